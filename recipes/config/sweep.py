"""The config of ``recipes/sweep.py``, and the table of cells that its command line describes."""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from parts.errors import UsageError
from parts.launch import hydra_line, read
from parts.resume import CHANGEABLE
from pydantic import Field

from config import dac, ppo_pmoe, sac_many_seeds, sac_pmoe, target_reaching
from config.typed import Flag, Integer, Text, build, config_class, described_keys, field, get, group, help_text


@dataclass(frozen=True)
class Recipe:
    """A recipe whose runs can be the cells of a sweep.

    Args:
        config_class: its typed config.
        resolve: fills in the keys that were left open, and raises for values that exclude each other.
        changeable: the beginnings of the keys that may change when a run goes on.
    """

    config_class: Any
    resolve: Callable[[Any], Any]
    changeable: tuple[str, ...] = CHANGEABLE


RECIPES = {
    "sac_pmoe": Recipe(sac_pmoe.SACConfig, sac_pmoe.resolve),
    "ppo_pmoe": Recipe(ppo_pmoe.PPOConfig, ppo_pmoe.resolve),
    "dac": Recipe(dac.DACConfig, dac.resolve),
    "sac_many_seeds": Recipe(sac_many_seeds.ManySeedsConfig, sac_many_seeds.resolve),
    "target_reaching": Recipe(
        target_reaching.TargetReachingConfig, target_reaching.resolve, target_reaching.MAY_CHANGE
    ),
}

Count = Annotated[Integer, Field(ge=1, le=100_000)]


@config_class
class Ray:
    """``engine=ray``."""

    address: Text | None = field(None, "of a Ray cluster, or auto; null: a Ray of its own on this machine")
    max_retries: Annotated[Integer, Field(ge=0)] = field(10, "of a cell whose node has died")
    gpus: Annotated[float, Field(ge=0)] = field(0.0, "that each cell reserves; a part of one may be shared")


@config_class
class Slurm:
    """``engine=slurm``."""

    cluster: Literal["slurm", "local"] = field("slurm", "local: submitit's own stand-in, on this machine")
    partition: Text | None = field(None, "null: Slurm's own choice")
    account: Text | None = field(None, "null: Slurm's own choice")
    minutes: Count = field(1440, "before Slurm ends a job, which writes a checkpoint and is queued again")
    cpus: Count = field(1, "of each cell")
    gpus: Annotated[Integer, Field(ge=0)] = field(0, "of each cell")
    memory_gb: Count | None = field(None, "of each cell; null: Slurm's own choice")
    at_once: Count = field(256, "jobs that may run at a time")


@config_class
class SweepConfig:
    """Every key of ``recipes/sweep.py`` itself."""

    recipe: Literal[tuple(RECIPES)] = field("sac_pmoe", "that trains every cell")  # type: ignore[valid-type]
    directory: Text | None = field(None, "of the sweep; null: outputs/sweeps/<recipe>")
    engine: Literal["local", "ray", "slurm"] = field("local", "processes here | Ray core tasks | jobs of Slurm")
    jobs: Count | None = field(None, "cells at a time with engine=local; null: one for each core")
    status: Flag = field(False, "print the table of cells, and start none")
    retry: Flag = field(False, "start cells that have failed, too")
    progress_bar: Flag = field(True, "show one")
    ray: Ray = group(Ray)
    slurm: Slurm = group(Slurm)


OWN = {key.split(".")[0] for key in described_keys(SweepConfig)}
"""The first names of its keys; no recipe has one of them but ``recipe``."""
ABOUT = """\
A table of runs, each one started by its recipe's command, in a directory named by what it is.

KEY=VALUE,VALUE (also KEY=0..4, KEY=range(0,5), KEY=choice(a,b)) is a column of the table, KEY=VALUE holds for all
cells. Keys are those of the recipe (python recipes/RECIPE.py --help) and these:"""
EXAMPLES = (
    "python recipes/sweep.py recipe=sac_pmoe env=Hopper-v4,Walker2d-v4 policy=pmoe,gaussian seed=0..4",
    "the same command goes on after any stop; with status=true it prints where the cells are",
)
HELP = help_text(SweepConfig, ABOUT, *EXAMPLES)
CONFIG_DIRECTORY = Path(__file__).parent
LONGEST_NAME = 120
ALWAYS_SAID = ("env", "policy", "seed")
"""The keys whose values stand first in a cell's name."""


@dataclass(frozen=True)
class TableCell:
    """One cell of the table.

    Args:
        name: of its directory; says what the cell is, whatever else is in the table.
        overrides: of its recipe, as given.
        changes: those of them that a run may get when it goes on.
        config: typed, resolved.
    """

    name: str
    overrides: tuple[str, ...]
    changes: tuple[str, ...]
    config: Any


