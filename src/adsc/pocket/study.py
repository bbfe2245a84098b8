"""The evidence on the model in the box: what quality is left at a budget, untrained and trained, and what that saves.

    python -m adsc.pocket.study layers          # where the model reads → results/pocket/layers.{json,md}, validation
    python -m adsc.pocket.study predict --name untrained --schedules-of ADAPTER --retained 1 1/3 2/9 1/9 1/18
    python -m adsc.pocket.study predict --name untrained --condition "downsampled 1/9"
    python -m adsc.pocket.study predict --name dense --seed 0 --model CONTROL --retained 1
    python -m adsc.pocket.study predict --name adsc --seed 0 --model ADAPTER --retained 1 1/3 2/9 1/9 1/18
    python -m adsc.pocket.study table           # → results/pocket/main.{json,md,csv}, from stored answers alone
    python -m adsc.report.slope results/pocket/main.json results/pocket/slope.png
    python -m adsc.pocket.study ablate recipes/ablations.yaml --processes 2
    python -m adsc.pocket.study ablations recipes/ablations.yaml        # → results/pocket/ablations.{json,md}

``untrained`` is the model as it ships, ``dense`` the same with an adapter that was trained without reduction on the
same data for as many steps: the fair 100 %. Every average is over questions, with a 95 % interval clustered by image.

The **difficult subset** holds the questions that the model as it ships, dense, answers wrongly when the image is shrunk
to a third of its side and enlarged again (``downsampled 1/9``): what plain downsampling loses. The image keeps its
layout and all its vision tokens, so what is lost is detail. Fed as 25 tokens instead, the model fails at nearly
everything (31 % right), because it has never seen such a grid: that would say little about a question.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from ..errors import InputError
from ..evaluation.record import store
from ..evaluation.statistics import Mean, clustered_mean, clustered_mean_of_groups, clustered_ratio
from ..hf.checkpoint import read_config
from . import MODEL_FOLDER
from .ablations import Ablations
from .building import vision_tokens
from .predictions import CONDITIONS, OWN, PRECISIONS, Asked, Predictions, fingerprint, predict, read, read_all
from .questions import TASKS
from .splits import load

APART = ("grounding", "reading")  # which averages hide
GOALS = {"1/3": 0.996, "2/9": 0.993, "1/9": 0.983}  # of dense: the best published trained methods
FLOOR = {"1/3": 0.982}  # the paper's claim
BUDGETS = ("1/3", "2/9", "1/9", "1/18")
SEEDS = (0, 1, 2)
NO_WORSE = 0.005  # than the shipped model: what training on the same data without reduction may lose
LABELS = {"untrained": "reduced, untrained", "adsc": "ADSC trained", "dense": "dense, same extra training"}
SHIPPED = "dense, as shipped"


@dataclass(frozen=True)
class Questions:
    """Of each question of a split its task and the number of its image, both ``(questions,)``."""

    tasks: NDArray[np.str_]
    images: NDArray[np.int64]

    def groups(self, difficult: NDArray[np.bool_] | None) -> dict[str, NDArray[np.bool_]]:
        """Which questions each column of the table is about; columns about a single image, without interval, go."""
        groups = {"overall": np.ones(len(self.tasks), dtype=bool)}
        groups |= {task: self.tasks == task for task in APART}
        groups["the other five"] = ~np.isin(self.tasks, APART)
        if difficult is not None:
            groups["difficult"] = difficult
        groups |= {task: self.tasks == task for task in sorted(TASKS) if task not in APART}
        return {name: chosen for name, chosen in groups.items() if len(np.unique(self.images[chosen])) > 1}


def questions_of(split: str, images: int | None) -> tuple[Questions, dict[str, Any]]:
    """The questions of a split in the order of the stored answers, and their fingerprint."""
    asked = [questions for _, questions in load(split, images)]
    tasks = np.array([question.task for questions in asked for question in questions])
    return Questions(tasks, np.repeat(np.arange(len(asked)), list(map(len, asked)))), fingerprint(asked)


def figures(found: Sequence[Predictions], questions: Questions) -> dict[str, Any]:
    """All figures of the main table, as JSON values.

    Parameters
    ----------
    found
        Stored answers: ``untrained`` (at budget 1 the shipped model, dense), ``dense`` and ``adsc``.
    questions
        What they are about.

    Returns
    -------
    ``rows``, one for each name and budget, and ``missing``, what the whole table would need beside.
    """
    stored = {(p.about["name"], p.about["condition"], p.about["retained"], p.about["seed"]): p for p in found}
    rights: dict[tuple[str, str], dict[int | None, Predictions]] = {}
    for (name, condition, retained, seed), each in stored.items():
        if condition == "dense" and name in LABELS:
            rights.setdefault((name, retained), {})[seed] = each
    shrunk = stored.get(("untrained", CONDITIONS[1], "1", None))
    groups = questions.groups(None if shrunk is None else ~shrunk.right)
    fair = _mean_right(rights.get(("dense", "1"), {}))
    rows = []
    for (name, retained), by_seed in sorted(rights.items(), key=_order):
        right, about = _mean_right(by_seed), next(iter(by_seed.values())).about
        assert right is not None
        row: dict[str, Any] = {
            "name": name,
            "label": SHIPPED if (name, retained) == ("untrained", "1") else LABELS[name],
            "retained": retained,
            **{key: about[key] for key in ("share", "schedule", "pattern", "positions", "cost", "precision")},
            "seeds": {str(seed): float(p.right.mean().round(5)) for seed, p in sorted(by_seed.items(), key=str)},
            "quality": {g: clustered_mean(right[at], questions.images[at]).to_dict() for g, at in groups.items()},
            "mean over tasks": clustered_mean_of_groups(right, questions.tasks, questions.images).to_dict(),
        }
        if len(by_seed) > 1:
            row["deviation over seeds"] = round(float(np.std(list(row["seeds"].values()), ddof=1)), 5)
        if fair is not None:
            of_dense = {
                g: clustered_ratio(right[at], fair[at], questions.images[at])
                for g, at in groups.items()
                if fair[at].any()
            }
            row["of dense"] = {g: mean.to_dict() for g, mean in of_dense.items()}
            if name == "adsc":
                row |= _goals(retained, of_dense["overall"])
        rows.append(row)
    result: dict[str, Any] = {"rows": rows, "missing": _missing(stored.keys()), "card": _card(rows)}
    shipped = _mean_right(rights.get(("untrained", "1"), {}))
    if fair is not None and shipped is not None:
        change = clustered_mean(fair - shipped, questions.images)
        result["control"] = {
            "dense with the same training, less the shipped model": change.to_dict(),
            "no worse by more than": NO_WORSE,
            "holds": bool(change.value >= -NO_WORSE),
        }
    return result


def _mean_right(by_seed: dict[int | None, Predictions]) -> NDArray[np.float64] | None:
    """Part of the seeds that answered each question right."""
    return np.mean([each.right for each in by_seed.values()], axis=0) if by_seed else None


def _order(item: tuple[tuple[str, str], Any]) -> tuple[bool, int, Fraction]:
    (name, retained), _ = item
    names = ["untrained", "dense", "adsc"]
    return retained != "1" or name == "adsc", names.index(name), -Fraction(retained)


def _goals(retained: str, reached: Mean) -> dict[str, Any]:
    return {
        name: {"of dense": goals[retained], "reached": bool(round(reached.value, 5) >= goals[retained])}
        for name, goals in (("goal", GOALS), ("floor", FLOOR))
        if retained in goals
    }


def _missing(stored: Any) -> list[str]:
    wanted: list[tuple[str, str, str, int | None]] = []
    wanted += [("untrained", "dense", r, None) for r in ("1", *BUDGETS)] + [("untrained", CONDITIONS[1], "1", None)]
    wanted += [("dense", "dense", "1", seed) for seed in SEEDS]
    wanted += [("adsc", "dense", r, seed) for r in BUDGETS for seed in SEEDS]
    missing: dict[str, list[str]] = {}
    for name, condition, retained, seed in wanted:
        if (name, condition, retained, seed) not in stored:
            what = f"{name} at {retained}" + ("" if condition == "dense" else f", {condition}")
            missing.setdefault(what, []).extend([] if seed is None else [str(seed)])
    return [what + (f" (seed {', '.join(seeds)})" if seeds else "") for what, seeds in missing.items()]


def _card(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The table of an adapter's model card."""
    columns = {"right, %": "overall", **{f"{task}, %": task for task in APART}}
    return {
        row["label"] + ("" if row["retained"] == "1" and row["name"] != "adsc" else f" at {row['retained']}"): {
            **{column: percent(row["quality"].get(group)) for column, group in columns.items()},
            "of dense, %": percent(row.get("of dense", {}).get("overall"), 2),
        }
        for row in rows
    }


