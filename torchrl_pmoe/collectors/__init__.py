"""Collectors of frames on other machines."""

from torchrl_pmoe.collectors.ray_collector import ReplaceableRayCollector, WorkerError
from torchrl_pmoe.collectors.session import ClusterError, connect

__all__ = ["ClusterError", "ReplaceableRayCollector", "WorkerError", "connect"]
