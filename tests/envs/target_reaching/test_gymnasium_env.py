"""The target-reaching task: geometry, reward, starts, pictures, and the Gymnasium environment."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from envs.target_reaching.reference import EVERY_ROUTE, ROUTES, STEPPED, clearance, hostile_actions, steer
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from torchrl.envs import GymEnv, GymWrapper, check_env_specs

from torchrl_pmoe.envs import TargetReachingEnv, TargetReachingTask
from torchrl_pmoe.envs.target_reaching.gymnasium_env import ENV_ID, register
from torchrl_pmoe.envs.target_reaching.task import BLOCKS, LAYOUTS, MARGIN, START_REGION, travel


def started(**kwargs) -> TargetReachingEnv:
    env = TargetReachingEnv(**kwargs)
    env.reset(seed=0)
    return env


def random_plane(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Obstacles that overlap here and there, and agents outside them."""
    obstacles = np.concatenate((rng.uniform(-1, 1, (5, 2)), rng.uniform(0.05, 0.3, (5, 1))), -1)
    agents = rng.uniform(-1, 1, (400, 2))
    return obstacles, agents[(clearance(agents, agents, obstacles) > MARGIN).all(1)]


# ---------------------------------------------------------------------- movement


@pytest.mark.parametrize("max_step", [0.1, 1.0])
def test_a_step_ends_where_dense_samples_of_it_first_meet_an_obstacle(max_step):
    rng = np.random.default_rng(0)
    samples = np.linspace(0, 1, 4001)
    compared = 0
    for _ in range(4):
        obstacles, agents = random_plane(rng)
        actions = rng.uniform(-1.5, 1.5, agents.shape)
        ends, collided = travel(agents, actions, obstacles, max_step)
        for start, action, end, stopped in zip(agents, actions, ends, collided, strict=True):
            goal = (start + max_step * action.clip(-1, 1)).clip(-1, 1)
            points = start + samples[:, None] * (goal - start)
            gap = (np.hypot(*(points[:, None] - obstacles[:, :2]).T).T - obstacles[:, 2] - MARGIN).min(1)
            if abs(gap.min()) < MARGIN:  # it grazes: either way is right
                continue
            hits = np.flatnonzero(gap < 0)
            assert stopped == bool(len(hits))
            expected = points[hits[0]] if len(hits) else goal
            np.testing.assert_allclose(end, expected, atol=1e-9 if not len(hits) else 2 * max_step / 4000)
            compared += stopped
    assert compared > 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_step", [0.1, 0.9])
def test_no_path_ever_enters_an_obstacle(dtype, max_step):
    rng = np.random.default_rng(1)
    obstacles, agents = random_plane(rng)
    rows, position = torch.tensor(obstacles, dtype=dtype), torch.tensor(agents, dtype=dtype)
    stops = 0
    for _ in range(500):
        action = torch.tensor(hostile_actions(position.double().numpy(), obstacles, rng), dtype=dtype)
        new, collided = travel(position, action, rows, max_step)
        assert clearance(position.numpy(), new.numpy(), obstacles).min() > 0.2 * MARGIN
        assert new.abs().max() <= 1
        position = new
        stops += int(collided.sum())
    assert stops > 1000


@pytest.mark.parametrize("angle", np.linspace(0, 2 * np.pi, 17))
def test_an_agent_in_contact_cannot_go_on_but_slides_and_leaves(angle):
    outwards = np.array([np.cos(angle), np.sin(angle)])
    sideways = np.array([-outwards[1], outwards[0]])
    env = started(starts=[0.4 * outwards], target=(0.9, 0.9, 0.05))
    *_, info = env.step(-outwards)
    contact = env.position
    assert info["collided"]
    np.testing.assert_allclose(contact, (0.35 + MARGIN) * outwards, atol=1e-12)
    *_, info = env.step(-outwards)
    assert info["collided"]
    np.testing.assert_allclose(env.position, contact, atol=1e-12)
    within = (0.35 + 0.7 * MARGIN) * outwards  # where sliding may lead
    env.position = within
    *_, info = env.step(-outwards)
    assert info["collided"]
    np.testing.assert_allclose(env.position, within, atol=1e-12)
    for away in (sideways, -sideways, outwards, outwards + sideways):
        env.position = contact
        *_, info = env.step(0.5 * away)
        assert not info["collided"]
        np.testing.assert_allclose(env.position, contact + 0.05 * away, atol=1e-12)


