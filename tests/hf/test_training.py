"""Training through a reduced model: gradients are exact, with and without checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch

import adsc

from .oracle import kept_positions, masked_dense
from .tiny import CORE, SCHEDULE, case, model

FAMILIES = CORE
# The name of 5.16, which newer versions still know.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")


def trainable(family, implementation="sdpa"):
    network = copy.deepcopy(model(family))
    network.set_attn_implementation(implementation)
    return network.train()


def gradients(network, made) -> dict[str, torch.Tensor]:
    network.zero_grad()
    loss = network(**made.inputs, labels=made.inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["single", "left_padding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_masked_dense_model(family, name):
    network, made = trainable(family), case(family, name)
    ids, kept = made.inputs["input_ids"], kept_positions(made)
    with adsc.compress(network, SCHEDULE) as handle:
        found = gradients(network, made)
        ignored = handle._unpredicted(made.inputs)
    network.zero_grad()
    logits = masked_dense.__wrapped__(network, made.inputs, kept)
    labels = ids.masked_fill(ignored, -100)
    network.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1]).backward()
    expected = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        assert (grad - found[name]).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["single", "text_beside_image"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family, implementation, name, use_reentrant):
    network, made = trainable(family, implementation), case(family, name)
    with adsc.compress(network, SCHEDULE) as handle:
        expected = gradients(network, made)
        network.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        network.enable_input_require_grads()
        found = gradients(network, made)
        # Another budget between forward and backward belongs to other calls.
        network.zero_grad()
        loss = network(**made.inputs, labels=made.inputs["input_ids"], use_cache=False).loss
        with handle.budget("1/2"), torch.no_grad():
            network(**made.inputs)
        loss.backward()
        again = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    decoder = [name for name in expected if "language_model" in name or "lm_head" in name]
    assert len(decoder) > 50
    for name in decoder:
        assert torch.equal(found[name], expected[name]), name
        assert torch.equal(again[name], expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_after_the_handle_is_gone(family):
    network, made = trainable(family), case(family, "single")
    with adsc.compress(network, SCHEDULE):
        expected = gradients(network, made)
    network.gradient_checkpointing_enable({"use_reentrant": False})
    with adsc.compress(network, SCHEDULE):
        found = gradients(network, made)
    assert torch.equal(found["lm_head.weight"], expected["lm_head.weight"])
    dense = gradients(network, made)
    assert not torch.equal(dense["lm_head.weight"], expected["lm_head.weight"])
