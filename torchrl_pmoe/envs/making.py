"""Environments by name, ready for a collector: float32, actions in ``[-1, 1]``, seeded, on any backend."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torchrl.data import Composite
from torchrl.envs import DoubleToFloat, DTypeCastTransform, EnvBase, GymWrapper, SerialEnv, TransformedEnv

from torchrl_pmoe.envs.action_units import normalize_actions
from torchrl_pmoe.envs.envpool import EnvPoolEnv
from torchrl_pmoe.envs.libraries import GymnasiumView, UnusableError, library_of, make_library_env, with_one_observation
from torchrl_pmoe.envs.mujoco import MUJOCO_TASKS, mujoco_task
from torchrl_pmoe.envs.mujoco.engines import has_mjx, quiet_mujoco
from torchrl_pmoe.envs.parallel import parallel_env
from torchrl_pmoe.envs.vector import batched_gym_env, cores, seeds_of

__all__ = ["Backend", "Env", "EnvironmentFault", "full_id", "make_env", "make_gym_env", "try_env", "worker_fault"]

Backend = Literal["serial", "threads", "parallel", "envpool", "mjx"]
"""Where a batch of environments runs: one after the other or on threads in this process, one process each, EnvPool, or
MJX."""

_FLOATS = (np.float16, np.float32, np.float64)


class EnvironmentFault(ValueError):
    """An environment that cannot be made, reset or stepped, or whose spaces do not fit; one line says what must be.

    Where the environment itself has raised, that error is the ``__cause__``.
    """


Env = str | Callable[[], "EnvBase | gym.Env"]
"""A Gymnasium id (``module:Id`` imports the module first), ``library:task`` of one of TorchRL's libraries, or a
function that makes one environment."""


def full_id(name: str) -> str:
    """A Gymnasium id with its version: the newest that is registered, for an id without one.

    Args:
        name: ``Id``, ``Id-vN``, ``module:Id`` or ``library:task``; returned as it is where nothing is to be added.
    """
    if library_of(name) is not None or re.search(r"-v\d+$", name):
        return name
    module, _, id = name.rpartition(":")
    if module:
        with suppress(ImportError):
            importlib.import_module(module)
    versions = [int(found[1]) for key in gym.registry if (found := re.fullmatch(rf"{re.escape(id)}-v(\d+)", key))]
    return f"{name}-v{max(versions)}" if versions and id not in gym.registry else name


def make_env(
    env: Env,
    *,
    num_envs: int = 1,
    seed: int = 0,
    runs: int = 1,
    env_kwargs: Mapping[str, Any] | None = None,
    backend: Backend = "serial",
    device: torch.device | str | None = None,
    clip_actions: bool = False,
) -> EnvBase:
    """A seeded TorchRL environment in float32, with every dimension of its action in ``[-1, 1]``.

    Args:
        env: a Gymnasium id, ``dm_control:cheetah-run`` or ``brax:ant``, or a function that makes one environment, a
            TorchRL ``EnvBase`` of batch size ``[]`` or a Gymnasium one.

    Keyword Args:
        num_envs: ``N``; the batch size is ``[]`` for one environment on ``"serial"``, else ``[N]``.
        seed: of the first environment; the seeds of the others follow from it.
        runs: how many runs share the environments, the first of them the first run's. On ``"serial"`` and
            ``"threads"`` each run has those that it would have alone, with the seeds ``seed``, ``seed + 1``, …
        env_kwargs: arguments of the environment.
        backend: where the environments run.
        device: of the physics, on ``"mjx"``.
        clip_actions: take actions of any size and clip them into ``[-1, 1]``.

    Raises:
        EnvironmentFault: where the environment cannot be made, or not on this backend.
        ValueError: where the runs cannot share the environments evenly.

    Examples:
        >>> make_env("Pendulum-v1", num_envs=2).rollout(3)["action"].shape
        torch.Size([2, 3, 1])
    """
    if (why := unavailable(backend, env, env_kwargs)) is not None:
        raise EnvironmentFault(f"backend={backend}: must be serial or parallel {why}")
    if runs < 1 or num_envs % runs:
        raise ValueError(f"make_env: num_envs={num_envs} must be a multiple of runs={runs}.")
    if backend == "mjx":
        batched: EnvBase = mujoco_task(str(env), num_envs, seed=seed, device=device or "cpu")
        return normalize_actions(batched, clip=clip_actions)
    if backend == "envpool":
        return normalize_actions(EnvPoolEnv(str(env), num_envs, seed=seed), clip=clip_actions)
    made: EnvBase
    if backend == "parallel":
        handle, fault_file = tempfile.mkstemp(prefix="torchrl_pmoe-")
        os.close(handle)
        single = partial(_make_single, env, env_kwargs, clip_actions=clip_actions, fault_file=fault_file)
        made = parallel_env(num_envs, single)
        made.fault_file = fault_file
        weakref.finalize(made, Path(fault_file).unlink, missing_ok=True)
        made.set_seed(seed)
        return made
    single = partial(_make_single, env, env_kwargs, clip_actions=clip_actions)
    if num_envs == 1:
        return _seeded(single, seed)
    make, threads = partial(make_gym_env, env, env_kwargs), backend == "threads"
    with closing(make()) as first:
        of_torchrl = isinstance(first, GymnasiumView)
    if not of_torchrl:
        batch = partial(batched_gym_env, make, num_envs, runs=runs, threads=threads)
        return _seeded(lambda: _as_torchrl(batch(), clip_actions=clip_actions), seed)
    if threads:
        raise EnvironmentFault(
            f"backend=threads: must be serial or parallel with env={_shown(env)}, which TorchRL makes"
        )
    if runs == 1:
        return _seeded(lambda: SerialEnv(num_envs, single), seed)
    return SerialEnv(num_envs, [partial(_seeded, single, one) for one in seeds_of(seed, num_envs, runs)])


def _seeded(make: Callable[[], EnvBase], seed: int) -> EnvBase:
    made = make()
    made.set_seed(seed)
    return made


def _make_single(
    env: Env, env_kwargs: Mapping[str, Any] | None, *, clip_actions: bool, fault_file: str | None = None
) -> EnvBase:
    gym_env = make_gym_env(env, env_kwargs)
    if isinstance(gym_env, GymnasiumView):
        # TorchRL's own environment, which the view has looked at
        return normalize_actions(gym_env.env, clip=clip_actions)
    if fault_file is not None:
        gym_env = _ReportFault(gym_env, fault_file)
    return _as_torchrl(GymWrapper(gym_env), clip_actions=clip_actions)


def _as_torchrl(wrapped: GymWrapper, *, clip_actions: bool) -> EnvBase:
    """A wrapped environment, or a batch of them, in float32 and with actions in ``[-1, 1]``."""
    if wrapped.action_spec.dtype is torch.float32:
        # the wrapper turns what it reads into tensors of its specs; a transform takes as long as the wrapper itself
        wrapped.observation_spec = Composite(
            {key: spec.to(torch.float32) for key, spec in wrapped.observation_spec.items()}, shape=wrapped.batch_size
        )
        # a transformed environment on every backend, to which a transform is appended in place
        return normalize_actions(TransformedEnv(wrapped), clip=clip_actions)
    made = TransformedEnv(wrapped, DoubleToFloat())
    if torch.float16 in (made.observation_spec["observation"].dtype, made.action_spec.dtype):
        made.append_transform(DTypeCastTransform(torch.float16, torch.float32))
    return normalize_actions(made, clip=clip_actions)


def unavailable(backend: Backend, name: Env, env_kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Why a backend cannot run an environment, to be read after "must be serial or parallel"; ``None`` if it can."""
    if backend in ("envpool", "mjx") and not isinstance(name, str):
        return "with a function that makes the environment"
    # in this order: EnvPool is asked for its tasks only where it is installed
    reasons: dict[str, list[tuple[Callable[[], bool], str]]] = {
        "threads": [
            (lambda: isinstance(name, str) and library_of(name) is not None, f"with env={name}, which TorchRL makes"),
        ],
        "envpool": [
            (lambda: find_spec("envpool") is None, "without the package envpool: pip install envpool"),
            (lambda: not EnvPoolEnv.available(str(name)), f"with env={name}, which EnvPool does not have"),
            (lambda: bool(env_kwargs), "with env_kwargs, which EnvPool's tasks do not take"),
        ],
        "mjx": [
            (lambda: not has_mjx(), "without jax and mujoco-mjx: pip install jax mujoco-mjx"),
            (lambda: name not in MUJOCO_TASKS, f"with env={name}; mjx has {', '.join(MUJOCO_TASKS)}"),
            (lambda: bool(env_kwargs), "with env_kwargs, which mjx's tasks do not take"),
        ],
    }
    return next((why for holds, why in reasons.get(backend, []) if holds()), None)


