"""torch.compile: no graph break of ours, no new graph for another layout of the same size, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.generation import CompileConfig

import adsc

from .oracle import difference, kept_positions, masked_dense
from .tiny import SCHEDULE, TINY, batch, case, model

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before. transformers asks whether placeholders and features match: a number in a graph."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield
    torch._dynamo.reset()


@torch.no_grad()
def warm(family: str) -> torch.nn.Module:
    """The model of a family after a first call, in which transformers installs hooks of its own."""
    network = model(family)
    network(**case(family, "single").inputs)
    return network


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@torch.no_grad()
def test_the_forward_pass_is_one_graph(family):
    network, image = warm(family), TINY[family].images[0]
    same_size = [batch(family, [[4, image, 6]]), batch(family, [[7, image, 3]])]
    batches = [*same_size, batch(family, [[3, image, 5], [9]])]
    expected = [masked_dense(network, made.inputs, kept_positions(made)) for made in batches]
    text = batch(family, [[9]]).inputs
    words = network(**text).logits
    compiled = torch.compile(network, backend="eager", fullgraph=True)  # a graph break would be an error
    with adsc.compress(compiled, SCHEDULE):
        found = [compiled(**made.inputs).logits for made in same_size]
        assert graphs() == 1  # another place of the image needs no other graph
        found.append(compiled(**batches[2].inputs).logits)
        assert torch.allclose(compiled(**text).logits, words, atol=1e-5)
    for made, right, logits in zip(batches, expected, found, strict=True):
        assert difference(logits, right, kept_positions(made)[-1]) <= 1e-5
    assert not counters["graph_break"]
    assert not compiled._forward_pre_hooks
    assert not compiled._forward_hooks


@torch.no_grad()
def test_planned_ahead_by_hand():
    """For graphs that were compiled before the method was attached, or that hold more than the model."""
    network, made = warm("llava"), case("llava", "single")
    kept = kept_positions(made)

    @torch.compile(backend="eager", fullgraph=True)
    def halved(**inputs):
        return network(**inputs).logits / 2

    with adsc.compress(network, SCHEDULE) as handle, handle.planned(made.inputs):
        found = 2 * halved(**made.inputs)
    assert difference(found, masked_dense(network, made.inputs, kept), kept[-1]) <= 1e-5


@torch.no_grad()
def test_another_prompt_of_the_planned_length():
    network, image = warm("llava"), TINY["llava"].images[0]
    planned, other = batch("llava", [[4, image, 6]]), batch("llava", [[6, image, 4]])
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    handle = adsc.attach(compiled, SCHEDULE)
    with handle.planned(planned.inputs):
        found = [compiled(**made.inputs).logits for made in (planned, other, planned)]
    handle.remove()
    for made, logits in zip((planned, other, planned), found, strict=True):
        kept = kept_positions(made)
        assert difference(logits, masked_dense(network, made.inputs, kept), kept[-1]) <= 1e-5


@torch.no_grad()
def test_not_planned_ahead_the_graph_breaks_and_the_numbers_are_right():
    network, made = warm("llava"), case("llava", "single")
    kept = kept_positions(made)
    with adsc.compress(network, SCHEDULE):
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(network, backend="eager", fullgraph=True)(**made.inputs)
        torch._dynamo.reset()
        found = torch.compile(network, backend="eager")(**made.inputs).logits
        assert counters["graph_break"]
    assert difference(found, masked_dense(network, made.inputs, kept), kept[-1]) <= 1e-5


@pytest.mark.parametrize(("family", "name"), [("llava", "left_padding"), ("qwen2_5_vl", "single")])
@torch.no_grad()
def test_decoding_on_a_static_cache_is_one_graph(family, name):
    network, made = warm(family), case(family, name)
    compiling = CompileConfig(backend="eager", fullgraph=True, mode=None, dynamic=None)
    compiling._compile_all_devices = True
    with adsc.compress(network, SCHEDULE):
        expected = network.generate(**made.inputs, **GREEDY)
        for _ in range(2):  # the second time the cache is there already
            options = {"cache_implementation": "static", "compile_config": compiling}
            assert torch.equal(network.generate(**made.inputs, **GREEDY, **options), expected)
            assert graphs() == 1
    assert not counters["graph_break"]
    for name in ("_compiled_call", "_last_compile_config", "_cache"):
        network.__dict__.pop(name, None)
