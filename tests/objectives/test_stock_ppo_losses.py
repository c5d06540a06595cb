"""TorchRL's own on-policy losses train a mixture actor and its router, unmodified."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import distributions as D
from torch import nn
from torchrl.data import Bounded, Unbounded
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal
from torchrl.objectives import A2CLoss, ClipPPOLoss, KLPENPPOLoss, PPOLoss, ReinforceLoss

from objectives.helpers import (
    ACTION,
    OBSERVATION,
    Features,
    Table,
    assert_compiled_equals_eager,
    central_differences,
    make_batch,
    make_onpolicy_batch,
    make_policy,
    make_table,
    make_value,
    pre_tanh_reference,
    router_of,
    total,
)
from torchrl_pmoe import NormalMixture, PMOEActor

K, B, EPSILON = 4, 8, 0.2
KINDS = [ClipPPOLoss, PPOLoss, KLPENPPOLoss, A2CLoss, ReinforceLoss]
BOUNDED = pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])


def build(kind, actor, **kwargs):
    if kind is KLPENPPOLoss:
        kwargs = {"increment": 1.0, "decrement": 1.0, **kwargs}  # the penalty's factor stays what it is
    if kind is not ReinforceLoss:
        kwargs = {"entropy_bonus": False, **kwargs}
    return kind(actor, make_value(next(actor.parameters()).dtype), **kwargs)


def objective_of(losses):
    return losses.get("loss_actor", losses.get("loss_objective"))


def table_loss(kind, bounded=True, **distribution_kwargs):
    """A loss whose actor's parameters are logits, loc and scale themselves, its batch, and the objective per state."""
    table = make_table(B, K)
    actor = make_policy(K, bounded=bounded, network=table, **distribution_kwargs)
    batch = make_onpolicy_batch(actor, B)
    loss = build(kind, actor, reduction="none")

    def objective():
        torch.manual_seed(1)  # KLPENPPOLoss draws
        return objective_of(loss(batch.copy()))

    return table.features, batch, objective


def densities(features, batch, bounded):
    """Joint log-densities ``log w_k + log pi_k(a)`` ``[B, K]`` of the stored actions, by ``torch.distributions``."""
    logits, loc, scale = features.split((K, K * ACTION, K * ACTION), -1)
    experts = D.Independent(D.Normal(loc.unflatten(-1, (K, ACTION)), scale.unflatten(-1, (K, ACTION))), 1)
    if bounded:
        experts = D.TransformedDistribution(experts, D.TanhTransform())
    return logits.log_softmax(-1) + experts.log_prob(batch["action"].unsqueeze(1))


# ---------------------------------------------------------------------- gradients of the objective


@pytest.mark.parametrize("log_prob_routing", ["exact", "frequency"])
@BOUNDED
@pytest.mark.parametrize("kind", KINDS)
def test_stock_loss_trains_experts_and_router(kind, bounded, log_prob_routing):
    actor = make_policy(K, bounded=bounded, log_prob_routing=log_prob_routing)
    loss = build(kind, actor, **({} if kind is ReinforceLoss else {"entropy_bonus": True}))
    losses = loss(make_onpolicy_batch(actor, B))
    network = actor[0].module[0]
    parameters = [network.router.weight, network.experts.weight]
    for key in losses.keys() & {"loss_objective", "loss_actor", "loss_entropy"}:
        for gradient in torch.autograd.grad(losses[key], parameters, retain_graph=True):
            assert gradient.isfinite().all()
            assert gradient.norm() > 0


