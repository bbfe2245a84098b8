"""Gemma's vision-language models, those with Pixtral's tower (Mistral 3, LightOnOCR), Llama 4 and Phi-4."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

import torch
import transformers
from transformers import GemmaConfig, MistralConfig, PixtralVisionConfig, Qwen3Config, SiglipVisionConfig

from .spec import IMAGE, MARKER, TEXT, VIDEO, VISION_END, VISION_START, Image, Tiny, token_types

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


def build_gemma3(kind: type = transformers.Gemma3Config) -> torch.nn.Module:
    text = transformers.Gemma3TextConfig(
        **TEXT, head_dim=12, query_pre_attn_scalar=12, sliding_window=WINDOW, layer_types=LAYER_TYPES
    )
    config = kind(
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


def gemma4_text(**options: Any) -> dict[str, Any]:
    text = {**TEXT, "pad_token_id": 0, "head_dim": 12, "global_head_dim": 16, "sliding_window": WINDOW}
    # Smaller weights than elsewhere: so many norms, in float32 whatever the dtype, amplify rounding.
    return {**text, "initializer_range": 0.05, "layer_types": ["sliding_attention", "full_attention"] * 3, **options}


def softened(model: torch.nn.Module) -> torch.nn.Module:
    """Scores are not scaled but by what training makes of the queries' norm; as created, they amplify rounding."""
    for layer in model.model.language_model.layers:
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, layer.self_attn.head_dim**-0.5)
    return model


GEMMA4_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "boi_token_id": VISION_START,
    "eoi_token_id": VISION_END,
    "audio_token_id": TEXT["vocab_size"] - 1,
    "audio_config": None,
}


SHARED_TYPES = [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full", "full")]


def build_gemma4(**options: Any) -> torch.nn.Module:
    text = gemma4_text(hidden_size_per_layer_input=8, vocab_size_per_layer_input=256, **options)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 2,
        "pooling_kernel_size": 2,
        "position_embedding_size": 32,
    }
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, **GEMMA4_TOKENS)
    return softened(transformers.Gemma4ForConditionalGeneration(config))


def build_gemma4_unified() -> torch.nn.Module:
    vision = {
        "patch_size": 2,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 48,
        "mm_posemb_size": 32,
        "output_proj_dims": 48,
    }
    config = transformers.Gemma4UnifiedConfig(
        text_config=gemma4_text(use_bidirectional_attention="vision"), vision_config=vision, **GEMMA4_TOKENS
    )
    return softened(transformers.Gemma4UnifiedForConditionalGeneration(config))


