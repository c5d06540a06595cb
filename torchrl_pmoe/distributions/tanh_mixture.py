"""The mixture of diagonal Gaussians behind one tanh and one affine map."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from torchrl_pmoe.distributions.mixture import NormalMixture
from torchrl_pmoe.distributions.routing import RoutingGradient, wide

__all__ = ["TanhNormalMixture"]

_LOG_2 = math.log(2.0)


@lru_cache(maxsize=1)
def _hermite(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of the mean of a standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return points, weights / weights.sum()


class TanhNormalMixture(NormalMixture):
    """:class:`NormalMixture` squashed by one tanh and an affine map into ``[low, high]``.

    Args:
        logits: of the router, ``[*B, K]``.
        loc: of every expert before the tanh, ``[*B, K, A]``.
        scale: of every expert before the tanh, ``[*B, K, A]``.
        low: lower bound of the action, a number or a tensor ``[A]``.
        high: upper bound of the action, a number or a tensor ``[A]``.

    Keyword Args:
        routing: see :class:`NormalMixture`, as for the other five.
        routing_coef: factor on the routing gradient.
        score: the log-density that goes with a sample.
        log_prob_routing: gradient of ``log_prob`` on the logits.
        temperature: of the Gumbel-Softmax draw.
        straight_through: whether that draw acts on one expert.

    Raises:
        ValueError: as :class:`NormalMixture`, and if the bounds have another shape or ``low >= high``.
    """

    arg_constraints = NormalMixture.arg_constraints
    has_rsample = True

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        low: float | Tensor = -1.0,
        high: float | Tensor = 1.0,
        *,
        routing: str | RoutingGradient = RoutingGradient.FREQUENCY,
        routing_coef: float = 1.0,
        score: Literal["mixture", "expert"] = "mixture",
        log_prob_routing: Literal["exact", "frequency"] = "exact",
        temperature: float = 1.0,
        straight_through: bool = True,
    ) -> None:
        super().__init__(
            logits,
            loc,
            scale,
            routing=routing,
            routing_coef=routing_coef,
            score=score,
            log_prob_routing=log_prob_routing,
            temperature=temperature,
            straight_through=straight_through,
        )
        self.low, self.high = low, high = self._check_bounds(low, high)
        self._half = (high - low) / 2
        self._middle = (high + low) / 2

    def _check_bounds(self, low: float | Tensor, high: float | Tensor) -> tuple[Any, Any]:
        """Both bounds as floats, or both as tensors beside ``loc``."""
        name, loc = type(self).__name__, self.loc
        if not isinstance(low, Tensor) and not isinstance(high, Tensor):
            try:
                low, high = float(low), float(high)
            except TypeError:
                raise ValueError(f"{name}: a bound must be a number or a tensor, got {low!r} and {high!r}.") from None
            if not low < high:
                raise ValueError(f"{name}: low must be below high, got {low} and {high}.")
            return low, high
        low, high = (
            bound.to(device=loc.device, dtype=loc.dtype) if isinstance(bound, Tensor) else loc.new_full((), bound)
            for bound in (low, high)
        )
        for bound in (low, high):
            if bound.shape not in ((), self.event_shape):
                raise ValueError(
                    f"{name}: a bound must be a number or a tensor of shape {tuple(self.event_shape)}, "
                    f"got {tuple(bound.shape)} for loc of shape {tuple(loc.shape)}."
                )
        # a look at the values costs a synchronisation on an accelerator and a graph break under the compiler
        if loc.device.type == "cpu" and not torch.compiler.is_compiling() and not (high > low).all():
            raise ValueError(f"{name}: low must be below high, got {low} and {high}.")
        return low, high

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "low": self.low, "high": self.high}

    @property
    def support(self) -> constraints.Constraint:
        """The box between the bounds."""
        return constraints.independent(constraints.interval(self.low, self.high), 1)

    def _squash(self, latent: Tensor) -> Tensor:
        action = latent.tanh()
        if isinstance(self._middle, float):
            if self._half != 1:
                action = action * self._half
            if self._middle == 0:
                return action
        else:
            action = action * self._half
        # rounding can put the sum one step outside
        return (action + self._middle).clamp(self.low, self.high)

    def _unsquash(self, value: Tensor) -> Tensor:
        limit = 1.0 - torch.finfo(value.dtype).eps / 2
        return ((wide(value) - self._middle) / self._half).clamp(-limit, limit).atanh()

    def _log_abs_det(self, latent: Tensor) -> Tensor:
        # log(1 - tanh(u)^2), written so that it does not underflow
        log_slope = 2.0 * (_LOG_2 - latent - F.softplus(-2.0 * latent)).sum(-1)
        if isinstance(self._half, Tensor):
            return log_slope + self._half.log().expand(self.event_shape).sum(-1)
        return log_slope if self._half == 1 else log_slope + self.event_shape[0] * math.log(self._half)

    def _expert_mean(self) -> Tensor:
        loc = wide(self.loc)
        nodes, weights = (loc.new_tensor(x) for x in _hermite(64))
        latent = loc.unsqueeze(-1) + wide(self.scale).unsqueeze(-1) * nodes
        return ((latent.tanh() * weights).sum(-1)).to(self.loc.dtype) * self._half + self._middle

    @property
    def mean(self) -> Tensor:
        """See :attr:`NormalMixture.mean`; never outside the bounds."""
        return super().mean.clamp(self.low, self.high)
