"""Frames from Ray actors, each of which may die and be replaced at any time."""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase
from torchrl.envs.transforms import Transform
from tqdm import tqdm

from torchrl_pmoe.collectors.moments import Moments, add_gathered, moments_of
from torchrl_pmoe.collectors.session import connect
from torchrl_pmoe.collectors.transport import PolicySender, freeze, thaw
from torchrl_pmoe.collectors.worker import Answer, Fault, Order, RolloutWorker, WorkerSetup, unpack_frames
from torchrl_pmoe.envs import EnvironmentFault, NormalizeObservationAndReward
from torchrl_pmoe.envs.vector import cores

__all__ = ["EpisodesOfWorkers", "ReplaceableRayCollector", "WorkerError"]


class WorkerError(RuntimeError):
    """A worker that died again and again; its own traceback, where it has left one, is the ``__cause__``."""


@dataclass
class _Worker:
    """One worker as the learner sees it.

    Args:
        index: its number.
        state: of its episodes after the last frames that were handed out; ``None`` where others must begin.
        rounds: how many times its frames were handed out.
        there: whether the actor's own episodes stand where ``state`` says.
        deaths: since its last answer.
    """

    index: int
    state: bytes | None = None
    rounds: int = 0
    there: bool = False
    deaths: int = 0
    actor: Any = None
    pending: Any = None
    weights: Any = None
    order: Order | None = None
    deadline: float = 0.0


