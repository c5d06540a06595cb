"""What the tasks of a point agent in the plane share: for Gymnasium, and batched for TorchRL."""

from torchrl_pmoe.envs.points.batched_env import BatchedPointEnv
from torchrl_pmoe.envs.points.gymnasium_env import PointEnv
from torchrl_pmoe.envs.points.task import PointTask

__all__ = ["BatchedPointEnv", "PointEnv", "PointTask"]
