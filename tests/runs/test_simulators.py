"""An environment that goes on from a saved state, step by step against the one that was saved."""

from __future__ import annotations

import io
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from torchrl.collectors import Collector
from torchrl.envs import DoubleToFloat, GymWrapper, SerialEnv, TransformedEnv
from torchrl.modules import RandomPolicy

from torchrl_pmoe.envs import BatchedTargetReachingEnv, make_env
from torchrl_pmoe.envs.mujoco.engines import quiet_mujoco
from torchrl_pmoe.runs import EpisodeState, SimulatorState

TASKS = [
    *(f"{name}-v4" for name in ("Ant", "HalfCheetah", "Hopper", "Walker2d", "Humanoid", "HumanoidStandup")),
    *(f"{name}-v5" for name in ("Ant", "Humanoid", "Reacher", "Pusher", "Swimmer", "InvertedDoublePendulum")),
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "PMOE/TargetReaching-v0",
    "PMOE/MultiGoal-v0",
]
STEPS = 250


def make(name, **kwargs):
    with quiet_mujoco(), pytest.warns() if name.endswith("-v4") else quiet_mujoco():
        env = gym.make(name, **kwargs)
    return TransformedEnv(GymWrapper(env), DoubleToFloat())


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_future(env, other, td, steps=STEPS):
    """Both take the same actions, through ends of episodes."""
    ours, theirs = td.clone(), td.clone()
    for step in range(steps):
        ours = env.rand_action(ours)
        theirs["action"] = ours["action"].clone()
        (out, ours), (expected, theirs) = env.step_and_maybe_reset(ours), other.step_and_maybe_reset(theirs)
        for key in ("observation", "reward", "done", "terminated"):
            assert (out["next", key] == expected["next", key]).all(), (step, key)
        assert (ours["observation"] == theirs["observation"]).all(), step


def advance(env, steps=37):
    td = env.reset()
    for _ in range(steps):
        _, td = env.step_and_maybe_reset(env.rand_action(td))
    return td


@pytest.mark.parametrize("name", TASKS)
def test_a_restored_task_goes_on_to_the_last_bit(name):
    env, other = make(name), make(name)
    env.set_seed(3)
    other.set_seed(9)
    td = advance(env)
    other.reset()
    assert SimulatorState(env).complete
    SimulatorState(other).load_state_dict(through_a_file(SimulatorState(env).state_dict()))
    assert_same_future(env, other, td)


@pytest.mark.parametrize(
    "batch",
    [lambda: SerialEnv(3, partial(make, "Hopper-v5")), lambda: make_env("Hopper-v5", num_envs=3)],
    ids=["SerialEnv", "make_env"],
)
def test_every_environment_of_a_batch_is_restored(batch):
    env, other = batch(), batch()
    env.set_seed(1)
    td = advance(env)
    other.set_seed(2)
    other.reset()
    SimulatorState(other).load_state_dict(through_a_file(SimulatorState(env).state_dict()))
    assert_same_future(env, other, td, 60)


@pytest.mark.parametrize("layout", ["one", "paper"])
def test_the_batched_task_is_restored(layout):
    env, other = (BatchedTargetReachingEnv(5, layout, start="random", seed=seed) for seed in (1, 2))
    td = advance(env)
    SimulatorState(other).load_state_dict(through_a_file(SimulatorState(env).state_dict()))
    assert_same_future(env, other, td, 120)


def test_a_point_agent_goes_on_from_a_state_of_the_time_when_it_was_its_position():
    env, other = make("PMOE/TargetReaching-v0"), make("PMOE/TargetReaching-v0")
    env.set_seed(3)
    td = advance(env)
    other.set_seed(9)
    other.reset()
    state = SimulatorState(env).state_dict()
    innermost = state["parts"][0]["layers"][-1]
    innermost["_position"] = innermost.pop("_state")
    SimulatorState(other).load_state_dict(through_a_file(state))
    assert_same_future(env, other, td)


class Dreamy(gym.Wrapper):
    """Keeps the sum of all rewards where nobody looks, unless it is a number."""

    def __init__(self, env, kept):
        super().__init__(env)
        self.sum = 0.0 if kept else {"reward": 0.0}

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        if isinstance(self.sum, dict):
            self.sum["reward"] += reward
            return observation, self.sum["reward"], *rest
        self.sum += reward
        return observation, self.sum, *rest


