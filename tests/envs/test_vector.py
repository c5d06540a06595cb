"""Several environments as one batch, against single ones that are stepped by hand."""

from __future__ import annotations

from functools import partial
from threading import Barrier

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from torchrl._utils import seed_generator
from torchrl.collectors import Collector
from torchrl.data import Bounded
from torchrl.envs import GymWrapper, SerialEnv

from torchrl_pmoe.envs import make_env, making
from torchrl_pmoe.envs.making import EnvironmentFault, faster_backend, make_gym_env
from torchrl_pmoe.envs.vector import ThreadedVectorEnv

NUM_ENVS, STEPS = 8, 120


def short_hopper(steps: int = 25) -> gym.Env:
    """Falls at some steps, and is cut at others."""
    return TimeLimit(make_gym_env("Hopper-v4").unwrapped, steps)


def short_pendulum() -> gym.Env:
    return TimeLimit(make_gym_env("Pendulum-v1").unwrapped, 13)


@pytest.mark.parametrize("make", [short_hopper, short_pendulum])
def test_a_batch_takes_the_steps_of_single_environments(make):
    env = make_env(make, num_envs=NUM_ENVS, seed=5)
    assert not isinstance(env.base_env, SerialEnv)
    collector = Collector(env, env.rand_action, frames_per_batch=NUM_ENVS * STEPS, total_frames=-1, trust_policy=True)
    batch = next(iter(collector))  # [N, T]
    assert batch["next", "truncated"].any()
    seed = 5
    for row in batch:
        single = make()
        box = single.action_space
        single.reset(seed=seed)
        seed = seed_generator(seed)
        # the collector resets what was seeded
        observation, _ = single.reset()
        for t in range(STEPS):
            step = row[t]
            np.testing.assert_array_equal(step["observation"].numpy(), observation.astype(np.float32))
            action = step["action"].numpy() * (box.high - box.low) / 2 + (box.high + box.low) / 2
            observation, reward, terminated, truncated, _ = single.step(action)
            # the last observation of an episode is its own, not the first of the next one
            np.testing.assert_array_equal(step["next", "observation"].numpy(), observation.astype(np.float32))
            assert step["next", "reward"].item() == np.float32(reward)
            ends = [step["next", key].item() for key in ("terminated", "truncated", "done")]
            assert ends == [terminated, truncated, terminated or truncated]
            if terminated or truncated:
                observation, _ = single.reset()


@pytest.mark.parametrize("backend", ["serial", "threads"])
def test_a_batch_gives_the_frames_of_serial_environments(backend):
    batch = make_env("Hopper-v4", num_envs=3, seed=1, backend=backend)
    serial = SerialEnv(3, partial(make_env, "Hopper-v4"))
    serial.set_seed(1)
    assert batch.action_spec == serial.action_spec
    assert set(batch.specs.keys(True, True)) == set(serial.specs.keys(True, True))
    found = []
    for env in (batch, serial):
        torch.manual_seed(0)
        found.append(env.rollout(100, break_when_any_done=False))
    for key in ("observation", "action", "done", ("next", "observation"), ("next", "reward"), ("next", "terminated")):
        assert found[0][key].dtype == found[1][key].dtype
        assert torch.equal(found[0][key], found[1][key]), key


