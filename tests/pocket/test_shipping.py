"""The command that puts a trained adapter beside the model in the box."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

import adsc
from adsc.methods import ADSC
from adsc.pocket import MODEL_FOLDER
from adsc.pocket.shipping import main, read_figures

# PEFT asks for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
BUDGETS = {"1/3": "4:1/2,8:1/2,12:1/2,16:1/2", "1/9": "1:1/4,5:1/2,9:1/32"}
TABLE = {"ADSC trained at 1/9": {"right, %": "91.5 ± 0.4"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the model in the box as PEFT saves it, with its schedules."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER), lora).save_pretrained(folder)
    ADSC(adsc.Schedule.parse(BUDGETS["1/3"]), budgets=BUDGETS).save_pretrained(folder)
    return folder


def test_shipped(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main([str(trained), "--out", "packed"])
    assert "no figures yet" in capsys.readouterr().out
    Path("results/pocket").mkdir(parents=True)
    Path("results/pocket/main.json").write_text(json.dumps({"rows": [], "card": TABLE}))
    main([str(trained), "--out", "packed"])
    assert "figures of results/pocket/main.json" in capsys.readouterr().out
    text = Path("packed/README.md").read_text()
    assert "# The model in the box, trained" in text
    assert "| ADSC trained at 1/9 | 91.5 ± 0.4 |" in text
    base = json.loads(Path("packed/adapter_config.json").read_text())["base_model_name_or_path"]
    assert (tmp_path / "packed" / base).resolve() == MODEL_FOLDER.resolve()
    model, processor = adsc.load("packed", retained="1/9")
    assert str(model.adsc.method.schedule) == BUDGETS["1/9"]
    assert processor.chat_template


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"a": 1}', '{"card": {}}'])
def test_figures_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text(text)
    with pytest.raises(adsc.InputError, match="figures ") as caught:
        read_figures(tmp_path / "figures.json")
    assert "\n" not in str(caught.value)


def test_one_line_where_there_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "\n" not in str(ended.value.code)
    assert not (tmp_path / "out").exists()
