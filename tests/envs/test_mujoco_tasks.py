"""The MuJoCo tasks against Gymnasium's own environments, step by step."""

import importlib.util
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from torchrl_pmoe.envs import MUJOCO_TASKS, mujoco_task
from torchrl_pmoe.envs import mujoco_tasks as module
from torchrl_pmoe.envs.physics import has_mjx, quiet_mujoco

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="mujoco is not installed")
needs_mjx = pytest.mark.skipif(not has_mjx(), reason="jax and mujoco-mjx are not installed (extra mjx)")

STEPS = 1000
ROWS = 2


def gymnasium_task(name: str) -> gym.Env:
    with warnings.catch_warnings(), quiet_mujoco():
        warnings.filterwarnings("ignore", message=".*is out of date.*")
        return gym.make(name)


def state_of(envs: list[gym.Env], mask: list[bool] | None = None) -> TensorDict:
    """Where Gymnasium's simulators stand, in the form that a reset takes."""
    data = [env.unwrapped.data for env in envs]
    state = TensorDict(
        {
            "qpos": torch.from_numpy(np.stack([row.qpos for row in data])),
            "qvel": torch.from_numpy(np.stack([row.qvel for row in data])),
        },
        batch_size=len(envs),
    )
    return state if mask is None else state.set("_reset", torch.tensor(mask).unsqueeze(-1))


def step_all(envs: list[gym.Env], actions: np.ndarray) -> dict[str, np.ndarray]:
    outcomes = zip(*(env.step(action)[:4] for env, action in zip(envs, actions, strict=True)), strict=True)
    return dict(zip(("observation", "reward", "terminated", "truncated"), map(np.stack, outcomes), strict=True))


def random_actions(env: gym.Env, steps: int) -> np.ndarray:
    low, high = env.action_space.low, env.action_space.high
    return np.random.default_rng(0).uniform(low, high, (steps, ROWS, len(low)))


