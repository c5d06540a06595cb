"""Point agents, many at once, as a TorchRL environment over tensors."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.functional import pad
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_pmoe.envs.points.task import PointTask

__all__ = ["BatchedPointEnv"]


class BatchedPointEnv(EnvBase):
    """``num_envs`` agents of one task, stepped as one tensor on any device.

    Reads ``action`` ``[N, 2]``; writes ``observation`` ``[N, O]``, ``is_success`` ``[N, 1]`` (bool), ``reward``,
    ``done``, ``terminated`` and ``truncated``. A ``"_reset"`` mask resets its rows. Actions are clipped to their
    bounds. The agents' ``state`` ``[N, S]``, its view ``position`` ``[N, 2]`` and ``steps`` ``[N, 1]`` can be read and
    set.

    Args:
        task: over NumPy arrays.
        num_envs: ``N``.

    Keyword Args:
        max_episode_steps: steps after which an episode is truncated; the task's own if not given.
        seed: of the starts; drawn from torch's global generator if not given.
        device: of the tensors and of the generator of the starts.

    Raises:
        ValueError: for fewer than one agent or step.
    """

    def __init__(
        self,
        task: PointTask,
        num_envs: int,
        *,
        max_episode_steps: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = "cpu",
    ) -> None:
        max_episode_steps = task.max_episode_steps if max_episode_steps is None else max_episode_steps
        for name, value in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be an integer of at least 1, got {value!r}.")
        super().__init__(device="cpu" if device is None else device, batch_size=[num_envs])
        self.task: Any = task.as_tensors(self.device)
        self.max_episode_steps = max_episode_steps
        self.state: Tensor = torch.zeros(num_envs, task.state_size, device=self.device)
        self.steps: Tensor = torch.zeros(num_envs, 1, dtype=torch.int64, device=self.device)
        self._generator = torch.Generator(self.device)
        self.set_seed(int(torch.randint(2**31, ())) if seed is None else seed)

        high = torch.tensor(task.observation_high, device=self.device)
        high = high.expand(num_envs, *high.shape)
        flag = Categorical(2, shape=(num_envs, 1), dtype=torch.bool, device=self.device)
        self.observation_spec = Composite(
            observation=Bounded(-high, high), is_success=flag, shape=(num_envs,), device=self.device
        )
        self.action_spec = Bounded(-1.0, 1.0, (num_envs, 2), device=self.device)
        self.reward_spec = Unbounded((num_envs, 1), device=self.device)
        self.done_spec = Composite(
            done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=(num_envs,), device=self.device
        )

    @property
    def position(self) -> Tensor:
        """Positions of the agents, ``[N, 2]``, a view of their state; set ones stand still."""
        return self.state[:, :2]

    @position.setter
    def position(self, value: Tensor) -> None:
        self.state = self._at_rest(value)

    def to(self, device: torch.device | str | int) -> BatchedPointEnv:
        """Move the env; on another kind of device the starts are drawn anew from the same seed."""
        before = self.device
        super().to(device)
        if self.device != before:
            self.task = self.task.as_tensors(self.device)
            self.state = self.state.to(self.device)
            self.steps = self.steps.to(self.device)
            self._generator = torch.Generator(self.device).manual_seed(self._generator.initial_seed())
        return self

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)

    def _at_rest(self, position: Tensor) -> Tensor:
        return pad(position, (0, self.task.state_size - 2))

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        # drawn for every row, so that the draws of a row do not depend on which rows are reset
        start = self._at_rest(self._draw_starts())
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self.state, self.steps = start, torch.zeros_like(self.steps)
        else:
            mask = mask.view(-1, 1)  # [N, 1], beside states [N, S]
            self.state = torch.where(mask, start, self.state)
            self.steps = self.steps.masked_fill(mask, 0)
        return self._outcome()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.state, reward, _ = self.task.step(self.state, tensordict.get("action"))
        self.steps = self.steps + 1
        return self._outcome().set("reward", reward.unsqueeze(-1))

    @abstractmethod
    def _draw_starts(self) -> Tensor:
        """Where the agents would start, ``[N, 2]``, from the environment's generator."""

    def _outcome(self) -> TensorDict:
        ended = self.task.ended(self.state).unsqueeze(-1)  # [N] to [N, 1]
        truncated = self.steps >= self.max_episode_steps
        return TensorDict(
            {
                "observation": self.task.observe(self.state),
                "is_success": self.task.reached(self.state).unsqueeze(-1),
                "done": ended | truncated,
                "terminated": ended,
                "truncated": truncated,
            },
            batch_size=self.batch_size,
            device=self.device,
        )
