"""The density: against torch.distributions, by quadrature, and its gradients by finite differences."""

from __future__ import annotations

import math
import re

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
from torch.autograd import gradcheck
from torch.distributions import Normal
from torchrl.modules import TanhNormal

from torchrl_pmoe import NormalMixture, TanhNormalMixture

PER_DIMENSION = (torch.tensor([-2.0, 0.0], dtype=torch.float64), torch.tensor([2.0, 0.5], dtype=torch.float64))
BOUNDS = [(-1.0, 1.0), (-2.0, 2.0), (-0.5, 3.0), PER_DIMENSION, (-1.0, PER_DIMENSION[1]), (PER_DIMENSION[0], 5.0)]
BOUND_IDS = ["unit", "symmetric", "shifted", "per-dimension", "only-high-is-a-tensor", "only-low-is-a-tensor"]
SHAPES = [(), (0,), (3,), (2, 3)]


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("experts", [1, 4, 64])
@pytest.mark.parametrize("batch", SHAPES)
def test_normal_density_is_that_of_mixture_same_family(batch, experts, device):
    params = make_params(*batch, experts=experts, device=device)
    value = torch.randn(5, *batch, 2, dtype=torch.float64, device=device)
    expected = normal_reference(*params).log_prob(value) if 0 not in batch else value.new_zeros(5, 0)
    torch.testing.assert_close(NormalMixture(*params).log_prob(value), expected)


@pytest.mark.parametrize(("low", "high"), BOUNDS, ids=BOUND_IDS)
@pytest.mark.parametrize("experts", [1, 4])
def test_squashed_density_is_that_of_a_transformed_mixture(low, high, experts):
    params = make_params(3, experts=experts)
    reference = tanh_reference(*params, low, high)
    value = reference.sample((50,))
    torch.testing.assert_close(TanhNormalMixture(*params, low, high).log_prob(value), reference.log_prob(value))


@pytest.mark.parametrize(("low", "high"), BOUNDS, ids=BOUND_IDS)
def test_expert_density_is_that_of_each_expert_alone(low, high):
    params = make_params(3)
    dist = TanhNormalMixture(*params, low, high)
    value = dist.sample((20,))
    expected = expert_reference(*params[1:], low, high).log_prob(value.unsqueeze(-2))
    torch.testing.assert_close(dist.expert_log_prob(value), expected)


@pytest.mark.parametrize("cls", BOTH)
def test_responsibilities_are_bayes_posterior(cls):
    params = make_params(3)
    dist = cls(*params)
    value = dist.sample((20,))
    joint = params[0].softmax(-1) * dist.expert_log_prob(value).exp()
    torch.testing.assert_close(dist.responsibilities(value), joint / joint.sum(-1, keepdim=True))


@pytest.mark.parametrize("score", ["mixture", "expert"])
@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "none"])
@pytest.mark.parametrize("log_prob_routing", ["exact", "frequency"])
def test_log_prob_is_the_mixtures_under_every_option(score, routing, log_prob_routing):
    params = make_params(3)
    value = torch.rand(3, 2, dtype=torch.float64)
    dist = TanhNormalMixture(*params, routing=routing, score=score, log_prob_routing=log_prob_routing)
    torch.testing.assert_close(dist.log_prob(value), tanh_reference(*params).log_prob(value))


def test_one_expert_is_torchrls_tanh_normal():
    _, loc, scale = make_params(5, experts=1)
    value = 1.99 * torch.rand(5, 2, dtype=torch.float64) - 0.995
    ours = TanhNormalMixture(torch.zeros(5, 1, dtype=torch.float64), loc, scale)
    theirs = TanhNormal(loc.squeeze(-2), scale.squeeze(-2))
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(ours.deterministic_sample, theirs.deterministic_sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_density_is_the_float64_one_at_the_same_numbers(dtype, device):
    params = make_params(50, experts=4, dtype=dtype, device=device)
    value = (1.8 * torch.rand(50, 2, device=device) - 0.9).to(dtype)
    expected = tanh_reference(*(x.double() for x in params)).log_prob(value.double())
    actual = TanhNormalMixture(*params).log_prob(value)
    assert actual.dtype == dtype
    # the result is rounded once, so half a unit in the last place of the dtype is all it may lose
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps * 20)