@BOUNDED
@pytest.mark.parametrize("kind", [ClipPPOLoss, PPOLoss])
def test_objective_is_the_surrogate_of_the_mixtures_density(kind, bounded):
    features, batch, objective = table_loss(kind, bounded)
    ratio = (densities(features, batch, bounded).logsumexp(-1) - batch["action_log_prob"]).exp()
    advantage = batch["advantage"].squeeze(-1)
    expected = ratio * advantage
    if kind is ClipPPOLoss:
        expected = torch.minimum(expected, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
    torch.testing.assert_close(objective(), -expected)


@BOUNDED
@pytest.mark.parametrize("kind", KINDS)
def test_exact_gradients_are_finite_differences(kind, bounded):
    features, _, objective = table_loss(kind, bounded)
    (gradient,) = torch.autograd.grad(objective().sum(), features)
    torch.testing.assert_close(gradient, central_differences(objective, features), rtol=1e-6, atol=1e-8)


@BOUNDED
@pytest.mark.parametrize("kind", KINDS)
def test_frequency_form_leaves_loc_and_scale_their_exact_gradient(kind, bounded):
    features, _, objective = table_loss(kind, bounded, log_prob_routing="frequency")
    (gradient,) = torch.autograd.grad(objective().sum(), features)
    expected = central_differences(objective, features)
    torch.testing.assert_close(gradient[:, K:], expected[:, K:], rtol=1e-6, atol=1e-8)


@BOUNDED
@pytest.mark.parametrize("kind", [ClipPPOLoss, PPOLoss, A2CLoss, ReinforceLoss])
def test_frequency_form_pulls_the_logits_to_the_likeliest_expert_where_the_density_rises(kind, bounded):
    """And away from the responsibilities where it falls."""
    features, batch, objective = table_loss(kind, bounded, log_prob_routing="frequency")
    (gradient,) = torch.autograd.grad(objective().sum(), features)
    joint = densities(features.detach(), batch, bounded)
    advantage = batch["advantage"]
    ratio = (joint.logsumexp(-1) - batch["action_log_prob"]).exp().unsqueeze(-1)
    h = -advantage * (ratio if kind in (ClipPPOLoss, PPOLoss) else 1.0)
    if kind is ClipPPOLoss:
        h = h * ~torch.where(advantage > 0, ratio > 1 + EPSILON, ratio < 1 - EPSILON)
    assert (h < 0).any()
    assert (h > 0).any()
    w, r = features[:, :K].detach().softmax(-1), joint.softmax(-1)
    best = torch.eye(K, dtype=r.dtype)[r.argmax(-1)]
    expected = torch.where(h < 0, h * (best - w), h * (r - w))
    torch.testing.assert_close(gradient[:, :K], expected)


@pytest.mark.parametrize("log_prob_routing", ["exact", "frequency"])
@BOUNDED
def test_clipped_samples_do_not_move_the_policy(bounded, log_prob_routing):
    features, batch, objective = table_loss(ClipPPOLoss, bounded, log_prob_routing=log_prob_routing)
    (gradient,) = torch.autograd.grad(objective().sum(), features)
    ratio = (densities(features.detach(), batch, bounded).logsumexp(-1) - batch["action_log_prob"]).exp()
    better = batch["advantage"].squeeze(-1) > 0
    clipped = torch.where(better, ratio > 1 + EPSILON, ratio < 1 - EPSILON)
    assert (clipped & better).any()
    assert (clipped & ~better).any()
    assert (gradient[clipped] == 0).all()
    assert (gradient[~clipped].abs().amax(-1) > 0).all()


# ---------------------------------------------------------------------- the entropy bonus

ROW = torch.tensor([0.4, -0.6, -0.8, 1.1, 0.5, 0.9], dtype=torch.float64)  # logits, loc, scale of two experts in 1-D
DRAWS = 100_000


def quadrature_entropy(row, bounded):
    logits, loc, scale = row.split(2)
    u = torch.linspace(-14.0, 14.0, 20_001, dtype=row.dtype)
    log_density = pre_tanh_reference(logits, loc.unsqueeze(-1), scale.unsqueeze(-1)).log_prob(u.unsqueeze(-1))
    log_slope = -2.0 * u.cosh().log() if bounded else 0.0
    return torch.trapezoid(log_density.exp() * (log_slope - log_density), u)


@BOUNDED
@pytest.mark.parametrize("kind", [ClipPPOLoss, A2CLoss])
def test_entropy_bonus_and_its_gradient_are_unbiased(kind, bounded):
    """Many copies of one state against quadrature, within four standard errors."""
    spec = Bounded(-1, 1, (1,), dtype=torch.float64) if bounded else Unbounded((1,), dtype=torch.float64)
    table = Table(ROW.repeat(DRAWS, 1))
    options = {} if bounded else {"distribution_class": NormalMixture}
    actor = PMOEActor(2, spec=spec, network=table, scale_mapping=nn.Identity(), return_log_prob=True, **options)
    batch = make_batch(DRAWS).set("action", torch.zeros(DRAWS, 1, dtype=torch.float64))
    batch["advantage"] = batch["value_target"] = torch.zeros(DRAWS, 1, dtype=torch.float64)
    batch["action_log_prob"] = torch.zeros(DRAWS, dtype=torch.float64)
    losses = build(kind, actor, entropy_bonus=True, entropy_coeff=0.5, reduction="none")(batch)
    entropy = -2.0 * losses["loss_entropy"]
    (slope,) = torch.autograd.grad(entropy.sum(), table.features)
    entropy = entropy.detach()

    assert (entropy.mean() - quadrature_entropy(ROW, bounded)).abs() < 4 * entropy.std() / DRAWS**0.5
    torch.testing.assert_close(losses["entropy"], entropy.mean())
    expected = central_differences(lambda: quadrature_entropy(row, bounded), row := ROW.clone(), step=1e-5)
    error = slope.std(0) / DRAWS**0.5
    assert ((slope.mean(0) - expected).abs() < 4 * error).all()
    assert (expected[:2].abs() > 20 * error[:2]).all()  # what reaches the router is not noise about zero


@BOUNDED
@pytest.mark.parametrize("kind", [ClipPPOLoss, A2CLoss])
def test_gradient_of_the_entropy_bonus_is_a_finite_difference_at_the_same_draws(kind, bounded):
    table = make_table(B, K)
    actor = make_policy(K, bounded=bounded, network=table)
    batch = make_onpolicy_batch(actor, B)
    loss = build(kind, actor, entropy_bonus=True, reduction="none")

    def bonus():
        torch.manual_seed(1)
        return loss(batch.copy())["loss_entropy"]

    (gradient,) = torch.autograd.grad(bonus().sum(), table.features)
    torch.testing.assert_close(gradient, central_differences(bonus, table.features), rtol=1e-6, atol=1e-9)


@BOUNDED
@pytest.mark.parametrize("kind", [ClipPPOLoss, PPOLoss, KLPENPPOLoss, A2CLoss])
def test_nothing_routes_through_the_entropy_bonus(kind, bounded):
    actor = make_policy(K, bounded=bounded)
    batch = make_onpolicy_batch(actor, B)
    loss = build(kind, actor, entropy_bonus=True)
    parameters = list(actor.parameters())
    gradients = []
    for routing in ("none", "frequency", "soft_frequency"):
        actor[-1].distribution_kwargs["routing"] = routing
        assert str(actor.get_dist(batch.copy()).routing) == routing
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(total(loss(batch.copy())), parameters, allow_unused=True))
    for other in gradients[1:]:
        for ours, theirs in zip(other, gradients[0], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [ClipPPOLoss, A2CLoss])
