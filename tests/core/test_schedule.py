"""Schedules: text form, validation, and the rule that finds one for a budget."""

from __future__ import annotations

import time
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adsc import InputError, Schedule, plan
from adsc.schedule import KEEPS, MAX_STAGES, survivors

fractions = st.fractions(min_value=Fraction(1, 50), max_value=1, max_denominator=50)
schedules = st.lists(st.tuples(st.integers(1, 40), fractions), max_size=6, unique_by=lambda pair: pair[0]).map(
    lambda pairs: Schedule(sorted(pairs))
)


def average(schedule: Schedule, num_layers: int, vision_tokens: int) -> float:
    counts = plan([(0, vision_tokens)], vision_tokens, schedule, num_layers).vision_tokens_per_layer()
    return sum(counts) / num_layers


@given(schedules)
def test_text_round_trip(schedule: Schedule) -> None:
    again = Schedule.parse(str(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert list(again) == list(schedule)


def test_text_form() -> None:
    schedule = Schedule.parse(" 3:1/2, 11 : 0.5,21:2/6 ")
    assert str(schedule) == "3:1/2,11:1/2,21:1/3"
    assert list(schedule) == [(3, Fraction(1, 2)), (11, Fraction(1, 2)), (21, Fraction(1, 3))]
    assert str(Schedule.none()) == ""
    assert Schedule.parse("") == Schedule.parse("  ") == Schedule.none()
    assert not Schedule.none()
    assert Schedule([(3, 1 / 3)]) == Schedule([(3, "1/3")])


@pytest.mark.parametrize(
    "text",
    [
        "3",
        "3:",
        ":1/2",
        "x:1/2",
        "3:x",
        "3:1/0",
        "3:1/2,",
        "3:1/2;4:1/2",
        "-3:1/2",
        "3.0:1/2",
        "3:0",
        "3:-1/2",
        "3:3/2",
        "0:1/2",
        "3:1/2,3:1/2",
        "4:1/2,3:1/2",
        "3:nan",
        "3:inf",
        "²:1/2",
    ],
)
def test_bad_text_is_one_clear_line(text: str) -> None:
    with pytest.raises(InputError) as error:
        Schedule.parse(text)
    assert "\n" not in str(error.value)


def test_layers_must_exist() -> None:
    schedule = Schedule.parse("3:1/2,31:1/2")
    assert schedule.validate(32) is schedule
    with pytest.raises(InputError, match="layer 31, but the model has 31 layers; layers 1 to 30"):
        schedule.validate(31)
    assert Schedule.none().validate(1) == Schedule.none()


def test_layers_are_whole_numbers() -> None:
    assert Schedule([(np.int64(3), "1/2")]) == Schedule.parse("3:1/2")
    for layer in (3.7, 3.0, "3", None):
        with pytest.raises(InputError, match="not a whole number"):
            Schedule([(layer, "1/2")])  # type: ignore[list-item]


GOLDEN = [
    # retained, schedule, average vision tokens per layer
    ("2/3", "21:1/4,22:1/4,23:1/4,24:1/4,25:1/4", 384.19),
    ("1/3", "10:1/4,12:1/4,14:1/4,16:1/4,18:1/4", 192.38),
    ("2/9", "6:1/4,9:1/4,13:1/4,17:1/4", 128.06),
    ("1/9", "3:1/3,4:1/3,5:1/3,6:1/3,7:1/3,8:1/3", 63.69),
    ("1/18", "1:1/4,2:1/4,3:1/4", 31.78),
]


@pytest.mark.parametrize(("retained", "text", "tokens"), GOLDEN)
def test_golden_budgets(retained: str, text: str, tokens: float) -> None:
    schedule = Schedule.for_budget(32, retained)
    assert str(schedule) == text
    assert average(schedule, 32, 576) == pytest.approx(tokens, abs=0.005)
    assert abs(average(schedule, 32, 576) - 576 * Fraction(retained)) <= 1


@pytest.mark.parametrize(
    ("retained", "keep", "stages", "text"),
    [
        ("1/3", "1/2", 4, "8:1/2,10:1/2,11:1/2,13:1/2"),
        ("2/9", "1/2", 4, "4:1/2,6:1/2,8:1/2,10:1/2"),
        ("1/3", "1/3", 2, "7:1/3,11:1/3"),
        ("1/9", "1/4", 3, "2:1/4,6:1/4,10:1/4"),
        ("1/3", ["1/2", "1/3"], None, "10:1/3,11:1/3,12:1/3,13:1/3"),
    ],
)
def test_golden_with_keep_and_stages(retained: str, keep: str, stages: int | None, text: str) -> None:
    assert str(Schedule.for_budget(32, retained, keep=keep, stages=stages)) == text


@pytest.mark.parametrize(
    ("num_layers", "tokens", "retained", "text"),
    [
        (4, 24, "1/2", "1:1/3"),  # as near as 1:1/2,2:1/2, with fewer reductions
        (3, 4, "1/2", "2:1/3"),  # as near as 2:1/4, with the larger fraction
    ],
)
def test_ties(num_layers: int, tokens: int, retained: str, text: str) -> None:
    assert str(Schedule.for_budget(num_layers, retained, tokens)) == text


def test_forms_of_a_budget_agree() -> None:
    expected = Schedule.for_budget(32, Fraction(1, 3))
    assert Schedule.for_budget(32, "1/3") == Schedule.for_budget(32, 1 / 3) == expected
    assert Schedule.for_budget(32, 1) == Schedule.for_budget(32, "1.0") == Schedule.none()


def test_unreachable_budget_names_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"no schedule of 4 reductions keeping 1/2 .* nearest is retained 0.1133 \(65.2"
    ):
        Schedule.for_budget(32, "1/9", keep="1/2", stages=4)
    reachable = Schedule.for_budget(32, 0.1133, keep="1/2", stages=4)
    assert average(reachable, 32, 576) == 65.25
    with pytest.raises(InputError, match=r"nearest is retained 0.6250 \(360.0 tokens\)"):
        Schedule.for_budget(2, "1/3")
    with pytest.raises(InputError, match=r"nearest is retained 1.0000 \(576.0 tokens\)"):
        Schedule.for_budget(32, "999/1000")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((1, "1/3"), "at least 2 decoder layers"),
        ((32, 0), "outside"),
        ((32, "4/3"), "outside"),
        ((32, "a third"), "not a number"),
        ((32, "1/3", 0), "vision_tokens"),
        ((32, "1/3", 576, 1), "below 1"),
        ((32, "1/3", 576, []), "below 1"),
        ((32, "1/3", 576, None, 32), "stages is 32"),
        ((32, "1/3", 576, None, 0), "stages is 0"),
    ],
)
def test_bad_budgets(arguments: tuple[object, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Schedule.for_budget(*arguments)  # type: ignore[arg-type]


def brute_force(num_layers: int, target: Fraction, tokens: int) -> Schedule | None:
    """The documented rule, by listing everything."""
    found = []
    for keep in KEEPS:
        for k in range(1, min(MAX_STAGES, num_layers - 1) + 1):
            counts = [tokens]
            while len(counts) <= k:
                counts.append(survivors(counts[-1], keep))
            if len(set(counts)) != len(counts):
                continue
            for layers in combinations(range(1, num_layers), k):
                total = sum(counts[sum(layer <= at for layer in layers)] for at in range(num_layers))
                error = abs(Fraction(total, num_layers) - target)
                gaps = [after - before for before, after in pairwise(layers)] or [0]
                if error <= 1:
                    rank = (-layers[0], max(gaps) - min(gaps), error, k, -keep, tuple(-layer for layer in layers))
                    found.append((rank, Schedule((layer, keep) for layer in layers)))
    return min(found, key=lambda each: each[0])[1] if found else None


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 10), st.fractions(min_value=Fraction(1, 20), max_value=Fraction(19, 20)), st.integers(1, 700))
def test_budget_rule_equals_brute_force(num_layers: int, retained: Fraction, tokens: int) -> None:
    expected = brute_force(num_layers, retained * tokens, tokens)
    if expected is None:
        with pytest.raises(InputError, match="nearest"):
            Schedule.for_budget(num_layers, retained, tokens)
    else:
        assert Schedule.for_budget(num_layers, retained, tokens) == expected


@pytest.mark.parametrize("num_layers", [20, 32, 80])
@pytest.mark.parametrize("tokens", [256, 576, 16384])
def test_budgets_of_deep_models_are_found_quickly(num_layers: int, tokens: int) -> None:
    for retained in ("2/3", "1/2", "1/3", "2/9", "1/9"):
        start = time.process_time()
        schedule = Schedule.for_budget(num_layers, retained, tokens)
        assert time.process_time() - start < 3
        assert abs(average(schedule, num_layers, tokens) - tokens * Fraction(retained)) <= 1
