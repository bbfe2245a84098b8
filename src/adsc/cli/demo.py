"""``adsc demo``: the model in the box answers questions about stored scenes, dense and reduced."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .options import Debug, Json, Pattern, Retain, ScheduleText, Seed

EXAMPLE = "adsc demo --retain 1/4 --out demo.png"
BUDGETS = "1/3", "2/9", "1/9"  # of the trained adapter
SCENES, SHOWN = 10, 3  # how many are asked about, and how many of them are shown
RETAIN = "1/3"  # without an adapter, where neither --retain nor --schedule is given
IMAGE = 1  # of the stored test split
ROUNDS, SECONDS = 21, 10.0  # the timing ends with whichever is reached first
MAX_NEW_TOKENS = 16
VISION_TOKENS = 256  # of an image, in the model in the box


def command(
    retain: Retain = None,
    schedule: ScheduleText = None,
    pattern: Pattern = None,
    seed: Seed = None,
    image_index: Annotated[int, typer.Option(metavar="N", help="Image of the test split to begin with.")] = IMAGE,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where the picture goes.")] = Path("adsc_demo.png"),
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Ask the model in the box about test scenes, dense and reduced, and draw what was saved. Needs no network.

    Without more: at three budgets, with its trained adapter and without. With --retain, --schedule or --pattern: that
    reduction, about one scene, with its time.
    """
    from ..hf.checkpoint import depth, read_config, read_reduction
    from ..pocket import ADAPTER_FOLDER
    from ..report.picture import check_target

    check_target(out)
    from . import answering

    answering.quiet()
    folder = str(answering.in_the_box())
    layers, saved = depth(read_config(folder)), read_reduction(folder)
    if folder == str(ADAPTER_FOLDER) and all(each is None for each in (retain, schedule, pattern, seed)):
        return _budgets(folder, layers, saved, image_index, out, as_json)
    changes = answering.changes(layers, retain, schedule, VISION_TOKENS, saved, pattern=pattern, seed=seed)
    return _reduction(folder, layers, saved, changes, image_index, out, as_json)


def _budgets(folder: str, layers: int, saved: Any, first: int, out: Path, as_json: bool) -> dict[str, Any]:
    """Dense, and at each budget trained and untrained: some scenes are shown, and more are counted."""
    from functools import partial

    from rich.console import Console

    from ..accounting import cost
    from ..methods import ADSC
    from ..report.budgets import Asked, Budget, draw
    from . import answering

    scenes = _scenes(first, SCENES)
    configs = {name: ADSC(**vars(saved)).for_budget(layers, name) for name in BUDGETS}
    with Console(stderr=True).status("loading the model in the box") as status:
        model, processor = answering.open_model(folder)
        asked: list[list[Asked]] = []
        for number, (index, image, questions) in enumerate(scenes, start=1):
            status.update(f"asking about image {index} ({number} of {len(scenes)})")
            texts = [question.text for question in questions]

            ask = partial(answering.answer_all, model, processor, image, texts, tokens=MAX_NEW_TOKENS)
            trained = zip(*map(ask, configs.values()), strict=True)
            with answering.untrained(model):
                dense, untrained = ask(None), zip(*map(ask, configs.values()), strict=True)
            asked.append(
                [
                    Asked(question.text, question.answer, *said)
                    for question, said in zip(questions, zip(dense, trained, untrained, strict=True), strict=True)
                ]
            )
        _, image, (question, *_) = scenes[0]
        inputs = answering.build_inputs(model, processor, question.text, [image])
        plans = {name: answering.plan_of(model, inputs, config) for name, config in configs.items()}
        pictures = [answering.seen(processor, inputs, [image])[0], *(image for _, image, _ in scenes[1:SHOWN])]
    ratios = {name: cost(model.config, plan=plan, dtype=model.dtype).ratios for name, plan in plans.items()}
    everything = [row for rows in asked for row in rows]
    dense_right = sum(row.dense == row.truth for row in everything)
    budgets = [
        Budget(
            name, plan, ratios[name]["prefill_flops"], ratios[name]["kv_bytes"],
            *(sum(getattr(row, way)[place] == row.truth for row in everything) for way in ("trained", "untrained")),
        )
        for place, (name, plan) in enumerate(plans.items())
    ]  # fmt: skip
    total, least = len(everything), budgets[-1]
    summary = (
        f"{least.trained} of {total} answers right with {least.name} of the vision tokens; "
        f"{dense_right} with all of them, {least.untrained} untrained"
    )
    subtitle = (
        f"The model in the box, its one adapter at {len(budgets)} budgets, and the same schedules without it; "
        f"{len(scenes)} test images"
    )
    draw(out, list(zip(pictures, asked, strict=False)), budgets, dense_right, total, summary, subtitle)
    if not as_json:
        console = Console(highlight=False)
        for (index, *_), rows in zip(scenes[:SHOWN], asked, strict=False):
            _print_scene(console, index, rows)
        _print_budgets(console, budgets, dense_right, total)
        console.print(f"\n{summary}\npicture: {out}", soft_wrap=True)
    return {
        "images": [index for index, *_ in scenes],
        "questions": [
            {"image": index, "task": question.task, "question": row.question, "answer": row.truth, "dense": row.dense}
            | {way: dict(zip(configs, getattr(row, way), strict=True)) for way in ("trained", "untrained")}
            for (index, _, questions), rows in zip(scenes, asked, strict=True)
            for question, row in zip(questions, rows, strict=True)
        ],
        "asked": total,
        "right": {
            "dense": dense_right,
            "trained": {each.name: each.trained for each in budgets},
            "untrained": {each.name: each.untrained for each in budgets},
        },
        "budgets": {
            name: {
                "reduction": configs[name].to_dict(),
                "retained": float(plan.retained),
                "vision_tokens_per_layer": plan.vision_tokens_per_layer(),
                "ratios": ratios[name],
            }
            for name, plan in plans.items()
        },
        "picture": str(out),
    }


