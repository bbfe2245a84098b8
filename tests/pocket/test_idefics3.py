"""The second architecture on the same scenes: its processor, its training, and that it is reduced like any other."""

from __future__ import annotations

import json
from functools import cache, partial

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import adsc
from adsc.pocket import MODEL_FOLDER, training
from adsc.pocket.building import AROUND_IMAGE, IMAGE, SPECIAL_IDEFICS3, WHOLE_IMAGE, build_model, build_processor
from adsc.pocket.packing import answer_logits, pack, turn
from adsc.pocket.questions import questions
from adsc.pocket.scenes import CHARACTERS, render, scene
from adsc.pocket.training import (
    FACTS,
    SECOND,
    Recipe,
    Scenes,
    adopt,
    codebook,
    collate,
    content,
    export,
    facts,
    groups,
    merged,
    see,
    train,
)

TOKENS = 64


@pytest.fixture(scope="module")
def processor():
    return build_processor("idefics3")


@pytest.fixture(scope="module")
def codes():
    return codebook(128, len(FACTS) + len(SECOND))


@pytest.fixture
def model(processor):
    return build_model(len(processor.tokenizer), architecture="idefics3", num_hidden_layers=4).eval()


def chat(image, text):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def test_a_saved_processor_comes_back_the_same(processor, model, tmp_path):
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(model)
    image = render(scene(5))
    inputs, expected = (
        each.apply_chat_template(
            chat(image, "where is the red star?"), tokenize=True, return_dict=True, return_tensors="pt"
        )
        for each in (again, processor)
    )
    assert inputs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(inputs[name], value, atol=0, rtol=0)
    ids = inputs["input_ids"][0].tolist()
    assert [i for i in ids if i < len(SPECIAL_IDEFICS3)] == [2, 3, AROUND_IMAGE, WHOLE_IMAGE, *[IMAGE] * TOKENS, 6]
    assert inputs["pixel_values"].shape == (1, 1, 3, 128, 128)
    assert inputs["pixel_attention_mask"].all()
    item = Scenes(5, None, 0, images=True)[0]
    torch.testing.assert_close(inputs["pixel_values"][0, 0], item["pixels"], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_packed_question_gets_the_logits_it_gets_alone(model, processor):
    image, asked = render(scene(3)), questions(scene(3), 4)
    packed = pack([[turn(processor.tokenizer, q) for q in asked]])
    pixels = processor.image_processor([[image]], return_tensors="pt")["pixel_values"][0]
    logits, _ = answer_logits(model, see(model, pixels), packed)
    for question in asked:
        messages = [*chat(image, question.text), {"role": "assistant", "content": question.answer}]
        alone = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        answer = len(processor.tokenizer(question.answer)["input_ids"]) + 1
        torch.testing.assert_close(logits[:answer], model(**alone).logits[0, -answer - 1 : -1], atol=2e-5, rtol=0)
        logits = logits[answer:]
    assert not len(logits)


def test_merged_tokens_hold_what_their_patches_hold(codes):
    drawn = scene(4)
    held, together = facts(drawn), merged(facts(drawn))
    assert together.shape == (TOKENS, len(FACTS) + len(SECOND))
    assert content(together).sum() == content(held).sum()
    for thing in drawn.things:
        row, column = thing.cell
        token = together[8 * row + column]
        assert all(token[FACTS[name]] >= 1 for name in (thing.color, thing.shape, thing.size))
        assert token[FACTS[f"row {2 * row}"]] == token[FACTS[f"column {2 * column + 1}"]] == 0.5
    for sign in (drawn.number, drawn.word):
        found = []
        for x, y in sign.centers():
            name = "second character" if x // 8 % 2 else "character"
            token = together[8 * (y // 16) + x // 16]
            found += [c for c in CHARACTERS if token[(FACTS | SECOND)[f"{name} {c}"]]]
        assert "".join(found) == sign.text
    torch.testing.assert_close(codes @ codes.T, torch.eye(len(codes)), atol=1e-5, rtol=0)
    assert set(groups(together)) - set(groups(held)) == {"second character"}


@pytest.mark.parametrize("stage", ["decoder", "tower", "join"])
def test_each_stage_learns(stage, tmp_path, monkeypatch):
    get = cache(Scenes.__getitem__)
    monkeypatch.setattr(Scenes, "__getitem__", lambda self, i: get(self, i % 4))  # so few that 8 steps learn them
    monkeypatch.setattr(training, "validate", lambda *_: {})  # slow, and beside the point
    recipe = Recipe(
        steps=8, batch=4, architecture="idefics3", layers=2, questions=4, warmup=1, bf16=False, evaluate_every=4
    )
    train(stage, recipe, tmp_path, [])
    first, last = (point["loss"] for point in json.loads((tmp_path / "state.json").read_text())["curve"])
    assert last < 0.8 * first


@torch.no_grad()
def test_it_begins_from_the_model_in_the_box(processor, codes):
    source = AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    model = build_model(len(processor.tokenizer), architecture="idefics3").eval()
    adopt(model, source, Scenes(0, None, 0, images=True, tokens=TOKENS), codes)
    # The decoder computes what it computed, on the ids of its own tokenizer.
    text = "is there a red star?"
    old, new = (each.tokenizer(text, return_tensors="pt")["input_ids"] for each in (build_processor(), processor))
    assert not torch.equal(old, new)
    before, after = (m.get_decoder()(ids).last_hidden_state for m, ids in ((source, old), (model, new)))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    # The tower sees from the first step on: other scenes than those its connector was fitted to.
    data = Scenes(1000, None, 0, images=True, tokens=TOKENS)
    batch = collate([data[i] for i in range(24)])
    scores = see(model, batch["pixels"]) @ codes.T
    for group, index in groups(batch["facts"]).items():
        there = batch["facts"][..., index].sum(-1) > 0
        right = scores[..., index][there].argmax(-1) == batch["facts"][..., index][there].argmax(-1)
        assert right.float().mean() > 0.8, group


def test_an_exported_checkpoint_is_reduced_exactly(tmp_path):
    recipe = Recipe(steps=1, batch=2, architecture="idefics3", layers=6, questions=2, bf16=False)
    train("join", recipe, tmp_path / "join", [])
    export(tmp_path / "join" / "model.safetensors", tmp_path / "model", "idefics3")
    assert load_file(tmp_path / "model" / "model.safetensors")["lm_head.weight"].dtype == torch.float16
    model, processor = adsc.load(tmp_path / "model", retained="1/2", attn_implementation="eager")
    assert model.dtype == torch.float32
    inputs = processor.apply_chat_template(
        chat(render(scene(7)), "how many red objects are there?"),
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        reduced = model(**inputs).logits[0]
        (plan,) = model.adsc.last_plans
        assert plan.vision_tokens_per_layer()[0] == TOKENS
        assert plan.vision_tokens_per_layer()[-1] < TOKENS / 2
        model.adsc.remove()
        dense = masked(model, inputs, plan)
    kept = plan.kept(5).tolist()
    torch.testing.assert_close(reduced[kept], dense[kept], atol=1e-5, rtol=0)
    assert (model(**inputs).logits[0, -1] - dense[-1]).abs().max() > 1e-3


def masked(model, inputs, plan):
    """Logits of a dense forward in which dropped tokens stay, hidden as keys from their layer on."""
    length = inputs["input_ids"].shape[1]
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)

    def hide(layer, arguments, keywords, number):
        gone = torch.ones(length, dtype=torch.bool)
        gone[plan.kept(number).tolist()] = False
        mask = causal.masked_fill(gone, torch.finfo(torch.float32).min)
        mask.fill_diagonal_(0)
        return arguments, keywords | {"attention_mask": mask[None, None]}

    layers = model.get_decoder().layers
    hooks = [
        layer.register_forward_pre_hook(partial(hide, number=number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    logits = model(**inputs).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


def test_the_recipe_is_readable(request):
    stages = yaml.safe_load((request.config.rootpath / "recipes" / "pocket-idefics3.yaml").read_text())
    shared = {name: stages.pop(name) for name in ("architecture", "start")}
    assert list(stages) == ["decoder", "tower", "join"]
    assert {Recipe(**shared, **stage).tokens for stage in stages.values()} == {TOKENS}
    assert (request.config.rootpath / shared["start"]).resolve() == MODEL_FOLDER.resolve()
