"""Why a run cannot begin, cannot go on, or has stopped: each ends in one line."""

from __future__ import annotations

import torch

from parts import process

__all__ = ["Interrupted", "RunError", "UsageError", "cause"]


class UsageError(Exception):
    """A config that cannot be run: one line that names the key, the value and what is allowed."""


class RunError(Exception):
    """A run that cannot go on: one line that says why, and what is left of it."""


class Interrupted(Exception):
    """A run that was told to stop and has written a checkpoint.

    Args:
        number: of the signal.
        where: the run stands now.
    """

    def __init__(self, number: int, where: str) -> None:
        super().__init__(number, where)
        self.number, self.where = number, where
        self.advice = ""


def cause(error: BaseException) -> str:
    """What a user can make of an error that nobody has foreseen, in one line."""
    words = str(error)
    if isinstance(error, MemoryError | OverflowError | torch.OutOfMemoryError) or any(
        sign in words for sign in ("can't allocate memory", "Storage size calculation overflowed")
    ):
        return "the config asks for more memory than there is"
    if "Too many open files" in words:
        return f"this process may not open as many files as it needs (ulimit -n): {process.describe(error)}"
    return process.describe(error)
