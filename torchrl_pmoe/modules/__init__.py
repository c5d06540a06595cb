"""Networks and actors of mixture policies."""

from torchrl_pmoe.modules.actors import BestOfExpertsActor, MeanOfDrawnExpertActor, PMOEActor
from torchrl_pmoe.modules.heads import ClampedExp, MixtureParamExtractor
from torchrl_pmoe.modules.networks import ExpertOptions

__all__ = [
    "BestOfExpertsActor",
    "ClampedExp",
    "ExpertOptions",
    "MeanOfDrawnExpertActor",
    "MixtureParamExtractor",
    "PMOEActor",
]
