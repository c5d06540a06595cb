"""PMOESACLoss and PMOETQCLoss against formulas written out independently."""

from __future__ import annotations

import itertools

import pytest
import torch
from tensordict.nn import CompositeDistribution, TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss

from objectives.helpers import (
    ACTION,
    OBSERVATION,
    Features,
    Mean,
    make_actor,
    make_batch,
    make_critic,
    make_policy,
    router_of,
    total,
)
from torchrl_pmoe import MixtureParamExtractor, PMOEActor, PMOESACLoss, PMOETQCLoss, TanhNormalMixture
from torchrl_pmoe.distributions import mixture

K, B = 4, 8


def build(actor, critic=None, kind=PMOESACLoss, **kwargs):
    critic = critic or make_critic(5 if kind is PMOETQCLoss else 1)
    loss = kind(actor, critic, alpha_init=0.3, scalar_output_mode="exclude", **kwargs).double()
    loss.make_value_estimator(gamma=0.9)
    return loss


def log_normal_tanh(u, loc, scale):
    """log-density of tanh(u), [..., K], by torch.distributions."""
    normal = torch.distributions.Normal(loc, scale).log_prob(u).sum(-1)
    return normal + 2.0 * u.cosh().log().sum(-1)


def reference(loss, actor, batch, noise, drawn):
    """Actor loss, routing loss and what the temperature sees, [B], by the formulas, one draw per expert."""
    dist = actor.get_dist(batch)
    w = dist.logits.softmax(-1)
    u = dist.loc + dist.scale * noise
    action = u.tanh()
    if dist.score == "expert":
        density = log_normal_tanh(u, dist.loc, dist.scale)
    else:
        rows = [
            (w.detach().log() + log_normal_tanh(u[:, k : k + 1], dist.loc, dist.scale)).logsumexp(-1) for k in range(K)
        ]
        density = torch.stack(rows, -1)
    values = []
    for i in range(2):
        params = loss.qvalue_network_params[i].detach()
        with params.to_module(loss.qvalue_network, preserve_module_state=False):
            observation = batch["observation"].unsqueeze(1).expand(B, K, OBSERVATION)
            values.append(loss.qvalue_network(observation, action).squeeze(-1))
    q = torch.minimum(*values)
    alpha = loss.log_alpha.exp().detach()
    term = alpha * density - q
    pick = {
        "max": lambda x: x.gather(-1, q.argmax(-1, keepdim=True)).squeeze(-1),
        "routed": lambda x: x.gather(-1, drawn.unsqueeze(-1)).squeeze(-1),
        "all": lambda x: x.sum(-1) / K,
        "weighted": lambda x: (w.detach() * x).sum(-1),
    }[loss.backprop]
    q, density_ = q.detach(), density.detach()
    if loss.routing == "marginal":
        routing = (w * (alpha * density_ - q)).sum(-1)
    elif loss.routing == "none":
        routing = torch.zeros(B, dtype=q.dtype)
    else:
        if loss.routing == "frequency":
            v = torch.eye(K, dtype=q.dtype)[q.argmax(-1)]
        else:
            v = ((q - alpha * density_) / alpha).exp() * (w.detach() if dist.score == "mixture" else 1.0)
            v = v / v.sum(-1, keepdim=True)
        routing = (w - v).square().mean(-1) if loss.routing_loss == "brier" else -(v * w.log()).sum(-1)
    seen = pick(density_) if loss.entropy_from == "winner" else (w.detach() * density_).sum(-1)
    return pick(term), loss.routing_coef * routing, seen


COMBINATIONS = list(
    itertools.product(
        ["frequency", "soft_frequency", "marginal", "none"], ["max", "all", "routed", "weighted"], ["mixture", "expert"]
    )
)


