"""Training frames per second of the PPO recipe, mixture over Gaussian.

    python recipes/benchmarks/ppo_speed.py

Every figure is a whole run of ``recipes/ppo_pmoe.py`` on HalfCheetah-v4 with the recipe's own settings, K=8, one
thread; evaluation and start are not counted. The variants take turns, so that a change in the machine's speed hits all
of them; the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

RECIPE = Path(__file__).parents[1] / "ppo_pmoe.py"
RESULTS = Path(__file__).parents[1] / "results" / "ppo_speed.csv"
VARIANTS = {
    "gaussian": ["policy=gaussian"],
    "responsibility": ["scoring=responsibility"],
    "frequency": ["scoring=frequency"],
    "critic": ["scoring=critic"],
}


def frames_per_second(options: list[str], frames: int, threads: int) -> float:
    """Of one run."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [
            "env=HalfCheetah-v4",
            "num_experts=8",
            f"total_frames={frames}",
            f"logger.eval_interval={10 * frames}",
            "logger.eval_episodes=1",
            "logger.rank_states=0",
            "logger.progress_bar=false",
            f"hydra.run.dir={directory}",
            *options,
        ]
        subprocess.run(
            [sys.executable, str(RECIPE), *arguments],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        with (Path(directory) / "metrics.csv").open(newline="") as file:
            return float(list(csv.DictReader(file))[-1]["frames_per_second"])


def main() -> None:
    """Measure, print the table, keep the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=8192, help="of one run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    if min(args.rounds, args.frames, args.threads) < 1:
        parser.error("--rounds, --frames and --threads must be at least 1")
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tqdm(total=args.rounds * len(VARIANTS), unit="run") as bar:
        for _ in range(args.rounds):
            for name, options in VARIANTS.items():
                found[name].append(frames_per_second(options, args.frames, args.threads))
                bar.update()
    where = platform.processor() or platform.machine()
    print(f"{where}, {args.threads} thread(s), torch {torch.__version__}, medians of {args.rounds} rounds")
    print("| policy | frames/s | over the Gaussian |\n|---|---|---|")
    for name, values in found.items():
        ratio = median(value / other for value, other in zip(values, found["gaussian"], strict=True))
        print(f"| {name} | {median(values):.0f} | {ratio:.2f} |")
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", *(f"frames_per_second_{i}" for i in range(args.rounds))])
        writer.writerows([name, *(f"{value:.1f}" for value in values)] for name, values in found.items())


if __name__ == "__main__":
    main()
