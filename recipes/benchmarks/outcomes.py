"""What trained policies achieve on bandits, and how that is shown and kept; shared by the benchmarks on bandits."""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isnan
from pathlib import Path
from statistics import mean
from typing import ClassVar, TypeVar

from known_optimum import BANDITS, Bandit, evaluate, solve
from torch import Tensor
from tqdm import tqdm

KEPT = 0.5


@dataclass(frozen=True)
class Outcome:
    """One trained policy, one row of a CSV."""

    combination_type: ClassVar[type]
    """Of ``combination``, in a subclass."""

    problem: str
    combination: object
    """How the policy was trained; its fields are columns of the CSV, its name stands in the table."""
    seed: int
    objective: float
    optimum: float
    share: float
    peaks_kept: int
    peaks: int
    least_peak: float
    """Mass on the peak that fares worst, over that of the best policy there."""
    mass_distance: float
    largest_weight: float


SomeOutcome = TypeVar("SomeOutcome", bound=Outcome)
SomeCombination = TypeVar("SomeCombination")


def outcomes(
    combination: object, bandits: Sequence[Bandit], seeds: Sequence[int], params: tuple[Tensor, Tensor, Tensor]
) -> list[Outcome]:
    """What trained policies achieve; ``params`` are logits, locs and scales, bandit by bandit, seed by seed."""
    found = []
    for bandit, *chunk in zip(bandits, *(p.split(len(seeds)) for p in params), strict=True):
        best = solve(bandit)
        report = evaluate(bandit, *chunk)
        on_peak = report.peak_mass / best.peak_mass
        kept = (on_peak >= KEPT).sum(-1)
        distance = (report.basin_mass - best.basin_mass).abs().sum(-1)
        largest = chunk[0].softmax(-1).amax(-1)
        found += [
            Outcome(
                problem=bandit.name,
                combination=combination,
                seed=seed,
                objective=report.objective[i].item(),
                optimum=best.objective,
                share=report.objective[i].item() / best.objective,
                peaks_kept=int(kept[i]),
                peaks=len(bandit.centres),
                least_peak=on_peak[i].min().item(),
                mass_distance=distance[i].item(),
                largest_weight=largest[i].item(),
            )
            for i, seed in enumerate(seeds)
        ]
    return found


def sweep(
    combinations: Sequence[SomeCombination],
    bandits: Sequence[Bandit],
    steps: int,
    measure: Callable[[SomeCombination, Sequence[Bandit], Callable[[], object]], Iterable[SomeOutcome]],
) -> Iterator[SomeOutcome]:
    """Hand every combination, with the bandits of one shape at a time, to ``measure``; outcomes come as they are found.

    Args:
        combinations: ways to train.
        bandits: to train on.
        steps: how often ``measure`` calls its last argument, which moves the progress bar.
        measure: trains a combination on bandits of one shape and says what the policies achieve.
    """
    groups: dict[tuple[int, int], list[Bandit]] = defaultdict(list)
    for bandit in bandits:
        groups[bandit.num_experts, bandit.action_size].append(bandit)
    with tqdm(total=len(combinations) * len(groups) * steps, unit="step", mininterval=1.0) as bar:
        for combination in combinations:
            bar.set_description(str(combination))
            for group in groups.values():
                yield from measure(combination, group, bar.update)


def table(
    found: Sequence[Outcome], title: str = "router / backprop / score", extra: Mapping[str, str] | None = None
) -> str:
    """Markdown, one table a problem.

    Args:
        found: what to show.
        title: of the column that names the combinations.
        extra: titles of further columns, and the attribute of the outcomes whose mean each shows.
    """
    extra = extra or {}
    titles = "".join(f"| {name} " for name in extra)
    lines = []
    for problem in dict.fromkeys(outcome.problem for outcome in found):
        here = [outcome for outcome in found if outcome.problem == problem]
        seeds = len({outcome.seed for outcome in here})
        lines += [
            f"### {problem} (optimum {here[0].optimum:.3f}, {here[0].peaks} peaks, {seeds} seeds)",
            "",
            f"| {title} | share of the optimum: mean (min) | peaks kept | seeds keeping all "
            f"| distance to the closed-form mass | largest weight {titles}|",
            "|---" * (6 + len(extra)) + "|",
        ]
        for name in dict.fromkeys(o.combination for o in here):
            group = [o for o in here if o.combination == name]
            shares = [o.share for o in group]
            kept = sorted({o.peaks_kept for o in group})
            means = [mean(getattr(o, attribute) for o in group) for attribute in extra.values()]
            lines.append(
                f"| {name} | {mean(shares):.1%} ({min(shares):.1%}) "
                f"| {'-'.join(str(n) for n in dict.fromkeys((kept[0], kept[-1])))} "
                f"| {sum(o.peaks_kept == o.peaks for o in group)} of {len(group)} "
                f"| {mean(o.mass_distance for o in group):.2f} | {mean(o.largest_weight for o in group):.2f} "
                + "".join("| - " if isnan(value) else f"| {value:.2f} " for value in means)
                + "|"
            )
        lines.append("")
    return "\n".join(lines)


