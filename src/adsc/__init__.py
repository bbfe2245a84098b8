"""Attention-driven self-compression of vision tokens in multimodal LLMs.

Everything public is loaded on first use, so ``import adsc; adsc.Schedule`` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import methods
    from .accounting import Cost, cost
    from .config import ADSCConfig
    from .errors import InputError, UnsupportedModelError
    from .hf.checkpoint import load
    from .hf.engine import attach, compress
    from .layout import Layout
    from .planning import Plan, plan
    from .schedule import Schedule

__version__ = "0.1.0"

_HOME = {
    "ADSCConfig": "config",
    "Cost": "accounting",
    "InputError": "errors",
    "Layout": "layout",
    "Plan": "planning",
    "Schedule": "schedule",
    "UnsupportedModelError": "errors",
    "attach": "hf.engine",
    "compress": "hf.engine",
    "cost": "accounting",
    "load": "hf.checkpoint",
    "plan": "planning",
}

__all__ = [
    "ADSCConfig",
    "Cost",
    "InputError",
    "Layout",
    "Plan",
    "Schedule",
    "UnsupportedModelError",
    "attach",
    "compress",
    "cost",
    "load",
    "methods",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name == "methods":  # adsc.methods.X(...) works without an import of its own
        return import_module(".methods", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
