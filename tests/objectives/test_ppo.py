"""PMOEClipPPOLoss against TorchRL's ClipPPOLoss and against formulas written out independently."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from tensordict.nn import CompositeDistribution, TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss

from objectives.helpers import (
    ACTION,
    OBSERVATION,
    Features,
    Mean,
    assert_compiled_equals_eager,
    central_differences,
    make_batch,
    make_critic,
    make_onpolicy_batch,
    make_policy,
    make_table,
    make_value,
    moved_by,
    pre_tanh_reference,
    router_of,
    total,
)
from torchrl_pmoe import (
    MixtureParamExtractor,
    NormalMixture,
    PMOEActor,
    PMOEClipPPOLoss,
    TanhNormalMixture,
)
from torchrl_pmoe.distributions import ESTIMATORS, ScoredProposals, mixture

K, B = 4, 8
ALPHA = 0.25  # the entropy coefficient, exact in every dtype
OURS = ["loss_routing", "loss_qvalue", "routing_entropy", "expert_usage", "best_expert_value"]


def build(actor, value=None, critic=None, **kwargs):
    dtype = next(actor.parameters()).dtype
    kwargs = {"entropy_bonus": False, "entropy_coeff": ALPHA, **kwargs}
    return PMOEClipPPOLoss(actor, value or make_value(dtype), critic or make_critic(dtype=dtype), **kwargs)


def rollout(actor, time=6):
    """Two trajectories ``[2, T]`` without an advantage."""
    batch = make_batch(2 * time).reshape(2, time)
    batch["next", "done"][0, -1] = batch["next", "terminated"][0, -1] = True
    with torch.no_grad():
        batch["action_log_prob"] = actor.get_dist(batch.copy()).log_prob(batch["action"]) - 0.1
    return batch


def fix_draws(monkeypatch, num_proposals=1, batch=(B,), experts=K):
    """Noise ``[M, *B, K, A]``, which every later draw of proposals gets."""
    noise = torch.randn(num_proposals, *batch, experts, ACTION, dtype=torch.float64)
    monkeypatch.setattr(mixture.torch, "randn", lambda shape, **_: noise.reshape(shape))
    return noise


def q_values(loss, observation, action):
    """``[N, ...]``, every network by itself."""
    values = []
    stacked = loss.qvalue_network_params.detach()
    for params in stacked.unbind(0) if loss.num_qvalue_nets > 1 else [stacked]:
        with params.to_module(loss.qvalue_network, preserve_module_state=False):
            values.append(loss.qvalue_network(observation, action).squeeze(-1))
    return torch.stack(values)


def target_of(loss, dist, batch, noise):
    """Frequency ``v`` ``[B, K]``, or for the marginal the cost of each expert, by the docstring's formulas."""
    logits, loc, scale = dist.logits.detach(), dist.loc.detach(), dist.scale.detach()
    u = loc + scale * noise
    log_slope = -2.0 * u.cosh().log().sum(-1)
    q = torch.empty(u.shape[:-1], dtype=u.dtype)
    density = torch.empty_like(q)
    for k in range(K):
        q[..., k] = torch.stack([q_values(loss, batch["observation"], x).amin(0) for x in u[..., k, :].tanh()])
        if dist.score == "mixture":
            normal = pre_tanh_reference(logits, loc, scale).log_prob(u[..., k, :])
        else:
            normal = torch.distributions.Normal(loc[:, k], scale[:, k]).log_prob(u[..., k, :]).sum(-1)
        density[..., k] = normal - log_slope[..., k]
    if loss.routing == "marginal":
        return (ALPHA * density - q).mean(0)
    if loss.routing == "frequency":
        return torch.eye(K, dtype=q.dtype)[q.argmax(-1)].mean(0)
    v = (q / ALPHA - density).mean(0).exp() * (logits.softmax(-1) if dist.score == "mixture" else 1.0)
    return v / v.sum(-1, keepdim=True)


def reference(loss, logits, target):
    """Routing loss ``[B]``."""
    w = logits.softmax(-1)
    if loss.routing == "none":
        return torch.zeros(len(w), dtype=w.dtype)
    if loss.routing == "marginal":
        return loss.routing_coef * (w * target).sum(-1)
    if loss.routing_loss == "log":
        return -loss.routing_coef * (target * w.log()).sum(-1)
    return loss.routing_coef * (w - target).square().mean(-1)


