"""Starting a recipe as a user does, and reading what it leaves."""

from __future__ import annotations

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import fork_server
import pytest
from fork_server import AVAILABLE, RECIPES, Forked, environment
from hydra import compose, initialize_config_dir

sys.path.insert(0, str(RECIPES))

from config.dac import DACConfig
from config.ppo_pmoe import PPOConfig
from config.sac_many_seeds import ManySeedsConfig
from config.sac_pmoe import SACConfig
from config.target_reaching import TargetReachingConfig
from parts import resume
from parts.errors import UsageError
from parts.launch import read

CONFIGS = {
    "sac_pmoe": SACConfig,
    "sac_many_seeds": ManySeedsConfig,
    "ppo_pmoe": PPOConfig,
    "dac": DACConfig,
    "target_reaching": TargetReachingConfig,
}

SMALL_PPO = [
    "env=Pendulum-v1",
    "total_frames=512",
    "network.hidden_sizes=[16,16]",
    "collector.frames_per_batch=128",
    "loss.num_minibatches=4",
    "loss.ppo_epochs=2",
    "logger.eval_interval=256",
    "logger.eval_episodes=2",
    "logger.eval_max_steps=40",
    "checkpoint.interval=256",
]
try:
    import torchrl._torchrl  # noqa: F401

    HAS_EXTENSION = True
except ImportError:
    HAS_EXTENSION = False
CLOCKS = {"wall_seconds", "frames_per_second"}


def launch(
    recipe: str, *args: str, directory: Path, stdout: IO[bytes], stderr: IO[bytes], anew: bool = False
) -> subprocess.Popen[bytes] | Forked:
    """Start a recipe as ``python recipes/NAME.py ARGUMENTS`` does, in a process that leads a session of its own.

    Args:
        recipe: its name.
        args: the command's arguments.
        directory: where the command is given.
        stdout: where it prints.
        stderr: where it prints errors and progress bars.
        anew: have Python start, and import all, for this command alone. That takes six seconds more, and is for tests
            of what happens there; else the process is forked from one that has imported the recipes.
    """
    command = [str(RECIPES / f"{recipe}.py"), *args]
    if AVAILABLE and not anew:
        return fork_server.shared().start(
            command, cwd=directory, env=environment(), files=(stdout.fileno(), stderr.fileno())
        )
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=directory,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        # a shell in the background has its children ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


class Running:
    """A recipe that runs; what :class:`subprocess.Popen` has of it, and ``communicate`` as often as one likes."""

    def __init__(self, process: subprocess.Popen[bytes] | Forked, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self._process, self._files = process, (stdout, stderr)
        self.args, self.pid = process.args, process.pid
        self.poll, self.send_signal = process.poll, process.send_signal

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed by its end, on stdout and stderr."""
        self._process.wait(timeout)
        stdout, stderr = (os.pread(file.fileno(), 2**24, 0).decode() for file in self._files)
        return stdout, stderr.replace("\r", "\n")  # a progress bar goes back to the line's start


@contextmanager
def in_background(recipe: str, *args: str, directory: Path, anew: bool = False) -> Iterator[Running]:
    """A recipe that runs meanwhile, see :func:`launch`; it and what it has started are killed at the end."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        running = Running(
            launch(recipe, *args, directory=directory, stdout=stdout, stderr=stderr, anew=anew), stdout, stderr
        )
        try:
            yield running
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.communicate()


def wait_for(condition: Callable[[], object], running: Running) -> None:
    """Wait until it holds; the run must not end before."""
    while not condition():
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)


def start(recipe: str, *args: str, directory: Path, anew: bool = False) -> subprocess.CompletedProcess[str]:
    """A recipe from its start to its end; see :func:`launch`."""
    with in_background(recipe, *args, directory=directory, anew=anew) as running:
        printed = running.communicate()
        return subprocess.CompletedProcess(running.args, running.returncode or 0, *printed)


def composed(recipe: ModuleType, *overrides: str) -> Any:
    with initialize_config_dir(str(RECIPES / "config"), version_base="1.3"):
        cfg = compose(recipe.__name__, overrides=list(overrides))
    return read(cfg, CONFIGS[recipe.__name__])


def resolve(recipe: ModuleType, *overrides: str) -> Any:
    cfg = composed(recipe, *overrides)
    recipe.resolve(cfg)
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
    with pytest.raises(UsageError) as error:
        resolve(recipe, override)
    line = str(error.value)
    assert line.startswith(f"{key}={value}: must be ")
    assert allowed in line
    assert "\n" not in line


def about_line(printed: str) -> str:
    """What a run is about, as it says before its first frame; where it is and what to do next stand around that."""
    where, first, *_, cost, returned, again, watch, plot, longer = printed.splitlines()
    assert where.startswith("run directory: ")
    assert re.fullmatch(r"\d+ checkpoints?: [\d.]+ MiB in [\d.]+ s, [\d.]+% of the run's time", cost), printed
    assert returned.startswith("return of the last evaluation (mean ± std over episodes): ")
    assert again.startswith(where)
    directory = where.removeprefix("run directory: ")
    for line, script in ((watch, "evaluate.py"), (plot, "plot.py")):
        _, _, _, python, path, *run = shlex.split(line)
        assert (Path(python).name[:6], Path(path).name, run) == ("python", script, [directory])
    assert resume.resume_argument(Path(directory)) in longer
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
