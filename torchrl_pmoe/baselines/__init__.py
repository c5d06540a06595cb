"""The policies that mixtures are compared with: experts blended into one Gaussian, and the option framework."""

from torchrl_pmoe.baselines.blended import GatingActor, MCPActor
from torchrl_pmoe.baselines.dac import DACLoss
from torchrl_pmoe.baselines.double_gae import DoubleGAE
from torchrl_pmoe.baselines.gaussian import GaussianActor
from torchrl_pmoe.baselines.options import OptionActor

__all__ = ["DACLoss", "DoubleGAE", "GatingActor", "GaussianActor", "MCPActor", "OptionActor"]
