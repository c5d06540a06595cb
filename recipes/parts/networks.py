"""The networks of the recipes: policies by name, critics and values.

A policy of your own is one entry in :data:`POLICIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchrl.data import TensorSpec
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator

from torchrl_pmoe import NormalMixture, PMOEActor, TanhNormalMixture
from torchrl_pmoe.baselines import GatingActor, GaussianActor, MCPActor, OptionActor
from torchrl_pmoe.modules.actors import ExpertsActor
from torchrl_pmoe.modules.heads import ClampedExp
from torchrl_pmoe.runs import construct

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class ActorOptions:
    """What a policy is made from.

    Args:
        spec: of the action ``[A]``.
        in_features: size of the observation.
        num_experts: ``K``, for a policy that has some.
        hidden_sizes: widths of the hidden layers.
        activation: name in :data:`ACTIVATIONS`.
        router: ``"linear"`` (on the observation), ``"detached"``, ``"shared"`` or ``"separate"``.
        log_std_bounds: of scales that depend on the state; ``None`` for scales that do not.
        head_init: heads whose scales depend on the state start uniform in ``[-head_init, head_init]``.
        bounded: squash actions into the bounds of ``spec``; else they are Gaussian.
        mixture_kwargs: of the mixture's distribution.
        blend: of ``policy=gating``.
        return_log_prob: write ``action_log_prob``.
        device: of the parameters.
    """

    spec: TensorSpec
    in_features: int
    num_experts: int = 4
    hidden_sizes: Sequence[int] = (256, 256)
    activation: str = "relu"
    router: str = "detached"
    log_std_bounds: tuple[float, float] | None = (-20.0, 2.0)
    head_init: float = 1e-3
    bounded: bool = True
    mixture_kwargs: Mapping[str, Any] = field(default_factory=dict)
    blend: str = "parameters"
    return_log_prob: bool = False
    device: torch.device | str = "cpu"

    def of_experts(self) -> dict[str, Any]:
        """Keyword arguments of the actors that are made of experts."""
        scales: dict[str, Any] = {"state_dependent_scale": False}
        if self.log_std_bounds is not None:
            scales = {"scale_mapping": construct(ClampedExp, *self.log_std_bounds), "head_init": self.head_init}
        return {
            "spec": self.spec,
            "in_features": self.in_features,
            "num_cells": tuple(self.hidden_sizes),
            "activation_class": ACTIVATIONS[self.activation],
            "router": self.build_router(self.num_experts),
            "return_log_prob": self.return_log_prob,
            "device": self.device,
            **scales,
        }

    def build_router(self, outputs: int) -> nn.Linear | str:
        """The router that ``router`` names, of ``outputs`` numbers."""
        if self.router != "linear":
            return self.router
        return construct(nn.Linear, self.in_features, outputs, device=self.device)


# ------------------------------------------------------------------------------------------------ policies


def build_mixture(options: ActorOptions) -> PMOEActor:
    """A mixture of Gaussian experts."""
    return construct(
        PMOEActor,
        options.num_experts,
        distribution_class=TanhNormalMixture if options.bounded else NormalMixture,
        distribution_kwargs=dict(options.mixture_kwargs),
        **options.of_experts(),
    )


def build_gating(options: ActorOptions) -> GatingActor:
    """A gating mixture of experts: their parameters or actions are blended."""
    blended = {"distribution_class": TanhNormal if options.bounded else IndependentNormal}
    return construct(GatingActor, options.num_experts, blend=options.blend, **blended, **options.of_experts())


def build_mcp(options: ActorOptions) -> MCPActor:
    """Multiplicative Compositional Policies: the experts' Gaussians are multiplied."""
    blended = {"distribution_class": TanhNormal if options.bounded else IndependentNormal}
    return construct(MCPActor, options.num_experts, **blended, **options.of_experts())


def build_gaussian(options: ActorOptions) -> GaussianActor:
    """The control: TorchRL's own Gaussian actor, of the same size."""
    return construct(
        GaussianActor,
        options.spec,
        options.in_features,
        num_cells=tuple(options.hidden_sizes),
        activation_class=ACTIVATIONS[options.activation],
        log_std_bounds=options.log_std_bounds,
        head_init=options.head_init,
        distribution_class=TanhNormal if options.bounded else IndependentNormal,
        return_log_prob=options.return_log_prob,
        device=options.device,
    )