WRAPPERS = {
    "DelayObservation": lambda env: wrappers.DelayObservation(env, 3),
    "FrameStackObservation": lambda env: wrappers.FlattenObservation(wrappers.FrameStackObservation(env, 4)),
    "NormalizeObservation": wrappers.NormalizeObservation,
    "NormalizeReward": wrappers.NormalizeReward,
    "TimeAwareObservation": wrappers.TimeAwareObservation,
    "StickyAction": lambda env: wrappers.StickyAction(env, 0.5),
    "RecordEpisodeStatistics": wrappers.RecordEpisodeStatistics,
    "ClipAction": wrappers.ClipAction,
    "a number of one's own": lambda env: Dreamy(env, True),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_a_wrapper_keeps_is_restored_too(name):
    env, other = (
        TransformedEnv(GymWrapper(WRAPPERS[name](gym.make("Pendulum-v1"))), DoubleToFloat()) for _ in range(2)
    )
    env.set_seed(1)
    td = advance(env)
    other.set_seed(2)
    other.reset()
    assert SimulatorState(env).complete
    SimulatorState(other).load_state_dict(through_a_file(SimulatorState(env).state_dict()))
    assert_same_future(env, other, td, 250)


def test_a_wrapper_that_cannot_be_restored_is_not_said_to_be():
    env = GymWrapper(Dreamy(gym.make("Pendulum-v1"), False))
    assert not SimulatorState(env).complete


def test_a_list_that_two_hold_stays_one():
    env = wrappers.RecordEpisodeStatistics(gym.make("Pendulum-v1"))
    mine = env.return_queue
    state = SimulatorState(GymWrapper(env)).state_dict()
    mine.append(3.0)
    SimulatorState(GymWrapper(env)).load_state_dict(through_a_file(state))
    assert env.return_queue is mine
    assert not mine


def test_another_number_of_environments_is_refused():
    state = SimulatorState(SerialEnv(2, partial(make, "Pendulum-v1"))).state_dict()
    with pytest.raises(ValueError, match="it has 2 environments, here are 1"):
        SimulatorState(make("Pendulum-v1")).load_state_dict(state)


class Unknown(gym.Env):
    """Its state is where nobody looks."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.hidden = [self.np_random.normal()]
        return np.array(self.hidden), {}

    def step(self, action):
        self.hidden[0] += float(action[0])
        return np.array(self.hidden), 0.0, False, False, {}


def test_of_an_unknown_environment_the_generator_goes_on():
    env, other = (TransformedEnv(GymWrapper(Unknown()), DoubleToFloat()) for _ in range(2))
    env.set_seed(1)
    env.reset()
    other.set_seed(2)
    other.reset()
    state = SimulatorState(env).state_dict()
    assert not state["complete"]
    SimulatorState(other).load_state_dict(through_a_file(state))
    assert (other.reset()["observation"] == env.reset()["observation"]).all()


def collector_of(env):
    return Collector(env, RandomPolicy(env.action_spec), frames_per_batch=7, total_frames=-1, track_traj_ids=False)


def collected(collector, batches):
    iterator = iter(collector)
    return [next(iterator).clone() for _ in range(batches)]


def test_a_collector_goes_on_in_the_middle_of_an_episode():
    first, second = collector_of(make("Hopper-v5")), collector_of(make("Hopper-v5"))
    torch.manual_seed(0)
    collected(first, 4)
    state = through_a_file(EpisodeState(first, 0).state_dict())
    torch.manual_seed(1)
    expected = collected(first, 5)
    restored = EpisodeState(second, 0)
    restored.load_state_dict(state)
    torch.manual_seed(1)
    found = collected(second, 5)
    assert not restored.fresh
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["next", "observation"] == theirs["next", "observation"]).all()
        assert (ours["observation"] == theirs["observation"]).all()


def test_where_a_passage_is_closed_new_episodes_begin():
    first, second = (
        collector_of(BatchedTargetReachingEnv(5, start="random", seed=seed, blocked=blocked))
        for seed, blocked in ((1, None), (2, "upper"))
    )
    collected(first, 4)
    restored = EpisodeState(second, 0)
    restored.load_state_dict(through_a_file(EpisodeState(first, 0).state_dict()))
    restored.after_load()
    assert restored.fresh
    assert (second.env.steps == 0).all()
    first.reset()
    assert (second._carrier["observation"] == first._carrier["observation"]).all()


def test_a_collector_of_an_unknown_environment_begins_a_new_episode():
    first, second = (collector_of(TransformedEnv(GymWrapper(Unknown()), DoubleToFloat())) for _ in range(2))
    collected(first, 2)
    restored = EpisodeState(second, 0)
    restored.load_state_dict(through_a_file(EpisodeState(first, 0).state_dict()))
    restored.after_load()
    assert restored.fresh
    first.reset()
    assert (second._carrier["observation"] == first._carrier["observation"]).all()
