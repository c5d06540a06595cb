"""Losses that train mixture policies, and one that trains several agents in one call."""

from torchrl_pmoe.objectives.ppo import PMOEClipPPOLoss
from torchrl_pmoe.objectives.sac import PMOESACLoss, PMOETQCLoss
from torchrl_pmoe.objectives.scoring import score_proposals
from torchrl_pmoe.objectives.stacked import StackedLoss, StackedPolicy

__all__ = ["PMOEClipPPOLoss", "PMOESACLoss", "PMOETQCLoss", "StackedLoss", "StackedPolicy", "score_proposals"]
