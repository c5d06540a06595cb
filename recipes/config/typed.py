"""What a typed config is made of: kinds of fields, their help, and one line for a value that they do not allow."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from annotated_types import Ge, Gt, Le, Lt
from hydra.core.config_store import ConfigStore
from parts.errors import UsageError
from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

__all__ = [
    "Device",
    "Flag",
    "Integer",
    "Kwargs",
    "Number",
    "RunPath",
    "Size",
    "Text",
    "Widths",
    "build",
    "config_class",
    "described_keys",
    "field",
    "get",
    "help_text",
    "hparams",
    "register",
    "set_",
    "to_dict",
    "unknown_key",
]


@dataclasses.dataclass(frozen=True)
class Allowed:
    """In an annotation: what a value must be, where its type does not say it.

    Args:
        words: complete "<key>=<value>: must be ...".
    """

    words: str


def _whole(value: Any) -> Any:
    """``1e6`` is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _run_name(value: Any) -> Any:
    """The job of a sweep is called ``0``."""
    return str(value) if type(value) is int else value


def _device(value: Any) -> Any:
    """A device of this machine; null is the best one."""
    if value is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(value, str):
        return value
    try:
        # a device that holds no numbers (meta) is none to train on
        torch.zeros(1, device=value).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(str(error)) from error
    return value


_DEVICES = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])

