"""PMOEActor: what it writes, who gets which gradient, one expert alone, copies, other ways to act with its experts."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential, set_interaction_type
from torch import nn
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import Bounded, Composite, OneHot, Unbounded
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    ExplorationType,
    GymEnv,
    InitTracker,
    TransformedEnv,
    set_exploration_type,
)
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss

from torchrl_pmoe import (
    BestOfExpertsActor,
    MeanOfDrawnExpertActor,
    MixtureParamExtractor,
    NormalMixture,
    PMOEActor,
    PMOEClipPPOLoss,
    PMOESACLoss,
    PMOETQCLoss,
    TanhNormalMixture,
)

EXPERTS, OBSERVATION, ACTION = 4, 5, 3
DETERMINISTIC = ExplorationType.DETERMINISTIC


def make_actor(**kwargs) -> PMOEActor:
    options = {"spec": Bounded(-1, 1, (ACTION,)), "in_features": OBSERVATION, "num_cells": (16, 16), "head_init": 0.3}
    if "network" in kwargs:
        options = {"spec": options["spec"]}
    return PMOEActor(EXPERTS, **{**options, **kwargs})


def observe(*batch: int) -> TensorDict:
    return TensorDict(observation=torch.randn(*batch, OBSERVATION), batch_size=batch)


def same_outputs(one: PMOEActor, other: PMOEActor) -> None:
    data = observe(6)
    with set_exploration_type(DETERMINISTIC):
        torch.testing.assert_close(one(data.clone()).to_dict(), other(data.clone()).to_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------------- keys, shapes, bounds


@pytest.mark.parametrize("batch", [(), (0,), (7,), (2, 3)])
@pytest.mark.parametrize("in_features", [OBSERVATION, None], ids=["sized", "lazy"])
@pytest.mark.parametrize("router", ["detached", "shared", "separate"])
def test_it_writes_the_mixture_and_an_action(batch, in_features, router, device):
    actor = make_actor(in_features=in_features, router=router, return_log_prob=True, device=device)
    out = actor(observe(*batch).to(device))
    shapes = {key: tuple(out[key].shape) for key in actor.out_keys}
    assert shapes == {
        "logits": (*batch, EXPERTS),
        "loc": (*batch, EXPERTS, ACTION),
        "scale": (*batch, EXPERTS, ACTION),
        "action": (*batch, ACTION),
        "action_log_prob": batch,
    }
    assert actor.spec["action"].is_in(out["action"]) or 0 in batch


def test_without_return_log_prob_no_log_density_is_written():
    assert list(make_actor()(observe(2)).keys()) == ["observation", "logits", "loc", "scale", "action"]


def test_get_dist_is_the_mixture_with_the_options_given():
    actor = make_actor(distribution_kwargs={"routing": "soft_frequency", "routing_coef": 2.0, "score": "expert"})
    dist = actor.get_dist(observe(2))
    assert isinstance(dist, TanhNormalMixture)
    assert (dist.routing.value, dist.routing_coef, dist.score) == ("soft_frequency", 2.0, "expert")


SPECS = {
    "uniform": (Bounded(-2, 3, (ACTION,)), [-2.0] * 3, [3.0] * 3),
    "per dimension": (
        Bounded(torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 1.0, 4.0])),
        [-1.0, -2.0, 0.0],
        [1.0, 1.0, 4.0],
    ),
    "batched": (Bounded(-2, 3, (7, ACTION)), [-2.0] * 3, [3.0] * 3),
    "composite": (Composite(action=Bounded(-2, 3, (ACTION,))), [-2.0] * 3, [3.0] * 3),
    "batched composite": (Composite(action=Bounded(-2, 3, (7, ACTION)), shape=(7,)), [-2.0] * 3, [3.0] * 3),
}


@pytest.mark.parametrize(("spec", "low", "high"), SPECS.values(), ids=SPECS)
def test_the_spec_bounds_the_actions(spec, low, high):
    actor = make_actor(spec=spec, head_init=30.0)
    dist = actor.get_dist(observe(7))
    bounds = [torch.as_tensor(bound).expand(ACTION).tolist() for bound in (dist.low, dist.high)]
    assert bounds == [low, high]
    assert isinstance(dist.low, torch.Tensor) == (len(set(low)) > 1)
    action = actor(observe(7))["action"]
    assert (action >= torch.tensor(low)).all()
    assert (action <= torch.tensor(high)).all()
    assert (dist.sample((100,)).amax((0, 1)) > torch.tensor(high) - 0.5).all()


def test_bounds_given_by_hand_win_over_the_specs():
    dist = make_actor(distribution_kwargs={"low": -0.5, "high": 0.5}).get_dist(observe(2))
    assert (dist.low, dist.high) == (-0.5, 0.5)


def test_bounds_follow_the_network_to_another_dtype():
    actor = make_actor(spec=SPECS["per dimension"][0]).double()
    assert actor(observe(7).double())["action"].dtype == torch.float64


def test_an_unbounded_spec_takes_a_normal_mixture():
    actor = make_actor(spec=Unbounded((ACTION,)), distribution_class=NormalMixture)
    assert type(actor.get_dist(observe(2))) is NormalMixture
    assert actor(observe(2))["action"].shape == (2, ACTION)


def test_nested_keys():
    spec = Composite(agents=Composite(action=Bounded(-1, 1, (2, ACTION)), shape=(2,)))
    actor = make_actor(spec=spec, in_keys=[("agents", "observation")], return_log_prob=True)
    data = TensorDict(agents=TensorDict(observation=torch.randn(6, 2, OBSERVATION), batch_size=(6, 2)), batch_size=6)
    out = actor(data)
    assert out["agents", "action"].shape == (6, 2, ACTION)
    assert out["agents", "action_log_prob"].shape == (6, 2)
    recomputed = actor.get_dist(data).log_prob(out["agents", "action"])
    torch.testing.assert_close(out["agents", "action_log_prob"], recomputed, rtol=0, atol=0)


def test_parameters_can_be_written_elsewhere():
    keys = [("agents", "logits"), ("agents", "loc"), "sigma"]
    out = make_actor(param_keys=keys, log_prob_key="lp", return_log_prob=True)(observe(2))
    assert {"lp", "sigma", "action"} <= set(out.keys())
    assert out["agents", "loc"].shape == (2, EXPERTS, ACTION)


def test_several_inputs_are_concatenated_in_their_order():
    whole, parts = make_actor(), make_actor(in_keys=["a", "b"])
    parts.load_state_dict(whole.state_dict())
    data = observe(4)
    split = TensorDict(a=data["observation"][:, :2], b=data["observation"][:, 2:], batch_size=4)
    torch.testing.assert_close(parts.get_dist(split).loc, whole.get_dist(data).loc)


# ---------------------------------------------------------------------- who gets which gradient


def _gradient_of_logits(actor: PMOEActor) -> dict[str, bool]:
    logits = actor.get_dist(observe(8)).logits
    logits.square().sum().backward()
    return {
        name.removeprefix("module.0.module.0."): bool(x.grad is not None and x.grad.abs().max() > 0)
        for name, x in actor.named_parameters()
    }


@pytest.mark.parametrize(("router", "trains_trunk"), [("detached", False), ("shared", True), ("separate", False)])
def test_who_the_router_trains(router, trains_trunk):
    gets_gradient = _gradient_of_logits(make_actor(router=router))
    for name, nonzero in gets_gradient.items():
        expected = name.startswith("router.") or (trains_trunk and name.startswith("trunk."))
        assert nonzero == expected, name


def test_a_router_of_ones_own_reads_the_inputs():
    router = nn.Linear(OBSERVATION, EXPERTS)
    actor, data = make_actor(router=router), observe(3)
    torch.testing.assert_close(actor.get_dist(data).logits, router(data["observation"]))
    assert not any(x for name, x in _gradient_of_logits(actor).items() if not name.startswith("router."))


@pytest.mark.parametrize("router", ["detached", "shared", "separate"])
def test_router_parameters_are_those_the_logits_alone_depend_on(router):
    actor = make_actor(router=router)
    routers = {id(x) for x in actor.router_parameters()}
    dist = actor.get_dist(observe(4))
    (dist.loc.square().sum() + dist.scale.square().sum()).backward()
    assert {id(x) for x in actor.parameters() if x.grad is None or (x.grad == 0).all()} == routers


def test_a_network_of_ones_own_has_no_router_to_tell_apart():
    with pytest.raises(ValueError, match="built-in"):
        make_actor(network=nn.Linear(OBSERVATION, EXPERTS * (2 * ACTION + 1))).router_parameters()


@pytest.mark.parametrize("depends", [True, False])
def test_scale_may_or_may_not_depend_on_the_state(depends):
    scale = make_actor(state_dependent_scale=depends).get_dist(observe(8)).scale
    assert (scale.std(0) > 0).all() == depends
    scale.sum().backward()


def test_a_state_independent_scale_is_learned_per_expert_and_dimension():
    actor = make_actor(state_dependent_scale=False)
    actor.get_dist(observe(8)).scale.sum().backward()
    learned = [x for x in actor.parameters() if x.grad is not None and x.grad.abs().max() > 0]
    assert [tuple(x.shape) for x in learned] == [(EXPERTS * ACTION,)]


def test_heads_start_as_the_authors_do():
    actor = PMOEActor(EXPERTS, spec=Bounded(-1, 1, (ACTION,)), in_features=OBSERVATION)
    dist = actor.get_dist(observe(50))
    assert dist.logits.abs().max() < 0.1
    assert dist.loc.abs().max() < 0.1
    torch.testing.assert_close(dist.scale, torch.ones_like(dist.scale), rtol=0, atol=0.1)


def test_loc_spread_sets_the_experts_apart():
    loc = make_actor(head_init=1e-3, loc_spread=2.0).get_dist(observe(50)).loc
    assert loc.std(1).mean() > 0.5
    assert loc.std(0).max() < 0.1


# ---------------------------------------------------------------------- the log-density that is stored


@pytest.mark.parametrize("score", ["mixture", "expert"])
@pytest.mark.parametrize("init", [0.3, 30.0], ids=["ordinary", "saturated"])
@pytest.mark.parametrize("kind", [InteractionType.RANDOM, InteractionType.DETERMINISTIC])
def test_the_stored_log_density_is_the_mixtures_at_the_stored_action(score, init, kind):
    actor = make_actor(head_init=init, return_log_prob=True, distribution_kwargs={"score": score})
    with set_interaction_type(kind):
        out = actor(observe(500))
    mixture = TanhNormalMixture(out["logits"], out["loc"], out["scale"])
    torch.testing.assert_close(out["action_log_prob"], mixture.log_prob(out["action"]), rtol=0, atol=0)
    assert out["action_log_prob"].isfinite().all()


def test_deterministic_exploration_follows_the_likeliest_expert():
    actor = make_actor()
    with set_exploration_type(DETERMINISTIC):
        out = actor(observe(20))
    likeliest = out["logits"].argmax(-1)
    torch.testing.assert_close(out["action"], out["loc"][torch.arange(20), likeliest].tanh())


def test_random_exploration_is_the_default_and_can_be_changed():
    actor, calm = make_actor(), make_actor(default_interaction_type=InteractionType.DETERMINISTIC)
    data = observe(20)
    assert (actor(data.clone())["action"] != actor(data.clone())["action"]).all()
    assert (calm(data.clone())["action"] == calm(data.clone())["action"]).all()


# ---------------------------------------------------------------------- one expert alone


@pytest.mark.parametrize("k", [0, EXPERTS - 1])
def test_an_expert_is_a_tanh_normal_with_its_loc_and_scale(k):
    actor = make_actor(spec=SPECS["per dimension"][0], return_log_prob=True).double()
    data = observe(6).double()
    whole, alone = actor.get_dist(data), actor.expert(k).get_dist(data)
    value = whole.sample()
    assert isinstance(alone, TanhNormal)
    torch.testing.assert_close(alone.loc, whole.loc[:, k])
    torch.testing.assert_close(alone.scale, whole.scale[:, k])
    torch.testing.assert_close(alone.log_prob(value), whole.expert_log_prob(value)[:, k])
    out = actor.expert(k)(data)
    assert out["action"].shape == (6, ACTION)
    assert out["action_log_prob"].shape == (6,)


def test_an_expert_shares_the_actors_parameters():
    actor = make_actor()
    expert = actor.expert(1)
    assert {id(x) for x in expert.parameters()} == {id(x) for x in actor.parameters()}
    with torch.no_grad():
        for x in actor.parameters():
            x.add_(0.1)
    data = observe(6)
    torch.testing.assert_close(expert.get_dist(data).loc, actor.get_dist(data).loc[:, 1])


def test_an_expert_acts_deterministically_on_its_own_squashed_loc():
    actor, data = make_actor(), observe(6)
    with set_exploration_type(DETERMINISTIC):
        torch.testing.assert_close(actor.expert(2)(data.clone())["action"], actor.get_dist(data).loc[:, 2].tanh())


def test_an_unbounded_expert_is_a_normal():
    actor, data = make_actor(spec=Unbounded((ACTION,)), distribution_class=NormalMixture), observe(6)
    alone = actor.expert(1).get_dist(data)
    value = torch.randn(6, ACTION)
    assert isinstance(alone, IndependentNormal)
    torch.testing.assert_close(alone.log_prob(value), actor.get_dist(data).expert_log_prob(value)[:, 1])


@pytest.mark.parametrize("k", [EXPERTS, -1, 100])
def test_an_expert_out_of_range_is_an_index_error(k):
    with pytest.raises(IndexError, match=f"expert {k} .* {EXPERTS} experts"):
        make_actor().expert(k)


# ---------------------------------------------------------------------- any network, bad input


def test_network_is_any_module_that_ends_in_the_features():
    network = nn.Linear(OBSERVATION, EXPERTS * (2 * ACTION + 1))
    actor, data = make_actor(network=network, scale_mapping="exp"), observe(6)
    logits, loc, scale = MixtureParamExtractor(EXPERTS, "exp", 0.0)(network(data["observation"]))
    out = actor(data)
    torch.testing.assert_close((out["logits"], out["loc"], out["scale"]), (logits, loc, scale))


def test_floor_reaches_the_router():
    probs = make_actor(head_init=100.0, floor=0.2).get_dist(observe(50)).probs
    torch.testing.assert_close(probs.min(), torch.tensor(0.2 / EXPERTS))


BAD = {
    "router beside network": ({"network": nn.Identity(), "router": "detached"}, "router= .*network="),
    "separate router beside network": ({"network": nn.Identity(), "router": "separate"}, "router= .*network="),
    "unknown router": ({"router": "foo"}, "router='foo'.*detached, shared, separate"),
    "no hidden layer": ({"num_cells": ()}, "num_cells"),
    "unbounded": ({"spec": Unbounded((ACTION,))}, "bounded"),
    "discrete": ({"spec": OneHot(3)}, "box of floats, got OneHot"),
    "infinite bounds": ({"spec": Bounded(-torch.inf, torch.inf, (ACTION,))}, "finite"),
    "two actions": ({"spec": Composite(a=Bounded(-1, 1, (1,)), b=Bounded(-1, 1, (1,)))}, r"\['a', 'b'\]"),
    "another distribution": ({"distribution_class": TanhNormal}, "got TanhNormal"),
    "two parameter keys": ({"param_keys": ["loc", "scale"]}, "param_keys"),
}


@pytest.mark.parametrize(("kwargs", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_actor(**kwargs)


@pytest.mark.parametrize("experts", [0, -3, 2.5])
def test_num_experts_is_a_positive_integer(experts):
    with pytest.raises(ValueError, match=f"num_experts={experts}"):
        PMOEActor(experts, spec=Bounded(-1, 1, (ACTION,)))


# ---------------------------------------------------------------------- copies, composition


@pytest.mark.parametrize("router", ["detached", "shared", "separate"])
@pytest.mark.parametrize("spec", [SPECS["uniform"][0], SPECS["per dimension"][0]], ids=["uniform", "per-dimension"])
def test_state_dict_carries_the_policy(router, spec):
    one, other = (make_actor(router=router, spec=spec, return_log_prob=True) for _ in range(2))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    same_outputs(one, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("router", ["detached", "shared", "separate"])
def test_copies_are_the_same_policy_with_parameters_of_their_own(copied, router):
    actor = make_actor(router=router, spec=SPECS["per dimension"][0], return_log_prob=True)
    actor(observe(2))
    twin = copied(actor)
    same_outputs(actor, twin)
    assert not {id(x) for x in twin.parameters()} & {id(x) for x in actor.parameters()}
    torch.testing.assert_close(twin.expert(1).get_dist(data := observe(3)).loc, actor.get_dist(data).loc[:, 1])


def test_it_takes_part_in_a_tensordict_sequential():
    encode = TensorDictModule(nn.Linear(7, OBSERVATION), in_keys=["pixels"], out_keys=["observation"])
    chain = TensorDictSequential(encode, make_actor(return_log_prob=True))
    out = chain(TensorDict(pixels=torch.randn(4, 7), batch_size=4))
    out["action"].sum().backward()
    assert encode.module.weight.grad.abs().max() > 0
    assert out["action_log_prob"].shape == (4,)


def test_an_update_through_the_actor_trains_router_and_experts():
    actor = make_actor()
    action, log_prob = actor.get_dist(observe(16)).rsample_and_log_prob()
    (0.1 * log_prob + (action - 0.5).square().sum(-1)).mean().backward()
    assert all(x.grad.abs().max() > 0 for x in actor.parameters())


def test_a_plain_probabilistic_actor_takes_the_mixture_too():
    network = nn.Sequential(nn.Linear(OBSERVATION, EXPERTS * (2 * ACTION + 1)), MixtureParamExtractor(EXPERTS))
    keys = ["logits", "loc", "scale"]
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=keys),
        in_keys=keys,
        spec=Bounded(-2, 2, (ACTION,)),
        distribution_class=TanhNormalMixture,
        distribution_kwargs={"low": -2, "high": 2},
        return_log_prob=True,
    )
    out = actor.double()(observe(6).double())
    torch.testing.assert_close(out["action_log_prob"], actor.get_dist(out).log_prob(out["action"]))


# ---------------------------------------------------------------------- the best of the experts' proposals


def _distance_to(goal: float):
    return lambda tensordict, proposals: -(proposals - goal).square().sum(-1)


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
def test_deterministically_it_takes_the_squashed_loc_that_scores_best(batch):
    actor, data = make_actor(head_init=3.0), observe(*batch)
    out = BestOfExpertsActor(actor, _distance_to(0.5))
    with set_exploration_type(DETERMINISTIC):
        action = out(data.clone())["action"]
    locs = actor.get_dist(data).loc.tanh()
    best = (locs - 0.5).square().sum(-1).argmin(-1)
    expected = torch.stack([row[k] for row, k in zip(locs.reshape(-1, 4, 3), best.reshape(-1), strict=True)])
    torch.testing.assert_close(action, expected.reshape(*batch, ACTION))
    assert not action.requires_grad


def test_exploring_it_takes_the_best_of_one_draw_per_expert():
    actor, data = make_actor(), observe(6)
    seen = []

    def score(tensordict, proposals):
        assert tensordict is data
        seen.append(proposals)
        return proposals[..., 0]

    actions = [BestOfExpertsActor(actor, score)(data)["action"].clone() for _ in range(2)]
    for proposals, action in zip(seen, actions, strict=True):
        best = proposals[..., 0].argmax(-1)
        torch.testing.assert_close(action, proposals[torch.arange(6), best])
    assert (actions[0] != actions[1]).all()


def test_best_of_experts_keeps_the_actors_keys_and_distribution():
    spec = Composite(agents=Composite(action=Bounded(-1, 1, (ACTION,))))
    actor = make_actor(spec=spec, in_keys=[("agents", "observation")])
    best = BestOfExpertsActor(actor, _distance_to(0.0))
    data = TensorDict(agents=TensorDict(observation=torch.randn(6, OBSERVATION), batch_size=6), batch_size=6)
    assert (best.in_keys, best.out_keys) == (actor.in_keys, [("agents", "action")])
    assert best(data)["agents", "action"].shape == (6, ACTION)
    torch.testing.assert_close(best.get_dist(data).loc, actor.get_dist(data).loc)


class Sign(nn.Module):
    """Prefers large or small actions, as the sign of its only parameter says."""

    def __init__(self):
        super().__init__()
        self.sign = nn.Parameter(torch.ones(()))

    def forward(self, observation, action):
        return (self.sign * action).sum(-1, keepdim=True) + 0.0 * observation.sum(-1, keepdim=True)


def two_opposite_experts(kind):
    """An actor whose experts push with all their force to one side each, judged by ``kind``'s critics."""
    actor = PMOEActor(2, spec=Bounded(-2, 2, (1,)), in_features=3, num_cells=(4,), head_init=0.0, return_log_prob=True)
    with torch.no_grad():
        actor[0].module[0].experts.bias[:2] = torch.tensor([-5.0, 5.0])
    critic = ValueOperator(Sign(), in_keys=["observation", "action"])
    if kind is PMOEClipPPOLoss:
        return actor, kind(actor, ValueOperator(nn.Linear(3, 1), in_keys=["observation"]), critic)
    return actor, kind(actor, critic)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [PMOESACLoss, PMOETQCLoss, PMOEClipPPOLoss])
