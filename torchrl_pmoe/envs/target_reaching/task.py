"""The target-reaching task: plane, obstacles, movement and reward, for NumPy arrays and for tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from torchrl_pmoe.envs.points.task import Array, PointTask, namespace, require_finite
from torchrl_pmoe.envs.target_reaching.routes import erase_loops, h_signature

__all__ = [
    "BLOCKS",
    "CANDIDATES",
    "LAYOUTS",
    "MARGIN",
    "MAX_EPISODE_STEPS",
    "PAPER_EPISODE_STEPS",
    "START_REGION",
    "TargetReachingTask",
    "own_reward",
    "travel",
]

MAX_EPISODE_STEPS = 100
"""Steps after which an episode is truncated."""

PAPER_EPISODE_STEPS = 200
"""The same for ``layout="paper"``, where the straight way alone would take 76 steps. The authors' code has no limit."""

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
    # the authors' arena [-5, 5]^2, in units of 5: every route passes the first disc on one side
    "paper": {
        "obstacles": [(-0.5, -0.5, 0.12), (-0.6, -0.1, 0.12), (-0.1, -0.6, 0.12)],
        "starts": [(-0.9, -0.9)],
        "target": [(0.6, 0.6, 0.1)],
    },
    # random actions end in the bait in every second episode, in the target in one of a hundred
    "deceptive": {
        "obstacles": [(0.0, 0.0, 0.3)],
        "starts": [(-0.5, 0.0)],
        "target": [(0.6, 0.0, 0.2)],
        "bait": [(-0.8, 0.0, 0.12)],
    },
}
"""Obstacles, target and bait as ``(x, y, radius)``, starts as ``(x, y)``."""


def own_reward(layout: str) -> Literal["dense", "sparse", "paper"]:
    """The reward of a layout where none is asked for."""
    return "paper" if layout == "paper" else "sparse" if "bait" in LAYOUTS[layout] else "dense"


Disc = tuple[float, float, float]


def _mirrored(upper: list[Disc]) -> list[Disc]:
    return [(x, -y, radius) for x, y, radius in upper]


def _swapped(upper: list[Disc]) -> list[Disc]:
    return [(y, x, radius) for x, y, radius in upper]


_ABOVE_ONE: list[Disc] = [(0.0, 0.55, 0.22), (0.0, 0.88, 0.22)]
_ABOVE_DECEPTIVE: list[Disc] = [(0.0, 0.5, 0.22), (0.0, 0.88, 0.22)]
_ABOVE_TWO: list[Disc] = [(-0.3, 0.42, 0.21), (-0.3, 0.8, 0.22)]
_ABOVE_THREE: list[Disc] = [(0.0, 0.84, 0.2)]
_SECOND_OF_THREE: list[Disc] = [(0.0, 0.25, 0.11)]
_LEFT_OF_PAPER: list[Disc] = [(-0.86, -0.1, 0.15)]
_SECOND_OF_PAPER: list[Disc] = [(-0.55, -0.3, 0.1)]
BLOCKS: dict[str, dict[str, list[Disc]]] = {
    "one": {"upper": _ABOVE_ONE, "lower": _mirrored(_ABOVE_ONE)},
    "two": {"upper": _ABOVE_TWO, "lower": _mirrored(_ABOVE_TWO)},
    "three": {
        "upper": _ABOVE_THREE,
        "upper_middle": _SECOND_OF_THREE,
        "lower_middle": _mirrored(_SECOND_OF_THREE),
        "lower": _mirrored(_ABOVE_THREE),
    },
    "paper": {
        "upper": _LEFT_OF_PAPER,
        "upper_middle": _SECOND_OF_PAPER,
        "lower_middle": _swapped(_SECOND_OF_PAPER),
        "lower": _swapped(_LEFT_OF_PAPER),
    },
    "deceptive": {"upper": _ABOVE_DECEPTIVE, "lower": _mirrored(_ABOVE_DECEPTIVE)},
}
"""By layout and passage the discs that close it. Of ``"two"`` it is the one beside the first disc."""

CANDIDATES = 32
"""Number of draws for a random start, which is the first free one among them."""

TIME_STEP = 0.1
"""Of the arena with acceleration: what a unit acceleration adds to the velocity in a step."""


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
    xp = namespace(position)
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


