"""The normalising transform against Gymnasium's own wrappers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from gymnasium.wrappers.utils import RunningMeanStd
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import DoubleToFloat, GymWrapper, SerialEnv, TransformedEnv

from torchrl_pmoe.envs import make_env, normalize_actions
from torchrl_pmoe.envs.making import make_gym_env
from torchrl_pmoe.envs.normalization import (
    EPSILON,
    NormalizedPolicy,
    NormalizeObservationAndReward,
    RunningMoments,
)
from torchrl_pmoe.runs import EpisodeState, SimulatorState, VerifiedCheckpoint

OPTIONS = {"clip": 2.0, "gamma": 0.9}


def hopper(num_envs=1, seed=0, **options):
    """Hopper under the transform, and the transform."""
    normalization = NormalizeObservationAndReward(**{**OPTIONS, **options})
    env = make_env("Hopper-v4", num_envs=num_envs, seed=seed, clip_actions=True)
    return env.append_transform(normalization), normalization


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
    theirs, ours = RunningMeanStd(shape=(3,)), RunningMoments((3,))
    for rows in (1, 4, 4, 2):
        batch = rng.normal(2, 3, (rows, 3))
        theirs.update(batch)
        ours.update(torch.as_tensor(batch))
    for moment in ("mean", "var", "count"):
        np.testing.assert_allclose(getattr(ours, moment), getattr(theirs, moment), rtol=1e-12)


def test_rows_that_are_not_seen_leave_no_trace():
    rows = torch.randn(5, 3, dtype=torch.float64)
    seen = torch.tensor([[True], [False], [True], [False], [False]])
    masked, selected, untouched = RunningMoments((3,)), RunningMoments((3,)), RunningMoments((3,))
    masked.update(rows, seen)
    selected.update(rows[[0, 2]])
    untouched.update(rows, torch.zeros_like(seen))
    torch.testing.assert_close(masked.mean, selected.mean)
    torch.testing.assert_close(masked.var, selected.var)
    torch.testing.assert_close(untouched.var, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch of one"])
def test_one_environment_is_normalised_as_by_gymnasiums_wrappers(batched):
    wrapped = NormalizeReward(NormalizeObservation(make_gym_env("Hopper-v4"), EPSILON), OPTIONS["gamma"], EPSILON)
    reference = normalize_actions(TransformedEnv(GymWrapper(wrapped), DoubleToFloat()), clip=True)
    reference.set_seed(0)
    # seeding has reset the environment once already
    wrapped.return_rms, wrapped.env.obs_rms = RunningMeanStd(shape=()), RunningMeanStd(shape=(11,))
    theirs = rollout(reference, 200)
    normalization = NormalizeObservationAndReward(**OPTIONS)
    env = make_env("Hopper-v4", clip_actions=True)
    if batched:
        env = SerialEnv(1, lambda: make_env("Hopper-v4", clip_actions=True))
    env.set_seed(0)
    ours = rollout(env.append_transform(normalization), 200)
    assert ours["next", "done"].sum() > 5
    for key in ("observation", ("next", "observation"), ("next", "reward")):
        expected = theirs[key].clamp(-OPTIONS["clip"], OPTIONS["clip"])
        torch.testing.assert_close(ours[key].reshape_as(expected), expected, rtol=1e-4, atol=1e-5)
    assert ours["next", "observation"].abs().max() == OPTIONS["clip"]
    for found, kept in ((normalization.observations, wrapped.env.obs_rms), (normalization.returns, wrapped.return_rms)):
        for moment in ("mean", "var", "count"):
            np.testing.assert_allclose(getattr(found, moment), getattr(kept, moment), rtol=1e-6, atol=1e-8)


def test_rows_share_their_statistics_and_a_reset_row_counts_alone():
    env, normalization = hopper(3)
    frames = rollout(env, 60)
    resets = int(frames["next", "done"].sum())
    assert resets > 0
    # every row's first observation, three a step, and one for each reset
    assert float(normalization.observations.count) == pytest.approx(3 + 3 * 60 + resets, abs=1e-3)
    assert float(normalization.returns.count) == pytest.approx(3 * 60, abs=1e-3)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_train_return_is_the_mean_of_the_last_hundred_episodes(num_envs, monkeypatch):
    monkeypatch.setattr("torchrl_pmoe.envs.normalization.RECENT_EPISODES", 4)
    env, normalization = hopper(num_envs, observation=False, reward=False)
    assert np.isnan(normalization.train_return())
    returns, running = [], torch.zeros(num_envs)
    for step in rollout(env, 120):
        running = running + step["next", "reward"].reshape(-1)
        done = step["next", "done"].reshape(-1)
        returns += running[done].tolist()
        running = running * ~done
    assert len(returns) > 4
    assert normalization.train_return() == pytest.approx(np.mean(returns[-4:]), rel=1e-5)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_after_a_resume_new_episodes_are_normalised_by_the_statistics_that_were_loaded(num_envs, tmp_path, monkeypatch):
    """As a run begins them whose environment's state is not kept: the checkpoint has the episodes before the rest."""
    monkeypatch.setattr(SimulatorState, "complete", False)

    def build(seed):
        env, normalization = hopper(num_envs, seed)
        collector = Collector(
            env, env.rand_action, frames_per_batch=20 * num_envs, total_frames=-1, track_traj_ids=False
        )
        return (
            normalization,
            collector,
            VerifiedCheckpoint(episodes=EpisodeState(collector, 0), normalization=normalization),
        )

    old, collector, checkpoint = build(0)
    next(iter(collector))
    path = checkpoint.save(tmp_path / "checkpoint")
    count, raw = float(old.observations.count), []
    new, other, loaded = build(1)
    normalize = new.normalize
    monkeypatch.setattr(new, "normalize", lambda rows: raw.append(rows.clone()) or normalize(rows))
    loaded.load(path)
    assert float(new.observations.count) == pytest.approx(count + num_envs)
    first = other._carrier["observation"]
    torch.testing.assert_close(first, normalize(raw[-1]), rtol=1e-5, atol=1e-5)
    assert not new._undiscounted.any()
    assert not new._discounted.any()
    assert old._undiscounted.all()
    # by the few rows that a new run has seen, a first observation is 0 or next to it
    assert first.abs().max() > 0.1


def test_a_policy_of_normalised_observations_reads_raw_ones_and_leaves_them_as_they_are():
    env, normalization = hopper()
    rollout(env, 30)

    def act(td):
        return td.set("action", td["observation"][..., :3])

    act.in_keys, act.out_keys = ["observation"], ["action"]
    raw = torch.randn(4, 11)
    mean, var = normalization.observations.mean, normalization.observations.var
    acted = NormalizedPolicy(act, normalization.normalize)(batch_of(raw))
    torch.testing.assert_close(acted["observation"], raw)
    expected = ((raw.double() - mean) / (var + EPSILON).sqrt()).clamp(-2, 2).float()
    torch.testing.assert_close(acted["action"], expected[:, :3], rtol=1e-4, atol=1e-5)


def batch_of(observation):
    return TensorDict(observation=observation, batch_size=observation.shape[:1])
