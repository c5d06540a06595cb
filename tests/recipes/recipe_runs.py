"""Starting a recipe as a user does, and reading what it leaves."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import common  # noqa: E402

CLOCKS = {"wall_seconds", "frames_per_second"}


def start(recipe: str, *args: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RECIPES / f"{recipe}.py"), *args],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def resolve(recipe: ModuleType, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(RECIPES / "config"), version_base="1.3"):
        cfg = compose(recipe.__name__, overrides=list(overrides))
    recipe.resolve_config(cfg)
    return cfg


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless_rows(run: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows(run)]


def assert_refused(recipe: ModuleType, override: str, allowed: str) -> None:
    key, value = override.split("=", 1)
    with pytest.raises(common.UsageError) as error:
        resolve(recipe, override)
    line = str(error.value)
    assert line.startswith(f"{key}={value}: must be ")
    assert allowed in line
    assert "\n" not in line


def assert_only_a_progress_bar(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    bars = [line for line in re.split(r"[\r\n]|\x1b\[A", done.stderr) if line.strip()]
    assert all("frames/s" in line or "?frames" in line or line.startswith("ranking") for line in bars), done.stderr
    return bars


def assert_one_line(done: subprocess.CompletedProcess[str], begins: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {begins}")
