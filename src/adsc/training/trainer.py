"""The trainer: TRL's SFTTrainer, whose model is reduced by the schedule of the step and may learn from itself dense.

What a step does depends on the seed and the number of the step alone. So a run that was killed goes on from its last
checkpoint to the same losses and weights, and all processes of a run agree without a word. (Where ``logging_steps``
does not divide the step of the checkpoint, the first loss that is logged behind it is the mean of fewer steps.)
"""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..errors import InputError, UnsupportedModelError
from ..hf.checkpoint import read_config
from ..hf.decoders import decoder_of
from ..hf.engine import IGNORED, Handle, attach
from ..hf.families import family_of
from ..methods import ADSC
from ..schedule import Schedule
from .collating import Collator, segment_mask
from .curriculum import Curriculum
from .data import as_dataset, open_rows
from .distillation import Distillation, forward_kl, head_of, hidden_error, hidden_states
from .exporting import RECIPE, check_free, export
from .recipe import Lora, Recipe, check_training, read

# Modules between vision tower and decoder, by the names that transformers gives them.
PROJECTORS = ("multi_modal_projector", "merger", "connector", "aligner", "embed_vision", "vl_connector")
# Keys of ``training`` that change no weight, so a run may go on with others.
FREE = ("logging_steps", "save_steps", "save_total_limit", "disable_tqdm", "report_to", "run_name", "log_level")
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what clusters send ahead of the end

log = logging.getLogger(__name__)


