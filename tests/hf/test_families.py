"""The matrix: every family through the exactness oracle and the cache oracle. The support table is made of these."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

import adsc

from .oracle import attention, difference, kept_positions, masked_dense, shifted
from .test_cache import GREEDY, STEPS, longest, recomputed, storage_tokens
from .test_oracle import check
from .tiny import CASES, SCHEDULE, TINY, batch, case, model


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", TINY)
def test_exact(family, name):
    check(family, case(family, name), torch.float32)


@pytest.mark.parametrize("family", TINY)
def test_exact_in_eager(family):
    check(family, case(family, "left_padding"), torch.float32, "eager")


@pytest.mark.parametrize("family", TINY)
def test_exact_in_float64(family):
    check(family, case(family, "several_images", torch.float64), torch.float64)


def with_a_video(family, seed=0):
    """Beside an image, where the family mixes them; if not, in each of two rows. The last row is text."""
    video, image = TINY[family].video, TINY[family].images[1]
    rows = [[3, video, 4, image, 2], [5]] if TINY[family].mixes else [[3, video, 6], [2, video, 3], [5]]
    return batch(family, rows, seed=seed)


@pytest.mark.parametrize("family", [family for family in TINY if TINY[family].video])
def test_exact_with_a_video(family):
    check(family, with_a_video(family), torch.float32)


def check_decoding(family, made, planned=False):
    """Greedy tokens and logits are those of recomputing each step, and each layer pays for what its plan keeps."""
    network = model(family)
    expected, logits = recomputed(network, made)
    assert len(expected[0].unique()) >= 8
    with adsc.compress(network, SCHEDULE) as handle, ExitStack() as ahead:
        if planned or not TINY[family].words:  # these embed images in generate, and run their language model with that
            ahead.enter_context(handle.planned(made.inputs))
        out = network.generate(**made.inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    length = made.inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, -STEPS:], expected)
    assert max((a - b).abs().max() for a, b in zip(out.logits, logits, strict=True)) <= 1e-5
    counts = longest(kept_positions(made))
    layers = [layer for layer in out.past_key_values.layers if layer.keys is not None]
    windows = [getattr(layer, "sliding_window", 10**6) for layer in layers]  # with the view of one that just left it
    given = [length + STEPS - 1, *(n + STEPS - 1 for n in counts[1:])]
    assert storage_tokens(out.past_key_values) == list(map(min, given, windows))


@pytest.mark.parametrize("name", ["single", "left_padding"])
@pytest.mark.parametrize("family", TINY)
def test_greedy_decoding_on_the_cache(family, name):
    check_decoding(family, case(family, name))


# One family of each way to tell frames.
VIDEOS = ["gemma4", "glm4v", "internvl", "kimi_k25", "llava_next_video", "llava_onevision", "molmo2", "qwen2_5_vl"]
VIDEOS += ["qwen3_vl", "hyperclovax_vision_v2"]


@pytest.mark.parametrize("family", [family for family in VIDEOS if family in TINY])
def test_greedy_decoding_after_a_video(family):
    # A seed with which no model says a placeholder. The last one's features, made in generate, do not tell frames.
    check_decoding(family, with_a_video(family, seed=1), planned=family == "hyperclovax_vision_v2")


def test_onevision_tiles_an_image_that_is_alone_in_its_row(monkeypatch):
    tiny = TINY["llava_onevision"]
    wide, square, tall = tiny.images
    whole = replace(tiny, tokens=lambda image: tiny.tokens(image) if image == square else [9 + 1])
    monkeypatch.setitem(TINY, "llava_onevision", whole)
    made = batch("llava_onevision", [[3, wide, 2, tall, 4], [3, square, 5]])
    assert tiny.tokens(square) == [29]
    made.inputs["batch_num_images"] = torch.tensor([2, 1])
    check("llava_onevision", made, torch.float32)
    check_decoding("llava_onevision", made)


@pytest.mark.parametrize("family", TINY)
def test_off_is_dense(family):
    network, made = model(family), case(family, "left_padding")
    text = batch(family, [[9], [4]] if TINY[family].words else [[9, TINY[family].images[0]]])
    with torch.no_grad():
        dense, words = network(**made.inputs).logits, network(**text.inputs).logits
        with adsc.compress(network, SCHEDULE) as handle:
            if TINY[family].words:
                assert torch.equal(network(**text.inputs).logits, words)
            with handle.budget(1):
                assert torch.equal(network(**made.inputs).logits, dense)
        assert torch.equal(network(**made.inputs).logits, dense)


@pytest.mark.parametrize("family", TINY)
def test_shifting_one_kept_index_fails(family):
    made, network = case(family, "left_padding"), model(family)
    kept = shifted(kept_positions(made), made)
    expected = masked_dense(network, made.inputs, kept)
    with attention(network, "sdpa"), torch.no_grad(), adsc.compress(network, SCHEDULE):
        reduced = network(**made.inputs).logits
    common = [sorted(set(a) & set(b)) for a, b in zip(kept[-1], kept_positions(made)[-1], strict=True)]
    assert difference(reduced, expected, common) >= 1e-3
