"""Policies that PMOE is compared with, whose experts are blended into one Gaussian before the tanh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tensordict import NestedKey
from tensordict.nn import InteractionType, TensorDictModule
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.modules import IndependentNormal, ProbabilisticActor, SafeProbabilisticModule, TanhNormal

from torchrl_pmoe.distributions.routing import upcast
from torchrl_pmoe.modules.actors import ExpertsActor
from torchrl_pmoe.modules.networks import ExpertOptions, expert_chain, pop_expert_options
from torchrl_pmoe.modules.specs import refuse_unknown, single_action, try_distribution, with_bounds

__all__ = ["Blend", "GatingActor", "MCPActor", "Product"]

BLENDS = ("parameters", "actions")


class Blend(nn.Module):
    """The paper's gating operation: the router's weights ``w = softmax(logits)`` blend the experts into one Gaussian.

    Args:
        blend: ``"parameters"``: loc ``sum_k w_k mu_k``, scale ``sum_k w_k sigma_k``; ``"actions"``: the law of
            ``sum_k w_k a_k`` with independent ``a_k``, variance ``sum_k w_k^2 sigma_k^2``.

    Raises:
        ValueError: for another blend.
    """

    def __init__(self, blend: Literal["parameters", "actions"] = "parameters") -> None:
        super().__init__()
        if blend not in BLENDS:
            raise ValueError(f"GatingActor: blend={blend!r} is unknown; allowed: {', '.join(BLENDS)}.")
        self.blend = blend

    def forward(self, logits: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Loc and scale ``[*B, A]`` of the blend of ``K`` experts, ``[*B, K, A]``."""
        share = logits.softmax(-1).unsqueeze(-1)  # [*B, K, 1]
        blended = (share * loc).sum(-2)  # [*B, A]
        # scales add up, or variances do: sqrt(sum_k (w_k sigma_k)^2)
        if self.blend == "parameters":
            return blended, (share * scale).sum(-2)
        return blended, torch.linalg.vector_norm(share * scale, dim=-2)


