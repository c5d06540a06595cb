"""A maze with two ways to its goal, on PointMaze of gymnasium-robotics."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import DependencyNotInstalled

__all__ = ["ENV_ID", "MAX_EPISODE_STEPS", "TWO_ROUTES", "make_two_routes", "register"]

ENV_ID = "PMOE/PointMazeTwoRoutes-v0"

MAX_EPISODE_STEPS = 300
"""Steps after which an episode is truncated."""

TWO_ROUTES: list[list[int | str]] = [
    [1, 1, 1, 1, 1, 1, 1],
    [1, 0, 0, 0, 0, 0, 1],
    [1, "r", 1, 1, 1, "g", 1],
    [1, 0, 0, 0, 0, 0, 1],
    [1, 1, 1, 1, 1, 1, 1],
]
"""Start on the left, goal on the right, and a corridor above and below the wall between them, of the same length."""


class _Route(gymnasium.Wrapper):
    """Tells in ``info`` at the end of an episode by which corridor the middle of the maze was passed last."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.route: str | None = None
        self.x = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self.route, self.x = None, float(observation["achieved_goal"][0])
        return observation, info

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        x, y = observation["achieved_goal"]
        # the middle of the maze is at x = 0
        if self.x < 0 <= x:
            self.route = "upper" if y > 0 else "lower"
        self.x = float(x)
        if terminated:
            info["outcome"] = self.route
        return observation, reward, terminated, truncated, info


def make_two_routes(**kwargs: Any) -> gymnasium.Env:
    """PointMaze in :data:`TWO_ROUTES`, with episodes that end at the goal.

    Observations are PointMaze's: a mapping with ``achieved_goal`` ``[2]``, ``desired_goal`` ``[2]`` and ``observation``
    ``[4]``, which :func:`make_env` makes one vector of. ``info`` holds ``success``, and at the goal ``outcome``, the
    corridor: ``upper`` or ``lower``.

    Keyword Args:
        **kwargs: of PointMaze. Its ``reward_type="dense"`` pays in every step for being near the goal, and so more for
            waiting beside it than for arriving.

    Raises:
        DependencyNotInstalled: without gymnasium-robotics.
    """
    if find_spec("gymnasium_robotics") is None:
        raise DependencyNotInstalled("its package is missing: pip install gymnasium-robotics")
    from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv

    return _Route(PointMazeEnv(**{"maze_map": TWO_ROUTES, "continuing_task": False, **kwargs}))


def register() -> None:
    """Register :data:`ENV_ID` with Gymnasium, once."""
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(
            ENV_ID, entry_point="torchrl_pmoe.envs.mazes:make_two_routes", max_episode_steps=MAX_EPISODE_STEPS
        )