@pytest.mark.parametrize(("routing", "backprop", "score"), COMBINATIONS)
def test_losses_and_gradients_follow_the_formulas(routing, backprop, score, monkeypatch):
    torch.manual_seed(0)
    actor, batch = make_actor(score=score), make_batch(B)
    entropy_from = "winner" if routing in ("frequency", "none") else "policy"
    loss = build(actor, routing=routing, backprop=backprop, routing_coef=0.7, entropy_from=entropy_from)
    noise = torch.randn(B, K, ACTION, dtype=torch.float64)
    drawn = torch.randint(K, (B,))
    monkeypatch.setattr(mixture.torch, "randn", lambda *_, **__: noise)
    monkeypatch.setattr(mixture.NormalMixture, "sample_expert", lambda *_: drawn)
    value, metadata = loss.actor_loss(batch)
    expected, routing_loss, density = reference(loss, actor, batch, noise, drawn)
    torch.testing.assert_close(value, expected.mean())
    torch.testing.assert_close(metadata["loss_routing"], routing_loss.mean())
    torch.testing.assert_close(metadata["log_prob"], density)
    parameters = list(actor.parameters())
    found = torch.autograd.grad(value + metadata["loss_routing"], parameters)
    wanted = torch.autograd.grad((expected + routing_loss).mean(), parameters)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_log_loss_follows_its_formula(monkeypatch):
    torch.manual_seed(0)
    actor, batch = make_actor(), make_batch(B)
    loss = build(actor, routing="frequency", routing_loss="log")
    noise = torch.randn(B, K, ACTION, dtype=torch.float64)
    monkeypatch.setattr(mixture.torch, "randn", lambda *_, **__: noise)
    _, metadata = loss.actor_loss(batch)
    _, routing_loss, _ = reference(loss, actor, batch, noise, torch.zeros(B, dtype=torch.long))
    torch.testing.assert_close(metadata["loss_routing"], routing_loss.mean())


@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "marginal"])
def test_several_proposals_average_what_each_draw_says(routing, monkeypatch):
    """Hard frequencies and the marginal average over draws; the soft frequency averages the exponent."""
    torch.manual_seed(0)
    actor, batch = make_actor(), make_batch(B)
    loss = build(actor, routing=routing, backprop="weighted", num_proposals=3)
    # small draws: the log-density below goes through atanh of the action
    noise = 0.2 * torch.randn(3, B, K, ACTION, dtype=torch.float64)
    monkeypatch.setattr(mixture.torch, "randn", lambda *_, **__: noise)
    value, metadata = loss.actor_loss(batch)
    single = [reference(loss, actor, batch, n, None) for n in noise]
    torch.testing.assert_close(value, torch.stack([s[0] for s in single]).mean())
    w = actor.get_dist(batch).probs
    if routing == "marginal":
        expected = torch.stack([s[1] for s in single]).mean()
    else:
        dist = actor.get_dist(batch)
        action = (dist.loc + dist.scale * noise).tanh()
        q = torch.stack([loss.score_proposals(batch, a) for a in action])
        if routing == "frequency":
            v = torch.stack([torch.eye(K, dtype=q.dtype)[x.argmax(-1)] for x in q]).mean(0)
        else:
            density = dist.log_prob(action.movedim(-2, 1)).movedim(1, -1)
            v = (dist.logits.log_softmax(-1) + (q / loss.log_alpha.exp() - density).mean(0)).softmax(-1)
        expected = (w - v).square().mean()
    torch.testing.assert_close(metadata["loss_routing"], expected)


def test_soft_frequency_becomes_the_best_proposal_as_alpha_vanishes(monkeypatch):
    torch.manual_seed(0)
    actor, batch = make_actor(), make_batch(B)
    hard, soft = (build(actor, routing=routing) for routing in ("frequency", "soft_frequency"))
    soft.qvalue_network_params.data.copy_(hard.qvalue_network_params.data)
    soft.log_alpha.data.fill_(-60.0)
    noise = torch.randn(B, K, ACTION, dtype=torch.float64)
    monkeypatch.setattr(mixture.torch, "randn", lambda *_, **__: noise)
    torch.testing.assert_close(soft.actor_loss(batch)[1]["loss_routing"], hard.actor_loss(batch)[1]["loss_routing"])


