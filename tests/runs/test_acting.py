"""Who acts in an episode, and the episodes that a seed makes."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Bounded
from torchrl.envs import GymEnv, InitTracker, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_pmoe import BestOfExpertsActor, PMOEActor
from torchrl_pmoe.baselines import GatingActor, GaussianActor, MCPActor, OptionActor
from torchrl_pmoe.envs import NormalizedPolicy
from torchrl_pmoe.runs import CarriedOptionPolicy, EpisodePlayer, Evaluator, WatchedPolicy, acting

SPEC = Bounded(-torch.ones(1), torch.ones(1), (1,))
SEED, STEPS, EXPERTS = 7, 20, 3


def spread(actor, scale=1.0):
    """Weights that make experts differ, and states matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return actor.requires_grad_(False)


def mixture(cls=PMOEActor):
    return spread(cls(EXPERTS, spec=SPEC, in_features=3, num_cells=(8,)))


def options():
    return spread(OptionActor(EXPERTS, spec=SPEC, in_features=3, num_cells=(8,)))


def states_of(observation):
    return TensorDict(observation=torch.as_tensor(observation), batch_size=observation.shape[:1])


def rollout(policy, steps=STEPS, seed=SEED):
    """Observations before every step, and rewards, of the pendulum, whose torque has bounds of 2."""
    env, observations, rewards = gym.make("Pendulum-v1"), [], []
    observation, _ = env.reset(seed=seed)
    torch.manual_seed(seed)
    for _ in range(steps):
        observations.append(observation)
        action = policy(states_of(observation[None]))
        observation, reward, *_ = env.step(2 * action[0].clamp(-1, 1).numpy())
        rewards.append(float(reward))
    return np.stack(observations), np.array(rewards)


def played(policy, watched, seed=SEED):
    player = EpisodePlayer("Pendulum-v1", policy, watched, max_steps=STEPS)
    episode = player(seed)
    player.close()
    return episode


def watched(actor, kind):
    policy = WatchedPolicy(acting(actor, kind))
    return played(policy, policy)


def test_the_likeliest_expert_acts_by_its_mean():
    actor = mixture()
    episode = watched(actor, "deterministic")

    def act(states):
        dist = actor.get_dist(states)
        return dist.expert_mode[:, int(dist.logits.argmax(-1))]

    observations, rewards = rollout(act)
    probs = actor.get_dist(states_of(observations)).logits.softmax(-1).numpy()
    np.testing.assert_allclose(episode.rewards, rewards, atol=1e-6)
    np.testing.assert_allclose(episode.weights, probs, atol=1e-5)
    np.testing.assert_array_equal(episode.experts, probs.argmax(-1))
    assert len(set(episode.experts)) > 1


@pytest.mark.parametrize("kind", ["drawn", "stochastic"])
def test_a_drawn_expert_is_the_one_whose_action_was_played(kind):
    actor, drawn = mixture(), []
    episode = watched(actor, kind)

    def act(states):
        dist = actor.get_dist(states)
        proposals = dist.propose().action if kind == "stochastic" else dist.expert_mode
        # the same random numbers: noise of the experts, then the draw among them
        weights = dist.logits.softmax(-1).cumsum(-1)
        drawn.append(int((torch.rand(1, 1) >= weights[:, :-1]).sum()))
        return proposals[:, drawn[-1]]

    _, rewards = rollout(act)
    np.testing.assert_allclose(episode.rewards, rewards, atol=1e-6)
    assert episode.experts.tolist() == drawn
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("commit_steps", [1, 6, None])
def test_a_committed_expert_keeps_acting_by_its_mean_and_the_next_one_is_drawn(commit_steps):
    actor, drawn = mixture(), []
    policy = WatchedPolicy(acting(actor, "committed", commit_steps=commit_steps))
    player = EpisodePlayer("Pendulum-v1", policy, policy, max_steps=STEPS)
    length = commit_steps or STEPS

    def act(states):
        dist = actor.get_dist(states)
        # an expert is drawn at every step; it acts where the one before has come to its end
        weights = dist.logits.softmax(-1).cumsum(-1)
        new = int((torch.rand(1, 1) >= weights[:, :-1]).sum())
        drawn.append(drawn[-1] if len(drawn) % length else new)
        return dist.expert_mode[:, drawn[-1]]

    for seed in (SEED, SEED + 1):  # a new episode begins with a new expert
        drawn.clear()
        episode = player(seed)
        observations, rewards = rollout(act, seed=seed)
        assert episode.experts.tolist() == drawn
        np.testing.assert_allclose(episode.rewards, rewards, atol=1e-5)
        probs = actor.get_dist(states_of(observations)).logits.softmax(-1).numpy()
        np.testing.assert_allclose(episode.weights, probs, atol=1e-5)
    player.close()


