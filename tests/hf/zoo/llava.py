"""LLaVA and its kin."""

from __future__ import annotations

import torch
import transformers
from transformers import Cohere2Config, LlamaConfig, Qwen2Config, SiglipVisionConfig

from .spec import IMAGE, MARKER, TEXT, VIDEO, VISION_END, VISION_START, Image, Tiny, clip

Pixels = dict[str, torch.Tensor]


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


def split(images: list[Image]) -> tuple[list[Image], list[Image]]:
    """Images, and videos."""
    return [image for image in images if image.frames == 1], [image for image in images if image.frames > 1]


def frames(videos: list[Image], side: int, generator: torch.Generator) -> Pixels:
    if not videos:
        return {}
    return {"pixel_values_videos": torch.randn(len(videos), videos[0].frames, 3, side, side, generator=generator)}


def build_llava() -> torch.nn.Module:
    config = transformers.LlavaConfig(vision_config=clip(10, 2), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)
    return transformers.LlavaForConditionalGeneration(config)


def build_vipllava() -> torch.nn.Module:
    config = transformers.VipLlavaConfig(
        vision_config=clip(10, 2), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, vision_feature_layers=[-1, -2]
    )
    return transformers.VipLlavaForConditionalGeneration(config)


def llava_pixels(images: list[Image], generator: torch.Generator) -> Pixels:
    return {"pixel_values": torch.randn(len(images), 3, 10, 10, generator=generator)}


def build_video_llava() -> torch.nn.Module:
    config = transformers.VideoLlavaConfig(
        vision_config=clip(6, 2), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, video_token_id=VIDEO
    )
    return transformers.VideoLlavaForConditionalGeneration(config)


def video_llava_pixels(images: list[Image], generator: torch.Generator) -> Pixels:
    # The name that processors of both ends of the range of transformers give.
    stills, videos = split(images)
    inputs = {"pixel_values_images": torch.randn(len(stills), 3, 6, 6, generator=generator)} if stills else {}
    return inputs | frames(videos, 6, generator)


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
# In tiles of 4 x 4 patches, one beside another (the first two) or one above another; padding cut off.
NEXT_VIDEO = {Image(4, 16): (2, [16 + 2 * 9]), Image(8, 8): (2, [16 + 4 * 5]), Image(16, 4): (2, [16 + 8 * 3])}
# As NEXT, but more than two tiles' worth of patches is made smaller.
ONEVISION = {**NEXT, Image(12, 12): (4, [9 + 4 * 5])}


def anyres_pixels(images: list[Image], generator: torch.Generator, sizes: dict, side: int) -> Pixels:
    stills, videos = split(images)
    inputs = frames(videos, side, generator)
    if stills:
        tiles = max(sizes[image][0] for image in stills) + 1
        inputs["pixel_values"] = torch.randn(len(stills), tiles, 3, side, side, generator=generator)
        inputs["image_sizes"] = torch.tensor([(image.height, image.width) for image in stills])
    return inputs


def build_llava_next_video() -> torch.nn.Module:
    config = transformers.LlavaNextVideoConfig(
        vision_config=clip(8, 2),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[8, 16], [16, 8]],
    )
    return transformers.LlavaNextVideoForConditionalGeneration(config)


def build_llava_onevision() -> torch.nn.Module:
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(6, 2),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[6, 12], [12, 6], [12, 12]],
        vision_aspect_ratio="anyres_max_2",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def build_granite4_vision() -> torch.nn.Module:
    vision = clip(12, 2)
    vision.hidden_size = 64  # the projector wants heads of 64
    config = transformers.Granite4VisionConfig(
        vision_config=vision,
        text_config=TEXT | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
        qformer_config={
            "model_type": "blip_2_qformer",
            "hidden_size": 64,
            "encoder_hidden_size": 64,
            "num_attention_heads": 1,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
        },
        image_token_id=IMAGE,
        image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]],
        downsample_rate="1/2",
        # Vision features are added in front of almost every layer, as in the real one.
        deepstack_layer_map=[[-2, 0], [-1, 1]],
        spatial_target_layers=[2, 3, 4, 5],
    )
    return transformers.Granite4VisionForConditionalGeneration(config)


# 6 x 6 patches a tile become 3 x 3.
GRANITE = {Image(2 * image.height, 2 * image.width): found for image, found in NEXT.items()}

COHERE = TEXT | {"sliding_window": 8, "logit_scale": 1.0}


def build_aya_vision() -> torch.nn.Module:
    config = transformers.AyaVisionConfig(
        vision_config=siglip(12, 2),
        text_config=Cohere2Config(**COHERE),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.AyaVisionForConditionalGeneration(config)


def build_cohere2_vision() -> torch.nn.Module:
    config = transformers.Cohere2VisionConfig(
        vision_config=siglip(12, 2),
        text_config=Cohere2Config(**COHERE),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
        tie_word_embeddings=False,
    )
    return transformers.Cohere2VisionForConditionalGeneration(config)


def tiles(image: Image) -> int:
    """Tiles of an image, and one of the whole where there are several."""
    count = image.height * image.width
    return count + (count > 1)


TILED = (Image(), Image(1, 2), Image(1, 3))


def aya_prompt(image: Image) -> list[int]:
    ids = [VISION_START]
    for tile in range(1, tiles(image)):
        ids += [MARKER, tile, *[IMAGE] * 9]
    return [*ids, MARKER + 1, *[IMAGE] * 9, VISION_END]


def cohere_prompt(image: Image) -> list[int]:
    return [VISION_START, *([IMAGE] * 9 + [MARKER]) * tiles(image), VISION_END]


def tile_pixels(images: list[Image], generator: torch.Generator, side: int) -> Pixels:
    return {"pixel_values": torch.randn(sum(map(tiles, images)), 3, side, side, generator=generator)}


SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 2,
    "initializer_range": 0.1,  # the default makes every image the same
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 32,
}