def test_the_plane_has_walls():
    env = started(starts=[(-0.95, 0.93)])
    env.step(np.array([-1.0, 1.0]))
    np.testing.assert_array_equal(env.position, [-1.0, 1.0])


@pytest.mark.parametrize("layout", STEPPED)
def test_mirrored_actions_make_the_mirrored_path(layout):
    above, below = started(layout=layout), started(layout=layout)
    mirror, stops = np.array([1, -1]), 0
    rng = np.random.default_rng(2)
    for step in range(400):
        if step % 40 == 0:
            above.reset()
            below.reset()
        action = rng.uniform(-0.7, 1, 2)
        _, reward, *_, info = above.step(action)
        assert below.step(action * mirror)[1] == reward
        np.testing.assert_array_equal(above.position, below.position * mirror)
        stops += info["collided"]
    assert stops


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_its_own_mirror_image(layout):
    def mirrored(rows):
        return sorted((y, x, *rest) if layout == "paper" else (x, -y, *rest) for x, y, *rest in rows)

    for rows in LAYOUTS[layout].values():
        assert sorted(rows) == mirrored(rows)
    sides = {"upper": "lower", "upper_middle": "lower_middle"}
    for upper, lower in sides.items():
        assert sorted(BLOCKS[layout].get(lower, [])) == mirrored(BLOCKS[layout].get(upper, []))


@pytest.mark.parametrize(("layout", "word"), EVERY_ROUTE)
def test_every_route_of_a_layout_can_be_driven(layout, word):
    env = gymnasium.make(ENV_ID, layout=layout)
    env.reset(seed=0)
    reached, total, goals = False, 0.0, [*map(np.array, ROUTES[layout][word]), np.array([0.8, 0.0])]
    while not reached:
        here = env.unwrapped.position
        if np.allclose(here, goals[0]):
            goals.pop(0)
        _, reward, reached, truncated, info = env.step(steer(here, goals[0]))
        assert not info["collided"]
        assert not truncated
        total += reward
    assert info["is_success"]
    assert info["outcome"] == ("above " + " ".join(map(str, word)) if word else "below all")
    assert -2 < total < 1


# ---------------------------------------------------------------------- reward and end of an episode


def test_the_dense_reward_is_the_sum_of_its_terms():
    options = {"distance_cost": 0.3, "collision_cost": 0.7, "success_reward": 5.0}
    env = started(starts=[(-0.4, 0.0)], **options)
    _, reward, terminated, *_ = env.step(np.array([1.0, 0.0]))
    assert reward == pytest.approx(-0.3 * (0.8 + 0.35 + MARGIN) - 0.7)
    assert not terminated
    env.position = [0.65, 0.0]
    _, reward, terminated, truncated, info = env.step(np.array([0.5, 0.0]))
    assert reward == pytest.approx(-0.3 * 0.1 + 5.0)
    assert terminated
    assert not truncated
    assert info == {"is_success": True, "collided": False, "outcome": "below all"}


def test_the_default_rewards():
    env = started()
    assert env.step(np.array([1.0, 0.0]))[1] == pytest.approx(-0.15)
    env = started(reward="sparse")
    assert env.step(np.array([1.0, 0.0]))[1] == 0.0
    env.position = [-0.36, 0.0]
    assert env.step(np.array([1.0, 0.0]))[1] == 0.0
    env.position = [0.65, 0.0]
    assert env.step(np.array([0.5, 0.0]))[1] == 1.0


def test_in_the_authors_arena_a_push_counts_one_and_a_half_times_in_the_step_in_which_it_is_given():
    env = started(layout="paper")
    observation, reward, *_ = env.step(np.array([1.0, -0.5]))
    # velocity 0.1, -0.05; moved by 0.1 * (0.1 + 0.05) in their units of 1 / 5
    np.testing.assert_allclose(observation, [-0.897, -0.9015, 1.497, 1.5015, 0.1, -0.05], rtol=1e-6)
    assert reward == pytest.approx(0.1 * np.hypot(0.1, 0.05))
    for _ in range(20):
        observation, reward, *_ = env.step(np.array([5.0, 0.0]))
    np.testing.assert_allclose(observation[4:], [1.0, -0.05], rtol=1e-6)
    np.testing.assert_allclose(env.step(np.array([1.0, 0.0]))[0][:2] - observation[:2], [0.02, -0.001], atol=1e-6)


