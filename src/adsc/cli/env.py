"""``adsc env``: what to paste into a bug report."""

from __future__ import annotations

import os
import platform
from importlib import metadata, util
from typing import Any

from .. import __version__
from .options import Debug, Json

EXAMPLE = "adsc env --json"
PACKAGES = ("torch", "transformers", "huggingface-hub", "safetensors", "numpy", "pillow", "matplotlib", "typer", "rich")
EXTRAS = ("accelerate", "peft", "trl", "vllm", "lmms-eval", "flash-attn", "torchvision")


def command(as_json: Json = False, debug: Debug = False) -> dict[str, Any]:
    """Print versions, hardware and attention backends, to paste into a bug report."""
    found = collect()
    for name, value in () if as_json else found.items():
        print(f"{name + ':':16} {', '.join(value) or 'none' if isinstance(value, list) else value}")
    return found


def collect() -> dict[str, Any]:
    """Versions and hardware, in the order to print them."""
    import torch

    found: dict[str, Any] = {
        "adsc": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch threads": torch.get_num_threads(),
    }
    for name in (*PACKAGES, *EXTRAS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in PACKAGES:
                found[name] = "missing"
    found["torch cuda"] = torch.version.cuda or "not built in"
    found["gpus"] = [
        f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 1e9:.0f} GB)"
        for i in range(torch.cuda.device_count())
    ]
    backends = ["eager", "sdpa"]
    backends += ["flash_attention_2"] if util.find_spec("flash_attn") else []
    backends += ["flash_attention_3"] if util.find_spec("flash_attn_interface") else []
    found["attention"] = backends
    return found
