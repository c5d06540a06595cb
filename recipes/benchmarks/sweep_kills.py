"""Does a sweep survive being killed? SIGKILL to its whole process group at random moments, and the same command again.

    python recipes/benchmarks/sweep_kills.py

A sweep of a few short trainings is killed again and again with all its processes, each time started again by the same
command, and left to finish at last. Then every cell must have finished, none may have been started again after it had,
no two processes may have been in one cell at once, and every ``metrics.csv`` must be that of a sweep that nobody has
killed, wall-clock columns aside.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

sys.path.insert(0, str(Path(__file__).parents[1]))

from kills import timeless
from parts.cells import LOG, PLAN
from rounds import at_least_one, command_line, print_table, stop, write_csv
from tqdm import tqdm

from torchrl_pmoe.runs import RunDirectory

SWEEP = Path(__file__).parents[1] / "sweep.py"
CELLS = ["env=Pendulum-v1,MountainCarContinuous-v0", "policy=pmoe,gaussian", "seed=0..2"]
SETTINGS = [
    "network.hidden_sizes=[8,8]",
    "optim.batch_size=16",
    "optim.utd_ratio=0.1",
    "collector.frames_per_batch=10",
    "collector.init_random_frames=50",
    "logger.eval_episodes=1",
    "logger.eval_max_steps=50",
    "compile.enabled=false",
    "device=cpu",
    "progress_bar=false",
]
COLUMNS = ("kill", "aim", "seconds", "processes killed", "finished", "resumable", "new", "frames")


@dataclass(frozen=True)
class Kill:
    """One kill, and what it left.

    Args:
        aim: ``any`` moment, or one in which cells are ``training``.
        seconds: from the start of the sweep.
        processes: that trained a cell then.
        finished: cells by then.
        resumable: cells with a checkpoint by then.
        new: cells without one.
        frames: in the checkpoints of all cells.
    """

    aim: str
    seconds: float
    processes: int
    finished: int
    resumable: int
    new: int
    frames: int


def start(arguments: Sequence[str], directory: Path) -> subprocess.Popen[bytes]:
    """The sweep, in a process group of its own."""
    with (directory.parent / f"{directory.name}.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, str(SWEEP), *arguments, f"directory={directory}"],
            stdout=said,
            stderr=said,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def finish(arguments: Sequence[str], directory: Path) -> None:
    """The sweep to its end.

    Raises:
        RuntimeError: if it did not end well.
    """
    if start(arguments, directory).wait():
        said = (directory.parent / f"{directory.name}.txt").read_text().strip().splitlines()
        raise RuntimeError(f"the sweep of {directory} did not end well: {said[-1:]}")


def cells_of(directory: Path) -> list[Path]:
    """The directories of all cells."""
    return sorted(path.parent for path in directory.glob(f"*/{PLAN}"))


def is_finished(cell: Path) -> bool:
    """Whether a cell has all its frames."""
    return RunDirectory(cell).finished(json.loads((cell / PLAN).read_text())["total_frames"])


def processes_in(cell: Path) -> list[int]:
    """The living processes that train a cell; Linux lists them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(f"{cell}" in word and word.startswith(("resume=", "hydra.run.dir=")) for word in words):
            found.append(int(entry.parent.name))
    return found


def kill_once(arguments: Sequence[str], directory: Path, aim: str, longest: float, rng: random.Random) -> Kill | None:
    """Start the sweep and kill it at a random moment; ``None`` if it ended first.

    Raises:
        RuntimeError: where two processes were in one cell, or a cell that had finished was started again.
    """
    finished = {cell: log_size(cell) for cell in cells_of(directory) if is_finished(cell)}
    process = start(arguments, directory)
    began = monotonic()
    # the moment counts from the first process of a cell, or from its first checkpoint: imports take seconds
    sign = log_size if aim == "any" else newest_frame
    before = {cell: sign(cell) for cell in cells_of(directory)}
    while process.poll() is None and not any(sign(cell) > before.get(cell, 0) for cell in cells_of(directory)):
        sleep(0.01)
    moment = monotonic() + rng.uniform(0, longest)
    most = 0
    while process.poll() is None and monotonic() < moment:
        inside = [processes_in(cell) for cell in cells_of(directory)]
        if max(map(len, inside), default=0) > 1:
            raise RuntimeError(f"two processes in one cell: {inside}")
        most = sum(map(len, inside))
        sleep(0.05)
    if process.poll() is not None:
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for cell, size in finished.items():
        if log_size(cell) != size:
            raise RuntimeError(f"{cell.name} had finished, and was started again")
    cells = cells_of(directory)
    done = sum(map(is_finished, cells))
    frames = list(map(newest_frame, cells))
    begun = sum(map(bool, frames))
    return Kill(aim, monotonic() - began, most, done, begun - done, len(cells) - begun, sum(frames))


