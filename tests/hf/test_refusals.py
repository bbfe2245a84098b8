"""What cannot be served exactly is refused with one clear line, before any output."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, LlamaConfig

import adsc
from adsc.hf.families import family_of

from .test_support import smallest, with_sparse_layers
from .test_unknown import Shrinking, Silent, Stacked, UnknownConfig, Weighted
from .tiny import CORE, IMAGE, SCHEDULE, TEXT, Image, batch, case, clip, model
from .zoo.gemma import build_gemma4


def refuse(network, pattern):
    with pytest.raises(adsc.UnsupportedModelError, match=pattern) as caught:
        adsc.attach(network, SCHEDULE)
    assert "\n" not in str(caught.value)
    assert not hasattr(network, "adsc")
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_text_only_models():
    refuse(transformers.LlamaForCausalLM(LlamaConfig(**TEXT)), "text-only")


def test_cross_attention_models():
    text = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"intermediate_size": 16, "cross_attention_layers": [2]}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "image_size": 28}
    vision |= {"intermediate_size": 16, "vision_output_dim": 32, "intermediate_layers_indices": [0]}
    config = transformers.MllamaConfig(vision_config=vision, text_config=text)
    with torch.device("meta"):
        refuse(transformers.MllamaForConditionalGeneration(config), "cross-attention")


def test_encoder_decoder_models():
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
    refuse(transformers.T5ForConditionalGeneration(config), "encoder-decoder")


def llava_with(text) -> torch.nn.Module:
    config = transformers.LlavaConfig(
        vision_config=clip(10, 2), text_config=text, image_token_id=IMAGE, tie_word_embeddings=False
    )
    return transformers.LlavaForConditionalGeneration(config)


def test_linear_attention_inside_a_known_family():
    text = transformers.Qwen3NextConfig(**{**TEXT, "pad_token_id": 0})
    with torch.device("meta"):
        refuse(llava_with(text), "LinearAttentionLayer")


def test_compact_positions_without_rotary_embeddings():
    text = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 6, "ffn_dim": 16, "num_attention_heads": 2}
    network = llava_with(transformers.OPTConfig(**text, tie_word_embeddings=False))
    with pytest.raises(adsc.UnsupportedModelError, match="need one rotary embedding"):
        adsc.attach(network, adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), positions="compact"))


def test_compact_positions_with_frequencies_that_depend_on_the_length():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    network = llava_with(LlamaConfig(**TEXT, rope_parameters=rope))
    schedule = adsc.Schedule.parse(SCHEDULE)
    with pytest.raises(adsc.UnsupportedModelError, match="rope type dynamic"):
        adsc.attach(network, adsc.ADSCConfig(schedule, positions="compact"))
    adsc.attach(network, schedule).remove()


def test_attaching_twice():
    network = model("llava")
    with adsc.compress(network, SCHEDULE):
        for inner in (network, network.model):
            with pytest.raises(adsc.InputError, match="attached already"):
                adsc.attach(inner, SCHEDULE)
    with adsc.compress(network.model, SCHEDULE), pytest.raises(adsc.InputError, match="attached already"):
        adsc.attach(network, SCHEDULE)


@pytest.mark.parametrize(
    ("what", "pattern"),
    [("6:1/2", "the model has 6 layers"), ("half", "LAYER:FRACTION"), (3, "not a way to reduce"), (None, "not a way")],
)
def test_methods_that_do_not_fit(what, pattern):
    with pytest.raises(adsc.InputError, match=pattern):
        adsc.attach(model("llava"), what)
    assert not hasattr(model("llava"), "adsc")


def test_things_that_are_not_models():
    with pytest.raises(adsc.InputError, match="a Linear is not a transformers model"):
        adsc.attach(torch.nn.Linear(1, 1), SCHEDULE)


def test_budgets_out_of_reach():
    with adsc.compress(model("llava"), SCHEDULE) as handle:
        with pytest.raises(adsc.InputError, match="nearest"), handle.budget("1/500"):
            pass
        assert str(handle.method.schedule) == SCHEDULE


def test_caches_of_unknown_kind():
    class Other(DynamicCache):
        pass

    network, made = model("llava"), case("llava", "single")
    indexed = DynamicCache()
    indexed.layers.append(transformers.cache_utils.DynamicIndexedLayer())
    with adsc.compress(network, SCHEDULE):
        for cache, name in ((Other(), "a Other cannot be reduced"), (indexed, "DynamicIndexedLayer")):
            with pytest.raises(adsc.UnsupportedModelError, match=name):
                network(**made.inputs, past_key_values=cache)


def test_compact_positions_with_a_static_cache():
    config = adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), positions="compact")
    with adsc.compress(model("llava"), config), pytest.raises(adsc.InputError, match="static cache"):
        model("llava").generate(**case("llava", "single").inputs, max_new_tokens=2, cache_implementation="static")


def test_embeddings_without_ids():
    network, made = model("llava"), case("llava", "single")
    embeds = network.get_input_embeddings()(made.inputs["input_ids"])
    with adsc.compress(network, SCHEDULE) as handle:
        with pytest.raises(adsc.InputError, match="input_ids"):
            network(inputs_embeds=embeds, pixel_values=made.inputs["pixel_values"])
        with pytest.raises(adsc.InputError, match="pass input_ids"):
            network(inputs_embeds=embeds)
        with pytest.raises(ValueError, match="exactly one"):
            network()
        with handle.budget(1):
            network(inputs_embeds=embeds)


def test_inputs_that_do_not_belong_together():
    made = case("llava", "several_images")
    with adsc.compress(model("llava"), SCHEDULE):
        two = dict(made.inputs, pixel_values=made.inputs["pixel_values"][:2])
        with pytest.raises(adsc.InputError, match="75 image placeholders for 2 images"):
            model("llava")(**two)
        hidden = dict(made.inputs, attention_mask=made.inputs["attention_mask"].clone())
        hidden["attention_mask"][0, 10] = 0
        with pytest.raises(adsc.InputError, match="padding only"):
            model("llava")(**hidden)
    for family, missing in (("llava_next", "image_sizes"), ("qwen2_5_vl", "image_grid_thw")):
        inputs = {k: v for k, v in case(family, "single").inputs.items() if k != missing}
        with adsc.compress(model(family), SCHEDULE), pytest.raises(adsc.InputError, match=missing):
            model(family)(**inputs)
    uneven = batch("llava", [[3, Image(), 4, Image(), 5], [20, Image(), 2]])
    ids = uneven.inputs["input_ids"]
    ids[0, uneven.spans[0][0][0]] = 9  # the first row one placeholder short, the second one too many
    ids[1, -1] = IMAGE
    with adsc.compress(model("llava"), SCHEDULE), pytest.raises(adsc.InputError, match="spread over rows 0 and 1"):
        model("llava")(**uneven.inputs)


def test_chunked_prefill():
    made = case("llava", "single")
    with adsc.compress(model("llava"), SCHEDULE), pytest.raises(adsc.InputError, match=r"prefill_chunk_size|no pixel"):
        model("llava").generate(**made.inputs, max_new_tokens=2, prefill_chunk_size=8)


@pytest.mark.parametrize("family", CORE)
def test_placeholders_without_images(family):
    ids = case(family, "single").inputs["input_ids"]
    with adsc.compress(model(family), SCHEDULE) as handle:
        with pytest.raises(adsc.InputError, match=r"placeholders \(image_token_id\) but no pixel_values"):
            model(family)(input_ids=ids)
        with handle.budget(1):
            model(family)(input_ids=ids)  # off is dense, whatever dense does


# The page: each line on it is raised in one of the situations below, and each situation's line is on it.
PAGE = (Path(__file__).parents[2] / "docs" / "refused.md").read_text()
SITUATIONS: list[Callable[[], Any]] = []


def situation(function: Callable[[], Any]) -> Callable[[], Any]:
    SITUATIONS.append(function)
    return function


for name in ("mllama", "git", "florence2", "qwen3_5", "mistral_large4", "gemma3n", "unlimited_ocr", "diffusion_gemma"):
    if name in transformers.CONFIG_MAPPING:
        SITUATIONS.append(lambda name=name: family_of(smallest(name)))


def call(family: str, what: str = "single", positions: str = "original", **changed: Any) -> Any:
    """Call a family's model; entries that are ``None`` are left out."""
    inputs = {name: value for name, value in (case(family, what).inputs | changed).items() if value is not None}
    with adsc.compress(model(family), adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), positions=positions)):
        return model(family)(**inputs)


