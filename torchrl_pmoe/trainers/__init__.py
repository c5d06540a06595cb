"""Optimisation steppers, hooks and diagnostics for :class:`torchrl.trainers.Trainer`."""

from torchrl_pmoe.trainers.diagnostics import mixture_diagnostics, policy_diagnostics, saturation
from torchrl_pmoe.trainers.hooks import (
    EpisodeReturns,
    ExpertCollapse,
    FlatReplay,
    MinibatchReplay,
    PeriodicEvaluation,
    ProgressBar,
)
from torchrl_pmoe.trainers.nonfinite import FiniteBatch, FiniteLoss, NonFiniteError
from torchrl_pmoe.trainers.steppers import FusedOptimizationStepper

__all__ = [
    "EpisodeReturns",
    "ExpertCollapse",
    "FiniteBatch",
    "FiniteLoss",
    "FlatReplay",
    "FusedOptimizationStepper",
    "MinibatchReplay",
    "NonFiniteError",
    "PeriodicEvaluation",
    "ProgressBar",
    "mixture_diagnostics",
    "policy_diagnostics",
    "saturation",
]
