"""Plans: what stays, by definition and by property."""

from __future__ import annotations

import os
import random
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adsc import InputError, Layout, Schedule, plan
from adsc.planning import GRIDS, PATTERNS

RUNNING = random.Random(os.urandom(8))  # hypothesis seeds the global one


def rounded(tokens: int, keep: Fraction) -> int:
    return max(1, floor(tokens * keep + Fraction(1, 2)))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Rows with images of any size, with and without markers inside, touching or apart, each span a grid."""
    position, spans, grids = draw(st.integers(0, 3)), [], []
    for _ in range(draw(st.integers(0, 4))):
        height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        marker = draw(st.booleans())
        span = [position + row * (width + marker) + column for row in range(height) for column in range(width)]
        spans.append(span)
        grids.append((height, width))
        position = span[-1] + 1 + draw(st.integers(0, 3))
    return Layout(position + draw(st.integers(1, 5)), spans, grids)


@st.composite
def schedules(draw: st.DrawFn, num_layers: int = 12) -> Schedule:
    layers = sorted(draw(st.sets(st.integers(1, num_layers - 1), max_size=4)))
    keep = st.fractions(min_value=Fraction(1, 30), max_value=1, max_denominator=30)
    return Schedule((layer, draw(keep)) for layer in layers)


@given(layouts(), schedules(), st.sampled_from(PATTERNS), st.integers(0, 3))
@settings(deadline=None)
def test_what_always_holds(layout: Layout, schedule: Schedule, pattern: str, seed: int) -> None:
    made = plan(layout, schedule=schedule, num_layers=12, pattern=pattern, seed=seed)
    assert [stage.start for stage in made.stages] == [0, *(layer for layer, _ in schedule)]
    assert [stage.stop for stage in made.stages] == [*(layer for layer, _ in schedule), 12]
    np.testing.assert_array_equal(made.kept(0), np.arange(layout.length))
    keeps = dict(schedule.reductions)
    for layer in range(12):
        kept = made.kept(layer)
        assert np.all(np.diff(kept) > 0)
        assert set(layout.text.tolist()) <= set(kept.tolist())
        stage = made.stage(layer)
        assert sorted(kept.tolist()) == sorted([*layout.text.tolist(), *np.concatenate([[], *stage.spans]).tolist()])
        for index, (span, remaining) in enumerate(zip(layout.spans, stage.spans, strict=True)):
            assert len(remaining) >= 1
            assert remaining[-1] == span[-1]
            if layer in keeps:
                entering = made.stage(layer - 1).spans[index]
                assert set(remaining.tolist()) <= set(entering.tolist())
                if pattern not in GRIDS:
                    assert len(remaining) == rounded(len(entering), keeps[layer])
            elif layer:
                np.testing.assert_array_equal(remaining, made.stage(layer - 1).spans[index])
    assert made.tokens_per_layer() == [len(made.kept(layer)) for layer in range(12)]
    assert made.vision_tokens_per_layer() == [count - len(layout.text) for count in made.tokens_per_layer()]
    if layout.spans:
        expected = Fraction(sum(made.vision_tokens_per_layer()), 12 * layout.vision_tokens)
        assert made.retained == expected
    else:
        assert made.retained == 1


@given(st.integers(1, 2000), st.fractions(min_value=Fraction(1, 100), max_value=1))
def test_last_of_each_group(tokens: int, keep: Fraction) -> None:
    kept = plan([(5, 5 + tokens)], tokens + 9, Schedule([(1, keep)]), 2).stages[1].spans[0] - 5
    exact = Schedule([(1, keep)]).reductions[0][1]
    m = rounded(tokens, exact)
    assert kept.tolist() == [ceil(Fraction((j + 1) * tokens, m)) - 1 for j in range(m)]


@given(st.integers(1, 500), st.fractions(min_value=Fraction(1, 100), max_value=1))
def test_first_of_each_group_and_the_last_token(tokens: int, keep: Fraction) -> None:
    kept = plan([(0, tokens)], tokens, Schedule([(1, keep)]), 2, "first").stages[1].spans[0]
    m = rounded(tokens, keep)
    assert kept.tolist() == [*(floor(Fraction(j * tokens, m)) for j in range(m - 1)), tokens - 1]


@given(layouts(), schedules(), st.sampled_from(PATTERNS))
@settings(deadline=None)
def test_an_image_depends_on_itself_alone(layout: Layout, schedule: Schedule, pattern: str) -> None:
    made = plan(layout, schedule=schedule, num_layers=12, pattern=pattern)
    for index, span in enumerate(layout.spans):
        alone = Layout(len(span), [(0, len(span))], [layout.grids[index]])
        single = plan(alone, schedule=schedule, num_layers=12, pattern=pattern)
        for stage, own in zip(made.stages, single.stages, strict=True):
            np.testing.assert_array_equal(stage.spans[index], span[own.spans[0]])


@given(layouts(), schedules(), st.sampled_from(("last", "first", "grid", "rows")))
@settings(deadline=None)
def test_stages_compose(layout: Layout, schedule: Schedule, pattern: str) -> None:
    """Reducing the survivors of all but the last reduction once more is the whole schedule."""
    if not len(schedule):
        return
    *before, (_, keep) = schedule
    whole = plan(layout, schedule=schedule, num_layers=12, pattern=pattern).stages[-1]
    part = plan(layout, schedule=Schedule(before), num_layers=12, pattern=pattern).stages[-1]
    for index, survivors in enumerate(part.spans):
        grid = None
        if pattern in GRIDS:
            lines = np.searchsorted(layout.spans[index], survivors) // layout.grids[index][1]
            grid = len(set(lines)), len(survivors) // len(set(lines))
        again = plan(
            Layout(len(survivors), [(0, len(survivors))], [grid]),
            schedule=Schedule([(1, keep)]),
            num_layers=2,
            pattern=pattern,
        )
        np.testing.assert_array_equal(survivors[again.stages[1].spans[0]], whole.spans[index])


@given(st.integers(1, 40), st.integers(1, 40), st.fractions(min_value=Fraction(1, 40), max_value=1))
def test_grid_keeps_rows_and_columns(height: int, width: int, keep: Fraction) -> None:
    made = plan([(0, height * width)], height * width, Schedule([(1, keep)]), 2, "grid", grids=[(height, width)])
    kept = made.stages[1].spans[0]
    rows, columns = np.unique(kept // width), np.unique(kept % width)
    assert kept.tolist() == [row * width + column for row in rows for column in columns]
    for lines, side in ((rows, height), (columns, width)):
        assert lines.tolist() == [ceil(Fraction((j + 1) * side, len(lines))) - 1 for j in range(len(lines))]
    m = rounded(height * width, keep)
    # One more or fewer line of the shorter direction is the most that the count may be off.
    assert abs(len(kept) - m) <= max(1, min(len(rows), len(columns)))


@pytest.mark.parametrize(
    ("grid", "keep", "rows", "columns"),
    [
        ((24, 24), "1/4", 12, 12),
        ((24, 24), "1/9", 8, 8),
        ((24, 24), "1/2", 16, 18),
        ((24, 48), "1/4", 12, 24),
        ((1, 9), "1/3", 1, 3),
        ((9, 1), "1/3", 3, 1),
        ((10, 13), "1/1000", 1, 1),
        ((10, 13), "1", 10, 13),
    ],
)
def test_grid_examples(grid: tuple[int, int], keep: str, rows: int, columns: int) -> None:
    tokens = grid[0] * grid[1]
    kept = plan([(0, tokens)], tokens, Schedule([(1, keep)]), 2, "grid", grids=[grid]).stages[1].spans[0]
    assert (len(set(kept // grid[1])), len(set(kept % grid[1]))) == (rows, columns)


@given(st.integers(1, 40), st.integers(1, 40), st.fractions(min_value=Fraction(1, 40), max_value=1))
def test_rows_stay_as_whole_as_can_be(height: int, width: int, keep: Fraction) -> None:
    made = plan([(0, height * width)], height * width, Schedule([(1, keep)]), 2, "rows", grids=[(height, width)])
    kept = made.stages[1].spans[0]
    rows, columns = np.unique(kept // width), np.unique(kept % width)
    assert kept.tolist() == [row * width + column for row in rows for column in columns]
    for lines, side in ((rows, height), (columns, width)):
        assert lines.tolist() == [ceil(Fraction((j + 1) * side, len(lines))) - 1 for j in range(len(lines))]
    assert len(rows) == ceil(height * keep)
    if (height * keep).denominator == 1:
        assert len(columns) == width
    assert 2 * abs(len(kept) - rounded(height * width, keep)) <= len(rows) or len(columns) == 1


def test_random_is_seeded() -> None:
    seed = RUNNING.randrange(1_000_000)
    schedule = Schedule.parse("1:1/2,2:1/2")

    def kept(seed: int) -> list[int]:
        return plan([(0, 400)], 400, schedule, 3, "random", seed=seed).kept(2).tolist()

    assert kept(seed) == kept(seed)
    assert kept(seed) != kept(seed + 1)


def test_the_example_of_the_contract() -> None:
    made = plan(
        spans=[(35, 611)],
        length=676,
        schedule=Schedule.parse("3:1/2,11:1/2,21:1/2,29:1/2"),
        num_layers=32,
        pattern="last",
    )
    assert made.tokens_per_layer() == [676] * 3 + [388] * 8 + [244] * 10 + [172] * 8 + [136] * 3
    assert float(made.retained) * 576 == 192.375
    assert made.kept(3)[34:38].tolist() == [34, 36, 38, 40]
    assert made.kept(31)[-66:-63].tolist() == [610, 611, 612]
    assert made.kept(31).dtype == np.int64


def test_plans_cannot_be_changed() -> None:
    made = plan([(1, 9)], 12, Schedule.parse("1:1/2"), 2)
    for array in (made.kept(0), made.kept(1), made.stages[1].spans[0], made.layout.spans[0]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


def test_bad_input() -> None:
    half = Schedule.parse("1:1/2")
    with pytest.raises(InputError, match="length"):
        plan([(0, 4)], schedule=half, num_layers=2)
    with pytest.raises(InputError, match="schedule"):
        plan([(0, 4)], 4, num_layers=2)
    with pytest.raises(InputError, match="'1:1/2' is not a Schedule"):
        plan([(0, 4)], 4, "1:1/2", 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed -1"):
        plan([(0, 4)], 4, half, 2, "random", seed=-1)
    with pytest.raises(InputError, match="layers"):
        plan([(0, 4)], 4, half, 1)
    with pytest.raises(InputError, match="pattern 'middle'"):
        plan([(0, 4)], 4, half, 2, "middle")
    with pytest.raises(InputError, match="grid of span 1"):
        plan([(0, 4), (4, 8)], 8, half, 2, "grid", grids=[(2, 2), None])
    with pytest.raises(InputError, match="layout"):
        plan(Layout(4, [(0, 4)]), 5, half, 2)
    with pytest.raises(InputError, match="layer 2"):
        plan([(0, 4)], 4, half, 2).kept(2)
    with pytest.raises(InputError, match="layer -1"):
        plan([(0, 4)], 4, half, 2).kept(-1)
