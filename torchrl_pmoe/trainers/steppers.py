"""Optimisation steppers for :class:`torchrl.trainers.Trainer`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper

__all__ = ["MeanLossStepper"]


class MeanLossStepper(OptimizationStepper):
    """One optimiser step on the sum of all ``loss_*`` terms, without a host synchronisation.

    The ``Trainer``'s own stepper reads the gradient norm back after every update and averages every
    output of the loss one by one. This one adds the one-element outputs to a running sum on the device, to be
    read when they are wanted, and calls the ``post_loss`` and ``process_loss`` hooks, which the
    ``Trainer`` skips when it is given a stepper.

    Args:
        clip_apart: groups of parameters whose gradients are clipped to the trainer's ``clip_norm`` by their own norm;
            the parameters in none of them are clipped together.
    """

    def __init__(self, clip_apart: Sequence[Iterable[nn.Parameter]] = ()) -> None:
        self._apart = [list(group) for group in clip_apart]
        self._keys: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Update the trainer's parameters once from ``sub_batch``."""
        losses = trainer.compute_loss(sub_batch)
        trainer._post_loss_hook(sub_batch)
        losses = trainer._process_loss_hook(sub_batch, losses)
        sum(value for key, value in losses.items() if key.startswith("loss")).backward()
        if trainer.clip_norm is not None:
            clip = nn.utils.clip_grad_norm_ if trainer.clip_grad_norm else nn.utils.clip_grad_value_
            for group in self._clip_groups(trainer):
                clip(group, trainer.clip_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        self._accumulate(losses)
        return TensorDict()

    def _clip_groups(self, trainer: Trainer) -> list[list[nn.Parameter]]:
        apart = {id(parameter) for group in self._apart for parameter in group}
        every = (parameter for group in trainer.optimizer.param_groups for parameter in group["params"])
        return [[parameter for parameter in every if id(parameter) not in apart], *self._apart]

    @torch.no_grad()
    def _accumulate(self, losses: TensorDictBase) -> None:
        if self._sum is None:
            self._keys = [key for key, value in losses.items() if value.numel() == 1]
        values = torch.stack([losses.get(key).detach().reshape(()) for key in self._keys])
        self._sum = values if self._sum is None else self._sum.add_(values)
        self._count += 1

    def finite(self) -> bool:
        """Whether every one-element output of the loss has been a finite number since :meth:`reset`."""
        return self._sum is None or bool(self._sum.isfinite().all())

    def means(self) -> dict[str, float]:
        """Mean of every one-element output of the loss since :meth:`reset` (empty before the first update)."""
        if self._sum is None:
            return {}
        return dict(zip(self._keys, (self._sum / self._count).tolist(), strict=True))

    def reset(self) -> None:
        """Start new means."""
        self._sum, self._count = None, 0
