"""What a recipe will cost, from the model's config alone: parameters, tokens and FLOPs a step, memory, hours.

Convention
----------
* FLOPs are those of :mod:`adsc.accounting`. A training step runs the frozen vision encoder once. A frozen matrix of
  the language model is run twice (forward, gradient of its input), attention and what is trained three times; gradient
  checkpointing runs the decoder layers once more. The LM head is run at text positions (at most these have labels),
  three times: forward, again for the gradient, and the gradient.
* With distillation the teacher is one dense forward pass more, and both run the head again.
* *Reduced* is the mean over the curriculum; its memory is that of the heaviest schedule in it.
* Memory is of one GPU that holds the whole model: frozen weights in bfloat16 (float32 without ``bf16`` and ``fp16``),
  16 bytes for each trained parameter (weight, gradient, two moments of AdamW in float32), what autograd keeps of the
  decoder layers, and logits, made a chunk at a time. Allocator and communication come on top; FSDP and ZeRO-3 divide
  the first two.
* Hours are FLOPs over the GPU's peak times ``estimate.utilisation``, an assumption: what waits for data, or is bound by
  memory, takes longer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ..accounting import Flops, Usage, cost
from ..errors import InputError
from ..planning import plan
from ..schedule import Schedule
from .recipe import Lora, Recipe
from .trainer import lora_config

GB = 10**9
HEAD_POSITIONS = 1024  # whose logits exist at a time


@dataclass(frozen=True)
class GPU:
    """Memory in bytes, and peak of dense bfloat16 matrix products in FLOP/s, as its maker states them."""

    memory: int
    flops: float


GPUS = {
    "RTX-4090": GPU(24 * GB, 165e12),
    "RTX-A6000": GPU(48 * GB, 155e12),
    "A10": GPU(24 * GB, 125e12),
    "L4": GPU(24 * GB, 121e12),
    "L40S": GPU(48 * GB, 362e12),
    "A100-40GB": GPU(40 * GB, 312e12),
    "A100-80GB": GPU(80 * GB, 312e12),
    "H100-80GB": GPU(80 * GB, 989e12),
    "H200": GPU(141 * GB, 989e12),
    "B200": GPU(180 * GB, 2250e12),
    "MI300X": GPU(192 * GB, 1307e12),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    trained: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.trained + self.activations + self.logits


@dataclass(frozen=True)
class Training:
    """One training, dense or reduced.

    Attributes
    ----------
    tokens, vision_tokens
        Of one row, averaged over layers and over the curriculum.
    student_flops, teacher_flops
        Of one step, all GPUs together.
    seconds
        Of one step.
    hours
        Of all steps; ``None`` where their number is not known.
    memory
        On one GPU.
    """

    tokens: float
    vision_tokens: float
    student_flops: int
    teacher_flops: int
    seconds: float
    hours: float | None
    memory: Memory

    @property
    def flops(self) -> int:
        """Student and teacher."""
        return self.student_flops + self.teacher_flops

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "flops": self.flops, "memory": {**asdict(self.memory), "total": self.memory.total}}


@dataclass(frozen=True)
class Part:
    """One schedule of the training: its share of the steps, and a row's vision tokens averaged over layers."""

    share: float
    schedule: str
    vision_tokens: float


@dataclass(frozen=True)
class Report:
    """What :func:`estimate` found.

    Attributes
    ----------
    parameters, trainable
        Of the model, and those that are trained (which count the adapter's).
    schedule, curriculum, parts
        The target, how the training gets there, and what it runs on the way.
    rows, steps
        Rows of a step, all GPUs together; number of steps where the recipe tells.
    length, vision_tokens
        Of a row.
    gpu, gpus, gpu_memory, gpu_flops, utilisation
        What it would run on.
    dense, reduced
        Training with the same rows and steps; ``None`` for a model that the cost model does not know.
    unknown
        Why there are none.
    """

    parameters: int
    trainable: int
    schedule: str
    curriculum: str
    parts: tuple[Part, ...]
    rows: int
    steps: int | None
    length: int
    vision_tokens: int
    gpu: str
    gpus: int
    gpu_memory: int
    gpu_flops: float
    utilisation: float
    dense: Training | None
    reduced: Training | None
    unknown: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        both = {name: part and part.to_dict() for name, part in (("dense", self.dense), ("reduced", self.reduced))}
        return {**asdict(self), **both}


