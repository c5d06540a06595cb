"""The paper's target-reaching task: for Gymnasium, batched for TorchRL, and how its routes are told apart."""

from torchrl_pmoe.envs.target_reaching.batched_env import BatchedTargetReachingEnv
from torchrl_pmoe.envs.target_reaching.gymnasium_env import TargetReachingEnv, register
from torchrl_pmoe.envs.target_reaching.task import TargetReachingTask

__all__ = ["BatchedTargetReachingEnv", "TargetReachingEnv", "TargetReachingTask", "register"]
