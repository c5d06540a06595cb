"""Mixtures of any shape, dtype, width and box."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from distributions.reference import brier_gradient
from hypothesis import assume, given
from hypothesis import strategies as st
from properties.reference import as_double, assert_within, box_of, computes_in, density, latent_density
from properties.strategies import DTYPES, EXACT, numbers, recipes, shapes
from torch.autograd import gradcheck
from torchrl.modules import TanhNormal

from torchrl_pmoe.distributions.routing import gumbel_softmax

LEARNED = ("frequency", "soft_frequency")
DRAWS = ("sample", "rsample", "sample_and_log_prob", "rsample_and_log_prob")
sample_shapes = shapes(2)


def draw(recipe, method, sample_shape=(), *, dist=None, **options):
    """The outputs of a method, on the recipe's random numbers."""
    dist = recipe.dist(**options) if dist is None else dist
    recipe.reseed()
    return getattr(dist, method)(sample_shape)


def latents(recipe, params, sample_shape=()):
    """The latent draws ``[*S, *B, K, A]`` that the recipe's random numbers are."""
    recipe.reseed()
    _, loc, scale = params
    return (loc + scale * torch.randn(*sample_shape, *loc.shape, dtype=loc.dtype)).detach()


def slopes(recipe, action, log_prob):
    """Upstream gradients of both signs, some rows without any."""
    rng = torch.Generator().manual_seed(recipe.seed + 1)
    g, h = (torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in (action, log_prob))
    silent = torch.rand(log_prob.shape, generator=rng) < 0.2
    return g.masked_fill(silent.unsqueeze(-1), 0.0).to(action.dtype), h.to(action.dtype)


# ---------------------------------------------------------------------- the density


@given(recipes())
def test_density_is_the_float64_mixture_for_any_shape(recipe):
    dist = recipe.dist()
    value = recipe.points(dist)
    expected = density(dist, value)
    assert_within(dist.log_prob(value), expected.mixture, expected.mixture_error)
    assert_within(dist.expert_log_prob(value), expected.expert, expected.expert_error)


@given(recipes())
def test_density_and_its_gradient_are_finite_on_draws_on_the_bounds_and_beyond(recipe):
    params = recipe.params(requires_grad=True)
    dist = recipe.dist(params)
    value = recipe.points(dist).requires_grad_()
    log_prob = dist.log_prob(value)
    assert log_prob.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(log_prob.float().sum(), (*params, value)))


@given(recipes(), st.randoms(use_true_random=False))
def test_density_does_not_depend_on_the_order_of_the_experts(recipe, random):
    order = random.sample(range(recipe.experts), recipe.experts)
    logits, loc, scale = recipe.params()
    dist, other = recipe.dist(), recipe.dist((logits[..., order], loc[..., order, :], scale[..., order, :]))
    value = recipe.points(dist)
    eps = torch.finfo(recipe.dtype).eps
    close = {"rtol": 8 * eps, "atol": 8 * eps}
    torch.testing.assert_close(other.log_prob(value), dist.log_prob(value), **close)
    torch.testing.assert_close(other.expert_log_prob(value), dist.expert_log_prob(value)[..., order], **close)
    torch.testing.assert_close(other.responsibilities(value), dist.responsibilities(value)[..., order], **close)


@given(recipes(), st.integers(-32, 32))
def test_density_does_not_depend_on_a_constant_in_the_logits(recipe, constant):
    recipe = dataclasses.replace(recipe, buried=False)
    logits, loc, scale = recipe.params()
    logits = logits.round().clamp(-32, 32)  # then the sum is exact in every dtype
    dist, other = (recipe.dist((x, loc, scale)) for x in (logits, logits + constant))
    value = recipe.points(dist)
    eps, last = torch.finfo(computes_in(recipe.dtype)).eps, torch.finfo(recipe.dtype).eps
    torch.testing.assert_close(other.log_prob(value), dist.log_prob(value), rtol=2 * last, atol=256 * eps)
    torch.testing.assert_close(other.probs, dist.probs, rtol=2 * last + 256 * eps, atol=0)


