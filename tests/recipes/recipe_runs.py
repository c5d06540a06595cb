"""Starting a recipe as a user does, and reading what it leaves."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import common  # noqa: E402

SMALL_PPO = [
    "env=Pendulum-v1",
    "total_frames=512",
    "network.hidden_sizes=[16,16]",
    "collector.frames_per_batch=128",
    "loss.num_minibatches=4",
    "loss.ppo_epochs=2",
    "logger.eval_interval=256",
    "logger.eval_episodes=2",
    "checkpoint.interval=256",
]
try:
    import torchrl._torchrl  # noqa: F401

    HAS_EXTENSION = True
except ImportError:
    HAS_EXTENSION = False
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


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def in_background(recipe, *args, directory):
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / f"{recipe}.py"), *args],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell in the background has its children ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def composed(recipe: ModuleType, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(RECIPES / "config"), version_base="1.3"):
        return compose(recipe.__name__, overrides=list(overrides))


def resolve(recipe: ModuleType, *overrides: str) -> DictConfig:
    cfg = composed(recipe, *overrides)
    recipe.resolve_config(cfg)
    return cfg


def run_here(recipe: ModuleType, run: Path, *overrides: str) -> None:
    """One training in this process: seconds less than :func:`start`, and no command line."""
    cfg = resolve(recipe, "device=cpu", "logger.progress_bar=false", *overrides)
    recipe.train(cfg, run)


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


def about_line(printed: str) -> str:
    """What a run prints before its first frame; after its last there is a line on its checkpoints."""
    first, last = printed.splitlines()
    assert re.fullmatch(r"\d+ checkpoints?: [\d.]+ MiB in [\d.]+ s, [\d.]+% of the run's time", last), printed
    return first


def assert_a_line_and_a_progress_bar(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    first = about_line(done.stdout)
    assert re.fullmatch(r"Pendulum-v1: policy .* [\d,]+ parameters.*", first), done.stdout
    bars = [line for line in re.split(r"[\r\n]|\x1b\[A", done.stderr) if line.strip()]
    assert all("frames/s" in line or "?frames" in line for line in bars), done.stderr
    return bars


def assert_one_line(done: subprocess.CompletedProcess[str], begins: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {begins}")
