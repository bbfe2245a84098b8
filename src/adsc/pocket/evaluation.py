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
from adsc.pocket.packing import answer_logits, pack, turn
from adsc.pocket.questions import Question
from adsc.pocket.scenes import IMAGE_SIZE, PATCH_SIZE
from adsc.pocket.splits import load

Rows = list[tuple[Image.Image, list[Question]]]


def see(model: LlavaForConditionalGeneration, processor: Any, images: list[Image.Image]) -> Tensor:
    """Projected vision tokens (rows, n, width), through the processor and the model's own way to features."""
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device)
    features = model.get_image_features(pixels, return_dict=True).pooler_output
    return torch.stack(list(features))


def _nothing(model: LlavaForConditionalGeneration, processor: Any, images: list[Image.Image]) -> Tensor:
    return torch.zeros(len(images), 0, model.lm_head.in_features, device=model.device)


def _noise(model: LlavaForConditionalGeneration, processor: Any, images: list[Image.Image]) -> Tensor:
    rng = random.Random(0)
    return see(
        model, processor, [Image.frombytes("RGB", i.size, rng.randbytes(3 * i.width * i.height)) for i in images]
    )


def _shrunk(model: LlavaForConditionalGeneration, processor: Any, images: list[Image.Image]) -> Tensor:
    side = round(IMAGE_SIZE / 3)
    small = [i.resize((side, side), Image.Resampling.BICUBIC).resize(i.size, Image.Resampling.BICUBIC) for i in images]
    return see(model, processor, small)


def _few_tokens(model: LlavaForConditionalGeneration, processor: Any, images: list[Image.Image]) -> Tensor:
    side = round(IMAGE_SIZE / PATCH_SIZE / 3) * PATCH_SIZE
    pixels = processor.image_processor(
        images, size={"shortest_edge": side}, crop_size={"height": side, "width": side}, return_tensors="pt"
    )["pixel_values"].to(model.device)
    hidden = model.model.vision_tower(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(hidden)


CONDITIONS: dict[str, Callable[[LlavaForConditionalGeneration, Any, list[Image.Image]], Tensor]] = {
    "dense": see,
    "blind": _nothing,
    "noise": _noise,
    "other image": see,
    "downsampled 1/9": _shrunk,
    "downsampled tokens 1/9": _few_tokens,
}


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration, processor: Any, rows: Rows, condition: str = "dense", batch: int = 16
) -> list[list[bool]]:
    """For each image and question: is the greedy answer right, word for word?"""
    images = [image for image, _ in rows]
    if condition == "other image":
        images = images[1:] + images[:1]
    correct: list[list[bool]] = []
    for at in track(range(0, len(rows), batch), description=f"{condition:24}"):
        features = CONDITIONS[condition](model, processor, images[at : at + batch])
        turns = [[turn(processor.tokenizer, q) for q in asked] for _, asked in rows[at : at + batch]]
        packed = pack(turns).to(model.device)
        correct += packed.correct(answer_logits(model, features, packed)[0])
    return correct


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
    parser.add_argument("--condition", choices=tuple(CONDITIONS), action="append", help="default: all")
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