@given(recipes(dtypes=EXACT, batch=shapes(smallest=1), bounded=True, mild=True))
def test_copies_of_one_expert_are_that_tanh_normal(recipe):
    logits, loc, scale = recipe.params()
    copies = recipe.dist((logits, loc[..., :1, :].expand_as(loc), scale[..., :1, :].expand_as(scale)))
    low, high = (torch.as_tensor(x, dtype=torch.float64).expand(recipe.size) for x in (copies.low, copies.high))
    alone = TanhNormal(loc[..., 0, :], scale[..., 0, :], low=low, high=high)
    recipe.reseed()
    value = low + (high - low) * (0.05 + 0.9 * torch.rand(4, *recipe.batch, recipe.size, dtype=torch.float64))
    torch.testing.assert_close(copies.log_prob(value), alone.log_prob(value), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(copies.responsibilities(value), copies.probs.expand(4, *logits.shape))


@given(recipes())
def test_responsibilities_are_probabilities(recipe):
    dist = recipe.dist()
    found = dist.responsibilities(recipe.points(dist)).double()
    assert (found >= 0).all()
    assert ((found.sum(-1) - 1).abs() <= recipe.experts * torch.finfo(recipe.dtype).eps).all()


@given(recipes(dtypes=EXACT, batch=shapes(smallest=1), mild=True), st.sampled_from([1, 25]))
def test_the_exact_gradient_on_the_logits_is_responsibility_less_weight(recipe, spread):
    recipe = dataclasses.replace(recipe, spread=spread * recipe.spread)
    params = recipe.params(requires_grad=True)
    dist = recipe.dist(params)
    value = draw(recipe, "sample", (3,), dist=dist)
    joint = density(dist, value).expert + as_double(dist)[0].log_softmax(-1)
    torch.testing.assert_close(dist.responsibilities(value), joint.softmax(-1), rtol=1e-6, atol=1e-8)
    (found,) = torch.autograd.grad(dist.log_prob(value).sum(), params[0])
    expected = (joint.softmax(-1) - params[0].detach().softmax(-1)).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@given(recipes(dtypes=EXACT, batch=shapes(smallest=1), mild=True), st.booleans())
def test_the_frequency_form_replaces_responsibilities_where_the_density_is_to_rise(recipe, stored):
    """And only there; loc and scale keep the exact gradient."""
    params = recipe.params(requires_grad=True)
    frequency, exact = (recipe.dist(params, log_prob_routing=form) for form in ("frequency", "exact"))
    if stored:
        value = draw(recipe, "sample", (3,))
        densities = [dist.log_prob(value) for dist in (frequency, exact)]
    else:
        pairs = [draw(recipe, "sample_and_log_prob", (3,), dist=dist) for dist in (frequency, exact)]
        value, densities = pairs[0][0], [pair[1] for pair in pairs]
    _, upstream = slopes(recipe, value, densities[0])
    torch.testing.assert_close(densities[0], densities[1])
    found, reference = (torch.autograd.grad(x, params, upstream) for x in densities)
    h, r = upstream.unsqueeze(-1), frequency.responsibilities(value).detach()
    best = torch.nn.functional.one_hot(r.argmax(-1), recipe.experts).double()
    expected = (h * (torch.where(h < 0, best, r) - frequency.probs.detach())).sum(0)
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[1:], reference[1:])


@given(recipes(dtypes=EXACT, batch=shapes(1, smallest=1), mild=True))
def test_gradients_of_the_density_are_finite_differences(recipe):
    params = recipe.params(requires_grad=True)
    dist = recipe.dist()
    value = draw(recipe, "sample", dist=dist)
    if recipe.box is None:
        assert gradcheck(lambda *x: recipe.dist(x[:3]).log_prob(x[3]), (*params, value.requires_grad_()))
        return
    # in units of the box, where a step of finite differences is small
    middle, half = box_of(dist)
    unit = (0.99 * (value - middle) / half).detach().requires_grad_()
    assert gradcheck(lambda *x: recipe.dist(x[:3]).log_prob(middle + half * x[3]), (*params, unit))


# ---------------------------------------------------------------------- draws


