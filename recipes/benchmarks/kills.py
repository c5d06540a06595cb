"""Does a run survive being killed? SIGKILL at random moments, checkpoint writing among them, and on from there.

    python recipes/benchmarks/kills.py

One training of each recipe is killed again and again, each time resumed, and left to finish at last; its
``metrics.csv`` must then be that of a training that nobody has killed, bit for bit, wall-clock columns aside. After
every kill all checkpoints that are there must be whole, and the next start must go on from the newest of them. Every
third kill waits for a checkpoint that is being written. The process has no time for a last word, so neither has a disk
cache to survive: this is about processes that die, not about power cuts.
"""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

sys.path.insert(0, str(Path(__file__).parents[1]))

from rounds import at_least_one, command_line, print_table, stop, write_csv
from torchrl.checkpoint import CheckpointError
from tqdm import tqdm

from torchrl_pmoe.runs import VerifiedCheckpoint
from torchrl_pmoe.runs.metrics import CLOCKS

RECIPES = Path(__file__).parents[1]
SETTINGS: dict[str, list[str]] = {
    "sac_pmoe": ["replay_buffer.size=5000", "network.hidden_sizes=[32,32]", "optim.batch_size=64"],
    "ppo_pmoe": ["collector.frames_per_batch=256", "loss.num_minibatches=4", "loss.ppo_epochs=4"],
}
COMMON = ["env=Hopper-v4", "logger.eval_episodes=2", "logger.progress_bar=false", "compile.enabled=false"]
COLUMNS = ("kill", "recipe", "aim", "seconds", "started at frame", "killed after frame", "left half", "rows")


@dataclass(frozen=True)
class Kill:
    """One kill, and what it left.

    Args:
        aim: ``any`` moment, or while ``writing`` a checkpoint.
        seconds: from the start of the process.
        start: the frame that the process went on from.
        frame: of the newest whole checkpoint.
        partial: whether a checkpoint was left half.
        rows: of ``metrics.csv``.
    """

    aim: str
    seconds: float
    start: int
    frame: int
    partial: bool
    rows: int