# ---------------------------------------------------------------------- what the parent gives stays


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"entropy_bonus": True},
        {"clip_epsilon": (0.1, 0.3), "normalize_advantage": True, "loss_critic_type": "l2"},
        {"delay_actor": True, "max_importance_ratio": 1.2},
        {"clip_value": 0.2, "critic_coeff": 0.5, "reduction": "sum"},
        {"critic_coeff": 0.0, "reduction": "none"},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_the_parents_losses_are_unchanged(options):
    actor, value = make_policy(K), make_value()
    batch = make_onpolicy_batch(actor, B)
    batch["state_value"] = torch.randn(B, 1, dtype=torch.float64)
    options = {"entropy_bonus": False, "entropy_coeff": ALPHA, **options}
    ours, parent = build(actor, value, **options), ClipPPOLoss(actor, value, **options)
    found, wanted = [], []
    for loss, outputs in ((ours, found), (parent, wanted)):
        for _ in range(2):  # what the first call leaves behind does not reach the second
            torch.manual_seed(1)
            outputs.append(loss(batch.copy()))
    for ours_out, parents_out in zip(found, wanted, strict=True):
        assert set(ours_out.keys()) == {*parents_out.keys(), *OURS}
        for key, expected in parents_out.items():
            assert torch.equal(ours_out[key], expected), key
    assert [key for key in ours.out_keys if key not in parent.out_keys] == OURS
    assert ours.out_keys[: len(parent.out_keys)] == parent.out_keys


def test_the_batch_is_left_as_it_was():
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    before = batch.clone()
    build(actor)(batch)
    assert set(batch.keys(True, True)) == set(before.keys(True, True))
    assert (batch == before).all()


def test_in_keys_are_the_parents_and_the_q_networks():
    class Goals(nn.Module):
        def forward(self, observation, action, goal):
            return observation[..., :1] + action[..., :1] + goal

    actor, value = make_policy(K), make_value()
    critic = ValueOperator(Goals(), in_keys=["observation", "action", "goal"])
    loss, parent = build(actor, value, critic), ClipPPOLoss(actor, value)
    assert set(loss.in_keys) == {*parent.in_keys, "goal"}
    loss.set_keys(advantage="gain")
    assert set(loss.in_keys) == {*parent.in_keys, "goal"}


