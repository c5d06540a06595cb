"""Gymnasium's MuJoCo tasks as batched TorchRL environments, simulated by MuJoCo or by MJX."""

from torchrl_pmoe.envs.mujoco.tasks import MUJOCO_TASKS, MujocoTask, mujoco_task

__all__ = ["MUJOCO_TASKS", "MujocoTask", "mujoco_task"]