@pytest.mark.parametrize("kind", [PMOESACLoss, PMOETQCLoss])
def test_output_is_the_parents_with_routing_loss_and_diagnostics(kind):
    torch.manual_seed(0)
    actor, batch = make_actor(), make_batch(B)
    loss = build(actor, kind=kind)
    out = loss(batch)
    assert set(out.keys()) == set(loss.out_keys)
    assert out["expert_usage"].shape == (K,)
    torch.testing.assert_close(out["expert_usage"], actor.get_dist(batch).probs.mean(0))
    torch.testing.assert_close(
        out["routing_entropy"], torch.distributions.Categorical(logits=actor.get_dist(batch).logits).entropy().mean()
    )
    total(out).backward()
    assert router_of(actor).weight.grad.norm() > 0


def test_tqc_scores_by_the_mean_over_critics_and_quantiles():
    torch.manual_seed(0)
    actor, batch = make_actor(), make_batch(B)
    loss = build(actor, kind=PMOETQCLoss)
    action = torch.rand(B, K, ACTION, dtype=torch.float64)
    values = []
    for params in loss.qvalue_network_params.detach().unbind(0):
        with params.to_module(loss.qvalue_network, preserve_module_state=False):
            values.append(loss.qvalue_network(batch["observation"].unsqueeze(1).expand(B, K, -1), action).mean(-1))
    torch.testing.assert_close(loss.score_proposals(batch, action), torch.stack(values).mean(0))


def test_unreduced_losses_are_one_per_state_and_diagnostics_go_where_alpha_goes():
    torch.manual_seed(0)
    actor, batch = make_actor(), make_batch(B)
    loss = build(actor, reduction="none")
    out = loss(batch)
    assert {key: value.shape for key, value in out.items()} == dict.fromkeys(
        ["loss_actor", "loss_qvalue", "loss_alpha", "loss_routing"], torch.Size([B])
    )
    loss.scalar_output_mode = "non_tensor"
    out = loss(batch)
    assert out.get_non_tensor("alpha") == loss._alpha
    assert out.get_non_tensor("expert_usage").shape == (K,)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_routing_loss_is_reduced_like_the_others(reduction, monkeypatch):
    """Sample weights and masks count for the routing loss as for the actor's."""
    torch.manual_seed(0)
    actor, batch = make_actor(), make_batch(B)
    weights = torch.linspace(0.1, 2.0, B, dtype=torch.float64)
    batch["priority_weight"] = weights
    loss = build(actor, reduction=reduction)
    noise = torch.randn(B, K, ACTION, dtype=torch.float64)
    monkeypatch.setattr(mixture.torch, "randn", lambda *_, **__: noise)
    value, metadata = loss.actor_loss(batch)
    expected, routing, _ = reference(loss, actor, batch, noise, None)
    norm = weights.sum() if reduction == "mean" else 1.0
    torch.testing.assert_close(value, (expected * weights).sum() / norm)
    torch.testing.assert_close(metadata["loss_routing"], (routing * weights).sum() / norm)

    del batch["priority_weight"]
    batch["collector", "mask"] = torch.arange(B) < 5
    norm = 5.0 if reduction == "mean" else 1.0
    torch.testing.assert_close(loss.actor_loss(batch)[1]["loss_routing"], routing[:5].sum() / norm)


def test_renamed_keys_are_followed():
    torch.manual_seed(0)
    spec = Composite(agent=Composite(move=Bounded(-1, 1, (ACTION,), dtype=torch.float64)))
    actor = PMOEActor(K, spec=spec, in_keys=[("agent", "seen")], network=Features(K).double())
    critic = ValueOperator(
        make_critic().module, in_keys=[("agent", "seen"), ("agent", "move")], out_keys=[("agent", "worth")]
    )
    loss = build(actor, critic)
    loss.set_keys(state_action_value=("agent", "worth"), reward="gain", priority="surprise")
    plain = make_batch(B)
    batch = plain.empty()
    batch["agent", "seen"], batch["agent", "move"] = plain["observation"], plain["action"]
    batch["next", "agent", "seen"] = plain["next", "observation"]
    batch["next", "gain"] = plain["next", "reward"]
    batch["next", "done"], batch["next", "terminated"] = plain["next", "done"], plain["next", "terminated"]
    out = loss(batch)
    total(out).backward()
    assert router_of(actor).weight.grad.norm() > 0
    assert batch.get("surprise", None) is not None


