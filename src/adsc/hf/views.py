"""What the layers of one stage see in one forward pass. All indices are built here, before the first layer runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..planning import Plan
from .masks import inverse, put_back, stage_mask, take

T = TypeVar("T")
Ints = NDArray[np.int64]


class Slots:
    """The original positions that a layer's cache holds.

    Parameters
    ----------
    columns
        ``(batch, m)``, −1 for the padding of rows that kept fewer tokens than others.
    padded
        Whether there is any padding.
    """

    def __init__(self, columns: Tensor, padded: bool) -> None:
        self.columns, self.padded = columns, padded


class Memory:
    """What a cache has to remember between calls; it is an attribute of the cache, and is copied with it.

    Parameters
    ----------
    length
        Positions of layer 0 that ``slots`` speaks of. Every token fed in later is in every layer.
    slots
        One entry per layer, shared by the layers of a stage; ``None`` where everything was kept.
    """

    def __init__(self, length: int, slots: list[Slots | None]) -> None:
        self.length, self.slots = length, slots

    def cropped(self, count: int) -> Memory:
        """Without the last ``count`` positions, where every row of every layer has these; otherwise itself."""
        stages = {slots for slots in self.slots if slots is not None}
        for slots in stages:
            end = torch.arange(self.length - count, self.length, device=slots.columns.device)
            if slots.columns.shape[1] < count or (slots.columns[:, -count:] != end).any():
                return self
        shorter = {slots: Slots(slots.columns[:, :-count], slots.padded) for slots in stages}
        return Memory(self.length - count, [None if slots is None else shorter[slots] for slots in self.slots])


class Extent(NamedTuple):
    """The size of a call: rows, tokens fed in, tokens in layer 0's cache and how many of these the memory covers."""

    batch: int
    tokens: int
    past: int
    known: int
    device: torch.device


class View:
    """What the layers of one stage see in one call.

    Parameters
    ----------
    extent
        The size of the call.
    slots
        What these layers' caches hold, ``None`` for everything.
    first
        The layer at whose input the stage begins.
    rows
        ``(batch, width)``: which of the call's tokens are there, −1 for padding on the left; ``None`` for all.
    step
        The same as slots of the stage before, which is what the first layer gathers by.
    padded
        Whether any row has padding, in this call or in the cache.
    """

    ranks: Tensor | None = None  # (batch, width) compact position ids; None when tokens keep their original ones

    def __init__(
        self, extent: Extent, slots: Slots | None, first: int, rows: Tensor | None, step: Tensor | None, padded: bool
    ) -> None:
        self.extent, self.slots, self.first, self.rows, self.step, self.padded = (
            extent,
            slots,
            first,
            rows,
            step,
            padded,
        )
        self.width = extent.tokens if rows is None else rows.shape[1]
        self._made: list[tuple[object, object]] = []

    @cached_property
    def keys(self) -> Tensor:
        """Original positions of the layers' keys after this call, ``(batch, m)``; −1 for padding."""
        batch, tokens, past, known, device = self.extent

        def between(start: int, stop: int) -> Tensor:
            return torch.arange(start, stop, device=device).expand(batch, -1)

        held = between(0, known) if self.slots is None else self.slots.columns
        new = between(past, past + tokens) if self.rows is None else self.rows.where(self.rows < 0, self.rows + past)
        return torch.cat((held, between(known, past), new), dim=1)

    @cached_property
    def back(self) -> Tensor | None:
        """Slot of each of the call's tokens, ``(batch, tokens)``, −1 where dropped; ``None`` when all are there."""
        return None if self.rows is None else inverse(self.rows, self.extent.tokens)

    def renumber(self, real: Tensor) -> None:
        """Set ``ranks``: rows count what is not padding, by ``real (batch, past + tokens)`` in layer 0."""
        held = real[:, : self.extent.known]
        if self.slots is not None:
            held = real.gather(1, self.slots.columns.clamp(min=0)) & (self.slots.columns >= 0)
        past = held.sum(1, keepdim=True) + real[:, self.extent.known : self.extent.past].sum(1, keepdim=True)
        new = real[:, self.extent.past :] if self.rows is None else self.rows >= 0
        self.ranks = (past + new.cumsum(1) - 1).clamp(min=0)

    def once(self, source: object, make: Callable[[], T]) -> T:
        """Make what the stage's layers share; each of them comes with the same ``source``."""
        for known, made in self._made:
            if known is source:
                return made  # type: ignore[return-value]
        made = make()
        self._made.append((source, made))
        return made

    def mask(self, mask: Tensor | None, flash: bool) -> Tensor | None:
        """The stage's attention mask (see :func:`adsc.hf.masks.stage_mask`)."""
        if mask is None and not self.padded:
            return None
        return self.once(mask, lambda: stage_mask(mask, self.rows, self.keys, self.width, flash))

    def advance(self, hidden: Tensor) -> Tensor:
        """From the stage before into this one."""
        return hidden if self.step is None else take(hidden, self.step)

    def gather(self, x: Tensor) -> Tensor:
        """Pick the stage's tokens out of ``(..., batch or 1, tokens, features)``."""
        return x if self.rows is None else take(x, self.rows)

    def restore(self, x: Tensor) -> Tensor:
        """Put ``(batch, width, features)`` back at full length, zeros where dropped."""
        return x if self.back is None else put_back(x, self.back)

    def restore_attention(self, x: Tensor) -> Tensor:
        """Put attention weights ``(batch, heads, width, m)`` back at full size, zeros where dropped."""
        batch, heads = x.shape[:2]
        columns = inverse(self.keys, self.extent.past + self.extent.tokens).repeat_interleave(heads, 0)
        x = put_back(x.flatten(0, 1).transpose(1, 2), columns).transpose(1, 2)
        if self.back is not None:
            x = put_back(x, self.back.repeat_interleave(heads, 0))
        return x.reshape(batch, heads, *x.shape[1:])


