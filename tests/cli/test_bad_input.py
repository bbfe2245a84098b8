"""Bad input ends in one line on the error stream and status 2, before any weights are read where that is possible."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from PIL import Image

from .conftest import Ran

Run = Callable[..., Ran]


def refused(ran: Ran, *words: str) -> None:
    assert ran.status == 2, ran
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1, ran.err
    for word in words:
        assert word in ran.err


@pytest.mark.parametrize(("arguments", "word"), [
    (["--schedule", "3:1/2;5:1/2"], "is not a number"),
    (["--schedule", "half"], "write it like 3:1/2,11:1/2"),
    (["--schedule", "0:1/2"], "first decoder layer that can reduce is 1"),
    (["--schedule", "6:1/2"], "layers 1 to 5"),
    (["--schedule", "3:1/2,2:1/2"], "must increase"),
    (["--schedule", "3:1/2,3:1/2"], "must increase"),
    (["--schedule", "3:0"], "outside (0, 1]"),
    (["--schedule", "3:3/2"], "outside (0, 1]"),
    (["--schedule", "3:x"], "not a number"),
    (["--schedule", ""], "reduces nothing"),
    (["--retain", "1"], "reduces nothing"),
    (["--retain", "0"], "outside (0, 1]"),
    (["--retain", "-1/3"], "outside (0, 1]"),
    (["--retain", "a third"], "not a number"),
    (["--retain", "1/100"], "the nearest is"),
    (["--retain", "1/3", "--schedule", "3:1/2"], "give one of them"),
    (["--pattern", "middle"], "last, first, grid, rows, random"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["cost", "run"])
def test_reduction(adsc_run: Run, pocket: Path, image: Path, command: str, arguments: list[str], word: str) -> None:
    extra = ["--image", image] if command == "run" else []
    refused(adsc_run(command, "--model", pocket, *extra, *arguments), word)


def png(width: int, height: int) -> bytes:
    """A PNG that claims to be this large and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def broken(kind: str, folder: Path, image: Path) -> tuple[Path, str]:
    """A path that cannot be read as an image, and why."""
    path = folder / "image.png"
    if kind == "missing":
        return path, "no such file"
    if kind == "folder":
        return folder, "not a file"
    Image.open(image).save(folder / "whole.jpg")
    contents, why = {
        "cut PNG": (image.read_bytes()[:-300], "damaged or cut off"),
        "cut JPEG": ((folder / "whole.jpg").read_bytes()[:-300], "damaged or cut off"),
        "text": (b"no image at all", "not an image"),
        "empty": (b"", "not an image"),
        "bomb": (png(100_000, 100_000), "pixels"),
        # Up to twice its limit Pillow itself would only warn.
        "small bomb": (png(10_000, 12_000), "pixels"),
    }[kind]
    path.write_bytes(contents)
    return path, why


KINDS = ("missing", "folder", "cut PNG", "cut JPEG", "text", "empty", "bomb", "small bomb")


@pytest.mark.parametrize("kind", KINDS)
def test_image(adsc_run: Run, pocket: Path, image: Path, tmp_path: Path, kind: str) -> None:
    path, word = broken(kind, tmp_path, image)
    refused(adsc_run("run", "--model", pocket, "--image", path), str(path), word)


@pytest.mark.parametrize(("images", "prompt", "word"), [
    (0, "what is this?", "no image was given"),
    (0, "what is <image>?", "no image was given"),
    (2, "what is <image>?", "1 image placeholders (<image>) for 2 images"),
    (1, "is <image> like <image>?", "2 image placeholders (<image>) for 1 images"),
])  # fmt: skip
def test_prompt(adsc_run: Run, pocket: Path, image: Path, images: int, prompt: str, word: str) -> None:
    refused(adsc_run("run", "--model", pocket, *["--image", image] * images, "--prompt", prompt), word)


def llama() -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )


