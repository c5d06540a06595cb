"""How a training ends: at its last frame, by a signal, or by an error."""

from __future__ import annotations

import errno
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torchrl.checkpoint import CheckpointError
from torchrl.envs import EnvBase
from torchrl.trainers import Trainer

from parts import process
from parts.errors import Interrupted, RunError, cause
from parts.resume import how_to_resume
from torchrl_pmoe.envs.making import worker_fault
from torchrl_pmoe.runs import CheckpointLog, RecordedEvaluation, RunDirectory
from torchrl_pmoe.trainers import NonFiniteError

__all__ = ["run_to_the_end"]

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


@contextmanager
def finish_on_signal(trainer: Trainer, received: list[int]) -> Iterator[None]:
    """On the first signal, stop after the current batch and write a checkpoint. On the second, stop at once.

    Args:
        trainer: the trainer to stop.
        received: gets the numbers of the signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in process.endings()}

    def handle(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if name == "SIGHUP":
            # a closing terminal sends it twice, itself and through its shell: it does not count as a second signal
            process.leave_terminal()
        elif any(signal.Signals(other).name != "SIGHUP" for other in received):
            usual = before[number]
            if callable(usual):
                usual(number, frame)
            else:
                # outside a recipe, in a user's script for instance, the system's own handler
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        received.append(number)
        trainer.request_stop(name)
        # print() is not allowed in the middle of another print(), and the reader may have ended by the same signal
        with suppress(OSError):
            line = f"\n{process.STOPPING}this batch is finished and a checkpoint written (once more: at once)\n"
            os.write(2, line.encode())
        trainer.optimization_stepper.stop_compiling()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def run_to_the_end(
    trainer: Trainer, run_dir: Path, recorded: RecordedEvaluation, received: list[int], draw: Callable[[], None]
) -> None:
    """Train, and draw the picture whatever ends the training.

    Args:
        trainer: with its hooks.
        run_dir: directory of the run.
        recorded: the evaluation. One that was interrupted before a resume runs first.
        received: gets the numbers of the signals that end the training.
        draw: draws the picture.

    Raises:
        Interrupted: if a signal has ended the training, after it has written a checkpoint.
        RunError: in one line, if something else has ended it. The last checkpoint stays whole.
    """
    trainer.checkpoint.on_saved = log = CheckpointLog(run_dir)
    # kept here because a collector drops it at its shutdown; its processes may have reported the error
    env = trainer.collector.env
    undrawn = None
    with finish_on_signal(trainer, received):
        try:
            _train(trainer, recorded, received)
        except Exception as error:
            # tensordict's context manager raises an error of its own after an interrupt
            if isinstance(error.__context__, KeyboardInterrupt):
                raise
            with suppress(Exception):
                # the next job of a sweep starts its own processes
                trainer.collector.shutdown()
            raise RunError(f"{what_ended(error, trainer, env, run_dir)}, {what_is_left(run_dir)}") from error
        finally:
            try:
                draw()
            # the error that ended the run matters more; a full disk, for instance, has no room for a picture
            except Exception as error:
                undrawn = error
    print(log)
    if undrawn is not None:
        warnings.warn(f"there is no picture of the run ({process.describe(undrawn)})", stacklevel=1)
    if received and (trainer.collected_frames < trainer.total_frames or recorded.given_up):
        raise Interrupted(received[0], f"at frame {trainer.collected_frames:,}, with a checkpoint")


def _train(trainer: Trainer, recorded: RecordedEvaluation, received: list[int]) -> None:
    if recorded.given_up:
        trainer._modules["periodic_evaluation"].now()
    if trainer.collected_frames < trainer.total_frames and not received:
        trainer.train()
        return
    if not recorded.given_up:
        trainer.save_trainer(force_save=True)
    trainer.collector.shutdown()


def what_ended(error: Exception, trainer: Trainer, env: EnvBase, run_dir: Path) -> str:
    """Why a training has ended, in one line; the traceback of an unexpected error goes to a file."""
    if isinstance(error, NonFiniteError):
        return str(error)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        reason = f"a file could not be written: {error.strerror}"
    elif isinstance(error, CheckpointError):
        reason = str(error)
    else:
        if (fault := worker_fault(env)) is not None:
            line, trace = fault
            error.__cause__ = RuntimeError(f"in a process of its own:\n{trace}")
        else:
            line = cause(error)
        reason = f"{line} ({process.keep_traceback(error, run_dir)})"
    return f"frame {trainer.collected_frames}: {reason}; the run stops here"


def what_is_left(run_dir: Path) -> str:
    """The last checkpoint of a run, and the command that resumes from it."""
    last = RunDirectory(run_dir).rotation().latest()
    if last is None:
        return "there is no checkpoint yet"
    return f"{last.name} is whole; {how_to_resume(run_dir)}"