def test_keywords_in_place_of_a_tensordict():
    actor = make_policy(K)
    batch = rollout(actor)
    loss = build(actor)
    torch.manual_seed(1)
    expected = loss(batch.copy())
    torch.manual_seed(1)
    found = loss(**{"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in loss.in_keys})
    for key, value in zip(loss.out_keys, found, strict=True):
        assert torch.equal(value, expected[key]), key


# ---------------------------------------------------------------------- the routing loss

SHAPES = list(itertools.product([1, 3], [1, 2]))


@pytest.mark.parametrize(("num_proposals", "num_qvalue_nets"), SHAPES)
@pytest.mark.parametrize("score", ["mixture", "expert"])
@pytest.mark.parametrize(
    ("routing", "routing_loss"),
    [
        ("frequency", "brier"),
        ("frequency", "log"),
        ("soft_frequency", "brier"),
        ("soft_frequency", "log"),
        ("marginal", "brier"),
        ("none", "brier"),
    ],
)
def test_routing_loss_follows_its_formula(routing, routing_loss, score, num_proposals, num_qvalue_nets, monkeypatch):
    """Its value, and with what the critics said held its gradient: on the logits alone."""
    table = make_table(B, K)
    actor = make_policy(K, network=table, score=score)
    batch = make_onpolicy_batch(actor, B)
    loss = build(
        actor,
        routing=routing,
        routing_loss=routing_loss,
        routing_coef=0.7,
        num_proposals=num_proposals,
        num_qvalue_nets=num_qvalue_nets,
        reduction="none",
    )
    noise = fix_draws(monkeypatch, num_proposals)
    dist = actor.get_dist(batch.copy())
    target = target_of(loss, dist, batch, noise)
    found = loss(batch)["loss_routing"]
    torch.testing.assert_close(found, reference(loss, dist.logits, target))
    if routing == "none":
        assert not found.requires_grad
        return
    (gradient,) = torch.autograd.grad(found.sum(), table.features)
    logits = table.features.detach()[:, :K].clone()
    expected = central_differences(lambda: reference(loss, logits, target), logits)
    torch.testing.assert_close(gradient[:, :K], expected, rtol=1e-6, atol=1e-9)
    assert (gradient[:, K:] == 0).all()


def test_the_temperature_is_the_entropy_coefficient_also_when_it_is_annealed(monkeypatch):
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    noise = fix_draws(monkeypatch)
    loss = build(actor, routing="soft_frequency", entropy_coeff=1.0)
    loss.entropy_coeff = ALPHA
    dist = actor.get_dist(batch.copy())
    expected = reference(loss, dist.logits, target_of(loss, dist, batch, noise)).mean()
    torch.testing.assert_close(loss(batch)["loss_routing"], expected)


def test_where_the_entropy_coefficient_ends_at_zero_the_soft_frequency_is_the_best_proposal(monkeypatch):
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    fix_draws(monkeypatch)
    soft, hard = (build(actor, routing=routing) for routing in ("soft_frequency", "frequency"))
    soft.entropy_coeff = 0.0
    soft.qvalue_network_params.data.copy_(hard.qvalue_network_params.data)
    torch.testing.assert_close(soft(batch)["loss_routing"], hard(batch)["loss_routing"])


def test_without_a_temperature_several_draws_agree_on_the_best_on_average():
    """No draw's winner may drown the others: what counts is the mean score."""
    logits = torch.zeros(1, 3, dtype=torch.float64)
    dist = NormalMixture(logits, logits.unsqueeze(-1), torch.ones(1, 3, 1, dtype=torch.float64))
    value = torch.tensor([[[5.0, 0.0, 4.0]], [[0.0, 5.0, 4.5]]], dtype=torch.float64)
    scored = ScoredProposals(dist, value, temperature=torch.zeros(()), log_prob=torch.zeros_like(value))
    expected = ((torch.full((3,), 1 / 3) - torch.tensor([0.0, 0.0, 1.0])) ** 2).mean()
    assert ESTIMATORS["soft_frequency"](scored).item() == pytest.approx(expected.item())


def test_each_loss_moves_its_own_parameters_alone():
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    loss = build(actor, entropy_bonus=True, num_qvalue_nets=2, routing="soft_frequency")
    network = actor[0].module[0]
    owners = {
        "router": list(network.router.parameters()),
        "experts": list(network.experts.parameters()),
        "value": list(loss.critic_network_params.values(True, True)),
        "qvalue": list(loss.qvalue_network_params.values(True, True)),
    }
    assert sum(map(len, owners.values())) == len(list(loss.parameters()))
    losses = loss(batch)
    assert moved_by(losses, owners) == {
        "loss_objective": {"router", "experts"},
        "loss_entropy": {"router", "experts"},
        "loss_critic": {"value"},
        "loss_routing": {"router"},
        "loss_qvalue": {"qvalue"},
    }


class OnTheActorsLayer(nn.Module):
    """A value of state, or of state and action, that reads the actor's own layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, observation, action=None):
        return self.layer(observation).mean(-1, keepdim=True) + (
            0.0 if action is None else action.sum(-1, keepdim=True)
        )


@pytest.mark.parametrize("separate", [False, True])
def test_separate_losses_leave_shared_parameters_to_the_policys_losses(separate):
    actor = make_policy(K)
    layer = actor[0].module[0].experts
    value = ValueOperator(OnTheActorsLayer(layer), in_keys=["observation"])
    critic = ValueOperator(OnTheActorsLayer(layer), in_keys=["observation", "action"])
    losses = build(actor, value, critic, separate_losses=separate)(make_onpolicy_batch(actor, B))
    for key in ("loss_critic", "loss_qvalue"):
        moves = losses[key].requires_grad and torch.autograd.grad(
            losses[key], layer.weight, allow_unused=True, retain_graph=True
        ) != (None,)
        assert moves != separate, key


@pytest.mark.parametrize("bounded", [True, False], ids=["bounded", "unbounded"])
def test_gradient_of_the_policys_losses_is_a_finite_difference(bounded, monkeypatch):
    """Of every parameter of the actor; the best proposal of each state does not change within a step."""
    actor = make_policy(2, bounded=bounded)
    batch = make_onpolicy_batch(actor, B).exclude("logits", "loc", "scale")
    loss = build(actor, num_proposals=2, num_qvalue_nets=2, routing_coef=5.0)
    fix_draws(monkeypatch, 2, experts=2)

    def policys_loss():
        losses = loss(batch)
        return losses["loss_objective"] + losses["loss_routing"]

    for parameter in list(actor.parameters()):  # a list, because a call swaps parameters in and out
        (gradient,) = torch.autograd.grad(policys_loss(), parameter)
        expected = central_differences(policys_loss, parameter.data.view(-1))
        torch.testing.assert_close(gradient.view(-1), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("separate", [False, True])
def test_separate_losses_keep_the_q_networks_loss_from_features_that_it_reads(separate):
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    batch["observation"].requires_grad_()
    build(actor, separate_losses=separate).loss_qvalue(batch).sum().backward()
    assert (batch["observation"].grad is None) == separate


# ---------------------------------------------------------------------- the Q-network


@pytest.mark.parametrize("num_qvalue_nets", [1, 2])
@pytest.mark.parametrize("kind", ["l2", "smooth_l1"])
def test_q_networks_are_fitted_to_the_value_target_at_the_stored_action(kind, num_qvalue_nets):
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    batch["value_target"] *= 3.0  # both branches of the smooth distance
    loss = build(
        actor,
        loss_critic_type=kind,
        critic_coeff=0.1,
        num_qvalue_nets=num_qvalue_nets,
        qvalue_coeff=0.7,
        reduction="none",
    )
    gap = q_values(loss, batch["observation"], batch["action"]) - batch["value_target"].squeeze(-1)
    assert gap.shape == (num_qvalue_nets, B)
    assert (gap.abs() < 1).any()
    assert (gap.abs() > 1).any()
    distance = gap.square()
    if kind == "smooth_l1":
        distance = torch.where(gap.abs() < 1, 0.5 * distance, gap.abs() - 0.5)
    torch.testing.assert_close(loss(batch)["loss_qvalue"], 0.7 * distance.sum(0))


def test_q_networks_start_from_different_weights():
    loss = build(make_policy(K), num_qvalue_nets=3)
    first, second, third = q_values(loss, torch.randn(B, OBSERVATION).double(), torch.randn(B, ACTION).double())
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)


@pytest.mark.parametrize("critics", [1, 2])
def test_q_networks_given_as_a_list_keep_their_weights(critics):
    critics = [make_critic() for _ in range(critics)]
    loss = build(make_policy(K), critic=critics, num_qvalue_nets=len(critics))
    observation, action = torch.randn(B, OBSERVATION).double(), torch.randn(B, ACTION).double()
    expected = torch.stack([critic.module(observation, action).squeeze(-1) for critic in critics])
    torch.testing.assert_close(q_values(loss, observation, action), expected)


def test_one_q_network_alone_is_the_one_that_was_given():
    critic = make_critic()
    loss = build(make_policy(K), critic=critic)
    assert set(loss.qvalue_network_params.values(True, True)) == set(critic.parameters())


class Spy(nn.Module):
    """A Q-network that keeps the shapes of the actions it is asked about."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(OBSERVATION + ACTION, 1, dtype=torch.float64)
        self.seen = []

    def forward(self, observation, action):
        self.seen.append(tuple(action.shape))
        return self.network(torch.cat((observation, action), -1))


@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "marginal"])
@pytest.mark.parametrize(("num_proposals", "num_qvalue_nets"), SHAPES)
def test_one_call_of_the_q_network_scores_every_proposal(num_proposals, num_qvalue_nets, routing):
    actor, spy = make_policy(K), Spy()
    critic = ValueOperator(spy, in_keys=["observation", "action"])
    loss = build(actor, critic=critic, num_proposals=num_proposals, num_qvalue_nets=num_qvalue_nets, routing=routing)
    batch = make_onpolicy_batch(actor, B)
    loss(batch)  # in the first call the critics are asked how they take proposals
    spy.seen.clear()
    loss(batch)
    draws = () if num_proposals == 1 else (num_proposals,)
    assert sorted(spy.seen, key=len) == [(B, ACTION), (K, *draws, B, ACTION)]


