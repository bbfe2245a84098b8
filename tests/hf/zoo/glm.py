"""GLM's vision-language models, and others whose processors number patches the same way."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
import transformers

from .qwen import qwen_pixels
from .spec import IMAGE, LAYERS, MARKER, TEXT, VIDEO, VISION_END, VISION_START, Image, Tiny, token_types

# Half of each head is rotated, as in the real models: 3 frequencies of 6, one per axis.
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 1]}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "image_size": 24,
    "patch_size": 4,
    "out_hidden_size": 48,
    "spatial_merge_size": 2,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": MARKER,
    "video_end_token_id": MARKER + 1,
}
SIZES, MOVIE = (Image(4, 6), Image(3, 3), Image(5, 4)), Image(2, 4, frames=3)
MARKERS = ([VISION_START], [VISION_END])


def grid_tokens(image: Image) -> list[int]:
    return [image.height * image.width] * image.frames


def eager_experts(model: torch.nn.Module) -> torch.nn.Module:
    """The other implementations know no float64."""
    model.set_experts_implementation("eager")
    return model


def build_glm(name: str, **text: Any) -> torch.nn.Module:
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "rope_parameters": dict(MROPE), **text}, vision_config=VISION, **TOKENS
    )
    return transformers.AutoModelForImageTextToText.from_config(config)


def build_glm4v() -> torch.nn.Module:
    return build_glm("Glm4v")


def build_glm46v() -> torch.nn.Module:
    return build_glm("Glm46V", model_type="glm4v_text")


def build_glmga() -> torch.nn.Module:
    return build_glm("Glmga", model_type="glm4v_text")


def build_glm_ocr() -> torch.nn.Module:
    return build_glm("GlmOcr", head_dim=12)


def build_glm4v_moe() -> torch.nn.Module:
    experts = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    return eager_experts(build_glm("Glm4vMoe", head_dim=12, **experts))


def build_ernie4_5_vl_moe() -> torch.nn.Module:
    text = {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        "moe_intermediate_size": [16, 12],
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_merge_size": 2,
    }
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **TOKENS
    )
    return eager_experts(transformers.Ernie4_5_VLMoeForConditionalGeneration(config))


def flat_pixels(
    images: list[Image], generator: torch.Generator, patch: int = 3 * 4 * 4, group: int = 1
) -> dict[str, torch.Tensor]:
    """Patches of images and videos, ``group`` pictures to a frame of a video."""
    inputs = {}
    for names, kind, pictures in (
        (("pixel_values", "image_grid_thw"), [image for image in images if image.frames == 1], 1),
        (("pixel_values_videos", "video_grid_thw"), [image for image in images if image.frames > 1], group),
    ):
        if kind:
            grids = torch.tensor([(pictures * image.frames, 2 * image.height, 2 * image.width) for image in kind])
            inputs[names[0]] = torch.randn(int(grids.prod(1).sum()), patch, generator=generator)
            inputs[names[1]] = grids
    return inputs


def ernie_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    # The experts' types count the markers in.
    marked = ((ids == VISION_START) | (ids == VISION_END)).int()
    types = token_types(ids)["mm_token_type_ids"]
    return {"mm_token_type_ids": types, "moe_mm_token_type_ids": types + marked}


def build_hunyuan_vl() -> torch.nn.Module:
    # As HunyuanOCR has it: four axes (sequence, width, height, image), and a fixed stretching that it calls dynamic.
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 10.0, "factor": 1.0}
    rope["mrope_section"] = [2, 2, 1, 1]
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "max_image_size": 32,
        "out_hidden_size": 48,
        "spatial_merge_size": 2,
    }
    config = transformers.HunYuanVLConfig(
        text_config={**TEXT, "head_dim": 12, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        im_start_id=VISION_START,
        im_end_id=VISION_END,
        im_newline_id=254,
        tie_word_embeddings=False,
    )
    return transformers.HunYuanVLForConditionalGeneration(config)


def hunyuan_tokens(image: Image) -> list[int]:
    # Learned vectors for the image's begin, its end and the end of each row stand at placeholders too.
    return [image.height * (image.width + 1) + 2]


def build_minimax_m3_vl() -> torch.nn.Module:
    # Layers with block-sparse attention are refused: a block is as many slots of the cache, whatever is in them.
    text = {
        **TEXT,
        "head_dim": 12,
        "rotary_dim": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "dense_intermediate_size": 64,
        "shared_intermediate_size": 16,
        "intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
    }
    vision = {
        "hidden_size": 36,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
    }
    config = transformers.MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_hidden_size=32,
    )
    return eager_experts(transformers.MiniMaxM3SparseForConditionalGeneration(config))


# As in the real models every fourth layer, counted from the last, has full attention and no positions; the others have
# sliding windows.
MUSE_TEXT = {
    **TEXT,
    "head_dim": 12,
    "sliding_window": 16,
    # So many norms amplify rounding; these keep it small.
    "qk_scale_factor": 1.0,
    "post_norm_eps": 0.01,
    "output_multiplier": 0.2,
}
MUSE_VISION = {
    "patch_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "layer_types": ["window_attention", "full_attention"],
}
MUSE = {
    "vision_config": MUSE_VISION,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "out_hidden_size": 128,
    "projector_hidden_size": 32,
}


def build_muse_glimmer() -> torch.nn.Module:
    return transformers.MuseGlimmerForConditionalGeneration(
        transformers.MuseGlimmerConfig(text_config=MUSE_TEXT, **MUSE)
    )


def build_muse_spark() -> torch.nn.Module:
    experts = {
        "moe_hidden_size": 24,
        "moe_intermediate_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
    }
    audio = {
        "patch_sizes": [2, 2],
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "out_hidden_size": 48,
    }
    config = transformers.MuseSparkConfig(
        text_config=MUSE_TEXT | experts, audio_config=audio, audio_token_id=255, **MUSE
    )
    return eager_experts(transformers.MuseSparkForConditionalGeneration(config))


def stamped(image: Image) -> list[int]:
    """Frames with a time stamp and markers each, one number for the stamp."""
    pictures = [IMAGE if image.frames == 1 else VIDEO] * (image.height * image.width)
    frames = [[30 + stamp, VISION_START, *pictures, VISION_END] for stamp in range(image.frames)]
    return list(chain.from_iterable(frames))


def gridded(build: Any) -> Tiny:
    return Tiny(build, grid_tokens, qwen_pixels, SIZES, prompt=stamped, video=MOVIE)


def build_dots3_note() -> torch.nn.Module:
    # As in the real model layers 0, 1 and 5 attend to the keys that an indexer chooses, the others to a sliding window.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "head_dim": 12}
    heads |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
    text = {
        **TEXT,
        **heads,
        **{f"swa_{name}": value for name, value in heads.items()},
        "initializer_range": 0.06,  # the normalized latents amplify rounding
        "index_topk": 8,
        "index_head_dim": 8,
        "index_n_heads": 16,  # with few, scores are often zero, and which of equal ones wins depends on what is there
        "sliding_window": 16,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "num_local_experts": 4,
        "adapter_in_dim": 32,
        "adapter_out_dim": 48,
    }
    audio = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "feature_size": 8,
        "downsample_hidden_size": 8,
        "adapter_input_size": 16,
        "adapter_out_dim": 48,
    }
    config = transformers.Dots3NoteConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=255,
    )
    return eager_experts(transformers.Dots3NoteForConditionalGeneration(config))


def build_molmo2() -> torch.nn.Module:
    # Vocabulary and markers lie behind each other; here all ids are below 256.
    text = {**TEXT, "head_dim": 12, "additional_vocab_size": 0}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "image_size": [24, 24],
        "patch_size": 4,
    }
    adapter = {
        "vision_feature_layer": [2, 1],
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 32,
        "text_hidden_size": 48,
    }
    config = transformers.Molmo2Config(
        text_config=text,
        vision_config=vision,
        adapter_config=adapter,
        image_patch_id=IMAGE,
        image_start_token_id=VISION_START,
        low_res_image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        frame_start_token_id=VISION_START,
        frame_end_token_id=VISION_END,
        initializer_range=0.1,
    )
    return transformers.Molmo2ForConditionalGeneration(config)


LOW = 3  # rows and columns of the whole picture at low resolution


def molmo2_tokens(image: Image) -> list[int]:
    if image.frames > 1:  # at one resolution
        return grid_tokens(image)
    return [LOW * LOW + image.height * image.width]


def molmo2_ids(image: Image) -> list[int]:
    """Two views of an image, with a marker after each row; of a video each frame between markers, behind its time."""
    if image.frames > 1:
        frame = [VISION_START, *[IMAGE] * (image.height * image.width), VISION_END]
        return [token for time in range(image.frames) for token in (48 + time, *frame)]

    def view(height: int, width: int) -> list[int]:
        return [VISION_START, *([IMAGE] * width + [MARKER]) * height, VISION_END]

    return view(LOW, LOW) + view(image.height, image.width)


def molmo2_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    # Markers count as parts of the image: they too see all of it.
    return {"mm_token_type_ids": (ids >= IMAGE).int()}


def molmo2_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    # Crops of 6 x 6 patches: the whole picture, and one that all of its high resolution comes from; or a frame.
    film = images[0].frames > 1
    patches = 36 if film else 72
    tokens = [n for image in images for n in molmo2_tokens(image)]
    pixels = torch.randn(len(tokens) * patches // 36, 36, 3 * 4 * 4, generator=generator)
    pooling = [patches * i + torch.randint(patches, (n, 4), generator=generator) for i, n in enumerate(tokens)]
    if film:
        grids = torch.tensor([(video.frames, video.height, video.width) for video in images])
        return {"pixel_values_videos": pixels, "video_token_pooling": torch.cat(pooling), "video_grids": grids}
    return {
        "pixel_values": pixels,
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.tensor([(LOW, LOW, image.height, image.width) for image in images]),
        "image_num_crops": torch.full((len(images),), 2),
    }


def glm_ids(image: Image) -> list[int]:
    """A frame of a video has the same placeholder as an image, between the same markers, before its time."""
    picture = [VISION_START, *[IMAGE] * (image.height * image.width), VISION_END]
    if image.frames == 1:
        return picture
    frames = [token for time in range(image.frames) for token in (*picture, 48 + time)]
    return [TOKENS["video_start_token_id"], *frames, TOKENS["video_end_token_id"]]


def glm_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """1 for images, 2 inside of videos."""
    starts, ends = ((ids == TOKENS[f"video_{side}_token_id"]).cumsum(1) for side in ("start", "end"))
    return {"mm_token_type_ids": (ids == IMAGE).int() * (1 + (starts > ends).int())}


def glm(build: Any) -> Tiny:
    return Tiny(
        build, grid_tokens, qwen_pixels, SIZES, axes=3, prompt=glm_ids, extra=glm_types, video=MOVIE, mixes=False
    )


TINY = {
    "glm4v": glm(build_glm4v),
    "glm46v": glm(build_glm46v),
    "glmga": glm(build_glmga),
    "glm4v_moe": glm(build_glm4v_moe),
    "glm_ocr": glm(build_glm_ocr),
    "ernie4_5_vl_moe": Tiny(
        build_ernie4_5_vl_moe,
        grid_tokens,
        partial(flat_pixels, group=2),
        SIZES,
        axes=3,
        markers=MARKERS,
        extra=ernie_types,
        video=MOVIE,
    ),
    "hunyuan_vl": Tiny(
        build_hunyuan_vl,
        hunyuan_tokens,
        flat_pixels,
        (Image(3, 5), Image(3, 3), Image(4, 3)),
        grids=False,
        axes=4,
        markers=MARKERS,
        extra=token_types,
    ),
    "minimax_m3_vl": gridded(build_minimax_m3_vl),
    "muse_glimmer": gridded(build_muse_glimmer),
    "muse_spark": gridded(build_muse_spark),
    # An image's two views are one span.
    "molmo2": Tiny(
        build_molmo2,
        molmo2_tokens,
        molmo2_pixels,
        (Image(4, 6), Image(3, 3), Image(5, 4)),
        grids=False,
        prompt=molmo2_ids,
        extra=molmo2_types,
        video=MOVIE,
        mixes=False,
    ),
}
# Those that this version of transformers has.
TINY = {name: tiny for name, tiny in TINY.items() if name in transformers.CONFIG_MAPPING}
