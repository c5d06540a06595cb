"""What the recipes share: checking a config, making environments, evaluating, recording a run."""

from __future__ import annotations

import csv
import difflib
import importlib.util
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs import DoubleToFloat, EnvBase, GymWrapper, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_pmoe.trainers import NonFiniteError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


# --------------------------------------------------------------------------------------------- config


class UsageError(Exception):
    """A config that cannot be run: one line that names the key, the value and what is allowed."""


@dataclass(frozen=True)
class Rule:
    """What one config key may hold.

    Args:
        allowed: completes "<key>=<value>: must be ...".
        parse: returns the value to use, or raises ``ValueError``.
    """

    allowed: str
    parse: Callable[[Any], Any]


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def number(above: float | None = None, at_least: float | None = None, at_most: float | None = None) -> Rule:
    """A finite number between the given bounds."""

    def parse(value: Any) -> float:
        _require(isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf"))
        _require((above is None or value > above) and (at_least is None or value >= at_least))
        _require(at_most is None or value <= at_most)
        return float(value)

    bounds = [f"> {above:g}"] if above is not None else []
    bounds += [f">= {at_least:g}"] if at_least is not None else []
    bounds += [f"<= {at_most:g}"] if at_most is not None else []
    return Rule(" ".join(["a number", " and ".join(bounds)]).strip(), parse)


def integer(at_least: int, at_most: int | None = None) -> Rule:
    """A whole number (``1e6`` is one)."""

    def parse(value: Any) -> int:
        _require(isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1)
        _require(value >= at_least and (at_most is None or value <= at_most))
        return int(value)

    return Rule(f"an integer >= {at_least}" + (f" and <= {at_most}" if at_most is not None else ""), parse)


def choice(*names: str) -> Rule:
    """One of some names."""

    def parse(value: Any) -> str:
        _require(isinstance(value, str) and value in names)
        return value

    return Rule("one of " + ", ".join(names), parse)


def flag() -> Rule:
    """True or false."""

    def parse(value: Any) -> bool:
        _require(isinstance(value, bool))
        return value

    return Rule("true or false", parse)


def text() -> Rule:
    """Any text but the empty one."""

    def parse(value: Any) -> str:
        _require(isinstance(value, str) and value != "")
        return value

    return Rule("a non-empty text", parse)


def widths() -> Rule:
    """The widths of the hidden layers."""

    def parse(value: Any) -> list[int]:
        _require(isinstance(value, list))
        return [integer(1).parse(width) for width in value]

    return Rule("a list of integers >= 1", parse)


def device() -> Rule:
    """A device that is there; null is the best one."""

    def parse(value: Any) -> str:
        if value is None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=str(value))
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError from error
        return str(value)

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return Rule("a device of this machine (" + ", ".join(["cpu", *gpus]) + ") or null", parse)


def either(rule: Rule, *literals: Any) -> Rule:
    """A rule, or one of some literal values (null among them)."""

    def parse(value: Any) -> Any:
        same = any(value == other and type(value) is type(other) for other in literals)
        return value if same else rule.parse(value)

    names = ["null" if other is None else str(other) for other in literals]
    return Rule(" or ".join([rule.allowed, *names]), parse)


def check_config(cfg: DictConfig, rules: Mapping[str, Rule]) -> None:
    """Check every key against its rule and put the parsed values in place.

    Raises:
        UsageError: on the first key that is unknown, missing or holds what its rule does not allow.
    """
    values = dict(_leaves(cfg, rules))
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


def _leaves(cfg: DictConfig, rules: Mapping[str, Rule]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; what has a rule of its own is not looked into."""
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
    """Run a ``hydra.main`` function; what Hydra refuses ends in one line and exit status 2."""
    # Hydra prints several lines and exits with 1, unless it is told to raise
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        _stop(_hydra_line(error, rules), 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End a run with one line on stderr: status 2 for a config that cannot be run, 1 for numbers gone bad.

    Stands around the whole body of a ``hydra.main`` function, since Hydra has words of its own for every exception.
    """
    try:
        yield
    except UsageError as error:
        _remove_empty(Path(HydraConfig.get().runtime.output_dir))
        _stop(f"error: {error}", 2)
    except NonFiniteError as error:
        _stop(f"error: {error}", 1)
    except RuntimeError as error:
        # a tensordict's context manager answers an interrupt with an error of its own
        if isinstance(error.__context__, KeyboardInterrupt):
            _stop("interrupted", 130)
        raise


def _stop(line: str, status: int) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)


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


