"""Going on with an earlier run: its config, its directory, its last checkpoint."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import common
from common import Interrupted, UsageError, one_line_errors, prepare_torch, remove_empty
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from recording import replace, unreadable
from torchrl.checkpoint import CheckpointError, CheckpointRotation
from torchrl.trainers import Trainer
from yaml import YAMLError

from torchrl_pmoe.runs import DirectoryInUseError, RunDirectory
from torchrl_pmoe.trainers import VerifiedCheckpoint

FORMAT = 3
"""Of what a run keeps.

1 was TorchRL's own checkpoint, without replay rows, episodes and checksums; 2 had actions in the environment's own
units, and knew no evaluation that was given up.
"""
CHANGEABLE = ("total_frames", "logger.", "checkpoint.", "compile.", "optim.num_threads", "on_nonfinite")
"""The keys that may change when a run goes on."""
CHECKPOINTS = "checkpoints"
_ABOUT = "torchrl_pmoe"


# ----------------------------------------------------------------------------------- the files of a run


def metadata(cfg: DictConfig) -> Callable[[Trainer], dict[str, Any]]:
    """What a checkpoint says of the run that it belongs to."""
    kept = cfg.copy()
    kept.resume = None
    about = {"format": FORMAT, "config": OmegaConf.to_container(kept)}
    return lambda trainer: {_ABOUT: about}


def recipe_of(config: DictConfig) -> str:
    """The recipe that a resolved config belongs to; before a config told it, its keys did."""
    if isinstance(config.get("recipe"), str):
        return config.recipe
    if "policies" in config:
        return "target_reaching"
    if "num_options" in config:
        return "dac"
    return "ppo_pmoe" if "normalization" in config else "sac_pmoe"


def rotation(run: Path, keep: int = 1) -> CheckpointRotation:
    """The checkpoints of a run."""
    return CheckpointRotation(run / CHECKPOINTS, keep_last=keep)


def run_of(path: Path) -> Path:
    """The directory of a run, given that or one of its checkpoints."""
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def open_run(path: Path) -> tuple[DictConfig, Path]:
    """The config and the last checkpoint of a run, after a look at every byte of it.

    Args:
        path: the run's directory, or one of its checkpoints.

    Raises:
        UsageError: in one line, where it is no run, or a damaged one; an older checkpoint that is whole is named.
    """
    allowed = "the directory of a run, with its config.yaml and checkpoints"
    run = run_of(path)
    given = None if run == path else path
    try:
        candidates = sorted((run / CHECKPOINTS).glob("checkpoint-*"), reverse=True) if given is None else [given]
        run.is_dir()
    except OSError as error:
        raise UsageError(f"{path}: must be {allowed} ({error.strerror})") from error
    # what a full disk or a copy has left half is still the last one, and is told
    candidates = [found for found in candidates if re.fullmatch(r"checkpoint-\d+", found.name)]
    if not candidates:
        found = " yet" if (run / "config.yaml").is_file() else ""
        raise UsageError(f"{path}: must be {allowed}; there is no checkpoint{found}")
    checkpoint = candidates[0]
    try:
        about = read_metadata(checkpoint)
    except CheckpointError as error:
        older = next((found for found in _others(run, checkpoint) if _is_whole(found)), None)
        offer = "no older one is whole" if older is None else f"an older one is whole: {older}"
        raise UsageError(f"{path}: must hold a whole checkpoint; {error}; {offer}") from error
    config = about["config"]
    _refuse_other_config(run, checkpoint, config)
    config.recipe = recipe_of(config)
    return config, checkpoint


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """What a whole checkpoint says of its run.

    Raises:
        CheckpointError: in one line, where it is not whole, or was written by an older or a newer version.
    """
    if (checkpoint / "manifest.json").is_file() and not (checkpoint / "SHA256SUMS").is_file():
        raise CheckpointError(f"{checkpoint.name} has no SHA256SUMS: it was written by an older version, or in part")
    metadata = VerifiedCheckpoint.verify(checkpoint).get("metadata")
    about = metadata.get(_ABOUT) if isinstance(metadata, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise CheckpointError(f"{checkpoint.name} is of format {found}, this version reads {FORMAT}")
    try:
        config = OmegaConf.create(about["config"]) if isinstance(about.get("config"), dict) else None
    except (OmegaConfBaseException, RecursionError):
        config = None
    if not config:
        raise CheckpointError(f"{checkpoint.name} has no config that can be read")
    return {**about, "config": config}


def _others(run: Path, checkpoint: Path) -> list[Path]:
    """The checkpoints before one, the newest first."""
    found = sorted((run / CHECKPOINTS).glob("checkpoint-*"), reverse=True)
    return [path for path in found if path.name < checkpoint.name]


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_metadata(checkpoint)
    except CheckpointError:
        return False
    return True


def _refuse_other_config(run: Path, checkpoint: Path, config: DictConfig) -> None:
    """A checkpoint that was put into the directory of another run."""
    try:
        there = OmegaConf.load(run / "config.yaml")
        flat = dict(common.leaves(there)) if isinstance(there, DictConfig) else None
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError, UsageError):
        flat = None
    if flat is None:
        raise UsageError(f"{run}: must hold the run's config.yaml, which is missing or damaged")
    for key, value in common.leaves(config):
        if not key.startswith(CHANGEABLE) and key != "resume" and flat.get(key) != value:
            raise UsageError(
                f"{run}: must be the run of its checkpoints; {checkpoint.name} was written with {key}={value}, "
                f"config.yaml has {flat.get(key)}"
            )


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


# ----------------------------------------------------------------------------------------- going on


def resumed_config(cfg: DictConfig) -> DictConfig:
    """The config of the run that ``resume`` names, with the changes that a run may take on its way.

    ``resume`` of the result is the checkpoint.

    Raises:
        UsageError: where there is no such run, it is one of another recipe, or another key was given.
    """
    if not isinstance(cfg.resume, str) or not cfg.resume:
        raise UsageError(f"resume={cfg.resume}: must be the directory of a run, with its config.yaml and checkpoints")
    try:
        old, checkpoint = open_run(Path(cfg.resume))
    except UsageError as error:
        raise UsageError(f"resume={error}") from error
    if old.recipe != cfg.recipe:
        raise UsageError(f"resume={cfg.resume}: must be a run of {cfg.recipe}.py, it is one of {old.recipe}.py")
    apply_changes(old, cfg)
    old.resume = literal(str(checkpoint))
    return old


def apply_changes(old: DictConfig, cfg: DictConfig, changeable: tuple[str, ...] = CHANGEABLE) -> None:
    """Put what was given beside ``resume`` into the config of the run that goes on.

    Args:
        old: of that run, changed in place.
        cfg: as composed.
        changeable: the beginnings of the keys that may change.

    Raises:
        UsageError: for a key that must stay.
    """
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+~").split("=", 1)[0]
        if key.startswith(changeable):
            OmegaConf.update(old, key, OmegaConf.select(cfg, key))
        elif key != "resume":
            raise UsageError(
                f"{override}: must be left out with resume={cfg.resume}, whose own config holds; may change: "
                + ", ".join(key.rstrip(".") for key in changeable)
            )


@contextmanager
def owned(directory: Path, named: str, allowed: str) -> Iterator[Path]:
    """Own a directory, made where it is not there, as long as the body runs.

    Args:
        directory: that the body writes to.
        named: the key and its value, for the line on what is wrong.
        allowed: completes "<named>: must be ..." where another process owns it.

    Raises:
        UsageError: where another process owns it, or nothing can be written there.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(RunDirectory(directory).own())
        except DirectoryInUseError as error:
            raise UsageError(f"{named}: must be {allowed}; {error}") from error
        except OSError as error:
            raise UsageError(f"{named}: must be a directory that can be written to ({error.strerror})") from error
        yield directory


