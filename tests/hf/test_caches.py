"""Every cache of transformers: exact or refused, and each layer's storage is that of what its stage holds."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack
from functools import cache as once
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache, MistralConfig, QuantizedCache, StaticCache

import adsc

from .oracle import attention, decoder_of, kept_positions
from .test_cache import GREEDY, OLD, STEPS, longest, recomputed, storage_tokens
from .tiny import CORE, IMAGE, LAYERS, SCHEDULE, TEXT, TINY, Batch, batch, case, clip, model

RETURN = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
# Sliding windows in some layers (with images that look both ways; shorter than an image) and in all of them.
NONE = 10**6
WINDOWS = {
    "llava": [NONE] * LAYERS,
    "gemma3": [16, 16, NONE] * 2,
    "cohere2_vision": [8, 8, 8, NONE, 8, 8],
    "mistral": [16] * LAYERS,
}


@once
def mistral() -> torch.nn.Module:
    """LLaVA with a window in every layer."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=clip(10, 2),
        text_config=MistralConfig(**TEXT, head_dim=12, sliding_window=16),
        image_token_id=IMAGE,
    )
    made = transformers.LlavaForConditionalGeneration(config).eval()
    made.generation_config.pad_token_id = 0
    return made


def network_of(family: str) -> torch.nn.Module:
    """A model, without what transformers remembers on it: how long static caches were."""
    if OLD and family == "gemma3":
        pytest.skip("dense or not, it fails on static caches and in later turns in this version of transformers")
    network = mistral() if family == "mistral" else model(family)
    network.__dict__.pop("_previous_max_cache_length", None)
    return network


def inputs_of(family: str) -> str:
    return "llava" if family == "mistral" else family


def conversation(family: str, turns: list[list[list]]) -> tuple[list[Batch], list[tuple[int, int]], list]:
    """Turns, where each lies, and which positions are kept.

    A turn is rows of equal length. True stands for an image, −n for a text that is longer than one by n.
    """
    tiny = TINY[inputs_of(family)]
    image, length = tiny.images[0], len(tiny.ids(tiny.images[0]))
    made, bounds, kept = [], [0], [[[] for _ in turns[0]] for _ in range(LAYERS)]
    for seed, rows in enumerate(turns):
        rows = [[image if item is True else item if item > 0 else length - item for item in row] for row in rows]
        made.append(batch(inputs_of(family), rows, seed=seed, mask=False))
        for whole, new in zip(kept, kept_positions(made[-1]), strict=True):
            for row, places in zip(whole, new, strict=True):
                row += [bounds[-1] + place for place in places]
        bounds.append(bounds[-1] + made[-1].inputs["input_ids"].shape[1])
    return made, list(pairwise(bounds)), kept


@torch.no_grad()
def expected_of(network, made: list[Batch], kept) -> list[torch.Tensor]:
    """Logits of each turn on a dense cache of everything, with dropped tokens masked as keys."""
    past = 0

    def hook(layer):
        def swap(module, args, kwargs):
            lowest = torch.finfo(torch.float32).min
            mask = kwargs["attention_mask"].expand(len(kept[layer]), -1, -1, -1).clone()
            for row, places in enumerate(kept[layer]):
                dropped = [place for place in range(mask.shape[-1]) if place not in places]
                own = torch.diagonal(mask[row, 0], past).clone()
                mask[row, 0, :, dropped] = lowest
                torch.diagonal(mask[row, 0], past).copy_(own)
            kwargs["attention_mask"] = mask
            return args, kwargs

        return swap

    cache, logits = DynamicCache(), []
    with attention(network, "eager"), ExitStack() as hooks:
        for index, layer in enumerate(decoder_of(network).layers):
            hooks.callback(layer.register_forward_pre_hook(hook(index), with_kwargs=True).remove)
        for turn in made:
            logits.append(network(**turn.inputs, past_key_values=cache).logits)
            past += turn.inputs["input_ids"].shape[1]
    return logits


