"""The maze with two ways: what it tells of them, and observations under several names as one vector."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from torchrl_pmoe.envs import EnvironmentFault, make_env
from torchrl_pmoe.envs.making import make_gym_env

ENV_ID = "PMOE/PointMazeTwoRoutes-v0"


def drive(env: gymnasium.Env, goals: list[tuple[float, float]]) -> tuple[list[float], bool, dict]:
    """Rewards, whether the episode was truncated, and the last info of a way along ``goals``."""
    seen, _ = env.reset(seed=0)
    rewards, goals = [], [np.array(goal) for goal in goals]
    while True:
        at, velocity, target = seen["achieved_goal"], seen["observation"][2:], seen["desired_goal"]
        goal = goals[0] if goals else target
        if goals and np.hypot(*(goal - at)) < 0.2:
            goals.pop(0)
        seen, reward, terminated, truncated, info = env.step(np.clip(8 * (goal - at) - velocity, -1, 1).astype("f4"))
        rewards.append(reward)
        if terminated or truncated:
            return rewards, truncated, info


def test_the_way_is_told_at_the_goal():
    pytest.importorskip("gymnasium_robotics")
    env = gymnasium.make(ENV_ID)
    for name, side in (("upper", 1.0), ("lower", -1.0)):
        rewards, truncated, info = drive(env, [(-2.0, side), (2.0, side)])
        assert (info["outcome"], info["success"], truncated) == (name, True, False)
        assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
    # up, past the middle, back, and below: the last passage counts
    env = gymnasium.make(ENV_ID, max_episode_steps=1000)
    _, _, info = drive(env, [(-2.0, 1.0), (0.5, 1.0), (-2.0, 1.0), (-2.0, -1.0), (2.0, -1.0)])
    assert info["outcome"] == "lower"
    rewards, truncated, info = drive(gymnasium.make(ENV_ID), [(-2.0, 9.0)])
    assert (len(rewards), truncated, info["success"], "outcome" in info) == (300, True, False, False)


class Named(gymnasium.Env):
    """Sees two vectors under names, or an image with them."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, image: bool = False) -> None:
        parts = {"b": gymnasium.spaces.Box(-9.0, 9.0, (1,)), "a": gymnasium.spaces.Box(-9.0, 9.0, (2,), np.float64)}
        if image:
            parts["c"] = gymnasium.spaces.Box(0.0, 1.0, (4, 4))
        self.observation_space = gymnasium.spaces.Dict(parts)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"b": np.array([3.0], np.float32), "a": np.array([1.0, 2.0])}, {}

    def step(self, action):
        return {"b": action, "a": np.array([1.0, 2.0])}, 0.0, False, False, {}


def test_vectors_under_several_names_become_one():
    gymnasium.register("Named-v0", entry_point=Named)
    try:
        env = make_env("Named-v0", num_envs=2)
        td = env.reset()
        assert td["observation"].tolist() == [[1.0, 2.0, 3.0]] * 2
        assert td["observation"].dtype == torch.float32
        with pytest.raises(EnvironmentFault, match="must be an environment with a Box vector of observations"):
            make_gym_env("Named-v0", {"image": True})
    finally:
        gymnasium.registry.pop("Named-v0")
