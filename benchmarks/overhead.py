"""What an attached engine costs when it drops nothing: prefill of the model in the box with a method attached at
``retained=1`` against the same model untouched, in turns, median of paired ratios. Processor time of one thread, which
other programs on the machine disturb less than time on the clock.

    python benchmarks/overhead.py --pairs 400
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

import adsc
from adsc.evaluation.record import store
from adsc.pocket import MODEL_FOLDER
from adsc.pocket.splits import load


def seconds(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """Processor time of one prefill."""
    start = time.process_time()
    model(**inputs)
    return time.process_time() - start


@torch.no_grad()
def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400, help="prefills of each model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/overhead.json"), help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(MODEL_FOLDER)
    model = AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()
    image, questions = next(load("test", 1))
    turn = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": questions[0].text}]}
    ]
    inputs = processor.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    rng, ratios, untouched = np.random.default_rng(0), [], []
    for pair in track(range(-20, options.pairs), "pairs"):
        took = {}
        for attached in rng.permutation([False, True]):
            with adsc.compress(model, adsc.Schedule.none()) if attached else nullcontext():
                took[bool(attached)] = seconds(model, inputs)
        if pair >= 0:  # what comes before is warm-up
            ratios.append(took[True] / took[False])
            untouched.append(took[False])
    draws = [np.median(rng.choice(ratios, len(ratios))) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    figures = {
        "tokens": inputs["input_ids"].shape[1],
        "pairs": options.pairs,
        "prefill_seconds": float(np.median(untouched)),
        "ratio": float(np.median(ratios)),
        "interval": [float(low), float(high)],
    }
    store(
        options.out,
        {"overhead of retained=1": figures},
        seed=0,
        command=f"python benchmarks/overhead.py --pairs {options.pairs}",
    )
    print(f"attached / untouched: {figures['ratio']:.4f} (95 % {low:.4f} to {high:.4f}) over {options.pairs} pairs")


if __name__ == "__main__":
    main()