@pytest.mark.parametrize("name", MUJOCO_TASKS)
def test_mujoco_rows_are_gymnasium_environments_to_the_last_bit(name: str) -> None:
    """Two rows, each with ends of its own, for 1,000 steps on end: one row's reset must leave no trace in the other."""
    theirs = [gymnasium_task(name) for _ in range(ROWS)]
    ours = MUJOCO_TASKS[name](num_envs=ROWS, backend="mujoco", dtype=torch.float64)
    first = [env.reset(seed=row)[0] for row, env in enumerate(theirs)]
    seen = ours.reset(state_of(theirs), set_state=True)
    np.testing.assert_array_equal(seen["observation"], first)

    ends = 0
    for actions in random_actions(theirs[0], STEPS):
        expected = step_all(theirs, actions)
        got = ours.step(TensorDict(action=torch.from_numpy(actions), batch_size=ROWS))["next"]
        np.testing.assert_array_equal(got["observation"], expected["observation"])
        np.testing.assert_allclose(got["reward"].squeeze(-1), expected["reward"], rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(got["terminated"].squeeze(-1), expected["terminated"])
        np.testing.assert_array_equal(got["truncated"].squeeze(-1), expected["truncated"])
        over = (expected["terminated"] | expected["truncated"]).tolist()
        np.testing.assert_array_equal(got["done"].squeeze(-1), over)
        if any(over):
            ends += sum(over)
            for env, finished in zip(theirs, over, strict=True):
                if finished:
                    env.reset()
            ours.reset(state_of(theirs, over), set_state=True)
    assert ends >= ROWS


@pytest.mark.parametrize("name", MUJOCO_TASKS)
def test_specs_are_kept_and_actions_have_gymnasiums_bounds(name: str) -> None:
    env = mujoco_task(name, ROWS, seed=0, backend="mujoco")
    check_env_specs(env)
    space = gymnasium_task(name)
    np.testing.assert_array_equal(env.action_spec_unbatched.space.low[0], space.action_space.low)
    np.testing.assert_array_equal(env.action_spec_unbatched.space.high[0], space.action_space.high)
    assert env.observation_spec["observation"].shape == (ROWS, *space.observation_space.shape)
    assert env.rollout(3)["next", "observation"].dtype == torch.float32


@pytest.mark.parametrize("name", MUJOCO_TASKS)
def test_reset_noise_has_gymnasiums_distribution(name: str) -> None:
    from scipy import stats

    ours, theirs = mujoco_task(name, 16, seed=0, backend="mujoco"), gymnasium_task(name)
    theirs.reset(seed=0)
    drawn: dict[str, list[np.ndarray]] = {"qpos": [], "qvel": []}
    expected: dict[str, list[np.ndarray]] = {"qpos": [], "qvel": []}
    for _ in range(20):
        ours.reset()
        for key, values in drawn.items():
            values.append(ours.get_state()[key].numpy())
    for _ in range(320):
        theirs.reset()
        for key, values in expected.items():
            values.append(getattr(theirs.unwrapped.data, key).copy())
    for key, initial in (("qpos", theirs.unwrapped.init_qpos), ("qvel", theirs.unwrapped.init_qvel)):
        noise = np.concatenate(drawn[key]) - initial
        reference = np.stack(expected[key]) - initial
        assert noise.shape == reference.shape
        assert stats.ks_2samp(noise.ravel(), reference.ravel()).pvalue > 0.01
        assert np.abs(noise).max() == pytest.approx(np.abs(reference).max(), rel=0.3)
        assert np.abs(np.corrcoef(noise.T) - np.eye(noise.shape[1])).max() < 0.3  # every coordinate its own draw


def test_the_time_limit_truncates_after_1000_steps_and_does_not_terminate() -> None:
    rollout = mujoco_task("HalfCheetah-v4", ROWS, seed=0, backend="mujoco").rollout(1200)
    assert rollout.shape == (ROWS, 1000)
    assert rollout["next", "truncated"].sum(1).tolist() == [[1], [1]]
    assert rollout["next", "truncated"][:, -1].all()
    assert not rollout["next", "terminated"].any()


def test_one_seed_gives_one_run_and_rows_of_their_own() -> None:
    runs = []
    for seed in (3, 3, 4):
        env = mujoco_task("Hopper-v4", ROWS, seed=seed, backend="mujoco")
        runs.append(env.reset()["observation"])
    assert runs[0].equal(runs[1])
    assert not runs[0].equal(runs[2])
    assert not runs[0][0].equal(runs[0][1])


def test_a_row_can_be_taken_out_and_put_back() -> None:
    env = mujoco_task("Hopper-v4", 3, seed=0, backend="mujoco")
    env.reset()
    actions = [env.action_spec.rand() for _ in range(5)]
    row = env[1]
    for action in actions:
        alone = row.step(TensorDict(action=action[1:2], batch_size=1))["next", "observation"]
    assert not row.get_state()["qpos"].equal(env.get_state()["qpos"][1:2])
    env[0] = row
    assert env.get_state()["qpos"][0].equal(row.get_state()["qpos"][0])
    for action in actions:
        together = env.step(TensorDict(action=action, batch_size=3))["next", "observation"]
    assert together[1].equal(alone[0])


def test_nothing_is_printed_where_an_environment_is_made(capfd: pytest.CaptureFixture[str]) -> None:
    mujoco_task("HalfCheetah-v4", 1, seed=0, backend="mujoco").rollout(2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"name": "Swimmer-v4"}, "HalfCheetah-v4, Hopper-v4, Walker2d-v4, Ant-v4, Humanoid-v4, HumanoidStandup-v4"),
        ({"num_envs": 0}, "num_envs must be an integer of at least 1, got 0"),
        ({"backend": "brax"}, "backend must be 'mjx' or 'mujoco', got 'brax'"),
    ],
)
def test_what_cannot_be_made_is_one_line(given: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line) as raised:
        mujoco_task(**{"name": "Hopper-v4", "num_envs": 1, "seed": 0, "backend": "mujoco", **given})
    assert "\n" not in str(raised.value)


def test_a_missing_mjx_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_mjx", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'torchrl_pmoe\[mjx\]'"):
        mujoco_task("Hopper-v4", 1, seed=0)
