"""Running normalisation of observations and rewards, for on-policy training: one transform for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.data import Composite, Unbounded
from torchrl.envs.transforms import Transform

from torchrl_pmoe.envs.returns import keep_latest

__all__ = ["NormalizeObservationAndReward", "NormalizedPolicy", "RunningMoments", "normalize_observation"]

EPSILON = 1e-8
# what Gymnasium's statistics count before the first observation
_INITIAL_COUNT = 1e-4
RECENT_EPISODES = 100


def _doubles(*tensors: Tensor) -> list[Any]:
    """Tensors in float64 for formulas of a few numbers: on the host as NumPy's arrays, which take a fifth of the time.

    Gradients stay out.
    """
    if tensors[0].device.type != "cpu":
        return [tensor.detach().double() for tensor in tensors]
    plain = (tensor.detach() if tensor.requires_grad else tensor for tensor in tensors)
    return [tensor.numpy().astype(np.float64, copy=False) for tensor in plain]


def _put(tensor: Tensor, value: Any) -> None:
    """Write the result of such a formula into a tensor."""
    if tensor.device.type == "cpu":
        tensor.numpy()[...] = value
    else:
        tensor.copy_(value)


class RunningMoments(nn.Module):
    """Mean and variance of all rows that were ever seen, as Gymnasium's ``RunningMeanStd`` computes them.

    On the device of the rows, in float64. They change in place: clone what is to be kept.

    Args:
        shape: of one row.
        device: of the rows.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: torch.Size | tuple[int, ...] = (), device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64, device=device))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64, device=device))
        self.register_buffer("count", torch.full((), _INITIAL_COUNT, dtype=torch.float64, device=device))

    def update(self, rows: Tensor, seen: Tensor | None = None) -> None:
        """Take in rows ``[N, *shape]``, or those of them where ``seen`` ``[N]`` holds."""
        mean, var, count, new = _doubles(self.mean, self.var, self.count, rows)
        if seen is None:
            number = len(new)
            new_mean = new.sum(0) / number  # [*shape]
            new_var = ((new - new_mean) ** 2).sum(0) / number
        else:
            (weight,) = _doubles(seen)
            weight = weight.reshape(-1, *(1 for _ in self.mean.shape))  # [N, 1], or [N] for scalar rows
            number = weight.sum()
            at_least_one = number + (number == 0)
            new_mean = (new * weight).sum(0) / at_least_one
            new_var = ((new - new_mean) ** 2 * weight).sum(0) / at_least_one
        delta, total = new_mean - mean, count + number
        share = number / total
        # the buffers stay where they are: to put new ones in costs more than all of the above
        _put(self.var, var * (1 - share) + new_var * share + delta**2 * (share * (1 - share)))
        _put(self.mean, mean + delta * share)
        _put(self.count, total)


