"""How the router of a mixture learns: the Frequency Approximate Gradient of PMOE (arXiv 2104.09122) and its rivals.

Drawing an expert is not differentiable. The paper's way around it (Definition 3.1): let every expert propose an
action, call ``v`` the one-hot of the best proposal, and pull the router's probabilities ``w`` towards it,

    L_routing = 1/(B K) sum_b sum_k (w_bk - v_bk)^2,        dL/dw = 2 (w - v) / (B K).

Its minimiser is the frequency with which each expert proposes the best action. *Best* needs a score, and there are two:

- *critic-scored*: a loss that holds critics scores with them (:mod:`torchrl_pmoe.objectives`). An estimator is then a
  function from a :class:`ScoredProposals` to a loss ``[*B]``; :data:`ESTIMATORS` holds those that have a name.
- *gradient-scored*: a loss that knows nothing of mixtures scores by the slope that it hands back in the backward pass
  (:func:`route_by_slope`).

Shapes: ``B`` stands for any batch shape, ``K`` for the number of experts (the paper's *primitives*), ``A`` for the
action size, ``M`` for the number of draws of each expert, a dimension that is left out for one draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

if TYPE_CHECKING:
    from torchrl_pmoe.distributions.mixture import NormalMixture

__all__ = [
    "ESTIMATORS",
    "RoutingEstimator",
    "RoutingGradient",
    "ScoredProposals",
    "best_proposal",
    "brier_loss",
    "check_routing",
    "find_estimator",
    "frequency_log_prob",
    "gumbel_softmax",
    "host_can_read",
    "log_loss",
    "route_by_slope",
    "score_function_loss",
    "soft_frequency",
    "upcast",
]

# exponents are clamped to this size, so that no infinity enters the softmax
_LARGEST_EXPONENT = 1e30


class RoutingGradient(str, Enum):
    """The built-in ways in which the router learns. A member is also a string (``RoutingGradient("frequency")``)."""

    FREQUENCY = "frequency"
    """One-hot of the best proposal (the paper, Definition 3.1)."""
    SOFT_FREQUENCY = "soft_frequency"
    """Maximum-entropy counterpart of the one-hot: a softmax of the proposals' soft values."""
    GUMBEL_SOFTMAX = "gumbel_softmax"
    """Reparameterised draw of the expert."""
    SCORE_FUNCTION = "score_function"
    """Likelihood-ratio gradient of the draw of the expert."""
    MARGINAL = "marginal"
    """Exact enumeration of the experts, one draw each."""
    NONE = "none"
    """No routing gradient at all."""

    def __str__(self) -> str:
        return self.value


def check_routing(
    routing: str | RoutingGradient,
    *,
    supported: Iterable[RoutingGradient],
    owner: str,
) -> RoutingGradient:
    """Turn ``routing`` into a member that ``owner`` supports.

    Args:
        routing: a member or its name, in any case.
        supported: the members that ``owner`` supports.
        owner: name of the class that an error speaks of.

    Raises:
        ValueError: if ``owner`` has no such routing gradient.
    """
    supported = tuple(supported)
    allowed = ", ".join(member.value for member in supported)
    try:
        if isinstance(routing, RoutingGradient):  # asked first: the compiler cannot trace lower() of a member
            member = routing
        else:
            member = RoutingGradient(routing.lower() if isinstance(routing, str) else routing)
    except ValueError:
        raise ValueError(f"{owner}: routing={routing!r} is unknown; allowed: {allowed}.") from None
    if member not in supported:
        raise ValueError(f"{owner}: routing={member.value!r} does not exist here; allowed: {allowed}.")
    return member


