"""Stable-Baselines3's SAC and PPO with the settings of the recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
from watched_runs import NEVER
from workers import MissingPackage, Turns


def _library() -> Any:
    try:
        import stable_baselines3
    except ImportError as error:
        raise MissingPackage(f"pip install -e '.[benchmarks]' brings what it needs ({error})") from error
    return stable_baselines3


def _calls(turns: Turns, hook: str) -> Any:
    """A callback that hands the number of frames to ``turns`` where ``hook`` of its class is called."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

    def call(self: Any) -> bool:
        turns(self.num_timesteps)
        return True

    setattr(Watch, hook, call)
    return Watch()


def train_sac(name: str, random_frames: int, turns: Turns) -> None:
    """SAC in one environment, an update of batch 256 a frame, 2 x 256."""
    model = _library().SAC(
        "MlpPolicy",
        common.make_gym(name),
        learning_starts=random_frames,
        buffer_size=1_000_000,
        batch_size=256,
        train_freq=1,
        gradient_steps=1,
        policy_kwargs={"net_arch": [256, 256]},
        seed=0,
        device="cpu",
    )
    model.learn(NEVER, callback=_calls(turns, "_on_step"))


def train_ppo(name: str, num_envs: int, turns: Turns) -> None:
    """PPO with 2,048 frames a batch, 32 minibatches, 10 epochs, tanh 2 x 64; environments one after the other."""
    library = _library()
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv

    def single() -> gym.Env:
        return Monitor(common.make_gym(name))

    model = library.PPO(
        "MlpPolicy",
        DummyVecEnv([single] * num_envs),
        n_steps=2048 // num_envs,
        batch_size=64,
        n_epochs=10,
        policy_kwargs={"net_arch": [64, 64]},
        seed=0,
        device="cpu",
    )
    # a batch is collected and learned from between two starts of a rollout
    model.learn(NEVER, callback=_calls(turns, "_on_rollout_start"))
