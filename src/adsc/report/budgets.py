"""One picture of several budgets: answers dense, trained and untrained, and what each budget saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..planning import Plan
from .picture import (  # fmt: skip
    DENSE,
    HEADING,
    INK,
    MARGIN,
    PALE,
    REDUCED,
    RIGHT,
    SOFT,
    WIDTH,
    WRONG,
    check_target,
    draw_stage,
    save,
    title_stage,
)
from .tables import change

UNTRAINED = "#d97706"
LONGEST = 8  # characters of an answer
ROW, THUMBNAIL = 0.265, 1.75  # inches
COLUMNS = 6.3, 7.2, 9.98  # where dense, trained and untrained answers begin, in inches
STEP = 0.9


@dataclass(frozen=True)
class Budget:
    """One budget of a model: what stays, what it saves, and how many of its answers were right.

    Attributes
    ----------
    name
        As people write it: ``1/3``.
    plan
        The kept tokens.
    flops, kv
        Prefill FLOPs and bytes of the KV cache, reduced over dense.
    trained, untrained
        Right answers with the adapter and without.
    """

    name: str
    plan: Plan
    flops: float
    kv: float
    trained: int
    untrained: int


@dataclass(frozen=True)
class Asked:
    """A question with its right answer, and what was said dense and at each budget, with the adapter and without."""

    question: str
    truth: str
    dense: str
    trained: tuple[str, ...]
    untrained: tuple[str, ...]


Scene = tuple[Image.Image, Sequence[Asked]]


def draw(
    path: Path, scenes: Sequence[Scene], budgets: Sequence[Budget], dense: int, asked: int, title: str, subtitle: str
) -> None:
    """Write the picture as PNG, all of it or nothing.

    Parameters
    ----------
    path
        Where to.
    scenes
        Images, as the model sees them, with questions; each answer in the order of ``budgets``.
    budgets
        The largest first.
    dense, asked
        Right answers of the dense model, and how many questions were counted.
    title, subtitle
        Two lines above it all.

    Raises
    ------
    InputError
        When the file cannot be written.
    """
    check_target(path)
    save(compose(scenes, budgets, dense, asked, title, subtitle), path)


def compose(
    scenes: Sequence[Scene], budgets: Sequence[Budget], dense: int, asked: int, title: str, subtitle: str
) -> Figure:
    """The figure that :func:`draw` saves."""
    talls = [max(THUMBNAIL, ROW * len(rows)) + 0.2 for _, rows in scenes]
    charts, smallest = 3.1, budgets[-1]
    stages = smallest.plan.stages
    panel = min(1.85, (WIDTH - 2 * MARGIN) / len(stages) - 0.15)
    height = 1.15 + charts + 1.1 + panel + 0.75 + sum(talls) + 0.2
    figure = Figure(figsize=(WIDTH, height), dpi=130, facecolor="white")
    figure.text(MARGIN / WIDTH, 1 - 0.5 / height, title, size=17, weight="bold", color=INK)
    figure.text(MARGIN / WIDTH, 1 - 0.82 / height, subtitle, size=10.5, color=SOFT)

    def axes(left: float, above: float, width: float, tall: float) -> Axes:
        """Axes by their distance from the left and upper edge and their size, all in inches."""
        return figure.add_axes((left / WIDTH, 1 - (above + tall) / height, width / WIDTH, tall / height))

    _draw_right(axes(MARGIN, 1.15, 7.4, charts), budgets, dense, asked)
    _draw_saved(axes(8.4, 1.15, WIDTH - MARGIN - 8.4, charts), budgets)
    top = 1.15 + charts + 0.3
    box = axes(MARGIN, top, WIDTH - 2 * MARGIN, 0.3)
    box.axis("off")
    box.text(0, 0.5, f"The vision tokens that stay at {smallest.name}, of the first image", **HEADING)
    step = (WIDTH - 2 * MARGIN - panel) / max(1, len(stages) - 1)
    for column, stage in enumerate(stages):
        left = MARGIN + column * step
        title_stage(axes(left, top + 0.3, panel, 0.45), stage)
        kept = np.isin(smallest.plan.layout.spans[0], stage.spans[0])
        draw_stage(axes(left, top + 0.8, panel, panel), scenes[0][0], smallest.plan.layout.grids[0], kept)
    top += 0.8 + panel + 0.25
    _head(axes(0, top, WIDTH, 0.5), budgets)
    top += 0.55
    for (image, rows), tall in zip(scenes, talls, strict=True):
        _draw_scene(axes(0, top, WIDTH, tall), rows, tall)
        thumbnail = axes(MARGIN, top + 0.08, THUMBNAIL, THUMBNAIL)
        draw_stage(thumbnail, image, None, np.ones(1, dtype=bool))
        top += tall
    return figure


def _draw_right(box: Axes, budgets: Sequence[Budget], dense: int, asked: int) -> None:
    """Right answers in percent, as bars: dense, then each budget, trained beside untrained."""
    bars = [(0.0, dense, DENSE)]
    for place, each in enumerate(budgets, start=1):
        bars += [(place - 0.2, each.trained, REDUCED), (place + 0.2, each.untrained, UNTRAINED)]
    box.bar([x for x, _, _ in bars], [100 * right / asked for _, right, _ in bars], 0.37, color=[c for *_, c in bars])
    for x, right, color in bars:
        share = 100 * right / asked
        box.text(x, share + 1.5, f"{share:.0f} %", ha="center", size=10, weight="bold", color=color)
    names = ["all vision tokens", *(f"{each.name} of them" for each in budgets)]
    box.set_xticks(range(len(names)), names, size=10, color=INK)
    box.set_xlim(-0.5, len(budgets) + 0.5)
    box.set_ylim(0, 128)
    box.set_yticks([])
    box.tick_params(length=0)
    for side, spine in box.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALE)
    box.text(0, 0.985, f"Right answers to {asked} questions", transform=box.transAxes, va="top", **HEADING)
    places = 0.0, 0.11, 0.43
    said = "dense", "trained (one adapter)", "the same schedules, untrained"
    for x, name, color in zip(places, said, (DENSE, REDUCED, UNTRAINED), strict=True):
        box.text(x, 0.885, name, transform=box.transAxes, va="top", size=10, weight="bold", color=color)


def _draw_saved(box: Axes, budgets: Sequence[Budget]) -> None:
    """For each budget two bars; dense is the full width, reduced what is left of it."""
    box.set_xlim(0, 1)
    box.set_ylim(0.42 + 0.9 * len(budgets), 0)
    box.axis("off")
    box.text(0, 0.12, "What each budget leaves of the cost", **HEADING)
    for row, each in enumerate(budgets):
        above = 0.42 + 0.9 * row
        box.text(0, above + 0.16, f"{each.name} of the vision tokens", size=10, color=SOFT)
        for y, name, ratio in ((above + 0.37, "prefill FLOPs", each.flops), (above + 0.67, "KV cache", each.kv)):
            box.barh(y, 1, 0.25, color=DENSE)
            box.barh(y, min(ratio, 1), 0.25, color=REDUCED)
            text: dict[str, Any] = {"size": 9, "color": "white", "weight": "bold", "va": "center"}
            box.text(0.985, y + 0.02, f"{name} {change(ratio)}", ha="right", **text)


def _head(box: Axes, budgets: Sequence[Budget]) -> None:
    box.set_xlim(0, WIDTH)
    box.set_ylim(0.5, 0)
    box.axis("off")
    left = MARGIN + THUMBNAIL + 0.25
    heads = (left, "Question", INK), (COLUMNS[0], "Dense", DENSE), (COLUMNS[1], "Trained", REDUCED)
    for x, name, color in (*heads, (COLUMNS[2], "Untrained", UNTRAINED)):
        box.text(x, 0.2, name, **{**HEADING, "color": color})
    for start in COLUMNS[1:]:
        for column, each in enumerate(budgets):
            box.text(start + STEP * column, 0.44, each.name, size=10, color=SOFT)


def _draw_scene(box: Axes, rows: Sequence[Asked], tall: float) -> None:
    box.set_xlim(0, WIDTH)
    box.set_ylim(tall, 0)  # in inches, downwards
    box.axis("off")
    left = MARGIN + THUMBNAIL + 0.25
    for number, row in enumerate(rows):
        y = 0.02 + ROW * number
        box.plot([left, WIDTH - MARGIN], [y, y], color=PALE, linewidth=0.8)
        box.text(left, y + 0.185, f"{row.question} → {row.truth}", size=9.2, color=INK, parse_math=False)
        places = [COLUMNS[0], *(start + STEP * i for start in COLUMNS[1:] for i in range(len(row.trained)))]
        for x, said in zip(places, (row.dense, *row.trained, *row.untrained), strict=True):
            mark, color = ("✓", RIGHT) if said == row.truth else ("✗", WRONG)
            box.text(x, y + 0.185, mark, size=10, weight="bold", color=color)
            shown = said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"
            shown = shown.replace("\n", " ") or "(nothing)"
            box.text(x + 0.2, y + 0.185, shown, size=9, color=INK if said == row.truth else WRONG, parse_math=False)
