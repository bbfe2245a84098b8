"""Models that cut an image into tiles of equal size, and others whose images all have the same length.

No input tells which tiles are one image's, so each tile is a span (and so is each frame of a video).
"""

from __future__ import annotations

from functools import partial

import torch
import transformers
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from .spec import IMAGE, MARKER, TEXT, VISION_END, VISION_START, Image, Tiny

SIDE, PATCH = 12, 2  # a tile: 6 x 6 patches, 3 x 3 tokens
TOKENS = 9
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
NEWLINE = 10


def count(image: Image) -> int:
    """Tiles (with a small picture of the whole where there are several) or frames."""
    tiles = image.height * image.width
    return image.frames if image.frames > 1 else tiles + (tiles > 1)


def spans(image: Image) -> list[int]:
    return [TOKENS] * count(image)


def tiles(
    images: list[Image], generator: torch.Generator, mask: str | None = None, side: int = SIDE
) -> dict[str, torch.Tensor]:
    """Tiles of all images in one row."""
    total = sum(map(count, images))
    inputs = {"pixel_values": torch.randn(total, 3, side, side, generator=generator)}
    return inputs if mask is None else inputs | {mask: torch.ones(total, side, side, dtype=torch.bool)}


def padded_tiles(images: list[Image], generator: torch.Generator, pixel_mask: bool = True) -> dict[str, torch.Tensor]:
    """A row of tiles for each image, padded with tiles of zeros that the model takes out."""
    real = torch.arange(max(map(count, images))) < torch.tensor(list(map(count, images)))[:, None]
    pixels = torch.randn(*real.shape, 3, SIDE, SIDE, generator=generator) * real[..., None, None, None]
    mask = real[..., None, None].expand(*real.shape, SIDE, SIDE).long() if pixel_mask else real
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


# One tile; two beside each other and the whole; two above each other and the whole.
SIZES = (Image(1, 2), Image(1, 1), Image(2, 1))


def build_idefics2() -> torch.nn.Module:
    perceiver = {
        "resampler_n_latents": TOKENS,
        "resampler_depth": 2,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "num_key_value_heads": 1,
        "hidden_size": TEXT["hidden_size"],
    }
    config = transformers.Idefics2Config(
        vision_config=VISION,
        perceiver_config=perceiver,
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
    )
    return transformers.Idefics2ForConditionalGeneration(config)


def idefics2_prompt(image: Image) -> list[int]:
    fake = VISION_START  # one between two tiles
    return [fake, *([IMAGE] * TOKENS + [fake]) * count(image)]


