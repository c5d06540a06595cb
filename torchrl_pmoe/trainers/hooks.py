"""Hooks for :class:`torchrl.trainers.Trainer`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tensordict import NestedKey, TensorDictBase
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import ReplayBufferTrainer, TrainerHookBase
from tqdm import tqdm

from torchrl_pmoe.trainers.steppers import FusedOptimizationStepper

__all__ = ["FiniteBatch", "FiniteLoss", "FlatReplay", "NonFiniteError", "PeriodicEvaluation", "ProgressBar"]


class NonFiniteError(RuntimeError):
    """A reward, an observation or a loss is NaN or infinite: nothing sensible can follow."""


class FlatReplay(ReplayBufferTrainer):
    """TorchRL's :class:`ReplayBufferTrainer`, for single steps that stay on the device where they were collected.

    The parent takes every batch to the host before it stores it.
    """

    def extend(self, batch: TensorDictBase) -> TensorDictBase:
        """Store the steps of a collected batch, one a row, and return them so."""
        batch = batch.reshape(-1)
        self.replay_buffer.extend(batch)
        return batch


class _StatelessHook(TrainerHookBase):
    _trainer: Trainer

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        del state_dict


class FiniteBatch(_StatelessHook):
    """Stops the run with :class:`NonFiniteError` before a bad batch reaches the replay buffer.

    Args:
        keys: the entries of the collected batch to look at.
    """

    def __init__(self, keys: Sequence[NestedKey]) -> None:
        self.keys = tuple(keys)
        self._frames = 0

    def __call__(self, batch: TensorDictBase) -> None:
        """Look at a collected batch."""
        for key in self.keys:
            if not batch.get(key).isfinite().all():
                name = key if isinstance(key, str) else ".".join(key)
                raise NonFiniteError(
                    f"the environment returned a NaN or infinite {name} between frames {self._frames} and "
                    f"{self._frames + batch.numel()}: the run stops here"
                )
        self._frames += batch.numel()

    def register(self, trainer: Trainer, name: str = "finite_batch") -> None:
        """Register ahead of whatever stores the batch."""
        trainer.register_op("batch_process", self)


class FiniteLoss(_StatelessHook):
    """Stops the run with :class:`NonFiniteError` when a loss has left the finite numbers.

    The sums of the stepper are read once per collected batch, not once per update.
    """

    def __init__(self, stepper: FusedOptimizationStepper) -> None:
        self.stepper = stepper

    def __call__(self) -> None:
        """Look at the sums of the losses."""
        if not self.stepper.finite():
            bad = [key for key, value in self.stepper.means().items() if not abs(value) < float("inf")]
            raise NonFiniteError(
                f"{', '.join(bad)} became NaN or infinite before frame {self._trainer.collected_frames}: "
                "the run stops here"
            )

    def register(self, trainer: Trainer, name: str = "finite_loss") -> None:
        """Register after the updates of a batch."""
        self._trainer = trainer
        trainer.register_op("post_steps", self)


class PeriodicEvaluation(_StatelessHook):
    """Calls ``evaluate(frames)`` whenever another ``interval`` frames were collected, and at the end.

    Args:
        evaluate: called with the number of frames collected so far.
        interval: frames between two calls.
    """

    def __init__(self, evaluate: Callable[[int], None], interval: int) -> None:
        self.evaluate = evaluate
        self.interval = interval
        self._last = 0

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        """Evaluate if it is time."""
        frames = self._trainer.collected_frames
        if frames // self.interval > self._last // self.interval or frames >= self._trainer.total_frames:
            self._last = frames
            self.evaluate(frames)

    def state_dict(self) -> dict[str, Any]:
        """The frame of the last evaluation."""
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the frame of the last evaluation."""
        self._last = state_dict["last"]

    def register(self, trainer: Trainer, name: str = "periodic_evaluation") -> None:
        """Register after the updates of a batch, and with the checkpoint."""
        self._trainer = trainer
        trainer.register_op("post_steps_log", self)
        trainer.register_module(name, self)


class ProgressBar(_StatelessHook):
    """A bar of frames and frames per second, with the numbers of ``status`` beside it.

    Args:
        total_frames: the length of the bar.
        status: returns what is shown behind the bar, after every collected batch.
        initial: frames that an earlier run has collected.
        disable: show nothing.
    """

    def __init__(
        self, total_frames: int, status: Callable[[], dict[str, str]], *, initial: int = 0, disable: bool = False
    ) -> None:
        self.status = status
        # a log file gets a line now and then, a terminal a bar that moves
        self._interval = 0.2 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=total_frames, initial=initial, unit="frames", mininterval=self._interval, disable=disable
        )
        self._shown = 0.0

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        """Move on by a collected batch."""
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            self._bar.set_postfix(self.status(), refresh=False)
        self._bar.update(0 if batch is None else batch.numel())

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.set_postfix(self.status(), refresh=False)
        self._bar.close()

    def register(self, trainer: Trainer, name: str = "progress_bar") -> None:
        """Register after evaluation, so that the bar shows its result."""
        trainer.register_op("post_steps_log", self)
        trainer.register_op("shutdown", self.close)
