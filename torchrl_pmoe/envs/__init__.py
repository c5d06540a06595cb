"""Environments: the paper's target-reaching task, Gymnasium's MuJoCo tasks and EnvPool's, batched for TorchRL.

Importing this package registers ``PMOE/TargetReaching-v0`` with Gymnasium.
"""

from torchrl_pmoe.envs.action_units import RawActionPolicy, normalize_actions
from torchrl_pmoe.envs.envpool import EnvPoolEnv
from torchrl_pmoe.envs.making import EnvironmentFault, make_env
from torchrl_pmoe.envs.mujoco import MUJOCO_TASKS, MujocoTask, mujoco_task
from torchrl_pmoe.envs.normalization import NormalizedPolicy, NormalizeObservationAndReward
from torchrl_pmoe.envs.parallel import parallel_env
from torchrl_pmoe.envs.target_reaching import (
    BatchedTargetReachingEnv,
    TargetReachingEnv,
    TargetReachingTask,
    register,
)

__all__ = [
    "MUJOCO_TASKS",
    "BatchedTargetReachingEnv",
    "EnvPoolEnv",
    "EnvironmentFault",
    "MujocoTask",
    "NormalizeObservationAndReward",
    "NormalizedPolicy",
    "RawActionPolicy",
    "TargetReachingEnv",
    "TargetReachingTask",
    "make_env",
    "mujoco_task",
    "normalize_actions",
    "parallel_env",
]

register()