class Product(nn.Module):
    """Multiplicative composition of experts (Peng et al. 2019, MCP, equation 4).

    Gates ``g = sigmoid(logits)``; precision ``sum_k g_k / sigma_k^2``; loc, the precision-weighted mean of the
    experts'. A single expert is its own product, ``g = 1``.
    """

    def forward(self, logits: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Loc and scale ``[*B, A]`` of the product of ``K`` experts, ``[*B, K, A]``."""
        log_gate = F.logsigmoid(upcast(logits)) if logits.shape[-1] > 1 else torch.zeros_like(upcast(logits))
        # in logarithms, because a small scale squared underflows; in float32, because logarithms cost digits
        log_precision = log_gate.unsqueeze(-1) - 2.0 * upcast(scale).log()  # [*B, K, A]
        blended = (log_precision.softmax(-2) * loc).sum(-2)  # shares of the precision weight the locs
        return blended.to(loc.dtype), (-0.5 * log_precision.logsumexp(-2)).exp().to(scale.dtype)


class _BlendedActor(ExpertsActor):
    """An actor of one Gaussian that several experts make; options as in :class:`PMOEActor`."""

    def __init__(
        self,
        num_experts: int,
        composition: nn.Module,
        *,
        spec: TensorSpec,
        in_features: int | None = None,
        in_keys: Sequence[NestedKey] = ("observation",),
        out_keys: Sequence[NestedKey] | None = None,
        param_keys: Sequence[NestedKey] = ("loc", "scale"),
        network: nn.Module | None = None,
        num_cells: Sequence[int] = (256, 256),
        router: Literal["detached", "shared", "separate"] | nn.Module | None = None,
        distribution_class: type[TanhNormal | IndependentNormal] = TanhNormal,
        distribution_kwargs: dict[str, Any] | None = None,
        default_interaction_type: InteractionType = InteractionType.RANDOM,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        takers = (_BlendedActor, ExpertOptions, ProbabilisticActor, SafeProbabilisticModule)
        refuse_unknown(type(self), kwargs, *takers, without=["floor"])  # a floor is for a router that draws
        options = pop_expert_options(kwargs)
        if isinstance(in_keys, str):
            in_keys = [in_keys]
        if isinstance(out_keys, str):
            out_keys = [out_keys]
        box, action_key, action_spec = single_action(owner, spec if device is None else spec.to(device), out_keys)
        if len(param_keys) != 2:
            raise ValueError(f"{owner}: param_keys must name loc and scale, got {list(param_keys)}.")
        kinds = (TanhNormal, IndependentNormal)
        if not (isinstance(distribution_class, type) and issubclass(distribution_class, kinds)):
            name = getattr(distribution_class, "__name__", repr(distribution_class))
            raise ValueError(f"{owner}: distribution_class must be TanhNormal or IndependentNormal, got {name}.")
        if issubclass(distribution_class, TanhNormal):
            distribution_kwargs = with_bounds(
                owner, box, distribution_kwargs, bounded="TanhNormal", unbounded="IndependentNormal"
            )
        chain = expert_chain(
            owner,
            num_experts,
            box.shape[-1],
            network=network,
            router=router,
            default_router="shared",
            options=options,
            in_features=in_features,
            num_cells=num_cells,
            device=device,
        )
        # from loc and scale of every expert, [*B, K, A], to those of one Gaussian, [*B, A]
        chain.append(composition)
        # a distribution of zeros, so that a wrong option of it is refused here
        loc = box.zero()
        try_distribution(owner, distribution_class, distribution_kwargs or {}, loc=loc, scale=loc + 1)
        super().__init__(
            TensorDictModule(chain, in_keys=list(in_keys), out_keys=list(param_keys)),
            in_keys=dict(zip(("loc", "scale"), param_keys, strict=True)),
            out_keys=[action_key],
            spec=action_spec,
            distribution_class=distribution_class,
            distribution_kwargs=distribution_kwargs or {},
            default_interaction_type=default_interaction_type,
            **kwargs,
        )
        self.num_experts = num_experts


class GatingActor(_BlendedActor):
    """Actor whose router blends the experts into one Gaussian: the gating operation that PMOE is compared with.

    Writes ``loc``, ``scale`` and ``action``, ``[*B, A]`` each. The policy has one mode, and any loss for one of
    TorchRL's Gaussian actors trains it.

    Args:
        num_experts: ``K``; one is the plain Gaussian.

    Keyword Args:
        blend: what is blended, ``"parameters"`` or ``"actions"`` (see :class:`Blend`).
        param_keys: where loc and scale go.
        router: as in :class:`PMOEActor`, but ``"shared"`` by default: an exact gradient reaches it.
        distribution_class: TorchRL's ``TanhNormal`` (the default) or ``IndependentNormal``.
        **kwargs: as in :class:`PMOEActor`, without ``floor``.

    Raises:
        ValueError: as :class:`PMOEActor`, and for an unknown blend.

    Examples:
        >>> actor = GatingActor(4, spec=Bounded(-1, 1, (6,)), in_features=17)
        >>> actor(TensorDict(observation=torch.randn(3, 17), batch_size=3))["loc"].shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        num_experts: int,
        *,
        spec: TensorSpec,
        blend: Literal["parameters", "actions"] = "parameters",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, Blend(blend), spec=spec, **kwargs)


class MCPActor(_BlendedActor):
    """Actor whose policy is the product of gated experts (multiplicative compositional policy, Peng et al. 2019).

    Writes ``loc``, ``scale`` and ``action``, ``[*B, A]`` each, as :class:`GatingActor` does.

    Args:
        num_experts: ``K``; one is the plain Gaussian.

    Keyword Args:
        **kwargs: as in :class:`GatingActor`, without ``blend``.

    Raises:
        ValueError: as :class:`PMOEActor`.

    Examples:
        >>> actor = MCPActor(4, spec=Bounded(-1, 1, (6,)), in_features=17)
        >>> actor(TensorDict(observation=torch.randn(3, 17), batch_size=3))["loc"].shape
        torch.Size([3, 6])
    """

    def __init__(self, num_experts: int, *, spec: TensorSpec, **kwargs: Any) -> None:
        super().__init__(num_experts, Product(), spec=spec, **kwargs)
