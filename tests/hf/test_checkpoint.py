"""Checkpoints with a saved reduction, and the pipeline."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ViTConfig,
)
from transformers import pipeline as make_pipeline

import adsc
from adsc.hf import checkpoint

from .tiny import IMAGE, SCHEDULE, TEXT, case, model

# PEFT asks for it by its name of 5.16.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def processor() -> LlavaProcessor:
    words = {f"w{i}": i for i in range(IMAGE)} | {"<image>": IMAGE}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w1", padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 10, "width": 10}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, do_convert_rgb=True)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a saved reduction."""
    path = tmp_path_factory.mktemp("checkpoint")
    model("llava").save_pretrained(path)
    processor().save_pretrained(path)
    adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), positions="compact").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    return Picture.fromarray(pixels)


def test_a_saved_reduction_is_attached(folder, picture):
    network, made = adsc.load(folder)
    assert str(network.adsc.method.schedule) == SCHEDULE
    assert network.adsc.method.positions == "compact"
    inputs = made(images=picture, text="w5 <image> w7 w8", return_tensors="pt")
    out = network.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    assert network.adsc.last_plans[0].vision_tokens_per_layer() == [25, 17, 9, 9, 3, 3]
    with adsc.compress(model("llava"), network.adsc.method):
        assert torch.equal(model("llava").generate(**inputs, max_new_tokens=3, do_sample=False), out)


def test_another_budget_than_the_saved_one(folder):
    network, _ = adsc.load(folder, retained="1/2")
    assert network.adsc.method.schedule == adsc.Schedule.for_budget(6, "1/2")
    assert network.adsc.method.positions == "compact"
    dense, _ = adsc.load(folder, retained=1)
    assert not dense.adsc.method.reduces


def test_options_reach_the_model(folder):
    network, _ = adsc.load(str(folder), dtype=torch.float64, attn_implementation="eager")
    assert network.dtype == torch.float64
    assert network.config._attn_implementation == "eager"


def test_a_checkpoint_without_a_saved_reduction(tmp_path):
    model("llava").save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    assert not hasattr(adsc.load(tmp_path)[0], "adsc")
    assert adsc.load(tmp_path, retained="1/2")[0].adsc.method.positions == "original"


def test_saving_an_attached_model_saves_the_model(folder, tmp_path):
    network, _ = adsc.load(folder)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    assert network.state_dict().keys() == plain.state_dict().keys()
    reduced = logits(network)
    network.save_pretrained(tmp_path)
    assert "adsc" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(network), reduced)  # saving disturbs nothing
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not hasattr(again, "adsc")
    assert torch.equal(logits(again), logits(plain))
    for name, weight in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    again.load_state_dict(network.state_dict())
    assert not torch.equal(logits(again), reduced)


def bad_folder(kind, path):
    if kind == "missing":
        return path / "nothing"
    if kind == "empty":
        return path
    if kind == "without weights":
        model("llava").config.save_pretrained(path)
        processor().save_pretrained(path)
    elif kind == "without processor":
        model("llava").save_pretrained(path)
    elif kind == "text only":
        LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(path)
    elif kind == "images only":
        ViTConfig().save_pretrained(path)
    elif kind == "no decoder":
        ResNetConfig().save_pretrained(path)
    elif kind == "invalid config":
        values = model("llava").config.to_dict()
        values["text_config"]["hidden_size"] = "wide"
        (path / "config.json").write_text(json.dumps(values))
    elif kind == "cut weights":
        model("llava").save_pretrained(path)
        processor().save_pretrained(path)
        weights = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(weights[:-1000])
    else:
        model("llava").save_pretrained(path)
        processor().save_pretrained(path)
        (path / "adsc_config.json").write_text(kind)
    return path


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("missing", "there is no folder"),
        ("empty", "cannot read the config of .*Unrecognized model"),
        ("without weights", "cannot load .*safetensors"),
        ("without processor", "cannot load"),
        ("text only", "llama is text-only"),
        ("images only", "vit is text-only, or has no "),
        ("no decoder", "resnet is text-only, or has no "),
        ("invalid config", "cannot read the config .*hidden_size"),
        ("cut weights", "cannot load"),
        ("{", "not valid JSON"),
        (json.dumps({"type": "adsc", "schedule": "9:1/2"}), "the model has 6 layers"),
    ],
)
def test_bad_checkpoints_are_one_line(kind, pattern, tmp_path):
    with pytest.raises(adsc.InputError, match=pattern) as caught:
        adsc.load(bad_folder(kind, tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["text only", "images only", json.dumps({"type": "adsc", "schedule": "9:1/2"})])
def test_refused_before_weights_are_read(kind, tmp_path, monkeypatch):
    path = bad_folder(kind, tmp_path)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("weights read"))
    with pytest.raises(adsc.InputError):
        adsc.load(path)