def test_scores_follow_the_q_network():
    """Through an optimiser's step, new weights, and another dtype."""
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    loss = build(actor, num_qvalue_nets=2)
    action = torch.rand(B, K, ACTION, dtype=torch.float64)

    def agree():
        expected = torch.stack([q_values(loss, batch["observation"], a).amin(0) for a in action.unbind(1)], -1)
        torch.testing.assert_close(loss.score_proposals(batch, action), expected)
        return expected

    before = agree()
    optimiser = torch.optim.SGD(loss.parameters(), 0.1)
    total(loss(batch)).backward()
    optimiser.step()
    stepped = agree()
    loss.load_state_dict(build(make_policy(K), num_qvalue_nets=2).state_dict())
    loaded = agree()
    batch, action = batch.float(), action.float()
    loss.float()
    agree()
    assert not torch.allclose(before, stepped)
    assert not torch.allclose(stepped, loaded)


# ---------------------------------------------------------------------- diagnostics, shapes, masks


@pytest.mark.parametrize("num_proposals", [1, 3])
def test_diagnostics_are_what_their_names_say(num_proposals, monkeypatch):
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    loss = build(actor, num_proposals=num_proposals, num_qvalue_nets=2, routing="none")
    noise = fix_draws(monkeypatch, num_proposals)
    out = loss(batch)
    dist = actor.get_dist(batch)
    router = torch.distributions.Categorical(logits=dist.logits)
    torch.testing.assert_close(out["routing_entropy"], router.entropy().mean().detach())
    torch.testing.assert_close(out["expert_usage"], router.probs.mean(0).detach())
    action = (dist.loc + dist.scale * noise).tanh().detach()
    observation = batch["observation"].unsqueeze(1).expand(num_proposals, B, K, OBSERVATION)
    torch.testing.assert_close(
        out["best_expert_value"], q_values(loss, observation, action).amin(0).amax(-1).mean().detach()
    )


