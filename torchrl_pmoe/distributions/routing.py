"""The Frequency Approximate Gradient of PMOE (arXiv 2104.09122), autograd only.

Drawing an expert is not differentiable. The paper's way around it (Definition 3.1): let every expert propose an
action, call ``v`` the one-hot of the best proposal, and pull the router's probabilities ``w`` towards it,

    L_routing = 1/(B K) sum_b sum_k (w_bk - v_bk)^2,        dL/dw = 2 (w - v) / (B K).

Its minimiser is the frequency with which each expert proposes the best action. *Best* needs a score. A loss that
holds critics scores with them (:mod:`torchrl_pmoe.objectives`); a loss that knows nothing of mixtures scores by the
slope it hands back in the backward pass (:func:`route_by_slope`).

Shapes: ``B`` stands for any batch shape, ``K`` for the number of experts (the paper's *primitives*), ``A`` for the
action size.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = [
    "RoutingGradient",
    "best_proposal",
    "brier_loss",
    "can_look_at",
    "check_routing",
    "frequency_log_prob",
    "gumbel_softmax",
    "log_loss",
    "route_by_slope",
    "score_function_loss",
    "soft_frequency",
    "wide",
]

# Exponents are clamped here, so that no infinity enters the softmax.
_LARGEST_EXPONENT = 1e30


class RoutingGradient(str, Enum):
    """How the router learns. Every member is also the string of its value (``RoutingGradient("frequency")``)."""

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
    """The router gets no routing gradient."""

    def __str__(self) -> str:
        return self.value


def check_routing(
    routing: str | RoutingGradient,
    *,
    supported: Iterable[RoutingGradient],
    owner: str,
) -> RoutingGradient:
    """Turn ``routing`` into a member that ``owner`` supports.

    Raises:
        ValueError: if ``owner`` has no such routing gradient.
    """
    supported = tuple(supported)
    allowed = ", ".join(member.value for member in supported)
    try:
        if isinstance(routing, RoutingGradient):  # first, because the compiler cannot trace lower() of a member
            member = routing
        else:
            member = RoutingGradient(routing.lower() if isinstance(routing, str) else routing)
    except ValueError:
        raise ValueError(f"{owner}: routing={routing!r} is unknown; allowed: {allowed}.") from None
    if member not in supported:
        raise ValueError(f"{owner}: routing={member.value!r} does not exist here; allowed: {allowed}.")
    return member


def can_look_at(value: Tensor) -> bool:
    """Whether the host may read ``value`` here: not while a graph is traced or recorded, and not under ``vmap``."""
    if torch.compiler.is_compiling() or value.is_meta or not value.numel():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 if its dtype is a half-precision one, else ``x`` itself."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def best_proposal(score: Tensor) -> Tensor:
    """One-hot of the best proposal.

    Args:
        score: value of each expert's proposal, ``[*B, K]``.

    Returns:
        ``v``, ``[*B, K]``, in the dtype of ``score`` and without gradient; the first of equal scores wins.
    """
    experts = torch.arange(score.shape[-1], device=score.device)
    return (score.argmax(-1, keepdim=True) == experts).to(score.dtype)


def soft_frequency(exponent: Tensor, logits: Tensor | None = None) -> Tensor:
    """Maximum-entropy counterpart of :func:`best_proposal`.

    Args:
        exponent: soft value of each proposal over the temperature, ``Q_k / alpha - log pi(a_k)``, ``[*B, K]``.
        logits: the router's, ``[*B, K]``; given when the densities are the mixture's, left out when they are each
            expert's own (the router's weights would enter twice and it would collapse).

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
        frequency: of being the best proposal, ``[*B, K]``, a constant.

    Returns:
        ``[*B]``.
    """
    return (probs - frequency.detach()).square().mean(-1)


def log_loss(logits: Tensor, frequency: Tensor) -> Tensor:
    """Cross-entropy with the observed frequency: same minimiser as :func:`brier_loss`, gradient ``w - v`` on logits.

    Args:
        logits: the router's, ``[*B, K]``.
        frequency: of being the best proposal, ``[*B, K]``, a constant.

    Returns:
        ``[*B]``.
    """
    return -(frequency.detach() * logits.log_softmax(-1)).sum(-1)


def score_function_loss(logits: Tensor, cost: Tensor, index: Tensor) -> Tensor:
    """Likelihood-ratio estimate of the gradient of ``sum_k w_k cost_k`` (the paper's score-ratio trick).

    ``log w_z (cost_z - b)`` with the drawn expert ``z`` and the baseline ``b = sum_k w_k cost_k``, which does not
    depend on ``z`` and so leaves the estimate unbiased.

    Args:
        logits: the router's, ``[*B, K]``.
        cost: of every expert's proposal, ``[*M, *B, K]``, a constant.
        index: expert drawn from the router, ``[*M, *B]``, int64.

    Returns:
        ``[*M, *B]``; only its gradient means something.
    """
    log_probs = logits.log_softmax(-1).expand(cost.shape)
    baseline = (log_probs.detach().exp() * cost).sum(-1)
    z = index.unsqueeze(-1)
    gain = cost.detach().gather(-1, z).squeeze(-1) - baseline.detach()
    return gain * log_probs.gather(-1, z).squeeze(-1)


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
        gradient = wide(slope)
        # to first order, L(a_k) = L(a_z) + g (a_k - a_z): the score is what the loss would fall by
        gain = -(gradient.unsqueeze(-2) * (wide(proposals) - wide(action).unsqueeze(-2))).sum(-1)
        routed = (gradient != 0).any(-1)
        probs = wide(logits).softmax(-1)
        if ctx.soft:
            h = wide(weight)
            routed = routed & (h > 0)
            # h is alpha times the loss's reduction and sample weight, which all cancel against those in g
            temperature = torch.where(routed, h, torch.ones_like(h)).unsqueeze(-1)
            frequency = soft_frequency(gain / temperature - density[0], wide(logits))
        else:
            frequency = best_proposal(gain)
        d_probs = 2.0 * ctx.coef * (probs - frequency) * routed.unsqueeze(-1)
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
    """Hand out an action and its log-density; train the router by the slopes that come back (*gradient-scored*).

    In the backward pass ``g = dL/da`` is what reaches the action itself and ``h = dL/dlog pi`` what reaches the
    log-density. Proposal ``k`` scores ``-g (a_k - a_z)``. Hard form: ``v = one_hot(argmax_k score_k)``. Soft form:
    ``v_k ~ w_k exp(score_k / h - log pi(a_k))``. The logits receive ``coef * 2 (w - v)`` through the softmax: nothing
    where ``g = 0`` and, in the soft form, nothing where ``h <= 0``. The size of the upstream gradient does not
    matter, only its direction, so gradient scaling and accumulation do not commute with it.

    Args:
        action: the drawn expert's, ``[*B, A]``.
        log_prob: of that action, ``[*B]``.
        logits: the router's, ``[*B, K]``.
        proposals: every expert's action, ``[*B, K, A]``, a constant.
        coef: the routing coefficient over ``B K``.
        density: log-density of every proposal under the mixture, ``[*B, K]``, a constant; selects the soft form.

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
        h = wide(grad).unsqueeze(-1)
        responsibility = torch.where(h < 0, best_proposal(log_joint), log_joint.softmax(-1))
        d_logits = h * (responsibility - wide(logits).softmax(-1))
        return grad, d_logits.to(logits.dtype), None


def frequency_log_prob(log_prob: Tensor, logits: Tensor, log_joint: Tensor) -> Tensor:
    """Log-density whose gradient on the logits is the frequency form.

    The exact gradient is ``r - w`` with responsibilities ``r``. Here ``one_hot(argmax_k r_k)`` stands for ``r``
    where the update raises the density (upstream gradient below zero); where it lowers the density ``r`` stays,
    because a one-hot would not vanish there and PPO's clipping would not bound it.

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
        temperature: of the softmax; small ones come close to the draw of an expert, with gradients of high variance.
        straight_through: put out the one-hot of the drawn expert with the gradient of the softmax (biased).
        coef: factor on the gradient.

    Returns:
        Weights over the experts, ``[*S, *B, K]``; rows sum to one.
    """
    if coef != 1:
        logits = logits.detach() + coef * (logits - logits.detach())
    uniform = torch.rand((*sample_shape, *logits.shape), dtype=wide(logits).dtype, device=logits.device)
    noise = -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()
    perturbed = wide(logits).log_softmax(-1) + noise
    soft = (perturbed / temperature).softmax(-1)
    if straight_through:
        # in this order the sum is the one-hot to the last bit
        soft = best_proposal(perturbed.detach()) + (soft - soft.detach())
    return soft.to(logits.dtype)
