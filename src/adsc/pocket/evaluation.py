"""Does the model in the box see, and does it need its vision tokens?

    python -m adsc.pocket.evaluation --processes 2        # all conditions, stored test split → results/pocket/test.json

Conditions: ``dense``, the model as it is; ``blind``, no image at all; ``noise``, an image of random pixels;
``other image``, another scene's; ``downsampled 1/9``, the image shrunk to a third of its side and enlarged again (all
its vision tokens, a ninth of its pixels); ``downsampled tokens 1/9``, the image shrunk to 5 x 5 patches and fed as 25
vision tokens, position embeddings interpolated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from adsc.evaluation.record import store
from adsc.evaluation.statistics import clustered_mean
from adsc.pocket import MODEL_FOLDER
from adsc.pocket.packing import answer_logits, image_logits, pack, turn
from adsc.pocket.questions import Question
from adsc.pocket.scenes import IMAGE_SIZE, PATCH_SIZE
from adsc.pocket.splits import load

Rows = list[tuple[Image.Image, list[Question]]]


def see(model: LlavaForConditionalGeneration, processor: Any, images: list[Image.Image]) -> Tensor:
    """Projected vision tokens (rows, n, width), through the processor and the model's own way to features."""
    seen = processor.image_processor([[image] for image in images], return_tensors="pt").to(model.device)
    features = model.get_image_features(**seen, return_dict=True).pooler_output
    return torch.stack(list(features))


def _nothing(model: LlavaForConditionalGeneration, processor: Any, images: list[Image.Image]) -> Tensor:
    return torch.zeros(len(images), 0, model.lm_head.in_features, device=model.device)


def _few_tokens(model: LlavaForConditionalGeneration, processor: Any, images: list[Image.Image]) -> Tensor:
    side = round(IMAGE_SIZE / PATCH_SIZE / 3) * PATCH_SIZE
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    small = processor.image_processor(images, return_tensors="pt", **size).to(model.device)
    hidden = model.model.vision_tower(**small, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(hidden)


def _noise(images: list[Image.Image]) -> list[Image.Image]:
    rng = random.Random(0)
    return [Image.frombytes("RGB", i.size, rng.randbytes(3 * i.width * i.height)) for i in images]


def _shrunk(images: list[Image.Image]) -> list[Image.Image]:
    side = round(IMAGE_SIZE / 3)
    return [i.resize((side, side), Image.Resampling.BICUBIC).resize(i.size, Image.Resampling.BICUBIC) for i in images]


# What is shown in place of an image; or what stands for its vision tokens, where these are not all there.
CHANGED: dict[str, Callable[[list[Image.Image]], list[Image.Image]]] = {
    "dense": lambda images: images,
    "noise": _noise,
    "other image": lambda images: images,
    "downsampled 1/9": _shrunk,
}
FEATURES: dict[str, Callable[[LlavaForConditionalGeneration, Any, list[Image.Image]], Tensor]] = {
    "blind": _nothing,
    "downsampled tokens 1/9": _few_tokens,
}
CONDITIONS = ("dense", "blind", "noise", "other image", "downsampled 1/9", "downsampled tokens 1/9")


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: Any,
    rows: Rows,
    condition: str = "dense",
    batch: int = 16,
    progress: bool = True,
) -> list[list[bool]]:
    """For each image and question: is the greedy answer right, word for word?

    A method that is attached to the model reduces it, but for ``downsampled tokens 1/9``.
    """
    images = [image for image, _ in rows]
    if condition == "other image":
        images = images[1:] + images[:1]
    correct: list[list[bool]] = []
    for at in track(range(0, len(rows), batch), description=f"{condition:24}", disable=not progress):
        turns = [[turn(processor.tokenizer, q) for q in asked] for _, asked in rows[at : at + batch]]
        packed = pack(turns).to(model.device)
        if condition in FEATURES:
            features = FEATURES[condition](model, processor, images[at : at + batch])
            logits, _ = answer_logits(model, features, packed)
        else:
            shown = [[image] for image in CHANGED[condition](images[at : at + batch])]
            seen = processor.image_processor(shown, return_tensors="pt").to(model.device)
            logits, _ = image_logits(model, seen, packed)
        correct += packed.correct(logits)
    return correct


