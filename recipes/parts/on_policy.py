"""What PPO and DAC share: minibatches, the falling learning rate, initial weights, the trainer's hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import LRSchedulerHook

from parts.training import build_trainer
from torchrl_pmoe.envs import NormalizeObservationAndReward
from torchrl_pmoe.trainers import MinibatchReplay, policy_diagnostics

NORMALIZATION = "normalization"
"""The name of the running statistics among the trainer's modules."""


class MinibatchSampler(SamplerWithoutReplacement):
    """TorchRL's; an order that is loaded comes to the frames, on whose device later ones are drawn.

    Args:
        device: of the frames.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = device

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the order of a checkpoint."""
        order = state_dict["_sample_list"]
        super().load_state_dict({**state_dict, "_sample_list": None if order is None else order.to(self.device)})


def build_buffer(frames: int, device: torch.device | str) -> TensorDictReplayBuffer:
    """Holds the last batch of frames and hands it out in a new order each time."""
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(frames, device=device),
        sampler=MinibatchSampler(device),
        batch_size=frames,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, batches: int, *, falling: bool
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate by collected batches: linearly to zero over all ``batches``, or constant."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda batch: max(0.0, 1.0 - batch / batches) if falling else 1.0
    )


def rescale(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Set the rates to what the schedule says now: those of a checkpoint belong to another ``total_frames``."""
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)


def branch_on_the_host(loss: ClipPPOLoss) -> ClipPPOLoss:
    """Make the bound of the value's move a plain number.

    TorchRL keeps it as a tensor and asks whether it is zero: that waits for a GPU and cuts a compiled update in six.
    """
    bound = None if loss.clip_value is None else float(loss.clip_value)
    del loss.clip_value
    loss.clip_value = bound
    return loss


def build_on_policy_trainer(
    run_dir: Path,
    *,
    collector: BaseCollector,
    buffer: TensorDictReplayBuffer,
    advantages: Callable[[TensorDictBase], TensorDictBase],
    trained_on: Sequence[str],
    normalization: NormalizeObservationAndReward,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    device: torch.device | str,
    num_minibatches: int,
    **kwargs: Any,
) -> Trainer:
    """The trainer with the hooks of on-policy learning.

    Args:
        run_dir: of the run.

    Keyword Args:
        collector: of frames.
        buffer: made by :func:`build_buffer`.
        advantages: writes them into a batch ``[*N, T]``.
        trained_on: what the updates read.
        normalization: of the environment.
        optimizer: of the loss.
        schedule: of its learning rates.
        device: of the updates.
        num_minibatches: updates of an epoch.
        **kwargs: of :func:`parts.training.build_trainer`.
    """
    trainer = build_trainer(
        run_dir, collector=collector, optimizer=optimizer, optim_steps_per_batch=num_minibatches, **kwargs
    )

    def estimate(batch: TensorDictBase) -> TensorDictBase:
        return advantages(batch.to(device)).select(*trained_on).reshape(-1)  # [*N, T] -> [N * T]

    trainer.register_op("batch_process", estimate)
    MinibatchReplay(buffer, num_minibatches).register(trainer)
    LRSchedulerHook(schedule).register(trainer)
    trainer.register_module(NORMALIZATION, normalization)
    # the order of the first epoch is drawn when the last one ends
    trainer.register_module("sampler", buffer.sampler)
    return trainer


def diagnose(
    actor: ProbabilisticActor, normalization: NormalizeObservationAndReward, seen: TensorDictBase
) -> dict[str, float]:
    """Return of the latest episodes, entropy and diagnostics of the policy in the states ``seen`` ``[B]``."""
    row = {"train_return": normalization.train_return()}
    with torch.no_grad():
        dist = actor.get_dist(seen)
        row["entropy"] = -dist.log_prob(dist.sample()).mean().item()
    return {**row, **policy_diagnostics(actor, seen)}