def faster_backend(
    env: Env, num_envs: int, env_kwargs: Mapping[str, Any] | None = None, *, seconds: float = 1.0
) -> Literal["serial", "threads"]:
    """The faster of two backends whose frames are the same, by a moment of random actions on each.

    Args:
        env: as :func:`make_env` takes it.
        num_envs: ``N``.
        env_kwargs: arguments of the environment.

    Keyword Args:
        seconds: of the measurement; where a step takes long, three rounds of one step on each.

    Raises:
        EnvironmentFault: where the environment cannot be made.
    """
    if num_envs == 1 or cores() == 1 or unavailable("threads", env, env_kwargs) is not None:
        return "serial"
    make = partial(make_gym_env, env, env_kwargs)
    with closing(make()) as first:
        if isinstance(first, GymnasiumView):
            return "serial"
    taken: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        batches = [batched_gym_env(make, num_envs, threads=threads) for threads in (False, True)]
        for batch in batches:
            stack.callback(batch.close)
            began = perf_counter()
            batch.rollout(1)
        step = perf_counter() - began
        # what a rollout costs besides should not count
        steps = max(1, min(16, int(seconds / 20 / max(step, 1e-6))))
        until = perf_counter() + seconds
        while perf_counter() < until or len(taken[0]) < 3:
            for batch, times in zip(batches, taken, strict=True):
                began = perf_counter()
                batch.rollout(steps, break_when_any_done=False)
                times.append(perf_counter() - began)
    serial, threads = map(median, taken)
    # threads take the core that the learner might have: they must be worth it
    return "threads" if threads < 0.9 * serial else "serial"


