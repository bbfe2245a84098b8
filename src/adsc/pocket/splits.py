"""The validation and test questions. The test split is stored as files, so that a new Pillow cannot change it.

python -m adsc.pocket.splits        # writes the stored test split again
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from PIL import Image

from adsc.pocket.questions import Question, questions
from adsc.pocket.scenes import SPLIT_SEEDS, Scene, render, scene

TEST_FILE = Path(__file__).parent / "data" / "test.zip"
TEST_SCENES = 2000
PER_TASK = 3200  # questions of a task, over its forms


def balanced(scenes: list[Scene], per_task: int) -> list[tuple[int, Question]]:
    """Questions about scenes, the answers of each form of each task as evenly spread as the scenes allow.

    Returns (scene index, question) pairs, in the order of the scenes.
    """
    pool: dict[tuple[str, str], dict[str, list[tuple[int, Question]]]] = defaultdict(lambda: defaultdict(list))
    for index, each in enumerate(scenes):
        for question in questions(each, 60):
            pool[question.task, question.form][question.answer].append((index, question))
    forms = {task: sum(1 for t, _ in pool if t == task) for task, _ in pool}
    rng, chosen = random.Random("balanced"), list[tuple[int, Question]]()
    for (task, form), by_answer in sorted(pool.items()):
        for found in by_answer.values():
            rng.shuffle(found)
        if form == "number":  # a thousand answers: as they fall
            by_answer = {"": [q for _, found in sorted(by_answer.items()) for q in found]}
        # As many of each answer as the rarest one has; of the 64 cells the rarest are left to be rarer.
        rarest = sorted(map(len, by_answer.values()))[len(by_answer) // 4 if form == "cell" else 0]
        each_answer = min(-(-per_task // forms[task] // len(by_answer)), rarest)
        for _, found in sorted(by_answer.items()):
            chosen += found[:each_answer]
    return sorted(chosen, key=lambda pair: (pair[0], pair[1].text))


def write_test(path: Path = TEST_FILE) -> None:
    """Write the test split: one zip of lossless WebP images and ``questions.jsonl``."""
    scenes = [scene(SPLIT_SEEDS["test"] + i) for i in range(TEST_SCENES)]
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for index, each in enumerate(scenes):
            file = io.BytesIO()
            render(each).save(file, "WEBP", lossless=True, method=6)
            archive.writestr(zipfile.ZipInfo(f"images/{index:04d}.webp"), file.getvalue())
        lines = "".join(json.dumps({"image": i} | asdict(q)) + "\n" for i, q in balanced(scenes, PER_TASK))
        archive.writestr(zipfile.ZipInfo("questions.jsonl"), lines, zipfile.ZIP_DEFLATED)
    partial.replace(path)


@lru_cache(maxsize=1)
def _archive() -> zipfile.ZipFile:
    return zipfile.ZipFile(TEST_FILE)


def stored_questions() -> list[tuple[int, Question]]:
    """All stored test questions, each with the number of its image."""
    rows = [json.loads(line) for line in _archive().read("questions.jsonl").splitlines()]
    return [(row.pop("image"), Question(**row)) for row in rows]


def stored_image(index: int) -> Image.Image:
    """A stored test image, RGB, 128 x 128."""
    return Image.open(io.BytesIO(_archive().read(f"images/{index:04d}.webp"))).convert("RGB")


def load(split: str, count: int | None = None) -> Iterator[tuple[Image.Image, list[Question]]]:
    """Images of ``"validation"`` or ``"test"`` with their questions, the first ``count`` of them (validation: 500)."""
    if split == "test":
        asked = stored_questions()
        amount = TEST_SCENES
    else:
        amount = count or 500
        drawn = [scene(SPLIT_SEEDS[split] + i) for i in range(amount)]
        asked = balanced(drawn, amount * 2)
    grouped = defaultdict(list)
    for index, question in asked:
        grouped[index].append(question)
    for index in range(amount if count is None else min(amount, count)):
        if grouped[index]:
            yield (stored_image(index) if split == "test" else render(drawn[index])), grouped[index]


if __name__ == "__main__":
    write_test()