@given(recipes(), sample_shapes)
def test_every_method_has_the_shape_it_promises(recipe, sample_shape):
    dist = recipe.dist()
    drawn, size = (*sample_shape, *recipe.batch), (*sample_shape, *recipe.batch, recipe.size)
    per_expert = (*drawn, recipe.experts)
    assert (dist.batch_shape, dist.event_shape) == (recipe.batch, (recipe.size,))
    pairs = [draw(recipe, method, sample_shape) for method in DRAWS[2:]]
    value = draw(recipe, "sample", sample_shape)
    actions = [value, draw(recipe, "rsample", sample_shape), *(action for action, _ in pairs)]
    assert {tuple(x.shape) for x in actions} == {size}
    assert {tuple(x.shape) for x in (dist.log_prob(value), *(log_prob for _, log_prob in pairs))} == {drawn}
    proposals, log_prob = dist.rsample_experts(sample_shape)
    assert (proposals.shape, log_prob.shape) == ((*per_expert, recipe.size), per_expert)
    assert dist.expert_log_prob(value).shape == dist.responsibilities(value).shape == per_expert
    assert dist.mode.shape == dist.deterministic_sample.shape == dist.mean.shape == (*recipe.batch, recipe.size)
    assert dist.expert_mode.shape == (*recipe.batch, recipe.experts, recipe.size)
    assert dist.probs.shape == (*recipe.batch, recipe.experts)
    assert dist.entropy().shape == recipe.batch


@given(recipes(batch=st.just((20,)), bounded=True, mild=False))
def test_no_action_leaves_the_box(recipe):
    dist = recipe.dist()
    low, high = (torch.as_tensor(x, dtype=recipe.dtype) for x in (dist.low, dist.high))
    proposals, _ = draw(recipe, "rsample_experts", (3,))
    for action in (dist.sample((3,)), proposals, dist.mode, dist.expert_mode, dist.mean):
        assert (action >= low).all()
        assert (action <= high).all()
        assert action.dtype == recipe.dtype


@given(recipes(), sample_shapes, st.sampled_from([*LEARNED, "none"]), st.sampled_from(["mixture", "expert"]))
def test_every_way_to_draw_takes_one_of_the_same_proposals(recipe, sample_shape, routing, score):
    dist = recipe.dist(routing=routing, score=score)
    proposals, own = draw(recipe, "rsample_experts", sample_shape, dist=dist)
    index = dist.sample_expert(sample_shape).unsqueeze(-1)  # the numbers that come next
    expected = proposals.take_along_dim(index.unsqueeze(-1), -2).squeeze(-2)
    found = [draw(recipe, method, sample_shape, dist=dist) for method in DRAWS]
    pairs = found[2:]
    assert all(torch.equal(action, expected) for action in (*found[:2], *(action for action, _ in pairs)))
    if score == "expert":
        eps, last = torch.finfo(computes_in(recipe.dtype)).eps, torch.finfo(recipe.dtype).eps
        close = {"rtol": 4 * last, "atol": 64 * eps}
        torch.testing.assert_close(pairs[1][1], own.take_along_dim(index, -1).squeeze(-1), **close)


@given(recipes(batch=shapes(2)), sample_shapes, st.sampled_from(DRAWS))
def test_drawing_a_sample_shape_is_drawing_once_from_the_expanded_mixture(recipe, sample_shape, method):
    dist = recipe.dist()
    expanded = dist.expand((*sample_shape, *recipe.batch))
    found, expected = draw(recipe, method, dist=expanded), draw(recipe, method, sample_shape, dist=dist)
    for ours, theirs in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
        assert torch.equal(ours, theirs)
    value = expected[0] if isinstance(expected, tuple) else expected
    assert torch.equal(expanded.log_prob(value), dist.log_prob(value))


@given(
    recipes(dtypes=(torch.float32, torch.float64), mild=True),
    st.sampled_from(DRAWS[2:]),
    st.sampled_from([*LEARNED, "none"]),
)
def test_the_density_beside_a_draw_is_that_of_the_action(recipe, method, routing):
    dist = recipe.dist(routing=routing)
    action, log_prob = draw(recipe, method, (4,), dist=dist)
    expected = density(dist, action)
    kept = expected.resolved
    assert_within(log_prob[kept], expected.mixture[kept], 2 * expected.mixture_error[kept])


