"""A run on disk."""

from torchrl_pmoe.runs.directory import DirectoryInUseError, RunDirectory

__all__ = ["DirectoryInUseError", "RunDirectory"]
