"""PMOESACLoss, PMOETQCLoss and PMOEClipPPOLoss over every combination of their options."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from objectives.helpers import moved_by, total
from properties.reference import box_of
from properties.strategies import (
    BACKPROPS,
    DTYPES,
    KINDS,
    OBSERVATION,
    ROUTINGS,
    TEMPERATURE,
    USUAL,
    costly,
    nested_keys,
    numbers,
    reseed,
    setups,
)
from torch import nn
from torchrl.objectives import ClipPPOLoss

from torchrl_pmoe import NormalMixture, PMOEActor
from torchrl_pmoe.distributions import ExpertProposals, mixture

LOSSES = {
    "sac": {"loss_actor", "loss_qvalue", "loss_alpha", "loss_routing"},
    "tqc": {"loss_actor", "loss_qvalue", "loss_alpha", "loss_routing"},
    "ppo": {"loss_objective", "loss_entropy", "loss_critic", "loss_qvalue", "loss_routing"},
}
DIAGNOSTICS = {"routing_entropy", "expert_usage", "best_expert_value"}
OFF_POLICY = ("sac", "tqc")
routers = st.sampled_from(["detached", "shared", "separate"])


def made(setup, **options):
    actor = setup.actor()
    return actor, setup.loss(actor, **options), setup.transitions(actor)


@contextmanager
def pinned(noise, drawn, fresh=None):
    """Proposals ``[M, *B, K, A]`` and experts ``[M, *B]`` that losses draw; a single draw is the first of them.

    ``fresh`` ``[M, *B, A]`` is the noise of an expert that is drawn anew.
    """
    fresh = noise.mean(-2) if fresh is None else fresh
    redraw = ExpertProposals.redraw

    def redrawn(proposals, index):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(mixture.torch, "randn", lambda shape, **_: fresh if shape == fresh.shape else fresh[0])
            return redraw(proposals, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture.torch, "randn", lambda shape, **_: noise if shape == noise.shape else noise[0])
        patch.setattr(NormalMixture, "sample_expert", lambda _, shape=(): drawn if shape else drawn[0])
        patch.setattr(ExpertProposals, "redraw", redrawn)
        yield


def draws(setup):
    setup.reseed()
    shape = (setup.options["num_proposals"], *setup.batch, setup.experts)
    return torch.randn(*shape, setup.size, dtype=setup.dtype), torch.randint(setup.experts, shape[:-1])


# ---------------------------------------------------------------------- numbers


@costly
@given(setups(dtypes=DTYPES))
def test_every_output_is_finite_and_has_its_shape_and_every_gradient_is_finite(setup):
    _, loss, batch = made(setup)
    out = setup.outputs(loss, batch)
    unreduced = setup.options["reduction"] == "none"
    assert {key for key, _ in out.items() if key.startswith("loss_")} == LOSSES[setup.kind]
    if setup.kind == "ppo" or not unreduced:
        assert set(out.keys()) - {"explained_variance"} == set(loss.out_keys)  # TorchRL does not list that one
        assert out["expert_usage"].shape == (setup.experts,)
        assert abs(out["expert_usage"].double().sum() - 1) < setup.experts * torch.finfo(setup.dtype).eps
        assert -1e-6 <= out["routing_entropy"] <= math.log(setup.experts) + 4 * torch.finfo(setup.dtype).eps
    for key, value in out.items():
        assert value.isfinite().all(), key
        if key in LOSSES[setup.kind]:
            assert value.shape == (setup.batch if unreduced else ())
    assert out["loss_routing"].dtype == setup.dtype
    total(out).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


@costly
@given(setups(routings=("frequency", "soft_frequency", "none"), reductions=("none",)))
def test_the_routing_loss_is_a_squared_error_or_a_cross_entropy(setup):
    """At least zero; the squared error at most two over K."""
    actor, loss, batch = made(setup)
    routing, coef = setup.outputs(loss, batch)["loss_routing"], setup.options["routing_coef"]
    assert (routing >= 0).all()
    if setup.options["routing"] == "none":
        assert not routing.any()
    elif setup.options["routing_loss"] == "brier":
        assert (routing <= coef * 2 / setup.experts + 1e-12).all()
    else:
        floor = -actor.get_dist(batch).logits.log_softmax(-1).amax(-1)
        assert (routing >= coef * floor - 1e-12).all()


@costly
@given(setups(reductions=("none",)), st.sampled_from(["mean", "sum"]))
def test_reduced_losses_are_means_or_sums_of_the_unreduced(setup, reduction):
    actor, loss, batch = made(setup)
    rows = setup.outputs(loss, batch)
    reduced = setup.outputs(setup.loss(actor, reduction=reduction), batch)
    for key in LOSSES[setup.kind]:
        assert rows[key].shape == setup.batch
        torch.testing.assert_close(reduced[key], getattr(rows[key], reduction)())


@costly
@given(setups(reductions=("none",)), st.sampled_from([0.0, 0.25, 2.0, 8.0]))
def test_the_routing_loss_is_proportional_to_its_coefficient_and_nothing_else_is(setup, coef):
    actor = setup.actor()
    batch = setup.transitions(actor)
    one, found = (setup.outputs(setup.loss(actor, routing_coef=x), batch) for x in (1.0, coef))
    for key in LOSSES[setup.kind]:
        expected = coef * one[key] if key == "loss_routing" else one[key]
        assert torch.equal(found[key], expected), key


# ---------------------------------------------------------------------- formulas


def proposals_of(setup, loss, dist, batch, noise):
    """Values and log-densities ``[M, *B, K]`` of the proposals, differentiable in the policy."""
    latent = dist.loc + dist.scale * noise
    middle, half = box_of(dist)
    action = middle + half * latent.tanh()
    observation = batch["observation"].unsqueeze(-2).expand(*action.shape[:-1], OBSERVATION)
    stacked = loss.qvalue_network_params.detach()
    several = setup.kind != "ppo" or setup.critics > 1
    values = []
    for params in stacked.unbind(0) if several else [stacked]:
        with params.to_module(loss.qvalue_network, preserve_module_state=False):
            values.append(loss.qvalue_network(observation, action))
    value = torch.stack(values)
    value = value.mean((0, -1)) if setup.kind == "tqc" else value.squeeze(-1).amin(0)
    log_slope = (half.log() - 2 * latent.cosh().log()).sum(-1)
    normal = torch.distributions.Normal(dist.loc.unsqueeze(-3), dist.scale.unsqueeze(-3))
    every = normal.log_prob(latent.unsqueeze(-2)).sum(-1)  # of proposal k under expert j
    if dist.score == "expert":
        log_prob = every.diagonal(dim1=-2, dim2=-1)
    else:
        log_prob = (every + dist.logits.detach().log_softmax(-1).unsqueeze(-2)).logsumexp(-1)
    return value, log_prob - log_slope


def routing_by_hand(setup, dist, value, log_prob, temperature, drawn):
    """Routing loss ``[*B]`` from values and densities that are constants."""
    q, log_pi, logits = value.detach(), log_prob.detach(), dist.logits
    w = logits.softmax(-1)
    name, cost = setup.options["routing"], temperature * log_pi - q
    if name == "none":
        return torch.zeros(setup.batch, dtype=q.dtype)
    if name == "marginal":
        return setup.options["routing_coef"] * (w * cost).sum(-1).mean(0)
    if name == "score_function":
        gain = (cost.take_along_dim(drawn.unsqueeze(-1), -1) - (w * cost).sum(-1, keepdim=True)).detach().squeeze(-1)
        chosen = w.log().expand(q.shape).take_along_dim(drawn.unsqueeze(-1), -1).squeeze(-1)
        return setup.options["routing_coef"] * (gain * chosen).mean(0)
    if name == "frequency":
        v = nn.functional.one_hot(q.argmax(-1), setup.experts).to(q.dtype).mean(0)
    else:
        exponent = (q / temperature - log_pi).mean(0)
        v = (exponent + logits.detach().log_softmax(-1) if dist.score == "mixture" else exponent).softmax(-1)
    if setup.options["routing_loss"] == "brier":
        return setup.options["routing_coef"] * (w - v).square().sum(-1) / setup.experts
    return -setup.options["routing_coef"] * (v * w.log()).sum(-1)


def reduced(setup, rows, weights):
    """As sample weights, or a mask of zeros and ones, count the rows."""
    if setup.options["reduction"] == "none":
        return rows * weights
    return (rows * weights).sum() / (1.0 if setup.options["reduction"] == "sum" else weights.sum().clamp_min(0.1))


def gradients(value, parameters):
    return torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


def weigh(batch, how):
    """Weights ``[*B]``, put where the loss looks for them."""
    weights = torch.ones(batch.batch_size, dtype=torch.float64)
    if how == "priority":
        batch["priority_weight"] = weights = 0.1 + torch.rand_like(weights)
    elif how == "mask":
        batch["collector", "mask"] = mask = torch.rand_like(weights) < 0.7
        weights = mask.double()
    return weights


@pytest.mark.parametrize("routing", ROUTINGS)
@costly
@given(st.data(), st.sampled_from(["plain", "priority", "mask"]))
def test_actor_and_routing_loss_are_the_formulas_for_every_combination_of_options(routing, data, how):
    setup = data.draw(setups(kinds=OFF_POLICY, routings=[routing]))
    actor, loss, batch = made(setup)
    noise, drawn = draws(setup)
    fresh = torch.randn_like(noise[..., 0, :])
    weights = weigh(batch, how)
    with pinned(noise, drawn, fresh):
        found, metadata = loss.actor_loss(batch)
    dist = actor.get_dist(batch.copy())
    value, log_prob = proposals_of(setup, loss, dist, batch, noise)
    learned, seen = value, log_prob
    if setup.options["decoupled"]:
        learned, seen = proposals_of(setup, loss, dist, batch, fresh.unsqueeze(-2).expand_as(noise))
    w = dist.probs.detach()
    alpha = loss.log_alpha.exp().detach()
    pick = {
        "max": lambda x: x.take_along_dim(value.detach().argmax(-1, keepdim=True), -1).squeeze(-1),
        "routed": lambda x: x.take_along_dim(drawn.unsqueeze(-1), -1).squeeze(-1),
        "all": lambda x: x.mean(-1),
        "weighted": lambda x: (w * x).sum(-1),
    }[setup.options["backprop"]]
    expected = reduced(setup, pick(alpha * seen - learned).mean(0), weights)
    entropy = -pick(seen) if setup.options["entropy_from"] == "winner" else -(w * log_prob).sum(-1)
    routing = reduced(setup, routing_by_hand(setup, dist, value, log_prob, alpha, drawn), weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(metadata["loss_routing"], routing)
    torch.testing.assert_close(metadata["log_prob"], -entropy.mean(0).detach())
    entropy = torch.distributions.Categorical(logits=dist.logits).entropy().mean()
    torch.testing.assert_close(metadata["routing_entropy"], entropy.detach())
    torch.testing.assert_close(metadata["expert_usage"], w.reshape(-1, setup.experts).mean(0))
    torch.testing.assert_close(metadata["best_expert_value"], value.detach().amax(-1).mean())
    parameters = list(actor.parameters())
    ours = (
        gradients(found, parameters),
        gradients(metadata["loss_routing"], parameters) if routing.requires_grad else (),
    )
    theirs = gradients(expected, parameters), gradients(routing, parameters) if routing.requires_grad else ()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("routing", ROUTINGS)
@costly
@given(st.data(), st.sampled_from(["plain", "mask"]))
def test_the_routing_loss_beside_ppo_is_its_formula_for_every_combination_of_options(routing, data, how):
    setup = data.draw(setups(kinds=["ppo"], routings=[routing]))
    actor, loss, batch = made(setup)
    noise, drawn = draws(setup)
    weights = weigh(batch, how)
    with pinned(noise, drawn):
        found = loss(batch.copy())
    dist = actor.get_dist(batch.copy())
    value, log_prob = proposals_of(setup, loss, dist, batch, noise)
    routing = reduced(setup, routing_by_hand(setup, dist, value, log_prob, TEMPERATURE, drawn), weights)
    torch.testing.assert_close(found["loss_routing"], routing)
    torch.testing.assert_close(found["best_expert_value"], value.detach().amax(-1).mean())
    if routing.requires_grad:
        parameters = list(actor.parameters())
        torch.testing.assert_close(gradients(found["loss_routing"], parameters), gradients(routing, parameters))


@costly
@given(setups(kinds=("ppo",)))
def test_what_clip_ppo_puts_out_is_untouched(setup):
    actor, loss, batch = made(setup)
    options = {"entropy_coeff": TEMPERATURE, "reduction": setup.options["reduction"]}
    parent = ClipPPOLoss(actor, setup.state_value(), **options)
    found, expected = setup.outputs(loss, batch), setup.outputs(parent, batch)
    assert set(found.keys()) == {*expected.keys(), "loss_routing", "loss_qvalue", *DIAGNOSTICS}
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@costly
@given(setups(kinds=OFF_POLICY, reductions=("none",)))
def test_weighted_is_the_mean_of_routed_over_the_drawn_expert_and_all_its_plain_mean(setup):
    actor = setup.actor()
    batch = setup.transitions(actor)
    noise, drawn = draws(setup)

    def actor_loss(backprop, index):
        with pinned(noise, index):
            return setup.loss(actor, backprop=backprop, decoupled=False).actor_loss(batch)[0]

    routed = torch.stack([actor_loss("routed", torch.full_like(drawn, k)) for k in range(setup.experts)], -1)
    w = actor.get_dist(batch).probs.detach()
    parameters = list(actor.parameters())
    for backprop, share in (("weighted", w), ("all", torch.full_like(w, 1 / setup.experts))):
        found, expected = actor_loss(backprop, drawn), (share * routed).sum(-1)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found, parameters), gradients(expected, parameters))


# ---------------------------------------------------------------------- invariances


class Reordered(nn.Module):
    """A network whose experts come in another order."""

    def __init__(self, network, order, size):
        super().__init__()
        self.network = network
        experts = len(order)
        blocks = torch.arange(2 * experts * size).reshape(2, experts, size)[:, order].flatten() + experts
        self.order = torch.cat((torch.as_tensor(order), blocks))

    def forward(self, observation):
        return self.network(observation)[..., self.order]


@pytest.mark.parametrize("routing", ROUTINGS)
@costly
@given(st.data(), st.randoms(use_true_random=False))
def test_losses_do_not_depend_on_the_order_of_the_experts(routing, data, random):
    setup = data.draw(setups(routings=[routing], min_experts=2))
    order = random.sample(range(setup.experts), setup.experts)
    network = setup.network()
    actor, other = setup.actor(network), setup.actor(Reordered(network, order, setup.size))
    batch = setup.transitions(actor)
    noise, drawn = draws(setup)
    place = torch.empty(setup.experts, dtype=torch.long)
    place[order] = torch.arange(setup.experts)
    with pinned(noise, drawn):
        expected = setup.loss(actor)(batch.copy())
    with pinned(noise[..., order, :], place[drawn]):
        found = setup.loss(other)(batch.copy())
    for key, value in expected.items():
        wanted = value[order] if key == "expert_usage" else value
        torch.testing.assert_close(found[key], wanted, rtol=1e-6, atol=1e-9)


@costly
@given(setups(dtypes=DTYPES), st.data())
def test_names_and_nesting_of_the_keys_change_nothing(setup, data):
    found = data.draw(nested_keys(len(USUAL)))
    keys = dict(zip(USUAL, found, strict=True))
    keys["priority_weight"] = "weight"  # TorchRL finds it at the root alone
    network = setup.network()
    plain, renamed = setup.actor(network), setup.actor(network, keys)
    batch, usual = setup.transitions(renamed, keys), setup.transitions(plain)
    weights = torch.rand(setup.batch).to(setup.dtype)
    if setup.kind != "ppo":
        batch[keys["priority_weight"]] = usual["priority_weight"] = weights
    expected = setup.outputs(setup.loss(plain), usual)
    loss = setup.loss(renamed, keys)
    ours = setup.outputs(loss, batch)
    assert set(ours.keys()) == set(expected.keys())
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key
    assert {keys["observation"], keys["action"]} <= set(loss.in_keys)
    if setup.kind != "ppo":
        reseed(setup.seed)
        loss(batch)
        assert batch.get(keys["priority"]).shape == setup.batch


@costly
@given(
    setups(kinds=OFF_POLICY, min_experts=2, reductions=("mean", "sum")),
    st.sampled_from(["detached", "shared", "separate"]),
)
def test_each_loss_of_sac_moves_its_own_parameters_alone(setup, router):
    """The experts learn from the actor's loss, the router from the routing loss, the trunk from those that share it."""
    actor = built_in(setup, router)
    loss = setup.loss(actor)
    network = actor[0].module[0]
    owners = {
        "router": list(network.router.parameters()),
        "experts": list(network.experts.parameters()),
        "trunk": list(network.trunk.parameters()),
        "critics": list(loss.qvalue_network_params.values(True, True)),
        "alpha": [loss.log_alpha],
    }
    routing = {"router", "trunk"} if router == "shared" else {"router"}
    expected = {"loss_actor": {"experts", "trunk"}, "loss_qvalue": {"critics"}, "loss_alpha": {"alpha"}}
    if setup.options["routing"] != "none":
        expected["loss_routing"] = routing
    losses = setup.outputs(loss, setup.transitions(actor))
    moving = losses.select(*expected)
    assert moved_by(moving, owners) == expected
    assert losses["loss_routing"].requires_grad == ("loss_routing" in expected)


