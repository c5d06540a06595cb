"""One update of Soft Actor-Critic in PyTorch alone: what the same mathematics costs without a library.

Two critics and their targets, a tanh-Gaussian policy with actions in [-1, 1], a tuned temperature, one Adam for all.
As in TorchRL's ``SACLoss`` the three losses are taken at the same parameters, before any of them moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOG_STD = (-20.0, 2.0)


class Batch(NamedTuple):
    """Transitions: observations ``[B, O]``, actions ``[B, A]``, rewards ``[B]``, ends ``[B]`` as 0.0 or 1.0."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    terminated: Tensor


class Losses(NamedTuple):
    """Means over the batch, scalars."""

    actor: Tensor
    qvalue: Tensor
    alpha: Tensor


def mlp(sizes: Sequence[int], device: torch.device | str = "cpu") -> nn.Sequential:
    """Linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, device=device), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def frozen(network: nn.Sequential, x: Tensor) -> Tensor:
    """``network(x)`` with a gradient to ``x`` and none to the weights."""
    for layer in network:
        x = F.linear(x, layer.weight.detach(), layer.bias.detach()) if isinstance(layer, nn.Linear) else layer(x)
    return x


class RawSAC:
    """The networks of SAC and their update.

    Args:
        observation_size: ``O``.
        action_size: ``A``.
        cells: hidden layers of every network.
        gamma: discount.
        polyak: share of a target's parameters that stays.
        lr: of Adam.
        device: of the parameters.
    """

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        cells: Sequence[int] = (256, 256),
        *,
        gamma: float = 0.99,
        polyak: float = 0.995,
        lr: float = 3e-4,
        device: torch.device | str = "cpu",
    ) -> None:
        self.gamma, self.polyak, self.target_entropy = gamma, polyak, -float(action_size)
        self.actor = mlp([observation_size, *cells, 2 * action_size], device)
        critic = [observation_size + action_size, *cells, 1]
        self.critics = [mlp(critic, device) for _ in range(2)]
        self.targets = [mlp(critic, device) for _ in range(2)]
        for target, source in zip(self.targets, self.critics, strict=True):
            target.load_state_dict(source.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros((), device=device))
        self._sources: list[Tensor] = [parameter for critic in self.critics for parameter in critic.parameters()]
        self._followers: list[Tensor] = [parameter for target in self.targets for parameter in target.parameters()]
        trained = [*self.actor.parameters(), *self._sources, self.log_alpha]
        self.optimizer = torch.optim.Adam(trained, lr=lr, fused=True)

    def act(self, observation: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A draw of the policy ``[B, A]`` and its log-density ``[B]``; standard normal ``noise`` unless given."""
        loc, log_std = self.actor(observation).chunk(2, -1)
        log_std = log_std.clamp(*LOG_STD)
        noise = torch.randn_like(loc) if noise is None else noise
        u = loc + log_std.exp() * noise
        # log(1 - tanh(u)^2), written so that it stays finite
        squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - squash
        return u.tanh(), log_prob.sum(-1)

    def losses(self, batch: Batch, noise: tuple[Tensor, Tensor] | None = None) -> Losses:
        """The three losses.

        Args:
            batch: ``B`` transitions.
            noise: standard normal draws ``[B, A]`` for the target and for the actor.
        """
        next_noise, own_noise = (None, None) if noise is None else noise
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = self.act(batch.next_observation, next_noise)
            pairs = torch.cat((batch.next_observation, next_action), -1)
            next_value = torch.minimum(*(critic(pairs) for critic in self.targets)).squeeze(-1) - alpha * next_log_prob
            target = batch.reward + self.gamma * (1 - batch.terminated) * next_value
        pairs = torch.cat((batch.observation, batch.action), -1)
        one, two = ((critic(pairs).squeeze(-1) - target).square().mean() for critic in self.critics)
        action, log_prob = self.act(batch.observation, own_noise)
        pairs = torch.cat((batch.observation, action), -1)
        value = torch.minimum(*(frozen(critic, pairs) for critic in self.critics)).squeeze(-1)
        actor = (alpha * log_prob - value).mean()
        return Losses(actor, one + two, -(self.log_alpha * (log_prob.detach() + self.target_entropy)).mean())

    def update(self, batch: Batch, noise: tuple[Tensor, Tensor] | None = None) -> Losses:
        """One step of Adam on the sum of the losses, and of the targets."""
        losses = self.losses(batch, noise)
        (losses.actor + losses.qvalue + losses.alpha).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self._followers, self._sources, 1 - self.polyak)
        return losses
