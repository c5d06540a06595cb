"""Does a long run stay flat? Memory, file handles, threads and frames per second of a training, sampled from outside.

    python recipes/benchmarks/endurance.py sac_pmoe env=Walker2d-v4 total_frames=200_000 replay_buffer.size=50_000

Starts the recipe with the overrides that follow its name and reads ``/proc`` (Linux) once in ``--every`` seconds.
Frames are those of ``metrics.csv``, so ``logger.eval_interval`` sets how finely they are known. At the end it prints
medians of the tenths of the run, and how far memory has grown since the replay buffer was full: median of the last
tenth over the median of the tenth after that moment.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

sys.path.insert(0, str(Path(__file__).parents[1]))

from rounds import print_table, write_csv

from torchrl_pmoe.runs import read_metrics

MIB = 2**20


def sample(pid: int) -> dict[str, float]:
    """Resident memory in MiB, its anonymous part, open files and threads of a process."""
    process = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "resident_mib": int(status["VmRSS"].split()[0]) / 1024,
        "anonymous_mib": int(status["RssAnon"].split()[0]) / 1024,
        "open_files": len(list((process / "fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def progress(run: Path) -> dict[str, float]:
    """The last frame in ``metrics.csv``, and the frames per second up to it."""
    try:
        found = read_metrics(run / "metrics.csv")
    except (OSError, IndexError, ValueError, csv.Error):
        return {"frames": 0, "frames_per_second": float("nan")}
    return {name: float(found[name][-1]) for name in ("frames", "frames_per_second")}


def watch(command: list[str], run: Path, every: float) -> tuple[list[dict[str, float]], int]:
    """The samples of a run, and its exit status."""
    rows: list[dict[str, float]] = []
    began = perf_counter()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                found = sample(process.pid)
            except (FileNotFoundError, ProcessLookupError, KeyError):
                break
            rows.append({"seconds": round(perf_counter() - began, 1), **found, **progress(run)})
            sleep(every)
        status = process.wait()
    return rows, status


def tenths(rows: list[dict[str, float]], total: float) -> list[dict[str, float]]:
    """Medians over tenths of the frames."""
    found = []
    for tenth in range(10):
        low, high = tenth * total / 10, (tenth + 1) * total / 10
        part = [row for row in rows if low <= row["frames"] < high or (tenth == 9 and row["frames"] >= low)]
        if part:
            found.append({"to frame": high, **{key: median(row[key] for row in part) for key in list(part[0])[1:]}})
    return found


def main() -> int:
    """Run, sample, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", choices=("sac_pmoe", "ppo_pmoe", "dac"))
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--csv", type=Path, help="where the samples go")
    args, overrides = parser.parse_known_args()
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(given.get("hydra.run.dir", f"{scratch}/run"))
        recipe = Path(__file__).parents[1] / f"{args.recipe}.py"
        rows, status = watch([sys.executable, str(recipe), *overrides, f"hydra.run.dir={run}"], run, args.every)
    if status or not rows:
        return status or 1
    if args.csv is not None:
        write_csv(args.csv, list(rows[0]), [list(row.values()) for row in rows])
    found = tenths(rows, rows[-1]["frames"])
    names = ("resident_mib", "anonymous_mib", "open_files", "threads", "frames_per_second")
    print_table(
        ["to frame", *names],
        [[f"{row['to frame']:,.0f}", *(f"{row[name]:.1f}" for name in names)] for row in found],
    )
    full = float(given.get("replay_buffer.size", "inf"))
    after = [row for row in found if row["to frame"] > full]
    if len(after) > 1:
        growth = after[-1]["resident_mib"] / after[0]["resident_mib"] - 1
        print(f"memory since the buffer was full: {100 * growth:+.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