def estimate(recipe: Recipe, config: Any) -> Report:
    """Parameters, tokens and FLOPs a step, memory and hours (convention: see the module's docstring).

    Parameters
    ----------
    recipe
        Its part ``estimate`` holds a typical row and the hardware.
    config
        The model's transformers config; no weights are made or read.

    Raises
    ------
    InputError
        For an unknown GPU, names in ``lora.targets`` that the model lacks, or a reduction that does not fit the model.
    """
    names = {name.lower(): name for name in GPUS}
    wanted = recipe.estimate
    if wanted.gpu.lower() not in names:
        raise InputError(f"estimate.gpu is {wanted.gpu!r}; it can be {', '.join(GPUS)}")
    gpu_name = names[wanted.gpu.lower()]
    gpu = GPUS[gpu_name]
    method, curriculum = recipe.reduction(config), recipe.curriculum_for(config)
    shares = curriculum.shares()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    adapter, projector = trained_parameters(model, recipe.lora)

    training = recipe.training
    rows = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1) * wanted.gpus
    steps = _steps(recipe, rows)
    image = recipe.vision_tokens(config)
    vision_tokens = wanted.images * image
    report: dict[str, Any] = {
        "parameters": parameters,
        "trainable": adapter + projector,
        "schedule": str(method.schedule),
        "curriculum": curriculum.kind,
        "parts": tuple(
            _part(share, schedule, curriculum.num_layers, image, wanted.images) for share, schedule in shares
        ),
        "rows": rows,
        "steps": steps,
        "length": vision_tokens + wanted.text_tokens,
        "vision_tokens": vision_tokens,
        "gpu": gpu_name,
        "gpus": wanted.gpus,
        "gpu_memory": gpu.memory,
        "gpu_flops": gpu.flops,
        "utilisation": wanted.utilisation,
    }
    counter = _Counter(recipe, config, adapter, projector, parameters)
    try:
        passes = [(share, counter.usage(schedule)) for share, schedule in shares]
        dense = counter.usage(Schedule.none())
    except InputError as error:  # a model that the cost model does not know
        return Report(**report, dense=None, reduced=None, unknown=str(error))

    def made(passes: list[tuple[Fraction, Usage]], teacher: bool) -> Training:
        def mean(values: Iterator[float]) -> float:
            return float(sum(share * Fraction(value) for (share, _), value in zip(passes, values, strict=True)))

        student = round(rows * mean(counter.student(usage) for _, usage in passes))
        teaching = rows * counter.teacher(dense) if teacher else 0
        seconds = (student + teaching) / (gpu.flops * wanted.utilisation * wanted.gpus)
        return Training(
            tokens=mean(sum(usage.tokens_per_layer) / counter.layers for _, usage in passes),
            vision_tokens=mean(sum(usage.vision_tokens_per_layer) / counter.layers for _, usage in passes),
            student_flops=student,
            teacher_flops=teaching,
            seconds=seconds,
            hours=None if steps is None else seconds * steps / 3600,
            memory=max((counter.memory(usage, teacher) for _, usage in passes), key=lambda memory: memory.total),
        )

    return Report(**report, dense=made([(Fraction(1), dense)], False), reduced=made(passes, recipe.distillation.on))


def trained_parameters(model: PreTrainedModel, lora: Lora) -> tuple[int, int]:
    """Number of parameters of the adapter, and of the projector where that is trained too.

    Puts an adapter on the model, which may be one without weights (on the device ``meta``).
    """
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT asks transformers for checkpointing by an old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(model, lora_config(model, lora))
    trained = {name: each.numel() for name, each in adapted.named_parameters() if each.requires_grad}
    projector = sum(count for name, count in trained.items() if ".modules_to_save." in name)
    return sum(trained.values()) - projector, projector


