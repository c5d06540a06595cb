"""The MuJoCo tasks against Gymnasium's own environments, step by step."""

import importlib.util
import warnings
from collections.abc import Iterator

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from torchrl_pmoe.envs import MUJOCO_TASKS, mujoco_task
from torchrl_pmoe.envs.mujoco import tasks as module
from torchrl_pmoe.envs.mujoco.engines import has_mjx, quiet_mujoco

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mujoco") is None, reason="mujoco is not installed")
needs_mjx = pytest.mark.skipif(not has_mjx(), reason="jax and mujoco-mjx are not installed (extra mjx)")

STEPS = 1000
ROWS = 2
COMPARED = ("observation", "reward", "terminated", "truncated", "done")


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

    ends, found, wanted = 0, [], []
    for actions in random_actions(theirs[0], STEPS):
        expected = step_all(theirs, actions)
        got = ours.step(TensorDict(action=torch.from_numpy(actions), batch_size=ROWS))["next"]
        over = expected["terminated"] | expected["truncated"]
        found.append([got[key].reshape(ROWS, -1).numpy().copy() for key in COMPARED])
        wanted.append([value.reshape(ROWS, -1) for value in (*expected.values(), over)])
        if over.any():
            ends += over.sum()
            for env, finished in zip(theirs, over, strict=True):
                if finished:
                    env.reset()
            ours.reset(state_of(theirs, over.tolist()), set_state=True)
    for key, got, expected in zip(COMPARED, zip(*found, strict=True), zip(*wanted, strict=True), strict=True):
        allowed = 1e-12 if key == "reward" else 0.0
        np.testing.assert_allclose(np.stack(got), np.stack(expected), rtol=allowed, atol=allowed, err_msg=key)
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


def test_rows_that_end_start_anew_while_the_others_go_on() -> None:
    rollout = mujoco_task("Hopper-v4", 4, seed=0, backend="mujoco").rollout(200, break_when_any_done=False)
    first, last = rollout["observation"][:, 1:], rollout["next", "observation"][:, :-1]
    over = rollout["next", "done"][:, :-1, 0]
    assert over.any(1).all()
    assert not over.all(0).any()
    assert first[~over].equal(last[~over])
    start = torch.tensor([1.25] + 10 * [0.0])
    assert (first[over] - start).abs().max() <= 5e-3 + 1e-6
    assert ((last[over] - start).abs().amax(-1) > 0.1).all()


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_line() -> None:
    with pytest.raises(ValueError, match="got 'cuda' and no CUDA device"):
        mujoco_task("Hopper-v4", 1, seed=0, backend="mujoco", device="cuda")


def test_a_missing_mjx_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_mjx", lambda: False)
    with pytest.raises(ValueError, match=r"pip install jax mujoco-mjx"):
        mujoco_task("Hopper-v4", 1, seed=0)


# ------------------------------------------------------------------------------------------------------ MJX


