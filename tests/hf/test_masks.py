"""The masks of a stage, one by one."""

from __future__ import annotations

import pytest
import torch

from adsc.hf import masks
from adsc.hf.masks import inverse, put_back, take

# Two rows of 6 tokens, of which the first is padded on the left by 2; the stage keeps 3 of it and 4 of the other.
ROWS = torch.tensor([[-1, 2, 4, 5], [0, 1, 3, 5]])
REAL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
DENSE = (torch.ones(6, 6).tril().bool() & REAL[:, None, :]).unsqueeze(1)
VISIBLE = torch.tensor(
    [
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    ],
    dtype=torch.bool,
).unsqueeze(1)


def stage_mask(mask, rows, keys, width, flash):
    """With keys that begin at position 0 and end with the call's own."""
    return masks.stage_mask(mask, rows, keys[:, -width:], keys, 0, keys.shape[1] - width, flash)


def test_a_boolean_mask_is_gathered_and_padding_sees_itself_alone():
    assert torch.equal(stage_mask(DENSE, ROWS, ROWS, 4, flash=False), VISIBLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_additive_mask_is_gathered(dtype):
    lowest = torch.finfo(dtype).min
    dense = torch.zeros(2, 1, 6, 6, dtype=dtype).masked_fill(~DENSE, lowest)
    expected = torch.zeros(2, 1, 4, 4, dtype=dtype).masked_fill(~VISIBLE, lowest)
    assert torch.equal(stage_mask(dense, ROWS, ROWS, 4, flash=False), expected)


def test_a_mask_is_made_where_the_model_needs_none():
    assert torch.equal(stage_mask(None, ROWS, ROWS, 4, flash=False), VISIBLE)
    assert torch.equal(stage_mask(None, ROWS, ROWS, 4, flash=True), ROWS >= 0)


def test_flat_masks_are_gathered():
    keys = torch.tensor([[-1, 2, 4, 5], [0, 1, 3, 5]])
    assert torch.equal(stage_mask(REAL, ROWS, keys, 4, flash=True), keys >= 0)
    assert stage_mask(REAL.long(), ROWS, keys, 4, flash=True).tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_one_query_on_a_reduced_cache():
    keys = torch.cat((ROWS, torch.tensor([[6], [6]])), 1)
    dense = torch.nn.functional.pad(REAL, (0, 1), value=True)[:, None, None]
    expected = keys >= 0
    assert torch.equal(stage_mask(dense, None, keys, 1, flash=False)[:, 0, 0], expected)
    assert torch.equal(stage_mask(None, None, keys, 1, flash=False)[:, 0, 0], expected)


def test_a_mask_of_one_row_serves_a_batch():
    mask = torch.ones(6, 6).tril().bool()[None, None]
    assert torch.equal(stage_mask(mask, ROWS, ROWS, 4, flash=False), VISIBLE)


def test_put_back_undoes_take():
    x = torch.arange(24.0).view(2, 6, 2) + 1
    slots = inverse(ROWS, 6)
    assert slots.tolist() == [[-1, -1, 1, -1, 2, 3], [0, 1, -1, 2, -1, 3]]
    expected = x * (slots >= 0).unsqueeze(-1)
    assert torch.equal(put_back(take(x, ROWS), slots), expected)
    axes = x.expand(3, 2, 6, 2)  # as M-RoPE's embeddings are
    assert torch.equal(take(axes, ROWS)[1], take(x, ROWS))
