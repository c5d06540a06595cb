"""Optimisation steppers, hooks and diagnostics for :class:`torchrl.trainers.Trainer`."""

from torchrl_pmoe.trainers.diagnostics import mixture_diagnostics, saturation
from torchrl_pmoe.trainers.hooks import (
    FiniteBatch,
    FiniteLoss,
    FlatReplay,
    NonFiniteError,
    PeriodicEvaluation,
    ProgressBar,
)
from torchrl_pmoe.trainers.steppers import FusedOptimizationStepper

__all__ = [
    "FiniteBatch",
    "FiniteLoss",
    "FlatReplay",
    "FusedOptimizationStepper",
    "NonFiniteError",
    "PeriodicEvaluation",
    "ProgressBar",
    "mixture_diagnostics",
    "saturation",
]