@pytest.mark.parametrize(
    ("position", "velocity", "expected", "info"),
    [
        ([0.49, 0.6], [1.0, 0.0], 100.0, {"is_success": True, "collided": False, "outcome": "below all"}),
        ([-0.63, -0.5], [1.0, 0.0], -100.0, {"is_success": False, "collided": True, "outcome": None}),
        ([-0.985, 0.5], [-1.0, 0.0], -10.0, {"is_success": False, "collided": True, "outcome": None}),
        ([-0.985, 0.5], [0.0, 0.6], 0.06, {"is_success": False, "collided": False}),
    ],
    ids=["target", "obstacle", "wall", "free"],
)
def test_rewards_and_ends_of_the_authors_arena(position, velocity, expected, info):
    env = started(layout="paper")
    env.state = [*position, *velocity]
    _, reward, terminated, _, found = env.step(np.zeros(2))
    assert reward == pytest.approx(expected)
    assert terminated == ("outcome" in info)
    assert found == info


def test_the_bait_ends_an_episode_with_its_own_reward_and_without_success():
    env = started(layout="deceptive", bait_reward=0.3)
    steps = [env.step(np.array([-1.0, 0.0])) for _ in range(2)]
    assert [(reward, terminated) for _, reward, terminated, _, _ in steps] == [(0.0, False), (0.3, True)]
    info = steps[-1][-1]
    assert info == {"is_success": False, "collided": False, "outcome": "bait"}
    env.position = [0.45, 0.25]
    _, reward, terminated, _, info = env.step(np.array([0.5, -1.0]))
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)


def test_only_the_end_of_a_step_counts_as_reaching():
    env = started(obstacles=[], max_step=2.0, starts=[(0.4, 0.0)])
    *_, terminated, _, info = env.step(np.array([0.3, 0.0]))
    assert env.position[0] == 1.0
    assert not terminated
    assert not info["is_success"]


def test_the_observation_is_position_and_way_to_the_target():
    env = TargetReachingEnv(target=(0.7, 0.5, 0.1))
    observation, info = env.reset()
    np.testing.assert_allclose(observation, [-0.8, 0.0, 1.5, 0.5], rtol=1e-6)
    assert observation.dtype == np.float32
    assert info == {"is_success": False, "collided": False}
    np.testing.assert_allclose(env.step(np.array([1.0, 0.5]))[0], [-0.7, 0.05, 1.4, 0.45], rtol=1e-5)


def test_the_registered_environment_truncates_and_the_class_does_not():
    registered, bare = gymnasium.make(ENV_ID), started()
    registered.reset()
    ends = [(registered.step(np.zeros(2, np.float32))[3], bare.step(np.zeros(2))[3]) for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(True, False)]


# ---------------------------------------------------------------------- starts and seeds


STARTS = [(-0.8, -0.5), (-0.8, 0.0), (-0.8, 0.5)]


def test_one_of_several_starts_is_drawn_or_picked():
    env = TargetReachingEnv(starts=STARTS)
    env.reset(seed=0)
    assert {tuple(env.reset()[0][:2].round(3).tolist()) for _ in range(50)} == set(
        map(tuple, np.round(np.float32(STARTS), 3).tolist())
    )
    for index, start in enumerate(STARTS):
        np.testing.assert_array_equal(env.reset(options={"start": index})[0][:2], np.float32(start))


@pytest.mark.parametrize("index", [3, -1, 0.5, True, "first"])
def test_a_start_that_there_is_not_is_refused(index):
    with pytest.raises(ValueError, match="start must be an index below 3"):
        TargetReachingEnv(starts=STARTS).reset(options={"start": index})


@pytest.mark.parametrize("options", [{"starts": STARTS}, {"start": "random"}])
def test_the_seed_fixes_the_starts(options):
    env = TargetReachingEnv(**options)

    def draws(seed: int) -> list[tuple]:
        return [tuple(env.reset(seed=seed)[0]), *(tuple(env.reset()[0]) for _ in range(10))]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_random_starts_are_uniform_over_the_free_part_of_their_region():
    disc = (-0.8, 0.5, 0.15)
    task = TargetReachingTask(obstacles=[disc], starts=[(-0.8, -0.5)], start="random")
    starts = task.place(np.random.default_rng(0).random((20_000, 32, 2)))
    low, high = np.array(START_REGION)
    assert ((starts >= low) & (starts <= high)).all()
    assert np.hypot(*(starts - disc[:2]).T).min() > 0.15
    free = np.prod(high - low) - np.pi * 0.15**2
    for box, area in (((-1, -1, -0.8, 0), 0.2), ((-0.8, -1, -0.6, 0), 0.2), ((-1, 0.7, -0.6, 1), 0.12)):
        share = ((starts >= box[:2]) & (starts <= box[2:])).all(1).mean()
        assert share == pytest.approx(area / free, abs=4 * np.sqrt(0.25 / len(starts)))