def _reduction(
    folder: str, layers: int, saved: Any, changes: dict[str, Any], index: int, out: Path, as_json: bool
) -> dict[str, Any]:
    """One scene, dense and at one reduction, with its time."""
    from dataclasses import replace

    from rich.console import Console

    from ..config import ADSCConfig
    from ..report.picture import Exchange, draw
    from ..report.tables import describe
    from ..schedule import Schedule
    from . import answering

    ((_, image, questions),) = _scenes(index, 1)
    config = replace(saved or ADSCConfig(Schedule.for_budget(layers, RETAIN, VISION_TOKENS)), **changes)
    with Console(stderr=True).status("loading the model in the box") as status:
        model, processor = answering.open_model(folder)
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
        _print(console, index, [question.task for question in questions], asked)
        savings.show(console)
        console.print(f"{summary}\npicture: {out}", soft_wrap=True)
    return {
        "image_index": index,
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


def _scenes(first: int, count: int) -> list[tuple[int, Any, list[Any]]]:
    """``count`` stored test images, one after another from ``first`` on, each with its number and one question for each
    task that has any."""
    from ..pocket.questions import TASKS
    from ..pocket.splits import stored_image, stored_questions

    found: dict[int, dict[str, Any]] = {}
    for number, question in stored_questions():
        found.setdefault(number, {}).setdefault(question.task, question)
    if first not in found:
        raise InputError(f"no test question is about image {first}; give one of 0 to {max(found)}")
    numbers = sorted(found)
    place = numbers.index(first)
    chosen = (numbers[place:] + numbers[:place])[:count]
    return [(n, stored_image(n), [found[n][task] for task in TASKS if task in found[n]]) for n in chosen]


def _print(console: Any, index: int, tasks: list[str], asked: list[Any]) -> None:
    from ..report.tables import side_by_side, verdict

    table = side_by_side("task", "question", "right answer")
    for task, each in zip(tasks, asked, strict=True):
        dense, reduced = verdict(each.dense, each.truth), verdict(each.reduced, each.truth)
        table.add_row(task, each.question, each.truth, dense, reduced)
    console.print(f"test image {index}\n")
    console.print(table, "")


def _print_scene(console: Any, index: int, rows: list[Any]) -> None:
    from rich.table import Table

    from ..report.tables import verdict

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("question")
    for name in ("dense", *BUDGETS):
        table.add_column(name, no_wrap=True)
    for name in BUDGETS:
        table.add_column(f"({name})", style="dim", no_wrap=True)
    for row in rows:
        cells = []
        for said in (row.dense, *row.trained, *row.untrained):
            cell = verdict(said, row.truth)
            cell.truncate(1 if said == row.truth else 8, overflow="ellipsis" if said != row.truth else "crop")
            cells.append(cell)  # a right answer stands beside the question already
        table.add_row(f"{row.question} → {row.truth}", *cells)
    console.print(f"test image {index}\n")
    console.print(table, "")


def _print_budgets(console: Any, budgets: list[Any], dense: int, total: int) -> None:
    from rich.table import Table

    from ..report.tables import change

    console.print("(in brackets: the same schedule without the adapter)\n")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("vision tokens")
    for name in (f"right of {total}", "untrained", "prefill FLOPs", "KV cache"):
        table.add_column(name, justify="right")
    table.add_row("all (dense)", f"{dense}", "", "", "")
    for each in budgets:
        costs = change(each.flops), change(each.kv)
        table.add_row(each.name, f"[bold blue]{each.trained}[/]", f"{each.untrained}", *costs)
    console.print(table)
