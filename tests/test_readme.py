"""What the README and ``pyproject.toml`` say about packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_every_direct_dependency_has_a_tested_version():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    names = {Requirement(line).name for line in asked} - {project["name"]}
    lines = (line.split("#")[0].strip() for line in (ROOT / "recipes" / "constraints.txt").read_text().splitlines())
    tested = {found.name: found for found in map(Requirement, filter(None, lines))}
    assert names <= tested.keys()
    # the README's commands take them
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    installs = re.findall(r"pip install ([^&\n]*)-e", readme)
    assert len(installs) >= 2
    assert set(installs) == {"-c recipes/constraints.txt "}
    for line in asked:
        assert all(bound.operator != "==" for bound in Requirement(line).specifier), line