def percent(value: dict[str, Any] | None, digits: int = 1) -> str:
    """``{"mean": 0.9, "margin_95": 0.01}`` is ``90.0 ± 1.0``."""
    if value is None:
        return "–"
    return f"{100 * value['mean']:.{digits}f} ± {100 * value['margin_95']:.{digits}f}".replace("-", "−")


def _change(ratio: float | None) -> str:
    return "" if ratio is None else f"{100 * (ratio - 1):+.1f} %".replace("-", "−") if ratio != 1 else "0 %"


def _verdict(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{'≥' if name == 'goal' else 'floor'} {100 * row[name]['of dense']:.1f}: "
        f"{'reached' if row[name]['reached'] else 'not reached'}"
        for name in ("goal", "floor")
        if name in row
    )


def _text(row: dict[str, Any], groups: Sequence[str]) -> list[str]:
    return [row["label"], row["retained"], *(percent(row["quality"].get(group)) for group in groups)]


def markdown(result: dict[str, Any]) -> str:
    """The figures as tables for people."""
    rows = result["rows"]
    groups = list(rows[0]["quality"])
    first = [g for g in groups if g not in TASKS or g in APART]
    main = [
        [
            *_text(row, first),
            f"{100 * row['deviation over seeds']:.2f}" if "deviation over seeds" in row else "",
            percent(row.get("of dense", {}).get("overall"), 2),
            _verdict(row),
        ]
        for row in rows
    ]
    seeds = max(len(row["seeds"]) for row in rows)
    parts = [
        "# Quality at a budget",
        f"Questions of the {result['split']} split answered right, word for word: {result['questions']:,} questions "
        f"about {result['images']:,} images. In %, with the half-width of a 95 % interval clustered by image; of up "
        f"to {seeds} training seeds the mean, and the standard deviation over seeds in a column of its own. *Of dense* "
        "is the ratio to the dense model with the same extra training, question by question (delta method).",
        _table(("", "retained", *first, "over seeds", "of dense, %", "goal"), main),
    ]
    if "control" in result:
        change = next(iter(result["control"].values()))
        word = "is" if result["control"]["holds"] else "is NOT"
        parts.append(
            f"Dense with the same extra training, less the model as shipped: {percent(change, 2)} points; it {word} "
            f"within {100 * NO_WORSE:.1f} points below."
        )
    if "difficult" in groups:
        count = rows[0]["quality"]["difficult"]["questions"]
        parts.append(
            f"*Difficult*: the {count:,} questions that the dense model as shipped answers wrongly when the image is "
            "plainly downsampled to a ninth of its pixels and enlarged again (same number of vision tokens)."
        )
    if result["missing"]:
        parts.append(f"Missing: {'; '.join(result['missing'])}.")
    others = [task for task in groups if task in TASKS]
    tasks = [[*_text(row, others), percent(row["mean over tasks"])] for row in rows]
    parts += ["## Each task", _table(("", "retained", *others, "mean over tasks"), tasks)]
    done, kept = set[tuple[str, str]](), list[list[str]]()
    for row in rows:
        if (row["schedule"], row["pattern"]) in done or not row["schedule"]:
            continue
        done.add((row["schedule"], row["pattern"]))
        costs = [_change(row["cost"].get(key)) for key in ("prefill_flops", "llm_prefill_flops", "kv_bytes")]
        kept.append([row["retained"], f"`{row['schedule']}`", f"{100 * row['share']:.1f} %", row["pattern"], *costs])
    head = ("budget", "schedule", "really retained", "pattern", "prefill FLOPs", "of them language model", "KV cache")
    parts += ["## What it saves", "For one question of the usual length about one image.", _table(head, kept)]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spreadsheet(result: dict[str, Any]) -> str:
    """The figures as CSV, one line for each row and group of questions."""
    file = io.StringIO()
    head = ["name", "retained", "share", "schedule", "seeds", "questions of", "questions", "right", "right_margin_95",
            "of_dense", "of_dense_margin_95", "llm_prefill_flops", "kv_bytes"]  # fmt: skip
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    for row in result["rows"]:
        for group, mean in [*row["quality"].items(), ("mean over tasks", row["mean over tasks"])]:
            ratio = row.get("of dense", {}).get(group, {})
            writer.writerow([
                row["name"], row["retained"], row["share"], row["schedule"], len(row["seeds"]), group,
                mean["questions"], mean["mean"], mean["margin_95"], ratio.get("mean"), ratio.get("margin_95"),
                row["cost"]["llm_prefill_flops"], row["cost"]["kv_bytes"],
            ])  # fmt: skip
    return file.getvalue()