def test_a_plain_probabilistic_actor_over_the_mixture_is_enough():
    torch.manual_seed(0)
    head = TensorDictModule(
        nn.Sequential(Features(K), MixtureParamExtractor(K)).double(), ["observation"], ["logits", "loc", "scale"]
    )
    actor = ProbabilisticActor(
        head,
        in_keys=["logits", "loc", "scale"],
        spec=Bounded(-1, 1, (ACTION,), dtype=torch.float64),
        distribution_class=TanhNormalMixture,
    )
    total(build(actor)(make_batch(B))).backward()
    assert head.module[0].router.weight.grad.norm() > 0


def test_no_critic_parameter_receives_the_actors_gradient():
    torch.manual_seed(0)
    loss = build(make_actor(), backprop="weighted")
    out = loss(make_batch(B))
    (out["loss_actor"] + out["loss_routing"]).backward()
    assert all(p.grad is None for p in loss.qvalue_network_params.values(True, True))


@pytest.mark.parametrize("kind", [PMOESACLoss, PMOETQCLoss])
def test_a_critic_in_a_list_of_its_own_is_trained(kind):
    torch.manual_seed(0)
    critic = make_critic(5 if kind is PMOETQCLoss else 1)
    loss = build(make_actor(), [critic], kind=kind, num_qvalue_nets=1)
    total(loss(make_batch())).backward()
    gradients = [p.grad for name, p in loss.named_parameters() if name.startswith("qvalue_network_params")]
    assert gradients
    assert all(gradient.norm() > 0 for gradient in gradients)


def test_with_one_expert_the_loss_is_sac():
    """K=1: same parameters and noise, TorchRL's own SACLoss over TanhNormal."""
    torch.manual_seed(0)
    actor, batch = make_actor(1), make_batch(B)
    ours = build(actor)
    theirs = SACLoss(actor.expert(0), make_critic(), alpha_init=0.3).double()
    theirs.make_value_estimator(gamma=0.9)
    theirs.qvalue_network_params.data.copy_(ours.qvalue_network_params.data)

    class Pinned(TanhNormal):
        def rsample_and_log_prob(self, sample_shape=()):
            noise = torch.linspace(-1, 1, self.loc.numel(), dtype=self.loc.dtype).view_as(self.loc)
            u = self.loc + self.scale * noise
            action = u.tanh()
            return action, self.base_dist.log_prob(u) - torch.log1p(-action.square()).sum(-1)

    theirs.actor_network[-1].distribution_class = Pinned
    noise = torch.linspace(-1, 1, B * ACTION, dtype=torch.float64).view(B, 1, ACTION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture.torch, "randn", lambda *_, **__: noise)
        value, metadata = ours.actor_loss(batch)
    expected, theirs_metadata = theirs.actor_loss(batch)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(metadata["log_prob"], theirs_metadata["log_prob"])
    assert metadata["loss_routing"].item() == 0


@pytest.mark.parametrize("batch", [(), (1,), (K,), (2, K), (0,)])
@pytest.mark.parametrize("backprop", ["max", "weighted"])
def test_every_proposal_is_scored_in_its_own_state(batch, backprop):
    """Any batch shape; in one whose last dimension is K states and experts must not be confused."""
    torch.manual_seed(0)
    loss = build(make_actor(), backprop=backprop)
    size = max(1, int(torch.tensor(batch).prod())) if 0 not in batch else 0
    states = make_batch(max(size, 1))[:size].reshape(*batch) if batch != () else make_batch(1)[0]
    action = torch.rand(*batch, K, ACTION, dtype=torch.float64)
    value = loss.score_proposals(states, action)
    assert value.shape == (*batch, K)
    for k in range(K):
        alone = loss._critic_value(states, action[..., k, :], per_expert=False)
        torch.testing.assert_close(value[..., k], alone)
    if size:
        total(loss(states)).backward()