class NormalizeObservationAndReward(Transform):
    """Normalises observations and rewards by running statistics that all environments share.

    Observations become ``(o - mean) / std``, rewards are divided by the standard deviation of the discounted return;
    both are clipped. The formulas are those of Gymnasium's ``NormalizeObservation`` and ``NormalizeReward``; every step
    and every reset updates the statistics. Everything that is kept, the episodes under way included, is in
    ``state_dict``.

    Append it to an environment of batch size ``[]`` or ``[N]``, with one ``observation`` ``[*N, O]`` and ``reward``
    ``[*N, 1]``.

    Args:
        observation: normalise observations.
        reward: normalise rewards.
        clip: bound of both after normalisation.
        gamma: discount of the return.

    Examples:
        >>> env = make_env("Pendulum-v1", num_envs=2).append_transform(NormalizeObservationAndReward())
        >>> env.rollout(100)["observation"].abs().max() <= 10
        tensor(True)
    """

    def __init__(
        self, *, observation: bool = True, reward: bool = True, clip: float = 10.0, gamma: float = 0.99
    ) -> None:
        super().__init__(in_keys=["observation", "reward"], out_keys=["observation", "reward"])
        self.normalizes_observation, self.normalizes_reward = observation, reward
        self.clip, self.gamma = clip, gamma
        self.returns = RunningMoments()
        # as keep_latest takes them
        self.register_buffer("_recent", torch.full((RECENT_EPISODES + 1,), math.nan, dtype=torch.float64))
        self.register_buffer("_ended", torch.zeros((), dtype=torch.int64))
        self._recent: Tensor
        self._ended: Tensor
        self._discounted: Tensor
        self._undiscounted: Tensor

    def set_container(self, container: nn.Module) -> None:
        """Make the statistics in the shapes and on the device of the environment.

        Raises:
            ValueError: where the transform belongs to an environment already.
        """
        super().set_container(container)
        env = self.parent
        if env is None or hasattr(self, "observations"):
            return
        shape = env.observation_spec["observation"].shape
        self.observations = RunningMoments(shape[len(env.batch_size) :])
        zeros = torch.zeros(env.batch_size, dtype=torch.float64)
        # the returns of the episodes under way, [*N]
        self.register_buffer("_discounted", zeros)
        self.register_buffer("_undiscounted", zeros.clone())
        self.to(env.device)

    def train_return(self) -> float:
        """Mean return of the last hundred episodes that have ended, not normalised; nan before the first."""
        return self._recent[:-1].nanmean().item()

    def normalize(self, observation: Tensor) -> Tensor:
        """Observations ``[*B, O]`` under the statistics as they stand, which do not move."""
        if not self.normalizes_observation:
            return observation
        return normalize_observation(observation, self.observations.mean, self.observations.var, self.clip)

    def _observe(self, tensordict: TensorDictBase, seen: Tensor | None = None) -> TensorDictBase:
        if not self.normalizes_observation:
            return tensordict
        observation = tensordict.get("observation")
        self.observations.update(observation.reshape(-1, observation.shape[-1]), seen)
        return tensordict.set("observation", self.normalize(observation))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        reward, done = next_tensordict.get("reward"), next_tensordict.get("done")
        undiscounted, discounted, earned, ended, terminated = _doubles(
            self._undiscounted, self._discounted, reward, done, next_tensordict.get("terminated")
        )
        earned, ended, terminated = (x.reshape(discounted.shape) for x in (earned, ended, terminated))  # [*N]
        undiscounted = undiscounted + earned
        _put(self._undiscounted, undiscounted)
        # on the host a look costs less than to write what nobody will read
        if done.device.type != "cpu" or ended.any():
            self._recent, self._ended = keep_latest(
                self._recent, self._ended, self._undiscounted.reshape(-1), done.reshape(-1)
            )
        _put(self._undiscounted, undiscounted * (1 - ended))
        # as in Gymnasium, a truncated episode's return runs on into the next one
        _put(self._discounted, discounted * self.gamma * (1 - terminated) + earned)
        if self.normalizes_reward:
            self.returns.update(self._discounted.reshape(-1))
            (var,) = _doubles(self.returns.var)
            scaled = (earned / (var + EPSILON) ** 0.5).clip(-self.clip, self.clip)
            next_tensordict.set("reward", torch.as_tensor(scaled, dtype=reward.dtype).reshape(reward.shape))
        return self._observe(next_tensordict)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        rows = tensordict.get("_reset", None)
        if rows is None:
            # all episodes are new, whatever those of a checkpoint had
            self._discounted.zero_()
            self._undiscounted.zero_()
        return self._observe(tensordict_reset, None if rows is None else rows.reshape(-1))

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Observations of any size."""
        spec = observation_spec["observation"]
        observation_spec["observation"] = Unbounded(spec.shape, device=spec.device, dtype=spec.dtype)
        return observation_spec

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """Rewards of any size."""
        spec = reward_spec["reward"]
        reward_spec["reward"] = Unbounded(spec.shape, device=spec.device, dtype=spec.dtype)
        return reward_spec


def normalize_observation(observation: Tensor, mean: Tensor, var: Tensor, clip: float) -> Tensor:
    """Observations ``[*B, O]`` as ``(o - mean) / std``, within ``[-clip, clip]``; ``mean`` and ``var`` are ``[O]``."""
    mean, std = (x.to(observation.device, observation.dtype) for x in (mean, (var + EPSILON).sqrt()))
    return ((observation - mean) / std).clamp(-clip, clip)


class NormalizedPolicy(TensorDictModuleBase):
    """A policy of normalised observations as one that reads raw observations.

    Args:
        policy: trained on normalised observations.
        normalize: from raw to normalised observations, :meth:`NormalizeObservationAndReward.normalize`.
    """

    def __init__(self, policy: TensorDictModuleBase, normalize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys
        self.policy = policy
        self.normalize = normalize

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write what the policy writes; the observation stays as it is."""
        raw = tensordict.get("observation")
        acted = self.policy(tensordict.copy().set("observation", self.normalize(raw)))
        return acted.set("observation", raw)
