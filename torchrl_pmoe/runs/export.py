"""A policy as a program that runs without this package."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchrl_pmoe.runs.files import replace_file

__all__ = ["check_export_path", "export_policy"]

# what a reparameterised draw takes its noise from; torch.distributions fills an empty tensor
_DRAWS = {torch.rand: "uniform", torch.randn: "normal", torch.Tensor.normal_: "normal"}


class _Noise(TorchFunctionMode):
    """Hands out given tensors in place of what is drawn, or keeps what is drawn.

    Args:
        given: by their names in :data:`_DRAWS`; ``None`` lets everything be drawn, and fills :attr:`drawn`.

    Raises:
        ValueError: where something is drawn for the second time.
    """

    def __init__(self, given: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.given, self.drawn = given, dict[str, Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = _DRAWS.get(func)
        if name is None:
            return func(*args, **(kwargs or {}))
        if name in self.drawn:
            raise ValueError(f"a policy that draws {name} numbers more than once cannot be exported")
        self.drawn[name] = func(*args, **(kwargs or {})) if self.given is None else self.given[name]
        return self.drawn[name]


class _Program(nn.Module):
    """From observations ``[B, O]`` and what the policy draws to actions ``[B, A]``."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Tensor, uniform: Tensor | None = None, normal: Tensor | None = None) -> Tensor:
        given = {name: noise for name, noise in (("uniform", uniform), ("normal", normal)) if noise is not None}
        with _Noise(given):
            return self.policy(TensorDict(observation=observation, batch_size=observation.shape[:1]))["action"]


def check_export_path(path: Path) -> None:
    """Refuse what :func:`export_policy` cannot write, before any work.

    Raises:
        ValueError: for another ending than ``.pt2`` and ``.onnx``.
        ImportError: for ``.onnx``, where its packages are not installed.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{path}: must end in .pt2 (torch.export) or .onnx")
    if path.suffix == ".onnx" and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise ImportError(f"{path}: a program in ONNX needs {' and '.join(missing)}: pip install 'torchrl_pmoe[onnx]'")


def export_policy(policy: TensorDictModuleBase, path: Path, observation: Tensor) -> None:
    """Write a policy as a program of torch.export or ONNX, with as many states at once as one likes.

    Its inputs are ``observation`` ``[B, O]`` and what the policy draws: ``uniform`` numbers in ``[0, 1)``, standard
    ``normal`` ones, each ``[B, …]``. Its output is ``action`` ``[B, A]``.

    Args:
        policy: reads ``observation`` and writes ``action``; it draws uniform and normal numbers once at most.
        path: ends in ``.pt2`` or ``.onnx``.
        observation: two observations, ``[2, O]``, for their shape and type.

    Raises:
        ValueError: for another path, and a policy that draws otherwise.
        ImportError: where the packages for ONNX are not installed.
        OSError: where the file cannot be written.
    """
    check_export_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # also fills the caches of the policy with true tensors, before it meets those of the tracer
    with torch.random.fork_rng([observation.device] if observation.is_cuda else []), torch.no_grad(), _Noise() as noise:
        policy(TensorDict(observation=observation, batch_size=observation.shape[:1]))
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        _Program(policy),
        (observation,),
        noise.drawn,
        dynamic_shapes={name: {0: batch} for name in ("observation", *noise.drawn)},
        strict=False,
    )
    for node in program.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ValueError(f"a policy that draws by {node.target} cannot be exported")
    replace_file(path, _onnx(program, ["observation", *noise.drawn]) if path.suffix == ".onnx" else _pt2(program))


def _pt2(program: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _onnx(program: torch.export.ExportedProgram, inputs: list[str]) -> bytes:
    with _quiet_exporter():
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=inputs,
            output_names=["action"],
            dynamic_shapes={name: {0: "batch"} for name in inputs},
        )
    assert made is not None
    return made.model_proto.SerializeToString()


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without its lines on packages that a policy has no use for, and on what PyTorch will rename."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
