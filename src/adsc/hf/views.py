"""What the layers of one stage see in one forward pass. All indices are built here, before the first layer runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..planning import Plan
from . import caches
from .caches import Held
from .masks import inverse, put_back, stage_mask, take

T = TypeVar("T")
Ints = NDArray[np.int64]


class Extent(NamedTuple):
    """The size of a call: rows, tokens fed in, and tokens fed in before it."""

    batch: int
    tokens: int
    past: Any  # an int, or for static caches a tensor
    device: torch.device

    def positions(self, start: Any, count: int) -> Tensor:
        """``(batch, count)`` consecutive positions."""
        return (torch.arange(count, device=self.device) + start).expand(self.batch, -1)


class Chosen:
    """The tokens of a call that a stage is given.

    Parameters
    ----------
    first
        The layer at whose input the stage begins.
    rows
        ``(batch, width)``: which of the call's tokens are there, −1 for padding on the left.
    step
        The same as slots of the stage before, which is what the first layer gathers by.
    tokens
        How many the call has.
    padded
        Whether any row has padding.
    """

    def __init__(self, first: int, rows: Tensor, step: Tensor, tokens: int, padded: bool) -> None:
        self.first, self.rows, self.step, self.padded = first, rows, step, padded
        self.back = inverse(rows, tokens)  # (batch, tokens): slot of each token, −1 where dropped


def choose(plans: Sequence[Plan], real: Sequence[Ints], tokens: int, device: torch.device) -> list[Chosen | None]:
    """Of each layer the tokens that it is given, shared by the layers of a stage; ``None`` for all.

    Parameters
    ----------
    plans
        One per row.
    real
        Of each row the positions that are not padding; the plans count these alone. Reduced stages hold no padding
        but what makes their rows equally long.
    tokens
        How many the call has.
    """
    chosen: list[Chosen | None] = []
    before: Ints | None = None  # slot of each token in the stage before
    for stage in plans[0].stages:
        made = None
        if stage.start > 0:
            kept = [places[plan.kept(stage.start)] for places, plan in zip(real, plans, strict=True)]
            width = max(map(len, kept))
            rows = np.full((len(kept), width), -1, dtype=np.int64)
            back = np.full((len(kept), tokens), -1, dtype=np.int64)
            for row, places in enumerate(kept):
                rows[row, width - len(places) :] = places
                back[row, places] = np.arange(width - len(places), width)
            step = rows if before is None else np.where(rows < 0, -1, np.take_along_axis(before, rows.clip(0), 1))
            before, padded = back, bool((rows < 0).any())
            made = Chosen(
                stage.start, torch.from_numpy(rows).to(device), torch.from_numpy(step).to(device), tokens, padded
            )
        chosen += [made] * (stage.stop - stage.start)
    return chosen


class Part:
    """The part of a call that the layers of one stage are given.

    Parameters
    ----------
    extent
        The size of the call.
    held
        What these layers' caches held before, ``None`` for everything.
    chosen
        Which of the call's tokens are there, ``None`` for all.
    """

    ranks: Tensor | None = None  # (batch, width) compact position ids; None when tokens keep their original ones

    def __init__(self, extent: Extent, held: Held | None, chosen: Chosen | None) -> None:
        self.extent, self.held, self.chosen = extent, held, chosen
        self.padded = (held is not None and held.padded) or (chosen is not None and chosen.padded)
        self.rows = None if chosen is None else chosen.rows
        self.width = extent.tokens if self.rows is None else self.rows.shape[1]
        self.queries = extent.positions(extent.past, extent.tokens)  # (batch, width) original positions, −1 for padding
        if self.rows is not None:
            self.queries = self.rows.where(self.rows < 0, self.rows + extent.past)

    def given(self) -> Tensor:
        """Original positions of all tokens that these layers were ever given, ``(batch, n)``; −1 for padding."""
        known = self.held.length if self.held else 0
        before = (self.held.columns,) if self.held else ()
        return torch.cat((*before, self.extent.positions(known, int(self.extent.past) - known), self.queries), 1)

    def renumber(self, real: Tensor) -> None:
        """Set ``ranks``: rows count what is not padding, by ``real (batch, past + tokens)`` in layer 0."""
        past, known = self.extent.past, self.held.length if self.held else 0
        before = real[:, known:past].sum(1, keepdim=True)
        if self.held is not None:
            columns = self.held.columns
            before = before + (real.gather(1, columns.clamp(min=0)) & (columns >= 0)).sum(1, keepdim=True)
        new = real[:, past:] if self.rows is None else self.rows >= 0
        self.ranks = (before + new.cumsum(1) - 1).clamp(min=0)

    def gather(self, x: Tensor) -> Tensor:
        """Pick the stage's tokens out of ``(..., batch or 1, tokens, features)``."""
        return x if self.rows is None else take(x, self.rows)

    def enter(self, hidden: Tensor, layer: int, whole: bool) -> Tensor:
        """Hidden states that a layer gets: its stage's, where what comes is that of the stage before, or ``whole``."""
        if whole:
            return self.gather(hidden)
        return hidden if self.chosen is None or layer != self.chosen.first else take(hidden, self.chosen.step)

    def restore(self, x: Tensor) -> Tensor:
        """Put ``(batch, width, features)`` back at full length, zeros where dropped."""
        return x if self.chosen is None else put_back(x, self.chosen.back)