def host_can_read(value: Tensor) -> bool:
    """Whether Python may read the numbers in ``value``: not while a graph is traced or recorded, or under ``vmap``."""
    if torch.compiler.is_compiling() or value.is_meta or not value.numel():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32 if its dtype is a half-precision one, else ``x`` itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def best_proposal(score: Tensor) -> Tensor:
    """One-hot of the best proposal.

    Args:
        score: value of each expert's proposal, ``[*B, K]``.

    Returns:
        ``v``, ``[*B, K]``, in the dtype of ``score`` and without gradient; the first of equal scores wins.
    """
    # comparing with a range is one_hot without its data-dependent checks
    experts = torch.arange(score.shape[-1], device=score.device)
    return (score.argmax(-1, keepdim=True) == experts).to(score.dtype)


def soft_frequency(exponent: Tensor, logits: Tensor | None = None) -> Tensor:
    """Maximum-entropy counterpart of :func:`best_proposal`.

    Args:
        exponent: ``Q_k / alpha - log pi(a_k)`` of each proposal, ``[*B, K]``.
        logits: the router's, ``[*B, K]``. Give them where the densities are the mixture's. Leave them out where they
            are each expert's own: the router's weights would enter twice and the router would collapse.

    Returns:
        ``v``, ``[*B, K]``, detached; rows sum to one.
    """
    exponent = exponent.detach().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    if logits is not None:
        exponent = exponent + logits.detach().log_softmax(-1)
    return exponent.softmax(-1)


def brier_loss(probs: Tensor, frequency: Tensor) -> Tensor:
    """Squared error between probability and observed frequency (Definition 3.1), mean over experts.

    Args:
        probs: the router's, ``[*B, K]``.
        frequency: with which each expert proposes the best action, ``[*B, K]``, a constant.

    Returns:
        ``[*B]``.
    """
    return (probs - frequency.detach()).square().mean(-1)


def log_loss(logits: Tensor, frequency: Tensor) -> Tensor:
    """Cross-entropy with the observed frequency: same minimiser as :func:`brier_loss`, gradient ``w - v`` on logits.

    Args:
        logits: the router's, ``[*B, K]``.
        frequency: with which each expert proposes the best action, ``[*B, K]``, a constant.

    Returns:
        ``[*B]``.
    """
    return -(frequency.detach() * logits.log_softmax(-1)).sum(-1)


def score_function_loss(logits: Tensor, cost: Tensor, index: Tensor) -> Tensor:
    """Likelihood-ratio estimate of the gradient of ``sum_k w_k cost_k`` (the paper's score-ratio trick).

    ``log w_z (cost_z - b)`` with the drawn expert ``z`` and the baseline ``b = sum_k w_k cost_k``. The baseline does
    not depend on ``z``, so the estimate is unbiased.

    Args:
        logits: the router's, ``[*B, K]``.
        cost: of every expert's proposal, ``[*M, *B, K]``, a constant.
        index: expert drawn from the router, ``[*M, *B]``, int64.

    Returns:
        ``[*M, *B]``, of which only the gradient has a meaning.
    """
    log_probs = logits.log_softmax(-1).expand(cost.shape)
    baseline = (log_probs.detach().exp() * cost).sum(-1)  # [*M, *B]
    z = index.unsqueeze(-1)
    advantage = cost.detach().gather(-1, z).squeeze(-1) - baseline.detach()
    return advantage * log_probs.gather(-1, z).squeeze(-1)


# ---------------------------------------------------------------------- critic-scored estimators


