"""The entropy that SAC's temperature sees, and the one that it aims at."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.modules import ProbabilisticActor, ValueOperator

from objectives.helpers import ACTION, OBSERVATION, make_batch, make_critic
from torchrl_pmoe import MixtureParamExtractor, NormalMixture, PMOEActor, PMOESACLoss, PMOETQCLoss, TanhNormalMixture

LOW, HIGH = -0.5, 2.0
LOGITS = [2.0, -1.0, 0.5]
LOC = [-0.4, 0.9, 0.1]
SCALE = [0.1, 0.4, 1.2]


class Fixed(nn.Module):
    """The same three experts in every state, actions of one dimension."""

    def __init__(self):
        super().__init__()
        self.features = nn.Parameter(torch.tensor([*LOGITS, *LOC, *SCALE], dtype=torch.float64))

    def forward(self, observation):
        return self.features.expand(*observation.shape[:-1], -1)


class Hill(nn.Module):
    """A critic with one peak, so that the best proposal is no random one."""

    def __init__(self):
        super().__init__()
        self.top = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, observation, action):
        return -(action - self.top).square().sum(-1, keepdim=True)


def entropy_by_quadrature(score):
    """-sum_k w_k int pi_k(a) log density(a) da, the density the mixture's or each expert's own."""
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    loc, scale = torch.tensor(LOC).double(), torch.tensor(SCALE).double()
    normal = torch.distributions.Normal(loc, scale).log_prob(u.unsqueeze(-1))
    log_slope = math.log((HIGH - LOW) / 2) - 2.0 * u.cosh().log()
    weights = torch.tensor(LOGITS).double().softmax(0)
    density = normal if score == "expert" else (normal + weights.log()).logsumexp(-1, keepdim=True)
    integrand = normal.exp() * (density - log_slope.unsqueeze(-1))
    return -(weights * torch.trapezoid(integrand, u, dim=0)).sum().item()


@pytest.mark.parametrize("num_proposals", [1, 2])
@pytest.mark.parametrize("backprop", ["max", "all", "routed", "weighted"])
@pytest.mark.parametrize("score", ["mixture", "expert"])
def test_the_temperature_sees_the_policys_entropy(score, backprop, num_proposals):
    torch.manual_seed(0)
    actor = PMOEActor(
        3,
        spec=Bounded(LOW, HIGH, (1,), dtype=torch.float64),
        network=Fixed(),
        scale_mapping=nn.Identity(),
        distribution_kwargs={"score": score},
    )
    loss = PMOESACLoss(
        actor,
        ValueOperator(Hill(), in_keys=["observation", "action"]),
        backprop=backprop,
        num_proposals=num_proposals,
        target_entropy=-0.7,
    )
    loss.make_value_estimator(gamma=0.9)
    step = {"observation": torch.zeros(5000, 1).double(), "reward": torch.zeros(5000, 1).double()}
    step.update(done=torch.ones(5000, 1).bool(), terminated=torch.ones(5000, 1).bool())
    states = TensorDict(observation=torch.zeros(5000, 1).double(), batch_size=[5000])
    states["action"], states["next"] = actor.get_dist(states).sample(), TensorDict(step, batch_size=[5000])
    found = -loss.actor_loss(states)[1]["log_prob"]
    expected = entropy_by_quadrature(score)
    error = found.std().item() / math.sqrt(len(found))
    assert abs(found.mean().item() - expected) < 4 * error < 0.06
    # log_alpha, whose gradient is the entropy above the target, is what the optimiser moves
    out = loss(states)
    out["loss_alpha"].backward()
    torch.testing.assert_close(loss.log_alpha.grad.double(), out["entropy"] + 0.7, rtol=1e-6, atol=1e-6)
    assert abs(out["entropy"].item() - expected) < 4 * error


# ------------------------------------------------------------------------------------- the target


def actor_between(low, high, **kwargs):
    spec = Bounded(torch.tensor(low).double(), torch.tensor(high).double(), dtype=torch.float64)
    return PMOEActor(2, spec=spec, in_features=OBSERVATION, **kwargs)


def plain_actor(distribution_class, spec, **kwargs):
    network = nn.Sequential(nn.Linear(OBSERVATION, 2 * (2 * ACTION + 1)), MixtureParamExtractor(2))
    return ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["logits", "loc", "scale"]),
        in_keys=["logits", "loc", "scale"],
        spec=spec,
        distribution_class=distribution_class,
        distribution_kwargs=kwargs,
    )


ACTORS = {
    "a box of its own in every dimension": (
        lambda: actor_between([-0.2, -0.5, 1.0], [0.2, 0.3, 4.0]),
        math.log(0.2) + math.log(0.4) + math.log(1.5),
        True,
    ),
    "one number for all": (lambda: actor_between([-0.05] * 3, [0.05] * 3), 3 * math.log(0.05), True),
    "bounds of the distribution": (
        lambda: plain_actor(TanhNormalMixture, Unbounded((ACTION,)), low=-0.4, high=0.4),
        3 * math.log(0.4),
        True,
    ),
    "the distribution's own defaults": (
        lambda: plain_actor(TanhNormalMixture, Bounded(-0.4, 0.4, (ACTION,))),
        0.0,
        True,
    ),
    "an unbounded policy in a box": (
        lambda: plain_actor(NormalMixture, Bounded(-0.4, 0.4, (ACTION,))),
        3 * math.log(0.4),
        False,
    ),
    "an unbounded policy": (lambda: plain_actor(NormalMixture, Unbounded((ACTION,))), 0.0, False),
}
"""By name: the actor, the log of its half-widths and whether it is bounded."""


@pytest.mark.parametrize("name", ACTORS)
def test_auto_is_minus_the_action_size_of_actions_scaled_to_one(name):
    make, log_half_widths, bounded = ACTORS[name]
    actor, critic = make(), make_critic(dtype=torch.float32)
    for kind, quantiles in ((PMOESACLoss, 1), (PMOETQCLoss, 5)):
        loss = kind(actor, make_critic(quantiles))
        assert loss.target_entropy.item() == pytest.approx(log_half_widths - ACTION, rel=1e-6)
        assert "_target_entropy" in loss.state_dict()
    largest = log_half_widths + ACTION * math.log(2)
    assert PMOESACLoss(actor, critic, target_entropy=largest - 0.01).target_entropy.item() == pytest.approx(
        largest - 0.01
    )
    if bounded:
        with pytest.raises(ValueError, match=r"PMOESACLoss: target_entropy=.* must be at most .*uniform distribution"):
            PMOESACLoss(actor, critic, target_entropy=largest + 0.01)
    else:
        assert PMOESACLoss(actor, critic, target_entropy=largest + 9).target_entropy.item() > largest


def test_the_temperature_moves_the_same_way_whatever_the_units():
    """One policy and one noise between +-1 and between +-0.05: the same gradient on log alpha."""
    gradients = []
    for half in (1.0, 0.05):
        torch.manual_seed(0)
        actor = actor_between([-half] * ACTION, [half] * ACTION).double()
        loss = PMOESACLoss(actor, make_critic(), backprop="weighted").double()
        loss.make_value_estimator(gamma=0.9)
        torch.manual_seed(1)
        batch = make_batch()
        batch["action"] = batch["action"] * half
        loss(batch)["loss_alpha"].backward()
        gradients.append(loss.log_alpha.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2,), ()])
def test_agents_count_each_for_itself(shape):
    """A policy of two agents has one entropy for each, whether the spec's container has their shape or not."""
    spec = Composite(agents=Composite(move=Bounded(-0.4, 0.4, (2, ACTION)), shape=shape))
    actor = PMOEActor(4, spec=spec, in_keys=[("agents", "seen")], in_features=OBSERVATION)
    critic = ValueOperator(make_critic().module, in_keys=[("agents", "seen"), ("agents", "move")])
    expected = ACTION * math.log(0.4) - ACTION
    assert PMOESACLoss(actor, critic).target_entropy.item() == pytest.approx(expected)


def test_the_argument_names_the_spec_of_an_actor_that_has_none():
    head = plain_actor(NormalMixture, None)
    loss = PMOESACLoss(head, make_critic(), action_spec=Bounded(-0.4, 0.4, (ACTION,)))
    assert loss.target_entropy.item() == pytest.approx(ACTION * math.log(0.4) - ACTION)
    with pytest.raises(RuntimeError, match="action spec"):
        _ = PMOESACLoss(head, make_critic()).target_entropy


@pytest.mark.parametrize("target", ["foo", None, float("nan"), float("-inf"), True])
def test_what_is_no_entropy_is_refused(target):
    with pytest.raises(ValueError, match=r"PMOESACLoss: target_entropy=.*must be 'auto' or a finite number"):
        PMOESACLoss(actor_between([-1.0] * 3, [1.0] * 3), make_critic(), target_entropy=target)
