"""Stored figures: what was measured, with the command, seed, versions and hardware that gave it."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "adsc-vlm", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "peft", "trl", "accelerate",
)  # fmt: skip


def provenance(command: str, seed: int | None = None) -> dict[str, Any]:
    """Command line, seed, versions and hardware of a figure; no names of machines or folders."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count(), "gpus": gpus}
    return {"command": command, "seed": seed, "versions": versions, "hardware": hardware}


def store(path: Path, figures: dict[str, Any], seed: int | None = None, command: str | None = None) -> None:
    """Write figures with their provenance as JSON: to a temporary name, then renamed.

    ``command`` is the command line to give them again; by default how this process was started.
    """
    if command is None:
        module = getattr(sys.modules["__main__"], "__spec__", None)
        start = f"python -m {module.name}" if module else Path(sys.argv[0]).name
        command = " ".join([start, *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({**provenance(command, seed), **figures}, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
