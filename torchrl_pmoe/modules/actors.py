"""Actors whose policy is a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, TensorDictModule, TensorDictModuleBase
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded
from torchrl.modules import (
    MLP,
    IndependentNormal,
    ProbabilisticActor,
    SafeProbabilisticModule,
    TanhNormal,
)

from torchrl_pmoe.distributions import NormalMixture, TanhNormalMixture
from torchrl_pmoe.modules.heads import ClampedExp, MixtureParamExtractor

__all__ = ["BestOfExpertsActor", "PMOEActor"]

_PARAMS = ("logits", "loc", "scale")


class _DefaultRouter(str):
    """The default of ``router``, told apart from the same word given by a caller."""


_DETACHED = _DefaultRouter("detached")


class _ExpertNetwork(nn.Module):
    """MLP trunk with a router and the experts' heads; puts out ``[..., K (2A + 1)]``."""

    def __init__(
        self,
        num_experts: int,
        action_size: int,
        *,
        in_features: int | None,
        num_cells: Sequence[int],
        activation_class: type[nn.Module],
        router: Literal["detached", "shared", "separate"] | nn.Module,
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

        def head(out_features: int) -> nn.Linear:
            layer = nn.Linear(num_cells[-1], out_features, device=device)
            nn.init.uniform_(layer.weight, -init, init)
            nn.init.uniform_(layer.bias, -init, init)
            return layer

        experts = num_experts * action_size
        self.trunk = trunk()
        self.experts = head(2 * experts if state_dependent_scale else experts)
        if loc_spread:
            with torch.no_grad():
                self.experts.bias[:experts].uniform_(-loc_spread, loc_spread)
        self.log_scale = None if state_dependent_scale else nn.Parameter(torch.zeros(experts, device=device))
        self.router: nn.Module
        if isinstance(router, nn.Module):
            self.router = router
        elif router == "separate":
            self.router = nn.Sequential(trunk(), head(num_experts))
        else:
            self.router = head(num_experts)
        self.reads = router if isinstance(router, str) else "separate"

    def forward(self, *inputs: Tensor) -> Tensor:
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


class _Chain(nn.Sequential):
    """``nn.Sequential`` whose first module may take several inputs."""

    def forward(self, *inputs: Tensor) -> Any:
        network, extractor = self
        out = network(*inputs)
        return extractor(*out) if isinstance(out, tuple) else extractor(out)


class _SelectExpert(nn.Module):
    """Loc and scale of one expert, from the inputs of the whole actor."""

    def __init__(self, network: nn.Module, expert: int) -> None:
        super().__init__()
        self.network = network
        self.expert = expert

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        _, loc, scale, *_ = self.network(*inputs)
        return loc[..., self.expert, :], scale[..., self.expert, :]


class _MixtureModule(SafeProbabilisticModule):
    """Draws from the mixture and, on request, scores the action as stored.

    TorchRL's module would store the score of the pre-tanh draw; PPO recomputes the log-density from the stored action
    and its ratio would not start at one. The base class one step up scores what it has stored.
    """

    forward = ProbabilisticTensorDictModule.forward

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kwargs_cache: dict[tuple[torch.device, torch.dtype], dict[str, Any]] = {}

    def get_dist(self, tensordict: TensorDictBase) -> NormalMixture:
        """The mixture that the parameters in ``tensordict`` describe."""
        params = {name: tensordict.get(key) for name, key in zip(self.dist_keys, self.in_keys, strict=True)}
        return self.distribution_class(**params, **self._kwargs_for(params["loc"]))

    build_dist_from_params = get_dist

    def _kwargs_for(self, loc: Tensor) -> dict[str, Any]:
        # the bounds are no parameters and do not travel with .to(): one copy per device, not one per call
        if not any(isinstance(value, Tensor) for value in self.distribution_kwargs.values()):
            return self.distribution_kwargs
        place = (loc.device, loc.dtype)
        if place in self._kwargs_cache:
            return self._kwargs_cache[place]
        moved = {
            name: value.to(*place) if isinstance(value, Tensor) else value
            for name, value in self.distribution_kwargs.items()
        }
        if not torch.is_inference_mode_enabled():  # such tensors are of no use to autograd later
            self._kwargs_cache[place] = moved
        return moved


def _action_leaf(spec: TensorSpec, out_keys: Sequence[NestedKey] | None) -> tuple[TensorSpec, NestedKey, Composite]:
    """The action's own spec, its key, and a composite that holds it alone."""
    if out_keys is not None and len(out_keys) != 1:
        raise ValueError(f"PMOEActor: out_keys must name one action, got {list(out_keys)}.")
    if not isinstance(spec, Composite):
        key = "action" if out_keys is None else out_keys[0]
        return spec, key, Composite({key: spec})
    leaves = list(spec.keys(True, True))
    found = leaves if out_keys is None else [key for key in leaves if key == out_keys[0]]
    if len(found) != 1:
        raise ValueError(f"PMOEActor: spec must hold one action, got keys {leaves}.")
    alone = spec.clone()
    for key in leaves:
        if key != found[0]:
            del alone[key]
    return spec[found[0]], found[0], alone


def _bounds(spec: TensorSpec) -> dict[str, float | Tensor]:
    """``low`` and ``high`` of a bounded spec, as numbers where they are the same in every dimension."""
    bounds: dict[str, float | Tensor] = {}
    for name in ("low", "high"):
        bound = getattr(spec.space, name).reshape(-1, spec.shape[-1])
        if not bound.isfinite().all() or not (bound == bound[0]).all():
            raise ValueError(
                f"PMOEActor: the spec's {name} must be finite and the same for every action in a batch, "
                f"got {bound.tolist()}."
            )
        bounds[name] = bound[0, 0].item() if (bound[0] == bound[0, 0]).all() else bound[0].clone()
    return bounds


class PMOEActor(ProbabilisticActor):
    """Actor whose policy is a mixture of Gaussian experts (PMOE, arXiv 2104.09122).

    Writes ``logits`` ``[*B, K]``, ``loc`` and ``scale`` ``[*B, K, A]`` and ``action`` ``[*B, A]``; with
    ``return_log_prob`` also ``action_log_prob`` ``[*B]``, the mixture's log-density of the action as stored.

    Args:
        num_experts: ``K``.

    Keyword Args:
        spec: of the action; its bounds become those of the distribution.
        in_features: size of the input; unset, the first call decides (lazy layers).
        in_keys: what the network reads; several are concatenated.
        out_keys: where the action goes; from a ``Composite`` spec its key, else ``"action"``.
        param_keys: where logits, loc and scale go.
        network: any module that ends in ``K (2A + 1)`` features (see :class:`MixtureParamExtractor`), in place of the
            built-in MLP.
        num_cells: hidden layers of the built-in MLP.
        activation_class: of the built-in MLP.
        router: what the built-in router reads: ``"detached"`` features of the trunk (the authors' code), ``"shared"``
            features with their gradient, ``"separate"`` for an MLP of its own, or a module from the inputs to ``K``
            logits.
        state_dependent_scale: ``False`` for one learned scale per expert and dimension.
        scale_mapping: positive map for the scale, a name or a callable.
        scale_lb: smallest scale.
        head_init: the heads of the built-in network start uniform in ``[-head_init, head_init]``.
        floor: see :class:`MixtureParamExtractor`.
        loc_spread: the experts' biases for loc start uniform in ``[-loc_spread, loc_spread]``; a remedy against
            duplicate experts, off by default.
        distribution_class: :class:`TanhNormalMixture` or :class:`NormalMixture`.
        distribution_kwargs: options of the distribution (``routing``, ``score``, …).
        return_log_prob: whether to write the log-density.
        log_prob_key: where it goes; ``"<action key>_log_prob"`` by default.
        default_interaction_type: used where no ``set_exploration_type`` says otherwise.
        device: of the built-in network.
        **kwargs: of :class:`~torchrl.modules.SafeProbabilisticModule`.

    Raises:
        ValueError: for fewer than one expert, a spec that is not a box of finite bounds, ``router`` beside
            ``network``, or an unknown option.

    Examples:
        >>> actor = PMOEActor(4, spec=Bounded(-1, 1, (6,)), in_features=17)
        >>> actor(TensorDict(observation=torch.randn(3, 17), batch_size=3))["action"].shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        num_experts: int,
        *,
        spec: TensorSpec,
        in_features: int | None = None,
        in_keys: Sequence[NestedKey] = ("observation",),
        out_keys: Sequence[NestedKey] | None = None,
        param_keys: Sequence[NestedKey] = _PARAMS,
        network: nn.Module | None = None,
        num_cells: Sequence[int] = (256, 256),
        activation_class: type[nn.Module] = nn.ReLU,
        router: Literal["detached", "shared", "separate"] | nn.Module = _DETACHED,  # type: ignore[assignment]
        state_dependent_scale: bool = True,
        scale_mapping: str | Callable[[Tensor], Tensor] | None = None,
        scale_lb: float = 0.0,
        head_init: float = 1e-3,
        floor: float = 0.0,
        loc_spread: float = 0.0,
        distribution_class: type[NormalMixture] = TanhNormalMixture,
        distribution_kwargs: dict[str, Any] | None = None,
        return_log_prob: bool = False,
        log_prob_key: NestedKey | None = None,
        default_interaction_type: InteractionType = InteractionType.RANDOM,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(in_keys, str):
            in_keys = [in_keys]
        if isinstance(out_keys, str):
            out_keys = [out_keys]
        leaf, action_key, action_spec = _action_leaf(spec if device is None else spec.to(device), out_keys)
        if not isinstance(leaf, Bounded | Unbounded) or not leaf.dtype.is_floating_point or not leaf.shape:
            raise ValueError(f"PMOEActor: the action spec must be a box of floats, got {type(leaf).__name__}.")
        if not issubclass(distribution_class, NormalMixture):
            raise ValueError(
                "PMOEActor: distribution_class must be NormalMixture or TanhNormalMixture, "
                f"got {distribution_class.__name__}."
            )
        if len(param_keys) != 3:
            raise ValueError(f"PMOEActor: param_keys must name logits, loc and scale, got {list(param_keys)}.")
        distribution_kwargs = dict(distribution_kwargs or {})
        if issubclass(distribution_class, TanhNormalMixture) and not {"low", "high"} <= distribution_kwargs.keys():
            if not isinstance(leaf, Bounded):
                raise ValueError(
                    "PMOEActor: TanhNormalMixture needs a bounded action spec (NormalMixture takes an unbounded "
                    f"one), got {type(leaf).__name__}."
                )
            distribution_kwargs = {**_bounds(leaf), **distribution_kwargs}

        action_size = leaf.shape[-1]
        extractor = MixtureParamExtractor(
            num_experts,
            ClampedExp() if scale_mapping is None else scale_mapping,
            scale_lb,
            floor=floor,
            action_size=action_size,
        )
        if network is None:
            if not isinstance(router, nn.Module) and router not in ("detached", "shared", "separate"):
                raise ValueError(
                    f"PMOEActor: router={router!r} is unknown; allowed: detached, shared, separate, or a module."
                )
            if len(num_cells) < 1:
                raise ValueError("PMOEActor: num_cells must name at least one hidden layer.")
            network = _ExpertNetwork(
                num_experts,
                action_size,
                in_features=in_features,
                num_cells=num_cells,
                activation_class=activation_class,
                router=router,
                state_dependent_scale=state_dependent_scale,
                init=head_init,
                loc_spread=loc_spread,
                device=device,
            )
        elif router is not _DETACHED:
            raise ValueError("PMOEActor: router= belongs to the built-in network and cannot go with network=.")

        module = TensorDictModule(
            _Chain(network, extractor),
            in_keys=list(in_keys),
            out_keys=list(param_keys),
        )
        head = _MixtureModule(
            in_keys=dict(zip(_PARAMS, param_keys, strict=True)),
            out_keys=[action_key],
            spec=action_spec,
            distribution_class=distribution_class,
            distribution_kwargs=distribution_kwargs,
            return_log_prob=return_log_prob,
            log_prob_key=log_prob_key,
            default_interaction_type=default_interaction_type,
            **kwargs,
        )
        # ProbabilisticActor.__init__ builds TorchRL's own probabilistic module, with the other log-density
        super(ProbabilisticActor, self).__init__(module, head)
        self.num_experts = num_experts

    def expert(self, k: int) -> ProbabilisticActor:
        """Actor that shares this one's parameters and follows expert ``k`` alone, as a ``TanhNormal``.

        Raises:
            IndexError: if there is no expert ``k``.
        """
        if not 0 <= k < self.num_experts:
            raise IndexError(f"expert {k} is out of range for {self.num_experts} experts.")
        head = self[-1]
        bounded = issubclass(head.distribution_class, TanhNormalMixture)
        kwargs = {name: head.distribution_kwargs[name] for name in ("low", "high")} if bounded else {"tanh_loc": False}
        return ProbabilisticActor(
            TensorDictModule(_SelectExpert(self[0].module, k), in_keys=self[0].in_keys, out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            out_keys=head.dist_sample_keys,
            spec=head.spec.clone(),
            distribution_class=TanhNormal if bounded else IndependentNormal,
            distribution_kwargs=kwargs,
            return_log_prob=head.return_log_prob,
            log_prob_key=head.log_prob_key,
            default_interaction_type=head.default_interaction_type,
        )

    def router_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the built-in router, for an optimiser group of their own (``router_lr``).

        Raises:
            ValueError: if the actor was given a network of its own.
        """
        network = self[0].module[0]
        if not isinstance(network, _ExpertNetwork):
            raise ValueError("PMOEActor: only the built-in network has a router that can be told apart.")
        return network.router.parameters()


class BestOfExpertsActor(TensorDictModuleBase):
    """Acts on the proposal that the critics rank highest of ``K``, without gradient.

    Exploring, every expert proposes a draw; acting deterministically, its squashed loc. Writes the action alone.

    Args:
        actor: whose ``get_dist`` returns a mixture.
        score_proposals: value of proposals ``[*B, K, A]`` in the states of a tensordict ``[*B]``, ``[*B, K]``; that
            of a loss, for instance :meth:`PMOESACLoss.score_proposals`.
    """

    def __init__(self, actor: ProbabilisticActor, score_proposals: Callable[[TensorDictBase, Tensor], Tensor]) -> None:
        super().__init__()
        self.actor = actor
        self.score_proposals = score_proposals
        self.in_keys = actor.in_keys
        self.action_key = actor[-1].dist_sample_keys[0]
        self.out_keys = [self.action_key]

    def get_dist(self, tensordict: TensorDictBase) -> NormalMixture:
        """The wrapped actor's mixture."""
        return self.actor.get_dist(tensordict)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action into ``tensordict``."""
        dist = self.actor.get_dist(tensordict)
        kind = interaction_type() or self.actor[-1].default_interaction_type
        proposals = dist.propose().action if kind is InteractionType.RANDOM else dist.expert_mode
        best = self.score_proposals(tensordict, proposals).argmax(-1)
        action = proposals.take_along_dim(best[..., None, None], -2).squeeze(-2)
        return tensordict.set(self.action_key, action)