@given(recipes(dtypes=EXACT, batch=shapes(smallest=1), mild=True), sample_shapes.filter(lambda x: 0 not in x))
def test_the_density_beside_a_draw_is_that_of_its_latent_value(recipe, sample_shape):
    """Where the action itself could no longer tell: the mixture's, or with ``score="expert"`` the drawn expert's."""
    recipe = dataclasses.replace(recipe, locs=30.0)
    params = recipe.params()
    latent = latents(recipe, params, sample_shape)
    index = recipe.dist().sample_expert(sample_shape).unsqueeze(-1)
    chosen = latent.take_along_dim(index.unsqueeze(-1), -2).squeeze(-2)
    mixture, experts = latent_density(recipe.dist(), chosen)
    for score, expected in (("mixture", mixture), ("expert", experts.take_along_dim(index, -1).squeeze(-1))):
        for method in DRAWS[2:]:
            log_prob = draw(recipe, method, sample_shape, score=score)[1]
            torch.testing.assert_close(log_prob, expected, rtol=1e-7, atol=1e-7)


@given(recipes(dtypes=EXACT, batch=shapes(smallest=1), mild=True))
def test_entropy_is_the_weighted_surprise_of_one_draw_of_every_expert(recipe):
    """Its value, and its gradient with the draws' own."""
    params = recipe.params(requires_grad=True)
    dist = recipe.dist(params)
    recipe.reseed()
    found = dist.entropy()
    recipe.reseed()
    logits, loc, scale = params
    latent = loc + scale * torch.randn_like(loc)
    normal = torch.distributions.Normal(loc.unsqueeze(-3), scale.unsqueeze(-3))
    log_slope = 0.0
    if recipe.box is not None:
        log_slope = (box_of(dist)[1].log() - 2 * latent.cosh().log()).sum(-1)
    joint = logits.log_softmax(-1).unsqueeze(-2) + normal.log_prob(latent.unsqueeze(-2)).sum(-1)
    expected = -(logits.softmax(-1) * (joint.logsumexp(-1) - log_slope)).sum(-1)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), params) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------- point summaries


@given(recipes(batch=shapes(smallest=1)))
def test_the_mode_is_the_squashed_loc_of_the_likeliest_expert(recipe):
    dist = recipe.dist()
    logits, loc, _ = as_double(dist)
    rows = zip(logits.reshape(-1, recipe.experts), loc.reshape(-1, recipe.experts, recipe.size), strict=True)
    likeliest = [row_loc[row.tolist().index(row.max())] for row, row_loc in rows]  # the first of equals
    expected, tolerance = torch.stack(likeliest).reshape(*recipe.batch, recipe.size), 0.0
    if recipe.box is not None:
        middle, half = box_of(dist)
        expected = middle + half * expected.tanh()
        tolerance = 4 * torch.finfo(recipe.dtype).eps * (half + middle.abs())
    for found in (dist.mode, dist.deterministic_sample):
        assert_within(found, expected, tolerance + torch.zeros_like(expected))


@given(
    recipes(dtypes=EXACT, batch=st.just((20,)), bounded=True, mild=True),
    st.sampled_from([(2.0, 2e-5), (7.0, 2e-2)]),
    st.floats(0, 10),
    st.just(1.0) | st.floats(1e-3, 1),
)
def test_the_mean_is_as_close_to_the_integral_as_documented(recipe, claim, stretch, share):
    largest, error = claim
    logits, loc, scale = recipe.params()
    loc, scale = stretch * loc, torch.full_like(scale, share * largest)
    dist = recipe.dist((logits, loc, scale))
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    weight = (-z.square() / 2).exp()
    tanh_mean = ((loc.unsqueeze(-1) + scale.unsqueeze(-1) * z).tanh() * weight).sum(-1) / weight.sum()
    middle, half = box_of(dist)
    expected = middle + half * torch.einsum("...k,...ka->...a", logits.softmax(-1), tanh_mean)
    assert_within(dist.mean, expected, (error * half).expand_as(expected) + 1e-12 * middle.abs())


# ---------------------------------------------------------------------- the routing gradient


def routed(recipe, routing, sample_shape=(), scale=1.0, **options):
    """Gradients of logits, loc and scale under the recipe's upstream gradients, ``None`` where there is none."""
    params = recipe.params(requires_grad=True)
    dist = recipe.dist(params, routing=routing, **options)
    action, log_prob = draw(recipe, "rsample_and_log_prob", sample_shape, dist=dist)
    g, h = slopes(recipe, action, log_prob)
    return torch.autograd.grad((action, log_prob), params, (scale * g, scale * h), allow_unused=True)