def with_attention(family: str, implementation: str, **changed: Any) -> Any:
    network, made = copy.deepcopy(model(family)), case(family, "single")
    network.config.text_config._attn_implementation = implementation
    with adsc.compress(network, SCHEDULE):
        return network(**made.inputs | changed)


@situation
def shared_keys_and_values():
    adsc.attach(build_gemma4(num_kv_shared_layers=2), SCHEDULE)


@situation
def sparse_layers():
    family_of(with_sparse_layers().config)


@situation
def no_placeholder():
    family_of(UnknownConfig(image_token_id=None))


@situation
def no_list_of_layers():
    text = {"vocab_size": 64, "n_embd": 16, "n_layer": 6, "n_head": 2}
    adsc.attach(llava_with(transformers.GPT2Config(**text, tie_word_embeddings=False)), SCHEDULE)


def llava_of(layer: type | None = None, decoder: type | None = None) -> torch.nn.Module:
    network = copy.deepcopy(model("llava"))
    network.config.model_type = UnknownConfig.model_type
    network.model.language_model.__class__ = decoder or type(network.model.language_model)
    for each in network.model.language_model.layers:
        each.__class__ = layer or type(each)
    return network


@situation
def something_unknown_for_each_token():
    made = case("llava", "single")
    with adsc.compress(llava_of(layer=Weighted), SCHEDULE) as handle:
        handle.model(**made.inputs, token_weights=torch.ones(made.inputs["input_ids"].shape))