def gemma4_pixels(pool: int, images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Patches, pooled by the model ``pool`` x ``pool``, with the column and row of each; −1 is padding."""
    features = 3 * (4 // pool) ** 2  # the unified model is given patches as large as the other's pooled ones
    inputs = {}
    for pixels, places, kind in (
        ("pixel_values", "image_position_ids", [image for image in images if image.frames == 1]),
        ("pixel_values_videos", "video_position_ids", [image for image in images if image.frames > 1]),
    ):
        if not kind:
            continue
        frames = [image for image in kind for _ in range(image.frames)]
        longest = max(image.height * image.width for image in frames) * pool**2
        inputs[places] = torch.full((len(frames), longest, 2), -1)
        inputs[pixels] = torch.zeros(len(frames), longest, features)
        for frame, patches, image in zip(inputs[places], inputs[pixels], frames, strict=True):
            rows, columns = torch.arange(pool * image.height), torch.arange(pool * image.width)
            grid = torch.cartesian_prod(rows, columns).flip(-1)
            frame[: len(grid)] = grid
            patches[: len(grid)] = torch.rand(len(grid), features, generator=generator)
        if pixels == "pixel_values_videos":
            if "num_frames_per_video" in inspect.signature(transformers.Gemma4Model.forward).parameters:
                inputs["num_frames_per_video"] = torch.tensor([image.frames for image in kind])
            else:  # before, videos had a dimension of their own
                inputs |= {name: inputs[name].unflatten(0, (len(kind), -1)) for name in (pixels, places)}
    return inputs


def gemma4_prompt(image: Image) -> list[int]:
    """Each image and each frame between markers; a time stamp in front of a frame."""
    if image.frames == 1:
        return [VISION_START, *[IMAGE] * (image.height * image.width), VISION_END]
    return [MARKER, VISION_START, *[VIDEO] * (image.height * image.width), VISION_END] * image.frames


def framed(image: Image) -> list[int]:
    return [image.height * image.width] * image.frames


def build_llama4() -> torch.nn.Module:
    text = {
        **TEXT,
        "head_dim": 12,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 3,
        "attention_chunk_size": WINDOW,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 2,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    }
    config = transformers.Llama4Config(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    model = transformers.Llama4ForConditionalGeneration(config)
    rotary = model.vision_model.rotary_embedding
    rotary.freqs_ci = rotary._buffers.pop("freqs_ci").clone()  # complex: a change of dtype would make it real
    return model


def llama4_tiles(image: Image) -> int:
    tiles = image.height * image.width
    return tiles + 1 if tiles > 1 else 1  # the whole image comes last


def llama4_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(sum(map(llama4_tiles, images)), 3, 12, 12, generator=generator)}


def llama4_prompt(image: Image) -> list[int]:
    """Separators stand between tiles and after each row of them."""
    tile, rows = [IMAGE] * 9, []
    if llama4_tiles(image) > 1:
        rows = [*([*tile, MARKER] * image.width)[:-1], MARKER] * image.height
    return [VISION_START, *rows, MARKER + 1, *tile, VISION_END]


def build_phi4_multimodal() -> torch.nn.Module:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 2,
        "crop_size": 8,
        "image_token_id": IMAGE,
    }
    audio = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "audio_token_id": VIDEO,
    }
    # Smaller weights than elsewhere: its tower in eager rounds to float32 whatever the dtype.
    config = transformers.Phi4MultimodalConfig(
        **{**TEXT, "pad_token_id": 0, "initializer_range": 0.05}, vision_config=vision, audio_config=audio
    )
    return transformers.Phi4MultimodalForCausalLM(config)


def phi4_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Sizes in tokens, 2 x 2 in a crop; the whole image comes first, and the crops are padded."""
    down_across = [(math.ceil(image.height / 2), math.ceil(image.width / 2)) for image in images]
    crops = 1 + max(down * across for down, across in down_across)
    mask = torch.zeros(len(images), crops, 4, 4)
    for part, image, (down, across) in zip(mask, images, down_across, strict=True):
        whole = torch.zeros(4 * down, 4 * across)
        whole[: 2 * image.height, : 2 * image.width] = 1
        part[0] = 1
        part[1 : 1 + down * across] = (
            whole.unflatten(1, (across, 4)).unflatten(0, (down, 4)).transpose(1, 2).flatten(0, 1)
        )
    return {
        "image_pixel_values": torch.randn(len(images), crops, 3, 8, 8, generator=generator),
        "image_sizes": 8 * torch.tensor(down_across),
        "image_attention_mask": mask,
    }


SIZES = (Image(4, 6), Image(3, 3), Image(5, 4))
GEMMA3: dict[str, Any] = {
    "tokens": lambda image: [25],
    "pixels": gemma3_pixels,
    "markers": ([VISION_START], [VISION_END]),
    "extra": image_types,
}
GEMMA4_IMAGES: dict[str, Any] = {
    "images": SIZES,
    "prompt": gemma4_prompt,
    "extra": token_types,
    "video": Image(2, 4, frames=3),
}

TINY = {
    "paligemma": Tiny(build_paligemma, lambda image: [25], square_pixels, extra=prefix),
    "gemma3": Tiny(build_gemma3, **GEMMA3),
    "shieldgemma2": Tiny(partial(build_gemma3, transformers.ShieldGemma2Config), **GEMMA3),
    "mistral3": Tiny(build_mistral3, merged, pixtral_pixels, SIZES, prompt=broken_rows),
    "lighton_ocr": Tiny(build_lighton_ocr, merged, pixtral_pixels, SIZES),
    # Inputs tell tiles, not images: each tile, between its separators, is a span.
    "llama4": Tiny(
        build_llama4,
        lambda image: [9] * llama4_tiles(image),
        llama4_pixels,
        (Image(1, 2), Image(1, 1), Image(2, 1)),
        prompt=llama4_prompt,
    ),
    # A token after each row, then one, then the small image. Each image has padding: its tower takes sdpa without a
    # mask for causal.
    "phi4_multimodal": Tiny(
        build_phi4_multimodal,
        lambda image: [image.height * (image.width + 1) + 1 + 2 * 3],
        phi4_pixels,
        (Image(2, 3), Image(2, 1), Image(3, 2)),
        grids=False,
    ),
    # The large models: images are bidirectional blocks.
    "gemma4": Tiny(
        partial(build_gemma4, use_bidirectional_attention="vision", attention_k_eq_v=True),
        framed,
        partial(gemma4_pixels, 2),
        **GEMMA4_IMAGES,
    ),
    # The last layer shares the keys and values of the one before it.
    "gemma4-shared": Tiny(
        partial(build_gemma4, num_kv_shared_layers=1, layer_types=SHARED_TYPES),
        framed,
        partial(gemma4_pixels, 2),
        **GEMMA4_IMAGES,
    ),
    "gemma4_unified": Tiny(build_gemma4_unified, framed, partial(gemma4_pixels, 1), **GEMMA4_IMAGES),
}
