"""What the recipes share before a training starts: checking a config, making environments."""

from __future__ import annotations

import difflib
import os
import re
import secrets
import sys
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import process
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from policies import UNIMODAL
from rules import Rule, choice, device, either, flag, integer, mapping, number, text, widths
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl._utils import logger as torchrl_logger
from torchrl.envs import DoubleToFloat, DTypeCastTransform, EnvBase, GymWrapper, SerialEnv, TransformedEnv

from torchrl_pmoe.envs import RawActionPolicy, normalize_actions, parallel_env
from torchrl_pmoe.envs.mujoco.engines import quiet_mujoco
from torchrl_pmoe.trainers import NonFiniteError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


# --------------------------------------------------------------------------------------------- config


# two runs may start in the same second; a text that stays the same within a command, as ${now:} does
OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(4), use_cache=True, replace=True)


class UsageError(Exception):
    """A config that cannot be run: one line that names the key, the value and what is allowed."""


class RunError(Exception):
    """A run that cannot go on: one line that says why, and what is left of it."""


class Interrupted(Exception):
    """A run that was told to stop and has written a checkpoint.

    Args:
        number: of the signal.
        where: the run stands now.
    """

    def __init__(self, number: int, where: str) -> None:
        super().__init__(number, where)
        self.number, self.where = number, where
        self.advice = ""


RULES: dict[str, Rule] = {
    "env": text(),
    "env_kwargs": mapping(),
    "seed": integer(0, 2**31 - 1),
    "total_frames": integer(1),
    "num_experts": either(integer(1, 1024), None),
    "policy": choice("pmoe", *UNIMODAL),
    "blend": choice("parameters", "actions"),
    "preset": either(choice("paper"), None),
    "device": device(),
    "network.hidden_sizes": widths(),
    "network.activation": choice(*ACTIVATIONS),
    "optim.lr": number(above=0),
    "optim.router_lr": either(number(above=0), None),
    "optim.weight_decay": number(at_least=0),
    "optim.adam_eps": number(above=0),
    "optim.gamma": number(at_least=0, at_most=1),
    "optim.num_threads": either(integer(1, 256), None),
    "compile.enabled": either(flag(), None),
    "compile.cudagraphs": flag(),
    "collector.num_envs": integer(1, 2**20),
    "collector.backend": choice("serial", "parallel", "envpool", "mjx"),
    "loss.routing_coef": number(at_least=0),
    "loss.routing_loss": choice("brier", "log"),
    "loss.num_proposals": integer(1, 1024),
    "logger.backend": either(choice("csv", "tensorboard", "wandb", "mlflow", "trackio"), None),
    "logger.project_name": text(),
    "logger.eval_interval": integer(1),
    "logger.eval_episodes": integer(1, 10_000),
    "logger.eval_max_steps": integer(1),
    "logger.eval_expert": either(choice("largest", "drawn"), None),
    "logger.progress_bar": flag(),
    "on_nonfinite": choice("stop", "skip"),
    "resume": either(text(), None),
    "checkpoint.interval": integer(1),
    "checkpoint.keep": integer(1),
}
"""The keys that every recipe has."""


def check_config(cfg: DictConfig, rules: Mapping[str, Rule]) -> None:
    """Check every key against its rule and put the parsed values in place.

    Raises:
        UsageError: on the first key that is unknown, missing or holds what its rule does not allow.
    """
    values = dict(leaves(cfg, rules))
    for key in [*values, *rules]:
        if key not in rules:
            raise UsageError(unknown_key(key, values[key], rules))
        if key not in values:
            raise UsageError(f"{key}: is missing; must be {rules[key].allowed}")
        try:
            OmegaConf.update(cfg, key, rules[key].parse(values[key]))
        except (ValueError, TypeError):
            shown = "null" if values[key] is None else values[key]
            raise UsageError(f"{key}={shown}: must be {rules[key].allowed}") from None
    backend = OmegaConf.select(cfg, "logger.backend")
    if backend not in (None, "csv") and find_spec(backend) is None:
        raise UsageError(
            f"logger.backend={backend}: must be csv or null without the package {backend}: pip install {backend}"
        )
    on_gpu = str(cfg.device).startswith("cuda")
    refuse(cfg, {"compile.cudagraphs": (cfg.compile.cudagraphs and not on_gpu, f"false with device={cfg.device}")})


