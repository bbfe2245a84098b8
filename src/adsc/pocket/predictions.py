"""Which questions of a split a model answers right at a budget: asked through the engine, kept as one small file each.

A file holds one bit for each question and all that says how it came about, so that tables are made of files alone and a
run that was killed goes on where it was.
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from ..accounting import cost
from ..config import ADSCConfig
from ..errors import InputError
from ..evaluation.record import store
from ..hf.checkpoint import load as load_model
from ..layout import Layout
from ..methods import ADSC
from ..schedule import Schedule, fraction
from . import MODEL_FOLDER
from .building import around_image, vision_tokens
from .evaluation import CHANGED, Rows, answers, answers_alone
from .packing import turn
from .questions import Question
from .splits import load

FOLDER = Path("results/pocket/predictions")
CONDITIONS = ("dense", "downsampled 1/9")  # see adsc.pocket.evaluation; each image alone decides
PRECISIONS = ("float32", "bfloat16")
CHUNK = 32  # images of one task, at most
OWN = "own"  # in place of a budget: the schedule that the adapter was saved with

Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Asked:
    """Who is asked what.

    Attributes
    ----------
    name, seed
        What the answers are stored as: ``dense``, ``untrained``, ``adsc`` or the name of an ablation, and the seed of
        the training.
    model
        Folder of a model or an adapter, or hub id.
    retained
        Budgets, as text, or schedules like ``6:1/2``; :data:`OWN` is the schedule saved with the adapter.
    schedules_of
        Folder whose saved schedules are used, in place of the model's own.
    condition
        ``dense``, the images as they are, or another of :data:`CONDITIONS`.
    split, images
        ``validation`` or ``test``, and how many of its images (the first ones) if not all.
    precision
        ``float32``, or ``bfloat16``: autocast and eager attention.
    folder
        Where the answers go, in a folder for each split.
    device
        Where the model runs.
    """

    name: str
    seed: int | None = None
    model: str = str(MODEL_FOLDER)
    retained: tuple[str, ...] = ("1",)
    schedules_of: str | None = None
    condition: str = "dense"
    split: str = "test"
    images: int | None = None
    precision: str = "float32"
    folder: Path = FOLDER
    device: str = "cpu"

    def path(self, retained: str) -> Path:
        """The file with the answers at one budget."""
        seed = "" if self.seed is None else f"-seed{self.seed}"
        shown = "" if self.condition == "dense" else "-" + self.condition.replace(" ", "-").replace("/", "_")
        part = "" if self.images is None else f"-first-{self.images}"
        at = retained.replace("/", "_").replace(":", "-")
        return self.folder / f"{self.split}{part}" / f"{self.name}{seed}-{at}{shown}.json"


@dataclass(frozen=True, eq=False)
class Predictions:
    """What is stored.

    Attributes
    ----------
    right
        For each question of the split, in its order, whether the answer was right, word for word: ``(questions,)``.
    about
        All else in the file: ``name``, ``seed``, ``retained``, ``condition``, ``schedule``, ``share`` (of the vision
        tokens that are there, on average over layers), ``cost`` (reduced over dense), and where it came from.
    """

    right: Bits
    about: dict[str, Any]


def read(path: Path) -> Predictions:
    """Read stored answers.

    Raises
    ------
    InputError
        When the file does not hold any.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        packed = np.frombuffer(base64.b64decode(about.pop("right")), dtype=np.uint8)
        right = np.unpackbits(packed, count=about["questions"]["count"]).astype(bool)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no predictions ({error}); delete it and make it again") from None
    return Predictions(right, about)


def read_all(folder: Path) -> list[Predictions]:
    """All stored answers of a folder, which have to be about the same questions.

    Raises
    ------
    InputError
        When they are not.
    """
    found = {path: read(path) for path in sorted(folder.glob("*.json"))}
    for path, each in found.items():
        first = next(iter(found.values()))
        if each.about["questions"] != first.about["questions"]:
            raise InputError(f"{path} is about other questions than {next(iter(found))}; delete the older one")
    return list(found.values())


def fingerprint(questions: Sequence[Sequence[Question]]) -> dict[str, Any]:
    """Of the questions about each image: tells whether two files are about the same."""
    asked = [[asdict(question) for question in some] for some in questions]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    return {"count": sum(map(len, asked)), "digest": digest}


