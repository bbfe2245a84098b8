"""``adsc train``: from a recipe to a folder that opens, and on from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import adsc
from adsc.cli import main
from training import running

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["train", *map(str, arguments)])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    running.make_checkpoint(tmp_path / "model")
    running.make_rows(tmp_path / "rows")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(running.values(tmp_path, tmp_path / "out", max_steps=4)))
    return path


def test_train_then_open(run: Run, recipe: Path, tmp_path: Path) -> None:
    status, out, _ = run(recipe, "--json", "--merge")
    assert status == 0
    result = json.loads(out)
    assert (result["step"], result["steps"]) == (4, 4)
    assert Path(result["adapter"]) == tmp_path / "out" / "adapter"
    losses = [entry["loss"] for entry in result["history"] if "loss" in entry]
    assert len(losses) == 4
    for folder in (result["adapter"], result["merged"]):
        model, processor = adsc.load(folder, retained="1/3")
        assert str(model.adsc.method.schedule) == running.BUDGETS["1/3"]
        assert processor.tokenizer is not None

    # The last checkpoint is gone: the same command goes on from the one before, to the same losses.
    last = tmp_path / "out" / "checkpoints" / "checkpoint-4"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    status, out, _ = run(recipe, "--json")
    assert status == 0
    again = [entry["loss"] for entry in json.loads(out)["history"] if "loss" in entry]
    assert again == losses


def test_no_resume_leaves_a_training_alone(run: Run, recipe: Path, tmp_path: Path) -> None:
    assert run(recipe, "--set", "training.max_steps=2")[0] == 0
    before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    status, out, err = run(recipe, "--no-resume")
    assert (status, out) == (2, "")
    assert "holds a training already" in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before


def test_missing_data_is_one_line(run: Run, recipe: Path) -> None:
    status, out, err = run(recipe, "--set", "data.train=nowhere/*.jsonl")
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "nowhere" in lines[0]
