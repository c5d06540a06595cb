"""One draw of every expert of a mixture, to be scored, selected from, or both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchrl_pmoe.distributions.routing import upcast

if TYPE_CHECKING:
    from torchrl_pmoe.distributions.mixture import NormalMixture

__all__ = ["LOG_SQRT_2PI", "ExpertProposals", "take_expert"]

LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


def take_expert(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``x[..., index, :]``, ``[*B, A]``, of ``x`` ``[*B, K, A]`` at ``index`` ``[*B]``."""
    if index.shape != x.shape[:-2]:
        shape = torch.broadcast_shapes(x.shape[:-2], index.shape)
        index, x = index.expand(shape), x.expand(*shape, *x.shape[-2:])
    return x.gather(-2, index[..., None, None].expand(*index.shape, 1, x.shape[-1])).squeeze(-2)


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
        # all [*S, *B, K, A]; the step is kept apart from loc because their sum would lose a small one
        self.step = dist.scale * noise + dist._router_nan()
        self.latent = dist.loc + self.step

    @property
    def action(self) -> Tensor:
        """The proposed actions, ``[*S, *B, K, A]``."""
        return self.dist._squash(self.latent, per_expert=True)

    def expert_log_prob(self) -> Tensor:
        """Log-density of each proposal under the expert that made it, ``[*S, *B, K]``."""
        dist = self.dist
        # the noise is the standardised draw; (latent - loc) / scale would be inexact for a scale far below loc
        log_normal = -(0.5 * upcast(self.noise).square() + upcast(dist.scale).log()).sum(-1)
        log_det = dist._log_abs_det(upcast(self.latent), per_expert=True)
        return (log_normal - dist.event_shape[0] * LOG_SQRT_2PI - log_det).to(dist.loc.dtype)

    def mixture_log_prob(self, *, detach_weights: bool = True) -> Tensor:
        """Log-density of each proposal under the whole mixture, ``[*S, *B, K]``."""
        dist = self.dist
        loc = upcast(dist.loc)
        # u_k - loc_j, [*S, *B, K, K, A], as (loc_k - loc_j) + step_k: exact for j = k, also for a scale far below loc
        offset = (loc.unsqueeze(-2) - loc.unsqueeze(-3)) + upcast(self.step).unsqueeze(-2)
        log_weight = upcast(dist.logits).log_softmax(-1)
        if detach_weights:
            log_weight = log_weight.detach()
        scale = upcast(dist.scale).unsqueeze(-3)  # [*B, 1, K, A]
        log_normal = -(0.5 * (offset / scale).square() + scale.log()).sum(-1)  # [*S, *B, K, K]: proposal k, expert j
        log_mixture = (log_weight.unsqueeze(-2) + log_normal).logsumexp(-1)
        log_det = dist._log_abs_det(upcast(self.latent), per_expert=True)
        return (log_mixture - dist.event_shape[0] * LOG_SQRT_2PI - log_det).to(dist.loc.dtype)

    def log_prob(self) -> Tensor:
        """The log-density that the mixture's ``score`` names, ``[*S, *B, K]``, with detached weights."""
        return self.mixture_log_prob() if self.dist.score == "mixture" else self.expert_log_prob()

    def select_action(self, index: Tensor) -> Tensor:
        """Action ``[*S, *B, A]`` of expert ``index`` ``[*S, *B]``."""
        return self.dist._squash(take_expert(self.latent, index))

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Action of expert ``index`` ``[*S, *B]`` and the log-density that ``score`` names.

        Returns:
            The action ``[*S, *B, A]`` and its log-density ``[*S, *B]``, with detached weights.
        """
        dist = self.dist
        parts = (take_expert(x, index) for x in (dist.loc, dist.scale, self.noise))
        return self._action_and_log_prob(*parts)

    def redraw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """A fresh action of expert ``index`` ``[*S, *B]`` and its log-density.

        A proposal that was selected by its score is no random draw of its expert: its noise made it win.

        Returns:
            As :meth:`select`.
        """
        loc, scale = take_expert(self.dist.loc, index), take_expert(self.dist.scale, index)
        return self._action_and_log_prob(loc, scale, torch.randn(loc.shape, dtype=loc.dtype, device=loc.device))

    def _action_and_log_prob(self, loc: Tensor, scale: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action of one expert's parameters and noise ``[*S, *B, A]`` and the log-density that ``score`` names."""
        dist = self.dist
        step = scale * noise + dist._router_nan().squeeze(-1)
        if dist.score == "mixture":
            return self._action_and_mixture_log_prob(loc, step)
        latent = loc + step
        log_density = -(0.5 * upcast(noise).square() + upcast(scale).log()).sum(-1)
        log_density = log_density - dist.event_shape[0] * LOG_SQRT_2PI
        log_prob = (log_density - dist._log_abs_det(upcast(latent))).to(dist.loc.dtype)
        return dist._squash(latent), log_prob

    def combine(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Action of the weighted sum of the latent draws and the log-density that ``score`` names.

        Args:
            weights: over the experts, ``[*S, *B, K]``, differentiable; one-hot weights select an expert.

        Returns:
            The action ``[*S, *B, A]`` and its log-density ``[*S, *B]``: the mixture's at that action, with detached
            weights inside, or for ``score="expert"`` the weighted sum of the experts' own at their own draws.
        """
        dist, share = self.dist, weights.unsqueeze(-1)  # [*S, *B, K, 1]
        loc, step = (share * dist.loc).sum(-2), (share * self.step).sum(-2)
        if dist.score == "mixture":
            return self._action_and_mixture_log_prob(loc, step)
        return dist._squash(loc + step), (weights * self.expert_log_prob()).sum(-1)

    def _action_and_mixture_log_prob(self, loc: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Action of ``loc + step`` ``[*S, *B, A]`` and the mixture's log-density there."""
        dist = self.dist
        latent = loc + step
        # [*S, *B, K, A]
        offset = (upcast(loc).unsqueeze(-2) - upcast(dist.loc)) + upcast(step).unsqueeze(-2)
        log_weight = upcast(dist.logits).log_softmax(-1).detach()
        log_density = (log_weight + dist._normal_log_density(offset)).logsumexp(-1)
        log_prob = (log_density - dist._log_abs_det(upcast(latent))).to(dist.loc.dtype)
        return dist._squash(latent), log_prob