@costly
@given(
    setups(kinds=("ppo",), min_experts=2, reductions=("mean", "sum")),
    st.sampled_from(["detached", "shared", "separate"]),
)
def test_each_loss_of_ppo_moves_its_own_parameters_alone(setup, router):
    actor = built_in(setup, router)
    loss = setup.loss(actor)
    network = actor[0].module[0]
    owners = {
        "router": list(network.router.parameters()),
        "experts": list(network.experts.parameters()),
        "trunk": list(network.trunk.parameters()),
        "value": list(loss.critic_network_params.values(True, True)),
        "qvalue": list(loss.qvalue_network_params.values(True, True)),
    }
    policy = {"router", "experts", "trunk"}
    expected = {"loss_entropy": policy, "loss_critic": {"value"}, "loss_qvalue": {"qvalue"}}
    if setup.options["routing"] != "none":
        expected["loss_routing"] = {"router", "trunk"} if router == "shared" else {"router"}
    losses = setup.outputs(loss, setup.transitions(actor))
    assert moved_by(losses.select(*expected), owners) == expected
    assert losses["loss_routing"].requires_grad == ("loss_routing" in expected)


def built_in(setup, router):
    setup.reseed()
    return PMOEActor(
        setup.experts,
        spec=setup.box.spec(setup.size, setup.dtype),
        in_features=OBSERVATION,
        num_cells=(6,),
        activation_class=nn.Tanh,
        head_init=0.5,
        router=router,
        distribution_kwargs={"score": setup.score},
        return_log_prob=True,
    ).to(setup.dtype)


