"""A table of runs: every combination of some values, several at a time, and on from there after any stop.

    python recipes/sweep.py recipe=sac_pmoe env=Hopper-v4,Walker2d-v4 policy=pmoe,gaussian seed=0..4

Each cell of the table is a run of the recipe, started by its command in a process of its own, in a directory named by
what the cell is. Where a cell stands is read from its files, so the same command after any stop, kill, crash or reboot
runs just what is missing; so do several sweeps over the same directory at once. ``status=true`` prints the table,
``retry=true`` starts cells that have failed, too. ``--help`` prints every key.
"""

from __future__ import annotations

if __name__ == "__main__":
    from parts import process

    process.begin()

import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from config.sweep import HELP, RECIPES, SweepConfig, TableCell, read_command, table
from config.typed import to_dict
from parts import process
from parts.cells import (
    LOG,
    PLAN,
    Cell,
    Failure,
    Outcome,
    Progress,
    State,
    failure_of,
    log_size,
    progress_of,
    read_plan,
    state_of,
)
from parts.engines import Engine, Future, Local, OnRay, OnSlurm, outcome_of
from parts.errors import UsageError
from parts.launch import launch, usage_line
from parts.resume import flatten, from_here, interpreter, read_config
from tqdm import tqdm

from torchrl_pmoe.envs import EnvironmentFault
from torchrl_pmoe.envs.vector import cores
from torchrl_pmoe.runs.files import replace_file

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 60.0
"""In a file, where a bar is not written over."""


# ------------------------------------------------------------------------------------------------ the cells


def make_cell(cfg: SweepConfig, directory: Path, planned: TableCell) -> Cell:
    """A cell of the table as a run on disk.

    Args:
        cfg: of the sweep.
        directory: of the sweep.
        planned: the cell, checked.
    """
    script = str(Path(__file__).with_name(f"{cfg.recipe}.py"))
    # many at a time: one thread each, and nobody watches
    quiet = ("optim.num_threads=1", "logger.progress_bar=false")
    given = {override.partition("=")[0] for override in planned.overrides}
    ours = tuple(override for override in quiet if override.partition("=")[0] not in given)
    config, changes = planned.config, planned.changes
    if "total_frames" in RECIPES[cfg.recipe].changeable and "total_frames" not in given:
        # it may have been begun with another number
        changes = (*changes, f"total_frames={config.total_frames}")
    agents = getattr(config, "num_seeds", 1) * len(getattr(config, "policies", [config.policy]))
    return Cell(
        directory / planned.name,
        (sys.executable, script),
        (*planned.overrides, *ours),
        (*changes, *ours),
        frames=config.total_frames,
        agents=agents,
        may_resume=getattr(config.checkpoint, "replay_buffer", True),
        goes_on_by_config=cfg.recipe == "target_reaching",
        working_directory=Path.cwd(),
    )


def refuse_other_configs(cfg: SweepConfig, cells: Sequence[Cell], planned: Sequence[TableCell]) -> None:
    """Refuse a cell whose directory holds another run.

    Raises:
        UsageError: in one line, for the first key that differs.
    """
    changeable = (*RECIPES[cfg.recipe].changeable, "resume", "device")
    for cell, plan in zip(cells, planned, strict=True):
        before = dict(flatten(read_plan(cell.directory) or read_config(cell.directory) or {}))
        for key, value in flatten(to_dict(plan.config)):
            if key in before and before[key] != value and not key.startswith(changeable):
                raise UsageError(
                    f"{key}={value}: must be {before[key]} in {from_here(cell.directory)}, where the run has that "
                    "(directory=... names that of another sweep)"
                )


def keep_plans(cells: Sequence[Cell], planned: Sequence[TableCell]) -> None:
    """Write what each cell is to be into its directory, which tells ``report.py`` what is missing."""
    for cell, plan in zip(cells, planned, strict=True):
        config = to_dict(plan.config)
        if read_plan(cell.directory) != config:
            cell.directory.mkdir(parents=True, exist_ok=True)
            replace_file(cell.directory / PLAN, json.dumps(config, indent=1))


# ------------------------------------------------------------------------------------------------ what is shown


@dataclass
class Row:
    """A cell, and where it stands.

    Args:
        cell: of the table.
        state: of it.
        progress: of it.
        failure: what went wrong, if something did.
    """

    cell: Cell
    state: State
    progress: Progress
    failure: Failure | None = None

    @property
    def total(self) -> int:
        """Frames of all agents."""
        return self.cell.frames * self.cell.agents

    @property
    def done(self) -> int:
        """Frames of all agents so far."""
        return self.total if self.state == "finished" else self.progress.frames


