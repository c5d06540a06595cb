"""Losses that train mixture policies."""

from torchrl_pmoe.objectives.ppo import PMOEClipPPOLoss
from torchrl_pmoe.objectives.sac import PMOESACLoss, PMOETQCLoss

__all__ = ["PMOEClipPPOLoss", "PMOESACLoss", "PMOETQCLoss"]
