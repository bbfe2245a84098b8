"""What a model costs: FLOPs by part and KV-cache bytes, dense beside reduced, from its config and a plan.

Convention
----------
* FLOPs are 2 × multiply-accumulates of matrix products and convolutions, as
  :class:`torch.utils.flop_counter.FlopCounterMode` counts them. Norms, activations, softmax, rotary embeddings and the
  embedding look-up are not counted.
* Attention is counted in full, without halving it for the causal mask, over all query heads (grouped-query attention
  saves key and value projections and cache, not products).
* The FFN of the LLM has three matrices (gate, up, down).
* The LM head is counted at the last position of the prefill, as ``generate`` runs it, or at all positions
  (``logits="all"``): the full row for the reduced model too, whose hidden states are put back at full length before it.
* The vision encoder is counted with all its layers, also where the features are taken from a layer before the last.
* KV bytes are those of keys and values of all layers at the end of the prefill, and after the decode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isqrt
from typing import Any, Literal

from . import planning
from .errors import InputError
from .layout import Layout
from .schedule import Schedule

#: Decoders of the plain shape: grouped-query attention of four projections, gated FFN of three matrices.
DECODERS = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen2_vl",
        "qwen2_vl_text",
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        "qwen3",
        "qwen3_vl_text",
    }
)
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}


@dataclass(frozen=True)
class Flops:
    """FLOPs (2 × multiply-accumulates) by part.

    Attributes
    ----------
    vision_encoder, projector
        The tower with its patch embedding, and what maps its features to the LLM (an MLP, a merger).
    attention_projections, attention_products
        Query, key, value and output projections of the LLM; scores and their product with the values.
    ffn, lm_head
        The gated FFNs of the LLM, and its output head.
    """

    vision_encoder: int = 0
    projector: int = 0
    attention_projections: int = 0
    attention_products: int = 0
    ffn: int = 0
    lm_head: int = 0

    @property
    def llm(self) -> int:
        """The language model: attention, FFN and LM head."""
        return self.attention_projections + self.attention_products + self.ffn + self.lm_head

    @property
    def total(self) -> int:
        """All parts."""
        return self.vision_encoder + self.projector + self.llm

    def to_dict(self) -> dict[str, int]:
        """Parts and sums."""
        return {**asdict(self), "llm": self.llm, "total": self.total}


@dataclass(frozen=True)
class Usage:
    """What one model, dense or reduced, uses for a batch of equal rows.

    Attributes
    ----------
    prefill, decode
        FLOPs of the prefill, vision encoder included, and of all decode steps together.
    kv_bytes_per_layer
        KV-cache bytes of each decoder layer at the end of the prefill, shape ``(num_layers,)``.
    kv_bytes_decoded
        KV-cache bytes of all layers after the decode steps.
    tokens_per_layer, vision_tokens_per_layer
        Of one row, during the prefill.
    """

    prefill: Flops
    decode: Flops
    kv_bytes_per_layer: tuple[int, ...]
    kv_bytes_decoded: int
    tokens_per_layer: tuple[int, ...]
    vision_tokens_per_layer: tuple[int, ...]

    @property
    def kv_bytes(self) -> int:
        """KV-cache bytes of all layers at the end of the prefill."""
        return sum(self.kv_bytes_per_layer)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "prefill_flops": self.prefill.to_dict(),
            "decode_flops": self.decode.to_dict(),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_decoded": self.kv_bytes_decoded,
            "kv_bytes_per_layer": list(self.kv_bytes_per_layer),
            "tokens_per_layer": list(self.tokens_per_layer),
            "vision_tokens_per_layer": list(self.vision_tokens_per_layer),
        }


@dataclass(frozen=True)
class Cost:
    """Dense beside reduced. Made by :func:`cost`.

    Attributes
    ----------
    dense, reduced
        What each of the two uses.
    schedule, pattern
        The reduction, as text.
    retained
        Average over layers of the vision tokens in that layer, over those of layer 0.
    vision_tokens, text_tokens, images, decode_tokens, batch
        The row, the decode steps after its prefill, and the number of equal rows.
    dtype, logits
        Of the cache; at which positions the LM head is counted.
    """

    dense: Usage
    reduced: Usage
    schedule: str
    pattern: str
    retained: float
    vision_tokens: int
    text_tokens: int
    images: int
    decode_tokens: int
    batch: int
    dtype: str
    logits: str

    @property
    def ratios(self) -> dict[str, float]:
        """Reduced over dense: all prefill FLOPs, those of the LLM, decode FLOPs (where there are any), and KV bytes."""
        dense, reduced = self.dense, self.reduced
        ratios = {
            "prefill_flops": reduced.prefill.total / dense.prefill.total,
            "llm_prefill_flops": reduced.prefill.llm / dense.prefill.llm,
            "kv_bytes": reduced.kv_bytes / dense.kv_bytes,
        }
        if self.decode_tokens:
            ratios["decode_flops"] = reduced.decode.total / dense.decode.total
            ratios["kv_bytes_decoded"] = reduced.kv_bytes_decoded / dense.kv_bytes_decoded
        return ratios

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**own, "dense": self.dense.to_dict(), "reduced": self.reduced.to_dict(), "ratios": self.ratios}


def cost(
    config: Any,
    vision_tokens: int | None = None,
    text_tokens: int | None = None,
    schedule: Schedule | None = None,
    *,
    images: int | Sequence[int] = 1,
    grids: Sequence[tuple[int, int] | None] | None = None,
    tiles: int | Sequence[int] | None = None,
    pattern: str = "last",
    seed: int = 0,
    plan: planning.Plan | None = None,
    decode_tokens: int = 0,
    batch: int = 1,
    dtype: Any = None,
    logits: Literal["last", "all"] = "last",
) -> Cost:
    """FLOPs by part and KV bytes of a model, dense and reduced (convention: see the module's docstring).

    Parameters
    ----------
    config
        A transformers config (LLaVA-1.5, LLaVA-NeXT, Qwen2.5-VL, or a Llama- or Qwen-like decoder alone, which then has
        no vision encoder to count), or a mapping with the same complete fields.
    vision_tokens, text_tokens
        Of one row. Both are required unless a plan is given.
    schedule
        The reductions; none by default, and then reduced is dense.
    images
        How many images, or video frames, share ``vision_tokens`` equally, or the vision tokens of each.
    grids
        Height and width, in vision tokens, of each image. Qwen2.5-VL's encoder attends in windows, whose sizes follow
        from it; where the grid is not known, the most square one is assumed.
    tiles
        LLaVA-NeXT only: how many tiles the encoder sees of each image, the overview included (an image's tokens
        alone do not tell). May be left out where only one number is possible.
    pattern, seed
        As in :func:`adsc.plan`.
    plan
        A plan in place of ``vision_tokens``, ``text_tokens``, ``schedule``, ``images``, ``grids``, ``pattern`` and
        ``seed``.
    decode_tokens
        Decode steps after the prefill: tokens fed back one by one.
    batch
        Number of equal rows.
    dtype
        Of the KV cache: a name like ``"float16"`` or a torch dtype. By default the config's, or bfloat16 if it states
        none.
    logits
        Positions of the prefill at which the LM head runs: ``"last"`` or ``"all"``.

    Raises
    ------
    InputError
        For a model, or a part of one, that this cost model does not know, and for numbers that do not fit together.
    """
    if logits not in ("last", "all"):
        raise InputError(f"logits is {logits!r}; the LM head is counted at the 'last' position or at 'all'")
    if batch < 1 or decode_tokens < 0:
        raise InputError(f"batch {batch}, decode_tokens {decode_tokens}: at least 1 row and 0 decode steps are needed")
    decoder = _Decoder(config)
    if plan is None:
        if vision_tokens is None or text_tokens is None:
            raise InputError("the cost of a row needs vision_tokens and text_tokens, or a plan")
        layout = _row(vision_tokens, text_tokens, images, grids)
        plan = planning.plan(
            layout, schedule=schedule or Schedule.none(), num_layers=decoder.layers, pattern=pattern, seed=seed
        )
    elif (vision_tokens, text_tokens, schedule, grids) != (None, None, None, None) or images != 1:
        raise InputError("a plan already holds the row and the schedule; give either a plan or the numbers")
    elif plan.num_layers != decoder.layers:
        raise InputError(f"the plan is for {plan.num_layers} layers, but the model has {decoder.layers}")
    decoder.check_window(plan.layout.length + decode_tokens)

    vision_encoder, projector = _vision(config, plan.layout, tiles)
    kv_itemsize, dtype_name = _itemsize(config if dtype is None else dtype)

    def usage(plan: planning.Plan) -> Usage:
        tokens = plan.tokens_per_layer()
        head_positions = plan.layout.length if logits == "all" else 1
        attended = [count * count for count in tokens]
        # Step t of the decode attends to the prefill's entries of its layer, the t − 1 fed back before it, and itself.
        fed = decode_tokens
        attended_decoding = [count * fed + fed * (fed + 1) // 2 for count in tokens]
        kv_bytes = [batch * count * decoder.kv_width * kv_itemsize for count in tokens]
        return Usage(
            prefill=Flops(
                vision_encoder=2 * batch * vision_encoder,
                projector=2 * batch * projector,
                **decoder.flops(batch, sum(tokens), sum(attended), head_positions),
            ),
            decode=Flops(**decoder.flops(batch, fed * decoder.layers, sum(attended_decoding), fed)),
            kv_bytes_per_layer=tuple(kv_bytes),
            kv_bytes_decoded=sum(kv_bytes) + batch * fed * decoder.layers * decoder.kv_width * kv_itemsize,
            tokens_per_layer=tuple(tokens),
            vision_tokens_per_layer=tuple(plan.vision_tokens_per_layer()),
        )

    return Cost(
        dense=usage(planning.plan(plan.layout, schedule=Schedule.none(), num_layers=decoder.layers)),
        reduced=usage(plan),
        schedule=str(plan.schedule),
        pattern=plan.pattern,
        retained=float(plan.retained),
        vision_tokens=plan.layout.vision_tokens,
        text_tokens=plan.layout.length - plan.layout.vision_tokens,
        images=len(plan.layout.spans),
        decode_tokens=decode_tokens,
        batch=batch,
        dtype=dtype_name,
        logits=logits,
    )


def _row(
    vision_tokens: int, text_tokens: int, images: int | Sequence[int], grids: Sequence[tuple[int, int] | None] | None
) -> Layout:
    if vision_tokens < 0 or text_tokens < 0 or vision_tokens + text_tokens < 1:
        raise InputError(f"a row of {vision_tokens} vision and {text_tokens} text tokens; give counts of at least 0")
    if isinstance(images, int):
        if vision_tokens and (images < 1 or vision_tokens % images):
            raise InputError(f"{images} images cannot share {vision_tokens} vision tokens; list the tokens of each")
        images = [vision_tokens // images] * images if vision_tokens else []
    if sum(images) != vision_tokens:
        raise InputError(f"the images have {sum(images)} vision tokens together, but vision_tokens is {vision_tokens}")
    stops = [sum(images[: index + 1]) for index in range(len(images))]
    return Layout(vision_tokens + text_tokens, [(stop - n, stop) for stop, n in zip(stops, images, strict=True)], grids)


class _Decoder:
    """The dimensions of a plain decoder, read from a model's config."""

    def __init__(self, config: Any) -> None:
        text = _field(config, "text_config", None)
        text = config if text is None else text
        kind = _field(text, "model_type")
        if kind not in DECODERS:
            raise InputError(f"decoder {kind!r} is not in the cost model; it knows {', '.join(sorted(DECODERS))}")
        self.kind = kind
        self.layers: int = _field(text, "num_hidden_layers")
        self.hidden: int = _field(text, "hidden_size")
        self.ffn: int = _field(text, "intermediate_size")
        self.vocabulary: int = _field(text, "vocab_size")
        heads: int = _field(text, "num_attention_heads")
        key_value_heads: int = _field(text, "num_key_value_heads", None) or heads
        head_dim: int = _field(text, "head_dim", None) or self.hidden // heads
        self.query_width = heads * head_dim
        self.kv_width = 2 * key_value_heads * head_dim
        windowed = _field(text, "use_sliding_window", True)
        self.window: int | None = _field(text, "sliding_window", None) if windowed else None

    def check_window(self, length: int) -> None:
        if self.window is not None and length > self.window:
            raise InputError(
                f"{length} positions exceed the sliding window of {self.window}, which the cost model does not know"
            )

    def flops(self, batch: int, tokens: int, attended: int, head_positions: int) -> dict[str, int]:
        """FLOPs of ``tokens`` and pairs of positions ``attended``, both summed over the layers."""
        projections = self.hidden * (2 * self.query_width + self.kv_width)
        return {
            "attention_projections": 2 * batch * tokens * projections,
            "attention_products": 2 * batch * attended * 2 * self.query_width,
            "ffn": 2 * batch * tokens * 3 * self.hidden * self.ffn,
            "lm_head": 2 * batch * head_positions * self.hidden * self.vocabulary,
        }


def _vision(config: Any, layout: Layout, tiles: int | Sequence[int] | None) -> tuple[int, int]:
    """Multiply-accumulates of the vision encoder and of the projector for the images of one row."""
    family = _field(config, "model_type")
    if tiles is not None and family != "llava_next":
        raise InputError(f"tiles belong to LLaVA-NeXT; a {family!r} model has none")
    vision = _field(config, "vision_config", None)
    if vision is None and _field(config, "text_config", None) is None and family in DECODERS:
        return 0, 0  # a decoder alone
    if family not in ("llava", "llava_next", "qwen2_5_vl") or vision is None:
        raise InputError(
            f"the vision encoder of {family!r} is not in the cost model, which knows llava, llava_next and qwen2_5_vl; "
            "give the text_config to count the decoder alone"
        )
    if not layout.spans:
        return 0, 0
    if family == "qwen2_5_vl":
        return _windowed_tower(vision, layout)
    return _clip_tower(config, vision, layout, tiles)


def _clip_tower(config: Any, vision: Any, layout: Layout, tiles: int | Sequence[int] | None) -> tuple[int, int]:
    """CLIP (a class token, an FFN of two matrices) on images or tiles of one size, and LLaVA's MLP of two layers."""
    kind = _field(vision, "model_type")
    if kind != "clip_vision_model":
        raise InputError(f"vision encoder {kind!r} is not in the cost model of LLaVA, which knows clip_vision_model")
    hidden, ffn = _field(vision, "hidden_size"), _field(vision, "intermediate_size")
    (height, width), (high, wide) = _pair(_field(vision, "image_size")), _pair(_field(vision, "patch_size"))
    patches = (height // high) * (width // wide)
    positions = patches + 1
    features = positions if _field(config, "vision_feature_select_strategy") == "full" else patches
    embedding = patches * hidden * _field(vision, "num_channels") * high * wide
    layer = positions * (4 * hidden * hidden + 2 * hidden * ffn) + 2 * positions * positions * hidden
    tower = embedding + _field(vision, "num_hidden_layers") * layer

    source = _field(config, "vision_feature_layer")
    sources = 1 if isinstance(source, int) else len(source)
    text_hidden = _field(_field(config, "text_config"), "hidden_size")
    projector = features * (sources * hidden * text_hidden + text_hidden * text_hidden)

    seen = _tiles(config, layout, tiles, features, (height, width))
    return seen * tower, seen * projector


def _tiles(config: Any, layout: Layout, tiles: int | Sequence[int] | None, features: int, size: tuple[int, int]) -> int:
    """How many images of the tower's size the images of a row make."""
    counts = [len(span) for span in layout.spans]
    if _field(config, "model_type") == "llava":
        if set(counts) != {features}:
            raise InputError(f"an image has {features} vision tokens in this model, but the row has images of {counts}")
        return len(counts)
    # Beside the overview, a grid of tiles covers the image; each row of their patches may end in a newline token.
    grids = {(rows // size[0], columns // size[1]) for rows, columns in _field(config, "image_grid_pinpoints")}
    side = isqrt(features)
    most: dict[int, int] = {}
    for rows, columns in grids:
        number = rows * columns + 1
        most[number] = max(most.get(number, 0), number * features + rows * side)
    if tiles is None:
        largest = max(most)
        others = max((tokens for number, tokens in most.items() if number != largest), default=0)
        if min(counts) <= others:
            raise InputError(
                f"images of {counts} vision tokens can have several numbers of tiles; give tiles, of {sorted(most)}"
            )
        tiles = largest
    numbers = [tiles] * len(counts) if isinstance(tiles, int) else list(tiles)
    if len(numbers) != len(counts):
        raise InputError(f"{len(numbers)} numbers of tiles for {len(counts)} images; give one for each")
    for number, tokens in zip(numbers, counts, strict=True):
        if number not in most or tokens > most[number]:
            raise InputError(
                f"{number} tiles of {features} cannot give {tokens} vision tokens; this model has {sorted(most)} tiles"
            )
    return sum(numbers)


def _windowed_tower(vision: Any, layout: Layout) -> tuple[int, int]:
    """Qwen2.5-VL's encoder (gated FFN, windows in most layers) and its merger."""
    hidden, ffn = _field(vision, "hidden_size"), _field(vision, "intermediate_size")
    merge, patch = _field(vision, "spatial_merge_size"), _field(vision, "patch_size")
    depth = _field(vision, "depth")
    full_layers = len(set(_field(vision, "fullatt_block_indexes")) & set(range(depth)))
    window = _field(vision, "window_size") // merge // patch
    channels = _field(vision, "in_channels", None) or _field(vision, "in_chans")
    patch_values = channels * _field(vision, "temporal_patch_size") * patch * patch

    tower = projector = 0
    for span, grid in zip(layout.spans, layout.grids, strict=True):
        tokens = len(span)
        patches = tokens * merge**2
        # A window is `window` vision tokens high and wide, each of merge × merge patches; the last ones are cut off.
        rows, columns = grid or _most_square(tokens)
        windowed = _squares(rows, window) * _squares(columns, window) * merge**4
        attended = full_layers * patches**2 + (depth - full_layers) * windowed
        tower += patches * hidden * patch_values
        tower += depth * patches * (4 * hidden * hidden + 3 * hidden * ffn) + 2 * attended * hidden
        merged = merge**2 * hidden
        projector += tokens * (merged * merged + merged * _field(vision, "out_hidden_size"))
    return tower, projector


def _squares(length: int, window: int) -> int:
    """Sum of the squared lengths of the pieces that windows cut ``length`` into."""
    return length // window * window**2 + (length % window) ** 2


def _most_square(tokens: int) -> tuple[int, int]:
    rows = next(side for side in range(isqrt(tokens), 0, -1) if tokens % side == 0)
    return rows, tokens // rows


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


_REQUIRED = object()


def _field(config: Any, name: str, default: Any = _REQUIRED) -> Any:
    value = config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)
    if value is _REQUIRED:
        raise InputError(f"the config has no {name}; the cost model needs a complete one, as AutoConfig loads it")
    return value


def _itemsize(source: Any) -> tuple[int, str]:
    """Bytes and name of a dtype given by name, as torch dtype, or as a config that may state one."""
    if isinstance(source, Mapping) or hasattr(source, "model_type"):
        text = _field(source, "text_config", None)
        stated = [_field(part, "dtype", None) for part in (text, source) if part is not None]
        source = next((dtype for dtype in stated if dtype is not None), "bfloat16")
    name = str(source).removeprefix("torch.")
    if name not in BYTES:
        raise InputError(f"dtype {name!r} is unknown; choose one of {', '.join(BYTES)}")
    return BYTES[name], name
