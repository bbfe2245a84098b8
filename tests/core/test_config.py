"""The saved config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adsc import ADSCConfig, InputError, Schedule
from adsc.methods import as_method

CONFIG = ADSCConfig(Schedule.parse("3:1/3,11:1/2"), pattern="random", positions="compact", seed=7)


def test_round_trip(tmp_path: Path) -> None:
    path = CONFIG.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == "adsc_config.json"
    assert [file.name for file in path.parent.iterdir()] == ["adsc_config.json"]
    assert ADSCConfig.from_pretrained(path.parent) == CONFIG
    values = json.loads(path.read_text())
    assert (values["type"], values["version"], values["schedule"]) == ("adsc", 1, "3:1/3,11:1/2")


def test_defaults_and_text() -> None:
    config = ADSCConfig.from_dict({"type": "adsc", "version": 1, "schedule": ""})
    assert config == ADSCConfig(Schedule.none(), pattern="last", positions="original", seed=0)
    assert ADSCConfig("3:1/2") == ADSCConfig(Schedule.parse("3:1/2"))  # type: ignore[arg-type]


def test_a_newer_file_loads_with_a_warning(tmp_path: Path) -> None:
    values = {**CONFIG.to_dict(), "version": 9, "colour": "red"}
    (tmp_path / "adsc_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="version 9 has keys unknown to version 1, which are ignored: colour"):
        assert ADSCConfig.from_pretrained(tmp_path) == CONFIG


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"type": "other"}, "type"),
        ({"schedule": None}, "no schedule"),
        ({"schedule": "3:2"}, "outside"),
        ({"pattern": "middle"}, "pattern 'middle'"),
        ({"positions": "new"}, "positions 'new'"),
        ({"seed": -1}, "seed"),
        ({"seed": "1"}, "seed"),
    ],
)
def test_bad_values(change: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        ADSCConfig.from_dict({**CONFIG.to_dict(), **change})


ELASTIC = {"1/9": "2:1/4,6:1/4,9:1/4", "1": "", "1/3": "4:1/3,20:1/3"}


def test_budgets(tmp_path: Path) -> None:
    config = ADSCConfig(Schedule.none(), budgets=ELASTIC)  # type: ignore[arg-type]
    assert [str(retained) for retained, _ in config.budgets] == ["1", "1/3", "1/9"]
    assert hash(config) != hash(CONFIG)
    values = json.loads(config.save_pretrained(tmp_path).read_text())
    assert values["budgets"] == {"1": "", "1/3": "4:1/3,20:1/3", "1/9": "2:1/4,6:1/4,9:1/4"}
    assert values["version"] == 1
    assert ADSCConfig.from_pretrained(tmp_path) == config
    assert "budgets" not in CONFIG.to_dict()


def test_budgets_are_taken_where_saved() -> None:
    method = as_method(ADSCConfig(Schedule.none(), pattern="first", budgets=ELASTIC))  # type: ignore[arg-type]
    for retained in ("1/3", 1 / 3, "2/6"):
        assert str(method.for_budget(32, retained).schedule) == "4:1/3,20:1/3"
    assert method.for_budget(32, "1/2").schedule == Schedule.for_budget(32, "1/2")
    assert Schedule.for_budget(32, "1/3") != Schedule.parse("4:1/3,20:1/3")
    there_and_back = method.for_budget(32, "1/2").for_budget(32, "1/9")
    assert str(there_and_back.schedule) == ELASTIC["1/9"]
    assert there_and_back.pattern == "first"
    assert not method.for_budget(32, 1).reduces
    with pytest.raises(InputError, match="layer 20, but the model has 12 layers"):
        method.validate(12)


@pytest.mark.parametrize(
    ("budgets", "match"),
    [
        ("1/3", "not a mapping"),
        (["1/3"], "not a budget with its schedule"),
        ({"4/3": "3:1/2"}, "outside"),
        ({"third": "3:1/2"}, "not a number"),
        ({"1/3": "3:2"}, "outside"),
        ({"1/3": 3}, "is not one"),
        ({"1/3": "3:1/2", "2/6": "4:1/2"}, "given twice"),
        ({"1": "3:1/2"}, "budget 1 is the dense model"),
        ({"1/3": ""}, "no other has an empty one"),
    ],
)
def test_bad_budgets(budgets: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        ADSCConfig.from_dict({**CONFIG.to_dict(), "budgets": budgets})


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no adsc_config\.json"):
        ADSCConfig.from_pretrained(tmp_path)
    (tmp_path / "adsc_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        ADSCConfig.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        CONFIG.save_pretrained(tmp_path / "adsc_config.json")


def test_no_such_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no folder 'someone/something'"):
        ADSCConfig.from_pretrained("someone/something")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CONFIG.save_pretrained(tmp_path)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        ADSCConfig(Schedule.none()).save_pretrained(tmp_path)
    assert ADSCConfig.from_pretrained(tmp_path) == CONFIG
