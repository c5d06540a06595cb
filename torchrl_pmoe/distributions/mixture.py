"""Mixtures of diagonal Gaussians whose backward pass trains the router."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, constraints

from torchrl_pmoe.distributions.routing import (
    RoutingGradient,
    check_routing,
    frequency_log_prob,
    route_by_slope,
    wide,
)

__all__ = ["ExpertProposals", "NormalMixture", "TanhNormalMixture"]

_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
_LOG_2 = math.log(2.0)


def _take_expert(x: Tensor, index: Tensor) -> Tensor:
    """``x[..., index, :]`` for ``x`` ``[*B, K, A]`` and ``index`` ``[*B]``."""
    shape = torch.broadcast_shapes(x.shape[:-2], index.shape)
    index = index.expand(shape)[..., None, None].expand(*shape, 1, x.shape[-1])
    return x.expand(*shape, *x.shape[-2:]).gather(-2, index).squeeze(-2)


@lru_cache(maxsize=1)
def _hermite(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of the mean of a standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return points, weights / weights.sum()


class NormalMixture(Distribution):
    r"""Mixture of diagonal Gaussians, reparameterised, with the routing gradients of PMOE.

    .. math:: \log \pi(a|s) = \log \sum_k w_k \prod_i N(a_i; \mu_{ki}, \sigma_{ki}),\quad w = \mathrm{softmax}(logits)

    ``rsample`` and ``rsample_and_log_prob`` draw one expert and reparameterise its Gaussian. What the drawn index
    cannot carry back, the routing gradient does (arXiv 2104.09122, Definition 3.1); see
    :func:`~torchrl_pmoe.distributions.routing.route_by_slope`.

    Args:
        logits: of the router, ``[*B, K]``.
        loc: of every expert, ``[*B, K, A]``.
        scale: standard deviation of every expert, positive, ``[*B, K, A]``.

    Keyword Args:
        routing: ``"frequency"``, ``"soft_frequency"`` or ``"none"``: what the router learns from the slopes that come
            back through a reparameterised sample.
        routing_coef: factor on that gradient; 2 where a loss draws for states and next states in one call, as
            ``REDQLoss`` does.
        score: the log-density that goes with a sample: ``"mixture"``, the policy's own, or ``"expert"``, that of the
            drawn expert alone (the authors' SAC code).
        log_prob_routing: gradient of :meth:`log_prob` on the logits: ``"exact"`` (responsibilities) or
            ``"frequency"`` (see :func:`~torchrl_pmoe.distributions.routing.frequency_log_prob`).
        temperature: of the Gumbel-Softmax draw; unused by the other routings.

    Raises:
        ValueError: if shapes do not fit together, or an option is not one of those above.
        NotImplementedError: for ``routing="gumbel_softmax"``, which is not built yet.

    Examples:
        >>> dist = NormalMixture(torch.zeros(3, 2), torch.randn(3, 2, 4), torch.ones(3, 2, 4))
        >>> action, log_prob = dist.rsample_and_log_prob()
        >>> action.shape, log_prob.shape
        (torch.Size([3, 4]), torch.Size([3]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    has_rsample = True

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        *,
        routing: str | RoutingGradient = RoutingGradient.FREQUENCY,
        routing_coef: float = 1.0,
        score: Literal["mixture", "expert"] = "mixture",
        log_prob_routing: Literal["exact", "frequency"] = "exact",
        temperature: float = 1.0,
    ) -> None:
        name = type(self).__name__
        if loc.ndim < 2 or loc.shape != scale.shape:
            raise ValueError(
                f"{name}: loc and scale must both be [*batch, num_experts, action_size], "
                f"got {tuple(loc.shape)} and {tuple(scale.shape)}."
            )
        if logits.shape != loc.shape[:-1]:
            raise ValueError(
                f"{name}: logits must be [*batch, num_experts] where loc is [*batch, num_experts, action_size], "
                f"got {tuple(logits.shape)} and {tuple(loc.shape)}."
            )
        if loc.shape[-2] < 1:
            raise ValueError(f"{name}: at least one expert is needed, got loc of shape {tuple(loc.shape)}.")
        if score not in ("mixture", "expert"):
            raise ValueError(f"{name}: score={score!r} is unknown; allowed: mixture, expert.")
        if log_prob_routing not in ("exact", "frequency"):
            raise ValueError(f"{name}: log_prob_routing={log_prob_routing!r} is unknown; allowed: exact, frequency.")
        if not 0.0 <= routing_coef < float("inf"):
            raise ValueError(f"{name}: routing_coef={routing_coef!r} must be finite and not negative.")
        if not temperature > 0:
            raise ValueError(f"{name}: temperature={temperature!r} must be positive.")
        self.routing = check_routing(
            routing,
            supported=(RoutingGradient.FREQUENCY, RoutingGradient.SOFT_FREQUENCY, RoutingGradient.NONE),
            planned=(RoutingGradient.GUMBEL_SOFTMAX,),
            owner=name,
        )
        self.routing_coef = routing_coef
        self.score = score
        self.log_prob_routing = log_prob_routing
        self.temperature = temperature
        self.logits = logits
        self.loc = loc
        self.scale = scale
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=False)

    def _options(self) -> dict[str, Any]:
        return {
            "routing": self.routing,
            "routing_coef": self.routing_coef,
            "score": self.score,
            "log_prob_routing": self.log_prob_routing,
            "temperature": self.temperature,
        }

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalMixture:
        """The same distribution over a larger batch shape."""
        batch_shape = torch.Size(batch_shape)
        experts = self.loc.shape[-2:]
        return type(self)(
            self.logits.expand(*batch_shape, experts[0]),
            self.loc.expand(*batch_shape, *experts),
            self.scale.expand(*batch_shape, *experts),
            **self._options(),
        )

    @property
    def num_experts(self) -> int:
        """Number of experts, ``K``."""
        return self.loc.shape[-2]

    @property
    def probs(self) -> Tensor:
        """The router's probabilities, ``[*B, K]``."""
        return self.logits.softmax(-1)

    @property
    def support(self) -> constraints.Constraint:
        """Where the density lives."""
        return constraints.real_vector

    # ------------------------------------------------------------------ the map from latent value to action

    def _squash(self, latent: Tensor) -> Tensor:
        return latent

    def _unsquash(self, value: Tensor) -> Tensor:
        return value

    def _log_abs_det(self, latent: Tensor) -> Tensor | float:
        """``log |da/du|`` at ``latent`` ``[..., A]``, summed over dimensions."""
        return 0.0

    # ------------------------------------------------------------------ densities

    def _normal_log_density(self, offset: Tensor) -> Tensor:
        """``sum_i log N`` of each expert, ``[..., K]``, at ``offset = u - loc``, ``[..., K, A]``."""
        scale = wide(self.scale)
        return -(0.5 * (offset / scale).square() + scale.log()).sum(-1) - self.event_shape[0] * _LOG_SQRT_2PI

    def _check_value(self, value: Tensor) -> None:
        batches = zip(reversed(value.shape[:-1]), reversed(self.batch_shape), strict=False)
        if value.shape[-1:] != self.event_shape or any(a != b and 1 not in (a, b) for a, b in batches):
            raise ValueError(
                f"{type(self).__name__}: a value must be [*sample, *batch, action_size], got a value of shape "
                f"{tuple(value.shape)} for batch shape {tuple(self.batch_shape)} and event shape "
                f"{tuple(self.event_shape)}."
            )

    def _value_log_density(self, value: Tensor) -> Tensor:
        self._check_value(value)
        latent = wide(self._unsquash(value))
        log_normal = self._normal_log_density(latent.unsqueeze(-2) - wide(self.loc))
        log_det = self._log_abs_det(latent)
        return log_normal - (log_det.unsqueeze(-1) if isinstance(log_det, Tensor) else log_det)

    def expert_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` ``[*S, *B, A]`` under each expert alone, ``[*S, *B, K]``."""
        return self._value_log_density(value).to(self.loc.dtype)

    def responsibilities(self, value: Tensor) -> Tensor:
        """Posterior probability of each expert given ``value`` ``[*S, *B, A]``, ``[*S, *B, K]``."""
        return (self._value_log_density(value) + wide(self.logits).log_softmax(-1)).softmax(-1).to(self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` under the mixture, whatever ``score``.

        Args:
            value: ``[*S, *B, A]``; for bounded mixtures values on or beyond the bounds count as just inside them.

        Returns:
            ``[*S, *B]``. Its gradient on the logits is what ``log_prob_routing`` says; that on ``loc`` and ``scale``
            is exact.

        Raises:
            ValueError: if the last dimension of ``value`` is not the action size.
        """
        log_density = self._value_log_density(value)
        return self._mix(log_density).to(self.loc.dtype)

    def _mix(self, log_density: Tensor) -> Tensor:
        """``log sum_k w_k exp(log_density_k)`` with the gradient on the logits that ``log_prob_routing`` asks for."""
        log_weight = wide(self.logits).log_softmax(-1)
        if self.log_prob_routing == "exact":
            return (log_weight + log_density).logsumexp(-1)
        log_joint = log_weight.detach() + log_density
        return frequency_log_prob(log_joint.logsumexp(-1), self.logits.expand(log_joint.shape), log_joint.detach())

    # ------------------------------------------------------------------ samples

    def propose(self, sample_shape: Any = ()) -> ExpertProposals:
        """One reparameterised action of every expert, to be scored, selected from, or both."""
        shape = torch.Size(sample_shape) + self.loc.shape
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return ExpertProposals(self, noise)

    def sample_expert(self, sample_shape: Any = ()) -> Tensor:
        """Index of an expert drawn from the router, ``[*S, *B]``, int64."""
        with torch.no_grad():
            cumulative = wide(self.logits).softmax(-1).cumsum(-1)[..., :-1]
            shape = torch.Size(sample_shape) + self.batch_shape
            uniform = torch.rand((*shape, 1), dtype=cumulative.dtype, device=cumulative.device)
            return (uniform >= cumulative).sum(-1)

    def rsample_experts(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """One action of every expert with its log-density under that expert alone; never routes.

        Returns:
            The actions ``[*S, *B, K, A]`` and their log-densities ``[*S, *B, K]``, scored on the latent draws.
        """
        proposals = self.propose(sample_shape)
        return proposals.action, proposals.expert_log_prob()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparameterised sample, ``[*S, *B, A]``.

        With ``routing="frequency"`` its slope trains the router; the soft form needs the log-density's slope as well
        and routes through :meth:`rsample_and_log_prob` alone.
        """
        proposals = self.propose(sample_shape)
        index = self.sample_expert(sample_shape)
        action = proposals.select_action(index)
        if self.routing is RoutingGradient.FREQUENCY and torch.is_grad_enabled():
            action, _ = self._route(action, action.new_zeros(action.shape[:-1]), proposals)
        return action

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Reparameterised sample and the log-density that ``score`` names, scored on the latent draw.

        The weights inside that density are detached: the router learns from the routing gradient alone.

        Returns:
            The action ``[*S, *B, A]`` and its log-density ``[*S, *B]``.
        """
        proposals = self.propose(sample_shape)
        index = self.sample_expert(sample_shape)
        action, log_prob = proposals.select(index)
        if self.routing is not RoutingGradient.NONE and torch.is_grad_enabled():
            action, log_prob = self._route(action, log_prob, proposals)
        return action, log_prob

    def _route(self, action: Tensor, log_prob: Tensor, proposals: ExpertProposals) -> tuple[Tensor, Tensor]:
        batch = action.shape[:-1]
        with torch.no_grad():
            density = None
            if self.routing is RoutingGradient.SOFT_FREQUENCY:
                density = wide(proposals.mixture_log_prob())
            others = proposals.action
        return route_by_slope(
            action,
            log_prob,
            self.logits.expand(*batch, self.num_experts),
            others,
            coef=self.routing_coef / (max(1, batch.numel()) * self.num_experts),
            density=density,
        )

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Sample without gradient, ``[*S, *B, A]``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def sample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Sample without gradient, with a log-density that keeps the score-function gradient of the parameters.

        Returns:
            The action ``[*S, *B, A]`` and the log-density that ``score`` names, ``[*S, *B]``, scored on the latent
            draw; for ``score="mixture"`` its gradient on the logits is the one of :meth:`log_prob`.
        """
        with torch.no_grad():
            proposals = self.propose(sample_shape)
            index = self.sample_expert(sample_shape)
            action = proposals.select_action(index)
            latent = wide(_take_expert(proposals.latent, index))
        log_density = self._normal_log_density(latent.unsqueeze(-2) - wide(self.loc))
        if self.score == "expert":
            log_prob = _take_expert(log_density.unsqueeze(-1), index).squeeze(-1)
        else:
            log_prob = self._mix(log_density)
        return action, (log_prob - self._log_abs_det(latent)).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """Unbiased estimate ``-sum_k w_k log pi(a_k)``, ``a_k ~ pi_k``, ``[*B]``, differentiable in all parameters."""
        log_prob = wide(self.propose().mixture_log_prob(detach_weights=False))
        return -(wide(self.logits).softmax(-1) * log_prob).sum(-1).to(self.loc.dtype)

    # ------------------------------------------------------------------ point summaries

    @property
    def expert_mode(self) -> Tensor:
        """Squashed loc of every expert, ``[*B, K, A]``."""
        return self._squash(self.loc)

    @property
    def deterministic_sample(self) -> Tensor:
        """Squashed loc of the expert with the largest weight, ``[*B, A]``."""
        return self._squash(_take_expert(self.loc, self.logits.argmax(-1)))

    @property
    def mode(self) -> Tensor:
        """Same as :attr:`deterministic_sample`."""
        return self.deterministic_sample

    def _expert_mean(self) -> Tensor:
        return self.loc

    @property
    def mean(self) -> Tensor:
        """``sum_k w_k E_k[a]``, ``[*B, A]``.

        Behind a tanh by Gauss-Hermite quadrature with 64 nodes: within 1e-5 of the bounds' half-width up to a scale
        of 2, within 2e-2 up to 7.
        """
        return (self.probs.unsqueeze(-1) * self._expert_mean()).sum(-2)


class TanhNormalMixture(NormalMixture):
    """:class:`NormalMixture` squashed by one tanh and an affine map into ``[low, high]``.

    Args:
        logits: of the router, ``[*B, K]``.
        loc: of every expert before the tanh, ``[*B, K, A]``.
        scale: of every expert before the tanh, ``[*B, K, A]``.
        low: lower bound of the action, a number or a tensor ``[A]``.
        high: upper bound of the action, a number or a tensor ``[A]``.

    Keyword Args:
        routing: see :class:`NormalMixture`, as for the other four.
        routing_coef: factor on the routing gradient.
        score: the log-density that goes with a sample.
        log_prob_routing: gradient of ``log_prob`` on the logits.
        temperature: of the Gumbel-Softmax draw.

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
        return wide(((value - self._middle) / self._half).clamp(-limit, limit)).atanh()

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


class ExpertProposals:
    """One reparameterised draw of every expert of a mixture, and its densities.

    Made by :meth:`NormalMixture.propose`. Densities are taken at the latent draw, not at the rounded action.

    Args:
        dist: the mixture.
        noise: standard normal, ``[*S, *B, K, A]``.
    """

    def __init__(self, dist: NormalMixture, noise: Tensor) -> None:
        self.dist = dist
        self.noise = noise
        self.step = dist.scale * noise
        self.latent = dist.loc + self.step

    @property
    def action(self) -> Tensor:
        """The proposed actions, ``[*S, *B, K, A]``."""
        return self.dist._squash(self.latent)

    def expert_log_prob(self) -> Tensor:
        """Log-density of each proposal under the expert that made it, ``[*S, *B, K]``."""
        dist = self.dist
        # the noise itself is the standardised draw: exact where loc swallows a small scale
        log_normal = -(0.5 * wide(self.noise).square() + wide(dist.scale).log()).sum(-1)
        log_det = dist._log_abs_det(wide(self.latent))
        return (log_normal - dist.event_shape[0] * _LOG_SQRT_2PI - log_det).to(dist.loc.dtype)

    def mixture_log_prob(self, *, detach_weights: bool = True) -> Tensor:
        """Log-density of each proposal under the whole mixture, ``[*S, *B, K]``."""
        dist = self.dist
        loc = wide(dist.loc)
        # u_k - loc_j as (loc_k - loc_j) + step_k: exact for j = k where loc swallows a small scale
        offset = (loc.unsqueeze(-2) - loc.unsqueeze(-3)) + wide(self.step).unsqueeze(-2)
        log_weight = wide(dist.logits).log_softmax(-1)
        if detach_weights:
            log_weight = log_weight.detach()
        scale = wide(dist.scale).unsqueeze(-3)
        log_normal = -(0.5 * (offset / scale).square() + scale.log()).sum(-1)
        log_mixture = (log_weight.unsqueeze(-2) + log_normal).logsumexp(-1)
        log_det = dist._log_abs_det(wide(self.latent))
        return (log_mixture - dist.event_shape[0] * _LOG_SQRT_2PI - log_det).to(dist.loc.dtype)

    def log_prob(self) -> Tensor:
        """The log-density that the mixture's ``score`` names, ``[*S, *B, K]``, with detached weights."""
        return self.mixture_log_prob() if self.dist.score == "mixture" else self.expert_log_prob()

    def select_action(self, index: Tensor) -> Tensor:
        """Action of expert ``index`` ``[*S, *B]``, ``[*S, *B, A]``."""
        return self.dist._squash(_take_expert(self.latent, index))

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Action of expert ``index`` ``[*S, *B]`` and the log-density that ``score`` names.

        Returns:
            The action ``[*S, *B, A]`` and its log-density ``[*S, *B]``, with detached weights.
        """
        dist = self.dist
        latent = _take_expert(self.latent, index)
        if dist.score == "expert":
            noise, scale = _take_expert(self.noise, index), _take_expert(dist.scale, index)
            log_density = -(0.5 * wide(noise).square() + wide(scale).log()).sum(-1)
            log_density = log_density - dist.event_shape[0] * _LOG_SQRT_2PI
        else:
            loc, step = wide(_take_expert(dist.loc, index)), wide(_take_expert(self.step, index))
            offset = (loc.unsqueeze(-2) - wide(dist.loc)) + step.unsqueeze(-2)
            log_weight = wide(dist.logits).log_softmax(-1).detach()
            log_density = (log_weight + dist._normal_log_density(offset)).logsumexp(-1)
        log_prob = (log_density - dist._log_abs_det(wide(latent))).to(dist.loc.dtype)
        return dist._squash(latent), log_prob