def predict(asked: Asked, processes: int = 1) -> list[Path]:
    """Ask all questions of the split at every budget and store who was right. What is stored already is left out.

    Returns
    -------
    The file of each budget.

    Raises
    ------
    InputError
        When a stored file came about in another way, or a folder, budget, condition or precision is not there.
    """
    if asked.condition not in CONDITIONS:
        raise InputError(f"condition {asked.condition!r} is unknown; choose one of {', '.join(CONDITIONS)}")
    if asked.precision not in PRECISIONS:
        raise InputError(f"precision {asked.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    rows = list(load(asked.split, asked.images))
    model, processor = _open(asked)
    methods = {retained: _method(asked, model, retained) for retained in asked.retained}
    shared = {
        "name": asked.name,
        "condition": asked.condition,
        "split": asked.split,
        "images": len(rows),
        "questions": fingerprint([questions for _, questions in rows]),
        "model": "the model in the box" if asked.model == str(MODEL_FOLDER) else asked.model,
        "weights": _digest(model),
        "precision": asked.precision,
    }
    abouts = {
        retained: shared | {"retained": retained} | _about(method, model.config, processor, rows)
        for retained, method in methods.items()
    }
    wanted = {r: method for r, method in methods.items() if not _is_stored(asked.path(r), asked.seed, abouts[r])}
    # Images with as much text side by side: less padding.
    order = sorted(range(len(rows)), key=lambda row: sum(len(q.text) for q in rows[row][1]))
    size = min(CHUNK, -(-len(rows) // processes))
    chunks = [order[at : at + size] for at in range(0, len(rows), size)]
    tasks = [(method, chunk) for method in wanted.values() for chunk in chunks]
    with Progress(disable=not tasks) as progress, _asking(asked, processes, len(tasks)) as ask:
        bar = progress.add_task(asked.name, total=len(tasks))
        results = ask(tasks)
        for retained in wanted:
            progress.update(bar, description=f"{asked.name} at {retained}")
            hits: dict[int, list[bool]] = {}
            for chunk in chunks:
                hits |= zip(chunk, next(results), strict=True)
                progress.advance(bar)
            right = np.array([hit for row in range(len(rows)) for hit in hits[row]])
            bits = base64.b64encode(np.packbits(right).tobytes()).decode()
            mean = {"accuracy": round(float(right.mean()), 5)}
            store(asked.path(retained), abouts[retained] | mean | {"right": bits}, asked.seed)
    return [asked.path(retained) for retained in asked.retained]


def _open(asked: Asked) -> tuple[Any, Any]:
    attention = {"attn_implementation": "eager"} if asked.precision == "bfloat16" else {}
    model, processor = load_model(asked.model, retained=1, dtype=torch.float32, **attention)
    return model.to(asked.device).eval(), processor


def _digest(model: Any) -> str:
    """Of all weights, the adapter's included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _method(asked: Asked, model: Any, retained: str) -> ADSC:
    """The reduction of one budget: the schedule that was saved for it, else the one that reaches it."""
    method: ADSC = model.adsc.method
    if asked.schedules_of is not None or retained == OWN:
        saved = ADSCConfig.from_pretrained(asked.schedules_of or asked.model)
        method = ADSC(saved.schedule, saved.pattern, saved.positions, saved.seed, saved.budgets)
    if retained == OWN:
        return method
    if ":" in retained:
        return replace(method, schedule=Schedule.parse(retained))
    budget, tokens = fraction(retained, "retained"), vision_tokens(model.config.model_type)
    schedule = dict(method.budgets).get(budget)
    if schedule is None:
        schedule = Schedule.for_budget(model.adsc.num_layers, budget, tokens)
    return replace(method, schedule=schedule)


def _about(method: ADSC, config: Any, processor: Any, rows: Rows) -> dict[str, Any]:
    """The reduction, and what it costs for one question of the usual length about one image."""
    texts = [len(turn(processor.tokenizer, question)[0]) for _, asked in rows[:200] for question in asked]
    (before, behind), tokens = around_image(config), vision_tokens(config.model_type)
    start, text = len(before), len(before) + len(behind) + round(float(np.mean(texts)))
    decoder = config.get_text_config()
    layout = Layout(text + tokens, [(start, start + tokens)], [(round(tokens**0.5),) * 2])
    plan = method.plan(layout, decoder.num_hidden_layers)
    try:
        ratios = cost(config, plan=plan).ratios
    except InputError:  # a vision encoder that the cost model does not know
        ratios = cost(decoder, plan=plan).ratios
        del ratios["prefill_flops"]
    return {
        "schedule": str(method.schedule),
        "pattern": method.pattern,
        "positions": method.positions,
        "share": round(float(plan.retained), 5),
        "text_tokens": text,
        "cost": {name: round(ratio, 5) for name, ratio in ratios.items()},
    }


def _is_stored(path: Path, seed: int | None, about: dict[str, Any]) -> bool:
    if not path.exists():
        return False
    stored = read(path).about
    now = json.loads(json.dumps(about)) | {"seed": seed}
    if other := [key for key in now if key != "model" and stored.get(key) != now[key]]:
        raise InputError(f"{path} came about in another way (it differs in {', '.join(other)}); delete it, or choose "
                         "another name")  # fmt: skip
    return True


_worker: tuple[Asked, Any, Any, Rows] | None = None  # of a process that answers


def _start(asked: Asked, threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    model, processor = _open(asked)
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):  # a LoRA layer: two products less
            module.merge()
    _worker = asked, model, processor, list(load(asked.split, asked.images))


def _ask(task: tuple[ADSC, list[int]]) -> list[list[bool]]:
    assert _worker is not None
    (asked, model, processor, rows), (method, chunk) = _worker, task
    some = [rows[row] for row in chunk]
    lower = torch.autocast(torch.device(asked.device).type, torch.bfloat16, enabled=asked.precision == "bfloat16")
    with model.adsc.using(method), lower:
        if method.positions == "compact":  # which numbers all that is in a row
            shown = CHANGED[asked.condition]([image for image, _ in some])
            return answers_alone(model, processor, list(zip(shown, [questions for _, questions in some], strict=True)))
        return answers(model, processor, some, asked.condition, progress=False)


@contextmanager
def _asking(asked: Asked, processes: int, tasks: int) -> Iterator[Any]:
    """Tasks to their answers, in order, in some processes."""
    global _worker
    threads = max(1, torch.get_num_threads() // processes)
    if processes == 1 or tasks == 0:
        if tasks:
            _start(asked, threads)
        try:
            yield lambda given: map(_ask, given)
        finally:
            _worker = None
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, initializer=_start, initargs=(asked, threads))
    try:
        yield lambda given: pool.map(_ask, given)
    finally:
        pool.shutdown(cancel_futures=True)
