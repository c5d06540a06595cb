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
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).parents[1]))

from parts.figures import subplots

# hues that stay apart under every kind of colour blindness (Okabe and Ito); a method has the same one in every picture
COLORS = {
    "gaussian": "#000000",
    "responsibility": "#0072B2",
    "frequency": "#E69F00",
    "critic": "#D55E00",
    "paper": "#D55E00",
    "dac": "#56B4E9",
}
OTHER = "#009E73"
CONTROL = "gaussian"
TOGETHER = 5
"""So many methods share a panel; more of them have one each, with the control in it."""
MODES = ("effective_experts", "effective_experts_per_state", "mutual_information", "dead_fraction")


def draw(runs: dict[str, pd.DataFrame], title: str, path: Path) -> None:
    """Evaluation return (mean and standard deviation over episodes) against frames, one line a run."""
    method = {name: re.sub(r"-seed\d+$", "", name) for name in runs}
    methods = list(dict.fromkeys(method.values()))
    panels = [methods]
    if len(methods) > TOGETHER:
        panels = [[CONTROL, name] if CONTROL in methods else [name] for name in methods if name != CONTROL]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = (10.5, 5) if len(panels) == 1 else (3.4 * columns, 2.9 * rows + 0.4)
    fig, axes = subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    for ax, shown in zip(axes.flat, panels, strict=False):
        for name, data in runs.items():
            if method[name] in shown:
                _line(ax, name, method[name], data)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.tick_params(axis="x", labelrotation=30)
        ax.grid(alpha=0.3)
        if len(panels) > 1:
            ax.legend(fontsize="small", loc="upper left")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    fig.supxlabel("frames", fontsize="medium")
    fig.supylabel("evaluation return", fontsize="medium")
    fig.suptitle(title)
    if len(panels) == 1:
        fig.legend(title="run, last return", loc="outside right upper")
    fig.savefig(path, dpi=130)


def _line(ax: Axes, name: str, method: str, data: pd.DataFrame) -> None:
    again = re.search(r"-seed([1-9]\d*)$", name) is not None
    color = COLORS.get(method, OTHER)
    ax.errorbar(
        data["frames"], data["return_mean"], data["return_std"], color=color, marker="o", markersize=3.5,
        linewidth=1.6, elinewidth=0.7, capsize=2, linestyle=":" if again else "-",
        label=f"{name}  {data['return_mean'].iloc[-1]:,.0f}",
    )  # fmt: skip


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
