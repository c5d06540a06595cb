"""Draws ``routes.gif``: recorded episodes of three policies on the target-reaching task, side by side.

    python docs/images/routes.py

The episodes are those of seed 0 in ``recipes/results/target_reaching/episodes``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

from torchrl_pmoe.envs import TargetReachingTask

HERE = Path(__file__).parent
EPISODES = HERE.parents[1] / "recipes" / "results" / "target_reaching" / "episodes"
POLICIES = {
    "gaussian": "SAC, one Gaussian",
    "pmoe_all": "PMOE, frequency / all",
    "pmoe_soft": "PMOE, soft frequency / weighted",
}
EXPERTS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # four hues of Okabe and Ito's
NUM_EPISODES, STEPS, HOLD = 16, 44, 14


def draw(step: int) -> Image.Image:
    """All episodes up to one step."""
    task = TargetReachingTask()
    figure = Figure(figsize=(9.6, 3.1), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for ax, (policy, title) in zip(figure.subplots(1, len(POLICIES)), POLICIES.items(), strict=True):
        record = np.load(EPISODES / f"{policy}-seed0.npz")
        for x, y, radius in np.asarray(task.obstacles):
            ax.add_patch(Circle((x, y), radius, color="#555555"))
        x, y, radius = np.asarray(task.target)
        ax.add_patch(Circle((x, y), radius, facecolor="#DDDDDD", edgecolor="black", hatch="//"))
        ax.plot(*np.asarray(task.starts).T, "k*", markersize=9)
        # paths [N, T + 1, 2] and the expert behind every step [N, T], which is -1 after the end
        for path, expert in zip(
            record["stochastic_path"][:NUM_EPISODES], record["stochastic_expert"][:NUM_EPISODES], strict=True
        ):
            count = min(step, int((expert >= 0).sum()))
            segments = np.stack((path[:count], path[1 : count + 1]), 1)
            colors = [EXPERTS[k] for k in expert[:count]]
            ax.add_collection(LineCollection(list(segments), colors=colors, linewidths=1.4, alpha=0.7))
            ax.plot(*path[count], "o", color="black", markersize=4)
        ax.set(xlim=(-1, 1), ylim=(-0.8, 0.8), aspect="equal", xticks=[], yticks=[])
        ax.set_title(title, fontsize=11)
    figure.supxlabel(f"step {step}: colours are experts, drawn anew at every step", fontsize=10)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    return image.quantize(48, dither=Image.Dither.NONE)


def main() -> None:
    """Write the picture beside this file."""
    frames = [draw(step) for step in range(STEPS + 1)]
    # the last frame stays for a while, then it begins again
    durations = [90] * STEPS + [90 * HOLD]
    frames[0].save(
        HERE / "routes.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True
    )


if __name__ == "__main__":
    main()
