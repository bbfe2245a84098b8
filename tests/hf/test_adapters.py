"""PEFT adapters, put on before or after a method is attached."""

from __future__ import annotations

import copy

import pytest
import torch

import adsc

from .oracle import decoder_of, difference, kept_positions, masked_dense
from .test_cache import GREEDY, STEPS, recomputed
from .tiny import CORE, IMAGE, SCHEDULE, VIDEO, case, model

FAMILIES = [*CORE, "gemma3", "qwen3_vl"]
EXACT, APART = 1e-5, 1e-3
# PEFT asks for it by its name of 5.16.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def logits(network, made) -> torch.Tensor:
    with torch.no_grad():
        return network(**made.inputs).logits


def lora(network, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "up_proj"]
    # As created, adapters add nothing; these do.
    return peft.get_peft_model(
        network, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    )


@pytest.fixture(params=["attached before", "attached to the PEFT model", "attached to the model inside"])
def adapted(request):
    """Makes a model with LoRA weights and a reduction, in one order or another."""

    def make(family, **options):
        network = copy.deepcopy(model(family))
        if request.param == "attached before":
            handle = adsc.attach(network, SCHEDULE)
            return lora(network, **options).eval(), handle
        around = lora(network, **options).eval()
        return around, adsc.attach(network if request.param.endswith("inside") else around, SCHEDULE)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters(family, adapted):
    made = case(family, "left_padding")
    kept, plain = kept_positions(made), logits(model(family), made)
    around, handle = adapted(family, task_type="CAUSAL_LM")
    assert around.adsc is handle
    reduced = logits(around, made)
    with around.disable_adapter():
        without = logits(around, made)
    tokens = around.generate(**made.inputs, **GREEDY)[:, -STEPS:]
    handle.remove()
    inside = around.get_base_model()
    assert difference(reduced, masked_dense(inside, made.inputs, kept), kept[-1]) <= EXACT
    assert torch.equal(tokens, recomputed(inside, made)[0])
    assert difference(without, masked_dense(model(family), made.inputs, kept), kept[-1]) <= EXACT
    dense = logits(around, made)
    assert min(difference(reduced, other, kept[-1]) for other in (dense, without)) >= APART
    assert not hasattr(around, "adsc")
    with around.disable_adapter():
        assert torch.equal(logits(around, made), plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_adapters_are_trained(family, task, adapted):
    """PEFT calls ``forward`` and passes hooks by: labels are masked all the same."""
    made = case(family, "left_padding")
    ids, mask = made.inputs["input_ids"], made.inputs["attention_mask"].bool()
    before = torch.nn.functional.pad(mask, (1, 0), value=True)[:, :-1]  # nothing predicts the token after padding
    labels = ids.masked_fill(~mask | ~before | torch.isin(ids, torch.tensor([IMAGE, VIDEO])), -100)
    around, handle = adapted(family, task_type=task)
    around(**made.inputs, labels=ids).loss.backward()
    found = {name: weight.grad for name, weight in around.named_parameters() if weight.requires_grad}
    handle.remove()
    inside = around.get_base_model()
    around.zero_grad()
    expected = masked_dense.__wrapped__(inside, made.inputs, kept_positions(made))
    inside.loss_function(logits=expected, labels=labels, vocab_size=expected.shape[-1]).backward()
    assert sum("lora" in name for name in found) == len(found) >= 36
    largest = max(weight.grad.abs().max() for weight in around.parameters() if weight.grad is not None)
    for name, weight in around.named_parameters():
        if weight.grad is not None:
            assert (weight.grad - found[name]).abs().max() <= 1e-5 * largest, name


def test_merged_adapters(adapted):
    made = case("llava", "left_padding")
    around, handle = adapted("llava")
    reduced = logits(around, made)
    merged = around.merge_and_unload()
    assert merged.adsc is handle
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (logits(merged, made) - reduced).abs().max() <= EXACT
    handle.remove()
    assert (logits(merged, made) - reduced).abs().max() >= APART


def test_nothing_stays_on_adapted_models(adapted):
    def state(around) -> list:
        hooks = [(name, list(module._forward_pre_hooks), list(module._forward_hooks)) for name, module in around]
        return [hooks, [sorted(vars(module)) for _, module in around]]

    around, handle = adapted("llava")
    clean = lora(copy.deepcopy(model("llava"))).eval()
    handle.remove()
    modules = [list(each.named_modules()) for each in (around, clean)]
    assert state(modules[0]) == state(modules[1])


def test_a_copy_of_an_adapted_model(adapted):
    made = case("llava", "single")
    around, handle = adapted("llava")
    reduced, other = logits(around, made), copy.deepcopy(around)
    assert other.adsc.model is other.get_base_model() is not around.get_base_model()
    handle.remove()
    dense = logits(around, made)
    assert not torch.equal(dense, reduced)
    assert torch.equal(logits(other, made), reduced)
    other.adsc.remove()
    assert torch.equal(logits(other, made), dense)


def test_learned_prefixes():
    """They stand in the cache, where every layer holds them; learned prompts hide which embeddings are images."""
    peft = pytest.importorskip("peft")
    made, kept = case("llava", "single"), kept_positions(case("llava", "single"))
    sizes = {"num_virtual_tokens": 3, "num_layers": 6, "task_type": "CAUSAL_LM"}
    prefix = peft.PrefixTuningConfig(**sizes, token_dim=24, num_attention_heads=2)  # of keys: there are two heads
    prompt = peft.PromptTuningConfig(**sizes, token_dim=48, num_attention_heads=4)
    around = peft.get_peft_model(copy.deepcopy(model("llava")), prefix).eval()
    for weight in around.prompt_encoder.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    with adsc.compress(around, SCHEDULE):
        reduced = logits(around, made)

    def hook(places):
        def swap(module, args, kwargs):
            mask = kwargs["attention_mask"].expand(1, 1, -1, -1).clone()
            dropped = torch.ones(mask.shape[-1], dtype=torch.bool)
            dropped[[0, 1, 2, *(place + 3 for place in places)]] = False
            own = mask[0, 0].diagonal(3).clone()
            mask[..., dropped] = torch.finfo(torch.float32).min
            mask[0, 0].diagonal(3).copy_(own)
            return args, {**kwargs, "attention_mask": mask}

        return swap

    around.get_base_model().set_attn_implementation("eager")
    dense = logits(around, made)
    for index, layer in enumerate(decoder_of(around.get_base_model()).layers):
        layer.register_forward_pre_hook(hook(kept[index][0]), with_kwargs=True)
    assert difference(reduced, logits(around, made), kept[-1]) <= EXACT
    assert difference(reduced, dense, kept[-1]) >= APART
    around = peft.get_peft_model(copy.deepcopy(model("llava")), prompt).eval()
    with adsc.compress(around, SCHEDULE), pytest.raises(adsc.InputError, match="images came without input_ids"):
        around(**made.inputs)