# ------------------------------------------------------------------------------------------ one environment


def make_gym_env(name: Env, env_kwargs: Mapping[str, Any] | None = None, *, checked: bool = True) -> gym.Env:
    """A Gymnasium environment with a vector of observations and a bounded vector of actions.

    Args:
        name: as :func:`make_env` takes it; a TorchRL environment comes as a
            :class:`~torchrl_pmoe.envs.libraries.GymnasiumView`.
        env_kwargs: arguments of the environment.

    Keyword Args:
        checked: let Gymnasium look at the first step and warn of what is unusual.

    Raises:
        EnvironmentFault: where there is no such environment, it cannot be made, or its spaces are others.
    """
    try:
        with _without_deprecation_notes():
            env = _make(name, env_kwargs or {}, checked)
    except UnusableError as error:
        raise EnvironmentFault(f"env={_shown(name)}: must be {_one_line(error)}") from None
    # an environment's own constructor may raise anything
    except Exception as error:
        raise EnvironmentFault(_why_not_made(name, env_kwargs, error)) from error
    if (allowed := _misfit(env.observation_space, env.action_space)) is not None:
        env.close()
        raise EnvironmentFault(f"env={_shown(name)}: must be {allowed}")
    return env


def _make(name: Env, env_kwargs: Mapping[str, Any], checked: bool) -> gym.Env:
    if isinstance(name, str) and library_of(name) is None:
        made = gym.make(full_id(name), disable_env_checker=None if checked else True, **env_kwargs)
        return gym.wrappers.FlattenObservation(made) if _has_vectors(made.observation_space) else made
    made = name(**env_kwargs) if callable(name) else make_library_env(name, env_kwargs)
    if isinstance(made, EnvBase) and not isinstance(name, str):
        made = with_one_observation(made)
    return made if isinstance(made, gym.Env) else GymnasiumView(made)


def _has_vectors(space: gym.Space) -> bool:
    """Whether observations are a mapping of names to vectors of numbers, which can stand one behind the other."""
    return isinstance(space, gym.spaces.Dict) and all(
        isinstance(part, gym.spaces.Box) and part.dtype in _FLOATS and len(part.shape) == 1 for part in space.values()
    )


def _shown(name: Env) -> str:
    """How an environment is named in a line."""
    return name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)


@contextmanager
def _without_deprecation_notes() -> Iterator[None]:
    """Leave out the two lines that every MuJoCo v4 task prints when it is made, and what dm_control's window says."""
    with warnings.catch_warnings(), quiet_mujoco():
        for message in (".*is out of date.*", ".*Using the latest versioned.*", ".*DISPLAY environment variable.*"):
            warnings.filterwarnings("ignore", message=message)
        yield


def _misfit(observation: gym.Space, action: gym.Space) -> str | None:
    """What an environment must be whose spaces cannot be used; ``None`` if they can."""
    if not isinstance(action, gym.spaces.Box):
        return f"an environment with a Box of continuous actions, this one has {_one_line(action)}"
    if action.dtype not in _FLOATS or len(action.shape) != 1 or not action.shape[0]:
        return f"an environment with a vector of continuous actions, this one has {_one_line(action)}"
    if not np.isfinite(width := _width(action)).all():
        return f"an environment with bounded actions, which are scaled to [-1, 1]; this one has {_one_line(action)}"
    if not (width > 0).all():
        return f"an environment with actions whose bounds differ, this one has {_one_line(action)}"
    if not isinstance(observation, gym.spaces.Box) or len(observation.shape) != 1:
        flattened = "gymnasium.wrappers.FlattenObservation makes one of others"
        return f"an environment with a Box vector of observations ({flattened}), this one has {_one_line(observation)}"
    if observation.dtype not in _FLOATS or not observation.shape[0]:
        cast = "gymnasium.wrappers.DtypeObservation casts others"
        return f"an environment with floating-point observations ({cast}), this one has {_one_line(observation)}"
    return None