@pytest.mark.parametrize("shape", [(B,), (2, K), (1,)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("num_proposals", [1, 3])
def test_losses_are_per_state_before_the_reduction(num_proposals, reduction, shape, monkeypatch):
    """Any batch shape; in one whose last dimension is K states and experts must not be confused."""
    actor = make_policy(K)
    size = torch.Size(shape).numel()
    batch = make_onpolicy_batch(actor, B)[:size]
    fix_draws(monkeypatch, num_proposals, (size,))
    loss = build(actor, num_proposals=num_proposals, num_qvalue_nets=2, reduction="none", routing="soft_frequency")
    flat = loss(batch)
    loss.reduction = reduction
    reshaped = loss(batch.reshape(*shape))
    for key in ("loss_routing", "loss_qvalue"):
        assert flat[key].shape == (size,)
        expected = {"none": lambda x: x.view(shape), "mean": torch.mean, "sum": torch.sum}[reduction](flat[key])
        torch.testing.assert_close(reshaped[key], expected)
    for key in OURS[2:]:
        torch.testing.assert_close(reshaped[key], flat[key])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_masked_states_do_not_count(reduction, monkeypatch):
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    fix_draws(monkeypatch)
    loss = build(actor, reduction="none")
    every = loss(batch)
    loss.reduction = reduction
    mask = torch.arange(B) < 5
    found = loss(batch.set(("collector", "mask"), mask.unsqueeze(-1)))
    for key in ("loss_objective", "loss_routing", "loss_qvalue"):
        kept = every[key] * mask
        expected = {"none": kept, "sum": kept.sum(), "mean": kept.sum() / 5}[reduction]
        torch.testing.assert_close(found[key], expected)


# ---------------------------------------------------------------------- the advantage


def test_without_an_advantage_the_loss_estimates_it_as_the_parent_does(monkeypatch):
    actor, value = make_policy(K), make_value()
    batch = rollout(actor)
    fix_draws(monkeypatch, batch=(2, 6))
    loss, parent = build(actor, value, num_qvalue_nets=2), ClipPPOLoss(actor, value, entropy_bonus=False)
    for each in (loss, parent):
        each.make_value_estimator(gamma=0.9, lmbda=0.8)
    found = loss(batch.copy())
    for key, expected in parent(batch.copy()).items():
        torch.testing.assert_close(found[key], expected, rtol=0, atol=0)
    prepared = loss.value_estimator(batch.copy(), params=loss.critic_network_params.detach())
    assert {"advantage", "value_target"} <= set(prepared.keys())
    for key, expected in loss(prepared).items():
        torch.testing.assert_close(found[key], expected, rtol=0, atol=0)
    gap = q_values(loss, batch["observation"], batch["action"]) - prepared["value_target"].squeeze(-1)
    distance = torch.where(gap.abs() < 1, 0.5 * gap.square(), gap.abs() - 0.5).sum(0)
    torch.testing.assert_close(found["loss_qvalue"], distance.mean())


# ---------------------------------------------------------------------- keys and kinds of actors


def test_renamed_keys_are_followed():
    """A policy with keys of its own loses what the same policy with the usual ones does."""
    spec = Composite(agent=Composite(move=Bounded(-1, 1, (ACTION,), dtype=torch.float64)))
    plain_actor, value, critic = make_policy(K), make_value(), make_critic()
    actor = PMOEActor(
        K,
        spec=spec,
        in_keys=[("agent", "seen")],
        network=plain_actor[0].module[0],
        return_log_prob=True,
    )
    seen, move = ("agent", "seen"), ("agent", "move")
    loss = build(
        actor,
        ValueOperator(value.module, in_keys=[seen], out_keys=["worth"]),
        ValueOperator(critic.module, in_keys=[seen, move], out_keys=[("agent", "q")]),
        num_qvalue_nets=2,
    )
    loss.set_keys(state_action_value=("agent", "q"), value="worth", value_target=("to", "reach"), advantage="gain")
    plain = build(plain_actor, value, critic, num_qvalue_nets=2)
    plain.qvalue_network_params.data.copy_(loss.qvalue_network_params.data)
    assert loss.tensor_keys.action == move
    assert {seen, move} <= set(loss.in_keys)

    usual = make_onpolicy_batch(plain_actor, B)
    batch = usual.empty()
    batch[seen], batch[move] = usual["observation"], usual["action"]
    batch["gain"], batch["to", "reach"] = usual["advantage"], usual["value_target"]
    batch[loss.tensor_keys.sample_log_prob] = usual["action_log_prob"]
    torch.manual_seed(1)
    found = loss(batch)
    torch.manual_seed(1)
    expected = plain(usual)
    assert set(found.keys()) == set(expected.keys())
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_plain_probabilistic_actor_over_the_mixture_is_enough():
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B).exclude("logits", "loc", "scale")
    head = TensorDictModule(
        nn.Sequential(actor[0].module[0], MixtureParamExtractor(K, "exp", 0.0)),
        ["observation"],
        ["logits", "loc", "scale"],
    )
    plain = ProbabilisticActor(
        head,
        in_keys=["logits", "loc", "scale"],
        spec=Bounded(-1, 1, (ACTION,), dtype=torch.float64),
        distribution_class=TanhNormalMixture,
    )
    ours, theirs = build(actor), build(plain)
    for params in ("critic_network_params", "qvalue_network_params"):
        getattr(theirs, params).data.copy_(getattr(ours, params).data)
    gradients = []
    for loss in (ours, theirs):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(total(loss(batch.copy())), list(actor.parameters())))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
    assert gradients[0][0].norm() > 0


