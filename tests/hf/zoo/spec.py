"""What a family under test is, and what all tiny models share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig

LAYERS = 6
VOCAB = 256
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Wide weights: attention must matter, and greedy decoding must not repeat itself.
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Text ids are below IMAGE. Markers that a processor puts inside or around images are from MARKER on.
IMAGE, VIDEO, VISION_START, VISION_END, MARKER = 250, 251, 252, 253, 254


@dataclass(frozen=True)
class Image:
    """An image (or, with more than one frame, a video): height and width in the family's own unit."""

    height: int = 1
    width: int = 1
    frames: int = 1


@dataclass(frozen=True)
class Tiny:
    """A family under test.

    Attributes
    ----------
    build
        Makes the model from its config.
    tokens
        Vision tokens of an image, span by span: a list of lengths.
    pixels
        Keywords for the images of a batch, in their order.
    images
        Three images of different size, where the family has sizes.
    grids
        Whether its tokens lie on a grid.
    axes
        Axes of its rotary positions.
    markers
        Text tokens that the processor puts around an image.
    prompt
        All ids of an image, where the processor puts markers between its placeholders too.
    extra
        Further inputs that the processor makes out of ``input_ids``.
    video
        A video, where the family takes any.
    mixes
        Whether images may stand beside a video.
    words
        Whether it takes prompts without images.
    """

    build: Callable[[], torch.nn.Module]
    tokens: Callable[[Image], list[int]]
    pixels: Callable[[list[Image], torch.Generator], dict[str, torch.Tensor]]
    images: tuple[Image, Image, Image] = (Image(), Image(), Image())
    grids: bool = True
    axes: int = 1
    markers: tuple[list[int], list[int]] = ([], [])
    prompt: Callable[[Image], list[int]] | None = None
    extra: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None
    video: Image | None = None
    mixes: bool = True
    words: bool = True

    def ids(self, image: Image) -> list[int]:
        """The ids that stand for an image in the prompt."""
        if self.prompt is not None:
            return self.prompt(image)
        placeholders = [IMAGE if image.frames == 1 else VIDEO] * sum(self.tokens(image))
        return [*self.markers[0], *placeholders, *self.markers[1]]


def clip(image_size: int, patch_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=32,
    )


def token_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What processors call ``mm_token_type_ids``: 1 for images, 2 for videos."""
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