def check(network, made: list[Batch], bounds, kept, cache, expected=None) -> None:
    """Every turn on a cache is exact. With ``kept`` longer than the turns, the rest is decoded by others."""
    expected = expected_of(network, made, kept) if expected is None else expected
    for turn, (start, stop), right in zip(made, bounds, expected, strict=True):
        logits = network(**turn.inputs, past_key_values=cache).logits
        for row, places in enumerate(kept[-1]):
            seen = [place - start for place in places if start <= place < stop]
            assert (logits[row, seen] - right[row, seen]).abs().max() <= 1e-5


def dynamic(network) -> DynamicCache:
    return DynamicCache(config=network.config.get_text_config())


def static(network, length: int = 100) -> StaticCache:
    return StaticCache(config=network.config.get_text_config(), max_cache_len=length)


# Turns of rows. They decode until every image has left the windows, and go on behind that.
TURNS = {
    "image_then_text": [[[4, True, 6]], [[5]], [[1]], [[14]], [[1]]],
    "text_then_image": [[[9]], [[3, True, 5]], [[1]], [[4]], [[1]]],
    "long_text_then_image": [[[20]], [[2, True, 1]], [[1]], [[1]]],
    "image_in_each_turn": [[[2, True, 1]], [[1]], [[1, True, 1]], [[1]], [[20]], [[1]]],
    "text_beside_image": [[[4, True, 3], [-7]], [[1], [1]], [[5], [5]], [[1], [1]]],
}


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("kind", [dynamic, static])
@pytest.mark.parametrize("family", WINDOWS)
def test_turns(family, kind, turns):
    network = network_of(family)
    made, bounds, kept = conversation(family, TURNS[turns])
    cache = kind(network)
    with torch.no_grad():
        expected = expected_of(network, made, kept)
        with adsc.compress(network, SCHEDULE):
            check(network, made, bounds, kept, cache, expected)
    full = longest(kept)
    if kind is static:
        first = longest(kept_positions(made[0]))
        full = [100 - first[0] + count for count in first]
    assert storage_tokens(cache) == list(map(min, full, WINDOWS[family]))


def generated(network, made: Batch, **options) -> tuple[torch.Tensor, list[torch.Tensor], object]:
    """Greedy tokens, their logits, and the cache."""
    out = network.generate(**made.inputs, **GREEDY, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, made.inputs["input_ids"].shape[1] :], out.logits, out.past_key_values


def same(found, expected) -> None:
    """Tokens and logits."""
    assert torch.equal(found[0], expected[0])
    assert max((a - b).abs().max() for a, b in zip(found[1], expected[1], strict=True)) <= 1e-5


def allocated(made: Batch, capacity: int) -> list[int]:
    """The storage of static layers: what is dropped from a prompt is not allocated."""
    counts = longest(kept_positions(made))
    return [capacity, *(capacity - made.inputs["input_ids"].shape[1] + count for count in counts[1:])]


@pytest.mark.parametrize("name", ["single", "left_padding", "text_beside_image"])
@pytest.mark.parametrize("family", [*CORE, "gemma3", "qwen3_vl"])
def test_generate_with_a_static_cache(family, name):
    network, made = network_of(family), case(family, name)
    expected = recomputed(network, made)
    with adsc.compress(network, SCHEDULE):
        found = generated(network, made, cache_implementation="static")
    same(found, expected)
    rows = allocated(made, made.inputs["input_ids"].shape[1] + STEPS - 1)
    assert storage_tokens(found[2]) == list(map(min, rows, WINDOWS.get(family, [NONE] * LAYERS)))


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_static_generate_again_and_again(family):
    """Shorter and longer prompts, text alone, and the model without a method, each as on a dynamic cache."""
    network = network_of(family)
    image = TINY[family].images[0]
    prompts = [batch(family, [row]) for row in ([4, image, 6], [2, image, 1], [9], [5, image, 3, image, 4])]
    with adsc.compress(network, SCHEDULE):
        for made in prompts:
            same(generated(network, made, cache_implementation="static"), generated(network, made))
    for made in prompts[::2]:
        same(generated(network, made, cache_implementation="static"), generated(network, made))


def test_beams_on_a_static_cache():
    network, made = network_of("llava"), case("llava", "left_padding")
    if OLD:  # it mixes up the images of rows with several of them, dense or not
        images = TINY["llava"].images
        made = batch("llava", [[3, images[0], 5], [4, images[1], 3]])
    options = dict(GREEDY, num_beams=3)
    with adsc.compress(network, SCHEDULE):
        expected = network.generate(**made.inputs, **options)
        assert torch.equal(network.generate(**made.inputs, **options, cache_implementation="static"), expected)


