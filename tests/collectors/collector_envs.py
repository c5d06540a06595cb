"""Environments that a worker cannot make, or does not survive; found by workers too, which have this folder's path."""

from __future__ import annotations

import os

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box


class Line(gym.Env):
    """A point on a line, whose state no checkpoint knows.

    Args:
        dies_after: steps; the process then ends at once.
        breaks_after: steps; the environment then raises.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, dies_after: int | None = None, breaks_after: int | None = None) -> None:
        self.dies_after, self.breaks_after = dies_after, breaks_after
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start = self.np_random.normal(size=2).astype(np.float32)
        return self.start, {}

    def step(self, action):
        self.steps += 1
        if self.steps == self.dies_after:
            os._exit(1)
        if self.steps == self.breaks_after:
            raise ValueError("the hinge broke:\nno more steps")
        return self.start, 0.0, False, self.steps % 50 == 0, {}


def no_motor():
    raise ZeroDivisionError("no motor")
