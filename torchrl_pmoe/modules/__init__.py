"""Networks and actors of mixture policies, and of those they are compared with."""

from torchrl_pmoe.modules.actors import BestOfExpertsActor, PMOEActor
from torchrl_pmoe.modules.baselines import GatingActor, MCPActor
from torchrl_pmoe.modules.heads import ClampedExp, MixtureParamExtractor
from torchrl_pmoe.modules.options import OptionActor

__all__ = [
    "BestOfExpertsActor",
    "ClampedExp",
    "GatingActor",
    "MCPActor",
    "MixtureParamExtractor",
    "OptionActor",
    "PMOEActor",
]
