"""Hooks for :class:`torchrl.trainers.Trainer`."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import ReplayBufferTrainer, TrainerHookBase
from tqdm import tqdm

from torchrl_pmoe.envs.returns import keep_latest

__all__ = ["EpisodeReturns", "ExpertCollapse", "FlatReplay", "MinibatchReplay", "PeriodicEvaluation", "ProgressBar"]


class FlatReplay(ReplayBufferTrainer):
    """TorchRL's :class:`ReplayBufferTrainer`, for single steps that stay on the device where they were collected.

    The parent takes every batch to the host before it stores it.
    """

    def extend(self, batch: TensorDictBase) -> TensorDictBase:
        """Store the steps of a collected batch, one a row, and return them so."""
        batch = batch.reshape(-1)
        self.replay_buffer.extend(batch)
        return batch


class MinibatchReplay(FlatReplay):
    """Hands out the frames of the last batch in minibatches, each frame once an epoch.

    The frames are put into the order of an epoch at once, and the minibatches are views of them: to draw each for
    itself takes as long as half of its update.

    Args:
        replay_buffer: holds the frames of one batch; its sampler draws their order, without replacement.
        num_minibatches: of an epoch; it divides the number of frames.
    """

    def __init__(self, replay_buffer: TensorDictReplayBuffer, num_minibatches: int) -> None:
        super().__init__(replay_buffer)
        self.num_minibatches = num_minibatches
        self._minibatches: Iterator[TensorDictBase] = iter(())

    def shuffle(self, batch: TensorDictBase) -> TensorDictBase:
        """Draw the order of an epoch.

        Raises:
            ValueError: where the frames cannot be shared out evenly.
        """
        frames = len(self.replay_buffer)
        if frames % self.num_minibatches:
            raise ValueError(
                f"MinibatchReplay: the {frames} frames of a batch must be a multiple of "
                f"num_minibatches={self.num_minibatches}."
            )
        self._minibatches = iter(self.replay_buffer.sample(frames).split(frames // self.num_minibatches))
        return batch

    def sample(self, batch: TensorDictBase) -> TensorDictBase:
        """The next minibatch ``[frames // num_minibatches]``."""
        return next(self._minibatches)

    def register(self, trainer: Trainer, name: str = "replay_buffer") -> None:
        """Register where batches are stored, epochs begin, and minibatches are asked for."""
        del name  # a batch that was learned from is not kept
        trainer.register_op("batch_process", self.extend)
        trainer.register_op("pre_epoch", self.shuffle)
        trainer.register_op("process_optim_batch", self.sample)


class _StatelessHook(TrainerHookBase):
    _trainer: Trainer

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        del state_dict


class ExpertCollapse(_StatelessHook):
    """Warns once when one expert has taken over, and says what to do.

    Args:
        usage: returns the mean router probabilities ``[K]`` over states that the policy has met lately.
        share: of the most used expert, from which on it has taken over.
        frames: how long that must last.
        look_every: frames between two looks, each of which costs a pass through the policy and a copy to the host.
        advice: completes the warning.
    """

    def __init__(
        self,
        usage: Callable[[], Tensor],
        *,
        share: float = 0.99,
        frames: int = 10_000,
        look_every: int = 1_000,
        advice: str = "a floor under the router's probabilities (PMOEActor(floor=0.05)) brings the others back",
    ) -> None:
        self.usage = usage
        self.share = share
        self.frames = frames
        self.look_every = look_every
        self.advice = advice
        self._looked = 0
        self._since: int | None = None
        self._expert = -1
        self._warned = False

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        """Look, if it is time."""
        now = self._trainer.collected_frames
        if self._warned or now - self._looked < self.look_every:
            return
        self._looked = now
        usage = self.usage().tolist()
        if len(usage) < 2:
            return  # one expert has nobody to take over from
        largest = max(usage)
        expert = usage.index(largest)
        if largest <= self.share:
            self._since = None
        elif self._since is None or expert != self._expert:
            self._since, self._expert = now, expert
        elif now - self._since >= self.frames:
            self._warned = True
            warnings.warn(
                f"expert {expert} of {len(usage)} has had {100 * largest:.1f} % of the router's probability since "
                f"frame {self._since}: {self.advice}.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Since when which expert has taken over."""
        return {"looked": self._looked, "since": self._since, "expert": self._expert, "warned": self._warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on watching."""
        self._looked, self._since = state_dict["looked"], state_dict["since"]
        self._expert, self._warned = state_dict["expert"], state_dict["warned"]

    def register(self, trainer: Trainer, name: str = "expert_collapse") -> None:
        """Register after the updates of a batch, and with the checkpoint."""
        self._trainer = trainer
        trainer.register_op("post_steps_log", self)
        trainer.register_module(name, self)


class EpisodeReturns(_StatelessHook):
    """Keeps the returns of the training episodes that have ended, without a look at any value.

    Args:
        recent: how many are kept.
        num_envs: of all batches, where each batch has the frames of some environments only and tells which in
            ``("collector", "environment")``; if not given, as many as the first batch has.
    """

    def __init__(self, recent: int = 100, num_envs: int | None = None) -> None:
        self.recent = recent
        self.num_envs = num_envs
        self._running: Tensor | None = None
        self._returns: Tensor | None = None
        self._ended: Tensor | None = None

    def __call__(self, batch: TensorDictBase) -> None:
        """Take in a collected batch ``[*N, T]``."""
        steps = batch.shape[-1]
        reward = batch["next", "reward"].reshape(-1, steps).double()  # [N, T]
        done = batch["next", "done"].reshape(-1, steps)
        if self._running is None:
            self._running = reward.new_zeros(self.num_envs or len(reward))
            self._returns = reward.new_full((self.recent + 1,), math.nan)
            self._ended = torch.zeros((), dtype=torch.int64, device=reward.device)
        assert self._returns is not None
        assert self._ended is not None
        running = self._running.to(reward.device)
        which = batch.get(("collector", "environment"), None)
        rows = slice(None) if which is None else which.reshape(-1, steps)[:, 0]  # [N]
        # on the host a look costs less than to write what nobody will read
        if done.device.type == "cpu" and not done.any():
            self._running = running.clone()
            self._running[rows] += reward.sum(-1)
            return
        total = reward.cumsum(-1) + running[rows].unsqueeze(-1)
        # where the episode before each step's own has ended: -1 if that was before this batch
        end = torch.where(done, torch.arange(steps, device=done.device), -1).cummax(-1).values  # [N, T]
        before = torch.cat([end.new_full((len(end), 1), -1), end[:, :-1]], -1)
        returns = total - _total_at(total, before)
        self._running = running.clone()
        self._running[rows] = total[:, -1] - _total_at(total, end)[:, -1]
        # [N, T] -> [T * N], in the order of time
        ended, returns = done.t().reshape(-1), returns.t().reshape(-1)
        kept, count = self._returns.to(returns.device), self._ended.to(returns.device)
        self._returns, self._ended = keep_latest(kept, count, returns, ended)

    def mean(self) -> float:
        """Mean over the episodes that are kept; nan before the first has ended."""
        return math.nan if self._returns is None else self._returns[:-1].nanmean().item()

    def state_dict(self) -> dict[str, Any]:
        """The episodes under way, and those that have ended."""
        return {"running": self._running, "returns": self._returns, "ended": self._ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._running, self._returns = state_dict["running"], state_dict["returns"]
        self._ended = state_dict["ended"]

    def register(self, trainer: Trainer, name: str = "episode_returns") -> None:
        """Register ahead of whatever takes keys out of the batch, and with the checkpoint."""
        trainer.register_op("batch_process", self)
        trainer.register_module(name, self)


def _total_at(total: Tensor, index: Tensor) -> Tensor:
    """Entries of ``total`` ``[N, T]`` at ``index`` ``[N, T]``; 0 where that is -1."""
    return torch.where(index >= 0, total.gather(-1, index.clamp_min(0)), 0)


class PeriodicEvaluation(_StatelessHook):
    """Calls ``evaluate(frames)`` whenever another ``interval`` frames were collected, and at the end.

    Args:
        evaluate: called with the number of frames collected so far; ``False`` says that it did not come to its end, and
            stays due.
        interval: frames between two calls.
    """

    def __init__(self, evaluate: Callable[[int], bool | None], interval: int) -> None:
        self.evaluate = evaluate
        self.interval = interval
        self._last = 0

    def __call__(self, batch: TensorDictBase | None = None) -> None:
        """Evaluate if it is time."""
        frames = self._trainer.collected_frames
        if frames // self.interval > self._last // self.interval or frames >= self._trainer.total_frames:
            self.now()

    def now(self) -> None:
        """Evaluate, whether it is time or not."""
        frames = self._trainer.collected_frames
        if self.evaluate(frames) is not False:
            self._last = frames

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
        begun: whether updates are at their usual speed. Frames before that (random ones, and the one in which updates
            are compiled) say nothing of the time that is left, and do not count for it.
        disable: show nothing.
    """

    def __init__(
        self,
        total_frames: int,
        status: Callable[[], dict[str, str]],
        *,
        initial: int = 0,
        begun: Callable[[], bool] = lambda: False,
        disable: bool = False,
    ) -> None:
        self.status = status
        self.begun: Callable[[], bool] | None = begun
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
        if self.begun is not None and self.begun():
            self.begun = None
            self._bar.initial = self._bar.n
            self._bar.start_t = self._bar.last_print_t = time.time()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.set_postfix(self.status(), refresh=False)
        self._bar.close()

    def register(self, trainer: Trainer, name: str = "progress_bar") -> None:
        """Register after evaluation, so that the bar shows its result."""
        trainer.register_op("post_steps_log", self)
        trainer.register_op("shutdown", self.close)