def test_where_no_candidate_is_free_a_fixed_start_stands_in():
    task = TargetReachingTask(obstacles=[(-0.8, 0.5, 0.15)], starts=[(-0.8, -0.5)], start="random")
    np.testing.assert_array_equal(task.place(np.full((3, 32, 2), [0.5, 0.75])), [(-0.8, -0.5)] * 3)


def test_the_position_may_be_set_to_free_points_only():
    env = started()
    env.position = [0.5, 0.5]
    np.testing.assert_array_equal(env.position, [0.5, 0.5])
    for wrong in ([0.0, 0.1], [1.1, 0.0], [0.5], [np.nan, 0.0]):
        with pytest.raises(ValueError, match="must be a free point"):
            env.position = wrong


def test_the_velocity_may_be_set_within_its_bounds_only():
    env = started(layout="paper")
    env.state = [0.5, -0.5, 1.0, -1.0]
    for velocity in ([1.1, 0.0], [0.0, np.nan]):
        with pytest.raises(ValueError, match=r"velocity must lie in \[-1, 1\]\^2"):
            env.state = [0.5, -0.5, *velocity]
    for wrong in (0.5, [[0.5, 0.5]], [0.5, 0.5, 0.0, 0.0]):
        with pytest.raises(ValueError, match="position must be a free point"):
            env.position = wrong


def test_of_obstacles_around_one_centre_one_tells_routes():
    env = started(obstacles=[(0.0, 0.5, 0.2), (0.0, 0.5, 0.3), (0.0, -0.5, 0.2)])
    env.position = [0.6, 0.0]
    assert env.step(np.array([1.0, 0.0]))[-1]["outcome"] == "below all"
    for x, y in [(-0.4, 0.0), (-0.1, 0.0), (0.1, 0.0), (0.7, 0.0)]:
        env._trail.append(np.array([x, y]))
    assert env.task.outcome(np.stack(env._trail[-4:])) == "above 2"


# ---------------------------------------------------------------------- errors


