"""Open a checkpoint with the reduction that is saved beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import cached_file

from ..config import FILE_NAME, ADSCConfig
from ..errors import InputError, UnsupportedModelError
from ..methods import as_method
from ..schedule import Ratio, Schedule
from .engine import attach

PROCESSOR_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")


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
        When the folder is missing or lacks weights or processor, the config is not valid, or the budget out of reach.
    UnsupportedModelError
        When the checkpoint is not an image-text-to-text model that can be served.
    """
    name = os.fspath(folder_or_hub_id)
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise InputError(f"there is no folder {name!r}; give the folder of a checkpoint or a hub id like 'owner/name'")
    shared = {key: options[key] for key in PROCESSOR_OPTIONS if key in options}
    try:
        saved = cached_file(name, FILE_NAME, _raise_exceptions_for_missing_entries=False, **shared)
    except OSError as error:
        raise InputError(f"cannot load {name!r}: {_first_line(error)}") from error
    method = as_method(ADSCConfig.from_pretrained(Path(saved).parent) if saved else Schedule.none())
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, **options)
        processor = AutoProcessor.from_pretrained(name, **shared)
    except OSError as error:
        raise InputError(f"cannot load {name!r}: {_first_line(error)}") from error
    except ValueError as error:
        raise UnsupportedModelError(f"{name!r} is no image-text-to-text model: {_first_line(error)}") from error
    # A PEFT adapter saved in the same folder is put on here, before the method is attached.
    if retained is not None:
        method = method.for_budget(model.config.get_text_config(decoder=True).num_hidden_layers, retained)
    if saved or retained is not None:
        attach(model, method)
    return model, processor


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
