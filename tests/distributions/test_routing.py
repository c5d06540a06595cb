"""The routing gradient against Definition 3.1, written out with an explicit softmax Jacobian."""

from __future__ import annotations

import math

import pytest
import torch
from distributions.reference import (
    BOTH,
    brier_gradient,
    expert_reference,
    make_params,
    one_hot_of_largest,
    tanh_reference,
)
from torch.distributions import Normal

from torchrl_pmoe import NormalMixture, RoutingGradient, TanhNormalMixture
from torchrl_pmoe.distributions.routing import (
    best_proposal,
    brier_loss,
    log_loss,
    route_by_slope,
    score_function_loss,
    soft_frequency,
)

HARD_AND_SOFT = ["frequency", "soft_frequency"]

# Anything a loss may do with the pair it is given; per row, so that every reduction can follow.
LOSSES = {
    "soft actor-critic": lambda a, lp: 0.1 * lp + (a - 0.3).square().sum(-1),
    "linear": lambda a, lp: 0.5 * lp - a[..., 0] + 2 * a[..., 1],
    "product of the two": lambda a, lp: (a.sum(-1).exp() + 3) * (lp + 50),
    "smallest of two critics": lambda a, lp: 0.2 * lp - torch.minimum(a.sin().sum(-1), (2 * a).cos().sum(-1)),
}


def _draw(dist, sample_shape=(), seed=3):
    """The pair handed to a loss, and every expert's proposal from the same noise."""
    torch.manual_seed(seed)
    proposals = dist.rsample_experts(sample_shape)[0].detach()
    torch.manual_seed(seed)
    return *dist.rsample_and_log_prob(sample_shape), proposals


def _slopes(loss, action, log_prob):
    """``g`` and ``h``: slopes of the total loss with respect to its two arguments, each a leaf."""
    action, log_prob = action.detach().requires_grad_(), log_prob.detach().requires_grad_()
    return torch.autograd.grad(loss(action, log_prob).sum(), (action, log_prob))


def _score(g, action, proposals):
    return -torch.einsum("...a,...ka->...k", g, proposals - action.detach().unsqueeze(-2))


def _expected_frequency(routing, params, g, h, action, proposals, **bounds):
    """``v`` of The gradient-scored forms."""
    score = _score(g, action, proposals)
    if routing == "frequency":
        return one_hot_of_largest(score)
    policy = tanh_reference(*(x.detach().unsqueeze(-2 - i) for i, x in zip((0, 1, 1), params, strict=True)), **bounds)
    unnormalised = params[0].detach().softmax(-1).log() + score / h.unsqueeze(-1) - policy.log_prob(proposals)
    return unnormalised.exp() / unnormalised.exp().sum(-1, keepdim=True)


def _logits_grad(loss, params):
    return torch.autograd.grad(loss, params[0], retain_graph=True, allow_unused=True)[0]