@pytest.mark.parametrize("high", [2.0, 0.1])
def test_low_precision_density_is_the_float64_one_in_a_shifted_box(high):
    """Where the action minus the box's middle is no number of that precision."""
    params = make_params(50, experts=4, dtype=torch.bfloat16)
    value = (-0.4 + (high + 0.4) * torch.linspace(0.05, 0.95, 100).reshape(50, 2)).bfloat16()
    expected = tanh_reference(*(x.double() for x in params), -0.4, high).log_prob(value.double())
    actual = TanhNormalMixture(*params, -0.4, high).log_prob(value)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=1e-3)


def _edges_and_density(cls, params, points):
    """Grid of latent points with the weights of a trapezoid rule, mapped to actions when bounded."""
    latent = torch.linspace(-9, 9, points, dtype=torch.float64)
    value = latent.tanh() if cls is TanhNormalMixture else latent
    slope = 1 - latent.tanh().square() if cls is TanhNormalMixture else torch.ones_like(latent)
    return value, slope * (latent[1] - latent[0])


@pytest.mark.parametrize("cls", BOTH)
def test_density_integrates_to_one_in_one_dimension(cls):
    params = make_params(experts=4, size=1)
    value, weight = _edges_and_density(cls, params, 4001)
    total = (cls(*params).log_prob(value.unsqueeze(-1)).exp() * weight).sum()
    assert abs(total.item() - 1) < 1e-4


@pytest.mark.parametrize("cls", BOTH)
def test_density_integrates_to_one_in_two_dimensions(cls):
    params = make_params(experts=4, size=2)
    value, weight = _edges_and_density(cls, params, 601)
    grid = torch.cartesian_prod(value, value)
    total = (cls(*params).log_prob(grid).exp() * torch.cartesian_prod(weight, weight).prod(-1)).sum()
    assert abs(total.item() - 1) < 1e-4


def test_density_integrates_to_one_over_a_shifted_box():
    params = make_params(experts=3, size=1)
    points, weights = np.polynomial.legendre.leggauss(2000)
    value = torch.from_numpy(points) * 2.5 + 0.5  # [-2, 3]
    density = TanhNormalMixture(*params, low=-2, high=3).log_prob(value.unsqueeze(-1)).exp()
    assert abs((density * torch.from_numpy(weights) * 2.5).sum().item() - 1) < 1e-4


# ---------------------------------------------------------------------- gradients


def _log_prob(cls, **options):
    return lambda logits, loc, scale, value: cls(logits, loc, scale, **options).log_prob(value)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("cls", BOTH)
def test_log_prob_gradients_are_finite_differences(cls, experts):
    params = make_params(3, experts=experts, requires_grad=True)
    value = (1.6 * torch.rand(2, 3, 2, dtype=torch.float64) - 0.8).requires_grad_()
    assert gradcheck(_log_prob(cls), (*params, value))


def test_log_prob_gradients_inside_a_box_are_finite_differences():
    params = make_params(3, requires_grad=True)
    value = torch.tensor([[0.1, 0.2]], dtype=torch.float64).requires_grad_()
    low, high = PER_DIMENSION
    assert gradcheck(_log_prob(TanhNormalMixture, low=low, high=high), (*params, value))


@pytest.mark.parametrize("cls", BOTH)
def test_density_of_each_expert_has_gradients_of_finite_differences(cls):
    _, loc, scale = make_params(2, requires_grad=True)
    value = (1.6 * torch.rand(2, 2, dtype=torch.float64) - 0.8).requires_grad_()
    logits = torch.zeros(2, 3, dtype=torch.float64)
    assert gradcheck(lambda *x: cls(logits, *x[:2]).expert_log_prob(x[2]), (loc, scale, value))


