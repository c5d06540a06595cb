"""Networks and actors of mixture policies."""

from torchrl_pmoe.modules.actors import BestOfExpertsActor, MeanOfDrawnExpertActor, PMOEActor
from torchrl_pmoe.modules.heads import ClampedExp, MixtureParamExtractor

__all__ = ["BestOfExpertsActor", "ClampedExp", "MeanOfDrawnExpertActor", "MixtureParamExtractor", "PMOEActor"]