learned = st.sampled_from(LEARNED)


@given(
    recipes(dtypes=EXACT, batch=shapes(2), mild=True),
    shapes(1, smallest=1),
    learned,
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from(["mixture", "expert"]),
)
def test_the_router_gets_definition_3_1_from_the_slopes_that_come_back(recipe, sample_shape, routing, coef, score):
    params = recipe.params()
    dist = recipe.dist(score=score)
    found, *_ = routed(recipe, routing, sample_shape, routing_coef=coef, score=score)
    if 0 in recipe.batch:
        assert found.shape == params[0].shape
        return
    latent = latents(recipe, params, sample_shape)
    index = dist.sample_expert(sample_shape)[..., None, None]
    middle, half = (0.0, 1.0) if recipe.box is None else box_of(dist)
    actions = latent if recipe.box is None else middle + half * latent.tanh()
    drawn = actions.take_along_dim(index, -2)
    g, h = slopes(recipe, drawn.squeeze(-2), index[..., 0, 0].double())
    gain = -(g.unsqueeze(-2) * (actions - drawn)).sum(-1)
    heard = (g != 0).any(-1)
    logits = params[0].expand(gain.shape)
    if routing == "frequency":
        v = torch.nn.functional.one_hot(gain.argmax(-1), recipe.experts).double()
    else:
        heard &= h > 0
        surprise = torch.stack([latent_density(dist, x)[0] for x in latent.unbind(-2)], -1)
        v = (logits.log_softmax(-1) + gain / torch.where(heard, h, 1.0).unsqueeze(-1) - surprise).softmax(-1)
    expected = (brier_gradient(logits, v, coef) * heard.unsqueeze(-1)).sum_to_size(params[0].shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@given(recipes(min_experts=2), learned)
def test_the_routing_gradient_moves_no_probability_in_sum(recipe, routing):
    found = routed(recipe, routing)[0].double()
    assert found.isfinite().all()
    eps, last = torch.finfo(computes_in(recipe.dtype)).eps, torch.finfo(recipe.dtype).eps
    assert (found.sum(-1).abs() <= recipe.experts * (last * found.abs().sum(-1) + 16 * eps)).all()


@given(recipes(dtypes=(torch.float32, torch.float64), mild=True), learned, st.integers(-20, 20), sample_shapes)
def test_only_the_direction_of_the_upstream_gradient_routes(recipe, routing, power, sample_shape):
    reference, found = (routed(recipe, routing, sample_shape, scale) for scale in (1.0, 2.0**power))
    torch.testing.assert_close(found[0], reference[0], rtol=0, atol=0)


@given(recipes(), learned, sample_shapes)
def test_a_loss_that_does_not_depend_on_the_action_does_not_route(recipe, routing, sample_shape):
    params = recipe.params(requires_grad=True)
    dist = recipe.dist(params, routing=routing)
    action, log_prob = draw(recipe, "rsample_and_log_prob", sample_shape, dist=dist)
    _, h = slopes(recipe, action, log_prob)
    for upstream in ((torch.zeros_like(action), h), (torch.zeros_like(action), torch.zeros_like(h))):
        grads = torch.autograd.grad((action, log_prob), params[0], upstream, retain_graph=True)
        assert not grads[0].any()


@given(recipes(), sample_shapes, st.sampled_from(["mixture", "expert"]), st.sampled_from(["rsample", "experts"]))
def test_without_routing_no_draw_moves_the_logits(recipe, sample_shape, score, method):
    assert routed(recipe, "none", sample_shape, score=score)[0] is None
    params = recipe.params(requires_grad=True)
    if method == "rsample":
        out = (draw(recipe, "rsample", sample_shape, dist=recipe.dist(params, routing="none", score=score)),)
    else:
        out = draw(recipe, "rsample_experts", sample_shape, dist=recipe.dist(params, score=score))
    total = sum(x.float().sum() for x in out)
    assert torch.autograd.grad(total, params[0], allow_unused=True) == (None,)


@given(recipes(dtypes=DTYPES[:2], batch=shapes(smallest=1)), learned, sample_shapes)
def test_routing_leaves_the_gradient_of_loc_and_scale_alone(recipe, routing, sample_shape):
    with_routing, without = routed(recipe, routing, sample_shape), routed(recipe, "none", sample_shape)
    torch.testing.assert_close(with_routing[1:], without[1:], rtol=0, atol=0)


# ---------------------------------------------------------------------- the relaxed draw


@given(recipes(), sample_shapes, st.floats(-2, 2).map(lambda x: 10.0**x), st.booleans())
def test_a_relaxed_draw_is_one_proposal_or_a_blend_of_all(recipe, sample_shape, temperature, straight_through):
    """Its action from its own weights; whichever it is, weights sum to one and gradients are finite."""
    params = recipe.params(requires_grad=True)
    form = {"temperature": temperature, "straight_through": straight_through}
    dist = recipe.dist(params, routing="gumbel_softmax", **form)
    recipe.reseed()
    proposals = dist.propose(sample_shape)
    weights = gumbel_softmax(params[0], torch.Size(sample_shape), **form).detach()
    action, log_prob = draw(recipe, "rsample_and_log_prob", sample_shape, dist=dist)
    last = torch.finfo(recipe.dtype).eps
    assert ((weights.double().sum(-1) - 1).abs() <= recipe.experts * last).all()
    if straight_through:
        assert ((weights == 0) | (weights == 1)).all()
        assert torch.equal(action, proposals.select_action(weights.argmax(-1)))
    else:
        blend = (weights.unsqueeze(-1) * proposals.latent).sum(-2).double()
        sizes = (weights.unsqueeze(-1) * (dist.loc.abs() + proposals.step.abs())).sum(-2).double()
        middle, half = (0.0, 1.0) if recipe.box is None else box_of(dist)
        expected = blend if recipe.box is None else middle + half * blend.tanh()
        tolerance = 16 * last * (half * (1 + sizes) + abs(middle))
        assert_within(action, expected.detach(), tolerance.detach() + 0 * expected.detach())
    upstream = slopes(recipe, action, log_prob)
    assert all(x.isfinite().all() for x in torch.autograd.grad((action, log_prob), params, upstream))


# ---------------------------------------------------------------------- what does not exist


ALLOWED = {
    "routing": ["frequency", "soft_frequency", "gumbel_softmax", "none"],
    "score": ["mixture", "expert"],
    "log_prob_routing": ["exact", "frequency"],
}


@given(recipes(), st.sampled_from(sorted(ALLOWED)), st.text(max_size=20))
def test_an_option_that_does_not_exist_is_answered_with_those_that_do(recipe, option, text):
    assume(text.lower() not in ALLOWED[option])
    with pytest.raises(ValueError, match=option) as caught:
        recipe.dist(**{option: text})
    assert all(x in str(caught.value) for x in (recipe.cls.__name__, repr(text), ", ".join(ALLOWED[option])))


@given(recipes(), st.sampled_from(["routing_coef", "temperature"]), numbers)
def test_a_coefficient_is_finite_and_not_negative_and_a_temperature_positive(recipe, option, number):
    if math.isfinite(number) and (number > 0 or (number == 0 and option == "routing_coef")):
        assert getattr(recipe.dist(**{option: number}), option) == number
        return
    with pytest.raises(ValueError, match="must be finite and") as caught:
        recipe.dist(**{option: number})
    assert f"{option}={number!r}" in str(caught.value)


@given(recipes(batch=shapes(smallest=1)), shapes(), st.integers(0, 5) | st.none())
def test_a_value_is_taken_where_its_shape_broadcasts_and_refused_elsewhere(recipe, lead, last):
    dist = recipe.dist()
    shape = (*lead, recipe.size if last is None else last)
    value = torch.zeros(shape, dtype=recipe.dtype)
    try:
        expected = torch.broadcast_shapes(lead, recipe.batch)
    except RuntimeError:
        expected = None
    if expected is not None and shape[-1] == recipe.size:
        assert dist.log_prob(value).shape == expected
        return
    for method in ("log_prob", "expert_log_prob", "responsibilities"):
        with pytest.raises(ValueError, match=re.escape(f"shape {shape} for batch shape {recipe.batch}")):
            getattr(dist, method)(value)
