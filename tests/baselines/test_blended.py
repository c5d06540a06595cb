"""GatingActor and MCPActor: one expert is TorchRL's Gaussian, several are their closed forms, losses take both."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, OneHot, Unbounded
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, SACLoss

from torchrl_pmoe import GatingActor, MCPActor, PMOEActor

EXPERTS, OBSERVATION, ACTION = 4, 5, 3
DETERMINISTIC = ExplorationType.DETERMINISTIC
ACTORS = {
    "gating": GatingActor,
    "gating actions": partial(GatingActor, blend="actions"),
    "mcp": MCPActor,
}
every_actor = pytest.mark.parametrize("kind", ACTORS.values(), ids=ACTORS)
DTYPES = [torch.float32, torch.float64]


def make_actor(kind, experts=EXPERTS, **kwargs):
    options = {"spec": Bounded(-1, 1, (ACTION,)), "in_features": OBSERVATION, "num_cells": (16, 16), "head_init": 0.3}
    if "network" in kwargs:
        options = {"spec": options["spec"]}
    return kind(experts, **{**options, **kwargs})


def gaussian_of(actor, low=-1.0, high=1.0, *, bounded=True, return_log_prob=False):
    """TorchRL's own actor with the weights of an actor of one expert."""
    network = actor[0].module[0]
    mlp = MLP(in_features=OBSERVATION, out_features=2 * ACTION, num_cells=[16, 16], activation_class=nn.ReLU)
    mlp = mlp.to(network.experts.weight.dtype)
    with torch.no_grad():
        learned = [*network.trunk.parameters(), *network.experts.parameters()]
        for mine, theirs in zip(mlp.parameters(), learned, strict=True):
            mine.copy_(theirs)
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(mlp, NormalParamExtractor("exp", scale_lb=0.0)), ["observation"], ["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        spec=Bounded(low, high, (ACTION,)) if bounded else Unbounded((ACTION,)),
        distribution_class=TanhNormal if bounded else IndependentNormal,
        distribution_kwargs={"low": low, "high": high} if bounded else {},
        default_interaction_type=ExplorationType.RANDOM,
        return_log_prob=return_log_prob,
    )


def observe(*batch, dtype=torch.float32):
    return TensorDict(observation=torch.randn(*batch, OBSERVATION, dtype=dtype), batch_size=batch)


def seeded(function, *args):
    torch.manual_seed(7)
    return function(*args)


def same_outputs(one, other):
    data = observe(6)
    for exploration in (DETERMINISTIC, ExplorationType.RANDOM):
        with set_exploration_type(exploration):
            outs = [seeded(actor, data.clone()).to_dict() for actor in (one, other)]
        torch.testing.assert_close(*outs, rtol=0, atol=0)


def offline_batch(dtype, size=8):
    flag = torch.zeros(size, 1, dtype=torch.bool)
    batch = observe(size, dtype=dtype)
    batch["action"] = 1.8 * torch.rand(size, ACTION, dtype=dtype) - 0.9
    batch["next"] = observe(size, dtype=dtype)
    batch["next", "reward"] = torch.randn(size, 1, dtype=dtype)
    batch["next", "done"], batch["next", "terminated"] = flag, flag.clone()
    return batch


def online_batch(actor, dtype, size=8):
    batch = offline_batch(dtype, size)
    with torch.no_grad():
        batch["action_log_prob"] = actor.get_dist(batch.copy()).log_prob(batch["action"]) + 0.1
    batch["advantage"] = torch.randn(size, 1, dtype=dtype)
    batch["value_target"] = torch.randn(size, 1, dtype=dtype)
    return batch


def sac_loss(actor, dtype):
    mlp = MLP(in_features=OBSERVATION + ACTION, out_features=1, num_cells=[16], activation_class=nn.Tanh)
    loss = SACLoss(actor, ValueOperator(mlp, in_keys=["observation", "action"]), alpha_init=0.3).to(dtype)
    loss.make_value_estimator(gamma=0.9)
    return loss


def ppo_loss(actor, dtype):
    value = ValueOperator(nn.Linear(OBSERVATION, 1).to(dtype), in_keys=["observation"])
    return ClipPPOLoss(actor, value, entropy_bonus=True, entropy_coeff=0.1)


def total(losses):
    return sum(value.sum() for key, value in losses.items() if key.startswith("loss_"))


# ---------------------------------------------------------------------- one expert is the Gaussian


