"""One picture of a reduction: which tokens stayed in each stage, what was answered dense and reduced, what it saved."""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from ..errors import InputError
from ..planning import Plan, Stage
from .tables import change

DENSE, REDUCED, RIGHT, WRONG, INK, SOFT, PALE = (
    "#9aa3af", "#2563eb", "#16a34a", "#dc2626", "#1f2937", "#4b5563", "#e5e7eb"
)  # fmt: skip
WIDTH, MARGIN = 13.0, 0.4  # inches
LINE = 0.2  # height of a line of text, in inches
HEADING: dict[str, Any] = {"size": 11.5, "weight": "bold", "color": INK}
MOST_IMAGES = 4
MOST_LINES = 12  # of one answer


@dataclass(frozen=True)
class Exchange:
    """A question with its dense and its reduced answer, and the right one where it is known."""

    question: str
    dense: str
    reduced: str
    truth: str | None = None


@dataclass(frozen=True)
class Bar:
    """A cost, dense and reduced, as text with unit, and reduced over dense."""

    name: str
    dense: str
    reduced: str
    ratio: float


def check_target(path: Path) -> None:
    """Refuse a path that :func:`draw` could not write to, before any work is done.

    Raises
    ------
    InputError
        When it does not end in ``.png``, is a folder, or its folder is missing or read-only.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"picture {path}: the name must end in .png")
    if path.is_dir():
        raise InputError(f"picture {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise InputError(f"picture {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"picture {path}: the folder {path.parent} is not writable")


def draw(
    path: Path,
    images: Sequence[Image.Image],
    plan: Plan,
    exchanges: Sequence[Exchange],
    bars: Sequence[Bar],
    title: str,
    subtitle: str,
) -> None:
    """Write the picture as PNG, all of it or nothing.

    Parameters
    ----------
    path
        Where to.
    images
        One for each span of the plan, as the model sees them.
    plan
        The kept tokens.
    exchanges
        Questions and answers.
    bars
        Costs, each drawn relative to its dense one.
    title, subtitle
        Two lines above it all.

    Raises
    ------
    InputError
        When the file cannot be written.
    """
    check_target(path)
    save(compose(images, plan, exchanges, bars, title, subtitle), path)


def compose(
    images: Sequence[Image.Image],
    plan: Plan,
    exchanges: Sequence[Exchange],
    bars: Sequence[Bar],
    title: str,
    subtitle: str,
) -> Figure:
    """The figure that :func:`draw` saves."""
    shown = list(images[:MOST_IMAGES])
    if len(shown) < len(images):
        subtitle += f"; the first {MOST_IMAGES} of {len(images)} images"
    rows = [_Row(exchange) for exchange in exchanges]
    stages = len(plan.stages)
    panel = min(3.2, (WIDTH - 2 * MARGIN) / stages - 0.15)
    sizes = [grid or image.size[::-1] for grid, image in zip(plan.layout.grids, shown, strict=False)]
    talls = [panel * min(1.0, height / width) for height, width in sizes]
    top, panels = 1.05, sum(talls) + 0.12 * len(talls) + 0.8
    lower = max(1.75 + 0.5 * len(bars), 0.45 + sum(row.inches for row in rows))
    height = top + panels + lower + 0.3
    figure = Figure(figsize=(WIDTH, height), dpi=130, facecolor="white")
    figure.text(MARGIN / WIDTH, 1 - 0.5 / height, title, size=17, weight="bold", color=INK)
    figure.text(MARGIN / WIDTH, 1 - 0.82 / height, subtitle, size=10.5, color=SOFT)

    def axes(left: float, above: float, width: float, tall: float) -> Axes:
        """Axes by their distance from the left and upper edge and their size, all in inches."""
        return figure.add_axes((left / WIDTH, 1 - (above + tall) / height, width / WIDTH, tall / height))

    step = (WIDTH - 2 * MARGIN - panel) / max(1, stages - 1)
    for column, stage in enumerate(plan.stages):
        left = MARGIN + column * step
        title_stage(axes(left, top, panel, 0.45), stage)
        for row, (image, tall) in enumerate(zip(shown, talls, strict=True)):
            box = axes(left, top + 0.5 + sum(talls[:row]) + 0.12 * row, panel, tall)
            draw_stage(box, image, plan.layout.grids[row], np.isin(plan.layout.spans[row], stage.spans[row]))
    _draw_answers(axes(MARGIN, top + panels, 7.4, lower), rows, lower)
    left, width = 8.4, WIDTH - MARGIN - 8.4
    _draw_tokens(axes(left, top + panels + 0.32, width, 0.85), plan)
    _draw_bars(axes(left, top + panels + 1.65, width, 0.5 * len(bars)), bars)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, all of it or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # an answer in a script that the font lacks
            figure.savefig(partial, format="png")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"picture {path} cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def title_stage(box: Axes, stage: Stage) -> None:
    """The layers of a stage, and how many vision tokens it holds."""
    box.axis("off")
    last, count = stage.stop - 1, stage.vision_tokens
    box.text(0, 0.62, f"layer {last}" if stage.start == last else f"layers {stage.start}–{last}", **HEADING)
    tokens = f"{'all ' if stage.start == 0 else ''}{count} vision token{'s' if count != 1 else ''}"
    box.text(0, 0.12, tokens, size=10, color=SOFT if stage.start == 0 else REDUCED)


def draw_stage(box: Axes, image: Image.Image, grid: tuple[int, int] | None, kept: NDArray[np.bool_]) -> None:
    """The image with the patches of dropped tokens faded; where there is no grid, tokens in order, row by row."""
    box.set_xticks([])
    box.set_yticks([])
    box.set_anchor("NW")
    for spine in box.spines.values():
        spine.set_color(PALE)
    if grid is not None:
        box.imshow(faded(image, kept.reshape(grid)))
    elif kept.all():
        box.imshow(image)
    else:
        side = math.ceil(math.sqrt(len(kept)))
        tokens = np.full((side, side, 3), 255, dtype=np.uint8)
        tokens.reshape(-1, 3)[: len(kept)] = np.where(kept[:, None], _rgb(REDUCED), _rgb(PALE))
        box.imshow(tokens, interpolation="nearest")


def faded(image: Image.Image, kept: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image, with the patches whose token was dropped washed out and those that stay outlined.

    Parameters
    ----------
    image
        Any size.
    kept
        ``(rows, columns)`` of the grid of tokens.

    Returns
    -------
    ``(rows * k, columns * k, 3)``, k pixels a patch.
    """
    rows, columns = kept.shape
    k = max(8, 640 // max(rows, columns))
    resized = image.convert("RGB").resize((columns * k, rows * k), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float32)
    if kept.all():
        return pixels.astype(np.uint8)
    mask = np.kron(kept, np.ones((k, k), dtype=bool))
    washed = 255 - 0.22 * (255 - pixels.mean(axis=2, keepdims=True))
    line = max(1, k // 12)
    border = np.pad(mask, line)
    inner = [np.roll(border, (y, x), (0, 1)) for y in (-line, 0, line) for x in (-line, 0, line)]
    outline = mask & ~np.logical_and.reduce(inner)[line:-line, line:-line]
    result = np.where(mask[..., None], pixels, washed)
    return np.where(outline[..., None], _rgb(REDUCED), result).astype(np.uint8)


def _rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


class _Row:
    """One exchange, wrapped into lines."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        truth = "" if exchange.truth is None else f" → {exchange.truth}"
        self.question = _wrap(exchange.question + truth, 38)
        self.dense, self.reduced = _wrap(exchange.dense, 21), _wrap(exchange.reduced, 21)
        self.inches = LINE * max(len(self.question), len(self.dense), len(self.reduced)) + 0.16


def _wrap(text: str, width: int) -> list[str]:
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width)] or ["(nothing)"]
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "…"]


def _draw_answers(box: Axes, rows: Sequence[_Row], tall: float) -> None:
    box.set_xlim(0, 1)
    box.set_ylim(tall, 0)  # in inches, downwards
    box.axis("off")
    columns = 0.0, 0.45, 0.73
    for x, name, color in zip(columns, ("Question", "Dense", "Reduced"), (INK, DENSE, REDUCED), strict=True):
        box.text(x, 0.22, name, **{**HEADING, "color": color})
    y = 0.34
    for row in rows:
        box.axhline(y, color=PALE, linewidth=0.8)
        said, truth = (None, row.exchange.dense, row.exchange.reduced), row.exchange.truth
        for x, lines, answer in zip(columns, (row.question, row.dense, row.reduced), said, strict=True):
            if answer is not None and truth is not None:
                mark, color = ("✓", RIGHT) if answer == truth else ("✗", WRONG)
                box.text(x, y + 0.22, mark, size=10.5, weight="bold", color=color)
                x += 0.03
            for number, line in enumerate(lines):
                box.text(x, y + 0.22 + LINE * number, line, size=10, color=INK, parse_math=False)
        y += row.inches


def _draw_tokens(box: Axes, plan: Plan) -> None:
    """Tokens of each layer, text included, as steps."""
    edges = np.arange(plan.num_layers + 1)
    box.stairs([plan.layout.length] * plan.num_layers, edges, color=DENSE, fill=True)
    box.stairs(plan.tokens_per_layer(), edges, color=REDUCED, fill=True)
    box.set_xlim(0, plan.num_layers)
    box.set_ylim(0, plan.layout.length)
    box.text(0, 1.12, "Tokens in each layer, text included", transform=box.transAxes, **HEADING)
    named = sorted({0, plan.num_layers - 1, *(stage.start for stage in plan.stages)})
    box.set_xticks([layer + 0.5 for layer in named], [str(layer) for layer in named])
    box.set_yticks([0, plan.layout.length])
    for spine in box.spines.values():
        spine.set_visible(False)
    box.tick_params(length=0, labelsize=8.5, colors=SOFT)


def _draw_bars(box: Axes, bars: Sequence[Bar]) -> None:
    """Dense is the full width, reduced what is left of it."""
    box.set_xlim(0, 1)
    box.set_ylim(len(bars), 0)
    box.axis("off")
    for y, bar in enumerate(bars):
        box.text(0, y + 0.36, bar.name.strip(), **{**HEADING, "size": 10})
        box.text(1, y + 0.36, f"{bar.dense} → {bar.reduced}", size=9.5, color=SOFT, ha="right")
        box.barh(y + 0.64, 1, 0.36, color=DENSE)
        box.barh(y + 0.64, min(bar.ratio, 1), 0.36, color=REDUCED)
        box.text(0.985, y + 0.66, change(bar.ratio), size=9, color="white", weight="bold", va="center", ha="right")
