"""Off is dense, bit for bit, and a removed handle leaves nothing behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import adsc

from .tiny import CORE, SCHEDULE, TINY, batch, case, model

FAMILIES = CORE


def outputs(network, made):
    with torch.no_grad():
        forward = network(**made.inputs, output_hidden_states=True)
        tokens = network.generate(**made.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return [forward.logits, *forward.hidden_states, tokens]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["single", "left_padding", "text_beside_image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_retaining_everything_is_dense(family, name):
    network, made = model(family), case(family, name)
    dense = outputs(network, made)
    with adsc.compress(network, adsc.Schedule.none()) as handle:
        assert same(outputs(network, made), dense)
        assert handle.last_plans == []
    with adsc.compress(network, SCHEDULE) as handle:
        assert not same(outputs(network, made), dense)
        with handle.budget(1):
            assert same(outputs(network, made), dense)
            assert handle.last_plans == []
        assert not same(outputs(network, made), dense)
    assert same(outputs(network, made), dense)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_dense(family, side):
    network, made = model(family), batch(family, [[7], [12]], side=side)
    dense = outputs(network, made)
    with adsc.compress(network, SCHEDULE):
        assert same(outputs(network, made), dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_stays_after_removal(family):
    network = copy.deepcopy(model(family))
    # transformers leaves things of its own behind the first time that a model runs.
    outputs(network, case(family, "single"))

    def state() -> list:
        places = []
        for name, module in network.named_modules():
            for key, value in vars(module).items():
                places.append((name, key, list(value.items()) if isinstance(value, dict) else id(value)))
        return [place for place in places if place[1] != "rope_deltas"]  # which every call of the model sets

    before, config = state(), network.config.to_dict()
    classes = [dict(vars(type(module))) for module in network.modules()]
    handle = adsc.attach(network, SCHEDULE)
    assert network.adsc is handle
    assert state() != before
    outputs(network, case(family, "left_padding"))
    handle.remove()
    assert state() == before
    assert network.config.to_dict() == config
    assert [dict(vars(type(module))) for module in network.modules()] == classes
    handle.remove()  # twice does no harm
    adsc.attach(network, SCHEDULE).remove()  # and attaching again works


def test_the_block_removes_after_an_error():
    network = model("llava")
    with pytest.raises(RuntimeError, match="mine"), adsc.compress(network, SCHEDULE):
        raise RuntimeError("mine")
    assert not hasattr(network, "adsc")
    assert not network.get_decoder()._forward_pre_hooks


def test_a_call_that_failed_leaves_nothing_for_the_next():
    network, made = model("llava"), case("llava", "single")
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        reduced = network(**made.inputs).logits
        wrong = dict(made.inputs, pixel_values=made.inputs["pixel_values"][:, :2])  # two channels: the tower fails
        with pytest.raises(RuntimeError):
            network(**wrong)
        text = network.get_decoder()(input_ids=torch.arange(1, 9)[None]).last_hidden_state
        assert torch.equal(network(**made.inputs).logits, reduced)
    with torch.no_grad():
        assert torch.equal(network.get_decoder()(input_ids=torch.arange(1, 9)[None]).last_hidden_state, text)


@torch.no_grad()
def test_an_interrupted_call_leaves_nothing_for_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    network, made = model("llava"), case("llava", "single")
    text = torch.arange(1, made.inputs["input_ids"].shape[1] + 1)[None]
    dense = network(input_ids=text).logits
    with adsc.compress(network, SCHEDULE):
        tower = network.model.vision_tower.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            network(**made.inputs)
        tower.remove()
        assert torch.equal(network(input_ids=text).logits, dense)


def test_a_removed_handle_leaves_a_later_one_alone():
    network = copy.deepcopy(model("llava"))
    with adsc.compress(network, SCHEDULE) as first:
        first.remove()
        second = adsc.attach(network, "2:1/2")
    assert network.adsc is second
    second.remove()
    assert not hasattr(network, "adsc")


def test_budgets_nest_and_end_with_an_error():
    def nested(handle):
        with handle.budget("1/2"):
            outer = handle.method
            with handle.budget(1):
                assert not handle.method.reduces
            assert handle.method is outer
            raise RuntimeError("mine")

    with adsc.compress(model("llava"), SCHEDULE) as handle:
        with pytest.raises(RuntimeError, match="mine"):
            nested(handle)
        assert str(handle.method.schedule) == SCHEDULE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickled_model_keeps_its_reduction(family):
    torch.manual_seed(0)
    network, made = TINY[family].build().eval(), case(family, "single")
    adsc.attach(network, SCHEDULE)
    loaded = pickle.loads(pickle.dumps(network))
    for each in (network, loaded):
        with torch.no_grad():
            assert torch.equal(each(**made.inputs).logits, network(**made.inputs).logits)
    loaded.adsc.remove()
    assert network.adsc.model is network
    with torch.no_grad():
        assert not torch.equal(loaded(**made.inputs).logits, network(**made.inputs).logits)
