"""The target-reaching task as a Gymnasium environment."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box

from torchrl_pmoe.envs.target_reaching.task import CANDIDATES, TargetReachingTask

__all__ = ["ENV_ID", "MAX_EPISODE_STEPS", "TargetReachingEnv", "register"]

ENV_ID = "PMOE/TargetReaching-v0"

MAX_EPISODE_STEPS = 100
"""Steps after which an episode is truncated."""

_PIXELS = 400
# Okabe and Ito's palette: colour-blind people can tell its colours apart, and so can a print in grey
_COLORS = {
    "plane": (255, 255, 255),
    "obstacle": (85, 85, 85),
    "target": (0, 158, 115),
    "trail": (86, 180, 233),
    "start": (0, 114, 178),
    "agent": (213, 94, 0),
}
_AGENT_RADIUS, _START_RADIUS, _TRAIL_RADIUS = 0.03, 0.02, 0.008


class TargetReachingEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point agent that must find its way past round obstacles into a round target.

    Observation, float32 ``[4]``: position in ``[-1, 1]^2`` and the vector from it to the target's centre. Action,
    ``[2]`` in ``[-1, 1]^2``: displacement in units of ``max_step``. ``info`` holds ``is_success`` and ``collided`` (an
    obstacle cut the step short). The class does not truncate; ``gymnasium.make("PMOE/TargetReaching-v0")`` does, after
    :data:`MAX_EPISODE_STEPS` steps. ``reset(options={"start": i})`` starts from the ``i``-th of the fixed starts.

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

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}  # type: ignore[misc]

    def __init__(self, layout: Any = "one", *, render_mode: str | None = None, **task: Any) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"TargetReachingEnv: render_mode={render_mode!r} is unknown; allowed: None, rgb_array.")
        self.task = TargetReachingTask(layout, **task)
        self.render_mode = render_mode
        high = np.array([1, 1, 2, 2], dtype=np.float32)
        self.observation_space = Box(-high, high, dtype=np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), dtype=np.float32)
        self._position: np.ndarray | None = None
        self._trail: list[np.ndarray] = []
        self._background: np.ndarray | None = None

    @property
    def position(self) -> np.ndarray:
        """Position of the agent, float64 ``[2]``; it can be set to any free point."""
        if self._position is None:
            raise ResetNeeded("TargetReachingEnv: call reset() first.")
        return self._position.copy()

    @position.setter
    def position(self, value: np.ndarray) -> None:
        position = np.array(value, dtype=np.float64)
        inside = position.shape == (2,) and bool((np.abs(position) <= 1).all())
        # from every centre, [M, 2]
        offset = position - self.task.obstacles[:, :2] if inside else np.zeros((1, 2))
        if not inside or (np.hypot(*offset.T) <= self.task.obstacles[:, 2]).any():
            raise ValueError(f"TargetReachingEnv: position must be a free point of the plane, got {position.tolist()}.")
        self._position = position
        self._trail = [position]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Put the agent on a start; ``options={"start": i}`` picks one of the fixed starts.

        Raises:
            ValueError: if there is no such start.
        """
        super().reset(seed=seed)
        index = (options or {}).get("start")
        starts = self.task.starts
        if index is not None:
            if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < len(starts):
                raise ValueError(f"TargetReachingEnv: start must be an index below {len(starts)}, got {index!r}.")
            self._position = starts[index].copy()
        elif self.task.random_starts:
            self._position = self.task.place(self.np_random.random((CANDIDATES, 2)))
        else:
            self._position = starts[self.np_random.integers(len(starts))].copy()
        self._trail = [self._position]
        return self._observation(self._position), {"is_success": False, "collided": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the agent.

        Raises:
            ValueError: for an action that is not two numbers.
        """
        if self._position is None:
            raise ResetNeeded("TargetReachingEnv: call reset() before step().")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"TargetReachingEnv: action must be two finite numbers, got {action.tolist()}.")
        self._position, reward, collided = self.task.step(self._position, action)
        # without pictures nobody sees the trail, and a long episode would only fill memory
        if self.render_mode is not None:
            self._trail.append(self._position)
        reached = bool(self.task.reached(self._position))
        info = {"is_success": reached, "collided": bool(collided)}
        return self._observation(self._position), float(reward), reached, False, info

    def render(self) -> np.ndarray | None:
        """Picture of the plane, the trail since the last reset, and the agent, uint8 ``[400, 400, 3]``."""
        if self.render_mode is None:
            gymnasium.logger.warn("TargetReachingEnv: render() needs render_mode='rgb_array'.")
            return None
        position = self.position
        # what does not move is painted once
        if self._background is None:
            self._background = np.full((_PIXELS, _PIXELS, 3), _COLORS["plane"], dtype=np.uint8)
            _draw(self._background, self.task.target[None, :2], self.task.target[2], "target")
            for obstacle in self.task.obstacles:
                _draw(self._background, obstacle[None, :2], obstacle[2], "obstacle")
        picture = self._background.copy()
        _draw(picture, _dots(np.stack(self._trail)), _TRAIL_RADIUS, "trail")
        _draw(picture, self._trail[0][None], _START_RADIUS, "start")
        _draw(picture, position[None], _AGENT_RADIUS, "agent")
        return picture

    def _observation(self, position: np.ndarray) -> np.ndarray:
        return self.task.observe(position).astype(np.float32)


def _dots(path: np.ndarray) -> np.ndarray:
    """Points ``[N, 2]`` along a path ``[T, 2]``, at most half a pixel apart."""
    dots = [path[:1]]
    for start, end in pairwise(path):
        number = int(np.ceil(np.hypot(*(end - start)) * _PIXELS)) + 1
        dots.append(start + (end - start) * np.linspace(0, 1, number)[:, None])
    return np.concatenate(dots)


def _draw(picture: np.ndarray, centres: np.ndarray, radius: float, color: str) -> None:
    """Paint discs of one radius at ``centres`` ``[N, 2]`` into ``picture``, whose first row is at y = 1."""
    scale = _PIXELS / 2  # pixels per unit of length
    # each disc is looked for in a square of P x P pixels around its centre
    reach = int(np.ceil(radius * scale)) + 1
    near = np.arange(-reach, reach + 1)
    columns = np.floor((centres[:, :1] + 1) * scale).astype(int) + near  # [N, P]
    rows = np.floor((1 - centres[:, 1:]) * scale).astype(int) + near
    dx = (columns + 0.5) / scale - 1 - centres[:, :1]
    dy = 1 - (rows + 0.5) / scale - centres[:, 1:]
    inside = dx[:, None, :] ** 2 + dy[:, :, None] ** 2 <= radius**2  # [N, P, P]
    rows, columns = np.broadcast_arrays(rows[:, :, None], columns[:, None, :])
    inside &= (rows >= 0) & (rows < _PIXELS) & (columns >= 0) & (columns < _PIXELS)
    picture[rows[inside], columns[inside]] = _COLORS[color]


def register() -> None:
    """Register :data:`ENV_ID` with Gymnasium, once."""
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(
            ENV_ID,
            entry_point="torchrl_pmoe.envs.target_reaching.gymnasium_env:TargetReachingEnv",
            max_episode_steps=MAX_EPISODE_STEPS,
        )
