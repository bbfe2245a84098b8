"""Open a checkpoint, or an adapter of one, with the reduction that is saved beside it."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_peft_available

from ..config import FILE_NAME, ADSCConfig
from ..errors import InputError, UnsupportedModelError
from ..methods import as_method
from ..schedule import Ratio, Schedule
from .engine import attach
from .families import family_of

ADAPTER = "adapter_config.json"  # what PEFT saves
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
SHARED_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")


def load(folder_or_hub_id: str | os.PathLike[str], retained: Ratio | None = None, **options: Any) -> tuple[Any, Any]:
    """Load model and processor, ready to generate with reduced vision tokens.

    Parameters
    ----------
    folder_or_hub_id
        A checkpoint, or a PEFT adapter, which is put on the model that it names (see :func:`base_of`). When it holds
        an ``adsc_config.json`` (or that model does), that reduction is attached.
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
        When the folder is missing or lacks weights or processor, a package that processor or adapter need is not there,
        a config is not valid, or the budget is out of reach.
    UnsupportedModelError
        When the checkpoint is no image-text-to-text model that can be served; found before weights are fetched.
    """
    name = os.fspath(folder_or_hub_id)
    shared = {key: options[key] for key in SHARED_OPTIONS if key in options}
    # What is small comes first: nothing is left to refuse when the weights are fetched.
    config = read_config(name, **shared)
    family_of(config)
    base = base_of(name, **shared)
    saved = _saved(name, **shared)
    if saved is None and not _is_known_to_lack(name, FILE_NAME, **shared):
        warnings.warn(
            f"no {FILE_NAME} of {name!r} is cached, and the hub could not be asked for it; "
            f"going on with {'the dense model' if retained is None else 'defaults'}",
            stacklevel=2,
        )
    method = as_method(ADSCConfig.from_pretrained(saved.parent) if saved else Schedule.none())
    num_layers = depth(config)
    if retained is not None:
        method = method.for_budget(num_layers, retained)
    method.validate(num_layers)
    processed = any(_found(name, file, **shared) for file in PROCESSOR)
    try:
        processor = AutoProcessor.from_pretrained(name if processed else base, **shared)
        model, report = _open(name, base, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load {name!r}: {_first_line(error)}") from error
    except ImportError as error:  # processors with video need torchvision
        raise InputError(f"cannot load {name!r} yet: {_first_line(error).partition('. ')[0]}") from error
    # An adapter is on by now, and the report is about its weights. Those that were missing are random.
    if report["missing_keys"] and getattr(model, "peft_config", None):
        missing = sorted(report["missing_keys"])
        raise InputError(f"the adapter {name!r} lacks {len(missing)} weights of {base!r} ({missing[0]}, …)")
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
    base = base_of(name, **options)
    named = "" if base == name else f", which the adapter {name!r} names"
    try:
        return AutoConfig.from_pretrained(base, **options)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise InputError(f"cannot read the config of {base!r}{named}: {_first_line(error)}") from error


def depth(config: Any) -> int:
    """How many decoder layers a model has."""
    layers: int | None = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if layers is None:
        raise UnsupportedModelError(f"{config.model_type} has no decoder layers, so there is nothing to reduce")
    return layers


def read_reduction(name: str, **options: Any) -> ADSCConfig | None:
    """The reduction that :func:`load` would attach: saved with a checkpoint or adapter, or else with its model.

    Raises
    ------
    InputError
        When it is not valid.
    """
    saved = _saved(name, **options)
    return ADSCConfig.from_pretrained(saved.parent) if saved else None


def base_of(name: str, **options: Any) -> str:
    """The checkpoint that an adapter is for, or ``name`` itself where a model is there.

    As transformers finds it, but for one thing: where an adapter's folder names its model by a relative path that leads
    to a folder *from there*, it is that one. So the two may travel together. Only then is it a hub id, or a path from
    the working directory.

    Raises
    ------
    InputError
        When the adapter cannot be read or does not name its model, or PEFT is missing.
    """
    named = _named(name, **options)
    return str((Path(name) / named).resolve()) if _is_beside(name, named) else named


def _is_beside(name: str, named: str) -> bool:
    return named != name and not os.path.isabs(named) and (Path(name) / named).is_dir()


def _named(name: str, **options: Any) -> str:
    """The model that an adapter names, word for word, or ``name`` itself where a model is there."""
    adapter = None if os.path.isfile(name) else _found(name, ADAPTER, **options)
    if adapter is None:
        return name
    if not is_peft_available():
        raise InputError(f"{name!r} holds an adapter, which needs peft; pip install peft")
    if (Path(name) / "config.json").exists():
        return name
    try:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise InputError(f"{adapter} is not valid JSON of an adapter; save it with PeftModel.save_pretrained") from None
    if not isinstance(base, str) or not base:
        raise InputError(f'{adapter} does not name its model; set "base_model_name_or_path" to a folder or hub id')
    return base


def _open(name: str, base: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model with the adapter on, and the report of what was loaded last."""
    # transformers puts an adapter on its model by itself, but takes every path from the working directory.
    shared = {key: options[key] for key in SHARED_OPTIONS if key in options}
    if not _is_beside(name, _named(name, **shared)):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True, **options)
        return loaded[0], loaded[1]
    model = AutoModelForImageTextToText.from_pretrained(base, **options)
    # Without a type the adapter would keep that of its file.
    report = model.load_adapter(name, dtype=model.dtype)
    return model, {"missing_keys": report.missing_keys}


def _saved(name: str, **options: Any) -> Path | None:
    return _found(name, FILE_NAME, **options) or _found(base_of(name, **options), FILE_NAME, **options)


def _found(name: str, file: str, **options: Any) -> Path | None:
    """A file of a folder or of the hub, ``None`` where there is none or the hub cannot be asked."""
    try:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
    except OSError as error:
        raise InputError(f"cannot load {name!r}: {_first_line(error)}") from error
    return None if path is None else Path(path)


def _is_known_to_lack(name: str, file: str, **options: Any) -> bool:
    where = {key: options[key] for key in ("cache_dir", "revision") if key in options}
    return os.path.isdir(name) or try_to_load_from_cache(name, file, **where) is not None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