# ---------------------------------------------------------------------- the ratio of PPO


@costly
@given(
    setups(kinds=("ppo",), dtypes=DTYPES, reductions=("mean",)),
    st.sampled_from(["exact", "frequency"]),
    st.sampled_from([1.0, 30.0]),
    st.booleans(),
)
def test_the_ratio_of_a_fresh_batch_is_one(setup, log_prob_routing, width, stock):
    """Whatever the mixture's score, and for saturated policies, whose actions rounding puts onto the bounds."""
    network = setup.network()
    with torch.no_grad():
        network.bias[setup.experts : setup.experts * (1 + setup.size)] *= width
    actor = setup.actor(network)
    actor[-1].distribution_kwargs["log_prob_routing"] = log_prob_routing
    loss = ClipPPOLoss(actor, setup.state_value()) if stock else setup.loss(actor)
    batch = setup.transitions(actor).exclude("action", "action_log_prob")
    with torch.no_grad():
        batch = actor(batch)
    log_weight = loss._log_weight(batch, batch.batch_size)[0]
    assert not log_weight.any()
    out = setup.outputs(loss, batch)
    assert out["clip_fraction"] == 0
    assert out["max_ratio"] == 1
    torch.testing.assert_close(out["loss_objective"], -batch["advantage"].mean())


