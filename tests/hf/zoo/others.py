"""Families with a language model or an image encoder of their own kind: image tokenizers, raw patches, Q-Formers."""

from __future__ import annotations

import torch
import transformers
from transformers import PersimmonConfig

from .spec import IMAGE, MARKER, TEXT, Image, Tiny

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


def chameleon_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
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
    text = PersimmonConfig(**{name: value for name, value in TEXT.items() if name != "num_key_value_heads"})
    return transformers.FuyuForCausalLM(transformers.FuyuConfig(text_config=text, patch_size=2, image_token_id=IMAGE))


def fuyu_prompt(image: Image) -> list[int]:
    """Each row ends with a newline token, and the image with the token that begins the text."""
    return [*([IMAGE] * image.width + [MARKER]) * image.height, MARKER + 1]


def fuyu_pixels(images: list[Image], generator: torch.Generator) -> dict[str, torch.Tensor]:
    patches = sum(image.height * image.width for image in images)
    return {"pixel_values": torch.randn(patches, 3 * 2 * 2, generator=generator)}


SIZES = (Image(4, 6), Image(3, 3), Image(5, 2))
TINY = {
    "chameleon": Tiny(build_chameleon, lambda image: [25], chameleon_pixels),
    "emu3": Tiny(build_emu3, emu3_tokens, emu3_pixels, SIZES, grids=False),
    "fuyu": Tiny(
        build_fuyu, lambda image: [image.height * image.width], fuyu_pixels, SIZES, grids=False, prompt=fuyu_prompt
    ),
}
