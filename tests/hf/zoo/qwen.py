"""Qwen's vision-language models and others with grids of patches and M-RoPE."""

from __future__ import annotations

from itertools import accumulate

import torch
import transformers

from .spec import IMAGE, TEXT, VIDEO, VISION_END, VISION_START, Image, Tiny, token_types

IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}}
MIXED = {"rope_parameters": MROPE["rope_parameters"] | {"mrope_interleaved": True}}  # axes alternate
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 48}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
WINDOWS = {**VISION, "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 48}
# The features of every layer of the tower are added to hidden states behind the decoder's first three layers.
DEEPSTACK = {
    **VISION,
    "depth": 3,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1, 2],
}


def build_qwen2_vl() -> torch.nn.Module:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 1, "num_heads": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config=TEXT | MROPE, vision_config=vision, **IDS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def build_qwen2_5_vl() -> torch.nn.Module:
    vision = {**WINDOWS, "tokens_per_second": 2}
    config = transformers.Qwen2_5_VLConfig(text_config=TEXT | MROPE, vision_config=vision, **IDS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def build_qwen3_vl() -> torch.nn.Module:
    text = {**TEXT, **MIXED, "head_dim": 12}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=DEEPSTACK, **IDS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def build_qwen3_vl_moe() -> torch.nn.Module:
    text = {**TEXT, **MIXED, **EXPERTS, "head_dim": 12}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=DEEPSTACK, **IDS)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


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


def patches(image: Image) -> list[int]:
    return [image.height * image.width] * image.frames


def stamped(image: Image) -> list[int]:
    """Each frame of a video follows its time as text, between markers of its own."""
    if image.frames == 1:
        return [VISION_START, *[IMAGE] * (image.height * image.width), VISION_END]
    frame = [VISION_START, *[VIDEO] * (image.height * image.width), VISION_END]
    return [token for time in range(image.frames) for token in (60, 48 + time, 62, *frame)]


IMAGES, MOVIE = (Image(4, 6), Image(3, 3), Image(5, 4)), Image(2, 4, frames=3)
QWEN2 = {
    "tokens": patches,
    "pixels": qwen_pixels,
    "images": IMAGES,
    "axes": 3,
    "markers": ([VISION_START], [VISION_END]),
    "extra": token_types,
    "video": MOVIE,
}
QWEN3 = QWEN2 | {"prompt": stamped}

BUILDERS = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", build_qwen2_vl, QWEN2),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", build_qwen2_5_vl, QWEN2),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", build_qwen3_vl, QWEN3),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", build_qwen3_vl_moe, QWEN3),
}
TINY = {name: Tiny(build, **facts) for name, (needs, build, facts) in BUILDERS.items() if hasattr(transformers, needs)}