MISTAKES = {
    "layout": ({"layout": "four"}, "layout='four' is unknown; allowed: one, two, three, paper, deceptive"),
    "layout type": ({"layout": [1]}, "is unknown; allowed: one, two, three"),
    "passage": ({"blocked": "upper_middle"}, "blocked='upper_middle' is unknown; allowed: upper, lower"),
    "reward of another layout": ({"reward": "paper"}, "reward='paper' is unknown; allowed: dense, sparse"),
    "bait": ({"layout": "deceptive", "bait_reward": None}, "bait_reward must be a finite number, got None"),
    "start": ({"start": "anywhere"}, "start='anywhere' is unknown; allowed: fixed, random"),
    "reward": ({"reward": "shaped"}, "reward='shaped' is unknown; allowed: dense, sparse"),
    "no step": ({"max_step": 0.0}, r"max_step must be in \(0, 2\], got 0.0"),
    "nan step": ({"max_step": float("nan")}, r"max_step must be a finite number"),
    "obstacle shape": ({"obstacles": [(0.0, 0.0)]}, r"obstacles must be rows \(x, y, radius\), got shape \(1, 2\)"),
    "flat obstacle": ({"obstacles": (0.0, 0.0, 0.1)}, "obstacles must be rows"),
    "ragged": ({"obstacles": [(0.0, 0.0, 0.1), (0.0,)]}, "obstacles must be rows"),
    "word": ({"obstacles": "none"}, "obstacles must be rows"),
    "starts shape": ({"starts": [(0.0, 0.0, 0.1)]}, r"starts must be rows \(x, y\)"),
    "no starts": ({"starts": []}, "starts must hold at least one point"),
    "target shape": ({"target": (0.8, 0.0)}, "target must be"),
    "obstacle outside": ({"obstacles": [(1.2, 0.0, 0.1)]}, "obstacles must lie in the plane"),
    "start outside": ({"starts": [(-1.2, 0.0)]}, "starts must lie in the plane"),
    "target outside": ({"target": (0.0, 1.2, 0.1)}, "target must lie in the plane"),
    "not finite": ({"obstacles": [(0.0, 0.0, float("inf"))]}, "obstacles must lie in the plane"),
    "radius": ({"obstacles": [(0.0, 0.0, 0.0)]}, "obstacles must have positive radii"),
    "start in obstacle": ({"starts": [(-0.8, 0.0), (0.1, 0.1)]}, r"must lie outside .* got \[0.1, 0.1\]"),
    "start in target": ({"starts": [(0.8, 0.05)]}, "must lie outside obstacles and target"),
    "target on obstacle": ({"target": (0.4, 0.0, 0.12)}, "target must not overlap obstacle 0"),
    "start at a wall": ({"layout": "paper", "starts": [(-1.0, 0.5)]}, r"not at a wall, got \[-1.0, 0.5\]"),
    "target on bait": ({"layout": "deceptive", "target": (-0.8, 0.3, 0.2)}, "must not overlap the bait"),
    "obstacle on bait": ({"layout": "deceptive", "obstacles": [(-0.8, -0.3, 0.2)]}, "must not overlap the bait"),
    "no room": (
        {"start": "random", "obstacles": [(-0.8, 0.5, 0.6)], "starts": [(-0.8, -0.9)]},
        "needs half of START_REGION",
    ),
    "render mode": ({"render_mode": "ansi"}, "render_mode='ansi' is unknown; allowed: None, rgb_array"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        TargetReachingEnv(**options)
    assert "\n" not in str(error.value)


def test_steps_need_a_reset_and_a_proper_action():
    env = TargetReachingEnv()
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(np.zeros(2))
    env.reset()
    for wrong in (np.zeros(3), np.array([np.nan, 0.0])):
        with pytest.raises(ValueError, match="action must be two finite numbers"):
            env.step(wrong)


# ---------------------------------------------------------------------- Gymnasium and TorchRL


@pytest.mark.parametrize("start", ["fixed", "random"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gymnasium_finds_nothing_to_warn_about(layout, start):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(ENV_ID, layout=layout, start=start, render_mode="rgb_array", max_episode_steps=200)
        check_env(env.unwrapped)


def test_registering_twice_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()
    assert gymnasium.spec(ENV_ID).max_episode_steps == 100


def test_torchrl_wraps_it():
    check_env_specs(GymEnv(ENV_ID, layout="two", start="random"))
    env = GymWrapper(gymnasium.make(ENV_ID, obstacles=[]))
    check_env_specs(env)
    assert env.rollout(200)["next", "truncated"].sum() <= 1


# ---------------------------------------------------------------------- pictures


def pixel(picture: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    return tuple(picture[int((1 - y) * 200), int((x + 1) * 200)].tolist())


@pytest.mark.parametrize("layout", ROUTES)
def test_the_picture_shows_the_task_and_the_trail(layout):
    env = started(layout=layout, render_mode="rgb_array")
    before = env.render()
    for _ in range(3):
        env.step(np.array([0.0, 1.0]))
    after = env.render()
    assert after.shape == (400, 400, 3)
    assert after.dtype == np.uint8
    white, obstacle, target, agent = (255,) * 3, (85,) * 3, (0, 158, 115), (213, 94, 0)
    assert pixel(before, -0.8, 0.0) == pixel(after, -0.8, 0.3) == agent
    assert pixel(before, -0.8, 0.15) == pixel(after, -0.9, 0.15) == pixel(after, -0.8, -0.15) == white
    assert pixel(after, -0.8, 0.15) not in (white, obstacle, target, agent)
    assert pixel(after, 0.8, 0.1) == target
    for x, y, radius in env.task.obstacles:
        assert pixel(after, x + 0.9 * radius, y) == pixel(after, x, y - 0.9 * radius) == obstacle
        assert pixel(after, x, y - 1.1 * radius) == white
    painted = (before == target).all(-1).mean() * 4
    assert painted == pytest.approx(np.pi * 0.12**2, rel=0.03)
    env.reset()
    np.testing.assert_array_equal(env.render(), before)


def test_an_agent_in_the_corner_is_drawn_within_the_picture():
    env = started(starts=[(-1.0, 1.0)], render_mode="rgb_array")
    picture = env.render()
    assert pixel(picture, -1.0, 1.0) == (213, 94, 0)
    assert (picture[-20:] == 255).all()
    assert (picture[:, -15:] == 255).all()


def test_without_a_render_mode_there_is_no_picture():
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert started().render() is None