def test_a_pickled_best_of_experts_is_one_actor_with_its_critics(kind):
    actor, loss = two_opposite_experts(kind)
    best = BestOfExpertsActor(actor, loss.score_proposals)
    assert {id(p) for p in loss.qvalue_network_params.parameters()} <= {id(p) for p in best.parameters()}
    copied = pickle.loads(pickle.dumps(best))
    states = TensorDict(observation=torch.randn(4, 3), batch_size=4)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert (best(states.clone())["action"] > 1).all()
        with torch.no_grad():
            copied.critics.qvalue_network_params.apply_(torch.neg_)
        assert (copied(states.clone())["action"] < -1).all()
        assert (best(states.clone())["action"] > 1).all()


def make_pendulum():
    return TransformedEnv(GymEnv("Pendulum-v1"), Compose(DoubleToFloat(), InitTracker()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("collector", [Collector, MultiSyncCollector])
def test_an_update_of_the_policys_weights_brings_the_critics_into_the_collector(collector):
    actor, loss = two_opposite_experts(PMOESACLoss)
    collected = collector(
        [make_pendulum] if collector is MultiSyncCollector else make_pendulum,
        BestOfExpertsActor(actor, loss.score_proposals),
        frames_per_batch=4,
        total_frames=100,
        exploration_type=ExplorationType.DETERMINISTIC,
    )
    try:
        batches = iter(collected)
        assert (next(batches)["action"] > 1).all()
        with torch.no_grad():
            loss.qvalue_network_params.apply_(torch.neg_)
        collected.update_policy_weights_()
        next(batches)  # may have been under way
        assert (next(batches)["action"] < -1).all()
    finally:
        collected.shutdown()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("router", ["detached", "separate"])
@pytest.mark.parametrize("state_dependent_scale", [True, False])
def test_a_reset_actor_starts_as_a_fresh_one(state_dependent_scale, router):
    """TorchRL's losses reset what they hold: heads within ``head_init``, spread locs, scales of one."""
    actor = make_actor(
        head_init=1e-3, loc_spread=1.0, state_dependent_scale=state_dependent_scale, router=router, num_cells=(16,)
    )
    loss = SACLoss(
        actor, ValueOperator(MLP(in_features=OBSERVATION + ACTION, out_features=1), ["observation", "action"])
    )
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter += 1000.0
    loss.reset_parameters_recursive()
    network = actor[0].module[0]
    assert max(p.abs().max() for p in actor.parameters()) <= 1.0  # nothing is left as it was
    head = network.router[1] if router == "separate" else network.router
    for layer in (network.experts, head):
        assert 0.5e-3 < layer.weight.abs().max() <= 1e-3
    locs = network.experts.bias[: EXPERTS * ACTION]
    assert 0.1 < locs.abs().max() <= 1.0
    assert network.experts.bias[EXPERTS * ACTION :].abs().sum() < 1e-3 * EXPERTS * ACTION
    if not state_dependent_scale:
        assert (network.log_scale == 0).all()
    assert network.trunk[0].weight.abs().max() > 0.1


# ---------------------------------------------------------------------- the mean of a drawn expert


@pytest.mark.parametrize("exploration", [ExplorationType.DETERMINISTIC, ExplorationType.RANDOM])
def test_the_mean_of_an_expert_is_played_as_often_as_the_router_draws_it(exploration):
    logits = torch.tensor([0.5, -1.0, 1.2, -0.3])
    loc = torch.tensor([[-2.0], [-0.5], [0.1], [1.5]])
    network = nn.Linear(OBSERVATION, 3 * EXPERTS)
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(torch.cat([logits, loc.flatten(), torch.zeros(EXPERTS)]))
    actor = PMOEActor(EXPERTS, spec=Bounded(-1, 3, (1,)), network=network)
    number = 20_000
    with set_exploration_type(exploration):
        action = MeanOfDrawnExpertActor(actor)(observe(number))["action"]
    means = 1 + 2 * torch.tanh(loc.squeeze(-1))  # onto [-1, 3]
    played = (action - means).abs() < 1e-5  # [number, K]
    assert (played.sum(-1) == 1).all()
    expected = logits.exp() / logits.exp().sum()
    tolerance = 4 * (expected * (1 - expected) / number).sqrt()
    assert ((played.float().mean(0) - expected).abs() < tolerance).all()


@pytest.mark.parametrize("batch", [(), (0,), (7,), (2, 3)])
def test_the_mean_of_a_drawn_expert_in_any_batch_shape(batch, device):
    actor = make_actor(device=device, head_init=2.0)
    states = observe(*batch).to(device)
    drawn = MeanOfDrawnExpertActor(actor)(states.clone())
    means = actor.get_dist(states).loc.tanh()  # [*batch, K, A]
    played = (drawn["action"].unsqueeze(-2) - means).abs().amax(-1) < 1e-5
    assert played.shape == (*batch, EXPERTS)
    assert (played.sum(-1) == 1).all()


def test_the_mean_of_a_drawn_expert_goes_where_the_actors_action_goes():
    actor = make_actor(in_keys=[("agent", "seen")], out_keys=[("agent", "move")])
    drawn = MeanOfDrawnExpertActor(actor)
    assert drawn.in_keys == [("agent", "seen")]
    assert drawn.out_keys == [("agent", "move")]
    data = drawn(TensorDict(agent=TensorDict(seen=torch.randn(6, OBSERVATION), batch_size=6), batch_size=6))
    assert data["agent", "move"].shape == (6, ACTION)
    assert "action" not in data


AGENTS = 3


def agents_spec(low, high):
    return Composite(agents=Composite(action=Bounded(low, high), shape=(AGENTS,)))


@pytest.mark.parametrize("by_kwargs", [True, False])
def test_agents_may_have_boxes_of_their_own(by_kwargs):
    """Bounds ``[agents, A]``, from the spec or by hand, as TorchRL's ``TanhNormal`` takes them."""
    high = torch.arange(1.0, 1 + AGENTS * ACTION).reshape(AGENTS, ACTION)
    low = -2 * high
    spec = (
        agents_spec(-100 * torch.ones_like(high), 100 * torch.ones_like(high)) if by_kwargs else agents_spec(low, high)
    )
    actor = PMOEActor(
        EXPERTS,
        spec=spec,
        in_features=OBSERVATION,
        in_keys=[("agents", "observation")],
        head_init=3.0,
        distribution_kwargs={"low": low, "high": high} if by_kwargs else None,
    )
    data = TensorDict(
        agents=TensorDict(observation=torch.randn(50, AGENTS, OBSERVATION), batch_size=(50, AGENTS)), batch_size=50
    )
    action = actor(data)["agents", "action"]
    assert (action >= low).all()
    assert (action <= high).all()
    assert ((action.amax(0) - high).abs() < 0.1 * high).all()
    assert ((action.amin(0) - low).abs() < 0.1 * high).all()
    one = actor.expert(1)(data.clone())["agents", "action"]
    assert ((one >= low) & (one <= high)).all()


def test_bounds_that_all_environments_of_a_batch_share_fit_any_batch():
    spec = Bounded(-torch.arange(1.0, 1 + ACTION).expand(8, ACTION), torch.ones(8, ACTION))
    actor = PMOEActor(EXPERTS, spec=spec, in_features=OBSERVATION)
    assert actor[-1].distribution_kwargs["low"].shape == (ACTION,)
    assert actor(observe(5))["action"].shape == (5, ACTION)
