"""Where the cells of a sweep run: threads that wait for processes here, tasks of Ray, or jobs of Slurm.

Each engine calls :func:`parts.cells.run_cell` for every cell that it is given, and hands back what came of it.
"""

from __future__ import annotations

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from parts import process
from parts.cells import Cell, Failure, Outcome, failure_of, run_cell, state_of
from parts.errors import UsageError
from torchrl_pmoe.collectors import ClusterError, connect
from torchrl_pmoe.envs.vector import cores

RECIPES = Path(__file__).parents[1]


class Future(Protocol):
    """What every engine gives for a cell."""

    def done(self) -> bool:
        """Whether :meth:`result` returns at once."""

    def result(self) -> Outcome:
        """What came of the cell."""

    def cancel(self) -> Any:
        """Do not begin it."""


class Engine(ABC):
    """Runs cells.

    Args:
        retry: start cells that have failed before, too.
    """

    def __init__(self, *, retry: bool) -> None:
        self.retry = retry
        self._futures: list[Any] = []

    @abstractmethod
    def submit(self, cells: Sequence[Cell], *, wait: bool) -> list[Future]:
        """Have cells run as soon as there is a place for them; see :func:`parts.cells.run_cell`."""

    @abstractmethod
    def stop(self) -> None:
        """Begin no more cells, and let those that run write a checkpoint and end; once more, and they end at once."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds; nothing runs any more."""


def outcome_of(cell: Cell, future: Future, *, stopped: bool) -> Outcome:
    """What came of a cell, once its future is done.

    Args:
        cell: that was given to an engine.
        future: that the engine gave for it.
        stopped: whether the engine was told to stop; then it may have lost the cell, whose files tell all.
    """
    if not stopped:
        try:
            return future.result()
        # engines wrap what has ended a task in errors of their own
        except Exception as error:
            return Outcome(state_of(cell), Failure(process.describe(error), 1))
    state = state_of(cell)
    return Outcome(state, failure_of(cell) if state == "failed" else None)


class Local(Engine):
    """Processes on this machine.

    Args:
        retry: start cells that have failed before, too.
        jobs: how many at a time; one for each core by default.
    """

    def __init__(self, *, retry: bool, jobs: int | None = None) -> None:
        super().__init__(retry=retry)
        self._stops = 0
        self._pool = ThreadPoolExecutor(jobs or cores())

    def submit(self, cells: Sequence[Cell], *, wait: bool) -> list[Future]:
        """See the parent."""
        made = [
            self._pool.submit(run_cell, cell, retry=self.retry, wait=wait, stops=lambda: self._stops) for cell in cells
        ]
        self._futures += made
        return list(made)

    def stop(self) -> None:
        """See the parent."""
        self._stops += 1
        for future in self._futures:
            future.cancel()

    def close(self) -> None:
        """See the parent."""
        self._pool.shutdown()


class OnRay(Engine):
    """Tasks of Ray core, on every node that sees the sweep's directory. A task whose node dies runs elsewhere.

    Args:
        retry: start cells that have failed before, too.
        address: of a cluster; a Ray of its own on this machine by default.
        max_retries: of a cell whose node has died.
        gpus: that each cell reserves.

    Raises:
        UsageError: without Ray, or where there is none at the address.
    """

    def __init__(self, *, retry: bool, address: str | None = None, max_retries: int = 10, gpus: float = 0.0) -> None:
        super().__init__(retry=retry)
        if find_spec("ray") is None:
            raise UsageError("engine=ray: must be local or slurm without the package ray: pip install ray")
        try:
            self._connected = connect(address)
        except ClusterError as error:
            raise UsageError(
                f"ray.address={address}: must be that of a Ray that runs, auto, or null ({error})"
            ) from error
        import ray

        self._ray = ray
        run: Any = _run_cell_on_ray
        task: Any = ray.remote(run)
        # workers import the recipes' modules by name
        variables = {"PYTHONPATH": python_path(os.environ)}
        self._task = task.options(
            num_cpus=1, num_gpus=gpus, max_retries=max_retries, runtime_env={"env_vars": variables}
        )

    def submit(self, cells: Sequence[Cell], *, wait: bool) -> list[Future]:
        """See the parent."""
        tasks = [self._task.remote(cell, retry=self.retry, wait=wait) for cell in cells]
        self._futures += tasks
        return [task.future() for task in tasks]

    def stop(self) -> None:
        """See the parent: an interrupt in the task tells the process of its cell."""
        for task in self._futures:
            self._ray.cancel(task, force=False)

    def close(self) -> None:
        """See the parent."""
        if self._connected:
            self._ray.shutdown()


