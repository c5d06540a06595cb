"""What the tests of the two target-reaching environments share: routes to drive, and geometry done another way."""

from __future__ import annotations

import numpy as np

# waypoints from the start to the target, by layout, with the h-signature of each route
ROUTES = {
    "one": {
        (1,): [(-0.4, 0.5), (0.4, 0.5)],
        (): [(-0.4, -0.5), (0.4, -0.5)],
    },
    "two": {
        (1, 2): [(-0.3, 0.4), (0.3, 0.4)],
        (): [(-0.3, -0.4), (0.3, -0.4)],
        (1,): [(-0.3, 0.4), (0.0, 0.3), (0.0, -0.3), (0.3, -0.4)],
        (2,): [(-0.3, -0.4), (0.0, -0.3), (0.0, 0.3), (0.3, 0.4)],
    },
    "three": {
        (1, 2, 3): [(-0.2, 0.8), (0.2, 0.8)],
        (1, 2): [(-0.2, 0.25), (0.2, 0.25)],
        (1,): [(-0.2, -0.25), (0.2, -0.25)],
        (): [(-0.2, -0.8), (0.2, -0.8)],
    },
}
STEPPED = [*ROUTES, "deceptive"]
"""The layouts in which an action is a displacement and obstacles stop an agent; each is its own mirror image."""
EVERY_ROUTE = [(layout, word) for layout, words in ROUTES.items() for word in words]


def steer(position: np.ndarray, goal: np.ndarray, max_step: float = 0.1) -> np.ndarray:
    """Action that goes straight at ``goal``."""
    offset = (goal - position) / max_step
    return offset / max(1.0, np.hypot(*offset))


def clearance(start: np.ndarray, end: np.ndarray, obstacles: np.ndarray) -> np.ndarray:
    """Distance of segments ``[N, 2]`` from the rims of obstacles, ``[N, M]``, by projection onto the segment."""
    start, end = (np.asarray(point, dtype=np.float64)[:, None] for point in (start, end))
    step = end - start
    length2 = np.maximum((step**2).sum(-1), 1e-300)
    share = (((obstacles[:, :2] - start) * step).sum(-1) / length2).clip(0, 1)
    nearest = start + share[..., None] * step
    return np.hypot(*np.moveaxis(obstacles[:, :2] - nearest, -1, 0)) - obstacles[:, 2]


def hostile_actions(position: np.ndarray, obstacles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit-square actions at, past, or along the nearest obstacle, or anywhere, drawn per agent."""
    offset = obstacles[:, :2] - position[:, None]
    nearest = (np.hypot(*np.moveaxis(offset, -1, 0)) - obstacles[:, 2]).argmin(1)
    at = offset[np.arange(len(position)), nearest]
    at = at / np.hypot(*at.T)[:, None]
    along = np.stack((-at[:, 1], at[:, 0]), -1)
    choices = np.stack((at, along, -along, along + 0.02 * at, 0.3 * at + along, rng.uniform(-1, 1, at.shape)))
    length = 10.0 ** rng.uniform(-3, 0, (len(position), 1))
    return (choices[rng.integers(len(choices), size=len(position)), np.arange(len(position))] * length).clip(-1, 1)
