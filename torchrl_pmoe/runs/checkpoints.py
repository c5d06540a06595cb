"""Checkpoints that are whole or not there, are checked before they are read, and run no code when they are."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.checkpoint import Checkpoint, CheckpointAdapter, CheckpointError, CheckpointLoadResult
from torchrl.data import ReplayBuffer

__all__ = ["POLICIES", "ReplayRowsAdapter", "StateFileAdapter", "StateReader", "VerifiedCheckpoint"]

POLICIES = "agents"
"""The component that holds the policies of a run."""
SUMS = "SHA256SUMS"
_STATE = "state.pt"
_ROWS = "rows-{:015d}-{:015d}.npz"
# anything else is not of ours, and never opened
_OURS = re.compile(r"manifest\.json|components/[^/]+/(state\.pt|rows-\d{15}-\d{15}\.npz)")


class VerifiedCheckpoint(Checkpoint):
    """TorchRL's :class:`~torchrl.checkpoint.Checkpoint` for runs that may be killed, on disks that may fail.

    A checkpoint is written beside its place, flushed to the disk with the SHA-256 of every file (``sha256sum -c
    SHA256SUMS`` checks it too) and renamed: whatever happens, it is there as a whole or not at all. It is checked
    before anything is read from it. Components are tensors, numbers and texts alone: whatever a file says, no code of
    it runs. Replay buffers are written in increments (:class:`ReplayRowsAdapter`).

    Args:
        **components: objects with ``state_dict`` and ``load_state_dict``, or replay buffers.

    Attributes:
        last: the checkpoint that was saved or loaded last.
        on_saved: called after every save with its path, its seconds and the bytes that it has written; those of earlier
            checkpoints that it shares do not count.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     source, target = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        ...     path = VerifiedCheckpoint(net=source).save(f"{directory}/checkpoint")
        ...     loaded = VerifiedCheckpoint(net=target).load(path).loaded
        >>> loaded, torch.equal(source.weight, target.weight)
        ({'net'}, True)
    """

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self.last: Path | None = None
        self.on_saved: Callable[[Path, float, int], None] = lambda path, seconds, size: None
        self._sums: dict[tuple[int, int, int, int], str] = {}
        self.register_adapter(object, StateFileAdapter())
        self.register_adapter(ReplayBuffer, ReplayRowsAdapter(lambda: self.last))

    def save(self, path: str | Path, **kwargs: Any) -> Path:
        """Save the components as a directory, which appears when it is complete and on the disk.

        One that is there already is moved aside for that moment: only for a new ``path`` is there none without a
        whole checkpoint.

        Raises:
            CheckpointError: where the disk is full or cannot be written; what was there stays.
        """
        began = perf_counter()
        destination = Path(path).expanduser().absolute()
        staged = destination.with_name(f".{destination.name}.partial")
        aside = destination.with_name(f".{destination.name}.aside")
        try:
            shutil.rmtree(staged, ignore_errors=True)
            super().save(staged, **kwargs)
            new = self._seal(staged)
            if destination.exists():
                os.replace(destination, aside)
            try:
                os.replace(staged, destination)
            except OSError:
                if aside.exists():
                    os.replace(aside, destination)
                raise
            _flush(destination.parent)
            shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            raise CheckpointError(f"{destination.name} could not be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self.last = destination
        self.on_saved(destination, perf_counter() - began, new)
        return destination

    def load(self, path: str | Path, **kwargs: Any) -> CheckpointLoadResult:
        """Check a checkpoint, then restore the components.

        A component with a method ``after_load`` has it called when all of them are restored.

        Raises:
            CheckpointError: as :meth:`verify`, and where a component is missing or does not fit.
        """
        self.verify(path)
        loaded = super().load(path, **kwargs)
        for name in loaded.loaded:
            getattr(self.components[name], "after_load", lambda: None)()
        self.last = Path(path).expanduser().absolute()
        # what the next checkpoint links from here is neither read nor counted again
        self._sums = {_identity(self.last / name): digest for name, digest in _read_sums(self.last / SUMS)}
        return loaded

    @classmethod
    def verify(cls, path: str | Path) -> dict[str, Any]:
        """The manifest of a checkpoint whose files are all as they were written.

        Raises:
            CheckpointError: in one line, for anything else.
        """
        root = Path(path).expanduser().absolute()
        try:
            listed = dict(_read_sums(root / SUMS))
        except OSError as error:
            raise CheckpointError(f"{root.name} has no readable {SUMS}: it is no checkpoint of this package") from error
        found = {file.relative_to(root).as_posix() for file in root.rglob("*") if not file.is_dir()} - {SUMS}
        for name in sorted(found | set(listed) | {"manifest.json"}):
            if not _OURS.fullmatch(name):
                raise CheckpointError(f"{root.name} holds {name}, which is no file of a checkpoint")
            if name not in listed:
                raise CheckpointError(f"{root.name}: {SUMS} is damaged, {name} is not in it")
            file = root / name
            if name not in found or file.is_symlink() or not file.is_file():
                raise CheckpointError(f"{root.name}: {name} is missing")
            try:
                digest, empty = _digest(file), not file.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{root.name}: {name} cannot be read ({error.strerror})") from error
            if digest != listed[name]:
                how = "empty" if empty else "damaged (its SHA-256 is another)"
                raise CheckpointError(f"{root.name}: {name} is {how}")
        try:
            manifest = cls.manifest(root)
        except (OSError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{root.name}: manifest.json cannot be read") from error
        held = {f"{record['path']}/{file}" for record in manifest["components"].values() for file in record["files"]}
        if held != set(listed) - {"manifest.json"}:
            raise CheckpointError(f"{root.name}: manifest.json names other files than there are")
        return manifest

    def _seal(self, root: Path) -> int:
        """List the files with their checksums and flush them; bytes of those that are new."""
        lines, size, known = [], 0, {}
        for file in sorted(file for file in root.rglob("*") if file.is_file()):
            identity = _identity(file)
            digest = self._sums.get(identity)
            if digest is None:
                digest = _digest(file)
                _flush(file)
                size += file.stat().st_size
            known[identity] = digest
            lines.append(f"{digest}  {file.relative_to(root).as_posix()}\n")
        self._sums = known
        (root / SUMS).write_text("".join(lines), encoding="utf-8")
        _flush(root / SUMS)
        for directory in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            _flush(directory)
        return size


class StateReader:
    """A component that takes whatever state there is, and may be saved again."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """What was read."""
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it."""
        self.state = state_dict


