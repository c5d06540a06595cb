"""Which route around the obstacles a path took, and how many routes a policy uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

__all__ = ["effective_routes", "erase_loops", "h_signature", "routes"]

Route = TypeVar("Route", bound=Hashable)

_TOLERANCE = 1e-10


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross product of vectors ``[..., 2]``, ``[...]``."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _first_contact(start: np.ndarray, end: np.ndarray, kept: np.ndarray) -> tuple[float, int] | None:
    """First meeting of the segment from ``start`` to ``end`` with the polyline ``kept`` ``[N, 2]``.

    Returns:
        the share of the way to ``end`` and the index of the polyline's segment; ``None`` if they do not meet.
    """
    if len(kept) < 2:
        return None
    step, offset, edges = end - start, kept[:-1] - start, np.diff(kept, axis=0)  # [2], [N - 1, 2], [N - 1, 2]
    area = _cross(step, edges)
    length = np.hypot(*step)
    parallel = np.abs(area) <= _TOLERANCE * length * np.hypot(*edges.T)
    divisor = np.where(parallel, 1.0, area)
    # both lines in parameters of their own: shares of the step and of the edge, [N - 1]
    share, along = _cross(offset, edges) / divisor, _cross(offset, step) / divisor
    meets = ~parallel & (share >= 0) & (share <= 1) & (along >= 0) & (along <= 1)
    # segments on one line meet at the nearer end of the older one, if it lies on the way
    ends = np.stack((offset, kept[1:] - start)) @ step / length**2
    same_line = parallel & (np.abs(_cross(step, offset)) <= _TOLERANCE * length)
    overlap = same_line & (ends.min(0) <= 1) & (ends.max(0) >= 0)
    share = np.where(meets, share, np.where(overlap, ends.min(0).clip(0, 1), np.inf))
    first = int(share.argmin())
    return (float(share[first]), first) if np.isfinite(share[first]) else None


def _retrace(kept: list[np.ndarray], end: np.ndarray) -> bool:
    """Remove from ``kept`` the part of its last segment that a move to ``end`` goes back over.

    Returns:
        whether the move ends within that segment.
    """
    back, step = kept[-2] - kept[-1], end - kept[-1]
    if abs(_cross(back, step)) > _TOLERANCE * np.hypot(*back) * np.hypot(*step) or back @ step <= 0:
        return False
    if step @ step < back @ back:
        kept[-1] = end
        return True
    kept.pop()
    return False


def erase_loops(path: np.ndarray) -> np.ndarray:
    """The path without its loops: where it meets an earlier point of its own, everything in between is cut out.

    A way back over the same line is removed too, and so is a repeated point.

    Args:
        path: ``[T, 2]``.

    Returns:
        A path ``[S, 2]`` that does not cross itself, from the first point to the last.
    """
    path = np.asarray(path, dtype=np.float64)
    kept = [path[0]]  # the path so far, free of loops
    for end in path[1:]:
        while not np.array_equal(kept[-1], end):
            if len(kept) > 1:
                before = len(kept)
                if _retrace(kept, end):
                    break
                if len(kept) < before:
                    continue
            contact = _first_contact(kept[-1], end, np.array(kept[:-1]))
            if contact is None:
                kept.append(end)
                break
            share, edge = contact
            point = kept[-1] + share * (end - kept[-1])
            del kept[edge + 1 :]
            if not np.allclose(point, kept[-1], rtol=0, atol=_TOLERANCE):
                kept.append(point)
    return np.stack(kept)


def _ray_axes(centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors across and along the rays, which point up or, where two would lie on one line, a little left."""
    angles = np.linspace(0, np.pi / 4, 65)
    across = np.stack((np.cos(angles), np.sin(angles)))
    gaps = np.diff(np.sort(centres @ across, axis=0), axis=0).min(0, initial=np.inf)
    best = int((gaps > 1e-3).argmax()) if (gaps > 1e-3).any() else int(gaps.argmax())
    if gaps[best] < 1e-9:
        raise ValueError("h_signature: no two obstacles may share a centre.")
    return across[:, best], np.array([-np.sin(angles[best]), np.cos(angles[best])])


