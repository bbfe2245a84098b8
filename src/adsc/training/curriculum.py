"""How the reduction changes while a model is trained: progress → schedule. Exact, and without state."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from ..errors import InputError
from ..schedule import Ratio, Schedule, fraction

Kind = Literal["constant", "light_to_heavy", "heavy_to_light", "deep_to_shallow", "elastic"]
KINDS: tuple[str, ...] = get_args(Kind)
STEPS = 8  # from start to target: few schedules to plan for, and fractions with small denominators
WARM = Fraction(3, 5)


@dataclass(frozen=True)
class Curriculum:
    """What is dropped at which point of the training. A function of its arguments alone, so a resumed run agrees.

    ``constant``
        The target throughout.
    ``light_to_heavy``
        Every fraction f goes from 1 (nothing is dropped) to f, at the target's layers.
    ``heavy_to_light``
        Every fraction goes from f² to f: at first each reduction is made twice.
    ``deep_to_shallow``
        The target's fractions throughout. Its k reductions move from the last k layers to their own.
    ``elastic``
        One of several budgets for each batch. Of as many batches in a row as there are budgets, each gets another, in
        an order drawn for that row of batches; so one adapter learns them all.

    All but the first and the last reach the target in :data:`STEPS` even steps over the first ``warm`` part of the
    training, and stay there.

    Parameters
    ----------
    kind
        One of these.
    target
        The schedule that the training is for.
    num_layers
        Decoder layers of the model.
    warm
        Part of the training, in (0, 1], after which the target is reached.
    budgets
        The schedules of ``elastic``; one named twice is drawn twice as often.
    seed
        Seed of the draws of ``elastic``.

    Raises
    ------
    InputError
        For an unknown kind, a schedule that names a layer the model lacks, ``warm`` outside (0, 1], or ``elastic``
        without budgets.

    Examples
    --------
    >>> curriculum = Curriculum("light_to_heavy", Schedule.parse("4:1/2,8:1/2"), num_layers=12)
    >>> str(curriculum.schedule(0)), str(curriculum.schedule("0.3")), str(curriculum.schedule(1))
    ('', '4:3/4,8:3/4', '4:1/2,8:1/2')
    """

    kind: str
    target: Schedule
    num_layers: int
    warm: Ratio = WARM
    budgets: Sequence[Schedule] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"curriculum {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        object.__setattr__(self, "warm", fraction(self.warm, "warm"))
        object.__setattr__(self, "budgets", tuple(self.budgets))
        if self.kind == "elastic" and not self.budgets:
            raise InputError("the curriculum elastic needs budgets to draw from; give at least one")
        for schedule in (self.target, *self.budgets):
            schedule.validate(self.num_layers)

    def schedule(self, progress: Ratio, draw: int = 0) -> Schedule:
        """The schedule of one batch.

        Parameters
        ----------
        progress
            Part of the training that lies behind, in [0, 1]: optimiser steps done over all of them.
        draw
            Number of the batch, at least 0 (``elastic`` alone looks at it). The same on every process.

        Raises
        ------
        InputError
            When either is out of range.
        """
        done = Fraction(progress).limit_denominator(1_000_000)
        if not 0 <= done <= 1:
            raise InputError(f"progress {progress} is outside [0, 1]; it is steps done over all steps")
        if draw < 0:
            raise InputError(f"draw {draw} must be a whole number of at least 0")
        if self.kind == "elastic":
            round_, place = divmod(draw, len(self.budgets))
            order = list(range(len(self.budgets)))
            random.Random(f"{self.seed} {round_}").shuffle(order)
            return self.budgets[order[place]]
        return self._step(min(STEPS, int(done * STEPS / Fraction(self.warm))))

    def shares(self) -> list[tuple[Fraction, Schedule]]:
        """Every schedule of the training, in their order, and the part of it that each one takes (together 1)."""
        if self.kind == "elastic":
            return [
                (Fraction(self.budgets.count(each), len(self.budgets)), each) for each in dict.fromkeys(self.budgets)
            ]
        warm = Fraction(self.warm)
        shares = [(warm / STEPS, self._step(step)) for step in range(STEPS)] + [(1 - warm, self.target)]
        merged: list[tuple[Fraction, Schedule]] = []
        for share, schedule in shares:
            if merged and merged[-1][1] == schedule:
                share += merged.pop()[0]
            if share:
                merged.append((share, schedule))
        return merged

    def _step(self, step: int) -> Schedule:
        """From 0, the start, to :data:`STEPS`, the target."""
        part = Fraction(step, STEPS)
        if self.kind == "light_to_heavy":
            keeps = [(layer, 1 - (1 - keep) * part) for layer, keep in self.target]
            return Schedule((layer, keep) for layer, keep in keeps if keep < 1)
        if self.kind == "heavy_to_light":
            return Schedule((layer, keep * (keep + (1 - keep) * part)) for layer, keep in self.target)
        if self.kind == "deep_to_shallow":
            # Gaps between layers are at least 1 at both ends, so they are on the way, and rounding keeps that.
            first = self.num_layers - len(self.target)
            return Schedule(
                (layer + int((first + index - layer) * (1 - part)), keep)
                for index, (layer, keep) in enumerate(self.target)
            )
        return self.target
