"""The model in the box is a checkpoint like any other, and it sees."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, pipeline

import adsc
from adsc.pocket import MODEL_FOLDER
from adsc.pocket.evaluation import answers, chance, summary
from adsc.pocket.questions import TASKS
from adsc.pocket.splits import load

ROWS = list(load("test", 48))


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(MODEL_FOLDER)


def chat(image, text):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def generate(model, processor, image, text) -> str:
    inputs = processor.apply_chat_template(
        chat(image, text), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    output = model.generate(**inputs)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_is_a_llava_of_the_promised_shape(model, processor):
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.dtype == torch.float32
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert model.config.text_config.model_type == "llama"
    assert model.config.text_config.num_hidden_layers >= 20
    assert processor.tokenizer.is_fast
    inputs = processor(images=ROWS[0][0], text="<image>", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 256
    assert sum(f.stat().st_size for f in MODEL_FOLDER.glob("*.safetensors")) <= 24e6


def test_greedy_answers_are_those_the_packed_evaluation_counts(model, processor):
    rows = [(image, asked[:4]) for image, asked in ROWS[:6]]
    packed = answers(model, processor, rows)
    for (image, asked), hits in zip(rows, packed, strict=True):
        assert [generate(model, processor, image, q.text) == q.answer for q in asked] == hits


def test_it_sees(model, processor):
    figures = {
        c: summary(ROWS, answers(model, processor, ROWS, c)) for c in ("dense", "other image", "downsampled 1/9")
    }
    assert figures["dense"]["overall"]["mean"] > 0.85
    assert figures["downsampled 1/9"]["overall"]["mean"] < figures["dense"]["overall"]["mean"] - 0.1
    assert figures["other image"]["overall"]["mean"] < 0.45


def test_pipeline(processor):
    pipe = pipeline("image-text-to-text", model=str(MODEL_FOLDER))
    image, asked = ROWS[0]
    found = [pipe(text=chat(image, q.text), return_full_text=False)[0]["generated_text"] for q in asked]
    assert sum(f == q.answer for f, q in zip(found, asked, strict=True)) >= len(asked) * 0.6


def test_it_answers_with_a_third_of_its_vision_tokens(model, processor):
    image, asked = ROWS[1]
    dense = generate(model, processor, image, asked[0].text)
    with adsc.compress(
        model, adsc.Schedule.for_budget(model.config.text_config.num_hidden_layers, "2/3", 256)
    ) as handle:
        reduced = generate(model, processor, image, asked[0].text)
        assert handle.last_plans[0].retained < 0.67
    assert dense
    assert reduced


@pytest.fixture
def stored(request):
    return json.loads((request.config.rootpath / "results" / "pocket" / "test.json").read_text())


def test_stored_figures_say_that_it_needs_its_vision_tokens(stored):
    conditions, by_chance = stored["conditions"], stored["chance"]
    assert by_chance == pytest.approx(chance(list(load("test"))))
    assert set(by_chance) == set(TASKS)
    dense = conditions["dense"]
    assert dense["overall"]["mean"] >= 0.9
    for task in TASKS:
        assert dense[task]["mean"] >= 0.8, task
        for condition in ("blind", "noise", "other image"):
            assert conditions[condition][task]["mean"] <= by_chance[task] + 0.1, (condition, task)
    for condition in ("downsampled 1/9", "downsampled tokens 1/9"):
        assert conditions[condition]["overall"]["mean"] <= dense["overall"]["mean"] - 0.1


def test_tracked_files_are_small(request):
    root: Path = request.config.rootpath
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    files = [root / n for n in names.split("\0") if n]
    assert sum(f.stat().st_size for f in files if f.exists()) < 40 * 2**20
