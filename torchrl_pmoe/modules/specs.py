"""What an actor reads off the spec of its action."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

from tensordict import NestedKey
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded

__all__ = ["action_leaf", "box_of_floats", "refuse_unknown", "try_distribution", "with_bounds"]


def refuse_unknown(owner: type, options: Mapping[str, Any], *takers: type, without: Sequence[str] = ()) -> None:
    """Refuse options that nothing takes, in the name of the class that the user wrote.

    Args:
        owner: that class.
        options: given besides its own arguments.
        takers: classes that ``options`` are handed to.
        without: options of ``takers`` that ``owner`` has not.

    Raises:
        TypeError: for the first option in alphabetical order that neither ``owner`` nor one of ``takers`` knows.
    """
    found = [signature(taker.__init__).parameters.values() for taker in (owner, *takers)]  # type: ignore[misc]
    known = {p.name for parameters in found for p in parameters if p.kind is not Parameter.VAR_KEYWORD}
    known -= set(without)
    unknown = sorted(options.keys() - known)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise TypeError(f"{owner.__name__}: got an unexpected keyword argument {unknown[0]!r}{hint}")


def try_distribution(owner: str, kind: Callable[..., Any], kwargs: Mapping[str, Any], **params: Tensor) -> None:
    """Make a distribution once, so that an option that it does not take shows where it is given.

    Args:
        owner: who is speaking in an error.
        kind: the distribution's class.
        kwargs: its options.
        params: parameters of the right shapes.

    Raises:
        TypeError: for an unknown option.
        ValueError: for a value that an option cannot have.
    """
    try:
        kind(**params, **kwargs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{owner}: distribution_kwargs: {error}") from error


def action_leaf(
    owner: str, spec: TensorSpec, out_keys: Sequence[NestedKey] | None
) -> tuple[TensorSpec, NestedKey, Composite]:
    """The action's own spec, its key, and a composite that holds it alone.

    Raises:
        ValueError: if ``spec`` holds no action or several, or the action is not a box of floats.
    """
    if out_keys is not None and len(out_keys) != 1:
        raise ValueError(f"{owner}: out_keys must name one action, got {list(out_keys)}.")
    if not isinstance(spec, Composite):
        key = "action" if out_keys is None else out_keys[0]
        return box_of_floats(owner, spec), key, Composite({key: spec})
    leaves = list(spec.keys(True, True))
    found = leaves if out_keys is None else [key for key in leaves if key == out_keys[0]]
    if len(found) != 1:
        raise ValueError(f"{owner}: spec must hold one action, got keys {leaves}.")
    alone = spec.clone()
    for key in leaves:
        if key != found[0]:
            del alone[key]
    return box_of_floats(owner, spec[found[0]]), found[0], alone


def box_of_floats(owner: str, leaf: TensorSpec) -> TensorSpec:
    """``leaf`` itself.

    Raises:
        ValueError: if it is not a box of floats.
    """
    if not isinstance(leaf, Bounded | Unbounded) or not leaf.dtype.is_floating_point or not leaf.shape:
        raise ValueError(f"{owner}: the action spec must be a box of floats, got {type(leaf).__name__}.")
    return leaf


def with_bounds(
    owner: str, spec: TensorSpec, kwargs: Mapping[str, Any] | None, *, bounded: str, unbounded: str
) -> dict[str, Any]:
    """``kwargs`` of a bounded distribution; ``low`` and ``high`` come from the spec unless both are given.

    Bounds are numbers where they are the same in every dimension, and ``[A]`` where they are the same for all agents
    and environments of a batch.

    Args:
        owner: who is speaking in an error.
        spec: of the action.
        kwargs: of the distribution.
        bounded: the distribution's name.
        unbounded: the name of the one to take instead for an unbounded spec.

    Raises:
        ValueError: if the spec is unbounded, or a bound is infinite.
    """
    kwargs = dict(kwargs or {})
    if {"low", "high"} <= kwargs.keys():
        return kwargs
    if not isinstance(spec, Bounded):
        raise ValueError(
            f"{owner}: {bounded} needs a bounded action spec ({unbounded} takes an unbounded one), "
            f"got {type(spec).__name__}."
        )
    bounds: dict[str, float | Tensor] = {}
    for name in ("low", "high"):
        bound = getattr(spec.space, name)
        if not bound.isfinite().all():
            raise ValueError(f"{owner}: the spec's {name} must be finite, got {bound.tolist()}.")
        while bound.ndim > 1 and (bound == bound[:1]).all():
            bound = bound[0]
        bounds[name] = bound.flatten()[0].item() if (bound == bound.flatten()[0]).all() else bound.clone()
    return {**bounds, **kwargs}
