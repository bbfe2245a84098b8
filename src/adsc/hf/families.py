"""What differs between model families, as data in one place: where each image's tokens are in a batch of inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from math import isqrt, prod, sqrt
from typing import Any

import numpy as np
import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, DynamicCache, GenerationMixin, PreTrainedConfig
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ..errors import InputError, UnsupportedModelError
from .caches import LAYERS
from .decoders import shared_layers
from .spans import Family, Frames, Inputs, Modality, check_whole
from .views import Ints


def _square(tokens: int, _: object = None) -> Frames:
    side = isqrt(tokens)
    return Frames(tokens, grid=(side, side) if side * side == tokens else None)


def _llava_images(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    if inputs.get("image_sizes") is not None:  # towers for any resolution (Pixtral)
        patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        grids = [(h // patch, w // patch) for h, w in torch.as_tensor(inputs["image_sizes"]).tolist()]
        return [Frames(h * w, grid=(h, w)) for h, w in grids]
    images = len(inputs["pixel_values"])
    if placeholders % images:
        raise InputError(f"{placeholders} image placeholders for {images} images of equal size do not divide evenly")
    return [_square(placeholders // images)] * images


def _anyres_images(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # Base image, then the tiles' grid without padding, with one newline token after each of its rows.
    if inputs.get("image_sizes") is None:
        raise InputError("pixel_values came without image_sizes; pass all that the processor returns")
    vision, sizes = config.vision_config, torch.as_tensor(inputs["image_sizes"]).tolist()
    side = vision.image_size // vision.patch_size
    if getattr(config, "downsample_rate", None):  # Granite
        side = int(side * Fraction(config.downsample_rate))
    most = getattr(config, "vision_aspect_ratio", None)  # OneVision: "anyres_max_9" is the patches of 9 tiles at most
    tiled = [True] * len(sizes)
    if inputs.get("batch_num_images") is not None:  # OneVision does not tile images that are not alone in their row
        tiled = [n == 1 for n in torch.as_tensor(inputs["batch_num_images"]).tolist() for _ in range(n)]
    frames = []
    for size, is_tiled in zip(sizes, tiled, strict=True):
        if not is_tiled:
            frames.append(Frames(side * side + 1))
            continue
        tiles = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, vision.image_size)
        grid = unpad_image(torch.empty(1, tiles[0] * side, tiles[1] * side, device="meta"), size).shape[1:]
        if most and (ratio := sqrt(prod(grid) / (int(most.removeprefix("anyres_max_")) * side**2))) > 1.1:
            grid = tuple(int(length // ratio) for length in grid)
        frames.append(Frames(side * side + grid[0] * (grid[1] + 1)))
    return frames


def _granite_images(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is None:
        return _anyres_images(placeholders, config, inputs)
    return [Frames(len(feature)) for feature in encoded.deepstack_features[0][1]]  # of the first layer, image by image


def _pooled_clips(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # Videos of equal length. OneVision ends each with a newline token, which belongs to its last frame.
    if inputs.get("pixel_values_videos") is not None:
        videos = len(inputs["pixel_values_videos"])
    else:
        encoded = inputs["mm_encoder_outputs"]["video"]
        if encoded.get("last_hidden_state") is None:
            raise InputError("video features without last_hidden_state, as prefill_chunk_size makes them; leave it out")
        videos = len(encoded.pooler_output)
    side = config.vision_config.image_size // config.vision_config.patch_size
    stride = getattr(config, "spatial_pool_stride", None)
    side = side // stride if stride else -(-side // 2)
    count, newline = divmod(placeholders // videos, side * side)
    if newline:
        return [Frames(side * side, count - 1, (side, side)), Frames(side * side + newline)] * videos
    return [Frames(side * side, count, (side, side))] * videos


def _step_images(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # Local views with markers around them, then the whole image; the tower halves height and width twice.
    local, images = inputs.get("pixel_values_local"), len(inputs["pixel_values"])
    counts = [0] * images if local is None else torch.as_tensor(inputs["num_local_patches"]).tolist()
    whole, view = (
        0 if pixels is None else prod(-(-side // config.vision_config.patch_size // 4) for side in pixels.shape[-2:])
        for pixels in (inputs["pixel_values"], local)
    )
    return [Frames(whole + count * view) for count in counts]


def _ungridded(tokens: int, _: object) -> Frames:
    return Frames(tokens)


def _equal_queries(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    return [Frames(image.tokens) for image in _llava_images(placeholders, config, inputs)]


def _patch_grids(keyword: str, placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    if inputs.get(keyword) is None:
        raise InputError(f"pixels came without {keyword}; pass all that the processor returns")
    vision = config.vision_config
    merge = vision.merge_size if hasattr(vision, "merge_size") else vision.spatial_merge_size
    grids = [(t, h // merge, w // merge) for t, h, w in inputs[keyword].tolist()]
    return [Frames(h * w, t, (h, w)) for t, h, w in grids]


def _mrope_frames(tokens: int, positions: Ints) -> Frames:
    # The rows and columns of a grid are numbered by M-RoPE's second and third axis.
    if len(positions) == 1:
        raise InputError("image features came without position_ids; pass pixel_values and image_grid_thw instead")
    height, width = (int(np.ptp(axis)) + 1 for axis in positions[-2:])
    return Frames(height * width, tokens // (height * width), (height, width))


def _parted_frames(tokens: int, positions: Ints) -> Frames:
    # Text, such as time stamps, stands between the frames of a video: each is one run of positions.
    count = 1 + int((np.diff(positions[0]) > 1).sum())
    if len(positions) == 1:
        return Frames(tokens // count, count)
    height, width = (int(np.ptp(axis[: tokens // count])) + 1 for axis in positions[-2:])
    return Frames(height * width, count, (height, width))


def _equal_tiles(keyword: str, placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # ``(images, tiles, 3, height, width)``: a tile is all that features computed beforehand tell apart.
    tiles = prod(inputs[keyword].shape[:-3])
    if placeholders % tiles:
        raise InputError(f"{placeholders} placeholders for {tiles} tiles of equal size do not divide evenly")
    return [_square(placeholders // tiles)] * tiles


def _emu3_images(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # The end of each row of codes is among the features.
    if inputs.get("image_sizes") is None:
        raise InputError("pixel_values came without image_sizes; pass all that the processor returns")
    code = 2 ** (len(config.vq_config.channel_multiplier) - 1)
    return [Frames(h // code * (w // code + 1)) for h, w in torch.as_tensor(inputs["image_sizes"]).tolist()]


def _tiles_and_whole(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # Tiles, then the whole image at another resolution, then one separator; how many tokens a view has depends on size.
    images, local = len(inputs["pixel_values"]), inputs.get("pixel_values_local")
    if local is None:
        return [Frames(placeholders // images)] * images
    if inputs.get("num_local_patches") is None:
        raise InputError("pixel_values_local came without num_local_patches; pass all that the processor returns")
    tiles = torch.as_tensor(inputs["num_local_patches"]).tolist()
    stride = 4 * config.vision_config.sam_config.patch_size
    # The encoder has one set of queries for up to 144 patches and one for more.
    whole, tile = (144 if prod(x.shape[-2:]) <= 144 * stride**2 else 256 for x in (inputs["pixel_values"], local))
    return [Frames(n * tile + whole + 1) for n in tiles]


def _rows_and_newlines(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # Nothing but the prompt tells images apart: a row ends with one newline token, an image with one more.
    row, column = torch.nonzero(inputs["input_ids"] == config.image_token_id, as_tuple=True)
    starts = torch.nonzero((row.diff() != 0) | (column.diff() > 2)).flatten().tolist()
    return [Frames(stop - start) for start, stop in pairwise([0, *(i + 1 for i in starts), len(row)])]


def _marked_tiles(
    make: Callable[[int, None], Frames], _: int, config: PreTrainedConfig, inputs: Inputs
) -> list[Frames]:
    # Text markers stand between tiles, and no input tells which tiles are one image's: each tile is a span.
    if inputs.get("pixel_values") is None:
        check_whole(inputs["mm_encoder_outputs"]["image"])
    here = (inputs["input_ids"] == config.image_token_id).cpu().numpy().astype(np.int8)
    edges = np.diff(np.pad(here, ((0, 0), (1, 1)))).ravel()
    lengths = np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)
    if len(set(lengths.tolist())) > 1:
        raise InputError(f"tiles of {min(lengths)} and of {max(lengths)} placeholders; put markers between tiles")
    return [make(int(length), None) for length in lengths]


def _marked(make: Callable[[int, None], Frames]) -> Family:
    return Family((Modality("image_token_id", "pixel_values", "image", partial(_marked_tiles, make), None),))


# Images, or their tiles, of equal size.
_EQUAL = Family((Modality("image_token_id", "pixel_values", "image", _llava_images, _square),))


def _run_frames(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # Text stands between all frames, and a frame may have lost any of its tokens: each is one run of placeholders.
    if inputs.get("pixel_values_videos") is None:
        check_whole(inputs["mm_encoder_outputs"]["video"])
    rows = np.pad(inputs["input_ids"].cpu().numpy() == config.video_token_id, ((0, 0), (1, 1)))
    edges = np.diff(rows.astype(np.int8))
    return [Frames(int(n)) for n in np.argwhere(edges < 0)[:, 1] - np.argwhere(edges > 0)[:, 1]]


def _rescaled_images(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # How many patches are merged is a fact of the image.
    if inputs.get("image_grid_thw") is None or inputs.get("image_merge_sizes") is None:
        raise InputError("pixels came without image_grid_thw or image_merge_sizes; pass all that the processor returns")
    merges = torch.as_tensor(inputs["image_merge_sizes"]).tolist()
    grids = [(h // n, w // n) for (_, h, w), n in zip(inputs["image_grid_thw"].tolist(), merges, strict=True)]
    return [Frames(h * w, grid=(h, w)) for h, w in grids]


def _pooled_grids(keyword: str, placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # A video comes as groups of frames, each of them pooled over time into one.
    if inputs.get(keyword) is None:
        raise InputError(f"pixels came without {keyword}; pass all that the processor returns")
    merge = config.vision_config.merge_kernel_size
    grids = [(h // merge[0], w // merge[1]) for _, h, w in inputs[keyword].tolist()]
    return [Frames(h * w, grid=(h, w)) for h, w in grids]


def _paired_grids(keyword: str, placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # Ernie merges pictures that follow one another into one frame.
    merge = config.vision_config.temporal_merge_size
    videos = _patch_grids(keyword, placeholders, config, inputs)
    return [replace(video, count=video.count // merge) for video in videos]


def _row_end_grids(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # HunYuan has learned vectors at the end of each row, and around the image.
    images = _patch_grids("image_grid_thw", placeholders, config, inputs)
    return [Frames(height * (width + 1) + 2) for height, width in (image.grid for image in images if image.grid)]


def _two_views(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # Molmo 2 shows an image at low resolution, then at high resolution.
    if inputs.get("image_grids") is None:
        raise InputError("pixels came without image_grids; pass all that the processor returns")
    return [Frames(low[0] * low[1] + h * w) for *low, h, w in inputs["image_grids"].tolist()]


def _video_grids(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    if inputs.get("video_grids") is None:
        raise InputError("pixels came without video_grids; pass all that the processor returns")
    return [Frames(h * w, t, (h, w)) for t, h, w in inputs["video_grids"].tolist()]


def _unframed(tokens: int, _: object) -> Frames:
    raise InputError(
        "video features computed beforehand, as in generate, do not tell frames; use handle.planned(inputs)"
    )


_QWEN_IMAGES = Modality(
    "image_token_id", "pixel_values", "image", partial(_patch_grids, "image_grid_thw"), _mrope_frames
)
_QWEN_VIDEOS = Modality(
    "video_token_id", "pixel_values_videos", "video", partial(_patch_grids, "video_grid_thw"), _mrope_frames
)
_QWEN2 = Family((_QWEN_IMAGES, _QWEN_VIDEOS), axes=3)
_QWEN3 = Family((_QWEN_IMAGES, replace(_QWEN_VIDEOS, frames=_parted_frames)), axes=3)
# The same with ordinary positions.
_STAMPED = Family((replace(_QWEN_IMAGES, frames=_ungridded), replace(_QWEN_VIDEOS, frames=_parted_frames)))
# A frame has the placeholders of an image. The models take images or videos in a batch, not both.
_GLM = Family(
    (
        replace(_QWEN_IMAGES, frames=_parted_frames),
        replace(_QWEN_VIDEOS, token="image_token_id", frames=_parted_frames),
    ),
    axes=3,
)
# Qwen's vision tower in front of a decoder with ordinary positions.
_QWEN_TOWER = Family((replace(_QWEN_IMAGES, frames=_ungridded), replace(_QWEN_VIDEOS, frames=_unframed)))
_VIDEO_LLAMA = Family(
    (
        replace(_QWEN_IMAGES, sizes=_rescaled_images, frames=_ungridded),
        replace(_QWEN_VIDEOS, sizes=_run_frames, frames=None),
    )
)
_KIMI = Family(
    (
        replace(_QWEN_IMAGES, sizes=partial(_pooled_grids, "image_grid_thw"), frames=_ungridded),
        replace(_QWEN_VIDEOS, sizes=partial(_pooled_grids, "video_grid_thw"), frames=_ungridded),
    )
)


def _row_frames(tokens: int, positions: Ints) -> Frames:
    # A marker ends each row.
    rows = 1 + int((np.diff(positions[0]) > 1).sum())
    return Frames(tokens, grid=(rows, tokens // rows))


def _placed_patches(
    keyword: str, pooled: bool, placeholders: int, config: PreTrainedConfig, inputs: Inputs
) -> list[Frames]:
    # Column and row of each patch of an image or frame, -1 for padding. Older versions have frames in a dimension
    # of their own.
    if inputs.get(keyword) is None:
        raise InputError(f"pixels came without {keyword}; pass all that the processor returns")
    side = config.vision_config.pooling_kernel_size if pooled else 1
    sizes = (inputs[keyword].flatten(0, -3).amax(1) + 1) // side
    return [Frames(height * width, grid=(height, width)) for width, height in sizes.tolist()]


def _phi4_images(placeholders: int, config: PreTrainedConfig, inputs: Inputs) -> list[Frames]:
    # The crops' grid without padding, with one token after each row; one token; the small image, likewise with rows.
    if not placeholders:  # decoding steps come with the pixels too
        return []
    if inputs.get("image_sizes") is None or inputs.get("image_attention_mask") is None:
        raise InputError("pixels came without image_sizes or image_attention_mask; pass all that the processor returns")
    frames = []
    for (height, width), mask in zip(inputs["image_sizes"].tolist(), inputs["image_attention_mask"], strict=True):
        crops = mask[1:, ::2, ::2]
        across, side = width // config.vision_config.crop_size, crops.shape[-1]
        down = height // config.vision_config.crop_size
        rows = int(crops[: down * across : across, :, 0].sum())
        columns = int(crops[:across, 0].sum())
        frames.append(Frames(rows * (columns + 1) + 1 + side * (side + 1)))
    return frames


def _gemma4(pooled: bool) -> Family:
    images, frames = (partial(_placed_patches, f"{kind}_position_ids", pooled) for kind in ("image", "video"))
    return Family(
        (
            Modality("image_token_id", "pixel_values", "image", images, _ungridded),
            Modality("video_token_id", "pixel_values_videos", "video", frames, _parted_frames),
        )
    )


# Functions of modules only, no lambdas: a model can be pickled with its handle.
FAMILIES = {
    "llava": _EQUAL,
    "paligemma": _EQUAL,
    "gemma3": _EQUAL,
    "shieldgemma2": _EQUAL,
    "mistral3": Family((Modality("image_token_id", "pixel_values", "image", _llava_images, _row_frames),)),
    "lighton_ocr": Family((Modality("image_token_id", "pixel_values", "image", _llava_images, _ungridded),)),
    "llama4": _EQUAL,  # of tiles
    "phi4_multimodal": Family(
        (Modality("vision_config.image_token_id", "image_pixel_values", "image", _phi4_images, _ungridded),)
    ),
    "gemma4": _gemma4(pooled=True),
    "gemma4_unified": _gemma4(pooled=False),
    "llava_next": Family((Modality("image_token_id", "pixel_values", "image", _anyres_images, _ungridded),)),
    **dict.fromkeys(
        ("llava_next_video", "llava_onevision"),
        Family(
            (
                Modality("image_token_id", "pixel_values", "image", _anyres_images, _ungridded),
                Modality("video_token_id", "pixel_values_videos", "video", _pooled_clips, None),
            )
        ),
    ),
    "granite4_vision": Family((Modality("image_token_id", "pixel_values", "image", _granite_images, None),)),
    "video_llava": Family(
        (
            Modality("image_token_id", "pixel_values", "image", partial(_equal_tiles, "pixel_values"), _square),
            # The older name of the same, and still that of what the processor returns.
            Modality("image_token_id", "pixel_values_images", "", partial(_equal_tiles, "pixel_values_images"), None),
            Modality(
                "video_token_id", "pixel_values_videos", "video", partial(_equal_tiles, "pixel_values_videos"), _square
            ),
        )
    ),
    # The inputs do not say which tiles make up an image: each tile counts as one.
    **dict.fromkeys(
        ("vipllava", "aya_vision", "cohere2_vision", "got_ocr2", "pp_chart2table"),
        Family((Modality("image_token_id", "pixel_values", "image", partial(_equal_tiles, "pixel_values"), _square),)),
    ),
    "step3p7": Family((Modality("image_token_id", "pixel_values", "image", _step_images, _ungridded),)),
    "blip-2": Family((Modality("image_token_id", "pixel_values", "image", _llava_images, _ungridded),)),
    "instructblipvideo": Family(
        (Modality("video_token_id", "pixel_values", "", partial(_equal_tiles, "pixel_values"), None),)
    ),
    "instructblip": Family((Modality("image_token_id", "pixel_values", "image", _llava_images, _ungridded),)),
    "chameleon": _EQUAL,
    "emu3": Family((Modality("image_token_id", "pixel_values", "image", _emu3_images, _ungridded),)),
    "fuyu": Family(
        (
            Modality("image_token_id", "pixel_values", "image", _rows_and_newlines, None),
            # What the keyword was called before, and the processor still calls it.
            Modality("image_token_id", "image_patches", "", _rows_and_newlines, None),
        )
    ),
    "fast_vlm": _EQUAL,
    "deepseek_ocr2": Family((Modality("image_token_id", "pixel_values", "image", _tiles_and_whole, _ungridded),)),
    "perception_lm": Family(
        (
            Modality("image_token_id", "pixel_values", "image", partial(_equal_tiles, "pixel_values"), _square),
            Modality(
                "video_token_id", "pixel_values_videos", "video", partial(_equal_tiles, "pixel_values_videos"), _square
            ),
        )
    ),
    # A tile is a span: no input tells how many an image has.
    **dict.fromkeys(("internvl", "qianfan_ocr", "ovis2", "janus", "deepseek_vl", "deepseek_vl_hybrid"), _EQUAL),
    "aria": Family((Modality("image_token_id", "pixel_values", "image", _equal_queries, _ungridded),)),
    "idefics2": _marked(_ungridded),
    **dict.fromkeys(("idefics3", "smolvlm", "granite_docling"), _marked(_square)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), _QWEN2),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "cosmos3_edge", "cohere_compass"), _QWEN3),
    **dict.fromkeys(("exaone4_5", "hyperclovax_vision_v2"), _QWEN_TOWER),
    "paddleocr_vl": Family((_QWEN_IMAGES,), axes=3),
    "video_llama_3": _VIDEO_LLAMA,
    "kimi_k25": _KIMI,
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm4v_moe", "glm_ocr"), _GLM),
    "ernie4_5_vl_moe": Family(
        (_QWEN_IMAGES, replace(_QWEN_VIDEOS, sizes=partial(_paired_grids, "video_grid_thw"))), axes=3
    ),
    **dict.fromkeys(("minimax_m3_vl", "muse_glimmer", "muse_spark"), _STAMPED),
    "dots3_note": _QWEN_TOWER,
    "molmo2": Family(
        (
            replace(_QWEN_IMAGES, sizes=_two_views, frames=_ungridded),
            replace(_QWEN_VIDEOS, sizes=_video_grids, frames=_parted_frames),
        )
    ),
    "hunyuan_vl": Family((replace(_QWEN_IMAGES, sizes=_row_end_grids, frames=_ungridded),), axes=4),
}


# Of a family that nobody described: fields of the config with the placeholder, and the keyword of the pixels.
PLACEHOLDERS = {
    "image": (("image_token_id", "image_token_index"), "pixel_values"),
    "video": (("video_token_id", "video_token_index"), "pixel_values_videos"),
}
# Fields of decoders that read images beside the sequence: Mllama's, those of IDEFICS and of BLIP.
CROSS_ATTENTION = ("cross_attention_layers", "cross_layer_interval", "encoder_hidden_size")


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model.

    Raises
    ------
    UnsupportedModelError
        With the reason, when the model cannot be served exactly.
    """
    name, text = config.model_type, config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; adsc serves decoders that hold vision tokens")
    if any(getattr(part, field, None) for part in (config, text) for field in CROSS_ATTENTION):
        raise UnsupportedModelError(f"{name} reads images by cross-attention: no vision tokens are in its sequence")
    if name not in FAMILIES and not any(
        hasattr(config, token) for tokens, _ in PLACEHOLDERS.values() for token in tokens
    ):
        raise UnsupportedModelError(
            f"{name} is text-only, or has no vision tokens in the sequence: its config names no placeholder for images"
        )
    # Looking the class up also loads its module, which may bring cache layers of its own.
    served: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if served is not None and not issubclass(served, GenerationMixin):
        raise UnsupportedModelError(f"{name} has no causal generation: its decoder does not answer token by token")
    if getattr(text, "altup_num_inputs", None):
        raise UnsupportedModelError(f"{name} keeps several hidden states of each token (AltUp)")
    layers = DynamicCache(config=text).layers[: text.num_hidden_layers - shared_layers(text)]
    kinds = sorted({kind.__name__ for kind in map(type, layers) if kind not in LAYERS})
    if kinds:
        raise UnsupportedModelError(
            f"{name} has layers with {' and '.join(sorted(set(map(_reason, kinds))))} ({', '.join(kinds)}); "
            "adsc serves layers that attend to the tokens of the sequence, and cache these alone"
        )
    return FAMILIES.get(name) or _general(config)


