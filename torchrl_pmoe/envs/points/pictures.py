"""Pictures of a point agent in the plane."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

__all__ = ["draw_agent", "draw_discs"]

_PIXELS = 400
# Okabe and Ito's palette: colour-blind people can tell its colours apart, and so can a print in grey
_COLORS = {
    "plane": (255, 255, 255),
    "obstacle": (85, 85, 85),
    "target": (0, 158, 115),
    "bait": (230, 159, 0),
    "trail": (86, 180, 233),
    "start": (0, 114, 178),
    "agent": (213, 94, 0),
}
_AGENT_RADIUS, _START_RADIUS, _TRAIL_RADIUS = 0.03, 0.02, 0.008


def draw_discs(discs: list[tuple[np.ndarray, str]], half_width: float) -> np.ndarray:
    """The plane with its discs ``(x, y, radius)`` of some kinds, uint8 ``[400, 400, 3]``."""
    picture = np.full((_PIXELS, _PIXELS, 3), _COLORS["plane"], dtype=np.uint8)
    for disc, kind in discs:
        x, y, radius = np.asarray(disc) / half_width
        _draw(picture, np.array([[x, y]]), radius, kind)
    return picture


def draw_agent(background: np.ndarray, trail: np.ndarray, half_width: float) -> np.ndarray:
    """A copy of the background with the positions of an agent ``[T, 2]``, the last of which is where it is."""
    picture, trail = background.copy(), trail / half_width
    _draw(picture, _dots(trail), _TRAIL_RADIUS, "trail")
    _draw(picture, trail[:1], _START_RADIUS, "start")
    _draw(picture, trail[-1:], _AGENT_RADIUS, "agent")
    return picture


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