def _columns(kind: type[Outcome]) -> dict[str, type]:
    """Columns of a CSV of such outcomes and what they hold."""
    how = fields(kind.combination_type)
    columns = [c for field in fields(kind) for c in (how if field.name == "combination" else (field,))]
    return {column.name: {"int": int, "float": float}.get(str(column.type), str) for column in columns}


def recorded(found: Iterable[SomeOutcome], path: Path, kind: type[Outcome]) -> Iterator[SomeOutcome]:
    """Hand outcomes through and write each, as it comes, to a row of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(_columns(kind)))
        writer.writeheader()
        for outcome in found:
            row = asdict(outcome)
            row |= row.pop("combination")
            writer.writerow({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()})
            file.flush()
            yield outcome


def read(path: Path, kind: type[SomeOutcome]) -> list[SomeOutcome]:
    """What :func:`recorded` wrote.

    Raises:
        ValueError: if the columns of ``path`` are not those of ``kind``.
    """
    kinds = _columns(kind)
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or set(rows.fieldnames) != set(kinds):
            raise ValueError(f"its columns must be {', '.join(kinds)}")
        found = []
        for row in rows:
            values = {k: kinds[k](v) for k, v in row.items()}
            how = {field.name: values.pop(field.name) for field in fields(kind.combination_type)}
            found.append(kind(combination=kind.combination_type(**how), **values))
    return found


def add_arguments(
    parser: argparse.ArgumentParser, *, results: Path, fast: str, batch: int, lr: float, loc_spread: float
) -> None:
    """The options that every benchmark on bandits has, with their defaults."""
    parser.add_argument("--problems", nargs="+", choices=list(BANDITS), default=list(BANDITS))
    parser.add_argument("--only", default="", help="combinations whose name contains this")
    parser.add_argument("--seeds", type=int, default=6, help="number of seeds (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--loc-spread", type=float, default=loc_spread)
    parser.add_argument("--csv", type=Path, default=None, help=f"where rows go (default, unless --fast: {results})")
    parser.add_argument("--fast", action="store_true", help=fast)
    parser.add_argument("--show", type=Path, default=None, help="print the tables of this CSV and train nothing")


def shown(
    parser: argparse.ArgumentParser, path: Path, kind: type[SomeOutcome], view: Callable[[Sequence[SomeOutcome]], str]
) -> list[SomeOutcome]:
    """Print what ``--show`` asks for."""
    if not path.is_file():
        parser.error(f"--show={path}: there is no such file")
    try:
        found = read(path, kind)
    except ValueError as reason:
        parser.error(f"--show={path}: {reason}")
    print(view(found))
    return found


def chosen(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    combinations: Sequence[SomeCombination],
    fast: Sequence[SomeCombination],
) -> list[SomeCombination]:
    """The combinations that ``--fast`` and ``--only`` leave; ``--fast`` sets problems and seeds as well."""
    if args.csv is not None and args.csv.is_dir():
        parser.error(f"--csv={args.csv}: it is a folder")
    if args.fast:
        args.problems, args.seeds = ["two_equal"], 2
        return list(fast)
    found = [combination for combination in combinations if args.only in str(combination)]
    if not found:
        parser.error(f"--only={args.only!r} matches no combination")
    return found


def finish(
    stream: Iterable[SomeOutcome],
    path: Path | None,
    kind: type[SomeOutcome],
    view: Callable[[Sequence[SomeOutcome]], str],
) -> list[SomeOutcome]:
    """Run to the end, print the tables, and say where the rows are."""
    found = list(stream if path is None else recorded(stream, path, kind))
    print(view(found))
    if path is not None:
        print(f"Wrote {path}.")
    return found