class ScoredProposals:
    """The proposals of all experts with their scores: what a critic-scored estimator reads.

    Every estimator is a function from one of these to a loss ``[*B]``. Only ``logits`` and ``probs`` carry a gradient.
    A policy that draws each expert once has ``values`` and ``log_prob`` of ``[*B, K]``; with ``num_proposals=M`` above
    1 they are ``[M, *B, K]``, and :meth:`mean_over_draws` takes the mean over ``M``.

    Args:
        dist: the mixture, of batch shape ``[*B]``.
        values: the critics' value of each proposal, ``[*M, *B, K]``, without gradient.
        temperature: weight of the entropy in the soft objective, ``[]``: SAC's ``alpha``, PPO's ``entropy_coeff``.
        log_prob: log-density of each proposal, ``[*M, *B, K]``, or a function that computes it: the mixture's density
            or each expert's own, as ``dist.score`` says.
        routing_loss: what :meth:`distance_to` is.
    """

    def __init__(
        self,
        dist: NormalMixture,
        values: Tensor,
        temperature: Tensor,
        log_prob: Tensor | Callable[[], Tensor],
        routing_loss: Literal["brier", "log"] = "brier",
    ) -> None:
        self.dist = dist
        self.values = values
        self.temperature = temperature
        self.routing_loss = routing_loss
        self._log_prob = log_prob

    @property
    def logits(self) -> Tensor:
        """The router's logits ``[*B, K]``, with gradient."""
        return self.dist.logits

    @property
    def probs(self) -> Tensor:
        """The router's probabilities ``[*B, K]``, with gradient."""
        return self.dist.probs

    @property
    def log_prob(self) -> Tensor:
        """Log-density of each proposal, ``[*M, *B, K]``, without gradient."""
        # computed on demand: the mixture's density costs K^2, and the paper's own estimator does not read it
        if not isinstance(self._log_prob, Tensor):
            with torch.no_grad():
                self._log_prob = self._log_prob()
        return self._log_prob

    @property
    def num_draws(self) -> int | None:
        """``M``, or ``None`` where each expert was drawn once and there is no such dimension."""
        return self.values.shape[0] if self.values.ndim > self.logits.ndim else None

    def mean_over_draws(self, x: Tensor) -> Tensor:
        """``x`` ``[*M, *B, …]`` without ``M``, ``[*B, …]``."""
        return x if self.num_draws is None else x.mean(0)

    def draw_expert(self) -> Tensor:
        """Index of an expert drawn from the router for each draw, ``[*M, *B]``."""
        return self.dist.sample_expert(() if self.num_draws is None else (self.num_draws,))

    def distance_to(self, frequency: Tensor) -> Tensor:
        """Brier or log loss ``[*B]`` between the router's probabilities and a frequency ``[*B, K]``."""
        frequency = frequency.to(self.logits.dtype)
        if self.routing_loss == "brier":
            return brier_loss(self.probs, frequency)
        return log_loss(self.logits, frequency)


RoutingEstimator = Callable[[ScoredProposals], Tensor]
"""A critic-scored estimator: from what was scored to a loss ``[*B]``, before its coefficient and the reduction."""


def frequency_routing(scored: ScoredProposals) -> Tensor:
    """Distance to the frequency with which each expert proposes the best action (the paper, Definition 3.1)."""
    return scored.distance_to(scored.mean_over_draws(best_proposal(scored.values)))


def soft_frequency_routing(scored: ScoredProposals) -> Tensor:
    """Distance to the soft frequency, at the temperature of the soft objective; see :func:`soft_frequency`."""
    value = scored.mean_over_draws(upcast(scored.values))  # [*B, K]
    # only differences matter to the softmax; those to the best keep a small temperature from overflowing
    gap = value - value.amax(-1, keepdim=True)
    temperature = scored.temperature.to(gap.dtype).clamp_min(torch.finfo(gap.dtype).tiny)
    exponent = gap / temperature - scored.mean_over_draws(upcast(scored.log_prob))
    return scored.distance_to(soft_frequency(exponent, scored.logits if scored.dist.score == "mixture" else None))


def score_function_routing(scored: ScoredProposals) -> Tensor:
    """Likelihood-ratio estimate of :func:`marginal_routing`; see :func:`score_function_loss`."""
    cost = scored.temperature * scored.log_prob - scored.values  # [*M, *B, K]
    return scored.mean_over_draws(score_function_loss(scored.logits, cost, scored.draw_expert()))