class ADSCTrainer(SFTTrainer):
    """TRL's ``SFTTrainer`` with a curriculum of schedules, self-distillation, and evaluation at every budget.

    Logged beside what TRL logs: ``retained``, the vision tokens that were there on average over layers and rows, over
    all; ``distillation`` and ``hidden``, the losses between student and teacher for a label; at evaluation
    ``eval_<budget>_loss`` and ``eval_<budget>_accuracy`` for every budget, and ``eval_loss``, their mean, which picks
    the best checkpoint.

    Parameters
    ----------
    model
        An image-text-to-text model, or one with a PEFT adapter.
    method
        How tokens are chosen; its budgets are evaluated, or its own schedule where it has none. It stays attached
        (``model.adsc``). One that does not reduce trains the dense model.
    curriculum
        The schedule of each step; by default always that of ``method``.
    distillation
        What the loss takes from the same model dense with its adapter off. By default nothing.
    options
        Of ``SFTTrainer``.

    Raises
    ------
    InputError
        When there is no adapter to turn off for the teacher.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        method: ADSC,
        curriculum: Curriculum | None = None,
        distillation: Distillation | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        self.stopper = StopOnSignal()
        super().__init__(model, args, callbacks=[*callbacks, self.stopper, _KeepCount(self)], **options)
        # Behind TRL, which changes the model's forward too: so labels are masked in front of that as well.
        self.handle: Handle = attach(self.model, method)
        self.method, self.curriculum = method, curriculum
        self.distillation = distillation if distillation is not None and distillation.needed else None
        if self.distillation and not hasattr(self.model, "disable_adapter"):
            raise InputError(
                "distillation needs an adapter to turn off for the teacher; train with lora, or set it to 0"
            )
        self._inner: PreTrainedModel = self.handle.model

    def schedule(self, step: int) -> Schedule:
        """Of an optimiser step, the same for each of its micro-batches and on every process."""
        if self.curriculum is None:
            return self.method.schedule
        return self.curriculum.schedule(Fraction(min(step, self.state.max_steps), self.state.max_steps), draw=step)

    def budgets(self) -> dict[str, Schedule]:
        """What is evaluated, by name."""
        named = {str(retained): schedule for retained, schedule in self.method.budgets}
        return named if self.method.schedule in named.values() else {**named, "schedule": self.method.schedule}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of the reduced model, and in training what the teacher adds to it."""
        trls: Any = super().compute_loss
        if (segments := inputs.pop("segments", None)) is not None:
            mask = segment_mask(segments, self._inner.dtype)
            with _masked(self._inner.base_model, mask):
                return self.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._inner.training:  # evaluate() says which schedule
            return trls(model, inputs, return_outputs, num_items_in_batch)
        metrics = self._metrics["train"]
        teacher = self._teacher(model, inputs) if self.distillation else None
        method = replace(self.method, schedule=self.schedule(self.state.global_step))
        with self.handle.using(method), hidden_states(self._inner.base_model) as student:
            loss = trls(model, inputs, False, num_items_in_batch)
            plans = self.handle.last_plans if method.reduces else []
        retained = [float(plan.retained) for plan in plans if plan.vision_tokens_per_layer()[0]]
        metrics["retained"].append(self._mean(sum(retained) if retained else 1.0, len(retained) or 1))
        if teacher is not None:
            loss = loss + self._distilled(student[0], teacher, inputs, num_items_in_batch)
        return loss

    @torch.no_grad()
    def _teacher(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Hidden states of the dense model without its adapter."""
        given = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        model.eval()  # no dropout, no checkpointing
        try:
            adapter = self.accelerator.unwrap_model(self.model).disable_adapter()
            with self.handle.using(Schedule.none()), adapter, hidden_states(self._inner.base_model) as found:
                model(**given, use_cache=False, logits_to_keep=1)
        finally:
            model.train()
        return found[0]

    def _distilled(self, student: Tensor, teacher: Tensor, inputs: dict[str, Any], items: Any) -> Tensor:
        """The weighted losses between student and teacher, a mean over labels as TRL's own is."""
        assert self.distillation is not None
        if teacher.shape != student.shape:
            raise UnsupportedModelError(
                f"{self._inner.config.model_type} returns {teacher.shape[1]} of {student.shape[1]} hidden states where "
                "few logits are asked for, so it cannot be its own teacher; set the distillation to 0"
            )
        # The engine puts zeros where tokens were dropped: nothing is to be learned there.
        kept = student.detach().any(-1)
        labels = inputs["labels"][:, 1:] != IGNORED
        places = labels & kept[:, :-1]
        count = labels.sum()
        total: Tensor = student.new_zeros((), dtype=torch.float32)
        metrics, weights = self._metrics["train"], self.distillation
        if weights.weight:
            with head_of(self._inner) as head, self.accelerator.autocast():
                divergence = forward_kl(student[:, :-1][places], teacher[:, :-1][places], head, weights.temperature)
            metrics["distillation"].append(self._mean(divergence.detach(), count))
            total = total + weights.weight * divergence
        if weights.hidden:
            real = kept & inputs["attention_mask"].bool() if "attention_mask" in inputs else kept
            errors = hidden_error(student, teacher).masked_fill(~real, 0).sum(-1) / real.sum(-1).clamp(min=1)
            error = (errors * labels.sum(-1)).sum()  # a row counts as its labels do, however rows are put in batches
            metrics["hidden"].append(self._mean(error.detach(), count))
            total = total + weights.hidden * error
        total = total / (count if items is None else items)
        # As TRL does: the count is that of all processes, over which the gradient is averaged.
        if self.args.average_tokens_across_devices and items is not None:
            total = total * (self.accelerator.num_processes // self.get_tp_size())
        return total

    def _mean(self, total: Any, count: Any) -> float:
        """Of all processes."""
        both = torch.as_tensor([float(total), float(count)], device=self.accelerator.device, dtype=torch.float32)
        total, count = self.accelerator.gather(both[None]).sum(0).tolist()
        return float(total / max(count, 1.0))

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The loss at every budget, and their mean."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, Mapping):
            raise InputError("several evaluation sets at a time are not supported; evaluate them one by one")
        metrics: dict[str, float] = {}
        budgets = self.budgets()
        for name, schedule in budgets.items():
            prefix = f"{metric_key_prefix}_{name}"
            with self.handle.using(replace(self.method, schedule=schedule)):
                output = self.evaluation_loop(
                    self.get_eval_dataloader(eval_dataset),
                    description=f"Evaluation at {name}",
                    prediction_loss_only=True if self.compute_metrics is None else None,
                    ignore_keys=ignore_keys,
                    metric_key_prefix=prefix,
                )
            own = self._metrics["eval"].pop("mean_token_accuracy", [])
            metrics |= {
                key: value for key, value in (output.metrics or {}).items() if not key.endswith("_preparation_time")
            }
            metrics[f"{prefix}_accuracy"] = sum(own) / max(len(own), 1)
            self._metrics["eval"].clear()
        losses = [metrics[f"{metric_key_prefix}_{name}_loss"] for name in budgets]
        metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``. Ctrl-C, or SIGTERM, saves a checkpoint behind the step that is running and stops."""
        with self.stopper.listening(self.accelerator):
            return super().train(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for checkpoints: the result has one."""


@contextmanager
def _masked(base: nn.Module, mask: Tensor) -> Iterator[None]:
    """Calls of a base model in this block get ``mask`` in place of theirs. (TRL counts tokens by the batch's own.)"""
    hook = base.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


class StopOnSignal(TrainerCallback):
    """Stops with a checkpoint at the end of the step in which the process was asked to; a second Ctrl-C kills.

    Attributes
    ----------
    stopped
        Whether that happened.
    """

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self._accelerator: Any = None

    @contextmanager
    def listening(self, accelerator: Any) -> Iterator[None]:
        """Take the signals over in this block, where Python lets us: in the main thread."""
        self._accelerator = accelerator
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """All processes stop behind the same step, whichever of them was asked."""
        asked = self.asked
        if self._accelerator.num_processes > 1:
            told = torch.tensor([float(asked)], device=self._accelerator.device)
            asked = bool(self._accelerator.gather(told).any())
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
        return control


class _KeepCount(TrainerCallback):
    """TRL counts tokens from nothing after a resume; the log knows better."""

    def __init__(self, trainer: ADSCTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counted = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens = counted[-1] if counted else 0


def lora_config(model: PreTrainedModel, lora: Lora) -> LoraConfig:
    """The adapter: on linear layers inside the decoder's layers alone, never on the vision tower or the head.

    The projector is trained in full where wanted: a copy in the adapter, which goes off with it, so that the teacher
    keeps its own.

    Raises
    ------
    InputError
        For targets that the decoder lacks, or a projector that is not found.
    """
    names = {id(module): name for name, module in model.named_modules()}
    layers = decoder_of(model.base_model).layers
    linear = {
        name.rpartition(".")[2]: None
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    targets = list(linear) if lora.targets == "all-linear" else list(lora.targets)
    if missing := [name for name in targets if name not in linear]:
        raise InputError(f"lora.targets: {missing[0]!r} is no linear layer of the decoder; it has {', '.join(linear)}")
    projectors = [name for name in names.values() if name.rpartition(".")[2] in PROJECTORS]
    if lora.projector and not projectors:
        raise InputError(f"lora.projector: {type(model).__name__} has none by a known name; set it to false")
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"{re.escape(names[id(layers)])}\.\d+\.(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})",
        modules_to_save=projectors if lora.projector else None,
        task_type="CAUSAL_LM",
    )


@dataclass(frozen=True)
class Outcome:
    """What :func:`train` did.

    Attributes
    ----------
    folder
        The result; ``None`` when the training was stopped.
    checkpoint
        The last checkpoint.
    step, steps
        Optimiser steps done, of how many.
    history
        What was logged.
    """

    folder: Path | None
    checkpoint: Path | None
    step: int
    steps: int
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)

    @property
    def stopped(self) -> bool:
        """Whether the training ended before its time."""
        return self.folder is None


def trainer_for(recipe: Recipe, callbacks: Iterable[TrainerCallback] = ()) -> ADSCTrainer:
    """The trainer of a recipe, with its model, processor and rows.

    Raises
    ------
    InputError
        When something does not fit.
    """
    args = _arguments(recipe, Path(recipe.output) / "checkpoints")
    config = read_config(recipe.model)
    method, curriculum = recipe.reduction(config), recipe.curriculum_for(config)
    family_of(config)
    loading: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    loading.setdefault("dtype", torch.bfloat16 if args.bf16 else torch.float32)
    if recipe.data.independent_turns and loading.setdefault("attn_implementation", "sdpa") not in ("eager", "sdpa"):
        raise InputError(
            f"data.independent_turns need a mask, which {loading['attn_implementation']} does not take; set "
            "training.model_init_kwargs.attn_implementation to sdpa or eager"
        )
    model = AutoModelForImageTextToText.from_pretrained(recipe.model, **loading)
    args.model_init_kwargs = None
    processor = AutoProcessor.from_pretrained(recipe.model)
    return ADSCTrainer(
        model,
        args,
        method=method,
        curriculum=curriculum if method.reduces or recipe.curriculum.kind == "elastic" else None,
        distillation=Distillation(**recipe.distillation.model_dump()),
        peft_config=lora_config(model, recipe.lora),
        processing_class=processor,
        data_collator=Collator(
            processor,
            config=config,
            keeps_last_token=method.keeps_last_token,
            independent_turns=recipe.data.independent_turns,
        ),
        train_dataset=as_dataset(_rows(recipe, recipe.data.train, processor)),
        eval_dataset=None
        if recipe.data.validation is None
        else as_dataset(_rows(recipe, recipe.data.validation, processor)),
        callbacks=callbacks,
    )


def train(recipe: Recipe, *, resume: bool = False, callbacks: Iterable[TrainerCallback] = ()) -> Outcome:
    """Train as a recipe says. Writes ``checkpoints``, ``logs`` (TensorBoard's, when asked for) and ``adapter``, the
    result, into the recipe's output folder.

    Parameters
    ----------
    recipe
        See :func:`adsc.training.recipe.read`.
    resume
        Go on from the last checkpoint that is whole, or begin where there is none.
    callbacks
        For the trainer.

    Raises
    ------
    InputError
        When the output holds another training, or something does not fit.
    """
    output = Path(recipe.output)
    result, checkpoints = output / "adapter", output / "checkpoints"
    check_training(recipe)
    check_free(result)
    checkpoint = last_checkpoint(checkpoints) if resume else None
    if not resume and any(path.exists() for path in (result, checkpoints)):
        raise InputError(f"{output} holds a training already; go on with it by --resume, or choose another output")
    if checkpoint is not None and (other := _changed(recipe, output / RECIPE)):
        raise InputError(
            f"{output} holds a training by another recipe (it differs in {', '.join(other)}); choose another output"
        )
    trainer = trainer_for(recipe, callbacks=callbacks)
    method, processor = trainer.method, trainer.processing_class
    if (writer := _tensorboard(recipe, trainer.args, output / "logs", checkpoint)) is not None:
        trainer.add_callback(writer)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        (output / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    if checkpoint is not None and (state := _state(checkpoint))["global_step"] >= state["max_steps"]:
        _finished(trainer, checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if trainer.stopper.stopped:
        return Outcome(None, last_checkpoint(checkpoints), step, steps, trainer.state.log_history)
    gathered = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        adapted, figures = trainer.accelerator.unwrap_model(trainer.model), _figures(trainer)
        export(adapted, result, method=method, processor=processor, recipe=recipe, figures=figures, state=gathered)
    trainer.accelerator.wait_for_everyone()
    return Outcome(result, last_checkpoint(checkpoints), step, steps, trainer.state.log_history)


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole. A kill may come while one is written."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if _is_whole(path):
            return path
        log.warning("%s is not whole, and left out", path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        _state(checkpoint)  # is written last
        for path in checkpoint.rglob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    # torch.save's files are zip archives, whose directory stands at the end.
    return all(zipfile.is_zipfile(path) for suffix in ("*.pt", "*.pth", "*.bin") for path in checkpoint.rglob(suffix))


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return {**state, "global_step": state["global_step"], "max_steps": state["max_steps"]}


def _changed(recipe: Recipe, path: Path) -> list[str]:
    """Keys in which a recipe differs from the one of the checkpoints, as far as they change weights."""
    before, now = (_flat(each.model_dump(mode="json")) for each in (read(path) if path.exists() else recipe, recipe))
    free = ("output", "estimate.", "data.validation", *(f"training.{key}" for key in FREE))
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return [key for key in keys if not key.startswith(free)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _finished(trainer: ADSCTrainer, checkpoint: Path) -> None:
    """Take the weights of a training that was killed behind its last step."""
    trainer.state = trainer.state.load_from_json(str(checkpoint / "trainer_state.json"))
    best = trainer.state.best_model_checkpoint
    trainer._load_from_checkpoint(best if trainer.args.load_best_model_at_end and best else str(checkpoint))


def _figures(trainer: ADSCTrainer) -> dict[str, dict[str, str]]:
    """What the validation rows said of the weights that are saved, for the card."""
    state, args = trainer.state, trainer.args
    step = state.best_global_step if args.load_best_model_at_end else state.global_step
    entry: dict[str, Any] = next((e for e in state.log_history if "eval_loss" in e and e["step"] == step), {})
    columns = {"validation loss": "loss", "right tokens, %": "accuracy"}
    return {
        f"retained {name}" if name != "schedule" else "reduced": {
            column: f"{entry[key] * (100 if 'accuracy' in key else 1):.4g}"
            for column, key in ((column, f"eval_{name}_{kind}") for column, kind in columns.items())
        }
        for name in (trainer.budgets() if entry else ())
    }


def _arguments(recipe: Recipe, checkpoints: Path) -> SFTConfig:
    gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    own: dict[str, Any] = {
        "bf16": gpu,
        "use_cpu": not torch.accelerator.is_available(),  # lets bf16 be asked for
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "seed": recipe.seed,
        "max_length": None,
        "packing": False,
    }
    given = own | recipe.training | {"output_dir": str(checkpoints)}
    reports = [given["report_to"]] if isinstance(given["report_to"], str) else list(given["report_to"] or ())
    given["report_to"] = [name for name in reports if name not in ("tensorboard", "none")] or "none"
    try:
        args = SFTConfig(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}") from error
    return args


def _tensorboard(recipe: Recipe, args: Any, folder: Path, checkpoint: Path | None) -> TrainerCallback | None:
    if "tensorboard" not in (recipe.training.get("report_to") or ()) or args.process_index:
        return None
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    # What was logged behind the checkpoint is logged again.
    step = None if checkpoint is None else _state(checkpoint)["global_step"] + 1
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=step))


def _rows(recipe: Recipe, sources: Any, processor: Any) -> Any:
    if not isinstance(sources, tuple):
        return open_rows(sources.model_dump(exclude_none=True))
    reserved = [getattr(processor, name, None) for name in ("image_token", "video_token")]
    data = recipe.data
    return open_rows(
        sources,
        images=data.images,
        bad_rows=data.bad_rows,
        remote_images=data.remote_images,
        reserved=[token for token in reserved if isinstance(token, str)],
    )
