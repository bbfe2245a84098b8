"""Open a model, ask it about images dense and reduced, and take the figures. What ``demo`` and ``run`` share."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from PIL import Image
from rich.console import Console
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils import logging
from transformers.utils.import_utils import is_peft_available

from ..accounting import Cost, cost
from ..config import ADSCConfig
from ..errors import InputError
from ..hf.checkpoint import ADAPTER, load
from ..hf.engine import compress
from ..planning import Plan
from ..report.picture import Bar
from ..report.tables import add_cost, describe, layers, si, side_by_side
from ..schedule import Schedule, fraction

DTYPES = ("auto", "float32", "bfloat16", "float16")


def quiet() -> None:
    """Errors only from transformers, and its loading bars only where someone watches."""
    logging.set_verbosity(ERROR)
    hub_logging.set_verbosity(ERROR)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def in_the_box() -> Path:
    """The model in the box: with its trained adapter, where that is there and PEFT is."""
    from ..pocket import ADAPTER_FOLDER, MODEL_FOLDER

    return ADAPTER_FOLDER if (ADAPTER_FOLDER / ADAPTER).is_file() and is_peft_available() else MODEL_FOLDER


def changes(
    num_layers: int,
    retain: str | None,
    schedule: str | None,
    vision_tokens: int = 576,
    saved: ADSCConfig | None = None,
    **others: Any,
) -> dict[str, Any]:
    """The fields of an :class:`ADSCConfig` that the options set (``None``: not given), checked for the model.

    A budget that the ``saved`` config has a schedule for gets that one; others are solved for images of
    ``vision_tokens``.
    """
    if retain is not None and schedule is not None:
        raise InputError("--retain and --schedule both say how much stays; give one of them")
    given = {name: value for name, value in others.items() if value is not None}
    if schedule is not None:
        given["schedule"] = Schedule.parse(schedule).validate(num_layers)
    elif retain is not None:
        trained = dict(saved.budgets).get(fraction(retain, "retained")) if saved else None
        given["schedule"] = Schedule.for_budget(num_layers, retain, vision_tokens) if trained is None else trained
    if "schedule" in given and not given["schedule"]:
        raise InputError("this reduces nothing; give a fraction below 1, or at least one reduction like 3:1/2")
    ADSCConfig(**{"schedule": Schedule.none(), **given})
    return given


def open_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Model and processor. A reduction that is saved beside them is not attached."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used ({reason}); try cpu or cuda") from None
    model, processor = load(name, dtype=dtype)
    if (handle := getattr(model, "adsc", None)) is not None:
        handle.remove()
    return model.to(device), processor


def build_inputs(model: Any, processor: Any, prompt: str, images: Sequence[Image.Image]) -> Any:
    """Keywords of ``generate`` for one user turn. Images go where the prompt has placeholders, else before it."""
    placeholder = processor.image_token
    pieces = prompt.split(placeholder)
    if len(pieces) == 1:
        pieces = [""] * len(images) + pieces
    if len(pieces) != len(images) + 1:
        raise InputError(
            f"the prompt has {len(pieces) - 1} image placeholders ({placeholder}) for {len(images)} images; "
            "write one for each image, or none at all"
        )
    content: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        content += [{"type": "image", "image": images[index - 1]}] if index else []
        content += [{"type": "text", "text": piece}] if piece.strip() else []
    chat = [{"role": "user", "content": content}]
    try:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except ValueError as error:  # no chat template, an image of impossible proportions, …
        raise InputError(f"the model's processor refuses this prompt: {str(error).splitlines()[0]}") from error
    return inputs.to(model.device, dtype=model.dtype)


def seen(processor: Any, inputs: Any, images: Sequence[Image.Image]) -> list[Image.Image]:
    """The images as the model sees them, resized and cropped, where its pixels are whole images."""
    pixels, steps = inputs["pixel_values"], processor.image_processor
    if pixels.ndim != 4 or len(pixels) != len(images):
        return list(images)
    mean, std = (torch.tensor(values)[:, None, None] for values in (steps.image_mean, steps.image_std))
    pixels = (pixels.float().cpu() * std + mean).clamp(0, 1) * 255
    return [Image.fromarray(each.round().byte().permute(1, 2, 0).numpy()) for each in pixels]


@dataclass(frozen=True)
class Answer:
    """What a model said, and in how many tokens."""

    text: str
    tokens: int


def answer(model: Any, processor: Any, inputs: Any, config: ADSCConfig | None, max_new_tokens: int) -> Answer:
    """Greedy answer, reduced by ``config`` or dense for ``None``."""
    output, *_ = _generate(model, inputs, config, max_new_tokens)
    new = output.sequences[0, inputs["input_ids"].shape[1] :]
    return Answer(processor.decode(new, skip_special_tokens=True).strip(), len(new))


def answer_all(
    model: Any, processor: Any, image: Image.Image, questions: Sequence[str], config: ADSCConfig | None, tokens: int
) -> list[str]:
    """Greedy answers to questions about one image, in one batch; each of at most ``tokens``."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    ).to(model.device, dtype=model.dtype)
    output, *_ = _generate(model, inputs, config, tokens)
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def plan_of(model: Any, inputs: Any, config: ADSCConfig) -> Plan:
    """The plan of one prompt."""
    _, _, (plan,) = _generate(model, inputs, config, 1)
    return plan


