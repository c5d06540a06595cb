"""From the command line to a training.

Hydra composes a config, :func:`read` turns it into a typed one, and every error ends the command in one line. Hydra's
own config goes no further than this module.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import yaml
from config.typed import build, described_keys, get, set_, to_dict, unknown_key
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from parts import process
from parts.errors import Interrupted, RunError, UsageError, cause
from parts.resume import CHANGEABLE, from_here, how_to_resume, interpreter, open_run, resume_argument, run_of
from parts.training import prepare_torch
from torchrl_pmoe.envs import EnvironmentFault
from torchrl_pmoe.runs import DirectoryInUseError, RunDirectory
from torchrl_pmoe.runs.files import replace_file
from torchrl_pmoe.trainers import NonFiniteError

# two runs may start in the same second, so a name has a random part, which stays the same within a command
OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(4), use_cache=True, replace=True)
# an id may hold a colon (module:Id) or a slash (PMOE/...): neither belongs into a folder's name
OmegaConf.register_new_resolver("folder", lambda name: re.sub(r"[^\w.+-]+", "-", str(name)), replace=True)


# ------------------------------------------------------------------------------------------------ the command


def launch(main: Callable[[], None], config_class: type) -> None:
    """Run a ``hydra.main`` function.

    An override that Hydra refuses ends the command in one line, with exit status 2. At the end of a sweep, one line
    names each job that failed.

    Args:
        main: decorated by Hydra.
        config_class: its typed config.
    """
    # without this, Hydra prints several lines and exits with 1 instead of raising
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if "--version" in sys.argv[1:]:
        from importlib.metadata import version

        print(f"torchrl_pmoe {version('torchrl_pmoe')}")
        return
    process.ready()
    if {"-m", "--multirun"} & set(sys.argv[1:]) and Path(sys.argv[0]).stem != "sweep":
        print(f"a sweep that goes on after a stop, several runs at a time: {sweep_command()}")
    sweep.parent = os.getpid()
    try:
        _launch(main, config_class)
    finally:
        sweep.tell()
    if sweep.failed:
        sys.exit(min(job.status for job in sweep.failed))


def sweep_command() -> str:
    """The command of ``sweep.py`` that does what this command with Hydra's ``-m`` does."""
    script = Path(sys.argv[0])
    given = [arg for arg in sys.argv[1:] if not arg.startswith("-") and not arg.startswith("hydra.")]
    return shlex.join([interpreter(), str(script.with_name("sweep.py")), f"recipe={script.stem}", *given])


