"""What differs between model families, as data in one place: where each image's tokens are in a batch of inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt, prod
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ..errors import InputError, UnsupportedModelError
from ..layout import Layout
from .caches import LAYERS
from .views import Ints

Inputs = Mapping[str, Any]
Grid = tuple[int, int]


def _nowhere(_: PreTrainedConfig) -> int:
    return 0


def _deepstack(config: PreTrainedConfig) -> int:
    return len(config.vision_config.deepstack_visual_indexes)


@dataclass(frozen=True)
class Frames:
    """The vision tokens of one image or video: ``count`` frames (1 for an image) of ``tokens`` each."""

    tokens: int
    count: int = 1
    grid: Grid | None = None


@dataclass(frozen=True)
class Modality:
    """Images or videos.

    Attributes
    ----------
    token
        Field of the config with the placeholder id.
    pixels
        Keyword of the forward pass with the raw pixels.
    encoded
        Key of ``mm_encoder_outputs`` with the features that ``generate`` computed beforehand.
    sizes
        Placeholders of the whole batch, config and inputs → the frames of each image, from the raw inputs.
    frames
        The same for one image of known length out of its positions, for features computed beforehand.
    """

    token: str
    pixels: str
    encoded: str
    sizes: Callable[[int, PreTrainedConfig, Inputs], list[Frames]]
    frames: Callable[[int, Ints | None], Frames]


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    Attributes
    ----------
    modalities
        Kinds of vision input that it takes.
    axes
        Axes of its rotary positions: 1, or 3 for M-RoPE.
    between
        Of a config: behind how many of the first decoder layers the decoder itself works on the hidden states of all
        tokens (DeepStack adds vision features there).
    """

    modalities: tuple[Modality, ...]
    axes: int = 1
    between: Callable[[PreTrainedConfig], int] = _nowhere


def _square(tokens: int, _: object = None) -> Frames:
    side = isqrt(tokens)
    return Frames(tokens, grid=(side, side) if side * side == tokens else None)


