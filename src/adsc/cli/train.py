"""``adsc train``: teach a model to compress itself, as a recipe says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Debug, Json

EXAMPLE = (
    "adsc train recipes/pocket-elastic.yaml --dry-run"
    " · adsc train recipes/pocket-elastic.yaml --set training.max_steps=20 --set output=runs/short"
    " · accelerate launch --config_file recipes/accelerate/fsdp2.yaml --no_python"
    " adsc train recipes/llava-1.5-7b-66.7.yaml"
)


def command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train; see docs/training.md.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="In place of what the recipe says; may be given many times."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, FLOPs, memory and hours, and train nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on from the last checkpoint in the output folder.")
    ] = True,
    merge: Annotated[
        bool, typer.Option("--merge", help="Bake the adapter into the weights, in the folder merged of the output.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """Teach a model to compress itself: LoRA under a curriculum of budgets, as a recipe says.

    A killed run goes on where it was. The result is a folder that adsc.load and adsc run open.
    """
    from ..training.recipe import check_training, read

    asked = read(recipe, changes or ())
    for name in ("torchao", "torch.utils._pytree"):  # which talk when TRL loads them
        logging.getLogger(name).setLevel(logging.ERROR)
    check_training(asked, str(recipe))
    if dry_run:
        from ..hf.checkpoint import read_config
        from ..training.estimate import estimate
        from . import answering

        answering.quiet()
        report = estimate(asked, read_config(asked.model))
        if not as_json:
            _print(report, asked)
        return {"recipe": asked.model_dump(mode="json"), **report.to_dict()}

    from accelerate import PartialState

    from ..training.exporting import merge as bake
    from ..training.trainer import train

    outcome = train(asked, resume=resume)
    if not PartialState().is_main_process:
        raise typer.Exit
    if outcome.folder is None:
        typer.secho(f"stopped behind step {outcome.step} of {outcome.steps}; the same command goes on", err=True)
        raise KeyboardInterrupt
    merged = bake(outcome.folder, Path(asked.output) / "merged") if merge else None
    if not as_json:
        print(f"step {outcome.step} of {outcome.steps}: the adapter is in {outcome.folder}")
        if merged:
            print(f"with the adapter baked in: {merged}")
    return {
        "step": outcome.step,
        "steps": outcome.steps,
        "adapter": str(outcome.folder),
        "merged": merged and str(merged),
        "history": outcome.history,
    }


def _print(report: Any, recipe: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..report.tables import add_cost, si, side_by_side

    out = Console(highlight=False)
    steps = "steps not known (set training.max_steps)" if report.steps is None else f"{report.steps:,} steps"
    out.print(
        f"{recipe.model} → {recipe.output}\n"
        f"{report.trainable / 1e6:,.1f} million trained parameters beside {report.parameters / 1e6:,.1f} million\n"
        f"{steps} of {report.rows} rows, each of {report.vision_tokens} vision and "
        f"{report.length - report.vision_tokens} text tokens\n"
        f"curriculum {report.curriculum} to the schedule {report.schedule or '(none: dense)'} "
        f"(pattern {recipe.method.pattern}):\n",
        soft_wrap=True,
    )
    parts = Table("training", "schedule", "vision tokens", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for part in report.parts:
        parts.add_row(f"{100 * part.share:.1f} %", part.schedule or "dense", f"{part.vision_tokens:.1f}")
    out.print(parts, "")
    if report.unknown:
        out.print(f"FLOPs, memory and hours are not known: {report.unknown}", soft_wrap=True)
        return
    dense, reduced = report.dense, report.reduced
    table = side_by_side("")

    def add(label: str, one: float, other: float, unit: str) -> None:
        text = _duration if unit == "s" else lambda value: si(value, unit)
        if one:
            add_cost(table, label, text(one), text(other), other / one)
        elif other:
            table.add_row(label, "–", text(other), "")

    add("tokens of a row in a layer", dense.tokens, reduced.tokens, "")
    add("  vision tokens", dense.vision_tokens, reduced.vision_tokens, "")
    add("tokens of a step in a layer", report.rows * dense.tokens, report.rows * reduced.tokens, "")
    add("a step", dense.flops, reduced.flops, "FLOP")
    add("  student, forward and backward", dense.student_flops, reduced.student_flops, "FLOP")
    add("  teacher (distillation)", dense.teacher_flops, reduced.teacher_flops, "FLOP")
    add("memory of a GPU", dense.memory.total, reduced.memory.total, "B")
    add("  frozen weights", dense.memory.weights, reduced.memory.weights, "B")
    add("  what is trained, optimiser", dense.memory.trained, reduced.memory.trained, "B")
    add("  activations", dense.memory.activations, reduced.memory.activations, "B")
    add("  logits", dense.memory.logits, reduced.memory.logits, "B")
    where = f"on {report.gpus} x {report.gpu}"
    add(f"a step {where}", dense.seconds, reduced.seconds, "s")
    if report.steps is not None:
        add(f"all steps {where}", 3600 * dense.hours, 3600 * reduced.hours, "s")
    out.print(table)
    fits = "fits" if reduced.memory.total <= report.gpu_memory else "does NOT fit"
    out.print(
        f"\nReduced is the mean over the curriculum, its memory that of its heaviest schedule; it {fits} into the "
        f"{si(report.gpu_memory, 'B')} of one {report.gpu}, before the allocator's overhead. Times assume "
        f"{100 * report.utilisation:g} % of {si(report.gpu_flops, 'FLOP/s')} (estimate.utilisation).",
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"
