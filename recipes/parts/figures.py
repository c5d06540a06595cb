"""Pictures in files: drawn by Agg, whatever backend ``MPLBACKEND`` names, and without matplotlib's list of figures."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# matplotlib refuses to be imported where a notebook has left a backend there that is not installed
_given = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
finally:
    if _given is not None:
        os.environ["MPLBACKEND"] = _given

__all__ = ["draw_learning_curve", "expert_colors", "expert_legend", "line_styles", "mpl", "subplots"]


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **kwargs: Any) -> tuple[Figure, Any]:
    """A figure and its axes, as ``matplotlib.pyplot.subplots`` makes them.

    Args:
        rows: of axes.
        columns: of axes.
        figsize: width and height in inches.
        **kwargs: of ``Figure.subplots``.
    """
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **kwargs)


def draw_learning_curve(data: Mapping[str, np.ndarray], title: str, path: Path) -> None:
    """Draw return and expert usage over frames.

    Args:
        data: the columns of a ``metrics.csv``.
        title: of the picture.
        path: of the picture.
    """
    frames = data["frames"]
    usage = [data[name] for name in data if re.fullmatch(r"usage_\d+", name)]
    fig, axes = subplots(1 + bool(usage), 1, sharex=True, figsize=(7, 6 if usage else 4), squeeze=False)
    top = axes[0, 0]
    mean, std = data["return_mean"], data["return_std"]
    top.plot(frames, mean, color="#0072B2", marker="o" if len(frames) < 30 else None, markersize=3)
    top.fill_between(frames, mean - std, mean + std, color="#0072B2", alpha=0.2, linewidth=0)
    top.set(title=title, ylabel="evaluation return (mean ± std)")
    top.grid(alpha=0.3)
    if usage:
        bottom = axes[1, 0]
        labels = [str(index) for index in range(len(usage))]
        bottom.stackplot(frames, usage, colors=expert_colors(len(usage)), labels=labels, edgecolor="white", lw=0.5)
        bottom.set(ylabel="expert usage", ylim=(0, 1))
        bottom.margins(x=0)
        expert_legend(bottom, len(usage))
    axes[-1, 0].set_xlabel("frames")
    fig.savefig(path, dpi=150)


def expert_colors(number: int) -> np.ndarray:
    """A colour for each expert, ``[number, 4]``."""
    # cividis keeps its order of lightness under every kind of colour blindness
    return mpl.colormaps["cividis"](np.linspace(0.05, 0.95, number))


def expert_legend(axes: Any, number: int, name: str = "expert") -> None:
    """A legend beside the axes that stays within their height: columns of 16 experts, small ones for many."""
    columns = -(-number // 16)
    axes.legend(
        title=name, loc="upper left", bbox_to_anchor=(1, 1.02), reverse=True, ncols=columns,
        fontsize="small" if number <= 16 else "x-small", columnspacing=0.8, handlelength=1.0, labelspacing=0.25,
    )  # fmt: skip


# eight hues that stay apart under every kind of colour blindness (Okabe and Ito); a policy has one everywhere
POLICY_COLORS = {
    "gaussian": "#000000",
    "pmoe": "#CC79A7",
    "gating": "#E69F00",
    "mcp": "#F0E442",
    "dac": "#56B4E9",
}
_OTHER_COLORS = ("#0072B2", "#009E73", "#D55E00", "#999999")
_DASHES = ("-", "--", ":", "-.")


def line_styles(policies: Sequence[str]) -> list[dict[str, Any]]:
    """A style for each line: the colour of its policy; further lines of a policy have other colours and dashes."""
    styles, others = [], 0
    seen: set[str] = set()
    for policy in policies:
        color = POLICY_COLORS.get(policy)
        if color is None or policy in seen:
            color = _OTHER_COLORS[others % len(_OTHER_COLORS)]
            dash = _DASHES[others // len(_OTHER_COLORS) % len(_DASHES)]
            others += 1
        else:
            dash = "-"
        seen.add(policy)
        styles.append({"color": color, "linestyle": dash})
    return styles
