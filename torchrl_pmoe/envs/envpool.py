"""EnvPool's tasks as a batched TorchRL environment: no false transition after an episode, final observations kept."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_pmoe.envs.vector import cores

__all__ = ["EnvPoolEnv"]

_MAX_INT32 = 2**31 - 1


class EnvPoolEnv(EnvBase):
    """``num_envs`` copies of an EnvPool task, stepped by its threads in this process.

    For tasks with a vector of observations and a bounded vector of actions, MuJoCo's v4 tasks among them. Reads
    ``action`` ``[N, A]``; writes float32 ``observation`` ``[N, O]`` and ``reward`` ``[N, 1]``, and ``done``,
    ``terminated`` and ``truncated`` ``[N, 1]``.

    EnvPool resets an environment by itself, in the step after the one that ended the episode. Here that step is never
    made: the last step of an episode keeps its final observation, and the next one needs a ``"_reset"`` mask that
    names the row, as TorchRL's collectors and rollouts give it. A reset advances no other row. The time limit is
    counted here, so that an episode that fails in its last step is both terminated and truncated, as in Gymnasium.

    EnvPool seeds at construction only: :meth:`set_seed` makes the pool anew, and a reset must follow. Every row has
    a seed of its own, drawn from ``seed``; neighbouring seeds share no row.

    Do not use an instance in a process forked after its construction, since threads do not survive a fork.

    Args:
        name: EnvPool's task id.
        num_envs: ``N``.

    Keyword Args:
        seed: of the starts, from 0.
        num_threads: of the pool; as many as there are cores for this process, at most ``num_envs``, if not given.

    Raises:
        ValueError: where EnvPool or the task is missing, its spaces are others, or an argument is out of range.

    Examples:
        >>> EnvPoolEnv("HalfCheetah-v4", 8).rollout(5)["next", "reward"].shape
        torch.Size([8, 5, 1])
    """

    def __init__(self, name: str, num_envs: int, *, seed: int = 0, num_threads: int | None = None) -> None:
        for key, value, least in (("num_envs", num_envs, 1), ("num_threads", num_threads, 1), ("seed", seed, 0)):
            default = key == "num_threads" and value is None
            if not default and (not isinstance(value, int) or value < least):
                raise ValueError(f"EnvPoolEnv: {key} must be an integer of at least {least}, got {value!r}.")
        observation, action, config = _task(name)
        super().__init__(device="cpu", batch_size=[num_envs])
        self._name = name
        self._max_episode_steps = int(config["max_episode_steps"])
        self._settings: dict[str, Any] = {
            "num_threads": num_threads or min(num_envs, cores()),
            "max_episode_steps": min(self._max_episode_steps + 1, _MAX_INT32),
        }
        if name.endswith("-v4") and "post_constraint" in config:
            # Gymnasium's v4 tasks compute the contact forces that they observe, EnvPool's leave them at zero
            self._settings["post_constraint"] = True
        self._pool: Any = None
        self._state: NDArray[Any] = np.zeros((num_envs, *observation.shape), observation.dtype)
        self._ends: dict[str, NDArray[np.bool_]] = {}
        self._set_seed(seed)

        flag = Categorical(2, shape=(num_envs, 1), dtype=torch.bool)
        low, high = (torch.as_tensor(bound).float().expand(num_envs, -1) for bound in (action.low, action.high))
        # the bounds of observations are not to be trusted: several tasks give the smallest positive number as lowest
        self.observation_spec = Composite(observation=Unbounded(self._state.shape), shape=(num_envs,))
        self.action_spec = Bounded(low.clone(), high.clone())
        self.reward_spec = Unbounded((num_envs, 1))
        self.done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(num_envs,), device=self.device
        )

    @staticmethod
    def available(name: str) -> bool:
        """Whether EnvPool is installed and has a task ``name``."""
        if importlib.util.find_spec("envpool") is None:
            return False
        import envpool

        return name in envpool.list_all_envs()

    def close(self, *, raise_if_closed: bool = True) -> None:
        """End the pool's threads."""
        # they end with the pool itself, its own close() leaves them
        self._pool = None
        super().close(raise_if_closed=raise_if_closed)

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            return
        import envpool

        number = self.batch_size[0]
        rows = np.random.SeedSequence(seed).generate_state(number) & _MAX_INT32
        with _quiet():
            self._pool = envpool.make(
                self._name,
                env_type="gymnasium",
                num_envs=number,
                seed=rows.tolist(),
                **self._settings,
            )
            # EnvPool makes it, with Gymnasium's remarks, when it first asks itself: ask here
            _ = self._pool.observation_space
        # nothing may step before the first reset
        self._ends = {key: np.ones(number, bool) for key in ("done", "terminated", "truncated")}

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        rows = self._rows(mask)
        if rows.size:
            self._state[rows] = self._pool.reset(rows)[0]
            for ended in self._ends.values():
                ended[rows] = False
        return self._outcome()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        rows = self._rows(tensordict.get("_step", None))
        if self._ends["done"][rows].any():
            ended = rows[self._ends["done"][rows]].tolist()
            raise RuntimeError(f"EnvPoolEnv: environments {ended} must be reset before they are stepped.")
        reward = np.zeros(self.batch_size[0], np.float32)
        if rows.size:
            action = tensordict.get("action").detach().cpu().numpy()[rows]
            state, gain, terminated, truncated, info = self._pool.step(action, rows)
            self._state[rows], reward[rows] = state, gain
            truncated = truncated | (info["elapsed_step"] >= self._max_episode_steps)
            self._ends["terminated"][rows] = terminated
            self._ends["truncated"][rows] = truncated
            self._ends["done"][rows] = terminated | truncated
        return self._outcome().set("reward", torch.from_numpy(reward).unsqueeze(-1))

    def _rows(self, mask: Tensor | None) -> NDArray[np.int32]:
        """The rows that a mask ``[N]`` or ``[N, 1]`` names, all without one."""
        if mask is None:
            return np.arange(self.batch_size[0], dtype=np.int32)
        return np.flatnonzero(mask.cpu().numpy()).astype(np.int32)

    def _outcome(self) -> TensorDict:
        ends = {key: torch.from_numpy(ended.copy()).unsqueeze(-1) for key, ended in self._ends.items()}
        state = torch.from_numpy(self._state.astype(np.float32))
        return TensorDict({"observation": state, **ends}, batch_size=self.batch_size, device=self.device)


def _task(name: str) -> tuple[gym.spaces.Box, gym.spaces.Box, dict[str, Any]]:
    """Spaces of observations and actions of one environment, and EnvPool's settings of the task."""
    if importlib.util.find_spec("envpool") is None:
        raise ValueError("EnvPoolEnv: EnvPool is not installed: pip install envpool.")
    import envpool

    if name not in envpool.list_all_envs():
        raise ValueError(f"EnvPoolEnv: EnvPool has no task {name!r}; envpool.list_all_envs() names those it has.")
    try:
        with _quiet():
            spec = envpool.make_spec(name)
            observation, action = spec.gymnasium_observation_space, spec.gymnasium_action_space
    # a family that needs files or libraries which are not here raises what it likes
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"EnvPoolEnv: EnvPool cannot make {name} ({reason})") from error
    for kind, space in (("observations", observation), ("actions", action)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
            given = " ".join(str(space).split())
            raise ValueError(f"EnvPoolEnv: {name} must have a Box vector of {kind} in floating point, it has {given}.")
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise ValueError(f"EnvPoolEnv: {name} must have bounded actions, it has {action}.")
    return observation, action, spec.config._asdict()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out Gymnasium's remarks on the spaces that EnvPool makes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
        yield