def marginal_routing(scored: ScoredProposals) -> Tensor:
    """``sum_k w_k (alpha log pi(a_k) - Q(s, a_k))``: the soft objective, enumerated over the experts."""
    cost = scored.mean_over_draws(scored.temperature * scored.log_prob - scored.values)  # [*B, K]
    return (scored.probs * cost).sum(-1)


def no_routing(scored: ScoredProposals) -> Tensor:
    """Zeros: the router learns from nothing but what else reaches its parameters."""
    return scored.values.new_zeros(scored.dist.batch_shape)


ESTIMATORS: dict[str, RoutingEstimator] = {
    "frequency": frequency_routing,
    "soft_frequency": soft_frequency_routing,
    "score_function": score_function_routing,
    "marginal": marginal_routing,
    "none": no_routing,
}
"""The critic-scored estimators by name. An entry that is added here is a ``routing`` of every critic-scored loss."""


def find_estimator(
    routing: str | RoutingGradient | RoutingEstimator, *, owner: str
) -> tuple[str | RoutingGradient | RoutingEstimator, RoutingEstimator]:
    """The estimator that ``routing`` stands for.

    Args:
        routing: a name in :data:`ESTIMATORS`, in any case, the member of that name, or an estimator.
        owner: name of the class that an error speaks of.

    Returns:
        what to show as ``routing`` (a built-in one as a member of :class:`RoutingGradient`), and the estimator.

    Raises:
        ValueError: for anything else.
    """
    fault = "is unknown"
    if isinstance(routing, str):  # a member is a string too
        name = str(routing).lower()
        built_in = any(member.value == name for member in RoutingGradient)
        if name in ESTIMATORS:
            return (RoutingGradient(name) if built_in else name), ESTIMATORS[name]
        routing, fault = (name, "does not exist here") if built_in else (routing, fault)
    elif callable(routing) and not isinstance(routing, type):
        return routing, routing
    allowed = ", ".join(ESTIMATORS)
    raise ValueError(
        f"{owner}: routing={routing!r} {fault}; allowed: {allowed}, or a function from ScoredProposals to a loss [*B]."
    )


# ---------------------------------------------------------------------- gradient-scored routing


