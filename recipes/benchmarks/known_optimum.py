"""Bandits whose best maximum-entropy policy is known, and quadrature for everything that is said about them.

One state, a known value ``Q``, a fixed temperature ``alpha``: the policy that maximises ``J = E[Q] + alpha H`` is
``exp(Q / alpha) / Z`` and its ``J`` is ``alpha log Z``. All functions here work in float64 and draw nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALPHA = 0.1
SAC_OPTIONS: dict[str, Any] = {
    "alpha_init": ALPHA,
    "fixed_alpha": True,
    "target_entropy": 0.0,
    "reduction": "none",
    "scalar_output_mode": "exclude",
    "delay_qvalue": False,
}
"""Of a ``SACLoss`` on one state: a temperature that stays, a loss per row."""


@dataclass(frozen=True)
class Bandit:
    """``Q(a) = sum_p height_p exp(-|a - centre_p|^2 / width^2)`` for actions in ``[-1, 1]^A``.

    Args:
        name: of the problem.
        centres: of the peaks, ``P`` tuples of ``A`` numbers.
        heights: of the peaks.
        width: of every peak.
        num_experts: ``K`` of the mixture that is to solve it.
    """

    name: str
    centres: tuple[tuple[float, ...], ...]
    heights: tuple[float, ...]
    width: float
    num_experts: int

    @property
    def action_size(self) -> int:
        """``A``."""
        return len(self.centres[0])

    def bumps(self, action: Tensor) -> Tensor:
        """Contribution of every peak to the value of ``action`` ``[*B, A]``, ``[*B, P]``."""
        gap = action.unsqueeze(-2) - action.new_tensor(self.centres)
        return action.new_tensor(self.heights) * (-gap.square().sum(-1) / self.width**2).exp()

    def value(self, action: Tensor) -> Tensor:
        """``Q`` of ``action`` ``[*B, A]``, ``[*B]``."""
        return self.bumps(action).sum(-1)


_CORNERS = ((-0.6, -0.6), (-0.6, 0.6), (0.6, -0.6), (0.6, 0.6))
BANDITS = {
    bandit.name: bandit
    for bandit in (
        Bandit("two_equal", ((-0.6,), (0.6,)), (2.0, 2.0), 0.2, 4),
        Bandit("unequal", ((-0.6,), (0.6,)), (1.7, 2.0), 0.2, 4),
        Bandit("one_peak", ((0.6,),), (2.0,), 0.2, 4),
        Bandit("four_peaks", _CORNERS, (2.0,) * 4, 0.25, 8),
    )
}


class Solution(NamedTuple):
    """What the best policy of a bandit achieves, and where its mass is."""

    objective: float
    basin_mass: Tensor
    """Of the actions nearest to each peak, ``[P]``."""
    peak_mass: Tensor
    """Of those among them that have at least half the peak's height, ``[P]``."""


class Report(NamedTuple):
    """What mixtures ``[R]`` achieve on a bandit."""

    objective: Tensor
    """``J``, ``[R]``."""
    expert_value: Tensor
    """``E_k[Q - alpha log pi]``, ``[R, K]``; ``J`` is its mean under the weights."""
    basin_mass: Tensor
    """``[R, P]``, as in :class:`Solution`."""
    peak_mass: Tensor
    """``[R, P]``, as in :class:`Solution`."""


def _grid(limit: float, nodes: int, size: int) -> tuple[Tensor, float]:
    """Points ``[nodes^size, size]`` of a box and the volume each stands for."""
    line = torch.linspace(-limit, limit, nodes, dtype=torch.float64)
    return torch.cartesian_prod(*[line] * size).reshape(-1, size), (2 * limit / (nodes - 1)) ** size


def _draws(size: int) -> tuple[Tensor, Tensor]:
    """Standard normal nodes ``[G, size]`` and their weights ``[G]``."""
    noise, _ = _grid(*((8.0, 4001) if size == 1 else (6.0, 201)), size)
    share = (-0.5 * noise.square().sum(-1)).exp()
    return noise, share / share.sum()


def _regions(bandit: Bandit, action: Tensor) -> tuple[Tensor, Tensor]:
    """Membership of ``action`` ``[*B, A]`` in every basin and in every peak, two tensors ``[*B, P]`` of 0 and 1."""
    centres = action.new_tensor(bandit.centres)
    nearest = (action.unsqueeze(-2) - centres).square().sum(-1).argmin(-1, keepdim=True)
    basin = nearest == torch.arange(len(centres))
    high = bandit.value(action).unsqueeze(-1) >= 0.5 * action.new_tensor(bandit.heights)
    return basin.to(action.dtype), (basin & high).to(action.dtype)


