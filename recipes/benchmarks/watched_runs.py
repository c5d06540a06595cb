"""Runs of a recipe that a benchmark looks into from outside: the recipe's own ``train``, with no evaluation."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torchrl.trainers import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from config.ppo_pmoe import PPOConfig
from config.sac_pmoe import SACConfig
from parts.launch import read
from parts.training import prepare_torch
from rounds import Finished

RECIPES = Path(__file__).parents[1]
CONFIGS = {"sac_pmoe": SACConfig, "ppo_pmoe": PPOConfig}
NEVER = 10**9
QUIET = (
    f"total_frames={NEVER}",
    f"logger.eval_interval={NEVER}",
    f"checkpoint.interval={NEVER}",
    "logger.eval_episodes=1",
    "logger.progress_bar=false",
)
"""No end, no evaluation and no checkpoint within the frames of a benchmark."""


def resolve(recipe: ModuleType, overrides: Sequence[str]) -> Any:
    """The config of a recipe with ``overrides`` after :data:`QUIET`, checked and filled in.

    Raises:
        UsageError: as the recipe itself would.
        HydraException: for what is no override, or a key that the recipe has not.
    """
    # a process may have composed another one
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(RECIPES / "config"), version_base="1.3"):
        cfg = compose(recipe.__name__, overrides=[*QUIET, *overrides])
    config = read(cfg, CONFIGS[recipe.__name__])
    recipe.resolve(config)
    return config


def run(
    recipe: ModuleType,
    cfg: Any,
    after_batch: Callable[[int], None],
    prepare: Callable[[Trainer], None] = lambda trainer: None,
) -> None:
    """Train with a recipe until ``after_batch`` raises :class:`Finished`.

    Args:
        recipe: its module.
        cfg: made by :func:`resolve`.
        after_batch: called with the number of frames, after the updates of each collected batch.
        prepare: called with the trainer before its first frame.
    """
    train_and_record = recipe.train_and_record
    trainers: list[Trainer] = []

    def watched(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        trainers.append(trainer)
        prepare(trainer)
        trainer.register_op("post_steps_log", lambda batch: after_batch(trainer.collected_frames))
        train_and_record(trainer, *args, **kwargs)

    prepare_torch(cfg.optim.num_threads)
    with (
        tempfile.TemporaryDirectory() as directory,
        patch.object(recipe, "train_and_record", watched),
        # the line on what is about to be trained
        redirect_stdout(io.StringIO()),
    ):
        try:
            recipe.train(cfg, Path(directory))
        except Finished:
            pass
        finally:
            for trainer in trainers:
                trainer.collector.shutdown()
