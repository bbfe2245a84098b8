"""What the engine has to know of a decoder: where it is, and what its config says of its layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError


def decoder_of(base: nn.Module) -> Any:
    """The module with the decoder layers of a base model, which may be wrapped more than once, or that model itself.

    Raises
    ------
    UnsupportedModelError
        When there is none.
    """
    decoder = base
    while not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        inner: Any = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder  # type: ignore[operator]
        inner = getattr(decoder, "model", decoder) if inner is decoder else inner
        if inner is decoder:
            raise UnsupportedModelError(f"{type(base).__name__} has no decoder with a list of layers to reduce at")
        decoder = inner
    return decoder


def whole_until(config: PreTrainedConfig) -> int:
    """Behind so many of the first decoder layers the decoder itself works on the hidden states of all tokens, to add
    vision features to them (DeepStack)."""
    indexes = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    layers = [layer for _, layer in getattr(config, "deepstack_layer_map", None) or ()]  # Granite, in front of these
    return max([len(indexes), *layers, *(getattr(config, "spatial_target_layers", None) or ())])


def shared_layers(text: PreTrainedConfig) -> int:
    """How many of the last layers use keys and values of earlier ones."""
    return getattr(text, "num_kv_shared_layers", None) or 0


def sources(text: PreTrainedConfig) -> list[int]:
    """Of each decoder layer the one whose keys and values it attends to: itself, or the last before the sharing ones
    that is of its kind."""
    own = text.num_hidden_layers - shared_layers(text)
    kinds = text.layer_types if shared_layers(text) else []
    return [*range(own), *(own - 1 - kinds[:own][::-1].index(kind) for kind in kinds[own:])]


def windows(text: PreTrainedConfig) -> list[int | None]:
    """Of each decoder layer the sliding window (or chunk) of its attention; ``None`` for full attention."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else ""] * text.num_hidden_layers
    chunk = getattr(text, "attention_chunk_size", None)
    return [{"sliding_attention": window, "chunked_attention": chunk}.get(kind) for kind in kinds]
