"""One cell of a sweep: an idempotent run of a recipe, started by its command in a process of its own.

Everything that is known of a cell is read from the files of its directory, so it does not matter what has ended the
sweep before. Two locks of the kernel keep two processes from the same cell: the sweep holds a lease as long as it looks
after the cell, and the recipe owns its run directory. Both end with their process, whatever ends it.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from parts.process import STOPPING
from parts.resume import text_argument
from torchrl_pmoe.runs import DirectoryInUseError, RunDirectory, read_metrics
from torchrl_pmoe.runs.files import replace_file

State = Literal["new", "resumable", "running", "finished", "failed"]

LOG = "log.txt"
"""The file of a cell's directory with all that its processes have printed, behind the command of each."""
FAILURE = "failed.json"
"""The file of a cell's directory that says how its run has ended by itself; it is gone when the run starts again."""
PLAN = "cell.json"
"""The file of a cell's directory with the config that it is to have, from before it begins."""
LEASES = ".leases"
"""The folder of a sweep with a lease for each cell that somebody looks after."""


@dataclass(frozen=True)
class Cell:
    """A run of a recipe.

    Args:
        directory: of the run, an absolute path. Its parent is the directory of the sweep.
        command: that starts the recipe, without overrides.
        overrides: of a new run.
        changes: overrides of a run that goes on.
        frames: that each of its agents is to have.
        agents: trained in this run, one after the other or at once.
        may_resume: whether its checkpoints hold what a resume takes.
        goes_on_by_config: whether a run goes on from its ``config.yaml``, without a checkpoint of its own.
        working_directory: where the command is given.
    """

    directory: Path
    command: tuple[str, ...]
    overrides: tuple[str, ...]
    changes: tuple[str, ...]
    frames: int
    agents: int = 1
    may_resume: bool = True
    goes_on_by_config: bool = False
    working_directory: Path = Path()

    @property
    def name(self) -> str:
        """What the cell is."""
        return self.directory.name

    @property
    def run(self) -> RunDirectory:
        """The directory of the run."""
        return RunDirectory(self.directory)


@dataclass(frozen=True)
class Failure:
    """How a run has ended.

    Args:
        line: on what went wrong.
        status: with which the process has exited, negative for a signal.
    """

    line: str
    status: int


@dataclass(frozen=True)
class Outcome:
    """What looking after a cell has come to.

    Args:
        state: of the cell now.
        failure: what went wrong, if something did.
    """

    state: State
    failure: Failure | None = None


# ------------------------------------------------------------------------------------------- what its files say


def state_of(cell: Cell) -> State:
    """Where a cell stands; ``running`` where another process owns its directory or its lease."""
    if cell.run.finished(cell.frames):
        return "finished"
    if not cell.directory.is_dir():
        return "new"
    with lease(cell) as free:
        return _state(cell) if free else "running"


def _state(cell: Cell) -> State:
    """As :func:`state_of`, for the holder of the lease."""
    if cell.run.finished(cell.frames):
        return "finished"
    if _is_owned(cell):
        return "running"
    if failure_of(cell) is not None:
        return "failed"
    return "resumable" if _can_resume(cell) else "new"


def _can_resume(cell: Cell) -> bool:
    if cell.goes_on_by_config:
        return (cell.directory / "config.yaml").is_file()
    return cell.may_resume and bool(cell.run.checkpoints())


def _is_owned(cell: Cell) -> bool:
    if not (cell.directory / RunDirectory.LOCK).exists():
        return False
    try:
        with cell.run.own():
            return False
    except DirectoryInUseError:
        return True


