"""Environments: tasks of a point agent with several solutions, Gymnasium's MuJoCo tasks and EnvPool's, for TorchRL.

Importing this package registers ``PMOE/TargetReaching-v0``, ``PMOE/MultiGoal-v0`` and ``PMOE/PointMazeTwoRoutes-v0``
with Gymnasium.
"""

from torchrl_pmoe.envs import mazes, multi_goal, target_reaching
from torchrl_pmoe.envs.action_units import RawActionPolicy, normalize_actions
from torchrl_pmoe.envs.envpool import EnvPoolEnv
from torchrl_pmoe.envs.making import EnvironmentFault, make_env
from torchrl_pmoe.envs.mujoco import MUJOCO_TASKS, MujocoTask, mujoco_task
from torchrl_pmoe.envs.multi_goal import BatchedMultiGoalEnv, MultiGoalEnv, MultiGoalTask
from torchrl_pmoe.envs.normalization import NormalizedPolicy, NormalizeObservationAndReward
from torchrl_pmoe.envs.parallel import parallel_env
from torchrl_pmoe.envs.target_reaching import (
    BatchedTargetReachingEnv,
    TargetReachingEnv,
    TargetReachingTask,
)

__all__ = [
    "MUJOCO_TASKS",
    "BatchedMultiGoalEnv",
    "BatchedTargetReachingEnv",
    "EnvPoolEnv",
    "EnvironmentFault",
    "MujocoTask",
    "MultiGoalEnv",
    "MultiGoalTask",
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

target_reaching.register()
multi_goal.register()
mazes.register()