PROMPTS = [[[9]], [[3, True, 5]], [[1]]], [[[30]], [[1]]], [[[4, True, 3, True, 2]], [[1]]], [[[1, True, 1]]]


@pytest.mark.parametrize("first", [0, -1], ids=["text_first", "image_first"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "mistral"])
def test_a_static_cache_is_used_again(family, first):
    """After a reset it serves another prompt, and allocates what that one needs."""
    network = network_of(family)
    cache = static(network)
    for turns in PROMPTS if first == 0 else PROMPTS[::-1]:
        made, bounds, kept = conversation(family, turns)
        with torch.no_grad():
            expected = expected_of(network, made, kept)
            with adsc.compress(network, SCHEDULE):
                check(network, made, bounds, kept, cache, expected)
        assert storage_tokens(cache) == list(map(min, allocated(made[0], 100), WINDOWS[family]))
        cache.reset()
    made, bounds, kept = conversation(family, [[[60]], [[30]], [[1]]])
    with torch.no_grad():  # dense again, without a method
        check(network, made, bounds, kept, cache)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_static_cache_made_in_advance(family):
    network = network_of(family)
    cache, config = static(network), network.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, config.num_key_value_heads, width, torch.float32, torch.device("cpu"))
    made, bounds, kept = conversation(family, [[[4, True, 6]], [[1]]])
    with torch.no_grad():
        expected = expected_of(network, made, kept)
        with adsc.compress(network, SCHEDULE):
            check(network, made, bounds, kept, cache, expected)
    assert storage_tokens(cache) == list(map(min, allocated(made[0], 100), WINDOWS[family]))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "positions"), [(static, "original"), (dynamic, "original"), (dynamic, "compact")])
def test_a_mask_for_tokens_to_come(kind, positions):
    network, made = network_of("llava"), case("llava", "left_padding")
    mask, text = made.inputs["attention_mask"], torch.randint(1, IMAGE, (3, 2))
    longer = torch.cat((mask, torch.ones(3, 2, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long)), 1)
    found = []
    with adsc.compress(network, adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), positions=positions)):
        for masks in ((mask, longer[:, :-4]), (longer, longer)):
            cache = kind(network)
            first = network(**{**made.inputs, "attention_mask": masks[0]}, past_key_values=cache)
            second = network(input_ids=text, attention_mask=masks[1], past_key_values=cache)
            found.append((first.logits[:, -1], second.logits))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_full_static_cache_is_an_error(family):
    network, made = network_of(family), batch(family, [[4, TINY[family].images[0], 6]])
    length = made.inputs["input_ids"].shape[1]
    cache, token = static(network, length + 2), torch.tensor([[5]])
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        network(**made.inputs, past_key_values=cache)
        network(input_ids=token, past_key_values=cache)
        network(input_ids=token, past_key_values=cache)
        with pytest.raises((IndexError, RuntimeError)):
            network(input_ids=token, past_key_values=cache)


def test_windows_wider_than_a_static_cache():
    """Their layers are allocated at their stage's length as well."""
    network = copy.deepcopy(network_of("gemma3"))
    network.config.text_config.sliding_window = 64
    made, bounds, kept = conversation("gemma3", [[[4, True, 6]], [[5]], [[1]], [[1]]])
    cache = static(network, 50)
    with torch.no_grad():
        expected = expected_of(network, made, kept)
        with adsc.compress(network, SCHEDULE):
            check(network, made, bounds, kept, cache, expected)
    assert storage_tokens(cache) == allocated(made[0], 50)
    made, bounds, kept = conversation("gemma3", [[[4, True, 25]], [[5]], [[1]], [[1]], [[20]], [[1]]])  # 64 and more
    cache = static(network, 85)
    with torch.no_grad():
        expected = expected_of(network, made, kept)
        with adsc.compress(network, SCHEDULE):
            check(network, made, bounds, kept, cache, expected)
    assert storage_tokens(cache) == list(map(min, allocated(made[0], 85), [64, 64, NONE] * 2))


