"""Routes at matched policy entropy: every policy beside the Gaussian whose entropy comes closest to its own.

    python recipes/benchmarks/matched_routes.py recipes/results/routes.csv recipes/results/routes_gaussian_*.csv

Each file is the ``routes.csv`` of one run of ``recipes/target_reaching.py``; the first one's policies are compared, and
those of the others with the name ``--control`` are the Gaussians at other target entropies. A target entropy does not
match policies by itself: the loss of the temperature sees the proposals that the actor's loss flows through, not what
the router draws. So what is matched is the entropy of the trained policies along their episodes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from parts.figures import mpl, subplots
from parts.intervals import interquartile_mean, probability_of_improvement
from parts.routes_report import LABELS, POLICY_STYLES, STYLE

COLUMNS = ("entropy", "success", "effective_routes")


def read(paths: list[Path], control: str) -> dict[tuple[str, str], pd.DataFrame]:
    """Stochastic rows by policy and file: all policies of the first file, the control's of the others."""
    found = {}
    for path in paths:
        data = pd.read_csv(path)
        for policy, rows in data[data["kind"] == "stochastic"].groupby("policy", sort=False):
            if path == paths[0] or policy == control:
                found[str(policy), str(path)] = rows
    return found


def closest(rows: pd.DataFrame, controls: dict[str, pd.DataFrame]) -> str:
    """The file whose control has the nearest interquartile mean of the entropy."""
    entropy = float(interquartile_mean(rows["entropy"]).value)
    return min(controls, key=lambda name: abs(float(interquartile_mean(controls[name]["entropy"]).value) - entropy))


def table(found: dict[tuple[str, str], pd.DataFrame], control: str) -> str:
    """Markdown: interquartile means over seeds with 95 % intervals, each policy followed by its control."""
    controls = {name: rows for (policy, name), rows in found.items() if policy == control}
    lines = [
        f"| policy | entropy | success | effective routes | {control}: entropy | success | effective routes "
        "| P(more routes) | P(more success) |",
        "|" + "---|" * 9,
    ]
    for (policy, _), rows in found.items():
        if policy == control:
            continue
        beside = controls[closest(rows, controls)]
        cells = [str(interquartile_mean(frame[column])) for frame in (rows, beside) for column in COLUMNS]
        cells += [
            str(probability_of_improvement(rows[column], beside[column])) for column in ("effective_routes", "success")
        ]
        lines.append(" | ".join(["| " + policy, *cells]) + " |")
    return "\n".join(lines)


def draw(found: dict[tuple[str, str], pd.DataFrame], path: Path) -> None:
    """Effective routes and success against entropy: a point a seed, a large one for the interquartile means."""
    with mpl.rc_context(STYLE):
        fig, axes = subplots(1, 2, figsize=(15, 5.5), sharex=True)
        for (policy, _), rows in found.items():
            color, marker = POLICY_STYLES[policy]
            for ax, column in zip(axes, ("effective_routes", "success"), strict=True):
                ax.plot(rows["entropy"], rows[column], marker, color=color, alpha=0.3, markersize=6)
                x, y = interquartile_mean(rows["entropy"]), interquartile_mean(rows[column])
                ax.vlines(x.value, y.low, y.high, color=color, linewidth=2.5)
                ax.plot(
                    x.value, y.value, marker, color=color, markersize=13, markeredgecolor="white", label=LABELS[policy]
                )
        for ax, name in zip(axes, ("effective routes, stochastic policy", "success rate"), strict=True):
            ax.set(xlabel="policy entropy (nats)", ylabel=name)
            ax.grid(alpha=0.3)
        handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        fig.legend(handles.values(), handles.keys(), loc="outside right upper")
        fig.savefig(path)


def main(argv: list[str] | None = None) -> str:
    """Read, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--control", default="gaussian")
    parser.add_argument("--out", type=Path, help="the picture; beside the first file if not given")
    args = parser.parse_args(argv)
    for path in args.files:
        if not path.is_file():
            parser.error(f"{path}: must be a routes.csv of recipes/target_reaching.py")
    found = read(args.files, args.control)
    if not any(policy == args.control for policy, _ in found):
        parser.error(f"--control {args.control}: must be a policy of the files")
    draw(found, args.out or args.files[0].with_name("routes_matched.png"))
    text = table(found, args.control)
    print(text)
    return text


if __name__ == "__main__":
    main()
