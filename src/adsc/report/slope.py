"""One picture of the main table: how quality falls with the vision tokens that are left, untrained and trained.

python -m adsc.report.slope results/pocket/main.json results/pocket/slope.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ..errors import InputError
from .picture import DENSE, HEADING, INK, PALE, REDUCED, SOFT, check_target

GROUPS = ("grounding", "reading", "counting", "attribute", "relation", "difficult")  # small, beside overall
LINES = {"untrained": ("reduced, untrained", DENSE, "s"), "adsc": ("ADSC, trained", REDUCED, "o")}


def compose(rows: Sequence[dict[str, Any]]) -> Figure:
    """The figure that :func:`draw` saves.

    Parameters
    ----------
    rows
        Of the table that ``python -m adsc.pocket.study table`` writes.
    """
    groups = [group for group in GROUPS if any(group in row["of dense"] for row in rows)]
    lowest = min(
        mean["mean"] - mean["margin_95"]
        for row in rows
        if row["name"] in LINES
        for group, mean in row["of dense"].items()
        if group in ("overall", *groups)
    )
    figure = Figure(figsize=(8.6, 4.5), dpi=163, facecolor="white")
    box = figure.add_axes((0.075, 0.14, 0.375, 0.65))
    _panel(box, rows, "overall", lowest, large=True)
    for index, group in enumerate(groups):
        row, column = divmod(index, 3)
        _panel(figure.add_axes((0.53 + 0.16 * column, 0.505 - 0.365 * row, 0.14, 0.285)), rows, group, lowest)
        if column:
            figure.axes[-1].set_yticklabels([])
        if row == 0 and len(groups) > 3:
            figure.axes[-1].set_xticklabels([])
    figure.text(0.02, 0.945, "Quality left when vision tokens go", **{**HEADING, "size": 13})
    figure.text(
        0.02, 0.895, "right answers, in % of the dense model with the same extra training; bars: 95 % intervals",
        size=9, color=SOFT,
    )  # fmt: skip
    figure.text(0.26, 0.03, "vision tokens left, average over layers", ha="center", size=9, color=SOFT)
    figure.text(0.75, 0.03, "vision tokens left, average over layers", ha="center", size=9, color=SOFT)
    return figure


def _panel(box: Axes, rows: Sequence[dict[str, Any]], group: str, lowest: float, large: bool = False) -> None:
    box.axhline(100, color=INK, lw=0.8, ls=(0, (4, 3)), zorder=1)
    for name, (label, color, marker) in LINES.items():
        points = sorted((row["share"], row["of dense"][group]) for row in rows
                        if row["name"] == name and group in row["of dense"])  # fmt: skip
        if not points:
            continue
        shares, means = [share for share, _ in points], [100 * mean["mean"] for _, mean in points]
        margins = [100 * mean["margin_95"] for _, mean in points]
        box.errorbar(
            shares, means, margins, color=color, marker=marker, ms=5.5 if large else 3.2, lw=2 if large else 1.4,
            elinewidth=1.2 if large else 0.9, capsize=2.5 if large else 1.5, label=label, zorder=3,
        )  # fmt: skip
        if large and name == "adsc":
            for share, mean in zip(shares, means, strict=True):
                box.annotate(f"{mean:.1f}", (share, mean), (0, -15), textcoords="offset points", ha="center",
                             size=8.5, color=color, weight="bold")  # fmt: skip
    if large:
        goals = sorted((row["share"], 100 * row["goal"]["of dense"]) for row in rows if "goal" in row)
        if goals:
            box.plot(*zip(*goals, strict=True), ls="none", marker="_", ms=15, mew=1.6, color=INK, zorder=4)
        handles = [
            Line2D([], [], color=color, marker=marker, lw=2, label=label)
            for name, (label, color, marker) in LINES.items()
            if any(row["name"] == name for row in rows)
        ]
        if goals:
            handles.append(Line2D([], [], color=INK, marker="_", ms=12, mew=1.6, ls="none", label="goal, trained"))
        box.legend(handles=handles, loc="lower left", frameon=False, fontsize=9, labelcolor=INK, handlelength=1.8)
    box.set_title(group, loc="left", pad=5 if large else 3, **{**HEADING, "size": 11 if large else 9})
    # From all tokens on the left to few on the right, each budget as far from the next as the number of tokens is.
    box.set_xscale("log")
    ticks = {1.0: "all", 1 / 3: "1/3", 2 / 9: "2/9", 1 / 9: "1/9", 1 / 18: "1/18"}
    shown = ticks if large else {at: text for at, text in ticks.items() if text != "2/9"}
    box.set_xticks(list(shown), list(shown.values()))
    box.xaxis.set_minor_locator(NullLocator())
    box.set_xlim(1.15, 1 / 21)
    bottom = max(0.0, 100 * lowest - 4)
    step = next(step for step in (1, 2, 5, 10, 20, 25) if (100 - bottom) / step <= 5 or step == 25)
    heights = [height for height in range(100, -1, -step) if height >= bottom]
    box.set_yticks(heights, [f"{height} %" for height in heights])
    box.set_ylim(bottom, 100 + (100 - bottom) / 25)
    box.grid(axis="y", color=PALE, lw=0.8)
    box.set_axisbelow(True)
    for side in ("top", "right", "left"):
        box.spines[side].set_visible(False)
    box.spines["bottom"].set_color(PALE)
    box.tick_params(length=0, labelsize=8.5 if large else 7.5, colors=SOFT)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a main table that have a ratio to dense.

    Raises
    ------
    InputError
        When there is no such table, or no row of it has.
    """
    try:
        rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if "of dense" in row]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no main table ({error}); make it with python -m adsc.pocket.study table") from None
    if not any(row["name"] in LINES for row in rows):
        raise InputError(f"{path} has no ratios to the dense model yet; predict with the dense control first")
    return rows


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the picture as PNG."""
    check_target(path)
    compose(rows).savefig(path, format="png", metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[2]), read_rows(Path(sys.argv[1])))