class Halves(gym.Env):
    """In half precision throughout."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float16)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float16)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float16), {}

    def step(self, action):
        assert action.dtype == np.float16
        return action, 0.0, False, False, {}


def test_half_precision_becomes_single():
    env = make_env(Halves, num_envs=2)
    assert isinstance(env.action_spec, Bounded)
    rollout = env.rollout(3)
    assert rollout["action"].dtype == rollout["observation"].dtype == torch.float32
    torch.testing.assert_close(rollout["next", "observation"], rollout["action"].half().float())


class Raising(Halves):
    def step(self, action):
        raise ZeroDivisionError("no")


@pytest.mark.parametrize("backend", ["serial", "threads"])
def test_the_error_of_one_environment_is_raised_as_it_is(backend):
    env = make_env(Raising, num_envs=2, backend=backend)
    with pytest.raises(ZeroDivisionError, match=r"^no$"):
        env.rollout(1)


class Meeting(Halves):
    """Its step ends when two of them are on the way."""

    together = Barrier(2, timeout=600)

    def step(self, action):
        self.together.wait()
        return super().step(action)


def test_steps_on_threads_overlap():
    vector = ThreadedVectorEnv([Meeting, Meeting, Meeting, Meeting], num_threads=2)
    vector.reset(seed=0)
    action = np.linspace(-1, 1, 8, dtype=np.float16).reshape(4, 2)
    observation, *_ = vector.step(action)
    np.testing.assert_array_equal(observation, action)
    vector.close()


@pytest.mark.parametrize(("serial", "threads", "faster"), [(4.0, 2.0, "threads"), (2.0, 2.0, "serial")])
@pytest.mark.parametrize("seconds", [1.0, 1000.0], ids=["few steps", "many"])
def test_the_faster_backend_is_found(serial, threads, faster, seconds, monkeypatch):
    now, steps = [0.0], []

    class Batch:
        """Takes as long as it says."""

        def __init__(self, seconds):
            self.seconds = seconds

        def rollout(self, number, **kwargs):
            steps.append(number)
            torch.rand(1)
            now[0] += self.seconds * number

        def close(self):
            steps.append(0)

    monkeypatch.setattr(making, "perf_counter", lambda: now[0])
    monkeypatch.setattr(making, "cores", lambda: 2)
    monkeypatch.setattr(making, "batched_gym_env", lambda make, n, *, threads: Batch(times[threads]))
    times = {False: serial, True: threads}
    before = torch.get_rng_state()
    assert faster_backend("Pendulum-v1", 4, seconds=seconds) == faster
    assert torch.equal(torch.get_rng_state(), before)
    assert steps[-2:] == [0, 0]
    # three rounds on each where a step takes long; so many steps that the rest does not count where it does not
    assert now[0] <= max(4 * (serial + threads), 1.3 * seconds)
    assert (steps[2] == 16) == (seconds == 1000.0)


def test_runs_that_share_a_batch_have_the_environments_that_they_would_have_alone():
    for env in ("Hopper-v4", own):
        shared = make_env(env, num_envs=4, seed=7, runs=2).reset()["observation"]
        alone = [make_env(env, num_envs=2, seed=seed).reset()["observation"] for seed in (7, 8)]
        torch.testing.assert_close(shared, torch.cat(alone), rtol=0, atol=0)
    with pytest.raises(ValueError, match="num_envs=3 must be a multiple of runs=2"):
        make_env("Hopper-v4", num_envs=3, runs=2)


def test_where_threads_cannot_help_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(making, "batched_gym_env", None)
    monkeypatch.setattr(making, "cores", lambda: 2)
    assert faster_backend("Pendulum-v1", 1) == "serial"
    assert faster_backend("dm_control:cheetah-run", 4) == "serial"
    assert faster_backend(own, 4) == "serial"
    monkeypatch.setattr(making, "cores", lambda: 1)
    assert faster_backend("Pendulum-v1", 4) == "serial"


def own():
    return GymWrapper(make_gym_env("Pendulum-v1"))


def test_an_environment_of_torchrl_runs_in_a_serial_env():
    assert make_env(own, num_envs=2).rollout(3).shape == (2, 3)
    with pytest.raises(EnvironmentFault, match="must be serial or parallel with env=own, which TorchRL makes"):
        make_env(own, num_envs=2, backend="threads")
    with pytest.raises(EnvironmentFault, match="must be serial or parallel with env=dm_control:cheetah-run, which"):
        make_env("dm_control:cheetah-run", num_envs=2, backend="threads")