POLICIES: dict[str, Callable[[ActorOptions], ProbabilisticActor]] = {
    "pmoe": build_mixture,
    "gaussian": build_gaussian,
    "gating": build_gating,
    "mcp": build_mcp,
}
"""What ``policy=NAME`` builds."""

UNIMODAL = {
    "gaussian": "has one expert",
    "gating": "blends its experts into one Gaussian",
    "mcp": "multiplies its experts into one Gaussian",
}
"""Policies without a draw of an expert, and why they have none."""


# ------------------------------------------------------------------------------------------- critics and values


def build_qvalue(
    in_features: int, hidden_sizes: Sequence[int], activation: str = "relu", device: torch.device | str = "cpu"
) -> ValueOperator:
    """A critic of observation and action, ``in_features`` of both together."""
    mlp = construct(
        MLP,
        in_features=in_features,
        out_features=1,
        num_cells=list(hidden_sizes),
        activation_class=ACTIVATIONS[activation],
        device=device,
    )
    return construct(ValueOperator, mlp, in_keys=["observation", "action"])


def build_value(
    in_features: int,
    hidden_sizes: Sequence[int],
    activation: str = "tanh",
    device: torch.device | str = "cpu",
    *,
    num_values: int = 1,
    key: str = "state_value",
) -> ValueOperator:
    """The value of an observation, or several values of it."""
    mlp = MLP(
        in_features=in_features,
        out_features=num_values,
        num_cells=list(hidden_sizes),
        activation_class=ACTIVATIONS[activation],
        device=device,
    )
    return ValueOperator(mlp, in_keys=["observation"], out_keys=[key])


# ------------------------------------------------------------------------------------------- initial weights


def orthogonal_(module: nn.Module, last_gain: float, hidden_gain: float = math.sqrt(2)) -> nn.Module:
    """Initialise the linear layers of ``module`` orthogonally, the last one with a gain of its own; biases are zero."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, last_gain if layer is layers[-1] else hidden_gain)
        nn.init.zeros_(layer.bias)
    return module


def orthogonal_policy_(actor: nn.Module, head_gain: float, log_std_init: float) -> None:
    """Initialise a policy for PPO: orthogonal layers, heads of a small gain, the same scale everywhere.

    Args:
        actor: an actor of experts or options, or :func:`build_gaussian`'s, whose scales do not depend on the state;
            any other is left as it is.
        head_gain: of the last layers.
        log_std_init: log of every scale.
    """
    if isinstance(actor, ExpertsActor | OptionActor):
        network: Any = actor.network.module if isinstance(actor, OptionActor) else actor[0].module[0]
        orthogonal_(network.trunk, math.sqrt(2))
        orthogonal_(network.experts, head_gain)
        orthogonal_(network.router, head_gain)
        nn.init.constant_(network.log_scale, log_std_init)
    elif isinstance(actor, GaussianActor):
        mlp, scale = actor[0].module
        orthogonal_(mlp, head_gain)
        nn.init.constant_(scale.state_independent_scale, log_std_init)


# ----------------------------------------------------------------------------------------------- one line


def describe(env: str, policy: str, actor: nn.Module, critics: nn.Module | None = None) -> str:
    """One line on what is about to be trained: the policy and the number of its parameters."""

    def count(parameters: Iterable[nn.Parameter]) -> str:
        return f"{sum(parameter.numel() for parameter in parameters):,}"

    line = f"{env}: policy {policy}"
    if isinstance(actor, OptionActor):
        line += f" of {actor.num_options} options"
    elif isinstance(actor, ExpertsActor):
        line += f" of {actor.num_experts} experts"
    line += f", {count(actor.parameters())} parameters"
    if isinstance(actor, ExpertsActor | OptionActor):
        # a network of the user's own has no router that can be told apart
        with suppress(ValueError):
            line += f" ({count(actor.router_parameters())} of them the router's)"
    return line if critics is None else f"{line}; critics {count(critics.parameters())} parameters"
