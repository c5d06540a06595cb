"""A mixture of diagonal Gaussians whose backward pass trains the router."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from torchrl_pmoe.distributions.proposals import LOG_SQRT_2PI, ExpertProposals, take_expert
from torchrl_pmoe.distributions.routing import (
    RoutingGradient,
    check_routing,
    frequency_log_prob,
    gumbel_softmax,
    host_can_read,
    route_by_slope,
    upcast,
)

__all__ = ["NormalMixture"]


class NormalMixture(Distribution):
    r"""Mixture of diagonal Gaussians, reparameterised, with the routing gradients of PMOE.

    .. math:: \log \pi(a|s) = \log \sum_k w_k \prod_i N(a_i; \mu_{ki}, \sigma_{ki}),\quad w = \mathrm{softmax}(logits)

    ``rsample`` and ``rsample_and_log_prob`` draw one expert and reparameterise its Gaussian. The index of the drawn
    expert has no gradient; the router learns from the routing gradient in its place (arXiv 2104.09122, Definition
    3.1; see :func:`~torchrl_pmoe.distributions.routing.route_by_slope`).

    Args:
        logits: of the router, ``[*B, K]``.
        loc: of every expert, ``[*B, K, A]``.
        scale: standard deviation of every expert, positive, ``[*B, K, A]``.

    Keyword Args:
        routing: what the router learns from the gradient that comes back through a reparameterised sample:
            ``"frequency"``, ``"soft_frequency"``, ``"gumbel_softmax"`` (the draw of the expert is relaxed, see
            :func:`~torchrl_pmoe.distributions.routing.gumbel_softmax`) or ``"none"``.
        routing_coef: factor on that gradient. Use 2 with a loss that draws for states and next states in one call, as
            ``REDQLoss`` does.
        score: the log-density that is returned with a sample: ``"mixture"``, the policy's own, or ``"expert"``, that
            of the drawn expert alone (the authors' SAC code).
        log_prob_routing: gradient of :meth:`log_prob` on the logits: ``"exact"`` (responsibilities) or
            ``"frequency"`` (see :func:`~torchrl_pmoe.distributions.routing.frequency_log_prob`).
        temperature: of the Gumbel-Softmax draw. The other routings do not use it.
        straight_through: of the Gumbel-Softmax draw: act on the drawn expert and differentiate the softmax. ``False``
            weights the experts' draws, before any tanh, by the softmax itself. Such samples do not follow the mixture,
            though their log-density is the mixture's, and ``score="expert"`` is refused because there is no single
            expert. Draws without gradient follow the mixture either way.
        validate_args: whether the values of the parameters are checked, as in :mod:`torch.distributions`: by default
            unless ``Distribution.set_default_validate_args(False)`` was called, but never while a graph is traced or
            recorded. Unchecked, a NaN of the router makes every action NaN.

    Raises:
        ValueError: if shapes do not fit together, an option is not one of those above, or a checked parameter is NaN
            or, for a scale, not positive.

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
        straight_through: bool = True,
        validate_args: bool | None = None,
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
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"{name}: temperature={temperature!r} must be finite and positive.")
        self.routing = check_routing(
            routing,
            supported=(
                RoutingGradient.FREQUENCY,
                RoutingGradient.SOFT_FREQUENCY,
                RoutingGradient.GUMBEL_SOFTMAX,
                RoutingGradient.NONE,
            ),
            owner=name,
        )
        relaxed = self.routing is RoutingGradient.GUMBEL_SOFTMAX and not straight_through
        if relaxed and score == "expert":
            raise ValueError(
                f"{name}: score='expert' cannot go with straight_through=False, which draws no single expert; "
                "allowed: mixture."
            )
        self.routing_coef = routing_coef
        self.score = score
        self.log_prob_routing = log_prob_routing
        self.temperature = temperature
        self.straight_through = straight_through
        self.logits = logits
        self.loc = loc
        self.scale = scale
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=False)
        if validate_args is None:
            validate_args = Distribution._validate_args
        if validate_args and host_can_read(loc):
            self._validate_parameters()
        self._validate_args = validate_args

    def _validate_parameters(self) -> None:
        """Check the values. A logit of minus infinity masks an expert and is valid; a router with no weight is not."""
        checks = {
            "the router's logits must be numbers, one of them finite": (
                self.logits,
                self.logits.softmax(-1).isfinite(),
            ),
            "the experts' loc must be numbers": (self.loc, self.loc == self.loc),
            "the experts' scale must be positive": (self.scale, self.scale > 0),
        }
        for demand, (value, valid) in checks.items():
            if not torch._is_all_true(valid):
                raise ValueError(
                    f"{type(self).__name__}: {demand}, got {int((~valid).sum())} bad entries in a tensor of shape "
                    f"{tuple(value.shape)}."
                )

    def _options(self) -> dict[str, Any]:
        return {
            "routing": self.routing,
            "routing_coef": self.routing_coef,
            "score": self.score,
            "log_prob_routing": self.log_prob_routing,
            "temperature": self.temperature,
            "straight_through": self.straight_through,
            "validate_args": False,  # these parameters have been checked
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
        """Where the density is positive."""
        return constraints.real_vector

    # ------------------------------------------------------------------ the map from latent value to action

    def _squash(self, latent: Tensor, *, per_expert: bool = False) -> Tensor:
        """Action at ``latent`` ``[..., A]``, or ``[..., K, A]`` per expert."""
        return latent

    def _unsquash(self, value: Tensor) -> Tensor:
        return value

    def _log_abs_det(self, latent: Tensor, *, per_expert: bool = False) -> Tensor | float:
        """``log |da/du|`` at ``latent`` ``[..., A]``, or ``[..., K, A]`` per expert, summed over dimensions."""
        return 0.0

    # ------------------------------------------------------------------ densities

    def _normal_log_density(self, offset: Tensor) -> Tensor:
        """``sum_i log N`` of each expert, ``[..., K]``, at ``offset = u - loc``, ``[..., K, A]``."""
        scale = upcast(self.scale)
        return -(0.5 * (offset / scale).square() + scale.log()).sum(-1) - self.event_shape[0] * LOG_SQRT_2PI

    def _check_value(self, value: Tensor) -> None:
        batches = zip(reversed(value.shape[:-1]), reversed(self.batch_shape), strict=False)
        if value.shape[-1:] != self.event_shape or any(a != b and 1 not in (a, b) for a, b in batches):
            raise ValueError(
                f"{type(self).__name__}: a value must be [*sample, *batch, action_size], got a value of shape "
                f"{tuple(value.shape)} for batch shape {tuple(self.batch_shape)} and event shape "
                f"{tuple(self.event_shape)}."
            )

    def _value_log_density(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` ``[*S, *B, A]`` under each expert, ``[*S, *B, K]``, in float32 at least."""
        self._check_value(value)
        latent = upcast(self._unsquash(value))
        # [*S, *B, 1, A] - [*B, K, A] = [*S, *B, K, A]
        log_normal = self._normal_log_density(latent.unsqueeze(-2) - upcast(self.loc))
        log_det = self._log_abs_det(latent)  # [*S, *B], the same for every expert
        return log_normal - (log_det.unsqueeze(-1) if isinstance(log_det, Tensor) else log_det)

    def expert_log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` ``[*S, *B, A]`` under each expert alone, ``[*S, *B, K]``."""
        return self._value_log_density(value).to(self.loc.dtype)

    def responsibilities(self, value: Tensor) -> Tensor:
        """Posterior probability of each expert given ``value`` ``[*S, *B, A]``, ``[*S, *B, K]``."""
        return (self._value_log_density(value) + upcast(self.logits).log_softmax(-1)).softmax(-1).to(self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` under the mixture, whatever ``score``.

        Args:
            value: ``[*S, *B, A]``. A bounded mixture takes values on or beyond its bounds as just inside them.

        Returns:
            ``[*S, *B]``. Its gradient on the logits is the one that ``log_prob_routing`` names; the gradient on
            ``loc`` and ``scale`` is exact.

        Raises:
            ValueError: if the last dimension of ``value`` is not the action size.
        """
        log_density = self._value_log_density(value)
        return self._mix(log_density).to(self.loc.dtype)

    def _mix(self, log_density: Tensor) -> Tensor:
        """``log sum_k w_k exp(log_density_k)``, ``[..., K]`` to ``[...]``.

        The gradient on the logits is the one that ``log_prob_routing`` names.
        """
        log_weight = upcast(self.logits).log_softmax(-1)
        if self.log_prob_routing == "exact":
            return (log_weight + log_density).logsumexp(-1)
        log_joint = log_weight.detach() + log_density
        return frequency_log_prob(log_joint.logsumexp(-1), self.logits.expand(log_joint.shape), log_joint.detach())

    # ------------------------------------------------------------------ samples

    def _router_nan(self) -> Tensor:
        """Zeros ``[*B, 1, 1]``, or NaN where the router's weights are NaN.

        Added to every action: the index of a drawn expert is a number whatever the weights were, and would hide it.
        """
        return self.logits.detach().amax(-1)[..., None, None] * 0.0

    def propose(self, sample_shape: Any = ()) -> ExpertProposals:
        """One reparameterised action of every expert, to be scored, selected from, or both."""
        # noise for every expert, also where one is selected: batched arithmetic beats indexing before the draw
        shape = torch.Size(sample_shape) + self.loc.shape  # [*S, *B, K, A]
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return ExpertProposals(self, noise)

    def sample_expert(self, sample_shape: Any = ()) -> Tensor:
        """Index of an expert drawn from the router, ``[*S, *B]``, int64."""
        with torch.no_grad():
            # inverse of the cumulative probabilities, whose last one is left out: rounding may keep it below one
            cumulative = upcast(self.logits).softmax(-1).cumsum(-1)[..., :-1]
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

        With ``routing="frequency"`` the gradient that reaches the sample trains the router. The soft form needs the
        log-density's gradient as well, so only :meth:`rsample_and_log_prob` routes then.
        """
        proposals = self.propose(sample_shape)
        if self.routing is RoutingGradient.GUMBEL_SOFTMAX and torch.is_grad_enabled():
            return proposals.combine(self._relaxed_expert(sample_shape))[0]
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
        if self.routing is RoutingGradient.GUMBEL_SOFTMAX and torch.is_grad_enabled():
            return proposals.combine(self._relaxed_expert(sample_shape))
        index = self.sample_expert(sample_shape)
        action, log_prob = proposals.select(index)
        if self.routing is not RoutingGradient.NONE and torch.is_grad_enabled():
            action, log_prob = self._route(action, log_prob, proposals)
        return action, log_prob

    def _relaxed_expert(self, sample_shape: Any) -> Tensor:
        return gumbel_softmax(
            self.logits,
            torch.Size(sample_shape),
            temperature=self.temperature,
            straight_through=self.straight_through,
            coef=self.routing_coef,
        )

    def _route(self, action: Tensor, log_prob: Tensor, proposals: ExpertProposals) -> tuple[Tensor, Tensor]:
        """The same action and log-density, whose gradients train the router on their way back."""
        batch = action.shape[:-1]  # [*S, *B]
        with torch.no_grad():
            density = None
            if self.routing is RoutingGradient.SOFT_FREQUENCY:
                density = upcast(proposals.mixture_log_prob())
            proposed = proposals.action  # [*S, *B, K, A]
        return route_by_slope(
            action,
            log_prob,
            self.logits.expand(*batch, self.num_experts),
            proposed,
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
            latent = upcast(take_expert(proposals.latent, index))
        log_density = self._normal_log_density(latent.unsqueeze(-2) - upcast(self.loc))  # [*S, *B, K]
        if self.score == "expert":
            log_prob = take_expert(log_density.unsqueeze(-1), index).squeeze(-1)
        else:
            log_prob = self._mix(log_density)
        return action, (log_prob - self._log_abs_det(latent)).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """Unbiased estimate ``-sum_k w_k log pi(a_k)``, ``a_k ~ pi_k``, ``[*B]``, differentiable in all parameters."""
        log_prob = upcast(self.propose().mixture_log_prob(detach_weights=False))  # [*B, K]
        return -(upcast(self.logits).softmax(-1) * log_prob).sum(-1).to(self.loc.dtype)

    # ------------------------------------------------------------------ point summaries

    @property
    def expert_mode(self) -> Tensor:
        """Squashed loc of every expert, ``[*B, K, A]``."""
        return self._squash(self.loc + self._router_nan(), per_expert=True)

    @property
    def deterministic_sample(self) -> Tensor:
        """Squashed loc of the expert with the largest weight, ``[*B, A]``."""
        return self._squash(take_expert(self.loc + self._router_nan(), self.logits.argmax(-1)))

    @property
    def mode(self) -> Tensor:
        """Same as :attr:`deterministic_sample`."""
        return self.deterministic_sample

    def _expert_mean(self) -> Tensor:
        return self.loc

    @property
    def mean(self) -> Tensor:
        """``sum_k w_k E_k[a]``, ``[*B, A]``.

        Behind a tanh it is computed by Gauss-Hermite quadrature with 64 nodes. Its error is below 2e-5 of the bounds'
        half-width for scales up to 2, and below 2e-2 for scales up to 7.
        """
        return (self.probs.unsqueeze(-1) * self._expert_mean()).sum(-2)