@pytest.fixture
def double_precision() -> Iterator[None]:
    import jax

    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def deviations(name: str, steps: int, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """How far one step of MJX is from Gymnasium's, from the same states and actions along Gymnasium's own episodes.

    Positions and velocities, and what else is observed, in units of ``1 + |value|``; rewards as they are.
    """
    theirs = [gymnasium_task(name) for _ in range(ROWS)]
    ours = MUJOCO_TASKS[name](num_envs=ROWS, backend="mjx", dtype=dtype)
    for row, env in enumerate(theirs):
        env.reset(seed=row)
    coordinates = theirs[0].unwrapped.model.nq + theirs[0].unwrapped.model.nv - ours.SKIP_QPOS
    found: dict[str, list[np.ndarray]] = {"state": [], "rest": [], "reward": [], "ends": []}
    for actions in random_actions(theirs[0], steps):
        for env in theirs:
            start_over(env)
        ours.reset(state_of(theirs), set_state=True)
        expected = step_all(theirs, actions)
        step = ours.step(TensorDict(action=torch.from_numpy(actions), batch_size=ROWS))["next"]
        got = {key: step[key].numpy() for key in expected}
        difference = np.abs(got["observation"] - expected["observation"]) / (1 + np.abs(expected["observation"]))
        found["state"].append(difference[:, :coordinates])
        found["rest"].append(difference[:, coordinates:])
        found["reward"].append(np.abs(got["reward"][:, 0] - expected["reward"]))
        found["ends"].append(got["terminated"][:, 0] != expected["terminated"])
        for env, over in zip(theirs, expected["terminated"], strict=True):
            if over:
                env.reset()
    return {key: np.concatenate(values) for key, values in found.items()}


def start_over(env: gym.Env) -> None:
    """Leave the simulator with what ``qpos`` and ``qvel`` say and no memory of how it came there."""
    import mujoco

    simulator = env.unwrapped
    qpos, qvel = simulator.data.qpos.copy(), simulator.data.qvel.copy()
    mujoco.mj_resetData(simulator.model, simulator.data)
    simulator.set_state(qpos, qvel)


SINGLE = {
    "HalfCheetah-v4": (5e-4, 1e-2),
    "Hopper-v4": (5e-5, 1e-3),
    "Walker2d-v4": (5e-4, 1e-2),
    "Ant-v4": (5e-4, 1e-2),
    "Humanoid-v4": (5e-4, 1e-2),
    "HumanoidStandup-v4": (5e-4, 0.5),
}
"""What 99 of 100 steps keep to, and what every step keeps to: rounding may start a contact a substep sooner."""

DOUBLE = {
    "HalfCheetah-v4": 1e-9,
    "Hopper-v4": 1e-9,
    "Walker2d-v4": 1e-9,
    "Ant-v4": 1e-5,
    "Humanoid-v4": 1e-3,
    "HumanoidStandup-v4": 1e-3,
}
"""What every step keeps to: the solvers' own tolerance, and for the humanoids' that of another solver."""


@needs_mjx
@pytest.mark.filterwarnings("error:Accessing:DeprecationWarning")
@pytest.mark.parametrize(
    "name", [name if name == "HalfCheetah-v4" else pytest.param(name, marks=pytest.mark.slow) for name in SINGLE]
)
def test_a_step_of_mjx_is_a_step_of_gymnasium_in_single_precision(name: str) -> None:
    """1,000 steps."""
    found = deviations(name, 500, torch.float32)
    mostly, always = SINGLE[name]
    for key in ("state", "reward"):
        worst = found[key].reshape(1000, -1).max(-1)
        assert np.quantile(worst, 0.99) < mostly
        assert worst.max() < always
    if found["rest"].size:
        assert np.median(found["rest"].max(-1)) < mostly
    assert not found["ends"].any()


@needs_mjx
@pytest.mark.slow
@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", DOUBLE)
def test_a_step_of_mjx_is_a_step_of_gymnasium_in_double_precision(name: str) -> None:
    """1,000 steps: what single precision leaves between the two is rounding, and not another task."""
    found = deviations(name, 500, torch.float64)
    assert found["state"].max() < DOUBLE[name]
    assert found["reward"].max() < max(DOUBLE[name], 1e-6)
    assert not found["ends"].any()


@needs_mjx
def test_an_mjx_row_is_left_alone_by_the_reset_of_another() -> None:
    runs = []
    for mask in ([False, False], [True, False]):
        env = mujoco_task("HalfCheetah-v4", ROWS, seed=0)
        check = env.reset()
        for step in range(20):
            if step == 10:
                check = env.reset(check.set("_reset", torch.tensor(mask).unsqueeze(-1)))
            check = env.step(check.set("action", torch.full((ROWS, 6), 0.5)))["next"]
        runs.append(check["observation"])
    assert runs[0][1].equal(runs[1][1])
    assert not runs[0][0].equal(runs[1][0])


@needs_mjx
def test_a_diverged_row_goes_on_from_the_initial_state() -> None:
    env = mujoco_task("HalfCheetah-v4", ROWS, seed=0)
    velocities = torch.zeros(ROWS, 9)
    velocities[0] = torch.inf
    env.reset(TensorDict(qpos=torch.zeros(ROWS, 9), qvel=velocities, batch_size=ROWS), set_state=True)
    seen = env.step(TensorDict(action=torch.ones(ROWS, 6), batch_size=ROWS))["next", "observation"]
    assert seen[0].eq(0).all()
    assert seen[1].ne(0).any()
    assert seen.isfinite().all()


@needs_mjx
def test_mjx_keeps_its_specs_and_the_time_limit() -> None:
    env = MUJOCO_TASKS["HalfCheetah-v4"](num_envs=ROWS, seed=0, max_episode_steps=30)
    check_env_specs(env)
    rollout = env.rollout(40)
    assert rollout["next", "observation"].dtype == torch.float32
    assert rollout.shape == (ROWS, 30)
    assert rollout["next", "truncated"].sum(1).tolist() == [[1], [1]]
    assert not rollout["next", "terminated"].any()


@needs_mjx
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_mjx_stays_on_the_gpu() -> None:
    env = mujoco_task("HalfCheetah-v4", 64, seed=0, device="cuda")
    assert all(device.platform == "gpu" for device in env._backend._dx.qpos.devices())
    for tensor in env.rollout(5).values(True, True):
        assert tensor.device.type == "cuda"
