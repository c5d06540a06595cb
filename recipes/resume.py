"""Going on with an earlier run: its config, its directory, its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from common import UsageError, one_line_errors, prepare_torch, remove_empty
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from yaml import YAMLError

CHANGEABLE = ("total_frames", "logger.", "checkpoint.")
"""The keys that may change when a run goes on."""


def resumed_config(cfg: DictConfig) -> DictConfig:
    """The config of the run that ``resume`` names, with the changes that a run may take on its way.

    Raises:
        UsageError: where there is no such run, or another key was given.
    """
    allowed = "the directory of a run, with its config.yaml and checkpoints"
    if not isinstance(cfg.resume, str) or not cfg.resume:
        raise UsageError(f"resume={cfg.resume}: must be {allowed}")
    run = Path(cfg.resume)
    try:
        old = OmegaConf.load(run / "config.yaml")
    except (OSError, YAMLError):
        old = None
    if not isinstance(old, DictConfig) or last_checkpoint(run) is None:
        raise UsageError(f"resume={run}: must be {allowed}")
    for override in HydraConfig.get().overrides.task:
        key = override.split("=", 1)[0]
        if key.startswith(CHANGEABLE) and key != "logger.rank_states":  # that one adds columns
            OmegaConf.update(old, key, OmegaConf.select(cfg, key))
        elif key != "resume":
            raise UsageError(
                f"{override}: must be left out with resume={run}, whose own config.yaml holds; "
                "total_frames, logger and checkpoint keys may change"
            )
    old.resume = cfg.resume
    return old


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint in a run's directory, ``None`` where there is none."""
    return CheckpointRotation(run / "checkpoints", keep_last=1).latest() if (run / "checkpoints").is_dir() else None


def run_directory(cfg: DictConfig) -> Path:
    """Where a run keeps its records: Hydra's directory, or that of the run that goes on."""
    directory = Path(HydraConfig.get().runtime.output_dir)
    if OmegaConf.select(cfg, "resume") is None:
        return directory
    remove_empty(directory)
    return Path(cfg.resume)


def checkpoint_to_resume(cfg: DictConfig, needed: Mapping[str, str]) -> Path | None:
    """The last checkpoint of the run that ``resume`` names, ``None`` without one.

    Args:
        cfg: the config.
        needed: components that it must hold, and what to call them.

    Raises:
        UsageError: where one is missing.
    """
    if cfg.resume is None:
        return None
    path = last_checkpoint(Path(cfg.resume))
    assert path is not None
    held = Checkpoint.manifest(path)["components"]
    for component, words in needed.items():
        if component not in held:
            raise UsageError(f"resume={cfg.resume}: must hold {words}; {path.name} has no {component}")
    return path


def start_or_resume(
    cfg: DictConfig, resolve: Callable[[DictConfig], None], train: Callable[[DictConfig, Path], None]
) -> None:
    """The body of a recipe that can go on: check the config, then train; errors end in one line.

    Args:
        cfg: as composed.
        resolve: checks it and fills it in.
        train: one run, given its directory.
    """
    with one_line_errors():
        if cfg.resume is not None:
            cfg = resumed_config(cfg)
        resolve(cfg)
        prepare_torch(cfg)
        train(cfg, run_directory(cfg))
