"""What runs in a worker: environments, a copy of the policy, and nothing that cannot be replaced."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.transforms import Compose
from torchrl.envs.utils import ExplorationType

from torchrl_pmoe.collectors.moments import Moments, begin_gathering, gathered
from torchrl_pmoe.collectors.transport import PolicyReceiver, Structure, freeze, from_array, thaw, to_array
from torchrl_pmoe.envs import NormalizeObservationAndReward
from torchrl_pmoe.envs.making import worker_fault
from torchrl_pmoe.runs.simulators import EpisodeState

__all__ = ["Answer", "Fault", "Order", "RolloutWorker", "WorkerSetup", "unpack_frames"]

_PackedFrames = list[tuple[Any, tuple[int, ...], torch.dtype, np.ndarray]]


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker is made from, the same for all workers of a run.

    Args:
        create_env: makes the environments of one worker, as one of batch size ``[]`` or ``[n]``.
        structure: of the policy, and of what makes the transforms that are appended to the environments.
        frames: that a worker collects for one answer.
        keys: of the frames that are sent; ``None`` for all.
    """

    create_env: Callable[[], EnvBase]
    structure: Structure
    frames: int
    keys: Sequence[NestedKey] | None = None


@dataclass(frozen=True)
class Order:
    """What a worker is asked for beside the weights.

    Args:
        random: take random actions.
        state: where the episodes go on; ``None`` where the worker stands there, or where ``seed`` is given.
        seed: begin new episodes from it.
        moments: the learner's running statistics, where there are any.
    """

    random: bool
    state: bytes | None = None
    seed: int | None = None
    moments: dict[str, Moments] | None = None


@dataclass(frozen=True)
class Answer:
    """The frames of one order.

    Args:
        frames: ``[n, T]``, packed.
        state: of the episodes after them, from which another worker can go on; ``None`` where it is not known.
        seen: by the running statistics meanwhile, where there are any.
    """

    frames: _PackedFrames
    state: bytes | None
    seen: dict[str, object] | None = None


@dataclass(frozen=True)
class Fault:
    """An error that was raised in a worker.

    Args:
        line: the error in one line.
        trace: its traceback.
    """

    line: str
    trace: str


class RolloutWorker:
    """Collects frames with the weights and from the states that each order names.

    Args:
        setup: of the run.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        self._collector: Collector | None = None

    def start(self) -> Fault | None:
        """Make the environments and the policy, if that was not done."""
        try:
            self._start()
        # an environment may raise anything
        except Exception as error:
            return self._fault(error)
        return None

    def collect(self, weights: Sequence[np.ndarray], order: Order) -> Answer | Fault:
        """Carry out one order.

        Args:
            weights: of the policy.
            order: where to begin.
        """
        try:
            self._start()
            return self._collect(weights, order)
        except Exception as error:
            return self._fault(error)

    def _start(self) -> None:
        if self._collector is not None:
            return
        torch.set_num_threads(1)
        # checking the parameters costs more than drawing the sample
        torch.distributions.Distribution.set_default_validate_args(False)
        env = self.setup.create_env()
        self._receiver = PolicyReceiver(self.setup.structure)
        policy, transforms = self._receiver.content
        for make in transforms:
            env = env.append_transform(make())
        self._normalization = _normalization(env)
        self._collector = Collector(
            env,
            policy,
            frames_per_batch=self.setup.frames,
            total_frames=-1,
            env_device=env.device or "cpu",
            policy_device="cpu",
            storing_device="cpu",
            exploration_type=ExplorationType.RANDOM,
            track_traj_ids=False,
            trust_policy=True,
            auto_register_policy_transforms=False,
        )
        self._episodes = EpisodeState(self._collector, seed=0)
        self._batches = iter(self._collector)

    def _collect(self, weights: Sequence[np.ndarray], order: Order) -> Answer:
        collector, normalization = self._collector, self._normalization
        assert collector is not None
        self._receiver.load(weights)
        if normalization is not None:
            assert order.moments is not None
            begin_gathering(normalization, order.moments)
        if order.state is not None:
            self._load_state(order.state)
        elif order.seed is not None:
            torch.manual_seed(order.seed)
            # environments may still draw from NumPy's global generator
            np.random.seed(order.seed)  # noqa: NPY002
            collector.env.set_seed(order.seed)
            collector.reset()
        collector.init_random_frames = sys.maxsize if order.random else 0
        frames: TensorDictBase = next(self._batches)
        if self.setup.keys is not None:
            frames = frames.select(*self.setup.keys)
        seen = None if normalization is None else gathered(normalization, order.moments or {})
        return Answer(_pack_frames(frames), self._state(), seen)

    def _state(self) -> bytes | None:
        episodes = self._episodes.state_dict()
        if not episodes["simulators"]["complete"]:
            return None
        name, numbers, *rest = np.random.get_state()  # noqa: NPY002
        state: dict[str, Any] = {
            "episodes": episodes,
            "torch": torch.get_rng_state(),
            "numpy": [str(name), torch.from_numpy(np.asarray(numbers).astype(np.int64)), *map(float, rest)],
        }
        if (one := self._normalization) is not None:
            state["returns"] = {"discounted": one._discounted, "undiscounted": one._undiscounted}
        return freeze(state)

    def _load_state(self, frozen: bytes) -> None:
        state = thaw(frozen)
        self._episodes.load_state_dict(state["episodes"])
        torch.set_rng_state(state["torch"])
        name, numbers, position, has_gauss, cached = state["numpy"]
        np.random.set_state(  # noqa: NPY002
            (name, numbers.numpy().astype(np.uint32), int(position), int(has_gauss), cached)
        )
        if (one := self._normalization) is not None:
            returns = state["returns"]
            one._discounted = returns["discounted"].to(one._discounted.device, copy=True)
            one._undiscounted = returns["undiscounted"].to(one._undiscounted.device, copy=True)

    def _fault(self, error: Exception) -> Fault:
        env = getattr(self._collector, "env", None)
        with suppress(Exception):
            if env is not None and (own := worker_fault(env)) is not None:
                return Fault(*own)
        words = " ".join(str(error).split())[:300]
        line = f"{type(error).__name__}: {words}" if words else type(error).__name__
        return Fault(line, "".join(traceback.format_exception(error)))


def _normalization(env: EnvBase) -> NormalizeObservationAndReward | None:
    if not isinstance(env, TransformedEnv):
        return None
    top: Any = env.transform
    for one in top if isinstance(top, Compose) else [top]:
        if isinstance(one, NormalizeObservationAndReward):
            return one
    return None


def _pack_frames(frames: TensorDictBase) -> _PackedFrames:
    # [*n, T] -> [n, T], where n is 1 for one environment
    frames = frames.reshape(-1, frames.shape[-1])
    return [(key, tuple(x.shape), x.dtype, to_array(x).copy()) for key, x in frames.items(True, True)]


def unpack_frames(packed: _PackedFrames) -> TensorDict:
    """The frames ``[n, T]``, in memory of their own."""
    entries: dict[Any, Tensor] = {key: from_array(array, shape, dtype) for key, shape, dtype, array in packed}
    frames = TensorDict({}, next(iter(entries.values())).shape[:2])
    for key, value in entries.items():
        frames.set(key, value)
    return frames