# ---------------------------------------------------------------------- gradient-scored: the formula


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("score", ["mixture", "expert"])
@pytest.mark.parametrize("routing", HARD_AND_SOFT)
def test_the_router_gets_the_gradient_of_definition_3_1(routing, score, loss, device):
    params = make_params(64, experts=4, requires_grad=True, device=device)
    dist = TanhNormalMixture(*params, -2.0, 1.0, routing=routing, score=score)
    action, log_prob, proposals = _draw(dist)
    g, h = _slopes(loss, action, log_prob)
    v = _expected_frequency(routing, params, g, h, action, proposals, low=-2.0, high=1.0)
    actual = _logits_grad(loss(action, log_prob).sum(), params)
    torch.testing.assert_close(actual, brier_gradient(params[0], v), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("routing", HARD_AND_SOFT)
def test_a_loss_of_one_dimension_alone_routes(routing):
    params = make_params(16, requires_grad=True)
    action, log_prob, proposals = _draw(TanhNormalMixture(*params, routing=routing))
    loss = lambda a, lp: a[..., 1].exp() + 0.1 * lp
    g, h = _slopes(loss, action, log_prob)
    v = _expected_frequency(routing, params, g, h, action, proposals)
    actual = _logits_grad(loss(action, log_prob).mean(), params)
    torch.testing.assert_close(actual, brier_gradient(params[0], v), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("routing", HARD_AND_SOFT)
@pytest.mark.parametrize("coef", [1.0, 2.0])
@pytest.mark.parametrize(("batch", "sample_shape"), [((), ()), ((2, 3), ()), ((3,), (5,)), ((), (5,))])
def test_the_gradient_is_a_mean_over_samples_and_batch_times_the_coefficient(routing, coef, batch, sample_shape):
    params = make_params(*batch, experts=4, requires_grad=True)
    dist = TanhNormalMixture(*params, routing=routing, routing_coef=coef)
    action, log_prob, proposals = _draw(dist, sample_shape)
    loss = LOSSES["soft actor-critic"]
    g, h = _slopes(loss, action, log_prob)
    v = _expected_frequency(routing, params, g, h, action, proposals)
    logits = params[0].detach().expand(*sample_shape, *batch, 4)
    expected = brier_gradient(logits, v, coef).sum_to_size(params[0].shape)
    torch.testing.assert_close(_logits_grad(loss(action, log_prob).mean(), params), expected, rtol=1e-6, atol=1e-12)


def test_rsample_routes_by_its_slope_as_well():
    params = make_params(20, requires_grad=True)
    dist = TanhNormalMixture(*params)
    _, _, proposals = _draw(dist)
    torch.manual_seed(3)
    action = dist.rsample()
    g, _ = _slopes(lambda a, lp: a.exp().sum() + 0 * lp, action, action.sum(-1))
    expected = brier_gradient(params[0], one_hot_of_largest(_score(g, action, proposals)))
    torch.testing.assert_close(_logits_grad(action.exp().sum(), params), expected)


def test_soft_routing_needs_a_log_density_so_rsample_does_not_route():
    params = make_params(20, requires_grad=True)
    assert _logits_grad(TanhNormalMixture(*params, routing="soft_frequency").rsample().sum(), params) is None


def test_the_routers_fixed_point_is_the_frequency_of_being_best():
    """For a linear loss the slope ranks exactly: f = P(a_2 > a_1), and the gradient is that of |w - f|^2 / K."""
    gap, rows = 0.5, 40_000
    frequency = Normal(0.0, math.sqrt(2.0)).cdf(torch.tensor(gap)).double()
    f = torch.stack((1 - frequency, frequency))
    for w in (f, torch.tensor([0.5, 0.5]).double(), torch.tensor([0.1, 0.9]).double()):
        logits = w.log().expand(rows, 2).clone().requires_grad_()
        loc = torch.tensor([[0.0], [gap]], dtype=torch.float64).expand(rows, 2, 1)
        action, _ = NormalMixture(logits, loc, torch.ones_like(loc)).rsample_and_log_prob()
        rowwise = torch.autograd.grad(-action.sum(), logits)[0] * rows
        error = rowwise.mean(0) - brier_gradient(w.log(), f)
        assert (error.abs() < 4 * rowwise.std(0) / math.sqrt(rows)).all()


# ---------------------------------------------------------------------- how the loss is reduced does not matter


@pytest.mark.parametrize("routing", HARD_AND_SOFT)
def test_reductions_and_weights_of_the_loss_leave_the_routing_gradient_alone(routing):
    params = make_params(32, experts=4, requires_grad=True)
    action, log_prob, _ = _draw(TanhNormalMixture(*params, routing=routing))
    rows = LOSSES["soft actor-critic"](action, log_prob)
    expected = _logits_grad(rows.mean(), params)
    weights = torch.rand(32, dtype=torch.float64) + 0.01
    reductions = [rows.sum(), (weights * rows).mean(), 1e-6 * rows.mean(), 1e6 * rows.sum()]
    for loss in reductions:
        torch.testing.assert_close(_logits_grad(loss, params), expected, rtol=1e-9, atol=0)
    actual = torch.autograd.grad(rows, params[0], grad_outputs=weights)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    assert expected.abs().min() > 0


@pytest.mark.parametrize("routing", HARD_AND_SOFT)
def test_masked_rows_get_no_gradient_and_leave_the_others_alone(routing):
    params = make_params(32, experts=4, requires_grad=True)
    action, log_prob, _ = _draw(TanhNormalMixture(*params, routing=routing))
    rows = LOSSES["soft actor-critic"](action, log_prob)
    mask = torch.arange(32) % 3 > 0
    everywhere = _logits_grad(rows.mean(), params)
    for loss in ((rows * mask).mean(), rows[mask].mean(), torch.where(mask, rows, 0.0).sum()):
        actual = _logits_grad(loss, params)
        assert (actual[~mask] == 0).all()
        torch.testing.assert_close(actual[mask], everywhere[mask], rtol=1e-9, atol=0)


# ---------------------------------------------------------------------- where there is no routing gradient


@pytest.mark.parametrize("routing", HARD_AND_SOFT)
@pytest.mark.parametrize("score", ["mixture", "expert"])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_flows_through_the_log_density_never_routes(routing, score, sign):
    params = make_params(8, requires_grad=True)
    _, log_prob, _ = _draw(TanhNormalMixture(*params, routing=routing, score=score))
    logits, loc, scale = torch.autograd.grad(sign * log_prob.mean(), params)
    assert (logits == 0).all()
    assert (loc != 0).any(-1).any(-1).all()
    assert (scale != 0).any(-1).any(-1).all()


def test_the_hard_form_does_not_see_the_log_density_beside_an_action():
    params = make_params(64, experts=4, requires_grad=True)
    action, log_prob, _ = _draw(TanhNormalMixture(*params))
    alone = _logits_grad(action.sin().sum(), params)
    for weight in (1e3, -1e3):
        beside = _logits_grad(action.sin().sum() + weight * log_prob.sum(), params)
        torch.testing.assert_close(beside, alone, rtol=0, atol=0)


@pytest.mark.parametrize("weight", [0.0, -0.1])
def test_the_soft_form_is_silent_where_the_loss_does_not_want_entropy(weight):
    params = make_params(8, requires_grad=True)
    action, log_prob, _ = _draw(TanhNormalMixture(*params, routing="soft_frequency"))
    assert (_logits_grad((action.sin().sum(-1) + weight * log_prob).mean(), params) == 0).all()


def test_the_soft_form_is_silent_row_by_row():
    params = make_params(8, requires_grad=True)
    action, log_prob, _ = _draw(TanhNormalMixture(*params, routing="soft_frequency"))
    weight = torch.tensor([0.1, -0.1, 0.0, 0.1, 0.2, -1.0, 0.3, 0.1], dtype=torch.float64)
    grad = _logits_grad((action.sin().sum(-1) + weight * log_prob).mean(), params)
    assert ((grad != 0).any(-1) == (weight > 0)).all()


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_routing_none_leaves_the_router_alone(cls, loss):
    params = make_params(8, requires_grad=True)
    action, log_prob = cls(*params, routing="none").rsample_and_log_prob()
    logits, loc = torch.autograd.grad(loss(action, log_prob).mean(), params[:2], allow_unused=True)
    assert logits is None or (logits == 0).all()
    assert loc.abs().max() > 0


@pytest.mark.parametrize("routing", HARD_AND_SOFT)
def test_samples_without_gradient_do_not_route(routing):
    params = make_params(8, requires_grad=True)
    dist = TanhNormalMixture(*params, routing=routing)
    assert not dist.sample().requires_grad
    assert not dist.sample_and_log_prob()[0].requires_grad
    with torch.no_grad():
        assert not any(x.requires_grad for x in (dist.rsample(), *dist.rsample_and_log_prob()))


def test_one_expert_has_nothing_to_route():
    params = make_params(8, experts=1, requires_grad=True)
    action, log_prob = TanhNormalMixture(*params).rsample_and_log_prob()
    assert (_logits_grad((action.sum(-1) + log_prob).sum(), params) == 0).all()


# ---------------------------------------------------------------------- the frequency form of log_prob


@pytest.mark.parametrize("method", ["log_prob", "sample_and_log_prob"])
@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
def test_frequency_form_of_log_prob(method, batch, device):
    params = make_params(*batch, experts=4, requires_grad=True, device=device)
    dist = TanhNormalMixture(*params, log_prob_routing="frequency")
    value = dist.sample((5,))
    if method == "log_prob":
        log_prob = dist.log_prob(value)
    else:
        value, log_prob = dist.sample_and_log_prob((5,))
    upstream = torch.randn(5, *batch, dtype=torch.float64, device=device)
    w = params[0].detach().softmax(-1)
    joint = w * expert_reference(*(x.detach() for x in params[1:])).log_prob(value.unsqueeze(-2)).exp()
    r = joint / joint.sum(-1, keepdim=True)
    raises_the_density = (upstream < 0).unsqueeze(-1)
    target = torch.where(raises_the_density, one_hot_of_largest(r), r)
    expected = (upstream.unsqueeze(-1) * (target - w)).sum(0)
    actual = torch.autograd.grad(log_prob, params, upstream)
    torch.testing.assert_close(actual[0], expected, rtol=1e-6, atol=1e-9)
    exact = tanh_reference(*params).log_prob(value)
    torch.testing.assert_close(actual[1:], torch.autograd.grad(exact, params[1:], upstream), rtol=1e-6, atol=1e-9)


def test_frequency_and_exact_forms_are_the_same_number():
    params = make_params(6)
    value = torch.rand(6, 2, dtype=torch.float64)
    forms = [TanhNormalMixture(*params, log_prob_routing=form).log_prob(value) for form in ("exact", "frequency")]
    torch.testing.assert_close(*forms, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- the parts


def test_best_proposal_is_the_first_of_the_largest():
    score = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0], [-1.0, -2.0, -0.5]])
    expected = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(best_proposal(score), expected)


