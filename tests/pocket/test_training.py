"""Packing is exact, growing changes nothing, and a killed training goes on as if nothing had happened."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adsc.pocket.building import build_model, build_processor
from adsc.pocket.evaluation import see
from adsc.pocket.packing import answer_logits, pack, turn
from adsc.pocket.questions import questions
from adsc.pocket.scenes import render, scene
from adsc.pocket.training import CONTENT, FACTS, TOKENS, Recipe, choose_tokens, codebook, facts, grow, pixels, train


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def model(processor):
    return build_model(len(processor.tokenizer), num_hidden_layers=3).eval()


@torch.no_grad()
def test_a_packed_question_gets_the_logits_it_gets_alone(model, processor):
    drawn = scene(3)
    asked = questions(drawn, 5)
    packed = pack([[turn(processor.tokenizer, q) for q in asked]])
    logits, targets = answer_logits(model, see(model, processor, [render(drawn)]), packed)
    at = 0
    for question in asked:
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
            {"role": "assistant", "content": question.answer},
        ]
        text = processor.apply_chat_template(messages)
        alone = processor(images=render(drawn), text=text, return_tensors="pt")
        answer = len(processor.tokenizer(question.answer)["input_ids"]) + 1
        expected = model(**alone).logits[0, -answer - 1 : -1]
        torch.testing.assert_close(logits[at : at + answer], expected, atol=2e-5, rtol=0)
        assert targets[at : at + answer].tolist() == alone["input_ids"][0, -answer:].tolist()
        at += answer
    assert at == len(logits)


def test_pixels_are_the_image_processors(processor):
    image = render(scene(5))
    expected = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels(image), expected, atol=1e-6, rtol=0)


def test_facts_and_codes():
    codes = codebook(128)
    torch.testing.assert_close(codes @ codes.T, torch.eye(len(FACTS)), atol=1e-5, rtol=0)
    drawn = scene(4)
    held = facts(drawn)
    assert held[:, FACTS["small"]].sum() + held[:, FACTS["large"]].sum() == len(drawn.things)
    assert held[:, [i for f, i in FACTS.items() if f.startswith("character")]].sum() == len(
        drawn.number.text + drawn.word.text
    )
    chosen = choose_tokens(held[None], 48, seed=1)[0]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == 48
    assert set(held[:, CONTENT].sum(-1).nonzero().flatten().tolist()) <= set(chosen.tolist())


@torch.no_grad()
def test_a_grown_model_computes_the_same(model, processor):
    inputs = processor(images=render(scene(1)), text="<image>where is the red star?", return_tensors="pt")
    deeper = build_model(len(processor.tokenizer), seed=1, num_hidden_layers=7).eval()
    deeper.load_state_dict(grow(model.state_dict(), 7))
    torch.testing.assert_close(deeper(**inputs).logits, model(**inputs).logits, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="cannot shrink"):
        grow(model.state_dict(), 2)


@pytest.mark.parametrize("stage", ["decoder", "tower", "join"])
def test_a_resumed_stage_ends_like_an_undisturbed_one(stage, tmp_path):
    recipe = Recipe(
        steps=4, batch=2, layers=2, questions=3, warmup=2, vision_tokens=(32, 48), bf16=False, code_loss=0.1
    )
    train(stage, recipe, tmp_path / "whole", [])

    class Killed(Exception):
        pass

    from adsc.pocket import training

    step, calls = training.Optimizer.step, 0

    def dying(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Optimizer, "step", dying)
        with pytest.raises(Killed):
            train(stage, recipe, tmp_path / "halves", [])
    train(stage, recipe, tmp_path / "halves", [])
    whole, halves = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, atol=0, rtol=0)


def test_the_recipe_is_readable(request):
    stages = yaml.safe_load((request.config.rootpath / "recipes" / "pocket.yaml").read_text())
    assert list(stages) == ["decoder", "tower", "join"]
    assert all(Recipe(**stage).steps > 0 and Recipe(**stage).questions >= 8 for stage in stages.values())
    assert Recipe(**stages["join"]).layers >= 20
    assert TOKENS == 256