def test_ratio_and_entropy_are_the_mixtures_whatever_the_score(kind):
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    loss = build(kind, actor, entropy_bonus=True)
    found = []
    for score in ("mixture", "expert"):
        actor[-1].distribution_kwargs["score"] = score
        torch.manual_seed(1)
        found.append(loss(batch.copy()))
    assert all(torch.equal(found[0][key], found[1][key]) for key in ("loss_objective", "loss_entropy"))


# ---------------------------------------------------------------------- the ratio before the first step

BOXES = {
    "symmetric": (-torch.ones(ACTION), torch.ones(ACTION)),
    "asymmetric": (torch.tensor([-0.4, -1.0, 0.1]), torch.tensor([2.0, 1.0, 0.7])),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("saturated", [False, True], ids=["ordinary", "saturated"])
@pytest.mark.parametrize("box", ["symmetric", "asymmetric", None])
def test_ratio_is_one_before_the_first_step(box, saturated, dtype, tolerance):
    """Also for actions that rounding puts onto a bound."""
    low, high = (x.to(dtype) for x in BOXES[box or "symmetric"])
    network = Features(K).to(dtype)
    if saturated:
        with torch.no_grad():
            network.experts.bias[: K * ACTION] = 20.0 * torch.randn(K * ACTION).sign()
    actor = PMOEActor(
        K,
        spec=Unbounded((ACTION,), dtype=dtype) if box is None else Bounded(low, high, (ACTION,), dtype=dtype),
        network=network,
        return_log_prob=True,
        **({"distribution_class": NormalMixture} if box is None else {}),
    )
    with torch.no_grad():
        collected = actor(make_batch(256, dtype).exclude("action"))
    if box is not None and saturated:
        for bound in (low, high):
            assert (collected["action"] == bound).any(0).any()
    collected["advantage"] = collected["value_target"] = torch.randn(256, 1, dtype=dtype)
    loss = build(ClipPPOLoss, actor)
    for rows in torch.randperm(256).split(37):
        batch = collected[rows]
        log_weight = loss._log_weight(batch, batch.batch_size)[0]
        assert log_weight.abs().max() <= tolerance
        losses = loss(batch)
        assert losses["kl_approx"].abs() <= tolerance
        assert (losses["max_ratio"] - 1).abs() <= tolerance
        assert losses["clip_fraction"] == 0


# ---------------------------------------------------------------------- one expert


class OneExpert(nn.Module):
    """Loc and scale from the layer of ``Features``, as the mixture's head reads it."""

    def __init__(self, network):
        super().__init__()
        self.experts = nn.Linear(OBSERVATION, 2 * ACTION, dtype=network.experts.weight.dtype)
        self.experts.load_state_dict(network.experts.state_dict())

    def forward(self, observation):
        loc, log_scale = self.experts(observation).chunk(2, -1)
        return loc, log_scale.exp()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {"rtol": 1e-9, "atol": 1e-12}), (torch.float32, {})],
    ids=["float64", "float32"],
)
@BOUNDED
@pytest.mark.parametrize("kind", [ClipPPOLoss, A2CLoss])
def test_with_one_expert_the_loss_is_that_of_a_gaussian(kind, bounded, dtype, tolerance):
    ours = make_policy(1, dtype, bounded=bounded)
    head = OneExpert(ours[0].module[0])
    theirs = ProbabilisticActor(
        TensorDictModule(head, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-1, 1, (ACTION,), dtype=dtype) if bounded else Unbounded((ACTION,), dtype=dtype),
        distribution_class=TanhNormal if bounded else IndependentNormal,
        return_log_prob=True,
    )
    batch = make_onpolicy_batch(ours, B, dtype).exclude("logits", "loc", "scale")
    loss = build(kind, ours)
    stock = build(kind, theirs)
    stock.critic_network_params.data.copy_(loss.critic_network_params.data)
    found, wanted = loss(batch.copy()), stock(batch.copy())
    assert set(found.keys()) == set(wanted.keys())
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], **tolerance)
    total(found).backward()
    total(wanted).backward()
    layer = ours[0].module[0].experts
    torch.testing.assert_close(layer.weight.grad, head.experts.weight.grad, **tolerance)
    torch.testing.assert_close(layer.bias.grad, head.experts.bias.grad, **tolerance)
    assert router_of(ours).weight.grad.abs().max() <= torch.finfo(dtype).eps


# ---------------------------------------------------------------------- compiled


def test_compiled_loss_equals_eager():
    actor = make_policy(K, log_prob_routing="frequency")
    batch = make_onpolicy_batch(actor, B)
    loss = build(ClipPPOLoss, actor, entropy_bonus=True)
    assert_compiled_equals_eager(loss, batch, list(actor.parameters()))