def test_a_mixture_with_another_batch_shape_is_refused():
    """An actor that has one mixture for a batch of as many states as experts."""
    actor = make_policy(K, network=nn.Sequential(Features(K).double(), Mean()))
    with pytest.raises(ValueError, match=r"batch shape \(\) for a tensordict of batch size \(4,\)"):
        build(actor).actor_loss(make_batch(K))


@pytest.mark.parametrize("coef", [-1.0, float("nan"), float("inf")])
def test_a_coefficient_that_makes_no_sense_is_refused(coef):
    with pytest.raises(ValueError, match="must be finite and not negative"):
        build(make_actor(), routing_coef=coef)
    with pytest.raises(ValueError, match="must be finite and not negative"):
        make_actor(routing_coef=coef).get_dist(make_batch(B))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"routing": "gumbel_softmax"},
            "gumbel_softmax.*allowed: frequency, soft_frequency, score_function, marginal, none",
        ),
        ({"routing": "foo"}, "'foo' is unknown; allowed"),
        ({"backprop": "foo"}, "'foo' is unknown; allowed: max, all, routed, weighted"),
        ({"routing_loss": "foo"}, "'foo' is unknown; allowed: brier, log"),
        ({"decoupled": 1}, "decoupled=1 must be True or False"),
        ({"decoupled": True, "backprop": "all"}, "decoupled=True goes with backprop='max' alone.*'all'"),
        ({"entropy_from": "foo"}, "'foo' is unknown; allowed: policy, winner"),
        ({"num_proposals": 0}, "num_proposals=0 must be an integer of at least 1"),
    ],
)
@pytest.mark.parametrize("kind", [PMOESACLoss, PMOETQCLoss])
def test_unknown_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        build(make_actor(), kind=kind, **options)


def test_sac_v1_is_refused():
    value = ValueOperator(nn.Linear(OBSERVATION, 1), in_keys=["observation"])
    with pytest.raises(ValueError, match=r"value_network \(SAC v1\)"):
        PMOESACLoss(make_actor(), make_critic(), value)


def composite_actor():
    return ProbabilisticActor(
        TensorDictModule(Features(K), ["observation"], ["params"]),
        in_keys=["params"],
        distribution_class=CompositeDistribution,
        distribution_kwargs={"distribution_map": {"action": TanhNormalMixture}},
    )


@pytest.mark.parametrize(
    ("actor", "named"), [(composite_actor, "Composite"), (lambda: make_actor().expert(0), "TanhNormal")]
)
def test_an_actor_without_a_mixture_is_refused(actor, named):
    with pytest.raises(ValueError, match=named):
        build(actor())


@pytest.mark.parametrize("backprop", ["max", "weighted"])
def test_compiled_loss_equals_eager(backprop):
    torch.manual_seed(0)
    actor, batch = make_actor(), make_batch(B)
    loss = build(actor, backprop=backprop, routing="soft_frequency")

    def run(function):
        torch.manual_seed(1)
        out = function(batch.copy())
        loss.zero_grad()
        total(out).backward()
        return out, [p.grad.clone() for p in actor.parameters()]

    # a backend that keeps PyTorch's own random numbers
    compiled, compiled_gradients = run(torch.compile(loss, backend="aot_eager"))
    eager, gradients = run(loss)
    for key in ("loss_actor", "loss_routing", "loss_qvalue", "loss_alpha"):
        torch.testing.assert_close(compiled[key], eager[key])
    for ours, theirs in zip(compiled_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("routing", ["frequency", "soft_frequency", "score_function", "marginal", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_runs_on_the_device(device, dtype, routing):
    actor, batch = make_actor(dtype=dtype), make_batch(B, dtype)
    loss = PMOESACLoss(actor, make_critic(dtype=dtype), routing=routing, backprop="weighted").to(device)
    loss.make_value_estimator(gamma=0.9)
    out = loss(batch.to(device))
    total(out).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())
    assert out["expert_usage"].device.type == device.type
