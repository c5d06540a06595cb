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


class Odd(Line):
    """What a user may get wrong, one thing at a time.

    Args:
        fault: its name.
        obs: type of the observations.
        act: type of the actions.
    """

    def __init__(self, fault: str = "", obs: str = "float64", act: str = "float32") -> None:
        super().__init__()
        self.fault = fault
        self.observation_space = Box(-np.inf, np.inf, (2,), np.dtype(obs).type)
        self.action_space = Box(-3.0, 3.0, (1,), np.dtype(act).type)
        if fault == "constructor":
            raise ZeroDivisionError("no motor")
        if fault == "value":
            raise ValueError(f"fault={fault} is not known")

    def reset(self, *, seed=None, options=None):
        if self.fault == "reset":
            raise ZeroDivisionError("no motor")
        _, info = super().reset(seed=seed)
        return np.zeros(5 if self.fault == "shape" else 2, self.observation_space.dtype), info

    def step(self, action):
        if self.fault == "step":
            raise ZeroDivisionError("no motor")
        _, _, *rest = super().step(action)
        rewards = {"none": None, "vector": np.ones(1), "text": "1"}
        return self.observe().astype(self.observation_space.dtype), rewards.get(self.fault, 1.0), *rest


class Point(gym.Env):
    """A point in the plane that is pushed to the origin, in units of its own.

    Args:
        half: the largest push. All else is the same, to the last bit where it is a power of two.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, half: float = 1.0, low: float | None = None) -> None:
        self.half = half
        lowest = np.array([-half if low is None else low, -half], np.float32)
        self.action_space = Box(lowest, np.full(2, half, np.float32), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.time = self.np_random.uniform(-1, 1, 2), 0
        return self.position.copy(), {}

    def step(self, action):
        assert (np.abs(action) <= self.half).all(), action
        self.position, self.time = self.position + 0.1 * np.asarray(action, np.float64) / self.half, self.time + 1
        return self.position.copy(), -float(self.position @ self.position), False, self.time == 20, {}


for kind in (NanReward, NanObservation, Breaks, Hungry, Pixels, Unbounded, Odd, Point):
    gym.register(f"{kind.__name__}-v0", entry_point=kind, disable_env_checker=True)