def test_brier_loss_has_the_gradient_of_definition_3_1():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    v = one_hot_of_largest(torch.randn(5, 3, dtype=torch.float64)).requires_grad_()
    loss = brier_loss(logits.softmax(-1), v)
    torch.testing.assert_close(loss, (logits.softmax(-1) - v).square().sum(-1) / 3)
    grads = torch.autograd.grad(loss.mean(), (logits, v), allow_unused=True)
    torch.testing.assert_close(grads[0], brier_gradient(logits, v.detach()))
    assert grads[1] is None


def test_log_loss_has_gradient_w_minus_v():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    v = torch.rand(5, 3, dtype=torch.float64).softmax(-1)
    grad = torch.autograd.grad(log_loss(logits, v).sum(), logits)[0]
    torch.testing.assert_close(grad, logits.detach().softmax(-1) - v)


def test_soft_frequency_is_the_softmax_that_maximises_the_soft_value():
    """``v`` solves max_v sum_k v_k (x_k + log w_k) + H(v): no neighbour on the simplex does better."""
    exponent, logits = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    for prior in (None, logits):
        log_prior = torch.zeros_like(exponent) if prior is None else prior.log_softmax(-1)
        value = lambda v, log_prior=log_prior: (v * (exponent + log_prior - v.log())).sum(-1)
        v = soft_frequency(exponent, prior)
        for direction in torch.randn(50, 5, 4, dtype=torch.float64):
            step = direction - direction.mean(-1, keepdim=True)
            assert (value((v + 1e-3 * v.min() * step).clamp_min(1e-12)) < value(v)).all()