def composite_actor():
    return ProbabilisticActor(
        TensorDictModule(Features(K).double(), ["observation"], ["params"]),
        in_keys=["params"],
        distribution_class=CompositeDistribution,
        distribution_kwargs={"distribution_map": {"action": TanhNormalMixture}},
    )


@pytest.mark.parametrize(
    ("actor", "named"), [(composite_actor, "CompositeDistribution"), (lambda: make_policy(K).expert(0), "TanhNormal")]
)
def test_an_actor_without_a_mixture_is_refused(actor, named):
    with pytest.raises(ValueError, match=f"must be NormalMixture or TanhNormalMixture, got {named}"):
        build(actor())


def test_a_mixture_with_another_batch_shape_is_refused():
    """An actor that has one mixture for a batch of as many states as experts."""
    actor = make_policy(K, network=nn.Sequential(Features(K).double(), Mean()))
    batch = make_onpolicy_batch(make_policy(K), K)
    with pytest.raises(ValueError, match=r"batch shape \(\) for a tensordict of batch size \(4,\)"):
        build(actor)(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"routing": "gumbel_softmax"},
            "gumbel_softmax.*allowed: frequency, soft_frequency, score_function, marginal, none",
        ),
        ({"routing": "foo"}, "'foo' is unknown; allowed: frequency, soft_frequency, score_function, marginal, none"),
        ({"routing_loss": "foo"}, "'foo' is unknown; allowed: brier, log"),
        ({"functional": False}, "functional=False is not supported"),
        ({"routing": "soft_frequency", "entropy_coeff": 0.0}, "'soft_frequency' has entropy_coeff for its temperature"),
        *(({"num_proposals": n}, f"num_proposals={n!r} must be an integer of at least 1") for n in (0, -1, 2.0, True)),
        *(({"num_qvalue_nets": n}, f"num_qvalue_nets={n!r} must be an integer of at least 1") for n in (0, 1.5, True)),
        *(
            ({name: x}, f"{name}={x!r} must be finite and not negative")
            for name in ("qvalue_coeff", "routing_coef")
            for x in (-1.0, float("nan"), float("inf"))
        ),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=f"PMOEClipPPOLoss: .*{message}"):
        build(make_policy(K), **options)


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'backprop'"):
        PMOEClipPPOLoss(make_policy(), None, make_critic(), backprop="max")


