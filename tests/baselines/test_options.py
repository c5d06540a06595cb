"""OptionActor: its two levels against formulas written out, and options carried through a collector."""

from __future__ import annotations

import itertools

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Unbounded
from torchrl.envs import GymEnv, InitTracker, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal, TanhNormal

from torchrl_pmoe import NormalMixture, TanhNormalMixture
from torchrl_pmoe.baselines.options import OptionActor

K, A, OBSERVATION = 3, 2, 4
F64 = torch.float64


def make_actor(bounded=False, num_options=K, **kwargs):
    spec = Bounded(-2, 1, (A,), dtype=F64) if bounded else Unbounded((A,), dtype=F64)
    options = {
        "in_features": OBSERVATION,
        "distribution_class": TanhNormal if bounded else IndependentNormal,
        "head_init": 1.0,
        **kwargs,
    }
    actor = OptionActor(num_options, spec=spec, **options).double()
    log_scale = getattr(actor.network.module, "log_scale", None)
    if log_scale is not None:  # another one for each option
        nn.init.normal_(log_scale, std=0.5)
    return actor


def states(*batch, is_init=False, num_options=K):
    return TensorDict(
        {
            "observation": torch.randn(*batch, OBSERVATION, dtype=F64),
            "is_init": torch.full((*batch, 1), is_init),
            "previous_option": torch.randint(num_options, (*batch, 1)),
        },
        batch,
    )


# ---------------------------------------------------------------------- the high level


@pytest.mark.parametrize("batch", [(), (7,), (2, 5)])
def test_high_level_is_the_formula_and_sums_to_one(batch):
    actor, td = make_actor(), states(*batch)
    policy = actor.get_policy(td)
    found = actor.get_dist_high(td).probs
    master, ends = policy.logits.softmax(-1), policy.termination_logits.sigmoid()
    torch.testing.assert_close(found.sum(-1), torch.ones(batch, dtype=F64))
    for index in itertools.product(*map(range, batch)):
        before = td["previous_option"][index].item()
        for option in range(K):
            expected = ends[index][before] * master[index][option] + (1 - ends[index][before]) * (option == before)
            assert found[index][option].item() == pytest.approx(expected.item(), rel=1e-10)


def test_where_an_episode_begins_the_master_policy_chooses_alone():
    actor, td = make_actor(), states(9, is_init=True)
    policy = actor.get_policy(td)
    torch.testing.assert_close(actor.get_dist_high(td).probs, policy.logits.softmax(-1))
    torch.testing.assert_close(policy.master_log_prob, policy.logits.log_softmax(-1))
    td["is_init"][4] = False
    assert not torch.allclose(actor.get_dist_high(td).probs[4], policy.logits[4].softmax(-1))


@pytest.mark.parametrize("ends", [-800.0, 800.0])
def test_sure_terminations_keep_densities_and_gradients_finite(ends):
    actor, td = make_actor(), states(6)
    with torch.no_grad():
        actor.network.module.router[-1].bias[K:] = ends
    found = actor.get_policy(td).option_log_prob(td["previous_option"])
    assert found.isfinite().all()
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in actor.network.module.router.parameters())


def test_with_one_option_the_high_level_is_certain():
    actor, td = make_actor(num_options=1), states(6, num_options=1)
    torch.testing.assert_close(actor.get_dist_high(td).probs, torch.ones(6, 1, dtype=F64))


# ---------------------------------------------------------------------- acting


@pytest.mark.parametrize("bounded", [False, True])
def test_what_is_written(bounded):
    actor, td = make_actor(bounded), states(2, 5)
    before = set(td.keys(True, True))
    actor(td)
    assert set(td.keys(True, True)) - before == {*actor.out_keys}
    assert set(actor.in_keys) == before
    assert td["option"].shape == (2, 5, 1)
    assert td["option"].dtype == td["next", "previous_option"].dtype == torch.int64
    assert (td["next", "previous_option"] == td["option"]).all()
    policy = actor.get_policy(td)
    option = td["option"].squeeze(-1)
    expected = actor.get_dist_high(td).log_prob(option)
    torch.testing.assert_close(td["option_log_prob"], expected)
    for b, t in itertools.product(range(2), range(5)):
        loc, scale = policy.loc[b, t, option[b, t]], policy.scale[b, t, option[b, t]]
        if bounded:
            own = TanhNormal(loc, scale, low=torch.tensor(-2.0).double(), high=torch.tensor(1.0).double())
        else:
            own = torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)
        torch.testing.assert_close(td["action_log_prob"][b, t], own.log_prob(td["action"][b, t]))
    torch.testing.assert_close(actor.get_dist_low(td).log_prob(td["action"]), td["action_log_prob"])


