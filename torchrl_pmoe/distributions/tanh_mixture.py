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
from torchrl_pmoe.distributions.routing import RoutingGradient, upcast

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
        low: lower bound of the action: a number, a tensor ``[A]``, or for agents with bounds of their own a tensor
            that broadcasts to ``[*B, A]``.
        high: upper bound of the action, as ``low``.

    Keyword Args:
        routing: see :class:`NormalMixture` for this and all that follow.
        routing_coef: factor on the routing gradient.
        score: the log-density that goes with a sample.
        log_prob_routing: gradient of ``log_prob`` on the logits.
        temperature: of the Gumbel-Softmax draw.
        straight_through: whether that draw acts on one expert.
        validate_args: whether the values of the parameters are checked.

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
        validate_args: bool | None = None,
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
            validate_args=validate_args,
        )
        self.low, self.high = low, high = self._check_bounds(low, high)
        self._half = (high - low) / 2
        self._middle = (high + low) / 2
        self._bounds_per_agent = isinstance(self._half, Tensor) and self._half.ndim > 1

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
        full = self.batch_shape + self.event_shape
        for bound in (low, high):
            fits = bound.ndim <= len(full) and all(
                size in (1, whole) for size, whole in zip(reversed(bound.shape), reversed(full), strict=False)
            )
            if bound.shape and (not fits or bound.shape[-1:] != self.event_shape):
                raise ValueError(
                    f"{name}: a bound must be a number or a tensor of shape {tuple(self.event_shape)}, or one for "
                    f"each agent that fits {tuple(full)}, got {tuple(bound.shape)} for loc of shape {tuple(loc.shape)}."
                )
        # reading the values would cost a synchronisation on an accelerator and a graph break under the compiler
        if loc.device.type == "cpu" and not torch.compiler.is_compiling() and not (high > low).all():
            raise ValueError(f"{name}: low must be below high, got {low} and {high}.")
        return low, high

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "low": self.low, "high": self.high}

    @property
    def support(self) -> constraints.Constraint:
        """The box between ``low`` and ``high``."""
        return constraints.independent(constraints.interval(self.low, self.high), 1)

    def _align(self, bound: Any, per_expert: bool) -> Any:
        """A bound, or a value made of bounds, that broadcasts with ``[..., A]``, or ``[..., K, A]`` per expert."""
        insert = per_expert and self._bounds_per_agent and isinstance(bound, Tensor) and bound.ndim > 0
        return bound.unsqueeze(-2) if insert else bound  # [*B, A] to [*B, 1, A]

    def _squash(self, latent: Tensor, *, per_expert: bool = False) -> Tensor:
        low, high, half, middle = (
            self._align(bound, per_expert) for bound in (self.low, self.high, self._half, self._middle)
        )
        action = latent.tanh()
        if isinstance(middle, float):
            if half != 1:
                action = action * half
            if middle == 0:
                return action
        else:
            action = action * half
        # rounding can put the sum just outside the bounds
        return (action + middle).clamp(low, high)

    def _unsquash(self, value: Tensor) -> Tensor:
        # the largest number below one, so that an action that was rounded onto its bound has a finite latent value
        limit = 1.0 - torch.finfo(value.dtype).eps / 2
        return ((upcast(value) - self._middle) / self._half).clamp(-limit, limit).atanh()

    def _log_abs_det(self, latent: Tensor, *, per_expert: bool = False) -> Tensor:
        # log(1 - tanh(u)^2), written so that it does not underflow, summed over dimensions: [..., A] to [...]
        log_slope = 2.0 * (_LOG_2 - latent - F.softplus(-2.0 * latent)).sum(-1)
        half = self._align(self._half, per_expert)
        if isinstance(half, Tensor):
            return log_slope + half.log().expand(*half.shape[:-1], *self.event_shape).sum(-1)
        return log_slope if half == 1 else log_slope + self.event_shape[0] * math.log(half)

    def _expert_mean(self) -> Tensor:
        loc = upcast(self.loc)
        nodes, weights = (loc.new_tensor(x) for x in _hermite(64))
        latent = loc.unsqueeze(-1) + upcast(self.scale).unsqueeze(-1) * nodes  # [*B, K, A, nodes]
        mean = ((latent.tanh() * weights).sum(-1)).to(self.loc.dtype)  # [*B, K, A]
        return mean * self._align(self._half, True) + self._align(self._middle, True)

    @property
    def mean(self) -> Tensor:
        """See :attr:`NormalMixture.mean`; never outside the bounds."""
        return super().mean.clamp(self.low, self.high)