# ---------------------------------------------------------------------- what does not exist

ALLOWED = {
    "routing": list(ROUTINGS),
    "routing_loss": ["brier", "log"],
    "backprop": list(BACKPROPS),
    "entropy_from": ["policy", "winner"],
}


@costly
@given(setups(), st.sampled_from(sorted(ALLOWED)), st.text(max_size=20) | st.just("gumbel_softmax"))
def test_an_option_that_does_not_exist_is_answered_with_those_that_do(setup, option, text):
    assume(text.lower() not in ALLOWED[option])
    assume(setup.kind != "ppo" or option not in ("backprop", "entropy_from"))
    with pytest.raises(ValueError, match=f"^{KINDS[setup.kind].__name__}: {option}=") as caught:
        setup.loss(setup.actor(), **{option: text})
    assert repr(text) in str(caught.value)
    assert all(name in str(caught.value) for name in ALLOWED[option])


@costly
@given(setups(), st.integers(max_value=0) | st.floats() | st.booleans() | st.none() | st.text(max_size=3))
def test_the_number_of_proposals_is_a_positive_integer(setup, number):
    with pytest.raises(ValueError, match="must be an integer of at least 1") as caught:
        setup.loss(setup.actor(), num_proposals=number)
    assert f"num_proposals={number!r}" in str(caught.value)


@costly
@given(setups(), numbers)
def test_the_coefficient_is_finite_and_not_negative(setup, coef):
    if 0 <= coef < math.inf:
        assert setup.loss(setup.actor(), routing_coef=coef).routing_coef == coef
        return
    with pytest.raises(ValueError, match="must be finite and not negative") as caught:
        setup.loss(setup.actor(), routing_coef=coef)
    assert f"routing_coef={coef!r}" in str(caught.value)
