"""Which way round the obstacles a path went, and how many ways a policy knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

__all__ = ["effective_routes", "erase_loops", "h_signature", "routes"]

_TOLERANCE = 1e-10


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _first_contact(start: np.ndarray, end: np.ndarray, kept: np.ndarray) -> tuple[float, int] | None:
    """Where the segment from ``start`` first meets the polyline ``kept`` ``[N, 2]``: share of the way, and segment."""
    if len(kept) < 2:
        return None
    step, offset, edges = end - start, kept[:-1] - start, np.diff(kept, axis=0)
    area = _cross(step, edges)
    length = np.hypot(*step)
    parallel = np.abs(area) <= _TOLERANCE * length * np.hypot(*edges.T)
    divisor = np.where(parallel, 1.0, area)
    share, along = _cross(offset, edges) / divisor, _cross(offset, step) / divisor
    meets = ~parallel & (share >= 0) & (share <= 1) & (along >= 0) & (along <= 1)
    # segments of one line: the nearer end of the older one, if it lies on the way
    ends = np.stack((offset, kept[1:] - start)) @ step / length**2
    same_line = parallel & (np.abs(_cross(step, offset)) <= _TOLERANCE * length)
    overlap = same_line & (ends.min(0) <= 1) & (ends.max(0) >= 0)
    share = np.where(meets, share, np.where(overlap, ends.min(0).clip(0, 1), np.inf))
    first = int(share.argmin())
    return (float(share[first]), first) if np.isfinite(share[first]) else None


def _retrace(kept: list[np.ndarray], end: np.ndarray) -> bool:
    """Undo the part of the last segment that a move to ``end`` goes back over; whether the move ends within it."""
    back, step = kept[-2] - kept[-1], end - kept[-1]
    if abs(_cross(back, step)) > _TOLERANCE * np.hypot(*back) * np.hypot(*step) or back @ step <= 0:
        return False
    if step @ step < back @ back:
        kept[-1] = end
        return True
    kept.pop()
    return False


def erase_loops(path: np.ndarray) -> np.ndarray:
    """The path without its loops: whenever it meets an earlier point of its own, all in between is cut out.

    Ways back over the same line are undone, and points that repeat are dropped.

    Args:
        path: ``[T, 2]``.

    Returns:
        A path ``[S, 2]`` from the first to the last point that does not cross itself.
    """
    path = np.asarray(path, dtype=np.float64)
    kept = [path[0]]
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
    """Unit vectors across and along the rays: straight up, or the smallest tilt to the left that tells them apart."""
    angles = np.linspace(0, np.pi / 4, 65)
    across = np.stack((np.cos(angles), np.sin(angles)))
    gaps = np.diff(np.sort(centres @ across, axis=0), axis=0).min(0, initial=np.inf)
    best = int((gaps > 1e-3).argmax()) if (gaps > 1e-3).any() else int(gaps.argmax())
    if gaps[best] < 1e-9:
        raise ValueError("h_signature: no two obstacles may share a centre.")
    return across[:, best], np.array([-np.sin(angles[best]), np.cos(angles[best])])


def h_signature(path: np.ndarray, obstacles: np.ndarray) -> tuple[int, ...]:
    """Reduced h-signature of a path: which rays from the obstacles it crosses, in order (Bhattacharya et al., 2012).

    A ray runs upwards (+y) from the centre of each obstacle. Crossing that of obstacle ``m`` from left to right writes
    ``m + 1``, from right to left ``-(m + 1)``, and neighbours that undo each other are struck out. Where two centres
    share their x all rays are tilted to the left by the same small angle, so that no two lie on one line.

    Two paths with the same end points that avoid the obstacles can be deformed into each other if and only if their
    words are equal. For paths that end anywhere in a target, append its centre first if a ray may pass through it.

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
    u, v = path @ across, path @ along
    ray_u, ray_v = centres @ across, centres @ along
    right = u[:, None] >= ray_u
    step, obstacle = np.nonzero(right[1:] != right[:-1])
    share = (ray_u[obstacle] - u[step]) / (u[step + 1] - u[step])
    above = v[step] + share * (v[step + 1] - v[step]) > ray_v[obstacle]
    order = np.lexsort((share, step))
    word: list[int] = []
    for index in order[above[order]]:
        letter = int(obstacle[index] + 1) * (1 if right[step[index] + 1, obstacle[index]] else -1)
        if word and word[-1] == -letter:
            word.pop()
        else:
            word.append(letter)
    return tuple(word)


def routes(signatures: Sequence[tuple[int, ...]], min_share: float = 0.05) -> dict[tuple[int, ...], float]:
    """Routes that at least ``min_share`` of the episodes took, with their share of all episodes, the largest first."""
    counts = Counter(signatures)
    shares = {signature: count / len(signatures) for signature, count in counts.most_common()}
    return {signature: share for signature, share in shares.items() if share >= min_share}


def effective_routes(
    signatures: Sequence[tuple[int, ...]], starts: Sequence[Hashable] | None = None, *, min_share: float = 0.05
) -> float:
    """Number of routes in use: ``exp`` of the entropy over those of :func:`routes`, their shares renormalised.

    With several starts it is ``exp`` of the conditional entropy ``H(route | start)``: each start has its own routes,
    and counts with its episodes, so that two starts with one route each make 1, not 2.

    Args:
        signatures: one per episode; give those of the successful ones to count routes that lead to the target.
        starts: one label per episode.
        min_share: routes of fewer of a start's episodes do not count; a start where all are that rare is left out.

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
