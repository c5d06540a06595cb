"""Environments of TorchRL's libraries by name, and any TorchRL environment as a Gymnasium one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torchrl.data import Composite
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.transforms import CatTensors, DoubleToFloat, UnsqueezeTransform

__all__ = ["LIBRARIES", "GymnasiumView", "UnusableError", "library_of", "make_library_env", "with_one_observation"]


class UnusableError(ValueError):
    """Why there is no environment, to be read after "must be"; the fault is the caller's, and needs no traceback."""


def library_of(name: str) -> str | None:
    """The library that ``library:task`` names; ``None`` for a Gymnasium id."""
    library = name.partition(":")[0]
    return library if ":" in name and library in LIBRARIES else None


def make_library_env(name: str, env_kwargs: Mapping[str, Any] | None = None) -> EnvBase:
    """One environment of a library, with one float32 ``observation`` ``[O]``.

    Args:
        name: ``library:task``, the library one of :data:`LIBRARIES`.
        env_kwargs: arguments of TorchRL's environment.

    Raises:
        UnusableError: in one line, where the library is not installed or has no such task.
    """
    library, _, task = name.partition(":")
    if find_spec(library) is None:
        raise UnusableError(
            f"an environment that can be made here; its package is missing: pip install {library} 'mujoco<4'"
        )
    return LIBRARIES[library](task, dict(env_kwargs or {}))


def _dm_control(task: str, env_kwargs: dict[str, Any]) -> EnvBase:
    """``domain-task`` of the DeepMind Control Suite; observations one after the other, in the order of their names."""
    from dm_control import suite
    from torchrl.envs.libs.dm_control import DMControlEnv

    known = ["-".join(pair) for pair in suite.ALL_TASKS]
    if task not in known:
        close = difflib.get_close_matches(task, known, n=3) or known
        raise UnusableError(f"one of dm_control's tasks, such as {', '.join(close)}")
    env = DMControlEnv(*task.split("-", 1), **env_kwargs)
    return with_one_observation(env)


def _brax(task: str, env_kwargs: dict[str, Any]) -> EnvBase:
    """A task of Brax."""
    from torchrl.envs.libs.brax import BraxEnv

    if task not in BraxEnv.available_envs:
        close = difflib.get_close_matches(task, BraxEnv.available_envs, n=3) or BraxEnv.available_envs
        raise UnusableError(f"one of Brax's tasks, such as {', '.join(close)}")
    return with_one_observation(BraxEnv(task, **env_kwargs))


LIBRARIES: dict[str, Callable[[str, dict[str, Any]], EnvBase]] = {"dm_control": _dm_control, "brax": _brax}
"""By the name before the colon: what makes one environment of the task behind it."""


def with_one_observation(env: EnvBase) -> EnvBase:
    """The environment with all of its observations in ``observation`` ``[O]``, in float32, in the order of their names.

    Raises:
        UnusableError: for a batch of environments, or one without observations.
    """
    if env.batch_size:
        raise UnusableError(f"an environment of batch size [], this one has {list(env.batch_size)}")
    # what is nested (a simulator's state, parameters) is not seen by the policy, nor are pixels
    flat = [key for key, spec in env.observation_spec.items() if not isinstance(spec, Composite) and key != "pixels"]
    keys = sorted(flat)
    one = TransformedEnv(env, DoubleToFloat())
    if scalars := [key for key in keys if not env.observation_spec[key].shape]:
        one.append_transform(UnsqueezeTransform(-1, in_keys=scalars, in_keys_inv=[]))  # [] -> [1]
    if keys != ["observation"]:
        one.append_transform(CatTensors(in_keys=keys, out_key="observation", del_keys=True))
    return one


class GymnasiumView(gym.Env):
    """A TorchRL environment as a Gymnasium one, to be reset and stepped by itself.

    Args:
        env: of batch size ``[]``, with a vector ``observation`` and a bounded vector ``action``.
    """

    def __init__(self, env: EnvBase) -> None:
        self.env = env
        observation, action = env.observation_spec["observation"], env.action_spec
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, tuple(observation.shape), np.float32)
        low, high = (bound.expand(action.shape).cpu().numpy() for bound in (action.space.low, action.space.high))
        self.action_space = gym.spaces.Box(low.astype(np.float32), high.astype(np.float32))
        self._td: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self.env.set_seed(seed)
        self._td = self.env.reset()
        return self._td["observation"].cpu().numpy(), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step; the last two are whether the episode has terminated, and whether it was cut."""
        spec = self.env.action_spec
        td = self.env.step(self._td.set("action", torch.as_tensor(action, dtype=spec.dtype, device=spec.device)))
        self._td = td["next"]
        ended = (bool(self._td[key]) if key in self._td else False for key in ("terminated", "truncated"))
        return self._td["observation"].cpu().numpy(), float(self._td["reward"]), *ended, {}

    def close(self) -> None:
        """Close it."""
        self.env.close()
