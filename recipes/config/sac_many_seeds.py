"""The config of ``recipes/sac_many_seeds.py``: the keys of ``sac_pmoe.py``, counted for each agent."""

from __future__ import annotations

from typing import Literal

from config import sac_pmoe
from config.shared import Experts, refuse
from config.typed import config_class, field, register


@config_class
class ManySeedsConfig(sac_pmoe.SACConfig):
    """Every key of ``recipes/sac_many_seeds.py``."""

    recipe: Literal["sac_many_seeds"] = field("sac_many_seeds", "tells what a run is a run of")  # type: ignore[assignment]
    num_seeds: Experts = field(8, "agents, of seeds seed, seed + 1, ...; everything else holds for each of them")  # type: ignore[assignment]


ABOUT = "Soft Actor-Critic for several agents at once, in one process: one update for all of them."
EXAMPLES = ("python recipes/sac_many_seeds.py env=Walker2d-v4 num_seeds=8",)
register("sac_many_seeds", ManySeedsConfig, ABOUT, *EXAMPLES)


def resolve(config: ManySeedsConfig) -> None:
    """As for one agent; refuse what several at once cannot have.

    Raises:
        UsageError: in one line, for the first key that cannot stay.
    """
    sac_pmoe.resolve(config)
    several = f"with num_seeds={config.num_seeds}"
    refuse(
        config,
        {
            "replay_buffer.prb": (config.replay_buffer.prb, f"false {several}"),
            "replay_buffer.scratch_dir": (config.replay_buffer.scratch_dir is not None, f"null {several}"),
            "acting": (config.acting != "policy", f"policy {several}"),
            "optim.router_lr": (config.optim.router_lr is not None, f"null {several}"),
            "on_nonfinite": (config.on_nonfinite == "skip", f"stop {several}"),
            "logger.backend": (config.logger.backend is not None, f"null {several}; every seed has its metrics.csv"),
            "collector.backend": (
                config.collector.backend in ("parallel", "ray"),
                f"serial, threads, envpool or mjx {several}",
            ),
        },
    )
