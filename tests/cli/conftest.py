"""Checkpoints on disk, made here, and a way to run the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers

import adsc
from adsc.cli import main
from adsc.pocket.building import CHAT_TEMPLATE, build_model, build_processor, build_tokenizer
from adsc.pocket.splits import stored_image

LAYERS = 6
SCHEDULE = "2:1/2,4:1/4"
BUDGETS = {"1/3": "1:1/4,3:1/2", "2/9": "1:1/8,4:1/2", "1/9": "1:1/16,2:1/4"}


class Ran(NamedTuple):
    """What a run of ``adsc`` left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def adsc_run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*arguments: object) -> Ran:
        capsys.readouterr()  # what making a checkpoint printed
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return Ran(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in the box with six layers, untrained."""
    folder = tmp_path_factory.mktemp("pocket")
    processor = build_processor()
    # Wide weights: dense and reduced must not answer alike.
    build_model(len(processor.tokenizer), num_hidden_layers=LAYERS, initializer_range=0.3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(pocket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of ``pocket``, and where it learned which schedules: none that a budget would give."""
    torch.manual_seed(3)
    base = transformers.AutoModelForImageTextToText.from_pretrained(pocket)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(base, lora).save_pretrained(folder)
    adsc.ADSCConfig(BUDGETS["1/3"], budgets=BUDGETS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT, untrained: tiles of 8 x 8 patches, newline tokens."""
    folder = tmp_path_factory.mktemp("tiled")
    base = build_model(len(build_tokenizer()), num_hidden_layers=LAYERS).config
    pinpoints = [[64, 128], [128, 64], [128, 128]]
    base.vision_config.image_size = 64
    config = transformers.LlavaNextConfig(
        text_config=base.text_config,
        vision_config=base.vision_config,
        image_token_id=base.image_token_id,
        vision_feature_layer=-1,
        image_grid_pinpoints=pinpoints,
    )
    torch.manual_seed(0)
    transformers.LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 64}, crop_size=size, image_grid_pinpoints=pinpoints
    )
    transformers.LlavaNextProcessor(
        images,
        build_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "scene.png"
    stored_image(0).save(path)
    return path


@pytest.fixture(scope="session")
def direct(pocket: Path) -> tuple[Any, Any]:
    """Model and processor of ``pocket``, to compare with."""
    return adsc.load(pocket)