def _width(box: gym.spaces.Box) -> np.ndarray:
    """How far apart the bounds are, in the float32 that policies compute in."""
    with np.errstate(over="ignore", invalid="ignore"):
        return box.high.astype(np.float32) - box.low.astype(np.float32)


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def _describe(error: BaseException) -> str:
    """An error in one line, without a terminal's colours."""
    words = re.sub(r"\x1b\[[0-9;]*m", "", _one_line(error))[:300]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _with_line(error: BaseException) -> str:
    """An error in one line, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    # the last line of the user's own code, if an installed package raised the error
    own = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename != __file__]
    last = (own or list(frames))[-1]
    return f"{_describe(error)} ({Path(last.filename).name}, line {last.lineno})"


def _why_not_made(name: Env, env_kwargs: Mapping[str, Any] | None, error: Exception) -> str:
    """Why there is no environment, in one line: its id, its arguments, or a fault of its own."""
    if not isinstance(name, str) or library_of(name) is not None:
        return f"env={_shown(name)}: must be an environment that can be made; it raised {_with_line(error)}"
    id = name.rpartition(":")[2]
    if id not in gym.registry and not any(key.startswith(f"{id}-v") for key in gym.registry):
        return f"env={name}: must be the id of an installed Gymnasium environment ({_describe(error)})"
    of_arguments = isinstance(error, TypeError | ValueError | LookupError | AssertionError | gym.error.Error)
    if env_kwargs and of_arguments and not isinstance(error, gym.error.DependencyNotInstalled):
        return f"env_kwargs={dict(env_kwargs)}: must be arguments of {name} ({_describe(error)})"
    given = f"with env_kwargs={dict(env_kwargs)} it raised" if env_kwargs else "it raised"
    return f"env={name}: must be an environment that can be made; {given} {_with_line(error)}"


_TRIED: set[str] = set()


def try_env(name: Env, env_kwargs: Mapping[str, Any] | None = None) -> None:
    """Take one step in an environment that is thrown away, so that its faults show before any work.

    Args:
        name: Gymnasium id; what was tried once in this process is not tried again.
        env_kwargs: arguments of the environment.

    Raises:
        EnvironmentFault: where it cannot be made, reset or stepped, or what it returns is not what its spaces say.
    """
    shown, key = _shown(name), f"{name} {dict(env_kwargs or {})}"
    if key in _TRIED:
        return
    with closing(make_gym_env(name, env_kwargs, checked=False)) as env, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observations: dict[str, Any] = {}
        reward: Any
        doing = "reset"
        try:
            observations["reset"], _ = env.reset(seed=0)
            env.action_space.seed(0)
            doing = "step"
            observations["step"], reward, *_ = env.step(env.action_space.sample())
        # an environment may raise anything
        except Exception as error:
            raise EnvironmentFault(
                f"env={shown}: must be an environment that can be reset and stepped; its {doing} raised "
                f"{_with_line(error)}"
            ) from error
        shape: Any = env.observation_space.shape
    for doing, observation in observations.items():
        if np.shape(observation) != shape:
            raise EnvironmentFault(
                f"env={shown}: must be an environment with observations of shape {shape} as its space says; "
                f"its {doing} returned shape {np.shape(observation)}"
            )
    if np.shape(reward) != () or not hasattr(reward, "__float__"):
        found = f"shape {np.shape(reward)}" if np.shape(reward) else type(reward).__name__
        scalar = "gymnasium.wrappers.TransformReward makes it one"
        raise EnvironmentFault(
            f"env={shown}: must be an environment whose reward is a number ({scalar}), this one has {found}"
        )
    _TRIED.add(key)


# ---------------------------------------------------------------------------------------- faults in workers


class _ReportFault(gym.Wrapper):
    """In a worker process: writes what the environment raises into a file, and ends the process without a word.

    Args:
        env: the environment.
        file: gets the error in one line, then the traceback.
    """

    def __init__(self, env: gym.Env, file: str) -> None:
        super().__init__(env)
        self._file = file

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        with self._reported():
            return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        with self._reported():
            return self.env.step(action)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        # an environment may raise anything
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            Path(self._file).write_text(f"{_describe(error)}\n{text}", encoding="utf-8")
            raise SystemExit(1) from None


def worker_fault(env: EnvBase) -> tuple[str, str] | None:
    """What an environment of :func:`make_env` has raised in a worker process.

    Returns:
        The error in one line and its traceback; ``None`` where nothing was raised or there is no worker process.
    """
    while isinstance(env, TransformedEnv):
        env = env.base_env
    file = getattr(env, "fault_file", None)
    text = Path(file).read_text(encoding="utf-8") if file is not None and Path(file).is_file() else ""
    line, _, trace = text.partition("\n")
    return (line, trace) if line else None
