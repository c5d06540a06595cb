"""Draws ``results.png``: where a mixture helps and where it does not, from the raw figures in ``recipes/results``.

    python docs/images/results.py

It lies beside this file.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "recipes" / "results"
BANDITS = {  # scoring, routing, backprop, score
    "one Gaussian": ("none", "none", "routed", "mixture"),
    "PMOE, the paper's": ("critic", "frequency", "max", "expert"),
    "PMOE, frequency / all": ("critic", "frequency", "all", "mixture"),
    "PMOE, soft frequency / weighted": ("critic", "soft_frequency", "weighted", "mixture"),
}
CURVES = ("gaussian", "paper", "frequency-all-mixture", "soft-weighted-mixture")
COLORS = ("#000000", "#CC79A7", "#009E73", "#0072B2")  # hues of Okabe and Ito, as in the other pictures


def main() -> None:
    """Write the picture beside this file."""
    figure = Figure(figsize=(11.0, 3.7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.25))

    rows = pd.read_csv(RESULTS / "bandits.csv")
    rows = rows[rows["problem"] == "four_peaks"].set_index(["scoring", "routing", "backprop", "score"]).sort_index()
    for place, (choice, color) in enumerate(zip(BANDITS.values(), COLORS, strict=True)):
        seeds = rows.loc[choice]
        share, kept = 100 * seeds["share"].mean(), int((seeds["peaks_kept"] == seeds["peaks"]).sum())
        left.barh(place, share, color=color)
        left.text(share + 1.5, place, f"{share:.0f} %, all peaks in {kept} of {len(seeds)}", va="center", fontsize=9)
    left.set(
        yticks=range(len(BANDITS)), yticklabels=BANDITS, xlim=(0, 168), xticks=range(0, 101, 25),
        xlabel="share of the best possible objective in %", title="bandit with four equal peaks, 6 seeds",
    )  # fmt: skip
    left.invert_yaxis()

    for name, label, color in zip(CURVES, BANDITS, COLORS, strict=True):
        curve = pd.read_csv(RESULTS / "halfcheetah" / f"{name}.csv")
        right.plot(curve["frames"], curve["return_mean"], color=color, label=label, linewidth=2)
        low, high = (curve["return_mean"] + sign * curve["return_std"] for sign in (-1, 1))
        right.fill_between(curve["frames"], low, high, color=color, alpha=0.12, linewidth=0)
    right.set(
        xlabel="frames", ylabel="evaluation return", title="SAC, HalfCheetah-v4, K = 4, one seed; band: 10 episodes"
    )
    right.xaxis.set_major_formatter("{x:,.0f}")
    right.yaxis.set_major_formatter("{x:,.0f}")
    right.legend(fontsize=9, frameon=False)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(10.5)
    figure.savefig(HERE / "results.png")


if __name__ == "__main__":
    main()
