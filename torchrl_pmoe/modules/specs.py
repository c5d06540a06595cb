"""What an actor takes from the spec of its action, and checks of its options."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any

from tensordict import NestedKey
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded

__all__ = ["box_of_floats", "refuse_unknown", "single_action", "try_distribution", "with_bounds"]


def refuse_unknown(owner: type, options: Mapping[str, Any], *takers: type, without: Sequence[str] = ()) -> None:
    """Refuse keywords that no class takes, with an error that names the class that the user called.

    Args:
        owner: the class that the user called.
        options: keywords besides its own arguments.
        takers: classes that ``options`` are passed on to.
        without: options of ``takers`` that ``owner`` has not.

    Raises:
        TypeError: for the first option in alphabetical order that neither ``owner`` nor one of ``takers`` knows.
    """
    # positional and keyword parameters, without **kwargs
    found = [signature(taker.__init__).parameters.values() for taker in (owner, *takers)]  # type: ignore[misc]
    known = {p.name for parameters in found for p in parameters if p.kind is not Parameter.VAR_KEYWORD}
    known -= set(without)
    unknown = sorted(options.keys() - known)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise TypeError(f"{owner.__name__}: got an unexpected keyword argument {unknown[0]!r}{hint}")


def try_distribution(owner: str, kind: Callable[..., Any], kwargs: Mapping[str, Any], **params: Tensor) -> None:
    """Make a distribution once, so that a wrong option is refused where it is given and not in the first call.

    Args:
        owner: name of the class that an error speaks of.
        kind: class of the distribution.
        kwargs: options of the distribution.
        params: parameters of the right shapes.

    Raises:
        TypeError: for an unknown option.
        ValueError: for a value that an option cannot have.
    """
    try:
        kind(**params, **kwargs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{owner}: distribution_kwargs: {error}") from error


def single_action(
    owner: str, spec: TensorSpec, out_keys: Sequence[NestedKey] | None
) -> tuple[TensorSpec, NestedKey, Composite]:
    """The action's own spec, its key, and a composite spec of the action alone.

    Raises:
        ValueError: if ``spec`` holds no action or several, or the action is not a box of floats.
    """
    if out_keys is not None and len(out_keys) != 1:
        raise ValueError(f"{owner}: out_keys must name one action, got {list(out_keys)}.")
    if not isinstance(spec, Composite):
        key = "action" if out_keys is None else out_keys[0]
        return box_of_floats(owner, spec), key, Composite({key: spec})
    keys = list(spec.keys(True, True))
    found = keys if out_keys is None else [key for key in keys if key == out_keys[0]]
    if len(found) != 1:
        raise ValueError(f"{owner}: spec must hold one action, got keys {keys}.")
    # a copy without the other entries keeps the nesting and the batch shape of the composite
    alone = spec.clone()
    for key in keys:
        if key != found[0]:
            del alone[key]
    return box_of_floats(owner, spec[found[0]]), found[0], alone


def box_of_floats(owner: str, spec: TensorSpec) -> TensorSpec:
    """``spec`` itself, if it is a box of floats.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(spec, Bounded | Unbounded) or not spec.dtype.is_floating_point or not spec.shape:
        raise ValueError(f"{owner}: the action spec must be a box of floats, got {type(spec).__name__}.")
    return spec


def with_bounds(
    owner: str, spec: TensorSpec, kwargs: Mapping[str, Any] | None, *, bounded: str, unbounded: str
) -> dict[str, Any]:
    """Options of a bounded distribution, with ``low`` and ``high`` from the spec unless both are given.

    A bound that is the same in every dimension becomes a number. A bound that is the same for all agents and
    environments of a batch becomes ``[A]``.

    Args:
        owner: name of the class that an error speaks of.
        spec: of the action.
        kwargs: of the distribution.
        bounded: name of the distribution.
        unbounded: name of the distribution that takes an unbounded spec.

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
        # from [*environments, *agents, A] to [A], as long as the rows are the same
        while bound.ndim > 1 and (bound == bound[:1]).all():
            bound = bound[0]
        bounds[name] = bound.flatten()[0].item() if (bound == bound.flatten()[0]).all() else bound.clone()
    return {**bounds, **kwargs}
