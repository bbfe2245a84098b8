"""Picking slots out of tensors, and the attention masks of a reduced stage. Index −1 is padding everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """Pick positions along the second-last dimension, per row.

    Parameters
    ----------
    x
        ``(..., batch or 1, tokens, features)``.
    index
        ``(batch, n)``; padding gets position 0, which is finite and never looked at.

    Returns
    -------
    ``(..., batch, n, features)``.
    """
    index = index.to(x.device).clamp(min=0)
    return torch.take_along_dim(x, index.view((1,) * (x.ndim - 3) + (*index.shape, 1)), dim=-2)


def put_back(x: Tensor, slots: Tensor) -> Tensor:
    """Undo :func:`take`: ``(batch, n, features)`` at full length, zeros where ``slots (batch, tokens)`` is −1."""
    slots = slots.to(x.device)
    return take(x, slots).masked_fill((slots < 0).unsqueeze(-1), 0)


def inverse(index: Tensor, size: int) -> Tensor:
    """For ``index (batch, n)`` of positions below ``size``: the slot of each position, −1 where it is absent."""
    slots = index.new_full((index.shape[0], size + 1), -1)
    target = index.masked_fill(index < 0, size)  # padding writes into the spare column
    return slots.scatter_(1, target, torch.arange(index.shape[1], device=index.device).expand_as(index))[:, :size]


def stage_mask(mask: Tensor | None, rows: Tensor | None, keys: Tensor, width: int, flash: bool) -> Tensor | None:
    """The attention mask of a stage, out of the one that the decoder built for all tokens.

    Parameters
    ----------
    mask
        ``(batch or 1, heads or 1, queries, keys)`` boolean or additive (eager, sdpa), ``(batch, keys)`` (flash), or
        ``None`` where the kernel's own causal rule is enough.
    rows
        ``(batch, width)`` queries that stay, or ``None`` for all of them.
    keys
        ``(batch, m)`` original positions of the keys, the last ``width`` of them this call's.
    width
        Queries of the stage.
    flash
        Whether the kernel takes 2-D masks.
    """
    hidden = keys < 0
    if mask is None:
        # Rows that keep different counts are padded on the left, so the stage needs a mask where the whole did not.
        if flash:
            return ~hidden
        queries = keys[:, -width:]
        stage = (~hidden[:, None, :] & (keys[:, None, :] <= queries[:, :, None])).unsqueeze(1)
    else:
        keys, hidden = keys.to(mask.device), hidden.to(mask.device)
        columns = keys.clamp(min=0)
        if mask.ndim == 2:
            return mask.expand(keys.shape[0], -1).gather(1, columns).masked_fill(hidden, 0)
        if rows is not None:
            mask = take(mask.transpose(0, 1), rows).transpose(0, 1)
        stage = torch.take_along_dim(mask, columns[:, None, None, :], dim=-1)
        never = False if stage.dtype == torch.bool else torch.finfo(stage.dtype).min
        stage = stage.masked_fill(hidden[:, None, None, :], never)
    # A padding query may see itself: a softmax over nothing is not finite in every kernel and precision.
    itself = stage.diagonal(keys.shape[1] - width, -2, -1)
    itself.masked_fill_(hidden[:, None, -width:], True if stage.dtype == torch.bool else 0)
    return stage
