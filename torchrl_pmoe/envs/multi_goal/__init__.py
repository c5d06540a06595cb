"""Four goals around the start (Haarnoja et al., 2017): for Gymnasium, and batched for TorchRL."""

from torchrl_pmoe.envs.multi_goal.batched_env import BatchedMultiGoalEnv
from torchrl_pmoe.envs.multi_goal.gymnasium_env import MultiGoalEnv, register
from torchrl_pmoe.envs.multi_goal.task import MultiGoalTask

__all__ = ["BatchedMultiGoalEnv", "MultiGoalEnv", "MultiGoalTask", "register"]