# ---------------------------------------------------------------------- bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_action_rounded_onto_the_bound_is_as_likely_as_the_one_just_inside(dtype):
    params = make_params(experts=3, size=1, dtype=dtype)
    dist = TanhNormalMixture(*params)
    one = torch.ones(1, dtype=dtype)
    inside = torch.nextafter(one, torch.zeros_like(one))
    torch.testing.assert_close(dist.log_prob(one), dist.log_prob(inside), rtol=0, atol=0)
    torch.testing.assert_close(dist.log_prob(-one), dist.log_prob(-inside), rtol=0, atol=0)
    assert dist.log_prob(one) != dist.log_prob(torch.nextafter(inside, torch.zeros_like(one)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("low", "high"), [*BOUNDS[:4], (-0.75, 0.25)])
def test_samples_lie_in_the_support(low, high, dtype):
    logits, loc, scale = make_params(200, dtype=dtype)
    dist = TanhNormalMixture(logits, 10 * loc, 10 * scale, low, high)
    action = dist.sample((20,))
    assert action.dtype == dtype
    assert dist.support.check(action).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("as_tensors", [True, False])
def test_a_saturated_action_is_not_rounded_out_of_the_box(dtype, as_tensors):
    """``half + middle`` rounds above ``high`` for about a third of these boxes."""
    low, high = (torch.combinations(torch.arange(-20, 31) / 10).T[:, ::7]).to(dtype)
    logits, loc = torch.zeros(2, dtype=dtype), 100 * torch.tensor([[-1.0], [1.0]], dtype=dtype)
    if as_tensors:
        loc = loc.expand(2, len(low))
        modes = [TanhNormalMixture(logits, loc, torch.ones_like(loc), low, high).expert_mode]
    else:
        bounds = zip(low.tolist(), high.tolist(), strict=True)
        modes = [TanhNormalMixture(logits, loc, torch.ones_like(loc), *pair).expert_mode for pair in bounds]
    actions = torch.cat(modes, -1)
    assert (actions >= low).all()
    assert (actions <= high).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("low", "high"), [*BOUNDS[:4], (0.1, 0.7)])
def test_the_mean_of_saturated_experts_is_not_rounded_out_of_the_box(low, high, dtype):
    """Rounded, the weights of experts and of nodes do not sum to one."""
    logits, loc, scale = make_params(200, dtype=dtype)
    dist = TanhNormalMixture(logits, 20 * loc, scale, low, high)
    assert dist.support.check(dist.mean).all()


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_output_has_the_dtype_of_loc_whatever_the_bounds(cls, dtype):
    options = {"low": PER_DIMENSION[0], "high": PER_DIMENSION[1]} if cls is TanhNormalMixture else {}
    dist = cls(*make_params(3, dtype=dtype), **options)
    value = dist.sample()
    pairs = (*dist.rsample_and_log_prob(), *dist.sample_and_log_prob(), *dist.rsample_experts())
    summaries = (dist.mode, dist.mean, dist.entropy(), dist.probs, dist.expert_mode)
    densities = (dist.log_prob(value), dist.expert_log_prob(value), dist.responsibilities(value))
    assert {x.dtype for x in (value, dist.rsample(), *pairs, *summaries, *densities)} == {dtype}


# ---------------------------------------------------------------------- point summaries


@pytest.mark.parametrize(("low", "high"), BOUNDS, ids=BOUND_IDS)
def test_deterministic_sample_is_the_squashed_loc_of_the_likeliest_expert(low, high):
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    _, loc, scale = make_params(2)
    dist = TanhNormalMixture(logits, loc, scale, low, high)
    expected = low + (high - low) * (loc[[0, 1], [1, 0]].tanh() + 1) / 2
    torch.testing.assert_close(dist.deterministic_sample, expected)
    torch.testing.assert_close(dist.mode, expected)


def test_unbounded_mean_is_the_weighted_loc():
    logits, loc, scale = make_params(3)
    expected = torch.einsum("bk,bka->ba", logits.softmax(-1), loc)
    torch.testing.assert_close(NormalMixture(logits, loc, scale).mean, expected)


