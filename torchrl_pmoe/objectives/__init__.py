"""Losses that train mixture policies."""

from torchrl_pmoe.objectives.sac import PMOESACLoss, PMOETQCLoss

__all__ = ["PMOESACLoss", "PMOETQCLoss"]
