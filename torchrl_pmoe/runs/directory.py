"""The directory of a run, and the one process that writes to it."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["DirectoryInUseError", "RunDirectory"]

# what flock says where a file system has none, or a network file system whose server keeps none
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class DirectoryInUseError(RuntimeError):
    """Another process owns the directory."""


class RunDirectory:
    r"""A directory that one process at a time writes to.

    Args:
        path: of the directory.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     directory = RunDirectory(f"{parent}/run")
        ...     with directory.own() as path:
        ...         _ = (path / "metrics.csv").write_text("frames\n")
        ...     directory.outputs()
        ['metrics.csv']
    """

    LOCK = ".lock"
    """The file that is locked. It names the process, and is there while the directory is owned."""
    OUTPUTS = (
        "config.yaml",
        "metrics.csv",
        "checkpoints",
        "checkpoints.csv",
        "learning_curve.png",
        "logs",
        "logger.json",
        "seed[0-9]*",
        "episodes.npz",
        "routes.csv",
    )
    """What a run writes, as patterns."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def outputs(self) -> list[str]:
        """The names of what a run has left in the directory; none where a new run may begin.

        Raises:
            OSError: where the directory cannot be read.
        """
        if not self.path.is_dir():
            return []
        names = [path for path in self.path.iterdir() if any(path.match(pattern) for pattern in self.OUTPUTS)]
        return sorted(path.name for path in names)

    @contextmanager
    def own(self) -> Iterator[Path]:
        """Own the directory, which is made where it is not there, and removed again if nothing was put into it.

        The lock is the kernel's (``flock``). It ends with this process, whatever ends it, and is never a child's. Where
        the file system has no locks, a warning says so, and nothing guards the directory.

        Yields:
            The path of the directory.

        Raises:
            DirectoryInUseError: at once, where another process owns the directory; its message names that process.
            OSError: where the directory cannot be made or written to.
        """
        made = [place for place in (self.path, *self.path.parents) if not place.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / self.LOCK
        identity: list[os.stat_result] = []

        def sign(descriptor: int) -> None:
            identity.append(os.fstat(descriptor))
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

        lock = FileLock(file, blocking=False, fallback_to_soft=False, on_acquired=sign)
        try:
            try:
                lock.acquire()
            except Timeout:
                raise DirectoryInUseError(f"{self._owner() or 'another process'} uses it") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                file.unlink(missing_ok=True)
                warnings.warn(
                    f"{self.path}: its file system has no locks ({error.strerror}); "
                    "let no second process write to this directory",
                    RuntimeWarning,
                    stacklevel=3,
                )
            yield self.path
        finally:
            # removed while it is locked, and only if it is still the one: a directory may be moved while a run is on
            with suppress(OSError):
                if identity and os.path.samestat(identity[0], file.stat()):
                    file.unlink()
            lock.release()
            for place in made:
                with suppress(OSError):
                    place.rmdir()

    def _owner(self) -> str:
        try:
            return (self.path / self.LOCK).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""
