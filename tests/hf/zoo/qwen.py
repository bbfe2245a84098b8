"""Qwen's vision-language models and others with grids of patches and M-RoPE."""

from __future__ import annotations

import torch
import transformers

from .spec import IMAGE, TEXT, VIDEO, VISION_END, VISION_START, Image, Tiny, token_types


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
    "qwen2_5_vl": Tiny(
        build_qwen2_5_vl,
        lambda image: [image.height * image.width] * image.frames,
        qwen_pixels,
        (Image(4, 6), Image(3, 3), Image(5, 4)),
        axes=3,
        markers=([VISION_START], [VISION_END]),
        extra=token_types,
        video=Image(2, 4, frames=3),
    ),
}