def h_signature(path: np.ndarray, obstacles: np.ndarray) -> tuple[int, ...]:
    """Reduced h-signature of a path: which rays from the obstacles it crosses, in order (Bhattacharya et al., 2012).

    A ray runs upwards (+y) from the centre of each obstacle. A path that crosses the ray of obstacle ``m`` from left to
    right adds ``m + 1`` to its word, from right to left ``-(m + 1)``. Two neighbours of opposite sign cancel. Where two
    centres have the same x, all rays are tilted to the left by the same small angle, so that no two lie on one line.

    Two paths with the same end points that avoid the obstacles can be deformed into each other if and only if their
    words are equal. If paths end anywhere in a target and a ray may pass through it, append the target's centre first.

    Args:
        path: ``[T, 2]``.
        obstacles: ``[M, 3]`` or ``[M, 2]``, centres first.

    Returns:
        The word; ``()`` for a path below all obstacles.

    Raises:
        ValueError: if two obstacles share a centre.
    """
    path = np.asarray(path, dtype=np.float64)
    if not len(obstacles):
        return ()
    centres = np.asarray(obstacles, dtype=np.float64)[:, :2]
    across, along = _ray_axes(centres)
    u, v = path @ across, path @ along  # [T] each
    ray_u, ray_v = centres @ across, centres @ along  # [M] each
    right = u[:, None] >= ray_u  # [T, M]
    # one entry for each crossing of a line through a ray, [crossings]
    step, obstacle = np.nonzero(right[1:] != right[:-1])
    share = (ray_u[obstacle] - u[step]) / (u[step + 1] - u[step])
    above = v[step] + share * (v[step + 1] - v[step]) > ray_v[obstacle]
    order = np.lexsort((share, step))  # by step, then along the step
    word: list[int] = []
    for index in order[above[order]]:
        letter = int(obstacle[index] + 1) * (1 if right[step[index] + 1, obstacle[index]] else -1)
        if word and word[-1] == -letter:
            word.pop()
        else:
            word.append(letter)
    return tuple(word)


def routes(signatures: Sequence[Route], min_share: float = 0.05) -> dict[Route, float]:
    """Routes that at least ``min_share`` of the episodes took, with their share of all episodes, the largest first."""
    counts = Counter(signatures)
    shares = {signature: count / len(signatures) for signature, count in counts.most_common()}
    return {signature: share for signature, share in shares.items() if share >= min_share}


def effective_routes(
    signatures: Sequence[Hashable], starts: Sequence[Hashable] | None = None, *, min_share: float = 0.05
) -> float:
    """Number of routes in use: ``exp`` of the entropy of the shares of :func:`routes`, renormalised.

    With several starts it is ``exp`` of the conditional entropy ``H(route | start)``, in which a start weighs as many
    as its episodes: two starts with one route each give 1, not 2.

    Args:
        signatures: one per episode, or any other name of what it did. Give those of successful episodes to count
            routes that lead to the target.
        starts: one label per episode.
        min_share: smallest share of a start's episodes that a route must have to count. A start without such a route
            is left out.

    Returns:
        At least 1, or 0 where no route counts.

    Raises:
        ValueError: if there is not one start per episode.
    """
    if starts is None:
        starts = [None] * len(signatures)
    if len(starts) != len(signatures):
        raise ValueError(f"effective_routes: got {len(starts)} starts for {len(signatures)} episodes.")
    entropies, episodes = [], []
    for start in dict.fromkeys(starts):
        here = [signature for signature, label in zip(signatures, starts, strict=True) if label == start]
        shares = np.array(list(routes(here, min_share).values()))
        if len(shares):
            shares /= shares.sum()
            entropies.append(-(shares * np.log(shares)).sum())
            episodes.append(len(here))
    return float(np.exp(np.average(entropies, weights=episodes))) if entropies else 0.0