class StateFileAdapter(CheckpointAdapter):
    """Saves the ``state_dict`` of a component in one file, and reads it with PyTorch's ``weights_only``.

    TorchRL's own adapter lets tensordict unpickle what it finds beside the tensors.
    """

    adapter_id = "torchrl_pmoe.state_file"

    def save(self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Write ``state.pt`` below ``path``."""
        path.mkdir(parents=True, exist_ok=True)
        # in memory first: PyTorch's own writer reports a full disk without saying so
        buffer = io.BytesIO()
        torch.save(component.state_dict(*args, **kwargs), buffer)
        (path / _STATE).write_bytes(buffer.getbuffer())

    def load(
        self,
        component: Any,
        path: Path,
        *,
        map_location: Any,
        tensor_load_kwargs: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Read ``state.pt``, onto the CPU unless ``map_location`` says otherwise."""
        del tensor_load_kwargs
        component.load_state_dict(_read_state(path / _STATE, map_location), *args, **kwargs)


class ReplayRowsAdapter(CheckpointAdapter):
    """Saves the rows of a round-robin replay buffer that are new since the last checkpoint.

    The rows of earlier checkpoints come in as hard links (copies, on file systems without them): every checkpoint
    directory is complete, may be copied or deleted by itself, and shares its bytes with the others. A file holds the
    rows ``start`` to ``stop`` of all that were ever written; what the buffer has overwritten is linked no more.

    Args:
        last: the checkpoint before, if there is one.
        rows_per_file: at most.
    """

    adapter_id = "torchrl_pmoe.replay_rows"

    def __init__(self, last: Callable[[], Path | None], rows_per_file: int = 100_000) -> None:
        self.last = last
        self.rows_per_file = rows_per_file

    def save(self, component: ReplayBuffer, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Write or link the rows that the buffer holds, and the state of writer and sampler."""
        del args, kwargs
        path.mkdir(parents=True, exist_ok=True)
        stop = component.write_count
        start = stop - len(component)
        first = start
        for file, begin, end in _rows_files(self.last(), start, stop):
            if begin <= first < end and _link(file, path / file.name):
                first = end
        for begin in range(first, stop, self.rows_per_file):
            end = min(begin + self.rows_per_file, stop)
            index = torch.arange(begin, end) % component.storage.max_size
            _write_rows(path / _ROWS.format(begin, end), component.storage.get(index))
        sampler, slots = component.sampler.state_dict(), torch.arange(start, stop) % component.storage.max_size
        # trees of priorities are objects of TorchRL's extension: of these, the numbers of the rows in order
        trees = {key: torch.as_tensor(tree[slots]) for key, tree in sampler.items() if key.endswith("_tree")}
        state = {"start": start, "stop": stop, "sampler": {**sampler, **trees}}
        StateFileAdapter().save(_Constant(state), path, args=(), kwargs={})

    def load(
        self,
        component: ReplayBuffer,
        path: Path,
        *,
        map_location: Any,
        tensor_load_kwargs: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Fill the buffer as it was, row by row in its place.

        Raises:
            ValueError: where the buffer has another size, or rows are missing.
        """
        del map_location, tensor_load_kwargs, args, kwargs
        state = _read_state(path / _STATE, "cpu")
        start, stop = state["start"], state["stop"]
        if stop - start > component.storage.max_size:
            raise ValueError(f"it has {stop - start} rows, the buffer room for {component.storage.max_size}")
        component.empty()
        component.writer.load_state_dict({"_cursor": start % component.storage.max_size, "_write_count": start})
        first = start
        for file, begin, end in _rows_files(path.parents[1], start, stop):
            if begin <= first < end:
                component.extend(_read_rows(file)[first - begin :])
                first = end
        if first != stop:
            raise ValueError(f"its rows {first} to {stop} are missing")
        sampler, fresh = state["sampler"], component.sampler.state_dict()
        for key, value in sampler.items():
            if key.endswith("_tree"):
                sampler[key] = fresh[key]
                sampler[key][torch.arange(start, stop) % component.storage.max_size] = value
            elif isinstance(value, Tensor):
                # an order that is drawn without replacement lies, and is drawn again, where the rows are
                sampler[key] = value.to(component.storage.device)
        component.sampler.load_state_dict(sampler)


class _Constant:
    """A state without an object."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state_dict = lambda: state


def _rows_files(checkpoint: Path | None, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
    """Files of a checkpoint with rows between ``start`` and ``stop``, in order."""
    if checkpoint is None:
        return
    for file in sorted(checkpoint.glob("components/*/rows-*.npz")):
        begin, end = (int(part) for part in file.stem.split("-")[1:])
        if begin < stop and end > start:
            yield file, begin, end


def _write_rows(file: Path, rows: TensorDictBase) -> None:
    names: list[tuple[Sequence[str], str]] = []
    arrays: dict[str, np.ndarray] = {}
    for key, value in rows.items(include_nested=True, leaves_only=True):
        names.append(((key,) if isinstance(key, str) else key, str(value.dtype).removeprefix("torch.")))
        # NumPy has no bfloat16: bytes have every type
        arrays[str(len(arrays))] = value.contiguous().cpu().unsqueeze(-1).view(torch.uint8).numpy()
    with file.open("xb") as opened:
        np.savez(opened, allow_pickle=False, names=np.array(json.dumps(names)), **arrays)


def _read_rows(file: Path) -> TensorDict:
    with np.load(file, allow_pickle=False) as found:
        entries: dict[Any, Tensor] = {}
        for index, (key, dtype) in enumerate(json.loads(str(found["names"]))):
            kind = getattr(torch, dtype, None)
            if not isinstance(kind, torch.dtype):
                raise ValueError(f"{file.name} has a type {dtype!r}, which PyTorch has not")
            entries[tuple(key)] = torch.from_numpy(found[str(index)]).view(kind).squeeze(-1)
    number = len(next(iter(entries.values())))
    rows = TensorDict({}, [number])
    for key, value in entries.items():
        rows.set(key, value)
    return rows


def _read_state(file: Path, map_location: Any) -> Any:
    # the device that wrote the file need not be there
    where = "cpu" if map_location is None else map_location
    return torch.load(io.BytesIO(file.read_bytes()), map_location=where, weights_only=True)


def _read_sums(file: Path) -> Iterator[tuple[str, str]]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        yield name, digest


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _identity(file: Path) -> tuple[int, int, int, int]:
    """The same for every hard link of a file that has not changed."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _link(source: Path, target: Path) -> bool:
    """Whether ``target`` is now ``source``."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        return False
    except OSError:
        shutil.copy2(source, target)
    return True


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
