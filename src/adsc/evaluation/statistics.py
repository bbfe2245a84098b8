"""Means with intervals for questions that share images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mean:
    """A mean over ``count`` questions and the half-width of its 95 % interval."""

    value: float
    margin: float
    count: int

    def to_dict(self) -> dict[str, float | int]:
        return {"mean": round(self.value, 5), "margin_95": round(self.margin, 5), "questions": self.count}


def clustered_mean(values: Sequence[float], clusters: Sequence[int]) -> Mean:
    """Mean of ``values`` with a 95 % interval that lets questions about one image (``clusters``) go together.

    The interval is the normal one around the ratio estimator, from the between-cluster ("sandwich") variance:
    s² = k/(k−1) · Σ_c (Σ_i∈c (x_i − x̄))² / n², over k clusters of n values in all (Cameron & Miller 2015, section II).

    Raises
    ------
    ValueError
        For fewer than two clusters.
    """
    x = np.asarray(values, dtype=float)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    k = int(index.max()) + 1 if len(x) else 0
    if k < 2:
        raise ValueError(f"an interval needs at least 2 clusters, not {k}")
    mean = float(x.mean())
    sums = np.bincount(index, weights=x - mean)
    error = np.sqrt(k / (k - 1) * np.sum(sums**2)) / len(x)
    return Mean(mean, float(1.96 * error), len(x))