def test_soft_frequency_becomes_the_best_proposal_as_the_temperature_falls():
    score, logits = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    torch.testing.assert_close(soft_frequency(score / 1e-6, logits), best_proposal(score))


def _enumerated(logits, cost):
    """Gradient of the score-function loss for every index that may be drawn, ``[K, *B, K]``, and its probability."""
    experts = logits.shape[-1]
    gradients = []
    for z in range(experts):
        loss = score_function_loss(logits, cost, torch.full(cost.shape[:-1], z))
        gradients.append(torch.autograd.grad(loss.sum(), logits)[0])
    return torch.stack(gradients), logits.detach().softmax(-1).movedim(-1, 0).unsqueeze(-1)


def test_the_score_functions_mean_over_the_drawn_expert_is_the_marginals_gradient():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    cost = torch.randn(6, 4, dtype=torch.float64)
    gradients, w = _enumerated(logits, cost)
    expected = torch.autograd.grad((logits.softmax(-1) * cost).sum(), logits)[0]
    torch.testing.assert_close((w * gradients).sum(0), expected)


def test_the_score_function_reads_each_draw_of_its_own_cost():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    cost, index = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(4, (3, 6))
    loss = score_function_loss(logits, cost, index)
    w = logits.detach().softmax(-1)
    for m in range(3):
        for b in range(6):
            z = index[m, b]
            expected = w[b, z].log() * (cost[m, b, z] - w[b] @ cost[m, b])
            torch.testing.assert_close(loss[m, b], expected)


