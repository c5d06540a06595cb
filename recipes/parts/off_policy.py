"""What SAC with one agent and with many share: loss, replay buffer, diagnostics."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torchrl
from tensordict import TensorDictBase
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import SACLoss
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import SelectKeys

from parts.errors import UsageError
from torchrl_pmoe import PMOESACLoss
from torchrl_pmoe.objectives import score_proposals
from torchrl_pmoe.trainers import FlatReplay, policy_diagnostics

STORED = ["observation", "action", *[("next", key) for key in ("observation", "reward", "done", "terminated")]]
"""What a replay buffer keeps of a frame."""
LOSS_COLUMNS = ("loss_actor", "loss_qvalue", "loss_alpha", "loss_routing", "alpha", "entropy")
NEEDED_TO_RESUME = {"replay_buffer": "the replay buffer (checkpoint.replay_buffer=true)"}
DIAGNOSED_STATES = 1000


def build_loss(
    actor: ProbabilisticActor,
    qvalue: ValueOperator,
    *,
    gamma: float,
    sac: Mapping[str, Any],
    routing: Mapping[str, Any] | None,
) -> SACLoss:
    """``PMOESACLoss`` where the critics score the experts, else TorchRL's unmodified ``SACLoss``.

    Args:
        actor: the policy.
        qvalue: a critic; the loss makes two of it.

    Keyword Args:
        gamma: discount.
        sac: arguments of ``SACLoss``.
        routing: those that ``PMOESACLoss`` has besides; ``None`` for ``SACLoss``.
    """
    loss = SACLoss(actor, qvalue, **sac) if routing is None else PMOESACLoss(actor, qvalue, **routing, **sac)
    loss.make_value_estimator(gamma=gamma)
    return loss


def build_replay_buffer(
    size: int,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    scratch_dir: str | None = None,
    prioritized: bool = False,
) -> TensorDictReplayBuffer:
    """A buffer of single steps, uniform or prioritised.

    Args:
        size: steps.
        batch_size: of a sample.

    Keyword Args:
        device: of the steps, where they are kept in memory.
        scratch_dir: keeps them in files there.
        prioritized: sample by TD error.

    Raises:
        UsageError: where prioritised replay does not work here.
    """
    storage: LazyTensorStorage = (
        LazyTensorStorage(size, device=device)
        if scratch_dir is None
        # a run that goes on finds the files of the one before, and fills them from its checkpoint
        else LazyMemmapStorage(size, scratch_dir=scratch_dir, existsok=True)
    )
    if not prioritized:
        return TensorDictReplayBuffer(storage=storage, batch_size=batch_size)
    try:
        return TensorDictPrioritizedReplayBuffer(alpha=0.7, beta=0.5, storage=storage, batch_size=batch_size)
    except RuntimeError as error:
        raise UsageError(
            f"replay_buffer.prb=True: must be false with torch {torch.__version__}, with which the compiled "
            f"extension of torchrl {torchrl.__version__} does not load (docs: versions)"
        ) from error


def latest(buffer: TensorDictReplayBuffer) -> TensorDictBase:
    """The steps that were stored last."""
    stop, number = buffer.write_count, min(len(buffer), DIAGNOSED_STATES)
    return buffer.storage.get(torch.arange(stop - number, stop) % buffer.storage.max_size)


def diagnose(actor: ProbabilisticActor, loss: SACLoss, states: TensorDictBase) -> dict[str, float]:
    """Diagnostics of a policy in the states that it has met, its proposals judged by the critics."""
    return policy_diagnostics(actor, states, lambda action: score_proposals(loss, states, action, per_critic=True))


def some(buffer: TensorDictReplayBuffer) -> TensorDictBase:
    """Steps drawn from all that are stored."""
    return buffer[torch.randint(len(buffer), (DIAGNOSED_STATES,))]


def replay_steps(trainer: Trainer, buffer: TensorDictReplayBuffer, device: str, *, prioritized: bool) -> None:
    """Store single steps of every collected batch, and sample batches of them for the updates.

    Args:
        trainer: of the run.
        buffer: of the steps.
        device: of the updates.

    Keyword Args:
        prioritized: hand the priorities of an update back to the buffer.
    """
    SelectKeys(STORED).register(trainer)
    replay = FlatReplay(buffer, device=None if device == "cpu" else device)
    trainer.register_op("batch_process", replay.extend)
    trainer.register_op("process_optim_batch", replay.sample)
    if prioritized:
        with warnings.catch_warnings():
            # "will be replaced by OptimizationStepper": ours calls this hook
            warnings.simplefilter("ignore", FutureWarning)
            trainer.register_op("post_loss", replay.update_priority)