def test_attention_weights_on_a_static_cache():
    network = network_of("llava")
    made, _, _ = conversation("llava", [[[4, True, 6]], [[2, True, 3]], [[2]]])
    cache = static(network, 80)
    with attention(network, "eager"), torch.no_grad(), adsc.compress(network, SCHEDULE):
        for turn in made:
            weights = network(**turn.inputs, past_key_values=cache, output_attentions=True).attentions
            assert {layer.shape[2:] for layer in weights} == {(turn.inputs["input_ids"].shape[1], 80)}


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


def quantized(network, **options) -> QuantizedCache:
    """Quantizes groups of one head of one token."""
    if options["backend"] == "quanto":
        extension = pytest.importorskip("optimum.quanto.library.extensions.extension").get_extension("quanto_cpp")
        if extension._lib is None:  # what it would have a compiler build first
            extension._lib = SimpleNamespace(unpack=unpacked)
        options |= {"q_group_size": 12}
    elif not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("not in this version of transformers")
    return QuantizedCache(config=network.config.get_text_config(), **options)


def quantized_bytes(layer) -> int:
    """What the quantized keys take, with their scales."""
    keys = layer._quantized_keys
    if isinstance(keys, tuple):
        return keys[0].untyped_storage().nbytes()
    parts = (keys._data._data, keys._scale, keys._shift)  # packed
    return sum(part.untyped_storage().nbytes() for part in parts)


QUANTIZED = {
    "4_bits": {"backend": "quanto", "nbits": 4, "residual_length": 128},
    "2_bits": {"backend": "quanto", "nbits": 2, "residual_length": 128},
    "quantized_again": {"backend": "quanto", "nbits": 4, "residual_length": 3},
    "fp8": {"backend": "fp8"},
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized(name):
    """Decoding is what transformers' own layers make of the kept keys and values, given them from the start."""
    network, made = network_of("llava"), case("llava", "single")
    cache, expected = quantized(network, **QUANTIZED[name]), quantized(network, **QUANTIZED[name])
    with attention(network, "eager"), adsc.compress(network, SCHEDULE):
        tokens, logits, _ = generated(network, made, past_key_values=cache)
        with torch.no_grad():
            kept = network(**made.inputs)
    assert (logits[0] - kept.logits[:, -1]).abs().max() <= 1e-6  # the prompt itself is not quantized
    for layer, whole in zip(expected.layers, kept.past_key_values.layers, strict=True):
        layer.update(whole.keys, whole.values)
    plain = [row[0] for row in kept_positions(made)]
    assert [layer.get_seq_length() for layer in expected.layers] == list(map(len, plain))
    hooks = [  # a row that sees all there is needs no mask, whatever the length of a layer
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
        )
        for layer in decoder_of(network).layers
    ]
    with attention(network, "eager"), torch.no_grad():
        for step in range(STEPS - 1):
            position = torch.tensor([[made.inputs["input_ids"].shape[1] + step]])
            out = network(input_ids=tokens[:, step : step + 1], position_ids=position, past_key_values=expected)
            assert (out.logits[:, -1] - logits[step + 1]).abs().max() <= 1e-5
    for hook in hooks:
        hook.remove()
    assert list(map(quantized_bytes, cache.layers)) == list(map(quantized_bytes, expected.layers))
    assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in expected.layers]


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_in_a_ragged_batch(name):
    """Close to the plain cache, the closer the more bits."""
    network, made = network_of("llava"), case("llava", "left_padding")
    with adsc.compress(network, SCHEDULE):
        _, right, _ = generated(network, made)
        _, found, cache = generated(network, made, past_key_values=quantized(network, **QUANTIZED[name]))
    assert (right[0] - found[0]).abs().max() <= 1e-6
    assert [layer.get_seq_length() for layer in cache.layers] == [
        made.inputs["input_ids"].shape[1] + STEPS - 1
    ] * LAYERS
    error = (right[1] - found[1]).abs().max() / right[1].std()
    assert 1e-4 < error <= (1 if name == "2_bits" else 0.2)
    layer = cache.layers[-1]
    for change in ("crop", -1), ("batch_select_indices", torch.tensor([0])), ("batch_repeat_interleave", 2):
        with pytest.raises(adsc.InputError, match="quantized cache cannot be"):
            getattr(layer, change[0])(change[1])


