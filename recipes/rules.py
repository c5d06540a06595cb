"""What a key of a config may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rule:
    """What one config key may hold.

    Args:
        allowed: completes "<key>=<value>: must be ...".
        parse: returns the value to use, or raises ``ValueError``.
    """

    allowed: str
    parse: Callable[[Any], Any]


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def number(
    above: float | None = None, at_least: float | None = None, at_most: float | None = None, below: float | None = None
) -> Rule:
    """A finite number between the given bounds."""

    def parse(value: Any) -> float:
        _require(isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf"))
        _require((above is None or value > above) and (at_least is None or value >= at_least))
        _require((at_most is None or value <= at_most) and (below is None or value < below))
        return float(value)

    bounds = [f"> {above:g}"] if above is not None else []
    bounds += [f">= {at_least:g}"] if at_least is not None else []
    bounds += [f"<= {at_most:g}"] if at_most is not None else []
    bounds += [f"< {below:g}"] if below is not None else []
    return Rule(" ".join(["a number", " and ".join(bounds)]).strip(), parse)


def integer(at_least: int, at_most: int | None = None) -> Rule:
    """A whole number (``1e6`` is one)."""

    def parse(value: Any) -> int:
        _require(isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1)
        _require(value >= at_least and (at_most is None or value <= at_most))
        return int(value)

    return Rule(f"an integer >= {at_least}" + (f" and <= {at_most}" if at_most is not None else ""), parse)


def choice(*names: str) -> Rule:
    """One of some names."""

    def parse(value: Any) -> str:
        _require(isinstance(value, str) and value in names)
        return value

    return Rule("one of " + ", ".join(names), parse)


def flag() -> Rule:
    """True or false."""

    def parse(value: Any) -> bool:
        _require(isinstance(value, bool))
        return value

    return Rule("true or false", parse)


def text() -> Rule:
    """Any text but the empty one."""

    def parse(value: Any) -> str:
        _require(isinstance(value, str) and value != "")
        return value

    return Rule("a non-empty text", parse)


def widths() -> Rule:
    """The widths of the hidden layers."""

    def parse(value: Any) -> list[int]:
        _require(isinstance(value, list) and len(value) > 0)
        return [integer(1, 2**20).parse(width) for width in value]

    return Rule("a list of integers >= 1 and <= 1048576, one at least", parse)


def device() -> Rule:
    """A device that is there; null is the best one."""

    def parse(value: Any) -> str:
        if value is None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            # a device that holds no numbers (meta) is none to train on
            torch.zeros(1, device=str(value)).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError from error
        return str(value)

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return Rule("a device of this machine (" + ", ".join(["cpu", *gpus]) + ") or null", parse)


def mapping() -> Rule:
    """Names and values."""

    def parse(value: Any) -> dict[str, Any]:
        _require(isinstance(value, dict) and all(isinstance(name, str) for name in value))
        return value

    return Rule("a mapping of names to values", parse)


def either(rule: Rule, *literals: Any) -> Rule:
    """A rule, or one of some literal values (null among them)."""

    def parse(value: Any) -> Any:
        same = any(value == other and type(value) is type(other) for other in literals)
        return value if same else rule.parse(value)

    names = ["null" if other is None else str(other) for other in literals]
    return Rule(" or ".join([rule.allowed, *names]), parse)
