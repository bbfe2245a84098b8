"""The result folder, and the adapter baked in."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import adsc
from adsc.methods import ADSC
from adsc.training import exporting
from adsc.training.exporting import describe, export, merge, ship
from adsc.training.recipe import Lora, check
from adsc.training.trainer import lora_config
from hf.tiny import case
from training.running import BUDGETS, make_checkpoint, values

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
METHOD = ADSC(adsc.Schedule.parse(BUDGETS["1/2"]), "first", "compact", budgets=BUDGETS)
FIGURES = {"dense": {"loss": 1.25, "accuracy": "81.0 ± 0.5"}, "1/3": {"loss": 1.5}}
FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "adsc_config.json", "chat_template.jinja",
    "processor_config.json", "recipe.yaml", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("exporting")
    make_checkpoint(path / "model")
    return path


@pytest.fixture(params=[False, True], ids=["", "projector"])
def adapted(request, folder):
    """A model with an adapter that changes what it says, its processor, and the recipe."""
    base = AutoModelForImageTextToText.from_pretrained(folder / "model")
    torch.manual_seed(0)
    made = peft.get_peft_model(base, lora_config(base, Lora(rank=4, alpha=8, projector=request.param)))
    for weight in made.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    recipe = check(values(folder, folder / "run"))
    return made.eval(), AutoProcessor.from_pretrained(folder / "model"), recipe


def exported(adapted, out: Path, **options) -> Path:
    network, processor, recipe = adapted
    return export(network, out, method=METHOD, processor=processor, recipe=recipe, **options)


def logits(network, method=None) -> torch.Tensor:
    made = case("llava", "left_padding")
    if method is None:
        with torch.no_grad():
            return network(**made.inputs).logits
    with adsc.compress(network, method), torch.no_grad():
        return network(**made.inputs).logits


def test_the_folder_opens_as_it_was(adapted, tmp_path, monkeypatch):
    expected = logits(adapted[0], METHOD)
    out = exported(adapted, tmp_path / "new" / "result", figures=FIGURES)
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["result"]  # nothing temporary is left
    monkeypatch.chdir(tmp_path)  # from anywhere
    network, processor = adsc.load("new/result")
    assert network.adsc.method == METHOD
    assert processor.tokenizer.get_vocab() == adapted[1].tokenizer.get_vocab()
    assert torch.equal(logits(network), expected)
    base = AutoModelForImageTextToText.from_pretrained(network.config._name_or_path or out)
    assert (logits(base, METHOD) - expected).abs().max() > 1e-3


def test_budgets_that_were_trained_are_taken(adapted, tmp_path):
    out = exported(adapted, tmp_path / "result")
    network, _ = adsc.load(out, retained="1/3")
    assert str(network.adsc.method.schedule) == BUDGETS["1/3"]
    assert adsc.Schedule.for_budget(6, "1/3") != network.adsc.method.schedule
    with network.adsc.budget("1/2"):
        assert str(network.adsc.method.schedule) == BUDGETS["1/2"]
    with network.adsc.budget("2/3"):
        assert network.adsc.method.schedule == adsc.Schedule.for_budget(6, "2/3")
    dense, _ = adsc.load(out, retained=1)
    assert torch.equal(logits(dense), logits(adapted[0]))


def test_the_card(adapted, tmp_path):
    out = exported(adapted, tmp_path / "result", figures=FIGURES)
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "peft"
    assert "base_model" not in front  # a folder is no name on the hub
    assert "| 1/2 | `1:1/2,4:1/2` | default |" in text
    assert "| 1 | dense |" in text
    assert "|   | loss | accuracy |\n| --- | --- | --- |\n| dense | 1.25 | 81.0 ± 0.5 |\n| 1/3 | 1.5 |   |" in text
    written = check(yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0]))
    assert written == adapted[2]
    hub = exporting.card("owner/name", METHOD)
    assert yaml.safe_load(hub.split("---\n")[1])["base_model"] == "owner/name"
    assert "Measured" not in hub


def test_figures_that_come_later(adapted, tmp_path):
    out, early = exported(adapted, tmp_path / "later"), exported(adapted, tmp_path / "early", figures=FIGURES)
    assert "Measured" not in (out / "README.md").read_text()
    describe(out, FIGURES)
    assert (out / "README.md").read_text() == (early / "README.md").read_text()
    assert {path.name for path in out.iterdir()} == FILES


@pytest.mark.parametrize("attached", [False, True])
def test_merged(adapted, tmp_path, attached):
    out = exported(adapted, tmp_path / "result")
    merged = merge(out, tmp_path / "merged")
    assert not (merged / "adapter_config.json").exists()
    found, expected = ((adsc.load(each, retained=None if attached else 1)[0]) for each in (merged, out))
    assert not any("lora" in name or "modules_to_save" in name for name, _ in found.named_parameters())
    assert (logits(found) - logits(expected)).abs().max() <= 1e-5
    assert found.adsc.method == expected.adsc.method
    front = yaml.safe_load((merged / "README.md").read_text().split("---\n")[1])
    assert (front["library_name"], front["tags"]) == ("transformers", ["adsc"])
    half, _ = adsc.load(merge(out, tmp_path / "half", dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16


def shipped(adapted, folder, path: Path, **options) -> Path:
    """Model and adapter in a box, which then moves."""
    out = exported(adapted, path / "run" / "result")
    shutil.copytree(folder / "model", path / "packed" / "model")
    ship(out, path / "packed" / "adapter", path / "packed" / "model", **options)
    (path / "packed").rename(path / "box")
    return path / "box" / "adapter"


def test_shipped_beside_its_model(adapted, folder, tmp_path, monkeypatch):
    expected = logits(adapted[0], METHOD)
    monkeypatch.chdir(tmp_path)
    box = shipped(adapted, folder, tmp_path, name="the one in the box", figures=FIGURES)
    assert {path.name for path in box.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "adsc_config.json", "recipe.yaml",
    }  # fmt: skip
    weights = load_file(box / "adapter_model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float16}
    shutil.rmtree(tmp_path / "run")
    monkeypatch.chdir("/")
    network, processor = adsc.load(box)
    assert network.adsc.method == METHOD
    assert processor.chat_template == adapted[1].chat_template
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert 0 < (logits(network) - expected).abs().max() < 0.01 * expected.abs().max()
    text = "".join(path.read_text() for path in box.iterdir() if path.suffix != ".safetensors")
    assert str(tmp_path) not in text.replace(str(folder), "")  # where it was made is nobody's business
    assert "# The one in the box, trained" in text
    assert "| dense | 1.25 | 81.0 ± 0.5 |" in text
    assert "base_model: " not in text
    recipe = yaml.safe_load((box / "recipe.yaml").read_text())
    assert (recipe["model"], recipe["output"]) == ("packed/model", "run")
    describe(box, {"later": {"loss": 2}}, "the one in the box")
    assert "| later | 2 |" in (box / "README.md").read_text()
    merged, _ = adsc.load(merge(box, tmp_path / "merged"))
    assert (logits(merged) - logits(network)).abs().max() <= 1e-5


def test_what_is_not_shipped(adapted, folder, tmp_path):
    out, other = exported(adapted, tmp_path / "result"), tmp_path / "other"
    shutil.copytree(folder / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thoughts.txt").write_text("mine")
    for arguments, message in (
        ((folder / "model", tmp_path / "new", folder / "model"), "no adapter to ship"),
        ((out, tmp_path / "notes" / ".." / "result", folder / "model"), "own folder"),
        ((out, tmp_path / "new", other), "has other weights than"),
        ((out, tmp_path / "notes", folder / "model"), "something other than a result"),
    ):
        with pytest.raises(adsc.InputError, match=message):
            ship(*arguments)
    assert not (tmp_path / "new").exists()


def test_an_earlier_result_is_replaced_at_once(adapted, tmp_path, monkeypatch):
    out = exported(adapted, tmp_path / "result")
    before = load_file(out / "adapter_model.safetensors")
    for weight in adapted[0].parameters():
        weight.data += 0.01
    with monkeypatch.context() as patch:

        def full_disk(*_, **__):
            raise OSError("no space left")

        patch.setattr(ADSC, "save_pretrained", full_disk)  # after the weights were written
        with pytest.raises(OSError, match="no space"):
            exported(adapted, out)
    kept = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], before[name]) for name in before)
    assert os.listdir(tmp_path) == ["result"]
    exported(adapted, out)
    after = load_file(out / "adapter_model.safetensors")
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert os.listdir(tmp_path) == ["result"]


def test_what_is_no_result_is_left_alone(adapted, tmp_path, folder):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thoughts.txt").write_text("mine")
    with pytest.raises(adsc.InputError, match="something other than a result"):
        exported(adapted, tmp_path / "notes")
    with pytest.raises(adsc.InputError, match="is a file"):
        exported(adapted, tmp_path / "notes" / "thoughts.txt")
    assert os.listdir(tmp_path / "notes") == ["thoughts.txt"]
    with pytest.raises(adsc.InputError, match="no adapter to merge"):
        merge(folder / "model", tmp_path / "merged")
    out = exported(adapted, tmp_path / "result")
    with pytest.raises(adsc.InputError, match="own folder"):
        merge(out, tmp_path / "notes" / ".." / "result")
    moved = copy.copy(json.loads((out / "adapter_config.json").read_text()))
    moved["base_model_name_or_path"] = str(tmp_path / "nowhere")
    (out / "adapter_config.json").write_text(json.dumps(moved))
    with pytest.raises(adsc.InputError, match="nowhere"):
        merge(out, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    shutil.rmtree(out)