def test_a_package_that_the_processor_needs(folder, monkeypatch):
    def needs_torchvision(*_, **__):
        raise ImportError("\nVideoProcessor requires the Torchvision library. See the installation page.\nAnd more.")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", needs_torchvision)
    with pytest.raises(adsc.InputError, match=r"yet: VideoProcessor requires the Torchvision library$"):
        adsc.load(folder)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA adapter with a reduction of its own, as PEFT saves it, and the logits of the reduced adapted model."""
    peft = pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(folder), lora).eval()
    adapted.save_pretrained(path)
    adsc.ADSCConfig("2:1/3").save_pretrained(path)
    with torch.no_grad(), adsc.compress(adapted, "2:1/3"):
        return path, adapted(**case("llava", "single").inputs).logits


def logits(network):
    with torch.no_grad():
        return network(**case("llava", "single").inputs).logits


def test_an_adapter_finds_its_model(adapter, folder):
    path, expected = adapter
    network, made = adsc.load(path)
    assert str(network.adsc.method.schedule) == "2:1/3"
    assert torch.equal(logits(network), expected)
    assert made.chat_template == TEMPLATE  # the processor is that of the model
    assert not torch.equal(logits(adsc.load(folder, retained=1)[0]), expected)


def test_an_adapter_beside_its_model(adapter, folder, tmp_path):
    for source in (folder, adapter[0]):
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    change(tmp_path, base_model_name_or_path="/moved/away")  # the model at hand comes first
    assert torch.equal(logits(adsc.load(tmp_path)[0]), adapter[1])


def travelling(adapter: Path, folder: Path, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Adapter and model in one folder, the first naming the second by a relative path."""
    shutil.copytree(folder, path / "model")
    shutil.copytree(adapter, path / "adapter")
    change(path / "adapter", base_model_name_or_path="../model")
    rewrite(path / "adapter", lambda weights: {name: weight.to(dtype) for name, weight in weights.items()})
    return path / "adapter"


