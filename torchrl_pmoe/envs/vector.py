"""Several Gymnasium environments in this process as one batch, stepped one after the other or on threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import iterate
from torchrl._utils import seed_generator
from torchrl.envs import GymWrapper

__all__ = ["SeededVectorEnv", "ThreadedVectorEnv", "batched_gym_env", "cores", "seeds_of"]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seeds_of(first: int, num_envs: int, runs: int = 1) -> list[int]:
    """The seeds of the environments of some runs, as TorchRL seeds those of each.

    Args:
        first: seed of the first run; the next one's is one more.
        num_envs: of all runs.
        runs: how many.
    """
    seeds = []
    for seed in range(first, first + runs):
        for _ in range(num_envs // runs):
            seeds.append(seed)
            seed = seed_generator(seed)
    return seeds


class SeededVectorEnv(SyncVectorEnv):
    """Gymnasium's vector environment, which resets where a mask says so, seeded as TorchRL's ``SerialEnv`` is.

    Args:
        makers: each makes one environment.
        runs: how many runs share them, the first of them the first run's. Their seeds follow each other.
    """

    def __init__(self, makers: Sequence[Callable[[], gym.Env]], runs: int = 1) -> None:
        self.runs = runs
        # an episode ends where it ends: TorchRL asks for the reset, and the last observation of an episode is kept
        super().__init__(makers, autoreset_mode=AutoresetMode.DISABLED)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; an integer ``seed`` is that of the first environment, and the seeds of the others follow from it."""
        if isinstance(seed, int):
            seed = seeds_of(seed, len(self.envs), self.runs)
        return super().reset(seed=seed, options=options)


class _Stepped:
    """Stands in for an environment whose step is on its way."""

    def __init__(self, outcome: Future) -> None:
        self._outcome = outcome

    def step(self, action: Any) -> Any:
        del action
        return self._outcome.result()


class ThreadedVectorEnv(SeededVectorEnv):
    """As :class:`SeededVectorEnv`; the steps of a batch run on threads.

    That pays where a step is long and its simulator lets go of the interpreter's lock, as MuJoCo does: the frames of
    Humanoid come faster, those of HalfCheetah more slowly.

    Args:
        makers: each makes one environment.
        runs: how many runs share them.
        num_threads: as many as there are cores for this process, at most one for each environment, if not given.
    """

    def __init__(self, makers: Sequence[Callable[[], gym.Env]], runs: int = 1, num_threads: int | None = None) -> None:
        super().__init__(makers, runs)
        self._pool = ThreadPoolExecutor(num_threads or min(cores(), len(makers)))

    def step(self, actions: Any) -> Any:
        """Step all environments at once."""
        envs = self.envs
        outcomes = [
            self._pool.submit(env.step, action)
            for env, action in zip(envs, iterate(self.action_space, actions), strict=True)
        ]
        self.envs = [_Stepped(outcome) for outcome in outcomes]  # type: ignore[misc]
        try:
            return super().step(actions)
        finally:
            self.envs = envs

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments and end the threads."""
        super().close_extras(**kwargs)
        self._pool.shutdown()


def batched_gym_env(make: Callable[[], gym.Env], num_envs: int, *, runs: int = 1, threads: bool = False) -> GymWrapper:
    """``num_envs`` environments in one of batch size ``[num_envs]``.

    A step costs a third of that of a ``SerialEnv``, which wraps each environment for itself; the frames are the same.

    Args:
        make: makes one environment.
        num_envs: ``N``.

    Keyword Args:
        runs: how many runs share them.
        threads: step the environments on threads.
    """
    return GymWrapper((ThreadedVectorEnv if threads else SeededVectorEnv)([make] * num_envs, runs))