def build_idefics3() -> torch.nn.Module:
    config = transformers.Idefics3Config(
        vision_config=VISION, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def build_smolvlm() -> torch.nn.Module:
    config = transformers.SmolVLMConfig(
        vision_config=VISION, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def idefics3_prompt(image: Image) -> list[int]:
    fake, place, whole = VISION_START, VISION_END, MARKER
    one = [fake, whole, *[IMAGE] * TOKENS, fake]
    if image.frames > 1:
        return [7, 8, *[NEWLINE, 9, *one] * image.frames, NEWLINE]  # each frame with its time
    if count(image) == 1:
        return one
    row = [*[fake, place, *[IMAGE] * TOKENS] * image.width, NEWLINE]
    return [*row * image.height, NEWLINE, *one]


def build_granite_docling() -> torch.nn.Module:
    text = {name: value for name, value in TEXT.items() if name != "initializer_range"}
    config = transformers.GraniteDoclingConfig(
        vision_config={
            **VISION,
            "num_hidden_layers": 3,
            "scale_factor": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "deepstack_visual_indexes": [0, 1, 2],
        },
        # The real multipliers are made for wide models.
        text_config={**text, "initializer_range": 0.1, "attention_multiplier": 0.3, "residual_multiplier": 1.0},
        image_token_id=IMAGE,
        tie_word_embeddings=False,
        pad_token_id=None,
    )
    return transformers.GraniteDoclingForConditionalGeneration(config)


def granite_docling_prompt(image: Image) -> list[int]:
    fake, place, whole = VISION_START, VISION_END, MARKER
    row = [*[fake, place, *[IMAGE] * TOKENS] * image.width, NEWLINE]
    last = [] if count(image) == 1 else [NEWLINE, fake, whole, *[IMAGE] * TOKENS, fake]
    return [*row * image.height, *last]


def build_internvl() -> torch.nn.Module:
    config = transformers.InternVLConfig(
        vision_config={**VISION, "image_size": (SIDE, SIDE), "patch_size": (PATCH, PATCH)},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    return transformers.InternVLForConditionalGeneration(config)


def build_qianfan_ocr() -> torch.nn.Module:
    config = transformers.QianfanOCRConfig(
        vision_config={**VISION, "image_size": (SIDE, SIDE), "patch_size": (PATCH, PATCH)},
        text_config=Qwen3Config(**TEXT, head_dim=12),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
    )
    return transformers.QianfanOCRForConditionalGeneration(config)


def internvl_prompt(image: Image) -> list[int]:
    if image.frames > 1:  # each with its number in front
        return [*[7, 8, VISION_START, *[IMAGE] * TOKENS, VISION_END, NEWLINE] * image.frames][:-1]
    return [VISION_START, *[IMAGE] * sum(spans(image)), VISION_END]


INDICATORS = START, GRID, COL, ROW, END = VISION_START, VISION_END, MARKER, MARKER + 1, 249


def build_ovis2() -> torch.nn.Module:
    config = transformers.Ovis2Config(
        vision_config={**VISION, "hidden_stride": 2, "vocab_size": 40, "initializer_range": 0.1},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        visual_indicator_token_ids=list(INDICATORS),
        vocab_size=TEXT["vocab_size"],
        hidden_size=TEXT["hidden_size"],
        tie_word_embeddings=False,
    )
    return transformers.Ovis2ForConditionalGeneration(config)


def ovis2_prompt(image: Image) -> list[int]:
    one = [IMAGE] * TOKENS
    if count(image) == 1:
        return [START, *one, GRID, END]
    row = [*[*one, COL] * image.width][:-1]
    return [START, *one, GRID, *[*[*row, ROW] * image.height][:-1], END]


def build_aria() -> torch.nn.Module:
    config = transformers.AriaConfig(
        vision_config=transformers.Idefics3VisionConfig(**VISION),
        text_config=transformers.AriaTextConfig(**TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={36: TOKENS},
        initializer_range=0.1,
    )
    network = transformers.AriaForConditionalGeneration(config)
    network.set_experts_implementation("eager")  # the default takes no float64
    return network


def build_janus() -> torch.nn.Module:
    config = transformers.JanusConfig(
        vision_config={**VISION, "mlp_ratio": 1.0, "projection_dim": TEXT["hidden_size"], "num_image_tokens": 36},
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 8,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 1,
            "projection_dim": 8,
            "image_token_embed_dim": TEXT["hidden_size"],
        },
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.JanusForConditionalGeneration(config)


def build_deepseek_vl() -> torch.nn.Module:
    config = transformers.DeepseekVLConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.DeepseekVLForConditionalGeneration(config)


def build_deepseek_vl_hybrid() -> torch.nn.Module:
    config = transformers.DeepseekVLHybridConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        high_res_vision_config={
            "model_type": "sam_vision_model",
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 2,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 32,
            "initializer_range": 0.1,
        },
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.DeepseekVLHybridForConditionalGeneration(config)


def hybrid_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    high = torch.randn(len(images), 3, 16, 16, generator=generator)
    return tiles(images, generator) | {"high_res_pixel_values": high}


def whole(image: Image) -> list[int]:
    """One image of one length: no tiles, every patch a token."""
    return [36]


AROUND = ([VISION_START], [VISION_END])
VIDEO = Image(frames=3)
TINY = {
    # Markers stand between tiles.
    "idefics2": Tiny(build_idefics2, spans, padded_tiles, SIZES, grids=False, prompt=idefics2_prompt),
    "idefics3": Tiny(build_idefics3, spans, padded_tiles, SIZES, prompt=idefics3_prompt),
    "smolvlm": Tiny(build_smolvlm, spans, padded_tiles, SIZES, prompt=idefics3_prompt, video=VIDEO),
    "ovis2": Tiny(build_ovis2, spans, tiles, SIZES, prompt=ovis2_prompt),
    # An image's tiles follow each other without markers.
    "internvl": Tiny(build_internvl, spans, tiles, SIZES, prompt=internvl_prompt, video=VIDEO),
    "qianfan_ocr": Tiny(build_qianfan_ocr, spans, tiles, SIZES, prompt=internvl_prompt),
    "aria": Tiny(build_aria, spans, partial(tiles, mask="pixel_mask"), SIZES, grids=False, markers=AROUND),
    # No tiles.
    "janus": Tiny(build_janus, whole, tiles, markers=AROUND),
    "deepseek_vl": Tiny(build_deepseek_vl, whole, tiles),
    "deepseek_vl_hybrid": Tiny(build_deepseek_vl_hybrid, whole, hybrid_pixels),
}
if hasattr(transformers, "GraniteDoclingConfig"):
    TINY["granite_docling"] = Tiny(
        build_granite_docling, spans, partial(padded_tiles, pixel_mask=False), SIZES, prompt=granite_docling_prompt
    )
