"""The records of a run: ``metrics.csv``, one row an evaluation, and ``checkpoints.csv``, one row a checkpoint."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from torchrl_pmoe.runs.files import replace_file

__all__ = ["CLOCKS", "CheckpointLog", "MetricsFile", "read_metrics", "why_unreadable"]

MIB = 2**20
CLOCKS = ("wall_seconds", "frames_per_second")
"""The columns that are another time's in every run."""


@dataclass
class CheckpointLog:
    """What checkpoints cost: ``checkpoints.csv``, one row for each that was written.

    Args:
        directory: the run's own.
    """

    directory: Path
    number: int = 0
    seconds: float = 0.0
    size: int = 0
    _start: float = field(default_factory=time.perf_counter)

    def __call__(self, path: Path, seconds: float, size: int) -> None:
        """Add a row.

        Args:
            path: of the checkpoint.
            seconds: that it took.
            size: bytes that were written.
        """
        self.number, self.seconds, self.size = self.number + 1, self.seconds + seconds, self.size + size
        file = self.directory / "checkpoints.csv"
        header = "" if file.is_file() else "frames,seconds,written_mib,total_mib\r\n"
        total = sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
        frames = int(path.name.rsplit("-", 1)[-1])
        with file.open("a", newline="") as opened:
            opened.write(f"{header}{frames},{seconds:.3f},{size / MIB:.3f},{total / MIB:.3f}\r\n")

    def __str__(self) -> str:
        share = self.seconds / max(time.perf_counter() - self._start, 1e-9)
        one = "checkpoint" if self.number == 1 else "checkpoints"
        return f"{self.number} {one}: {self.size / MIB:.1f} MiB in {self.seconds:.1f} s, {share:.1%} of the run's time"


@dataclass
class MetricsFile:
    """Writes ``metrics.csv``, one row an evaluation.

    Args:
        directory: of the run.

    Attributes:
        last: the row that was written last, or the last one that an earlier run has left.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     metrics = MetricsFile(Path(directory))
        ...     metrics.write({**metrics.clock(100), "return_mean": 1.5})
        ...     read_metrics(metrics.path)["return_mean"].tolist()
        [1.5]
    """

    directory: Path
    last: dict[str, float] = field(default_factory=dict)
    _fields: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)
    _paused: float = 0.0
    _mark: tuple[int, float] = (0, 0.0)

    @property
    def path(self) -> Path:
        """Where the rows go."""
        return self.directory / "metrics.csv"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the frames per second."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def clock(self, frames: int) -> dict[str, float]:
        """Wall seconds since the start, and training frames per second since the last call."""
        wall = time.perf_counter() - self._start
        training = wall - self._paused
        last_frames, last_training = self._mark
        self._mark = (frames, training)
        speed = (frames - last_frames) / max(training - last_training, 1e-9)
        return {"frames": frames, "wall_seconds": round(wall, 2), "frames_per_second": round(speed, 1)}

    def resume(self, frames: int) -> None:
        """Go on with an earlier ``metrics.csv`` after ``frames`` frames.

        Rows beyond them are dropped, and a last row that a kill has torn; everything else stays, known or not.
        """
        self._mark = (frames, 0.0)
        header, rows = read_table(self.path) if self.path.is_file() else ([], [])
        if not header:
            return
        place = header.index("frames")
        rows = [row for row in rows if (_number(row, place) or 0) <= frames]
        self._fields = header
        _write_table(self.path, [header, *rows])
        known = [row for row in rows if _number(row, place) is not None]
        if known:
            cells = ((name, _number(known[-1], index)) for index, name in enumerate(header))
            self.last = {name: value for name, value in cells if value is not None}
        self._start -= self.last.get("wall_seconds", 0.0)
        self._paused += self.last.get("wall_seconds", 0.0)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; columns that the file does not have yet are added to it."""
        new = [name for name in row if name not in self._fields]
        if new:
            before = read_table(self.path)[1] if self._fields else []
            widths = [len(self._fields) - len(cells) for cells in before]
            padded = [[*cells, *[""] * (width + len(new))] for cells, width in zip(before, widths, strict=True)]
            self._fields = [*self._fields, *new]
            _write_table(self.path, [self._fields, *padded])
        text = io.StringIO(newline="")
        csv.writer(text).writerow([_cell(row.get(name)) for name in self._fields])
        # in one go: a row is there or not
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())
        self.last = dict(row)


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _number(row: Sequence[str], place: int) -> float | None:
    """The number in a cell, ``None`` where there is none."""
    try:
        number = float(row[place])
    except (IndexError, ValueError):
        return None
    return None if math.isnan(number) else number


def why_unreadable(path: Path) -> str | None:
    """Why a run cannot go on with a ``metrics.csv``, if it cannot."""
    try:
        header, rows = read_table(path)
    except (OSError, csv.Error) as error:
        return f"cannot be read ({error})"
    if (header or rows) and "frames" not in header:
        return f"must have a column frames, and commas between its columns; it begins with {','.join(header)[:60]!r}"
    return None


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a ``metrics.csv`` as they stand there, but for a last row that a kill has torn.

    Both are empty where not even the header is whole.
    """
    # a byte-order mark is what some editors put before it
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "\ufffd")
    if "\n" not in text:
        return [], []
    with io.StringIO(text, newline="") as file:
        header, *rows = csv.reader(file)
    if rows and _is_torn(header, rows[-1], ended=text.endswith("\n")):
        rows.pop()
    return header, rows


def _is_torn(header: Sequence[str], row: Sequence[str], *, ended: bool) -> bool:
    """Whether a last row is the beginning of one, perhaps with what a loss of power has put behind it."""
    damaged = any("\ufffd" in cell for cell in row)
    ours = not row or not row[0] or row[0][0].isdigit() or damaged
    return ours and (damaged or not ended or len(row) < len(header))


def _write_table(path: Path, rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    replace_file(path, text.getvalue())


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of a ``metrics.csv``; a cell without a number is nan, a row without frames is left out."""
    header, rows = read_table(path)
    rows = [row for row in rows if _number(row, header.index("frames")) is not None]
    cells = [[_number(row, place) for row in rows] for place in range(len(header))]
    return {name: np.array(column, dtype=float) for name, column in zip(header, cells, strict=True)}
