"""The target-reaching task as a Gymnasium environment."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from torchrl_pmoe.envs.points import PointEnv
from torchrl_pmoe.envs.target_reaching.task import CANDIDATES, MAX_EPISODE_STEPS, TargetReachingTask

__all__ = ["ENV_ID", "MAX_EPISODE_STEPS", "TargetReachingEnv", "register"]

ENV_ID = "PMOE/TargetReaching-v0"


class TargetReachingEnv(PointEnv):
    """A point agent that must find its way past round obstacles into a round target.

    Observation, float32 ``[4]``: position in ``[-1, 1]^2`` and the vector from it to the target's centre; ``[6]`` with
    the velocity behind them in ``layout="paper"``. Action, ``[2]`` in ``[-1, 1]^2``: displacement in units of
    ``max_step``, or in ``layout="paper"`` the acceleration. ``info`` holds ``is_success`` and ``collided`` (an obstacle
    cut the step short), and at the end of an episode ``outcome``: the route, ``bait``, or ``None``. The class does not
    truncate; ``gymnasium.make("PMOE/TargetReaching-v0")`` does, after :data:`MAX_EPISODE_STEPS` steps. With
    ``layout="paper"`` give it ``max_episode_steps=200``, since nobody arrives there sooner with ease.
    ``reset(options={"start": i})`` starts from the ``i``-th of the fixed starts.

    Args:
        layout: see :class:`TargetReachingTask`.

    Keyword Args:
        render_mode: ``"rgb_array"`` for pictures uint8 ``[400, 400, 3]`` of the plane and the episode's trail.
        **task: of :class:`TargetReachingTask`.

    Raises:
        ValueError: for an unknown render mode, and those of :class:`TargetReachingTask`.

    Examples:
        >>> env = gymnasium.make("PMOE/TargetReaching-v0", layout="two")
        >>> observation, info = env.reset(seed=0)
    """

    def __init__(self, layout: Any = "one", *, render_mode: str | None = None, **task: Any) -> None:
        super().__init__(TargetReachingTask(layout, **task), render_mode=render_mode)

    def _draw_start(self, options: dict[str, Any]) -> np.ndarray:
        starts, index = self.task.starts, options.get("start")
        if index is not None:
            if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < len(starts):
                raise ValueError(f"TargetReachingEnv: start must be an index below {len(starts)}, got {index!r}.")
            return starts[index].copy()
        if self.task.random_starts:
            return self.task.place(self.np_random.random((CANDIDATES, 2)))
        return starts[self.np_random.integers(len(starts))].copy()


def register() -> None:
    """Register :data:`ENV_ID` with Gymnasium, once."""
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(
            ENV_ID,
            entry_point="torchrl_pmoe.envs.target_reaching.gymnasium_env:TargetReachingEnv",
            max_episode_steps=MAX_EPISODE_STEPS,
        )
