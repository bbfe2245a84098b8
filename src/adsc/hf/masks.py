"""Picking slots out of tensors, and the attention masks of a reduced stage. Index −1 is padding everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


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


def stage_mask(
    mask: Any, rows: Tensor | None, queries: Tensor, keys: Tensor, offset: int, first: int, flash: bool
) -> Any:
    """The attention mask of a stage, out of the one that the decoder built for all tokens.

    Parameters
    ----------
    mask
        ``(batch or 1, heads or 1, queries, keys)`` boolean or additive (eager, sdpa), ``(batch, keys)`` (flash), a
        block mask (flex), or ``None`` where the kernel's own causal rule is enough.
    rows
        ``(batch, width)`` queries that stay, counted within the call, or ``None`` for all of them.
    queries
        ``(batch, width)`` their original positions, −1 for padding.
    keys
        ``(batch, m)`` original positions of the keys, −1 for padding.
    offset
        Original position of the first key that ``mask`` speaks of.
    first
        Column of ``keys`` where this call's begin.
    flash
        Whether the kernel takes 2-D masks.
    """
    if isinstance(mask, BlockMask):
        return _stage_block_mask(mask, rows, queries.shape[1], keys, offset)
    hidden = keys < 0
    if mask is None:
        # Rows that keep different counts are padded on the left, so the stage needs a mask where the whole did not.
        if flash:
            return ~hidden
        stage = (~hidden[:, None, :] & (keys[:, None, :] <= queries[:, :, None])).unsqueeze(1)
    else:
        keys = keys.to(mask.device) - offset
        hidden = hidden.to(mask.device) | (keys < 0) | (keys >= mask.shape[-1])
        columns = keys.masked_fill(hidden, 0)
        if mask.ndim == 2:
            return mask.expand(keys.shape[0], -1).gather(1, columns).masked_fill(hidden, 0)
        if rows is not None:
            mask = take(mask.transpose(0, 1), rows).transpose(0, 1)
        stage = torch.take_along_dim(mask, columns[:, None, None, :], dim=-1)
        never = False if stage.dtype == torch.bool else torch.finfo(stage.dtype).min
        stage = stage.masked_fill(hidden[:, None, None, :], never)
    # A padding query may see itself: a softmax over nothing is not finite in every kernel and precision.
    itself = stage[..., first : first + queries.shape[1]].diagonal(0, -2, -1)
    itself.masked_fill_((queries < 0).to(stage.device)[:, None], True if stage.dtype == torch.bool else 0)
    return stage


def _stage_block_mask(mask: BlockMask, rows: Tensor | None, width: int, keys: Tensor, offset: int) -> BlockMask:
    """Flex attention asks by query, key and row: the answer is that of the whole mask for what stands there.

    The answer reads two tensors and no numbers: the fewer a kernel depends on, the fewer need compiling. A padding
    query sees nothing, for which flex attention gives zeros.
    """
    whole, batch, device = mask.mask_mod, keys.shape[0], keys.device
    rows = torch.arange(width, device=device).expand(batch, -1) if rows is None else rows
    columns = keys - offset
    columns = columns.masked_fill((columns < 0) | (columns >= mask.seq_lengths[1]), -1)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row, column = rows[b, q], columns[b, k]
        return (row >= 0) & (column >= 0) & whole(b, h, row.clamp(min=0), column.clamp(min=0))

    return create_block_mask(seen, B=batch, H=None, Q_LEN=width, KV_LEN=keys.shape[1], device=str(device))
