"""What several seeds say together: interquartile means and probabilities of improvement, with bootstrap intervals.

The estimates that Agarwal et al. (2021, *Deep Reinforcement Learning at the Edge of the Statistical Precipice*)
recommend, on SciPy; the seed is the unit of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 2000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A value between the ends of its interval; floats, or arrays of one shape."""

    value: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def _bootstrapped(
    samples: Sequence[ArrayLike], statistic: Callable[..., NDArray[np.float64]], seed: int, axis: int
) -> Estimate:
    """A statistic of some samples, with its 95 % percentile-bootstrap interval; nan where one has no second value."""
    arrays = [np.asarray(one, dtype=np.float64) for one in samples]
    value = np.asarray(statistic(*arrays, axis=axis))
    if min(one.shape[axis] for one in arrays) < 2:
        return Estimate(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    found = stats.bootstrap(
        arrays,
        statistic,
        axis=axis,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, np.asarray(found.low), np.asarray(found.high))


def _middle_half(samples: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return stats.trim_mean(samples, 0.25, axis=axis)


def interquartile_mean(samples: ArrayLike, seed: int = 0) -> Estimate:
    """Mean of the middle half over the seeds, with its 95 % percentile-bootstrap interval.

    Args:
        samples: ``[seeds, ...]``, without nan.
        seed: of the bootstrap.

    Returns:
        Arrays ``[...]``; one seed alone has no interval (nan).
    """
    return _bootstrapped([samples], _middle_half, seed, axis=0)


def mean_interval(samples: ArrayLike, seed: int = 0) -> Estimate:
    """Mean over the seeds, with its 95 % percentile-bootstrap interval.

    Args:
        samples: ``[seeds, ...]``, without nan.
        seed: of the bootstrap.

    Returns:
        Arrays ``[...]``; one seed alone has no interval (nan).
    """
    return _bootstrapped([samples], np.mean, seed, axis=0)


def _improvement(x: NDArray[np.float64], y: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    gap = np.moveaxis(x, axis, -1)[..., :, None] - np.moveaxis(y, axis, -1)[..., None, :]
    return ((gap > 0) + 0.5 * (gap == 0)).mean((-2, -1))


def probability_of_improvement(x: ArrayLike, y: ArrayLike, seed: int = 0) -> Estimate:
    """``P(X > Y) + P(X = Y) / 2`` over pairs of seeds, with its 95 % percentile-bootstrap interval.

    Args:
        x: one value per seed.
        y: one value per seed of the other.
        seed: of the bootstrap.
    """
    return _bootstrapped([x, y], _improvement, seed, axis=-1)


# ------------------------------------------------------------------------------------------ over several tasks
#
# A stratified bootstrap draws the seeds of each task anew, independently of those of the others, which is what SciPy
# does with several samples.


def _pooled(statistic: Callable[..., NDArray[np.float64]]) -> Callable[..., NDArray[np.float64]]:
    """A statistic of the runs of all tasks together."""
    return lambda *tasks, axis: statistic(np.concatenate(tasks, axis=axis), axis=axis)


def interquartile_mean_over_tasks(tasks: Sequence[ArrayLike], seed: int = 0) -> Estimate:
    """Mean of the middle half of the runs of all tasks, with its 95 % stratified bootstrap interval.

    Args:
        tasks: of each, one score per seed, in units that all tasks share.
        seed: of the bootstrap.
    """
    return _bootstrapped(tasks, _pooled(_middle_half), seed, axis=-1)


def probability_of_improvement_over_tasks(pairs: Sequence[tuple[ArrayLike, ArrayLike]], seed: int = 0) -> Estimate:
    """The mean over tasks of :func:`probability_of_improvement`, with its 95 % stratified bootstrap interval.

    Args:
        pairs: of each task, one value per seed of both.
        seed: of the bootstrap.
    """

    def improvement(*samples: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        half = len(samples) // 2
        each = [_improvement(x, y, axis) for x, y in zip(samples[:half], samples[half:], strict=True)]
        return np.mean(each, axis=0)

    return _bootstrapped([x for x, _ in pairs] + [y for _, y in pairs], improvement, seed, axis=-1)


def performance_profile(tasks: Sequence[ArrayLike], levels: ArrayLike, seed: int = 0) -> Estimate:
    """Which part of the runs has a score above each level, with its 95 % stratified bootstrap interval.

    Args:
        tasks: of each, one score per seed, in units that all tasks share.
        levels: of the score, ``[L]``.
        seed: of the bootstrap.

    Returns:
        Arrays ``[L]``.
    """
    above = [np.asarray(scores)[:, None] > np.asarray(levels) for scores in tasks]  # [seeds, L] each
    return _bootstrapped(above, _pooled(np.mean), seed, axis=0)
