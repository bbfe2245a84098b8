"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None, typer.Option(help="Folder of a checkpoint or hub id.", show_default="the model in the box")
]
Retain = Annotated[
    str | None,
    typer.Option(metavar="FRACTION", help="Vision tokens retained, on average over all layers: 1/3, 0.25, …"),
]
ScheduleText = Annotated[
    str | None,
    typer.Option(
        "--schedule", metavar="LAYER:FRACTION,…", help="In place of --retain: where to reduce, and what part goes on."
    ),
]
Pattern = Annotated[
    str | None, typer.Option(help="Which tokens stay: last, first, grid, rows or random.", show_default="last")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the pattern random.", show_default="0")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
