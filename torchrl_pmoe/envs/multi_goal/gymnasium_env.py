"""The multi-goal task as a Gymnasium environment."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from torchrl_pmoe.envs.multi_goal.task import MAX_EPISODE_STEPS, MultiGoalTask
from torchrl_pmoe.envs.points import PointEnv

__all__ = ["ENV_ID", "MultiGoalEnv", "register"]

ENV_ID = "PMOE/MultiGoal-v0"


class MultiGoalEnv(PointEnv):
    """A point agent with four goals around its start, all of the same worth; see :class:`MultiGoalTask`.

    ``info`` holds ``is_success`` and ``collided`` (the edge of the plane cut the step short), and at a goal
    ``outcome``: ``east``, ``west``, ``north`` or ``south``. ``gymnasium.make("PMOE/MultiGoal-v0")`` truncates after
    :data:`MAX_EPISODE_STEPS` steps.

    Keyword Args:
        render_mode: ``"rgb_array"`` for pictures uint8 ``[400, 400, 3]`` of the plane and the episode's trail.
        **task: of :class:`MultiGoalTask`.

    Raises:
        ValueError: for an unknown render mode, and those of :class:`MultiGoalTask`.

    Examples:
        >>> env = gymnasium.make("PMOE/MultiGoal-v0", action_cost=1.0)
        >>> observation, info = env.reset(seed=0)
    """

    def __init__(self, *, render_mode: str | None = None, **task: float) -> None:
        super().__init__(MultiGoalTask(**task), render_mode=render_mode)

    def _draw_start(self, options: dict[str, Any]) -> np.ndarray:
        return self.task.place(self.np_random.standard_normal(2))


def register() -> None:
    """Register :data:`ENV_ID` with Gymnasium, once."""
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(
            ENV_ID,
            entry_point="torchrl_pmoe.envs.multi_goal.gymnasium_env:MultiGoalEnv",
            max_episode_steps=MAX_EPISODE_STEPS,
        )
