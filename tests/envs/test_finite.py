"""Steps with NaN or infinite numbers, in one environment and in a batch."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import NormalizeObservation
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import DoubleToFloat, EnvBase, GymWrapper, TransformedEnv
from torchrl.envs.utils import check_env_specs

from torchrl_pmoe.envs import FiniteStep, FiniteSteps
from torchrl_pmoe.envs.finite import read_nonfinite


class Broken(gym.Env):
    """Counts its steps; the third of an episode is bad."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, what):
        self.what, self.time = what, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(2), {}

    def step(self, action):
        self.time += 1
        bad = self.time == 3
        observation = np.full(2, float(self.time))
        if bad and self.what == "observation":
            observation[1] = np.inf
        return observation, np.nan if bad and self.what == "reward" else 1.0, bad, False, {}


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_a_bad_step_is_marked_and_ends_the_episode_without_a_terminal_state(what):
    env = FiniteSteps(Broken(what))
    env.reset()
    for time in (1, 2):
        observation, reward, terminated, truncated, info = env.step(np.zeros(1))
        assert (observation == time).all()
        assert (reward, terminated, truncated, info) == (1.0, False, False, {"nonfinite": np.array([False])})
    observation, reward, terminated, truncated, info = env.step(np.zeros(1))
    assert (observation == 2).all()
    assert (reward, terminated, truncated, info) == (0.0, False, True, {"nonfinite": np.array([True])})


def test_an_episode_that_begins_badly_is_an_error():
    broken = Broken("reward")
    broken.reset = lambda **kwargs: (np.array([np.nan, 0.0]), {})
    with pytest.raises(FloatingPointError, match="first observation"):
        FiniteSteps(broken).reset()


def test_statistics_outside_see_finite_numbers_alone():
    env = NormalizeObservation(FiniteSteps(Broken("observation")))
    env.reset()
    for _ in range(3):
        env.step(np.zeros(1))
    assert np.isfinite(env.obs_rms.mean).all()


def test_torchrl_reads_the_mark():
    env = TransformedEnv(read_nonfinite(GymWrapper(FiniteSteps(Broken("reward")))), DoubleToFloat())
    check_env_specs(env)
    rollout = env.rollout(5, break_when_any_done=False)
    assert rollout["next", "nonfinite"].flatten().tolist() == [False, False, True, False, False]
    assert rollout["next", "truncated"].flatten().tolist() == [False, False, True, False, False]
    assert rollout["observation"][:, 0].tolist() == [0, 1, 2, 0, 1]


class BrokenBatch(EnvBase):
    """Rows count their steps; row 1 is bad at its third."""

    def __init__(self, device, what="observation"):
        super().__init__(device=device, batch_size=[3])
        self.what = what
        self.observation_spec = Composite(observation=Unbounded((3, 2), device=device), shape=(3,), device=device)
        self.action_spec = Bounded(-1, 1, (3, 1), device=device)
        self.reward_spec = Unbounded((3, 1), device=device)
        flag = Categorical(2, shape=(3, 1), dtype=torch.bool, device=device)
        self.done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(3,), device=device
        )
        self.time = torch.zeros(3, 1, device=device)

    def _set_seed(self, seed):
        pass

    def _outcome(self, terminated):
        return TensorDict(
            observation=self.time.expand(3, 2).clone(),
            done=terminated.clone(),
            terminated=terminated,
            truncated=torch.zeros_like(terminated),
            batch_size=3,
            device=self.device,
        )

    def _reset(self, tensordict):
        mask = None if tensordict is None else tensordict.get("_reset", None)
        self.time = torch.zeros_like(self.time) if mask is None else self.time.masked_fill(mask.view(3, 1), 0)
        return self._outcome(torch.zeros_like(self.time, dtype=torch.bool))

    def _step(self, tensordict):
        self.time = self.time + 1
        bad = (self.time == 3) & (torch.arange(3, device=self.device) == 1).unsqueeze(-1)
        out = self._outcome(bad.clone())
        out["reward"] = torch.ones_like(self.time)
        out[self.what] = torch.where(bad, torch.nan, out[self.what])
        return out


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_rows_of_a_batch_go_bad_one_by_one(what, device):
    env = TransformedEnv(BrokenBatch(device, what), FiniteStep())
    check_env_specs(env)
    rollout = env.rollout(5, break_when_any_done=False)
    found = rollout["next"]
    bad = torch.zeros(3, 5, dtype=torch.bool)
    bad[1, 2] = True
    for key, expected in (("nonfinite", bad), ("truncated", bad), ("done", bad), ("terminated", bad & False)):
        assert (found[key].squeeze(-1).cpu() == expected).all(), key
    assert found["observation"][1, :, 0].tolist() == [1, 2, 2, 1, 2]
    assert found["reward"][1, :, 0].tolist() == [1, 1, 0, 1, 1]
    assert rollout["observation"][1, :, 0].tolist() == [0, 1, 2, 0, 1]
    assert found["observation"][0, :, 0].tolist() == [1, 2, 3, 4, 5]
