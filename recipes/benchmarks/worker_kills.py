"""Does a training on Ray survive its workers? They are killed at random moments, and nothing may change.

    python recipes/benchmarks/worker_kills.py

The same training runs three times: in one process, with workers on Ray, and with workers of which one is killed by
SIGKILL at random moments, ``--kills`` times. The last two must leave the same ``metrics.csv``, wall-clock columns aside
(``collector.ray.sync=true``). The first one's frames come from other seeds, so its returns stand beside them, to be
looked at. Keys of the recipe may follow.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from kills import finish, start, timeless
from rounds import at_least_one, command_line, print_table, stop, write_csv
from tqdm import tqdm

from torchrl_pmoe.runs import read_metrics

SETTINGS = [
    "env=Pendulum-v1",
    "total_frames=10_000",
    "collector.num_envs=4",
    "collector.frames_per_batch=64",
    "logger.eval_interval=1000",
    "logger.progress_bar=false",
    "checkpoint.interval=1000",
]
ON_RAY = ["collector.backend=ray", "collector.ray.workers=2"]
RUNS = ("one process", "workers", "workers, killed")
COLUMNS = ["run", "frames", "return_mean", "return_std"]


@dataclass(frozen=True)
class Kill:
    """One kill.

    Args:
        seconds: from the start of the training.
        frames: evaluated by then.
    """

    seconds: float
    frames: int


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of Ray that collect frames for it; Ray names them so."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RolloutWorker" in command_of(child)]


def command_of(process: psutil.Process) -> str:
    """Its command line, nothing of one that has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def frames_of(run: Path) -> int:
    """Frames at the last evaluation."""
    if not (run / "metrics.csv").is_file():
        return 0
    frames = read_metrics(run / "metrics.csv")["frames"]
    return int(frames[-1]) if len(frames) else 0


def torture(
    recipe: str, run: Path, arguments: Sequence[str], *, kills: int, longest: float, bar: tqdm
) -> tuple[list[Kill], str]:
    """Train with workers that are killed, to the end; the kills, and what the training has said.

    Args:
        recipe: its name.
        run: directory.
        arguments: of the recipe.
        kills: how many.
        longest: seconds from one kill to the next.
        bar: moved on by every kill.

    Raises:
        RuntimeError: if the training ended before it had been harmed often enough, or not well.
    """
    rng, found = random.Random(0), list[Kill]()
    process, began = start(recipe, *arguments, f"hydra.run.dir={run}"), monotonic()
    try:
        while not workers_of(process) and process.poll() is None:
            sleep(0.1)
        while len(found) < kills:
            moment = monotonic() + rng.uniform(0, longest)
            while monotonic() < moment and process.poll() is None:
                sleep(0.05)
            if process.poll() is not None:
                finish(process)
                raise RuntimeError(f"the training ended after {len(found)} kills: total_frames must be larger")
            # one that has just died by itself is not there any more
            with suppress(psutil.Error):
                if not (workers := workers_of(process)):
                    continue
                rng.choice(workers).kill()
                found.append(Kill(monotonic() - began, frames_of(run)))
                bar.update()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return found, finish(process)


def main() -> None:
    """Train three times, compare, print."""
    parser = command_line(__doc__ or "", "worker_kills.csv", rounds=1, threads=1, variants=False)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--recipe", choices=["sac_pmoe", "ppo_pmoe"], default="sac_pmoe", help="(sac_pmoe)")
    parser.add_argument("--kills", type=at_least_one, default=10, help="of workers (10)")
    parser.add_argument("--longest", type=float, default=30.0, help="seconds from one kill to the next, at most (30)")
    given = parser.parse_intermixed_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    arguments = [*SETTINGS, f"optim.num_threads={given.threads}", *given.overrides]
    returns: list[tuple[str | float, ...]] = []
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=given.kills, unit="kill") as bar:
        runs = [Path(scratch, name.replace(", ", "-").replace(" ", "-")) for name in RUNS]
        try:
            for run, where in zip(runs[:2], ([], ON_RAY), strict=True):
                finish(start(given.recipe, *arguments, *where, f"hydra.run.dir={run}"))
            found, said = torture(
                given.recipe, runs[2], [*arguments, *ON_RAY], kills=given.kills, longest=given.longest, bar=bar
            )
            if timeless(runs[2]) != timeless(runs[1]):
                raise RuntimeError("metrics.csv is not that of a training whose workers lived")
        except RuntimeError as error:
            stop(error)
        for name, run in zip(RUNS, runs, strict=True):
            data = read_metrics(run / "metrics.csv")
            returns += [(name, *row) for row in zip(*(data[key].tolist() for key in COLUMNS[1:]), strict=True)]
    print_table(
        ["kill", "seconds", "frames"], [[str(n), f"{k.seconds:.1f}", str(k.frames)] for n, k in enumerate(found, 1)]
    )
    replaced = said.count(" is replaced at frame ")
    print(f"\n{len(found)} kills, {replaced} workers replaced; metrics.csv is that of a training whose workers lived")
    last = {name: [row for row in returns if row[0] == name][-1] for name in RUNS}
    print_table(["run", "frames", "return"], [[name, f"{row[1]:g}", f"{row[2]:.1f}"] for name, row in last.items()])
    write_csv(
        given.output.with_name(f"{given.output.stem}_moments.csv"),
        ["kill", "seconds", "frames"],
        [(number, f"{kill.seconds:.2f}", kill.frames) for number, kill in enumerate(found, 1)],
    )
    write_csv(given.output, COLUMNS, returns)


if __name__ == "__main__":
    main()
