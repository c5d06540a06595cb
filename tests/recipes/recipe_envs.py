"""Environments that a recipe must refuse, or survive."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

GOOD_STEPS = 330


class Line(gym.Env):
    """A point on a line; subclasses go wrong after ``GOOD_STEPS`` steps, or have spaces that cannot be run."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self) -> None:
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), self.reward(), False, self.steps % 50 == 0, {}

    def observe(self):
        return np.zeros(2)

    def reward(self):
        return 0.0


class NanReward(Line):
    def reward(self):
        return float("nan") if self.steps > GOOD_STEPS else 0.0


class NanObservation(Line):
    def observe(self):
        return np.full(2, np.nan) if self.steps > GOOD_STEPS else np.zeros(2)


class RewardGlitch(Line):
    """Bad at every fortieth step."""

    def reward(self):
        return float("inf") if self.steps % 40 == 0 else 1.0


class ObservationGlitch(Line):
    """Bad at every fortieth step."""

    def observe(self):
        return np.array([np.nan, 1.0]) if self.steps % 40 == 0 else np.ones(2)


class Breaks(Line):
    """Raises in a late step."""

    def reward(self):
        if self.steps > GOOD_STEPS:
            raise ValueError("the hinge broke:\nno more steps")
        return 0.0


class Hungry(Line):
    """Has no memory left in a late step."""

    def reward(self):
        if self.steps > GOOD_STEPS:
            raise MemoryError
        return 0.0


class Pixels(Line):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class Unbounded(Line):
    action_space = Box(-np.inf, np.inf, (1,), np.float32)


for kind in (NanReward, NanObservation, RewardGlitch, ObservationGlitch, Breaks, Hungry, Pixels, Unbounded):
    gym.register(f"{kind.__name__}-v0", entry_point=kind, disable_env_checker=True)
