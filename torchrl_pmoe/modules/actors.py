"""Actors whose policy is a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, TensorDictModule, TensorDictModuleBase
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor, nn
from torchrl.data import TensorSpec, Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import IndependentNormal, ProbabilisticActor, SafeProbabilisticModule, TanhNormal

from torchrl_pmoe.distributions import NormalMixture, TanhNormalMixture
from torchrl_pmoe.distributions.proposals import take_expert
from torchrl_pmoe.modules.networks import (
    Chain,
    ExpertNetwork,
    ExpertOptions,
    SelectExpert,
    expert_chain,
    pop_expert_options,
)
from torchrl_pmoe.modules.specs import refuse_unknown, single_action, try_distribution, with_bounds

__all__ = ["BestOfExpertsActor", "CommittedExpertsActor", "ExpertsActor", "MeanOfDrawnExpertActor", "PMOEActor"]

_PARAMS = ("logits", "loc", "scale")


class _MixtureModule(SafeProbabilisticModule):
    """Draws from the mixture and, on request, writes the log-density of the action as stored.

    TorchRL's module would write the log-density of the pre-tanh draw. PPO computes the log-density from the stored
    action, and its ratio would not start at one.
    """

    # the base class takes the log-density of the action that it has written
    forward = ProbabilisticTensorDictModule.forward

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kwargs_cache: dict[tuple[torch.device, torch.dtype], dict[str, Any]] = {}

    def get_dist(self, tensordict: TensorDictBase) -> NormalMixture:
        """The mixture that the parameters in ``tensordict`` describe."""
        # logits [*B, K], loc and scale [*B, K, A]
        params = {name: tensordict.get(key) for name, key in zip(self.dist_keys, self.in_keys, strict=True)}
        return self.distribution_class(**params, **self._kwargs_for(params["loc"]))

    build_dist_from_params = get_dist

    def _kwargs_for(self, loc: Tensor) -> dict[str, Any]:
        # bounds are not parameters, so .to() does not move them: keep one copy per device instead of one per call
        if not any(isinstance(value, Tensor) for value in self.distribution_kwargs.values()):
            return self.distribution_kwargs
        place = (loc.device, loc.dtype)
        if place in self._kwargs_cache:
            return self._kwargs_cache[place]
        moved = {
            name: value.to(*place) if isinstance(value, Tensor) else value
            for name, value in self.distribution_kwargs.items()
        }
        if not torch.is_inference_mode_enabled():  # autograd could not use an inference tensor later
            self._kwargs_cache[place] = moved
        return moved


class ExpertsActor(ProbabilisticActor):
    """Base class of the actors with several experts; see :class:`PMOEActor`."""

    num_experts: int

    def _experts(self) -> nn.Module:
        """From the inputs to logits, locs and scales: the network and its extractor alone."""
        # baselines append a module that blends the experts
        return Chain(*self[0].module[:2])

    def expert(self, k: int) -> ProbabilisticActor:
        """Actor that shares this actor's parameters and follows expert ``k`` alone, as a ``TanhNormal``.

        Raises:
            IndexError: if there is no expert ``k``.
        """
        if not 0 <= k < self.num_experts:
            raise IndexError(f"expert {k} is out of range for {self.num_experts} experts.")
        head = self[-1]  # the probabilistic module
        bounded = issubclass(head.distribution_class, TanhNormalMixture | TanhNormal)
        kwargs = {name: head.distribution_kwargs[name] for name in ("low", "high")} if bounded else {"tanh_loc": False}
        return ProbabilisticActor(
            TensorDictModule(SelectExpert(self._experts(), k), in_keys=self[0].in_keys, out_keys=["loc", "scale"]),
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
            ValueError: if the actor was made with ``network``.
        """
        network = self[0].module[0]
        if not isinstance(network, ExpertNetwork):
            raise ValueError(f"{type(self).__name__}: only the built-in network has a router that can be told apart.")
        return network.router.parameters()