def test_draws_follow_both_levels():
    torch.manual_seed(0)
    actor, one = make_actor(), states(1)
    td = one.expand(20_000).clone()
    with torch.no_grad():
        actor(td)
        policy, high = actor.get_policy(one), actor.get_dist_high(one).probs[0]
    option = td["option"].squeeze(-1)
    torch.testing.assert_close(torch.bincount(option, minlength=K) / 20_000.0, high.float(), atol=0.02, rtol=0.0)
    for k in range(K):
        drawn = td["action"][option == k]
        torch.testing.assert_close(drawn.mean(0), policy.loc[0, k], atol=0.1, rtol=0.1)
        torch.testing.assert_close(drawn.std(0), policy.scale[0, k], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", [ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN])
def test_without_exploration_the_likeliest_option_acts_on_its_centre(kind):
    actor, td = make_actor(), states(40)
    with set_exploration_type(kind):
        actor(td)
    likeliest = actor.get_dist_high(td).probs.argmax(-1)
    assert (td["option"].squeeze(-1) == likeliest).all()
    assert (likeliest != td["previous_option"].squeeze(-1)).any()
    assert (likeliest == td["previous_option"].squeeze(-1)).any()
    expected = actor.get_policy(td).loc[torch.arange(40), likeliest]
    torch.testing.assert_close(td["action"], expected)


def test_a_drawn_option_may_act_on_its_centre():
    actor, td = make_actor(), states(200)
    actor.act(td, draw_option=True, draw_action=False)
    option = td["option"].squeeze(-1)
    torch.testing.assert_close(td["action"], actor.get_policy(td).loc[torch.arange(200), option])
    assert (option != actor.get_dist_high(td).probs.argmax(-1)).any()


@pytest.mark.parametrize("bounded", [False, True])
def test_unconditioned_distribution_is_the_mixture_of_both_levels(bounded):
    actor, td = make_actor(bounded), states(6)
    dist, high = actor.get_dist(td), actor.get_dist_high(td).probs
    assert type(dist) is (TanhNormalMixture if bounded else NormalMixture)
    action = dist.sample()
    expected = 0.0
    for k in range(K):
        td["option"] = torch.full((6, 1), k)
        expected = expected + high[:, k] * actor.get_dist_low(td).log_prob(action).exp()
    torch.testing.assert_close(dist.log_prob(action).exp(), expected)


def test_actions_stay_inside_the_spec():
    actor, td = make_actor(bounded=True), states(500)
    actor(td)
    assert td["action"].min() >= -2
    assert td["action"].max() <= 1
    assert td["action"].min() < -1.5


# ---------------------------------------------------------------------- through an environment


def make_env(actor, episode=7, num_envs=1):
    def single():
        return TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(episode))

    env = TransformedEnv(SerialEnv(num_envs, single) if num_envs > 1 else single(), InitTracker())
    return env.append_transform(actor.make_tensordict_primer())


@pytest.mark.parametrize("num_envs", [1, 2])
def test_options_are_carried_across_batches_and_reset_with_episodes(num_envs):
    """Batches of ten frames of episodes of seven: they end in the middle of an episode."""
    torch.manual_seed(0)
    actor = OptionActor(K, spec=Bounded(-2, 2, (1,)), in_features=3)
    collector = Collector(make_env(actor, num_envs=num_envs), actor, frames_per_batch=10 * num_envs, total_frames=-1)
    batches = [next(found) for found in [iter(collector)] for _ in range(6)]
    collector.shutdown()
    steps = torch.cat([batch.reshape(num_envs, -1) for batch in batches], -1)
    option, before, first = (steps[key].squeeze(-1) for key in ("option", "previous_option", "is_init"))
    assert (first == (torch.arange(60) % 7 == 0)).all()
    assert (before[first] == 0).all()
    goes_on = ~first[:, 1:]
    assert (before[:, 1:][goes_on] == option[:, :-1][goes_on]).all()
    # every batch but the first begins with an option of the batch before
    edges = [edge for edge in range(10, 60, 10) if edge % 7]
    assert len({*option[:, [edge - 1 for edge in edges]].flatten().tolist()}) > 1
    assert (steps["next", "previous_option"].squeeze(-1) == option).all()


def test_an_option_lasts_while_it_does_not_end():
    actor = OptionActor(K, spec=Bounded(-2, 2, (1,)), in_features=3)
    with torch.no_grad():
        actor.network.module.router[-1].bias[K:] = -100.0
    rollout = make_env(actor, 30).rollout(90, actor, break_when_any_done=False)
    per_episode = rollout["option"].reshape(3, 30)
    assert (per_episode == per_episode[:, :1]).all()


def test_primer_names_the_actors_key():
    actor = make_actor(previous_option_key=("hi", "before"))
    (key,) = actor.make_tensordict_primer().primers.keys(True, True)
    assert key == ("hi", "before")
    assert ("next", "hi", "before") in actor.out_keys