@pytest.mark.parametrize("make", [lambda: mixture(GatingActor), options], ids=["blend", "options"])
def test_only_a_mixture_has_experts_that_keep_acting(make):
    with pytest.raises(ValueError, match=r"^act=committed: must be deterministic, drawn or stochastic with \w+Actor"):
        acting(make(), "committed")


@pytest.mark.parametrize("kind", ["deterministic", "drawn"])
def test_experts_are_the_critics_choice_where_they_choose(kind):
    actor, chosen = mixture(), []

    def value(states, action):
        """Likes one torque in the left half and another in the right one."""
        return -(action.squeeze(-1) - states["observation"][:, :1].sign() * 0.9).square()

    episode = watched(BestOfExpertsActor(actor, value), kind)

    def act(states):
        proposals = actor.get_dist(states).expert_mode
        values = [value(states, proposals[:, k : k + 1]).item() for k in range(EXPERTS)]
        chosen.append(int(np.argmax(values)))
        return proposals[:, chosen[-1]]

    observations, rewards = rollout(act)
    np.testing.assert_allclose(episode.rewards, rewards, atol=1e-6)
    assert episode.experts.tolist() == chosen
    probs = actor.get_dist(states_of(observations)).logits.softmax(-1).numpy()
    np.testing.assert_allclose(episode.weights, probs, atol=1e-5)
    # the router's own favourite is another
    assert (episode.experts != probs.argmax(-1)).any()


@pytest.mark.parametrize("kind", ["deterministic", "drawn"])
def test_options_are_of_the_high_level_given_the_option_before(kind):
    actor = options()
    watched = WatchedPolicy(acting(actor, kind))
    episode = played(CarriedOptionPolicy(watched), watched)
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=SEED)
    for t, option in enumerate(episode.experts):
        policy = actor.get_policy(states_of(observation[None]))
        high = policy.logits.softmax(-1)[0]
        if t:
            before = episode.experts[t - 1]
            ends = policy.termination_logits.sigmoid()[0, before]
            high = ends * high + (1 - ends) * torch.eye(EXPERTS)[before]
        np.testing.assert_allclose(episode.weights[t], high.numpy(), atol=1e-5)
        observation, reward, *_ = env.step(2 * policy.loc[0, option].tanh().numpy())
        assert episode.rewards[t] == pytest.approx(float(reward), abs=1e-4)
    likeliest = episode.experts == episode.weights.argmax(-1)
    assert likeliest.all() == (kind == "deterministic")


def test_an_option_ends_with_an_episode_that_the_environment_resets():
    actor, seen = options(), []
    env = TransformedEnv(GymEnv("Pendulum-v1", max_episode_steps=5), InitTracker())

    def act(states):
        seen.append(states["is_init"].item())
        return actor.act(states, draw_option=False, draw_action=False)

    policy = CarriedOptionPolicy(act)
    env.rollout(12, policy, break_when_any_done=False)
    assert seen == [step % 5 == 0 for step in range(12)]


@pytest.mark.parametrize("cls", [GatingActor, MCPActor])
def test_of_a_blend_the_weights_are_told_and_no_expert(cls):
    actor = mixture(cls)
    episode = watched(actor, "deterministic")

    def act(states):
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            return actor(states)["action"]

    observations, rewards = rollout(act)
    logits, _, _ = actor._experts()(torch.as_tensor(observations))
    gates = logits.exp() if cls is GatingActor else 1 / (1 + (-logits).exp())
    np.testing.assert_allclose(episode.weights, gates / gates.sum(-1, keepdim=True), atol=1e-5)
    np.testing.assert_allclose(episode.rewards, rewards, atol=1e-6)
    assert episode.experts is None


def test_a_gaussian_has_neither():
    episode = watched(spread(GaussianActor(SPEC, 3, num_cells=(8,))), "stochastic")
    assert episode.experts is None
    assert episode.weights is None


def test_another_kind_is_an_error():
    with pytest.raises(ValueError, match="kind='wildly' must be one of deterministic, drawn, stochastic, committed"):
        acting(mixture(), "wildly")


