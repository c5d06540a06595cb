"""TorchRL's own losses train a mixture actor and its router, unmodified (gradient-scored)."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution
from torchrl.modules.distributions.utils import rsample_and_log_prob
from torchrl.objectives import CQLLoss, CrossQLoss, REDQLoss, SACLoss, TQCLoss

from objectives.helpers import make_actor, make_batch, make_blind_critic, make_critic, router_of
from torchrl_pmoe import RoutingGradient, TanhNormalMixture

ROUTINGS = ["frequency", "soft_frequency"]


def build(kind, actor, *, blind=False, **kwargs):
    critic = (make_blind_critic if blind else make_critic)(5 if kind is TQCLoss else 1)
    if kind is REDQLoss:
        kwargs = {"num_qvalue_nets": 3, "sub_sample_len": 2, **kwargs}
    loss = kind(actor, critic, **kwargs)
    loss.make_value_estimator(gamma=0.9)
    return loss.double()


@pytest.mark.parametrize("routing", [*ROUTINGS, "gumbel_softmax"])
@pytest.mark.parametrize("kind", [SACLoss, TQCLoss, CrossQLoss, CQLLoss, REDQLoss])
def test_stock_loss_trains_experts_and_router(kind, routing):
    torch.manual_seed(0)
    actor = make_actor(routing=routing)
    losses = build(kind, actor)(make_batch())
    losses["loss_actor"].sum().backward()
    network = actor[0].module[0]
    assert network.router.weight.grad.norm() > 0
    assert network.experts.weight.grad.norm() > 0
    assert network.router.weight.grad.isfinite().all()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", [SACLoss, TQCLoss, CrossQLoss, CQLLoss, REDQLoss])
def test_entropy_term_never_routes(kind, routing):
    """Where the critics do not see the action, only the entropy term is left."""
    torch.manual_seed(0)
    actor = make_actor(routing=routing)
    losses = build(kind, actor, blind=True)(make_batch())
    losses["loss_actor"].sum().backward()
    assert router_of(actor).weight.grad.norm() == 0
    assert actor[0].module[0].experts.weight.grad.norm() > 0


@pytest.mark.parametrize("routing", ROUTINGS)
def test_cloning_term_of_cql_gives_the_router_the_likelihood_alone(routing):
    torch.manual_seed(0)
    actor, batch = make_actor(routing=routing), make_batch()
    loss = build(CQLLoss, actor)
    cloning, _ = loss.actor_bc_loss(batch)
    cloning.backward()
    found = router_of(actor).weight.grad.clone()
    actor.zero_grad()
    (-actor.get_dist(batch).log_prob(batch["action"])).mean().backward()
    torch.testing.assert_close(found, router_of(actor).weight.grad)


def routing_gradient(routing, reduction="mean", edit=None, **kwargs):
    torch.manual_seed(0)
    actor, batch = make_actor(routing=routing), make_batch()
    if edit is not None:
        batch = edit(batch)
    loss = build(SACLoss, actor, reduction=reduction, scalar_output_mode="exclude", **kwargs)
    torch.manual_seed(1)
    value, _ = loss.actor_loss(batch)
    value.sum().backward()
    return router_of(actor).weight.grad


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_routing_does_not_depend_on_the_reduction(routing, reduction):
    torch.testing.assert_close(routing_gradient(routing, reduction), routing_gradient(routing))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_does_not_depend_on_sample_weights(routing):
    def weigh(batch):
        return batch.set("priority_weight", torch.linspace(0.1, 3.0, len(batch), dtype=torch.float64))

    torch.testing.assert_close(routing_gradient(routing, edit=weigh), routing_gradient(routing))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_masked_states_do_not_route(routing):
    """A masked state contributes nothing, and the others what they would without the mask."""

    def mask(batch):
        return batch.set(("collector", "mask"), torch.arange(len(batch)) < 5)

    def blank(batch):
        observation = batch["observation"].clone()
        observation[5:] = 0.0
        return batch.set("observation", observation)

    # the router is linear in the observation: a state of zeros gives its weight no gradient
    masked = routing_gradient(routing, edit=lambda batch: blank(mask(batch)))
    unmasked = routing_gradient(routing, edit=blank)
    torch.testing.assert_close(masked, unmasked)
    assert not torch.allclose(routing_gradient(routing, edit=mask), routing_gradient(routing))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_redq_routes_its_own_states_and_not_the_next_ones(routing):
    """REDQ draws for states and next states in one call: half of B routes, so routing_coef=2 makes up for it."""
    torch.manual_seed(0)
    actor, batch = make_actor(routing=routing, routing_coef=2.0), make_batch()
    loss = build(REDQLoss, actor)
    found = []
    hook_on = type(actor[-1]).get_dist

    def spy(self, params):
        dist = hook_on(self, params)
        dist.logits = dist.logits.clone()
        dist.logits.retain_grad()
        found.append(dist)
        return dist

    type(actor[-1]).get_dist = spy
    try:
        loss(batch)["loss_actor"].sum().backward()
    finally:
        type(actor[-1]).get_dist = hook_on
    gradient = found[0].logits.grad
    assert gradient.shape == (2, 8, 4)
    assert gradient[1].abs().max() == 0
    # 2 (w - v) through the softmax, over B K of one half
    probs = found[0].probs[0].detach()
    if RoutingGradient(routing) is RoutingGradient.FREQUENCY:
        candidates = []
        for k in range(4):
            v = torch.eye(4, dtype=torch.float64)[k]
            slope = 2.0 * (probs - v) / (8 * 4)
            candidates.append(probs * (slope - (probs * slope).sum(-1, keepdim=True)))
        gap = (torch.stack(candidates) - gradient[0]).abs().amax(-1).amin(0)
        assert gap.max() < 1e-12


def test_composite_actor_routes_through_its_leaf():
    logits = torch.zeros(3, 2, requires_grad=True)
    dist = CompositeDistribution(
        TensorDict({"move": {"logits": logits, "loc": torch.randn(3, 2, 2), "scale": torch.ones(3, 2, 2)}}, [3]),
        distribution_map={"move": TanhNormalMixture},
    )
    sample, _ = rsample_and_log_prob(dist)
    sample["move"].sum().backward()
    assert logits.grad.norm() > 0
