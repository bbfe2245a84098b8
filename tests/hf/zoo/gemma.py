"""Gemma's vision-language models and those with Pixtral's tower (Mistral 3, LightOnOCR)."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import GemmaConfig, MistralConfig, PixtralVisionConfig, Qwen3Config, SiglipVisionConfig

from .spec import IMAGE, MARKER, TEXT, VISION_END, VISION_START, Image, Tiny

WINDOW = 16  # shorter than the prompts, and than an image
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 2


def siglip(image_size: int, patch_size: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )


def square_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(images), 3, 10, 10, generator=generator)}


def build_paligemma() -> torch.nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config=siglip(10, 2),
        text_config=GemmaConfig(**TEXT, head_dim=12),
        image_token_index=IMAGE,
        projection_dim=48,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def prefix(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt is one bidirectional block, text too; suffixes (1) exist only in training."""
    return {"token_type_ids": torch.zeros_like(ids)}


def build_gemma3() -> torch.nn.Module:
    text = transformers.Gemma3TextConfig(
        **TEXT, head_dim=12, query_pre_attn_scalar=12, sliding_window=WINDOW, layer_types=LAYER_TYPES
    )
    config = transformers.Gemma3Config(
        vision_config=siglip(20, 2),  # 10 x 10 patches, pooled to 5 x 5
        text_config=text,
        mm_tokens_per_image=25,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    # It starts as zeros, which no image shines through.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


def gemma3_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(images), 3, 20, 20, generator=generator)}


def image_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each image is a bidirectional block."""
    return {"token_type_ids": (ids == IMAGE).long()}


PIXTRAL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 32,
    "patch_size": 2,
}


def build_mistral3() -> torch.nn.Module:
    config = transformers.Mistral3Config(
        vision_config=PixtralVisionConfig(**PIXTRAL),
        text_config=MistralConfig(**TEXT, head_dim=12, sliding_window=None),
        image_token_index=IMAGE,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def build_lighton_ocr() -> torch.nn.Module:
    config = transformers.LightOnOcrConfig(
        vision_config=PixtralVisionConfig(**PIXTRAL),
        text_config=Qwen3Config(**TEXT, head_dim=12),
        image_token_id=IMAGE,
    )
    return transformers.LightOnOcrForConditionalGeneration(config)


def merged(image: Image) -> list[int]:
    return [image.height * image.width]  # in patches after merging 2 x 2


def pixtral_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    sizes = [(4 * image.height, 4 * image.width) for image in images]
    pixels = torch.zeros(len(images), 3, *(max(side) for side in zip(*sizes, strict=True)))
    for image, (height, width) in zip(pixels, sizes, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def broken_rows(image: Image) -> list[int]:
    """A row-break marker after each row, an end marker after the last."""
    return [*([*[IMAGE] * image.width, MARKER] * image.height)[:-1], MARKER + 1]


SIZES = (Image(4, 6), Image(3, 3), Image(5, 4))

TINY = {
    "paligemma": Tiny(build_paligemma, lambda image: [25], square_pixels, extra=prefix),
    "gemma3": Tiny(
        build_gemma3, lambda image: [25], gemma3_pixels, markers=([VISION_START], [VISION_END]), extra=image_types
    ),
    "mistral3": Tiny(build_mistral3, merged, pixtral_pixels, SIZES, prompt=broken_rows),
    "lighton_ocr": Tiny(build_lighton_ocr, merged, pixtral_pixels, SIZES),
}
