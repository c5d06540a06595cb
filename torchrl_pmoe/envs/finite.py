"""Environments that return NaN or infinite numbers now and then, for runs that are to go on without those steps."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import Binary, Composite
from torchrl.envs import EnvBase, GymWrapper
from torchrl.envs.gym_like import default_info_dict_reader
from torchrl.envs.transforms import Transform

__all__ = ["NONFINITE", "FiniteStep", "FiniteSteps", "read_nonfinite"]

NONFINITE = "nonfinite"
"""The entry of ``next`` (of Gymnasium's ``info``) that marks a bad step."""


class FiniteSteps(gymnasium.Wrapper):
    """Ends the episode, truncated, at a step with a NaN or infinite observation or reward.

    Such a step returns the observation before it, the reward 0 and ``info["nonfinite"] = [True]``, which tells a run
    to leave it out (:class:`~torchrl_pmoe.trainers.FiniteBatch`). It belongs inside whatever keeps statistics of
    observations.

    Raises:
        FloatingPointError: if an episode begins with such an observation.
    """

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(**kwargs)
        if not np.isfinite(observation).all():
            raise FloatingPointError("the environment's first observation of an episode is NaN or infinite")
        self._last = observation
        return observation, {**info, NONFINITE: _mark(False)}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if np.isfinite(observation).all() and math.isfinite(reward):
            self._last = observation
            return observation, float(reward), terminated, truncated, {**info, NONFINITE: _mark(False)}
        return self._last, 0.0, False, True, {**info, NONFINITE: _mark(True)}


def _mark(bad: bool) -> np.ndarray:
    # TorchRL reads arrays alone
    return np.array([bad])


def read_nonfinite(env: GymWrapper) -> EnvBase:
    """Let TorchRL write the mark of :class:`FiniteSteps` into ``next``."""
    spec = Composite({NONFINITE: Binary(1, shape=(1,), dtype=torch.bool)}, shape=env.batch_size)
    return env.set_info_dict_reader(default_info_dict_reader([NONFINITE], spec=spec))


class FiniteStep(Transform):
    """:class:`FiniteSteps` for a batch of environments: fixed shapes, on their device, no look at a value.

    Reads and writes ``observation`` ``[*B, O]``, ``reward``, ``done``, ``terminated`` and ``truncated`` ``[*B, 1]``;
    writes ``nonfinite`` ``[*B, 1]``.
    """

    def __init__(self) -> None:
        super().__init__(in_keys=["observation"], out_keys=[NONFINITE])

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        observation, reward = next_tensordict.get("observation"), next_tensordict.get("reward")
        bad = ~(observation.isfinite().all(-1, keepdim=True) & reward.isfinite())
        next_tensordict.set("observation", torch.where(bad, tensordict.get("observation"), observation))
        next_tensordict.set("reward", reward.masked_fill(bad, 0))
        next_tensordict.set("terminated", next_tensordict.get("terminated") & ~bad)
        for key in ("done", "truncated"):
            if (ended := next_tensordict.get(key, None)) is not None:
                next_tensordict.set(key, ended | bad)
        return next_tensordict.set(NONFINITE, bad)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return tensordict_reset.set(NONFINITE, torch.zeros_like(tensordict_reset.get("done")))

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """The mark is there too."""
        shape = observation_spec.shape
        mark = Binary(1, shape=(*shape, 1), dtype=torch.bool, device=observation_spec.device)
        return observation_spec.set(NONFINITE, mark) or observation_spec