def _run_cell_on_ray(cell: Cell, *, retry: bool, wait: bool) -> Outcome:
    """As :func:`parts.cells.run_cell`, in a worker that hears the interrupt of :meth:`OnRay.stop`."""
    # a shell in the background has its children ignore interrupts, Ray's workers among them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run_cell(cell, retry=retry, wait=wait)


@contextmanager
def _children_hear_interrupts() -> Iterator[None]:
    """Start processes that can be interrupted, though a shell in the background has this one ignore interrupts."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class OnSlurm(Engine):
    """Jobs of Slurm, through submitit. A job that comes to its time limit writes a checkpoint and is queued again.

    Args:
        retry: start cells that have failed before, too.
        folder: for what submitit writes.
        cluster: ``slurm``, or ``local`` for submitit's stand-in on this machine.
        at_once: how many jobs may run at a time.
        **parameters: of submitit's executor.

    Raises:
        UsageError: without submitit, or without Slurm.
    """

    def __init__(
        self, *, retry: bool, folder: Path, cluster: str = "slurm", at_once: int = 256, **parameters: Any
    ) -> None:
        super().__init__(retry=retry)
        if find_spec("submitit") is None:
            raise UsageError("engine=slurm: must be local or ray without the package submitit: pip install submitit")
        import submitit

        os.environ["PYTHONPATH"] = python_path(os.environ)
        try:
            # a time limit is no failure: the next job goes on
            self._executor = submitit.AutoExecutor(folder=str(folder), cluster=cluster, slurm_max_num_timeout=100_000)
        except RuntimeError as error:
            raise UsageError(
                f"engine=slurm: must be local or ray where there is no Slurm ({' '.join(str(error).split())})"
            ) from error
        limits = {"slurm_array_parallelism": at_once} if cluster == "slurm" else {}
        self._executor.update_parameters(**limits, **parameters)

    def submit(self, cells: Sequence[Cell], *, wait: bool) -> list[Future]:
        """See the parent."""
        if not cells:
            return []
        count = range(len(cells))
        # submitit's stand-in for Slurm is told to stop by an interrupt
        with _children_hear_interrupts():
            jobs = self._executor.map_array(SlurmJob(), cells, [self.retry for _ in count], [wait for _ in count])
        self._futures += jobs
        return list(jobs)

    def stop(self) -> None:
        """See the parent."""
        for job in self._futures:
            if not job.done():
                job.cancel(check=False)

    def close(self) -> None:
        """See the parent."""


class SlurmJob:
    """One cell as a job, which submitit pickles.

    Slurm's signals end it with a checkpoint: SIGTERM for good, and the one before the time limit to be queued again.
    """

    def __init__(self) -> None:
        self._stops = 0

    def __call__(self, cell: Cell, retry: bool, wait: bool) -> Outcome:
        """See :func:`parts.cells.run_cell`."""
        signal.signal(signal.SIGTERM, self._stop)
        return run_cell(cell, retry=retry, wait=wait, stops=lambda: self._stops)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stops = 1

    def checkpoint(self, cell: Cell, retry: bool, wait: bool) -> Any:
        """Called by submitit in a signal handler before the time limit: what the next job calls.

        The next job waits for the process of this one, which writes its checkpoint meanwhile.
        """
        import submitit

        return submitit.helpers.DelayedSubmission(SlurmJob(), cell, retry, True)


def python_path(variables: Mapping[str, str]) -> str:
    """``PYTHONPATH`` with the recipes on it."""
    return os.pathsep.join([str(RECIPES), *filter(None, [variables.get("PYTHONPATH")])])


__all__ = ["Engine", "Future", "Local", "OnRay", "OnSlurm", "outcome_of"]
