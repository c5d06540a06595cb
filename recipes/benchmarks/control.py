"""Our Gaussian beside Stable-Baselines3 and beside published curves: whether a training learns as others' do.

    python recipes/benchmarks/control.py --jobs 2
    python recipes/benchmarks/control.py --algorithms ppo --num-envs 8
    python recipes/benchmarks/control.py --show

SAC (100,000 frames) and PPO (500,000 frames) with the same settings on both sides, HalfCheetah-v4 and Hopper-v4, three
seeds, one thread each. The recipe is started by its command line as a user starts it. PPO runs with the recipe's
defaults and with ``--num-envs`` environments on both sides; SAC with the learning rate of 1e-3 and the 5,000 random
frames of the published curve. With the recipe's 3e-4 and 1,000 (``--sac-settings recipe``) both libraries learn more
slowly in the first 100,000 frames. Every training has a directory of its own under ``--work``; the same command goes on
after any stop: what is finished is left alone, a run of ours is resumed, one of Stable-Baselines3 begins again. The
evaluations (10 deterministic episodes) of all of them go to ``--output``, and the picture beside it is drawn over the
published curves of ``published.csv``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import baselines3
import pandas as pd
from parts.figures import subplots
from rounds import at_least_one
from tqdm import tqdm

RECIPES = Path(__file__).parents[1]
RESULTS = RECIPES / "results"

ENVS = ("HalfCheetah-v4", "Hopper-v4")
FRAMES = {"sac": 100_000, "ppo": 500_000}
INTERVAL = {"sac": 10_000, "ppo": 25_000}
NUM_ENVS = "num_envs="
OURS, THEIRS = "torchrl_pmoe", "Stable-Baselines3"
COLORS = {OURS: "#D55E00", THEIRS: "#0072B2"}
COLUMNS = ["algorithm", "settings", "env", "trained_by", "seed", "frames", "return_mean", "return_std"]

PUBLISHED_SAC: dict[str, Any] = {"learning_rate": 1e-3, "random_frames": 5000}
"""Where the published runs differ from the recipe.

SimbaV2's file of results has an evaluation every 16,666 frames, 1/300 of 5,000,000: the interval of ``train.py`` in
github.com/adityab/CrossQ, which trains its SAC with these two (``slurm/submit_everything.sh``).
"""

TITLES = {"published": "lr 1e-3, 5,000 random frames", "recipe": "lr 3e-4, 1,000 random frames"}
"""Of the settings of SAC; those of PPO, its number of environments, speak for themselves."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    algorithm: str
    settings: str
    env: str
    trained_by: str
    seed: int

    def directory(self, work: Path) -> Path:
        """Where it leaves its files."""
        settings = self.settings.replace("=", "")  # Hydra would want it quoted
        return work / f"{self.algorithm}-{settings}-{self.env}-{self.trained_by}-seed{self.seed}"

    def evaluations(self, work: Path) -> pd.DataFrame | None:
        """What has been evaluated so far, or nothing."""
        file = self.directory(work) / "metrics.csv"
        if not file.is_file():
            return None
        data = pd.read_csv(file)
        return data.assign(**asdict(self))[COLUMNS]

    def finished(self, work: Path) -> bool:
        """Whether it has all of its frames."""
        data = self.evaluations(work)
        return data is not None and data["frames"].max() >= FRAMES[self.algorithm]

    def command(self, work: Path) -> list[str]:
        """What trains it, or goes on with it."""
        run = self.directory(work)
        if self.trained_by == THEIRS:
            return [sys.executable, __file__, "--work", str(work), "--train", *map(str, astuple(self))]
        recipe = [sys.executable, str(RECIPES / f"{self.algorithm}_pmoe.py")]
        if any((run / "checkpoints").glob("checkpoint-*")):
            return [*recipe, f"resume={run}"]
        return [
            *recipe,
            f"env={self.env}",
            "policy=gaussian",
            f"seed={self.seed}",
            *(f"{key}={value}" for key, value in self.overrides().items()),
            f"total_frames={FRAMES[self.algorithm]}",
            f"logger.eval_interval={INTERVAL[self.algorithm]}",
            "optim.num_threads=1",
            f"hydra.run.dir={run}",
        ]

    @property
    def num_envs(self) -> int:
        """Environments that PPO's frames come from."""
        return int(self.settings.removeprefix(NUM_ENVS)) if self.algorithm == "ppo" else 1

    def overrides(self) -> dict[str, Any]:
        """What differs from the recipe's defaults."""
        if self.algorithm == "ppo":
            return {"collector.num_envs": self.num_envs, "collector.backend": "serial"}
        if self.settings == "recipe":
            return {}
        return {
            "optim.lr": PUBLISHED_SAC["learning_rate"],
            "collector.init_random_frames": PUBLISHED_SAC["random_frames"],
        }

    def run(self, work: Path) -> int:
        """Train in a process of its own, its output in ``output.log``; its exit status."""
        run = self.directory(work)
        run.parent.mkdir(parents=True, exist_ok=True)
        if self.trained_by == OURS and not any((run / "checkpoints").glob("checkpoint-*")):
            # a new run does not begin in what another has left
            shutil.rmtree(run, ignore_errors=True)
        with run.with_suffix(".log").open("a") as log:
            return subprocess.run(self.command(work), stdout=log, stderr=log, check=False).returncode


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """All trainings, the first seed of each task first."""
    settings = {"sac": args.sac_settings, "ppo": f"{NUM_ENVS}{args.num_envs}"}
    for seed in range(args.seeds):
        for algorithm in args.algorithms:
            for env in args.envs:
                for library in (OURS, THEIRS):
                    yield Cell(algorithm, settings[algorithm], env, library, seed)


