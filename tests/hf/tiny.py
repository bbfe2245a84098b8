"""Tiny random models of every family, and batches of inputs for them. The one place that knows how to make both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig

LAYERS = 6
VOCAB = 256
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Wide weights: attention must matter, and greedy decoding must not repeat itself.
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
IMAGE, VIDEO, VISION_START, VISION_END = 250, 251, 252, 253  # text ids are below
SCHEDULE = "1:2/3,2:1/2,4:1/3"


@dataclass(frozen=True)
class Image:
    """An image (or, with more than one frame, a video): height and width in the family's own unit."""

    height: int = 1
    width: int = 1
    frames: int = 1


@dataclass(frozen=True)
class Tiny:
    """A family under test.

    Attributes
    ----------
    build
        Makes the model from its config.
    tokens
        Vision tokens of an image, frame by frame: a list of lengths.
    pixels
        Keywords for the images of a batch.
    images
        Three images of different size, where the family has sizes.
    grids
        Whether its tokens lie on a grid.
    axes
        Axes of its rotary positions.
    markers
        Text tokens that the processor puts around an image.
    """

    build: Callable[[], torch.nn.Module]
    tokens: Callable[[Image], list[int]]
    pixels: Callable[[list[Image], torch.Generator], dict[str, torch.Tensor]]
    images: tuple[Image, Image, Image] = (Image(), Image(), Image())
    grids: bool = True
    axes: int = 1
    markers: tuple[list[int], list[int]] = ([], [])


def clip(image_size: int, patch_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=32,
    )


def build_llava() -> torch.nn.Module:
    config = transformers.LlavaConfig(vision_config=clip(10, 2), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)
    return transformers.LlavaForConditionalGeneration(config)


def llava_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(images), 3, 10, 10, generator=generator)}


def build_llava_next() -> torch.nn.Module:
    pinpoints = [[6, 12], [12, 6], [12, 12]]
    config = transformers.LlavaNextConfig(
        vision_config=clip(6, 2),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=pinpoints,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


# In tiles of 3 x 3 patches: a wide image (1 x 2 tiles), a square one (2 x 2), a tall one (2 x 1, its padding cut off).
NEXT = {Image(6, 12): (2, [9 + 3 * 7]), Image(12, 12): (4, [9 + 6 * 7]), Image(12, 2): (2, [9 + 6 * 2])}


def llava_next_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    tiles = max(NEXT[image][0] for image in images) + 1
    return {
        "pixel_values": torch.randn(len(images), tiles, 3, 6, 6, generator=generator),
        "image_sizes": torch.tensor([(image.height, image.width) for image in images]),
    }


def build_qwen2_5_vl() -> torch.nn.Module:
    text = {**TEXT, "hidden_size": 48, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}}
    text["rope_parameters"]["rope_theta"] = 10000.0
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 48,
        "spatial_merge_size": 2,
        "tokens_per_second": 2,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    inputs = {}
    for names, kind in (
        (("pixel_values", "image_grid_thw"), [image for image in images if image.frames == 1]),
        (("pixel_values_videos", "video_grid_thw"), [image for image in images if image.frames > 1]),
    ):
        if kind:
            grids = torch.tensor([(image.frames, 2 * image.height, 2 * image.width) for image in kind])
            patches = int(grids.prod(1).sum())
            inputs[names[0]] = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
            inputs[names[1]] = grids
    return inputs


TINY = {
    "llava": Tiny(build_llava, lambda image: [25], llava_pixels),
    "llava_next": Tiny(build_llava_next, lambda image: NEXT[image][1], llava_next_pixels, tuple(NEXT), grids=False),
    "qwen2_5_vl": Tiny(
        build_qwen2_5_vl,
        lambda image: [image.height * image.width] * image.frames,
        qwen_pixels,
        (Image(4, 6), Image(3, 3), Image(5, 4)),
        axes=3,
        markers=([VISION_START], [VISION_END]),
    ),
}


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
        Of each row the ``(start, stop)`` of every image or frame, padding not counted.
    real
        Of each row the positions that are not padding.
    """

    inputs: dict[str, torch.Tensor]
    spans: list[list[tuple[int, int]]]
    real: list[list[int]]


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
            tokens += tiny.markers[0]
            lengths = tiny.tokens(item)
            ends = list(accumulate(lengths, initial=len(tokens)))
            spans[-1] += list(pairwise(ends))
            tokens += [IMAGE if item.frames == 1 else VIDEO] * sum(lengths) + tiny.markers[1]
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
    if family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int() + 2 * (inputs["input_ids"] == VIDEO).int()
    return Batch(inputs, spans, real)


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
    length = sum(tiny.tokens(tiny.images[0])) + len(tiny.markers[0] + tiny.markers[1])
    return batch(family, rows(*tiny.images, length), dtype, side, seed, mask)


def one_row(family: str, made: Batch, row: int, first: int, last: int) -> dict[str, torch.Tensor]:
    """One row of a batch on its own, without padding; its images are those from ``first`` to ``last``."""
    inputs = {}
    for name, value in made.inputs.items():
        if name in ("input_ids", "mm_token_type_ids"):
            inputs[name] = value[row : row + 1, made.real[row]]
        elif name == "pixel_values" and family == "qwen2_5_vl":
            patches = made.inputs["image_grid_thw"].prod(1).tolist()
            inputs[name] = value[sum(patches[:first]) : sum(patches[:last])]
        elif name != "attention_mask":
            inputs[name] = value[first:last]
    text = ("input_ids", "mm_token_type_ids")
    return inputs if last > first else {name: value for name, value in inputs.items() if name in text}
