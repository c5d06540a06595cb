"""The target-reaching task for many agents at once, as a TorchRL environment over tensors."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_pmoe.envs.target_reaching.gymnasium_env import MAX_EPISODE_STEPS
from torchrl_pmoe.envs.target_reaching.task import CANDIDATES, TargetReachingTask

__all__ = ["BatchedTargetReachingEnv"]


class BatchedTargetReachingEnv(EnvBase):
    """``num_envs`` agents of :class:`TargetReachingEnv`, stepped as one tensor on any device.

    Reads ``action`` ``[N, 2]``; writes ``observation`` ``[N, 4]``, ``is_success`` ``[N, 1]`` (bool), ``reward``,
    ``done``, ``terminated`` and ``truncated``. A ``"_reset"`` mask resets its rows. Actions are clipped to their
    bounds. The agents' ``position`` ``[N, 2]`` and ``steps`` ``[N, 1]`` can be read and set.

    Args:
        num_envs: ``N``.
        layout: see :class:`TargetReachingTask`.

    Keyword Args:
        max_episode_steps: steps after which an episode is truncated.
        seed: of the starts; drawn from torch's global generator if not given.
        device: of the tensors and of the generator of the starts.
        **task: of :class:`TargetReachingTask`.

    Raises:
        ValueError: for fewer than one agent or step, and those of :class:`TargetReachingTask`.

    Examples:
        >>> BatchedTargetReachingEnv(8, layout="two").rollout(5)["next", "is_success"].shape
        torch.Size([8, 5, 1])
    """

    def __init__(
        self,
        num_envs: int,
        layout: Any = "one",
        *,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        seed: int | None = None,
        device: torch.device | str | None = "cpu",
        **task: Any,
    ) -> None:
        for name, value in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"BatchedTargetReachingEnv: {name} must be an integer of at least 1, got {value!r}.")
        # made before the environment: its errors name what is wrong with the task
        arrays = TargetReachingTask(layout, **task)
        super().__init__(device="cpu" if device is None else device, batch_size=[num_envs])
        self.task = arrays.as_tensors(self.device)
        self.max_episode_steps = max_episode_steps
        self.position: Tensor = self.task.starts[:1].repeat(num_envs, 1)
        self.steps: Tensor = torch.zeros(num_envs, 1, dtype=torch.int64, device=self.device)
        self._generator = torch.Generator(self.device)
        self.set_seed(int(torch.randint(2**31, ())) if seed is None else seed)

        high = torch.tensor([1.0, 1.0, 2.0, 2.0], device=self.device).expand(num_envs, 4)
        flag = Categorical(2, shape=(num_envs, 1), dtype=torch.bool, device=self.device)
        self.observation_spec = Composite(
            observation=Bounded(-high, high), is_success=flag, shape=(num_envs,), device=self.device
        )
        self.action_spec = Bounded(-1.0, 1.0, (num_envs, 2), device=self.device)
        self.reward_spec = Unbounded((num_envs, 1), device=self.device)
        self.done_spec = Composite(
            done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=(num_envs,), device=self.device
        )

    def to(self, device: torch.device | str | int) -> BatchedTargetReachingEnv:
        """Move the env; on another kind of device the starts are drawn anew from the same seed."""
        before = self.device
        super().to(device)
        if self.device != before:
            self.task = self.task.as_tensors(self.device)
            self.position = self.position.to(self.device)
            self.steps = self.steps.to(self.device)
            self._generator = torch.Generator(self.device).manual_seed(self._generator.initial_seed())
        return self

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        # drawn for every row, so that the draws of a row do not depend on which rows are reset
        start = self._draw_starts()
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self.position, self.steps = start, torch.zeros_like(self.steps)
        else:
            mask = mask.view(-1, 1)  # [N, 1], beside positions [N, 2]
            self.position = torch.where(mask, start, self.position)
            self.steps = self.steps.masked_fill(mask, 0)
        return self._outcome()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.position, reward, _ = self.task.step(self.position, tensordict.get("action"))
        self.steps = self.steps + 1
        return self._outcome().set("reward", reward.unsqueeze(-1))

    def _draw_starts(self) -> Tensor:
        number = self.batch_size[0]
        if self.task.random_starts:
            # the first free candidate of each row: no loop until all are free, whose length would depend on data
            shape = (number, CANDIDATES, 2)
            return self.task.place(torch.rand(shape, generator=self._generator, device=self.device))
        starts = self.task.starts
        return starts[torch.randint(len(starts), (number,), generator=self._generator, device=self.device)]

    def _outcome(self) -> TensorDict:
        reached = self.task.reached(self.position).unsqueeze(-1)  # [N] to [N, 1]
        truncated = self.steps >= self.max_episode_steps
        return TensorDict(
            {
                "observation": self.task.observe(self.position),
                "is_success": reached,
                "done": reached | truncated,
                "terminated": reached.clone(),
                "truncated": truncated,
            },
            batch_size=self.batch_size,
            device=self.device,
        )
