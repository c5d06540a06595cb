"""Gumbel-Softmax routing against the relaxation written by hand, the exact gradient, and the mixture's own law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from distributions.reference import (
    BOTH,
    expert_reference,
    make_params,
    one_hot_of_largest,
    squash_transforms,
    tanh_reference,
)
from scipy import stats
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import SACLoss

from torchrl_pmoe import NormalMixture, PMOEActor, RoutingGradient, TanhNormalMixture
from torchrl_pmoe.distributions.routing import gumbel_softmax

# A sample of the right distribution is refused about once in a thousand seeds; the seed is fixed.
SIGNIFICANCE = 1e-3
STRAIGHT_AND_SOFT = pytest.mark.parametrize("straight_through", [True, False], ids=["straight", "soft"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def relax(logits, sample_shape=(), *, temperature=0.7, straight_through=True, **kwargs):
    return gumbel_softmax(
        logits, torch.Size(sample_shape), temperature=temperature, straight_through=straight_through, **kwargs
    )


def relaxed(params, cls=TanhNormalMixture, **options):
    return cls(*params, **{"routing": "gumbel_softmax", "temperature": 0.7, **options})


@pytest.fixture
def uniform(monkeypatch):
    """The uniform numbers of the last draw of an expert."""
    seen, draw = [], torch.rand

    def record(*args, **kwargs):
        seen.append(draw(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(torch, "rand", record)
    return lambda: seen[-1].double().numpy()


def by_hand(logits, uniform, temperature):
    """Soft weights and the drawn expert, in numpy: ``softmax((log w - log(-log u)) / temperature)``."""
    logits = logits.detach().double().numpy()
    perturbed = logits - np.log(-np.log(uniform))  # the softmax does not see what log w adds to every logit
    exponentials = np.exp((perturbed - perturbed.max(-1, keepdims=True)) / temperature)
    return exponentials / exponentials.sum(-1, keepdims=True), perturbed.argmax(-1)


def through_the_softmax(y, cost, temperature):
    """``cost`` times the Jacobian ``(diag y - y y^T) / temperature``, in numpy."""
    jacobian = np.einsum("...i,ij->...ij", y, np.eye(y.shape[-1])) - y[..., :, None] * y[..., None, :]
    return np.einsum("...i,...ij->...j", cost, jacobian) / temperature


# ---------------------------------------------------------------------- the relaxed draw


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1e-3, 0.7, 30.0])
def test_the_straight_through_draw_is_one_hot_to_the_last_bit(dtype, temperature, device):
    logits = 3 * torch.randn(500, 5, dtype=dtype, device=device)
    weights = relax(logits.requires_grad_(), (4,), temperature=temperature)
    assert weights.dtype == dtype
    assert weights.shape == (4, 500, 5)
    assert torch.equal(weights, one_hot_of_largest(weights))
    assert weights.requires_grad


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_the_soft_draw_is_the_relaxation_written_by_hand(temperature, uniform):
    logits = 2 * torch.randn(50, 4, dtype=torch.float64)
    soft = relax(logits, (3,), temperature=temperature, straight_through=False)
    expected, _ = by_hand(logits, uniform(), temperature)
    np.testing.assert_allclose(soft.numpy(), expected, rtol=1e-9, atol=1e-300)


def test_the_straight_through_draw_is_the_largest_of_the_soft_one(uniform):
    logits = 2 * torch.randn(50, 4, dtype=torch.float64)
    hard = relax(logits, (3,))
    np.testing.assert_array_equal(hard.argmax(-1).numpy(), by_hand(logits, uniform(), 0.7)[1])


@STRAIGHT_AND_SOFT
@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_the_gradient_is_the_relaxations_written_by_hand(straight_through, temperature, uniform):
    logits = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    cost = torch.randn(3, 20, 4, dtype=torch.float64)
    weights = relax(logits, (3,), temperature=temperature, straight_through=straight_through)
    y, _ = by_hand(logits, uniform(), temperature)
    expected = through_the_softmax(y, cost.numpy(), temperature).sum(0)
    actual = torch.autograd.grad(weights, logits, cost)[0]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-8, atol=1e-12)


@STRAIGHT_AND_SOFT
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_the_largest_weight_falls_on_experts_as_often_as_the_router_says(straight_through, temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -3.0], dtype=torch.float64)
    drawn = relax(logits, (5000,), temperature=temperature, straight_through=straight_through).argmax(-1)
    counts = np.bincount(drawn.numpy(), minlength=5)
    assert stats.chisquare(counts, 5000 * logits.softmax(-1).numpy()).pvalue > SIGNIFICANCE


def test_rows_and_samples_are_drawn_independently():
    first, second = relax(torch.zeros(4000, 2), (2,)).argmax(-1).numpy()
    for one, other in ((first, second), (first[::2], first[1::2])):
        table = np.array([[np.sum((one == a) & (other == b)) for b in (0, 1)] for a in (0, 1)])
        assert stats.chi2_contingency(table).pvalue > SIGNIFICANCE


def mean_gradient(temperature, straight_through, cost, logits, rows=400_000):
    """Mean gradient of a linear cost over draws, and its standard error."""
    leaf = logits.expand(rows, -1).clone().requires_grad_()
    weights = relax(leaf, temperature=temperature, straight_through=straight_through)
    gradient = torch.autograd.grad((weights * cost).sum(), leaf)[0]
    return gradient.mean(0), gradient.std(0) / math.sqrt(rows)


@STRAIGHT_AND_SOFT
def test_as_the_temperature_falls_the_mean_gradient_of_a_linear_cost_becomes_exact(straight_through):
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)
    cost = torch.tensor([1.0, 3.0, -1.0], dtype=torch.float64)
    w = logits.softmax(-1)
    exact = w * (cost - w @ cost)
    errors = []
    for temperature in (2.0, 0.5, 0.05):
        mean, error = mean_gradient(temperature, straight_through, cost, logits)
        errors.append((mean - exact).norm())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert ((mean - exact).abs() < 4 * error).all()
    assert (error < 0.02).all()


@pytest.mark.parametrize("drawn", [[0.0, 1.0 - torch.finfo(torch.float32).eps / 2, 0.5], [0.0] * 3], ids=str)
def test_its_numbers_are_finite_for_the_extreme_draws_and_logits(drawn, monkeypatch):
    for dtype in DTYPES:
        extremes = torch.tensor(drawn)
        monkeypatch.setattr(torch, "rand", lambda shape, dtype, device, x=extremes: x.to(dtype).expand(shape))
        logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
        weights = relax(logits, temperature=0.05, straight_through=False)
        assert weights.isfinite().all()
        assert torch.autograd.grad(weights.square().sum(), logits)[0].isfinite().all()


# ---------------------------------------------------------------------- in the distribution


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("score", ["mixture", "expert"])
def test_the_straight_through_draw_is_one_proposal_with_the_density_that_score_names(cls, score, uniform):
    params = make_params(40, experts=4, requires_grad=True)
    dist = relaxed(params, cls, score=score)
    torch.manual_seed(3)
    proposals, own = dist.rsample_experts((5,))
    torch.manual_seed(3)
    action, log_prob = dist.rsample_and_log_prob((5,))
    drawn = torch.from_numpy(by_hand(params[0], uniform(), 0.7)[1])
    picked = proposals.take_along_dim(drawn[..., None, None], -2).squeeze(-2)
    torch.testing.assert_close(action, picked, rtol=0, atol=0)
    expected = dist.log_prob(action) if score == "mixture" else own.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_prob, expected)
    torch.manual_seed(3)
    torch.testing.assert_close(dist.rsample((5,)), action, rtol=0, atol=0)


def test_the_soft_draw_blends_the_experts_draws_before_the_tanh(uniform):
    params = make_params(40, experts=4, requires_grad=True)
    dist = relaxed(params, low=-2.0, high=1.0, straight_through=False)
    torch.manual_seed(3)
    latent = dist.propose((5,)).latent
    torch.manual_seed(3)
    action, log_prob = dist.rsample_and_log_prob((5,))
    y = torch.from_numpy(by_hand(params[0], uniform(), 0.7)[0]).unsqueeze(-1)
    torch.testing.assert_close(action, 1.5 * (y * latent).sum(-2).tanh() - 0.5)
    torch.testing.assert_close(log_prob, dist.log_prob(action))
    torch.manual_seed(3)
    torch.testing.assert_close(dist.rsample((5,)), action, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("score", "straight_through"), [("mixture", True), ("mixture", False), ("expert", True)], ids=str
)
@pytest.mark.parametrize("coef", [1.0, 0.3, 0.0])
def test_gradients_of_a_loss_are_those_of_the_relaxation_and_the_coefficient_scales_the_routers(
    score, straight_through, coef, uniform
):
    """The slope of the loss in the weights of the experts, by a second density; from there on by numpy."""
    params = make_params(12, experts=4, requires_grad=True)
    dist = relaxed(params, low=-2.0, high=1.0, score=score, straight_through=straight_through, routing_coef=coef)
    torch.manual_seed(3)
    noise = dist.propose((5,)).noise
    torch.manual_seed(3)
    action, log_prob = dist.rsample_and_log_prob((5,))
    loss = lambda a, lp: (0.3 * lp + (a - 0.2).square().sum(-1) + a.prod(-1)).sum()
    actual = torch.autograd.grad(loss(action, log_prob), params)

    y, drawn = by_hand(params[0], uniform(), 0.7)
    y = torch.from_numpy(y)
    v = torch.eye(4, dtype=torch.float64)[torch.from_numpy(drawn)] if straight_through else y
    v = v.clone().requires_grad_()
    logits, loc, scale = params[0].detach(), *params[1:]
    u = (v.unsqueeze(-1) * (loc + scale * noise)).sum(-2)
    for transform in squash_transforms(-2.0, 1.0):
        u = transform(u)
    if score == "mixture":
        density = tanh_reference(logits, loc, scale, -2.0, 1.0).log_prob(u)
    else:
        proposals = 1.5 * (loc + scale * noise).tanh() - 0.5
        density = (v * expert_reference(loc, scale, -2.0, 1.0).log_prob(proposals)).sum(-1)
    cost, *expected = torch.autograd.grad(loss(u, density), (v, loc, scale))
    router = coef * through_the_softmax(y.numpy(), cost.numpy(), 0.7).sum(0)
    np.testing.assert_allclose(actual[0].numpy(), router, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(actual[1:], tuple(expected), rtol=1e-6, atol=1e-9)
    assert bool(actual[0].any()) == (coef > 0)


@STRAIGHT_AND_SOFT
@pytest.mark.parametrize("method", ["sample", "sample_and_log_prob", "rsample", "rsample_and_log_prob"])
def test_draws_without_gradient_follow_the_mixture(straight_through, method):
    params = make_params(experts=3)
    dist = relaxed(params, NormalMixture, straight_through=straight_through, temperature=5.0)
    with torch.no_grad():
        out = getattr(dist, method)((4000,))
    action = out[0] if isinstance(out, tuple) else out
    assert not action.requires_grad
    weights, loc, scale = (x.numpy() for x in (params[0].softmax(-1), *params[1:]))
    for i in range(2):
        cdf = lambda u, i=i: stats.norm.cdf(u[:, None], loc[:, i], scale[:, i]) @ weights
        assert stats.kstest(action[:, i].numpy(), cdf).pvalue > SIGNIFICANCE
    if isinstance(out, tuple):
        torch.testing.assert_close(out[1], dist.log_prob(action))


def test_straight_through_draws_with_gradient_follow_the_mixture():
    params = make_params(experts=3, requires_grad=True)
    action = relaxed(params, NormalMixture, temperature=5.0).rsample((4000,)).detach()
    weights, loc, scale = (x.detach().numpy() for x in (params[0].softmax(-1), *params[1:]))
    for i in range(2):
        cdf = lambda u, i=i: stats.norm.cdf(u[:, None], loc[:, i], scale[:, i]) @ weights
        assert stats.kstest(action[:, i].numpy(), cdf).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("cls", BOTH)
@STRAIGHT_AND_SOFT
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_one_expert_has_nothing_to_route(cls, straight_through, temperature):
    params = make_params(8, experts=1, requires_grad=True)
    dist = relaxed(params, cls, straight_through=straight_through, temperature=temperature)
    plain = cls(*params, routing="none")
    grads = []
    for one in (dist, plain):
        torch.manual_seed(3)
        action, log_prob = one.rsample_and_log_prob((5,))
        loss = (action.sin().sum(-1) + 0.1 * log_prob).sum()
        grads.append((action, log_prob, *torch.autograd.grad(loss, params, allow_unused=True)))
    assert not grads[0][2].any()
    torch.testing.assert_close((*grads[0][:2], *grads[0][3:]), (*grads[1][:2], *grads[1][3:]))


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
@STRAIGHT_AND_SOFT
def test_draws_keep_their_dtype_and_gradients_are_finite(cls, dtype, straight_through, device):
    params = make_params(64, experts=4, dtype=dtype, device=device, requires_grad=True)
    action, log_prob = relaxed(params, cls, straight_through=straight_through, temperature=0.1).rsample_and_log_prob()
    assert action.dtype == log_prob.dtype == dtype
    grads = torch.autograd.grad((action.sin().sum(-1) + 0.1 * log_prob).sum(), params)
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.parametrize("cls", BOTH)
def test_expand_keeps_temperature_and_form(cls):
    dist = relaxed(make_params(3), cls, temperature=0.3, straight_through=False, routing_coef=2.0).expand((5, 3))
    assert dist.routing is RoutingGradient.GUMBEL_SOFTMAX
    assert (dist.temperature, dist.straight_through, dist.routing_coef) == (0.3, False, 2.0)
    assert dist.rsample().shape == (5, 3, 2)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("routing", ["gumbel_softmax", "frequency"])
def test_a_temperature_that_makes_no_sense_is_refused_in_one_line(cls, temperature, routing):
    with pytest.raises(ValueError, match=f"^{cls.__name__}: temperature={temperature} must be finite and pos") as error:
        cls(*make_params(3), routing=routing, temperature=temperature)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cls", BOTH)
def test_a_soft_draw_is_no_experts_so_it_has_no_experts_density(cls):
    with pytest.raises(ValueError, match=f"^{cls.__name__}: score='expert' .*straight_through=False") as error:
        relaxed(make_params(3), cls, straight_through=False, score="expert")
    assert "\n" not in str(error.value)
    # where nothing is relaxed the option means nothing
    cls(*make_params(3), straight_through=False, score="expert")


# ---------------------------------------------------------------------- in a loss of TorchRL's own


@STRAIGHT_AND_SOFT
def test_the_unmodified_sac_loss_finds_the_expert_that_the_critics_prefer(straight_through):
    """Two fixed experts; the critic is the action itself, so the router has to learn the higher one."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(2))

        def forward(self, observation):
            experts = torch.tensor([0.8, -0.8, -2.0, -2.0])  # locs, log-stds
            return torch.cat((self.logits, experts)).expand(len(observation), -1)

    actor = PMOEActor(
        2,
        spec=Bounded(-1, 1, (1,)),
        network=Fixed(),
        distribution_kwargs={
            "routing": "gumbel_softmax", "temperature": 0.5, "straight_through": straight_through,
        },
    )  # fmt: skip
    critic = MLP(in_features=2, out_features=1, depth=0)
    loss = SACLoss(actor, ValueOperator(critic, in_keys=["observation", "action"]), alpha_init=1e-4, fixed_alpha=True)
    loss.make_value_estimator(gamma=0.9)
    with torch.no_grad():
        loss.qvalue_network_params["module", "0", "weight"].copy_(torch.tensor([0.0, 1.0]))
    router = actor[0].module[0].logits
    optimizer = torch.optim.Adam([router], lr=0.05)
    batch = TensorDict(observation=torch.zeros(64, 1), batch_size=64)
    for _ in range(100):
        optimizer.zero_grad()
        loss.actor_loss(batch.clone())[0].mean().backward()
        optimizer.step()
    assert router.softmax(-1)[0] > 0.95
