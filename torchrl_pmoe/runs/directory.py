"""The directory of a run, and the one process that writes to it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torchrl.checkpoint import CheckpointRotation
from torchrl.trainers import Trainer

from torchrl_pmoe.runs.files import replace_file

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

    CHECKPOINTS = "checkpoints"
    """The directory of the checkpoints, ``checkpoint-<frames>`` each."""
    LOCK = ".lock"
    """The file that is locked. It names the process, and is there while the directory is owned."""
    FINISHED = "finished"
    """The file that a run writes last. It holds the number of frames that the run was asked for."""
    OUTPUTS = (
        "config.yaml",
        "metrics.csv",
        "checkpoints",
        "checkpoints.csv",
        "learning_curve.png",
        "model_card.md",
        "logs",
        "logger.json",
        "seed[0-9]*",
        "episodes.npz",
        "routes.csv",
        "finished",
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

    def finish(self, frames: int) -> None:
        """Note that a run has come to its end, as the last thing that the run does.

        Args:
            frames: that it was asked for.
        """
        replace_file(self.path / self.FINISHED, f"{frames}\n")

    def finished(self, frames: int) -> bool:
        """Whether the run in the directory has come to its end with this many frames, or with more.

        Args:
            frames: that it is to have.
        """
        try:
            return int((self.path / self.FINISHED).read_text(encoding="utf-8")) >= frames
        except (OSError, ValueError):
            return False

    def rotation(self, keep: int = 2) -> CheckpointRotation:
        """The checkpoints of the run, for ``Trainer(checkpoint_rotation=...)``.

        Args:
            keep: how many; older ones are removed.
        """
        return CheckpointRotation(self.path / self.CHECKPOINTS, keep_last=keep)

    def checkpoints(self) -> list[Path]:
        """All checkpoints, the newest first; whether they are whole is not looked at."""
        found = (self.path / self.CHECKPOINTS).glob("checkpoint-*")
        return sorted((path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)), reverse=True)

    def resume(self, trainer: Trainer, checkpoint: Path | None = None) -> Path | None:
        """Go on from a checkpoint, and clear away what the run that wrote it has left after it.

        What a kill has left half is removed; checkpoints of later frames are renamed to ``set-aside-...``.

        Args:
            trainer: with its :class:`~torchrl_pmoe.runs.VerifiedCheckpoint`, and with all hooks registered.
            checkpoint: the newest one, if not given.

        Returns:
            The checkpoint; ``None`` where there is none, which leaves the trainer at its start.

        Raises:
            CheckpointError: in one line, where it is damaged or does not fit.

        Examples:
            >>> directory = RunDirectory("runs/hopper")
            >>> with directory.own():
            ...     directory.resume(trainer)  # the same script starts a run, and goes on with it after a kill
            ...     trainer.train()
        """
        if checkpoint is None:
            checkpoint = next(iter(self.checkpoints()), None)
        if checkpoint is None:
            return None
        trainer.load_from_file(checkpoint)
        # in another directory than the checkpoint's there may be none yet
        for path in (self.path / self.CHECKPOINTS).glob(".checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.checkpoints():
            if path.name > checkpoint.name:
                aside = path.with_name(f"set-aside-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        return checkpoint

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
