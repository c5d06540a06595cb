"""Bounds ``[agents, A]``: every agent has the distribution that it would have alone."""

from __future__ import annotations

import pytest
import torch
from distributions.reference import make_params

from torchrl_pmoe import TanhNormalMixture

AGENTS, K, A = 3, 3, 2
HIGH = torch.arange(1.0, 1 + AGENTS * A, dtype=torch.float64).reshape(AGENTS, A)
BOUNDS = {
    "both": (-2 * HIGH, HIGH),
    "low is a number": (-1.0, HIGH),
    "high is [A]": (-2 * HIGH, HIGH[0]),
    "one for all dimensions is refused, one for all agents not": (-2 * HIGH[:1], HIGH),
}


def alone(params, low, high, agent, **options):
    def of(bound):
        return bound.expand(AGENTS, A)[agent] if isinstance(bound, torch.Tensor) else bound

    return TanhNormalMixture(*(x[:, agent] for x in params), of(low), of(high), **options)


@pytest.mark.parametrize(("low", "high"), BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("score", ["mixture", "expert"])
def test_an_agent_has_the_distribution_that_it_would_have_alone(score, low, high):
    params = make_params(5, AGENTS, experts=K, size=A)
    dist = TanhNormalMixture(*params, low, high, score=score)
    proposals = dist.propose((4,))
    index = dist.sample_expert((4,))
    action, density = proposals.select(index)
    found = {
        "proposals": (proposals.action, -3),
        "their densities": (proposals.log_prob(), -2),
        "their own densities": (proposals.expert_log_prob(), -2),
        "action": (action, -2),
        "selected": (proposals.select_action(index), -2),
        "density": (density, -1),
        "log_prob": (dist.log_prob(action), -1),
        "expert_log_prob": (dist.expert_log_prob(action), -2),
        "responsibilities": (dist.responsibilities(action), -2),
        "modes": (dist.expert_mode, -3),
        "mode": (dist.mode, -2),
        "mean": (dist.mean, -2),
    }
    for agent in range(AGENTS):
        one = alone(params, low, high, agent, score=score)
        own = one.propose((4,))
        own.__init__(one, proposals.noise[:, :, agent])
        own_action, own_density = own.select(index[..., agent])
        expected = {
            "proposals": own.action,
            "their densities": own.log_prob(),
            "their own densities": own.expert_log_prob(),
            "action": own_action,
            "selected": own_action,
            "density": own_density,
            "log_prob": one.log_prob(own_action),
            "expert_log_prob": one.expert_log_prob(own_action),
            "responsibilities": one.responsibilities(own_action),
            "modes": one.expert_mode,
            "mode": one.mode,
            "mean": one.mean,
        }
        for name, (value, dim) in found.items():
            torch.testing.assert_close(value.select(dim, agent), expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_draws_and_what_is_made_of_the_distribution_keep_to_the_boxes():
    params = make_params(5, AGENTS, experts=K, size=A)
    dist = TanhNormalMixture(*params, -2 * HIGH, HIGH)
    for one in (dist, dist.expand((7, 5, AGENTS))):
        action, log_prob = one.rsample_and_log_prob((100,))
        assert ((action >= -2 * HIGH) & (action <= HIGH)).all()
        assert (action.flatten(0, -3).amax(0) > 0.5 * HIGH).all()
        torch.testing.assert_close(log_prob, one.log_prob(action), rtol=1e-4, atol=1e-4)
        assert one.support.check(action).all()
        assert one.entropy().shape == one.batch_shape


@pytest.mark.parametrize("shape", [(AGENTS + 1, A), (AGENTS, 1), (K, AGENTS, A, 1), (A, AGENTS)], ids=str)
def test_bounds_that_fit_no_agent_are_refused(shape):
    params = make_params(5, AGENTS, experts=K, size=A)
    with pytest.raises(
        ValueError, match=r"a number or a tensor of shape \(2,\), or one for each agent that fits \(5, 3, 2\)"
    ):
        TanhNormalMixture(*params, -torch.ones(shape), torch.ones(shape))


def test_a_crossed_pair_of_one_agent_is_refused():
    low = -HIGH.clone()
    low[1, 1] = HIGH[1, 1]
    with pytest.raises(ValueError, match="low must be below high"):
        TanhNormalMixture(*make_params(5, AGENTS, experts=K, size=A), low, HIGH)