@pytest.mark.parametrize("name", ["dynamic", "static", "4_bits", "fp8"])
@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2, 0]], ids=str)
def test_rows_change_places(name, rows):
    """As beam search does it: decoding goes on in each row as it would have in the one that it was."""
    network, made = network_of("llava"), case("llava", "left_padding")
    order, mask = torch.tensor(rows), torch.nn.functional.pad(made.inputs["attention_mask"], (0, 1), value=1)
    token, positions = torch.tensor([[5], [6], [7]]), mask.sum(1, keepdim=True) - 1
    kinds = {"dynamic": dynamic, "static": static}
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        right, cache = [kinds[name](network) if name in kinds else quantized(network, **QUANTIZED[name]) for _ in "ab"]
        for each in (right, cache):
            network(**made.inputs, past_key_values=each)
        if OLD and name not in kinds:
            with pytest.raises(adsc.InputError, match="beam search"):  # layer 0, transformers' own, fails as well
                cache.layers[-1].reorder_cache(order)
            return
        for step in range(3):
            inputs = {"input_ids": token + step, "attention_mask": mask, "position_ids": positions}
            expected = network(**inputs, past_key_values=right).logits[order]
            if step == 0:
                cache.reorder_cache(order)
            inputs = {key: value[order] for key, value in inputs.items()}
            logits = network(**inputs, past_key_values=cache).logits
            assert (logits - expected).abs().max() <= 1e-5
            mask, positions = torch.nn.functional.pad(mask, (0, 1), value=1), positions + 1
    assert (expected[0] - expected[1]).abs().max() > 0.1 or rows[0] == rows[1]


def test_rows_are_picked_and_repeated():
    network, made = network_of("llava"), case("llava", "left_padding")
    mask = torch.nn.functional.pad(made.inputs["attention_mask"], (0, 1), value=1)
    inputs = {
        "input_ids": torch.tensor([[5], [6], [7]]),
        "attention_mask": mask,
        "position_ids": mask.sum(1, keepdim=True) - 1,
    }
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        caches = [network(**made.inputs).past_key_values for _ in range(3)]
        expected = network(**inputs, past_key_values=caches[0]).logits
        rows = torch.tensor([2, 0])
        caches[1].batch_select_indices(rows)
        picked = network(**{name: value[rows] for name, value in inputs.items()}, past_key_values=caches[1]).logits
        assert (picked - expected[rows]).abs().max() <= 1e-5
        for _ in range(2):
            caches[2].batch_repeat_interleave(2)
        rows = torch.arange(3).repeat_interleave(4)
        repeated = network(**{name: value[rows] for name, value in inputs.items()}, past_key_values=caches[2]).logits
        assert (repeated - expected[rows]).abs().max() <= 1e-5


@pytest.mark.parametrize("turns", ["image_then_text", "text_then_image", "image_in_each_turn"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "cohere2_vision", "mistral"])
def test_rejected_candidates_leave_no_trace(family, turns):
    """Assisted decoding feeds guesses and crops them, with windows that remember what left them meanwhile."""
    network = network_of(family)
    made, bounds, kept = conversation(family, TURNS[turns])
    cache = dynamic(network)
    cache.activate_past_recording()
    with torch.no_grad():
        expected = expected_of(network, made, kept)
        with adsc.compress(network, SCHEDULE):
            for turn in zip(made, bounds, expected, strict=True):
                check(network, *([part] for part in turn[:2]), kept, cache, [turn[2]])
                cache.crop(0)
                for count in (1, 4):
                    network(input_ids=torch.arange(7, 7 + count)[None], past_key_values=cache)
                    cache.crop(-count)
    assert storage_tokens(copied(cache)) == list(map(min, longest(kept), [width - 1 for width in WINDOWS[family]]))


