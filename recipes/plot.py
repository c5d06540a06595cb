"""Draw and compare runs: one panel a task, one line for each kind of run, with its interval over seeds.

    python recipes/plot.py outputs/sac_pmoe/...
    python recipes/plot.py outputs/sac_pmoe outputs/ppo_pmoe/multirun/... --output comparison.png

Each path is a run, or a directory with runs in it: a sweep, a run of ``sac_many_seeds.py`` or of
``target_reaching.py``. Runs that differ in nothing but their seed share a line: the mean over seeds, with its 95 %
bootstrap interval. Every other line is named by the keys in which the runs differ. A table of the last evaluations goes
to the terminal.
"""

from __future__ import annotations

if __name__ == "__main__":
    from parts import process

    process.begin()

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from parts import process
from parts.errors import UsageError
from parts.figures import line_styles, subplots
from parts.intervals import Estimate, mean_interval
from parts.resume import flatten, read_config

from torchrl_pmoe.runs import read_metrics

UNIMPORTANT = ("seed", "num_seeds", "device", "resume", "logger.", "checkpoint.", "compile.", "optim.num_threads")
"""The beginnings of the keys that do not tell one kind of run from another."""


@dataclass(frozen=True)
class Run:
    """One agent's record.

    Args:
        path: of its ``metrics.csv``.
        config: dotted keys and values.
        frames: of the evaluations, ``[T]``.
        returns: mean return of each, ``[T]``.
    """

    path: Path
    config: dict[str, Any]
    frames: np.ndarray
    returns: np.ndarray

    @property
    def env(self) -> str:
        """The task."""
        return str(self.config.get("env"))


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs at some paths, in the order of their names.

    Raises:
        UsageError: in one line, for a path without a run, or a record that cannot be read.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        files = sorted(path.rglob("metrics.csv")) if path.is_dir() else []
        found = [run for file in files if (run := _read(file)) is not None]
        if not found:
            raise UsageError(f"{path}: must be a run, or a directory with runs that have been evaluated")
        runs.update({run.path.resolve(): run for run in found})
    return list(runs.values())