def test_the_baseline_takes_out_what_all_experts_have_in_common_and_lowers_the_variance():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    cost = torch.randn(6, 4, dtype=torch.float64)
    gradients, w = _enumerated(logits, cost)
    torch.testing.assert_close(_enumerated(logits, cost + 1e3)[0], gradients)
    mean = (w * gradients).sum(0)
    score = torch.eye(4, dtype=torch.float64).unsqueeze(1) - logits.detach().softmax(-1)  # of z, in the logits
    for common in (3.0, 1e3):
        plain = score * (cost + common).movedim(-1, 0).unsqueeze(-1)
        torch.testing.assert_close((w * plain).sum(0), mean)
        variance, without = ((w * (x - mean).square()).sum((0, -1)) for x in (gradients, plain))
        assert (variance < 0.5 * without).all()


def test_the_score_function_trains_the_logits_alone():
    logits = torch.randn(6, 4, requires_grad=True)
    cost = torch.randn(6, 4, requires_grad=True)
    loss = score_function_loss(logits, cost, torch.randint(4, (6,)))
    found = torch.autograd.grad(loss.sum(), (logits, cost), allow_unused=True)
    assert found[0].any()
    assert found[1] is None


@pytest.mark.parametrize("soft", [False, True])
def test_route_by_slope_hands_everything_else_through(soft):
    action, log_prob = torch.randn(4, 2, requires_grad=True), torch.randn(4, requires_grad=True)
    logits, proposals = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True)
    density = torch.randn(4, 3, requires_grad=True) if soft else None
    out = route_by_slope(action, log_prob, logits, proposals, coef=1.0, density=density)
    torch.testing.assert_close(out, (action, log_prob), rtol=0, atol=0)
    leaves = (action, log_prob, proposals, density) if soft else (action, log_prob, proposals)
    slopes = (torch.randn(4, 2), torch.rand(4))
    grads = torch.autograd.grad(out, leaves, slopes, allow_unused=True)
    torch.testing.assert_close(grads[:2], slopes, rtol=0, atol=0)
    assert all(grad is None for grad in grads[2:])


# ---------------------------------------------------------------------- names


def test_members_are_the_documented_ones():
    names = ["FREQUENCY", "SOFT_FREQUENCY", "GUMBEL_SOFTMAX", "SCORE_FUNCTION", "MARGINAL", "NONE"]
    assert [member.name for member in RoutingGradient] == names
    assert all(RoutingGradient(name.lower()) is RoutingGradient[name] for name in names)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("routing", [RoutingGradient.SOFT_FREQUENCY, "soft_frequency", "SOFT_FREQUENCY"])
def test_routing_is_a_member_or_its_name(cls, routing):
    assert cls(*make_params(3), routing=routing).routing is RoutingGradient.SOFT_FREQUENCY


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "gumbel_softmax", "none"])
def test_every_routing_that_lives_here_is_taken(cls, routing):
    member = RoutingGradient(routing)
    assert all(cls(*make_params(3), routing=given).routing is member for given in (routing, member))


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("routing", ["score_function", "marginal", "foo", RoutingGradient.SCORE_FUNCTION, None, 3])
def test_a_routing_that_does_not_live_here_is_refused(cls, routing):
    with pytest.raises(ValueError, match=r"routing=.*allowed: frequency, soft_frequency, gumbel_softmax, none\.$"):
        cls(*make_params(3), routing=routing)
