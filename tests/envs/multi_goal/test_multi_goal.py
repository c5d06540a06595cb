"""The multi-goal task: rewards, goals, and the batched environment against Gymnasium's."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torchrl.envs import check_env_specs

from torchrl_pmoe.envs import BatchedMultiGoalEnv, MultiGoalEnv
from torchrl_pmoe.envs.multi_goal.task import GOALS
from torchrl_pmoe.envs.target_reaching.routes import effective_routes, routes

ENV_ID = "PMOE/MultiGoal-v0"


@pytest.mark.parametrize(
    ("position", "action", "expected", "end", "outcome"),
    [
        ([0.0, 0.0], [0.5, 0.0], -30 * 0.25 - 4.5**2, [0.5, 0.0], None),
        ([0.0, 2.0], [0.6, 0.8], -30 - (0.6**2 + 2.2**2), [0.6, 2.8], None),
        ([0.0, -3.5], [0.0, -0.9], -30 * 0.81 - 0.6**2 + 10, [0.0, -4.4], "south"),
        ([-3.0, 0.2], [-3.0, -0.2], -30 * 1.04 - 1.0 + 0, [-4.0, 0.0], None),  # at a distance of 1, not below it
        ([6.8, 6.8], [1.0, 0.0], -30 - (2**2 + 6.8**2), [7.0, 6.8], None),
    ],
    ids=["east", "north", "goal", "rim", "edge"],
)
def test_reward_and_end_of_a_step(position, action, expected, end, outcome):
    env = MultiGoalEnv()
    env.reset(seed=0)
    env.position = position
    observation, reward, terminated, truncated, info = env.step(np.array(action))
    np.testing.assert_allclose(observation, end, rtol=1e-6)
    assert reward == pytest.approx(expected)
    assert (terminated, truncated, info["is_success"]) == (outcome is not None, False, outcome is not None)
    assert info.get("outcome") == outcome
    assert info["collided"] == (end[0] == 7.0)


def test_costs_are_arguments():
    env = MultiGoalEnv(action_cost=2.0, distance_cost=0.5, goal_reward=3.0, start_std=0.0)
    assert env.reset(seed=0)[0].tolist() == [0.0, 0.0]
    env.position = [3.5, 0.0]
    assert env.step(np.array([1.0, 0.0]))[1] == pytest.approx(-2.0 - 0.5 * 0.25 + 3.0)


def test_starts_are_normal_around_the_origin():
    starts = BatchedMultiGoalEnv(20_000, seed=0).reset()["observation"].numpy()
    np.testing.assert_allclose(starts.std(0), 0.1, rtol=0.03)
    np.testing.assert_allclose(starts.mean(0), 0.0, atol=0.004)
    env = MultiGoalEnv(start_std=0.5)
    assert np.std([env.reset(seed=seed)[0] for seed in range(1000)]) == pytest.approx(0.5, rel=0.1)


def test_no_start_is_at_a_goal():
    td = BatchedMultiGoalEnv(2000, seed=0, start_std=5.0).reset()
    assert not td["done"].any()
    assert (td["observation"].norm(dim=-1) > 3.8).any()
    env = MultiGoalEnv(start_std=1e6)
    lengths = [np.hypot(*env.reset(seed=seed)[0]) for seed in range(5)]
    np.testing.assert_allclose(lengths, 3.9, rtol=1e-6)


def test_it_agrees_with_the_gymnasium_environment_over_whole_episodes(device):
    number, rng = 6, np.random.default_rng(0)
    batched = BatchedMultiGoalEnv(number, seed=0, device=device)
    check_env_specs(batched)
    single = [gymnasium.make(ENV_ID) for _ in range(number)]
    ways = np.array(list(GOALS.values())) / 5
    aims, ends, found = ways[np.arange(number) % 4], set(), []
    td = batched.reset()

    def follow(rows) -> None:
        for row in rows:
            single[row].reset()
            single[row].unwrapped.position = batched.position[row].cpu().double().numpy()

    follow(range(number))
    for _ in range(120):
        action = (aims + rng.normal(0, 0.4, aims.shape)).astype(np.float32)
        td = batched.step(td.set("action", torch.tensor(action, device=device)))["next"]
        for row, env in enumerate(single):
            observation, reward, terminated, truncated, info = env.step(action[row].clip(-1, 1))
            expected = [*observation, reward, terminated, truncated, info["is_success"]]
            keys = ("observation", "reward", "terminated", "truncated", "is_success")
            np.testing.assert_allclose(
                np.concatenate([td[key][row].cpu().numpy().astype(float) for key in keys]), expected, atol=1e-4
            )
            goal = int(batched.task.goal(batched.position)[row])
            assert (None if goal < 0 else list(GOALS)[goal]) == info.get("outcome")
            if terminated or truncated:
                ends.add(info.get("outcome"))
        done = td["done"].flatten().cpu().numpy()
        if done.any():
            # a tenth of the way a step, so that some never arrive
            aims[done] = (ways[rng.integers(4, size=number)] * rng.choice([0.1, 1.0], (number, 1)))[done]
            td = batched.reset(td.exclude("reward").set("_reset", td["done"]))
            follow(np.flatnonzero(done))
        found.append(done.sum())
    assert sum(found) > 20
    assert ends == {*GOALS, None}


def test_goals_are_counted_from_where_episodes_end():
    ends = torch.tensor([[4.5, 0.0], [5.2, 0.6], [0.0, 4.2], [0.5, -5.0], [3.0, 3.0], [0.0, 0.0], [-4.1, 0.1]])
    goals = BatchedMultiGoalEnv(1).task.goal(ends)
    assert goals.tolist() == [0, 0, 2, 3, -1, -1, 1]
    reached = goals[goals >= 0].tolist()
    assert routes(reached, min_share=0) == {0: 0.4, 2: 0.2, 3: 0.2, 1: 0.2}
    assert effective_routes(reached, min_share=0) == pytest.approx(np.exp(-(0.4 * np.log(0.4) + 0.6 * np.log(0.2))))


def test_gymnasium_finds_nothing_to_warn_about_and_an_episode_has_thirty_steps():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ENV_ID, render_mode="rgb_array").unwrapped)
    env = gymnasium.make(ENV_ID)
    env.reset(seed=0)
    assert [env.step(np.zeros(2, np.float32))[3] for _ in range(30)] == [False] * 29 + [True]


def test_the_picture_shows_the_goals_and_the_agent():
    env = MultiGoalEnv(render_mode="rgb_array", start_std=0.0)
    env.reset(seed=0)
    picture = env.render()
    for x, y in [*GOALS.values(), (5.0, 0.9), (-5.9, 0.0)]:
        assert picture[int((7 - y) / 14 * 400), int((x + 7) / 14 * 400)].tolist() == [0, 158, 115]
    assert picture[200, 200].tolist() == [213, 94, 0]
    assert picture[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action_cost": float("nan")}, "MultiGoalTask: action_cost must be a finite number, got nan"),
        ({"goal_reward": "much"}, "MultiGoalTask: goal_reward must be a finite number, got 'much'"),
        ({"start_std": -0.1}, "MultiGoalTask: start_std must be at least 0, got -0.1"),
    ],
)
def test_a_mistake_is_told_in_one_line(options, message):
    for make in (MultiGoalEnv, lambda **kwargs: BatchedMultiGoalEnv(2, **kwargs)):
        with pytest.raises(ValueError, match=message):
            make(**options)
