"""The divergence of student and teacher, and the model's head."""

from __future__ import annotations

import pytest
import torch

import adsc
from adsc.training.distillation import Distillation, forward_kl, head_of, hidden_error, hidden_states
from hf.tiny import KINDS, case, model


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_kl_and_its_gradient(temperature, chunk):
    torch.manual_seed(0)
    weight = torch.randn(11, 5, dtype=torch.float64)
    student = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    found = forward_kl(student, teacher, lambda hidden: hidden @ weight.T, temperature, chunk)
    (gradient,) = torch.autograd.grad(3 * found, student)
    p, q = ((hidden @ weight.T / temperature).softmax(-1) for hidden in (teacher, student))
    expected = (p * (p / q).log()).sum() * temperature**2  # by its definition
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * expected, student)[0])
    assert gradient.abs().max() > 0.01
    # Forward and reverse differ: this is the one that covers what the teacher thinks likely.
    reverse = (q * (q / p).log()).sum() * temperature**2
    assert abs(reverse - expected) > 0.01 * expected


def test_nothing_to_learn_from():
    student = torch.randn(4, 5, requires_grad=True)
    same = forward_kl(student, student.detach(), lambda hidden: hidden)
    empty = forward_kl(student[:0], student[:0].detach(), lambda hidden: hidden)
    (same + empty).backward()
    assert same.item() == pytest.approx(0, abs=1e-6)
    assert empty.item() == 0
    assert student.grad.abs().max() <= 1e-6


def test_logits_exist_a_chunk_at_a_time():
    rows = []

    def head(hidden):
        rows.append(len(hidden))
        return hidden

    student = torch.randn(10, 4, requires_grad=True)
    forward_kl(student, torch.randn(10, 4), head, chunk=4).backward()
    assert max(rows) == 4


def test_hidden_error():
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    student = torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    assert hidden_error(student, teacher).tolist() == [0, 0.25]
    assert hidden_error(100 * student, 100 * teacher).tolist() == [0, 0.25]


@pytest.mark.parametrize("family", KINDS)
def test_hidden_states_and_head_give_the_models_logits(family):
    network, made = model(family), case(family, "left_padding")
    with torch.no_grad(), hidden_states(network.base_model) as found:
        logits = network(**made.inputs).logits
    with torch.no_grad(), head_of(network) as head:
        torch.testing.assert_close(head(found[0]), logits)
    network(**made.inputs)
    assert len(found) == 1  # the hook is gone


@pytest.mark.parametrize(
    ("values", "match"),
    [({"weight": -1}, "weight -1"), ({"hidden": -1}, "hidden -1"), ({"temperature": 0}, "temperature 0")],
)
def test_bad_values(values, match):
    with pytest.raises(adsc.InputError, match=match):
        Distillation(**values)
