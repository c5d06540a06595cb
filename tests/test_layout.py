"""The import graph: arrows point down only, there are no circles, and a config ends in the recipe."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BELOW = {
    "distributions": (),
    "modules": ("distributions",),
    "objectives": ("distributions", "modules"),
    "baselines": ("distributions", "modules", "objectives"),
    "envs": (),
    "trainers": ("distributions", "modules", "objectives", "baselines", "envs"),
    "runs": ("distributions", "modules", "objectives", "baselines", "envs", "trainers"),
    "collectors": ("envs", "runs"),
}
"""Packages of the library, and those that each may import."""

CONFIG = ("hydra", "omegaconf", "pydantic")
"""What reads configs: the recipes do, the library takes arguments."""

STORES = "torchrl_pmoe.configs"
"""Entries for the configs of TorchRL's own trainers, which are Hydra's; nothing else in the library imports it."""

WITHOUT_CIRCLES = ("torchrl_pmoe", "recipes")
"""Folders whose modules must not import each other in a circle."""


def module_name(path: Path, root: Path) -> str:
    """Name under which ``path`` is imported where ``root`` is on the path."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def only_for_types(node: ast.AST) -> bool:
    """Whether this is ``if TYPE_CHECKING:``, whose imports never run."""
    if not isinstance(node, ast.If):
        return False
    name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
    return name == "TYPE_CHECKING"


def imported(node: ast.AST, package: str) -> Iterator[str]:
    """Every name that code imports, in functions too; ``from a import b`` gives ``a.b``.

    Args:
        node: the code.
        package: that it stands in, for relative imports.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        start = ".".join([*up, *([node.module] if node.module else [])])
        yield from (f"{start}.{alias.name}" for alias in node.names)
    else:
        children = node.orelse if only_for_types(node) else ast.iter_child_nodes(node)
        for child in children:
            yield from imported(child, package)


@cache
def graph(folder: str) -> dict[str, set[str]]:
    """For every module of a folder the names that it imports: the folder's own modules, and top names of others."""
    # the recipes are scripts, which import each other from their own folder
    root = ROOT / folder if folder == "recipes" else ROOT
    files = {module_name(path, root): path for path in sorted((ROOT / folder).rglob("*.py"))}

    def target(name: str, package: str) -> str:
        if folder == "recipes":
            name = name.removeprefix("recipes.")
            # a benchmark that is run as a script finds its neighbours first
            neighbour = f"{package}.{name.partition('.')[0]}"
            name = neighbour if neighbour in files else name
        while name and name not in files:
            shorter = name.rpartition(".")[0]
            if not shorter:
                return name
            name = shorter
        return name

    found = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[name] = {target(other, package) for other in imported(tree, package)} - {name}
    return found


def package_of(module: str) -> str:
    """``modules`` of ``torchrl_pmoe.modules.heads``; the library itself is the empty name."""
    return module.split(".")[1] if "." in module else ""


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, the first one also at the end."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in arrows:
            return None
        for other in sorted(arrows[module]):
            found = follow(other, [*path, module])
            if found:
                return found
        done.add(module)
        return None

    for module in arrows:
        found = follow(module, [])
        if found:
            return found
    return None


def test_every_package_of_the_library_has_its_place():
    folders = {path.parent.name for path in (ROOT / "torchrl_pmoe").glob("*/__init__.py")}
    assert folders == set(BELOW)


def test_arrows_of_the_library_point_down():
    wrong = [
        f"{module} -> {other}"
        for module, others in graph("torchrl_pmoe").items()
        for other in others
        # torchrl_pmoe itself puts all of it together, and so does what Hydra stores
        if package_of(module) in BELOW and other.partition(".")[0] == "torchrl_pmoe"
        if package_of(other) not in (package_of(module), *BELOW[package_of(module)])
    ]
    assert not wrong, f"arrows that point up: {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("folder", WITHOUT_CIRCLES)
def test_no_modules_import_each_other_in_a_circle(folder):
    found = circle(graph(folder))
    assert found is None, f"a circle: {' -> '.join(found or [])}"


def test_distributions_need_torch_alone():
    allowed = {"torch", "numpy", "torchrl_pmoe", *sys.stdlib_module_names}
    wrong = {
        f"{module} -> {other}"
        for module, others in graph("torchrl_pmoe").items()
        for other in others
        if package_of(module) == "distributions" and other.partition(".")[0] not in allowed
    }
    assert not wrong, f"more than torch: {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("folder", ["torchrl_pmoe", "recipes"])
def test_a_config_ends_in_the_recipe(folder):
    """The library and the recipes' parts take arguments; ``launch`` alone knows Hydra."""
    wrong = {
        f"{module} -> {other}"
        for module, others in graph(folder).items()
        for other in others
        if (folder == "torchrl_pmoe" or module.startswith("parts.")) and module not in ("parts.launch", STORES)
        if other.partition(".")[0] in CONFIG or other == STORES
    }
    assert not wrong, f"reads configs: {', '.join(sorted(wrong))}"


def test_a_circle_and_an_import_in_a_function_are_found():
    """What the tests above stand on."""
    code = "import a.b\ndef f():\n    from .c import d\nif TYPE_CHECKING:\n    import e\nelse:\n    import g"
    assert list(imported(ast.parse(code), "top.middle")) == ["a.b", "top.middle.c.d", "g"]
    assert circle({"a": {"b", "torch"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": {"torch"}}) is None
