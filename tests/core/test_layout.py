"""Layouts: what may be said about a row."""

from __future__ import annotations

import numpy as np
import pytest

from adsc import InputError, Layout


def test_spans_as_ranges_and_as_positions() -> None:
    layout = Layout(12, [(1, 4), [5, 7], np.array([8, 9]), range(10, 12)])
    assert [span.tolist() for span in layout.spans] == [[1, 2, 3], [5, 7], [8, 9], [10, 11]]
    assert layout.text.tolist() == [0, 4, 6]
    assert layout.vision_tokens == 9
    assert layout.grids == (None,) * 4


def test_layouts_are_values() -> None:
    first = Layout(9, [(1, 5)], [(2, 2)])
    assert first == Layout(9, [[1, 2, 3, 4]], [(2, 2)])
    assert hash(first) == hash(Layout(9, [[1, 2, 3, 4]], [(2, 2)]))
    assert first not in (Layout(9, [(1, 5)]), Layout(9, [(2, 6)], [(2, 2)]), Layout(8, [(1, 5)], [(2, 2)]))
    assert first != Layout(9, [(1, 3), (3, 5)])


def test_the_caller_keeps_the_array() -> None:
    positions = np.array([1, 2, 3])
    layout = Layout(5, [positions])
    positions[0] = 2
    assert layout.spans[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("length", "spans", "grids", "match"),
    [
        (0, [], None, "length"),
        (4, [(0, 5)], None, "outside the row of 4"),
        (4, [[-1, 2]], None, "outside"),
        (4, [(2, 2)], None, "empty"),
        (4, [[]], None, "empty"),
        (4, [[2, 1]], None, "increasing"),
        (4, [[1, 1]], None, "increasing"),
        (4, [(0, 2), (1, 3)], None, "share"),
        (4, [[0.5, 1.5]], None, "whole positions"),
        (4, [(0.5, 2)], None, "whole positions"),
        (4, [("a", "b")], None, "whole positions"),
        (4.5, [(0, 2)], None, "whole number"),
        (4, [[[0, 1], [2, 3]]], None, "flat"),
        (4, [(0, 4)], [], "0 grids for 1 spans"),
        (4, [(0, 4)], [(2, 3)], "not a grid of 2 x 3"),
        (4, [(0, 4)], [(-2, -2)], "not a grid"),
    ],
)
def test_bad_layouts(length: int, spans: list, grids: list | None, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Layout(length, spans, grids)
