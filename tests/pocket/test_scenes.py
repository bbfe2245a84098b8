"""Scenes and questions: every answer is what the scene says, and the words alone do not give it away."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest

from adsc.pocket.questions import TASKS, Question, questions
from adsc.pocket.scenes import CELL, IMAGE_SIZE, SIGN_HEIGHT, SPLIT_SEEDS, Scene, render, scene
from adsc.pocket.splits import TEST_FILE, TEST_SCENES, balanced, load, stored_image, stored_questions

SCENES = [scene(seed) for seed in range(120)]


def test_a_seed_gives_the_same_scene_and_the_same_picture():
    assert scene(7) == scene(7) != scene(8)
    assert render(scene(7)).tobytes() == render(scene(7)).tobytes()
    assert render(scene(7)).size == (IMAGE_SIZE, IMAGE_SIZE)


def test_things_are_inside_apart_and_not_on_signs():
    overlapping = 0
    for each in SCENES:
        for thing in each.things:
            assert thing.radius < thing.x < IMAGE_SIZE - thing.radius
            assert thing.radius < thing.y < IMAGE_SIZE - thing.radius
            for sign in (each.number, each.word):
                inside = sign.x <= thing.x < sign.x + sign.width and sign.y <= thing.y < sign.y + SIGN_HEIGHT
                assert not inside
        pairs = [(a, b) for i, a in enumerate(each.things) for b in each.things[:i]]
        distances = [(math.dist((a.x, a.y), (b.x, b.y)), a.radius + b.radius) for a, b in pairs]
        assert min(d for d, _ in distances) >= 12
        overlapping += any(d < r for d, r in distances)
    assert overlapping > len(SCENES) // 4, "scenes should hold partly covered objects"


def answer(scene: Scene, text: str) -> str:
    """The answer to a question, found again from its words and the list of objects."""
    things = [(f"{t.color} {t.shape}", t) for t in scene.things]

    def the(named: str):
        found = [t for n, t in things if n == named]
        assert len(found) == 1, f"{named} is not one object"
        return found[0]

    def count(noun: str) -> int:
        noun = noun.removesuffix(" objects")
        singular = noun.removesuffix("es") if noun == "crosses" else noun.removesuffix("s")
        return sum(t.color == noun or t.shape == singular for t in scene.things)

    if m := re.fullmatch(r"is there a (\w+ \w+)\?", text):
        return "yes" if m[1] in dict(things) else "no"
    if m := re.fullmatch(r"what size is the (\w+ \w+)\?", text):
        return the(m[1]).size
    if m := re.fullmatch(r"what color is the (\w+) (\w+)\?", text):
        (color,) = [t.color for t in scene.things if (t.size, t.shape) == (m[1], m[2])]
        return color
    if m := re.fullmatch(r"what shape is the (\w+) (\w+) one\?", text):
        (shape,) = [t.shape for t in scene.things if (t.size, t.color) == (m[1], m[2])]
        return shape
    if m := re.fullmatch(r"how many (.+) are there\?", text):
        return str(count(m[1]))
    if m := re.fullmatch(r"is the (\w+ \w+) (left of|above) the (\w+ \w+)\?", text):
        one, other = the(m[1]), the(m[3])
        return "yes" if (one.x < other.x if m[2] == "left of" else one.y < other.y) else "no"
    if m := re.fullmatch(r"is the (\w+ \w+) larger than the (\w+ \w+)\?", text):
        return "yes" if the(m[1]).radius > the(m[2]).radius else "no"
    if m := re.fullmatch(r"are there more (.+) than (.+)\?", text):
        return "yes" if count(m[1]) > count(m[2]) else "no"
    if m := re.fullmatch(r"where is the (\w+ \w+)\?", text):
        thing = the(m[1])
        return "abcdefgh"[thing.y // CELL] + str(thing.x // CELL + 1)
    return {"what number is printed?": scene.number.text, "what word is printed?": scene.word.text.lower()}[text]


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_what_the_scene_says(task):
    asked = [(each, q) for each in SCENES for q in questions(each, 6, tasks=(task,))]
    assert len(asked) > len(SCENES)
    for each, question in asked:
        assert question.task == task
        assert question.answer == answer(each, question.text), (each, question)


def test_no_question_is_asked_twice_of_a_scene():
    for each in SCENES[:20]:
        texts = [q.text for q in questions(each, 30)]
        assert len(set(texts)) == len(texts)


def test_balancing_makes_guessing_worthless():
    counts: dict[tuple[str, str], Counter[str]] = {}
    for _, question in balanced(SCENES, 200):
        counts.setdefault((question.task, question.form), Counter())[question.answer] += 1
    assert counts["existence", "exists"]["yes"] == counts["existence", "exists"]["no"]
    assert len(set(counts["counting", "color"].values())) == 1


def test_the_stored_test_split():
    asked = stored_questions()
    assert len({image for image, _ in asked}) >= 2000 <= TEST_SCENES
    assert len(asked) >= 20_000
    tasks = Counter(q.task for _, q in asked)
    assert set(tasks) == set(TASKS)
    assert min(tasks.values()) >= 2000
    assert len({(image, q.text) for image, q in asked}) == len(asked)
    assert TEST_FILE.stat().st_size < 6 * 2**20
    for form in {(q.task, q.form) for _, q in asked}:
        answers = Counter(q.answer for _, q in asked if (q.task, q.form) == form)
        assert max(answers.values()) <= 1.1 * answers.total() / len(answers) or form[1] == "number"
    for image, question in asked[::37]:
        assert question.answer == answer(scene(SPLIT_SEEDS["test"] + image), question.text)


def test_stored_images_are_the_drawn_ones():
    import numpy as np

    for index in (0, 999, 1999):
        stored, drawn = np.asarray(stored_image(index)), np.asarray(render(scene(SPLIT_SEEDS["test"] + index)))
        # Another Pillow may draw an edge or a letter a little differently.
        assert np.abs(stored.astype(int) - drawn).mean() < 2


def test_splits_are_disjoint_and_load():
    starts = sorted(SPLIT_SEEDS.values())
    assert starts[0] + TEST_SCENES < starts[1]
    for split in ("validation", "test"):
        rows = list(load(split, 12))
        assert rows
        assert all(isinstance(q, Question) and i.size == (128, 128) for i, asked in rows for q in asked)