def fill_preset(
    cfg: DictConfig,
    paper: Mapping[str, Any],
    fills: Mapping[str, Any],
    num_experts: Mapping[str, int],
    *,
    for_unimodal: Sequence[str] = (),
) -> None:
    """Fill in the keys that were left to the preset; a unimodal policy has none but those ``for_unimodal``.

    Args:
        cfg: a checked config.
        paper: what ``preset=paper`` stands for.
        fills: the values of the keys that are null.
        num_experts: the paper's numbers by task, without its version; 4 elsewhere.
        for_unimodal: the keys that mean something to a policy that draws no expert.

    Raises:
        UsageError: where a key contradicts the preset.
    """
    if cfg.preset == "paper" and cfg.policy in UNIMODAL:
        raise UsageError(f"preset=paper: must be null with policy={cfg.policy}, it is a combination for policy=pmoe")
    for key in fills:
        given = OmegaConf.select(cfg, key)
        if cfg.preset == "paper" and given not in (None, paper[key]):
            raise UsageError(f"{key}={given}: must be {paper[key]} or null with preset=paper")
        if cfg.policy in UNIMODAL and key not in for_unimodal:
            OmegaConf.update(cfg, key, None)  # a sweep over policies may name them
        elif given is None:
            OmegaConf.update(cfg, key, fills[key])
    if cfg.num_experts is None:
        cfg.num_experts = num_experts.get(cfg.env.split("-")[0], 4)


def refuse(cfg: DictConfig, refused: Mapping[str, tuple[bool, str]]) -> None:
    """Raise for the first key whose condition holds.

    Args:
        cfg: a checked config.
        refused: by key, whether its value cannot go with the others, and what must be.

    Raises:
        UsageError: the line for that key.
    """
    for key, (bad, allowed) in refused.items():
        if bad:
            raise UsageError(f"{key}={OmegaConf.select(cfg, key)}: must be {allowed}")


def leaves(cfg: DictConfig, rules: Mapping[str, Rule] = MappingProxyType({})) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; what has a rule of its own is not looked into.

    Raises:
        UsageError: for a config that cannot be resolved.
    """
    try:
        tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UsageError(" ".join(str(error).split())) from None

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and value and key not in rules:
                yield from walk(value, f"{key}.")
            else:
                yield key, value

    return walk(tree, "")


def unknown_key(key: str, value: Any, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The line for a key that does not exist."""
    close = difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    group = [name for name in known if name.startswith(f"{key.split('.')[0]}.")]
    if "." not in key and group:
        return f"{key}={value}: is a group of keys; allowed are {', '.join(group)}"
    allowed = close or group or [name for name in known if "." not in name]
    return f"{key}={value}: no such key; {'did you mean' if close else 'allowed are'} {', '.join(allowed)}"


def launch(main: Callable[[], None], rules: Mapping[str, Rule]) -> None:
    """Run a ``hydra.main`` function.

    What Hydra refuses ends in one line and exit status 2; the jobs of a sweep that failed are told at its end.
    """
    # Hydra prints several lines and exits with 1, unless it is told to raise
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _check_flags()
    process.ready()
    sweep.parent = os.getpid()
    try:
        _launch(main, rules)
    finally:
        sweep.tell()
    if sweep.failed:
        sys.exit(min(job.status for job in sweep.failed))