def _launch(main: Callable[[], None], config_class: type) -> None:
    def bad_flag(parser: ArgumentParser, message: str) -> NoReturn:
        _stop(f"error: {message}; --help tells more", 2)

    try:
        # the parser of Hydra would print its usage before the error
        with patch.object(ArgumentParser, "error", bad_flag):
            main()
    except (HydraException, OmegaConfBaseException) as error:
        _stop(f"error: {hydra_line(error, config_class)}", 2)
    except ValueError as error:
        # Hydra's flags that exclude each other; errors of a job were printed already
        _stop(f"error: {' '.join(str(error).split())}", 2)
    except JobError as error:
        _stop(error.line, error.status)
    except OSError as error:
        # errors of a training were printed already: this one is Hydra's, which could not make the directory
        if error.filename is None:
            raise
        _stop(f"error: hydra.run.dir: must be a directory that can be made; {error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


def hydra_line(error: Exception, config_class: type, arguments: Sequence[str] | None = None) -> str:
    """What Hydra refuses, in one line.

    Args:
        error: that Hydra has raised.
        config_class: the typed config of the recipe.
        arguments: of the command line; those of this process by default.
    """
    if isinstance(error, OverrideParseException):
        return f"{error.override}: must be written key=value"
    message = " ".join(str(error).split())
    found = re.search(r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", message)
    known = list(described_keys(config_class))
    if found is None:
        return message
    key = found[1].split("=")[0].lstrip("+~")
    arguments = sys.argv[1:] if arguments is None else arguments
    given = [arg.split("=", 1)[1] for arg in arguments if arg.lstrip("+~").startswith(f"{key}=")]
    if key in known or key.startswith("hydra."):
        return message
    if key.startswith("env_kwargs."):
        value = "".join(given[:1])
        return f"{key}={value}: must be written +{key}={value}, an argument of the environment is a new key"
    return unknown_key(key, "".join(given[:1]), known)


def start_or_resume(cfg: DictConfig, config_class: type, resolve: Callable[[Any], Any], train: Callable) -> None:
    """The body of a recipe: read and check the config, then train from the start or from a checkpoint.

    An error ends the command in one line.

    Args:
        cfg: as Hydra composed it.
        config_class: its typed config.
        resolve: fills in the keys that were left open, and raises for values that exclude each other.
        train: trains one run, given its config and its directory.
    """
    with one_line_errors(), own_run_directory(cfg) as run:
        config = read(cfg, config_class)
        if config.resume is not None:
            config = resumed_config(config)
        resolve(config)
        prepare_torch(config.optim.num_threads)
        try:
            with own_scratch(config, run):
                train(config, run)
        except Interrupted as interrupted:
            interrupted.advice = how_to_resume(run)
            raise


def read(cfg: DictConfig, config_class: type) -> Any:
    """The typed config of what Hydra composed.

    Raises:
        UsageError: in one line, for what is not allowed.
    """
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UsageError(" ".join(str(error).split())) from None
    return build(config_class, values)


def resumed_config(config: Any) -> Any:
    """The config of the run that ``resume`` names, with the changes from the command line.

    The key ``resume`` of the returned config is the path of the checkpoint.

    Raises:
        UsageError: if there is no such run, if another recipe has trained it, or if a key was given that must not
            change.
    """
    try:
        values, checkpoint = open_run(Path(config.resume))
    except UsageError as error:
        raise UsageError(f"resume={error}") from error
    if values["recipe"] != config.recipe:
        raise UsageError(
            f"resume={config.resume}: must be a run of {config.recipe}.py, it is one of {values['recipe']}.py"
        )
    old = build(type(config), values)
    apply_changes(old, config)
    old.resume = str(checkpoint)
    return old


def apply_changes(old: Any, config: Any, changeable: tuple[str, ...] = CHANGEABLE) -> None:
    """Copy the keys that were given beside ``resume`` into the config of the resumed run.

    Args:
        old: config of that run, changed in place.
        config: config from the command line.
        changeable: prefixes of the keys that may change.

    Raises:
        UsageError: for a key that must not change.
    """
    known = described_keys(type(config))
    for override in HydraConfig.get().overrides.task:
        given = override.lstrip("+~").split("=", 1)[0]
        keys = [key for key in known if key == given or key.startswith(f"{given}.")]
        if keys and all(key.startswith(changeable) for key in keys):
            for key in keys:
                set_(old, key, get(config, key))
        elif given != "resume":
            raise UsageError(
                f"{override}: must be left out with resume={config.resume}, whose own config holds; may change: "
                + ", ".join(key.rstrip(".") for key in changeable)
            )


def keep_config(config: Any, run_dir: Path) -> None:
    """Write ``config.yaml``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({**to_dict(config), "resume": None}, sort_keys=False, allow_unicode=True)
    replace_file(run_dir / "config.yaml", text)


# ------------------------------------------------------------------------------------------------ one line


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an exception into one line on stderr, with exit status 2 for a config that cannot be run and 1 otherwise.

    It goes around the whole body of a ``hydra.main`` function, because Hydra would print its own message for every
    exception. When a job of a sweep fails, the next job starts; a signal ends the whole sweep.
    """
    if sweeping := HydraConfig.get().mode == RunMode.MULTIRUN:
        sweep.begin()
    try:
        yield
    except Interrupted as stop:
        _stop(f"stopped {stop.where}; {stop.advice}", 128 + stop.number)
    except (Exception, KeyboardInterrupt) as error:
        # a tensordict's context manager answers an interrupt with an error of its own
        if KeyboardInterrupt in (type(error), type(error.__context__)):
            _stop("interrupted", 130)
        line, status = _ending(error)
        if sweeping:
            sweep.fail(line, status)
        else:
            _stop(line, status)


def _ending(error: BaseException) -> tuple[str, int]:
    """The line and the exit status of a run that an error has ended."""
    directory = Path(HydraConfig.get().runtime.output_dir)
    if isinstance(error, UsageError | EnvironmentFault | OmegaConfBaseException):
        remove_empty(directory)
        return f"error: {usage_line(error)}", 2
    if isinstance(error, NonFiniteError | RunError):
        return f"error: {error}", 1
    return f"error: {cause(error)}; {process.keep_traceback(error, directory)}", 1


def usage_line(error: BaseException) -> str:
    """The error in one line; if an environment's own code has raised it, the traceback goes to a file."""
    line = " ".join(str(error).split())
    own = error.__cause__ if isinstance(error, EnvironmentFault) else None
    return (
        line
        if own is None or type(own).__module__.startswith("gymnasium.")
        else (f"{line} ({process.keep_traceback(own)})")
    )


def _stop(line: str, status: int) -> NoReturn:
    process.complain(line)
    sys.exit(status)


# ------------------------------------------------------------------------------------------------- a sweep


class JobError(Exception):
    """The failure of a job in a process that another Hydra launcher has started; Hydra passes it on to the parent.

    Args:
        line: one line on the failure.
        status: exit status.
    """

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line, status)
        self.line, self.status = line, status


@dataclass(frozen=True)
class Job:
    """A job of a sweep that failed."""

    overrides: Sequence[str]
    directory: str
    line: str
    status: int


class Sweep:
    """The jobs of a sweep that this process has begun.

    Attributes:
        parent: id of the process where Hydra was started; it prints the failures.
        overrides: those of each job.
        failed: failed jobs, in their order.
    """

    def __init__(self) -> None:
        self.parent: int | None = None
        self.overrides: list[Sequence[str]] = []
        self.failed: list[Job] = []
        self._places: tuple[Path, Path] | None = None

    def begin(self) -> None:
        """Note that a job starts."""
        self.overrides.append(HydraConfig.get().overrides.task)

    def fail(self, line: str, status: int) -> None:
        """Print why a job has failed; the next job starts afterwards.

        Raises:
            JobError: in a process of another launcher.
        """
        if os.getpid() != self.parent:
            raise JobError(line, status) from None
        hydra = HydraConfig.get()
        self._places = Path(hydra.runtime.cwd, hydra.sweep.dir), Path(hydra.runtime.cwd)
        self.failed.append(Job(hydra.overrides.task, os.path.join(hydra.sweep.dir, hydra.sweep.subdir), line, status))
        process.complain(line)

    def tell(self) -> None:
        """Print one line for each job that failed, and remove the directory of a sweep in which no job has begun."""
        shared = set.intersection(*map(set, self.overrides)) if len(self.overrides) > 1 else set()
        for job in self.failed:
            overrides = " ".join(override for override in job.overrides if override not in shared)
            process.complain(f"failed: {overrides} in {job.directory}: {job.line.removeprefix('error: ')}")
        if self._places is not None:
            directory, top = self._places
            # Hydra's own note
            if directory.is_dir() and [found.name for found in directory.iterdir()] == ["multirun.yaml"]:
                (directory / "multirun.yaml").unlink()
                _remove_empty([here for here in (directory, *directory.parents) if top in here.parents], top)


sweep = Sweep()
"""Of this process."""


# ---------------------------------------------------------------------------------------- the run's directories


@contextmanager
def owned(directory: Path, named: str, allowed: str) -> Iterator[Path]:
    """Make a directory if necessary, and lock it while the body runs.

    Args:
        directory: the body writes to it.
        named: key and value, for the error.
        allowed: completes the error "<named>: must be ..." if another process has locked it.

    Raises:
        UsageError: if another process has locked it, or nothing can be written there.
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
    """Lock the directory of a run: the one that Hydra has made, or that of the run to resume.

    Args:
        cfg: as Hydra composed it; only ``resume`` is read.
        may_hold: says whether a new run may begin in a directory that holds one already. It is asked under the lock.

    Raises:
        UsageError: if it cannot be locked, or a new run would overwrite the files of another.
    """
    output = Path(HydraConfig.get().runtime.output_dir)
    resume = OmegaConf.to_container(cfg, resolve=True).get("resume")  # type: ignore[union-attr]
    if resume is not None:
        remove_empty(output)
        run = run_of(Path(str(resume)))
        with ExitStack() as stack:
            # a directory that does not exist gets an error of its own later
            if os.path.isdir(run):
                stack.enter_context(owned(run, f"resume={resume}", "a run that no other process uses"))
            yield run
        return
    shown = from_here(output)
    key = "hydra.sweep.dir: " if HydraConfig.get().mode == RunMode.MULTIRUN else "hydra.run.dir="
    with owned(output, f"{key}{shown}", "a directory that no other process uses"):
        if (there := RunDirectory(output).outputs()) and not may_hold(output):
            goes_on = f"; {resume_argument(output)} goes on with that run" if RunDirectory.CHECKPOINTS in there else ""
            raise UsageError(f"{key}{shown}: must be a directory without a run, it has {', '.join(there)}{goes_on}")
        yield output


@contextmanager
def own_scratch(config: Any, run: Path) -> Iterator[None]:
    """Lock ``replay_buffer.scratch_dir``, if the config has one.

    It must be empty when a run starts, or be that of the same run directory; a resumed run must find its own.

    Args:
        config: typed.
        run: directory of the run.

    Raises:
        UsageError: if it holds other files, belongs to another run, or cannot be written to.
    """
    scratch = getattr(getattr(config, "replay_buffer", None), "scratch_dir", None)
    if scratch is None:
        yield
        return
    named = f"replay_buffer.scratch_dir={scratch}"
    with owned(Path(scratch), named, "a directory that no other process uses") as directory:
        note = directory / ".run"
        ours = {note.name, RunDirectory.LOCK}
        owner = Path(note.read_text(encoding="utf-8")) if note.is_file() else run.absolute()
        if config.resume is None:
            # a run that was killed before its first checkpoint begins again, and writes over its own frames
            again = note.is_file() and owner == run.absolute()
            if {path.name for path in directory.iterdir()} - ours and not again:
                raise UsageError(f"{named}: must be empty or not there")
        # the run may have been moved: then the owner that was noted is gone
        elif owner != run.absolute() and owner.is_dir():
            raise UsageError(f"{named}: must be that of the run that goes on, it is that of {owner}")
        replace_file(note, str(run.absolute()))
        try:
            yield
        finally:
            # a run that was refused leaves no file behind
            if {path.name for path in directory.iterdir()} <= ours:
                note.unlink()


def remove_empty(path: Path) -> None:
    """Remove the empty run directory, which Hydra has made before the config was checked."""
    top = Path(HydraConfig.get().runtime.cwd)
    os.chdir(top)
    # the path as it was written may go through more directories, with .. in it
    written = top / HydraConfig.get().run.dir
    made = [here for base in (path, written) for here in (base, *base.parents) if here == path or top in here.parents]
    if (notes := HydraConfig.get().output_subdir) is not None:
        for name in ("config", "hydra", "overrides"):
            (path / notes / f"{name}.yaml").unlink(missing_ok=True)
        made.insert(0, path / notes)
    _remove_empty(made, top)


def _remove_empty(made: Iterable[Path], top: Path) -> None:
    # hydra.run.dir=. is the user's own directory, which was there before
    for directory in (here for here in made if here.resolve() != top.resolve()):
        if directory.name != ".." and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