def start(recipe: str, *args: str) -> subprocess.Popen[str]:
    """The recipe in a session of its own."""
    return subprocess.Popen(
        [sys.executable, str(RECIPES / f"{recipe}.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the end; its output.

    Raises:
        RuntimeError: if it did not end well.
    """
    try:
        out, err = process.communicate()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, process.args))}: {err.strip().splitlines()[-1:]}")  # type: ignore[arg-type]
    return out


def whole_checkpoints(run: Path) -> list[int]:
    """The frames of all checkpoints.

    Raises:
        RuntimeError: if one is not whole.
    """
    found = sorted((run / "checkpoints").glob("checkpoint-*"))
    try:
        for path in found:
            VerifiedCheckpoint.verify(path)
    except CheckpointError as error:
        raise RuntimeError(f"half a checkpoint was taken for a whole one: {error}") from error
    return [int(path.name.split("-")[1]) for path in found]


def half_checkpoints(run: Path) -> list[Path]:
    """What is being written, or was left so."""
    return list((run / "checkpoints").glob(".checkpoint-*"))


def kill_once(recipe: str, run: Path, args: list[str], aim: str, longest: float, rng: random.Random) -> Kill | None:
    """Start or go on, and kill at a random moment; ``None`` if the run ended first.

    Raises:
        RuntimeError: if what is left is not what it must be.
    """
    before = whole_checkpoints(run)
    if not before:
        shutil.rmtree(run, ignore_errors=True)  # a new run does not begin in what another has left
    process = start(recipe, *([f"resume={run}"] if before else [*args, f"hydra.run.dir={run}"]))
    began = monotonic()
    # the moment counts from the first sign of life: imports and the like take seconds
    first = process.stdout.readline() if process.stdout else ""
    while not before and process.poll() is None and not (run / "checkpoints").is_dir():
        sleep(0.01)
    if before and (went := re.search(r"goes on at frame ([\d,]+)", first)) is not None:
        assert int(went[1].replace(",", "")) == before[-1], f"went on at {went[1]}, newest was {before[-1]}"
    elif before:
        raise RuntimeError(f"did not go on: {first!r} {finish(process)}")
    moment = monotonic() + rng.uniform(0, longest)
    while process.poll() is None and (monotonic() < moment or (aim == "writing" and not half_checkpoints(run))):
        sleep(0.0005)
    if process.poll() is not None:
        finish(process)
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    seconds = monotonic() - began
    frames = whole_checkpoints(run)
    rows = read_rows(run / "metrics.csv") if (run / "metrics.csv").is_file() else []
    numbers = [row["frames"] for row in rows]
    if len(set(numbers)) < len(numbers) or any(None in row.values() for row in rows):
        raise RuntimeError(f"metrics.csv has doubled or torn rows: {numbers}")
    if frames[-1:] < before[-1:]:
        raise RuntimeError(f"the newest checkpoint was {before[-1]}, is {frames[-1:]}")
    newest = frames[-1] if frames else 0
    return Kill(aim, seconds, before[-1] if before else 0, newest, bool(half_checkpoints(run)), len(rows))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows as they stand there."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(run: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` without clocks."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in read_rows(run / "metrics.csv")]


def torture(recipe: str, args: list[str], kills: int, longest: float, directory: Path, bar: tqdm) -> list[Kill]:
    """Kill one training ``kills`` times, and compare it with one that was left alone.

    Raises:
        RuntimeError: where they differ, or the run ended before it was killed often enough.
    """
    rng = random.Random(recipe)
    reference, run = directory / f"{recipe}-alone", directory / f"{recipe}-killed"
    alone = start(recipe, *args, f"hydra.run.dir={reference}")
    found: list[Kill] = []
    while len(found) < kills:
        kill = kill_once(recipe, run, args, "writing" if len(found) % 3 == 2 else "any", longest, rng)
        if kill is None:
            raise RuntimeError(f"{recipe} ended after {len(found)} kills: --frames must be larger")
        found.append(kill)
        bar.update()
    finish(start(recipe, f"resume={run}"))
    finish(alone)
    if timeless(run) != timeless(reference):
        raise RuntimeError(f"{recipe}: metrics.csv of {run} and {reference} differ")
    return found


def main() -> None:
    """Kill, resume, compare, print."""
    parser = command_line(__doc__ or "", "kills.csv", rounds=1, threads=1, variants=False)
    parser.add_argument("--kills", type=at_least_one, default=15, help="of each recipe")
    parser.add_argument("--frames", type=at_least_one, default=20_000, help="of each training")
    parser.add_argument("--longest", type=float, default=10.0, help="seconds from a start to its kill, at most")
    parser.add_argument("--recipes", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    rows: list[tuple[str | float, ...]] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=given.kills * len(given.recipes), unit="kill") as bar,
    ):
        for recipe in given.recipes:
            args = [
                *COMMON,
                *SETTINGS[recipe],
                f"total_frames={given.frames}",
                f"checkpoint.interval={max(given.frames // 80, 1)}",
                f"logger.eval_interval={max(given.frames // 10, 1)}",
            ]
            try:
                found = torture(recipe, args, given.kills, given.longest, Path(scratch), bar)
            except (RuntimeError, AssertionError) as error:
                stop(error)
            for kill in found:
                number = len(rows) + 1
                half = "yes" if kill.partial else "no"
                rows.append((number, recipe, kill.aim, kill.seconds, kill.start, kill.frame, half, kill.rows))
    print_table(
        list(COLUMNS), [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    )
    print(f"\n{len(rows)} kills; each training finished with the metrics.csv of one that was left alone")
    write_csv(given.output, list(COLUMNS), rows)


if __name__ == "__main__":
    main()