def _remove_empty(path: Path) -> None:
    """Take back the empty run directory that Hydra makes before a config is looked at."""
    while path != Path.cwd() and path.is_dir() and not any(path.iterdir()):
        path.rmdir()
        path = path.parent


# ---------------------------------------------------------------------------------------- environments


@contextmanager
def _quiet_make() -> Iterator[None]:
    """Leave out the two lines that every MuJoCo v4 task prints when it is made."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is out of date.*")
        if importlib.util.find_spec("mujoco") is None:
            yield
            return
        import mujoco

        previous = mujoco.get_mju_user_warning()

        def show(message: str) -> None:
            if "settotalmass" not in message:
                print(f"MuJoCo: {message}", file=sys.stderr)

        mujoco.set_mju_user_warning(show)
        try:
            yield
        finally:
            mujoco.set_mju_user_warning(previous)


def make_gym(name: str) -> gym.Env:
    """A Gymnasium environment with a vector of observations and a bounded vector of actions.

    Raises:
        UsageError: where there is no such environment, or its spaces are others.
    """
    try:
        with _quiet_make():
            env = gym.make(name)
    # an environment's own constructor may raise anything
    except Exception as error:
        reason = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split()) or type(error).__name__
        raise UsageError(f"env={name}: must be the id of an installed Gymnasium environment ({reason})") from error
    observation, action = env.observation_space, env.action_space
    allowed = None
    if not isinstance(action, gym.spaces.Box):
        allowed = f"an environment with a Box of continuous actions, this one has {_one_line(action)}"
    elif action.dtype.kind != "f" or len(action.shape) != 1 or not action.shape[0]:
        allowed = f"an environment with a vector of continuous actions, this one has {_one_line(action)}"
    elif not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        allowed = f"an environment with bounded actions, this one has {_one_line(action)}"
    elif not isinstance(observation, gym.spaces.Box) or len(observation.shape) != 1:
        allowed = f"an environment with a Box vector of observations, this one has {_one_line(observation)}"
    elif observation.dtype.kind != "f" or not observation.shape[0]:
        allowed = f"an environment with floating-point observations, this one has {_one_line(observation)}"
    if allowed is not None:
        env.close()
        raise UsageError(f"env={name}: must be {allowed}")
    return env


def _one_line(space: gym.Space) -> str:
    return " ".join(str(space).split())


def make_env(name: str, seed: int, num_envs: int = 1) -> EnvBase:
    """A seeded TorchRL environment of Gymnasium's ``name``, in float32."""

    def single() -> EnvBase:
        return TransformedEnv(GymWrapper(make_gym(name)), DoubleToFloat())

    env = single() if num_envs == 1 else SerialEnv(num_envs, single)
    env.set_seed(seed)
    return env


def seed_everything(seed: int) -> None:
    """Seed the global generators of PyTorch and NumPy."""
    torch.manual_seed(seed)
    # environments may still draw from NumPy's global generator
    np.random.seed(seed)  # noqa: NPY002


