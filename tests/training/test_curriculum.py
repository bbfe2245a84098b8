"""Curricula: where they begin and end, and that they get there step by step."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adsc import InputError, Schedule, plan
from adsc.training.curriculum import KINDS, STEPS, Curriculum

LAYERS = 24
MOVING = [kind for kind in KINDS if kind not in ("constant", "elastic")]
keeps = st.sampled_from([Fraction(1, n) for n in (2, 3, 4, 8, 16)] + [Fraction(2, 3), Fraction(3, 4)])
targets = st.lists(st.tuples(st.integers(1, LAYERS - 1), keeps), min_size=1, max_size=6, unique_by=lambda r: r[0]).map(
    lambda reductions: Schedule(sorted(reductions))
)
warms = st.fractions(min_value=Fraction(1, 20), max_value=1, max_denominator=20)
progresses = st.fractions(min_value=0, max_value=1, max_denominator=100)
BUDGETS = [Schedule.none(), *map(Schedule.parse, ("12:1/2", "8:1/2,12:1/2", "4:1/4", "1:1/16,4:1/4"))]


def retained(schedule: Schedule, tokens: int) -> Fraction:
    return plan([(0, tokens)], tokens, schedule, LAYERS).retained


@given(st.sampled_from(KINDS[:-1]), targets, warms, progresses)
def test_ends_at_the_target_and_stays_there(kind: str, target: Schedule, warm: Fraction, progress: Fraction) -> None:
    curriculum = Curriculum(kind, target, LAYERS, warm)
    assert curriculum.schedule(1) == target
    assert curriculum.schedule(max(progress, warm)) == target


@given(st.sampled_from(MOVING), targets, warms, progresses)
def test_every_schedule_on_the_way_can_be_run(kind: str, target: Schedule, warm: Fraction, progress: Fraction) -> None:
    schedule = Curriculum(kind, target, LAYERS, warm).schedule(progress)
    schedule.validate(LAYERS)  # layers that increase and fractions in (0, 1] are a Schedule's own rule
    for (layer, keep), (_, final) in zip(schedule, target, strict=False):
        assert 1 <= layer < LAYERS
        assert keep < 1
        assert keep.denominator <= STEPS * final.denominator**2
    assert len(schedule) in (0, len(target))


@given(st.sampled_from(MOVING), targets, warms, st.integers(1, 600), progresses, progresses)
def test_monotone(kind: str, target: Schedule, warm: Fraction, tokens: int, one: Fraction, other: Fraction) -> None:
    curriculum = Curriculum(kind, target, LAYERS, warm)
    before, after = (retained(curriculum.schedule(progress), tokens) for progress in sorted((one, other)))
    if kind == "heavy_to_light":
        before, after = after, before
    assert before >= after


@given(targets)
def test_where_they_begin(target: Schedule) -> None:
    start = {kind: Curriculum(kind, target, LAYERS).schedule(0) for kind in KINDS[:-1]}
    assert start["constant"] == target
    assert start["light_to_heavy"] == Schedule.none()
    assert start["heavy_to_light"] == Schedule((layer, keep * keep) for layer, keep in target)
    assert [keep for _, keep in start["deep_to_shallow"]] == [keep for _, keep in target]
    assert [layer for layer, _ in start["deep_to_shallow"]] == list(range(LAYERS - len(target), LAYERS))


@given(st.sampled_from(MOVING), targets, warms)
def test_shares_are_what_a_run_sees(kind: str, target: Schedule, warm: Fraction) -> None:
    curriculum = Curriculum(kind, target, LAYERS, warm)
    steps = STEPS * warm.denominator
    seen = Counter(curriculum.schedule(Fraction(step, steps)) for step in range(steps))
    shares = curriculum.shares()
    assert seen == {schedule: share * steps for share, schedule in shares}
    assert all(before != after for (_, before), (_, after) in pairwise(shares))


@given(st.integers(0, 10**6), st.integers(0, 50))
def test_elastic_covers_its_budgets_evenly(seed: int, first_round: int) -> None:
    curriculum = Curriculum("elastic", BUDGETS[-1], LAYERS, budgets=BUDGETS, seed=seed)
    n = len(BUDGETS)
    for round_ in range(first_round, first_round + 3):
        drawn = [curriculum.schedule(0, draw) for draw in range(round_ * n, round_ * n + n)]
        assert Counter(drawn) == Counter(BUDGETS)
    assert sum(share for share, _ in curriculum.shares()) == 1


def test_a_budget_named_twice_is_drawn_twice_as_often() -> None:
    curriculum = Curriculum("elastic", BUDGETS[-1], LAYERS, budgets=[*BUDGETS, BUDGETS[-1]])
    drawn = [curriculum.schedule(0, draw) for draw in range(3 * (len(BUDGETS) + 1))]
    assert [drawn.count(each) for each in BUDGETS] == [3] * (len(BUDGETS) - 1) + [6]
    shares = {schedule: share for share, schedule in curriculum.shares()}
    assert len(shares) == len(curriculum.shares()) == len(BUDGETS)
    assert shares[BUDGETS[-1]] == 2 * shares[BUDGETS[0]]
    assert sum(shares.values()) == 1


def test_elastic_is_a_function_of_seed_and_draw() -> None:
    """In another process too, and whatever was drawn before; other seeds draw otherwise."""
    program = (
        "from adsc import Schedule; from adsc.training.curriculum import Curriculum\n"
        "budgets = [Schedule.parse(t) for t in ('', '12:1/2', '8:1/2,12:1/2', '4:1/4', '1:1/16,4:1/4')]\n"
        "c = Curriculum('elastic', budgets[-1], 24, budgets=budgets, seed=7)\n"
        "print(*(c.schedule(0, draw) or '-' for draw in reversed(range(100))))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seeds = {
        seed: [str(Curriculum("elastic", BUDGETS[-1], LAYERS, budgets=BUDGETS, seed=seed).schedule(0, draw) or "-")
               for draw in range(100)]
        for seed in (7, 8)
    }  # fmt: skip
    assert ran.stdout.split() == seeds[7][::-1]
    assert seeds[7] != seeds[8]
    orders = {tuple(seeds[7][at : at + 5]) for at in range(0, 100, 5)}
    assert len(orders) > 10


def test_steps_are_exact() -> None:
    curriculum = Curriculum("light_to_heavy", Schedule.parse("4:1/4,8:1/2"), LAYERS, "0.6")
    assert str(curriculum.schedule("0.3")) == str(curriculum.schedule(0.3)) == "4:5/8,8:3/4"
    assert curriculum.schedule(0.6) == curriculum.target  # 0.6 is a little less than 3/5
    assert curriculum.schedule(Fraction(599, 1000)) != curriculum.target


@pytest.mark.parametrize(("make", "match"), [
    (lambda: Curriculum("steep", BUDGETS[1], LAYERS), "choose one of constant, light_to_heavy"),
    (lambda: Curriculum("constant", BUDGETS[1], 12), "layers 1 to 11"),
    (lambda: Curriculum("elastic", BUDGETS[-1], 12, budgets=BUDGETS), "layers 1 to 11"),
    (lambda: Curriculum("constant", BUDGETS[1], LAYERS, 0), "warm 0 is outside"),
    (lambda: Curriculum("elastic", BUDGETS[1], LAYERS), "needs budgets"),
    (lambda: Curriculum("constant", BUDGETS[1], LAYERS).schedule(1.5), "outside"),
    (lambda: Curriculum("constant", BUDGETS[1], LAYERS).schedule(0, -1), "at least 0"),
])  # fmt: skip
def test_bad_input(make: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()  # type: ignore[operator]


def test_needs_the_core_alone() -> None:
    program = "import sys, adsc.training.curriculum; print({'torch', 'transformers', 'yaml'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
