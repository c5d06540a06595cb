"""A policy in two parts: its structure, sent once, and its numbers, sent with every request."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import cloudpickle
import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["PolicyReceiver", "PolicySender", "freeze", "from_array", "thaw", "to_array"]


Structure: TypeAlias = tuple[bytes, list[Any], list[np.ndarray]]


class PolicySender:
    """Takes a policy apart, with everything that it holds: critics, target networks, what a function closes over.

    Args:
        policy: a module, or several things that share some, which cloudpickle can write; all parameters are made.

    Attributes:
        structure: for :class:`PolicyReceiver`, with the numbers as they stood.
    """

    def __init__(self, policy: Any) -> None:
        writer = _Writer(file := io.BytesIO())
        writer.dump(policy)
        self._tensors = writer.tensors
        kinds = [(type(one) is nn.Parameter, one.requires_grad, one.shape, one.dtype) for one in self._tensors]
        # what is made there may act before the first request, and an action's bounds must be bounds
        self.structure: Structure = (file.getvalue(), kinds, [array.copy() for array in self.weights()])

    def weights(self) -> list[np.ndarray]:
        """All numbers as they stand, as bytes; those of a policy on the CPU are not copied."""
        return [to_array(one) for one in self._tensors]


class PolicyReceiver:
    """Puts a policy together, on the CPU.

    Args:
        structure: of a :class:`PolicySender`.

    Attributes:
        content: what was sent.
    """

    def __init__(self, structure: Structure) -> None:
        code, kinds, weights = structure
        self._tensors: list[Tensor] = []
        for is_parameter, requires_grad, shape, dtype in kinds:
            one = torch.zeros(shape, dtype=dtype)
            self._tensors.append(nn.Parameter(one, requires_grad=requires_grad) if is_parameter else one)
        self.load(weights)
        self.content: Any = _Reader(io.BytesIO(code), self._tensors).load()

    @torch.no_grad()
    def load(self, weights: Sequence[np.ndarray]) -> None:
        """Take over the numbers."""
        for one, array in zip(self._tensors, weights, strict=True):
            one.copy_(from_array(array, one.shape, one.dtype))


def to_array(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor of any type."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def from_array(array: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor whose bytes these are, in memory of its own."""
    return torch.from_numpy(array.copy()).view(dtype).reshape(tuple(shape))


def freeze(state: Any) -> bytes:
    """Nested dictionaries and lists of tensors, numbers and texts, as bytes that cost little to send.

    A simulator has a hundred small tensors, and PyTorch takes ten times as long to pickle one as NumPy.
    """
    return pickle.dumps(_walk(state, lambda x: x.cpu().numpy() if isinstance(x, Tensor) else x))


def thaw(frozen: bytes) -> Any:
    """The state that was frozen, with tensors in memory of their own."""
    return _walk(pickle.loads(frozen), lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x)


def _walk(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _walk(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_walk(one, change) for one in value)
    return change(value)


class _Writer(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter, nn.Buffer) and not value.is_meta:
            if id(value) not in self._places:
                self._places[id(value)] = len(self.tensors)
                self.tensors.append(value)
            return self._places[id(value)]
        # a module may remember the device that it was made on
        return "cpu" if isinstance(value, torch.device) and value.type != "meta" else None


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> Any:
        return torch.device("cpu") if place == "cpu" else self._tensors[place]
