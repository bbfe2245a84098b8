"""Families with a language model or an image encoder of their own kind: image tokenizers, raw patches, Q-Formers."""

from __future__ import annotations

import torch
import transformers
from transformers import LlamaConfig, OPTConfig, Qwen2Config, SamVisionConfig

from .qwen import DEEPSTACK, IDS, QWEN3
from .spec import IMAGE, MARKER, TEXT, VIDEO, Image, Tiny, clip

# Of the ids below, 200 to 231 also stand for entries of an image tokenizer's codebook.
CODES = range(200, 232)


def build_chameleon() -> torch.nn.Module:
    # The names of the codes count in letters: A is 0, B is 1, …
    names = {"".join(chr(ord("A") + int(digit)) for digit in str(i)): code for i, code in enumerate(CODES)}
    config = transformers.ChameleonConfig(
        **TEXT,
        vocabulary_map={"<image>": IMAGE} | {f"IMGIMG{name}Z": code for name, code in names.items()},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": len(CODES),
            "latent_channels": 8,
            "resolution": 10,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
    )
    return transformers.ChameleonForConditionalGeneration(config)


def pixels_10(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(images), 3, 10, 10, generator=generator)}


def build_emu3() -> torch.nn.Module:
    names = {f"<|visual token {i:06}|>": code for i, code in enumerate(CODES)}
    config = transformers.Emu3Config(
        text_config={**TEXT, "pad_token_id": 0, "bos_token_id": 1, "attention_dropout": 0.0},
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": MARKER} | names,
        vq_config={
            "codebook_size": len(CODES),
            "temporal_downsample_factor": 1,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
        },
    )
    return transformers.Emu3ForConditionalGeneration(config)


def emu3_tokens(image: Image) -> list[int]:
    """The end of each row is a placeholder too: its embedding comes with the image's."""
    return [image.height * (image.width + 1)]


def emu3_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    height, width = (2 * max(sizes) for sizes in zip(*((image.height, image.width) for image in images), strict=True))
    return {
        "pixel_values": torch.randn(len(images), 3, height, width, generator=generator),
        "image_sizes": torch.tensor([(2 * image.height, 2 * image.width) for image in images]),
    }


def build_fuyu() -> torch.nn.Module:
    text = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    config = transformers.FuyuConfig(**text, patch_size=2, image_token_id=IMAGE)  # flat, as the hub has it
    config.text_config.initializer_range = TEXT["initializer_range"]
    return transformers.FuyuForCausalLM(config)


def fuyu_prompt(image: Image) -> list[int]:
    """Each row ends with a newline token, and the image with the token that begins the text."""
    return [*([IMAGE] * image.width + [MARKER]) * image.height, MARKER + 1]


def fuyu_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    patches = sum(image.height * image.width for image in images)
    return {"image_patches": torch.randn(patches, 3 * 2 * 2, generator=generator)}


def build_perception_lm() -> torch.nn.Module:
    """Its vision tower comes from the package timm; any other that gives patches will do."""
    vision = clip(8, 2)
    vision.model_args = {"embed_dim": vision.hidden_size}
    config = transformers.PerceptionLMConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, video_token_id=VIDEO
    )
    return transformers.PerceptionLMForConditionalGeneration(config)


def perception_lm_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Three tiles an image, as many as a video has frames: images of a batch have the same number."""
    inputs = {}
    for name, count in (
        ("pixel_values", sum(image.frames == 1 for image in images)),
        ("pixel_values_videos", sum(image.frames > 1 for image in images)),
    ):
        if count:
            inputs[name] = torch.randn(count, 3, 3, 8, 8, generator=generator)
    return inputs


def build_fast_vlm() -> torch.nn.Module:
    """Its vision tower comes from the package timm; any other that gives a map of features will do."""
    vision = SamVisionConfig(
        hidden_size=32,
        output_channels=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=10,
        patch_size=2,
        global_attn_indexes=[0, 1],
        mlp_dim=32,
    )
    config = transformers.FastVlmConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_index=IMAGE, image_seq_length=25
    )
    return transformers.FastVlmForConditionalGeneration(config)


def build_deepseek_ocr2() -> torch.nn.Module:
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.DeepseekOcr2Config(
        text_config={
            **TEXT,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 3,
        },
        vision_config={
            "sam_config": {
                **layers,
                "output_channels": 16,
                "image_size": 52,
                "patch_size": 1,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 32,
                "downsample_channels": [16, 32],
                "initializer_range": 0.02,
            },
            "encoder_config": {**layers, "num_key_value_heads": 2, "vocab_size": 8},
        },
        image_token_id=IMAGE,
    )
    model = transformers.DeepseekOcr2ForConditionalGeneration(config)
    model.set_experts_implementation("eager")  # the grouped kernel has no float64
    return model


def deepseek_ocr2_tokens(image: Image) -> list[int]:
    """Tiles (as many as ``width``), the whole image, and the separator. The numbers of queries are the model's own."""
    return [image.width * 144 + 256 + 1]


