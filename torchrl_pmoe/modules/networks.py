"""The networks below mixture actors: trunk, experts' heads and router."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrl.modules import MLP

from torchrl_pmoe.modules.heads import ClampedExp, MixtureParamExtractor

__all__ = ["ROUTERS", "Chain", "ExpertNetwork", "SelectExpert", "expert_chain", "expert_network"]

ROUTERS = ("detached", "shared", "separate")


class Head(nn.Linear):
    """A linear layer that starts small, and starts so again when it is reset.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        init: weights and biases start uniform in ``[-init, init]``.
        spread: the first ``spread_over`` biases start uniform in ``[-spread, spread]``; unused where it is 0.
        spread_over: see above.
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
        # what the parent's constructor resets by
        self.init, self.spread, self.spread_over = init, spread, spread_over
        super().__init__(in_features, out_features, device=device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the start anew."""
        super().reset_parameters()
        nn.init.uniform_(self.weight, -self.init, self.init)
        nn.init.uniform_(self.bias, -self.init, self.init)
        if self.spread:
            self.bias[: self.spread_over].uniform_(-self.spread, self.spread)


class ExpertNetwork(nn.Module):
    """MLP trunk with a router and the experts' heads; puts out ``[..., router_size + 2KA]``."""

    def __init__(
        self,
        num_experts: int,
        action_size: int,
        *,
        router_size: int,
        in_features: int | None,
        num_cells: Sequence[int],
        activation_class: type[nn.Module],
        router: str | nn.Module,
        state_dependent_scale: bool,
        init: float,
        loc_spread: float,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()

        def trunk() -> nn.Module:
            return MLP(
                in_features=in_features,
                out_features=num_cells[-1],
                num_cells=list(num_cells[:-1]),
                activation_class=activation_class,
                activate_last_layer=True,
                device=device,
            )

        head = partial(Head, num_cells[-1], init=init, device=device)
        experts = num_experts * action_size
        self.trunk = trunk()
        outputs = 2 * experts if state_dependent_scale else experts
        self.experts = head(outputs, spread=loc_spread, spread_over=experts)
        self.log_scale = None if state_dependent_scale else nn.Parameter(torch.zeros(experts, device=device))
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
        """Start the scales anew that belong to no layer; layers are reset each by itself."""
        if self.log_scale is not None:
            self.log_scale.zero_()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features of the inputs, concatenated."""
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        features = self.trunk(x)
        if self.reads == "separate":
            logits = self.router(x)
        else:
            logits = self.router(features.detach() if self.reads == "detached" else features)
        experts = self.experts(features)
        if self.log_scale is None:
            return torch.cat((logits, experts), -1)
        return torch.cat((logits, experts, self.log_scale.expand(experts.shape)), -1)


class Chain(nn.Sequential):
    """``nn.Sequential`` whose modules may take several inputs."""

    def forward(self, *inputs: Tensor) -> Any:
        """What the last module puts out."""
        out: Any = inputs
        for module in self:
            out = module(*out) if isinstance(out, tuple) else module(out)
        return out


class SelectExpert(nn.Module):
    """Loc and scale of one expert, from the inputs of the whole actor.

    Args:
        network: puts out logits, locs and scales.
        expert: which one.
    """

    def __init__(self, network: nn.Module, expert: int) -> None:
        super().__init__()
        self.network = network
        self.expert = expert

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Loc and scale, ``[*B, A]`` each."""
        _, loc, scale, *_ = self.network(*inputs)
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
    in_features: int | None,
    num_cells: Sequence[int],
    activation_class: type[nn.Module],
    router: str | nn.Module | None,
    default_router: Literal["detached", "shared", "separate"],
    state_dependent_scale: bool,
    scale_mapping: str | Callable[[Tensor], Tensor] | None,
    scale_lb: float,
    head_init: float,
    floor: float,
    loc_spread: float,
    device: torch.device | str | None,
) -> Chain:
    """The network of an actor and the extractor of its parameters; options as in :class:`PMOEActor`.

    Returns:
        A module from the actor's inputs to ``logits`` ``[*B, K]``, ``loc`` and ``scale`` ``[*B, K, A]``.

    Raises:
        ValueError: for fewer than one expert, ``router`` beside ``network``, or an unknown option.
    """
    extractor = MixtureParamExtractor(
        num_experts,
        ClampedExp() if scale_mapping is None else scale_mapping,
        scale_lb,
        floor=floor,
        action_size=action_size,
    )
    if network is not None:
        if router is not None:
            raise ValueError(f"{owner}: router= belongs to the built-in network and cannot go with network=.")
        return Chain(network, extractor)
    built_in = expert_network(
        owner,
        num_experts,
        action_size,
        router_size=num_experts,
        in_features=in_features,
        num_cells=num_cells,
        activation_class=activation_class,
        router=default_router if router is None else router,
        state_dependent_scale=state_dependent_scale,
        init=head_init,
        loc_spread=loc_spread,
        device=device,
    )
    return Chain(built_in, extractor)
