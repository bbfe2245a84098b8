"""Engine for transformers: reduces the vision tokens inside the decoder of a live model."""

from .checkpoint import load
from .engine import Handle, attach, compress

__all__ = ["Handle", "attach", "compress", "load"]
