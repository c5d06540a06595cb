"""The policies that a recipe offers, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig
from torch import nn
from torchrl.data import TensorSpec

from torchrl_pmoe import GatingActor, MCPActor, PMOEActor
from torchrl_pmoe.baselines import OptionActor
from torchrl_pmoe.modules.actors import ExpertsActor

UNIMODAL = {
    "gaussian": "has one expert",
    "gating": "blends its experts into one Gaussian",
    "mcp": "multiplies its experts into one Gaussian",
}
"""Policies without a draw of an expert, and why they have none."""


def build_experts_actor(
    cfg: DictConfig, spec: TensorSpec, *, mixture: Mapping[str, Any], blended: Mapping[str, Any], **kwargs: Any
) -> ExpertsActor:
    """The actor of several experts that ``policy`` names.

    Args:
        cfg: a resolved config whose policy is not the Gaussian.
        spec: of the action.
        mixture: options of :class:`~torchrl_pmoe.PMOEActor` alone.
        blended: options of the unimodal ones alone.
        **kwargs: options of all of them.
    """
    kwargs.update(spec=spec, device=cfg.device)
    if cfg.policy == "pmoe":
        return PMOEActor(cfg.num_experts, **mixture, **kwargs)
    if cfg.policy == "gating":
        return GatingActor(cfg.num_experts, blend=cfg.blend, **blended, **kwargs)
    return MCPActor(cfg.num_experts, **blended, **kwargs)


def describe(cfg: DictConfig, actor: nn.Module, critics: nn.Module | None = None) -> str:
    """One line on what is about to be trained: the policy and the number of its parameters."""

    def count(parameters: Iterable[nn.Parameter]) -> str:
        return f"{sum(parameter.numel() for parameter in parameters):,}"

    line = f"{cfg.env}: policy {cfg.policy}"
    if cfg.policy == "dac":
        line += f" of {cfg.num_options} options"
    elif cfg.policy != "gaussian":
        line += f" of {cfg.num_experts} experts"
    line += f", {count(actor.parameters())} parameters"
    if isinstance(actor, ExpertsActor | OptionActor):
        line += f" ({count(actor.router_parameters())} of them the router's)"
    return line if critics is None else f"{line}; critics {count(critics.parameters())} parameters"
