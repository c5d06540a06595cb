"""The multi-goal task for many agents at once, as a TorchRL environment over tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_pmoe.envs.multi_goal.task import MultiGoalTask
from torchrl_pmoe.envs.points import BatchedPointEnv

__all__ = ["BatchedMultiGoalEnv"]


class BatchedMultiGoalEnv(BatchedPointEnv):
    """``num_envs`` agents of :class:`MultiGoalEnv`, stepped as one tensor on any device.

    For keys and attributes see :class:`BatchedTargetReachingEnv`; ``env.task.goal`` says from the last observations of
    episodes which goals they reached.

    Args:
        num_envs: ``N``.

    Keyword Args:
        max_episode_steps: steps after which an episode is truncated; 30 if not given.
        seed: of the starts; drawn from torch's global generator if not given.
        device: of the tensors and of the generator of the starts.
        **task: of :class:`MultiGoalTask`.

    Raises:
        ValueError: for fewer than one agent or step, and those of :class:`MultiGoalTask`.

    Examples:
        >>> rollout = BatchedMultiGoalEnv(8).rollout(30, break_when_any_done=False)
        >>> BatchedMultiGoalEnv(8).task.goal(rollout["next", "observation"]).shape
        torch.Size([8, 30])
    """

    def __init__(
        self,
        num_envs: int,
        *,
        max_episode_steps: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = "cpu",
        **task: float,
    ) -> None:
        super().__init__(MultiGoalTask(**task), num_envs, max_episode_steps=max_episode_steps, seed=seed, device=device)

    def _draw_starts(self) -> Tensor:
        shape = (self.batch_size[0], 2)
        return self.task.place(torch.randn(shape, generator=self._generator, device=self.device))
