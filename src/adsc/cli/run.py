"""``adsc run``: one prompt about images, answered dense and reduced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .options import Debug, Json, Model, Pattern, Retain, ScheduleText, Seed

EXAMPLE = "adsc run --model llava-hf/llava-1.5-7b-hf --image photo.jpg --prompt 'What is on the table?' --retain 1/3"
RETAIN = "1/3"  # where neither an option nor the checkpoint says
ROUNDS, SECONDS = 11, 6.0  # the timing ends with whichever is reached first


def command(
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Image; once for each.")] = None,
    prompt: Annotated[str, typer.Option(help="The question.")] = "Describe the image.",
    model: Model = None,
    retain: Retain = None,
    schedule: ScheduleText = None,
    pattern: Pattern = None,
    positions: Annotated[
        str | None, typer.Option(help="Positions of kept tokens: original or compact.", show_default="original")
    ] = None,
    seed: Seed = None,
    only: Annotated[str | None, typer.Option(metavar="dense|reduced", help="Answer one way, without timing.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw kept tokens, answers and savings here.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Ask a model about images, dense and reduced side by side. A prompt may hold the model's image placeholders."""
    if only not in (None, "dense", "reduced"):
        raise InputError(f"--only {only!r} is unknown; choose dense or reduced")
    if only and picture:
        raise InputError("--picture compares dense with reduced; leave out --only")
    if not image:
        raise InputError("no image was given; add --image FILE, once for each image")
    from ..hf.images import open_image
    from ..report.picture import Exchange, check_target, draw
    from ..report.tables import describe

    if picture:
        check_target(picture)
    images = [open_image(path) for path in image]
    from rich.console import Console

    from ..config import ADSCConfig
    from ..hf.checkpoint import depth, read_config, read_reduction
    from ..schedule import Schedule
    from . import answering

    answering.quiet()
    name = model or str(answering.in_the_box())
    layers = depth(read_config(name))
    saved = read_reduction(name)
    changes = answering.changes(layers, retain, schedule, saved=saved, pattern=pattern, positions=positions, seed=seed)
    with Console(stderr=True).status(f"loading {model or 'the model in the box'}") as status:
        net, processor = answering.open_model(name, device, dtype)
        config = replace(saved or ADSCConfig(Schedule.for_budget(layers, RETAIN)), **changes)
        inputs = answering.build_inputs(net, processor, prompt, images)
        answers = {}
        for way, how in (("dense", None), ("reduced", config)):
            if only in (None, way):
                status.update(f"answering {way}")
                answers[way] = answering.answer(net, processor, inputs, how, max_new_tokens)
        savings = None
        if only is None:
            status.update("timing the two in turn")
            savings = answering.measure(net, inputs, config, ROUNDS, SECONDS)
    if savings and picture:
        draw(
            picture, answering.seen(processor, inputs, images), savings.plan,
            [Exchange(prompt, answers["dense"].text, answers["reduced"].text)], savings.bars(),
            f"Answered with {100 * float(savings.plan.retained):.0f} % of the vision tokens",
            describe(savings.plan),
        )  # fmt: skip
    if not as_json:
        _print(Console(highlight=False), answers, savings, picture)
    return {
        "model": name,
        "prompt": prompt,
        "images": [str(path) for path in image],
        "reduction": config.to_dict(),
        **{way: vars(each) for way, each in answers.items()},
        **(savings.to_dict() if savings else {}),
        "picture": picture and str(picture),
    }


def _print(console: Any, answers: dict[str, Any], savings: Any, picture: Path | None) -> None:
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    if len(answers) == 1:
        (each,) = answers.values()
        console.print(Text(each.text), soft_wrap=True)
        return
    panels = []
    for way, each in answers.items():
        panel = Panel(Text(each.text), title=way, width=(console.width - 1) // 2)
        panel.border_style = "blue" if way == "reduced" else "dim"
        panel.subtitle = f"{each.tokens} tokens"
        panels.append(panel)
    console.print(Columns(panels, padding=(0, 1)))
    savings.show(console)
    if picture:
        console.print(f"picture: {picture}", soft_wrap=True)
