"""Means with intervals for questions that share images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Mean:
    """A mean over ``count`` questions and the half-width of its 95 % interval."""

    value: float
    margin: float
    count: int

    def to_dict(self) -> dict[str, float | int]:
        return {"mean": round(self.value, 5), "margin_95": round(self.margin, 5), "questions": self.count}


def clustered_mean(values: ArrayLike, clusters: ArrayLike) -> Mean:
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


def clustered_ratio(values: ArrayLike, reference: ArrayLike, clusters: ArrayLike) -> Mean:
    """Mean of ``values`` over that of ``reference``, paired: both are of the same questions, in the same order.

    The interval is that of :func:`clustered_mean` for the linearised ratio (delta method: Cochran 1977, *Sampling
    Techniques*, section 6.4): the residuals (x_i − R·y_i) / ȳ of R = x̄ / ȳ, summed by cluster.

    Raises
    ------
    ValueError
        For fewer than two clusters, values that are not paired, or a reference of mean 0.
    """
    x, y = np.asarray(values, dtype=float), np.asarray(reference, dtype=float)
    if x.shape != y.shape or not y.any():
        raise ValueError(f"a ratio needs as many values ({len(x)}) as reference values ({len(y)}), not all of them 0")
    ratio = x.mean() / y.mean()
    return Mean(float(ratio), clustered_mean((x - ratio * y) / y.mean(), clusters).margin, len(x))


def clustered_mean_of_groups(values: ArrayLike, groups: ArrayLike, clusters: ArrayLike) -> Mean:
    """Mean over groups (tasks) of the mean in each, whatever their sizes, with an interval as :func:`clustered_mean`.

    Each value counts as 1 / (number of groups · size of its group); an image may have questions in several groups.
    """
    x = np.asarray(values, dtype=float)
    _, index, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=x) / sizes
    weight = len(x) / (len(sizes) * sizes[index])
    return Mean(float(means.mean()), clustered_mean(weight * (x - means[index]), clusters).margin, len(x))
