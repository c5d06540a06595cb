"""Probabilistic Mixture-of-Experts policies (PMOE, arXiv 2104.09122) as native TorchRL components."""

from torchrl_pmoe.baselines import DACLoss, DoubleGAE, GatingActor, MCPActor, OptionActor
from torchrl_pmoe.distributions import NormalMixture, RoutingGradient, TanhNormalMixture
from torchrl_pmoe.envs import BatchedTargetReachingEnv, TargetReachingEnv
from torchrl_pmoe.modules import (
    BestOfExpertsActor,
    CommittedExpertsActor,
    MeanOfDrawnExpertActor,
    MixtureParamExtractor,
    PMOEActor,
)
from torchrl_pmoe.objectives import PMOEClipPPOLoss, PMOESACLoss, PMOETQCLoss

__version__ = "0.1.0"

__all__ = [
    "BatchedTargetReachingEnv",
    "BestOfExpertsActor",
    "CommittedExpertsActor",
    "DACLoss",
    "DoubleGAE",
    "GatingActor",
    "MCPActor",
    "MeanOfDrawnExpertActor",
    "MixtureParamExtractor",
    "NormalMixture",
    "OptionActor",
    "PMOEActor",
    "PMOEClipPPOLoss",
    "PMOESACLoss",
    "PMOETQCLoss",
    "RoutingGradient",
    "TanhNormalMixture",
    "TargetReachingEnv",
]