@every_actor
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-2.0, 3.0), None], ids=["unit", "shifted", "unbounded"])
def test_one_expert_is_torchrls_gaussian(kind, dtype, bounds):
    if bounds is None:
        options = {"spec": Unbounded((ACTION,)), "distribution_class": IndependentNormal}
    else:
        options = {"spec": Bounded(*bounds, (ACTION,))}
    actor = make_actor(kind, 1, return_log_prob=True, **options).to(dtype)
    gaussian = gaussian_of(actor, *(bounds or ()), bounded=bounds is not None, return_log_prob=True)
    data = observe(50, dtype=dtype)
    for exploration in (ExplorationType.RANDOM, DETERMINISTIC):
        with set_exploration_type(exploration):
            ours, theirs = (seeded(policy, data.clone()) for policy in (actor, gaussian))
        torch.testing.assert_close(ours.to_dict(), theirs.to_dict())
    dists = [policy.get_dist(data.clone()) for policy in (actor, gaussian)]
    value = dists[1].sample()
    torch.testing.assert_close(*(dist.log_prob(value) for dist in dists))
    torch.testing.assert_close(*(seeded(dist.rsample, (4,)) for dist in dists))


@every_actor
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_has_the_gaussians_sac_loss_and_gradients(kind, dtype):
    actor = make_actor(kind, 1).to(dtype)
    gaussian = gaussian_of(actor)
    ours, theirs = sac_loss(actor, dtype), sac_loss(gaussian, dtype)
    theirs.qvalue_network_params.data.copy_(ours.qvalue_network_params.data)
    theirs.target_qvalue_network_params.data.copy_(ours.target_qvalue_network_params.data)
    batch = offline_batch(dtype)
    outs = [seeded(loss, batch.copy()) for loss in (ours, theirs)]
    torch.testing.assert_close(outs[0].to_dict(), outs[1].to_dict())
    _same_gradients(outs, actor, gaussian)


@every_actor
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_expert_has_the_gaussians_ppo_loss_and_gradients(kind, dtype):
    actor = make_actor(kind, 1).to(dtype)
    gaussian = gaussian_of(actor)
    losses = [seeded(ppo_loss, policy, dtype) for policy in (actor, gaussian)]
    batch = online_batch(gaussian, dtype)
    outs = [seeded(loss, batch.copy()) for loss in losses]
    torch.testing.assert_close(outs[0].to_dict(), outs[1].to_dict())
    _same_gradients(outs, actor, gaussian)


def _same_gradients(outs, actor, gaussian):
    for out in outs:
        total(out).backward()
    network = actor[0].module[0]
    ours = [p.grad for p in (*network.trunk.parameters(), *network.experts.parameters())]
    theirs = [p.grad for p in gaussian.parameters()]
    assert all(gradient.abs().max() > 0 for gradient in theirs)
    torch.testing.assert_close(ours, theirs)
    assert all(p.grad is None or not p.grad.any() for p in network.router.parameters())


# ---------------------------------------------------------------------- as an actor


@every_actor
@pytest.mark.parametrize("batch", [(), (7,), (2, 3)])
@pytest.mark.parametrize("in_features", [OBSERVATION, None], ids=["sized", "lazy"])
def test_it_writes_one_gaussian_and_an_action(kind, batch, in_features, device):
    actor = make_actor(kind, in_features=in_features, return_log_prob=True, device=device)
    out = actor(observe(*batch).to(device))
    assert {key: tuple(out[key].shape) for key in actor.out_keys} == {
        "loc": (*batch, ACTION),
        "scale": (*batch, ACTION),
        "action": (*batch, ACTION),
        "action_log_prob": batch,
    }
    assert type(actor.get_dist(observe(*batch).to(device))) is TanhNormal


@every_actor
@pytest.mark.parametrize("make_loss", [sac_loss, ppo_loss])
def test_an_unmodified_loss_trains_trunk_experts_and_router(kind, make_loss):
    actor = make_actor(kind)
    loss = make_loss(actor, torch.float32)
    total(loss(online_batch(actor, torch.float32))).backward()
    for name, p in actor.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


@every_actor
def test_deterministic_exploration_takes_the_squashed_loc_within_the_bounds(kind):
    low, high = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 1.0, 4.0])
    actor = make_actor(kind, spec=Bounded(low, high), head_init=5.0)
    with set_exploration_type(DETERMINISTIC):
        out = actor(observe(50))
    expected = out["loc"].tanh() * (high - low) / 2 + (high + low) / 2
    torch.testing.assert_close(out["action"], expected, rtol=1e-5, atol=1e-5)
    assert ((out["action"] >= low) & (out["action"] <= high)).all()


