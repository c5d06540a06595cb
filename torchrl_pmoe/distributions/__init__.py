"""Mixture distributions and the gradient estimators of their router."""

from torchrl_pmoe.distributions.mixture import ExpertProposals, NormalMixture, TanhNormalMixture
from torchrl_pmoe.distributions.routing import RoutingGradient

__all__ = ["ExpertProposals", "NormalMixture", "RoutingGradient", "TanhNormalMixture"]