class TargetReachingTask(PointTask):
    """A point agent in the plane ``[-1, 1]^2`` on its way past round obstacles to a round target.

    The action ``[2]`` in ``[-1, 1]^2`` is a displacement in units of ``max_step``; see :func:`travel`. The observation
    ``[4]`` is the position and the vector from it to the target's centre. An episode ends when a step ends in the
    target or in the bait, if there is one.

    In ``layout="paper"`` the action is an acceleration instead. The velocity stays within ``[-1, 1]^2`` and is observed
    too, behind the rest, ``[6]``. There an episode also ends when a step ends in an obstacle or at a wall. Geometry,
    motion and rewards are those of the authors' code; their observation also has the last acceleration and the
    obstacles, which add nothing where these stand still.

    Args:
        layout: ``"one"`` disc, with two mirrored routes; ``"two"`` discs one behind the other with a gap between them,
            so four routes, two of which pass through the gap; ``"three"`` discs in a column, with four routes in two
            mirrored pairs; ``"paper"``, the authors' arena; ``"deceptive"``, a bait near the start and the target
            behind a disc. See :data:`LAYOUTS`.

    Keyword Args:
        obstacles: rows ``(x, y, radius)``, in place of the layout's. They may overlap; ``[]`` is an empty plane.
        starts: rows ``(x, y)``, in place of the layout's.
        target: ``(x, y, radius)``, in place of the layout's.
        blocked: a passage of the layout, which obstacles close: ``"upper"`` or ``"lower"``, in ``"three"`` and
            ``"paper"`` also ``"upper_middle"`` or ``"lower_middle"``. See :data:`BLOCKS`. Routes keep their names.
        start: ``"fixed"``, one of ``starts`` at each reset, or ``"random"``, uniform over the free part of
            :data:`START_REGION`.
        reward: ``"dense"``, ``-distance_cost * distance - collision_cost * collided + success_reward * reached`` with
            the distance from the end of the step to the target's centre; ``"sparse"``, ``success_reward`` in the step
            that reaches the target and 0 in the others; with a bait, both have ``bait_reward`` more in the step that
            reaches it; or, with ``layout="paper"``, ``"paper"``: 100 in the target, -100 in an obstacle, -10 at a wall,
            else a tenth of the speed. ``None`` is ``"paper"`` in the authors' arena, ``"sparse"`` with a bait, else
            ``"dense"``.
        max_step: length of a unit action, or of a step at full speed in ``layout="paper"``; 0.1, or 0.02 there, if not
            given.
        distance_cost: see ``reward``.
        collision_cost: see ``reward``.
        success_reward: see ``reward``.
        bait_reward: see ``reward``.

    Raises:
        ValueError: for an unknown option, or discs and points that lie outside the plane or on one another.
    """

    arrays: ClassVar[tuple[str, ...]] = ("obstacles", "starts", "target", "bait")
    obstacles: Any
    starts: Any
    target: Any
    bait: Any

    def __init__(
        self,
        layout: Literal["one", "two", "three", "paper", "deceptive"] = "one",
        *,
        obstacles: Sequence[Sequence[float]] | np.ndarray | None = None,
        starts: Sequence[Sequence[float]] | np.ndarray | None = None,
        target: Sequence[float] | np.ndarray | None = None,
        blocked: str | None = None,
        start: Literal["fixed", "random"] = "fixed",
        reward: Literal["dense", "sparse", "paper"] | None = None,
        max_step: float | None = None,
        distance_cost: float = 0.1,
        collision_cost: float = 0.1,
        success_reward: float = 1.0,
        bait_reward: float = 0.2,
    ) -> None:
        _one_of("layout", layout, list(LAYOUTS))
        _one_of("start", start, ["fixed", "random"])
        base = LAYOUTS[layout]
        self.accelerates = layout == "paper"
        if reward is None:
            reward = own_reward(layout)
        _one_of("reward", reward, ["dense", "sparse", *(["paper"] if self.accelerates else [])])
        if blocked is not None:
            _one_of("blocked", blocked, list(BLOCKS[layout]))
        if max_step is None:
            max_step = 0.02 if self.accelerates else 0.1
        require_finite(
            "TargetReachingTask",
            {
                "max_step": max_step,
                "distance_cost": distance_cost,
                "collision_cost": collision_cost,
                "success_reward": success_reward,
                "bait_reward": bait_reward,
            },
        )
        if not 0 < max_step <= 2:
            raise ValueError(f"TargetReachingTask: max_step must be in (0, 2], got {max_step}.")
        own = _numbers(
            "obstacles", base["obstacles"] if obstacles is None else obstacles, columns=3, form="rows (x, y, radius)"
        )
        # what routes are told by: one of several obstacles around the same centre
        _, first = np.unique(own[:, :2].round(6) + 0.0, axis=0, return_index=True)
        self.landmarks = own[np.sort(first)]
        closed = [] if blocked is None else BLOCKS[layout][blocked]
        self.obstacles = np.concatenate((own, np.array(closed).reshape(-1, 3)))
        self.starts = _numbers("starts", base["starts"] if starts is None else starts, columns=2, form="rows (x, y)")
        self.target = _numbers("target", base["target"] if target is None else [target], columns=3, form="(x, y, r)")[0]
        self.bait = np.array(base["bait"][0]) if "bait" in base else None
        self.random_starts = start == "random"
        self.reward = reward
        self.max_step = float(max_step)
        self.distance_cost = float(distance_cost)
        self.collision_cost = float(collision_cost)
        self.success_reward = float(success_reward)
        self.bait_reward = float(bait_reward)
        self.max_episode_steps = PAPER_EPISODE_STEPS if self.accelerates else MAX_EPISODE_STEPS
        self.observation_high = (1.0, 1.0, 2.0, 2.0, *((1.0, 1.0) if self.accelerates else ()))
        self.state_size = 4 if self.accelerates else 2
        self._check()

    def _check(self) -> None:
        # distance between the edges of the target and of each obstacle, [M]
        gap = np.hypot(*(self.obstacles[:, :2] - self.target[:2]).T) - self.obstacles[:, 2] - self.target[2]
        if (gap < 0).any():
            raise ValueError(f"TargetReachingTask: target must not overlap obstacle {int(gap.argmin())}.")
        if self.bait is not None:
            others = np.vstack((self.target, self.obstacles))
            if (np.hypot(*(others[:, :2] - self.bait[:2]).T) < others[:, 2] + self.bait[2]).any():
                raise ValueError("TargetReachingTask: target and obstacles must not overlap the bait.")
        if not len(self.starts):
            raise ValueError("TargetReachingTask: starts must hold at least one point.")
        free = self.is_free(self.starts)
        if not free.all():
            where = self.starts[~free][0].tolist()
            ends = "obstacles and target, and not at a wall" if self.accelerates else "obstacles and target"
            raise ValueError(f"TargetReachingTask: starts must lie outside {ends}, got {where}.")
        # random starts are the first free one of CANDIDATES draws, so half of the region must be free
        grid = np.stack(np.meshgrid(*np.linspace(*START_REGION, 101).T), -1)
        if self.random_starts and self.is_free(grid).mean() < 0.5:
            raise ValueError("TargetReachingTask: start='random' needs half of START_REGION free of discs.")

    def is_free(self, position: Array) -> Array:
        """Whether points ``[*B, 2]`` lie outside all obstacles, the target and the bait, ``[*B]``.

        In the authors' arena they must not lie at a wall either.
        """
        ends = self.target[None] if self.bait is None else namespace(position).stack((self.target, self.bait))
        # all of them together, [D, 3]
        discs = namespace(position).concatenate((self.obstacles, ends), 0)
        offset = position[..., None, :] - discs[:, :2]  # [*B, D, 2]
        clear: Any = (offset**2).sum(-1) > (discs[:, 2] + MARGIN) ** 2
        return clear.all(-1) & ~self._at_wall(position) if self.accelerates else clear.all(-1)

    def is_allowed(self, position: np.ndarray) -> bool:
        """Whether a point ``[2]`` lies in the plane and outside all obstacles."""
        # from every centre, [M, 2]
        offset = position - self.obstacles[:, :2]
        return super().is_allowed(position) and not (np.hypot(*offset.T) <= self.obstacles[:, 2]).any()

    def place(self, candidates: Array) -> Array:
        """The first free one of ``N`` candidate starts, ``[*B, 2]``, from uniform draws ``[*B, N, 2]`` in [0, 1].

        If none is free, which has odds below 1e-9 with 32 candidates, it is the first of the fixed starts.
        """
        (left, bottom), (right, top) = START_REGION
        xp = namespace(candidates)
        x, y = candidates[..., 0], candidates[..., 1]
        candidates = xp.stack((left + (right - left) * x, bottom + (top - bottom) * y), -1)
        free: Any = self.is_free(candidates)
        first = free & (free.cumsum(-1) == 1)  # [*B, N], true at the first free one
        return xp.where(free.any(-1)[..., None], (candidates * first[..., None]).sum(-2), self.starts[0])

    def observe(self, state: Array) -> Array:
        """Position, the vector from it to the target's centre, and the velocity where there is one, ``[*B, O]``."""
        position, velocity = state[..., :2], state[..., 2:]
        return namespace(state).concatenate((position, self.target[:2] - position, velocity), -1)

    def reached(self, state: Array) -> Array:
        """Whether agents are in the target, ``[*B]``."""
        return _is_in(state, self.target)

    def ended(self, state: Array) -> Array:
        """Whether agents are in the target or the bait or, in the authors' arena, have hit something, ``[*B]``."""
        over = self.reached(state)
        if self.bait is not None:
            over = over | _is_in(state, self.bait)
        if self.accelerates:
            over = over | self._in_obstacle(state) | self._at_wall(state)
        return over

    def step(self, state: Array, action: Array) -> tuple[Array, Array, Array]:
        """One step of agents in states ``[*B, S]``.

        Returns:
            Their new state ``[*B, S]``, the reward ``[*B]``, and whether an obstacle has stopped them ``[*B]``; in the
            authors' arena also a wall.
        """
        if self.accelerates:
            state = self._accelerate(state, action)
            collided = self._in_obstacle(state) | self._at_wall(state)
        else:
            state, collided = travel(state, action, self.obstacles, self.max_step)
        if self.reward == "paper":
            return state, self._paper_reward(state), collided
        reward = self.success_reward * self.reached(state)
        if self.bait is not None:
            reward = reward + self.bait_reward * _is_in(state, self.bait)
        if self.reward == "dense":
            distance = ((self.target[:2] - state[..., :2]) ** 2).sum(-1) ** 0.5
            reward = reward - self.distance_cost * distance - self.collision_cost * collided
        return state, reward, collided

    def _accelerate(self, state: Array, action: Array) -> Array:
        position, before = state[..., :2], state[..., 2:]
        velocity = (before + TIME_STEP * action.clip(-1.0, 1.0)).clip(-1.0, 1.0)
        # half of the change on top of the new velocity is the authors' rule, not the middle of both
        position = position + self.max_step * (velocity + 0.5 * (velocity - before))
        return namespace(state).concatenate((position.clip(-1.0, 1.0), velocity), -1)

    def _in_obstacle(self, state: Array) -> Array:
        inside: Any = _is_in(state[..., None, :], self.obstacles)  # [*B, M]
        return inside.any(-1)

    def _at_wall(self, state: Array) -> Array:
        outside: Any = abs(state[..., :2]) >= 1.0
        return outside.any(-1)

    def _paper_reward(self, state: Array) -> Array:
        xp = namespace(state)
        reward = 0.1 * (state[..., 2:] ** 2).sum(-1) ** 0.5
        reward = xp.where(self.reached(state), 100.0, reward)
        reward = xp.where(self._at_wall(state), -10.0, reward)
        return xp.where(self._in_obstacle(state), -100.0, reward)

    def route(self, path: np.ndarray) -> tuple[int, ...]:
        """The h-signature of the positions ``[T, 2]`` of an episode that has reached the target, without its loops."""
        return h_signature(erase_loops(np.vstack((path, np.asarray(self.target)[:2]))), self.landmarks)

    def outcome(self, path: np.ndarray) -> str | None:
        """The route, ``"below all"`` or by what was passed above, ``"above 1 2"``; ``"bait"``; ``None`` for a crash."""
        if self.reached(path[-1]):
            return "above " + " ".join(map(str, word)) if (word := self.route(path)) else "below all"
        return "bait" if self.bait is not None and _is_in(path[-1], self.bait) else None

    def discs(self) -> list[tuple[np.ndarray, str]]:
        """Target, bait and obstacles."""
        baits = [] if self.bait is None else [(self.bait, "bait")]
        return [(self.target, "target"), *baits, *((obstacle, "obstacle") for obstacle in self.obstacles)]


def _is_in(state: Array, discs: Array) -> Array:
    """Whether positions, the first two of the last dimension, lie in discs ``[..., 3]``."""
    return ((state[..., :2] - discs[..., :2]) ** 2).sum(-1) <= discs[..., 2] ** 2