def collect(args: argparse.Namespace) -> pd.DataFrame:
    """The evaluations of every training, finished or not, and what ``--output`` holds of others; written there."""
    found = [data for cell in cells(args) if (data := cell.evaluations(args.work)) is not None]
    if args.output.is_file():
        found.append(pd.read_csv(args.output))
    data = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS)
    data = data.drop_duplicates([*(f.name for f in fields(Cell)), "frames"]).sort_values(
        ["algorithm", "settings", "env", "trained_by", "seed", "frames"]
    )
    data.to_csv(args.output, index=False, lineterminator="\n")
    return data


# ------------------------------------------------------------------------------------------- the picture


def draw(data: pd.DataFrame, published: pd.DataFrame, path: Path) -> None:
    """One panel a task and algorithm: every seed thin, the mean thick, the published seeds' mean ± std as a band."""
    panels = list(data.groupby(["algorithm", "settings", "env"], sort=False))
    fig, axes = subplots(1, len(panels), figsize=(5 * len(panels), 4.2), squeeze=False)
    for ax, ((algorithm, settings, env), here) in zip(axes[0], panels, strict=True):
        last = here["frames"].max()
        for source, band in published[(published["algorithm"] == algorithm) & (published["env"] == env)].groupby(
            "source"
        ):
            band = band[band["frames"] <= 1.05 * last]
            stats = band.groupby("frames")["return"].agg(["mean", "std"])
            seeds = band["seed"].nunique()
            ax.fill_between(
                stats.index, stats["mean"] - stats["std"], stats["mean"] + stats["std"], color="#999999", alpha=0.35,
                linewidth=0, label=f"{source}; mean ± std of {seeds} seeds",
            )  # fmt: skip
            ax.plot(stats.index, stats["mean"], color="#666666", linestyle="--", linewidth=1)
        for library, runs in here.groupby("trained_by", sort=False):
            for _, run in runs.groupby("seed"):
                ax.plot(run["frames"], run["return_mean"], color=COLORS[library], alpha=0.4, linewidth=0.9)
            mean = runs.groupby("frames")["return_mean"].mean()
            ax.plot(mean.index, mean, color=COLORS[library], linewidth=2.2, label=f"{library}, mean over seeds")
        ax.set(
            title=f"{algorithm.upper()}, {env}\n{TITLES.get(settings, settings)}",
            xlabel="frames",
            ylabel="evaluation return",
        )
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.tick_params(axis="x", labelrotation=30)
        ax.grid(alpha=0.3)
    entries = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries, fontsize="small", loc="outside lower left")
    fig.savefig(path, dpi=120)


