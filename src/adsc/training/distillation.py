"""Self-distillation: the reduced student learns from the same model dense, with its adapter off.

Only the hidden states of the final norm are kept of either, at the positions that predict a label. Logits are made from
them a chunk at a time, and so is the gradient: the logits of a whole batch never exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..errors import InputError

CHUNK = 1024  # positions whose logits exist at a time

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Distillation:
    """How much of the teacher goes into the loss.

    Parameters
    ----------
    weight
        Of the forward KL divergence, beside the cross-entropy of the labels, whose weight is 1.
    temperature
        That the logits of both are divided by. The divergence is multiplied by its square, so that gradients keep
        their size (Hinton et al. 2015, arXiv 1503.02531, section 2).
    hidden
        Weight of the error of the hidden states (see :func:`hidden_error`).

    Raises
    ------
    InputError
        For negative weights, or a temperature that is not above 0.
    """

    weight: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "hidden"):
            if getattr(self, name) < 0:
                raise InputError(f"distillation {name} {getattr(self, name)} is negative; 0 turns it off")
        if self.temperature <= 0:
            raise InputError(
                f"distillation temperature {self.temperature} must be above 0; 1 leaves logits as they are"
            )

    @property
    def needed(self) -> bool:
        """Whether there is anything to ask the teacher for."""
        return self.weight > 0 or self.hidden > 0


def forward_kl(student: Tensor, teacher: Tensor, head: Head, temperature: float = 1.0, chunk: int = CHUNK) -> Tensor:
    """The sum over positions of KL(teacher ‖ student) · temperature².

    Parameters
    ----------
    student, teacher
        Hidden states ``(positions, width)`` in front of the head. No gradient goes to the teacher.
    head
        Gives logits ``(n, vocabulary)`` for n hidden states. Its own weights get no gradient.
    temperature
        See :class:`Distillation`.
    chunk
        Positions whose logits exist at a time.
    """
    total: Tensor = _ForwardKL.apply(student, teacher, head, temperature, chunk)  # type: ignore[no-untyped-call]
    return total


def hidden_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Of each position the squared distance of the hidden states over the teacher's squared length, ``(…,)``.

    Relative, since the scale behind the final norm differs between models.
    """
    student, teacher = student.float(), teacher.float()
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)


class _ForwardKL(torch.autograd.Function):
    """Makes the gradient on the way forward, chunk by chunk, so that nothing of vocabulary size outlives its chunk."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Head, temperature: float, chunk: int) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        total, gradient = student.new_zeros((), dtype=dtype), torch.zeros_like(student)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            expected = (head(teacher[part]).to(dtype) / temperature).log_softmax(-1)
            with torch.enable_grad():
                hidden = student[part].detach().requires_grad_()
                found = (head(hidden).to(dtype) / temperature).log_softmax(-1)
                divergence = nn.functional.kl_div(found, expected, reduction="sum", log_target=True) * temperature**2
                (gradient[part],) = torch.autograd.grad(divergence, hidden)
            total += divergence.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None, None


@contextmanager
def head_of(model: PreTrainedModel) -> Iterator[Head]:
    """The head that makes logits of hidden states, with what the model does to logits afterwards; whole in the block
    where its weights are sharded."""
    output: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = _scale(config)

    with maybe_gather_lm_head_ctx(output.weight, output.bias):
        weight, bias = (_whole(each) for each in (output.weight, output.bias))

        def head(hidden: Tensor) -> Tensor:
            logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias) * scale
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)

        yield head


def _whole(weight: Any) -> Any:
    # Of FSDP2's sharded parameters, which are frozen: LoRA leaves the head alone.
    return weight if weight is None else (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()


def _scale(config: Any) -> float:
    """What a model multiplies its logits by, under the names that families have for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    return 1.0 if scaling is None else 1 / scaling


@contextmanager
def hidden_states(base: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the hidden states ``(batch, tokens, width)`` that calls of a base model return in this block."""
    found: list[Tensor] = []
    hook = base.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    try:
        yield found
    finally:
        hook.remove()
