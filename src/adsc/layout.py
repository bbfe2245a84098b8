"""Where the vision tokens of one row are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError

Positions = NDArray[np.int64]


@dataclass(frozen=True, eq=False, init=False)
class Layout:
    """One row: its length and its spans of vision tokens.

    A span is the vision tokens of one image, or of one video frame, in order. Markers inside a span are text and
    simply not among its positions.

    Parameters
    ----------
    length
        Number of positions of the row, padding not counted.
    spans
        One entry per image or frame, in order. A *tuple of two integers* is ``(start, stop)``, stop excluded; every
        other sequence (list, range, array) holds the positions themselves, strictly increasing. Spans share none.
    grids
        Height and width of each span's grid of tokens (row-major), or ``None`` where it is not a grid or unknown.

    Attributes
    ----------
    spans
        tuple of read-only int64 arrays of shape ``(n_i,)``.
    grids
        tuple of ``(height, width)`` or ``None``, one per span.

    Raises
    ------
    InputError
        For positions outside the row, not increasing or shared, empty spans, and grids that do not fit their span.
    """

    length: int
    spans: tuple[Positions, ...]
    grids: tuple[tuple[int, int] | None, ...]

    def __init__(
        self,
        length: int,
        spans: Iterable[tuple[int, int] | Sequence[int] | ArrayLike] = (),
        grids: Sequence[tuple[int, int] | None] | None = None,
    ) -> None:
        if not isinstance(length, Integral) or length < 1:
            raise InputError(f"the length of a row is {length}; it must be a whole number of at least 1")
        arrays = tuple(_positions(span, index, length) for index, span in enumerate(spans))
        if arrays and np.bincount(np.concatenate(arrays)).max() > 1:
            raise InputError("two spans share a position; every vision token belongs to exactly one span")
        checked: tuple[tuple[int, int] | None, ...] = (None,) * len(arrays)
        if grids is not None:
            checked = tuple(None if grid is None else (int(grid[0]), int(grid[1])) for grid in grids)
        if len(checked) != len(arrays):
            raise InputError(f"{len(checked)} grids for {len(arrays)} spans; give one (height, width) or None per span")
        for index, (span, grid) in enumerate(zip(arrays, checked, strict=True)):
            if grid is not None and (min(grid) < 1 or grid[0] * grid[1] != len(span)):
                raise InputError(f"span {index} has {len(span)} tokens, which is not a grid of {grid[0]} x {grid[1]}")
        object.__setattr__(self, "length", int(length))
        object.__setattr__(self, "spans", arrays)
        object.__setattr__(self, "grids", checked)

    @cached_property
    def text(self) -> Positions:
        """Positions that are not vision tokens, shape ``(length - vision_tokens,)``, read-only."""
        is_text = np.ones(self.length, dtype=bool)
        for span in self.spans:
            is_text[span] = False
        positions: Positions = np.flatnonzero(is_text)
        positions.setflags(write=False)
        return positions

    @property
    def vision_tokens(self) -> int:
        """Number of vision tokens in the row."""
        return sum(len(span) for span in self.spans)

    @cached_property
    def _key(self) -> tuple[object, ...]:
        return self.length, self.grids, tuple(span.tobytes() for span in self.spans)

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Layout) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        spans = ", ".join(f"{span[0]}..{span[-1]} ({len(span)})" for span in self.spans)
        return f"Layout(length={self.length}, spans=[{spans}])"


def _positions(span: tuple[int, int] | Sequence[int] | ArrayLike, index: int, length: int) -> Positions:
    if isinstance(span, tuple) and len(span) == 2 and all(isinstance(end, Integral) for end in span):
        array = np.arange(span[0], span[1], dtype=np.int64)
    else:
        raw = np.array(span)
        if raw.ndim != 1 or (raw.size and raw.dtype.kind not in "iu"):
            raise InputError(f"span {index} must be (start, stop) or a flat sequence of whole positions")
        array = raw.astype(np.int64)
    if array.size == 0:
        raise InputError(f"span {index} is empty; leave it out, or give at least one position")
    if array[0] < 0 or array[-1] >= length:
        raise InputError(f"span {index} covers {array[0]}..{array[-1]}, outside the row of {length} positions")
    if np.any(np.diff(array) <= 0):
        raise InputError(f"the positions of span {index} must be strictly increasing")
    array.setflags(write=False)
    return array
