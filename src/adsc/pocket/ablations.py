"""Ablations of the training: a base recipe, and runs that each change one thing of it, trained and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from ..errors import InputError
from ..evaluation.record import store
from ..evaluation.statistics import clustered_mean
from .predictions import OWN, Asked, Predictions, fingerprint, predict, read
from .splits import load

BASE = "base"


@dataclass(frozen=True)
class Run:
    """One run: the value of its group, and the keys of the recipe that make it. Without keys it is the base."""

    group: str
    value: str
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Of its folder and its stored answers."""
        return f"{self.group}-{self.value}".replace(" ", "_") if self.changes else BASE


@dataclass(frozen=True)
class Ablations:
    """A file of ablations. The first run of each group is what the others of that group are compared with.

    Attributes
    ----------
    recipe
        The base recipe, with ``changes`` that all runs share.
    output
        Folder of the runs.
    retained
        The budget to predict at: a saved one, or ``own``, the schedule that the adapter was saved with.
    runs
        In the order in which they are made and shown.
    """

    recipe: Path
    changes: tuple[tuple[str, Any], ...]
    output: Path
    retained: str
    runs: tuple[Run, ...]

    @classmethod
    def read(cls, path: Path) -> Ablations:
        """Read the YAML file (see ``recipes/ablations.yaml``).

        Raises
        ------
        InputError
            When it is not valid, or names a run twice.
        """
        from ..training.recipe import _parse

        try:
            values = _parse(path.read_text(encoding="utf-8"), str(path))
            runs = tuple(
                Run(str(each["group"]), str(each["value"]), tuple((each.get("set") or {}).items()))
                for each in values["runs"]
            )
            base = tuple((values.get("set") or {}).items())
            made = cls(Path(values["base"]), base, Path(values["output"]), str(values.get("retained", OWN)), runs)
        except (OSError, KeyError, TypeError, AttributeError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{path} is no file of ablations ({said}); it needs base, output and runs") from None
        keys = [(run.group, run.value) for run in runs]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"{path} names {key[0]} {key[1]} twice; give each value of a group once")
        return made

    def unique(self) -> list[Run]:
        """Every run once: the base may stand in several groups."""
        return list({run.name: run for run in self.runs}.values())

    def run(self, asked: Asked, only: Sequence[str] | None, processes: int, source: Path) -> None:
        """Train and predict each run, one process a run; what is there is left out, what was cut goes on.

        Raises
        ------
        InputError
            When a run is not known, or failed; the others are made all the same.
        """
        known = {run.name: run for run in self.unique()}
        if unknown := [name for name in only or () if name not in known]:
            raise InputError(f"there is no run {unknown[0]!r}; the runs are {', '.join(known)}")
        wanted = list(only or known)
        if len(wanted) == 1:
            self._make(known[wanted[0]], asked)
            return
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        failed: dict[str, str] = {}

        def one(name: str) -> None:
            folder = self.output / name
            folder.mkdir(parents=True, exist_ok=True)
            part = [] if asked.images is None else ["--images", str(asked.images)]
            command = [sys.executable, "-m", "adsc.pocket.study", "ablate", str(source), "--only", name, *part,
                       "--folder", str(asked.folder.parent), "--split", asked.split]  # fmt: skip
            with (folder / "log.txt").open("a") as log:
                environment = os.environ | {"OMP_NUM_THREADS": threads}
                status = subprocess.run(command, stdout=log, stderr=log, check=False, env=environment).returncode
            if status:
                last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
                failed[name] = f"{last[0] if last else status} ({folder / 'log.txt'})"
                progress.console.print(f"{name} failed: {failed[name]}")

        with Progress() as progress, ThreadPoolExecutor(processes) as pool:
            for _ in progress.track(pool.map(one, wanted), total=len(wanted), description="ablations"):
                pass
        if failed:
            raise InputError(f"{len(failed)} of {len(wanted)} runs failed ({', '.join(failed)}); run it again")

    def recipe_of(self, run: Run) -> Any:
        """The :class:`adsc.training.recipe.Recipe` of a run (errors as in :func:`adsc.training.recipe.read`)."""
        from ..training.recipe import read

        given = dict(self.changes) | {"output": str(self.output / run.name)} | dict(run.changes)
        return read(self.recipe, [f"{key}={json.dumps(value)}" for key, value in given.items()])

    def _make(self, run: Run, asked: Asked) -> None:
        from ..training.trainer import train

        recipe, adapter = self.recipe_of(run), self.output / run.name / "adapter"
        if not adapter.exists() and train(recipe, resume=True).folder is None:
            sys.exit(f"{run.name} was stopped; the same command goes on")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        which = replace(
            asked, name=run.name, seed=recipe.seed, model=str(adapter), retained=(self.retained,), device=device
        )
        for path in predict(which):
            print(f"{path}: {100 * read(path).about['accuracy']:.2f} % right")

    def table(self, asked: Asked, folder: Path) -> str:
        """Compare what is stored: writes ``ablations.json`` and ``ablations.md``, and returns the latter.

        Raises
        ------
        InputError
            When nothing is stored.
        """
        found: dict[str, Predictions] = {}
        for run in self.unique():
            name = f"{run.name}-*{self.retained.replace('/', '_')}.json"
            paths = sorted(replace(asked, name=run.name).path("").parent.glob(name))
            if paths:
                found[run.name] = read(paths[0])
        if not found:
            raise InputError("there are no predictions of these runs; make them: python -m adsc.pocket.study ablate")
        questions = [some for _, some in load(asked.split, asked.images)]
        print_of = fingerprint(questions)
        for name, each in found.items():
            if each.about["questions"] != print_of:
                raise InputError(f"the predictions of {name} are about other questions; delete and make them again")
        images = np.repeat(np.arange(len(questions)), list(map(len, questions)))
        rows = []
        for run in self.runs:
            if run.name not in found:
                continue
            first = next(each for each in self.runs if each.group == run.group)
            right, about = found[run.name].right, found[run.name].about
            row = {"group": run.group, "value": run.value, "run": run.name, "set": dict(run.changes),
                   **{key: about[key] for key in ("share", "schedule", "pattern", "positions", "seed")},
                   "right": clustered_mean(right, images).to_dict()}  # fmt: skip
            if run != first and first.name in found:
                less = right.astype(float) - found[first.name].right
                row["difference"] = clustered_mean(less, images).to_dict() | {"from": first.value}
            rows.append(row)
        missing = [run.name for run in self.unique() if run.name not in found]
        about = {"split": asked.split, "images": len(questions), "questions": print_of["count"],
                 "recipe": str(self.recipe), "set": dict(self.changes), "retained": self.retained}  # fmt: skip
        store(folder / "ablations.json", about | {"rows": rows, "missing": missing})
        text = _markdown(about, rows, missing)
        partial = folder / "ablations.md.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / "ablations.md")
        return text


def _markdown(about: dict[str, Any], rows: Sequence[dict[str, Any]], missing: Sequence[str]) -> str:
    def points(mean: dict[str, Any], sign: str = "") -> str:
        return f"{100 * mean['mean']:{sign}.1f} ± {100 * mean['margin_95']:.1f}".replace("-", "−")

    lines = ["| group | value | right, % | difference | schedule | really retained |", "|---|---|---|---|---|---|"]
    for row in rows:
        difference = row.get("difference")
        told = "" if difference is None else points(difference, "+")
        lines.append(
            f"| {row['group']} | {row['value']} | {points(row['right'])} | {told} | `{row['schedule']}` | "
            f"{100 * row['share']:.1f} % |"
        )
    parts = [
        "# Ablations",
        f"{about['questions']:,} questions of the {about['split']} split about {about['images']:,} images, one seed. "
        "In %, with the half-width of a 95 % interval clustered by image. Every run changes one thing of the base; the "
        "difference is to the first value of its group, question by question. One seed says nothing of how much "
        "another seed would change.",
        "\n".join(lines),
    ]
    if missing:
        parts.append(f"Missing: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"
