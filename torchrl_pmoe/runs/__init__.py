"""A run on disk, and what is seen of it."""

from torchrl_pmoe.runs.directory import DirectoryInUseError, RunDirectory
from torchrl_pmoe.runs.loggers import run_logger

__all__ = ["DirectoryInUseError", "RunDirectory", "run_logger"]