def mllama() -> transformers.PreTrainedConfig:
    both = {"hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    text = {"num_hidden_layers": 3, "cross_attention_layers": [1], "vocab_size": 32, "pad_token_id": 0}
    depth = {"num_hidden_layers": 2, "num_global_layers": 1, "intermediate_layers_indices": [0], "attention_heads": 2}
    sizes = {"image_size": 8, "patch_size": 4, "vision_output_dim": 32, "supported_aspect_ratios": [[1, 1]]}
    return transformers.MllamaConfig(text_config=both | heads | text, vision_config=both | depth | sizes)


@pytest.mark.parametrize(("config", "model", "word"), [
    (llama, "LlamaForCausalLM", "text-only"),
    (mllama, "MllamaForConditionalGeneration", "by cross-attention"),
])  # fmt: skip
def test_model_without_vision_tokens(
    adsc_run: Run, image: Path, tmp_path: Path,
    config: Callable[[], transformers.PreTrainedConfig], model: str, word: str,
) -> None:  # fmt: skip
    getattr(transformers, model)(config()).save_pretrained(tmp_path)
    refused(adsc_run("run", "--model", tmp_path, "--image", image), word)


def test_model_without_decoder_layers(adsc_run: Run, image: Path, tmp_path: Path) -> None:
    transformers.ResNetConfig().save_pretrained(tmp_path)
    for arguments in (["cost"], ["run", "--image", image]):
        refused(adsc_run(*arguments, "--model", tmp_path), "resnet has no decoder layers")


def test_model_folder(adsc_run: Run, pocket: Path, image: Path, tmp_path: Path) -> None:
    def run(folder: Path) -> Ran:
        return adsc_run("run", "--model", folder, "--image", image)

    refused(run(tmp_path / "none"), "there is no")
    refused(run(tmp_path), "cannot read the config")
    shutil.copytree(pocket, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    refused(run(tmp_path / "model"), "cannot load", "model.safetensors")
    values = json.loads((pocket / "config.json").read_text())
    values["text_config"]["hidden_size"] = "wide"
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    refused(run(tmp_path / "model"), "cannot read the config", "hidden_size")
    (tmp_path / "model" / "config.json").write_text("{")
    refused(run(tmp_path / "model"), "cannot read the config")


@pytest.mark.parametrize(("name", "word"), [
    ("none/picture.png", "there is no folder"),
    ("file/picture.png", "there is no folder"),
    ("folder.png", "is a folder"),
    ("picture.gif", "must end in .png"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["demo", "run"])
def test_output(adsc_run: Run, pocket: Path, image: Path, tmp_path: Path, command: str, name: str, word: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    extra = ["--out"] if command == "demo" else ["--model", pocket, "--image", image, "--picture"]
    refused(adsc_run(command, *extra, tmp_path / name), word)


def test_other_options(adsc_run: Run, pocket: Path, image: Path) -> None:
    run = ("run", "--model", pocket, "--image", image)
    refused(adsc_run(*run, "--only", "sparse"), "dense or reduced")
    refused(adsc_run(*run, "--device", "cuda:99"), "cannot be used")
    refused(adsc_run(*run, "--dtype", "float12"), "auto, float32")
    refused(adsc_run(*run, "--positions", "some"), "original, compact")
    refused(adsc_run("cost", "--model", pocket, "--dtype", "float12"), "float16")
    refused(adsc_run("demo", "--image-index", 2000), "give one of 0 to")
    assert adsc_run("run", "--no-such-option").status == 2


def test_vision_tokens_that_the_config_does_not_tell(adsc_run: Run, tiled: Path) -> None:
    refused(adsc_run("cost", "--model", tiled), "give --vision-tokens")
    refused(adsc_run("cost", "--model", tiled, "--vision-tokens", 130), "tiles")
    assert adsc_run("cost", "--model", tiled, "--vision-tokens", 200, "--tiles", 3).status == 0


def test_as_a_program() -> None:
    """Once as people run it: the traceback is for ``--debug`` alone."""
    command = [sys.executable, "-c", "from adsc.cli import main; main()", "run", "--prompt", "what is this?"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    refused(Ran(plain.returncode, plain.stdout, plain.stderr), "no image was given")
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "InputError" in debug.stderr
