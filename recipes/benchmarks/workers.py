"""Trainings that take turns: each in a process of its own, stopped between its turns.

A worker is the benchmark's own script, called with ``--worker NAME``. It calls :class:`Turns` after every batch of
frames; that tells the parent when the warm-up is over, waits to be called, and reports the speed of the frames since.
Imports, compilation and the frames of the warm-up are not in the figures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from time import perf_counter
from typing import IO, Any, NoReturn

import torch
from hydra.errors import HydraException
from rounds import Finished, alternate, stop
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from parts.errors import UsageError

READY, REFUSED, SPEED, GO = "ready", "refused", "speed", "go"


class MissingPackage(Exception):
    """A comparison needs a package that is not installed: one line that says how to install it."""


class WorkerLost(Exception):
    """A training ended by itself; what it had to say is on stderr."""


class Turns:
    """The worker's side.

    Args:
        warm_up: frames before the first turn.
        frames: of a turn, at least.
    """

    def __init__(self, warm_up: int, frames: int) -> None:
        self.warm_up, self.frames = warm_up, frames
        # what a training prints must not get between these lines
        self._out, sys.stdout = sys.stdout, sys.stderr
        self._mark = (0, 0.0)

    def __call__(self, collected: int) -> None:
        """Called after every batch with the number of frames so far.

        Raises:
            Finished: when the parent wants no more.
        """
        if not self._mark[1]:
            if collected >= self.warm_up:
                self._say(READY)
                self._wait(collected)
            return
        begun, since = self._mark
        if collected - begun >= self.frames:
            self._say(f"{SPEED} {(collected - begun) / (perf_counter() - since)}")
            self._wait(collected)

    def refuse(self, why: object) -> None:
        """Tell the parent, in one line, why there will be no figures."""
        self._say(f"{REFUSED} {' '.join(str(why).split())}")

    def _say(self, line: str) -> None:
        print(line, file=self._out, flush=True)

    def _wait(self, collected: int) -> None:
        if sys.stdin.readline().strip() != GO:
            raise Finished
        self._mark = (collected, perf_counter())


class Worker:
    """The parent's side of one training.

    Args:
        name: which variant.
        command: of the process; ``--worker NAME`` is added.
        threads: of PyTorch and what it calls.
    """

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        environment = {**os.environ, **{f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL")}}
        self._process = subprocess.Popen(
            [sys.executable, *command, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pipe(self._process.stdin).close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def warm(self) -> str | None:
        """Wait for the end of the warm-up; why there will be no figures, or ``None``."""
        word, _, rest = self._read().partition(" ")
        return rest if word == REFUSED else None

    def turn(self) -> float:
        """Frames per second of the next turn."""
        pipe = self._pipe(self._process.stdin)
        print(GO, file=pipe, flush=True)
        return float(self._read().removeprefix(SPEED))

    def _read(self) -> str:
        line = self._pipe(self._process.stdout).readline().strip()
        if not line:
            raise WorkerLost(f"{self.name}: the training ended by itself, with status {self._process.wait()}")
        return line

    @staticmethod
    def _pipe(pipe: IO[Any] | None) -> IO[Any]:
        assert pipe is not None
        return pipe


def serve(args: argparse.Namespace, train: Callable[[argparse.Namespace, Turns], None]) -> NoReturn:
    """Train as the worker ``args.worker``, and end the process.

    Args:
        args: of the script, with ``frames``, ``warm_up`` and ``threads``.
        train: runs one variant and calls the turns with the number of frames after every batch.
    """
    turns = Turns(args.warm_up, args.frames)
    torch.set_num_threads(args.threads)
    with suppress(Finished, KeyboardInterrupt):
        try:
            train(args, turns)
        except (UsageError, HydraException, MissingPackage) as error:
            turns.refuse(error)
    sys.exit(0)


def measure(
    script: Path, names: Sequence[str], arguments: Sequence[str] | None, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Frames per second by variant and round; a variant that cannot run is left out with one line that says why.

    Args:
        script: of the benchmark.
        names: the variants.
        arguments: of the command line, ``None`` for those of the process.
        args: what they say.
    """
    command = [str(script), *(sys.argv[1:] if arguments is None else arguments)]
    try:
        return _take_turns(command, names, args)
    except WorkerLost as error:
        stop(error)
    except KeyboardInterrupt:
        sys.exit(130)


def _take_turns(command: Sequence[str], names: Sequence[str], args: argparse.Namespace) -> dict[str, list[float]]:
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        # one after the other, so that no warm-up takes another's processor
        for name in tqdm(names, desc="starting and warming up", unit="variant"):
            worker = stack.enter_context(Worker(name, command, args.threads))
            why = worker.warm()
            if why is None:
                workers[name] = worker
            else:
                tqdm.write(f"{name}: left out, {why}", file=sys.stderr)
        return alternate({name: worker.turn for name, worker in workers.items()}, args.rounds, unit="turn")
