"""One picture of the curricula: which part of the vision tokens each layer holds while a model is trained.

python -m adsc.report.curricula docs/curricula.png
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..planning import plan
from ..schedule import Schedule
from ..training.curriculum import KINDS, Curriculum
from .picture import HEADING, INK, PALE, REDUCED, SOFT, check_target

# The model in the box: 24 layers, 256 vision tokens of an image.
LAYERS, TOKENS = 24, 256
TARGET = Schedule.parse("6:1/2,9:1/4,11:1/8")  # retained 1/3
BUDGETS = {
    "1": "",
    "2/3": "12:1/3",
    "1/2": "10:1/4,12:1/2",
    "1/3": str(TARGET),
    "2/9": "2:1/2,8:1/4,10:1/32",
    "1/9": "1:1/4,5:1/2,9:1/8,11:1/4",
    "1/18": "1:1/16,4:1/2,6:1/8",
}
COLUMNS = 240  # moments of the training, and 4 rounds of batches for elastic
WORDS = {
    "constant": "the target throughout",
    "light_to_heavy": "fractions fall from 1",
    "heavy_to_light": "fractions rise from f²",
    "deep_to_shallow": "layers move forward",
    "elastic": "a budget for each batch",
}


def vision_tokens(kind: str) -> NDArray[np.int64]:
    """Vision tokens in each layer at each moment, ``(layers, columns)``; for elastic batch by batch."""
    budgets = [Schedule.parse(text) for text in BUDGETS.values()]
    curriculum = Curriculum(kind, TARGET, LAYERS, budgets=budgets)
    if kind == "elastic":
        schedules = [curriculum.schedule(0, draw) for draw in range(4 * len(budgets))]
    else:
        schedules = [curriculum.schedule(Fraction(column, COLUMNS)) for column in range(COLUMNS)]
    rows = [plan([(0, TOKENS)], TOKENS, each, LAYERS).vision_tokens_per_layer() for each in schedules]
    held: NDArray[np.int64] = np.stack([np.array(row) for row in rows], axis=1)
    return held


def compose() -> Figure:
    """The figure that :func:`draw` saves."""
    figure = Figure(figsize=(13, 3.7), dpi=130, facecolor="white")
    colors = LinearSegmentedColormap.from_list("kept", [PALE, "#bfd3fa", REDUCED, "#172554"])
    image = None
    for index, kind in enumerate(KINDS):
        box = figure.add_axes((0.045 + 0.178 * index, 0.2, 0.158, 0.56))
        held = vision_tokens(kind)
        image = box.imshow(
            held, cmap=colors, norm=LogNorm(1, TOKENS), aspect="auto", interpolation="nearest",
            extent=(0, 1 if kind != "elastic" else held.shape[1], LAYERS, 0),
        )  # fmt: skip
        _label(box, kind, first=index == 0)
    bar = figure.add_axes((0.938, 0.2, 0.012, 0.56))
    ticks = [2**power for power in range(9)]
    assert image is not None
    legend = figure.colorbar(image, cax=bar, ticks=ticks, format="%d")
    legend.outline.set_visible(False)
    bar.minorticks_off()
    bar.tick_params(length=0, labelsize=8.5, colors=SOFT)
    figure.text(0.985, 0.48, "vision tokens in the layer", rotation=270, va="center", ha="right", size=9, color=SOFT)
    return figure


def _label(box: Axes, kind: str, first: bool) -> None:
    box.text(0, 1.19, kind, transform=box.transAxes, **HEADING)
    box.text(0, 1.07, WORDS[kind], transform=box.transAxes, size=9.5, color=SOFT)
    if kind == "elastic":
        box.set_xticks([0, 7, 14, 21, 28])
    else:
        box.set_xticks([0, 0.3, 0.6, 1], ["0", "0.3", "0.6", "1"])
    box.set_xlabel("batch" if kind == "elastic" else "part of the training", size=9, color=SOFT)
    box.set_yticks([0.5, 4.5, 8.5, 12.5, 16.5, 23.5], ["0", "4", "8", "12", "16", "23"] if first else [""] * 6)
    if first:
        box.set_ylabel("decoder layer", size=9, color=INK)
    for spine in box.spines.values():
        spine.set_visible(False)
    box.tick_params(length=0, labelsize=8.5, colors=SOFT)


def draw(path: Path) -> None:
    """Write the picture as PNG."""
    check_target(path)
    compose().savefig(path, format="png", metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