@contextmanager
def own_run_directory(cfg: DictConfig, may_hold: Callable[[Path], bool] = lambda run: False) -> Iterator[Path]:
    """Own the directory where a run keeps its records: Hydra's, or that of the run that goes on.

    Args:
        cfg: as composed.
        may_hold: whether a new run may begin in a directory that holds one already; asked when it is owned.

    Raises:
        UsageError: where it cannot be owned, or a new run would write over what another has left.
    """
    output = Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume is not None:
        remove_empty(output)
        run = run_of(Path(str(cfg.resume)))
        with ExitStack() as stack:
            # where there is none, a line of its own follows
            if os.path.isdir(run):
                stack.enter_context(owned(run, f"resume={cfg.resume}", "a run that no other process uses"))
            yield run
        return
    shown = from_here(output)
    key = "hydra.sweep.dir: " if HydraConfig.get().mode == RunMode.MULTIRUN else "hydra.run.dir="
    with owned(output, f"{key}{shown}", "a directory that no other process uses"):
        if (there := RunDirectory(output).outputs()) and not may_hold(output):
            goes_on = f"; {resume_argument(output)} goes on with that run" if CHECKPOINTS in there else ""
            raise UsageError(f"{key}{shown}: must be a directory without a run, it has {', '.join(there)}{goes_on}")
        yield output