class _Counter:
    """FLOPs and bytes of a training step for one row, or one GPU's batch of them."""

    def __init__(self, recipe: Recipe, config: Any, adapter: int, projector: int, parameters: int) -> None:
        self.recipe, self.config = recipe, config
        self.adapter, self.projector, self.parameters = adapter, projector, parameters
        training = recipe.training
        self.checkpointing = bool(training.get("gradient_checkpointing", True))  # as TRL's defaults
        self.half = bool(training.get("bf16", not training.get("fp16", False)) or training.get("fp16", False))
        self.text = config.get_text_config(decoder=True)
        self.layers: int = self.text.num_hidden_layers

    def usage(self, schedule: Schedule) -> Usage:
        """Forward pass of one row."""
        wanted, image = self.recipe.estimate, self.recipe.vision_tokens(self.config)
        return cost(
            self.config,
            vision_tokens=wanted.images * image,
            text_tokens=wanted.text_tokens,
            schedule=schedule,
            images=wanted.images,
            tiles=wanted.tiles,
            pattern="last",  # how many stay is all that counts
        ).reduced

    def student(self, usage: Usage) -> int:
        """FLOPs of one row, forward and backward."""
        forward = usage.prefill
        again = int(self.checkpointing)
        adapter = 2 * self.adapter * sum(usage.tokens_per_layer) // self.layers
        return (
            forward.vision_encoder
            + forward.projector * (3 if self.projector else 1)
            + (forward.attention_projections + forward.ffn) * (2 + again)
            + (forward.attention_products + adapter) * (3 + again)
            + self.head(forward) * 3
        )

    def teacher(self, usage: Usage) -> int:
        """FLOPs of one row: a forward pass, and the head for both losses' sake."""
        forward = usage.prefill
        return forward.total - forward.lm_head + self.head(forward) * 3

    def head(self, forward: Flops) -> int:
        """FLOPs of the LM head at all text positions; it is counted for one."""
        return forward.lm_head * self.recipe.estimate.text_tokens

    def memory(self, usage: Usage, teacher: bool) -> Memory:
        """Of one GPU."""
        size = 2 if self.half else 4
        text, rows = self.text, self.recipe.training.get("per_device_train_batch_size", 8)
        heads = text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        # What autograd keeps of a token in a layer: both norms' inputs and outputs; queries, keys, values and their
        # product, keys and values repeated for each head; four of the FFN's width; inside the adapters.
        kept = 4 * text.hidden_size + 4 * width + 4 * text.intermediate_size + 7 * self.recipe.lora.rank
        tokens = usage.tokens_per_layer
        # With checkpointing each layer's input, and one layer at work.
        at_work = max(tokens) if self.checkpointing else sum(tokens)
        activations = at_work * kept + (sum(tokens) * text.hidden_size if self.checkpointing else 0)
        # In float32, and their gradient; the teacher's beside them.
        positions = min(HEAD_POSITIONS, rows * self.recipe.estimate.text_tokens)
        return Memory(
            weights=self.parameters * size,
            trained=16 * (self.adapter + self.projector),
            activations=rows * activations * size,
            logits=positions * text.vocab_size * 4 * (3 if teacher else 2),
        )


def _part(share: Fraction, schedule: Schedule, layers: int, image: int, images: int) -> Part:
    retained = plan([(0, image)], image, schedule, layers).retained
    return Part(float(share), str(schedule), float(images * image * retained))


def _steps(recipe: Recipe, rows: int) -> int | None:
    training, given = recipe.training, recipe.training.get("max_steps")
    if given is not None and given > 0:
        return int(given)
    if recipe.estimate.rows is None:
        return None
    epochs = float(training.get("num_train_epochs", 3))
    return math.ceil(recipe.estimate.rows / rows * epochs)
