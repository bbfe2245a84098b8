"""``adsc demo``: the model in the box answers questions about a stored scene, dense and reduced."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .options import Debug, Json, Pattern, Retain, ScheduleText, Seed

EXAMPLE = "adsc demo --retain 1/4 --out demo.png"
RETAIN = "1/3"  # where neither --retain nor --schedule is given
IMAGE = 1  # of the stored test split
ROUNDS, SECONDS = 21, 10.0  # the timing ends with whichever is reached first
MAX_NEW_TOKENS = 16
VISION_TOKENS = 256  # of an image, in the model in the box


def command(
    retain: Retain = None,
    schedule: ScheduleText = None,
    pattern: Pattern = None,
    seed: Seed = None,
    image_index: Annotated[int, typer.Option(metavar="N", help="Image of the test split to ask about.")] = IMAGE,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where the picture goes.")] = Path("adsc_demo.png"),
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Ask the model in the box about a test scene, dense and reduced, and draw what was saved. Needs no network."""
    from rich.console import Console

    from ..config import ADSCConfig
    from ..hf.checkpoint import depth, read_config
    from ..pocket import MODEL_FOLDER
    from ..report.picture import Exchange, check_target, draw
    from ..report.tables import describe
    from ..schedule import Schedule

    check_target(out)
    from . import answering

    answering.quiet()
    image, questions = _scene(image_index)
    layers = depth(read_config(str(MODEL_FOLDER)))
    changes = answering.changes(layers, retain, schedule, VISION_TOKENS, pattern=pattern, seed=seed)
    config = ADSCConfig(**{"schedule": Schedule.for_budget(layers, RETAIN, VISION_TOKENS), **changes})
    with Console(stderr=True).status("loading the model in the box") as status:
        model, processor, _ = answering.open_model(str(MODEL_FOLDER))
        asked = []
        for question in questions:
            status.update(f"asking: {question.text}")
            inputs = answering.build_inputs(model, processor, question.text, [image])
            dense = answering.answer(model, processor, inputs, None, MAX_NEW_TOKENS).text
            reduced = answering.answer(model, processor, inputs, config, MAX_NEW_TOKENS).text
            asked.append(Exchange(question.text, dense, reduced, question.answer))
        status.update("timing the two in turn")
        savings = answering.measure(model, inputs, config, ROUNDS, SECONDS)

    right = {way: sum(getattr(each, way) == each.truth for each in asked) for way in ("dense", "reduced")}
    summary = (
        f"{right['reduced']} of {len(asked)} answers right with {100 * float(savings.plan.retained):.0f} % "
        f"of the vision tokens, {right['dense']} of {len(asked)} with all of them"
    )
    draw(
        out, answering.seen(processor, inputs, [image]), savings.plan, asked, savings.bars(),
        summary, describe(savings.plan),
    )  # fmt: skip
    if not as_json:
        console = Console(highlight=False)
        _print(console, image_index, [question.task for question in questions], asked)
        savings.show(console)
        console.print(f"{summary}\npicture: {out}", soft_wrap=True)
    return {
        "image_index": image_index,
        "reduction": config.to_dict(),
        "questions": [
            {"task": question.task, "question": each.question, "answer": each.truth, "dense": each.dense}
            | {"reduced": each.reduced}
            for question, each in zip(questions, asked, strict=True)
        ],
        "right": right,
        **savings.to_dict(),
        "picture": str(out),
    }


def _scene(index: int) -> tuple[Any, list[Any]]:
    """A stored test image and one question about it for each task that has any."""
    from ..pocket.questions import TASKS
    from ..pocket.splits import stored_image, stored_questions

    everything = stored_questions()
    found = {question.task: question for number, question in reversed(everything) if number == index}
    if not found:
        raise InputError(f"no test question is about image {index}; give one of 0 to {everything[-1][0]}")
    return stored_image(index), [found[task] for task in TASKS if task in found]


def _print(console: Any, index: int, tasks: list[str], asked: list[Any]) -> None:
    from ..report.tables import side_by_side, verdict

    table = side_by_side("task", "question", "right answer")
    for task, each in zip(tasks, asked, strict=True):
        dense, reduced = verdict(each.dense, each.truth), verdict(each.reduced, each.truth)
        table.add_row(task, each.question, each.truth, dense, reduced)
    console.print(f"test image {index}\n")
    console.print(table, "")