def _launch(main: Callable[[], None], rules: Mapping[str, Rule]) -> None:
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        _stop(_hydra_line(error, rules), 2)
    except JobError as error:
        _stop(error.line, error.status)
    except OSError as error:
        # ours are one line already: this one comes from before
        if error.filename is None:
            raise
        _stop(f"error: hydra.run.dir: must be a directory that can be made; {error.filename}: {error.strerror}", 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


def _check_flags() -> None:
    """End in one line where Hydra's parser would print its usage, or raise."""
    parser = get_args_parser()
    parser.error = lambda message: _stop(f"error: {message}; --help tells more", 2)  # type: ignore[method-assign]
    flags = parser.parse_args()
    if flags.resolve and not (flags.cfg or flags.help):
        parser.error("--resolve: goes with --cfg or --help")
    if flags.package and not flags.cfg:
        parser.error("--package: goes with --cfg")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a run with one line on stderr: status 2 for a config that cannot be run, 1 for what went bad on the way.

    Stands around the whole body of a ``hydra.main`` function, since Hydra has words of its own for every exception. A
    job of a sweep that goes wrong leaves the next one its turn; a signal ends the sweep.
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
    if isinstance(error, UsageError | OmegaConfBaseException):
        remove_empty(directory)
        return f"error: {' '.join(str(error).split())}", 2
    if isinstance(error, NonFiniteError | RunError):
        return f"error: {error}", 1
    return f"error: {cause(error)}; {process.keep_traceback(error, directory)}", 1


def cause(error: BaseException) -> str:
    """What a user can make of an error that nobody has foreseen, in one line."""
    words = str(error)
    if isinstance(error, MemoryError | OverflowError | torch.OutOfMemoryError) or any(
        sign in words for sign in ("can't allocate memory", "Storage size calculation overflowed")
    ):
        return "the config asks for more memory than there is"
    if "Too many open files" in words:
        return f"this process may not open as many files as it needs (ulimit -n): {process.describe(error)}"
    return process.describe(error)


def _stop(line: str, status: int) -> NoReturn:
    process.complain(line)
    sys.exit(status)


class JobError(Exception):
    """What ended a job of a sweep in a process that another launcher has started; Hydra takes it to the parent.

    Args:
        line: that tells it.
        status: to exit with.
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
        parent: the process where Hydra was started, which tells what has failed.
        overrides: of each job.
        failed: in their order.
    """

    def __init__(self) -> None:
        self.parent: int | None = None
        self.overrides: list[Sequence[str]] = []
        self.failed: list[Job] = []
        self._places: tuple[Path, Path] | None = None

    def begin(self) -> None:
        """A job has its turn."""
        self.overrides.append(HydraConfig.get().overrides.task)

    def fail(self, line: str, status: int) -> None:
        """A job has failed: say so, and let the next one have its turn.

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
        """One line for each job that failed; nothing is left of a sweep in which no job began."""
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


def _hydra_line(error: Exception, rules: Mapping[str, Rule]) -> str:
    if isinstance(error, OverrideParseException):
        return f"error: {error.override}: must be written key=value"
    message = " ".join(str(error).split())
    found = re.search(r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", message)
    if found is None:
        return f"error: {message}"
    key = found[1].split("=")[0].lstrip("+~")
    given = [arg.split("=", 1)[1] for arg in sys.argv[1:] if arg.lstrip("+~").startswith(f"{key}=")]
    if key in rules or key.startswith("hydra."):
        return f"error: {message}"
    return f"error: {unknown_key(key, ''.join(given[:1]), rules)}"


def remove_empty(path: Path) -> None:
    """Take back the empty run directory that Hydra makes before a config is looked at."""
    top = Path(HydraConfig.get().runtime.cwd)
    os.chdir(top)
    # as it was written too: with .. in a name, there is more on the way
    written = top / HydraConfig.get().run.dir
    made = [here for base in (path, written) for here in (base, *base.parents) if here == path or top in here.parents]
    if (notes := HydraConfig.get().output_subdir) is not None:
        for name in ("config", "hydra", "overrides"):
            (path / notes / f"{name}.yaml").unlink(missing_ok=True)
        made.insert(0, path / notes)
    _remove_empty(made, top)


def _remove_empty(made: Iterable[Path], top: Path) -> None:
    # hydra.run.dir=. names the user's own directory, which was there before
    for directory in (here for here in made if here.resolve() != top.resolve()):
        if directory.name != ".." and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


# ---------------------------------------------------------------------------------------- environments


@contextmanager
def _quiet_make() -> Iterator[None]:
    """Leave out the two lines that every MuJoCo v4 task prints when it is made."""
    with warnings.catch_warnings(), quiet_mujoco():
        for message in (".*is out of date.*", ".*Using the latest versioned.*"):
            warnings.filterwarnings("ignore", message=message)
        yield


def make_gym(name: str, kwargs: Mapping[str, Any] | None = None, *, checked: bool = True) -> gym.Env:
    """A Gymnasium environment with a vector of observations and a bounded vector of actions.

    Args:
        name: Gymnasium id.
        kwargs: of the environment.
        checked: whether Gymnasium looks at its first step and warns of what is unusual.

    Raises:
        UsageError: where there is no such environment, or its spaces are others.
    """
    given: Any = OmegaConf.to_container(kwargs) if isinstance(kwargs, DictConfig) else kwargs
    try:
        with _quiet_make():
            env = gym.make(name, disable_env_checker=None if checked else True, **(given or {}))
    # an environment's own constructor may raise anything
    except Exception as error:
        raise UsageError(_not_made(name, given, error)) from error
    observation, action = env.observation_space, env.action_space
    allowed = None
    if not isinstance(action, gym.spaces.Box):
        allowed = f"an environment with a Box of continuous actions, this one has {_one_line(action)}"
    elif action.dtype not in _FLOATS or len(action.shape) != 1 or not action.shape[0]:
        allowed = f"an environment with a vector of continuous actions, this one has {_one_line(action)}"
    elif not np.isfinite(width := _width(action)).all():
        allowed = f"an environment with bounded actions, which are scaled to [-1, 1]; this one has {_one_line(action)}"
    elif not (width > 0).all():
        allowed = f"an environment with actions whose bounds differ, this one has {_one_line(action)}"
    elif not isinstance(observation, gym.spaces.Box) or len(observation.shape) != 1:
        flattened = "gymnasium.wrappers.FlattenObservation makes one of others"
        allowed = (
            f"an environment with a Box vector of observations ({flattened}), this one has {_one_line(observation)}"
        )
    elif observation.dtype not in _FLOATS or not observation.shape[0]:
        cast = "gymnasium.wrappers.DtypeObservation casts others"
        allowed = f"an environment with floating-point observations ({cast}), this one has {_one_line(observation)}"
    if allowed is not None:
        env.close()
        raise UsageError(f"env={name}: must be {allowed}")
    return env


def _not_made(name: str, kwargs: Any, error: Exception) -> str:
    """Why there is no environment, in one line: its id, its arguments, or a fault of its own."""
    reason = re.sub(r"\x1b\[[0-9;]*m", "", process.describe(error))
    known = name.rpartition(":")[2]
    if known not in gym.registry and not any(key.startswith(f"{known}-v") for key in gym.registry):
        return f"env={name}: must be the id of an installed Gymnasium environment ({reason})"
    if kwargs and isinstance(error, TypeError | ValueError | LookupError | AssertionError | gym.error.Error):
        return f"env_kwargs={kwargs}: must be arguments of {name} ({reason})"
    given = f"with env_kwargs={kwargs} it raised" if kwargs else "it raised"
    return f"env={name}: must be an environment that can be made; {given} {reason} ({process.keep_traceback(error)})"


_TRIED: set[str] = set()


def try_env(name: str, kwargs: Mapping[str, Any] | None = None) -> None:
    """Take one step in an environment that is thrown away, so that what it cannot do is told before any work.

    Args:
        name: Gymnasium id.
        kwargs: of the environment.

    Raises:
        UsageError: where it cannot be made, reset or stepped, or what it returns is not what its spaces say.
    """
    if (key := f"{name} {dict(kwargs or {})}") in _TRIED:
        return
    with closing(make_gym(name, kwargs, checked=False)) as env, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first: Any
        second: Any
        reward: Any
        doing = "reset"
        try:
            first, _ = env.reset(seed=0)
            env.action_space.seed(0)
            doing = "step"
            second, reward, *_ = env.step(env.action_space.sample())
        # an environment may raise anything
        except Exception as error:
            raise UsageError(
                f"env={name}: must be an environment that can be reset and stepped; its {doing} raised "
                f"{process.describe(error)} ({process.keep_traceback(error)})"
            ) from error
        shape: Any = env.observation_space.shape
    for doing, observation in (("reset", first), ("step", second)):
        if np.shape(observation) != shape:
            what = (
                f"observations of shape {shape} as its space says; its {doing} returned shape {np.shape(observation)}"
            )
            raise UsageError(f"env={name}: must be an environment with {what}")
    if np.shape(reward) != () or not hasattr(reward, "__float__"):
        shown = f"shape {np.shape(reward)}" if np.shape(reward) else type(reward).__name__
        single = "gymnasium.wrappers.TransformReward makes it one"
        raise UsageError(
            f"env={name}: must be an environment whose reward is a number ({single}), this one has {shown}"
        )
    _TRIED.add(key)


_FLOATS = (np.float16, np.float32, np.float64)


def _width(box: gym.spaces.Box) -> np.ndarray:
    """How far apart the bounds are, in the float32 that policies compute in."""
    with np.errstate(over="ignore", invalid="ignore"):
        return box.high.astype(np.float32) - box.low.astype(np.float32)


def _one_line(space: gym.Space) -> str:
    return " ".join(str(space).split())


def make_env(
    name: str,
    seed: int,
    num_envs: int = 1,
    wrap: Callable[[gym.Env], gym.Env] = lambda env: env,
    kwargs: Mapping[str, Any] | None = None,
    *,
    processes: bool = False,
    clip_actions: bool = False,
) -> EnvBase:
    """A seeded TorchRL environment of Gymnasium's ``name``, in float32, with actions in ``[-1, 1]``.

    Args:
        name: Gymnasium id.
        seed: of the first environment; the others follow.
        num_envs: stepped one after the other, unless each has a process.
        wrap: puts Gymnasium's wrappers around each.
        kwargs: of the environment.
        processes: whether each environment has a process of its own.
        clip_actions: take actions of any size and clip them into ``[-1, 1]``.
    """
    words = None
    if processes:
        handle, words = tempfile.mkstemp(prefix="torchrl_pmoe-")
        os.close(handle)

    def single() -> EnvBase:
        gym_env = make_gym(name, kwargs)
        env = TransformedEnv(
            GymWrapper(wrap(gym_env if words is None else _LastWords(gym_env, words))), DoubleToFloat()
        )
        if torch.float16 in (env.observation_spec["observation"].dtype, env.action_spec.dtype):
            env.append_transform(DTypeCastTransform(torch.float16, torch.float32))
        return normalize_actions(env, clip=clip_actions)

    if processes:
        env: EnvBase = parallel_env(num_envs, single)
        env.last_words = words
        weakref.finalize(env, Path(str(words)).unlink, missing_ok=True)
    else:
        env = single() if num_envs == 1 else SerialEnv(num_envs, single)
    env.set_seed(seed)
    return env


class _LastWords(gym.Wrapper):
    """In a process of its own: keeps what the environment raises for the run, and ends the process without a word.

    Args:
        env: Gymnasium's.
        file: that takes one line and the traceback.
    """

    def __init__(self, env: gym.Env, file: str) -> None:
        super().__init__(env)
        self._file = file

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        with self._kept():
            return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with self._kept():
            return self.env.step(action)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        # an environment may raise anything
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            Path(self._file).write_text(f"{process.describe(error)}\n{text}", encoding="utf-8")
            raise SystemExit(1) from None


def last_words(env: EnvBase) -> tuple[str, str] | None:
    """What an environment in a process of its own has raised, in one line and as a traceback; None if nothing."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    file = getattr(env, "last_words", None)
    text = Path(file).read_text(encoding="utf-8") if file is not None and Path(file).is_file() else ""
    line, _, trace = text.partition("\n")
    return (line, trace) if line else None


def raw_action_policy(cfg: DictConfig, policy: TensorDictModuleBase) -> RawActionPolicy:
    """A policy of the recipes' normalised actions, for the environment as Gymnasium makes it.

    Args:
        cfg: ``env``, ``env_kwargs`` and ``device`` are read.
        policy: writes ``action`` in ``[-1, 1]``.
    """
    with closing(make_gym(cfg.env, cfg.env_kwargs)) as env:
        box: Any = env.action_space
    low, high = (torch.as_tensor(bound, dtype=torch.float32, device=cfg.device) for bound in (box.low, box.high))
    return RawActionPolicy(policy, low, high)


def seed_everything(seed: int) -> None:
    """Seed the global generators of PyTorch and NumPy."""
    torch.manual_seed(seed)
    # environments may still draw from NumPy's global generator
    np.random.seed(seed)  # noqa: NPY002


def prepare_torch(cfg: DictConfig) -> None:
    """Settings of the whole process: threads, and the checks and messages that a run does without."""
    torchrl_logger.setLevel("WARNING")
    # a check of every distribution's parameters costs more than drawing from it
    torch.distributions.Distribution.set_default_validate_args(False)
    if cfg.optim.num_threads is not None:
        torch.set_num_threads(cfg.optim.num_threads)
