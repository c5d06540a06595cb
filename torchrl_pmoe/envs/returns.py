"""The returns of the latest training episodes, kept without a look at any value."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_latest"]


def keep_latest(kept: Tensor, count: Tensor, returns: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
    """Write the returns of episodes that have ended over the oldest ones.

    Args:
        kept: ``[R + 1]``, the latest ``R`` returns, nan where there is none yet. The last entry is not to be read: what
            has not ended is written there, so that no shape depends on the data.
        count: ``[]``, how many episodes have ended.
        returns: ``[M]``, in the order of time.
        ended: ``[M]``, which of them have ended; of more than ``R``, the last ones stay.

    Returns:
        ``kept`` and ``count`` as they are afterwards.
    """
    recent = len(kept) - 1
    counts = count + ended.cumsum(0)  # [M]
    stays = ended & (counts > counts[-1] - recent)
    place = torch.where(stays, (counts - 1) % recent, recent)
    return kept.scatter(0, place, returns), counts[-1]
