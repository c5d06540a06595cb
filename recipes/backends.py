"""The environments that frames are collected from: one after the other, in processes, in EnvPool, or in MJX."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import common
import gymnasium as gym
from omegaconf import DictConfig
from torchrl.envs import EnvBase

from torchrl_pmoe.envs import MUJOCO_TASKS, EnvPoolEnv, mujoco_task, normalize_actions
from torchrl_pmoe.envs.mujoco.engines import has_mjx


def refuse(cfg: DictConfig) -> None:
    """Refuse a backend that cannot run the environment.

    Raises:
        UsageError: before any environment is made.
    """
    name, kwargs = cfg.env, bool(cfg.env_kwargs)
    # in this order: EnvPool is asked for its tasks only where it is there
    refused: dict[str, list[tuple[Callable[[], bool], str]]] = {
        "envpool": [
            (lambda: find_spec("envpool") is None, "without the package envpool: pip install 'torchrl_pmoe[envpool]'"),
            (lambda: not EnvPoolEnv.available(name), f"with env={name}, which EnvPool does not have"),
            (lambda: kwargs, "with env_kwargs, which EnvPool's tasks do not take"),
        ],
        "mjx": [
            (lambda: not has_mjx(), "without jax and mujoco-mjx: pip install 'torchrl_pmoe[mjx]'"),
            (lambda: name not in MUJOCO_TASKS, f"with env={name}; mjx has {', '.join(MUJOCO_TASKS)}"),
            (lambda: kwargs, "with env_kwargs, which mjx's tasks do not take"),
        ],
    }
    for bad, why in refused.get(cfg.collector.backend, []):
        common.refuse(cfg, {"collector.backend": (bad(), f"serial or parallel {why}")})


def describe(cfg: DictConfig) -> str:
    """How many environments there are, and where they run."""
    number = cfg.collector.num_envs
    return f"{number} environment{'s' * (number > 1)}, collector.backend={cfg.collector.backend}"


def make_env(
    cfg: DictConfig, wrap: Callable[[gym.Env], gym.Env] = lambda env: env, *, clip_actions: bool = False
) -> EnvBase:
    """The environments of a resolved config, seeded, in float32, with actions in ``[-1, 1]``.

    Args:
        cfg: ``env``, ``env_kwargs``, ``seed``, ``device`` and ``collector`` are read.
        wrap: puts Gymnasium's wrappers around each (``serial``).
        clip_actions: take actions of any size and clip them into ``[-1, 1]``.
    """
    common.try_env(cfg.env, cfg.env_kwargs)
    backend, number = cfg.collector.backend, cfg.collector.num_envs
    if backend == "mjx":
        print("MJX compiles the physics: up to a minute")
        batched: EnvBase = mujoco_task(cfg.env, number, seed=cfg.seed, device=cfg.device)
    elif backend == "envpool":
        batched = EnvPoolEnv(cfg.env, number, seed=cfg.seed)
    else:
        processes = backend == "parallel"
        return common.make_env(
            cfg.env,
            cfg.seed,
            number,
            wrap,
            cfg.env_kwargs,
            processes=processes,
            clip_actions=clip_actions,
        )
    return normalize_actions(batched, clip=clip_actions)