# ---------------------------------------------------------------------- networks and keys


@pytest.mark.parametrize("router", ["separate", "shared", "detached", "linear"])
def test_routers_read_what_they_say(router):
    module = nn.Linear(OBSERVATION, 2 * K) if router == "linear" else router
    actor, td = make_actor(router=module), states(6)
    policy = actor.get_policy(td)
    network = actor.network.module
    (policy.logits.sum() + (policy.termination_logits**2).sum()).backward()
    reached = any(p.grad is not None and p.grad.any() for p in network.trunk.parameters())
    assert reached == (router == "shared")
    assert all(p.grad is not None for p in actor.router_parameters())
    others = {id(p) for p in [*network.trunk.parameters(), *network.experts.parameters()]}
    assert not others & {id(p) for p in actor.router_parameters()}


def test_features_are_master_terminations_locs_and_scales():
    features = torch.randn(K * (2 * A + 2), dtype=F64)
    network = nn.Linear(OBSERVATION, len(features), dtype=F64)
    nn.init.zeros_(network.weight)
    network.bias.data.copy_(features)
    actor = make_actor(network=network, scale_mapping="exp")
    policy = actor.get_policy(states(5))
    logits, ends, loc, scale = features.split((K, K, K * A, K * A))
    torch.testing.assert_close(policy.logits[3], logits)
    torch.testing.assert_close(policy.termination_prob[3], ends.sigmoid())
    torch.testing.assert_close(policy.loc[3], loc.reshape(K, A))
    torch.testing.assert_close(policy.scale[3], scale.reshape(K, A).exp())


@pytest.mark.parametrize("state_dependent_scale", [False, True])
def test_scales_depend_on_the_state_on_request(state_dependent_scale):
    scale = make_actor(state_dependent_scale=state_dependent_scale).get_policy(states(2)).scale
    assert torch.equal(scale[0], scale[1]) != state_dependent_scale


def test_lazy_layers_and_several_inputs():
    actor = OptionActor(K, spec=Bounded(-1, 1, (A,)), in_keys=["position", ("deep", "goal")])
    td = states(5).update({"position": torch.randn(5, 3), "deep": {"goal": torch.randn(5, 2)}})
    assert actor(td)["action"].shape == (5, A)
    assert actor.network.module.trunk[0].in_features == 5


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kwargs", "line"),
    [
        ({"num_options": 0}, "num_options=0 must be an integer of at least 1"),
        ({"num_options": 2.0}, r"num_options=2\.0 must be an integer"),
        ({"num_options": True}, "num_options=True must be an integer"),
        ({"spec": Categorical(3)}, "must be a box of floats, got Categorical"),
        ({"spec": Unbounded((A,), dtype=torch.int64)}, "must be a box of floats"),
        ({"spec": Unbounded((A,))}, "TanhNormal needs a bounded action spec"),
        ({"distribution_class": CompositeDistribution}, "must be TanhNormal or IndependentNormal, got CompositeDist"),
        ({"router": "linear"}, "router='linear' is unknown; allowed: detached, shared, separate, or a module"),
        ({"num_cells": ()}, "num_cells must name at least one hidden layer"),
    ],
)
def test_bad_option_is_named_in_one_line(kwargs, line):
    options = {"num_options": K, "spec": Bounded(-1, 1, (A,)), **kwargs}
    with pytest.raises(ValueError, match=line) as error:
        OptionActor(**options)
    assert str(error.value).startswith("OptionActor: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ["floor", "scale_lb", "loc_spread", "num_layers"])
def test_options_of_other_actors_are_refused(option):
    with pytest.raises(TypeError, match=f"^OptionActor: got an unexpected keyword argument '{option}'"):
        make_actor(**{option: 0.1})


def test_defaults_are_those_of_the_options_papers_network():
    network = OptionActor(K, spec=Bounded(-1, 1, (A,)), in_features=OBSERVATION).network.module
    assert [type(layer) for layer in network.trunk] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh]
    assert [layer.out_features for layer in list(network.trunk)[::2]] == [64, 64]
    assert network.log_scale.shape == (K * A,)


def test_a_network_of_another_size_is_refused():
    actor = make_actor(network=nn.Linear(OBSERVATION, 17, dtype=F64))
    with pytest.raises(ValueError, match=r"must end in 3 \* \(2 \* 2 \+ 2\) = 18 features, got 17"):
        actor(states(5))
    with pytest.raises(ValueError, match="only the built-in network"):
        actor.router_parameters()


@pytest.mark.parametrize("key", ["is_init", "previous_option"])
def test_an_environment_that_carries_nothing_is_refused(key):
    with pytest.raises(KeyError, match=f"there is no '{key}' in the input; the environment needs an InitTracker"):
        make_actor()(states(5).exclude(key))