@contextmanager
def own_scratch(cfg: DictConfig, run: Path) -> Iterator[None]:
    """Own ``replay_buffer.scratch_dir``, where there is one, for a run: empty at its start, its own when it goes on.

    Args:
        cfg: a resolved config.
        run: its directory.

    Raises:
        UsageError: where it holds something else, is another run's, or cannot be written to.
    """
    scratch = OmegaConf.select(cfg, "replay_buffer.scratch_dir")
    if scratch is None:
        yield
        return
    named = f"replay_buffer.scratch_dir={scratch}"
    with owned(Path(scratch), named, "a directory that no other process uses") as directory:
        note = directory / ".run"
        ours = {note.name, RunDirectory.LOCK}
        owner = Path(note.read_text(encoding="utf-8")) if note.is_file() else run.absolute()
        if cfg.resume is None:
            if {path.name for path in directory.iterdir()} - ours:
                raise UsageError(f"{named}: must be empty or not there")
        # that of a run that was moved has no other owner
        elif owner != run.absolute() and owner.is_dir():
            raise UsageError(f"{named}: must be that of the run that goes on, it is that of {owner}")
        replace(note, str(run.absolute()))
        try:
            yield
        finally:
            # a run that was refused leaves nothing
            if {path.name for path in directory.iterdir()} <= ours:
                note.unlink()


def from_here(path: Path) -> str:
    """A path as it is named from the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def checkpoint_to_resume(cfg: DictConfig, needed: Mapping[str, str] = MappingProxyType({})) -> Path | None:
    """The checkpoint that a resolved config goes on from, ``None`` without one.

    Args:
        cfg: the config.
        needed: components that it must hold, and what to call them.

    Raises:
        UsageError: where one is missing.
    """
    if cfg.resume is None:
        return None
    path = Path(cfg.resume)
    held = VerifiedCheckpoint.manifest(path)["components"]
    for component, words in needed.items():
        if component not in held:
            raise UsageError(f"resume={cfg.resume}: must hold {words}; {path.name} has no {component}")
    run = run_of(path)
    for record in (run / "metrics.csv", *sorted(run.glob("seed[0-9]*/metrics.csv"))):
        if record.exists() and (why := unreadable(record)) is not None:
            raise UsageError(f"resume={cfg.resume}: {record} {why}")
    return path


def tidy(run: Path, checkpoint: Path) -> None:
    """Clear away what a killed run has left half, and set aside checkpoints after the one that it goes on from."""
    for path in (run / CHECKPOINTS).iterdir():
        if path.name.startswith(".checkpoint-"):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r"checkpoint-\d+", path.name) and path.name > checkpoint.name:
            aside = path.with_name(f"set-aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(f"{path} is of a later frame: now {aside.name}")


def how_to_go_on(run: Path) -> str:
    """What to type in a shell to go on with a run that has a checkpoint, or why it cannot go on."""
    config: Any = OmegaConf.load(run / "config.yaml")
    if OmegaConf.select(config, "checkpoint.replay_buffer") is False:
        return "it cannot go on, with checkpoint.replay_buffer=false a checkpoint is without what that takes"
    if Path(sys.argv[0]).stem == "target_reaching" and recipe_of(config) != "target_reaching":
        run = run.parent  # that script goes on with an experiment, not with one training of it
    return f"goes on with: {command_to_resume(run)}"


def command_to_resume(run: Path) -> str:
    """What to type in a shell to go on with a run."""
    return shlex.join(["python", sys.argv[0], resume_argument(run)])


def resume_argument(run: Path) -> str:
    """The override that goes on with a run, as Hydra reads it."""
    where = from_here(run)
    try:
        plain = OverridesParser.create().parse_override(f"resume={where}").value() == where == literal(where)
    except HydraException:
        plain = False
    return f"resume={where if plain else QuotedString(literal(where), Quote.single).with_quotes()}"


def literal(text: str) -> str:
    """A text for a config, in which nothing is taken for an interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def start_or_resume(
    cfg: DictConfig, resolve: Callable[[DictConfig], Any], train: Callable[[DictConfig, Path], Any]
) -> None:
    """The body of a recipe: check the config, then train, from the start or a checkpoint; errors end in one line.

    Args:
        cfg: as composed.
        resolve: checks it and fills it in.
        train: one run, given its directory.
    """
    with one_line_errors(), own_run_directory(cfg) as run:
        if cfg.resume is not None:
            cfg = resumed_config(cfg)
        resolve(cfg)
        prepare_torch(cfg)
        try:
            with own_scratch(cfg, run):
                train(cfg, run)
        except Interrupted as interrupted:
            interrupted.advice = how_to_go_on(run)
            raise
