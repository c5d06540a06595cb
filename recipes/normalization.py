"""Running statistics of observations and returns, for on-policy training."""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers import (
    ClipAction,
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

EPSILON = 1e-8
RECENT_EPISODES = 100


class RunningNormalization:
    """Gymnasium's normalising wrappers around several environments, with one set of statistics, kept in checkpoints.

    Observations become ``(o - mean) / std``, rewards are divided by the standard deviation of the discounted return;
    both are clipped.

    Args:
        space: of one observation.
        observation: whether observations are normalised.
        reward: whether rewards are.
        clip: bound on both after normalisation.
        gamma: discount of the return.
    """

    def __init__(self, space: gym.spaces.Box, *, observation: bool, reward: bool, clip: float, gamma: float) -> None:
        self.clip = clip
        self.gamma = gamma
        self.statistics: dict[str, RunningMeanStd] = {}
        if observation:
            self.statistics["observation"] = RunningMeanStd(shape=space.shape)
        if reward:
            self.statistics["return"] = RunningMeanStd()
        self.episode_returns: deque[float] = deque(maxlen=RECENT_EPISODES)

    def wrap(self, env: gym.Env, *, clip_action: bool) -> gym.Env:
        """The environment as it is trained on, its episodes' own returns recorded.

        Args:
            env: Gymnasium's.
            clip_action: take unbounded actions and clip them into the bounds.
        """
        env = RecordEpisodeStatistics(env)
        env.return_queue = self.episode_returns
        if clip_action:
            env = ClipAction(env)
        if "observation" in self.statistics:
            env = NormalizeObservation(env, EPSILON)
            env.obs_rms = self.statistics["observation"]
            env = TransformObservation(env, lambda o: np.clip(o, -self.clip, self.clip), env.observation_space)
        if "return" in self.statistics:
            env = NormalizeReward(env, self.gamma, EPSILON)
            env.return_rms = self.statistics["return"]
            env = TransformReward(env, lambda reward: min(max(float(reward), -self.clip), self.clip))
        return env

    def normalize(self, observation: Tensor) -> Tensor:
        """Observations ``[*B, O]`` under the statistics as they stand, which do not move."""
        found = self.statistics.get("observation")
        if found is None:
            return observation
        mean = observation.new_tensor(found.mean)
        std = observation.new_tensor(np.sqrt(found.var + EPSILON))
        return ((observation - mean) / std).clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, Any]:
        """Mean, variance and count of everything that is normalised."""
        return {
            f"{name}.{moment}": torch.as_tensor(getattr(found, moment), dtype=torch.float64).clone()
            for name, found in self.statistics.items()
            for moment in ("mean", "var", "count")
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the statistics of a checkpoint."""
        for name, found in self.statistics.items():
            found.mean = state_dict[f"{name}.mean"].numpy().copy()
            found.var = state_dict[f"{name}.var"].numpy().copy()
            found.count = float(state_dict[f"{name}.count"])


class NormalizedPolicy(TensorDictModuleBase):
    """A policy in an environment without wrappers: reads raw observations, writes actions inside the bounds.

    Args:
        policy: trained on normalised observations.
        normalization: its statistics, read at every call and never updated.
        low: lower bound of the action.
        high: upper bound of the action.
    """

    def __init__(
        self, policy: TensorDictModuleBase, normalization: RunningNormalization, low: Tensor, high: Tensor
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.policy = policy
        self.normalization = normalization
        self.low, self.high = low, high

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action``."""
        states = tensordict.select("observation")
        states["observation"] = self.normalization.normalize(states["observation"])
        return tensordict.set("action", self.policy(states)["action"].clamp(self.low, self.high))