@every_actor
@pytest.mark.parametrize("state_dependent_scale", [True, False])
@pytest.mark.parametrize("router", ["detached", "shared", "separate"])
def test_it_has_as_many_parameters_as_the_mixture_of_the_same_size(kind, router, state_dependent_scale):
    sizes = [
        sum(p.numel() for p in make_actor(k, router=router, state_dependent_scale=state_dependent_scale).parameters())
        for k in (kind, PMOEActor)
    ]
    assert sizes[0] == sizes[1]


@every_actor
@pytest.mark.parametrize("router", [None, "detached", "shared", "separate"])
def test_who_the_router_trains(kind, router):
    """Experts that do not look at the state: what reaches the trunk comes through the router."""
    actor = make_actor(kind, router=router)
    network = actor[0].module[0]
    nn.init.zeros_(network.experts.weight)
    actor.get_dist(observe(8)).loc.square().sum().backward()
    trunk = any(p.grad is not None and p.grad.any() for p in network.trunk.parameters())
    assert trunk == (router in (None, "shared"))
    assert all(p.grad.any() for p in actor.router_parameters())


@every_actor
def test_a_router_of_ones_own_reads_the_inputs(kind):
    router = nn.Linear(OBSERVATION, EXPERTS)
    actor, data = make_actor(kind, router=router), observe(6)
    before = actor.get_dist(data).loc
    with torch.no_grad():
        router.bias[2] += 50.0
    assert (actor.get_dist(data).loc != before).all()
    assert {id(p) for p in actor.router_parameters()} == {id(p) for p in router.parameters()}


@every_actor
@pytest.mark.parametrize("router", ["detached", "shared", "separate"])
def test_router_parameters_are_those_that_no_expert_depends_on(kind, router):
    actor = make_actor(kind, router=router)
    for k in range(EXPERTS):
        dist = actor.expert(k).get_dist(observe(8))
        (dist.loc.square().sum() + dist.scale.square().sum()).backward()
    routers = {id(p) for p in actor.router_parameters()}
    assert {id(p) for p in actor.parameters() if p.grad is None or not p.grad.any()} == routers


@every_actor
@pytest.mark.parametrize("k", [0, EXPERTS - 1])
def test_an_expert_is_its_own_gaussian_and_shares_the_parameters(kind, k):
    actor, data = make_actor(kind, spec=Bounded(-2, 3, (ACTION,))), observe(6)
    expert = actor.expert(k)
    assert {id(p) for p in expert.parameters()} == {id(p) for p in actor.parameters()}
    network = actor[0].module[0]
    for _ in range(2):
        features = network.experts(network.trunk(data["observation"]))
        loc, log_scale = features.unflatten(-1, (2, EXPERTS, ACTION)).unbind(1)
        alone = expert.get_dist(data.clone())
        assert isinstance(alone, TanhNormal)
        torch.testing.assert_close((alone.loc, alone.scale), (loc[:, k], log_scale[:, k].exp()))
        with torch.no_grad():
            network.experts.bias.add_(0.1)
    with set_exploration_type(DETERMINISTIC):
        action = expert(data.clone())["action"]
    torch.testing.assert_close(action, expert.get_dist(data.clone()).loc.tanh() * 2.5 + 0.5)


@every_actor
def test_an_unbounded_spec_takes_an_independent_normal(kind):
    actor = make_actor(kind, spec=Unbounded((ACTION,)), distribution_class=IndependentNormal, return_log_prob=True)
    data = observe(6)
    out = actor(data.clone())
    expected = torch.distributions.Normal(out["loc"], out["scale"]).log_prob(out["action"]).sum(-1)
    torch.testing.assert_close(out["action_log_prob"], expected)
    assert isinstance(actor.expert(1).get_dist(data), IndependentNormal)


@every_actor
@pytest.mark.parametrize("k", [EXPERTS, -1])
def test_an_expert_out_of_range_is_an_index_error(kind, k):
    with pytest.raises(IndexError, match=f"expert {k} .* {EXPERTS} experts"):
        make_actor(kind).expert(k)


# ---------------------------------------------------------------------- networks, keys, bounds