def look(cell: Cell, outcome: Outcome | None = None) -> Row:
    """Where a cell stands, by its files."""
    state = state_of(cell) if outcome is None else outcome.state
    failure = failure_of(cell) if state == "failed" else None
    return Row(cell, state, progress_of(cell), failure if outcome is None else outcome.failure)


def seconds_left(rows: Sequence[Row], row: Row) -> float:
    """Of a cell that is not finished, at its own speed or else at that of the others; nan if nobody knows."""
    known = [one.progress for one in ([row] if row.progress.seconds else rows) if one.progress.frames]
    frames, seconds = sum(one.frames for one in known), sum(one.seconds for one in known)
    return (row.total - row.done) * seconds / frames if frames and seconds else math.nan


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table, in Markdown."""
    yield "| cell | state | frames | return | time left |"
    yield "|---|---|---|---|---|"
    for row in rows:
        left = "" if row.state == "finished" else _clock(seconds_left(rows, row))
        value = "" if math.isnan(row.progress.value) else f"{row.progress.value:,.1f}"
        yield f"| {row.cell.name} | {row.state} | {row.done:,} of {row.total:,} | {value} | {left} |"


def _clock(seconds: float) -> str:
    return "" if math.isnan(seconds) else tqdm.format_interval(seconds)


def summary(rows: Sequence[Row]) -> str:
    """How many cells stand where."""
    states = [row.state for row in rows]
    order: tuple[State, ...] = ("finished", "running", "resumable", "new", "failed")
    return ", ".join(f"{states.count(state)} {state}" for state in order if state in states)


class Display:
    """A bar for the frames of all cells, and one for each cell that runs.

    Args:
        rows: all cells; kept up to date by :meth:`look`.
        disable: show nothing.
    """

    def __init__(self, rows: Sequence[Row], *, disable: bool) -> None:
        self._rows = rows
        self._of_cells: dict[str, tqdm] = {}
        # lines that are written over are for a terminal; a file gets a line now and then
        self._in_terminal = sys.stderr.isatty() and not disable
        self._next = 0.0
        total = sum(row.total for row in rows)
        self._all = tqdm(
            total=total, initial=sum(row.done for row in rows), unit="frames", unit_scale=True, disable=disable
        )

    def show(self) -> None:
        """Read how far the cells that run have come, and show it."""
        for row in self._rows:
            if row.state == "running":
                row.progress = progress_of(row.cell)
        self._all.set_postfix_str(summary(self._rows), refresh=False)
        self._all.n = sum(row.done for row in self._rows)
        if self._in_terminal or time.monotonic() > self._next:
            self._all.refresh()
            self._next = time.monotonic() + SECONDS_BETWEEN_LINES
        if not self._in_terminal:
            return
        running = {row.cell.name: row for row in self._rows if row.state == "running"}
        for name in [*self._of_cells]:
            if name not in running:
                self._of_cells.pop(name).close()
        for name, row in running.items():
            bar = self._of_cells.get(name)
            if bar is None:
                bar = tqdm(total=row.total, initial=row.done, desc=name, unit="frames", unit_scale=True, leave=False)
                self._of_cells[name] = bar
            bar.n = row.done
            bar.set_postfix_str("" if math.isnan(row.progress.value) else f"return {row.progress.value:,.1f}")

    def close(self) -> None:
        """Leave the last state of the bar for all."""
        for bar in self._of_cells.values():
            bar.close()
        self._all.close()


# ------------------------------------------------------------------------------------------------ the sweep


def make_engine(cfg: SweepConfig, directory: Path) -> Engine:
    """The engine that the config names.

    Raises:
        UsageError: where it is not there.
    """
    if cfg.engine == "ray":
        return OnRay(retry=cfg.retry, address=cfg.ray.address, max_retries=cfg.ray.max_retries, gpus=cfg.ray.gpus)
    if cfg.engine == "slurm":
        wished = {
            "name": cfg.recipe,
            "timeout_min": cfg.slurm.minutes,
            "cpus_per_task": cfg.slurm.cpus,
            "gpus_per_node": cfg.slurm.gpus,
            "mem_gb": cfg.slurm.memory_gb,
            "slurm_partition": cfg.slurm.partition,
            "slurm_account": cfg.slurm.account,
        }
        given = {key: value for key, value in wished.items() if value is not None}
        folder = directory / ".slurm"
        return OnSlurm(
            retry=cfg.retry,
            folder=folder,
            cluster=cfg.slurm.cluster,
            at_once=cfg.slurm.at_once,
            **given,
        )
    return Local(retry=cfg.retry, jobs=cfg.jobs)


@contextmanager
def counted_signals() -> Iterator[list[int]]:
    """The signals that asked this process to end, in their order; they do nothing else."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in process.endings()}
    for number in before:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(engine: Engine, rows: Sequence[Row], display: Display, received: Sequence[int]) -> None:
    """Run what is missing; cells that another sweep looks after are waited for, and taken over if it dies.

    Args:
        engine: that runs them.
        rows: all cells, kept up to date.
        display: shows them.
        received: signals that ask for an end.
    """
    told = 0
    for wait in (False, True):
        waiting = [row for row in rows if row.state == "running" or (row.state != "finished" and not wait)]
        if told or not waiting:
            continue
        logs = {row.cell.name: log_size(row.cell) for row in waiting}
        futures: list[tuple[Row, Future]] = list(
            zip(waiting, engine.submit([row.cell for row in waiting], wait=wait), strict=True)
        )
        while futures:
            if len(received) > told:
                told = len(received)
                tqdm.write("stopping: every cell that runs writes a checkpoint (once more: at once)", file=sys.stderr)
                engine.stop()
            done = [pair for pair in futures if pair[1].done()]
            for row, future in done:
                futures.remove((row, future))
                outcome = outcome_of(row.cell, future, stopped=told > 0)
                row.state, row.failure, row.progress = outcome.state, outcome.failure, progress_of(row.cell)
                if row.failure is not None:
                    tqdm.write(failure_line(row), file=sys.stderr)
            for row, _ in futures:
                # its process begins with a line in the log
                if log_size(row.cell) > logs[row.cell.name]:
                    row.state = "running"
            display.show()
            if not done:
                time.sleep(SECONDS_BETWEEN_LOOKS)


