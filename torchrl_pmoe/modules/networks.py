"""The built-in networks of mixture actors: trunk, experts' heads and router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrl.modules import MLP

from torchrl_pmoe.modules.heads import ClampedExp, MixtureParamExtractor

__all__ = [
    "ROUTERS",
    "Chain",
    "ExpertNetwork",
    "ExpertOptions",
    "SelectExpert",
    "expert_chain",
    "expert_network",
    "pop_expert_options",
]

ROUTERS = ("detached", "shared", "separate")


@dataclass(frozen=True)
class ExpertOptions:
    """Keywords that actors of several experts share and hand on to their network.

    Args:
        activation_class: of the built-in MLP.
        state_dependent_scale: ``False`` for one learned scale per expert and dimension.
        scale_mapping: positive map for the scale, a name or a callable; unset, :class:`ClampedExp`.
        scale_lb: smallest scale.
        head_init: the heads of the built-in network start uniform in ``[-head_init, head_init]``.
        loc_spread: the experts' biases for loc start uniform in ``[-loc_spread, loc_spread]``; a remedy against
            duplicate experts, off by default.
        floor: see :class:`MixtureParamExtractor`.
    """

    activation_class: type[nn.Module] = nn.ReLU
    state_dependent_scale: bool = True
    scale_mapping: str | Callable[[Tensor], Tensor] | None = None
    scale_lb: float = 0.0
    head_init: float = 1e-3
    loc_spread: float = 0.0
    floor: float = 0.0


def pop_expert_options(kwargs: dict[str, Any], **defaults: Any) -> ExpertOptions:
    """Take the fields of :class:`ExpertOptions` out of an actor's keywords.

    Args:
        kwargs: loses what is taken.
        **defaults: of this actor, where they differ.
    """
    taken = {field.name: kwargs.pop(field.name) for field in fields(ExpertOptions) if field.name in kwargs}
    return ExpertOptions(**{**defaults, **taken})


class Head(nn.Linear):
    """A linear layer with small initial weights, also after a reset.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        init: weights and biases start uniform in ``[-init, init]``.
        spread: the first ``spread_over`` biases start uniform in ``[-spread, spread]``; 0 is off.
        spread_over: number of those biases.
        device: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init: float,
        spread: float = 0.0,
        spread_over: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        # set first: the parent's constructor calls reset_parameters
        self.init, self.spread, self.spread_over = init, spread, spread_over
        super().__init__(in_features, out_features, device=device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights anew."""
        super().reset_parameters()
        nn.init.uniform_(self.weight, -self.init, self.init)
        nn.init.uniform_(self.bias, -self.init, self.init)
        if self.spread:
            self.bias[: self.spread_over].uniform_(-self.spread, self.spread)


class ExpertNetwork(nn.Module):
    """MLP trunk with a router and the experts' heads.

    From inputs ``[*B, …]`` to ``[*B, router_size + 2KA]``: the router's outputs, then ``K A`` locs, then ``K A`` values
    for the scale.
    """

    def __init__(
        self,
        num_experts: int,
        action_size: int,
        *,
        router_size: int,
        in_features: int | None,
        num_cells: Sequence[int],
        router: str | nn.Module,
        options: ExpertOptions,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()

        def trunk() -> nn.Module:
            return MLP(
                in_features=in_features,
                out_features=num_cells[-1],
                num_cells=list(num_cells[:-1]),
                activation_class=options.activation_class,
                activate_last_layer=True,
                device=device,
            )

        head = partial(Head, num_cells[-1], init=options.head_init, device=device)
        size = num_experts * action_size
        self.trunk = trunk()
        # K A locs, then K A values for the scale unless these are parameters
        outputs = 2 * size if options.state_dependent_scale else size
        self.experts = head(outputs, spread=options.loc_spread, spread_over=size)
        self.log_scale = None if options.state_dependent_scale else nn.Parameter(torch.zeros(size, device=device))
        # the router reads the trunk's features, or the inputs if it is a module or has a trunk of its own
        self.router: nn.Module
        if isinstance(router, nn.Module):
            self.router = router
        elif router == "separate":
            self.router = nn.Sequential(trunk(), head(router_size))
        else:
            self.router = head(router_size)
        self.reads = router if isinstance(router, str) else "separate"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset the scales, which belong to no layer; TorchRL resets every layer by itself."""
        if self.log_scale is not None:
            self.log_scale.zero_()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Outputs ``[*B, router_size + 2KA]`` for the concatenated inputs."""
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        features = self.trunk(x)  # [*B, num_cells[-1]]
        if self.reads == "separate":
            logits = self.router(x)
        else:
            logits = self.router(features.detach() if self.reads == "detached" else features)
        experts = self.experts(features)  # [*B, 2KA], or [*B, KA] where the scale is a parameter
        if self.log_scale is None:
            return torch.cat((logits, experts), -1)  # [*B, router_size + 2KA]
        # one scale for all states: [K A] to [*B, K A]
        return torch.cat((logits, experts, self.log_scale.expand(experts.shape)), -1)


class Chain(nn.Sequential):
    """``nn.Sequential`` whose modules may take several inputs."""

    def forward(self, *inputs: Tensor) -> Any:
        """Output of the last module."""
        out: Any = inputs
        for module in self:
            out = module(*out) if isinstance(out, tuple) else module(out)
        return out


class SelectExpert(nn.Module):
    """Loc and scale of one expert, from the inputs of the whole actor.

    Args:
        network: returns logits, locs and scales.
        expert: index of the expert.
    """

    def __init__(self, network: nn.Module, expert: int) -> None:
        super().__init__()
        self.network = network
        self.expert = expert

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Loc and scale, ``[*B, A]`` each."""
        _, loc, scale, *_ = self.network(*inputs)  # [*B, K, A] each
        return loc[..., self.expert, :], scale[..., self.expert, :]


def expert_network(
    owner: str,
    num_experts: int,
    action_size: int,
    *,
    router: str | nn.Module,
    num_cells: Sequence[int],
    **kwargs: Any,
) -> ExpertNetwork:
    """A built-in network, its options checked on behalf of ``owner``.

    Raises:
        ValueError: for an unknown router or no hidden layer.
    """
    if not isinstance(router, nn.Module) and router not in ROUTERS:
        raise ValueError(f"{owner}: router={router!r} is unknown; allowed: {', '.join(ROUTERS)}, or a module.")
    if len(num_cells) < 1:
        raise ValueError(f"{owner}: num_cells must name at least one hidden layer.")
    return ExpertNetwork(num_experts, action_size, router=router, num_cells=num_cells, **kwargs)


def expert_chain(
    owner: str,
    num_experts: int,
    action_size: int,
    *,
    network: nn.Module | None,
    router: str | nn.Module | None,
    default_router: Literal["detached", "shared", "separate"],
    options: ExpertOptions,
    **kwargs: Any,
) -> Chain:
    """The network of an actor and the extractor of its parameters.

    Args:
        owner: name of the class that an error speaks of.
        num_experts: ``K``.
        action_size: ``A``.
        network: in place of the built-in one.
        router: as in :class:`PMOEActor`.
        default_router: for the built-in network, where ``router`` is unset.
        options: of the network and the extractor.
        **kwargs: of :func:`expert_network`: ``in_features``, ``num_cells`` and ``device``.

    Returns:
        A module from the actor's inputs to ``logits`` ``[*B, K]``, ``loc`` and ``scale`` ``[*B, K, A]``.

    Raises:
        ValueError: for fewer than one expert, ``router`` beside ``network``, or an unknown option.
    """
    extractor = MixtureParamExtractor(
        num_experts,
        ClampedExp() if options.scale_mapping is None else options.scale_mapping,
        options.scale_lb,
        floor=options.floor,
        action_size=action_size,
    )
    if network is not None:
        # its own router is inside; only the split into parameters is ours
        if router is not None:
            raise ValueError(f"{owner}: router= belongs to the built-in network and cannot go with network=.")
        return Chain(network, extractor)
    built_in = expert_network(
        owner,
        num_experts,
        action_size,
        router_size=num_experts,
        router=default_router if router is None else router,
        options=options,
        **kwargs,
    )
    return Chain(built_in, extractor)