class _RouteBySlope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        action: Tensor, log_prob: Tensor, logits: Tensor, proposals: Tensor, density: Tensor | None, coef: float
    ) -> tuple[Tensor, Tensor]:
        return action.clone(), log_prob.clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        action, _, logits, proposals, density, ctx.coef = inputs  # type: ignore[attr-defined]
        ctx.soft = density is not None  # type: ignore[attr-defined]
        saved = (action, logits, proposals)
        ctx.save_for_backward(*(saved if density is None else (*saved, density)))

    @staticmethod
    def backward(ctx: Any, slope: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        action, logits, proposals, *density = ctx.saved_tensors
        gradient = upcast(slope)  # [*B, A]
        # to first order, L(a_k) = L(a_z) + g (a_k - a_z): a proposal's score is how much it lowers the loss, [*B, K]
        gain = -(gradient.unsqueeze(-2) * (upcast(proposals) - upcast(action).unsqueeze(-2))).sum(-1)
        routed = (gradient != 0).any(-1)  # [*B]
        probs = upcast(logits).softmax(-1)
        if ctx.soft:
            h = upcast(weight)
            routed = routed & (h > 0)
            # h is alpha times the loss's reduction and sample weight, which all cancel against those in g
            temperature = torch.where(routed, h, torch.ones_like(h)).unsqueeze(-1)
            frequency = soft_frequency(gain / temperature - density[0], upcast(logits))
        else:
            frequency = best_proposal(gain)
        d_probs = 2.0 * ctx.coef * (probs - frequency) * routed.unsqueeze(-1)  # [*B, K]
        # through the softmax
        d_logits = probs * (d_probs - (probs * d_probs).sum(-1, keepdim=True))
        return slope, weight, d_logits.to(logits.dtype), None, None, None


def route_by_slope(
    action: Tensor,
    log_prob: Tensor,
    logits: Tensor,
    proposals: Tensor,
    *,
    coef: float,
    density: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return an action and its log-density unchanged, and train the router in the backward pass (*gradient-scored*).

    In the backward pass ``g = dL/da`` reaches the action and ``h = dL/dlog pi`` the log-density. Proposal ``k`` scores
    ``-g (a_k - a_z)``. Hard form: ``v = one_hot(argmax_k score_k)``. Soft form:
    ``v_k ~ w_k exp(score_k / h - log pi(a_k))``. The logits receive ``coef * 2 (w - v)`` through the softmax, but
    nothing where ``g = 0`` and, in the soft form, nothing where ``h <= 0``. Only the direction of the upstream
    gradient matters, not its size, so gradient scaling and gradient accumulation give another result.

    Args:
        action: the drawn expert's, ``[*B, A]``.
        log_prob: of that action, ``[*B]``.
        logits: the router's, ``[*B, K]``.
        proposals: every expert's action, ``[*B, K, A]``, a constant.
        coef: the routing coefficient over ``B K``.
        density: log-density of every proposal under the mixture, ``[*B, K]``, a constant; given, the form is soft.

    Returns:
        ``action`` and ``log_prob``, unchanged.
    """
    return _RouteBySlope.apply(action, log_prob, logits, proposals, density, coef)


class _FrequencyLogProb(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_prob: Tensor, logits: Tensor, log_joint: Tensor) -> Tensor:
        return log_prob.clone()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_joint = ctx.saved_tensors
        h = upcast(grad).unsqueeze(-1)  # [*B, 1]
        responsibility = torch.where(h < 0, best_proposal(log_joint), log_joint.softmax(-1))
        d_logits = h * (responsibility - upcast(logits).softmax(-1))
        return grad, d_logits.to(logits.dtype), None


def frequency_log_prob(log_prob: Tensor, logits: Tensor, log_joint: Tensor) -> Tensor:
    """Log-density whose gradient on the logits is the frequency form.

    The exact gradient is ``r - w`` with responsibilities ``r``. Here ``one_hot(argmax_k r_k)`` replaces ``r`` where the
    update raises the density (upstream gradient below zero). Where the update lowers the density, ``r`` stays: a
    one-hot would not vanish there, and PPO's clipping would not bound it.

    Args:
        log_prob: the mixture's, with the weights detached, ``[*B]``.
        logits: the router's, ``[*B, K]``.
        log_joint: ``log w_k + log pi_k(a)``, ``[*B, K]``, a constant.

    Returns:
        ``log_prob``, unchanged.
    """
    return _FrequencyLogProb.apply(log_prob, logits, log_joint)


def gumbel_softmax(
    logits: Tensor, sample_shape: torch.Size, *, temperature: float, straight_through: bool, coef: float = 1.0
) -> Tensor:
    """Draw of an expert that is differentiable in the logits (Jang et al. 2017; Maddison et al. 2017).

    Args:
        logits: the router's, ``[*B, K]``.
        sample_shape: ``S``.
        temperature: of the softmax. A small one comes close to the draw of an expert; its gradients vary a lot.
        straight_through: return the one-hot of the drawn expert with the gradient of the softmax (biased).
        coef: factor on the gradient.

    Returns:
        Weights over the experts, ``[*S, *B, K]``; rows sum to one.
    """
    if coef != 1:
        # the same value, with coef times the gradient
        logits = logits.detach() + coef * (logits - logits.detach())
    uniform = torch.rand((*sample_shape, *logits.shape), dtype=upcast(logits).dtype, device=logits.device)
    noise = -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()
    perturbed = upcast(logits).log_softmax(-1) + noise
    soft = (perturbed / temperature).softmax(-1)
    if straight_through:
        # summed in this order, the value is the one-hot to the last bit
        soft = best_proposal(perturbed.detach()) + (soft - soft.detach())
    return soft.to(logits.dtype)
