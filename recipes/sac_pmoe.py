"""Soft Actor-Critic with a mixture-of-experts policy.

    python recipes/sac_pmoe.py env=Walker2d-v4

``--help`` prints every key.
"""

from __future__ import annotations

if __name__ == "__main__":
    from parts import process

    process.begin()

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import sac_many_seeds
import torch
from config.sac_pmoe import SACConfig, resolve
from omegaconf import DictConfig
from parts import off_policy
from parts.launch import keep_config, launch, start_or_resume
from parts.networks import build_qvalue
from parts.off_policy import DIAGNOSED_STATES, LOSS_COLUMNS, STORED
from parts.resume import checkpoint_to_resume
from parts.training import (
    Agent,
    build_collector,
    build_optimizer,
    build_trainer,
    isolated_rng,
    mean_columns,
    seed_everything,
    train_and_record,
    watch_experts,
)
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import SoftUpdate
from torchrl.trainers.trainers import SelectKeys

from torchrl_pmoe.envs import make_env
from torchrl_pmoe.envs.making import try_env
from torchrl_pmoe.trainers import FlatReplay, FusedOptimizationStepper
