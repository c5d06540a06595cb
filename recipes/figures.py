"""Pictures in files: drawn by Agg, whatever backend ``MPLBACKEND`` names, and without matplotlib's list of figures."""

from __future__ import annotations

import os
from typing import Any

# matplotlib refuses to be imported where a notebook has left a backend there that is not installed
_given = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
finally:
    if _given is not None:
        os.environ["MPLBACKEND"] = _given

__all__ = ["mpl", "subplots"]


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **kwargs: Any) -> tuple[Figure, Any]:
    """A figure and its axes, as ``matplotlib.pyplot.subplots`` makes them.

    Args:
        rows: of axes.
        columns: of axes.
        figsize: width and height in inches.
        **kwargs: of ``Figure.subplots``.
    """
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **kwargs)