class ReplaceableRayCollector(BaseCollector):
    """Collects frames in Ray actors, for a learner in this process; TorchRL's ``Trainer`` takes it as its collector.

    The weights of the policy, with all that it holds, travel with every request as one Ray object; the answer brings
    the frames and the state of the worker's episodes (simulators, what the policy reads next, random generators). So a
    worker holds nothing that is not here too. One that dies, or does not answer, is replaced by a new one that gets the
    same request, and one line says so. Frames are handed out once each.

    With ``sync`` all workers collect with the same weights, and a batch holds the frames of all of them, in their
    order: two runs have equal frames. So has a run whose workers die, where the state of the environments is known
    (:class:`~torchrl_pmoe.runs.SimulatorState`); elsewhere new episodes begin, from a seed made of ``seed``, the worker
    and its round. Without ``sync`` a worker that is done goes on at once, with the weights of that moment, and a batch
    holds the frames of one worker.

    Args:
        create_env: makes the environments of one worker, of batch size ``[]`` or ``[n]``; sent with cloudpickle. The
            modules that it names must be installed where the workers are.
        policy: on any device; acts on the CPU in the workers.

    Keyword Args:
        num_envs: of all workers, a multiple of ``num_workers``: ``N``.
        num_workers: Ray actors.
        frames_per_batch: a multiple of ``num_envs``. A batch is ``[N, T]`` with ``sync``, else ``[n, T]``, and then
            ``("collector", "environment")`` ``[n, T]`` tells which environments.
        total_frames: after so many it ends; -1 for never.
        init_random_frames: by random actions first.
        seed: of the run.
        sync: see above.
        transforms: each makes a transform, which is appended to a worker's environments.
        normalization: the learner's own, if ``transforms`` makes one: its statistics gather what all workers see.
        keys: of the frames that are sent; all of them if not given.
        env: what is to be found as ``env``: an environment of the same specs, not stepped here.
        address: of a Ray cluster, see :func:`~torchrl_pmoe.collectors.connect`.
        patience: seconds without an answer after which a worker counts as dead.
        max_restarts: how many times in a row a worker is replaced before it is given up.
        report: gets one line for every worker that is replaced.

    Raises:
        ClusterError: where there is no Ray.
        EnvironmentFault: where a worker cannot make its environments.
        ValueError: for numbers that do not fit each other.

    Examples:
        >>> create_env = partial(make_env, "Pendulum-v1", num_envs=4)
        >>> collector = ReplaceableRayCollector(create_env, actor, num_envs=8, num_workers=2, frames_per_batch=64)
        >>> next(iter(collector)).shape
        torch.Size([8, 8])
        >>> collector.shutdown()
    """

    def __init__(
        self,
        create_env: Callable[[], EnvBase],
        policy: TensorDictModuleBase,
        *,
        num_envs: int,
        num_workers: int,
        frames_per_batch: int,
        total_frames: int = -1,
        init_random_frames: int = 0,
        seed: int = 0,
        sync: bool = True,
        transforms: Sequence[Callable[[], Transform]] = (),
        normalization: NormalizeObservationAndReward | None = None,
        keys: Sequence[NestedKey] | None = None,
        env: EnvBase | None = None,
        address: str | None = None,
        patience: float = 300.0,
        max_restarts: int = 3,
        report: Callable[[str], None] = tqdm.write,
    ) -> None:
        super().__init__()
        if num_envs % num_workers:
            raise ValueError(f"num_envs={num_envs} must be a multiple of num_workers={num_workers}.")
        if frames_per_batch % num_envs:
            raise ValueError(f"frames_per_batch={frames_per_batch} must be a multiple of num_envs={num_envs}.")
        self.policy, self.env, self.normalization = policy, env, normalization
        self.requested_frames_per_batch = frames_per_batch
        self.total_frames = float("inf") if total_frames < 0 else total_frames
        self.init_random_frames = init_random_frames
        self.seed, self.sync, self.num_envs = seed, sync, num_envs
        self.patience, self.max_restarts, self.report = patience, max_restarts, report
        self.episodes = EpisodesOfWorkers(self)
        self._frames = 0
        self._workers = [_Worker(index) for index in range(num_workers)]
        local = address in (None, "local")
        self._owns_ray = connect(address, num_cpus=max(num_workers, cores()) if local else None)
        self._started_here = self._owns_ray and local
        import ray

        self._ray: Any = ray
        self._actor_class = ray.remote(RolloutWorker)
        try:
            # a transform may hold parts of the policy, on whatever device
            self._sender = PolicySender((policy, tuple(transforms)))
            frames = frames_per_batch // num_workers if sync else frames_per_batch
            self._setup = ray.put(WorkerSetup(create_env, self._sender.structure, frames, keys))
        except Exception as error:
            self.shutdown()
            raise EnvironmentFault(
                f"create_env, transforms and policy: must be such that cloudpickle can send them ({_one_line(error)})"
            ) from error
        self._begin()

    @property
    def actors(self) -> list[Any]:
        """The handles of the workers that there are now."""
        return [worker.actor for worker in self._workers]

    # -------------------------------------------------------------------------------------------- the workers

    def _begin(self) -> None:
        """Make all workers and their environments, before any work."""
        # a Ray that was started here shares out as many as there are workers
        there = cores() if self._started_here else int(self._ray.cluster_resources().get("CPU", 0))
        if len(self._workers) > there:
            warnings.warn(
                f"{len(self._workers)} workers share {there} cores: more workers than cores make nothing faster",
                stacklevel=3,
            )
        free = int(self._ray.available_resources().get("CPU", 0))
        for worker in self._workers:
            worker.actor = self._make_actor(1 if worker.index < free else 0)
        begun = {worker.actor.start.remote(): worker for worker in self._workers}
        try:
            for reference, worker in begun.items():
                try:
                    fault = self._ray.get(reference, timeout=self.patience)
                except self._ray.exceptions.RayError as error:
                    raise EnvironmentFault(f"worker {worker.index} cannot start: {_death(error)}") from error
                if isinstance(fault, Fault):
                    line = f"worker {worker.index} cannot make its environments: {fault.line}"
                    raise EnvironmentFault(line) from RuntimeError(f"in worker {worker.index}:\n{fault.trace}")
        except BaseException:
            self.shutdown()
            raise

    def _make_actor(self, num_cpus: int) -> Any:
        options = self._actor_class.options(num_cpus=num_cpus, max_restarts=0, scheduling_strategy="SPREAD")
        return options.remote(self._setup)

    def _order(self, worker: _Worker, moments: dict[str, Moments] | None, random: bool) -> Order:
        if worker.there:
            return Order(random, moments=moments)
        return self._from_scratch(worker, Order(random, moments=moments))

    def _from_scratch(self, worker: _Worker, order: Order) -> Order:
        """The same order for an actor that knows nothing."""
        if worker.state is not None:
            return replace(order, state=worker.state, seed=None)
        return replace(order, state=None, seed=seed_of(self.seed, worker.index, worker.rounds))

    def _send(self, worker: _Worker, weights: Any, order: Order) -> None:
        worker.weights, worker.order = weights, order
        worker.pending = worker.actor.collect.remote(weights, order)
        worker.deadline = time.monotonic() + self.patience

    def _receive(self) -> tuple[_Worker, Answer]:
        """The next answer of any worker; workers that die meanwhile are replaced."""
        while True:
            waiting = {worker.pending: worker for worker in self._workers if worker.pending is not None}
            left = min(worker.deadline for worker in waiting.values()) - time.monotonic()
            done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=max(0.0, left))
            for reference in done:
                worker, cause = waiting[reference], None
                try:
                    answer = self._ray.get(reference, timeout=self.patience)
                except self._ray.exceptions.RayError as error:
                    line = _death(error)
                else:
                    if isinstance(answer, Answer):
                        # until its frames are accepted, the actor is ahead of what is known here
                        worker.pending, worker.there, worker.deaths = None, False, 0
                        return worker, answer
                    line, cause = answer.line, RuntimeError(f"in worker {worker.index}:\n{answer.trace}")
                self._replace(worker, line, cause)
            if not done:
                for worker in waiting.values():
                    if worker.deadline <= time.monotonic():
                        self._replace(worker, f"no answer for {self.patience:g} s", None)

    def _replace(self, worker: _Worker, why: str, cause: Exception | None) -> None:
        """Put a new actor in the place of one that is lost, with the same order.

        Raises:
            WorkerError: if that was done too often.
        """
        worker.deaths += 1
        if worker.deaths > self.max_restarts:
            again = f", after {self.max_restarts} restarts" if self.max_restarts else ""
            raise WorkerError(f"worker {worker.index} is given up{again}: {why}") from cause
        self.report(f"worker {worker.index} is replaced at frame {self._frames:,}, no frame is lost: {why}")
        with suppress(Exception):
            self._ray.kill(worker.actor)
        free = self._ray.available_resources().get("CPU", 0)
        worker.actor, worker.there = self._make_actor(1 if free >= 1 else 0), False
        assert worker.order is not None
        self._send(worker, worker.weights, self._from_scratch(worker, worker.order))

    # --------------------------------------------------------------------------------------------- the frames

    def iterator(self) -> Iterator[TensorDictBase]:
        """Batches of frames, until there are ``total_frames``."""
        for worker in self._workers:
            if worker.pending is not None:
                # an answer that nobody has asked for any more
                worker.pending, worker.there = None, False
        yield from self._together() if self.sync else self._one_by_one()

    def _together(self) -> Iterator[TensorDictBase]:
        while self._frames < self.total_frames:
            weights, moments = self._ray.put(self._sender.weights()), self._moments()
            for worker in self._workers:
                self._send(worker, weights, self._order(worker, moments, self._frames < self.init_random_frames))
            answers: dict[int, Answer] = {}
            while len(answers) < len(self._workers):
                worker, answer = self._receive()
                answers[worker.index] = answer
            batch = torch.cat([self._accept(worker, answers[worker.index]) for worker in self._workers])
            self._frames += batch.numel()
            yield batch

    def _one_by_one(self) -> Iterator[TensorDictBase]:
        ordered = self._frames

        def send(worker: _Worker) -> None:
            nonlocal ordered
            weights = self._ray.put(self._sender.weights())
            self._send(worker, weights, self._order(worker, self._moments(), ordered < self.init_random_frames))
            ordered += self.requested_frames_per_batch

        for worker in self._workers:
            send(worker)
        while self._frames < self.total_frames:
            worker, answer = self._receive()
            batch = self._accept(worker, answer)
            number = len(batch)
            first = worker.index * number
            which = torch.arange(first, first + number).unsqueeze(-1).expand(batch.shape)
            batch.set(("collector", "environment"), which.clone())
            self._frames += batch.numel()
            send(worker)
            yield batch

    def _accept(self, worker: _Worker, answer: Answer) -> TensorDict:
        """The frames of an answer, which count from now on."""
        worker.rounds += 1
        worker.state = answer.state
        worker.there = True
        if self.normalization is not None:
            assert answer.seen is not None
            add_gathered(self.normalization, answer.seen)
        return unpack_frames(answer.frames)

    def _moments(self) -> dict[str, Moments] | None:
        return None if self.normalization is None else moments_of(self.normalization)

    # ------------------------------------------------------------------------------- what a Trainer asks for

    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is to be done: the weights travel with every request."""

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Begin new episodes, from another seed."""
        del static_seed
        self.seed = seed
        for worker in self._workers:
            worker.state, worker.there = None, False
        return seed

    def state_dict(self) -> OrderedDict:
        """How many frames were handed out."""
        return OrderedDict(frames=self._frames)

    def load_state_dict(self, state_dict: OrderedDict, **kwargs: Any) -> None:
        """Go on counting."""
        del kwargs
        self._frames = state_dict["frames"]

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        """End the workers, and Ray where it was started here."""
        del timeout, raise_on_error
        if getattr(self, "_ray", None) is None:
            return
        ray, self._ray = self._ray, None
        if ray.is_initialized():
            for worker in self._workers:
                with suppress(Exception):
                    ray.kill(worker.actor)
            if self._owns_ray:
                ray.shutdown()
        if close_env and self.env is not None and not self.env.is_closed:
            self.env.close()


