"""No NaN and no infinity anywhere a network or a user can go."""

from __future__ import annotations

import itertools

import pytest
import torch

from torchrl_pmoe import NormalMixture, TanhNormalMixture

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LOCS = (-100.0, 0.0, 3.0, 100.0)
SCALES = (1e-6, 1e-3, 1.0, 1e3)
LOGITS = (-1e4, 0.0, 1e4)


def _extreme_mixtures(dtype, device):
    """All pairs of two experts on the grid of loc and scale, with all pairs of logits: leaves that want a gradient."""
    expert = list(itertools.product(LOCS, SCALES))
    grid = torch.tensor(list(itertools.product(expert, expert)), dtype=torch.float64)  # [N, K, (loc, scale)]
    logits = torch.tensor(list(itertools.product(LOGITS, LOGITS)), dtype=torch.float64)
    loc = grid[:, None, :, :1].expand(-1, len(logits), -1, 2)
    scale = grid[:, None, :, 1:].expand(-1, len(logits), -1, 2)
    params = (logits.expand(len(grid), -1, -1), loc, scale)
    return [x.to(device=device, dtype=dtype).contiguous().requires_grad_() for x in params]


def _awkward_actions(dtype, device, low=-1.0, high=1.0):
    """On the bounds, one and two representable numbers beside them on either side, and in the middle."""
    bounds = torch.tensor([low, high], dtype=dtype, device=device)
    middle = torch.full_like(bounds, (low + high) / 2)
    inside = torch.nextafter(bounds, middle)
    outside = torch.nextafter(bounds, bounds + (bounds - middle))
    points = torch.cat((bounds, inside, torch.nextafter(inside, middle), outside, middle[:1], middle[:1] + 1e-3))
    return points[:, None, None, None].expand(-1, 1, 1, 2)


def _assert_finite(outputs, params):
    for output in outputs:
        assert output.isfinite().all()
    total = sum(output.float().sum() if output.dtype == torch.bfloat16 else output.sum() for output in outputs)
    for grad in torch.autograd.grad(total, params, allow_unused=True):
        assert grad is None or grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_prob_routing", ["exact", "frequency"])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.4, 2.0)])
def test_density_of_any_action_is_finite(dtype, log_prob_routing, low, high, device):
    params = _extreme_mixtures(dtype, device)
    value = _awkward_actions(dtype, device, low, high).clone().requires_grad_()
    dist = TanhNormalMixture(*params, low, high, log_prob_routing=log_prob_routing)
    _assert_finite([dist.log_prob(value)], [*params, value])
    _assert_finite([dist.expert_log_prob(value), dist.responsibilities(value)], [*params, value])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unbounded_density_is_finite(dtype, device):
    params = _extreme_mixtures(dtype, device)
    value = torch.tensor([-1e3, -1.0, 0.0, 1e-6, 1e3], dtype=dtype, device=device)
    value = value[:, None, None, None].expand(-1, 1, 1, 2).clone().requires_grad_()
    _assert_finite([NormalMixture(*params).log_prob(value)], [*params, value])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [NormalMixture, TanhNormalMixture])
@pytest.mark.parametrize("score", ["mixture", "expert"])
@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "none"])
def test_draws_are_finite(dtype, cls, score, routing, device):
    params = _extreme_mixtures(dtype, device)
    dist = cls(*params, score=score, routing=routing)
    _assert_finite(dist.rsample_and_log_prob((2,)), params)
    _assert_finite([dist.rsample()], params)
    action, log_prob = dist.sample_and_log_prob((2,))
    assert action.isfinite().all()
    _assert_finite([log_prob], params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("slope", "weight"), [(1.0, 1e-12), (1.0, 1e6), (1e30, 1e-30)])
def test_soft_routing_is_finite_under_tiny_and_huge_temperatures(dtype, slope, weight, device):
    params = _extreme_mixtures(dtype, device)
    action, log_prob = TanhNormalMixture(*params, routing="soft_frequency").rsample_and_log_prob()
    slopes = (torch.full_like(action, slope), torch.full_like(log_prob, weight))
    grads = torch.autograd.grad((action, log_prob), params, slopes)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", [NormalMixture, TanhNormalMixture])
def test_proposals_entropy_and_summaries_are_finite(dtype, cls, device):
    params = _extreme_mixtures(dtype, device)
    dist = cls(*params)
    _assert_finite(dist.rsample_experts((2,)), params)
    _assert_finite([dist.entropy()], params)
    _assert_finite([dist.mean], params)
    _assert_finite([dist.mode], params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_draws_own_action_has_a_finite_density(dtype, device):
    params = _extreme_mixtures(dtype, device)
    dist = TanhNormalMixture(*params)
    _assert_finite([dist.log_prob(dist.sample((3,)))], params)
