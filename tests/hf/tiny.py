"""Tiny random models and batches of inputs for them. What a family is stands in :mod:`zoo`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import torch

from .zoo import TINY
from .zoo.spec import IMAGE, LAYERS, TEXT, VIDEO, VOCAB, Image, Tiny, clip

__all__ = ["IMAGE", "LAYERS", "TEXT", "TINY", "VIDEO", "VOCAB", "Image", "Tiny", "clip"]

TEXTUAL = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # inputs that tokens have each
SCHEDULE = "1:2/3,2:1/2,4:1/3"
CORE = ["llava", "llava_next", "qwen2_5_vl"]  # one family of each kind goes through every test
# Further kinds, for what may differ: windows and images that see both ways, DeepStack, tiles, markers inside images,
# layers of two kinds of positions.
KINDS = [*CORE, "gemma3", "qwen3_vl", "idefics3", "mistral3", "cohere2_vision"]
WINDOWED = ("gemma3", "cohere2_vision")  # those of them whose caches forget


@cache
def model(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The one model of a family, in eval mode. Tests that change weights or structure copy it."""
    torch.manual_seed(0)
    made = TINY[family].build().to(dtype).eval()
    made.generation_config.pad_token_id = 0
    return made


@dataclass
class Batch:
    """Inputs, and where their vision tokens are.

    Attributes
    ----------
    inputs
        Keywords of the forward pass.
    spans
        Of each row the ``(start, stop)`` of every image or frame, or its positions where markers stand inside;
        padding not counted.
    real
        Of each row the positions that are not padding.
    images
        All of them, in their order.
    """

    inputs: dict[str, torch.Tensor]
    spans: list[list[tuple[int, int] | list[int]]]
    real: list[list[int]]
    images: list[Image]


def _span(places: list[int]) -> tuple[int, int] | list[int]:
    start, stop = places[0], places[-1] + 1
    return (start, stop) if stop - start == len(places) else places


def batch(
    family: str,
    rows: list[list[int | Image]],
    dtype: torch.dtype = torch.float32,
    side: str = "left",
    seed: int = 0,
    mask: bool = True,
) -> Batch:
    """Make a batch. A row is a list of images and of numbers, each so many random text tokens."""
    tiny, generator = TINY[family], torch.Generator().manual_seed(seed)
    ids, spans = [], []
    for row in rows:
        tokens: list[int] = []
        spans.append([])
        for item in row:
            if isinstance(item, int):
                tokens += torch.randint(1, IMAGE, (item,), generator=generator).tolist()
                continue
            start, image = len(tokens), tiny.ids(item)
            tokens += image
            places = [start + i for i, token in enumerate(image) if token in (IMAGE, VIDEO)]
            ends = accumulate(tiny.tokens(item), initial=0)
            spans[-1] += [_span(places[a:b]) for a, b in pairwise(ends)]
        ids.append(tokens)
    longest = max(map(len, ids))
    padding = [longest - len(row) for row in ids]
    left = padding if side == "left" else [0] * len(ids)
    inputs = {
        "input_ids": torch.tensor(
            [[0] * p + row + [0] * (n - p) for row, n, p in zip(ids, padding, left, strict=True)]
        ),
    }
    real = [list(range(p, p + len(row))) for row, p in zip(ids, left, strict=True)]
    if mask:
        inputs["attention_mask"] = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, places in enumerate(real):
            inputs["attention_mask"][row, places] = 1
    images = [item for row in rows for item in row if isinstance(item, Image)]
    if images:
        pixels = tiny.pixels(images, generator)
        inputs |= {name: value.to(dtype) if value.is_floating_point() else value for name, value in pixels.items()}
    if tiny.extra is not None:
        inputs |= tiny.extra(inputs["input_ids"])
    return Batch(inputs, spans, real, images)


# Every shape of batch: rows, side of the padding, and whether an attention mask is given.
CASES = {
    "single": (lambda a, b, c, text: [[4, a, 6]], "left", True),
    "no_mask": (lambda a, b, c, text: [[4, a, 6]], "left", False),
    "several_images": (lambda a, b, c, text: [[3, a, b, 2, c, 5]], "left", True),
    "left_padding": (lambda a, b, c, text: [[3, a, 5], [4, b, 2, c, 3], [9]], "left", True),
    "right_padding": (lambda a, b, c, text: [[3, a, 5], [4, b, 2, c, 3], [9]], "right", True),
    # Rows of equal length that keep different counts: the model sees no padding, its reduced stages do.
    "text_beside_image": (lambda a, b, c, text: [[3, a, 4], [text + 7]], "left", False),
}


def case(family: str, name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """One of :data:`CASES` for a family."""
    tiny = TINY[family]
    rows, side, mask = CASES[name]
    length = len(tiny.ids(tiny.images[0]))
    return batch(family, rows(*tiny.images, length), dtype, side, seed, mask)


def joined(turns: list[Batch]) -> dict[str, torch.Tensor]:
    """The inputs of a conversation in one, from those of its turns; their images one after another."""
    whole = {}
    for name in {name for made in turns for name in made.inputs}:
        parts = [made.inputs[name] for made in turns if name in made.inputs]
        text = name in TEXTUAL
        if not text and parts[0].ndim == 4:  # images of different size, padded
            height, width = (max(part.shape[axis] for part in parts) for axis in (2, 3))
            parts = [torch.nn.functional.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])) for x in parts]
        whole[name] = torch.cat(parts, int(text))
    return whole


def one_row(family: str, made: Batch, row: int, first: int, last: int) -> dict[str, torch.Tensor]:
    """One row of a batch on its own, without padding; its images are those from ``first`` to ``last``."""
    inputs = {}
    # Along their first dimension pixels have images, tiles of images, or patches of images.
    counts = [[1] * len(made.images), [len(TINY[family].tokens(image)) for image in made.images]]
    if "image_grid_thw" in made.inputs:
        counts.append(made.inputs["image_grid_thw"].prod(1).tolist())
    for name, value in made.inputs.items():
        if name in TEXTUAL:
            inputs[name] = value[row : row + 1, made.real[row]]
        elif last > first:
            each = next(each for each in counts if sum(each) == len(value))
            inputs[name] = value[sum(each[:first]) : sum(each[:last])]
    inputs.pop("attention_mask", None)
    return inputs
