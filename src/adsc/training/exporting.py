"""The result of a training: a folder with adapter, config, processor and model card, which :func:`adsc.load` opens."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..config import FILE_NAME, ADSCConfig
from ..errors import InputError
from ..hf.checkpoint import ADAPTER, PROCESSOR, base_of, read_config
from ..methods import ADSC
from .recipe import Recipe, read

RECIPE = "recipe.yaml"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"

Figures = Mapping[str, Mapping[str, object]]
"""Rows of the card's table: a name, and of each column its figure."""


def export(
    model: PeftModel,
    folder: str | os.PathLike[str],
    *,
    method: ADSC,
    processor: Any,
    recipe: Recipe | None = None,
    figures: Figures | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Write the result folder: to a temporary name, then renamed, in place of an earlier result.

    Parameters
    ----------
    model
        With the trained adapter.
    method
        Saved as the config: its schedule is what :func:`adsc.load` attaches.
    recipe
        Told in the card, and saved as ``recipe.yaml``.
    figures
        Measured figures, for a table in the card.
    state
        The model's weights, where they have to be gathered from several processes first.

    Raises
    ------
    InputError
        When ``folder`` is there and holds something other than a result.
    """
    base = str(next(iter(model.peft_config.values())).base_model_name_or_path)
    with _renamed(Path(folder)) as partial:
        model.save_pretrained(str(partial), state_dict=state)
        # A folder is found from anywhere by its whole path alone.
        if Path(base).is_dir():
            settings = json.loads((partial / ADAPTER).read_text(encoding="utf-8"))
            settings["base_model_name_or_path"] = str(Path(base).resolve())
            (partial / ADAPTER).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        _complete(partial, method, processor, card(base, method, recipe, figures), recipe)
    return Path(folder)


def merge(folder: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Path:
    """Bake the adapter of a result folder into its model's weights: ``out`` needs no PEFT.

    Parameters
    ----------
    folder
        A result folder.
    out
        Where to, with config, processor and card.
    options
        Passed to ``from_pretrained`` (``dtype``, …).

    Raises
    ------
    InputError
        When ``folder`` holds no adapter, or ``out`` something other than a result.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / ADAPTER).is_file():
        raise InputError(f"{folder} has no {ADAPTER}, so there is no adapter to merge; give a folder that train wrote")
    if folder.resolve() == out.resolve():
        raise InputError(f"{out} is the adapter's own folder; merge into another one")
    read_config(str(folder))  # the model it is for is there
    base = base_of(str(folder))
    processed = any((folder / file).is_file() for file in PROCESSOR)
    with _renamed(out) as partial:
        model = AutoModelForImageTextToText.from_pretrained(base, **options)
        PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(partial)
        method = ADSC(**vars(ADSCConfig.from_pretrained(folder)))
        text = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).exists() else card(base, method)
        text = text.replace("library_name: peft\n", "library_name: transformers\n").replace("- lora\n", "")
        _complete(partial, method, AutoProcessor.from_pretrained(folder if processed else base), text)
        if (folder / RECIPE).exists():
            shutil.copy(folder / RECIPE, partial / RECIPE)
    return out


