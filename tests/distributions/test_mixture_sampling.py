"""Draws against the density, the log-density that comes with a draw, proposals, entropy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributions.reference import (
    BOTH,
    expert_reference,
    make_params,
    normal_reference,
    tanh_reference,
)
from scipy import stats
from torch.autograd import gradcheck
from torchrl.modules import TanhNormal

from torchrl_pmoe import NormalMixture, TanhNormalMixture

# A sample of the right distribution is refused about once in a thousand seeds; the seed is fixed.
SIGNIFICANCE = 1e-3
DRAWS = ["sample", "rsample", "sample_and_log_prob", "rsample_and_log_prob"]


def _draw(dist, method, sample_shape):
    out = getattr(dist, method)(sample_shape)
    return (out[0] if isinstance(out, tuple) else out).detach()


def _seeded(function, *args, seed=7):
    torch.manual_seed(seed)
    return function(*args)


# ---------------------------------------------------------------------- draws have the density


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("method", DRAWS)
def test_every_dimension_of_a_draw_follows_the_mixtures_cdf(cls, method, device):
    params = make_params(2, experts=3, device=device)
    options = {"low": -1.0, "high": 3.0} if cls is TanhNormalMixture else {}
    action = _draw(cls(*params, **options), method, (4000,)).cpu()
    latent = ((action - 1) / 2).atanh() if options else action
    weights, loc, scale = params[0].softmax(-1).cpu().numpy(), params[1].cpu().numpy(), params[2].cpu().numpy()
    for b in range(2):
        for i in range(2):
            cdf = lambda u, b=b, i=i: stats.norm.cdf(u[:, None], loc[b, :, i], scale[b, :, i]) @ weights[b]
            assert stats.kstest(latent[:, b, i].numpy(), cdf).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("method", DRAWS)
def test_experts_are_drawn_as_often_as_their_weights_say(method):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -3.0], dtype=torch.float64)
    loc = torch.arange(5.0, dtype=torch.float64).unsqueeze(-1) * 10
    action = _draw(NormalMixture(logits, loc, torch.full_like(loc, 0.1)), method, (5000,))
    counts = np.bincount((action / 10).round().long().squeeze(-1).numpy(), minlength=5)
    assert stats.chisquare(counts, 5000 * logits.softmax(-1).numpy()).pvalue > SIGNIFICANCE


def test_dimensions_of_a_draw_come_from_the_same_expert():
    loc = torch.tensor([[-10.0, -10.0], [10.0, 10.0]])
    action = NormalMixture(torch.zeros(2), loc, torch.ones(2, 2)).sample((500,))
    assert (action[:, 0].sign() == action[:, 1].sign()).all()


def test_rows_of_a_batch_are_drawn_independently():
    loc = torch.tensor([[-10.0], [10.0]]).expand(4000, 2, 1)
    dist = NormalMixture(torch.zeros(4000, 2), loc, torch.ones_like(loc))
    expert = (dist.sample().squeeze(-1) > 0).numpy()
    table = np.array([[np.sum((expert[::2] == a) & (expert[1::2] == b)) for b in (0, 1)] for a in (0, 1)])
    assert stats.chi2_contingency(table).pvalue > SIGNIFICANCE


def test_an_expert_without_weight_is_never_drawn():
    logits = torch.tensor([0.0, -1e4, 0.0])
    dist = NormalMixture(logits, torch.tensor([[-10.0], [0.0], [10.0]]), torch.ones(3, 1))
    assert (dist.sample((2000,)).abs() > 4).all()


# ---------------------------------------------------------------------- the log-density that comes with a draw


@pytest.mark.parametrize("method", ["sample_and_log_prob", "rsample_and_log_prob"])
@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "none"])
def test_with_score_mixture_a_draw_comes_with_the_policys_density(method, routing):
    params = make_params(3)
    dist = TanhNormalMixture(*params, low=-2, high=0.5, routing=routing)
    action, log_prob = getattr(dist, method)((50,))
    torch.testing.assert_close(log_prob, tanh_reference(*params, -2, 0.5).log_prob(action), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["sample_and_log_prob", "rsample_and_log_prob"])
@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "none"])
def test_with_score_expert_a_draw_comes_with_the_drawn_experts_density(method, routing):
    logits, loc, scale = make_params(3)
    loc = loc / 10 + torch.tensor([-1.5, 0.0, 1.5], dtype=torch.float64)[:, None]  # which expert drew can be told
    dist = TanhNormalMixture(logits, loc, scale / 10, low=-2, high=0.5, score="expert", routing=routing)
    action, log_prob = getattr(dist, method)((50,))
    own = expert_reference(loc, scale / 10, -2, 0.5).log_prob(action.unsqueeze(-2))
    torch.testing.assert_close(log_prob, own.max(-1).values, rtol=1e-9, atol=1e-9)


def test_a_saturated_draw_is_scored_where_it_was_drawn():
    """In float32 tanh(20) is 1: the score must be that of the latent draw, not of the rounded action."""
    loc = torch.tensor([[[20.0], [-20.0]]])
    dist = TanhNormalMixture(torch.zeros(1, 2), loc, torch.full_like(loc, 0.1))
    _, log_prob = dist.rsample_and_log_prob((2000,))
    # -log|da/du| is about 2|u| - log 4 out there, so the mean is the Gaussian's entropy turned plus 2*20 - log 4
    expected = np.log(0.5) - stats.norm(scale=0.1).entropy() + 40 - np.log(4)
    assert abs(log_prob.mean().item() - expected) < 0.05


@pytest.mark.parametrize("score", ["mixture", "expert"])
def test_sample_and_log_prob_keeps_the_score_function_gradient(score):
    params = make_params(3, requires_grad=True)
    action, log_prob = NormalMixture(*params, score=score).sample_and_log_prob((4,))
    if score == "mixture":
        expected = normal_reference(*params).log_prob(action)
    else:  # the drawn expert is the only one whose density is the one returned
        own = expert_reference(*params[1:]).base_dist.log_prob(action.unsqueeze(-2))
        expected = own.take_along_dim((own - log_prob.unsqueeze(-1)).abs().argmin(-1, keepdim=True), -1).squeeze(-1)
    inputs = params if score == "mixture" else params[1:]
    assert not action.requires_grad
    torch.testing.assert_close(log_prob, expected)
    actual = torch.autograd.grad(log_prob.sum(), inputs)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), inputs))


# ---------------------------------------------------------------------- one draw of every expert


@pytest.mark.parametrize("cls", BOTH)
def test_every_expert_proposes_from_its_own_density_and_knows_it(cls, device):
    params = make_params(2, experts=3, device=device)
    action, log_prob = cls(*params).rsample_experts((3000,))
    latent = action.atanh() if cls is TanhNormalMixture else action
    standard = ((latent - params[1]) / params[2]).detach().cpu().numpy().reshape(3000, -1)
    assert min(stats.kstest(column, "norm").pvalue for column in standard.T) > SIGNIFICANCE / standard.shape[-1]
    reference = expert_reference(*params[1:])
    reference = reference if cls is TanhNormalMixture else reference.base_dist
    torch.testing.assert_close(log_prob, reference.log_prob(action), rtol=1e-7, atol=1e-7)


def test_experts_propose_independently():
    action, _ = NormalMixture(torch.zeros(3), torch.zeros(3, 2), torch.ones(3, 2)).rsample_experts((4000,))
    correlation = np.corrcoef(action.flatten(1).T.numpy()) - np.eye(6)
    assert np.abs(correlation).max() < 4 / np.sqrt(4000)


@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "none"])
@pytest.mark.parametrize("score", ["mixture", "expert"])
def test_proposals_never_route(routing, score):
    logits, loc, scale = make_params(3, requires_grad=True)
    action, log_prob = TanhNormalMixture(logits, loc, scale, routing=routing, score=score).rsample_experts()
    inputs = torch.autograd.grad((action.sin() + log_prob.unsqueeze(-1)).sum(), [logits, loc], allow_unused=True)
    assert inputs[0] is None
    assert inputs[1].abs().min() > 0


@pytest.mark.parametrize("cls", BOTH)
def test_proposals_have_gradients_of_finite_differences(cls):
    logits, loc, scale = make_params(2, requires_grad=True)
    propose = lambda loc, scale: _seeded(cls(logits.detach(), loc, scale).rsample_experts)
    assert gradcheck(propose, (loc, scale))


# ---------------------------------------------------------------------- pathwise gradients


def _loss_of_a_draw(dist):
    action, log_prob = dist.rsample_and_log_prob((4,))
    return (action - 0.3).square().sum() + 0.1 * log_prob.sum()


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("score", ["mixture", "expert"])
@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "none"])
def test_a_draw_moves_loc_and_scale_along_finite_differences(cls, score, routing):
    logits, loc, scale = make_params(3, requires_grad=True)
    dist = lambda loc, scale: cls(logits.detach(), loc, scale, score=score, routing=routing)
    assert gradcheck(lambda *x: _seeded(_loss_of_a_draw, dist(*x)), (loc, scale))


@pytest.mark.parametrize("cls", BOTH)
def test_rsample_moves_loc_and_scale_along_finite_differences(cls):
    logits, loc, scale = make_params(3, requires_grad=True)
    assert gradcheck(lambda *x: _seeded(cls(logits.detach(), *x).rsample, (4,)), (loc, scale))


@pytest.mark.parametrize("cls", BOTH)
def test_routing_leaves_the_gradient_of_loc_and_scale_alone(cls):
    grads = []
    for routing in ("frequency", "soft_frequency", "none"):
        params = make_params(3, requires_grad=True)
        loss = _seeded(_loss_of_a_draw, cls(*params, routing=routing))
        grads.append(torch.autograd.grad(loss, params[1:]))
    torch.testing.assert_close(grads[0], grads[2], rtol=0, atol=0)
    torch.testing.assert_close(grads[1], grads[2], rtol=0, atol=0)


def test_one_expert_draws_and_differentiates_as_torchrls_tanh_normal(monkeypatch):
    _, loc, scale = make_params(5, experts=1, requires_grad=True)
    ours = TanhNormalMixture(torch.zeros(5, 1, dtype=torch.float64), loc, scale, low=-2.0, high=0.5)
    theirs = TanhNormal(loc.squeeze(-2), scale.squeeze(-2), low=-2.0, high=0.5)
    noise = torch.randn(5, 2, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise.unsqueeze(-2))
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *_, **__: noise)
    results = []
    for dist in (ours, theirs):
        action, log_prob = dist.rsample_and_log_prob()
        grads = torch.autograd.grad((action.sin() + log_prob.unsqueeze(-1)).sum(), (loc, scale))
        results.append((action, log_prob, *grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------- entropy


def _entropy_by_quadrature(cls, logits, loc, scale):
    """Exact differential entropy in one dimension, differentiable in everything."""
    latent = torch.linspace(-8, 8, 4001, dtype=torch.float64).unsqueeze(-1)
    log_normal = normal_reference(logits, loc, scale).log_prob(latent)
    log_density = log_normal
    if cls is TanhNormalMixture:
        log_density = log_normal - (1 - latent.tanh().square()).log().squeeze(-1)
    return -(log_normal.exp() * log_density).sum() * (latent[1] - latent[0]).squeeze()


@pytest.mark.parametrize("cls", BOTH)
def test_entropy_and_its_gradients_are_unbiased(cls):
    params = make_params(experts=3, size=1, requires_grad=True)
    repeated = [x.detach().expand(20000, *x.shape).requires_grad_() for x in params]
    estimate = cls(*repeated).entropy()
    estimates = [estimate, *torch.autograd.grad(estimate.sum(), repeated)]
    exact = _entropy_by_quadrature(cls, *params)
    expected = [exact, *torch.autograd.grad(exact, params)]
    for draws, truth in zip(estimates, expected, strict=True):
        error, spread = draws.mean(0) - truth, draws.std(0) / np.sqrt(20000)
        assert (error.abs() < 4 * spread).all()
        assert (spread < 0.05).all()


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("score", ["mixture", "expert"])
@pytest.mark.parametrize("log_prob_routing", ["exact", "frequency"])
def test_entropy_has_gradients_of_finite_differences(cls, score, log_prob_routing):
    params = make_params(2, requires_grad=True)
    options = {"score": score, "log_prob_routing": log_prob_routing}
    assert gradcheck(lambda *x: _seeded(cls(*x, **options).entropy), params)
