"""Going on with an earlier run: its config, its last checkpoint, and what to type."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from torchrl.checkpoint import CheckpointError

from parts.errors import UsageError
from torchrl_pmoe.runs import RunDirectory, VerifiedCheckpoint
from torchrl_pmoe.runs.metrics import why_unreadable

FORMAT = 4
"""Of what a run keeps.

1 was TorchRL's own checkpoint, without replay rows, episodes and checksums; 2 had actions in the environment's own
units, and knew no evaluation that was given up; 3 had another state of the running normalisation.
"""
CHANGEABLE = ("total_frames", "logger.", "checkpoint.", "compile.", "optim.num_threads", "on_nonfinite")
"""The beginnings of the keys that may change when a run goes on."""
_ABOUT = "torchrl_pmoe"


# ----------------------------------------------------------------------------------- the files of a run


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the run that it belongs to."""
    return {_ABOUT: {"format": FORMAT, "config": {**config, "resume": None}}}


def run_of(path: Path) -> Path:
    """The directory of a run, given that or one of its checkpoints."""
    return path.parent.parent if path.parent.name == RunDirectory.CHECKPOINTS else path


def read_config(run: Path) -> dict[str, Any] | None:
    """The ``config.yaml`` of a run; ``None`` where it is missing or damaged."""
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return config if isinstance(config, dict) and isinstance(config.get("recipe"), str) else None


def open_run(path: Path) -> tuple[dict[str, Any], Path]:
    """The config and the last checkpoint of a run, after a look at every byte of it.

    Args:
        path: the run's directory, or one of its checkpoints.

    Raises:
        UsageError: in one line, where it is no run, or a damaged one; an older checkpoint that is whole is named.
    """
    allowed = "the directory of a run, with its config.yaml and checkpoints"
    run = run_of(path)
    try:
        candidates = RunDirectory(run).checkpoints()
        run.is_dir()
    except OSError as error:
        raise UsageError(f"{path}: must be {allowed} ({error.strerror})") from error
    # what a full disk or a copy has left half is still the last one, and is told
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
    _refuse_other_config(run, checkpoint, config)
    return config, checkpoint


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """The config that a whole checkpoint was written with.

    Raises:
        CheckpointError: in one line, where it is not whole, or was written by an older or a newer version.
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


def _refuse_other_config(run: Path, checkpoint: Path, config: dict[str, Any]) -> None:
    """A checkpoint that was put into the directory of another run."""
    there = read_config(run)
    if there is None:
        raise UsageError(f"{run}: must hold the run's config.yaml, which is missing or damaged")
    flat = dict(flatten(there))
    for key, value in flatten(config):
        if not key.startswith(CHANGEABLE) and key != "resume" and flat.get(key) != value:
            raise UsageError(
                f"{run}: must be the run of its checkpoints; {checkpoint.name} was written with {key}={value}, "
                f"config.yaml has {flat.get(key)}"
            )


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
        UsageError: in one line, where one is missing or does not fit.
    """
    try:
        VerifiedCheckpoint(**components).load(checkpoint, components=list(components), map_location="cpu")
    except CheckpointError as error:
        raise does_not_fit(checkpoint, error) from error


def does_not_fit(checkpoint: Path, error: CheckpointError) -> UsageError:
    """The line for a checkpoint that cannot be loaded."""
    reason = " ".join(str(error).split())
    return UsageError(f"{checkpoint}: must be a checkpoint of this run ({reason[:300]})")


def checkpoint_to_resume(resume: str | None, needed: Mapping[str, str] = MappingProxyType({})) -> Path | None:
    """The checkpoint that a run goes on from, ``None`` without one.

    Args:
        resume: its path.
        needed: components that it must hold, and what to call them.

    Raises:
        UsageError: where one is missing.
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


# --------------------------------------------------------------------------------------------- what to type


def how_to_resume(run: Path) -> str:
    """What to type in a shell to go on with a run that has a checkpoint, or why it cannot go on."""
    config = read_config(run) or {}
    if config.get("checkpoint", {}).get("replay_buffer") is False:
        return "it cannot go on, with checkpoint.replay_buffer=false a checkpoint is without what that takes"
    if Path(sys.argv[0]).stem == "target_reaching" and config.get("recipe") != "target_reaching":
        run = run.parent  # that script goes on with an experiment, not with one training of it
    return f"goes on with: {command_to_resume(run)}"


def command_to_resume(run: Path) -> str:
    """What to type in a shell to go on with a run."""
    return shlex.join([interpreter(), sys.argv[0], resume_argument(run)])


def interpreter() -> str:
    """The Python that runs, as it is typed here: an activated one by its name alone."""
    running = Path(sys.executable)
    if (found := shutil.which("python")) is not None and Path(found).absolute() == running.absolute():
        return "python"
    return from_here(running)


def resume_argument(run: Path) -> str:
    """The override that goes on with a run, as Hydra reads it."""
    where = from_here(run)
    return f"resume={where if _is_plain(where) else _quoted(literal(where))}"


def _is_plain(text: str) -> bool:
    """Whether Hydra takes a text that is not quoted for that text."""
    if not re.fullmatch(r"[\w./-]+", text, re.ASCII) or text.lower() in ("null", "true", "false"):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def _quoted(text: str) -> str:
    """A text in single quotes, as Hydra reads them: a backslash counts before a quote alone."""
    escaped = re.sub(r"(\\*)'", r"\1\1\'", text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def from_here(path: Path) -> str:
    """A path as it is named from the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def literal(text: str) -> str:
    """A text for a config, in which nothing is taken for an interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
