"""Trainings in processes of their own, some at a time; all of them end with this one."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any

from tqdm import tqdm

from parts import process
from parts.errors import Interrupted


def run_in_workers(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], num_workers: int, bar: tqdm) -> None:
    """Call ``function`` with the arguments of every job, ``num_workers`` at a time.

    Args:
        function: found by its name in a new process.
        jobs: arguments.
        num_workers: processes.
        bar: moved on by every job that is done.

    Raises:
        Interrupted: where a signal has ended it; each worker has written a checkpoint.
        Exception: the first that a job has raised; the other workers have written a checkpoint.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_begin_worker) as pool:
        waiting = list(jobs)
        try:
            running = {pool.submit(_call, function, job) for job in waiting[:num_workers]}
            del waiting[:num_workers]
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for finished in done:
                    finished.result()
                    bar.update()
                    if waiting:
                        running.add(pool.submit(_call, function, waiting.pop(0)))
        except BaseException as error:
            # each writes a checkpoint and is waited for
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(error, KeyboardInterrupt | SystemExit):
                status = 128 + signal.SIGTERM if isinstance(error, SystemExit) else 128 + signal.SIGINT
                number = int(getattr(error, "code", None) or status) - 128
                raise Interrupted(number, "with a checkpoint of every training") from None
            raise


def _begin_worker() -> None:
    """In a worker: what a terminal sends is for the parent; its SIGTERM ends the job, not the process with its locks.

    A parent that was killed sends nothing: then the worker tells itself.
    """
    process.speak_plainly()
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Call it; where nobody waits for the result any more, the worker ends."""
    try:
        function(*arguments)
    finally:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)
