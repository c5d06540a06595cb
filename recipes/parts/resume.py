"""Resuming an earlier run: its config, its last checkpoint, and the command."""

from __future__ import annotations

import copy
import operator
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from torchrl.checkpoint import CheckpointError

from parts.errors import UsageError
from torchrl_pmoe.runs import RunDirectory, VerifiedCheckpoint
from torchrl_pmoe.runs.metrics import why_unreadable

FORMAT = 4
"""Version of the files of a run.

1 was TorchRL's own checkpoint, without replay rows, episodes and checksums; 2 had actions in the environment's own
units, and no interrupted evaluations; 3 had another state of the running normalisation.
"""
RAY_MAY_CHANGE = ("collector.ray.address", "collector.ray.patience", "collector.ray.max_restarts")
"""Where workers run, and when they are given up."""
CHANGEABLE = (
    "total_frames",
    "logger.",
    "checkpoint.",
    "compile.",
    "optim.num_threads",
    "on_nonfinite",
    *RAY_MAY_CHANGE,
)
"""Prefixes of the keys that may change when a run is resumed."""
_ABOUT = "torchrl_pmoe"


# ----------------------------------------------------------------------------------- the files of a run


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Description of a run, for its checkpoints."""
    return {_ABOUT: {"format": FORMAT, "config": {**config, "resume": None}}}


def run_of(path: Path) -> Path:
    """The directory of a run, from that directory or from one of its checkpoints."""
    return path.parent.parent if path.parent.name == RunDirectory.CHECKPOINTS else path


def read_config(run: Path) -> dict[str, Any] | None:
    """The ``config.yaml`` of a run; ``None`` where it is missing or damaged."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return config if isinstance(config, dict) and isinstance(config.get("recipe"), str) else None


def open_run(path: Path) -> tuple[dict[str, Any], Path]:
    """The config and the last checkpoint of a run, after a check of every byte of it.

    Args:
        path: the run's directory, or one of its checkpoints.

    Raises:
        UsageError: in one line, if it is no run, or a damaged one. The line names an older checkpoint that is whole.
    """
    allowed = "the directory of a run, with its config.yaml and checkpoints"
    run = run_of(path)
    try:
        candidates = RunDirectory(run).checkpoints()
        run.is_dir()
    except OSError as error:
        raise UsageError(f"{path}: must be {allowed} ({error.strerror})") from error
    # a checkpoint that a full disk has cut short is still the last one, and gets its own error
    if run != path:
        candidates = [path] if re.fullmatch(r"checkpoint-\d+", path.name) else []
    if not candidates:
        found = " yet" if (run / "config.yaml").is_file() else ""
        raise UsageError(f"{path}: must be {allowed}; there is no checkpoint{found}")
    checkpoint = candidates[0]
    try:
        config = read_metadata(checkpoint)
    except CheckpointError as error:
        others = [found for found in RunDirectory(run).checkpoints() if found.name < checkpoint.name]
        older = next((found for found in others if _is_whole(found)), None)
        offer = "no older one is whole" if older is None else f"an older one is whole: {older}"
        raise UsageError(f"{path}: must hold a whole checkpoint; {error}; {offer}") from error
    return _with_last_changes(run, checkpoint, config), checkpoint


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """The config in a checkpoint.

    Raises:
        CheckpointError: in one line, if it is not whole, or if an older or a newer version has written it.
    """
    if (checkpoint / "manifest.json").is_file() and not (checkpoint / "SHA256SUMS").is_file():
        raise CheckpointError(f"{checkpoint.name} has no SHA256SUMS: it was written by an older version, or in part")
    found = VerifiedCheckpoint.verify(checkpoint).get("metadata")
    about = found.get(_ABOUT) if isinstance(found, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        version = about.get("format") if isinstance(about, dict) else None
        raise CheckpointError(f"{checkpoint.name} is of format {version}, this version reads {FORMAT}")
    config = about.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("recipe"), str):
        raise CheckpointError(f"{checkpoint.name} has no config that can be read")
    return config


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_metadata(checkpoint)
    except CheckpointError:
        return False
    return True


