"""Draws ``concepts.svg``: where each key acts in one update of SAC with a mixture.

    python docs/images/concepts.py

It lies beside this file.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
BLUE, ORANGE = "#0072B2", "#D55E00"


def box(ax: Axes, x: float, y: float, width: float, title: str, text: str = "") -> None:
    """A part of the method, centred at ``(x, y)``."""
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.5), width, 1.0, boxstyle="round,pad=0.03,rounding_size=0.15",
            facecolor="#F2F4F8", edgecolor="#444444", linewidth=1.2,
        )
    )  # fmt: skip
    ax.text(x, y + (0.17 if text else 0.0), title, ha="center", va="center", fontsize=11, fontweight="bold")
    ax.text(x, y - 0.22, text, ha="center", va="center", fontsize=9.5)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], *, bend: float = 0.0, learns: bool) -> None:
    """From one part to another: black for numbers, orange and dashed for what a part learns from."""
    ax.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=14,
            linewidth=1.6, color=ORANGE if learns else "#444444", linestyle="--" if learns else "-",
        )
    )  # fmt: skip


def key(ax: Axes, x: float, y: float, name: str, text: str) -> None:
    """A key and the question that it answers."""
    ax.text(x, y, name, ha="center", va="center", fontsize=11, color=BLUE, family="monospace", fontweight="bold")
    ax.text(x, y - 0.16, text, ha="center", va="top", fontsize=9.5, linespacing=1.25)


def main() -> None:
    """Write the picture beside this file."""
    mpl.rcParams["svg.hashsalt"] = "concepts"  # the same bytes every time
    figure = Figure(figsize=(12.4, 6.9), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(-0.2, 13.2), ylim=(-0.75, 7.0))
    ax.axis("off")

    box(ax, 0.9, 3.0, 1.7, "state", "s")
    box(ax, 3.6, 5.2, 2.4, "router", "probabilities w(s)")
    box(ax, 3.6, 0.8, 2.4, "K experts", "Gaussians behind a tanh")
    box(ax, 7.0, 3.0, 2.4, "proposals", "one action of each expert")
    box(ax, 11.5, 3.0, 2.4, "scores", "one number a proposal")
    box(ax, 11.5, 6.2, 2.4, "environment", "one action")
    box(ax, 11.5, 0.0, 2.4, "temperature", "weight of the entropy")

    arrow(ax, (1.4, 3.55), (2.4, 5.0), learns=False)
    arrow(ax, (1.4, 2.45), (2.4, 1.0), learns=False)
    arrow(ax, (4.85, 1.15), (6.1, 2.45), learns=False)
    arrow(ax, (8.25, 3.0), (10.25, 3.0), learns=False)
    arrow(ax, (4.5, 5.75), (10.25, 6.35), bend=-0.06, learns=False)
    arrow(ax, (10.7, 3.55), (4.85, 5.1), bend=0.12, learns=True)
    arrow(ax, (10.7, 2.45), (4.85, 0.65), bend=-0.14, learns=True)
    arrow(ax, (7.0, 2.45), (10.25, -0.1), bend=0.3, learns=False)

    key(ax, 9.25, 3.42, "scoring", "")
    key(ax, 9.25, 3.0, "", "who scores: the critics,\nor the slope of a loss")
    key(ax, 6.5, 4.4, "routing", "how the router learns\nfrom the scores")
    key(ax, 6.0, 0.42, "backprop", "which experts the\nactor's loss trains")
    key(ax, 3.6, -0.1, "loss.decoupled", "max: on the draw that won,\nor on a fresh draw")
    key(ax, 7.0, 6.72, "acting", "")
    key(ax, 7.0, 6.08, "", "a draw of the router,\nor the best-scored proposal")
    key(ax, 9.4, 1.05, "score", "whose log-density: the\nmixture's or the expert's")
    key(ax, 11.5, 1.32, "loss.entropy_from", "entropy of the policy,\nor of the winning draws")

    ax.plot([0.0, 0.6], [6.75, 6.75], color="#444444", linewidth=1.6)
    ax.text(0.7, 6.75, "numbers", va="center", fontsize=9.5)
    ax.plot([0.0, 0.6], [6.4, 6.4], color=ORANGE, linewidth=1.6, linestyle="--")
    ax.text(0.7, 6.4, "learning", va="center", fontsize=9.5)
    ax.text(0.0, 6.05, "key", va="center", fontsize=10, color=BLUE, family="monospace", fontweight="bold")
    ax.text(0.7, 6.05, "a choice of yours", va="center", fontsize=9.5)
    figure.savefig(HERE / "concepts.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
