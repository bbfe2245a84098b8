"""Open a checkpoint with the reduction that is saved beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import cached_file

from ..config import FILE_NAME, ADSCConfig
from ..errors import InputError, UnsupportedModelError
from ..methods import as_method
from ..schedule import Ratio, Schedule
from .engine import attach
from .families import family_of

SHARED_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")


def load(folder_or_hub_id: str | os.PathLike[str], retained: Ratio | None = None, **options: Any) -> tuple[Any, Any]:
    """Load model and processor, ready to generate with reduced vision tokens.

    Parameters
    ----------
    folder_or_hub_id
        A checkpoint. When it holds an ``adsc_config.json``, that reduction is attached.
    retained
        Another budget than the saved one, by :meth:`adsc.Schedule.for_budget`; needed where no config is saved.
        1 gives the dense model with the handle attached, ready for ``handle.budget``.
    options
        Passed to ``from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation``, …).

    Returns
    -------
    The model (its handle is ``model.adsc``, if there is one) and its processor.

    Raises
    ------
    InputError
        When the folder is missing or lacks weights or processor, a package that the processor needs is not there, a
        config is not valid, or the budget is out of reach.
    UnsupportedModelError
        When the checkpoint is no image-text-to-text model that can be served; found before weights are fetched.
    """
    name = os.fspath(folder_or_hub_id)
    shared = {key: options[key] for key in SHARED_OPTIONS if key in options}
    # What is small comes first: nothing is left to refuse when the weights are fetched.
    config = read_config(name, **shared)
    family_of(config)
    try:
        saved = cached_file(name, FILE_NAME, _raise_exceptions_for_missing_entries=False, **shared)
    except OSError as error:
        raise InputError(f"cannot load {name!r}: {_first_line(error)}") from error
    method = as_method(ADSCConfig.from_pretrained(Path(saved).parent) if saved else Schedule.none())
    num_layers = depth(config)
    if retained is not None:
        method = method.for_budget(num_layers, retained)
    method.validate(num_layers)
    try:
        processor = AutoProcessor.from_pretrained(name, **shared)
        model = AutoModelForImageTextToText.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot load {name!r}: {_first_line(error)}") from error
    except ImportError as error:  # processors with video need torchvision
        raise InputError(f"cannot load {name!r} yet: {_first_line(error).partition('. ')[0]}") from error
    # A PEFT adapter saved in the same folder is put on here, before the method is attached.
    if saved or retained is not None:
        attach(model, method)
    return model, processor


def read_config(name: str, **options: Any) -> Any:
    """The transformers config of a folder, a ``config.json`` or a hub id. Reads no weights.

    Raises
    ------
    InputError
        When there is none, or it is not valid.
    """
    path = Path(name)
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise InputError(f"there is no folder {name!r}; give the folder of a checkpoint or a hub id like 'owner/name'")
    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise InputError(f"cannot read the config of {name!r}: {_first_line(error)}") from error


def depth(config: Any) -> int:
    """How many decoder layers a model has."""
    layers: int | None = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if layers is None:
        raise UnsupportedModelError(f"{config.model_type} has no decoder layers, so there is nothing to reduce")
    return layers


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
