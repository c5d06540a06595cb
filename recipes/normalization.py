"""Running statistics of observations and returns, for on-policy training."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers import (
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    TransformObservation,
    TransformReward,
)
from gymnasium.wrappers.utils import RunningMeanStd
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.transforms import Transform

EPSILON = 1e-8
# what Gymnasium's statistics count before the first observation
EPSILON_COUNT = 1e-4
RECENT_EPISODES = 100
# what a batch of environments has of the episodes that are under way or have just ended
RUNNING = ("discounted", "undiscounted", "ended")


class BatchMeanStd:
    """Gymnasium's ``RunningMeanStd`` for rows of tensors, on their device and without a look at their values.

    Args:
        shape: of one row.
        device: of the rows.
    """

    def __init__(self, shape: Sequence[int] = (), device: torch.device | str = "cpu") -> None:
        self.mean = torch.zeros(tuple(shape), dtype=torch.float64, device=device)
        self.var = torch.ones(tuple(shape), dtype=torch.float64, device=device)
        self.count = torch.full((), EPSILON_COUNT, dtype=torch.float64, device=device)

    def update(self, rows: Tensor, seen: Tensor | None = None) -> None:
        """Take in rows ``[N, *shape]``, or those where ``seen`` ``[N]`` holds."""
        rows = rows.double()
        weight = torch.ones_like(rows[:, :1] if rows.ndim > 1 else rows)
        if seen is not None:
            weight = weight * seen.reshape(weight.shape)
        number = weight.sum()
        mean = (rows * weight).sum(0) / number.clamp_min(1)
        var = ((rows - mean).square() * weight).sum(0) / number.clamp_min(1)
        delta, total = mean - self.mean, self.count + number
        moment = self.var * self.count + var * number + delta.square() * self.count * number / total
        self.mean, self.var, self.count = self.mean + delta * number / total, moment / total, total


class RunningNormalization:
    """Normalises observations and rewards with one set of statistics for all environments, kept in checkpoints.

    Gymnasium's wrappers do it for environments in this process (:meth:`wrap`), a TorchRL transform of the same
    formulas for batches of environments (:meth:`transform`).

    Observations become ``(o - mean) / std``, rewards are divided by the standard deviation of the discounted return;
    both are clipped.

    Args:
        space: of one observation.
        observation: whether observations are normalised.
        reward: whether rewards are.
        clip: bound on both after normalisation.
        gamma: discount of the return.
        device: of batches of environments; unset, for Gymnasium's wrappers.
    """

    def __init__(
        self,
        space: gym.spaces.Box,
        *,
        observation: bool,
        reward: bool,
        clip: float,
        gamma: float,
        device: torch.device | str | None = None,
    ) -> None:
        self.clip = clip
        self.gamma = gamma
        shapes = {"observation": space.shape} if observation else {}
        if reward:
            shapes["return"] = ()
        self.statistics: dict[str, RunningMeanStd | BatchMeanStd] = {
            name: RunningMeanStd(shape=shape) if device is None else BatchMeanStd(shape, device)
            for name, shape in shapes.items()
        }
        self.episode_returns: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._batch: NormalizeBatch | None = None

    def wrap(self, env: gym.Env) -> gym.Env:
        """The environment as it is trained on, its episodes' own returns recorded.

        Args:
            env: Gymnasium's.
        """
        env = RecordEpisodeStatistics(env)
        env.return_queue = self.episode_returns
        if "observation" in self.statistics:
            env = NormalizeObservation(env, EPSILON)
            env.obs_rms = self.statistics["observation"]  # type: ignore[assignment]
            env = TransformObservation(env, lambda o: np.clip(o, -self.clip, self.clip), env.observation_space)
        if "return" in self.statistics:
            env = NormalizeReward(env, self.gamma, EPSILON)
            env.return_rms = self.statistics["return"]  # type: ignore[assignment]
            env = TransformReward(env, lambda reward: min(max(float(reward), -self.clip), self.clip))
        return env

    def transform(self, env: EnvBase) -> EnvBase:
        """A batch of environments as it is trained on, its episodes' own returns recorded.

        Args:
            env: of batch size ``[N]``.
        """
        self._batch = NormalizeBatch(self, env)
        return TransformedEnv(env, self._batch)

    def train_return(self) -> float:
        """Mean return of the latest episodes: the last hundred, of batches those that ended since the last call."""
        if self._batch is not None:
            self.episode_returns.extend(self._batch.pop_returns())
        return float(np.mean(self.episode_returns)) if self.episode_returns else math.nan

    def normalize(self, observation: Tensor) -> Tensor:
        """Observations ``[*B, O]`` under the statistics as they stand, which do not move."""
        found = self.statistics.get("observation")
        if found is None:
            return observation
        mean, var = (torch.as_tensor(x, device=observation.device) for x in (found.mean, found.var))
        std = (var + EPSILON).sqrt()
        return ((observation - mean.to(observation.dtype)) / std.to(observation.dtype)).clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, Any]:
        """Mean, variance and count of everything that is normalised, and the returns of the latest episodes."""
        moments = {
            f"{name}.{moment}": torch.as_tensor(getattr(found, moment), dtype=torch.float64).clone()
            for name, found in self.statistics.items()
            for moment in ("mean", "var", "count")
        }
        running = {} if self._batch is None else {name: getattr(self._batch, name).clone() for name in RUNNING}
        return {**moments, **running, "episode_returns": torch.tensor(self.episode_returns, dtype=torch.float64)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the statistics of a checkpoint."""
        self.episode_returns.clear()
        self.episode_returns.extend(state_dict["episode_returns"].tolist())
        if self._batch is not None:
            for name in RUNNING:
                value = getattr(self._batch, name)
                setattr(self._batch, name, state_dict[name].to(value.device, copy=True))
        for name, found in self.statistics.items():
            for moment in ("mean", "var", "count"):
                value = state_dict[f"{name}.{moment}"]
                if isinstance(found, BatchMeanStd):
                    setattr(found, moment, value.to(found.mean.device, copy=True))
                else:
                    setattr(found, moment, float(value) if moment == "count" else value.cpu().numpy().copy())


