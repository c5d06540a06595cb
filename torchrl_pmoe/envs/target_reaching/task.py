"""The target-reaching task: plane, obstacles, movement and reward, for NumPy arrays and for tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["CANDIDATES", "LAYOUTS", "MARGIN", "START_REGION", "TargetReachingTask", "travel"]

Array = TypeVar("Array", np.ndarray, Tensor)

MARGIN = 1e-4
"""Distance from an obstacle at which an agent stops; rounding never costs more than half of it."""

START_REGION = ((-1.0, -1.0), (-0.6, 1.0))
"""Lower left and upper right corner of the box that random starts are drawn from."""

LAYOUTS: dict[str, dict[str, list[tuple[float, ...]]]] = {
    "one": {"obstacles": [(0.0, 0.0, 0.35)], "starts": [(-0.8, 0.0)], "target": [(0.8, 0.0, 0.12)]},
    "two": {
        "obstacles": [(-0.3, 0.0, 0.22), (0.3, 0.0, 0.22)],
        "starts": [(-0.8, 0.0)],
        "target": [(0.8, 0.0, 0.12)],
    },
    "three": {
        "obstacles": [(0.0, -0.5, 0.15), (0.0, 0.0, 0.15), (0.0, 0.5, 0.15)],
        "starts": [(-0.8, 0.0)],
        "target": [(0.8, 0.0, 0.12)],
    },
}
"""Obstacles and target as ``(x, y, radius)``, starts as ``(x, y)``."""

CANDIDATES = 32
"""Number of draws for a random start, which is the first free one among them."""


def _namespace(array: np.ndarray | Tensor) -> Any:
    return torch if isinstance(array, Tensor) else np


def travel(position: Array, action: Array, obstacles: Array, max_step: float) -> tuple[Array, Array]:
    """Move agents in a straight line, up to the first obstacle.

    The step ``max_step * action`` is clipped to the plane ``[-1, 1]^2``. It ends :data:`MARGIN` before the first disc
    that it would enter or come that close to. A step that passes a disc or leads away from it is free, so that an agent
    at an obstacle can move on.

    Args:
        position: ``[*B, 2]``.
        action: ``[*B, 2]``, clipped to ``[-1, 1]``.
        obstacles: ``[M, 3]``, rows ``(x, y, radius)``.
        max_step: length of a unit action.

    Returns:
        The new position ``[*B, 2]``, and whether an obstacle stopped the agent ``[*B]``.
    """
    xp = _namespace(position)
    step = (position + max_step * action.clip(-1.0, 1.0)).clip(-1.0, 1.0) - position
    offset = position[..., None, :] - obstacles[:, :2]  # from every centre, [*B, M, 2]
    # x, y are [*B, M]; dx, dy are [*B, 1]
    x, y, dx, dy = offset[..., 0], offset[..., 1], step[..., :1], step[..., 1:]
    outer = obstacles[:, 2] + MARGIN
    length2 = dx * dx + dy * dy
    inwards = x * dx + y * dy
    # squared length of the step times squared distance of its line from the centre; half the margin is for rounding
    cross2 = (x * dy - y * dx) ** 2
    blocked = (inwards < 0) & (cross2 < length2 * (outer - MARGIN / 2) ** 2)
    gap = (x * x + y * y - outer**2).clip(0.0)
    root = (length2 * outer**2 - cross2).clip(0.0) ** 0.5
    # share of the step up to each disc, [*B, M], and up to the first one, [*B]
    contact = xp.where(blocked, gap / xp.where(blocked, root - inwards, 1.0), 1.0)
    share = xp.amin(xp.concatenate((contact, xp.ones_like(dx)), -1), -1)
    return (position + share[..., None] * step).clip(-1.0, 1.0), share < 1.0


def _numbers(name: str, value: Any, *, columns: int, form: str) -> np.ndarray:
    """``value`` as rows of finite numbers ``[N, columns]``, the first two of which are a point of the plane."""
    try:
        rows = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        rows = np.empty(0)
        value = "something else"
    # an empty list is no row; anything that made no array is refused below
    if rows.shape == (0,) and value is not None and not isinstance(value, str):
        rows = rows.reshape(0, columns)
    if rows.ndim != 2 or rows.shape[1] != columns:
        raise ValueError(f"TargetReachingTask: {name} must be {form}, got shape {rows.shape}.")
    if not np.isfinite(rows).all() or (np.abs(rows[:, :2]) > 1).any():
        raise ValueError(f"TargetReachingTask: {name} must lie in the plane [-1, 1]^2, got {rows.tolist()}.")
    if columns == 3 and (rows[:, 2] <= 0).any():
        raise ValueError(f"TargetReachingTask: {name} must have positive radii, got {rows[:, 2].tolist()}.")
    return rows


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"TargetReachingTask: {name}={value!r} is unknown; allowed: {', '.join(allowed)}.")


class TargetReachingTask:
    """A point agent in the plane ``[-1, 1]^2`` on its way past round obstacles to a round target.

    The action ``[2]`` in ``[-1, 1]^2`` is a displacement in units of ``max_step``; see :func:`travel`. The observation
    ``[4]`` is the position and the vector from it to the target's centre. An episode ends when a step ends in the
    target. All methods take NumPy arrays, or tensors once :meth:`as_tensors` was called.

    Args:
        layout: ``"one"`` disc, with two mirrored routes; ``"two"`` discs one behind the other with a gap between them,
            so four routes, two of which pass through the gap; ``"three"`` discs in a column, with four routes in two
            mirrored pairs. See :data:`LAYOUTS`.

    Keyword Args:
        obstacles: rows ``(x, y, radius)``, in place of the layout's. They may overlap; ``[]`` is an empty plane.
        starts: rows ``(x, y)``, in place of the layout's.
        target: ``(x, y, radius)``, in place of the layout's.
        start: ``"fixed"``, one of ``starts`` at each reset, or ``"random"``, uniform over the free part of
            :data:`START_REGION`.
        reward: ``"dense"``, ``-distance_cost * distance - collision_cost * collided + success_reward * reached`` with
            the distance from the end of the step to the target's centre; or ``"sparse"``, ``success_reward`` in the
            step that reaches the target and 0 in the others.
        max_step: length of a unit action.
        distance_cost: see ``reward``.
        collision_cost: see ``reward``.
        success_reward: see ``reward``.

    Raises:
        ValueError: for an unknown option, or discs and points that lie outside the plane or on one another.
    """

    obstacles: Any
    starts: Any
    target: Any

    def __init__(
        self,
        layout: Literal["one", "two", "three"] = "one",
        *,
        obstacles: Sequence[Sequence[float]] | np.ndarray | None = None,
        starts: Sequence[Sequence[float]] | np.ndarray | None = None,
        target: Sequence[float] | np.ndarray | None = None,
        start: Literal["fixed", "random"] = "fixed",
        reward: Literal["dense", "sparse"] = "dense",
        max_step: float = 0.1,
        distance_cost: float = 0.1,
        collision_cost: float = 0.1,
        success_reward: float = 1.0,
    ) -> None:
        _one_of("layout", layout, list(LAYOUTS))
        _one_of("start", start, ["fixed", "random"])
        _one_of("reward", reward, ["dense", "sparse"])
        numbers = {
            "max_step": max_step,
            "distance_cost": distance_cost,
            "collision_cost": collision_cost,
            "success_reward": success_reward,
        }
        for name, value in numbers.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"TargetReachingTask: {name} must be a finite number, got {value!r}.")
        if not 0 < max_step <= 2:
            raise ValueError(f"TargetReachingTask: max_step must be in (0, 2], got {max_step}.")
        base = LAYOUTS[layout]
        self.obstacles = _numbers(
            "obstacles", base["obstacles"] if obstacles is None else obstacles, columns=3, form="rows (x, y, radius)"
        )
        self.starts = _numbers("starts", base["starts"] if starts is None else starts, columns=2, form="rows (x, y)")
        self.target = _numbers("target", base["target"] if target is None else [target], columns=3, form="(x, y, r)")[0]
        self.random_starts = start == "random"
        self.dense = reward == "dense"
        self.max_step = float(max_step)
        self.distance_cost = float(distance_cost)
        self.collision_cost = float(collision_cost)
        self.success_reward = float(success_reward)
        self._check()

    def _check(self) -> None:
        # distance between the edges of the target and of each obstacle, [M]
        gap = np.hypot(*(self.obstacles[:, :2] - self.target[:2]).T) - self.obstacles[:, 2] - self.target[2]
        if (gap < 0).any():
            raise ValueError(f"TargetReachingTask: target must not overlap obstacle {int(gap.argmin())}.")
        if not len(self.starts):
            raise ValueError("TargetReachingTask: starts must hold at least one point.")
        free = self.is_free(self.starts)
        if not free.all():
            where = self.starts[~free][0].tolist()
            raise ValueError(f"TargetReachingTask: starts must lie outside obstacles and target, got {where}.")
        # random starts are the first free one of CANDIDATES draws, so half of the region must be free
        grid = np.stack(np.meshgrid(*np.linspace(*START_REGION, 101).T), -1)
        if self.random_starts and self.is_free(grid).mean() < 0.5:
            raise ValueError("TargetReachingTask: start='random' needs half of START_REGION free of discs.")

    def as_tensors(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """The same task over tensors."""
        task = copy.copy(self)
        for name in ("obstacles", "starts", "target"):
            setattr(task, name, torch.as_tensor(getattr(self, name), dtype=dtype, device=device))
        return task

    def is_free(self, position: Array) -> Array:
        """Whether points ``[*B, 2]`` lie outside all obstacles and the target, ``[*B]``."""
        # obstacles and target together, [M + 1, 3]
        discs = _namespace(position).concatenate((self.obstacles, self.target[None]), 0)
        offset = position[..., None, :] - discs[:, :2]  # [*B, M + 1, 2]
        clear: Any = (offset**2).sum(-1) > (discs[:, 2] + MARGIN) ** 2
        return clear.all(-1)

    def place(self, candidates: Array) -> Array:
        """The first free one of ``N`` candidate starts, ``[*B, 2]``, from uniform draws ``[*B, N, 2]`` in [0, 1].

        If none is free, which has odds below 1e-9 with 32 candidates, it is the first of the fixed starts.
        """
        (left, bottom), (right, top) = START_REGION
        xp = _namespace(candidates)
        x, y = candidates[..., 0], candidates[..., 1]
        candidates = xp.stack((left + (right - left) * x, bottom + (top - bottom) * y), -1)
        free: Any = self.is_free(candidates)
        first = free & (free.cumsum(-1) == 1)  # [*B, N], true at the first free one
        return xp.where(free.any(-1)[..., None], (candidates * first[..., None]).sum(-2), self.starts[0])

    def observe(self, position: Array) -> Array:
        """Position and the vector from it to the target's centre, ``[*B, 4]``."""
        return _namespace(position).concatenate((position, self.target[:2] - position), -1)

    def reached(self, position: Array) -> Array:
        """Whether positions ``[*B, 2]`` lie in the target, ``[*B]``."""
        return ((self.target[:2] - position) ** 2).sum(-1) <= self.target[2] ** 2

    def step(self, position: Array, action: Array) -> tuple[Array, Array, Array]:
        """One step of agents at ``position`` ``[*B, 2]``.

        Returns:
            Their new position ``[*B, 2]``, the reward ``[*B]``, and whether an obstacle stopped them ``[*B]``.
        """
        position, collided = travel(position, action, self.obstacles, self.max_step)
        reward = self.success_reward * self.reached(position)
        if self.dense:
            distance = ((self.target[:2] - position) ** 2).sum(-1) ** 0.5
            reward = reward - self.distance_cost * distance - self.collision_cost * collided
        return position, reward, collided