class PMOEActor(ExpertsActor):
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
        network: any module that ends in ``K (2A + 1)`` features (see :class:`MixtureParamExtractor`), which replaces
            the built-in MLP.
        num_cells: hidden layers of the built-in MLP.
        router: what the built-in router reads: ``"detached"`` features of the trunk (the authors' code, the default),
            ``"shared"`` features with their gradient, ``"separate"`` for an MLP of its own, or a module from the
            inputs to ``K`` logits.
        distribution_class: :class:`TanhNormalMixture` or :class:`NormalMixture`.
        distribution_kwargs: options of the distribution (``routing``, ``score``, …).
        return_log_prob: whether to write the log-density.
        default_interaction_type: used where no ``set_exploration_type`` says otherwise.
        device: of the built-in network.
        **kwargs: the fields of :class:`~torchrl_pmoe.modules.ExpertOptions` (``activation_class``,
            ``state_dependent_scale``, ``scale_mapping``, ``scale_lb``, ``head_init``, ``loc_spread``, ``floor``), and
            options of :class:`~torchrl.modules.SafeProbabilisticModule`, such as ``log_prob_key``
            (``"<action key>_log_prob"`` by default).

    Raises:
        ValueError: for fewer than one expert, a spec that is not a box of finite bounds, ``router`` beside
            ``network``, or a value that an option cannot have.
        TypeError: for an unknown option.

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
        router: Literal["detached", "shared", "separate"] | nn.Module | None = None,
        distribution_class: type[NormalMixture] = TanhNormalMixture,
        distribution_kwargs: dict[str, Any] | None = None,
        return_log_prob: bool = False,
        default_interaction_type: InteractionType = InteractionType.RANDOM,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(in_keys, str):
            in_keys = [in_keys]
        if isinstance(out_keys, str):
            out_keys = [out_keys]
        refuse_unknown(PMOEActor, kwargs, ExpertOptions, SafeProbabilisticModule)
        options = pop_expert_options(kwargs)
        box, action_key, action_spec = single_action("PMOEActor", spec if device is None else spec.to(device), out_keys)
        if not issubclass(distribution_class, NormalMixture):
            raise ValueError(
                "PMOEActor: distribution_class must be NormalMixture or TanhNormalMixture, "
                f"got {distribution_class.__name__}."
            )
        if len(param_keys) != 3:
            raise ValueError(f"PMOEActor: param_keys must name logits, loc and scale, got {list(param_keys)}.")
        if issubclass(distribution_class, TanhNormalMixture):
            distribution_kwargs = with_bounds(
                "PMOEActor", box, distribution_kwargs, bounded="TanhNormalMixture", unbounded="NormalMixture"
            )
        chain = expert_chain(
            "PMOEActor",
            num_experts,
            box.shape[-1],
            network=network,
            router=router,
            default_router="detached",
            options=options,
            in_features=in_features,
            num_cells=num_cells,
            device=device,
        )
        # a distribution of zeros, [*agents, K, A], so that a wrong option of it is refused here
        loc = torch.zeros(*box.shape[:-1], num_experts, box.shape[-1], dtype=box.dtype, device=box.device)
        try_distribution(
            "PMOEActor", distribution_class, distribution_kwargs or {}, logits=loc[..., 0], loc=loc, scale=loc + 1
        )
        module = TensorDictModule(chain, in_keys=list(in_keys), out_keys=list(param_keys))
        head = _MixtureModule(
            in_keys=dict(zip(_PARAMS, param_keys, strict=True)),
            out_keys=[action_key],
            spec=action_spec,
            distribution_class=distribution_class,
            distribution_kwargs=distribution_kwargs or {},
            return_log_prob=return_log_prob,
            default_interaction_type=default_interaction_type,
            **kwargs,
        )
        # ProbabilisticActor.__init__ builds TorchRL's own probabilistic module, with the other log-density
        super(ProbabilisticActor, self).__init__(module, head)
        self.num_experts = num_experts


class BestOfExpertsActor(TensorDictModuleBase):
    """Acts on the proposal that the critics rank highest of ``K``, without gradient.

    Each expert proposes a draw when exploring, and its squashed loc when acting deterministically. Writes the action,
    beside what the actor's network writes.

    Args:
        actor: whose ``get_dist`` returns a mixture.
        score_proposals: from states ``[*B]`` and proposals ``[*B, K, A]`` to values ``[*B, K]``, for instance
            :meth:`PMOESACLoss.score_proposals`. A method's module becomes a part of the actor: its parameters are
            among the actor's, so a collector that updates the policy's weights updates the critics too. Critics that a
            ``functools.partial`` or a closure holds stay outside: in another process they would be left as they were.
    """

    def __init__(self, actor: ProbabilisticActor, score_proposals: Callable[[TensorDictBase, Tensor], Tensor]) -> None:
        super().__init__()
        self.actor = actor
        self.score_proposals = score_proposals
        # the loss, if score_proposals is its method
        owner = getattr(score_proposals, "__self__", None)
        if isinstance(owner, nn.Module):
            self.critics = owner
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
        # [*B, K, A]
        proposals = dist.propose().action if kind is InteractionType.RANDOM else dist.expert_mode
        best = self.score_proposals(tensordict, proposals).argmax(-1)  # [*B]
        return tensordict.set(self.action_key, take_expert(proposals, best))


class MeanOfDrawnExpertActor(TensorDictModuleBase):
    """Draws an expert from the router at every step and acts on its mean, as the paper evaluates.

    The mean is the squashed loc. The expert is drawn whatever the exploration type. Writes the action, beside what the
    actor's network writes.

    Args:
        actor: whose ``get_dist`` returns a mixture.

    Examples:
        >>> actor = PMOEActor(4, spec=Bounded(-1, 1, (6,)), in_features=17)
        >>> MeanOfDrawnExpertActor(actor)(TensorDict(observation=torch.randn(3, 17), batch_size=3))["action"].shape
        torch.Size([3, 6])
    """

    def __init__(self, actor: ProbabilisticActor) -> None:
        super().__init__()
        self.actor = actor
        self.in_keys = actor.in_keys
        self.action_key = actor[-1].dist_sample_keys[0]
        self.out_keys = [self.action_key]

    def get_dist(self, tensordict: TensorDictBase) -> NormalMixture:
        """The wrapped actor's mixture."""
        return self.actor.get_dist(tensordict)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action into ``tensordict``."""
        dist = self.actor.get_dist(tensordict)
        # means [*B, K, A], the drawn expert [*B]
        return tensordict.set(self.action_key, take_expert(dist.expert_mode, dist.sample_expert()))


class CommittedExpertsActor(TensorDictModuleBase):
    """Keeps to one expert for a while: draws it from the router at the start of an episode, then every so many steps.

    A policy that draws an expert at every step mixes ways of doing a task within one episode. Here an expert acts until
    its time is over, so what it has learned becomes a route of its own.

    What the actor remembers travels in the tensordict. It reads ``expert`` and ``steps_left`` of the step before, and
    writes the expert that acts now, and for how many steps it still acts after this one; both again under ``next``,
    where the following step finds them. Give the environment the transform of :meth:`make_tensordict_primer`, and a
    collector or a rollout does the rest. ``is_init`` of TorchRL's ``InitTracker`` begins an episode where it is there;
    an entry that is missing begins one too.

    The expert is drawn whatever the exploration type. It acts by a draw, or by its mean with ``deterministic=True`` and
    under exploration types other than ``RANDOM``.

    Args:
        actor: whose ``get_dist`` returns a mixture, ``[*B]`` states to ``K`` experts.

    Keyword Args:
        commit_steps: for how many steps an expert acts; the whole episode, if not given.
        deterministic: act by the mean of the expert, the squashed loc.

    Raises:
        ValueError: if ``commit_steps`` is below 1.

    Examples:
        >>> actor = CommittedExpertsActor(PMOEActor(4, spec=Bounded(-1, 1, (1,)), in_features=3), commit_steps=10)
        >>> env = GymEnv("Pendulum-v1").append_transform(InitTracker()).append_transform(actor.make_tensordict_primer())
        >>> env.rollout(30, actor)["expert"].squeeze(-1).unique_consecutive().numel() <= 3
        True
    """

    expert_key, steps_left_key, is_init_key = "expert", "steps_left", "is_init"

    def __init__(
        self, actor: ProbabilisticActor, *, commit_steps: int | None = None, deterministic: bool = False
    ) -> None:
        super().__init__()
        if commit_steps is not None and (type(commit_steps) is not int or commit_steps < 1):
            raise ValueError(f"commit_steps must be an integer of at least 1, or None, got {commit_steps!r}.")
        self.actor = actor
        # no episode is longer than the largest integer
        self.commit_steps = torch.iinfo(torch.int64).max if commit_steps is None else commit_steps
        self.deterministic = deterministic
        self.action_key = actor[-1].dist_sample_keys[0]
        self.in_keys = actor.in_keys
        state = [self.expert_key, self.steps_left_key]
        self.out_keys = [self.action_key, *state, *(("next", key) for key in state)]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Transform that gives an environment the entries ``expert`` and ``steps_left``, ``[*B, 1]``."""
        spec = Unbounded(shape=(1,), dtype=torch.int64)
        return TensorDictPrimer(
            {self.expert_key: spec, self.steps_left_key: spec.clone()}, default_value=0, expand_specs=True
        )

    def get_dist(self, tensordict: TensorDictBase) -> NormalMixture:
        """The wrapped actor's mixture."""
        return self.actor.get_dist(tensordict)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action, the expert that acts, and its steps that are left into ``tensordict``."""
        dist = self.actor.get_dist(tensordict)
        expert, left = self._committed(tensordict, dist)  # [*B], or [*B, *G] of the agents of a group
        kind = interaction_type() or self.actor[-1].default_interaction_type
        by_mean = self.deterministic or kind is not InteractionType.RANDOM
        proposals = dist.expert_mode if by_mean else dist.propose().action  # [*B, K, A]
        tensordict.set(self.action_key, take_expert(proposals, expert))
        for key, value in ((self.expert_key, expert), (self.steps_left_key, left)):
            tensordict.set(key, value.unsqueeze(-1))
            tensordict.set(("next", key), value.unsqueeze(-1).clone())
        return tensordict

    def _committed(self, tensordict: TensorDictBase, dist: NormalMixture) -> tuple[Tensor, Tensor]:
        """The expert that acts in each state, and for how many steps after this one."""
        drawn = dist.sample_expert()
        expert, left = (tensordict.get(key, None) for key in (self.expert_key, self.steps_left_key))
        if expert is None or left is None:
            return drawn, torch.full_like(drawn, self.commit_steps - 1)
        expert, left = expert.squeeze(-1), left.squeeze(-1)
        begins = left <= 0
        is_init = tensordict.get(self.is_init_key, None)
        if is_init is not None:
            # [*B, 1] to [*B], with a one for each dimension of agents
            begins = begins | is_init.reshape((*tensordict.shape, *[1] * (begins.ndim - tensordict.ndim)))
        return torch.where(begins, drawn, expert), torch.where(begins, self.commit_steps, left) - 1
