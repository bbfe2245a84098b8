"""Training time, reduced against dense: forward, backward and optimiser step of the same batches in one trainer, in
turns, median of paired ratios; with self-distillation and without. Processor time of one thread.

    python benchmarks/training_step.py recipes/pocket-elastic.yaml --rounds 12
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from adsc.evaluation.record import store
from adsc.schedule import Schedule
from adsc.training.recipe import read
from adsc.training.trainer import ADSCTrainer, trainer_for


def seconds(trainer: ADSCTrainer, batch: dict[str, Any], optimizer: torch.optim.Optimizer) -> float:
    """Processor time of one step."""
    start = time.process_time()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rounds", type=int, default=12, help="batches, each by every schedule (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/training-step.json"), help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(read(options.recipe, [f"output={folder}/run", "training.report_to=none"]))
        trainer.curriculum, distillation = None, trainer.distillation
        trainer.model.train()
        optimizer = torch.optim.AdamW(p for p in trainer.model.parameters() if p.requires_grad)
        schedules = trainer.budgets() | {"1": Schedule.none()}
        arms = [(name, teacher) for name in schedules for teacher in (distillation, None)]
        took: dict[str, list[float]] = {f"{name}{', distilled' if teacher else ''}": [] for name, teacher in arms}
        rng, batches = np.random.default_rng(0), iter(trainer.get_train_dataloader())
        for turn in track(range(-1, options.rounds), "batches"):
            batch = next(batches)
            for at in rng.permutation(len(arms)):
                name, trainer.distillation = arms[at]
                trainer.method = replace(trainer.method, schedule=schedules[name])
                spent = seconds(trainer, batch, optimizer)
                if turn >= 0:  # what comes before is warm-up
                    took[list(took)[at]].append(spent)
    figures = {}
    for name, times in took.items():
        # A dense training needs no teacher: what is saved is told against that.
        ratios = np.array(times) / np.array(took["1"])
        draws = [np.median(rng.choice(ratios, len(ratios))) for _ in range(2000)]
        low, high = np.quantile(draws, [0.025, 0.975])
        figures[name] = {
            "schedule": str(schedules[name.partition(",")[0]]),
            "seconds": round(float(np.median(times)), 3),
            "ratio": round(float(np.median(ratios)), 4),
            "interval": [round(float(low), 4), round(float(high), 4)],
        }
        print(f"{name:16} {figures[name]['ratio']:.3f} of a dense step ({low:.3f} to {high:.3f})")
    command = f"python benchmarks/training_step.py {options.recipe} --rounds {options.rounds}"
    store(options.out, {"a step, against a dense one without a teacher": figures}, seed=0, command=command)


if __name__ == "__main__":
    main()
