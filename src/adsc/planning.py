"""Which positions stay in which layer: the one place where this is decided."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, isqrt
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from .errors import InputError
from .layout import Layout, Positions
from .schedule import Schedule, survivors

Pattern = Literal["last", "first", "grid", "rows", "random"]
PATTERNS: tuple[str, ...] = get_args(Pattern)
GRIDS = ("grid", "rows")  # patterns that ask for the height and width of each span


@dataclass(frozen=True, eq=False)
class Stage:
    """The run of layers ``start`` … ``stop - 1``, all of which hold the same positions.

    Attributes
    ----------
    start, stop
        First decoder layer of the stage, and the one after its last.
    kept
        Original positions present, text and vision, sorted; read-only int64 array of shape ``(tokens,)``.
    spans
        Of each span the original positions that stay, sorted; read-only int64 arrays of shape ``(n_i,)``.
    """

    start: int
    stop: int
    kept: Positions
    spans: tuple[Positions, ...]

    @property
    def vision_tokens(self) -> int:
        """Vision tokens present in these layers."""
        return sum(len(span) for span in self.spans)


@dataclass(frozen=True, eq=False)
class Plan:
    """The kept positions of every stage of one row. Made by :func:`plan`.

    Attributes
    ----------
    layout, schedule, num_layers, pattern, seed
        What the plan was made from.
    stages
        Stage 0, which holds all tokens, and one stage per reduction; together they cover all layers.
    """

    layout: Layout
    schedule: Schedule
    num_layers: int
    pattern: str
    seed: int
    stages: tuple[Stage, ...]

    def stage(self, layer: int) -> Stage:
        """The stage that decoder layer ``layer`` belongs to."""
        if not 0 <= layer < self.num_layers:
            raise InputError(f"layer {layer} of a model with layers 0 to {self.num_layers - 1}")
        return next(stage for stage in self.stages if layer < stage.stop)

    def kept(self, layer: int) -> Positions:
        """Original positions present in ``layer``, text and vision: sorted, read-only, int64, shape ``(tokens,)``."""
        return self.stage(layer).kept

    def tokens_per_layer(self) -> list[int]:
        """Number of tokens in each layer, text and vision."""
        return [len(stage.kept) for stage in self.stages for _ in range(stage.start, stage.stop)]

    def vision_tokens_per_layer(self) -> list[int]:
        """Number of vision tokens in each layer."""
        return [stage.vision_tokens for stage in self.stages for _ in range(stage.start, stage.stop)]

    @property
    def retained(self) -> Fraction:
        """Average over layers of the vision tokens in that layer, over those of layer 0; 1 for a row without any."""
        if not self.layout.spans:
            return Fraction(1)
        return Fraction(sum(self.vision_tokens_per_layer()), self.num_layers * self.layout.vision_tokens)


def plan(
    spans: Layout | Iterable[tuple[int, int] | Sequence[int] | ArrayLike],
    length: int | None = None,
    schedule: Schedule | None = None,
    num_layers: int | None = None,
    pattern: str = "last",
    *,
    grids: Sequence[tuple[int, int] | None] | None = None,
    seed: int = 0,
) -> Plan:
    """Decide which positions of one row stay in which decoder layer.

    Of the n tokens of a span that enter a reduction with fraction f, m = max(1, ⌊n·f + 1/2⌋) stay, whatever else is
    in the row. Later reductions act on the survivors of earlier ones. Text always stays, and so does the last token
    of every span. Which others stay is the pattern's choice (indices into the survivors):

    ``last``
        The last of each of m even groups: ⌈(j+1)·n/m⌉ − 1 for j = 0 … m−1.
    ``first``
        The first of each of m even groups, ⌊j·n/m⌋ for j = 0 … m−2, and the last token of the span.
    ``grid``
        r evenly spaced rows crossed with c evenly spaced columns of the h × w survivors, both by the rule of ``last``.
        r is one of the two integers around h·√f, c the integer nearest to m/r (half up, at most w), or the same with
        rows and columns exchanged; the pair with r·c nearest to m is taken, then the one whose h/r and w/c are most
        alike, then the one with more columns. r·c is m only where it can be.
    ``rows``
        The same with as many columns as can be: r = ⌈h·f⌉, and c the integer nearest to m/r (half up, from 1 to w).
        What is written from left to right keeps its order.
    ``random``
        m−1 tokens drawn without replacement, and the last token of the span. The draw depends on the seed, n and the
        number of the reduction alone.

    Parameters
    ----------
    spans
        The vision tokens of each image or frame, as :class:`adsc.Layout` takes them, or a layout (then without
        ``length`` and ``grids``).
    length
        Number of positions of the row.
    schedule
        The reductions; required.
    num_layers
        Decoder layers of the model; required.
    pattern
        ``last``, ``first``, ``grid``, ``rows`` or ``random``.
    grids
        Height and width of each span, for the patterns ``grid`` and ``rows``.
    seed
        Seed of the pattern ``random``.

    Raises
    ------
    InputError
        For a layout that does not fit, layers that the model lacks, an unknown pattern, or one that lacks its grids.
    """
    if isinstance(spans, Layout):
        if length not in (None, spans.length) or grids is not None:
            raise InputError("length and grids are part of the layout; leave them out beside it")
        layout = spans
    elif length is None:
        raise InputError("a plan needs the length of the row")
    else:
        layout = Layout(length, spans, grids)
    if schedule is None or num_layers is None:
        raise InputError("a plan needs a schedule and the number of decoder layers")
    if not isinstance(schedule, Schedule):
        raise InputError(f"schedule {schedule!r} is not a Schedule; make one with Schedule.parse or for_budget")
    if seed < 0:
        raise InputError(f"seed {seed} must be a whole number of at least 0")
    if num_layers < 1:
        raise InputError(f"a model of {num_layers} layers; it must have at least 1")
    if pattern not in PATTERNS:
        raise InputError(f"pattern {pattern!r} is unknown; choose one of {', '.join(PATTERNS)}")
    if pattern in GRIDS and schedule.reductions and None in layout.grids:
        raise InputError(
            f"pattern {pattern!r} needs the grid of span {layout.grids.index(None)}; choose 'last' or give grids"
        )
    return _plan(layout, schedule.validate(num_layers), num_layers, pattern, seed)


@lru_cache(maxsize=64)
def _plan(layout: Layout, schedule: Schedule, num_layers: int, pattern: str, seed: int) -> Plan:
    keeps = tuple(keep for _, keep in schedule)
    chosen = [
        _choose(len(span), keeps, pattern, grid if pattern in GRIDS else None, seed)
        for span, grid in zip(layout.spans, layout.grids, strict=True)
    ]
    starts = [0, *(layer for layer, _ in schedule), num_layers]
    everything = np.arange(layout.length)
    stages = [Stage(0, starts[1], _frozen(everything), layout.spans)]
    for number in range(len(keeps)):
        spans = tuple(_frozen(span[indices[number]]) for span, indices in zip(layout.spans, chosen, strict=True))
        kept = np.sort(np.concatenate((layout.text, *spans)))
        stages.append(Stage(starts[number + 1], starts[number + 2], _frozen(kept), spans))
    return Plan(layout, schedule, num_layers, pattern, seed, tuple(stages))


@lru_cache(maxsize=1024)
def _choose(
    tokens: int, keeps: tuple[Fraction, ...], pattern: str, grid: tuple[int, int] | None, seed: int
) -> tuple[Positions, ...]:
    """Indices into a span of ``tokens`` that stay after each reduction."""
    alive = np.arange(tokens)
    result = []
    for number, keep in enumerate(keeps):
        n = len(alive)
        m = survivors(n, keep)
        if grid is not None:
            rows, columns = _whole_rows(*grid, m, keep) if pattern == "rows" else _rows_and_columns(*grid, m, keep)
            alive = alive.reshape(grid)[np.ix_(_last(grid[0], rows), _last(grid[1], columns))].ravel()
            grid = rows, columns
        elif pattern == "last":
            alive = alive[_last(n, m)]
        elif pattern == "first":
            alive = alive[np.append(np.arange(m - 1) * n // m, n - 1)]
        else:
            draw = np.random.default_rng((seed, number, n)).permutation(n - 1)[: m - 1]
            alive = alive[np.append(np.sort(draw), n - 1)]
        result.append(_frozen(alive))
    return tuple(result)


def _last(n: int, m: int) -> Positions:
    """The last index of each of m even groups of n."""
    indices: Positions = -(-np.arange(1, m + 1) * n // m) - 1  # ⌈x⌉ is −⌊−x⌋
    return indices


def _rows_and_columns(height: int, width: int, m: int, keep: Fraction) -> tuple[int, int]:
    """How many rows and columns of a grid stay, so that about m tokens do (see :func:`plan`)."""

    def pairs(long: int, other: int) -> Iterable[tuple[int, int]]:
        root = isqrt(long * long * keep.numerator // keep.denominator)
        for lines in {max(1, root), min(long, root + 1)}:
            yield lines, min(other, max(1, (2 * m + lines) // (2 * lines)))

    candidates = {*pairs(height, width), *((rows, columns) for columns, rows in pairs(width, height))}

    def rank(pair: tuple[int, int]) -> tuple[int, Fraction, int]:
        rows, columns = pair
        ratio = Fraction(height * columns, rows * width)
        return abs(rows * columns - m), max(ratio, 1 / ratio), -columns

    return min(candidates, key=rank)


def _whole_rows(height: int, width: int, m: int, keep: Fraction) -> tuple[int, int]:
    """The same for the pattern ``rows``."""
    rows = ceil(height * keep)
    return rows, max(1, min(width, (2 * m + rows) // (2 * rows)))


def _frozen(array: Positions) -> Positions:
    array.setflags(write=False)
    return array
