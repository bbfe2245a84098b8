"""The exactness oracle: a dense forward pass in which dropped tokens stay, but are masked as keys from their layer on.

Written without the engine: it knows the kept positions from :func:`adsc.plan` and the spans that the test itself made.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager

import torch

import adsc

from .tiny import LAYERS, SCHEDULE, Batch

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}
Kept = list[list[list[int]]]  # of each layer, of each row: positions, padding counted


def kept_positions(batch: Batch, schedule: str = SCHEDULE, pattern: str = "last", grids=None) -> Kept:
    """The kept positions of a batch, layer by layer and row by row."""
    plans = [
        adsc.plan(spans, len(real), adsc.Schedule.parse(schedule), LAYERS, pattern, grids=grids and grids[: len(spans)])
        for spans, real in zip(batch.spans, batch.real, strict=True)
    ]
    return [
        [[real[i] for i in plan.kept(layer)] for real, plan in zip(batch.real, plans, strict=True)]
        for layer in range(LAYERS)
    ]


def decoder_of(model):
    """The module with the layers, which some families wrap once more."""
    if hasattr(model, "layers"):
        return model
    decoder = model.get_decoder()
    return decoder_of(model.model if decoder is model else decoder)


@contextmanager
def attention(model, implementation: str):
    """The model with another attention implementation."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def masked_dense(model, inputs: dict, kept: Kept, axes: int | None = None) -> torch.Tensor:
    """Logits of the masked dense forward. With ``axes`` the survivors' positions are renumbered (that many axes)."""
    decoder = decoder_of(model)

    def hook(layer):
        def swap(module, args, kwargs):
            # In float64 the lowest number is −inf once softmax has rounded it to float32; this one stays finite.
            lowest = torch.finfo(torch.float32).min
            mask = kwargs["attention_mask"].expand(len(kept[layer]), -1, -1, -1).clamp(min=lowest)
            length = mask.shape[-1]
            ranks = torch.zeros(len(kept[layer]), length, dtype=torch.long)
            for row, places in enumerate(kept[layer]):
                dropped = torch.ones(length, dtype=torch.bool)
                dropped[places] = False
                own = torch.diagonal(mask[row, 0]).clone()
                mask[row, 0, :, dropped] = lowest
                mask[row, 0].diagonal().copy_(own)  # a dropped row may see itself
                ranks[row, places] = torch.arange(len(places))
            kwargs["attention_mask"] = mask
            if axes and layer >= 1:
                shape = ranks if axes == 1 else ranks.expand(axes, -1, -1)
                kinds = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
                kind = {"layer_type": decoder.config.layer_types[layer]} if kinds else {}
                kwargs["position_embeddings"] = decoder.rotary_emb(args[0], position_ids=shape, **kind)
            return args, kwargs

        return swap

    with attention(model, "eager"), ExitStack() as hooks:
        for index, layer in enumerate(decoder.layers):
            hooks.callback(layer.register_forward_pre_hook(hook(index), with_kwargs=True).remove)
        return model(**inputs, use_cache=False).logits


def difference(a: torch.Tensor, b: torch.Tensor, places: list[list[int]]) -> float:
    """Largest difference of logits at the given positions of each row."""
    return float(torch.cat([(a[row, at] - b[row, at]).flatten() for row, at in enumerate(places)]).abs().max())


def shifted(kept: Kept, batch: Batch) -> Kept:
    """The same with one kept vision token of the last stage exchanged for its dropped neighbour."""
    row = next(row for row, spans in enumerate(batch.spans) if spans)
    first = batch.spans[row][0]
    span = {batch.real[row][i] for i in (range(*first) if isinstance(first, tuple) else first)}
    last = kept[-1][row]
    moved = next(place for place in last if place in span and place - 1 in span and place - 1 not in last)
    changed = [list(map(list, layer)) for layer in kept]
    for layer in range(4, LAYERS):  # where the last stage begins
        places = changed[layer][row]
        places[places.index(moved)] = moved - 1
    return changed