def test_one_action_has_one_entropy_coefficient():
    with pytest.raises(ValueError, match="entropy_coeff must be a number"):
        PMOEClipPPOLoss(make_policy(), None, make_critic(), entropy_coeff={"action": 0.1})


def test_a_missing_value_target_is_named():
    """Also where the parent does not ask for it."""
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B).exclude("value_target")
    for coeff in (1.0, 0.0):
        with pytest.raises(KeyError, match="value_target"):
            build(actor, critic_coeff=coeff)(batch)


def test_construction_is_silent():
    actor, value, critic = make_policy(K), make_value(), make_critic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PMOEClipPPOLoss(actor, value, critic, num_qvalue_nets=2)


# ---------------------------------------------------------------------- copies


def outputs(loss, batch):
    torch.manual_seed(1)
    return loss(batch.copy())


@pytest.mark.parametrize("num_qvalue_nets", [1, 2])
def test_state_dict_carries_the_loss(num_qvalue_nets):
    batch = make_onpolicy_batch(make_policy(K), B)
    first, second = (build(make_policy(K), num_qvalue_nets=num_qvalue_nets) for _ in range(2))
    expected, other = outputs(first, batch), outputs(second, batch)
    assert not torch.equal(expected["loss_qvalue"], other["loss_qvalue"])
    second.load_state_dict(first.state_dict())
    found = outputs(second, batch)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("num_qvalue_nets", [1, 2])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_copy_is_the_same_loss_with_parameters_of_its_own(used, num_qvalue_nets):
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    loss = build(actor, num_qvalue_nets=num_qvalue_nets)
    if used:
        loss(batch.copy())
    copied = copy.deepcopy(loss)
    expected, found = outputs(loss, batch), outputs(copied, batch)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    torch.optim.SGD(copied.parameters(), 0.1).step(lambda: total(copied(batch.copy())).backward())
    again = outputs(loss, batch)
    for key, value in expected.items():
        assert torch.equal(again[key], value), key
    action = torch.rand(B, K, ACTION, dtype=torch.float64)
    follows = torch.stack([q_values(copied, batch["observation"], a).amin(0) for a in action.unbind(1)], -1)
    torch.testing.assert_close(copied.score_proposals(batch, action), follows)


# ---------------------------------------------------------------------- compiled, devices


def test_compiled_loss_equals_eager():
    actor = make_policy(K)
    batch = make_onpolicy_batch(actor, B)
    loss = build(actor, routing="soft_frequency", num_proposals=2, num_qvalue_nets=2)
    assert_compiled_equals_eager(loss, batch, list(loss.parameters()))


@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "score_function", "marginal", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_runs_on_the_device(device, dtype, routing):
    actor = make_policy(K, dtype)
    batch = make_onpolicy_batch(actor, B, dtype)
    loss = build(actor, routing=routing, num_qvalue_nets=2, entropy_bonus=True).to(device)
    out = loss(batch.to(device))
    total(out).backward()
    parameters = list(loss.parameters())
    assert {p.dtype for p in parameters} == {dtype}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert router_of(actor).weight.grad.norm() > 0
    for key in OURS[:2]:
        assert out[key].dtype == dtype
    assert {value.device.type for value in out.values()} == {device.type}