@contextmanager
def lease(cell: Cell) -> Iterator[bool]:
    """Look after a cell, if no other process does. The kernel takes a lease back from a process that has died.

    Yields:
        Whether this process has the lease.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(RunDirectory(cell.directory.parent / LEASES / cell.name).own())
        except DirectoryInUseError:
            free = False
        else:
            free = True
        yield free


def failure_of(cell: Cell) -> Failure | None:
    """How its last run has ended by itself, if it has."""
    try:
        return Failure(**json.loads((cell.directory / FAILURE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_plan(directory: Path) -> dict[str, Any] | None:
    """The config that the cell of a directory is to have; ``None`` where the directory is not one of a sweep."""
    try:
        found = json.loads((directory / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def log_size(cell: Cell) -> int:
    """Bytes that the processes of a cell have printed so far."""
    try:
        return (cell.directory / LOG).stat().st_size
    except OSError:
        return 0


@dataclass(frozen=True)
class Progress:
    """How far a cell has come.

    Args:
        frames: of all its agents.
        seconds: that they took.
        value: return of the last evaluation, mean over its agents; nan before the first.
    """

    frames: int
    seconds: float
    value: float


def progress_of(cell: Cell) -> Progress:
    """How far a cell has come, by its last evaluation and its last checkpoint."""
    rows = []
    for path in (*cell.directory.glob("metrics.csv"), *cell.directory.glob("*/metrics.csv")):
        # a file that is being replaced, or one that a user has changed, says nothing
        with suppress(OSError, ValueError, KeyError, IndexError):
            data = read_metrics(path)
            rows.append(tuple(float(data[key][-1]) for key in ("frames", "wall_seconds", "return_mean")))
    frames = sum(int(row[0]) for row in rows)
    if checkpoints := cell.run.checkpoints():
        frames = max(frames, int(checkpoints[0].name.rpartition("-")[2]))
    # agents that are trained at once share a clock
    at_once = any(cell.directory.glob("seed[0-9]*"))
    clocks = [row[1] for row in rows] or [0.0]
    value = sum(row[2] for row in rows) / len(rows) if rows else float("nan")
    return Progress(min(frames, cell.frames * cell.agents), max(clocks) if at_once else sum(clocks), value)


# ------------------------------------------------------------------------------------------------- its process


def run_cell(cell: Cell, *, retry: bool = False, wait: bool = False, stops: Callable[[], int] = lambda: 0) -> Outcome:
    """Bring a cell to its end from where its files say that it is. Nothing happens where it is there already.

    Args:
        cell: to be run.
        retry: start it although it has failed before.
        wait: where another process looks after it, wait for that one, and take over if it dies.
        stops: how often the sweep was told to stop. The first time the cell ends with a checkpoint, then at once.
    """
    while not stops():
        if cell.run.finished(cell.frames):
            return Outcome("finished")
        with lease(cell) as ours:
            state = _state(cell) if ours else "running"
            if state == "failed" and not retry:
                return Outcome(state, failure_of(cell))
            if state in ("new", "resumable", "failed"):
                # a recipe that an earlier sweep has started may take its directory just now
                with suppress(DirectoryInUseError):
                    return _run(cell, stops)
                state = "running"
        if not wait:
            return Outcome(state)
        time.sleep(1.0)
    return Outcome(state_of(cell))


def _run(cell: Cell, stops: Callable[[], int]) -> Outcome:
    command = [*cell.command, *_begin(cell)]
    with (cell.directory / LOG).open("ab") as log:
        log.write(f"\n$ {shlex.join(command)}\n".encode())
        log.flush()
        begins = log.tell()
        process = start(command, cell, log.fileno())
        try:
            told = 0
            while process.poll() is None:
                if stops() > told:
                    told = stops()
                    end(process, cell, begins, again=told > 1)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        except BaseException:
            # an engine ends this function by an interrupt
            end(process, cell, begins)
            process.wait()
            raise
    return _outcome(cell, process.returncode, begins, told=bool(told))


def _begin(cell: Cell) -> list[str]:
    """The overrides that start the run or go on with it, in a directory that is ready for that."""
    cell.directory.mkdir(parents=True, exist_ok=True)
    (cell.directory / FAILURE).unlink(missing_ok=True)
    if _can_resume(cell):
        return [_place(cell, "resume"), *cell.changes]
    # what a run without a checkpoint has left is begun anew
    with cell.run.own():
        for name in cell.run.outputs():
            path = cell.directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [*cell.overrides, _place(cell, "hydra.run.dir")]


def _place(cell: Cell, key: str) -> str:
    """The override that names the cell's directory, from where its command is given."""
    here = cell.working_directory
    below = cell.directory.is_relative_to(here)
    return text_argument(key, str(cell.directory.relative_to(here) if below else cell.directory))


def start(command: list[str], cell: Cell, output: int) -> subprocess.Popen[bytes]:
    """Start a recipe that hears of an end from :func:`end` alone.

    A terminal sends its signals to the sweep and to every process that it has started; a recipe that heard of an
    interrupt twice would end without a checkpoint.
    """
    names = ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    kept = {getattr(signal, name) for name in names if hasattr(signal, name)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, kept) if hasattr(signal, "pthread_sigmask") else None
    try:
        return subprocess.Popen(
            command, cwd=cell.working_directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(process: subprocess.Popen[bytes], cell: Cell, begins: int, *, again: bool = False) -> None:
    """Tell a recipe to write a checkpoint and to end.

    Args:
        process: of the recipe.
        cell: that it runs.
        begins: where its part of the log begins.
        again: whether it was told before, and is to end at once.
    """
    # a manager of jobs tells every process; one that has heard must not hear of it twice
    if again or STOPPING.encode() not in _said(cell, begins):
        process.terminate()


def _said(cell: Cell, begins: int) -> bytes:
    with suppress(OSError), (cell.directory / LOG).open("rb") as log:
        log.seek(begins)
        return log.read()
    return b""


def _outcome(cell: Cell, status: int, begins: int, *, told: bool) -> Outcome:
    state = _state(cell)
    by_signal = status < 0 or status - 128 in {int(number) for number in signal.Signals}
    if state in ("finished", "running") or told:
        return Outcome(state)
    lines = [line.strip() for line in _said(cell, begins).decode(errors="replace").splitlines() if line.strip()]
    if by_signal:
        number = -status if status < 0 else status - 128
        # it was told to end, or killed, from elsewhere: the same command goes on with it
        return Outcome(state, Failure(f"ended by {signal.Signals(number).name}", status))
    line = lines[-1].removeprefix("error: ") if lines else "it has printed nothing"
    if status == 0:
        line = f"ended before its {cell.frames:,} frames"
    failure = Failure(line, status or 1)
    replace_file(cell.directory / FAILURE, json.dumps({"line": failure.line, "status": failure.status}))
    return Outcome("failed", failure)
