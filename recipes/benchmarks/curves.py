"""Learning curves of several runs in one picture, and their last returns as a table.

    python recipes/benchmarks/curves.py recipes/results/halfcheetah --title "HalfCheetah-v4, K=4, seed 0"

Every ``NAME.csv`` in the folder is the ``metrics.csv`` of one run; ``NAME-seedN.csv`` share the colour of ``NAME``.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from parts.figures import subplots

# eight hues that stay apart under every kind of colour blindness (Okabe and Ito), each with a marker of its own
STYLES = tuple(zip(("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"),
                   "osD^vPX*", strict=True))  # fmt: skip
MODES = ("effective_experts", "effective_experts_per_state", "mutual_information", "dead_fraction")


def draw(runs: dict[str, pd.DataFrame], title: str, path: Path) -> None:
    """Evaluation return (mean and standard deviation over episodes) against frames, one line a run."""
    fig, ax = subplots(figsize=(11, 5.5))
    method = {name: re.sub(r"-seed\d+$", "", name) for name in runs}
    methods = sorted(set(method.values()))
    first = {method[name]: name for name in sorted(runs, reverse=True)}
    for name, data in runs.items():
        place = methods.index(method[name])
        color, marker = STYLES[place % len(STYLES)]
        again = place >= len(STYLES) or first[method[name]] != name
        ax.errorbar(
            data["frames"], data["return_mean"], data["return_std"],
            color=color, marker=marker, markersize=6, linewidth=1.8, elinewidth=0.8, capsize=2,
            linestyle=":" if again else "-", markerfacecolor="white" if again else color,
            label=f"{name}  {data['return_mean'].iloc[-1]:,.0f}",
        )  # fmt: skip
    ax.set(xlabel="frames", ylabel="evaluation return", title=title)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.grid(alpha=0.3)
    fig.legend(title="run, last return", loc="outside right upper")
    fig.savefig(path, dpi=150)


def table(runs: dict[str, pd.DataFrame]) -> str:
    """Markdown: the last evaluation of each run, its best, and what became of its experts."""
    lines = ["| run | frames | last return | best return | exp H(E w) | exp E H(w) | I(A;Z) | dead |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, data in runs.items():
        last = data.iloc[-1]
        modes = " | ".join(f"{last[key]:.2f}" if key in last else "-" for key in MODES)
        lines.append(
            f"| {name} | {last['frames']:,.0f} | {last['return_mean']:,.0f} ± {last['return_std']:,.0f} "
            f"| {data['return_mean'].max():,.0f} | {modes} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the folder, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    files = sorted(args.folder.glob("*.csv"))
    if not files:
        parser.error(f"{args.folder}: must be a folder with the metrics.csv of each run as NAME.csv")
    runs = {file.stem: pd.read_csv(file) for file in files}
    runs = dict(sorted(runs.items(), key=lambda item: -item[1]["return_mean"].iloc[-1]))
    draw(runs, args.title, args.folder.with_suffix(".png"))
    print(table(runs))


if __name__ == "__main__":
    main()