def _reason(kind: str) -> str:
    """What layers do that need a cache of a kind."""
    for part, reason in (
        ("Linear", "linear attention"),
        ("Indexed", "an indexer that picks keys"),
        ("Dummy", "no cache"),
    ):
        if part in kind:
            return reason
    return "a cache of their own"


def _general(config: PreTrainedConfig) -> Family:
    """A family that nobody described: placeholders for images are found in the config."""
    found = []
    for what, (tokens, pixels) in PLACEHOLDERS.items():
        token = next((token for token in tokens if isinstance(getattr(config, token, None), int)), None)
        if token is not None:
            found.append(Modality(token, pixels, what, partial(_runs, what, token, pixels), _ungridded))
    if not found:
        raise UnsupportedModelError(
            f"{config.model_type} has no image_token_id in its config; set it, as its checkpoints do"
        )
    return Family(tuple(found))


def _runs(
    what: str, token: str, keyword: str, placeholders: int, config: PreTrainedConfig, inputs: Inputs
) -> list[Frames]:
    # What is known of no family in particular: images of equal size are equal parts of what the prompt holds, one or
    # more to a run of placeholders; images of any size, of which a further input tells, are a run each.
    here = (inputs["input_ids"] == getattr(config, token)).cpu().numpy().astype(np.int8)
    edges = np.diff(np.pad(here, ((0, 0), (1, 1)))).ravel()
    lengths = np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)
    pixels = inputs[keyword]
    told = [
        value
        for name, value in inputs.items()
        if value is not None and name != keyword and name.startswith((f"{what}_", "pixel_attention"))
    ]
    if told or pixels.ndim < 4:
        images = len(told[0]) if told else len(pixels)
        if images == len(lengths):
            return [Frames(int(length)) for length in lengths]
    else:
        images = prod(pixels.shape[:-3])
        if placeholders % images == 0 and not (lengths % (placeholders // images)).any():
            return [Frames(placeholders // images)] * images
    raise InputError(
        f"{len(lengths)} runs of {placeholders} placeholders for {images} {what}s of {config.model_type}, of which "
        "adsc knows nothing more; put text between images and none inside, or say handle.planned(inputs, spans)"
    )
