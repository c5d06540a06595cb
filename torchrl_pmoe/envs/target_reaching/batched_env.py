"""The target-reaching task for many agents at once, as a TorchRL environment over tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchrl_pmoe.envs.points import BatchedPointEnv
from torchrl_pmoe.envs.target_reaching.task import CANDIDATES, TargetReachingTask

__all__ = ["BatchedTargetReachingEnv"]


class BatchedTargetReachingEnv(BatchedPointEnv):
    """``num_envs`` agents of :class:`TargetReachingEnv`, stepped as one tensor on any device.

    Reads ``action`` ``[N, 2]``; writes ``observation`` ``[N, O]``, ``is_success`` ``[N, 1]`` (bool), ``reward``,
    ``done``, ``terminated`` and ``truncated``. A ``"_reset"`` mask resets its rows. Actions are clipped to their
    bounds. The agents' ``position`` ``[N, 2]`` and ``steps`` ``[N, 1]`` can be read and set.

    Args:
        num_envs: ``N``.
        layout: see :class:`TargetReachingTask`.

    Keyword Args:
        max_episode_steps: steps after which an episode is truncated; 100, or 200 of ``"paper"``, if not given.
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
        max_episode_steps: int | None = None,
        seed: int | None = None,
        device: torch.device | str | None = "cpu",
        **task: Any,
    ) -> None:
        super().__init__(
            TargetReachingTask(layout, **task),
            num_envs,
            max_episode_steps=max_episode_steps,
            seed=seed,
            device=device,
        )

    def _draw_starts(self) -> Tensor:
        number = self.batch_size[0]
        if self.task.random_starts:
            # the first free candidate of each row: no loop until all are free, whose length would depend on data
            shape = (number, CANDIDATES, 2)
            return self.task.place(torch.rand(shape, generator=self._generator, device=self.device))
        starts = self.task.starts
        return starts[torch.randint(len(starts), (number,), generator=self._generator, device=self.device)]
