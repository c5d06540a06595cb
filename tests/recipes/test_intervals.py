"""Interquartile means, probabilities of improvement, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
import recipe_runs  # noqa: F401  (puts the recipes on the path)

from parts.intervals import interquartile_mean, probability_of_improvement  # isort: skip


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    samples = np.random.default_rng(0).normal(size=(12, 3))
    expected = [np.mean(sorted(column)[3:9]) for column in samples.T]
    np.testing.assert_allclose(interquartile_mean(samples).value, expected)


def test_one_wild_seed_does_not_move_it():
    samples = np.arange(10.0)
    wild = samples.copy()
    wild[-1] = 1e6
    assert interquartile_mean(wild).value == interquartile_mean(samples).value


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [interquartile_mean(rng.normal(2.0, 1.0, size=30), seed=trial) for trial in range(200)]
    covered = np.mean([estimate.low <= 2.0 <= estimate.high for estimate in found])
    # a percentile bootstrap of 30 falls a little short of 0.95; the binomial error is 0.017
    assert 0.86 < covered < 0.99


def test_probability_of_improvement_counts_pairs_and_halves_ties():
    x, y = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.0, 5.0])
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y)
    found = probability_of_improvement(x, y)
    assert found.value == pytest.approx(wins / 12)
    assert found.low <= found.value <= found.high


def test_probability_of_improvement_knows_winner_and_equal():
    low, high = np.arange(10.0), np.arange(10.0) + 100
    assert tuple(map(float, probability_of_improvement(high, low))) == (1.0, 1.0, 1.0)
    assert tuple(map(float, probability_of_improvement(low, high))) == (0.0, 0.0, 0.0)
    assert probability_of_improvement(low, low).value == 0.5


def test_one_seed_has_a_value_and_no_interval():
    for estimate in (interquartile_mean([3.0]), probability_of_improvement([3.0], [1.0])):
        assert np.isfinite(estimate.value)
        assert np.isnan(estimate.low)
        assert np.isnan(estimate.high)


def test_the_same_seed_gives_the_same_interval():
    samples = np.random.default_rng(2).normal(size=10)
    assert interquartile_mean(samples) == interquartile_mean(samples)
