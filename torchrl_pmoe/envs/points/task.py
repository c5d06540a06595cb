"""What a task of a point agent in the plane has to say, for NumPy arrays and for tensors."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["Array", "PointTask", "namespace", "require_finite"]

Array = TypeVar("Array", np.ndarray, Tensor)


def namespace(array: np.ndarray | Tensor) -> Any:
    """The module whose functions take the array."""
    return torch if isinstance(array, Tensor) else np


def require_finite(task: str, numbers: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for the first argument that is no finite number."""
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{task}: {name} must be a finite number, got {value!r}.")


class PointTask(ABC):
    """A point agent in a square plane around the origin, with actions ``[2]`` in ``[-1, 1]^2``.

    States are ``[*B, S]``, the position first; the rest is zero when an episode starts. All methods take NumPy arrays,
    or tensors once :meth:`as_tensors` was called.

    Attributes:
        half_width: of the plane.
        max_episode_steps: steps after which an episode is truncated.
        observation_high: bound of the absolute value of each observed number.
        state_size: ``S``.
    """

    half_width: float = 1.0
    max_episode_steps: int
    observation_high: tuple[float, ...]
    state_size: int = 2
    arrays: ClassVar[tuple[str, ...]]
    """Names of the attributes that :meth:`as_tensors` turns into tensors; one of them may be ``None``."""

    def as_tensors(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Any:
        """The same task over tensors."""
        task = copy.copy(self)
        for name in self.arrays:
            if (value := getattr(self, name)) is not None:
                setattr(task, name, torch.as_tensor(value, dtype=dtype, device=device))
        return task

    @abstractmethod
    def observe(self, state: Array) -> Array:
        """What the agent sees, ``[*B, O]``."""

    @abstractmethod
    def reached(self, state: Array) -> Array:
        """Whether an agent has what it was sent for, ``[*B]``."""

    def ended(self, state: Array) -> Array:
        """Whether an episode is over, ``[*B]``: by success, or by anything else."""
        return self.reached(state)

    @abstractmethod
    def step(self, state: Array, action: Array) -> tuple[Array, Array, Array]:
        """One step of agents in states ``[*B, S]``; actions are clipped.

        Returns:
            Their new state ``[*B, S]``, the reward ``[*B]``, and whether anything stood in their way ``[*B]``.
        """

    def is_allowed(self, position: np.ndarray) -> bool:
        """Whether an agent may be put at a point ``[2]``."""
        return bool((np.abs(position) <= self.half_width).all())

    @abstractmethod
    def outcome(self, path: np.ndarray) -> str | None:
        """Name of what an episode that is over came to, from its positions ``[T, 2]``; ``None`` where it failed."""

    @abstractmethod
    def discs(self) -> list[tuple[np.ndarray, str]]:
        """What a picture shows: ``(x, y, radius)`` and the kind of disc, ``obstacle``, ``target`` or ``bait``."""
