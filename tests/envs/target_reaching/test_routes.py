"""Routes: loops, h-signatures against winding angles and deformations, effective number of routes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from envs.target_reaching.reference import EVERY_ROUTE, ROUTES, steer

from torchrl_pmoe.envs import TargetReachingEnv
from torchrl_pmoe.envs.target_reaching.routes import effective_routes, erase_loops, h_signature, routes
from torchrl_pmoe.envs.target_reaching.task import LAYOUTS

START, END = (-0.9, -0.9), (0.9, -0.9)
SCATTERED = np.array([(-0.3, 0.1, 0.1), (0.2, 0.4, 0.1), (0.25, -0.3, 0.1)])
COLUMN = np.array([(0.0, -0.4, 0.1), (0.0, 0.0, 0.1), (0.0, 0.4, 0.1)])


def random_path(rng: np.random.Generator, points: int = 12) -> np.ndarray:
    return np.array([START, *rng.uniform(-0.8, 0.8, (points, 2)), END])


def winding(loop: np.ndarray, centre: np.ndarray) -> int:
    """Turns of a closed polyline around a point, counter-clockwise, by adding up angles."""
    offset = loop - centre
    angle = np.arctan2(offset[:, 1], offset[:, 0])
    turns = (np.diff(angle, append=angle[0]) + np.pi) % (2 * np.pi) - np.pi
    return round(turns.sum() / (2 * np.pi))


def contains(triangle: np.ndarray, point: np.ndarray) -> bool:
    return winding(triangle, point) != 0


# ---------------------------------------------------------------------- h-signature


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ([(-1, -1), (1, -1)], ()),
        ([(-1, 1), (1, 1)], (1, 2)),
        ([(1, 1), (-1, 1)], (-2, -1)),
        ([(-1, 1), (1, 1), (1, 0.9), (-1, 0.9)], ()),
        ([(-1, 1), (0, 1), (0, -1), (1, -1)], (1,)),
        ([(-1, -1), (0, -1), (0, 1), (1, 1)], (2,)),
        # above 1, 2, back below both, and around once more
        ([(-1, 1), (1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1)], (1, 2, 1, 2)),
        # the commutator: both winding numbers are 0, and yet it cannot be pulled straight
        (
            [
                *[(-1, -1), (-1, 1), (0, 1), (0, -1), (0.1, -1), (0.1, 0.9), (1, 0.9), (1, -0.9)],
                *[(-0.9, -0.9), (-0.9, -1.1), (0.05, -1.1), (0.05, 1.2), (-1, 1.2), (-1.1, -1.3)],
                *[(1.1, -1.3), (1.1, 0.7), (0.3, 0.7), (0.3, -1.2), (1, -1.2)],
            ],
            (1, 2, -1, -2),
        ),
        ([(-0.6, 1), (-0.5, 1), (-0.5, 0.9), (-0.4, 1)], (1,)),
        ([(-1, 1), (-0.5, 1), (-1, 1)], ()),
        ([(-1, 1), (-0.5, 1), (1, -1)], (1,)),
    ],
)
def test_known_words(path, word):
    assert h_signature(np.array(path), np.array([(-0.5, 0.0, 0.2), (0.5, 0.0, 0.2)])) == word


def test_without_obstacles_there_is_one_route():
    assert h_signature(np.array([START, END]), np.zeros((0, 3))) == ()


@pytest.mark.parametrize("obstacles", [SCATTERED, COLUMN], ids=["scattered", "column"])
def test_letters_add_up_to_the_winding_numbers(obstacles):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        path = random_path(rng)
        word = h_signature(path, obstacles)
        for index, (x, y, _) in enumerate(obstacles, 1):
            assert word.count(index) - word.count(-index) == -winding(path, np.array([x, y]))
        assert all(a != -b for a, b in pairwise(word))
        seen.add(word)
    assert len(seen) > 50


@pytest.mark.parametrize("obstacles", [SCATTERED, COLUMN], ids=["scattered", "column"])
def test_the_word_changes_when_and_only_when_the_path_is_pulled_over_an_obstacle(obstacles):
    rng = np.random.default_rng(1)
    kept = changed = 0
    path = random_path(rng)
    while kept < 500 or changed < 200:
        vertex = rng.integers(1, len(path) - 1)
        moved = path.copy()
        moved[vertex] = (moved[vertex] + rng.normal(scale=0.3, size=2)).clip(-0.9, 0.9)
        sides = [np.array([path[vertex], moved[vertex], path[vertex + side]]) for side in (-1, 1)]
        swept = [(m, side) for m in range(len(obstacles)) for side in (0, 1) if contains(sides[side], obstacles[m, :2])]
        same = h_signature(path, obstacles) == h_signature(moved, obstacles)
        if not swept:
            assert same
            kept += 1
        elif len(swept) == 1:
            assert not same
            changed += 1
        path = moved


def test_a_column_tells_its_gaps_apart_whatever_their_order():
    heights = [-0.7, -0.2, 0.2, 0.7]
    words = [h_signature(np.array([(-0.8, 0), (-0.1, y), (0.1, y), (0.8, 0)]), COLUMN) for y in heights]
    assert words == [(), (1,), (1, 2), (1, 2, 3)]
    words = [h_signature(np.array([(-0.8, 0), (-0.1, y), (0.1, y), (0.8, 0)]), COLUMN[::-1]) for y in heights]
    assert words == [(), (3,), (3, 2), (3, 2, 1)]


def test_circling_in_a_column_is_not_going_straight():
    circle = np.array([(-0.8, 0), (0, 0.2), (0.2, 0.0), (0, -0.2), (-0.2, 0.0), (0, 0.2), (0.8, 0)])
    assert h_signature(circle, COLUMN) == (1, 2, 2)


def test_two_obstacles_on_one_spot_are_refused():
    with pytest.raises(ValueError, match="share a centre"):
        h_signature(np.array([START, END]), SCATTERED[[0, 0]])


@pytest.mark.parametrize(("layout", "word"), EVERY_ROUTE)
def test_driven_routes_have_words_of_their_own_wherever_they_end_in_the_target(layout, word):
    env = TargetReachingEnv(layout)
    env.reset()
    rng = np.random.default_rng(2)
    for _ in range(5):
        path, goals = [np.array([-0.8, 0.0])], [*ROUTES[layout][word], 0.08 * rng.uniform(-1, 1, 2) + (0.8, 0)]
        env.reset()
        for goal in map(np.array, goals):
            while not np.allclose(env.position, goal):
                env.step(steer(env.position, goal))
                path.append(env.position)
        assert h_signature(np.array(path), env.task.obstacles) == word
        assert h_signature(erase_loops(np.array(path)), env.task.obstacles) == word


def test_every_layout_is_covered():
    assert {layout: len(words) for layout, words in ROUTES.items()} == {"one": 2, "two": 4, "three": 4}
    assert {*ROUTES, "deceptive", "paper"} == set(LAYOUTS)


# ---------------------------------------------------------------------- loops


def crosses_itself(path: np.ndarray) -> bool:
    """Whether two segments that are no neighbours share a point, pair by pair by orientation."""

    def turn(a, b, c) -> float:
        return np.sign((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))

    segments = list(pairwise(path))
    return any(
        turn(a, b, c) != turn(a, b, d) and turn(c, d, a) != turn(c, d, b)
        for i, (a, b) in enumerate(segments)
        for c, d in segments[i + 2 :]
    )


def distance_to(path: np.ndarray, point: np.ndarray) -> float:
    start, step = path[:-1], np.diff(path, axis=0)
    share = (((point - start) * step).sum(1) / (step**2).sum(1)).clip(0, 1)
    return np.hypot(*(start + share[:, None] * step - point).T).min()


def test_random_paths_lose_all_their_crossings_and_stay_on_their_way():
    rng = np.random.default_rng(3)
    crossed = 0
    for points in (4, 8, 12, 30) * 25:
        path = random_path(rng, points)
        crossed += crosses_itself(path)
        erased = erase_loops(path)
        assert not crosses_itself(erased)
        np.testing.assert_array_equal(erased[[0, -1]], path[[0, -1]])
        middles = (erased[1:] + erased[:-1]) / 2
        assert max(distance_to(path, point) for point in (*erased, *middles)) < 1e-9
        np.testing.assert_array_equal(erase_loops(erased), erased)
    assert crossed > 80


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ([(0, 0), (1, 0), (2, 1)], [(0, 0), (1, 0), (2, 1)]),
        ([(0, 0)], [(0, 0)]),
        ([(0, 0), (0, 0), (1, 0), (1, 0)], [(0, 0), (1, 0)]),
        ([(0, 0), (2, 0), (2, 1), (1, 1), (1, -1)], [(0, 0), (1, 0), (1, -1)]),
        ([(0, 0), (2, 0), (1, 0), (1, 1)], [(0, 0), (1, 0), (1, 1)]),
        ([(0, 0), (1, 0), (2, 0), (0.5, 0), (0.5, 1)], [(0, 0), (0.5, 0), (0.5, 1)]),
        ([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (-1, 0)], [(0, 0), (-1, 0)]),
        # it ends on its own way, or runs along it
        ([(0, 0), (2, 0), (1, 0)], [(0, 0), (1, 0)]),
        ([(0, 0), (1, 0), (1, 1), (-1, 1), (-1, 0), (0.5, 0)], [(0, 0), (0.5, 0)]),
        ([(0, 0), (2, 0), (2, 1), (1, 1), (1, 0)], [(0, 0), (1, 0)]),
        ([(0, 0), (2, 0), (2, 1), (3, 1), (3, 0), (1, 0), (1, -1)], [(0, 0), (1, 0), (1, -1)]),
        # two loops on one move: the older one swallows the younger
        ([(0, 0), (3, 0), (3, 2), (0, 2), (0, 1), (4, 1)], [(0, 0), (3, 0), (3, 1), (4, 1)]),
    ],
)
def test_known_loops(path, expected):
    np.testing.assert_allclose(erase_loops(np.array(path, dtype=float)), expected, atol=1e-12)


def test_a_detour_around_an_obstacle_is_no_route_of_its_own():
    turns = np.linspace(-np.pi / 2, 3 * np.pi / 2 + 0.2, 40)
    x, y, _ = SCATTERED[0]
    circle = np.stack((x + 0.2 * np.cos(turns), y + 0.2 * np.sin(turns)), -1)
    path = np.concatenate(([START], circle, [END]))
    assert h_signature(path, SCATTERED) == (-1,)
    assert h_signature(erase_loops(path), SCATTERED) == ()


# ---------------------------------------------------------------------- how many routes


WORDS = [()] * 60 + [(1,)] * 30 + [(1, 2)] * 6 + [(2,)] * 4


def test_routes_lists_what_enough_episodes_took_the_largest_first():
    assert routes(WORDS) == {(): 0.6, (1,): 0.3, (1, 2): 0.06}
    assert list(routes(WORDS[::-1])) == [(), (1,), (1, 2)]
    assert routes(WORDS, min_share=0.3) == {(): 0.6, (1,): 0.3}
    assert routes(WORDS, min_share=0.0)[(2,)] == 0.04
    assert routes([]) == {}


def test_effective_routes_is_the_exponential_of_the_entropy():
    assert effective_routes(WORDS) == pytest.approx(np.exp(scipy.stats.entropy([60, 30, 6])))
    assert effective_routes(WORDS, min_share=0.0) == pytest.approx(np.exp(scipy.stats.entropy([60, 30, 6, 4])))
    assert effective_routes([(), (1,)] * 10) == pytest.approx(2)
    assert effective_routes([(1,)] * 10) == 1
    assert effective_routes([]) == 0


def test_several_starts_count_the_routes_from_each():
    words = [()] * 50 + [(1,)] * 50
    starts = ["low"] * 50 + ["high"] * 50
    assert effective_routes(words) == pytest.approx(2)
    assert effective_routes(words, starts) == pytest.approx(1)
    # three quarters of the episodes start where two routes are used evenly
    words, starts = [(), (1,)] * 30 + [(2,)] * 20, [0] * 60 + [1] * 20
    assert effective_routes(words, starts) == pytest.approx(2**0.75)


def test_starts_whose_routes_are_all_rare_are_left_out():
    words, starts = [(m,) for m in range(30)] + [(), (1,)] * 5, [0] * 30 + [1] * 10
    assert effective_routes(words, starts) == pytest.approx(2)
    assert effective_routes(words[:30]) == 0


def test_every_episode_needs_a_start():
    with pytest.raises(ValueError, match="got 1 starts for 2 episodes"):
        effective_routes([(), ()], [0])
