"""Normalised actions of environments of every kind, and policies of them in raw environments."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import DoubleToFloat, GymWrapper, SerialEnv, TransformedEnv

from torchrl_pmoe.envs import BatchedTargetReachingEnv, RawActionPolicy, mujoco_task, normalize_actions

LOW, HIGH = np.array([-2.0, 0.5, -1.0]), np.array([2.0, 0.75, 3.0])


class Told(gym.Env):
    """Observes the action that it was told."""

    def __init__(self, dtype=np.float32):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = gym.spaces.Box(LOW.astype(dtype), HIGH.astype(dtype), dtype=dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3), {}

    def step(self, action):
        assert action.dtype == self.action_space.dtype
        return action.astype(np.float64), 0.0, False, False, {}


def scaled(action: torch.Tensor) -> torch.Tensor:
    """By the definition: -1 is the lower bound, 1 the upper one."""
    low, high = torch.from_numpy(LOW), torch.from_numpy(HIGH)
    return (low + (action.double() + 1) / 2 * (high - low)).float()


def single(dtype=np.float32, **kwargs):
    return normalize_actions(TransformedEnv(GymWrapper(Told(dtype)), DoubleToFloat()), **kwargs)


ENVS = {
    "one": single,
    "in double precision": lambda **kwargs: single(np.float64, **kwargs),
    "each of a batch": lambda **kwargs: SerialEnv(2, lambda: single(**kwargs)),
    "a batch": lambda **kwargs: normalize_actions(
        SerialEnv(2, lambda: TransformedEnv(GymWrapper(Told()), DoubleToFloat())), **kwargs
    ),
}


@pytest.mark.parametrize("name", ENVS)
def test_the_environment_gets_its_own_units_and_the_policy_sees_normalised_ones(name):
    env = ENVS[name]()
    space = env.action_spec_unbatched.space
    assert space.low.tolist() == [-1, -1, -1]
    assert space.high.tolist() == [1, 1, 1]
    collector = Collector(env, env.rand_action, frames_per_batch=200, total_frames=200, trust_policy=True)
    (batch,) = collector
    action = batch["action"]
    assert action.dtype == torch.float32
    # the whole box is explored, and what a buffer would store stays normalised
    assert action.abs().max() <= 1
    assert (action.flatten(0, -2).amin(0) < -0.9).all()
    assert (action.flatten(0, -2).amax(0) > 0.9).all()
    torch.testing.assert_close(batch["next", "observation"], scaled(action))
    collector.shutdown()


@pytest.mark.parametrize("name", ENVS)
def test_actions_of_any_size_are_clipped_where_that_is_asked_for(name):
    env = ENVS[name](clip=True)
    far = torch.tensor([-7.0, 0.5, 9.0]).expand(*env.batch_size, 3)
    after = env.step(env.reset().set("action", far))
    torch.testing.assert_close(after["next", "observation"], scaled(far.clamp(-1, 1)))
    torch.testing.assert_close(after["action"], far, rtol=0, atol=0)


def test_an_environment_of_normalised_actions_is_left_alone():
    env = BatchedTargetReachingEnv(2)
    assert normalize_actions(env) is env
    clipped = normalize_actions(env, clip=True)
    start = clipped.reset()["observation"][:, :2]
    after = clipped.step(TensorDict(action=torch.full((2, 2), 5.0), batch_size=[2]))["next", "observation"][:, :2]
    assert (after - start).abs().max() <= env.task.max_step * (1 + 1e-6)


def test_a_batch_of_simulators_takes_normalised_actions():
    raw, ours = (mujoco_task("Humanoid-v4", 2, seed=0, backend="mujoco") for _ in range(2))
    ours = normalize_actions(ours)
    action = torch.rand(2, 17) * 2 - 1
    half = torch.as_tensor(gym.make("Humanoid-v4").action_space.high)
    theirs = raw.step(raw.reset().set("action", action * half))["next"]
    found = ours.step(ours.reset().set("action", action))["next"]
    torch.testing.assert_close(found["observation"], theirs["observation"], rtol=0, atol=0)
    torch.testing.assert_close(found["reward"], theirs["reward"], rtol=0, atol=0)


def test_a_policy_acts_in_a_raw_environment_as_in_the_normalised_one():
    module = TensorDictModule(lambda o: torch.linspace(-3, 3, 9).reshape(3, 3) + o, ["observation"], ["action"])
    policy = RawActionPolicy(module, torch.from_numpy(LOW).float(), torch.from_numpy(HIGH).float())
    states = TensorDict(observation=torch.zeros(3, 3), batch_size=[3])
    expected = scaled(torch.linspace(-3, 3, 9).reshape(3, 3).clamp(-1, 1))
    torch.testing.assert_close(policy(states)["action"], expected)
    assert policy.in_keys == ["observation"]


@pytest.mark.parametrize("high", [LOW, np.full(3, np.inf)])
def test_bounds_that_do_not_make_a_box_are_an_error(high):
    raw = Told()
    raw.action_space = gym.spaces.Box(LOW.astype(np.float32), high.astype(np.float32), dtype=np.float32)
    with pytest.raises(RuntimeError, match="ActionScaling requires"):
        normalize_actions(GymWrapper(raw)).rollout(1)