Integer = Annotated[int, BeforeValidator(_whole), Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
Size = Annotated[int, BeforeValidator(_whole), Strict(), Field(ge=1, le=2**31 - 1)]
RunPath = Annotated[
    Annotated[str, Strict(), Field(min_length=1)] | None,
    BeforeValidator(_run_name),
    Allowed("the directory of a run, with its config.yaml and checkpoints, or one of its checkpoints, or null"),
]
Widths = Annotated[
    list[Annotated[int, BeforeValidator(_whole), Strict(), Field(ge=1, le=2**20)]],
    Field(min_length=1),
    Allowed("a list of integers >= 1 and <= 1048576, one at least"),
]
"""The widths of the hidden layers."""
Kwargs = Annotated[dict[Annotated[str, Strict()], Any], Allowed("a mapping of names to values")]
# null is replaced before the type is looked at: a config always has a text
Device = Annotated[str, BeforeValidator(_device), Strict(), Allowed(f"a device of this machine ({_DEVICES}) or null")]


def config_class(cls: type) -> Any:
    """Make a pydantic dataclass of a class, one that knows no other keys and no infinite numbers."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
    return pydantic_dataclass(config=config, kw_only=True)(cls)


def field(default: Any, help: str = "") -> Any:
    """A key of a config.

    Args:
        default: its value where nothing is given; a mutable one is copied for each config.
        help: one line on what it does.
    """
    if isinstance(default, list | dict):
        return Field(default_factory=lambda: type(default)(default), description=help)
    return Field(default, description=help)


def group(cls: type, **defaults: Any) -> Any:
    """A group of keys, some of them with other defaults than the class has."""
    return dataclasses.field(default_factory=lambda: cls(**defaults))


# ------------------------------------------------------------------------------------------------- reading


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """The typed config that nested ``values`` describe; what they leave out has its default.

    Raises:
        UsageError: for the first key that does not exist or whose value is not allowed, in one line.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        known = described_keys(cls)
        path = [str(part) for part in first["loc"]]
        for end in range(len(path), 0, -1):
            if (key := ".".join(path[:end])) in known:
                raise UsageError(_refusal(key, _at(values, key), known[key])) from None
        key = ".".join(path)
        raise UsageError(unknown_key(key, _at(values, key), list(known))) from None


def _refusal(key: str, value: Any, info: FieldInfo) -> str:
    return f"{key}={'null' if value is None else value}: must be {allowed(info)}"


def _at(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def unknown_key(key: str, value: Any, known: list[str]) -> str:
    """The line for a key that does not exist."""
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    members = [name for name in known if name.startswith(f"{key.split('.')[0]}.")]
    if "." not in key and members:
        return f"{key}={value}: is a group of keys; allowed are {', '.join(members)}"
    others = close or members or [name for name in known if "." not in name]
    return f"{key}={value}: no such key; {'did you mean' if close else 'allowed are'} {', '.join(others)}"


# ----------------------------------------------------------------------------------------- keys and their help


def described_keys(cls: Any) -> dict[str, FieldInfo]:
    """Every key of a config class, dotted, with what pydantic knows of it."""
    found: dict[str, FieldInfo] = {}
    for name, info in cls.__pydantic_fields__.items():
        if isinstance(info.annotation, type) and dataclasses.is_dataclass(info.annotation):
            found.update({f"{name}.{key}": inner for key, inner in described_keys(info.annotation).items()})
        else:
            found[name] = info
    return found


def allowed(info: FieldInfo) -> str:
    """What a key may hold, in words."""
    return _words(info.annotation, info.metadata)


def _words(annotation: Any, metadata: list[Any]) -> str:
    for note in metadata:
        if isinstance(note, Allowed):
            return note.words
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        for note in notes:
            notes = [*notes, *note.metadata] if isinstance(note, FieldInfo) else notes
        return _words(inner, [*notes, *metadata])
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not types.NoneType]
        words = [_words(part, metadata) for part in parts]
        if len(words) > 1:
            # "a number or auto"
            words = [word.removeprefix("one of ") if "," not in word else word for word in words]
        return " or ".join([*words, *(["null"] if types.NoneType in get_args(annotation) else [])])
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if annotation is bool:
        return "true or false"
    if annotation is str:
        return "a non-empty text"
    signs = ((Gt, "gt", ">"), (Ge, "ge", ">="), (Le, "le", "<="), (Lt, "lt", "<"))
    bounds = [
        f"{sign} {getattr(note, name)}" if annotation is int else f"{sign} {getattr(note, name):g}"
        for kind, name, sign in signs
        for note in metadata
        if isinstance(note, kind)
    ]
    return " ".join(["an integer" if annotation is int else "a number", " and ".join(bounds)]).strip()


def help_text(cls: Any, about: str, *examples: str) -> str:
    """What ``--help`` prints: every key with its default, what is allowed and what it does."""
    lines = [about, *(f"  {example}" for example in examples), ""]
    top = ""
    defaults = to_dict(cls())
    # a group's keys come after those that are in none, and those of a group in a group come last
    for key, info in sorted(described_keys(cls).items(), key=lambda item: item[0].count(".")):
        if (head := key.rpartition(".")[0]) != top:
            lines += ["", f"{head}:"]
            top = head
        value = _at(defaults, key)
        shown = json.dumps(value) if value is None or isinstance(value, bool) else value
        lines.append(f"  {f'{key}={shown}':<40} {info.description or ''} [{allowed(info)}]".rstrip())
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- values


def to_dict(config: Any) -> dict[str, Any]:
    """The nested values of a config."""
    return dataclasses.asdict(config)


def hparams(config: Any) -> dict[str, Any]:
    """Dotted keys and values of a config, for a service that records them."""
    return {key: get(config, key) for key in described_keys(type(config)) if key != "resume"}


def get(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def set_(config: Any, key: str, value: Any) -> None:
    """Put a value into the place of a dotted key."""
    *groups, name = key.split(".")
    setattr(get(config, ".".join(groups)) if groups else config, name, value)


def register(name: str, cls: Any, about: str, *examples: str) -> None:
    """Let ``config/<name>.yaml`` begin with the defaults of a config class, and ``--help`` print its keys."""
    node: dict[str, Any] = to_dict(cls())
    text = help_text(cls, about, *examples).replace("$", "\\$")
    node["hydra"] = {"help": {"template": text}}
    ConfigStore.instance().store(group="keys", name=name, node=node, package="_global_", provider="torchrl_pmoe")
