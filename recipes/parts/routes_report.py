"""What the policies did on the target-reaching task: one table and five pictures from a folder of runs."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from numpy.typing import NDArray

from parts.figures import mpl, subplots
from parts.intervals import Estimate, interquartile_mean, probability_of_improvement
from torchrl_pmoe.envs import TargetReachingTask
from torchrl_pmoe.envs.target_reaching.routes import effective_routes, routes

KINDS = ("stochastic", "deterministic", "drawn")
CELLS = 20  # the plane is divided into this many squares a side
LABELS = {
    "gaussian": "SAC (Gaussian)",
    "gating": "gating",
    "mcp": "MCP",
    "pmoe_all": "PMOE, all",
    "pmoe_max": "PMOE, max",
    "pmoe": "PMOE, default",
    "pmoe_decoupled": "PMOE, decoupled",
    "pmoe_paper": "PMOE, paper",
    "pmoe_soft": "PMOE, soft",
}
# eight hues that stay apart under every kind of colour blindness (Okabe and Ito)
EXPERTS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
POLICY_STYLES = {
    "gaussian": ("#000000", "o"),
    "gating": ("#E69F00", "s"),
    "mcp": ("#F0E442", "P"),
    "pmoe_all": ("#009E73", "^"),
    "pmoe_max": ("#D55E00", "v"),
    "pmoe": ("#CC79A7", "D"),
    "pmoe_decoupled": ("#56B4E9", "*"),
    "pmoe_paper": ("#999999", "p"),
    "pmoe_soft": ("#0072B2", "X"),
}
STYLE: Any = {
    "font.size": 15,
    "axes.titlesize": 15,
    "legend.fontsize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
}

Array = NDArray[Any]
Records = dict[str, dict[int, dict[str, Array]]]
"""By policy and seed, what ``episodes.npz`` holds."""


def read_records(directory: Path, names: Sequence[str]) -> Records:
    """The episodes of every run, policies in the order in which they are named."""
    records: Records = {}
    for name in names:
        policy, seed = name.rsplit("-seed", 1)
        with np.load(directory / name / "episodes.npz") as file:
            records.setdefault(policy, {})[int(seed)] = {key: file[key] for key in file.files}
    return records


# --------------------------------------------------------------------------------------------- figures of merit


def route_row(record: dict[str, Array], kind: str, task: TargetReachingTask) -> dict[str, float]:
    """Success rate, number of routes, and exp of their entropy given the start, over the episodes of one kind."""
    success = record[f"{kind}_success"]
    # nan after the end
    found = [task.route(path[~np.isnan(path[:, 0])]) for path in record[f"{kind}_path"][success]]
    starts = record[f"{kind}_start"][success].tolist()
    return {
        "success": float(success.mean()),
        "routes": float(len(routes(found)) if found else 0),
        "effective_routes": effective_routes(found, starts),
    }


def cells_over_frames(visited: Array) -> NDArray[np.int64]:
    """How many cells of the plane have been visited after each frame, from positions ``[T, 2]``."""
    place = np.clip(((visited + 1.0) / 2.0 * CELLS).astype(int), 0, CELLS - 1)
    cell = place[:, 0] * CELLS + place[:, 1]
    new = np.zeros(len(cell), dtype=np.int64)
    new[np.unique(cell, return_index=True)[1]] = 1
    return new.cumsum()


def rows(records: Records, directory: Path, task: TargetReachingTask) -> pd.DataFrame:
    """A row per policy, seed and kind of episode."""
    found = []
    for policy, seeds in records.items():
        for seed, record in seeds.items():
            last = pd.read_csv(directory / f"{policy}-seed{seed}" / "metrics.csv")["return_mean"].iloc[-1]
            common = {
                "entropy": float(record["entropy"]),
                "cells": int(cells_over_frames(record["visited"])[-1]),
                "last_return": float(last),
            }
            for kind in KINDS:
                if f"{kind}_path" in record:
                    row = {"policy": policy, "seed": seed, "kind": kind, **route_row(record, kind, task), **common}
                    found.append(row)
    return pd.DataFrame(found)


def table(data: pd.DataFrame) -> str:
    """Markdown: interquartile means over seeds, and what differs from the first policy."""
    first = data["policy"].iloc[0]
    columns = [
        ("stochastic", "success"), ("stochastic", "effective_routes"),
        ("deterministic", "success"), ("deterministic", "effective_routes"),
        ("drawn", "effective_routes"),
        ("stochastic", "entropy"), ("stochastic", "cells"), ("stochastic", "last_return"),
    ]  # fmt: skip

    def values(policy: str, kind: str, column: str) -> Array:
        return data.loc[(data["policy"] == policy) & (data["kind"] == kind), column].to_numpy()

    names = [f"{column.replace('_', ' ')}, {kind}" for kind, column in columns[:5]]
    header = ["policy", *names, "entropy (nats)", "cells explored", "last return"]
    better = [f"P(more routes than {first})", f"P(higher return than {first})"]
    lines = [" | ".join(["", *header, *better, ""]).strip(), "|" + "---|" * (len(header) + 2)]
    for policy in data["policy"].unique():
        cells = [
            _shown(interquartile_mean(values(policy, *column))) if len(values(policy, *column)) else "-"
            for column in columns
        ]
        for column in ("effective_routes", "last_return"):
            pair = (values(policy, "stochastic", column), values(first, "stochastic", column))
            cells.append("-" if policy == first else _shown(probability_of_improvement(*pair)))
        lines.append(" | ".join(["", policy, *cells, ""]).strip())
    return "\n".join(lines)


def report_closing(directory: Path, runs: Mapping[str, Path]) -> str:
    """Write ``closing.csv`` into ``directory``; markdown with the interquartile means over seeds.

    Args:
        directory: of the experiment.
        runs: by the name of a run, the directory with its ``success.csv``.
    """
    parts = []
    for name, run in runs.items():
        policy, seed = name.rsplit("-seed", 1)
        parts.append(pd.read_csv(run / "success.csv").assign(policy=policy, seed=int(seed)))
    data = pd.concat(parts)[["policy", "seed", "when", "kind", "success"]]
    data.to_csv(directory / "closing.csv", index=False, float_format="%.4f")
    moments = list(data["when"].unique())
    lines = [f"| success | kind | {' | '.join(moments)} |", "|" + "---|" * (len(moments) + 2)]
    for (policy, kind), some in data.groupby(["policy", "kind"], sort=False):
        means = [interquartile_mean(some.loc[some["when"] == when, "success"].to_numpy()) for when in moments]
        lines.append(" | ".join(["", policy, kind, *map(_shown, means), ""]).strip())
    return "\n".join(lines)


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.2f}" if np.isnan(estimate.low) else str(estimate)


# --------------------------------------------------------------------------------------------- pictures


def _plane(ax: Axes, task: TargetReachingTask) -> None:
    """The same axes everywhere: obstacles, target, bait, starts."""
    from matplotlib.patches import Circle

    for x, y, radius in np.asarray(task.obstacles):
        ax.add_patch(Circle((x, y), radius, color="#555555", zorder=1))
    x, y, radius = np.asarray(task.target)
    ax.add_patch(Circle((x, y), radius, facecolor="#BBBBBB", edgecolor="black", hatch="//", zorder=1))
    if task.bait is not None:
        x, y, radius = np.asarray(task.bait)
        ax.add_patch(Circle((x, y), radius, facecolor="none", edgecolor="black", hatch="..", zorder=1))
    ax.plot(*np.asarray(task.starts).T, "k*", markersize=12, zorder=4)
    ax.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    ax.spines[["top", "right"]].set_visible(True)


def _trails(ax: Axes, path: Array, expert: Array) -> None:
    """Episodes ``[N, T + 1, 2]``, each step in the colour of the expert ``[N, T]`` behind it."""
    for steps, who in zip(path, expert, strict=True):
        count = int((who >= 0).sum())
        segments = np.stack((steps[:count], steps[1 : count + 1]), 1)
        colors = [EXPERTS[k % len(EXPERTS)] for k in who[:count]]
        ax.add_collection(LineCollection(list(segments), colors=colors, linewidths=1.8, alpha=0.85, zorder=2))
        ax.plot(*steps[count], "o", color="black", markersize=4, zorder=3)


def _expert_legend(fig: Any, count: int) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=EXPERTS[k % len(EXPERTS)], linewidth=4) for k in range(count)]
    fig.legend(handles, range(count), title="expert", loc="outside right upper")


def draw_trajectories(path: Path, records: Records, task: TargetReachingTask, data: pd.DataFrame) -> None:
    """Ten episodes of each policy, stochastic above, deterministic below, of the first seed."""
    fig, axes = subplots(
        2, len(records), figsize=(3.1 * len(records) + 1, 6.9), squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    most = 1
    for column, (policy, seeds) in enumerate(records.items()):
        seed, record = next(iter(seeds.items()))
        for ax, kind in zip(axes[:, column], KINDS, strict=False):
            row = data[(data["policy"] == policy) & (data["seed"] == seed) & (data["kind"] == kind)].iloc[0]
            _plane(ax, task)
            _trails(ax, record[f"{kind}_path"][:10], record[f"{kind}_expert"][:10])
            most = max(most, int(record[f"{kind}_expert"].max()) + 1)
            ax.set_xlabel(f"success {row['success']:.0%}, routes {row['routes']:.0f}")
        axes[0, column].set_title(LABELS[policy])
    for ax, kind in zip(axes[:, 0], KINDS, strict=False):
        ax.set_ylabel(kind)
    if most > 1:
        _expert_legend(fig, most)
    fig.savefig(path)


def draw_experts(path: Path, records: Records, task: TargetReachingTask) -> None:
    """Ten episodes of each expert acting alone, of the first seed; a panel per policy."""
    mixtures = {policy: next(iter(seeds.values())) for policy, seeds in records.items()}
    mixtures = {policy: record for policy, record in mixtures.items() if "alone0_path" in record}
    if not mixtures:
        return
    fig, axes = subplots(1, len(mixtures), figsize=(4 * len(mixtures) + 1.2, 5.2), squeeze=False, sharey=True)
    most = 1
    for ax, (policy, record) in zip(axes[0], mixtures.items(), strict=True):
        _plane(ax, task)
        count = sum(key.endswith("_path") and key.startswith("alone") for key in record)
        most = max(most, count)
        for expert in range(count):
            _trails(ax, record[f"alone{expert}_path"], record[f"alone{expert}_expert"])
        reached = [f"{record[f'alone{expert}_success'].mean():.0%}" for expert in range(count)]
        ax.set_title(LABELS[policy])
        ax.set_xlabel(
            "arrives: " + ", ".join(f"expert {expert} {share}" for expert, share in enumerate(reached)), fontsize=10
        )
    _expert_legend(fig, most)
    fig.savefig(path)


def _band(ax: Axes, frames: Array, samples: Array, policy: str) -> None:
    """Interquartile mean over seeds ``[S, T]`` with its interval."""
    color, marker = POLICY_STYLES[policy]
    estimate = interquartile_mean(samples)
    ax.plot(
        frames, estimate.value, color=color, marker=marker, markevery=max(1, len(frames) // 8), markersize=8,
        linewidth=2.2, label=LABELS[policy],
    )  # fmt: skip
    ax.fill_between(frames, estimate.low, estimate.high, color=color, alpha=0.15, linewidth=0)


def draw_exploration(path: Path, records: Records, task: TargetReachingTask) -> None:
    """Where the first frames went: the Gaussian beside two mixtures (first seed), and cells against frames."""
    shown: list[str] = [policy for policy in ("gaussian", "pmoe", "pmoe_soft") if policy in records]
    fig, axes = subplots(
        1, len(shown) + 1, figsize=(4.4 * len(shown) + 8, 4.8), squeeze=False,
        width_ratios=[*[1.0] * len(shown), 1.5],
    )  # fmt: skip
    for ax, policy in zip(axes[0], shown, strict=False):
        visited = next(iter(records[policy].values()))["visited"]
        picture = ax.hist2d(
            visited[:, 0], visited[:, 1], bins=2 * CELLS, range=[[-1, 1], [-1, 1]], cmap="viridis", cmin=1,
            norm=mpl.colors.LogNorm(1, 1000), zorder=0,
        )[3]  # fmt: skip
        _plane(ax, task)
        ax.set_title(f"{LABELS[policy]}, {len(visited):,} frames")
    if shown:
        fig.colorbar(picture, ax=axes[0, : len(shown)].tolist(), label="visits", shrink=0.8)
    for policy, seeds in records.items():
        cells = np.stack([cells_over_frames(record["visited"]) for record in seeds.values()])
        frames = np.unique(np.linspace(1, cells.shape[1], 81).astype(int))
        _band(axes[0, -1], frames, cells[:, frames - 1], policy)
    axes[0, -1].set(xlabel="frames", ylabel=f"cells visited, of {CELLS**2}")
    axes[0, -1].xaxis.set_major_formatter("{x:,.0f}")
    axes[0, -1].grid(alpha=0.3)
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path)


def draw_curves(path: Path, records: Records, directory: Path) -> None:
    """Evaluation return against frames."""
    fig, ax = subplots(figsize=(11, 5.5))
    for policy, seeds in records.items():
        runs = [pd.read_csv(directory / f"{policy}-seed{seed}" / "metrics.csv") for seed in seeds]
        _band(ax, runs[0]["frames"].to_numpy(), np.stack([run["return_mean"] for run in runs]), policy)
    ax.set(xlabel="frames", ylabel="evaluation return (deterministic)")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.grid(alpha=0.3)
    fig.legend(loc="outside right upper")
    fig.savefig(path)


def draw_routes(path: Path, data: pd.DataFrame) -> None:
    """Effective number of routes, success rate and entropy of every policy: every seed, and the interquartile mean."""
    policies = list(data["policy"].unique())
    panels: list[tuple[str, Callable[[pd.DataFrame], bool], str]] = [
        ("effective routes", lambda frame: frame["kind"] != "", "effective_routes"),
        ("success rate", lambda frame: frame["kind"] != "", "success"),
        ("policy entropy (nats)", lambda frame: frame["kind"] == "stochastic", "entropy"),
    ]
    looks = {"stochastic": ("o", "#0072B2"), "deterministic": ("s", "#D55E00"), "drawn": ("^", "#009E73")}
    fig, axes = subplots(1, 3, figsize=(16, 0.75 * len(policies) + 2), sharey=True)
    for ax, (name, keep, column) in zip(axes, panels, strict=True):
        chosen = data[keep(data)]
        for place, policy in enumerate(policies):
            for offset, kind in zip((-0.25, 0.0, 0.25), KINDS, strict=True):
                values = chosen.loc[(chosen["policy"] == policy) & (chosen["kind"] == kind), column].to_numpy()
                if not len(values):
                    continue
                marker, color = looks[kind]
                y = place + offset
                ax.plot(values, np.full(len(values), y), marker, color=color, alpha=0.25, markersize=6)
                mean = interquartile_mean(values)
                ax.hlines(y, mean.low, mean.high, color=color, linewidth=3)
                ax.plot(
                    mean.value, y, marker, color=color, markersize=11, markeredgecolor="black",
                    label=kind if place == len(policies) - 1 or kind not in ax.get_legend_handles_labels()[1] else None,
                )  # fmt: skip
        ax.set(xlabel=name, yticks=range(len(policies)), yticklabels=[LABELS[policy] for policy in policies])
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_xlim(-0.1, max(2.1, data["effective_routes"].max() + 0.1))
    axes[1].set_xlim(-0.05, 1.05)
    axes[0].invert_yaxis()
    labels = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    fig.legend(labels.values(), labels.keys(), loc="outside right upper")
    fig.savefig(path)


def report(directory: Path, names: Sequence[str], task: TargetReachingTask, exploration_frames: int) -> str:
    """Write ``routes.csv``, ``cells.csv`` and the pictures into ``directory``; the table in markdown."""
    records = read_records(directory, names)
    data = rows(records, directory, task)
    data.to_csv(directory / "routes.csv", index=False, float_format="%.4f")
    with (directory / "cells.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "seed", "frames", "cells"])
        for policy, seeds in records.items():
            for seed, record in seeds.items():
                cells = cells_over_frames(record["visited"])
                for frames in range(500, exploration_frames + 1, 500):
                    writer.writerow([policy, seed, frames, cells[frames - 1]])
    with mpl.rc_context(STYLE):
        draw_trajectories(directory / "trajectories.png", records, task, data)
        draw_experts(directory / "experts.png", records, task)
        draw_exploration(directory / "exploration.png", records, task)
        draw_curves(directory / "learning_curves.png", records, directory)
        draw_routes(directory / "routes.png", data)
    return table(data)
