"""Files that a kill leaves as they were or as they are to be."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: Path, text: str) -> None:
    """Put ``text`` in the place of a file, which is the old one or the new one at any time."""
    part = path.with_name(f".{path.name}.partial")
    with part.open("w", newline="", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
