"""The multi-goal task: goals, movement and reward, for NumPy arrays and for tensors."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from torchrl_pmoe.envs.points.task import Array, PointTask, namespace, require_finite

__all__ = ["GOALS", "MAX_EPISODE_STEPS", "MultiGoalTask"]

GOALS = {"east": (5.0, 0.0), "west": (-5.0, 0.0), "north": (0.0, 5.0), "south": (0.0, -5.0)}
"""The goals by name; one is reached within a distance of :data:`GOAL_RADIUS`."""

GOAL_RADIUS = 1.0

START_RADIUS = 3.9
"""No start lies farther from the origin, so that none is at a goal."""

MAX_EPISODE_STEPS = 30
"""Steps after which an episode is truncated, as in the authors' example."""


class MultiGoalTask(PointTask):
    """A point agent at the origin of the plane ``[-7, 7]^2``, and four goals of the same worth around it.

    The task of Haarnoja, Tang, Abbeel, Levine: Reinforcement Learning with Deep Energy-Based Policies (2017). Its
    numbers are those of the authors' code (``softlearning``, ``MultiGoalEnv``; 30 steps: ``softqlearning``,
    ``multigoal_sql.py``). The action ``[2]`` in ``[-1, 1]^2`` is the displacement, the observation ``[2]`` is the
    position. An episode ends when a step ends less than 1 from a goal. The reward is
    ``-action_cost * |action|^2 - distance_cost * distance^2 + goal_reward * reached`` with the distance from the end of
    the step to the nearest goal.

    Keyword Args:
        action_cost: see above.
        distance_cost: see above.
        goal_reward: see above.
        start_std: of the normal draw of the start around the origin, in each dimension. Draws beyond
            :data:`START_RADIUS` are moved there.

    Raises:
        ValueError: for an argument that is no finite number, or a negative ``start_std``.
    """

    arrays: ClassVar[tuple[str, ...]] = ("goals",)
    half_width = 7.0
    max_episode_steps = MAX_EPISODE_STEPS
    observation_high = (7.0, 7.0)
    goals: Any

    def __init__(
        self,
        *,
        action_cost: float = 30.0,
        distance_cost: float = 1.0,
        goal_reward: float = 10.0,
        start_std: float = 0.1,
    ) -> None:
        numbers = {
            "action_cost": action_cost,
            "distance_cost": distance_cost,
            "goal_reward": goal_reward,
            "start_std": start_std,
        }
        require_finite("MultiGoalTask", numbers)
        if start_std < 0:
            raise ValueError(f"MultiGoalTask: start_std must be at least 0, got {start_std}.")
        self.action_cost = float(action_cost)
        self.distance_cost = float(distance_cost)
        self.goal_reward = float(goal_reward)
        self.start_std = float(start_std)
        self.goals = np.array(list(GOALS.values()))

    def _squared_distances(self, state: Array) -> Array:
        """To every goal, ``[*B, 4]``."""
        return ((state[..., None, :] - self.goals) ** 2).sum(-1)

    def place(self, normal: Array) -> Array:
        """Starts from standard normal draws, ``[*B, 2]``."""
        start = self.start_std * normal
        length = (start**2).sum(-1)[..., None] ** 0.5
        return start * (START_RADIUS / length.clip(START_RADIUS))

    def observe(self, state: Array) -> Array:
        """The position, ``[*B, 2]``."""
        # a copy: what is observed may be changed in place
        return namespace(state).concatenate((state,), -1)

    def goal(self, position: Array) -> Array:
        """Index in :data:`GOALS` of the goal that is reached at positions ``[*B, 2]``, -1 for none, ``[*B]``."""
        return namespace(position).where(self.reached(position), self._squared_distances(position).argmin(-1), -1)

    def reached(self, state: Array) -> Array:
        """Whether agents are at a goal, ``[*B]``."""
        return namespace(state).amin(self._squared_distances(state), -1) < GOAL_RADIUS**2

    def step(self, state: Array, action: Array) -> tuple[Array, Array, Array]:
        """One step of agents at positions ``[*B, 2]``.

        Returns:
            Their new position ``[*B, 2]``, the reward ``[*B]``, and whether the plane's edge stopped them ``[*B]``.
        """
        action = action.clip(-1.0, 1.0)
        free = state + action
        state = free.clip(-self.half_width, self.half_width)
        stopped: Any = state != free
        distance2 = namespace(state).amin(self._squared_distances(state), -1)
        cost = self.action_cost * (action**2).sum(-1) + self.distance_cost * distance2
        return state, self.goal_reward * self.reached(state) - cost, stopped.any(-1)

    def outcome(self, path: np.ndarray) -> str | None:
        """Name of the goal that is reached at the end of positions ``[T, 2]``."""
        index = int(self.goal(path[-1]))
        return None if index < 0 else list(GOALS)[index]

    def discs(self) -> list[tuple[np.ndarray, str]]:
        """The goals."""
        return [(np.append(goal, GOAL_RADIUS), "target") for goal in self.goals]
