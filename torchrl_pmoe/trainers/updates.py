"""One update as functions that :func:`torch.compile` takes: gradients, their judgement and clipping, what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

__all__ = [
    "DYNAMO",
    "UpdateOptions",
    "UpdateResult",
    "compiler_arguments",
    "compute_gradients",
    "in_layout_of",
    "judge_and_clip",
]


# ------------------------------------------------------------------------------------------- the compiler

# in-graph gradients make one graph of loss and backward
DYNAMO = {"trace_autograd_ops": True} if hasattr(torch._dynamo.config, "trace_autograd_ops") else {}
# without the guards that are left out, a loss would be taken for another one that was compiled before in this process
_ISOLATED = "isolate_recompiles" in signature(torch.compile).parameters


def compiler_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of :func:`torch.compile`: those that are given, and ours beside them."""
    ours: dict[str, Any] = {"dynamic": False}
    options: dict[str, Any] = {}
    if given.get("backend", "inductor") == "inductor":
        # PyTorch's own generator keeps the draws of the eager update
        options["fallback_random"] = True
    if _ISOLATED:
        ours["isolate_recompiles"] = True
        options["guard_filter_fn"] = _values_only
    options.update(given.get("options") or {})
    # a mode excludes options
    return {**ours, **given, **({"options": options} if options and "mode" not in given else {})}


def _values_only(guards: Sequence[Any]) -> list[bool]:
    """Which guards of the compiler are looked at in every update: those on values, not those on code.

    A loss of TorchRL has some 3,000 guards; nine of ten ask whether a function, a class or the inside of a
    ``TensorDict`` is still what it was, and all of them together take as long as the update. What may change in a
    training is still seen: shapes, dtypes and devices, the keys of the batch, attributes of the loss and its modules,
    and the modes of PyTorch, tensordict and TorchRL. The graphs of every stepper are its own.
    """
    return [_on_a_value(guard) for guard in guards]


# kinds of guards on functions, classes, and what they are made of
_OF_CODE = {
    "NOT_PRESENT_IN_GENERIC_DICT",
    "HASATTR",
    "TYPE_MATCH",
    "CLASS_MATCH",
    "CLOSURE_MATCH",
    "FUNCTION_MATCH",
    "BUILTIN_MATCH",
    "MODULE_MATCH",
    "DICT_KEYS_MATCH",
    "DICT_CONTAINS",
    "DICT_NOT_CONTAINS",
    "SEQUENCE_LENGTH",
    "EMPTY_NN_MODULE_HOOKS_DICT",
}
# that an attribute is that of the class, and how long a list is
_OF_ATTRIBUTES = {"NOT_PRESENT_IN_GENERIC_DICT", "SEQUENCE_LENGTH", "DICT_KEYS_MATCH"}
# defaults of functions, attributes of classes, and what a TensorDict keeps beside its tensors
_INSIDE = ("defaults__", "__closure__", ".__dict__)", "_param_td", "_tensordict[")


def _on_a_value(guard: Any) -> bool:
    if guard.guard_type == "TENSOR_MATCH" or guard.name.startswith(("batch", "parameters", "options")):
        return True
    if any(part in guard.name for part in _INSIDE):
        return False
    of_the_loss = guard.name.startswith("loss_module") and guard.guard_type in _OF_ATTRIBUTES
    return of_the_loss or guard.guard_type not in _OF_CODE


# ------------------------------------------------------------------------------------------- the update


def in_layout_of(parameter: nn.Parameter, gradient: Tensor | None) -> Tensor | None:
    """A gradient with the strides of its parameter.

    ``backward`` sees to that itself, ``torch.autograd.grad`` hands gradients back as they come: those of vmapped
    critics are permuted. A fused optimiser reads both as raw memory, so on a CPU every entry would go to another
    weight's place in silence, and on CUDA it raises.
    """
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class UpdateOptions(NamedTuple):
    """What an update does beside its loss.

    Args:
        shape: of the outputs whose means are kept, beside those of one element.
        limit: of the gradient; ``None`` for no clipping.
        by_norm: clip a group's gradients by their common norm, not entry by entry.
        groups: which parameters are clipped together, by their places.
    """

    shape: tuple[int, ...]
    limit: float | None
    by_norm: bool
    groups: tuple[tuple[int, ...], ...]


