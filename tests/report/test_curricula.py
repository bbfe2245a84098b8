"""The picture of the curricula shows what they do."""

from __future__ import annotations

from pathlib import Path

import yaml
from PIL import Image

from adsc import Schedule, plan
from adsc.report.curricula import BUDGETS, LAYERS, TARGET, TOKENS, compose, draw, vision_tokens
from adsc.training.curriculum import KINDS

ROOT = Path(__file__).parents[2]


def held(schedule: Schedule) -> list[int]:
    return plan([(0, TOKENS)], TOKENS, schedule, LAYERS).vision_tokens_per_layer()


def test_columns_are_plans() -> None:
    for kind in KINDS[:-1]:
        assert vision_tokens(kind)[:, -1].tolist() == held(TARGET)
    assert vision_tokens("light_to_heavy")[:, 0].tolist() == [TOKENS] * LAYERS
    assert vision_tokens("deep_to_shallow")[:20, 0].tolist() == [TOKENS] * 20
    first_round = sorted(map(tuple, vision_tokens("elastic")[:, : len(BUDGETS)].T.tolist()))
    assert first_round == sorted(tuple(held(Schedule.parse(text))) for text in BUDGETS.values())


def test_budgets_are_those_of_the_recipe() -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "pocket-elastic.yaml").read_text())["curriculum"]
    assert {str(budget) for budget in recipe["budgets"]} == BUDGETS.keys()
    assert {"1": "", **recipe["schedules"]} == BUDGETS


def test_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "curricula.png")
    with Image.open(tmp_path / "curricula.png") as made, Image.open(ROOT / "docs" / "curricula.png") as stored:
        assert made.size == stored.size
    titles = [text.get_text() for axes in compose().axes for text in axes.texts]
    assert set(KINDS) <= set(titles)
