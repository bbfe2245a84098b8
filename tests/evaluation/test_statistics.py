"""Intervals that let questions about one image go together."""

from __future__ import annotations

import numpy as np
import pytest

from adsc.evaluation.statistics import clustered_mean, clustered_mean_of_groups, clustered_ratio


def drawn(seed: int = 0, clusters: int = 400):
    """Right answers of two models to questions about images of different difficulty, 3 to 8 an image."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(3, 9, clusters)
    images = np.repeat(np.arange(clusters), sizes)
    ease = np.repeat(rng.beta(6, 2, clusters), sizes)
    reference = (rng.random(len(images)) < ease).astype(float)
    values = reference * (rng.random(len(images)) < 0.9)  # loses a tenth of what the other knows
    return values, reference, images


def test_a_known_mean_and_margin():
    # Two questions an image, always alike: the interval is that of 4 images, not of 8 questions.
    found = clustered_mean([1, 1, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3])
    assert (found.value, found.count) == (0.75, 8)
    assert found.margin == pytest.approx(1.96 * np.std([1, 0, 1, 1], ddof=1) / 2)


def test_a_known_ratio():
    found = clustered_ratio([1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 1, 1])
    assert found.value == pytest.approx(2 / 3)
    assert clustered_ratio([0.5, 1], [0.5, 1], [0, 1]) == clustered_ratio([1, 2], [1, 2], [0, 1])
    assert clustered_ratio([1, 0, 1], [1, 0, 1], [0, 1, 2]).margin == 0


@pytest.mark.parametrize("statistic", ["mean", "ratio", "groups"])
def test_margins_are_those_of_a_bootstrap_over_images(statistic):
    values, reference, images = drawn()
    groups = np.arange(len(values)) % 7 // 3  # of unequal sizes
    if statistic == "mean":
        found, of = clustered_mean(values, images), lambda at: values[at].mean()
    elif statistic == "ratio":
        found = clustered_ratio(values, reference, images)
        of = lambda at: values[at].mean() / reference[at].mean()  # noqa: E731
    else:
        found = clustered_mean_of_groups(values, groups, images)
        of = lambda at: np.mean([values[at][groups[at] == g].mean() for g in np.unique(groups)])  # noqa: E731
    assert found.value == pytest.approx(of(np.arange(len(values))))
    rng, rows = np.random.default_rng(1), [np.flatnonzero(images == image) for image in np.unique(images)]
    again = [of(np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])) for _ in range(1500)]
    assert found.margin == pytest.approx(1.96 * np.std(again), rel=0.07)


def test_ratios_are_paired():
    values, reference, images = drawn()
    shuffled = np.random.default_rng(2).permutation(reference)
    assert clustered_ratio(values, reference, images).margin < 0.7 * clustered_ratio(values, shuffled, images).margin


def test_what_has_no_interval():
    with pytest.raises(ValueError, match="2 clusters"):
        clustered_mean([1, 0], [0, 0])
    with pytest.raises(ValueError, match="not all of them 0"):
        clustered_ratio([1, 0], [0, 0], [0, 1])
    with pytest.raises(ValueError, match="as many values"):
        clustered_ratio([1, 0], [1, 0, 1], [0, 1, 2])
