"""Qwen's vision-language models and others with grids of patches and M-RoPE."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version

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
SOUNDS = {"audio_token_id": 255, "audio_start_token_id": 254}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "output_dim": 48}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
WINDOWS = {**VISION, "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 48}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}
# The features of every layer of the tower are added to hidden states behind the decoder's first three layers.
DEEPSTACK = {
    **VISION,
    "depth": 3,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1, 2],
}


def double(model: torch.nn.Module) -> torch.nn.Module:
    """With experts that work in float64 too, as the grouped matrix products that are the default do not."""
    model.set_experts_implementation("eager")
    return model


def silent(model: torch.nn.Module) -> torch.nn.Module:
    """A model that reads positions off the ids must not say markers and placeholders itself, as a random one may."""
    with torch.no_grad():
        model.lm_head.weight[IMAGE:] = 0
    return model


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
    return double(transformers.Qwen3VLMoeForConditionalGeneration(config))


def build_cosmos3_omni() -> torch.nn.Module:
    text = {**TEXT, **MIXED, "head_dim": 12, "model_type": "qwen3_vl_text"}
    vision = {**DEEPSTACK, "model_type": "qwen3_vl_vision"}
    config = transformers.Cosmos3OmniConfig(text_config=text, vision_config=vision, **IDS)
    return transformers.Cosmos3OmniForConditionalGeneration(config)


def build_cosmos3_edge() -> torch.nn.Module:
    text = {**TEXT, **MROPE, "head_dim": 12}
    vision = {**SIGLIP, "num_patches": 16}
    config = transformers.Cosmos3EdgeConfig(text_config=text, vision_config=vision, projector_hidden_size=32, **IDS)
    return transformers.Cosmos3EdgeForConditionalGeneration(config)


def build_exaone4_5() -> torch.nn.Module:
    # Three layers with windows shorter than the prompts, then one that sees everything, and so on.
    text = {**TEXT, "model_type": "exaone4", "sliding_window": 16, "sliding_window_pattern": 4}
    vision = {**WINDOWS, "num_key_value_heads": 1}
    config = transformers.Exaone4_5_Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )
    return transformers.Exaone4_5_ForConditionalGeneration(config)


def build_hyperclovax_vision_v2() -> torch.nn.Module:
    config = transformers.HyperCLOVAXVisionV2Config(
        text_config={**TEXT, "model_type": "hyperclovax"},
        vision_config={**WINDOWS, "model_type": "qwen2_5_vl_vision"},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )
    return transformers.HyperCLOVAXVisionV2ForConditionalGeneration(config)


def build_paddleocr_vl() -> torch.nn.Module:
    text, vision = {**TEXT, **MROPE, "head_dim": 12}, {**SIGLIP, "image_size": 16}
    config = transformers.PaddleOCRVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **IDS)
    return transformers.PaddleOCRVLForConditionalGeneration(config)


def build_video_llama_3() -> torch.nn.Module:
    config = transformers.VideoLlama3Config(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config=SIGLIP,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return transformers.VideoLlama3ForConditionalGeneration(config)


def build_qwen2_5_omni() -> torch.nn.Module:
    audio = {**AUDIO, "n_window": 4, "num_mel_bins": 8}
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=TEXT | MROPE,
        vision_config=WINDOWS,
        audio_config=audio,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        **SOUNDS,
    )
    return silent(transformers.Qwen2_5OmniThinkerForConditionalGeneration(config))


def build_qwen3_omni_moe() -> torch.nn.Module:
    audio = {**AUDIO, "n_window": 4, "n_window_infer": 8, "num_mel_bins": 8, "downsample_hidden_size": 8}
    config = transformers.Qwen3OmniMoeThinkerConfig(
        text_config={**TEXT, **MIXED, **EXPERTS}, vision_config=DEEPSTACK, audio_config=audio, **IDS, **SOUNDS
    )
    return silent(double(transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config)))


def build_kimi_k25() -> torch.nn.Module:
    text = {
        **TEXT,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 24,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 6,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    }
    vision = {**SIGLIP, "pos_emb_height": 4, "pos_emb_width": 4}
    del vision["layer_norm_eps"]
    config = transformers.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=32, tie_word_embeddings=False, **IDS
    )
    return double(transformers.Kimi_K25ForConditionalGeneration(config))


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


def omni_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    inputs = qwen_pixels(images, generator)
    if "video_grid_thw" in inputs:
        inputs["video_second_per_grid"] = torch.ones(len(inputs["video_grid_thw"]))
    return inputs


def flat_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Patches of one frame."""
    inputs = qwen_pixels(images, generator)
    return {name: value[:, :48] if name.startswith("pixel") else value for name, value in inputs.items()}


