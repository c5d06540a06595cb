"""Statistics that several workers gather at once, merged on the learner."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_pmoe.envs import NormalizeObservationAndReward
from torchrl_pmoe.envs.normalization import RunningMoments
from torchrl_pmoe.envs.returns import keep_latest

__all__ = ["Moments", "add_gathered", "begin_gathering", "gathered", "moments_of"]

Moments = tuple[Tensor, Tensor, Tensor]
"""Mean ``[*shape]``, variance ``[*shape]`` and count ``[]`` of rows that were seen."""


def combined(first: Moments, second: Moments) -> Moments:
    """The moments of the rows of both (Chan, Golub and LeVeque 1979)."""
    (mean, var, count), (other_mean, other_var, other_count) = first, second
    total = count + other_count
    share = other_count / total.clamp_min(torch.finfo(total.dtype).tiny)
    delta = other_mean - mean
    return mean + delta * share, var * (1 - share) + other_var * share + delta.square() * share * (1 - share), total


def difference(after: Moments, before: Moments) -> Moments:
    """The moments of the rows that were seen in between; the inverse of :func:`combined`."""
    (mean, var, count), (old_mean, old_var, old_count) = after, before
    number = count - old_count
    share = number / count
    safe = share.clamp_min(torch.finfo(share.dtype).tiny)
    delta = (mean - old_mean) / safe  # of the new rows' mean
    new_var = ((var - old_var * (1 - share)) / safe - delta.square() * (1 - share)).clamp_min(0)
    seen = number > 0
    return (
        torch.where(seen, old_mean + delta, torch.zeros_like(mean)),
        torch.where(seen, new_var, torch.zeros_like(var)),
        number,
    )


def moments_of(normalization: NormalizeObservationAndReward) -> dict[str, Moments]:
    """The statistics as they stand, of observations and of discounted returns, on the host."""
    return {
        name: (one.mean.cpu().clone(), one.var.cpu().clone(), one.count.cpu().clone())
        for name, one in _parts(normalization).items()
    }


def begin_gathering(normalization: NormalizeObservationAndReward, moments: dict[str, Moments]) -> None:
    """In a worker: take over the learner's statistics, and forget the episodes that have ended before."""
    for name, one in _parts(normalization).items():
        _set(one, moments[name])
    normalization._recent = torch.full_like(normalization._recent, torch.nan)
    normalization._ended = torch.zeros_like(normalization._ended)


def gathered(normalization: NormalizeObservationAndReward, before: dict[str, Moments]) -> dict[str, object]:
    """In a worker: what was seen since :func:`begin_gathering`."""
    number = int(normalization._ended.clamp_max(len(normalization._recent) - 1))
    return {
        "moments": {name: difference(after, before[name]) for name, after in moments_of(normalization).items()},
        "returns": normalization._recent[:number].cpu().clone(),
    }


def add_gathered(normalization: NormalizeObservationAndReward, seen: dict[str, object]) -> None:
    """On the learner: add what a worker has seen."""
    moments, returns = seen["moments"], seen["returns"]
    assert isinstance(moments, dict)
    assert isinstance(returns, Tensor)
    here = moments_of(normalization)
    for name, one in _parts(normalization).items():
        _set(one, combined(here[name], moments[name]))
    if len(returns):
        recent, ended = normalization._recent, normalization._ended
        returns = returns.to(recent.device)
        all_of_them = torch.ones_like(returns, dtype=torch.bool)
        normalization._recent, normalization._ended = keep_latest(recent, ended, returns, all_of_them)


def _parts(normalization: NormalizeObservationAndReward) -> dict[str, RunningMoments]:
    return {"observations": normalization.observations, "returns": normalization.returns}


def _set(one: RunningMoments, moments: Moments) -> None:
    one.mean, one.var, one.count = (value.to(one.mean.device, copy=True) for value in moments)