def test_a_seed_decides_an_episode_in_any_company():
    policy = WatchedPolicy(acting(mixture(), "stochastic"))
    player = EpisodePlayer("Pendulum-v1", policy, policy, max_steps=STEPS)
    first, second, again = player(SEED), player(SEED + 1), player(SEED)
    np.testing.assert_array_equal(first.rewards, again.rewards)
    np.testing.assert_array_equal(first.actions, again.actions)
    np.testing.assert_array_equal(first.experts, again.experts)
    assert (first.rewards != second.rewards).any()
    # in the environment's units, and as many of each as there are steps
    assert np.abs(first.actions).max() > 1
    assert {len(part) for part in (second.rewards, second.actions, second.experts, second.weights)} == {STEPS}
    player.close()


# -------------------------------------------------------------------------------------------- what is carried


class Named(gym.Env):
    """Shows its name in the first observation alone, and pays for every action that says it; lengths differ."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-128.0, 128.0, (1,), np.float32)
    name = 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.name = seed
        self.steps = 0
        return np.array([float(self.name)]), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1), float(action[0] == self.name), self.steps == 2 + 3 * (self.name % 3), False, {}


class Tells(Named):
    """Names an outcome in its first step and ``last`` in the second, which is the last."""

    last = None

    def step(self, action):
        observation, reward, *_ = super().step(action)
        info = [{"outcome": "early"}, {} if self.last is None else {"outcome": self.last}][self.steps - 1]
        return observation, reward, self.steps == 2, False, info


@pytest.mark.parametrize(("last", "told"), [(None, None), (True, None), (np.int64(3), 3), ("late", "late")])
def test_the_outcome_is_that_of_the_last_step_and_no_truth_value(last, told, monkeypatch):
    monkeypatch.setattr(Tells, "last", last)
    monkeypatch.setitem(gym.registry, "Tells-v0", gym.envs.registration.EnvSpec("Tells-v0", entry_point=Tells))
    policy = WatchedPolicy(acting(spread(GaussianActor(SPEC, 1, num_cells=(8,))), "deterministic"))
    player = EpisodePlayer("Tells-v0", policy, policy, max_steps=5)
    assert player(SEED).outcome == told
    player.close()


class Memory(TensorDictModuleBase):
    """Says in every step what it saw in the first, in units of the action's bound."""

    in_keys, out_keys = ("observation",), ("action",)

    def forward(self, tensordict):
        said = tensordict.get("said", tensordict["observation"])
        return tensordict.update({"action": said / 128, "next": {"said": said}})


def test_an_evaluated_policy_finds_what_it_has_carried_in_each_episode():
    gym.register("Named-v0", entry_point=Named, disable_env_checker=True)
    evaluator = Evaluator("Named-v0", Memory(), episodes=4, max_steps=100, seed=7)
    for _ in range(2):  # and nothing from one evaluation to the next
        assert evaluator().tolist() == [2 + 3 * (name % 3) for name in range(7, 11)]
    evaluator.close()


class Spy(TensorDictModuleBase):
    """Keeps what it reads, and goes from option to option."""

    in_keys, out_keys = ("observation", "is_init", "previous_option"), ("action",)

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, tensordict):
        self.seen.append(tensordict.clone())
        following = tensordict["previous_option"] + 1
        return tensordict.update({"action": 9.0 * tensordict["observation"], "next": {"previous_option": following}})


def test_evaluated_options_begin_with_the_episode_and_are_carried():
    """Behind a normalisation too."""
    spy = Spy()
    policy = NormalizedPolicy(CarriedOptionPolicy(spy), lambda observation: observation - torch.tensor([1.0, 2.0]))
    carried = TensorDict({}, [3])
    for _ in range(3):
        observation = torch.tensor([[1.5, 2.0]]).expand(3, 2)
        td = policy(carried.set("observation", observation.clone()))
        torch.testing.assert_close(td["observation"], observation)
        torch.testing.assert_close(td["action"], torch.tensor([[4.5, 0.0]]).expand(3, 2))
        carried = td["next"]
    assert [seen["is_init"].all().item() for seen in spy.seen] == [True, False, False]
    assert [seen["is_init"].any().item() for seen in spy.seen] == [True, False, False]
    assert [seen["previous_option"].unique().tolist() for seen in spy.seen] == [[0], [1], [2]]
    torch.testing.assert_close(spy.seen[0]["observation"], torch.tensor([[0.5, 0.0]]).expand(3, 2))