class Evaluator:
    """Runs whole episodes on environments of its own, all at once, without touching the run's randomness.

    Args:
        name: Gymnasium id.
        policy: reads ``observation`` and writes ``action``; asked for its deterministic action.
        episodes: how many episodes make one evaluation.
        max_steps: an episode is cut here.
        seed: of the environments and of what the policy may draw.
        device: of the policy.
    """

    def __init__(
        self,
        name: str,
        policy: TensorDictModuleBase,
        *,
        episodes: int,
        max_steps: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.policy = policy
        self.max_steps = max_steps
        self.device = device
        self.seed = seed
        self.envs = [make_gym(name) for _ in range(episodes)]
        for index, env in enumerate(self.envs):
            env.reset(seed=seed + index)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The return of every episode, ``[episodes]``."""
        with isolated_rng(self.seed), set_exploration_type(ExplorationType.DETERMINISTIC):
            return self._episodes()

    def _episodes(self) -> Tensor:
        returns = torch.zeros(len(self.envs), dtype=torch.float64)
        observation = np.stack([env.reset()[0] for env in self.envs])
        running = list(range(len(self.envs)))
        for _ in range(self.max_steps):
            batch = torch.as_tensor(observation[running], dtype=torch.float32, device=self.device)
            td = self.policy(TensorDict({"observation": batch}, [len(running)]))
            actions = td.get("action").cpu().numpy()
            still = []
            for index, action in zip(running, actions, strict=True):
                observation[index], reward, terminated, truncated, _ = self.envs[index].step(action)
                returns[index] += float(reward)
                if not (terminated or truncated):
                    still.append(index)
            running = still
            if not running:
                break
        if not (returns.isfinite().all() and np.isfinite(observation).all()):
            raise NonFiniteError("the evaluation met a NaN or infinite reward or observation: the run stops here")
        return returns

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Draw from PyTorch generators seeded with ``seed``, and put the run's own back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


# ------------------------------------------------------------------------------------------- recording


@dataclass
class RunRecorder:
    """Writes ``metrics.csv``, one row an evaluation, and draws it when the run ends.

    Args:
        directory: the run's own.
        title: of the plot.
    """

    directory: Path
    title: str
    last: dict[str, float] = field(default_factory=dict)
    _fields: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)
    _paused: float = 0.0
    _mark: tuple[int, float] = (0, 0.0)

    @property
    def path(self) -> Path:
        """Where the rows go."""
        return self.directory / "metrics.csv"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the frames per second."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def clock(self, frames: int) -> dict[str, float]:
        """Wall seconds since the start, and training frames per second since the last call."""
        wall = time.perf_counter() - self._start
        training = wall - self._paused
        last_frames, last_training = self._mark
        self._mark = (frames, training)
        speed = (frames - last_frames) / max(training - last_training, 1e-9)
        return {"frames": frames, "wall_seconds": round(wall, 2), "frames_per_second": round(speed, 1)}

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; the first one fixes the columns."""
        if not self._fields:
            self._fields = list(row)
            with self.path.open("w", newline="") as file:
                csv.writer(file).writerow(self._fields)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([_cell(row.get(name)) for name in self._fields])
        self.last = dict(row)

    def plot(self) -> Path | None:
        """Draw return and expert usage over frames."""
        return plot_run(self.path, self.title) if self._fields else None


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of a ``metrics.csv``; an empty cell is nan."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def plot_run(path: Path, title: str) -> Path:
    """Draw ``learning_curve.png`` beside a ``metrics.csv``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = read_metrics(path)
    frames = data["frames"]
    usage = [data[name] for name in data if re.fullmatch(r"usage_\d+", name)]
    fig, axes = plt.subplots(
        1 + bool(usage), 1, sharex=True, figsize=(7, 6 if usage else 4), squeeze=False, layout="constrained"
    )
    top = axes[0, 0]
    mean, std = data["return_mean"], data["return_std"]
    top.plot(frames, mean, color="#0072B2", marker="o" if len(frames) < 30 else None, markersize=3)
    top.fill_between(frames, mean - std, mean + std, color="#0072B2", alpha=0.2, linewidth=0)
    top.set(title=title, ylabel="evaluation return (mean ± std)")
    top.grid(alpha=0.3)
    if usage:
        bottom = axes[1, 0]
        # cividis keeps its order of lightness under every kind of colour blindness
        colors = plt.get_cmap("cividis")(np.linspace(0.05, 0.95, len(usage)))
        labels = [str(index) for index in range(len(usage))]
        bottom.stackplot(frames, usage, colors=colors, labels=labels, edgecolor="white", linewidth=0.5)
        bottom.set(ylabel="expert usage", ylim=(0, 1))
        bottom.margins(x=0)
        bottom.legend(title="expert", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    axes[-1, 0].set_xlabel("frames")
    target = path.with_name("learning_curve.png")
    fig.savefig(target, dpi=150)
    plt.close(fig)
    return target
