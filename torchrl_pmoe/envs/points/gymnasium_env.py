"""A point agent as a Gymnasium environment."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box

from torchrl_pmoe.envs.points.pictures import draw_agent, draw_discs
from torchrl_pmoe.envs.points.task import PointTask

__all__ = ["PointEnv"]


class PointEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point agent; what it sees and gets is said by its task.

    ``info`` holds ``is_success`` and ``collided`` (something cut the step short), and in the step that ends an episode
    ``outcome``, see :meth:`PointTask.outcome`. The class does not truncate; ``gymnasium.make`` does.

    Args:
        task: over NumPy arrays.

    Keyword Args:
        render_mode: ``"rgb_array"`` for pictures uint8 ``[400, 400, 3]`` of the plane and the episode's trail.

    Raises:
        ValueError: for an unknown render mode.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}  # type: ignore[misc]

    def __init__(self, task: PointTask, *, render_mode: str | None = None) -> None:
        self._name = type(self).__name__
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"{self._name}: render_mode={render_mode!r} is unknown; allowed: None, rgb_array.")
        self.task: Any = task
        self.render_mode = render_mode
        high = np.array(task.observation_high, dtype=np.float32)
        self.observation_space = Box(-high, high, dtype=np.float32)
        self.action_space = Box(-1.0, 1.0, (2,), dtype=np.float32)
        self._state: np.ndarray | None = None
        self._trail: list[np.ndarray] = []
        self._background: np.ndarray | None = None

    @property
    def state(self) -> np.ndarray:
        """State of the agent, float64 ``[S]``, the position first; it can be set where an agent may be.

        Raises:
            ValueError: for a position that is not free, or a velocity outside ``[-1, 1]^2``.
        """
        if self._state is None:
            raise ResetNeeded(f"{self._name}: call reset() first.")
        return self._state.copy()

    @state.setter
    def state(self, value: np.ndarray) -> None:
        state = np.array(value, dtype=np.float64)
        if state.shape != (self.task.state_size,) or not self.task.is_allowed(state[:2]):
            raise self._not_free(np.atleast_1d(state)[:2])
        if not (np.abs(state[2:]) <= 1).all():
            raise ValueError(f"{self._name}: velocity must lie in [-1, 1]^2, got {state[2:].tolist()}.")
        self._state = state
        self._trail = [state[:2]]

    @property
    def position(self) -> np.ndarray:
        """Position of the agent, float64 ``[2]``; it can be set to any free point, where the agent stands still."""
        return self.state[:2]

    @position.setter
    def position(self, value: np.ndarray) -> None:
        position = np.asarray(value, dtype=np.float64)
        if position.shape != (2,):
            raise self._not_free(position)
        self.state = self._at_rest(position)

    def _not_free(self, value: np.ndarray) -> ValueError:
        return ValueError(f"{self._name}: position must be a free point of the plane, got {value.tolist()}.")

    def _at_rest(self, position: np.ndarray) -> np.ndarray:
        return np.concatenate((position, np.zeros(self.task.state_size - 2)))

    @abstractmethod
    def _draw_start(self, options: dict[str, Any]) -> np.ndarray:
        """Where the agent starts, ``[2]``, from the environment's generator."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Put the agent on a start."""
        super().reset(seed=seed)
        self._state = self._at_rest(self._draw_start(options or {}))
        self._trail = [self._state[:2]]
        return self._observation(self._state), {"is_success": False, "collided": False}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the agent.

        Raises:
            ValueError: for an action that is not two numbers.
        """
        if self._state is None:
            raise ResetNeeded(f"{self._name}: call reset() before step().")
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"{self._name}: action must be two finite numbers, got {action.tolist()}.")
        self._state, reward, collided = self.task.step(self._state, action)
        self._trail.append(self._state[:2])
        ended = bool(self.task.ended(self._state))
        info = {"is_success": bool(self.task.reached(self._state)), "collided": bool(collided)}
        if ended:
            info["outcome"] = self.task.outcome(np.stack(self._trail))
        return self._observation(self._state), float(reward), ended, False, info

    def render(self) -> np.ndarray | None:
        """Picture of the plane, the trail since the last reset, and the agent, uint8 ``[400, 400, 3]``."""
        if self.render_mode is None:
            gymnasium.logger.warn(f"{self._name}: render() needs render_mode='rgb_array'.")
            return None
        if self._state is None:
            raise ResetNeeded(f"{self._name}: call reset() first.")
        # what does not move is painted once
        if self._background is None:
            self._background = draw_discs(self.task.discs(), self.task.half_width)
        return draw_agent(self._background, np.stack(self._trail), self.task.half_width)

    def _observation(self, state: np.ndarray) -> np.ndarray:
        return self.task.observe(state).astype(np.float32)