@lru_cache
def solve(bandit: Bandit, alpha: float = ALPHA) -> Solution:
    """The best policy of ``bandit`` by quadrature over the actions."""
    action, volume = _grid(1.0, 40001 if bandit.action_size == 1 else 801, bandit.action_size)
    edge = 0.5 ** (action.abs() == 1.0).sum(-1)  # trapezoid
    exponent = bandit.value(action) / alpha
    log_z = (exponent + edge.log()).logsumexp(0) + math.log(volume)
    mass = edge * (exponent - log_z).exp() * volume
    basin, peak = _regions(bandit, action)
    return Solution(alpha * log_z.item(), mass @ basin, mass @ peak)


def evaluate(bandit: Bandit, logits: Tensor, loc: Tensor, scale: Tensor, alpha: float = ALPHA) -> Report:
    """What tanh-squashed mixtures achieve, by quadrature over the latent draws of every expert.

    Args:
        bandit: to act in.
        logits: of the router, ``[R, K]``.
        loc: of the experts before the tanh, ``[R, K, A]``.
        scale: of the experts before the tanh, ``[R, K, A]``.
        alpha: temperature.
    """
    logits, loc, scale = logits.double(), loc.double(), scale.double()
    noise, share = _draws(bandit.action_size)
    values, basins, peaks = [], [], []
    for row in range(len(logits)):
        latent = loc[row].unsqueeze(1) + scale[row].unsqueeze(1) * noise  # [K, G, A]
        action = latent.tanh()
        log_weights = logits[row].log_softmax(-1)
        log_prob = (log_weights + _component_log_prob(latent, loc[row], scale[row])).logsumexp(-1)
        values.append((bandit.value(action) - alpha * log_prob) @ share)
        basin, peak = _regions(bandit, action)
        weights = log_weights.exp()
        basins.append(torch.einsum("k,g,kgp->p", weights, share, basin))
        peaks.append(torch.einsum("k,g,kgp->p", weights, share, peak))
    expert_value = torch.stack(values)
    objective = (logits.softmax(-1) * expert_value).sum(-1)
    return Report(objective, expert_value, torch.stack(basins), torch.stack(peaks))


def _component_log_prob(latent: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log-density of the squashed ``latent`` ``[*B, A]`` under each expert of one mixture, ``[*B, K]``."""
    log_normal = torch.distributions.Normal(loc, scale, validate_args=False).log_prob(latent.unsqueeze(-2)).sum(-1)
    # log(1 - tanh(u)^2) without underflow
    slope = 2.0 * (math.log(2.0) - latent - torch.nn.functional.softplus(-2.0 * latent)).sum(-1)
    return log_normal - slope.unsqueeze(-1)


def router_gradient(logits: Tensor, expert_value: Tensor) -> Tensor:
    """Gradient of ``J`` with respect to the logits, ``[*B, K]``, from :attr:`Report.expert_value`."""
    weights = logits.double().softmax(-1)
    return weights * (expert_value - (weights * expert_value).sum(-1, keepdim=True))


def best_logits(bandit: Bandit, loc: Tensor, scale: Tensor, alpha: float = ALPHA, steps: int = 2000) -> Tensor:
    """Logits that maximise ``J`` for given experts ``[K, A]``, by Blahut and Arimoto's iteration, ``[K]``.

    ``J`` is concave in the weights, and ``w_k <- w_k exp(E_k[Q - alpha log pi] / alpha)``, renormalised, never lowers
    it.
    """
    loc, scale = loc.double(), scale.double()
    noise, share = _draws(bandit.action_size)
    latent = loc.unsqueeze(1) + scale.unsqueeze(1) * noise
    components = _component_log_prob(latent, loc, scale)
    value = bandit.value(latent.tanh()) / alpha
    logits = loc.new_zeros(len(loc)).log_softmax(-1)
    for _ in range(steps):
        gain = (value - (logits + components).logsumexp(-1)) @ share
        new = (logits + gain).log_softmax(-1).clamp_min(-50.0)
        if (new.exp() - logits.exp()).abs().max() < 1e-9:
            break
        logits = new
    return logits
