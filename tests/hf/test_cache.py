"""Decoding on a reduced cache equals recomputing from scratch, and the memory is really gone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

import adsc

from .oracle import attention, kept_positions, masked_dense
from .tiny import (
    CORE,
    IMAGE,
    KINDS,
    LAYERS,
    SCHEDULE,
    TEXT,
    TEXTUAL,
    TINY,
    VOCAB,
    WINDOWED,
    Batch,
    batch,
    case,
    joined,
    model,
    one_row,
)

FAMILIES = CORE
OLD = Version(transformers.__version__) < Version("5.20")
STEPS = 10
# A tiny random model would say the same word again and again.
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "no_repeat_ngram_size": 1}


def grown(made: Batch, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs with tokens fed back, ``(batch, n)``."""
    inputs, n = dict(made.inputs), tokens.shape[1]
    for name, value in made.inputs.items():
        if value.shape == made.inputs["input_ids"].shape:  # masks and types too
            prefix = name == "token_type_ids" and not value.any()  # PaliGemma's prompt is 0, and what follows it 1
            inputs[name] = torch.nn.functional.pad(value, (0, n), value=int(name == "attention_mask" or prefix))
    inputs["input_ids"] = torch.cat((made.inputs["input_ids"], tokens), 1)
    return inputs


def longer(kept, start: int, stop: int):
    return [[[*row, *range(start, stop)] for row in layer] for layer in kept]