@every_actor
def test_network_is_any_module_that_ends_in_the_features(kind):
    network = nn.Linear(OBSERVATION, EXPERTS * (2 * ACTION + 1))
    actor, data = make_actor(kind, network=network, scale_mapping="exp"), observe(6)
    logits, loc, scale = network(data["observation"]).split((EXPERTS, EXPERTS * ACTION, EXPERTS * ACTION), -1)
    experts = (loc.unflatten(-1, (EXPERTS, ACTION)), scale.unflatten(-1, (EXPERTS, ACTION)).exp())
    expected = actor[0].module[-1](logits, *experts)
    out = actor(data)
    torch.testing.assert_close((out["loc"], out["scale"]), expected)
    torch.testing.assert_close(actor.expert(2).get_dist(data).loc, experts[0][:, 2])
    with pytest.raises(ValueError, match="built-in"):
        actor.router_parameters()


@every_actor
def test_nested_keys(kind):
    spec = Composite(agents=Composite(action=Bounded(-1, 1, (2, ACTION)), other=Unbounded((2, 1)), shape=(2,)))
    keys = {"out_keys": [("agents", "action")], "param_keys": [("agents", "mu"), "sigma"]}
    actor = make_actor(kind, spec=spec, in_keys=[("agents", "seen")], return_log_prob=True, **keys)
    seen = TensorDict(seen=torch.randn(6, 2, OBSERVATION), batch_size=(6, 2))
    out = actor(TensorDict(agents=seen, batch_size=6))
    assert out["agents", "mu"].shape == out["sigma"].shape == out["agents", "action"].shape == (6, 2, ACTION)
    assert out["agents", "action_log_prob"].shape == (6, 2)


@every_actor
def test_bounds_given_by_hand_win_over_the_specs(kind):
    for given, low, high in (({"low": -0.5, "high": 0.25}, -0.5, 0.25), ({"low": -0.5}, -0.5, 1.0)):
        actor = make_actor(kind, distribution_kwargs=given, head_init=30.0)
        action = actor(observe(200))["action"]
        assert low <= action.min() < low + 0.1
        assert high - 0.1 < action.max() <= high


BAD = {
    "router beside network": ({"network": nn.Identity(), "router": "shared"}, "router= .*network="),
    "unknown router": ({"router": "foo"}, "router='foo'.*detached, shared, separate"),
    "no hidden layer": ({"num_cells": ()}, "num_cells"),
    "unbounded": ({"spec": Unbounded((ACTION,))}, "IndependentNormal takes an unbounded one.*got Unbounded"),
    "discrete": ({"spec": OneHot(3)}, "box of floats, got OneHot"),
    "infinite bounds": ({"spec": Bounded(-torch.inf, torch.inf, (ACTION,))}, "finite"),
    "two actions": ({"spec": Composite(a=Bounded(-1, 1, (1,)), b=Bounded(-1, 1, (1,)))}, r"\['a', 'b'\]"),
    "two action keys": ({"out_keys": ["a", "b"]}, r"one action, got \['a', 'b'\]"),
    "three parameter keys": ({"param_keys": ["logits", "loc", "scale"]}, "loc and scale, got .*logits"),
}


@pytest.mark.parametrize("kind", [GatingActor, MCPActor])
@pytest.mark.parametrize(("kwargs", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named_in_one_line(kind, kwargs, message):
    with pytest.raises(ValueError, match=f"^{kind.__name__}: .*{message}") as error:
        make_actor(kind, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("blend", ["x", None, 0])
def test_an_unknown_blend_is_named_in_one_line(blend):
    message = f"^GatingActor: blend={blend!r} is unknown; allowed: parameters, actions"
    with pytest.raises(ValueError, match=message) as error:
        make_actor(GatingActor, blend=blend)
    assert "\n" not in str(error.value)


@every_actor
@pytest.mark.parametrize("experts", [0, -3, 2.5])
def test_num_experts_is_a_positive_integer(kind, experts):
    with pytest.raises(ValueError, match=f"num_experts={experts}"):
        make_actor(kind, experts)


# ---------------------------------------------------------------------- copies


@every_actor
@pytest.mark.parametrize("router", ["shared", "separate"])
def test_state_dict_carries_the_policy(kind, router):
    one, other = (make_actor(kind, router=router, return_log_prob=True) for _ in range(2))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    same_outputs(one, other)


@every_actor
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_the_same_policy_with_parameters_of_their_own(kind, copied):
    actor = make_actor(kind, spec=Bounded(torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 1.0, 4.0])))
    actor(observe(2))
    twin = copied(actor)
    same_outputs(actor, twin)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in actor.parameters()}
    assert twin.num_experts == EXPERTS
    data = observe(3)
    torch.testing.assert_close(twin.expert(1).get_dist(data).loc, actor.expert(1).get_dist(data).loc)
