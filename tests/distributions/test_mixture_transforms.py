"""Under torch.vmap, torch.func, torch.compile, and as a leaf of TensorDict's CompositeDistribution."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from distributions.reference import BOTH, make_params, tanh_reference
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, set_composite_lp_aggregate
from torch.distributions import Normal
from torchrl.modules.distributions.utils import rsample_and_log_prob, sample_and_log_prob

from torchrl_pmoe import TanhNormalMixture

STACK = 3
OPTIONS = [
    {"routing": "frequency"},
    {"routing": "soft_frequency"},
    {"routing": "none", "score": "expert"},
    {"routing": "soft_frequency", "low": torch.tensor([-1.0, 0.0]), "high": torch.tensor([1.0, 2.0])},
    {"routing": "gumbel_softmax", "temperature": 0.5},
    {"routing": "gumbel_softmax", "routing_coef": 2.0, "straight_through": False},
]


def _log_prob(form):
    return lambda *params: TanhNormalMixture(*params[:3], log_prob_routing=form).log_prob(params[3])


def _actor_loss(**options):
    def loss(logits, loc, scale):
        action, log_prob = TanhNormalMixture(logits, loc, scale, **options).rsample_and_log_prob((2,))
        return (0.1 * log_prob + (action - 0.3).square().sum(-1)).mean()

    return loss


def _loop(function, *args):
    """What vmap with randomness="same" promises: the same draws for every member of the stack."""
    out = []
    for row in zip(*(x.unbind(0) for x in args), strict=True):
        torch.manual_seed(5)
        out.append(function(*row))
    return out


def _stacked(outs):
    if isinstance(outs[0], tuple):
        return tuple(torch.stack(out) for out in zip(*outs, strict=True))
    return torch.stack(outs)


# ---------------------------------------------------------------------- vmap


@pytest.mark.parametrize("form", ["exact", "frequency"])
def test_vmap_of_log_prob_and_its_gradient_is_a_loop(form):
    params = make_params(STACK, 4)
    value = 1.8 * torch.rand(STACK, 4, 2, dtype=torch.float64) - 0.9
    function = _log_prob(form)
    torch.testing.assert_close(torch.vmap(function)(*params, value), _stacked(_loop(function, *params, value)))
    gradient = torch.func.grad(lambda *x: function(*x).sin().sum(), argnums=(0, 1, 2, 3))
    torch.testing.assert_close(torch.vmap(gradient)(*params, value), _stacked(_loop(gradient, *params, value)))


@pytest.mark.parametrize("options", OPTIONS)
def test_vmap_of_the_routing_gradient_is_a_loop(options):
    params = make_params(STACK, 4)
    gradient = torch.func.grad(_actor_loss(**options), argnums=(0, 1, 2))
    torch.manual_seed(5)
    actual = torch.vmap(gradient, randomness="same")(*params)
    torch.testing.assert_close(actual, _stacked(_loop(gradient, *params)))


@pytest.mark.parametrize("options", OPTIONS)
def test_backward_through_vmap_is_a_loop(options):
    params = make_params(STACK, 4, requires_grad=True)
    loss = _actor_loss(**options)
    torch.manual_seed(5)
    losses = torch.vmap(loss, randomness="same")(*params)
    expected = torch.stack(_loop(loss, *params))
    torch.testing.assert_close(losses, expected)
    inputs = params[1:] if options["routing"] == "none" else params
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


@pytest.mark.parametrize("method", ["sample", "rsample", "rsample_and_log_prob", "sample_and_log_prob", "entropy"])
def test_vmap_draws_differently_for_each_member_of_the_stack(method):
    params = [x.expand(STACK, *x.shape) for x in make_params(4)]
    out = torch.vmap(lambda *x: getattr(TanhNormalMixture(*x), method)(), randomness="different")(*params)
    out = out[-1] if isinstance(out, tuple) else out
    assert out.unique(dim=0).shape[0] == STACK


# ---------------------------------------------------------------------- compile


@pytest.mark.parametrize("form", ["exact", "frequency"])
def test_compiled_log_prob_and_gradient_are_the_eager_ones(form):
    params = make_params(4, requires_grad=True)
    value = 1.8 * torch.rand(2, 4, 2, dtype=torch.float64) - 0.9
    function = lambda *x: _log_prob(form)(*x).sin().sum()
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        out = call(*params, value)
        results.append((out, *torch.autograd.grad(out, params)))
    torch.testing.assert_close(results[1], results[0])


def _compiled_and_eager_draw(settings, **kwargs):
    params = make_params(4, requires_grad=True)
    function = _actor_loss(**settings)
    results = []
    for call in (function, torch.compile(function, fullgraph=True, **kwargs)):
        torch.manual_seed(5)
        loss = call(*params)
        results.append((loss, *torch.autograd.grad(loss, params)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("options", [{}, *OPTIONS[3:]])
def test_compiled_draw_and_routing_gradient_are_the_eager_ones(options):
    _compiled_and_eager_draw(options, backend="aot_eager")


@pytest.mark.slow  # a minute of the C++ compiler
def test_draw_and_routing_gradient_compiled_to_machine_code_are_the_eager_ones():
    # the eager random stream, to compare draw by draw
    _compiled_and_eager_draw({}, backend="inductor", options={"fallback_random": True})


# ---------------------------------------------------------------------- a leaf of a composite


def _composite(params, **options):
    logits, loc, scale = params
    return CompositeDistribution(
        TensorDict(
            arm=TensorDict(logits=logits, loc=loc, scale=scale),
            grip=TensorDict(loc=torch.zeros(4, dtype=torch.float64), scale=torch.ones(4, dtype=torch.float64)),
            batch_size=4,
        ),
        distribution_map={"arm": TanhNormalMixture, "grip": Normal},
        extra_kwargs={"arm": options},
    )


@pytest.fixture(params=[True, False])
def aggregate(request):
    with set_composite_lp_aggregate(request.param):
        yield request.param


@pytest.mark.parametrize("draw", [sample_and_log_prob, rsample_and_log_prob])
def test_leaf_of_a_composite_draws_and_scores(draw, aggregate):
    params = make_params(4)
    dist = _composite(params, low=-2.0, high=2.0)
    sample, log_prob = draw(dist)
    arm = tanh_reference(*params, -2.0, 2.0).log_prob(sample["arm"])
    grip = Normal(0, 1).log_prob(sample["grip"])
    for scored in (log_prob, dist.log_prob(sample)):
        if aggregate:
            torch.testing.assert_close(scored, arm + grip)
        else:
            torch.testing.assert_close(scored["arm_log_prob"], arm)
    assert dist.sample((3,))["arm"].shape == (3, 4, 2)


def test_leaf_of_a_composite_routes():
    params = make_params(4, requires_grad=True)
    sample, _ = rsample_and_log_prob(_composite(params))
    assert torch.autograd.grad(sample["arm"].sum(), params[0])[0].abs().min() > 0


def test_composites_deterministic_sample_takes_the_leafs():
    params = make_params(4)
    expected = TanhNormalMixture(*params).deterministic_sample
    torch.testing.assert_close(_composite(params).deterministic_sample["arm"], expected)


# ---------------------------------------------------------------------- as an object


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_the_same_distribution(cls, copied):
    dist = cls(*make_params(3), routing="soft_frequency")
    value = dist.sample()
    torch.testing.assert_close(copied(dist).log_prob(value), dist.log_prob(value))
    assert copied(dist).routing is dist.routing


@pytest.mark.parametrize("cls", BOTH)
def test_repr_names_the_parameters(cls):
    text = repr(cls(*make_params(3)))
    assert text.startswith(cls.__name__)
    assert all(name in text for name in ("logits", "loc", "scale"))