def square_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The same with height and width."""
    inputs = flat_pixels(images, generator)
    return {
        name: value.unflatten(1, (3, 4, 4)) if name.startswith("pixel") else value for name, value in inputs.items()
    }


def kimi_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Each group of frames has a grid of its own. Of one frame: with more of them the dense model fails."""
    inputs = square_pixels(images, generator)
    if "video_grid_thw" in inputs:
        grids = inputs["video_grid_thw"]
        inputs["video_grid_thw"] = grids.repeat_interleave(grids[:, 0], 0).index_fill(1, torch.tensor([0]), 1)
    return inputs


def video_llama_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The first two tokens of every second frame are left out, as being the same as those of the frame before."""
    inputs = flat_pixels(images, generator)
    for name in ("image", "video"):
        if f"{name}_grid_thw" in inputs:
            inputs[f"{name}_merge_sizes"] = torch.full((len(inputs[f"{name}_grid_thw"]),), 2)
    videos = [image for image in images if image.frames > 1]
    if videos:
        kept = [[time % 2 == 0 or at > 1 for at in range(n)] for v in videos for time, n in enumerate(patches(v))]
        inputs["video_compression_mask"] = torch.tensor([keep for frame in kept for keep in frame])
    return inputs


def patches(image: Image) -> list[int]:
    return [image.height * image.width] * image.frames


def stamped(image: Image) -> list[int]:
    """Each frame of a video follows its time as text, between markers of its own."""
    if image.frames == 1:
        return [VISION_START, *[IMAGE] * (image.height * image.width), VISION_END]
    frame = [VISION_START, *[VIDEO] * (image.height * image.width), VISION_END]
    return [token for time in range(image.frames) for token in (60, 48 + time, 62, *frame)]


def timed(image: Image) -> list[int]:
    """Each frame of a video follows its time as text, without markers."""
    if image.frames == 1:
        return [IMAGE] * (image.height * image.width)
    return [token for time, n in enumerate(compressed(image)) for token in (84, 48 + time, 58, *[VIDEO] * n, 44)]


def compressed(image: Image) -> list[int]:
    return [n - 2 * (time % 2) for time, n in enumerate(patches(image))]


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
TOWER = QWEN2 | {"axes": 1, "extra": None}
VIDEO_LLAMA = TOWER | {"tokens": compressed, "pixels": video_llama_pixels, "prompt": timed}

BUILDERS = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", build_qwen2_vl, QWEN2),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", build_qwen2_5_vl, QWEN2),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", build_qwen3_vl, QWEN3),
    "qwen2_5_omni_thinker": (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        build_qwen2_5_omni,
        QWEN2 | {"pixels": omni_pixels, "extra": None},
    ),
    "qwen3_omni_moe_thinker": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        build_qwen3_omni_moe,
        QWEN2 | {"pixels": omni_pixels, "extra": None},
    ),
    "cosmos3_omni": ("Cosmos3OmniForConditionalGeneration", build_cosmos3_omni, QWEN3),
    "cosmos3_edge": ("Cosmos3EdgeForConditionalGeneration", build_cosmos3_edge, QWEN3 | {"pixels": flat_pixels}),
    "exaone4_5": ("Exaone4_5_ForConditionalGeneration", build_exaone4_5, TOWER),
    "hyperclovax_vision_v2": ("HyperCLOVAXVisionV2ForConditionalGeneration", build_hyperclovax_vision_v2, TOWER),
    "paddleocr_vl": (
        "PaddleOCRVLForConditionalGeneration",
        build_paddleocr_vl,
        QWEN2 | {"pixels": square_pixels, "video": None},
    ),
    "video_llama_3": ("VideoLlama3ForConditionalGeneration", build_video_llama_3, VIDEO_LLAMA),
    "kimi_k25": (
        "Kimi_K25ForConditionalGeneration",
        build_kimi_k25,
        TOWER | {"pixels": kimi_pixels, "prompt": stamped},
    ),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", build_qwen3_vl_moe, QWEN3),
}
if Version(transformers.__version__) < Version("5.20"):
    del BUILDERS["cosmos3_edge"]  # without attention mask it takes gaps in image positions for packed sequences
TINY = {name: Tiny(build, **facts) for name, (needs, build, facts) in BUILDERS.items() if hasattr(transformers, needs)}
