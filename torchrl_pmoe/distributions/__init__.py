"""Mixture distributions and the gradient estimators of their router."""

from torchrl_pmoe.distributions.mixture import NormalMixture
from torchrl_pmoe.distributions.proposals import ExpertProposals
from torchrl_pmoe.distributions.routing import ESTIMATORS, RoutingGradient, ScoredProposals
from torchrl_pmoe.distributions.tanh_mixture import TanhNormalMixture

__all__ = [
    "ESTIMATORS",
    "ExpertProposals",
    "NormalMixture",
    "RoutingGradient",
    "ScoredProposals",
    "TanhNormalMixture",
]
