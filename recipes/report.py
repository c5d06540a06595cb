"""What a sweep says: tables and pictures with 95 % stratified bootstrap intervals over seeds.

    python recipes/report.py outputs/sweeps/sac_pmoe
    python recipes/report.py outputs/sweeps/sac_pmoe outputs/sweeps/ppo_pmoe --output comparison

Each path is a sweep, or any directory with runs in it, as for ``plot.py``. Runs that differ in nothing but their seed
are one kind. A run that is not finished is left out and counted as missing. The statistics are those of Agarwal et al.
(2021): interquartile mean, area under the curve, probability of improvement, performance profile. Over several tasks,
the score of a run is its last return, brought to 0 for the lowest and 1 for the highest of all runs of its task.

Leaves ``report.md``, ``report.csv``, ``curves.png``, ``profiles.png`` and ``intervals.png``, and prints the first.
"""

from __future__ import annotations

if __name__ == "__main__":
    from parts import process

    process.begin()

import argparse
import csv
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import plot
from parts import process
from parts.cells import PLAN, read_plan
from parts.errors import UsageError
from parts.figures import subplots
from parts.intervals import (
    Estimate,
    interquartile_mean,
    interquartile_mean_over_tasks,
    performance_profile,
    probability_of_improvement,
    probability_of_improvement_over_tasks,
)
from parts.resume import flatten
from plot import Run
from scipy.integrate import trapezoid

from torchrl_pmoe.runs import RunDirectory

COLUMNS = ("task", "runs", "statistic", "seeds", "missing", "frames", "value", "low", "high")
ALL_TASKS = "all tasks, scores of 0 to 1"
LEVELS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Kind:
    """Runs of one task that differ in nothing but their seed.

    Args:
        runs: those that are finished.
        missing: those that are not, by what tells them apart.
    """

    runs: list[Run] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def frames(self) -> int:
        """Of the last evaluation."""
        return int(plot.common_frames(self.runs)[0][-1])

    @property
    def last(self) -> np.ndarray:
        """The last return of each seed, ``[seeds]``."""
        return plot.common_frames(self.runs)[1][:, -1]

    @property
    def areas(self) -> np.ndarray:
        """The area under each seed's curve over its width: its mean return over the training, ``[seeds]``."""
        frames, returns = plot.common_frames(self.runs)
        return trapezoid(returns, frames) / (frames[-1] - frames[0]) if len(frames) > 1 else returns[:, 0]


Kinds = dict[str, dict[str, Kind]]
"""By task, and by what tells them apart."""


# ------------------------------------------------------------------------------------------------- reading


def read(paths: Sequence[Path]) -> Kinds:
    """All kinds of runs at some paths.

    Raises:
        UsageError: in one line, for a path without a run, or where none is finished.
    """
    planned = {file.parent.resolve() for path in paths for file in path.rglob(PLAN)}
    runs: list[Run] = []
    for path in paths:
        # the cells of a sweep may all be without an evaluation yet
        if any(path.rglob("metrics.csv")) or not any(path.rglob(PLAN)):
            runs += plot.find_runs([path])
    cells = {run.path.resolve(): cell for run in runs if (cell := _cell_of(run, planned)) is not None}
    begun = set(cells.values())
    # a cell of a sweep that has no evaluation yet
    runs += [_unbegun(cell) for cell in sorted(planned - begun)]
    found: Kinds = {}
    for env, here in plot.kinds(runs).items():
        for label, same in here.items():
            kind = found.setdefault(env, {}).setdefault(label, Kind())
            longest = max((run.frames[-1] for run in same if len(run.frames)), default=0)
            for run in same:
                cell = cells.get(run.path.resolve())
                if len(run.frames) and run.frames[-1] == longest and (cell is None or _is_finished(cell)):
                    kind.runs.append(run)
                else:
                    kind.missing.append(_seed(run))
    if not any(kind.runs for here in found.values() for kind in here.values()):
        raise UsageError(f"{paths[0]}: must be a sweep, or a directory with runs, of which one at least is finished")
    return found


def _cell_of(run: Run, planned: set[Path]) -> Path | None:
    """The directory of the cell that a run belongs to; one of several agents is a folder below it."""
    own = run.path.resolve().parent
    return next((directory for directory in (own, own.parent) if directory in planned), None)


def _unbegun(cell: Path) -> Run:
    nothing = np.empty(0)
    return Run(cell / "metrics.csv", dict(flatten(read_plan(cell) or {})), nothing, nothing)