def read_command(arguments: Sequence[str]) -> tuple[SweepConfig, list[Override]]:
    """The sweep's own config, and the overrides that describe its cells.

    Raises:
        UsageError: in one line, for what is not allowed.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
    except OverrideParseException as error:
        raise UsageError(hydra_line(error, SweepConfig)) from error
    own: dict[str, Any] = {}
    rest: dict[str, Override] = {}
    for override in overrides:
        key = str(override.key_or_group)
        if key.startswith("hydra.") or key in ("hydra", "resume"):
            raise UsageError(f"{override.input_line}: must be left out, every cell has a directory of its own")
        if override.is_delete() or override.package is not None or isinstance(override.value(), Glob | IntervalSweep):
            raise UsageError(f"{override.input_line}: must be written key=value, key=value,value or key=first..last")
        if key.split(".")[0] in OWN:
            if override.is_sweep_override():
                raise UsageError(f"{override.input_line}: must be one value, it holds for the whole sweep")
            _put(own, key, override.value())
        elif key in rest:
            raise UsageError(f"{override.input_line}: must be given once, as {key}=value,value")
        else:
            rest[key] = override
    return build(SweepConfig, own), list(rest.values())


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for part in groups:
        tree = tree.setdefault(part, {})
    tree[name] = value


def table(recipe_name: str, overrides: Sequence[Override]) -> list[TableCell]:
    """All cells, in the order of a product of the columns; cells that are the same run once.

    Every key of every cell is checked.

    Args:
        recipe_name: of the recipe that trains them.
        overrides: of that recipe.

    Raises:
        UsageError: in one line, for the first key that is not allowed.
    """
    recipe = RECIPES[recipe_name]
    columns = [list(_values(override)) for override in overrides]
    given = {str(override.key_or_group): len(column) > 1 for override, column in zip(overrides, columns, strict=True)}
    base = _composed(recipe_name, recipe, [column[0] for column in columns])
    cells: dict[str, TableCell] = {}
    for choice in itertools.product(*columns):
        config = _cell_config(recipe, base, choice)
        name = _name(recipe, config, given)
        cell = TableCell(name, tuple(choice), tuple(o for o in choice if _may_change(recipe, _key(o))), config)
        if (other := cells.setdefault(name, cell)).config != config:
            raise UsageError(
                f"{' '.join(choice)}: must differ from {' '.join(other.overrides)} in more than the signs "
                "that a directory cannot have"
            )
    return list(cells.values())


def _values(override: Override) -> Iterator[str]:
    """One override for each value: ``seed=0..2,7`` is four."""
    prefix, _, text = str(override.input_line).partition("=")
    if not override.is_sweep_override():
        ends = _ends(override.value())
        yield from [f"{prefix}={text}"] if ends is None else (f"{prefix}={number}" for number in ends)
        return
    sweep = override.value()
    elements = sweep.list if isinstance(sweep, ChoiceSweep) else [None] * len(list(override.sweep_string_iterator()))
    for element, shown in zip(elements, override.sweep_string_iterator(), strict=True):
        ends = _ends(element)
        yield from [f"{prefix}={shown}"] if ends is None else (f"{prefix}={number}" for number in ends)


def _ends(value: Any) -> range | None:
    """``0..4`` is 0, 1, 2, 3, 4."""
    found = re.fullmatch(r"(\d+)\.\.(\d+)", value) if isinstance(value, str) else None
    if found is None:
        return None
    first, last = int(found[1]), int(found[2])
    if last < first or last - first >= 100_000:
        raise UsageError(f"{value}: must be first..last, where last is not below first, and 100,000 values at most")
    return range(first, last + 1)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _may_change(recipe: Recipe, key: str) -> bool:
    return key.startswith(recipe.changeable)


def _composed(name: str, recipe: Recipe, overrides: Sequence[str]) -> DictConfig:
    """What Hydra makes of the overrides of the first cell; it knows which keys there are."""
    try:
        with initialize_config_dir(str(CONFIG_DIRECTORY), version_base="1.3"):
            return compose(name, list(overrides))
    except HydraException as error:
        raise UsageError(hydra_line(error, recipe.config_class, overrides)) from error


def _cell_config(recipe: Recipe, base: DictConfig, overrides: Sequence[str]) -> Any:
    """The typed config of a cell; Hydra takes half a second to compose one, so the keys are put into the first's."""
    config = copy.deepcopy(base)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        OmegaConf.update(config, str(override.key_or_group), override.value(), merge=False, force_add=True)
    typed = read(config, recipe.config_class)
    recipe.resolve(typed)
    return typed


def _name(recipe: Recipe, config: Any, given: Mapping[str, bool]) -> str:
    """``env=Hopper-v4_policy=pmoe_seed=0`` and the other keys that were given, but for those that a run may change.

    Args:
        recipe: of the cell.
        config: of the cell, resolved.
        given: by key, whether it is a column of the table.
    """
    order = [*ALWAYS_SAID, *described_keys(recipe.config_class)]
    said = [key for key, column in given.items() if column or not _may_change(recipe, key)]
    keys = sorted({*ALWAYS_SAID, *said}, key=lambda key: (order.index(key) if key in order else len(order), key))
    shown = {key: value for key in keys if (value := _value(config, key)) is not None}
    parts = [f"{key}={_plain(value)}" for key, value in shown.items()]
    name = "_".join(parts)
    if len(name) > LONGEST_NAME:
        code = hashlib.sha256(name.encode()).hexdigest()[:8]
        while len(parts) > 1 and len("_".join(parts)) > LONGEST_NAME - len(code) - 1:
            parts.pop()
        name = "_".join([*parts, code])[-LONGEST_NAME:]
    return name


def _value(config: Any, key: str) -> Any:
    group, _, name = key.partition(".")
    # an argument of the environment is an entry of a mapping
    if isinstance(entries := getattr(config, group), dict) and name:
        return entries.get(name)
    return get(config, key)


def _plain(value: Any) -> str:
    """A value in signs that every file system and every shell takes as they are."""
    return re.sub(r"[^\w.+-]+", "-", str(value), flags=re.ASCII).strip("-") or "-"
