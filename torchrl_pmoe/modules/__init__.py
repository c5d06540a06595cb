"""Networks and actors of mixture policies."""

from torchrl_pmoe.modules.actors import BestOfExpertsActor, CommittedExpertsActor, MeanOfDrawnExpertActor, PMOEActor
from torchrl_pmoe.modules.heads import ClampedExp, MixtureParamExtractor
from torchrl_pmoe.modules.networks import ExpertOptions

__all__ = [
    "BestOfExpertsActor",
    "ClampedExp",
    "CommittedExpertsActor",
    "ExpertOptions",
    "MeanOfDrawnExpertActor",
    "MixtureParamExtractor",
    "PMOEActor",
]