def test_an_adapter_travels_with_its_model(adapter, folder, tmp_path, monkeypatch):
    path = travelling(adapter[0], folder, tmp_path / "box")
    elsewhere = tmp_path / "some" / "where"
    elsewhere.mkdir(parents=True)
    other = copy.deepcopy(model("llava").config)
    other.text_config.num_hidden_layers = 3
    type(model("llava"))(other).save_pretrained(elsewhere.parent / "model")
    monkeypatch.chdir(elsewhere)  # from here "../model" is another one
    assert torch.equal(logits(adsc.load(path)[0]), adapter[1])
    assert checkpoint.base_of(str(path)) == str((path.parent / "model").resolve())
    assert str(checkpoint.read_reduction(str(path)).schedule) == "2:1/3"
    monkeypatch.chdir(path)
    assert torch.equal(logits(adsc.load(".")[0]), adapter[1])
    peft = pytest.importorskip("peft")
    plain = AutoModelForImageTextToText.from_pretrained("../adapter")  # as transformers reads it, from the right place
    adapted = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(path.parent / "model"), path)
    for network in (plain, adapted.eval()):
        with adsc.compress(network, "2:1/3"):
            assert torch.equal(logits(network), adapter[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_in_half_precision_computes_as_its_model(adapter, folder, tmp_path, dtype):
    network, _ = adsc.load(travelling(adapter[0], folder, tmp_path / "box", torch.float16), dtype=dtype)
    assert {weight.dtype for name, weight in network.named_parameters() if "lora" in name} == {dtype}
    if dtype == torch.float32:
        difference = (logits(network) - adapter[1]).abs().max()
        assert 0 < difference < 1e-2


def test_a_relative_path_that_leads_nowhere_from_the_adapter(adapter, folder, tmp_path, monkeypatch):
    path = travelling(adapter[0], folder, tmp_path / "box")
    (path.parent / "model").rename(tmp_path / "model")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # a path from the working directory, as ever
    assert torch.equal(logits(adsc.load(path)[0]), adapter[1])
    monkeypatch.chdir(tmp_path / "box")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(adsc.InputError, match=r"config of '\.\./model', which the adapter") as caught:
        adsc.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["lacks 4 weights of", "cannot load .*mismatched", "cannot load .*nothing"])
def test_bad_adapters_that_travel_are_one_line(adapter, folder, pattern, tmp_path):
    path = travelling(adapter[0], folder, tmp_path / "box")
    BAD_ADAPTERS[pattern](path)
    with pytest.raises(adsc.InputError, match=pattern) as caught:
        adsc.load(path)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_a_reduction_takes_that_of_its_model(adapter, tmp_path):
    shutil.copytree(adapter[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "adsc_config.json").unlink()
    processor().save_pretrained(tmp_path)
    method = adsc.load(tmp_path)[0].adsc.method
    assert (str(method.schedule), method.positions) == (SCHEDULE, "compact")


def change(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder: Path, make) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(make(load_file(path)), path, metadata={"format": "pt"})


BAD_ADAPTERS = {
    "lacks 4 weights of": lambda path: rewrite(path, lambda weights: dict(sorted(weights.items())[4:])),
    "cannot load .*mismatched": lambda path: rewrite(
        path, lambda weights: {name: weight[:, 1:].contiguous() for name, weight in weights.items()}
    ),
    "cannot load .*safetensors": lambda path: (path / "adapter_model.safetensors").unlink(),
    "cannot load .*nothing": lambda path: change(path, target_modules=["nothing"]),
    "not name its model": lambda path: change(path, base_model_name_or_path=None),
    "config of '/moved/away', which the adapter": lambda path: change(path, base_model_name_or_path="/moved/away"),
    "not valid JSON": lambda path: (path / "adapter_config.json").write_text("{"),
    "the model has 6 layers": lambda path: adsc.ADSCConfig("6:1/2").save_pretrained(path),
}


@pytest.mark.parametrize("pattern", BAD_ADAPTERS)
def test_bad_adapters_are_one_line(adapter, pattern, tmp_path):
    shutil.copytree(adapter[0], tmp_path, dirs_exist_ok=True)
    BAD_ADAPTERS[pattern](tmp_path)
    with pytest.raises(adsc.InputError, match=pattern) as caught:
        adsc.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_peft(adapter, monkeypatch):
    monkeypatch.setattr(checkpoint, "is_peft_available", lambda: False)
    with pytest.raises(adsc.InputError, match="which needs peft; pip install peft"):
        adsc.load(adapter[0])


def cached(home: Path, name: str, *folders: Path) -> None:
    """Files as the hub's client keeps them."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    for folder in folders:
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40), dirs_exist_ok=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


HUB = """
import json, sys, warnings
import adsc
from transformers.utils import logging
logging.disable_progress_bar()
out = {"config": adsc.ADSCConfig.from_pretrained("owner/model").to_dict()}
for name, retained in [("owner/model", None), ("owner/adapter", None), ("owner/plain", None), ("owner/plain", "1/2")]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model, processor = adsc.load(name, retained=retained, trust_remote_code=False)
    out[f"{name} {retained}"] = [
        str(model.adsc.method.schedule) if hasattr(model, "adsc") else None,
        hasattr(model, "peft_config"),
        type(processor).__name__,
        [str(w.message) for w in caught if "adsc_config" in str(w.message)],
    ]
try:
    adsc.load("owner/nothing")
except adsc.InputError as error:
    out["nothing"] = str(error)
print(json.dumps(out))
"""


def test_hub_ids(folder, adapter, tmp_path):
    plain, named = tmp_path / "plain", tmp_path / "named"
    shutil.copytree(folder, plain)
    (plain / "adsc_config.json").unlink()
    shutil.copytree(adapter[0], named)
    change(named, base_model_name_or_path="owner/model")
    for name, path in {"model": folder, "adapter": named, "plain": plain}.items():
        cached(tmp_path, f"owner/{name}", path)
    # The hub's client reads its settings when it is imported.
    settings = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    without = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    done = subprocess.run(
        [sys.executable, "-c", HUB], env={**without, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert out["config"] == adsc.ADSCConfig.from_pretrained(folder).to_dict()
    assert out["owner/model None"] == [SCHEDULE, False, "LlavaProcessor", []]
    assert out["owner/adapter None"] == ["2:1/3", True, "LlavaProcessor", []]
    # Whether the hub has a config for it nobody can tell.
    schedule, adapted, _, (warning,) = out["owner/plain None"]
    assert (schedule, adapted) == (None, False)
    assert warning.endswith("going on with the dense model")
    schedule, adapted, _, (warning,) = out["owner/plain 1/2"]
    assert (schedule, adapted) == (str(adsc.Schedule.for_budget(6, "1/2")), False)
    assert warning.endswith("going on with defaults")
    assert out["nothing"].startswith("cannot ")
    assert "\n" not in out["nothing"]


def test_what_a_newer_version_wrote(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adsc_config.json"
    values = {**json.loads(path.read_text()), "version": 2}
    path.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"version 2, newer than this adsc knows \(1\); update adsc"):
        assert str(adsc.load(tmp_path)[0].adsc.method.schedule) == SCHEDULE
    path.write_text(json.dumps({**values, "pattern": "spiral"}))
    with (
        pytest.warns(UserWarning, match="newer"),
        pytest.raises(adsc.InputError, match=r"'spiral' is unknown.* or update adsc: the config is of version 2"),
    ):
        adsc.load(tmp_path)
    for version in ("1", 0, 1.5, None, True):
        path.write_text(json.dumps({**values, "version": version}))
        with pytest.raises(adsc.InputError, match=r"version .* must be a whole number"):
            adsc.load(tmp_path)


def test_budget_out_of_reach(folder):
    with pytest.raises(adsc.InputError, match="nearest"):
        adsc.load(folder, retained="1/1000")


def test_pipeline(folder, picture):
    network, made = adsc.load(folder)
    pipe = make_pipeline("image-text-to-text", model=network, processor=made)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "w5 w9 w11"}]
    messages = [{"role": "w3", "content": content}]
    options = {"max_new_tokens": 4, "do_sample": False}
    answer = pipe(text=messages, generate_kwargs=options, return_full_text=False)[0]["generated_text"]
    assert network.adsc.last_plans[0].vision_tokens_per_layer() == [25, 17, 9, 9, 3, 3]
    prompt = made.apply_chat_template(messages, add_generation_prompt=True)
    inputs = made(images=picture, text=prompt, return_tensors="pt")
    tokens = network.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert answer.split() == made.decode(tokens, skip_special_tokens=True).split()