class EpisodesOfWorkers:
    """Where the workers stand in their episodes, for checkpoints; see :class:`~torchrl_pmoe.runs.EpisodeState`.

    Args:
        collector: whose workers they are.

    Attributes:
        fresh: whether new episodes begin where a state was loaded.
    """

    def __init__(self, collector: ReplaceableRayCollector) -> None:
        self._collector = collector
        self.fresh = False

    def state_dict(self) -> dict[str, Any]:
        """After the frames that were handed out; what is on its way is collected again."""
        return {
            "workers": [
                {"rounds": one.rounds, "state": None if one.state is None else thaw(one.state)}
                for one in self._collector._workers
            ]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have the next requests go on from there.

        Raises:
            ValueError: where there are other workers.
        """
        saved, workers = state_dict["workers"], self._collector._workers
        if len(saved) != len(workers):
            raise ValueError(f"it has {len(saved)} workers, here are {len(workers)}")
        for worker, one in zip(workers, saved, strict=True):
            worker.rounds, worker.there = one["rounds"], False
            worker.state = None if one["state"] is None else freeze(one["state"])
        self.fresh = any(one["rounds"] and one["state"] is None for one in saved)


def seed_of(seed: int, worker: int, rounds: int) -> int:
    """The seed of episodes that begin in the middle of a run."""
    return int(np.random.SeedSequence([seed, worker, rounds]).generate_state(1)[0]) % 2**31


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _death(error: BaseException) -> str:
    """How a worker was lost, in one line."""
    words = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = next((line for line in reversed(words) if line), type(error).__name__)
    return f"{type(error).__name__}: {last[:300]}"
