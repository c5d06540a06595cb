"""Losses that train mixture policies, and the option framework that they are compared with."""

from torchrl_pmoe.objectives.dac import DACLoss
from torchrl_pmoe.objectives.double_gae import DoubleGAE
from torchrl_pmoe.objectives.ppo import PMOEClipPPOLoss
from torchrl_pmoe.objectives.sac import PMOESACLoss, PMOETQCLoss
from torchrl_pmoe.objectives.stacked import StackedLoss, StackedPolicy

__all__ = ["DACLoss", "DoubleGAE", "PMOEClipPPOLoss", "PMOESACLoss", "PMOETQCLoss", "StackedLoss", "StackedPolicy"]
