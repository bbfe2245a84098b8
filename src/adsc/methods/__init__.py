"""Ways to choose the vision tokens that stay. One file per method; :data:`METHODS` finds them by name."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from ..config import ADSCConfig
from ..errors import InputError
from ..layout import Layout
from ..planning import Plan
from ..schedule import Ratio, Schedule
from .adsc import ADSC


@runtime_checkable
class Method(Protocol):
    """What an engine asks of a method. Everything is decided before the forward pass, from the layout alone."""

    @property
    def name(self) -> str:
        """Its name in :data:`METHODS`."""

    @property
    def positions(self) -> str:
        """``original`` or ``compact``: which position ids kept tokens have (see :class:`adsc.ADSCConfig`)."""

    @property
    def keeps_last_token(self) -> bool:
        """Whether the last token of every span stays, so that the text after it can be predicted everywhere."""

    @property
    def reduces(self) -> bool:
        """False when nothing is ever dropped: the model then runs as if no method were attached."""

    def validate(self, num_layers: int) -> None:
        """Raise :class:`adsc.InputError` when a decoder of ``num_layers`` layers cannot be reduced this way."""

    def plan(self, layout: Layout, num_layers: int) -> Plan:
        """The kept positions of one row."""

    def for_budget(self, num_layers: int, retained: Ratio) -> Method:
        """The same method at another budget."""


METHODS: dict[str, type[ADSC]] = {"adsc": ADSC}


def as_method(what: Schedule | ADSCConfig | Method | str) -> Method:
    """The method that a schedule (or its text), an :class:`adsc.ADSCConfig` or a method stands for.

    Raises
    ------
    InputError
        For anything else.
    """
    if isinstance(what, Method):
        return what
    if isinstance(what, (Schedule, str)):
        return ADSC(Schedule.parse(what) if isinstance(what, str) else what)
    if isinstance(what, ADSCConfig):
        return ADSC(what.schedule, what.pattern, what.positions, what.seed, what.budgets)
    raise InputError(f"{what!r} is not a way to reduce; give a Schedule, an ADSCConfig or a method of adsc.methods")


__all__ = ["ADSC", "METHODS", "Method", "as_method"]
