"""What happens to numbers that are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import TrainerHookBase

__all__ = ["BAD_IN_A_ROW", "FiniteBatch", "FiniteLoss", "NonFiniteError", "OnNonFinite", "check_choice"]

OnNonFinite = Literal["stop", "skip"]

BAD_IN_A_ROW = 100
"""Updates that may be skipped one after the other; then the run stops."""


class NonFiniteError(RuntimeError):
    """A reward, an observation, an action, a loss or a gradient is NaN or infinite: nothing sensible can follow."""


def check_choice(owner: str, on_nonfinite: str) -> OnNonFinite:
    """``on_nonfinite`` itself.

    Raises:
        ValueError: if it is no choice.
    """
    if on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"{owner}: on_nonfinite={on_nonfinite!r} must be 'stop' or 'skip'.")
    return on_nonfinite  # type: ignore[return-value]


class FiniteBatch(TrainerHookBase):
    """Stops the run at a bad frame, before that reaches a replay buffer or an advantage.

    An action that is NaN or infinite in a state that is not is the policy's fault, anything else the environment's: the
    error says whose.

    Frames on a GPU are judged there; the host looks at the result once in ``look_every`` batches.

    Args:
        keys: the entries of the collected batch ``[*B, T]`` to look at.
        look_every: see above.
        action_key: the policy's action, looked at where it is there.
    """

    def __init__(
        self, keys: Sequence[NestedKey], *, look_every: int = BAD_IN_A_ROW, action_key: NestedKey = "action"
    ) -> None:
        self.keys = tuple(keys)
        self.action_key = action_key
        self.look_every = look_every
        self._frames = 0
        self._looked_at = 0
        self._batches = 0
        self._bad: Tensor | None = None
        self._diverged: Tensor | None = None

    def __call__(self, batch: TensorDictBase) -> None:
        """Look at a collected batch.

        Raises:
            NonFiniteError: for a bad frame.
        """
        if self._surely_finite(batch):
            self._frames += batch.numel()
            self._looked_at = self._frames
            self._batches += 1
            return
        flags = torch.stack([_bad_rows(batch, key) for key in self.keys])
        start, self._frames = self._frames, self._frames + batch.numel()
        self._batches += 1
        on_host = flags.device.type == "cpu"
        self._judge_policy(batch, flags, start)
        found = flags.flatten(1).any(1)
        self._bad = found if self._bad is None else self._bad | found
        if on_host or self._batches % self.look_every == 0:
            self._look(start if on_host else self._looked_at)
            self._looked_at = self._frames

    def _surely_finite(self, batch: TensorDictBase) -> bool:
        """On the host: whether the sum of each entry is finite, as it is of all but the largest finite numbers."""
        entries = [batch.get(key) for key in self.keys]
        action = batch.get(self.action_key, None)
        if action is not None:
            entries.append(action)
        if any(entry.device.type != "cpu" for entry in entries):
            return False
        return all(math.isfinite(entry.sum(dtype=torch.float64)) for entry in entries)

    def _judge_policy(self, batch: TensorDictBase, flags: Tensor, start: int) -> None:
        """Find actions ``[*B, T]`` that are bad where what the policy has read is not."""
        read = [flag for key, flag in zip(self.keys, flags, strict=True) if isinstance(key, str) or key[0] != "next"]
        if not read or batch.get(self.action_key, None) is None:
            return
        bad = _bad_rows(batch, self.action_key) & ~torch.stack(read).any(0)
        found = bad.any()
        self._diverged = found if self._diverged is None else self._diverged | found
        if found.device.type == "cpu":
            self._look_at_the_policy(start)
        elif self._batches % self.look_every == 0:
            self._look_at_the_policy(self._looked_at)

    def _look_at_the_policy(self, start: int) -> None:
        if self._diverged is not None and self._diverged:
            raise NonFiniteError(
                f"the policy returned a NaN or infinite {_name(self.action_key)} in a finite state, "
                f"between frames {start} and {self._frames}: the run stops here"
            )

    def _look(self, start: int) -> None:
        assert self._bad is not None
        names = [_name(key) for key, bad in zip(self.keys, self._bad.tolist(), strict=True) if bad]
        if names:
            raise NonFiniteError(
                f"the environment returned a NaN or infinite {names[0]} between frames {start} and {self._frames}: "
                "the run stops here"
            )

    def state_dict(self) -> dict[str, Any]:
        """How many frames there were.

        Raises:
            NonFiniteError: for bad frames on a GPU that nobody has looked at yet; a checkpoint would hide them.
        """
        self._look_at_the_policy(self._looked_at)
        if self._bad is not None:
            self._look(self._looked_at)
        return {"frames": self._frames}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._frames = self._looked_at = state_dict["frames"]

    def register(self, trainer: Trainer, name: str = "finite_batch") -> None:
        """Register ahead of whatever stores the batch, and with the checkpoint."""
        trainer.register_op("batch_process", self)
        trainer.register_module(name, self)


class FiniteLoss(TrainerHookBase):
    """Looks at what :class:`FusedOptimizationStepper` has found of bad updates on a GPU, once in many updates.

    On a CPU the stepper itself does so in every update.

    Args:
        stepper: of the trainer.
        look_every: updates between two looks.
    """

    def __init__(self, stepper: Any, *, look_every: int = BAD_IN_A_ROW) -> None:
        self.stepper = stepper
        self.look_every = look_every
        self._looked_at = 0

    def __call__(self) -> None:
        """Look, if it is time.

        Raises:
            NonFiniteError: as :meth:`FusedOptimizationStepper.check`.
        """
        if self.stepper.updates - self._looked_at >= self.look_every:
            self._looked_at = self.stepper.updates
            self.stepper.check()

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""
        del state_dict

    def register(self, trainer: Trainer, name: str = "finite_loss") -> None:
        """Register after the updates of a batch."""
        trainer.register_op("post_steps", self)


def _bad_rows(batch: TensorDictBase, key: NestedKey) -> Tensor:
    finite = batch.get(key).isfinite()
    return ~(finite.flatten(batch.ndim).all(-1) if finite.ndim > batch.ndim else finite)


def _name(key: NestedKey) -> str:
    return key if isinstance(key, str) else ".".join(key)