class View:
    """A part of a call as layers of one kind see it: their keys and masks.

    Parameters
    ----------
    part
        What the layers are given.
    layer
        Their cache layer, one for all of them, or ``None`` without a cache.
    seen
        Length and first position of the keys that the decoder's own mask speaks of.
    """

    def __init__(self, part: Part, layer: Any, seen: tuple[int, int]) -> None:
        self.part, self.seen = part, seen
        self.static = getattr(layer, "is_compileable", False)
        if self.static and part.rows is None and not layer.is_sliding:
            self.keys, self.past = caches.slots(layer), 0
        else:
            end = part.extent.past + part.extent.tokens
            self.keys, self.past = caches.present(layer, part.given(), part.width, end)
        self._made: list[tuple[object, object]] = []

    def once(self, source: object, make: Callable[[], T]) -> T:
        """Make what the view's layers share; each of them comes with the same ``source``, a tensor."""
        for known, made in self._made:
            if known is source:
                return made  # type: ignore[return-value]
        made = make()
        self._made.append((source, made))
        return made

    def mask(self, mask: Any, flash: bool) -> Any:
        """The view's attention mask (see :func:`adsc.hf.masks.stage_mask`)."""
        part = self.part
        if mask is None and not (part.padded or self.static):
            return None
        return self.once(
            mask, lambda: stage_mask(mask, part.rows, part.queries, self.keys, self.seen[1], self.past, flash)
        )

    def restore_attention(self, x: Tensor) -> Tensor:
        """Put attention weights ``(batch, heads, width, m)`` back at full size, zeros where dropped."""
        batch, heads = x.shape[:2]
        length, offset = self.seen
        keys = self.keys - offset
        keys = keys.masked_fill((keys < 0) | (keys >= length), -1)
        columns = inverse(keys, length).repeat_interleave(heads, 0)
        x = put_back(x.flatten(0, 1).transpose(1, 2), columns).transpose(1, 2)
        if self.part.chosen is not None:
            x = put_back(x, self.part.chosen.back.repeat_interleave(heads, 0))
        return x.reshape(batch, heads, *x.shape[1:])


class Call:
    """One forward pass of the decoder: a view per layer, ``None`` for layers that hold everything.

    It travels with the call as a keyword of the layers, so threads, and the second run of a layer under gradient
    checkpointing, see what belongs to them.
    """

    def __init__(self, views: list[View | None], planned: bool, compact: bool = False) -> None:
        self.views, self.planned, self.compact = views, planned, compact
        self.reached = False  # set by the last layer: proof that the decoder hands keywords on
        self.left = 0  # where it is watched: the layer left last, and what tells its output
        self.output: tuple[object, ...] | None = None


def continue_call(extent: Extent, cache: Any, sources: Sequence[int], real: Callable[[], Tensor]) -> Call:
    """Lay out a call that feeds text, or decodes, on a cache that was reduced before.

    Parameters
    ----------
    sources
        Of each layer the one whose keys it attends to: itself, unless these are shared.
    real
        Tells which positions of layer 0 are not padding, ``(batch, past + tokens)``.
    """
    parts: dict[Held, Part] = {}
    views: dict[object, View] = {}
    laid: list[View | None] = []
    for index, source in enumerate(sources):
        if source != index:
            laid.append(laid[source])
            continue
        held = caches.held(cache, index)
        if held is None:
            laid.append(None)
            continue
        if held not in parts:
            parts[held] = Part(extent, held, None)
            if held.compact:
                parts[held].renumber(real())
        layer = cache.layers[index]
        caches.expect(layer)
        key = held, caches.kind(layer)
        if key not in views:
            views[key] = View(parts[held], layer, layer.get_mask_sizes(extent.tokens))
        laid.append(views[key])
    return Call(laid, planned=False)


def plan_call(
    extent: Extent, cache: Any, chosen: Sequence[Chosen | None], sources: Sequence[int], numbered: Tensor | None
) -> Call:
    """Lay out a call with vision tokens.

    Parameters
    ----------
    chosen
        Of each layer the tokens that it is given, from :func:`choose`.
    sources
        Of each layer the one whose keys it attends to: itself, unless these are shared.
    numbered
        Which positions of layer 0 are not padding, ``(batch, past + tokens)``, when survivors are to be renumbered.
    """
    parts: dict[object, Part] = {}
    views: dict[object, View] = {}
    laid: list[View | None] = []
    for index, (picked, source) in enumerate(zip(chosen, sources, strict=True)):
        if source != index:
            laid.append(laid[source])
            continue
        held = caches.held(cache, index)
        if picked is None and held is None:
            laid.append(None)
            continue
        if (picked, held) not in parts:
            parts[picked, held] = Part(extent, held, picked)
            if numbered is not None:
                parts[picked, held].renumber(numbered)
        layer, seen = None, (extent.tokens, 0)
        if cache is not None and index < len(cache.layers):
            layer = cache.layers[index]
            seen = layer.get_mask_sizes(extent.tokens)
            caches.expect(layer)
            if picked is not None and extent.past == 0:
                caches.allocate(cache, index, extent.tokens - picked.rows.shape[1])
        key = picked, held, caches.kind(layer)
        if key not in views:
            views[key] = View(parts[picked, held], layer, seen)
        laid.append(views[key])
    return Call(laid, True, numbered is not None)


def remember(call: Call, cache: Any) -> None:
    """After a planned call: tell the layers of its cache what they hold."""
    after: dict[Part, Held] = {}
    for index, view in enumerate(call.views):
        if view is not None and index < len(cache.layers):
            part = view.part
            if part not in after:
                end = int(part.extent.past) + part.extent.tokens
                after[part] = Held(part.given(), end, part.padded, call.compact)
            caches.reduce(cache, index, after[part])
