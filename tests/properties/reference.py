"""The mixture in float64 by ``torch.distributions``, and how far rounding may take an implementation from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributions as D

from torchrl_pmoe import NormalMixture

# operations whose roundings add up along one path, generously
STEPS = 16


class Density(NamedTuple):
    """Log-densities in float64, of the mixture ``[*S, *B]`` and of each expert ``[*S, *B, K]``, with tolerances."""

    mixture: Tensor
    mixture_error: Tensor
    expert: Tensor
    expert_error: Tensor
    resolved: Tensor  # whether rounding leaves the latent value of the action where it was, ``[*S, *B]``


def computes_in(dtype: torch.dtype) -> torch.dtype:
    """Densities of half-precision parameters are computed in float32."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def as_double(dist: NormalMixture) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.detach().double() for x in (dist.logits, dist.loc, dist.scale))


def box_of(dist: NormalMixture) -> tuple[Tensor, Tensor]:
    """Middle and half-width of a bounded mixture."""
    low, high = (torch.as_tensor(x, dtype=torch.float64) for x in (dist.low, dist.high))
    return (high + low) / 2, (high - low) / 2


def density(dist: NormalMixture, value: Tensor) -> Density:
    """Log-densities of ``value``, whose tolerances follow from what rounding does to each number on the way.

    A value on or beyond a bound counts as the largest one inside.
    """
    logits, loc, scale = as_double(dist)
    eps = torch.finfo(computes_in(value.dtype)).eps
    x = value.detach().double()
    if not hasattr(dist, "low"):
        latent, moved = x, torch.zeros_like(x)
        log_slope, slope_error = torch.zeros_like(x), torch.zeros_like(x)
        resolved = torch.ones(x.shape[:-1], dtype=torch.bool)
    else:
        middle, half = box_of(dist)
        # tensors of bounds are halved in their own dtype
        own = torch.finfo(value.dtype).eps if isinstance(dist.low, Tensor) else eps
        limit = 1.0 - torch.finfo(value.dtype).eps / 2
        inside = lambda y: y.clamp(-limit, limit)
        y = (x - middle) / half
        rounding = 2 * own * (middle.abs() / half + y.abs()) + STEPS * eps
        resolved = (y.abs() + rounding < limit).all(-1)
        y = inside(y)
        latent = y.atanh()
        moved = torch.maximum(inside(y + rounding).atanh() - latent, latent - inside(y - rounding).atanh())
        moved = moved + STEPS * eps * latent.abs()
        log_slope = (half * (1 - y) * (1 + y)).log()
        slope_error = 2 * moved + STEPS * eps * (1 + latent.abs() + half.log().abs()) + own
    normal = D.Normal(loc, scale)
    z = (latent.unsqueeze(-2) - loc) / scale
    shift = moved.unsqueeze(-2) / scale
    expert_error = (z.abs() * shift + shift.square() / 2 + STEPS * eps * (1 + z.square() + scale.log().abs())).sum(-1)
    expert_error = expert_error + slope_error.sum(-1, keepdim=True)
    expert = normal.log_prob(latent.unsqueeze(-2)).sum(-1) - log_slope.sum(-1, keepdim=True)
    log_weight = logits.log_softmax(-1)
    expected = log_slope.new_zeros(latent.shape[:-1])
    if expected.numel():
        same_family = D.MixtureSameFamily(D.Categorical(logits=logits), D.Independent(normal, 1))
        expected = same_family.log_prob(latent) - log_slope.sum(-1)
    joint, joint_error = expert + log_weight, expert_error + STEPS * eps * (1 + log_weight.abs())
    sums = [(joint + sign * joint_error).logsumexp(-1) for sign in (-1, 0, 1)]
    error = torch.maximum(sums[2] - sums[1], sums[1] - sums[0])
    last = torch.finfo(dist.loc.dtype).eps
    return Density(expected, error + last * expected.abs(), expert, expert_error + last * expert.abs(), resolved)


def latent_density(dist: NormalMixture, latent: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density in float64 of the actions that ``latent`` ``[*S, *B, A]`` becomes: mixture's and experts'."""
    logits, loc, scale = as_double(dist)
    log_slope = torch.zeros((), dtype=torch.float64)
    if hasattr(dist, "low"):
        log_slope = (box_of(dist)[1].log() - 2 * latent.cosh().log()).sum(-1)
    normal = D.Independent(D.Normal(loc, scale), 1)
    mixture = D.MixtureSameFamily(D.Categorical(logits=logits), normal).log_prob(latent) - log_slope
    return mixture, normal.log_prob(latent.unsqueeze(-2)) - log_slope.unsqueeze(-1)


def assert_within(found: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    assert found.shape == expected.shape
    miss = (found.double() - expected).abs() - tolerance
    assert (miss <= 0).all(), f"off by {(found.double() - expected).abs().max()}, tolerance exceeded by {miss.max()}"