def copied(cache):
    """With storage of its own where layers are views."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    return cache


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_prompt_look_up_with_windows(family):
    network, tiny = network_of(family), TINY[inputs_of(family)]
    made = batch(inputs_of(family), [[12, tiny.images[0], 6]])
    made.inputs["input_ids"][0, -6:] = made.inputs["input_ids"][0, :6]  # a phrase to go on with
    options, fed = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}, []
    with adsc.compress(network, SCHEDULE):
        alone = network.generate(**made.inputs, **options)
        hook = network.model.register_forward_pre_hook(lambda *call: fed.append(call[2]["input_ids"]), with_kwargs=True)
        assert torch.equal(network.generate(**made.inputs, **options, prompt_lookup_num_tokens=4), alone)
        hook.remove()
    assert any(ids.shape[1] > 1 for ids in fed[1:])


@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("kind", [dynamic, static])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_copies(family, kind, copying):
    """A copy and what it was made of go on apart."""
    network = network_of(family)
    made, bounds, kept = conversation(family, [[[4, True, 6]], [[5]], [[1]]])
    cache = kind(network)
    with torch.no_grad():
        expected = expected_of(network, made, kept)
        with adsc.compress(network, SCHEDULE):
            check(network, made[:1], bounds[:1], kept, cache, expected[:1])
            other = copying(cache)
            network(input_ids=torch.tensor([[9, 8, 7]]), past_key_values=cache)
            check(network, made[1:], bounds[1:], kept, other, expected[1:])
    assert len({id(layer.held) for layer in other.layers[2:4]}) == 1  # a stage still shares what it holds


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_layers_are_moved_between_steps(family):
    """What offloading does with each layer, on a machine without a second device."""
    network = network_of(family)
    made, bounds, kept = conversation(family, [[[4, True, 6]], [[5]], [[1]]])
    cache = dynamic(network)
    with torch.no_grad():
        expected = expected_of(network, made, kept)
        with adsc.compress(network, SCHEDULE):
            for turn in zip(made, bounds, expected, strict=True):
                check(network, *([part] for part in turn[:2]), kept, cache, [turn[2]])
                for layer in cache.layers:
                    layer.offload()
                    layer.prefetch()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a CUDA device")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_offloaded(family, implementation):
    network, made = copy.deepcopy(network_of(family)).cuda(), case(family, "left_padding")
    made.inputs = {name: value.cuda() for name, value in made.inputs.items()}
    with adsc.compress(network, SCHEDULE):
        expected = generated(network, made)
        found = generated(network, made, cache_implementation=implementation, disable_compile=True)
    assert torch.equal(found[0], expected[0])
    assert max((a - b).abs().max() for a, b in zip(found[1], expected[1], strict=True)) <= 1e-3
    windows = [layer.is_sliding for layer in found[2].layers]
    places = [layer.keys.device.type for layer in found[2].layers]
    assert "cpu" in [place for place, window in zip(places, windows, strict=True) if not window]


@pytest.mark.parametrize("kind", [dynamic, static])
@pytest.mark.parametrize("name", ["single", "text_beside_image"])
def test_a_reduced_cache_needs_its_method(name, kind):
    """Without it padding would be attended to; once it is reset or the method is back, all is well."""
    network, made = network_of("llava"), case("llava", name)
    token = torch.tensor([[5]] * len(made.spans))
    with torch.no_grad():
        with adsc.compress(network, SCHEDULE):
            cache, other = kind(network), kind(network)
            for each in (cache, other):
                network(**made.inputs, past_key_values=each)
            expected = network(input_ids=token, past_key_values=copy.deepcopy(other)).logits
        with pytest.raises(adsc.InputError, match="not attached"):
            network(input_ids=token, past_key_values=cache)
        with adsc.compress(network, "2:1/3"):  # what is held counts, not what would be
            assert (network(input_ids=token, past_key_values=other).logits - expected).abs().max() <= 1e-5
        if not OLD or kind is static:
            cache.reset()
            dense = [network(**made.inputs, past_key_values=each).logits for each in (cache, kind(network))]
            assert torch.equal(*dense)


def test_other_caches_are_refused():
    network, made = network_of("llava"), case("llava", "single")
    both = transformers.EncoderDecoderCache(DynamicCache(), DynamicCache())
    with (
        torch.no_grad(),
        adsc.compress(network, SCHEDULE),
        pytest.raises(adsc.UnsupportedModelError, match="EncoderDecoderCache"),
    ):
        network(**made.inputs, past_key_values=both)
