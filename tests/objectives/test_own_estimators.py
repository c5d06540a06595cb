"""Routing estimators of a user's own: a function, or a name added to ESTIMATORS, in every critic-scored loss."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from objectives.helpers import (
    assert_compiled_equals_eager,
    make_batch,
    make_critic,
    make_onpolicy_batch,
    make_policy,
    make_value,
    router_of,
)
from torchrl_pmoe import (
    NormalMixture,
    PMOEClipPPOLoss,
    PMOESACLoss,
    PMOETQCLoss,
    RoutingGradient,
    TanhNormalMixture,
)
from torchrl_pmoe.distributions import ESTIMATORS, ExpertProposals

K, B = 4, 8
every_loss = pytest.mark.parametrize("kind", [PMOESACLoss, PMOETQCLoss, PMOEClipPPOLoss])


def soft_objective(scored):
    """The marginal, written by a user: ``sum_k w_k (alpha log pi(a_k) - Q(s, a_k))``."""
    cost = scored.temperature * scored.log_prob - scored.values
    return (scored.probs * scored.mean_over_draws(cost)).sum(-1)


def best_on_average(scored):
    """The expert whose mean value is highest is the target."""
    best = torch.nn.functional.one_hot(scored.mean_over_draws(scored.values).argmax(-1), K)
    return scored.distance_to(best)


def build(kind, actor, routing, **kwargs):
    torch.manual_seed(7)
    if kind is PMOEClipPPOLoss:
        return kind(
            actor, make_value(), make_critic(), routing=routing, entropy_bonus=False, entropy_coeff=0.25, **kwargs
        )
    loss = kind(actor, make_critic(5 if kind is PMOETQCLoss else 1), routing=routing, alpha_init=0.3, **kwargs)
    loss = loss.double()
    loss.make_value_estimator(gamma=0.9)
    return loss


def batch_for(kind, actor):
    return make_onpolicy_batch(actor, B) if kind is PMOEClipPPOLoss else make_batch(B)


def routing_of(loss, batch):
    """Routing loss and its gradient on the router's parameters, on the same draws each time."""
    torch.manual_seed(1)
    value = loss(batch.copy())["loss_routing"]
    return value, *torch.autograd.grad(value.sum(), list(router_of(loss.actor_network).parameters()))


@every_loss
@pytest.mark.parametrize("num_proposals", [1, 3])
@pytest.mark.parametrize("score", ["mixture", "expert"])
def test_a_function_trains_the_router_as_the_built_in_one_of_the_same_formula(kind, num_proposals, score):
    actor = make_policy(K, score=score)
    batch = batch_for(kind, actor)
    options = {"num_proposals": num_proposals, "routing_coef": 0.7}
    own, built_in = (routing_of(build(kind, actor, r, **options), batch) for r in (soft_objective, "marginal"))
    torch.testing.assert_close(own, built_in)
    assert own[1].abs().max() > 1e-4


@every_loss
@pytest.mark.parametrize("loss", ["brier", "log"])
def test_distance_to_is_the_loss_that_routing_loss_names(kind, loss):
    expected = []

    def best_on_average_by_hand(scored):
        best = torch.nn.functional.one_hot(scored.values.argmax(-1), K)
        terms = (scored.probs - best).square() / K if loss == "brier" else -best * scored.probs.log()
        expected.append(terms.sum(-1).mean())
        return best_on_average(scored)

    actor = make_policy(K)
    found = build(kind, actor, best_on_average_by_hand, routing_loss=loss)(batch_for(kind, actor))["loss_routing"]
    torch.testing.assert_close(found, expected[0])


@every_loss
@pytest.mark.parametrize("num_proposals", [1, 3])
def test_what_was_scored_has_the_documented_shapes_and_only_the_router_has_a_gradient(kind, num_proposals):
    seen = []

    def look(scored):
        seen.append(scored)
        return scored.probs.sum(-1)

    actor = make_policy(K)
    build(kind, actor, look, num_proposals=num_proposals)(batch_for(kind, actor))
    (scored,) = seen
    draws = () if num_proposals == 1 else (num_proposals,)
    assert scored.num_draws == (None if num_proposals == 1 else num_proposals)
    assert scored.logits.shape == scored.probs.shape == (B, K)
    assert scored.values.shape == scored.log_prob.shape == (*draws, B, K)
    assert scored.draw_expert().shape == (*draws, B)
    mean = scored.values.reshape(num_proposals, B, K).sum(0) / num_proposals
    torch.testing.assert_close(scored.mean_over_draws(scored.values), mean)
    assert scored.distance_to(torch.full((B, K), 1 / K)).shape == (B,)
    assert scored.temperature.item() == pytest.approx(0.25 if kind is PMOEClipPPOLoss else 0.3)
    constants = (scored.values, scored.log_prob, scored.temperature)
    assert not any(constant.requires_grad for constant in constants)
    assert scored.logits.requires_grad


