"""Every way of calling a model with a method attached."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

import adsc
from adsc.pocket import MODEL_FOLDER
from adsc.pocket.scenes import render, scene

from .oracle import attention, decoder_of, difference, kept_positions, masked_dense
from .tiny import CORE, KINDS, LAYERS, SCHEDULE, TINY, WINDOWED, Batch, batch, case, model

FAMILIES = CORE


@pytest.mark.parametrize("family", KINDS)
def test_logits_to_keep(family):
    network, made = model(family), case(family, "left_padding")
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        whole = network(**made.inputs).logits
        assert torch.allclose(network(**made.inputs, logits_to_keep=3).logits, whole[:, -3:], atol=1e-5)
        some = torch.tensor([1, 4, 7])
        assert torch.allclose(network(**made.inputs, logits_to_keep=some).logits, whole[:, some], atol=1e-5)


@pytest.mark.parametrize("family", [kind for kind in KINDS if kind not in WINDOWED])
def test_hidden_states_and_attentions_have_full_size(family):
    network, made = model(family), case(family, "left_padding")
    kept = kept_positions(made)
    with torch.no_grad(), attention(network, "eager"), adsc.compress(network, SCHEDULE):
        out = network(**made.inputs, output_hidden_states=True, output_attentions=True)
        cache = out.past_key_values
        step = network(
            input_ids=torch.full((3, 1), 5),
            attention_mask=torch.nn.functional.pad(made.inputs["attention_mask"], (0, 1), value=1),
            position_ids=None if TINY[family].axes == 1 else torch.full((3, 3, 1), 60),
            past_key_values=cache,
            output_attentions=True,
        )
        base = network.model(**made.inputs)
    batch_size, length = made.inputs["input_ids"].shape
    assert len(out.hidden_states) == LAYERS + 1
    assert torch.equal(out.hidden_states[-1], base.last_hidden_state)
    for layer in range(LAYERS):
        assert out.hidden_states[layer].shape == (batch_size, length, 48)
        assert out.attentions[layer].shape == (batch_size, 4, length, length)
        assert step.attentions[layer].shape == (batch_size, 4, 1, length + 1)
        for row, places in enumerate(kept[layer] if layer else made.real):
            outside = torch.ones(length, dtype=torch.bool)
            outside[places] = False
            weights = out.attentions[layer][row]
            assert torch.allclose(weights[:, places].sum(-1), torch.ones(4, len(places)), atol=1e-5)
            assert (weights[:, places][:, :, outside] == 0).all()
            assert torch.allclose(step.attentions[layer][row].sum(-1), torch.ones(4, 1), atol=1e-5)
            assert (step.attentions[layer][row][:, :, :-1][:, :, outside] == 0).all()
            if layer:
                assert (weights[:, outside] == 0).all()
                assert (out.hidden_states[layer + 1][row, outside] == 0).all()


@pytest.mark.parametrize("family", KINDS)
def test_the_loss_leaves_out_what_no_token_predicts(family):
    network, made = model(family), case(family, "several_images")
    ids, kept = made.inputs["input_ids"], kept_positions(made)
    logits = masked_dense(network, made.inputs, kept)[0]
    vision = {place for span in made.spans[0] for place in (range(*span) if isinstance(span, tuple) else span)}
    ends = {span[-1] if isinstance(span, list) else span[1] - 1 for span in made.spans[0]}
    predicted = [
        i for i in kept[-1][0] if i + 1 < ids.shape[1] and i + 1 not in vision and (i not in vision or i in ends)
    ]
    assert len(predicted) < ids.shape[1] - len(vision)
    expected = torch.nn.functional.cross_entropy(logits[predicted], ids[0, [i + 1 for i in predicted]])
    labels = ids.clone()  # nothing masked by the caller
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        assert abs(network(**made.inputs, labels=labels).loss - expected) <= 1e-5
        with_shifted = network(**made.inputs, labels=labels, shift_labels=shifted).loss
        assert abs(with_shifted - expected) <= 1e-5
    assert torch.equal(labels, ids)  # the caller's tensor is not written to


def test_a_method_that_may_drop_the_last_token_masks_the_label_after_it():
    class Careless(adsc.methods.ADSC):
        keeps_last_token = False

    network, made = model("llava"), case("llava", "several_images")
    vision = [place for span in made.spans[0] for place in range(*span)]
    ends = [stop for _, stop in made.spans[0]]
    with adsc.compress(network, Careless(SCHEDULE)) as handle:
        ignored = handle._unpredicted(made.inputs)[0]
    assert ignored.nonzero().flatten().tolist() == sorted({*vision, *ends})


@pytest.mark.parametrize("family", FAMILIES)
def test_positional_arguments(family):
    network, made = model(family), case(family, "single")
    rest = {name: value for name, value in made.inputs.items() if name != "input_ids"}
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        expected = network(**made.inputs).logits
        assert torch.equal(network(made.inputs["input_ids"], **rest).logits, expected)
        hidden = network.model(made.inputs["input_ids"], **rest).last_hidden_state
        assert torch.equal(network.lm_head(hidden), expected)


@pytest.mark.parametrize("family", KINDS)
def test_attaching_to_the_base_model(family):
    network, made = model(family), case(family, "left_padding")
    with torch.no_grad(), adsc.compress(network.model, SCHEDULE) as handle:
        logits = network(**made.inputs).logits
        assert network.model.adsc is handle
    kept = kept_positions(made)
    assert difference(logits, masked_dense(network, made.inputs, kept), kept[-1]) <= 1e-5


@pytest.mark.parametrize("family", KINDS)
def test_threads_with_their_own_budgets(family):
    network, made = model(family), case(family, "left_padding")
    budgets = {"1": 1, "1/2": "1/2", "1/3": "1/3"}
    alone, found, failed = {}, {}, []

    def run(handle, budget):
        with torch.no_grad(), handle.budget(budget):
            logits = network(**made.inputs).logits
            return logits, [plan.tokens_per_layer() for plan in handle.last_plans]

    def work(handle, name, start):
        try:
            start.wait()
            found[name] = [run(handle, budgets[name]) for _ in range(8)]
        except Exception as error:  # an assertion in a thread would be lost
            failed.append(error)

    with adsc.compress(network, SCHEDULE) as handle:
        with torch.no_grad():
            own = network(**made.inputs).logits
        for name, budget in budgets.items():
            alone[name] = run(handle, budget)
        start = threading.Barrier(len(budgets))
        threads = [threading.Thread(target=work, args=(handle, name, start)) for name in budgets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with torch.no_grad():
            assert torch.equal(network(**made.inputs).logits, own)
    assert not failed
    assert len({str(plans) for _, plans in alone.values()}) == 3
    for name, runs in found.items():
        for logits, plans in runs:
            assert torch.equal(logits, alone[name][0])
            assert plans == alone[name][1]


def test_two_models_at_once():
    made = {family: case(family, "single") for family in ("llava", "qwen2_5_vl")}
    alone = {}
    for (family, inputs), schedule in zip(made.items(), ("1:1/2", "3:1/3"), strict=True):
        with torch.no_grad(), adsc.compress(model(family), schedule):
            alone[family] = model(family)(**inputs.inputs).logits
    with torch.no_grad(), adsc.compress(model("llava"), "1:1/2"), adsc.compress(model("qwen2_5_vl"), "3:1/3"):
        for family, inputs in made.items():
            assert torch.equal(model(family)(**inputs.inputs).logits, alone[family])


def test_a_copied_model_has_a_handle_of_its_own():
    made = case("llava", "single")
    with torch.no_grad(), adsc.compress(model("llava"), SCHEDULE) as handle:
        reduced = model("llava")(**made.inputs).logits
        other = copy.deepcopy(model("llava"))
        assert other.adsc is not handle
        assert torch.equal(other(**made.inputs).logits, reduced)
        other.adsc.remove()
        with torch.no_grad():
            assert not torch.equal(other(**made.inputs).logits, reduced)
        assert torch.equal(model("llava")(**made.inputs).logits, reduced)


def test_plans_tell_what_was_kept():
    network, made = model("llava"), case("llava", "left_padding")
    with torch.no_grad(), adsc.compress(network, SCHEDULE) as handle:
        network.generate(**made.inputs, max_new_tokens=3)  # decode steps do not disturb the plans of the prompt
        plans = handle.last_plans
    for layer, rows in enumerate(kept_positions(made)):
        for plan, real, places in zip(plans, made.real, rows, strict=True):
            assert np.array_equal(np.array(real)[plan.kept(layer)], places)


@pytest.mark.parametrize("family", KINDS)
def test_generate_plans_as_a_forward_pass_does(family):
    """``generate`` may encode images beforehand, and then hands features instead of pixels and sizes to the model."""
    images = list(TINY[family].images)
    if family == "qwen2_5_vl":
        images.insert(1, TINY[family].video)
    network, made = model(family), batch(family, [[3, *images[:2], 4], [5, *images[2:], 2], [6]])
    with torch.no_grad(), adsc.compress(network, SCHEDULE) as handle:
        network(**made.inputs)
        plans = handle.last_plans
        network.generate(**made.inputs, max_new_tokens=1)
        assert handle.last_plans is not plans
        assert [plan.layout for plan in handle.last_plans] == [plan.layout for plan in plans]
        assert (plans[0].layout.grids[0] is not None) == TINY[family].grids


def test_some_hidden_states_alone():
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("this version gives all or none")
    network, made = model("llava"), case("llava", "single")
    with torch.no_grad(), adsc.compress(network, SCHEDULE):
        whole = network.model(**made.inputs, output_hidden_states=True).hidden_states
        some = network.model(**made.inputs, output_hidden_states=[2, 5]).hidden_states
    for index, (state, expected) in enumerate(zip(some, whole, strict=True)):
        assert state is None if index not in (2, 5) else torch.equal(state, expected)


def embedded(network, made: Batch) -> dict[str, torch.Tensor]:
    """The same inputs as embeddings, with which nothing tells where the vision tokens are."""
    found = {}

    def note(module, args, kwargs):
        found.update(inputs_embeds=kwargs["inputs_embeds"].clone(), position_ids=kwargs.get("position_ids"))

    hook = decoder_of(network).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        network(**made.inputs)
    hook.remove()
    kept = {name: made.inputs[name] for name in ("attention_mask", "token_type_ids") if name in made.inputs}
    return {name: value for name, value in (found | kept).items() if value is not None}


def forms_of(made: Batch) -> dict[str, object]:
    """The spans of a batch in every form that ``handle.planned`` takes, padding counted."""
    spans = [
        [[real[i] for i in (range(*span) if isinstance(span, tuple) else span)] for span in row]
        for row, real in zip(made.spans, made.real, strict=True)
    ]
    numbers = torch.zeros_like(made.inputs["input_ids"])
    for row, found in enumerate(spans):
        for number, places in enumerate(found):
            numbers[row, places] = 7 - number  # any numbers, in any order
    pairs = [[(places[0], places[-1] + 1) for places in row] for row in spans]
    return {"positions": spans, "pairs": pairs, "numbers": numbers, "boolean": numbers > 0}


@pytest.mark.parametrize("form", ["positions", "pairs", "numbers", "boolean"])
@pytest.mark.parametrize("name", ["several_images", "left_padding", "right_padding"])
@pytest.mark.parametrize("family", [*CORE, "gemma3", "mistral3"])
def test_embeddings_with_spans(family, name, form):
    if family == "mistral3" and form in ("pairs", "boolean"):
        pytest.skip("markers stand inside its images")
    if form == "boolean" and name == "several_images":
        pytest.skip("images that touch are one run, unless they are numbered")
    network, made = model(family), case(family, name)
    kept, inputs = kept_positions(made), embedded(network, made)
    expected = masked_dense(network, made.inputs, kept)
    with torch.no_grad(), adsc.compress(network, SCHEDULE) as handle:
        with handle.planned(inputs, forms_of(made)[form]):
            logits = network(**inputs).logits
        assert difference(logits, expected, kept[-1]) <= 1e-5
        with pytest.raises(adsc.InputError, match="may hide vision tokens"):  # outside the block
            network(**inputs)


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "mistral3"])
def test_the_loss_of_embeddings_with_spans(family):
    network, made = model(family), case(family, "left_padding")
    inputs, labels = embedded(network, made), made.inputs["input_ids"]
    with torch.no_grad(), adsc.compress(network, SCHEDULE) as handle:
        expected = network(**made.inputs, labels=labels).loss
        with handle.planned(inputs, forms_of(made)["numbers"]):
            assert abs(network(**inputs, labels=labels).loss - expected) <= 1e-6
    with torch.no_grad():
        assert abs(network(**made.inputs, labels=labels).loss - expected) > 1e-3


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "mistral3"])
def test_generating_from_embeddings_with_spans(family, beams):
    network, made = model(family), batch(family, [[3, TINY[family].images[0], 5], [4, TINY[family].images[1], 3], [9]])
    inputs = embedded(network, made)
    inputs.pop("position_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    with adsc.compress(network, SCHEDULE) as handle:
        expected = network.generate(**made.inputs, **options)[:, -6:]
        with handle.planned(inputs, forms_of(made)["positions"]):
            assert torch.equal(network.generate(**inputs, **options), expected)
            assert len(handle.last_plans) == 3 * beams
    assert not torch.equal(network.generate(**inputs, **options), expected)


def test_spans_that_do_not_fit():
    network, made = model("llava"), case("llava", "left_padding")
    padding = made.inputs["input_ids"].shape[1] - len(made.real[0])
    with adsc.compress(network, SCHEDULE) as handle:
        for spans, message in (
            ([[(5, 9)]], "spans of 1 rows, but the inputs have 3"),
            (torch.zeros(2, 9, dtype=torch.bool), "spans of 2 rows"),
            ([[(padding - 1, padding + 3)], [], []], "outside its row or in its padding"),
            ([[], [(3, 2 * len(made.real[1]))], []], "outside its row or in its padding"),
            ([[], [], [(4, 4)]], "empty"),
            ([[], [], [(40, 45), (44, 50)]], "share a position"),
        ):
            with pytest.raises(adsc.InputError, match=message), handle.planned(made.inputs, spans):
                pass
        with handle.planned(made.inputs):  # of another call nothing is known here
            other = {"inputs_embeds": torch.zeros(1, 8, 48)}
            with torch.no_grad(), pytest.raises(adsc.InputError, match="may hide vision tokens"):
                network(**other)
            with pytest.raises(adsc.InputError, match="planned already"), handle.budget("1/2"):
                pass
            with handle.budget(1):
                assert not handle.method.reduces


def test_a_language_model_that_generate_runs_is_planned_for():
    class MyCache(transformers.DynamicCache):
        pass

    network, made = model("blip-2"), case("blip-2", "single")
    with adsc.compress(network, SCHEDULE) as handle, handle.planned(made.inputs):
        network.generate(**made.inputs, max_new_tokens=3)
        assert len(handle.last_plans) == 1
        with pytest.raises(adsc.UnsupportedModelError, match="a MyCache cannot be reduced"):
            network.generate(**made.inputs, max_new_tokens=3, past_key_values=MyCache())


@torch.no_grad()
def test_another_prompt_of_the_planned_length():
    network, image = model("llava"), TINY["llava"].images[0]
    planned, other = batch("llava", [[4, image, 6]]), batch("llava", [[6, image, 4]])
    with adsc.compress(network, SCHEDULE) as handle:
        expected = network(**other.inputs).logits
        with handle.planned(planned.inputs):
            assert torch.equal(network(**other.inputs).logits, expected)


def test_the_pipeline_for_images_and_text():
    """With the model in the box, whose answers are those of ``generate``."""
    pipe = transformers.pipeline("image-text-to-text", model=str(MODEL_FOLDER))
    images = [render(scene(seed)) for seed in (3, 4)]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "how many things?"}]}]
        for image in images
    ]
    options = {"max_new_tokens": 4, "do_sample": False}
    with adsc.compress(pipe.model, "1:1/8") as handle:
        together = [
            out[0]["generated_text"] for out in pipe(text=chats, return_full_text=False, batch_size=2, **options)
        ]
        assert [plan.layout.vision_tokens for plan in handle.last_plans] == [
            handle.last_plans[0].layout.vision_tokens
        ] * 2
        assert handle.last_plans[0].vision_tokens_per_layer()[-1] < handle.last_plans[0].layout.vision_tokens
        for chat, answer in zip(chats, together, strict=True):
            inputs = pipe.processor.apply_chat_template(
                chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            out = pipe.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
            assert pipe.processor.decode(out, skip_special_tokens=True) == answer
