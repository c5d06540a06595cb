"""routing="score_function" in the critic-scored losses: on average over the drawn expert it is the marginal."""

from __future__ import annotations

import math

import pytest
import torch

from objectives.helpers import (
    make_actor,
    make_batch,
    make_critic,
    make_onpolicy_batch,
    make_policy,
    make_table,
    make_value,
    router_of,
    total,
)
from torchrl_pmoe import NormalMixture, PMOEClipPPOLoss, PMOESACLoss, PMOETQCLoss

K, B = 4, 8
KINDS = [PMOESACLoss, PMOETQCLoss, PMOEClipPPOLoss]
every_loss = pytest.mark.parametrize("kind", KINDS)
PROPOSALS = pytest.mark.parametrize("num_proposals", [1, 3])


def build(kind, actor, routing="score_function", **kwargs):
    if kind is PMOEClipPPOLoss:
        kwargs = {"entropy_bonus": False, "entropy_coeff": 0.25, **kwargs}
        return PMOEClipPPOLoss(actor, make_value(), make_critic(), routing=routing, **kwargs)
    critic = make_critic(5 if kind is PMOETQCLoss else 1)
    kwargs = {"alpha_init": 0.3, "scalar_output_mode": "exclude", "backprop": "weighted", **kwargs}
    loss = kind(actor, critic, routing=routing, **kwargs).double()
    loss.make_value_estimator(gamma=0.9)
    return loss


def pair(kind, actor, **kwargs):
    """The estimate and what it estimates, with the same critics."""
    estimate, exact = build(kind, actor, **kwargs), build(kind, actor, routing="marginal", **kwargs)
    exact.qvalue_network_params.data.copy_(estimate.qvalue_network_params.data)
    return estimate, exact


def batch_for(kind, actor, size=B):
    return make_onpolicy_batch(actor, size) if kind is PMOEClipPPOLoss else make_batch(size)


def routing_loss(loss, batch):
    torch.manual_seed(1)  # the same proposals
    if isinstance(loss, PMOEClipPPOLoss):
        return loss(batch.copy())["loss_routing"]
    return loss.actor_loss(batch.copy())[1]["loss_routing"]


@every_loss
@PROPOSALS
@pytest.mark.parametrize("score", ["mixture", "expert"])
def test_its_mean_over_the_drawn_expert_is_the_marginals_gradient(kind, num_proposals, score, monkeypatch):
    """Every expert in turn is the drawn one, weighted by the router's probability: exactly, not on average."""
    actor = make_policy(K, score=score)
    batch = batch_for(kind, actor)
    options = {"num_proposals": num_proposals, "reduction": "none", "routing_coef": 0.7}
    estimate, exact = pair(kind, actor, **options)
    probs = actor.get_dist(batch.copy()).probs.detach()
    expected = torch.autograd.grad(routing_loss(exact, batch).mean(), router_of(actor).parameters())
    mean = 0.0
    for z in range(K):
        with monkeypatch.context() as patch:
            patch.setattr(
                NormalMixture, "sample_expert", lambda self, shape=(), z=z: torch.full((*shape, *self.batch_shape), z)
            )
            mean = mean + (probs[:, z] * routing_loss(estimate, batch)).mean()
    found = torch.autograd.grad(mean, router_of(actor).parameters())
    torch.testing.assert_close(found, expected)
    assert all(x.any() for x in expected)


@every_loss
@PROPOSALS
def test_its_mean_over_many_draws_is_the_marginals_gradient(kind, num_proposals):
    """The same state a thousandfold; the parameters of each row's mixture are leaves."""
    rows = 4000
    table = make_table(1, K)
    table.features = torch.nn.Parameter(table.features.detach().repeat(rows, 1))
    actor = make_policy(K, network=table)
    batch = batch_for(kind, actor, rows)
    batch["observation"] = batch["observation"][:1].repeat(rows, 1)
    estimate, exact = pair(kind, actor, num_proposals=num_proposals, reduction="sum")
    rowwise = [torch.autograd.grad(routing_loss(x, batch), table.features)[0][:, :K] for x in (estimate, exact)]
    difference = rowwise[0] - rowwise[1]
    standard_error = difference.std(0) / math.sqrt(rows)
    assert (difference.mean(0).abs() < 4 * standard_error).all()
    assert (standard_error < 0.2 * rowwise[1].mean(0).norm()).all()
    assert (difference.std(0) > 0).all()


@every_loss
def test_it_trains_the_router_alone(kind):
    actor = make_policy(K)
    loss = build(kind, actor)
    routing_loss(loss, batch_for(kind, actor)).backward()
    assert router_of(actor).weight.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in actor[0].module[0].experts.parameters())
    assert all(p.grad is None or not p.grad.any() for p in loss.qvalue_network_params.values(True, True))


@every_loss
@PROPOSALS
def test_unreduced_it_is_one_number_per_state_and_reduced_their_mean(kind, num_proposals):
    actor = make_policy(K)
    batch = batch_for(kind, actor)
    rows, mean = (build(kind, actor, num_proposals=num_proposals, reduction=x) for x in ("none", "mean"))
    mean.qvalue_network_params.data.copy_(rows.qvalue_network_params.data)
    unreduced = routing_loss(rows, batch)
    assert unreduced.shape == (B,)
    torch.testing.assert_close(routing_loss(mean, batch), unreduced.mean())


@pytest.mark.parametrize("kind", [PMOESACLoss, PMOETQCLoss])
@pytest.mark.parametrize("backprop", ["max", "all", "routed", "weighted"])
@PROPOSALS
def test_it_goes_with_every_backprop(kind, backprop, num_proposals):
    actor = make_actor(K)
    total(build(kind, actor, backprop=backprop, num_proposals=num_proposals)(make_batch(B))).backward()
    network = actor[0].module[0]
    for p in (*network.router.parameters(), *network.experts.parameters()):
        assert p.grad.any()
        assert p.grad.isfinite().all()


@every_loss
def test_one_expert_has_nothing_to_route(kind):
    actor = make_policy(1)
    loss = routing_loss(build(kind, actor), batch_for(kind, actor))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, router_of(actor).weight)[0].any()