@situation
def no_keywords():
    with adsc.compress(llava_of(decoder=Silent), SCHEDULE) as handle:
        handle.model(**case("llava", "single").inputs)


@situation
def a_layer_that_drops_tokens():
    with adsc.compress(llava_of(layer=Shrinking), SCHEDULE) as handle:
        handle.model(**case("llava", "single").inputs)


@situation
def hidden_states_that_change_between_layers():
    with adsc.compress(llava_of(decoder=Stacked), SCHEDULE) as handle:
        handle.model(**case("llava", "text_beside_image").inputs)


@situation
def far_into_llama_4():
    network = copy.deepcopy(model("llama4"))
    network.config.text_config.floor_scale = 16
    with adsc.compress(network, SCHEDULE):
        network(**case("llama4", "single").inputs)


@situation
def a_cache_of_its_own_kind():
    class MyCache(DynamicCache):
        pass

    call("llava", past_key_values=MyCache())


@situation
def a_cache_of_indexed_layers():
    cache = DynamicCache()
    cache.layers.append(transformers.cache_utils.DynamicIndexedLayer())
    call("llava", past_key_values=cache)


@situation
def a_cache_of_other_rows():
    cache = call("llava").past_key_values
    call("llava", "left_padding", past_key_values=cache, pixel_values=None, attention_mask=None)


@situation
def a_cache_without_its_method():
    model("llava")(input_ids=torch.tensor([[5]]), past_key_values=call("llava").past_key_values)


@situation
def a_cache_that_is_uneven():
    cache = call("llava").past_key_values
    with contextlib.suppress(adsc.InputError):
        model("llava")(input_ids=torch.tensor([[5]]), past_key_values=cache)
    call("llava", past_key_values=cache)


@situation
def a_cache_of_other_positions():
    cache = call("llava", "no_mask").past_key_values
    call("llava", "no_mask", positions="compact", past_key_values=cache)


@situation
def a_cache_that_is_cut():
    call("llava").past_key_values.crop(-20)


@situation
def compact_positions_in_a_static_cache():
    cache = transformers.StaticCache(config=model("llava").config, max_cache_len=64)
    call("llava", positions="compact", past_key_values=cache)


@situation
def compact_positions_without_rotary():
    text = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 6, "ffn_dim": 16, "num_attention_heads": 2}
    network = llava_with(transformers.OPTConfig(**text, tie_word_embeddings=False))
    adsc.attach(network, adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), positions="compact"))


@situation
def compact_positions_of_a_growing_rope():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    network = llava_with(LlamaConfig(**TEXT, rope_parameters=rope))
    adsc.attach(network, adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), positions="compact"))


SITUATIONS += [
    partial(with_attention, "llava", "my_attention"),
    partial(with_attention, "gemma3", "flash_attention_2"),
    partial(with_attention, "llava", "flash_attention_2", position_ids=2 * torch.arange(35)[None]),
    partial(call, "llava", input_ids=None, inputs_embeds=torch.zeros(1, 35, 48)),
    partial(call, "llava", input_ids=None, pixel_values=None, inputs_embeds=torch.zeros(1, 35, 48)),
    partial(call, "llava", pixel_values=None),
    partial(call, "llava", "several_images", pixel_values=torch.zeros(2, 3, 10, 10)),
    partial(call, "llava_next", image_sizes=None),
    partial(call, "qwen2_5_vl", image_grid_thw=None),
    partial(call, "llava", attention_mask=(torch.arange(35) != 10).long()[None]),
]


@situation
def images_over_rows():
    made = batch("llava", [[3, Image(), 4, Image(), 5], [20, Image(), 2]])
    ids = made.inputs["input_ids"]
    ids[0, made.spans[0][0][0]], ids[1, -1] = 9, IMAGE
    call("llava", **made.inputs)


@situation
def markers_in_an_unknown_family():
    known = model("llava").config.to_dict() | {"model_type": UnknownConfig.model_type}
    ids = torch.full((1, 40), 9)
    ids[0, 3:13] = ids[0, 14:29] = IMAGE
    with adsc.compress(transformers.LlavaForConditionalGeneration(UnknownConfig(**known)), SCHEDULE) as handle:
        handle.model(input_ids=ids, pixel_values=torch.zeros(1, 3, 10, 10))


@situation
def prefill_in_chunks():
    with adsc.compress(model("llava_next"), SCHEDULE) as handle:
        handle.model.generate(**case("llava_next", "single").inputs, max_new_tokens=2, prefill_chunk_size=8)


@situation
def attached_twice():
    with adsc.compress(model("llava"), SCHEDULE):
        adsc.attach(model("llava"), SCHEDULE)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="the lines are those of a newer version"
)
def test_the_page_of_what_is_refused():
    raised = []
    for each in SITUATIONS:
        with torch.no_grad(), pytest.raises(adsc.InputError) as caught:
            each()
        raised.append(str(caught.value))
    assert sorted(raised) == sorted(re.findall(r"^> `(.*)`$", PAGE, re.MULTILINE))