@contextmanager
def untrained(model: Any) -> Iterator[None]:
    """Within the block its adapter is off."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def _generate(model: Any, inputs: Any, config: ADSCConfig | None, tokens: int) -> tuple[Any, float, list[Plan]]:
    """What ``generate`` returns, the seconds it took, and the plans of a reduced prefill."""
    with nullcontext() if config is None else compress(model, config) as handle, torch.inference_mode():
        start = time.perf_counter()
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, num_beams=1, return_dict_in_generate=True
        )
        output.sequences.cpu()  # waits for the device
        return output, time.perf_counter() - start, handle.last_plans if handle else []


@dataclass(frozen=True)
class Savings:
    """What a reduction saved on one prompt.

    Attributes
    ----------
    plan
        The kept tokens.
    cost
        FLOPs by formula, ``None`` for a model that the cost model does not know.
    kv_bytes
        Bytes of storage that the cache holds after the prefill, dense and reduced; measured.
    seconds
        Medians of the time to the first token, dense and reduced: vision encoder and prefill, no image processing.
    time_ratio
        Median of the ratios reduced / dense of runs that followed each other.
    rounds
        How many such pairs were run.
    """

    plan: Plan
    cost: Cost | None
    kv_bytes: tuple[int, int]
    seconds: tuple[float, float]
    time_ratio: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        dense_seconds, reduced_seconds = self.seconds
        return {
            "retained": float(self.plan.retained),
            "tokens_per_layer": self.plan.tokens_per_layer(),
            "vision_tokens_per_layer": self.plan.vision_tokens_per_layer(),
            "kv_bytes": {"dense": self.kv_bytes[0], "reduced": self.kv_bytes[1]},
            "seconds_to_first_token": {
                "dense": dense_seconds,
                "reduced": reduced_seconds,
                "median_ratio": self.time_ratio,
                "rounds": self.rounds,
            },
            "cost": self.cost and self.cost.to_dict(),
        }

    def bars(self) -> list[Bar]:
        """The costs to show side by side."""
        rows = []
        if self.cost is not None:
            dense, reduced = self.cost.dense.prefill, self.cost.reduced.prefill
            rows += [("prefill FLOPs", dense.total, reduced.total), ("LLM prefill FLOPs", dense.llm, reduced.llm)]
        bars = [Bar(name, si(one, "FLOP"), si(other, "FLOP"), other / one) for name, one, other in rows]
        one, other = self.kv_bytes
        bars.append(Bar("KV cache", si(one, "B"), si(other, "B"), other / one))
        first, second = (f"{1e3 * seconds:.1f} ms" for seconds in self.seconds)
        bars.append(Bar("time to first token", first, second, self.time_ratio))
        return bars

    def show(self, console: Console) -> None:
        """Print for people."""
        console.print(layers([self.plan.layout.length] * self.plan.num_layers, self.plan.tokens_per_layer()), "")
        table = side_by_side("")
        for bar in self.bars():
            add_cost(table, bar.name, bar.dense, bar.reduced, bar.ratio)
        console.print(table)
        times = f"time to first token: medians of {self.rounds} runs in turn, and of their ratios"
        console.print(f"\n{describe(self.plan)}\n{times}", soft_wrap=True)


def measure(model: Any, inputs: Any, config: ADSCConfig, rounds: int, seconds: float) -> Savings:
    """Compare the prefill of one prompt, dense and reduced in turn: ``rounds`` times, or until ``seconds`` are up."""
    pairs: list[tuple[float, float]] = []
    start = time.perf_counter()
    while not pairs or (len(pairs) < rounds and time.perf_counter() - start < seconds):
        # Which of the two goes first changes each time, so that a drift of the machine favours neither.
        order = (None, config) if len(pairs) % 2 else (config, None)
        ran = {how is None: _generate(model, inputs, how, 1) for how in order}
        (dense, dense_seconds, _), (reduced, reduced_seconds, (plan,)) = ran[True], ran[False]
        pairs.append((dense_seconds, reduced_seconds))
    try:
        figures = cost(model.config, plan=plan, dtype=model.dtype, tiles=_tiles(model.config, inputs))
    except InputError:
        figures = None
    times = np.array(pairs)
    return Savings(
        plan=plan,
        cost=figures,
        kv_bytes=(_kv_bytes(dense.past_key_values), _kv_bytes(reduced.past_key_values)),
        seconds=tuple(np.median(times, axis=0).tolist()),
        time_ratio=float(np.median(times[:, 1] / times[:, 0])),
        rounds=len(times),
    )


def _kv_bytes(cache: Any) -> int:
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))


def _tiles(config: Any, inputs: Any) -> list[int] | None:
    if config.model_type != "llava_next":
        return None
    pinpoints, tile = config.image_grid_pinpoints, config.vision_config.image_size
    return [image_size_to_num_patches(size, pinpoints, tile) for size in inputs["image_sizes"].tolist()]