def failure_line(row: Row) -> str:
    """One line on a cell that has failed, with its log."""
    assert row.failure is not None
    return f"failed: {row.cell.name}: {row.failure.line}; its log is {from_here(row.cell.directory / LOG)}"


def again(arguments: Sequence[str], *more: str) -> str:
    """The command of this sweep."""
    kept = [arg for arg in arguments if arg.partition("=")[0] not in ("status", "retry")]
    return shlex.join([interpreter(), sys.argv[0], *kept, *more])


def sweep(arguments: Sequence[str]) -> int:
    """Check the table, then run it or print where it stands; the exit status.

    Raises:
        UsageError: in one line, for what is not allowed.
    """
    cfg, overrides = read_command(arguments)
    directory = Path(cfg.directory or f"outputs/sweeps/{cfg.recipe}").absolute()
    planned = table(cfg.recipe, overrides)
    cells = [make_cell(cfg, directory, cell) for cell in planned]
    try:
        refuse_other_configs(cfg, cells, planned)
        rows = [look(cell) for cell in cells]
        if not cfg.status:
            keep_plans(cells, planned)
    except OSError as error:
        raise UsageError(
            f"directory={from_here(directory)}: must be a directory that can be written to ({error.strerror})"
        ) from error
    if cfg.status:
        print("\n".join(lines(rows)))
        print(f"{summary(rows)} in {from_here(directory)}")
        for row in rows:
            if row.failure is not None:
                print(failure_line(row))
        return 0
    engine = make_engine(cfg, directory)
    where = f", {cfg.jobs or cores()} at a time" if cfg.engine == "local" else ""
    print(f"sweep directory: {from_here(directory)}")
    print(f"{len(rows)} cells of {cfg.recipe} with engine={cfg.engine}{where}: {summary(rows)}", flush=True)
    with counted_signals() as received:
        display = Display(rows, disable=not cfg.progress_bar)
        try:
            run(engine, rows, display, received)
        finally:
            display.close()
            engine.close()
    print("\n".join(lines(rows)))
    for row in rows:
        if row.failure is not None:
            print(failure_line(row))
    print(f"{summary(rows)} in {from_here(directory)}")
    return ending(cfg, arguments, rows, received)


def ending(cfg: SweepConfig, arguments: Sequence[str], rows: Sequence[Row], received: Sequence[int]) -> int:
    """Print what to do next; the exit status."""
    if received and any(row.state != "finished" for row in rows):
        process.complain(f"stopped; goes on with: {again(arguments)}")
        return 128 + received[0]
    failed = [row.failure.status for row in rows if row.failure is not None]
    if failed:
        print(f"failed cells, too:   {again(arguments, 'retry=true')}")
        return 2 if set(failed) == {2} else 1
    report = Path(sys.argv[0]).with_name("report.py")
    directory = from_here(rows[0].cell.directory.parent)
    print(f"compare them:        {shlex.join([interpreter(), str(report), directory])}")
    return 0


def main() -> None:
    """Read the command line, and run the sweep."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(HELP)
        return
    try:
        status = sweep(sys.argv[1:])
    except (UsageError, EnvironmentFault) as error:
        process.complain(f"error: {usage_line(error)}")
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    launch(main, SweepConfig)
