"""The record of a run: ``metrics.csv``, and the picture of it."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

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
class RunRecorder:
    """Writes ``metrics.csv``, one row an evaluation, and draws it when the run ends.

    Args:
        directory: the run's own.
        title: of the plot.
    """

    directory: Path
    title: str
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
        """Go on with an earlier ``metrics.csv`` after ``frames`` frames; rows beyond them are dropped."""
        self._mark = (frames, 0.0)
        if not self.path.is_file():
            return
        rows = read_rows(self.path)
        if not self.path.read_bytes().endswith(b"\n"):
            # torn: its last number may lack digits
            rows = rows[:-1]
        whole = [row for row in rows if _is_whole(row)]
        kept = [row for row in whole if int(row["frames"]) <= frames]
        if not kept:
            return
        self._fields = list(kept[0])
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._fields)
        writer.writeheader()
        writer.writerows(kept)
        replace(self.path, text.getvalue())
        self.last = {name: float(value) for name, value in kept[-1].items() if value}
        self._start -= self.last.get("wall_seconds", 0.0)
        self._paused += self.last.get("wall_seconds", 0.0)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; the first one fixes the columns."""
        text = io.StringIO(newline="")
        writer, mode = csv.writer(text), "a"
        if not self._fields:
            self._fields, mode = list(row), "w"
            writer.writerow(self._fields)
        writer.writerow([_cell(row.get(name)) for name in self._fields])
        # in one go: a row is there or not
        with self.path.open(mode, newline="") as file:
            file.write(text.getvalue())
        self.last = dict(row)

    def plot(self) -> Path | None:
        """Draw return and expert usage over frames."""
        return plot_run(self.path, self.title) if self._fields else None


def replace(path: Path, text: str) -> None:
    """Put ``text`` in the place of a file, which is the old one or the new one at any time."""
    part = path.with_name(f".{path.name}.partial")
    with part.open("w", newline="", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _is_whole(row: dict[str, str]) -> bool:
    """Whether every cell is there (csv gives None for the last ones of a torn row), and a number or empty."""
    try:
        for value in row.values():
            float("nan" if value == "" else value)
        return row["frames"].isdigit()
    except (KeyError, TypeError, ValueError):
        return False


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv`` as they stand there."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        # before Python 3.11, csv refuses a file with a zero byte, as a loss of power leaves them
        return list(csv.DictReader(line.replace("\0", "\ufffd") for line in file))


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The columns of a ``metrics.csv``; an empty cell is nan."""
    rows = read_rows(path)
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def plot_run(path: Path, title: str) -> Path:
    """Draw ``learning_curve.png`` beside a ``metrics.csv``."""
    from figures import mpl, subplots

    data = read_metrics(path)
    frames = data["frames"]
    usage = [data[name] for name in data if re.fullmatch(r"usage_\d+", name)]
    fig, axes = subplots(1 + bool(usage), 1, sharex=True, figsize=(7, 6 if usage else 4), squeeze=False)
    top = axes[0, 0]
    mean, std = data["return_mean"], data["return_std"]
    top.plot(frames, mean, color="#0072B2", marker="o" if len(frames) < 30 else None, markersize=3)
    top.fill_between(frames, mean - std, mean + std, color="#0072B2", alpha=0.2, linewidth=0)
    top.set(title=title, ylabel="evaluation return (mean ± std)")
    top.grid(alpha=0.3)
    if usage:
        bottom = axes[1, 0]
        # cividis keeps its order of lightness under every kind of colour blindness
        colors = mpl.colormaps["cividis"](np.linspace(0.05, 0.95, len(usage)))
        labels = [str(index) for index in range(len(usage))]
        bottom.stackplot(frames, usage, colors=colors, labels=labels, edgecolor="white", linewidth=0.5)
        bottom.set(ylabel="expert usage", ylim=(0, 1))
        bottom.margins(x=0)
        bottom.legend(title="expert", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    axes[-1, 0].set_xlabel("frames")
    target = path.with_name("learning_curve.png")
    fig.savefig(target, dpi=150)
    return target
