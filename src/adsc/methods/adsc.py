"""Attention-driven self-compression (arXiv 2602.12618): uniform subsets of each span at selected layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import ADSCConfig
from ..layout import Layout
from ..planning import Plan, plan
from ..schedule import Ratio, Schedule, fraction


@dataclass(frozen=True)
class ADSC(ADSCConfig):
    """Keep evenly spaced vision tokens from selected layers on; no scores, no extra modules.

    Takes the parameters of :class:`adsc.ADSCConfig`. Source: arXiv 2602.12618.
    """

    name = "adsc"
    keeps_last_token = True  # as every pattern of adsc.plan does

    @property
    def reduces(self) -> bool:
        """False for the empty schedule."""
        return len(self.schedule) > 0

    def validate(self, num_layers: int) -> None:
        """Raise :class:`adsc.InputError` when a schedule names a layer that the model lacks."""
        for schedule in (self.schedule, *(schedule for _, schedule in self.budgets)):
            schedule.validate(num_layers)

    def plan(self, layout: Layout, num_layers: int) -> Plan:
        """The kept positions of one row."""
        return plan(layout, schedule=self.schedule, num_layers=num_layers, pattern=self.pattern, seed=self.seed)

    def for_budget(self, num_layers: int, retained: Ratio) -> ADSC:
        """The same pattern and positions with another schedule: the one saved for this budget, where there is one,
        else that of :meth:`adsc.Schedule.for_budget`."""
        saved = dict(self.budgets).get(fraction(retained, "retained"))
        return replace(self, schedule=Schedule.for_budget(num_layers, retained) if saved is None else saved)