def _with_last_changes(run: Path, checkpoint: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint, with the keys that may change as ``config.yaml`` has them.

    A resumed run writes ``config.yaml`` when it starts, and may be killed before its first checkpoint.

    Raises:
        UsageError: if another key differs: the checkpoint was copied into the directory of another run.
    """
    there = read_config(run)
    if there is None:
        raise UsageError(f"{run}: must hold the run's config.yaml, which is missing or damaged")
    last = dict(flatten(there))
    config = copy.deepcopy(config)
    for key, value in flatten(config):
        if key.startswith(CHANGEABLE):
            *groups, name = key.split(".")
            group: dict[str, Any] = reduce(operator.getitem, groups, config)
            group[name] = last.get(key, value)
        elif key != "resume" and last.get(key) != value:
            raise UsageError(
                f"{run}: must be the run of its checkpoints; {checkpoint.name} was written with {key}={value}, "
                f"config.yaml has {last.get(key)}"
            )
    return config


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of nested ones; an empty mapping is a value."""
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found += flatten(value, f"{key}.") if isinstance(value, dict) and value else [(key, value)]
    return found


def load_components(checkpoint: Path, components: Mapping[str, Any]) -> None:
    """Restore some components of a checkpoint.

    Raises:
        UsageError: in one line, if one is missing or does not fit.
    """
    try:
        VerifiedCheckpoint(**components).load(checkpoint, components=list(components), map_location="cpu")
    except CheckpointError as error:
        raise does_not_fit(checkpoint, error) from error


def does_not_fit(checkpoint: Path, error: CheckpointError) -> UsageError:
    """The error for a checkpoint that cannot be loaded."""
    reason = " ".join(str(error).split())
    return UsageError(f"{checkpoint}: must be a checkpoint of this run ({reason[:300]})")


def checkpoint_to_resume(resume: str | None, needed: Mapping[str, str] = MappingProxyType({})) -> Path | None:
    """The checkpoint to resume from, ``None`` without one.

    Args:
        resume: its path.
        needed: components that it must hold, with their names for the error.

    Raises:
        UsageError: if one is missing, or if a ``metrics.csv`` of the run cannot be continued.
    """
    if resume is None:
        return None
    path = Path(resume)
    held = VerifiedCheckpoint.manifest(path)["components"]
    for component, words in needed.items():
        if component not in held:
            raise UsageError(f"resume={resume}: must hold {words}; {path.name} has no {component}")
    run = run_of(path)
    for record in (run / "metrics.csv", *sorted(run.glob("seed[0-9]*/metrics.csv"))):
        if record.exists() and (why := why_unreadable(record)) is not None:
            raise UsageError(f"resume={resume}: {record} {why}")
    return path


# ------------------------------------------------------------------------------------------ commands to type


def how_to_resume(run: Path) -> str:
    """The command that resumes a run with a checkpoint, or why the run cannot be resumed."""
    config = read_config(run) or {}
    if config.get("checkpoint", {}).get("replay_buffer") is False:
        return "it cannot go on, with checkpoint.replay_buffer=false a checkpoint is without what that takes"
    if Path(sys.argv[0]).stem == "target_reaching" and config.get("recipe") != "target_reaching":
        run = run.parent  # that script resumes a whole experiment, not one training of it
    return f"goes on with: {command_to_resume(run)}"


def command_to_resume(run: Path) -> str:
    """The command that resumes a run."""
    return shlex.join([interpreter(), sys.argv[0], resume_argument(run)])


def interpreter() -> str:
    """The running Python as one types it here: ``python`` if it is activated, else its path."""
    running = Path(sys.executable)
    if (found := shutil.which("python")) is not None and Path(found).absolute() == running.absolute():
        return "python"
    return from_here(running)


def resume_argument(run: Path) -> str:
    """The override ``resume=...`` for a run, quoted as Hydra needs it."""
    return text_argument("resume", from_here(run))


def text_argument(key: str, text: str) -> str:
    """An override with any text, quoted as Hydra needs it."""
    return f"{key}={text if _is_plain(text) else _quoted(literal(text))}"


def _is_plain(text: str) -> bool:
    """Whether Hydra reads a text as it is, without quotes."""
    if not re.fullmatch(r"[\w./-]+", text, re.ASCII) or text.lower() in ("null", "true", "false"):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def _quoted(text: str) -> str:
    """A text in single quotes for Hydra, where a backslash is special before a quote only."""
    escaped = re.sub(r"(\\*)'", r"\1\1\'", text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def from_here(path: Path) -> str:
    """A path, relative to the working directory if it is below that."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def literal(text: str) -> str:
    """A text for a config, with interpolations escaped."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
