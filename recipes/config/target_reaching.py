"""The config of ``recipes/target_reaching.py``: every key of ``sac_pmoe.py``, and those of an experiment."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

from parts.errors import UsageError
from parts.resume import RAY_MAY_CHANGE
from pydantic import AfterValidator, Field

from config import sac_pmoe, shared
from config.shared import Experts, Frames, refuse
from config.typed import (
    Allowed,
    Integer,
    Kwargs,
    Text,
    build,
    config_class,
    field,
    get,
    group,
    register,
    set_,
    to_dict,
)
from torchrl_pmoe.envs.target_reaching.task import BLOCKS, PAPER_EPISODE_STEPS, own_reward

POLICIES: dict[str, dict[str, Any]] = {
    "gaussian": {"policy": "gaussian"},
    "gating": {"policy": "gating"},
    "mcp": {"policy": "mcp"},
    "pmoe_all": {"routing": "frequency", "backprop": "all", "score": "mixture"},
    "pmoe_max": {"routing": "frequency", "backprop": "max", "score": "mixture"},
    "pmoe": {},
    "pmoe_decoupled": {"loss.decoupled": True},
    "pmoe_paper": {"preset": "paper"},
    "pmoe_soft": {"routing": "soft_frequency", "backprop": "weighted", "score": "mixture"},
}
"""The policies by name: what each sets in a config of ``sac_pmoe.py``."""
SET_BY_POLICIES = ("preset", "scoring", "routing", "backprop", "score", "acting")
MAY_CHANGE = (
    "num_workers",
    "blocked",
    "logger.progress_bar",
    "checkpoint.",
    "compile.",
    "optim.num_threads",
    *RAY_MAY_CHANGE,
)
"""The beginnings of the keys that may change when an experiment goes on."""


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names) or not set(names) <= set(POLICIES):
        raise ValueError(names)
    return names


@config_class
class TargetReachingConfig(sac_pmoe.SACConfig):
    """Every key of ``recipes/target_reaching.py``."""

    recipe: Literal["target_reaching"] = field("target_reaching", "tells what a run is a run of")  # type: ignore[assignment]
    env: Literal["PMOE/TargetReaching-v0"] = field("PMOE/TargetReaching-v0")
    env_kwargs: Kwargs = field(
        {"layout": "one", "start": "fixed", "reward": None},
        "layout: one | two | three discs on the way | paper | deceptive; start: fixed | random; "
        "reward: dense | sparse | null, the layout's own",
    )
    total_frames: Frames = field(20_000, "of each training")
    policies: Annotated[
        list[Text],
        Field(min_length=1),
        AfterValidator(_each_once),
        Allowed(f"a list of {', '.join(POLICIES)}, each once"),
    ] = field(
        ["gaussian", "gating", "pmoe_all", "pmoe_max", "pmoe", "pmoe_soft"],
        "pmoe: the default of sac_pmoe.py; pmoe_decoupled: with loss.decoupled; pmoe_paper: preset=paper; "
        "pmoe_all, pmoe_max: back-propagation through all or the best; pmoe_soft: soft frequency, keeps modes",
    )
    num_seeds: Frames = field(1, "seed, seed + 1, ...")  # type: ignore[assignment]
    num_workers: Frames = field(1, "trainings at a time, each in a process of its own; one thread each")
    num_experts: Experts | None = field(4)
    episodes: Annotated[Integer, Field(ge=10)] = field(100, "of each kind, after training")
    exploration_frames: Frames = field(10_000, "the first ones, whose places are counted")
    blocked: Text | None = field(
        None, "upper | lower | ...: after training this passage is closed, and the policy is tried and trained on"
    )
    blocked_frames: Frames = field(2000, "of that further training")
    network: sac_pmoe.Network = group(sac_pmoe.Network, hidden_sizes=[64, 64])
    # where the target entropy is low (auto: -2) nobody keeps a second route
    optim: sac_pmoe.Optim = group(
        sac_pmoe.Optim, num_threads=1, lr=1e-3, utd_ratio=0.25, alpha_init=0.1, target_entropy=0.5
    )
    collector: sac_pmoe.Collector = group(sac_pmoe.Collector, num_envs=8)
    logger: shared.ExpertLogger = group(shared.ExpertLogger, eval_interval=1000)
    checkpoint: sac_pmoe.Checkpoint = group(sac_pmoe.Checkpoint, interval=5000)

    @property
    def recorded(self) -> tuple[int, int, str | None, int]:
        """What is recorded of a training: arguments of ``train`` of the recipe."""
        return self.episodes, self.exploration_frames, self.blocked, self.blocked_frames


ABOUT = "Who uses the routes: several policies on the target-reaching task, several seeds each."
EXAMPLES = (
    "python recipes/target_reaching.py",
    "python recipes/target_reaching.py num_seeds=10 num_workers=2 hydra.run.dir=outputs/routes",
    "python recipes/target_reaching.py resume=outputs/routes",
)
register("target_reaching", TargetReachingConfig, ABOUT, *EXAMPLES)


def resolve(config: TargetReachingConfig) -> dict[str, sac_pmoe.SACConfig]:
    """Check what goes together.

    Returns:
        The resolved config of every training, by its name.

    Raises:
        UsageError: in one line, for the first key that cannot stay.
    """
    layout = str(config.env_kwargs.get("layout", "one"))
    if layout == "paper":
        # the id is registered with the steps of the other layouts
        config.env_kwargs.setdefault("max_episode_steps", PAPER_EPISODE_STEPS)
    # by its name, as experiments had it that went before: they go on
    if layout in BLOCKS and config.env_kwargs.get("reward") is None:
        config.env_kwargs["reward"] = own_reward(layout)
    if config.policy != "pmoe":
        raise UsageError(f"policy={config.policy}: must be named in policies")
    refuse(
        config,
        {
            **{key: (get(config, key) is not None, "null, each of policies has its own") for key in SET_BY_POLICIES},
            "loss.decoupled": (config.loss.decoupled, "false, that is what pmoe_decoupled of policies has"),
            "collector.backend": (
                config.collector.backend not in ("serial", "ray"),
                "serial or ray, the task is one batch of environments in a process",
            ),
            "collector.ray.backend": (
                config.collector.ray.backend != "serial",
                "serial, the task is one batch of environments in a worker",
            ),
            "collector.num_envs": (
                config.exploration_frames % config.collector.num_envs != 0,
                f"a divisor of exploration_frames={config.exploration_frames}",
            ),
            "exploration_frames": (
                config.exploration_frames > config.total_frames,
                f"at most total_frames={config.total_frames}",
            ),
            "replay_buffer.size": (
                config.replay_buffer.size < config.total_frames + config.collector.num_envs,
                f"above total_frames={config.total_frames}: the first frames are read from it at the end",
            ),
            "blocked": (
                # the task refuses another layout
                layout in BLOCKS and config.blocked not in (None, *BLOCKS[layout]),
                f"null or one of {', '.join(BLOCKS.get(layout, {}))} with layout={layout}",
            ),
            "checkpoint.replay_buffer": (
                config.blocked is not None and not config.checkpoint.replay_buffer,
                "true with blocked, the further training goes on from a checkpoint",
            ),
            "blend": (
                config.blend != "parameters" and "gating" not in config.policies,
                "parameters where policies has no gating",
            ),
        },
    )
    if config.blocked is not None and config.env_kwargs.get("blocked") is not None:
        raise UsageError(f"blocked={config.blocked}: must be null with env_kwargs.blocked, a passage that never opens")
    # of one training's own keys
    values = to_dict(config)
    own = [name for name in values if name not in to_dict(sac_pmoe.SACConfig())]
    for name in [*own, "recipe"]:
        del values[name]
    configs = {}
    for name in config.policies:
        for seed in range(config.seed, config.seed + config.num_seeds):
            run = build(sac_pmoe.SACConfig, {**copy.deepcopy(values), "seed": seed, "num_seeds": 1})
            for key, value in POLICIES[name].items():
                set_(run, key, value)
            if run.replay_buffer.scratch_dir is not None:
                run.replay_buffer.scratch_dir = f"{run.replay_buffer.scratch_dir}/{name}-seed{seed}"
            if run.policy != "gating":
                run.blend = "parameters"
            sac_pmoe.resolve(run)
            configs[f"{name}-seed{seed}"] = run
    return configs
