"""torch.compile: no graph break of ours, no new graph for another layout of the same size, and the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.generation import CompileConfig

import adsc

from .oracle import difference, kept_positions, masked_dense
from .tiny import SCHEDULE, TINY, batch, case, model

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing compiled before. transformers itself asks whether placeholders and features match, a number in a graph."""
    monkeypatch.setattr(torch._dynamo.config, "capture_scalar_outputs", True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@torch.no_grad()
def test_the_forward_pass_is_one_graph(family):
    network, image = model(family), TINY[family].images[0]
    compiled = torch.compile(network, backend="eager", fullgraph=True)  # a graph break would be an error
    with adsc.compress(compiled, SCHEDULE):
        for number, rows in enumerate(([[4, image, 6]], [[7, image, 3]])):
            made = batch(family, rows)
            kept = kept_positions(made)
            assert difference(compiled(**made.inputs).logits, masked_dense(network, made.inputs, kept), kept[-1]) <= 1e-5
            assert graphs() == 1, f"row {number} has the size of the first one, and needs no other graph"
        ragged = case(family, "left_padding")
        kept = kept_positions(ragged)
        found = compiled(**ragged.inputs).logits
        assert difference(found, masked_dense(network, ragged.inputs, kept), kept[-1]) <= 1e-5
        text = batch(family, [[9]]).inputs
        assert torch.allclose(compiled(**text).logits, network(**text).logits, atol=1e-5)
    assert not counters["graph_break"]
    assert not compiled._forward_pre_hooks
    assert not compiled._forward_hooks


@torch.no_grad()
def test_planned_ahead_by_hand():
    """For graphs that were compiled before the method was attached, or that hold more than the model."""
    network, made = model("llava"), case("llava", "single")
    kept = kept_positions(made)

    @torch.compile(backend="eager", fullgraph=True)
    def halved(**inputs):
        return network(**inputs).logits / 2

    with adsc.compress(network, SCHEDULE) as handle, handle.planned(made.inputs):
        found = 2 * halved(**made.inputs)
    assert difference(found, masked_dense(network, made.inputs, kept), kept[-1]) <= 1e-5


@torch.no_grad()
def test_not_planned_ahead_the_graph_breaks_and_the_numbers_are_right():
    network, made = model("llava"), case("llava", "single")
    kept = kept_positions(made)
    with adsc.compress(network, SCHEDULE):
        found = torch.compile(network, backend="eager")(**made.inputs).logits
        assert counters["graph_break"]
        with pytest.raises(Exception, match="disable"):
            torch.compile(network, backend="eager", fullgraph=True)(**made.inputs)
    assert difference(found, masked_dense(network, made.inputs, kept), kept[-1]) <= 1e-5


@torch.no_grad()
def test_graph_breaks_are_those_of_the_dense_model():
    """Without the setting above, transformers breaks the graph; the reduction adds nothing."""
    torch._dynamo.config.capture_scalar_outputs = False
    network, made = model("llava"), case("llava", "left_padding")
    network(**made.inputs)  # transformers installs its own hooks in the first call
    dense = torch._dynamo.explain(network)(**made.inputs)
    torch._dynamo.reset()
    with adsc.compress(network, SCHEDULE) as handle, handle.planned(made.inputs):
        reduced = torch._dynamo.explain(network)(**made.inputs)
    assert reduced.graph_break_count == dense.graph_break_count > 0
    ours = Path(adsc.__file__).parent
    assert not [why for why in reduced.break_reasons if ours in Path(why.user_stack[-1].filename).parents]


@pytest.mark.parametrize(("family", "name"), [("llava", "left_padding"), ("qwen2_5_vl", "single")])
@torch.no_grad()
def test_decoding_on_a_static_cache_is_one_graph(family, name):
    network, made = model(family), case(family, name)
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