@torch.inference_mode()
def answers_alone(model: Any, processor: Any, rows: Rows, batch: int = 32) -> list[list[bool]]:
    """As :func:`answers`, but every question in a row of its own, as the processor writes it."""
    pairs = [(image, question) for image, asked in rows for question in asked]
    hits: list[bool] = []
    for at in range(0, len(pairs), batch):
        some = pairs[at : at + batch]
        texts = [processor.apply_chat_template(_exchange(question), tokenize=False) for _, question in some]
        images = [[image] for image, _ in some]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt").to(model.device)
        targets = [torch.tensor(turn(processor.tokenizer, question)[1]) for _, question in some]
        keep = max(map(len, targets)) + 1  # rows are padded on the left
        likeliest = model(**inputs, use_cache=False, logits_to_keep=keep).logits.argmax(-1).cpu()
        hits += [
            bool((said[-len(target) - 1 : -1] == target).all()) for said, target in zip(likeliest, targets, strict=True)
        ]
    left = iter(hits)
    return [[next(left) for _ in asked] for _, asked in rows]


def _exchange(question: Question) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
        {"role": "assistant", "content": question.answer},
    ]


def chance(rows: Rows) -> dict[str, float]:
    """Accuracy of the best fixed answer to each form of question, for each task: what the words alone are worth."""
    seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for _, asked in rows:
        for question in asked:
            seen[question.task, question.form][question.answer] += 1
    tasks = sorted({task for task, _ in seen})
    return {
        task: sum(c.most_common(1)[0][1] for (t, _), c in seen.items() if t == task)
        / sum(c.total() for (t, _), c in seen.items() if t == task)
        for task in tasks
    }


def summary(rows: Rows, correct: list[list[bool]]) -> dict[str, dict[str, float | int]]:
    """Accuracy overall and of each task, with 95 % intervals clustered by image."""
    values: dict[str, list[float]] = defaultdict(list)
    clusters: dict[str, list[int]] = defaultdict(list)
    for index, ((_, asked), hits) in enumerate(zip(rows, correct, strict=True)):
        for question, hit in zip(asked, hits, strict=True):
            for name in ("overall", question.task):
                values[name].append(hit)
                clusters[name].append(index)
    return {name: clustered_mean(values[name], clusters[name]).to_dict() for name in sorted(values)}


def figures_of(arguments: argparse.Namespace, condition: str) -> dict[str, dict[str, float | int]]:
    """The figures of one condition; loads model and questions, so that it can run in a process of its own."""
    torch.set_num_threads(max(1, torch.get_num_threads() // arguments.processes))
    model = AutoModelForImageTextToText.from_pretrained(arguments.model).to(arguments.device).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    rows = list(load(arguments.split, arguments.images))
    return summary(rows, answers(model, processor, rows, condition))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_FOLDER), help="folder or hub id (default: the model in the box)")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--images", type=int, help="only the first so many images")
    parser.add_argument("--condition", choices=CONDITIONS, action="append", help="default: all")
    parser.add_argument("--processes", type=int, default=1, help="conditions run at once (default: 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: results/pocket/SPLIT.json; '-' prints alone")
    arguments = parser.parse_args()
    names = arguments.condition or list(CONDITIONS)
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(figures_of, [arguments] * len(names), names))
    rows = list(load(arguments.split, arguments.images))
    by_chance, conditions = chance(rows), dict(zip(names, found, strict=True))
    print(f"{'accuracy, %':12}" + "".join(f"{name:>24}" for name in [*names, "chance"]))
    for task in [*sorted(by_chance), "overall"]:
        cells = [conditions[name][task] for name in names]
        shown = [f"{100 * c['mean']:.1f} ± {100 * c['margin_95']:.1f}" for c in cells]
        shown.append(f"{100 * by_chance[task]:.1f}" if task in by_chance else "")
        print(f"{task:12}" + "".join(f"{cell:>24}" for cell in shown))
    out = arguments.out or Path("results/pocket") / f"{arguments.split}.json"
    if str(out) != "-":
        store(out, {"split": arguments.split, "images": len(rows), "chance": by_chance, "conditions": conditions})


if __name__ == "__main__":
    main()
