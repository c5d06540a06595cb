"""Environments: the paper's target-reaching task, single and batched, and EnvPool's tasks as TorchRL environments.

Importing this package registers ``PMOE/TargetReaching-v0`` with Gymnasium.
"""

from torchrl_pmoe.envs.batched_target_reaching import BatchedTargetReachingEnv
from torchrl_pmoe.envs.envpool_env import EnvPoolEnv
from torchrl_pmoe.envs.geometry import TargetReachingTask
from torchrl_pmoe.envs.target_reaching import TargetReachingEnv, register

__all__ = ["BatchedTargetReachingEnv", "EnvPoolEnv", "TargetReachingEnv", "TargetReachingTask"]

register()
