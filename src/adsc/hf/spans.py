"""Where the vision tokens of a batch of inputs are: placeholders, cut into images and frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..errors import InputError
from ..layout import Layout
from .views import Ints

Inputs = Mapping[str, Any]
Grid = tuple[int, int]


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
        Field of the config with the placeholder id, dots for those of parts.
    pixels
        Keyword of the forward pass with the raw pixels.
    encoded
        Key of ``mm_encoder_outputs`` with the features that ``generate`` computed beforehand.
    sizes
        Placeholders of the whole batch, config and inputs → the frames of each image, from the raw inputs.
    frames
        The same for one image of known length, for features computed beforehand, out of its positions
        ``(1 + axes, tokens)``: those in the sequence, then the rotary ones where they have several axes;
        ``None`` where ``sizes`` needs the prompt alone.
    """

    token: str
    pixels: str
    encoded: str
    sizes: Callable[[int, PreTrainedConfig, Inputs], list[Frames]]
    frames: Callable[[int, Ints], Frames] | None


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    Attributes
    ----------
    modalities
        Kinds of vision input that it takes.
    axes
        Axes of its rotary positions: 1, or 3 for M-RoPE.
    """

    modalities: tuple[Modality, ...]
    axes: int = 1


def has_vision(family: Family, inputs: Inputs) -> bool:
    """Whether a call brings images or videos."""
    return any(_features(kind, inputs) is not None for kind in family.modalities)


def check_text(family: Family, config: PreTrainedConfig, ids: torch.Tensor) -> None:
    """Refuse placeholders without features: the model would read them as words."""
    for kind in family.modalities:
        if (ids == attrgetter(kind.token)(config)).any():
            raise InputError(f"the prompt holds placeholders ({kind.token}) but no {kind.pixels} came with it")


def _features(kind: Modality, inputs: Inputs) -> Any:
    encoded = (inputs.get("mm_encoder_outputs") or {}).get(kind.encoded)
    if encoded is None and inputs.get(kind.pixels) is not None:
        return inputs[kind.pixels] if len(inputs[kind.pixels]) else None
    return encoded


def real_positions(mask: object, batch: int, tokens: int, past: int = 0) -> list[Ints]:
    """Of each row those of the ``tokens`` positions after ``past`` that an attention mask does not mark as padding.

    Parameters
    ----------
    mask
        ``(batch, past + tokens)`` or longer, as static caches allow; ``(batch, 1, tokens, keys)``, as ``generate``
        makes it for them, where padding is what no query may look at; or a mask of each kind of layer.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        rows = mask[:, past : past + tokens].bool()
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
        # Row-major, the order in which features are filled in.
        where = np.argwhere(ids == attrgetter(kind.token)(config))
        if torch.is_tensor(features) or kind.frames is None:
            images = kind.sizes(len(where), config, inputs)
        else:
            images = _encoded_frames(kind.frames, features, where, inputs.get("position_ids"))
        if sum(frames.tokens * frames.count for frames in images) != len(where):
            raise InputError(
                f"the prompts hold {len(where)} placeholders ({kind.token}), "
                f"but the images have {sum(frames.tokens * frames.count for frames in images)} tokens"
            )
        if not images:  # SmolVLM takes an empty image beside text
            continue
        pieces = [(frames.tokens, frames.grid) for frames in images for _ in range(frames.count)]
        for piece, (_, grid) in zip(np.split(where, np.cumsum([n for n, _ in pieces])[:-1]), pieces, strict=True):
            row = piece[0, 0]
            if row != piece[-1, 0]:
                raise InputError(f"the tokens of one image are spread over rows {row} and {piece[-1, 0]} of the batch")
            spans[row].append((piece[:, 1], grid))
    return [_layout(places, found) for places, found in zip(real, spans, strict=True)]


def check_whole(features: Any) -> None:
    """Refuse features of a part of the images."""
    if features.get("last_hidden_state") is None:
        # Chunked prefill cuts images where the chunk ends, and no longer tells how many there are.
        raise InputError("image features without last_hidden_state, as prefill_chunk_size makes them; leave it out")


def _encoded_frames(
    frames_of: Callable[[int, Ints], Frames], features: Any, where: Ints, positions: torch.Tensor | None
) -> list[Frames]:
    check_whole(features)
    encoded = getattr(features, "pooler_output", None)  # not always a field of the output's class
    encoded = features.last_hidden_state if encoded is None else encoded
    lengths = [prod(feature.shape[:-1]) for feature in encoded]
    axes = positions[-3:].cpu().numpy() if positions is not None and positions.ndim == 3 else None
    frames = []
    for length, places in zip(lengths, np.split(where, np.cumsum(lengths)[:-1]), strict=True):
        rotary = [] if axes is None else list(axes[:, places[:, 0], places[:, 1]])
        frames.append(frames_of(length, np.stack([places[:, 1], *rotary])))
    return frames


def _layout(real: Ints, found: list[tuple[Ints, Grid | None]]) -> Layout:
    found.sort(key=lambda span: int(span[0][0]))
    spans = [np.searchsorted(real, places) for places, _ in found]
    for span, (places, _) in zip(spans, found, strict=True):
        if span[-1] >= len(real) or (real[span] != places).any():
            raise InputError("the attention mask hides vision tokens; it may hide padding only")
    return Layout(len(real), spans, [grid for _, grid in found])


def spans_of_rows(spans: Sequence[Iterable[Any]] | torch.Tensor, batch: int) -> list[list[Ints]]:
    """The positions of every span of every row, padding counted."""
    if len(spans) != batch:
        raise InputError(f"spans of {len(spans)} rows, but the inputs have {batch}")
    if not isinstance(spans, torch.Tensor):
        return [list(Layout(np.iinfo(np.int32).max, row).spans) for row in spans]
    found: list[list[Ints]] = []
    for row in spans.cpu().numpy():
        if row.dtype == bool:
            row = np.where(row, 1 + np.cumsum(np.diff(row.astype(int), prepend=0) == 1), 0)
        found.append([np.flatnonzero(row == number) for number in np.unique(row[row != 0])])
    return found


def row_layout(real: Ints, spans: list[Ints]) -> Layout:
    """The layout of a row whose spans are given with padding counted."""
    places = sorted((np.searchsorted(real, span) for span in spans), key=lambda span: int(span[0]))
    for span, inside in zip(sorted(spans, key=lambda span: int(span[0])), places, strict=True):
        if inside[-1] >= len(real) or (real[inside] != span).any():
            raise InputError("a span lies outside its row or in its padding; give positions of the inputs")
    return Layout(len(real), places)