def _is_finished(cell: Path) -> bool:
    plan = read_plan(cell) or {}
    return RunDirectory(cell).finished(int(plan.get("total_frames", 0)))


def _seed(run: Run) -> str:
    done, total = (int(run.frames[-1]) if len(run.frames) else 0), int(run.config.get("total_frames") or 0)
    return f"seed {run.config.get('seed')} ({done:,} of {total:,} frames)"


# ---------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        task: of the runs.
        runs: what tells them apart.
        statistic: of them.
        seeds: that are finished.
        missing: those that are not.
        frames: of the last evaluation; 0 where tasks have others.
        estimate: of the statistic.
    """

    task: str
    runs: str
    statistic: str
    seeds: int
    missing: int
    frames: int
    estimate: Estimate

    def cells(self) -> list[Any]:
        """As in the CSV."""
        low, value, high = (float(number) for number in (self.estimate.low, self.estimate.value, self.estimate.high))
        numbers = ["" if np.isnan(number) else f"{number:.6g}" for number in (value, low, high)]
        return [self.task, self.runs, self.statistic, self.seeds, self.missing, self.frames or "", *numbers]


def statistics(found: Kinds) -> Iterator[Line]:
    """Every line of the table."""
    per_run: dict[str, Callable[[Kind], np.ndarray]] = {
        "last return, interquartile mean": lambda kind: kind.last,
        "area under the curve, interquartile mean": lambda kind: kind.areas,
    }
    for task, here in found.items():
        for label, kind in here.items():
            for name, values in per_run.items():
                estimate = interquartile_mean(values(kind)) if kind.runs else _nothing()
                frames = kind.frames if kind.runs else 0
                yield Line(task, label, name, len(kind.runs), len(kind.missing), frames, estimate)
        for one, other in itertools.combinations([label for label, kind in here.items() if kind.runs], 2):
            pair = here[one], here[other]
            estimate = probability_of_improvement(pair[0].last, pair[1].last)
            yield _improvement_line(task, one, other, pair, pair[0].frames, estimate)
    if len(found) < 2:
        return
    scored = scores(found)
    for label, tasks in scored.items():
        kinds = [here[label] for here in found.values() if label in here]
        estimate = interquartile_mean_over_tasks(list(tasks.values()))
        yield Line(ALL_TASKS, label, "last return, interquartile mean", *_counts(kinds), 0, estimate)
    for one, other in itertools.combinations(scored, 2):
        shared = [task for task in scored[one] if task in scored[other]]
        if shared:
            pairs = [(scored[one][task], scored[other][task]) for task in shared]
            estimate = probability_of_improvement_over_tasks(pairs)
            kinds = [found[task][label] for task in shared for label in (one, other)]
            yield _improvement_line(ALL_TASKS, one, other, kinds, 0, estimate)


def _improvement_line(task: str, one: str, other: str, kinds: Sequence[Kind], frames: int, estimate: Estimate) -> Line:
    return Line(task, f"{one} > {other}", "last return, probability of improvement", *_counts(kinds), frames, estimate)


def _counts(kinds: Sequence[Kind]) -> tuple[int, int]:
    """Seeds that are finished, and those that are missing."""
    return sum(len(kind.runs) for kind in kinds), sum(len(kind.missing) for kind in kinds)


def _nothing() -> Estimate:
    return Estimate(*(np.array(np.nan) for _ in range(3)))


def scores(found: Kinds) -> dict[str, dict[str, np.ndarray]]:
    """By kind and task, the last return of each seed on a scale from 0 to 1, ``[seeds]``.

    0 is the lowest and 1 the highest last return of all runs of a task.
    """
    scored: dict[str, dict[str, np.ndarray]] = {}
    for task, here in found.items():
        last = {label: kind.last for label, kind in here.items() if kind.runs}
        if not last:
            continue
        everything = np.concatenate(list(last.values()))
        low, width = everything.min(), np.ptp(everything) or 1.0
        for label, values in last.items():
            scored.setdefault(label, {})[task] = (values - low) / width
    return scored


# ------------------------------------------------------------------------------------------------ what is shown


def markdown(lines: Sequence[Line], found: Kinds) -> Iterator[str]:
    """The report as text."""
    yield "| task | runs | statistic | seeds | missing | frames | value [95 % interval] |"
    yield "|---|---|---|---|---|---|---|"
    for line in lines:
        task, runs, statistic, seeds, missing, frames, value, low, high = line.cells()
        shown = "" if value == "" else _number(value)
        shown += "" if low == "" else f" [{_number(low)}, {_number(high)}]"
        yield f"| {task} | {runs} | {statistic} | {seeds} | {missing or ''} | {frames and f'{frames:,}'} | {shown} |"
    yield ""
    gaps = [
        f"- {task}, {label}: {', '.join(kind.missing)}"
        for task, here in found.items()
        for label, kind in here.items()
        if kind.missing
    ]
    number = sum(len(kind.missing) for here in found.values() for kind in here.values())
    yield f"{number} seeds are missing:" if gaps else "No seed is missing."
    yield from ["", *gaps] if gaps else []


def _number(text: str) -> str:
    value = float(text)
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def draw_profiles(found: Kinds, path: Path, styles: dict[str, dict[str, Any]]) -> None:
    """Which part of the runs has a score above each level."""
    fig, ax = subplots(figsize=(6.4, 4.4))
    for label, tasks in scores(found).items():
        profile = performance_profile(list(tasks.values()), LEVELS)
        ax.plot(LEVELS, profile.value, label=label, **styles[label])
        ax.fill_between(LEVELS, profile.low, profile.high, color=styles[label]["color"], alpha=0.15, linewidth=0)
    ax.set(xlabel="score (0: lowest, 1: highest last return of a task)", ylabel="part of the runs above that score")
    ax.set(ylim=(0, 1.02), xlim=(0, 1))
    ax.grid(alpha=0.3)
    fig.legend(loc="outside lower center", fontsize="small")
    fig.savefig(path, dpi=130)


def draw_intervals(lines: Sequence[Line], path: Path, styles: dict[str, dict[str, Any]]) -> None:
    """Every statistic with its interval: a panel for each task and statistic."""
    panels: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        panels.setdefault((line.statistic, line.task), []).append(line)
    highest = max(map(len, panels.values()))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = subplots(rows, columns, figsize=(5.2 * columns, (0.4 * highest + 1.3) * rows), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, ((statistic, task), here) in zip(axes.flat, panels.items(), strict=False):
        for height, line in enumerate(here):
            color = styles.get(line.runs, {"color": "#0072B2"})["color"]
            value, low, high = line.estimate
            ax.plot([low, high], [height, height], color=color, linewidth=6, alpha=0.35, solid_capstyle="butt")
            ax.plot([value], [height], color=color, marker="|", markersize=12, markeredgewidth=2)
        if "probability" in statistic:
            ax.axvline(0.5, color="#999999", linewidth=1, linestyle="--")
            ax.set_xlim(-0.02, 1.02)
        ax.set_yticks(range(len(here)), [line.runs.replace(" > ", "\n> ") for line in here], fontsize="x-small")
        ax.set_title(f"{task}\n{statistic}", fontsize="small")
        ax.margins(y=0.3)
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.3)
    fig.savefig(path, dpi=130)


def write(found: Kinds, directory: Path) -> str:
    """Leave tables and pictures in a directory; the report as text."""
    lines = list(statistics(found))
    text = "\n".join(markdown(lines, found))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.md").write_text(f"{text}\n", encoding="utf-8")
    with (directory / "report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(line.cells() for line in lines)
    finished = {
        task: kept
        for task, here in found.items()
        if (kept := {label: kind.runs for label, kind in here.items() if kind.runs})
    }
    styles = plot.styles_of(finished)
    plot.draw(finished, directory / "curves.png", interquartile_mean, "interquartile mean")
    draw_profiles(found, directory / "profiles.png", styles)
    draw_intervals([line for line in lines if line.seeds], directory / "intervals.png", styles)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Read, compute, draw, print; the exit status."""
    assert __doc__ is not None
    first, _, rest = __doc__.partition("\n")
    parser = plot.Parser(
        description=first.replace("%", "%%"), epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP", help="a sweep, or a directory with runs in it")
    parser.add_argument("--output", type=Path, default=Path("report"), help="the directory of the report (report)")
    args = parser.parse_args(argv)
    try:
        print(write(read(args.sweeps), args.output))
    except UsageError as error:
        process.complain(f"error: {error}")
        return 2
    except OSError as error:
        process.complain(f"error: --output={args.output}: must be a directory that can be written to ({error})")
        return 2
    print(f"\nthe report is in {args.output}: report.md, report.csv, curves.png, profiles.png, intervals.png")
    return 0


if __name__ == "__main__":
    process.ready()
    sys.exit(main())
