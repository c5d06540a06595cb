"""Parameters that are no numbers: an error that names them, or actions that are no numbers; never an expert."""

from __future__ import annotations

import pytest
import torch
from distributions.reference import BOTH, make_params
from tensordict import TensorDict
from torch.distributions import Distribution
from torchrl.data import Bounded
from torchrl.envs import ExplorationType, set_exploration_type

from torchrl_pmoe import BestOfExpertsActor, NormalMixture, PMOEActor, TanhNormalMixture

B, K, A = 3, 4, 2
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def by_default(request):
    """The default of all distributions, as it was before afterwards."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(request.param)
    yield request.param
    Distribution.set_default_validate_args(before)


def broken(name, value):
    params = dict(zip(("logits", "loc", "scale"), make_params(B, experts=K, size=A), strict=True))
    params[name] = params[name].clone()
    params[name].view(-1)[5] = value
    return params


FAULTS = [
    ("logits", NAN, "the router's logits must be numbers"),
    ("logits", INF, "the router's logits must be numbers"),
    ("loc", NAN, "the experts' loc must be numbers"),
    ("scale", NAN, "the experts' scale must be positive"),
    ("scale", 0.0, "the experts' scale must be positive"),
    ("scale", -1.0, "the experts' scale must be positive"),
]


@pytest.mark.parametrize(("name", "value", "message"), FAULTS)
@pytest.mark.parametrize("cls", BOTH)
def test_validation_names_whose_parameter_is_bad(cls, name, value, message):
    with pytest.raises(ValueError, match=f"^{cls.__name__}: {message}"):
        cls(**broken(name, value), validate_args=True)
    cls(**broken(name, value), validate_args=False)


@pytest.mark.parametrize("by_default", [True, False], indirect=True)
def test_validation_follows_the_default_of_torch(by_default):
    bad = broken("logits", NAN)
    if by_default:
        with pytest.raises(ValueError, match="the router's logits"):
            TanhNormalMixture(**bad)
    else:
        TanhNormalMixture(**bad)


def test_an_expert_without_weight_and_a_distribution_without_states_are_valid():
    """Minus infinity masks an expert, as in ``torch.distributions.Categorical``."""
    masked = TanhNormalMixture(**broken("logits", -INF), validate_args=True)
    assert masked.sample().isfinite().all()
    assert masked.mode.isfinite().all()
    TanhNormalMixture(*make_params(0, experts=K, size=A), validate_args=True)
    logits, loc, scale = make_params(B, experts=K, size=A)
    with pytest.raises(ValueError, match="the router's logits"):  # no expert has any weight
        TanhNormalMixture(torch.full_like(logits, -INF), loc, scale, validate_args=True)


def test_validation_leaves_vmap_and_the_compiler_alone():
    """There is no host to read a value there."""
    params = make_params(2, B, experts=K, size=A)

    def density(*params):
        return TanhNormalMixture(*params, validate_args=True).log_prob(torch.zeros(A, dtype=torch.float64))

    expected = density(*params)
    torch.testing.assert_close(torch.vmap(density)(*params), expected)
    compiled = torch.compile(density, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*params), expected)


DRAWS = {
    "sample": lambda dist: dist.sample(),
    "rsample": lambda dist: dist.rsample(),
    "rsample_and_log_prob": lambda dist: dist.rsample_and_log_prob()[0],
    "sample_and_log_prob": lambda dist: dist.sample_and_log_prob()[0],
    "rsample_experts": lambda dist: dist.rsample_experts()[0],
    "redraw": lambda dist: dist.propose().redraw(dist.sample_expert())[0],
    "mode": lambda dist: dist.mode,
    "expert_mode": lambda dist: dist.expert_mode,
    "mean": lambda dist: dist.mean,
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "gumbel_softmax", "none"])
@pytest.mark.parametrize("score", ["mixture", "expert"])
@pytest.mark.parametrize("cls", [NormalMixture, TanhNormalMixture])
def test_a_router_that_is_no_number_makes_actions_that_are_none(cls, score, routing, draw):
    """In its own state alone, and for every way to act; no expert takes over in silence."""
    params = broken("logits", NAN)  # of state 1
    action = DRAWS[draw](cls(**params, score=score, routing=routing, validate_args=False))
    assert action[1].isnan().all()
    assert action[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", [ExplorationType.RANDOM, ExplorationType.DETERMINISTIC])
@pytest.mark.parametrize("best", [True, False])
def test_a_diverged_router_shows_in_the_actions_of_its_actor(best, kind):
    actor = PMOEActor(
        K, spec=Bounded(-1, 1, (A,)), in_features=5, num_cells=(4,), distribution_kwargs={"validate_args": False}
    )
    for parameter in actor.router_parameters():
        torch.nn.init.constant_(parameter, NAN)
    policy = BestOfExpertsActor(actor, lambda states, action: action.sum(-1)) if best else actor
    with set_exploration_type(kind):
        assert policy(TensorDict(observation=torch.randn(6, 5), batch_size=6))["action"].isnan().all()