def build_got_ocr2(config: str = "GotOcr2Config") -> torch.nn.Module:
    made = getattr(transformers, config)(
        vision_config=SAM, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, tie_word_embeddings=False
    )
    return transformers.GotOcr2ForConditionalGeneration(made)


def build_pp_chart2table() -> torch.nn.Module:
    return build_got_ocr2("PPChart2TableConfig")


def build_step3p7() -> torch.nn.Module:
    config = transformers.Step3p7Config(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 2,
            "mlp_ratio": 2.0,
            "max_position_embeddings": 256,
        },
        text_config=TEXT
        | {
            "pad_token_id": 0,
            "initializer_range": 0.05,  # queries and keys are normalized; wider weights lose float32's last digits
            "head_dim": 12,
            # Sliding layers have heads of another number, and experts begin at layer 3.
            "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention", "sliding_attention"],
            "num_sliding_attention_heads": 6,
            "sliding_window": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
        },
        image_token_id=IMAGE,
    )
    return transformers.Step3p7ForConditionalGeneration(config)


def local_views(image: Image) -> int:
    """Local views of an image, beside the one of the whole."""
    return tiles(image) - 1


def step_prompt(image: Image) -> list[int]:
    views = [MARKER, *[IMAGE] * 4, MARKER + 1] * local_views(image)
    return [*views, VISION_START, *[IMAGE] * 16, VISION_END]


def step_pixels(images: list[Image], generator: torch.Generator) -> Pixels:
    counts = [local_views(image) for image in images]
    inputs = {
        "pixel_values": torch.randn(len(images), 3, 32, 32, generator=generator),
        "num_local_patches": torch.tensor(counts),
    }
    if any(counts):
        inputs["pixel_values_local"] = torch.randn(sum(counts), 3, 16, 16, generator=generator)
    return inputs


TINY = {
    "llava": Tiny(build_llava, lambda image: [25], llava_pixels),
    "vipllava": Tiny(build_vipllava, lambda image: [25], llava_pixels),
    # Frames of a video keep their class token, images do not.
    "video_llava": Tiny(
        build_video_llava,
        lambda image: [9] if image.frames == 1 else [10] * image.frames,
        video_llava_pixels,
        video=Image(frames=3),
    ),
    "llava_next": Tiny(
        build_llava_next,
        lambda image: NEXT[image][1],
        lambda images, generator: anyres_pixels(images, generator, NEXT, 6),
        tuple(NEXT),
        grids=False,
    ),
    "llava_next_video": Tiny(
        build_llava_next_video,
        lambda image: NEXT_VIDEO[image][1] if image.frames == 1 else [4] * image.frames,
        lambda images, generator: anyres_pixels(images, generator, NEXT_VIDEO, 8),
        tuple(NEXT_VIDEO),
        grids=False,
        video=Image(frames=3),
    ),
    # The newline token at the end of a video belongs to its last frame.
    "llava_onevision": Tiny(
        build_llava_onevision,
        lambda image: ONEVISION[image][1] if image.frames == 1 else [4] * (image.frames - 1) + [5],
        lambda images, generator: anyres_pixels(images, generator, ONEVISION, 6),
        tuple(ONEVISION),
        grids=False,
        video=Image(frames=3),
    ),
    "granite4_vision": Tiny(
        build_granite4_vision,
        lambda image: GRANITE[image][1],
        lambda images, generator: anyres_pixels(images, generator, GRANITE, 12),
        tuple(GRANITE),
        grids=False,
    ),
    # Tiles that the inputs assign to no image: a tile is a span. In Aya and Cohere markers separate them.
    "aya_vision": Tiny(
        build_aya_vision,
        lambda image: [9] * tiles(image),
        lambda images, generator: tile_pixels(images, generator, 12),
        TILED,
        prompt=aya_prompt,
    ),
    "cohere2_vision": Tiny(
        build_cohere2_vision,
        lambda image: [9] * tiles(image),
        lambda images, generator: tile_pixels(images, generator, 12),
        TILED,
        prompt=cohere_prompt,
    ),
    "got_ocr2": Tiny(
        build_got_ocr2,
        lambda image: [16] * tiles(image),
        lambda images, generator: tile_pixels(images, generator, 32),
        TILED,
        markers=([VISION_START], [VISION_END]),
    ),
    "pp_chart2table": Tiny(
        build_pp_chart2table,
        lambda image: [16] * tiles(image),
        lambda images, generator: tile_pixels(images, generator, 32),
        TILED,
        markers=([VISION_START], [VISION_END]),
    ),
    # The inputs count the local views of each image: all its views are one span, whatever stands between them.
    "step3p7": Tiny(
        build_step3p7,
        lambda image: [16 + 4 * local_views(image)],
        step_pixels,
        TILED,
        grids=False,
        prompt=step_prompt,
    ),
}
