"""The normalising transform of batched environments against Gymnasium's own wrappers."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import recipe_runs  # noqa: F401  (puts the recipes on the path)
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from torchrl.collectors import Collector
from torchrl.envs import SerialEnv

from torchrl_pmoe.envs import EpisodeState, SimulatorState
from torchrl_pmoe.trainers import VerifiedCheckpoint

import common  # isort: skip
from normalization import RUNNING, BatchMeanStd, RunningNormalization  # isort: skip

SPACE = gym.spaces.Box(-np.inf, np.inf, (11,))
OPTIONS = {"observation": True, "reward": True, "clip": 2.0, "gamma": 0.9}


def rollout(env, frames, seed=3):
    """Frames across episodes under random actions, some beyond the bounds."""
    generator = torch.Generator().manual_seed(seed)
    td, collected = env.reset(), []
    for _ in range(frames):
        td.set("action", 3 * torch.randn(env.action_spec.shape, generator=generator))
        step, td = env.step_and_maybe_reset(td)
        collected.append(step)
    return torch.stack(collected)


def test_moments_are_gymnasiums_row_by_row_or_all_at_once():
    rng = np.random.default_rng(0)
    theirs, ours = RunningMeanStd(shape=(3,)), BatchMeanStd((3,))
    for rows in (1, 4, 4, 2):
        batch = rng.normal(2, 3, (rows, 3))
        theirs.update(batch)
        ours.update(torch.as_tensor(batch))
    for moment in ("mean", "var", "count"):
        np.testing.assert_allclose(getattr(ours, moment), getattr(theirs, moment), rtol=1e-12)


def test_rows_that_are_not_seen_leave_no_trace():
    rows = torch.randn(5, 3, dtype=torch.float64)
    seen = torch.tensor([[True], [False], [True], [False], [False]])
    masked, selected, untouched = BatchMeanStd((3,)), BatchMeanStd((3,)), BatchMeanStd((3,))
    masked.update(rows, seen)
    selected.update(rows[[0, 2]])
    untouched.update(rows, torch.zeros_like(seen))
    torch.testing.assert_close(masked.mean, selected.mean)
    torch.testing.assert_close(masked.var, selected.var)
    torch.testing.assert_close(untouched.var, torch.ones(3, dtype=torch.float64))


def test_one_environment_is_normalised_as_by_gymnasiums_wrappers():
    wrappers = RunningNormalization(SPACE, **OPTIONS)
    wrapped = common.make_env("Hopper-v4", 0, 1, wrappers.wrap, clip_actions=True)
    # seeding has reset the environment once already
    wrappers.load_state_dict(RunningNormalization(SPACE, **OPTIONS).state_dict())
    theirs = rollout(wrapped, 200)
    normalization = RunningNormalization(SPACE, **OPTIONS, device="cpu")
    batch = SerialEnv(1, lambda: common.make_env("Hopper-v4", 0, clip_actions=True))
    batch.set_seed(0)
    ours = rollout(normalization.transform(batch), 200).squeeze(-1)
    assert ours["next", "done"].sum() > 5
    for key in ("observation", ("next", "observation"), ("next", "reward")):
        torch.testing.assert_close(ours[key].reshape_as(theirs[key]), theirs[key], rtol=1e-4, atol=1e-5)
    assert ours["next", "observation"].abs().max() == OPTIONS["clip"]
    kept, found = wrappers.state_dict(), normalization.state_dict()
    # of the episode under way, Gymnasium's wrappers keep account themselves
    assert kept.keys() == found.keys() - set(RUNNING)
    # of the episodes that have ended, a batch knows the mean alone
    assert normalization.train_return() == pytest.approx(kept.pop("episode_returns").mean().item(), rel=1e-5)
    for key, value in kept.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-8)


def test_rows_share_their_statistics_and_a_reset_row_counts_alone():
    normalization = RunningNormalization(SPACE, **OPTIONS, device="cpu")
    env = normalization.transform(common.make_env("Hopper-v4", 0, 3, clip_actions=True))
    frames = rollout(env, 60)
    resets = int(frames["next", "done"].sum())
    assert resets > 0
    # every row's first observation, three a step, and one for each reset
    assert float(normalization.statistics["observation"].count) == pytest.approx(3 + 3 * 60 + resets, abs=1e-3)
    assert float(normalization.statistics["return"].count) == pytest.approx(3 * 60, abs=1e-3)


def test_train_return_is_the_mean_of_the_episodes_that_ended():
    normalization = RunningNormalization(SPACE, observation=False, reward=False, clip=10, gamma=0.9, device="cpu")
    assert np.isnan(normalization.train_return())
    env = normalization.transform(common.make_env("Hopper-v4", 0, 2, clip_actions=True))
    frames = rollout(env, 80)
    returns, running = [], torch.zeros(2)
    for step in frames:
        running = running + step["next", "reward"].squeeze(-1)
        returns += running[step["next", "done"].squeeze(-1)].tolist()
        running = running * ~step["next", "done"].squeeze(-1)
    assert len(returns) > 2
    assert normalization.train_return() == pytest.approx(np.mean(returns), rel=1e-5)


@pytest.mark.parametrize("device", [None, "cpu"], ids=["wrappers", "batch"])
def test_after_a_resume_new_episodes_are_normalised_by_the_statistics_that_were_loaded(device, tmp_path, monkeypatch):
    """As a run begins them whose environment's state is not kept: the checkpoint has the episodes before the rest."""
    monkeypatch.setattr(SimulatorState, "complete", False)

    def build(seed):
        normalization = RunningNormalization(SPACE, **OPTIONS, device=device)
        wrap = normalization.wrap if device is None else lambda env: env
        env = common.make_env("Hopper-v4", seed, 1, wrap) if device is None else common.make_env("Hopper-v4", seed, 2)
        env = env if device is None else normalization.transform(env)
        collector = Collector(env, env.rand_action, frames_per_batch=40, total_frames=-1, track_traj_ids=False)
        state = {"episodes": EpisodeState(collector, 0), "normalization": normalization}
        return normalization, collector, VerifiedCheckpoint(**state)

    old, collector, checkpoint = build(0)
    next(iter(collector))
    path = checkpoint.save(tmp_path / "checkpoint")
    count, raw = float(old.statistics["observation"].count), []
    new, other, loaded = build(1)
    normalize = new.normalize if device else None
    if normalize:
        monkeypatch.setattr(new, "normalize", lambda rows: raw.append(rows.clone()) or normalize(rows))
    loaded.load(path)
    rows = 1 if device is None else 2
    assert float(new.statistics["observation"].count) == pytest.approx(count + rows)
    first = other._carrier["observation"]
    if normalize:
        torch.testing.assert_close(first, normalize(raw[-1]), rtol=1e-5, atol=1e-5)
        assert new._batch.undiscounted.tolist() == new._batch.discounted.tolist() == [0, 0]
        assert old._batch.undiscounted.min() > 0
    # by the few rows that a new run has seen, a first observation is 0 or next to it
    assert first.abs().max() > 0.1


def test_a_checkpoint_moves_between_batches_and_gymnasiums_wrappers():
    batched, wrapped = RunningNormalization(SPACE, **OPTIONS, device="cpu"), RunningNormalization(SPACE, **OPTIONS)
    rollout(batched.transform(common.make_env("Hopper-v4", 0, 2, clip_actions=True)), 30)
    wrapped.load_state_dict(batched.state_dict())
    again = RunningNormalization(SPACE, **OPTIONS, device="cpu")
    again.load_state_dict(wrapped.state_dict())
    raw = torch.randn(4, 11)
    torch.testing.assert_close(wrapped.normalize(raw), batched.normalize(raw))
    torch.testing.assert_close(again.normalize(raw), batched.normalize(raw))