@pytest.mark.parametrize(("low", "high"), BOUNDS[:4], ids=BOUND_IDS[:4])
def test_bounded_mean_is_the_integral_of_the_action(low, high):
    logits, loc, scale = make_params(3)
    latent = torch.linspace(-15, 15, 20001, dtype=torch.float64)
    density = Normal(loc.unsqueeze(-1), scale.unsqueeze(-1)).log_prob(latent).exp()
    tanh_mean = (density * latent.tanh()).sum(-1) * (latent[1] - latent[0])
    expected = torch.einsum("bk,bka->ba", logits.softmax(-1), low + (high - low) * (tanh_mean + 1) / 2)
    torch.testing.assert_close(TanhNormalMixture(logits, loc, scale, low, high).mean, expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- expand, shapes, errors


@pytest.mark.parametrize("cls", BOTH)
def test_expand_is_the_same_distribution_over_a_larger_batch(cls):
    options = {"low": PER_DIMENSION[0], "high": PER_DIMENSION[1]} if cls is TanhNormalMixture else {}
    kwargs = {"routing": "soft_frequency", "routing_coef": 2.0, "score": "expert", "log_prob_routing": "frequency"}
    dist = cls(*make_params(3), **options, **kwargs)
    larger = dist.expand((4, 3))
    value = dist.sample((4,))
    assert (larger.batch_shape, larger.event_shape) == ((4, 3), (2,))
    assert (larger.routing, larger.routing_coef) == (dist.routing, 2.0)
    assert (larger.score, larger.log_prob_routing) == ("expert", "frequency")
    torch.testing.assert_close(larger.log_prob(value), dist.log_prob(value))
    assert larger.sample((2,)).shape == (2, 4, 3, 2)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("sample_shape", [(), (5,)])
@pytest.mark.parametrize("experts", [1, 4, 64])
@pytest.mark.parametrize("batch", SHAPES)
def test_shapes(cls, batch, experts, sample_shape):
    dist = cls(*make_params(*batch, experts=experts, dtype=torch.float32))
    drawn, size = (*sample_shape, *batch), (*sample_shape, *batch, 2)
    assert (dist.batch_shape, dist.event_shape, dist.num_experts) == (batch, (2,), experts)
    assert dist.sample(sample_shape).shape == dist.rsample(sample_shape).shape == size
    for action, log_prob in (dist.sample_and_log_prob(sample_shape), dist.rsample_and_log_prob(sample_shape)):
        assert (action.shape, log_prob.shape) == (size, drawn)
    proposals, log_prob = dist.rsample_experts(sample_shape)
    assert (proposals.shape, log_prob.shape) == ((*drawn, experts, 2), (*drawn, experts))
    value = dist.sample(sample_shape)
    assert dist.log_prob(value).shape == drawn
    assert dist.expert_log_prob(value).shape == dist.responsibilities(value).shape == (*drawn, experts)
    assert dist.entropy().shape == batch
    assert dist.mode.shape == dist.mean.shape == (*batch, 2)


@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "none"])
def test_an_empty_batch_has_a_backward_pass(routing):
    params = make_params(0, requires_grad=True)
    action, log_prob = TanhNormalMixture(*params, routing=routing).rsample_and_log_prob()
    (action.sum() + log_prob.sum()).backward()
    assert all(x.grad.shape == x.shape for x in params[1:])


WRONG_SHAPES = {  # logits, loc, scale, what the error quotes
    "logits have another K": ((3, 5), (3, 4, 2), (3, 4, 2), "(3, 5) and (3, 4, 2)"),
    "logits have another batch": ((2, 4), (3, 4, 2), (3, 4, 2), "(2, 4) and (3, 4, 2)"),
    "scale is not loc's": ((3, 4), (3, 4, 2), (3, 4, 1), "(3, 4, 2) and (3, 4, 1)"),
    "loc has no expert dimension": ((2,), (2,), (2,), "(2,) and (2,)"),
}


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(("logits", "loc", "scale", "quoted"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_wrong_shapes_are_quoted(cls, logits, loc, scale, quoted):
    with pytest.raises(ValueError, match=re.escape(quoted)):
        cls(torch.ones(logits), torch.ones(loc), torch.ones(scale))


def test_a_mixture_has_an_expert():
    with pytest.raises(ValueError, match=r"at least one expert.*\(3, 0, 2\)"):
        NormalMixture(torch.ones(3, 0), torch.ones(3, 0, 2), torch.ones(3, 0, 2))


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("method", ["log_prob", "expert_log_prob", "responsibilities"])
@pytest.mark.parametrize(("shape", "against"), [((3, 4), "(2,)"), ((7, 2), "(3,)")])
def test_a_value_that_does_not_fit_is_quoted(cls, method, shape, against):
    dist = cls(*make_params(3))
    with pytest.raises(ValueError, match="value") as caught:
        getattr(dist, method)(torch.zeros(shape, dtype=torch.float64))
    assert str(shape) in str(caught.value)
    assert against in str(caught.value)


BAD_BOUNDS = [
    (1.0, -1.0),
    (0.0, 0.0),
    (math.nan, 1.0),
    (torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 1.0])),
    (torch.tensor([-1.0, -1.0, -1.0]), 1.0),
    (-1.0, torch.ones(4, 2)),
]


@pytest.mark.parametrize(("low", "high"), BAD_BOUNDS)
def test_bad_bounds_are_refused(low, high):
    with pytest.raises(ValueError, match=r"bound|low"):
        TanhNormalMixture(*make_params(3), low, high)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(
    "option",
    [{"score": "foo"}, {"log_prob_routing": "foo"}, {"temperature": 0.0}, {"temperature": -1.0}],
)
def test_unknown_options_are_named(cls, option):
    with pytest.raises(ValueError, match=next(iter(option))) as caught:
        cls(*make_params(3), **option)
    assert repr(next(iter(option.values()))) in str(caught.value)
