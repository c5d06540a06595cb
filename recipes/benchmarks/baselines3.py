"""SAC and PPO of Stable-Baselines3, and of SBX, its sibling in JAX, with the settings of the recipes."""

from __future__ import annotations

import csv
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from watched_runs import NEVER
from workers import MissingPackage, Turns

from torchrl_pmoe.envs.making import make_gym_env

SB3, SBX = "Stable-Baselines3", "SBX"
_MODULES = {SB3: ("stable_baselines3", "benchmarks"), SBX: ("sbx", "sbx")}
"""Of each library, and the extra that brings it."""


def _library(name: str = SB3) -> Any:
    module, extra = _MODULES[name]
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPackage(f"pip install -e '.[{extra}]' brings what it needs ({error})") from error


def _bind(library: str) -> None:
    """JAX does not ask how many threads it may have: keep it to as many cores as PyTorch has threads."""
    if library == SBX and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()])


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


def train_sac(name: str, random_frames: int, turns: Turns, library: str = SB3) -> None:
    """SAC in one environment, an update of batch 256 a frame, 2 x 256."""
    _bind(library)
    model = _library(library).SAC(
        "MlpPolicy",
        make_gym_env(name),
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


def train_ppo(name: str, num_envs: int, turns: Turns, library: str = SB3) -> None:
    """PPO with 2,048 frames a batch, 32 minibatches, 10 epochs, tanh 2 x 64; environments one after the other."""
    _bind(library)
    module = _library(library)
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv

    def single() -> gym.Env:
        return Monitor(make_gym_env(name))

    model = module.PPO(
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


def learn(
    algorithm: str,
    name: str,
    seed: int,
    frames: int,
    interval: int,
    output: Path,
    learning_rate: float = 3e-4,
    random_frames: int = 1000,
    num_envs: int = 1,
) -> None:
    """A whole training with the settings of the recipe's defaults, on one thread.

    Args:
        algorithm: ``"sac"`` or ``"ppo"`` (observations and rewards normalised, values clipped,
            the learning rate falling to zero, the value's loss weighted as in the recipe).
        name: Gymnasium id.
        seed: of environment and networks.
        frames: of the training.
        interval: frames between two evaluations of 10 deterministic episodes.
        output: CSV file, a row an evaluation: frames, mean and standard deviation of the returns.
        learning_rate: of every network and of the temperature.
        random_frames: of SAC, before the first update.
        num_envs: of PPO, one after the other; a batch has 2,048 frames of all of them together.
    """
    library = _library()
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    torch.set_num_threads(1)

    def vector(training: bool) -> Any:
        env: Any = DummyVecEnv([lambda: Monitor(make_gym_env(name))] * (num_envs if training else 1))
        return VecNormalize(env, training=training, norm_reward=training) if algorithm == "ppo" else env

    train_env, eval_env = vector(True), vector(False)
    eval_env.seed(seed + 1_000_000)
    if algorithm == "sac":
        model = library.SAC(
            "MlpPolicy",
            train_env,
            learning_rate=learning_rate,
            learning_starts=random_frames,
            seed=seed,
            device="cpu",
        )
    else:
        model = library.PPO(
            "MlpPolicy",
            train_env,
            n_steps=2048 // num_envs,
            learning_rate=lambda left: learning_rate * left,
            clip_range_vf=0.2,
            # the recipe's 0.25 of the squared error; gradients are clipped with it
            vf_coef=0.25,
            policy_kwargs={"optimizer_kwargs": {"eps": 1e-5}},
            seed=seed,
            device="cpu",
        )

    class Evaluate(BaseCallback):
        def _on_step(self) -> bool:
            # several environments may step past a multiple
            if self.num_timesteps // interval > (self.num_timesteps - train_env.num_envs) // interval:
                if algorithm == "ppo":
                    eval_env.obs_rms = train_env.obs_rms
                mean, std = evaluate_policy(model, eval_env, n_eval_episodes=10, deterministic=True)
                with output.open("a", newline="") as file:
                    csv.writer(file).writerow([self.num_timesteps, mean, std])
            return True

    with output.open("w", newline="") as file:
        csv.writer(file).writerow(["frames", "return_mean", "return_std"])
    model.learn(frames, callback=Evaluate())