def write(path: Path, text: str) -> None:
    """To a temporary name, then renamed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def tabulate(folder: Path, split: str, images: int | None) -> dict[str, Any]:
    """Make the main table of what is stored in ``folder``.

    Raises
    ------
    InputError
        When nothing is stored, or it is about other questions.
    """
    stored = Asked("", split=split, images=images, folder=folder / "predictions").path("").parent
    found = read_all(stored)
    if not found:
        raise InputError(f"there are no predictions in {stored}; make them with python -m adsc.pocket.study predict")
    questions, asked = questions_of(split, images)
    if found[0].about["questions"] != asked:
        raise InputError(f"{stored} is about other questions than the {split} split; delete it and predict again")
    if len(np.unique(questions.images)) < 2:
        raise InputError("a table needs at least 2 images, for its intervals; predict with more")
    about = {"split": split, "images": len(np.unique(questions.images)), "questions": asked["count"]}
    result = about | figures([each for each in found if each.about["retained"] != OWN], questions)
    store(folder / "main.json", result)
    write(folder / "main.md", markdown(result))
    write(folder / "main.csv", spreadsheet(result))
    return result


def layers(asked: Asked, folder: Path, processes: int = 1) -> str:
    """Where a model reads its vision tokens: what is right when all but the last of them go in front of a layer.

    Writes ``layers.json`` and ``layers.md`` into ``folder``, and returns the latter.
    """
    config = read_config(asked.model)
    depth, tokens = config.get_text_config().num_hidden_layers, vision_tokens(config.model_type)
    cuts = [f"{layer}:1/{tokens}" for layer in range(1, depth)]
    paths = predict(replace(asked, name="layers", retained=(*cuts, "1")), processes)
    questions, fingerprints = questions_of(asked.split, asked.images)
    groups = questions.groups(None)
    rows: list[dict[str, Any]] = []
    for layer, path in enumerate(paths, start=1):
        right = read(path).right
        quality = {name: clustered_mean(right[at], questions.images[at]).to_dict() for name, at in groups.items()}
        rows.append({"layers with vision tokens": layer, "quality": quality})
    about = {"split": asked.split, "images": len(np.unique(questions.images)), "questions": fingerprints["count"]}
    store(folder / "layers.json", about | {"rows": rows})
    shown = [[str(row["layers with vision tokens"]), *(f"{100 * mean['mean']:.1f}" for mean in row["quality"].values())]
             for row in rows]  # fmt: skip
    text = (
        "# Where the model in the box reads its vision tokens\n\n"
        f"In % right of {about['questions']:,} questions of the {asked.split} split about {about['images']:,} images, "
        "when all but the last vision token go behind so many layers. Untrained. Where a row is better than the one "
        "above, the layer between them reads.\n\n" + _table(("layers", *groups), shown) + "\n"
    )
    write(folder / "layers.md", text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.add_argument("--folder", type=Path, default=Path("results/pocket"), help="default: results/pocket")
        made.add_argument("--split", choices=("validation", "test"), default="test", help="default: %(default)s")
        made.add_argument("--images", type=int, help="only the first so many images, stored apart")
        return made

    one = command("predict", "Ask all questions at some budgets and store who was right; goes on after a kill.")
    one.add_argument("--name", required=True, help="untrained, dense, adsc, or another")
    one.add_argument("--seed", type=int, help="of the training")
    one.add_argument("--model", default=str(MODEL_FOLDER), help="model or adapter (default: the model in the box)")
    one.add_argument("--schedules-of", metavar="ADAPTER", help="take the schedules that are saved there")
    one.add_argument("--retained", nargs="+", default=["1"], metavar="BUDGET", help="default: 1, dense")
    one.add_argument("--condition", choices=CONDITIONS, default="dense")
    one.add_argument("--precision", choices=PRECISIONS, default="float32")
    one.add_argument("--processes", type=int, default=1, help="parts of the work done at once (default: 1)")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command("table", "The main table, from what is stored.")
    where = command("layers", "Drop all vision tokens but one in front of each layer: where does the model read them?")
    where.add_argument("--model", default=str(MODEL_FOLDER), help="default: the model in the box")
    where.add_argument("--processes", type=int, default=1, help="parts of the work done at once (default: 1)")
    where.set_defaults(split="validation")
    runs = {
        "ablate": command("ablate", "Train the runs of an ablation one after another, and predict on validation."),
        "ablations": command("ablations", "The table of the ablations, from what is stored."),
    }
    for made in runs.values():
        made.add_argument("recipe", type=Path, metavar="ABLATIONS.yaml")
        made.set_defaults(split="validation")
    runs["ablate"].add_argument("--only", metavar="GROUP-VALUE", action="append", help="this run; default: all")
    runs["ablate"].add_argument("--processes", type=int, default=1, help="runs at once (default: 1)")
    given = parser.parse_args(arguments)
    try:
        _run(given)
    except InputError as error:
        sys.exit(f"error: {error}")


def _run(given: argparse.Namespace) -> None:
    for name in ("torchao", "torch.utils._pytree"):  # which talk when PEFT loads them
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if given.command == "predict":
        if given.processes < 1:
            raise InputError(f"--processes {given.processes} must be at least 1")
        options = {field.name: getattr(given, field.name) for field in fields(Asked) if field.name in given}
        folder = given.folder / "predictions"
        asked = Asked(**options | {"retained": tuple(given.retained), "folder": folder})
        for path in predict(asked, given.processes):
            print(f"{path}: {100 * read(path).about['accuracy']:.2f} % right")
    elif given.command == "layers":
        asked = Asked("layers", model=given.model, split=given.split, images=given.images)
        print(layers(replace(asked, folder=given.folder / "predictions"), given.folder, given.processes))
    elif given.command == "table":
        result = tabulate(given.folder, given.split, given.images)
        print(markdown(result))
        if result["missing"]:
            print(f"missing: {'; '.join(result['missing'])}", file=sys.stderr)
    else:
        ablations = Ablations.read(given.recipe)
        asked = Asked("", split=given.split, images=given.images, folder=given.folder / "predictions")
        if given.command == "ablate":
            ablations.run(asked, given.only, given.processes, given.recipe)
        else:
            print(ablations.table(asked, given.folder))


if __name__ == "__main__":
    main()