class UpdateResult(NamedTuple):
    """What an update has found.

    Args:
        gradients: clipped, in the order of the parameters.
        values: of the outputs whose means are kept, ``[outputs, elements]``.
        bad: which losses are NaN or infinite, whether a gradient is, and whether any of these, ``[losses + 2]``.
        keys: names of ``values``.
        judged: names of the losses in ``bad``.
    """

    gradients: Sequence[Tensor | None]
    values: Tensor
    bad: Tensor
    keys: tuple[str, ...]
    judged: tuple[str, ...]


def compute_gradients(
    loss_module: Callable[[TensorDictBase], TensorDictBase],
    parameters: list[nn.Parameter],
    batch: TensorDictBase,
    options: UpdateOptions,
) -> tuple[UpdateResult, dict]:
    """What an update finds and what its loss wrote into the batch: all detached."""
    scratch = batch.copy()
    losses = loss_module(scratch)
    total = sum(value.sum() for key, value in losses.items() if key.startswith("loss"))
    gradients = [
        in_layout_of(parameter, gradient)
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True
        )
    ]
    written = {
        key: value.detach()
        for key, value in scratch.items()
        if isinstance(value, Tensor) and value is not batch.get(key, None)
    }
    return judge_and_clip(gradients, {key: value.detach() for key, value in losses.items()}, options), written


@torch.no_grad()
def judge_and_clip(
    gradients: Sequence[Tensor | None], outputs: Mapping[str, Tensor], options: UpdateOptions
) -> UpdateResult:
    """Judge an update, clip its gradients, and gather the outputs whose means are kept."""
    judged = tuple(key for key in outputs if key.startswith("loss"))
    keys = tuple(key for key, value in outputs.items() if value.numel() == 1 or value.shape == options.shape)
    values = torch.stack([outputs[key].reshape(-1).expand(math.prod(options.shape)) for key in keys])
    losses = torch.stack([outputs[key].sum() for key in judged])
    present = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
    # no other norm is as fast on a CPU, tenfold for the largest entry
    norms = dict(zip(present, torch._foreach_norm(list(present.values())), strict=True)) if present else {}
    # the norms may be of several dtypes
    total = torch.stack([norm.to(losses) for norm in norms.values()]).sum() if norms else losses.new_zeros(())
    bad = ~torch.cat([losses, total.reshape(1)]).isfinite()
    bad = torch.cat([bad, bad.any().reshape(1)])
    clipped = _clipped(present, norms, options)
    return UpdateResult([clipped.get(index) for index in range(len(gradients))], values, bad, keys, judged)


def _clipped(present: dict[int, Tensor], norms: Mapping[int, Tensor], options: UpdateOptions) -> dict[int, Tensor]:
    """The gradients within their limit, in tensors of their own: two parameters may share one gradient."""
    if options.limit is None:
        return present
    clipped = dict(present)
    for group in options.groups:
        places = [index for index in group if index in present]
        if not places:
            continue
        found = [present[index] for index in places]
        if options.by_norm:
            # as torch.nn.utils.clip_grad_norm_ computes it
            norm = torch.linalg.vector_norm(torch.stack([norms[index] for index in places]))
            within = torch._foreach_mul(found, (options.limit / (norm + 1e-6)).clamp(max=1.0))
        else:
            within = torch._foreach_clamp_max(torch._foreach_clamp_min(found, -options.limit), options.limit)
        # numbers are promoted by a factor of another dtype
        kept = (gradient.to(before.dtype) for gradient, before in zip(within, found, strict=True))
        clipped.update(zip(places, kept, strict=True))
    return clipped
