"""What the benchmarks share: taking turns, medians, ratios, and the line that says where it was measured.

Variants take turns, A B A B, so that a change in the machine's speed hits all of them. A ratio is the median over the
rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NoReturn, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")
RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "torchrl", "tensordict", "gymnasium", "mujoco", "stable-baselines3")


class Finished(BaseException):
    """Raised by a benchmark to end a run that has shown what was asked.

    No ``Exception``, which a run would tell as what went wrong with it.
    """


def command_line(
    about: str, output: str, *, rounds: int = 5, threads: int = 2, variants: bool = True
) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has.

    Args:
        about: the docstring of the script.
        output: name of the CSV beside the other results.
        rounds: default of ``--rounds``.
        threads: default of ``--threads``.
        variants: whether there are some to choose from (``--only``, see :func:`chosen`).
    """
    # argparse would take the percent signs of a docstring for its own
    parser = argparse.ArgumentParser(
        description=about.replace("%", "%%"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=at_least_one, default=rounds, help=f"turns of every variant ({rounds})")
    if variants:
        parser.add_argument("--only", nargs="+", metavar="VARIANT", help="some of the variants, named as in the table")
    parser.add_argument("--threads", type=at_least_one, default=threads, help=f"of PyTorch ({threads})")
    parser.add_argument("--output", type=Path, default=RESULTS / output, help=f"CSV (recipes/results/{output})")
    return parser


def chosen(names: Iterable[str], only: Sequence[str] | None) -> list[str]:
    """The variants that ``--only`` names, all without it; an unknown one ends the process in one line."""
    every = list(names)
    for name in only or ():
        if name not in every:
            stop(f"--only {name!r}: must be among {', '.join(map(repr, every))}")
    return every if only is None else list(only)


def at_least_one(given: str) -> int:
    """For ``argparse``: a whole number of one or more."""
    try:
        value = int(given)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {given}")
    return value


def stop(error: object) -> NoReturn:
    """End with one line on stderr and status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def alternate(variants: Mapping[str, Callable[[], T]], rounds: int, unit: str = "run") -> dict[str, list[T]]:
    """What every variant returns, one entry a round; they take turns under a progress bar."""
    found: dict[str, list[T]] = {name: [] for name in variants}
    with tqdm(total=rounds * len(variants), unit=unit) as bar:
        for _ in range(rounds):
            for name, measure in variants.items():
                bar.set_postfix_str(name)
                found[name].append(measure())
                bar.update()
    return found


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of ``values / base``, round by round."""
    return median(value / reference for value, reference in zip(values, base, strict=True))


def place(threads: int, rounds: int, device: str = "cpu") -> str:
    """Machine, threads, versions and rounds, in one line."""
    versions = [f"{name} {version}" for name in PACKAGES if (version := version_of(name))]
    where = f"{_processor()} ({os.cpu_count()} cores), {threads} thread(s)"
    if device != "cpu":
        where = f"{torch.cuda.get_device_name(device)}, {where}"
    return f"{where}; Python {platform.python_version()}, {', '.join(versions)}; medians of {rounds} rounds"


def version_of(package: str) -> str | None:
    """The version of an installed package, ``None`` where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Claim:
    """What the figures must show.

    Args:
        about: in words.
        over: the variant above the line of the ratio.
        under: the one below it.
        bound: of the ratio.
        at_least: whether the bound is the smallest or the largest allowed.
    """

    about: str
    over: str
    under: str
    bound: float
    at_least: bool = True

    def row(self, found: Mapping[str, Sequence[float]]) -> list[str] | None:
        """A line of the table: ratio, what is asked, whether it holds; ``None`` where a variant was not measured."""
        if not {self.over, self.under} <= found.keys():
            return None
        value = ratio(found[self.over], found[self.under])
        held = value >= self.bound if self.at_least else value <= self.bound
        sign = ">=" if self.at_least else "<="
        return [self.about, f"{value:.2f}", f"{sign} {self.bound:g}", "yes" if held else "no"]


def report(
    found: Mapping[str, Sequence[float]], *, unit: str, base: str, claims: Sequence[Claim], output: Path
) -> None:
    """Print medians, ratios to ``base`` and claims; keep the raw figures.

    Args:
        found: figures by variant and round.
        unit: of the figures.
        base: a variant; left out of the table where it was not measured.
        claims: what must hold.
        output: where the CSV goes.
    """
    rows = []
    for name, values in found.items():
        over = [f"{ratio(values, found[base]):.2f}"] if base in found else []
        rows.append([name, f"{median(values):.4g}", *over])
    print_table(["variant", unit, *([f"over {base}"] if base in found else [])], rows)
    lines = [row for claim in claims if (row := claim.row(found)) is not None]
    if lines:
        print()
        print_table(["claim", "ratio", "asked", "holds"], lines)
    rounds = len(next(iter(found.values()), []))
    write_csv(
        output,
        ["variant", "unit", *(f"round_{index}" for index in range(rounds))],
        [[name, unit, *values] for name, values in found.items()],
    )


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
    """Keep the raw figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    print(f"Wrote {path}")