def recomputed(network, made: Batch, axes: int | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Greedy tokens and their logits, each from a masked dense forward pass with the plan of the prompt."""
    kept, length = kept_positions(made), made.inputs["input_ids"].shape[1]
    tokens, logits = torch.empty(len(made.spans), 0, dtype=torch.long), []
    for step in range(STEPS):
        inputs = grown(made, tokens)
        logits.append(masked_dense(network, inputs, longer(kept, length, length + step), axes)[:, -1])
        allowed = logits[-1].scatter(1, inputs["input_ids"], -torch.inf)  # what no_repeat_ngram_size=1 does
        tokens = torch.cat((tokens, allowed.argmax(-1, keepdim=True)), 1)
    return tokens, logits


def storage_tokens(cache: DynamicCache) -> list[int]:
    """Entries per row that each layer pays for, by the size of its storage."""
    held = []
    for layer in cache.layers:
        if layer.keys is None:  # it shares those of another layer
            continue
        for tensor in (layer.keys, layer.values):
            batch_size, heads, _, width = tensor.shape
            entry = batch_size * heads * width * tensor.element_size()
            assert tensor.untyped_storage().nbytes() % entry == 0
            held.append(tensor.untyped_storage().nbytes() // entry)
    assert held[::2] == held[1::2]
    return held[::2]


def longest(kept) -> list[int]:
    return [max(map(len, layer)) for layer in kept]


@pytest.mark.parametrize("name", ["single", "left_padding"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_equals_recomputing(family, implementation, positions, name):
    network, made = model(family), case(family, name)
    compact = positions == "compact"
    expected, logits = recomputed(network, made, TINY[family].axes if compact else None)
    assert len(expected[0].unique()) >= 8
    config = adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), positions=positions)
    with attention(network, implementation), adsc.compress(network, config) as handle:
        out = network.generate(**made.inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
        plans = handle.last_plans
    length = made.inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, length:], expected)
    assert max((a - b).abs().max() for a, b in zip(out.logits, logits, strict=True)) <= 1e-5
    # Layer 0 keeps its padding; reduced stages hold the longest row. The last token is not fed back.
    counts = [max(plan.tokens_per_layer()[layer] for plan in plans) for layer in range(LAYERS)]
    assert counts == longest(kept_positions(made))
    assert storage_tokens(out.past_key_values) == [length + STEPS - 1, *(n + STEPS - 1 for n in counts[1:])]


def places(spans) -> list[list[int]]:
    """Spans as positions, whatever form they come in."""
    return [list(range(*span)) if isinstance(span, tuple) else list(map(int, span)) for span in spans]


MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3, "do_sample": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", KINDS)
def test_without_cache_equals_with_it(family, mode):
    network, images = model(family), TINY[family].images
    rows = [[3, images[0], 5], [4, images[1], 2, images[2], 3], [9]]
    if mode == "beams" and OLD:  # it mixes up the images (or tiles) of rows with several, dense or not
        rows = [[3, images[0], 5], [4, images[0], 3]]
    made = batch(family, rows)
    outputs = []
    options = GREEDY | MODES[mode] | {"suppress_tokens": list(range(IMAGE, VOCAB))}  # no placeholders in the answer
    with adsc.compress(network, SCHEDULE) as handle:
        for use_cache in (True, False):
            torch.manual_seed(0)
            outputs.append(network.generate(**made.inputs, **options, use_cache=use_cache))
            layouts = [plan.layout for plan in handle.last_plans[:: 3 if mode == "beams" else 1]]
            assert [places(layout.spans) for layout in layouts] == [places(spans) for spans in made.spans]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", KINDS)
def test_several_samples_of_one_prompt(family):
    """They are those of a batch that holds the prompt as often."""
    network, images = model(family), TINY[family].images
    row = [3, images[0], 5] if OLD else [3, images[0], 2, images[1], 5]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": True, "temperature": 2.0}
    with adsc.compress(network, SCHEDULE) as handle:
        torch.manual_seed(0)
        out = network.generate(**batch(family, [row]).inputs, **options, num_return_sequences=3)
        assert len(handle.last_plans) == 3
        repeated = batch(family, [row])
        repeated.inputs |= {name: torch.cat([value] * 3) for name, value in repeated.inputs.items()}
        torch.manual_seed(0)
        assert torch.equal(network.generate(**repeated.inputs, **options), out)
    assert len({tuple(tokens) for tokens in out.tolist()}) == 3


def second_turn(family: str, first: Batch, items: list) -> tuple[Batch, dict]:
    """A second turn on its own, and both turns in one batch of inputs."""
    turn = batch(family, [items], seed=7)
    return turn, joined([first, turn])


def mrope(network, whole: dict) -> torch.Tensor:
    """The 3-D positions of a conversation: what a serving loop that feeds turn by turn passes along."""
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return network.model.get_rope_index(**{name: whole[name] for name in names})[0]


@pytest.mark.parametrize("new_image", [False, True], ids=["text", "new_image"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", KINDS)
def test_two_turns_on_one_cache(family, implementation, new_image):
    if family == "gemma3" and new_image:
        pytest.skip("of an image on a cache, transformers itself hides a part from the other: the dense answers change")
    if OLD and family == "gemma3":
        pytest.skip("this version takes no token_type_ids on a cache")
    network, tiny = model(family), TINY[family]
    first = batch(family, [[4, tiny.images[0], 6]])
    turn, whole = second_turn(family, first, [3, tiny.images[2], 5] if new_image else [5])
    past = first.inputs["input_ids"].shape[1]
    kept_first = kept_positions(first)
    kept = [[a[0] + [past + place for place in b[0]]] for a, b in zip(kept_first, kept_positions(turn), strict=True)]
    expected = masked_dense(network, whole, kept)
    positions = mrope(network, whole) if TINY[family].axes == 3 else None
    both = dict(turn.inputs, attention_mask=whole["attention_mask"])
    cache = DynamicCache(config=network.config.get_text_config())
    with attention(network, implementation), torch.no_grad(), adsc.compress(network, SCHEDULE) as handle:
        given = {} if positions is None else {"position_ids": positions[..., :past]}
        network(**first.inputs, **given, past_key_values=cache, use_cache=True)
        before = [layer.keys.clone() for layer in cache.layers]
        first_plans = handle.last_plans
        given = {} if positions is None else {"position_ids": positions[..., past:]}
        logits = network(**both, **given, past_key_values=cache, use_cache=True).logits
        assert (handle.last_plans is not first_plans) == new_image
    seen = [place - past for place in kept[-1][0] if place >= past]
    assert (logits[0, seen] - expected[0, kept[-1][0]][-len(seen) :]).abs().max() <= 1e-5
    windows = [getattr(layer, "sliding_window", 10**6) - 1 for layer in cache.layers]
    assert [layer.keys.shape[-2] for layer in cache.layers] == list(map(min, longest(kept), windows))
    if family not in WINDOWED:
        assert storage_tokens(cache) == longest(kept)
        for layer, was in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys[..., : was.shape[-2], :], was)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [kind for kind in KINDS if kind != "gemma3"])  # see above
def test_two_turns_in_a_ragged_batch(family, implementation):
    """The first turn leaves padding in the reduced caches, the second adds none, and then decoding goes on."""
    network, tiny = model(family), TINY[family]
    image = tiny.images[0]
    first = case(family, "text_beside_image")
    turn = batch(family, [[2, image, 3], [3, image, 2]], seed=7)
    whole = {}
    for name in first.inputs.keys() - {"mm_token_type_ids"}:
        pixels, new = first.inputs[name], turn.inputs[name].split(first.inputs[name].shape[0])
        whole[name] = torch.cat((pixels, *new), int(name in TEXTUAL))  # images come row by row
    for name in whole.keys() & {*TEXTUAL}:
        whole[name] = torch.nn.functional.pad(whole[name], (0, 1))
    whole["input_ids"][:, -1] = torch.tensor([5, 6])
    past, new = (made.inputs["input_ids"].shape[1] for made in (first, turn))
    kept = [
        [[*a, *(past + place for place in b), past + new] for a, b in zip(*rows, strict=True)]
        for rows in zip(kept_positions(first), kept_positions(turn), strict=True)
    ]
    positions = [{}, {}, {}]
    if TINY[family].axes == 3:
        whole["mm_token_type_ids"] = (whole["input_ids"] == IMAGE).int()
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        parts = mrope(network, whole).split([past, new, 1], -1)
        positions = [{"position_ids": part} for part in parts]
    expected = masked_dense(network, whole, kept)
    cache = DynamicCache()
    second = {name: value for name, value in turn.inputs.items() if name != "attention_mask"}
    with attention(network, implementation), torch.no_grad(), adsc.compress(network, SCHEDULE):
        network(**first.inputs, **positions[0], past_key_values=cache)
        logits = network(**second, **positions[1], past_key_values=cache).logits[:, -1]
        step = network(input_ids=whole["input_ids"][:, -1:], **positions[2], past_key_values=cache).logits[:, -1]
    assert (logits - expected[:, -2]).abs().max() <= 1e-5
    assert (step - expected[:, -1]).abs().max() <= 1e-5
    assert storage_tokens(cache) == longest(kept)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("new_image", [False, True], ids=["text", "new_image"])
def test_turns_of_different_length_equal_those_of_each_row_alone(positions, new_image):
    """Three turns, each padded in another row; decoding goes on behind the last."""
    network, image = model("llava"), TINY["llava"].images[0]
    config = adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), positions=positions)
    extra = [image] if new_image else []
    rows = [([4, image, 2], [3, image, 6]), ([5], [2]), ([2, *extra, 1], [4, *extra, 3]), ([1], [1])]

    def talk(turns) -> torch.Tensor:
        cache, masks = DynamicCache(), []
        for turn in turns:
            masks.append(turn["attention_mask"])
            mask = torch.cat(masks, 1)
            numbers = (mask.cumsum(1) - 1).clamp(min=0)[:, -masks[-1].shape[1] :]
            inputs = {**turn, "attention_mask": mask, "position_ids": numbers}
            logits = network(**inputs, past_key_values=cache).logits[:, -1]
        return logits

    together = [batch("llava", [*turn], seed=seed) for seed, turn in enumerate(rows)]
    with torch.no_grad(), adsc.compress(network, config):
        found = talk([made.inputs for made in together])
        for row in range(2):
            alone = []
            for made in together:
                has_image = bool(made.spans[row])
                inputs = one_row("llava", made, row, row * has_image, (row + 1) * has_image)
                alone.append({**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})
            assert (talk(alone)[0] - found[row]).abs().max() <= 1e-5


# With several axes transformers wants the images of all turns to count positions, which a second turn does not bring;
# for windows see above.
@pytest.mark.parametrize("family", [kind for kind in KINDS if TINY[kind].axes == 1 and kind not in WINDOWED])
def test_a_chat_by_generate_with_an_image_in_each_turn(family):
    network, tiny = model(family), TINY[family]
    first = batch(family, [[4, tiny.images[0], 6]])
    options = dict(GREEDY, return_dict_in_generate=True, suppress_tokens=list(range(IMAGE, VOCAB)))
    with adsc.compress(network, SCHEDULE):
        answer = network.generate(**first.inputs, **options)
        turn = batch(family, [[3, tiny.images[0], 5]], seed=7)
        answered = Batch({"input_ids": answer.sequences[:, first.inputs["input_ids"].shape[1] :]}, [[]], [[]], [])
        both = joined([first, answered, turn])
        both["attention_mask"] = torch.ones_like(both["input_ids"])
        if "mm_token_type_ids" in both:
            both["mm_token_type_ids"] = (both["input_ids"] == IMAGE).int()
        new = {name: turn.inputs.get(name) for name in both} | {name: both[name] for name in both if name in TEXTUAL}
        second = network.generate(**new, past_key_values=answer.past_key_values, **options)
        # The same conversation in one prompt: kept tokens depend on their image alone.
        whole = network.generate(**both, **options)
    assert torch.equal(second.sequences, whole.sequences)
    assert storage_tokens(second.past_key_values) == storage_tokens(whole.past_key_values)


def test_another_budget_in_the_second_turn_leaves_the_first_as_it_was():
    network, tiny = model("llava"), TINY["llava"]
    first, turn = batch("llava", [[4, tiny.images[0], 6]]), batch("llava", [[3, tiny.images[0], 5]], seed=7)
    cache = DynamicCache()
    with torch.no_grad(), adsc.compress(network, SCHEDULE) as handle:
        network(**first.inputs, past_key_values=cache)
        with handle.budget(1):
            inputs = {name: turn.inputs[name] for name in ("input_ids", "pixel_values")}
            logits = network(**inputs, past_key_values=cache).logits
    past, new = (made.inputs["input_ids"].shape[1] for made in (first, turn))
    kept = [[row + list(range(past, past + new)) for row in layer] for layer in kept_positions(first)]
    _, whole = second_turn("llava", first, [3, tiny.images[0], 5])
    assert (masked_dense(network, whole, kept)[0, past:] - logits[0]).abs().max() <= 1e-5
    assert storage_tokens(cache) == longest(kept)


def test_a_cache_is_copied_and_cropped():
    network, made = model("llava"), case("llava", "single")
    token = torch.tensor([[5]])
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        cache = network(**made.inputs).past_key_values
        logits = network(input_ids=token, past_key_values=copy.deepcopy(cache)).logits
        copied = copy.deepcopy(cache)
        network(input_ids=torch.tensor([[7, 8, 9]]), past_key_values=copied)
        copied.crop(-3)  # as assisted decoding does with rejected candidates
        assert torch.equal(network(input_ids=token, past_key_values=copied).logits, logits)
        cropped = copy.deepcopy(cache)
        with pytest.raises(adsc.InputError, match="cropped"):
            cropped.crop(-20)
        with pytest.raises(adsc.InputError, match="1 rows"):
            network(input_ids=token.expand(2, 1), past_key_values=cache)


@pytest.mark.parametrize("family", ["llava", "mistral3"])  # Mistral does not give the cache back
def test_a_cache_is_filled_with_use_cache_off(family):
    network, made = model(family), case(family, "single")
    text, caches, logits = torch.tensor([[5, 6, 7]]), [DynamicCache(), DynamicCache()], []
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        for cache, use_cache in zip(caches, (True, False), strict=True):
            network(**made.inputs, past_key_values=cache, use_cache=use_cache)
            logits.append(network(input_ids=text, past_key_values=cache).logits)
    assert torch.equal(*logits)
    assert storage_tokens(caches[0]) == storage_tokens(caches[1])


@torch.no_grad()
def test_a_cache_that_a_failed_call_left_uneven():
    network, made = model("llava"), case("llava", "no_mask")
    token = torch.tensor([[5]])
    with adsc.compress(network, SCHEDULE):
        cache = network(**made.inputs).past_key_values
        network(input_ids=token, past_key_values=cache)
    with pytest.raises(adsc.InputError, match="not attached any more; start with a new cache"):
        network(input_ids=token, past_key_values=cache)
    with adsc.compress(network, SCHEDULE), pytest.raises(adsc.InputError, match="failed halfway"):
        network(input_ids=token, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("positions", [("original", "compact"), ("compact", "original")])
def test_positions_of_one_kind_in_a_cache(positions):
    network, made = model("llava"), case("llava", "no_mask")
    configs = [adsc.ADSCConfig(adsc.Schedule.parse(SCHEDULE), positions=kind) for kind in positions]
    with adsc.compress(network, configs[0]):
        cache = network(**made.inputs).past_key_values
    with adsc.compress(network, configs[1]):
        network(input_ids=torch.tensor([[5]]), past_key_values=cache)  # text has those of the cache
        with pytest.raises(adsc.InputError, match=f"positions '{positions[1]}' cannot go on"):
            network(**made.inputs, past_key_values=cache)


@pytest.mark.skipif(OLD, reason="reset() leaves the cache at its length in this version")
def test_a_cache_that_was_reset_starts_anew():
    network, made = model("llava"), case("llava", "single")
    token = torch.tensor([[5]])
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        cache = network(**made.inputs).past_key_values
        cache.reset()
        text = network(input_ids=torch.arange(1, 9)[None], past_key_values=cache).logits
        follow = network(input_ids=token, past_key_values=cache).logits
    with torch.no_grad():
        dense = network(input_ids=torch.arange(1, 9)[None])
        assert torch.equal(text, dense.logits)
        assert torch.equal(follow, network(input_ids=token, past_key_values=dense.past_key_values).logits)


@pytest.mark.parametrize("family", [kind for kind in KINDS if kind not in WINDOWED])
def test_the_text_after_an_image_may_be_cropped(family):
    """As assisted decoding does with rejected candidates that it fed in together with the prompt."""
    network, made = model(family), case(family, "single")
    ids, token = made.inputs["input_ids"], torch.tensor([[5]])
    position = torch.full((3, 1, 1), 40) if TINY[family].axes == 3 else None
    shorter = {name: value[:, :-4] if name in TEXTUAL else value for name, value in made.inputs.items()}
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        cache = network(**made.inputs).past_key_values
        cache.crop(-4)
        found = network(input_ids=token, past_key_values=cache, position_ids=position).logits
        expected = network(**shorter).past_key_values
        assert storage_tokens(expected)[1] < ids.shape[1] - 4
        logits = network(input_ids=token, past_key_values=expected, position_ids=position).logits
        assert (found - logits).abs().max() <= 1e-5
        assert [len(layer.keys[0, 0]) for layer in cache.layers] == [len(layer.keys[0, 0]) for layer in expected.layers]


def test_rows_of_different_length_are_not_cropped():
    network, made = model("llava"), case("llava", "right_padding")
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        cache = network(**made.inputs).past_key_values
        with pytest.raises(adsc.InputError, match="cropped"):
            cache.crop(-2)  # text in one row, padding in the others


def prompt_with_an_echo(network) -> dict:
    """A prompt whose answer holds the word that stands before the image."""
    for seed in range(50):
        made = batch("llava", [[4, TINY["llava"].images[0], 6]], seed=seed)
        ids = made.inputs["input_ids"]
        for _ in range(3):
            answer = network.generate(**made.inputs, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
            if ids[0, 3] in answer[:-1]:
                return made.inputs
            ids[0, 3] = answer[0]
    raise AssertionError("no such prompt")


def test_candidates_from_prompt_look_up_may_be_placeholders():
    network = model("llava")
    with adsc.compress(network, SCHEDULE) as handle:
        inputs = prompt_with_an_echo(network)
        options = {"max_new_tokens": 12, "do_sample": False}
        alone = network.generate(**inputs, **options)
        fed = []
        hook = network.model.register_forward_pre_hook(lambda *call: fed.append(call[2]["input_ids"]), with_kwargs=True)
        assert torch.equal(network.generate(**inputs, **options, prompt_lookup_num_tokens=4), alone)
        hook.remove()
        assert any((ids == IMAGE).any() for ids in fed[1:])
        assert len(handle.last_plans) == 1


@pytest.mark.skipif(OLD, reason="this version hands pixels on to the assistant")
# Token types are handed on in every version.
@pytest.mark.parametrize("family", [kind for kind in KINDS if TINY[kind].extra is None])
def test_an_assistant_changes_nothing(family):
    network, made = model(family), case(family, "single")
    torch.manual_seed(1)
    assistant = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "pad_token_id": 0})).eval()
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    with adsc.compress(network, SCHEDULE):
        alone = network.generate(**made.inputs, **options)
        assert torch.equal(network.generate(**made.inputs, **options, assistant_model=assistant), alone)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("family", KINDS)
def test_batch_generation_equals_one_by_one(family, mode):
    network, made = model(family), case(family, "left_padding")
    options = GREEDY | MODES[mode] | {"suppress_tokens": [0, *range(IMAGE, VOCAB)]}
    images = [0, 1, 3, 3]  # the rows hold images 0; 1 and 2; none
    if mode == "beams" and OLD:
        pytest.skip("this version mixes up the images of rows with several of them, dense or not")
    with adsc.compress(network, SCHEDULE):
        together = network.generate(**made.inputs, **options)[:, -STEPS:]
        for row in range(3):
            alone = network.generate(**one_row(family, made, row, images[row], images[row + 1]), **options)
            assert torch.equal(alone[0, -STEPS:], together[row])