class NormalizeBatch(Transform):
    """Gymnasium's ``NormalizeObservation`` and ``NormalizeReward`` for a batch of environments.

    Args:
        normalization: its statistics, moved by every step and by the rows that are reset.
        env: of batch size ``[N]``, with one ``observation`` ``[N, O]`` and ``reward`` ``[N, 1]``.
    """

    def __init__(self, normalization: RunningNormalization, env: EnvBase) -> None:
        super().__init__(in_keys=["observation", "reward"], out_keys=["observation", "reward"])
        self.normalization = normalization
        zeros = torch.zeros(env.batch_size, dtype=torch.float64, device=env.device)
        self.discounted, self.undiscounted = zeros, zeros.clone()
        self.ended = torch.zeros(2, dtype=torch.float64, device=env.device)

    def pop_returns(self) -> list[float]:
        """Mean return of the episodes that ended since the last call: one number, or none."""
        total, number = self.ended.tolist()
        self.ended = torch.zeros_like(self.ended)
        return [total / number] if number else []

    def _observe(self, tensordict: TensorDictBase, seen: Tensor | None = None) -> TensorDictBase:
        observation, found = tensordict.get("observation"), self.normalization.statistics.get("observation")
        if isinstance(found, BatchMeanStd):
            found.update(observation, seen)
        return tensordict.set("observation", self.normalization.normalize(observation))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        reward = next_tensordict.get("reward").squeeze(-1).double()
        done = next_tensordict.get("done").squeeze(-1).double()
        terminated = next_tensordict.get("terminated").squeeze(-1).double()
        self.undiscounted = self.undiscounted + reward
        self.ended = self.ended + torch.stack([(self.undiscounted * done).sum(), done.sum()])
        self.undiscounted = self.undiscounted * (1 - done)
        self.discounted = self.discounted * self.normalization.gamma * (1 - terminated) + reward
        found = self.normalization.statistics.get("return")
        if isinstance(found, BatchMeanStd):
            found.update(self.discounted)
            clip = self.normalization.clip
            scaled = (reward / (found.var + EPSILON).sqrt()).clamp(-clip, clip)
            next_tensordict.set("reward", scaled.float().unsqueeze(-1))
        return self._observe(next_tensordict)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        rows = tensordict.get("_reset", None)
        if rows is None:
            # all episodes are new, whatever those of a checkpoint had
            self.discounted = torch.zeros_like(self.discounted)
            self.undiscounted = torch.zeros_like(self.undiscounted)
        return self._observe(tensordict_reset, rows)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Observations of any size."""
        spec = observation_spec["observation"]
        observation_spec["observation"] = Unbounded(spec.shape, device=spec.device, dtype=spec.dtype)
        return observation_spec


class NormalizedPolicy(TensorDictModuleBase):
    """A policy of normalised observations as one that reads raw observations.

    Args:
        policy: trained on normalised observations.
        normalization: its statistics, read at every call and never updated.
    """

    def __init__(self, policy: TensorDictModuleBase, normalization: RunningNormalization) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.policy = policy
        self.normalization = normalization

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action``."""
        states = tensordict.select("observation")
        states["observation"] = self.normalization.normalize(states["observation"])
        return tensordict.set("action", self.policy(states)["action"])
