"""What the layers of one stage see in one forward pass. All indices are built here, before the first layer runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..planning import Plan
from .masks import inverse, put_back, stage_mask, take

T = TypeVar("T")


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

    @cached_property
    def counts(self) -> Tensor:
        """Tokens of each row, ``(batch, 1)``."""
        return (self.columns >= 0).sum(1, keepdim=True)


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


class View:
    """What the layers of one stage see in one call.

    Attributes
    ----------
    first
        The layer at whose input the stage begins.
    rows
        ``(batch, width)``: which of the call's tokens are there, −1 for padding on the left; ``None`` for all.
    step
        The same as slots of the stage before, which is what the first layer gathers by.
    ranks
        ``(batch, width)`` compact position ids, or ``None`` when tokens keep their original ones.
    padded
        Whether any row has padding, in this call or in the cache.
    """

    def __init__(
        self, first: int, rows: Tensor | None, step: Tensor | None, ranks: Tensor | None, slots: Slots | None,
        known: int, past: int, tokens: int, batch: int, padded: bool, device: torch.device,
    ) -> None:  # fmt: skip
        self.first, self.rows, self.step, self.ranks, self.padded = first, rows, step, ranks, padded
        self.width = tokens if rows is None else rows.shape[1]
        self._slots, self._known, self._past, self._tokens = slots, known, past, tokens
        self._batch, self._device = batch, device
        self._made: list[tuple[object, object]] = []

    @cached_property
    def keys(self) -> Tensor:
        """Original positions of the layer's keys after this call, ``(batch, m)``; −1 for padding."""

        def between(start: int, stop: int) -> Tensor:
            return torch.arange(start, stop, device=self._device).expand(self._batch, -1)

        held = between(0, self._past) if self._slots is None else self._slots.columns
        fed_back = between(self._past if self._slots is None else self._known, self._past)
        if self.rows is None:
            new = between(self._past, self._past + self._tokens)
        else:
            new = torch.where(self.rows < 0, self.rows, self.rows + self._past)
        return torch.cat((held, fed_back, new), dim=1)

    @cached_property
    def back(self) -> Tensor | None:
        """Slot of each of the call's tokens, ``(batch, tokens)``, −1 where dropped; ``None`` when all are there."""
        return None if self.rows is None else inverse(self.rows, self._tokens)

    def once(self, source: object, make: Callable[[], T]) -> T:
        """Make what all layers of the stage share (they are handed the same ``source``) only for the first of them."""
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

    def gather(self, x: Tensor) -> Tensor:
        """Pick the stage's tokens out of ``(..., batch or 1, tokens, features)``."""
        return x if self.rows is None else take(x, self.rows)

    def advance(self, hidden: Tensor) -> Tensor:
        """From the stage before into this one."""
        return hidden if self.step is None else take(hidden, self.step)

    def restore(self, x: Tensor) -> Tensor:
        """Put ``(batch, width, features)`` back at full length, zeros where dropped."""
        return x if self.back is None else put_back(x, self.back)

    def restore_attention(self, x: Tensor) -> Tensor:
        """Put attention weights ``(batch, heads, width, m)`` back at full size, zeros where dropped."""
        heads = x.shape[1]
        columns = inverse(self.keys, self._past + self._tokens).repeat_interleave(heads, 0)
        x = put_back(x.flatten(0, 1).transpose(1, 2), columns).transpose(1, 2)
        if self.back is not None:
            x = put_back(x, self.back.repeat_interleave(heads, 0))
        return x.unflatten(0, (-1, heads))


class Call:
    """One forward pass of the decoder: a view per layer, ``None`` for layers that hold everything.

    It travels with the call as a keyword of the layers, so threads, and the second run of a layer under gradient
    checkpointing, see what belongs to them.
    """

    def __init__(
        self, views: list[View | None], memory: Memory | None, planned: bool, length: int
    ) -> None:
        self.views = views
        self.reached = False  # set by the last layer: proof that the decoder hands keywords on
        self._memory, self._planned, self._length = memory, planned, length

    def remember(self) -> Memory | None:
        """What the cache has to know from now on."""
        if not self._planned:
            return self._memory
        slots = {view: Slots(view.keys, view.padded) for view in self.views if view is not None}
        return Memory(self._length, [None if view is None else slots[view] for view in self.views])


def build(
    plans: Sequence[Plan] | None,
    real: Sequence[NDArray[np.int64]],
    memory: Memory | None,
    past: int,
    shape: tuple[int, int],
    num_layers: int,
    compact: bool,
    past_real: NDArray[np.int64],
    device: torch.device,
) -> Call:
    """Lay out a call.

    Parameters
    ----------
    plans
        One per row for a call with vision tokens, ``None`` for text and decode steps.
    real
        Of each row the positions that are not padding; the plans count these alone.
    memory
        What earlier calls dropped.
    past
        Tokens that layer 0's cache holds.
    shape
        Rows and tokens of this call.
    compact
        Whether survivors are renumbered.
    past_real
        ``(batch,)`` tokens of the past that are not padding.
    """
    batch, tokens = shape
    starts = {stage.start for stage in plans[0].stages} if plans else set()
    known = memory.length if memory else past
    views: list[View | None] = []
    before: NDArray[np.int64] | None = None  # slot of each token in the stage before
    previous: Slots | None = None
    for layer in range(num_layers):
        slots = memory.slots[layer] if memory else None
        if layer and layer not in starts and slots is previous:
            views.append(views[-1])
            continue
        previous = slots
        rows = step = ranks = None
        padded = slots.padded if slots else False
        if plans and layer >= plans[0].stages[0].stop:
            kept = [places[plan.kept(layer)] for places, plan in zip(real, plans, strict=True)]
            index = np.full((batch, max(map(len, kept))), -1, dtype=np.int64)
            back = np.full((batch, tokens), -1, dtype=np.int64)
            for row, places in enumerate(kept):
                index[row, index.shape[1] - len(places) :] = places
                back[row, places] = np.arange(index.shape[1] - len(places), index.shape[1])
            stride = index if before is None else np.take_along_axis(before, index.clip(0), 1)
            stride[index < 0] = -1
            before, padded = back, padded or bool((index < 0).any())
            rows, step = torch.from_numpy(index).to(device), torch.from_numpy(stride).to(device)
        if rows is None and slots is None:
            views.append(None)
            continue
        if compact:
            count = torch.from_numpy(past_real[:, None]).to(device) if slots is None else slots.counts + (past - known)
            width = tokens if rows is None else rows.shape[1]
            padding = 0 if rows is None else (rows < 0).sum(1, keepdim=True)
            ranks = (count - padding + torch.arange(width, device=device)).clamp(min=0)
        views.append(View(layer, rows, step, ranks, slots, known, past, tokens, batch, padded, device))
    return Call(views, memory, plans is not None, past + tokens)
