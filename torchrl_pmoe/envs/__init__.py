"""Environments: the paper's target-reaching task, Gymnasium's MuJoCo tasks and EnvPool's, batched for TorchRL.

Importing this package registers ``PMOE/TargetReaching-v0`` with Gymnasium.
"""

from torchrl_pmoe.envs.action_units import RawActionPolicy, normalize_actions
from torchrl_pmoe.envs.envpool import EnvPoolEnv
from torchrl_pmoe.envs.mujoco import MUJOCO_TASKS, MujocoTask, mujoco_task
from torchrl_pmoe.envs.parallel import parallel_env
from torchrl_pmoe.envs.simulators import EpisodeState, SimulatorState
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
    "EpisodeState",
    "MujocoTask",
    "RawActionPolicy",
    "SimulatorState",
    "TargetReachingEnv",
    "TargetReachingTask",
    "mujoco_task",
    "normalize_actions",
    "parallel_env",
]

register()
