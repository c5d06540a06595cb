"""Files that a kill leaves as they were or as they are to be."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: Path, content: str | bytes) -> None:
    """Put ``content`` in the place of a file, which is the old one or the new one at any time."""
    part = path.with_name(f".{path.name}.partial")
    with part.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
