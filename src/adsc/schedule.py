"""At which decoder layers vision tokens are reduced, and how many of them go on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from math import ceil, floor
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

Ratio = Fraction | int | float | str

#: What :meth:`Schedule.for_budget` tries when not told otherwise.
KEEPS = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 4))
MAX_STAGES = 6


def fraction(value: Ratio, name: str = "fraction") -> Fraction:
    """Read an exact fraction in (0, 1] from ``"1/3"``, ``"0.5"``, a Fraction or a number.

    A float is taken as the nearest fraction with a denominator of at most a million, so that ``1 / 3`` is one third.

    Raises
    ------
    InputError
        When it does not parse or lies outside (0, 1].
    """
    try:
        result = Fraction(str(value)).limit_denominator(1_000_000) if isinstance(value, float) else Fraction(value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise InputError(f"{name} {value!r} is not a number; write it like 1/3 or 0.5") from None
    if not 0 < result <= 1:
        raise InputError(f"{name} {value} is outside (0, 1]; it is the part that stays, for example 1/3")
    return result


def _whole(layer: int) -> int:
    if not isinstance(layer, Integral):
        raise InputError(f"layer {layer!r} of a schedule is not a whole number")
    return int(layer)


def survivors(tokens: int, keep: Fraction) -> int:
    """How many of a span's ``tokens`` stay: max(1, floor(tokens * keep + 1/2)), exactly."""
    return max(1, (2 * tokens * keep.numerator + keep.denominator) // (2 * keep.denominator))


@dataclass(frozen=True, init=False)
class Schedule:
    """The ordered reductions of the vision tokens: ``(layer, fraction of those entering that layer that stays)``.

    Parameters
    ----------
    reductions
        Pairs of a 0-indexed decoder layer (at least 1, strictly increasing) and a fraction in (0, 1]. A reduction acts
        at the *input* of its layer.

    Raises
    ------
    InputError
        For layers that are no whole numbers, below 1 or not increasing, and for fractions outside (0, 1].

    Examples
    --------
    >>> schedule = Schedule.parse("3:1/2,11:0.5")
    >>> str(schedule)
    '3:1/2,11:1/2'
    """

    reductions: tuple[tuple[int, Fraction], ...]

    def __init__(self, reductions: Iterable[tuple[int, Ratio]] = ()) -> None:
        pairs = tuple((_whole(layer), fraction(keep, f"fraction at layer {layer}")) for layer, keep in reductions)
        layers = [layer for layer, _ in pairs]
        if layers and layers[0] < 1:
            raise InputError(f"reduction at layer {layers[0]}; the first decoder layer that can reduce is 1")
        for before, after in pairwise(layers):
            if after <= before:
                raise InputError(f"layer {after} follows layer {before}; the layers of a schedule must increase")
        object.__setattr__(self, "reductions", pairs)

    @classmethod
    def none(cls) -> Schedule:
        """The schedule without reductions: the dense model."""
        return cls()

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read ``"3:1/2,11:1/2"``; the empty string is no reduction. ``str()`` gives the text back."""
        pairs: list[tuple[int, Ratio]] = []
        for item in text.split(",") if text.strip() else ():
            layer, colon, keep = (part.strip() for part in item.partition(":"))
            if not (colon and layer.isascii() and layer.isdigit() and keep):
                raise InputError(
                    f"schedule {text!r}: {item.strip()!r} is not LAYER:FRACTION; write it like 3:1/2,11:1/2"
                )
            pairs.append((int(layer), keep))
        return cls(pairs)

    def validate(self, num_layers: int) -> Schedule:
        """Check that every layer exists in a decoder of ``num_layers`` layers, and return the schedule itself.

        Raises
        ------
        InputError
            When a layer is ``num_layers`` or more.
        """
        if self.reductions and self.reductions[-1][0] >= num_layers:
            raise InputError(
                f"reduction at layer {self.reductions[-1][0]}, but the model has {num_layers} layers; "
                f"layers 1 to {num_layers - 1} can reduce"
            )
        return self

    def __iter__(self) -> Iterator[tuple[int, Fraction]]:
        return iter(self.reductions)

    def __len__(self) -> int:
        return len(self.reductions)

    def __str__(self) -> str:
        return ",".join(f"{layer}:{keep}" for layer, keep in self.reductions)

    def __repr__(self) -> str:
        return f"Schedule.parse({str(self)!r})"

    @classmethod
    def for_budget(
        cls,
        num_layers: int,
        retained: Ratio,
        vision_tokens: int = 576,
        keep: Ratio | Sequence[Ratio] | None = None,
        stages: int | None = None,
    ) -> Schedule:
        """The schedule whose average number of vision tokens over all layers meets a budget.

        Candidates are all schedules with one keep fraction f throughout and k reductions at layers ≥ 1, each of which
        lowers the number of vision tokens. Those whose average over the layers is within 1 token of
        ``retained * vision_tokens`` are compared by, in this order:

        1. the latest first reduction;
        2. the most even spacing: the smallest difference between the widest and the narrowest gap between
           neighbouring reductions (one or two reductions are always even);
        3. the smallest distance from the budget;
        4. the fewest reductions, then the largest f, then the later layers, read from the first on.

        Since counts are rounded, the budget depends a little on ``vision_tokens``: the rule is for one image of
        that many tokens, and :attr:`adsc.Plan.retained` tells what a given row gets.

        Parameters
        ----------
        num_layers
            Decoder layers of the model, at least 2.
        retained
            Average over all layers of the vision tokens in that layer, over those of layer 0: ``"1/3"``, ``0.333``, …
            1 gives the empty schedule, and nothing else does.
        vision_tokens
            Vision tokens of one image.
        keep
            The fraction f, or several to choose from, below 1. By default 1/2, 1/3 and 1/4.
        stages
            The number k of reductions (of stages after stage 0). By default 1 to 6.

        Raises
        ------
        InputError
            When no candidate is within 1 token; names the nearest budget that can be reached.
        """
        target = fraction(retained, "retained")
        if num_layers < 2:
            raise InputError(f"a budget needs at least 2 decoder layers; the model has {num_layers}")
        if vision_tokens < 1:
            raise InputError(f"vision_tokens is {vision_tokens}; it must be at least 1")
        if stages is not None and not 1 <= stages < num_layers:
            raise InputError(f"stages is {stages}; over {num_layers} layers it can be 1 to {num_layers - 1}")
        keeps: tuple[Fraction, ...]
        if keep is None:
            keeps = KEEPS
        elif isinstance(keep, (Fraction, int, float, str)):
            keeps = (fraction(keep, "keep"),)
        else:
            keeps = tuple(fraction(each, "keep") for each in keep)
        if not keeps or max(keeps) == 1:
            raise InputError("keep must hold at least one fraction below 1, for example 1/2")
        return cls() if target == 1 else _for_budget(num_layers, target, vision_tokens, keeps, stages)


@lru_cache(maxsize=256)
def _for_budget(
    num_layers: int, retained: Fraction, vision_tokens: int, keeps: tuple[Fraction, ...], stages: int | None
) -> Schedule:
    # Everything is counted in sums over layers, so that it stays in integers: a schedule is within 1 token of the
    # budget when its sum is within num_layers of `target`.
    target = retained * vision_tokens * num_layers
    low, high = ceil(target - num_layers), floor(target + num_layers)
    families: list[tuple[Fraction, tuple[int, ...]]] = []
    for keep in keeps:
        counts: tuple[int, ...] = (vision_tokens,)
        for k in range(1, (stages or min(MAX_STAGES, num_layers - 1)) + 1):
            counts += (survivors(counts[-1], keep),)
            if counts[-1] == counts[-2]:
                break
            if stages in (None, k):
                families.append((keep, counts))

    best: tuple[object, ...] | None = None
    schedule = None
    latest = 1
    for keep, counts in families:
        k = len(counts) - 1
        for first in range(num_layers - k, latest - 1, -1):
            gaps, sums = _solutions(counts, first, num_layers, low, high)
            if len(gaps) == 0:
                continue
            latest = first
            spread = np.ptp(gaps, axis=1) if k > 2 else np.zeros(len(gaps), dtype=np.int64)
            for row in np.flatnonzero(spread == spread.min()):
                layers = (first, *(first + np.cumsum(gaps[row])).tolist())
                key = (-first, spread[row], abs(int(sums[row]) - target), k, -keep, tuple(-layer for layer in layers))
                if best is None or key < best:
                    best, schedule = key, Schedule((layer, keep) for layer in layers)
            break
    if schedule is None:
        nearest = _nearest_sum(families, num_layers, vision_tokens, target)
        average = Fraction(nearest, num_layers)
        number = f" of {stages} reductions" if stages else ""
        raise InputError(
            f"retained {retained} is {float(target / num_layers):.1f} of {vision_tokens} vision tokens on average; "
            f"over {num_layers} layers no schedule{number} keeping {', '.join(map(str, keeps))} reaches it; "
            f"the nearest is retained {float(average / vision_tokens):.4f} ({float(average):.1f} tokens)"
        )
    return schedule


def _solutions(
    counts: tuple[int, ...], first: int, num_layers: int, low: int, high: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All gaps between the reductions that put the sum over layers within [low, high], and these sums.

    ``counts[i]`` tokens are in stage i and the first reduction is at layer ``first``. The sum is linear in the gaps:
    a layer added to stage i in place of the last one costs ``counts[i] - counts[-1]``. Gaps are filled in one after
    the other, dropping at once what can no longer end within bounds. Returns arrays of shape ``(s, k - 1)``, ``(s,)``.
    """
    last = counts[-1]
    extra = [count - last for count in counts[1:-1]]
    sums = np.array([first * counts[0] + (num_layers - first) * last + sum(extra)], dtype=np.int64)
    spare = np.array([num_layers - first - len(extra) - 1], dtype=np.int64)  # layers beyond one in each stage
    gaps = np.ones((1, 0), dtype=np.int64)
    for weight, following in pairwise([*extra, 0]):
        widths = np.arange(spare.max(initial=0) + 1)
        sums, spare = (sums[:, None] + weight * widths).ravel(), (spare[:, None] - widths).ravel()
        possible = (spare >= 0) & (sums <= high) & (sums + following * spare >= low)
        gaps = np.column_stack((np.repeat(gaps, len(widths), axis=0), np.tile(widths + 1, len(gaps))))[possible]
        sums, spare = sums[possible], spare[possible]
    inside = (sums >= low) & (sums <= high)
    return gaps[inside], sums[inside]


def _nearest_sum(
    families: list[tuple[Fraction, tuple[int, ...]]], num_layers: int, vision_tokens: int, target: Fraction
) -> int:
    """The reachable sum over layers that is nearest to ``target``; the dense one counts."""
    nearest = vision_tokens * num_layers
    for _, counts in families:
        for first in range(1, num_layers - len(counts) + 2):
            distance = floor(abs(nearest - target))
            _, sums = _solutions(counts, first, num_layers, ceil(target - distance), floor(target + distance))
            if len(sums):
                nearest = min([nearest, *sums.tolist()], key=lambda total: abs(total - target))
    return nearest