def newest_frame(cell: Path) -> int:
    """The frames of its newest checkpoint."""
    newest = RunDirectory(cell).checkpoints()[:1]
    return int(newest[0].name.split("-")[1]) if newest else 0


def log_size(cell: Path) -> int:
    """Bytes that the processes of a cell have printed."""
    return (cell / LOG).stat().st_size if (cell / LOG).exists() else 0


def starts(cell: Path) -> int:
    """How often a cell was started."""
    return len(re.findall(r"^\$ ", (cell / LOG).read_text(), re.MULTILINE))


def torture(
    arguments: Sequence[str], directory: Path, *, kills: int, longest: float, bar: tqdm, seed: int = 0
) -> list[Kill]:
    """Kill a sweep ``kills`` times, and let it finish.

    Args:
        arguments: of the sweep.
        directory: of the sweep.
        kills: how many.
        longest: seconds from a first sign of the cells to a kill.
        bar: moved on by every kill.
        seed: of the moments.

    Raises:
        RuntimeError: where a cell has not finished in the end, one was started again after it had, or the sweep ended
            before it was killed often enough.
    """
    rng = random.Random(seed)
    found: list[Kill] = []
    while len(found) < kills:
        kill = kill_once(arguments, directory, "any" if len(found) % 3 == 2 else "training", longest, rng)
        if kill is None:
            raise RuntimeError(f"the sweep ended after {len(found)} kills: --frames must be larger")
        found.append(kill)
        bar.update()
    finish(arguments, directory)
    for cell in cells_of(directory):
        if not is_finished(cell):
            raise RuntimeError(f"{cell.name} has not finished")
    before = {cell: starts(cell) for cell in cells_of(directory)}
    finish(arguments, directory)
    if {cell: starts(cell) for cell in cells_of(directory)} != before:
        raise RuntimeError("a sweep that has finished started a cell again")
    return found


def compare(killed: Path, alone: Path) -> None:
    """Compare the metrics of two sweeps.

    Raises:
        RuntimeError: where they differ.
    """
    if [cell.name for cell in cells_of(killed)] != [cell.name for cell in cells_of(alone)]:
        raise RuntimeError("the sweeps have other cells")
    for cell in cells_of(killed):
        if timeless(cell) != timeless(alone / cell.name):
            raise RuntimeError(f"{cell.name}: its metrics.csv is not that of a sweep that was left alone")


def main() -> None:
    """Kill, start again, compare, print."""
    parser = command_line(__doc__ or "", "sweep_kills.csv", rounds=1, threads=1, variants=False)
    parser.add_argument("--kills", type=at_least_one, default=10, help="of the whole sweep")
    parser.add_argument("--frames", type=at_least_one, default=3000, help="of each training")
    parser.add_argument("--longest", type=float, default=30.0, help="seconds from a first sign of the cells to a kill")
    parser.add_argument("--jobs", type=at_least_one, default=2, help="cells at a time")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    arguments = [
        *CELLS,
        *SETTINGS,
        f"jobs={given.jobs}",
        f"total_frames={given.frames}",
        f"checkpoint.interval={max(given.frames // 60, 10)}",
        f"logger.eval_interval={max(given.frames // 6, 10)}",
    ]
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=given.kills, unit="kill") as bar:
        alone, killed = Path(scratch, "alone"), Path(scratch, "killed")
        try:
            finish(arguments, alone)
            found = torture(arguments, killed, kills=given.kills, longest=given.longest, bar=bar)
            compare(killed, alone)
        except RuntimeError as error:
            stop(error)
    rows = [
        (number, kill.aim, kill.seconds, kill.processes, kill.finished, kill.resumable, kill.new, kill.frames)
        for number, kill in enumerate(found, 1)
    ]
    print_table(
        list(COLUMNS), [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    )
    print(f"\n{len(rows)} kills; every cell finished once, with the metrics.csv of a sweep that was left alone")
    write_csv(given.output, list(COLUMNS), rows)


if __name__ == "__main__":
    main()