def ship(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    name: str | None = None,
    figures: Figures | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Copy the adapter of a result folder to where it travels with its model, as small as it goes.

    The adapter names its model by the relative path from ``out`` to ``base``, which :func:`adsc.load` follows. There
    are no processor files: those of the model serve. Paths of the recipe's model and output become relative to the
    working directory.

    Parameters
    ----------
    folder
        A result folder.
    out, base
        Where the adapter goes, and the folder of its model: both in what is to be moved as a whole.
    name
        What the card calls the model.
    figures
        Measured figures, for a table in the card.
    dtype
        Of the weights in the file; what computes is the type that the model is loaded with.

    Raises
    ------
    InputError
        When ``folder`` holds no adapter, ``base`` has other weights than the model it was trained on, or ``out`` holds
        something other than a result.
    """
    folder, out, base = Path(folder), Path(out), Path(base)
    if not (folder / ADAPTER).is_file():
        raise InputError(f"{folder} has no {ADAPTER}, so there is no adapter to ship; give a folder that train wrote")
    if folder.resolve() == out.resolve():
        raise InputError(f"{out} is the adapter's own folder; ship to another one")
    method = ADSC(**vars(ADSCConfig.from_pretrained(folder)))
    trained_on = Path(base_of(str(folder)))
    if trained_on.is_dir() and _weights(trained_on) != _weights(base):
        raise InputError(f"{base} has other weights than {trained_on}, which the adapter was trained on")
    recipe = None
    if (folder / RECIPE).exists():
        recipe = read(folder / RECIPE)
        recipe = recipe.model_copy(update={"model": _relative(base), "output": _relative(recipe.output)})
    with _renamed(out) as partial:
        weights = {key: value.to(dtype).contiguous() for key, value in load_file(folder / WEIGHTS).items()}
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = Path(os.path.relpath(base.resolve(), out.resolve())).as_posix()
        (partial / ADAPTER).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        _complete(partial, method, None, card(str(base), method, recipe, figures, name), recipe)
    return out


def describe(folder: str | os.PathLike[str], figures: Figures, name: str | None = None) -> None:
    """Write the card of a result folder again, with a table of measured figures.

    Raises
    ------
    InputError
        When ``folder`` is no result.
    """
    folder = Path(folder)
    method = ADSC(**vars(ADSCConfig.from_pretrained(folder)))
    if not (folder / ADAPTER).is_file():
        raise InputError(f"{folder} has no {ADAPTER}; give a folder that train wrote")
    recipe = read(folder / RECIPE) if (folder / RECIPE).exists() else None
    partial = folder / f".{CARD}.{os.getpid()}"
    partial.write_text(card(base_of(str(folder)), method, recipe, figures, name), encoding="utf-8")
    partial.replace(folder / CARD)


def check_free(folder: Path) -> None:
    """Raise :class:`adsc.InputError` when something other than a result is there, which is not to be replaced."""
    if folder.is_file():
        raise InputError(f"{folder} is a file; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FILE_NAME).is_file():
        raise InputError(f"{folder} holds something other than a result, which is left alone; give another folder")


def card(
    base: str, method: ADSC, recipe: Recipe | None = None, figures: Figures | None = None, name: str | None = None
) -> str:
    """The model card, in the form that the Hugging Face hub reads. ``name`` is what it calls the model."""
    called = Path(base).name if Path(base).is_dir() else base
    title, name = (name[:1].upper() + name[1:], name) if name else (called, f"`{called}`")
    known = "" if Path(base).is_dir() else f"base_model: {base}\n"
    lines = [
        f"---\n{known}library_name: peft\npipeline_tag: image-text-to-text\ntags:\n- adsc\n- lora\n---",
        f"# {title}, trained to compress its vision tokens",
        f"A LoRA adapter for {name}: at selected decoder layers only a part of the vision tokens goes on "
        "(attention-driven self-compression, arXiv 2602.12618), and the adapter has taught the model to move what it "
        "needs into those that stay.",
        "```python\nimport adsc\n\nmodel, processor = adsc.load("
        + ('"path/to/this/folder"' if len(method.budgets) < 2 else '"path/to/this/folder", retained="1/3"')
        + ")\n```",
        "## Reduction",
        f"Pattern `{method.pattern}`, positions `{method.positions}`. A schedule names layers and the part of the "
        "vision tokens entering them that stays; retained is the average over all layers.",
        _table(
            ("retained", "schedule", ""),
            [
                (str(retained), f"`{schedule}`" if len(schedule) else "dense", _default(method, schedule))
                for retained, schedule in method.budgets or ((None, method.schedule),)
            ],
        ),
    ]
    if method.budgets and method.schedule not in dict(method.budgets).values():
        lines.append(f"By default: `{method.schedule}`.")
    if figures:
        columns = list(dict.fromkeys(column for row in figures.values() for column in row))
        rows = [(label, *(str(row.get(column, "")) for column in columns)) for label, row in figures.items()]
        lines += ["## Measured", _table(("", *columns), rows)]
    if recipe is not None:
        lines += ["## Recipe", f"```yaml\n{recipe.to_yaml().rstrip()}\n```"]
    return "\n\n".join(lines) + "\n"


def _default(method: ADSC, schedule: Any) -> str:
    return "default" if schedule == method.schedule else ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(each or " " for each in row) + " |" for row in cells).replace("| None |", "| |")


def _weights(folder: Path) -> dict[str, bytes]:
    """A digest of each file of weights."""
    return {path.name: sha256(path.read_bytes()).digest() for path in folder.glob("*.safetensors")}


def _relative(path: str | os.PathLike[str]) -> str:
    """A path as the working directory sees it; of one outside, its last part alone."""
    seen = Path(os.path.relpath(path))
    return seen.name if ".." in seen.parts else seen.as_posix()


def _complete(folder: Path, method: ADSC, processor: Any, text: str, recipe: Recipe | None = None) -> None:
    """Add what makes a result of saved weights."""
    if processor is not None:
        processor.save_pretrained(folder)
    method.save_pretrained(folder)
    (folder / CARD).write_text(text, encoding="utf-8")  # in place of PEFT's own
    if recipe is not None:
        (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")


@contextmanager
def _renamed(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, which gets its name when the block ends well and is gone if not."""
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