class Call:
    """One forward pass of the decoder: a view per layer, ``None`` for layers that hold everything.

    It travels with the call as a keyword of the layers, so threads, and the second run of a layer under gradient
    checkpointing, see what belongs to them.

    Parameters
    ----------
    views
        One per layer, shared by the layers of a stage.
    memory
        What the cache has to know from now on, made when asked for.
    """

    def __init__(self, views: list[View | None], memory: Callable[[], Memory | None]) -> None:
        self.views, self.memory = views, memory
        self.reached = False  # set by the last layer: proof that the decoder hands keywords on


def continue_call(extent: Extent, memory: Memory, numbered: Tensor | None) -> Call:
    """Lay out a call that feeds text, or decodes, on a cache that was reduced before.

    Parameters
    ----------
    numbered
        As in :func:`plan_call`.
    """
    views = {slots: View(extent, slots, 0, None, None, slots.padded) for slots in memory.slots if slots is not None}
    if numbered is not None:
        for view in views.values():
            view.renumber(numbered)
    return Call([None if slots is None else views[slots] for slots in memory.slots], lambda: memory)


def plan_call(
    extent: Extent,
    memory: Memory | None,
    plans: Sequence[Plan],
    real: Sequence[Ints],
    num_layers: int,
    numbered: Tensor | None,
) -> Call:
    """Lay out a call with vision tokens.

    Parameters
    ----------
    memory
        What earlier calls on the cache dropped.
    plans
        One per row.
    real
        Of each row the positions that are not padding; the plans count these alone. Reduced stages hold no padding
        but what makes their rows equally long.
    numbered
        Which positions of layer 0 are not padding, ``(batch, past + tokens)``, when survivors are to be renumbered.
    """
    held = memory.slots if memory else [None] * num_layers
    stages = [plans[0].stage(layer).start for layer in range(num_layers)]
    views: list[View | None] = []
    before: Ints | None = None  # slot of each token in the stage before
    for layer, (slots, stage) in enumerate(zip(held, stages, strict=True)):
        if layer and slots is held[layer - 1] and stage == stages[layer - 1]:
            views.append(views[-1])
            continue
        rows = step = None
        padded = slots.padded if slots else False
        if stage > 0:
            kept = [places[plan.kept(layer)] for places, plan in zip(real, plans, strict=True)]
            width = max(map(len, kept))
            index = np.full((extent.batch, width), -1, dtype=np.int64)
            back = np.full((extent.batch, extent.tokens), -1, dtype=np.int64)
            for row, places in enumerate(kept):
                index[row, width - len(places) :] = places
                back[row, places] = np.arange(width - len(places), width)
            stride = index if before is None else np.where(index < 0, -1, np.take_along_axis(before, index.clip(0), 1))
            rows, step = torch.from_numpy(index).to(extent.device), torch.from_numpy(stride).to(extent.device)
            before, padded = back, padded or bool((index < 0).any())
        if rows is None and slots is None:
            views.append(None)
            continue
        view = View(extent, slots, layer, rows, step, padded)
        if numbered is not None:
            view.renumber(numbered)
        views.append(view)

    def remember() -> Memory:
        after = {view: Slots(view.keys, view.padded) for view in views if view is not None}
        return Memory(extent.past + extent.tokens, [None if view is None else after[view] for view in views])

    return Call(views, remember)
