"""``adsc cost``: what a model costs dense and reduced, by formula."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import InputError
from .options import Debug, Json, Model, Pattern, Retain, ScheduleText

EXAMPLE = "adsc cost --model llava-hf/llava-1.5-7b-hf --retain 1/3 --text-tokens 88 --dtype float16"
RETAIN = "1/3"  # where neither --retain nor --schedule is given
CONVENTION = (
    "FLOPs are 2 × multiply-accumulates of matrix products; attention in full, without the causal half; "
    "LM head at the last position; KV cache: keys and values of all layers."
)


def command(
    model: Model = None,
    retain: Retain = None,
    schedule: ScheduleText = None,
    pattern: Pattern = None,
    vision_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of one image.", show_default="what the config says, if it does")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=0, help="Of the prompt, all that is not vision.")] = 100,
    images: Annotated[int, typer.Option(min=1, help="Images in the prompt.")] = 1,
    tiles: Annotated[
        int | None, typer.Option(min=1, help="LLaVA-NeXT: tiles of one image, the overview included.")
    ] = None,
    decode_tokens: Annotated[int, typer.Option(min=0, help="Steps of decoding after the prefill.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Equal rows.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Of the KV cache: float16, float8_e4m3fn, …", show_default="the config's")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> dict[str, Any]:
    """FLOPs and KV-cache bytes of a model from its config alone, dense beside reduced. Reads no weights."""
    from ..accounting import cost
    from ..hf.checkpoint import depth, read_config
    from ..pocket import MODEL_FOLDER
    from ..schedule import Schedule
    from . import answering

    answering.quiet()
    config = read_config(model or str(MODEL_FOLDER))
    layers = depth(config)
    vision_tokens = vision_tokens or _vision_tokens(config)
    changes = answering.changes(layers, retain, schedule, vision_tokens, pattern=pattern)
    result = cost(
        config,
        vision_tokens=images * vision_tokens,
        text_tokens=text_tokens,
        schedule=changes.get("schedule") or Schedule.for_budget(layers, RETAIN, vision_tokens),
        images=images,
        tiles=tiles,
        pattern=changes.get("pattern", "last"),
        decode_tokens=decode_tokens,
        batch=batch,
        dtype=dtype,
    )
    if not as_json:
        _print(result, model or "the model in the box")
    return {"model": model or "the model in the box", **result.to_dict(), "convention": CONVENTION}


def _vision_tokens(config: Any) -> int:
    """Of one image, where every image has the same number."""
    if config.model_type != "llava":
        raise InputError(f"the config of {config.model_type} does not say how many vision tokens; give --vision-tokens")
    vision = config.vision_config
    count: int = (vision.image_size // vision.patch_size) ** 2
    return count + int(config.vision_feature_select_strategy == "full")


def _print(result: Any, name: str) -> None:
    from rich.console import Console

    from ..report.tables import add_cost, layers, si, side_by_side

    dense, reduced = result.dense, result.reduced
    rows = [
        (label, getattr(dense.prefill, part), getattr(reduced.prefill, part), "FLOP")
        for part, label in (
            ("total", "prefill"),
            ("vision_encoder", "  vision encoder"),
            ("projector", "  projector"),
            ("llm", "  language model"),
            ("attention_projections", "    q, k, v, o"),
            ("attention_products", "    attention"),
            ("ffn", "    FFN"),
            ("lm_head", "    LM head"),
        )
    ]
    rows += [
        (f"decode of {result.decode_tokens} tokens", dense.decode.total, reduced.decode.total, "FLOP"),
        (f"KV cache ({result.dtype})", dense.kv_bytes, reduced.kv_bytes, "B"),
        ("  after the decode", dense.kv_bytes_decoded, reduced.kv_bytes_decoded, "B"),
    ]
    table = side_by_side("")
    for label, one, other, unit in rows[: None if result.decode_tokens else -1]:
        if one:
            add_cost(table, label, si(one, unit), si(other, unit), other / one)
    out = Console(highlight=False)
    out.print(
        f"{name}: {result.vision_tokens} vision and {result.text_tokens} text tokens, batch {result.batch}\n"
        f"schedule {result.schedule} ({result.pattern}), {100 * result.retained:.1f} % retained\n",
        soft_wrap=True,
    )
    out.print(layers(dense.tokens_per_layer, reduced.tokens_per_layer), "")
    out.print(table)
    out.print(f"\n{CONVENTION}", soft_wrap=True)
