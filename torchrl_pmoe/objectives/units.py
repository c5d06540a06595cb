"""The units of an action, which an entropy in nats depends on."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from tensordict.nn import ProbabilisticTensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded, TensorSpec
from torchrl.modules import TanhNormal

from torchrl_pmoe.distributions import TanhNormalMixture

__all__ = ["ActionUnits", "action_units", "mixture_of"]


@dataclass(frozen=True)
class ActionUnits:
    """The bounds in which a policy's densities are measured.

    Args:
        log_half_widths: ``sum_i log((high_i - low_i) / 2)``, ``[]`` or one for each agent, ``[*agents]``.
        action_size: ``A``.
        bounded: whether the policy stays between the bounds.
    """

    log_half_widths: Tensor
    action_size: int
    bounded: bool

    @property
    def largest_entropy(self) -> float:
        """Entropy of the uniform distribution between the bounds, the smallest of all agents'; infinite without."""
        if not self.bounded:
            return math.inf
        return self.log_half_widths.min().item() + self.action_size * math.log(2.0)

    def target_entropy(self, owner: str) -> Tensor:
        """The entropy of ``-A`` nats for actions in ``[-1, 1]``, in the action's own units, ``[]`` or ``[*agents]``.

        Raises:
            ValueError: if a lower bound is not below its upper bound.
        """
        if not self.log_half_widths.isfinite().all():
            raise ValueError(f"{owner}: target_entropy='auto' needs bounds with low below high in every dimension.")
        return self.log_half_widths - self.action_size


def mixture_of(actor: nn.Module) -> tuple[Any, dict[str, Any]]:
    """The class and the options of an actor's distribution, also of a ``functools.partial``."""
    heads = [module for module in actor.modules() if isinstance(module, ProbabilisticTensorDictModule)]
    if not heads:
        return None, {}
    kind: Any = heads[-1].distribution_class
    kwargs = dict(heads[-1].distribution_kwargs or {})
    while isinstance(kind, functools.partial):
        kind, kwargs = kind.func, {**kind.keywords, **kwargs}
    return kind, kwargs


def action_units(actor: nn.Module, spec: TensorSpec | None) -> ActionUnits | None:
    """The units of the actions that ``actor`` draws.

    The bounds are those of its distribution if it has some, otherwise those of the spec. Without bounds, or with
    infinite ones, the half-width is taken as 1.

    Args:
        actor: its last probabilistic module names the distribution.
        spec: of the action, if there is one.

    Returns:
        ``None`` if neither tells the size of the action.
    """
    kind, kwargs = mixture_of(actor)
    bounded = isinstance(kind, type) and issubclass(kind, TanhNormalMixture | TanhNormal)
    half = torch.ones(())
    if bounded:
        low, high = (torch.as_tensor(kwargs.get(name, bound)) for name, bound in (("low", -1.0), ("high", 1.0)))
        half = (high.cpu().double() - low.cpu().double()) / 2
    elif isinstance(spec, Bounded) and (spec.space.high - spec.space.low).isfinite().all():
        half = (spec.space.high.cpu().double() - spec.space.low.cpu().double()) / 2
    shape = spec.shape if spec is not None and spec.shape else half.shape
    if not shape:
        return None
    log_half = half.expand(*half.shape[:-1], shape[-1]).log().sum(-1)  # [*agents, A] to [*agents]
    # one number where all agents have the same bounds
    if (log_half == log_half.flatten()[0]).all():
        log_half = log_half.flatten()[0]
    return ActionUnits(log_half.to(torch.get_default_dtype()), shape[-1], bounded)