def deepseek_ocr2_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    tiles = [image.width for image in images]
    inputs = {"pixel_values": torch.randn(len(images), 3, 52, 52, generator=generator)}
    if sum(tiles):
        inputs["pixel_values_local"] = torch.randn(sum(tiles), 3, 8, 8, generator=generator)
        inputs["num_local_patches"] = torch.tensor(tiles)
    return inputs


def build_cohere_compass() -> torch.nn.Module:
    # Rotary positions in windows shorter than the prompts, none in the layers that see everything.
    layers = (["sliding_attention"] * 3 + ["full_attention"]) * 2
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    text = {
        **TEXT,
        "layer_types": layers[: TEXT["num_hidden_layers"]],
        "sliding_window": 16,
        "rope_parameters": {"sliding_attention": rotary, "full_attention": None},
    }
    config = transformers.CohereCompassConfig(text_config=text, vision_config=DEEPSTACK, **IDS)
    return transformers.CohereCompassForConditionalGeneration(config)


def q_former(prefix: str, **more: object) -> torch.nn.Module:
    text = {name: value for name, value in TEXT.items() if name not in ("num_key_value_heads", "intermediate_size")}
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{prefix}Config")(
        vision_config={**layers, "image_size": 8, "patch_size": 4},
        qformer_config={**layers, "vocab_size": 256, "initializer_range": 0.5},
        text_config=OPTConfig(**text, ffn_dim=64, word_embed_proj_dim=48, init_std=0.1),
        num_query_tokens=18,
        **more,
    )
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    torch.nn.init.normal_(model.query_tokens)  # zeros otherwise, and all vision tokens alike
    return model


def build_blip_2() -> torch.nn.Module:
    return q_former("Blip2", image_token_index=IMAGE)


def blip_2_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(len(images), 3, 8, 8, generator=generator)}


def build_instructblip() -> torch.nn.Module:
    return q_former("InstructBlip", image_token_index=IMAGE)


def instructblip_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The Q-Former reads the instruction too."""
    words = torch.randint(1, 256, (len(images), 5), generator=generator)
    return {**blip_2_pixels(images, generator), "qformer_input_ids": words}


def build_instructblipvideo() -> torch.nn.Module:
    return q_former("InstructBlipVideo", video_token_index=VIDEO)


def instructblipvideo_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The Q-Former reads the instruction with every frame; videos of a batch have the same number of these."""
    videos, frames = len(images), images[0].frames
    words = torch.randint(1, 256, (videos, 5), generator=generator)
    return {"pixel_values": torch.randn(videos, frames, 3, 8, 8, generator=generator), "qformer_input_ids": words}


SIZES = (Image(4, 6), Image(3, 3), Image(5, 2))
TINY = {
    "blip-2": Tiny(build_blip_2, lambda image: [18], blip_2_pixels, grids=False, words=False),
    "instructblip": Tiny(build_instructblip, lambda image: [18], instructblip_pixels, grids=False, words=False),
    "instructblipvideo": Tiny(
        build_instructblipvideo,
        lambda video: [18] * video.frames,
        instructblipvideo_pixels,
        (Image(frames=2),) * 3,
        grids=False,
        video=Image(frames=2),
        mixes=False,
        words=False,
    ),
    "chameleon": Tiny(build_chameleon, lambda image: [25], pixels_10),
    "cohere_compass": Tiny(build_cohere_compass, **QWEN3),
    "deepseek_ocr2": Tiny(
        build_deepseek_ocr2,
        deepseek_ocr2_tokens,
        deepseek_ocr2_pixels,
        (Image(1, 0), Image(1, 1), Image(1, 2)),
        grids=False,
    ),
    "emu3": Tiny(build_emu3, emu3_tokens, emu3_pixels, SIZES, grids=False),
    "fast_vlm": Tiny(build_fast_vlm, lambda image: [25], pixels_10),
    "fuyu": Tiny(
        build_fuyu, lambda image: [image.height * image.width], fuyu_pixels, SIZES, grids=False, prompt=fuyu_prompt
    ),
    # The features come tile by tile, nothing tells which make up an image: a tile is a span.
    "perception_lm": Tiny(build_perception_lm, lambda image: [16] * 3, perception_lm_pixels, video=Image(frames=3)),
}
