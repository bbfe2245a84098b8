"""Checkpoints with a saved reduction, and the pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image as Picture
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

from .tiny import IMAGE, SCHEDULE, TEXT, model

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
    network.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"config.json", "model.safetensors"}
    assert "adsc" not in (tmp_path / "config.json").read_text()


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
        ("images only", "vit is text-only, or has no language model"),
        ("no decoder", "resnet is text-only, or has no language model"),
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