def _llava_images(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    if inputs.get("image_sizes") is not None:  # towers for any resolution (Pixtral)
        patch = config.vision_config.patch_size
        grids = [(h // patch, w // patch) for h, w in torch.as_tensor(inputs["image_sizes"]).tolist()]
        return [Frames(h * w, grid=(h, w)) for h, w in grids]
    images = len(inputs["pixel_values"])
    if placeholders % images:
        raise InputError(f"{placeholders} image placeholders for {images} images of equal size do not divide evenly")
    return [_square(placeholders // images)] * images


def _anyres_images(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # Base image, then the tiles' grid without padding, with one newline token after each of its rows.
    if inputs.get("image_sizes") is None:
        raise InputError("pixel_values came without image_sizes; pass all that the processor returns")
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    frames = []
    for size in torch.as_tensor(inputs["image_sizes"]).tolist():
        tiles = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
        grid = unpad_image(torch.empty(1, tiles[0] * side, tiles[1] * side, device="meta"), size).shape[1:]
        frames.append(Frames(side * side + grid[0] * (grid[1] + 1)))
    return frames


def _equal_images(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    raise NotImplementedError


def _ungridded(tokens: int, _: object) -> Frames:
    return Frames(tokens)


def _patch_grids(keyword: str, placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    if inputs.get(keyword) is None:
        raise InputError(f"pixels came without {keyword}; pass all that the processor returns")
    merge = config.vision_config.spatial_merge_size
    grids = [(t, h // merge, w // merge) for t, h, w in inputs[keyword].tolist()]
    return [Frames(h * w, t, (h, w)) for t, h, w in grids]


def _mrope_frames(tokens: int, positions: Ints | None) -> Frames:
    # The rows and columns of a grid are numbered by M-RoPE's second and third axis.
    if positions is None:
        raise InputError("image features came without position_ids; pass pixel_values and image_grid_thw instead")
    height, width = (int(np.ptp(axis)) + 1 for axis in positions[-2:])
    return Frames(height * width, tokens // (height * width), (height, width))


# Functions of modules only, no lambdas: a model can be pickled with its handle.
FAMILIES = {
    "llava": Family((Modality("image_token_id", "pixel_values", "image", _llava_images, _square),)),
    "llava_next": Family((Modality("image_token_id", "pixel_values", "image", _anyres_images, _ungridded),)),
    "qwen2_5_vl": Family(
        (
            Modality("image_token_id", "pixel_values", "image", partial(_patch_grids, "image_grid_thw"), _mrope_frames),
            Modality(
                "video_token_id", "pixel_values_videos", "video", partial(_patch_grids, "video_grid_thw"), _mrope_frames
            ),
        ),
        axes=3,
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model.

    Raises
    ------
    UnsupportedModelError
        With the reason, when the model cannot be served exactly.
    """
    name, text = config.model_type, config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; adsc serves decoders that hold vision tokens")
    if getattr(text, "cross_attention_layers", None):
        raise UnsupportedModelError(f"{name} reads images by cross-attention: no vision tokens are in its sequence")
    if text is config:
        raise UnsupportedModelError(f"{name} is text-only, or has no language model: it has no vision tokens to reduce")
    if getattr(text, "num_kv_shared_layers", None):
        raise UnsupportedModelError(f"{name} shares keys and values between layers that would hold different tokens")
    kinds = sorted({kind.__name__ for kind in map(type, DynamicCache(config=text).layers) if kind not in LAYERS})
    if kinds:
        raise UnsupportedModelError(
            f"{name} with a {text.model_type} decoder needs {' and '.join(kinds)} caches; "
            "adsc serves decoders whose layers all attend to the tokens of the sequence"
        )
    return FAMILIES.get(name) or _general(config)


def _general(config: PreTrainedConfig) -> Family:
    """A family that nobody described: placeholders for images are found in the config."""
    found = []
    for what, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        for token in (f"{what}_token_id", f"{what}_token_index"):
            if isinstance(getattr(config, token, None), int):
                found.append(Modality(token, pixels, what, _equal_images, _ungridded))
                break
    if not found:
        raise UnsupportedModelError(
            f"{config.model_type} names no image token in its config, so its vision tokens cannot be found"
        )
    return Family(tuple(found))


def windows(text: PreTrainedConfig) -> list[int | None]:
    """Of each decoder layer the sliding window (or chunk) of its attention; ``None`` for full attention."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else ""] * text.num_hidden_layers
    chunk = getattr(text, "attention_chunk_size", None)
    return [{"sliding_attention": window, "chunked_attention": chunk}.get(kind) for kind in kinds]


def has_vision(family: Family, inputs: Inputs) -> bool:
    """Whether a call brings images or videos."""
    return any(_features(kind, inputs) is not None for kind in family.modalities)


def check_text(family: Family, config: PreTrainedConfig, ids: torch.Tensor) -> None:
    """Refuse placeholders without features: the model would read them as words."""
    for kind in family.modalities:
        if (ids == getattr(config, kind.token)).any():
            raise InputError(f"the prompt holds placeholders ({kind.token}) but no {kind.pixels} came with it")


def _features(kind: Modality, inputs: Inputs) -> Any:
    encoded = (inputs.get("mm_encoder_outputs") or {}).get(kind.encoded)
    if encoded is None and inputs.get(kind.pixels) is not None:
        return inputs[kind.pixels] if len(inputs[kind.pixels]) else None
    return encoded


def real_positions(mask: object, batch: int, tokens: int, past: int = 0) -> list[Ints]:
    """Of each row the positions of its last ``tokens`` that an attention mask does not mark as padding.

    Parameters
    ----------
    mask
        ``(batch, past + tokens)``; or ``(batch, 1, tokens, keys)``, as ``generate`` makes it for static caches, where
        padding is what no query may look at; or a mask of each kind of layer.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        rows = mask[:, -tokens:].bool()
    elif isinstance(mask, torch.Tensor) and mask.ndim == 4:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        rows = seen.any(1).any(1)[:, past : past + tokens].expand(batch, -1)
    else:
        return [np.arange(tokens)] * batch
    found = [np.flatnonzero(row) for row in rows.cpu().numpy()]
    return [row if len(row) else np.arange(tokens) for row in found]


def layouts(family: Family, config: PreTrainedConfig, inputs: Inputs, real: Sequence[Ints]) -> list[Layout]:
    """Where the vision tokens of each row are, in the row's own coordinates (padding not counted).

    Parameters
    ----------
    inputs
        Keywords of the base model's forward pass.
    real
        Of each row the positions that are not padding.

    Raises
    ------
    InputError
        When placeholders and features do not match, or the inputs lack what the family needs.
    """
    if inputs.get("input_ids") is None:
        raise InputError("images came without input_ids, which tell where their vision tokens are; pass input_ids")
    ids = inputs["input_ids"].cpu().numpy()
    spans: list[list[tuple[Ints, Grid | None]]] = [[] for _ in ids]
    for kind in family.modalities:
        features = _features(kind, inputs)
        if features is None:
            continue
        where = np.argwhere(ids == getattr(config, kind.token))  # row-major, the order in which features are filled in
        if torch.is_tensor(features):
            images = kind.sizes(len(where), config, inputs)
        else:
            images = _encoded_frames(kind, features, where, inputs.get("position_ids"))
        if sum(frames.tokens * frames.count for frames in images) != len(where):
            raise InputError(
                f"the prompts hold {len(where)} placeholders ({kind.token}), "
                f"but the images have {sum(frames.tokens * frames.count for frames in images)} tokens"
            )
        pieces = [(frames.tokens, frames.grid) for frames in images for _ in range(frames.count)]
        for piece, (_, grid) in zip(np.split(where, np.cumsum([n for n, _ in pieces])[:-1]), pieces, strict=True):
            row = piece[0, 0]
            if row != piece[-1, 0]:
                raise InputError(f"the tokens of one image are spread over rows {row} and {piece[-1, 0]} of the batch")
            spans[row].append((piece[:, 1], grid))
    return [_layout(places, found) for places, found in zip(real, spans, strict=True)]


def _encoded_frames(kind: Modality, features: Any, where: Ints, positions: torch.Tensor | None) -> list[Frames]:
    if features.get("last_hidden_state") is None:
        # Chunked prefill cuts images where the chunk ends, and no longer tells how many there are.
        raise InputError("image features without last_hidden_state, as prefill_chunk_size makes them; leave it out")
    lengths = [prod(feature.shape[:-1]) for feature in features.pooler_output]
    axes = positions[-3:].cpu().numpy() if positions is not None and positions.ndim == 3 else None
    frames = []
    for length, places in zip(lengths, np.split(where, np.cumsum(lengths)[:-1]), strict=True):
        frames.append(kind.frames(length, None if axes is None else axes[:, places[:, 0], places[:, 1]]))
    return frames


def _layout(real: Ints, found: list[tuple[Ints, Grid | None]]) -> Layout:
    found.sort(key=lambda span: int(span[0][0]))
    spans = [np.searchsorted(real, places) for places, _ in found]
    for span, (places, _) in zip(spans, found, strict=True):
        if span[-1] >= len(real) or (real[span] != places).any():
            raise InputError("the attention mask hides vision tokens; it may hide padding only")
    return Layout(len(real), spans, [grid for _, grid in found])
