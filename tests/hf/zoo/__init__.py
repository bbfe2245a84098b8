"""Tiny random models of every family, a group a file."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from .spec import Tiny

TINY: dict[str, Tiny] = {}
for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
    if file.stem != "spec":
        TINY |= import_module(f"{__name__}.{file.stem}").TINY