def table(data: pd.DataFrame, published: pd.DataFrame) -> str:
    """Markdown: mean and standard deviation over seeds of the last evaluation, the published ones beside them."""
    lines = [
        "| algorithm | settings | task | frames | who | seeds | return, each seed | mean ± std |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def line(place: Sequence[str], frames: int, who: str, returns: Sequence[float]) -> str:
        values = pd.Series(returns)
        each = ", ".join(f"{value:,.0f}" for value in values) if len(values) < 6 else ""
        spread = f" ± {values.std(ddof=0):,.0f}" if len(values) > 1 else ""
        about = f"| {' | '.join(place)} | {frames:,} | {who} | {len(values)} |"
        return f"{about} {each} | {values.mean():,.0f}{spread} |"

    for place, here in data.groupby(["algorithm", "settings", "env"], sort=False):
        algorithm, _, env = place
        for library, runs in here.groupby("trained_by", sort=False):
            last = runs[runs["frames"] == runs["frames"].max()]
            lines.append(line(place, int(last["frames"].iloc[0]), str(library), list(last["return_mean"])))
        band = published[(published["algorithm"] == algorithm) & (published["env"] == env)]
        for source, found in band.groupby("source"):
            nearest = min(found["frames"].unique(), key=lambda frames: abs(frames - here["frames"].max()))
            lines.append(line(place, int(nearest), str(source), list(found[found["frames"] == nearest]["return"])))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, then collect, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithms", nargs="+", choices=FRAMES, default=list(FRAMES), help="(all)")
    parser.add_argument("--envs", nargs="+", default=ENVS, metavar="ENV", help=f"({' '.join(ENVS)})")
    parser.add_argument("--sac-settings", choices=["published", "recipe"], default="published", help="(published)")
    parser.add_argument("--num-envs", type=at_least_one, default=1, help="of PPO (1)")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="(3)")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="trainings at once, one thread each (1)")
    parser.add_argument("--work", type=Path, default=Path("outputs/control"), help="of the trainings (outputs/control)")
    parser.add_argument("--output", type=Path, default=RESULTS / "control.csv", help="(recipes/results/control.csv)")
    parser.add_argument("--show", action="store_true", help="train nothing: draw and print what --output holds")
    parser.add_argument("--train", nargs=5, metavar=tuple(f.name.upper() for f in fields(Cell)), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.work = args.work.absolute()
    if 2048 % args.num_envs:
        parser.error(f"argument --num-envs: must divide the 2,048 frames of a batch, got {args.num_envs}")
    if args.train is not None:
        algorithm, settings, env, library, seed = args.train
        cell = Cell(algorithm, settings, env, library, int(seed))
        learn(cell, cell.directory(args.work))
        return
    if args.show and not args.output.is_file():
        parser.error(f"--output {args.output}: must be a file that an earlier call has written, with --show")
    failed: list[str] = []
    if not args.show:
        failed = train_missing(args)
    data: Any = pd.read_csv(args.output) if args.show else collect(args)
    published = pd.read_csv(RESULTS / "published.csv")
    if len(data):
        draw(data, published, args.output.with_suffix(".png"))
        print(table(data, published))
    for line in failed:
        print(line, file=sys.stderr)
    sys.exit(bool(failed))


def train_missing(args: argparse.Namespace) -> list[str]:
    """Train every cell that is not finished; a line for each that failed."""
    missing = [cell for cell in cells(args) if not cell.finished(args.work)]
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(missing), unit="training") as bar:

        def run(cell: Cell) -> None:
            status = cell.run(args.work)
            if status:
                failed.append(f"{cell}: exit status {status}, see {cell.directory(args.work).with_suffix('.log')}")
            bar.update()

        list(pool.map(run, missing))
    return failed


def learn(cell: Cell, run: Path) -> None:
    """One training of Stable-Baselines3, its evaluations in ``metrics.csv``."""
    run.mkdir(parents=True, exist_ok=True)
    baselines3.learn(
        cell.algorithm,
        cell.env,
        cell.seed,
        FRAMES[cell.algorithm],
        INTERVAL[cell.algorithm],
        run / "metrics.csv",
        num_envs=cell.num_envs,
        **(PUBLISHED_SAC if cell.settings == "published" else {}),
    )


if __name__ == "__main__":
    main()