def _read(file: Path) -> Run | None:
    # one of several agents has its config beside its directory
    config = read_config(file.parent) or read_config(file.parent.parent)
    if config is None:
        return None
    try:
        data = read_metrics(file)
        frames, returns = data["frames"], data["return_mean"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{file}: must be the metrics.csv of a run ({error})") from error
    return Run(file, dict(flatten(config)), frames, returns) if len(frames) else None


def kinds(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """The runs by task, and by what tells them apart but for their seeds."""
    telling = [
        key
        for key in dict.fromkeys(key for run in runs for key in run.config)
        if key != "env" and not key.startswith(UNIMPORTANT)
    ]
    differ = [key for key in telling if len({str(run.config.get(key)) for run in runs}) > 1]
    # what follows from the policy alone need not be said
    if "policy" in differ or "recipe" in differ:
        explained: list[str] = [key for key in ("recipe", "policy") if key in differ]
        by: dict[tuple, set[tuple]] = {}
        rest = [key for key in differ if key not in explained]
        for run in runs:
            kind = tuple(str(run.config.get(key)) for key in explained)
            by.setdefault(kind, set()).add(tuple(str(run.config.get(key)) for key in rest))
        if all(len(found) == 1 for found in by.values()):
            differ = explained
    found: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        label = ", ".join(f"{key}={run.config[key]}" for key in differ if run.config.get(key) is not None)
        label = label or f"policy={run.config.get('policy')}"
        found.setdefault(run.env, {}).setdefault(label, []).append(run)
    return found


def common_frames(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Frames ``[T]`` at which all runs were evaluated, and their returns there, ``[seeds, T]``."""
    frames = runs[0].frames
    for run in runs[1:]:
        frames = np.intersect1d(frames, run.frames)
    if not len(frames):
        # one of them has come nowhere yet: the longest stands for all
        runs = [max(runs, key=lambda run: len(run.frames))]
        frames = runs[0].frames
    return frames, np.stack([run.returns[np.isin(run.frames, frames)][: len(frames)] for run in runs])


def over_seeds(
    runs: Sequence[Run], estimate: Callable[[np.ndarray], Estimate] = mean_interval
) -> tuple[np.ndarray, Estimate]:
    """Frames ``[T]`` at which all runs were evaluated, and what their returns there say together.

    Args:
        runs: one for each seed.
        estimate: reads returns ``[seeds, T]``.
    """
    frames, samples = common_frames(runs)
    return frames, estimate(samples)


def styles_of(found: dict[str, dict[str, list[Run]]]) -> dict[str, dict[str, Any]]:
    """The style of each kind's line, the same in every picture."""
    policies = {label: str(runs[0].config.get("policy")) for here in found.values() for label, runs in here.items()}
    return dict(zip(policies, line_styles(list(policies.values())), strict=True))


def draw(
    found: dict[str, dict[str, list[Run]]],
    path: Path,
    estimate: Callable[[np.ndarray], Estimate] = mean_interval,
    name: str = "mean",
) -> None:
    """One panel a task.

    Args:
        found: runs by task and kind.
        path: of the picture.
        estimate: what the lines are, see :func:`over_seeds`.
        name: of that.
    """
    styles = styles_of(found)
    fig, axes = subplots(1, len(found), figsize=(6.2 * len(found) + 0.5, 4.4), squeeze=False)
    for ax, (env, here) in zip(axes[0], found.items(), strict=True):
        for label, runs in here.items():
            frames, mean = over_seeds(runs, estimate)
            style = styles[label]
            ax.plot(frames, mean.value, linewidth=2, label=f"{label} ({len(runs)})", **style)
            if len(runs) > 1:
                ax.fill_between(frames, mean.low, mean.high, color=style["color"], alpha=0.15, linewidth=0)
        ax.set(title=env, xlabel="frames", ylabel=f"evaluation return,\n{name} and 95 % interval over seeds")
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.tick_params(axis="x", labelrotation=30)
        ax.grid(alpha=0.3)
    handles = {text: handle for ax in axes[0] for handle, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    columns = -(-len(handles) // 20)
    fig.legend(
        handles.values(), handles.keys(), title="(seeds)", loc="outside lower center" if columns > 1 else
        "outside right upper", ncols=columns, fontsize="small" if len(handles) <= 12 else "x-small",
    )  # fmt: skip
    fig.savefig(path, dpi=130)


def table(found: dict[str, dict[str, list[Run]]]) -> Iterator[str]:
    """Markdown: the last evaluation that all seeds of a kind have."""
    yield "| task | runs | seeds | frames | return: mean [95 % interval] |"
    yield "|---|---|---|---|---|"
    for env, here in found.items():
        for label, runs in here.items():
            frames, mean = over_seeds(runs)
            value = f"{mean.value[-1]:,.1f}"
            if len(runs) > 1:
                value += f" [{mean.low[-1]:,.1f}, {mean.high[-1]:,.1f}]"
            yield f"| {env} | {label} | {len(runs)} | {int(frames[-1]):,} | {value} |"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Without the usage."""
        process.complain(f"error: {message}; --help tells more")
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Read, draw, print; the exit status."""
    assert __doc__ is not None
    first, _, rest = __doc__.partition("\n")
    parser = Parser(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run, or a directory with runs in it")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), help="the picture (comparison.png)")
    args = parser.parse_args(argv)
    try:
        found = kinds(find_runs(args.runs))
        draw(found, args.output)
    except UsageError as error:
        process.complain(f"error: {error}")
        return 2
    except (OSError, ValueError) as error:
        process.complain(f"error: --output={args.output}: must be a picture that can be written ({error})")
        return 2
    print("\n".join(table(found)))
    print(f"the picture is {args.output}")
    return 0


if __name__ == "__main__":
    process.ready()
    sys.exit(main())
