"""How the process of a recipe begins, what it says, and how it ends: in one line, whatever ends it.

Imports nothing but the standard library: PyTorch takes seconds, and :func:`begin` stands before that.
"""

from __future__ import annotations

import os
import platform
import signal
import stat
import sys
import tempfile
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

TRACEBACK = "error.log"
"""The file of a run directory that holds the traceback of what ended the run."""
STOPPING = "stopping: "
"""The beginning of the line that a recipe prints as soon as a signal has told it to stop."""


def begin() -> None:
    """Let an interrupt or an error end the imports of a script in one line; its first statement."""
    # a shell in the background has its children ignore interrupts
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    sys.excepthook = _unexpected
    speak_plainly()


def ready() -> None:
    """The imports are done: an interrupt raises ``KeyboardInterrupt`` again, other ends raise ``SystemExit``.

    An exit, not a death: what runs beside this process must end with it.
    """
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in endings():
        if number != signal.SIGINT:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def endings() -> list[int]:
    """The signals that ask this process to end, without those that it was started to ignore (``nohup``)."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def leave_terminal() -> None:
    """Say nothing more to a terminal that was closed: writing to it would be an error."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def speak_plainly() -> None:
    """Print whatever a line holds on any terminal, and a warning in one line."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(message)}\n"


def printable(message: object) -> str:
    """One line, whatever a value holds."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(message))


def complain(line: str) -> None:
    """Print one line on stderr, if there is somebody to read it."""
    with suppress(OSError, ValueError):
        print(printable(line), file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    """An error in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


def keep_traceback(error: BaseException, directory: Path | None = None) -> str:
    """Write the traceback of an error into a file, and say into which.

    Args:
        error: that ends the run.
        directory: where ``error.log`` goes; a new file among the temporary ones if that cannot be.
    """
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    text = f"{' '.join(sys.argv)}\nPython {platform.python_version()}, {platform.platform()}\n\n{text}"
    if directory is not None and directory.is_dir():
        with suppress(OSError):
            (directory / TRACEBACK).write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"the traceback is in {_shortest(directory / TRACEBACK)}"
    with suppress(OSError):
        descriptor, name = tempfile.mkstemp(prefix="torchrl_pmoe-", suffix=f"-{TRACEBACK}")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        return f"the traceback is in {name}"
    return "there is no room for the traceback"


def _shortest(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _interrupted(number: int, frame: FrameType | None) -> None:
    """While modules are imported there is nothing to leave in order, and a traceback through them tells nothing."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    del kind, trace
    if isinstance(error, BrokenPipeError):
        # whoever reads the output has had enough (--help | head); the interpreter would complain at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return
    line = _renderer_at_fault(error) or _place_at_fault(error) or f"{describe(error)}; {keep_traceback(error)}"
    complain(f"error: {line}")


def _renderer_at_fault(error: BaseException) -> str | None:
    """The line for a value of ``MUJOCO_GL`` with which MuJoCo, and TorchRL with it, cannot be imported."""
    given = os.environ.get("MUJOCO_GL")
    frames = traceback.walk_tb(error.__traceback__)
    if given is None or not any(f"{os.sep}mujoco{os.sep}" in frame.f_code.co_filename for frame, _ in frames):
        return None
    return f"MUJOCO_GL={given}: must be egl, osmesa, glfw or disable, and installed ({describe(error)})"


def _place_at_fault(error: BaseException) -> str | None:
    """The line for a variable that names a place where nothing can be written (``TORCHINDUCTOR_CACHE_DIR``)."""
    place = str(error.filename) if isinstance(error, OSError) and error.filename is not None else None
    for name, value in os.environ.items():
        if place is not None and name.endswith("_DIR") and value and place.startswith(value):
            return f"{name}={value}: must be a directory that can be written ({os.strerror(error.errno)})"  # type: ignore[attr-defined]
    return None
