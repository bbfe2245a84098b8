"""LLaVA and its kin."""

from __future__ import annotations

import torch
import transformers
from transformers import LlamaConfig

from .spec import IMAGE, TEXT, Image, Tiny, clip


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


TINY = {
    "llava": Tiny(build_llava, lambda image: [25], llava_pixels),
    "llava_next": Tiny(build_llava_next, lambda image: NEXT[image][1], llava_next_pixels, tuple(NEXT), grids=False),
}