@every_loss
def test_a_name_that_is_added_is_a_routing_from_then_on(kind, monkeypatch):
    actor = make_policy(K)
    with pytest.raises(ValueError, match="'soft objective' is unknown"):
        build(kind, actor, "soft objective")
    monkeypatch.setitem(ESTIMATORS, "soft objective", soft_objective)
    loss = build(kind, actor, "soft objective")
    assert loss.routing == "soft objective"
    batch = batch_for(kind, actor)
    torch.testing.assert_close(routing_of(loss, batch), routing_of(build(kind, actor, "marginal"), batch))
    with pytest.raises(ValueError, match=r"allowed: frequency.*none, soft objective, or a function"):
        build(kind, actor, "another")


@every_loss
@pytest.mark.parametrize("routing", list(ESTIMATORS))
def test_every_built_in_estimator_is_a_member_and_a_name(kind, routing):
    actor = make_policy(K)
    assert all(
        build(kind, actor, given).routing is RoutingGradient(routing)
        for given in (routing, routing.upper(), RoutingGradient(routing))
    )


@every_loss
@pytest.mark.parametrize(
    ("routing", "fault"),
    [
        ("foo", "routing='foo' is unknown"),
        (None, "routing=None is unknown"),
        (3, "routing=3 is unknown"),
        (NormalMixture, "routing=.*NormalMixture'> is unknown"),
        ("gumbel_softmax", "routing='gumbel_softmax' does not exist here"),
        (RoutingGradient.GUMBEL_SOFTMAX, "routing='gumbel_softmax' does not exist here"),
    ],
)
def test_anything_else_is_refused_with_what_is_allowed(kind, routing, fault):
    allowed = "frequency, soft_frequency, score_function, marginal, none, or a function from ScoredProposals to a loss"
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: {fault}; allowed: {allowed} \[\*B\]\.$"):
        build(kind, make_policy(K), routing)


@pytest.mark.parametrize("cls", [NormalMixture, TanhNormalMixture])
def test_a_distribution_takes_no_function(cls):
    loc = torch.zeros(2, K, 3)
    with pytest.raises(ValueError, match="allowed: frequency, soft_frequency, gumbel_softmax, none"):
        cls(loc[..., 0], loc, loc + 1, routing=soft_objective)


@every_loss
def test_a_loss_that_is_not_one_number_a_state_is_refused(kind):
    actor = make_policy(K)
    loss = build(kind, actor, lambda scored: scored.probs - scored.values)
    with pytest.raises(ValueError, match=r"routing must return a loss of shape \(8,\), one .*, got shape \(8, 4\)"):
        loss(batch_for(kind, actor))


@every_loss
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copied_loss_keeps_its_function(kind, copied):
    actor = make_policy(K)
    batch = batch_for(kind, actor)
    loss = build(kind, actor, soft_objective)
    other = copied(loss)
    assert other.routing is soft_objective
    torch.manual_seed(1)
    value = other(batch.copy())["loss_routing"]
    torch.testing.assert_close(value, routing_of(loss, batch)[0])


def test_densities_are_computed_for_estimators_that_read_them(monkeypatch):
    """The mixture's density costs K^2; the paper's PPO does not need it."""

    def computed(self):
        raise AssertionError

    monkeypatch.setattr(ExpertProposals, "log_prob", computed)
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    for routing in ("frequency", "none", best_on_average):
        build(PMOEClipPPOLoss, actor, routing)(batch.copy())
    with pytest.raises(AssertionError):
        build(PMOEClipPPOLoss, actor, soft_objective)(batch.copy())


def test_a_compiled_loss_takes_a_function_too():
    actor = make_policy(K)
    loss = build(PMOEClipPPOLoss, actor, soft_objective)
    batch = make_onpolicy_batch(actor, B)
    loss(batch.copy())
    assert_compiled_equals_eager(loss, batch, list(router_of(actor).parameters()))
