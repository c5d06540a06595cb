"""Critic-scored routing, written once for every loss that holds critics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import CompositeDistribution, TensorDictModule, dispatch
from torch import Tensor
from torchrl.data import Composite, TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SACLoss

from torchrl_pmoe.distributions import ExpertProposals, NormalMixture
from torchrl_pmoe.distributions.routing import (
    RoutingGradient,
    best_proposal,
    brier_loss,
    can_look_at,
    check_routing,
    log_loss,
    score_function_loss,
    soft_frequency,
    wide,
)
from torchrl_pmoe.modules.specs import refuse_unknown
from torchrl_pmoe.objectives.units import action_units, mixture_of

__all__ = ["CriticScoredLoss", "CriticScoredSACLoss", "Scored"]

BACKPROP = ("max", "all", "routed", "weighted")
ENTROPY_FROM = ("policy", "winner")
ROUTING_LOSSES = ("brier", "log")
_DISTANCES = ("l2", "l1", "smooth_l1")
PARENT_CHOICES: dict[str, tuple[str | None, ...]] = {
    "loss_function": _DISTANCES,
    "loss_critic_type": _DISTANCES,
    "reduction": (None, "mean", "sum", "none"),
    "scalar_output_mode": (None, "exclude", "non_tensor"),
}
"""Options of TorchRL's losses that are looked at in the first call only."""


class Scored(NamedTuple):
    """Values and log-densities ``[*M, *B, K]`` of the proposals: what the routing loss and the diagnostics read."""

    dist: NormalMixture
    value: Tensor
    log_prob: Tensor  # zeros where nothing reads it


class CriticScoredLoss:
    """What a loss needs to train a router with its critics as the judges; mixed in before the parent.

    The parent brings ``actor_network``, ``qvalue_network`` with its parameters, and the keys ``action`` and
    ``state_action_value``. A subclass says with :meth:`_reduce_critics` how its critics' outputs become one value, and
    with :attr:`_temperature` what the soft objective weighs the entropy with. Everything about routing is described in
    :class:`~torchrl_pmoe.objectives.PMOESACLoss`.
    """

    # no LossModule itself: its metaclass would put an empty forward before the parent's
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    tensor_keys: Any
    _vmap_qnetworkN0: Callable[..., TensorDictBase]
    _cached_detached_qvalue_params: Any
    _make_vmap: Callable[[], None]

    def __getstate__(self) -> dict[str, Any]:
        # TorchRL caches the detached parameters: a copy would go on scoring with those of the original. Its vmapped
        # network is a local function, which does not pickle
        state = {**self.__dict__, "_cache": {}}
        del state["_vmap_qnetworkN0"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._make_vmap()

    def _set_routing(
        self,
        *,
        routing: str | RoutingGradient,
        routing_coef: float,
        routing_loss: Literal["brier", "log"],
        num_proposals: int,
    ) -> None:
        name = type(self).__name__
        if routing_loss not in ROUTING_LOSSES:
            raise ValueError(f"{name}: routing_loss={routing_loss!r} is unknown; allowed: {', '.join(ROUTING_LOSSES)}.")
        if isinstance(num_proposals, bool) or not isinstance(num_proposals, int) or num_proposals < 1:
            raise ValueError(f"{name}: num_proposals={num_proposals!r} must be an integer of at least 1.")
        if not 0.0 <= routing_coef < float("inf"):
            raise ValueError(f"{name}: routing_coef={routing_coef!r} must be finite and not negative.")
        self.routing = check_routing(
            routing,
            supported=(
                RoutingGradient.FREQUENCY,
                RoutingGradient.SOFT_FREQUENCY,
                RoutingGradient.SCORE_FUNCTION,
                RoutingGradient.MARGINAL,
                RoutingGradient.NONE,
            ),
            owner=name,
        )
        self.routing_coef = routing_coef
        self.routing_loss = routing_loss
        self.num_proposals = num_proposals
        self._folds: dict[tuple[int, int, bool], bool] = {}

    @staticmethod
    def _unlisted(qvalue_network: Any) -> Any:
        """A list of one network becomes that network: TorchRL would register no parameters for the list."""
        single = isinstance(qvalue_network, list) and len(qvalue_network) == 1
        return qvalue_network[0] if single else qvalue_network

    @classmethod
    def _check_options(cls, options: Mapping[str, Any], *parents: type) -> None:
        """Refuse what the parents would not know, or would find out about in the first call only.

        Raises:
            TypeError: for an unknown option.
            ValueError: for a value that an option cannot have.
        """
        refuse_unknown(cls, options, *parents)
        for name, allowed in PARENT_CHOICES.items():
            if options.get(name, allowed[0]) not in allowed:
                raise ValueError(
                    f"{cls.__name__}: {name}={options[name]!r} is unknown; allowed: {', '.join(map(str, allowed))}."
                )
        number = options.get("num_qvalue_nets", 1)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{cls.__name__}: num_qvalue_nets={number!r} must be an integer of at least 1.")
        if not 0.0 < options.get("alpha_init", 1.0) < math.inf:
            raise ValueError(f"{cls.__name__}: alpha_init={options['alpha_init']!r} must be finite and positive.")

    @staticmethod
    def _check_actor(owner: str, actor: Any) -> None:
        kind, _ = mixture_of(actor)
        if isinstance(kind, type) and not issubclass(kind, NormalMixture):
            composite = " (critics can score the experts of one mixture only)" * issubclass(kind, CompositeDistribution)
            raise ValueError(
                f"{owner}: the actor's distribution must be NormalMixture or TanhNormalMixture, "
                f"got {kind.__name__}{composite}."
            )

    _own_out_keys: ClassVar[Sequence[str]] = ("loss_routing", "routing_entropy", "expert_usage", "best_expert_value")
    _out_keys: list[NestedKey] | None

    @property
    def out_keys(self) -> list[NestedKey]:
        """Keys of the output: the parent's, then ours, so that a call with keywords returns the parent's first."""
        if self._out_keys is None:
            self._out_keys = [*super().out_keys, *self._own_out_keys]  # type: ignore[misc]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    def _check_critic_keys(self) -> None:
        """Refuse critics that write no value or read no action, which would otherwise end far from here.

        Raises:
            KeyError: with the key that is missing.
        """
        name, keys = type(self).__name__, self.tensor_keys
        written = [unravel_key(key) for key in self.qvalue_network.out_keys]
        if unravel_key(keys.state_action_value) not in written:
            raise KeyError(
                f"{name}: the Q-network writes {written}, and {keys.state_action_value!r} is not among them; give it "
                f"out_keys=[{keys.state_action_value!r}] or call set_keys(state_action_value=...)."
            )
        action, read = _path(keys.action), [_path(key) for key in self.qvalue_network.in_keys]
        if not any(action[: len(key)] == key for key in read):
            raise KeyError(
                f"{name}: the Q-network reads {self.qvalue_network.in_keys}, and the action {keys.action!r} is not "
                "among them; proposals could not be told apart. Name it in the in_keys or call set_keys(action=...)."
            )

    def _reduce_critics(self, state_action_value: Tensor) -> Tensor:
        """One value per action, ``[*L, *B, *G]``, of what the critics put out, theirs the first dimension."""
        raise NotImplementedError

    @property
    def _temperature(self) -> Tensor:
        """Weight of the entropy in the soft objective."""
        raise NotImplementedError

    @property
    def _draws(self) -> tuple[int, ...]:
        return (self.num_proposals,) if self.num_proposals > 1 else ()

    @property
    def _needs_density(self) -> bool:
        """Whether the routing reads the proposals' log-densities."""
        return self.routing not in (RoutingGradient.FREQUENCY, RoutingGradient.NONE)

    def _check_mixture(self, dist: Any, tensordict: TensorDictBase) -> None:
        if not isinstance(dist, NormalMixture):
            raise ValueError(
                f"{type(self).__name__}: the actor must describe a NormalMixture or TanhNormalMixture, "
                f"got {type(dist).__name__}."
            )
        # what comes behind the batch is the agents of a group, an action each
        if dist.batch_shape[: tensordict.ndim] != tensordict.batch_size:
            raise ValueError(
                f"{type(self).__name__}: every state needs an action, got a mixture of batch shape "
                f"{tuple(dist.batch_shape)} for a tensordict of batch size {tuple(tensordict.batch_size)}."
            )

    def _critic_value(
        self,
        tensordict: TensorDictBase,
        action: Tensor,
        *,
        per_expert: bool,
        draws: int = 0,
        params: TensorDictBase | None = None,
    ) -> Tensor:
        """Value of actions in the states ``[*B]`` of ``tensordict``, by one call of the critics.

        Args:
            tensordict: states ``[*B]``.
            action: ``[*M, *B, *G, A]``, or ``[*M, *B, *G, K, A]`` per expert. ``*G`` are the agents of a group, where
                there are some.
            per_expert: whether the actions are proposals of the experts.
            draws: dimensions of ``*M``.
            params: of the critics; theirs of now, without gradient, if not given.

        Returns:
            ``[*M, *B, *G]``, or ``[*M, *B, *G, K]`` per expert.
        """
        self._check_critic_keys()
        if per_expert:
            action = action.movedim(-2, 0)  # [K, *M, *B, *G, A]: a critic may read batch dimensions as time or agents
        leading = draws + per_expert
        states = tensordict.select(*self.qvalue_network.in_keys, strict=False).exclude(self.tensor_keys.action)
        if params is None:
            params = self._cached_detached_qvalue_params
        fold = leading > 0 and self._must_fold(states, action, leading, params)
        value = self._evaluate(states, action, leading, params, fold=fold)
        return value.movedim(0, -1) if per_expert else value

    def _evaluate(
        self, states: TensorDictBase, action: Tensor, leading: int, params: TensorDictBase, *, fold: bool
    ) -> Tensor:
        """Values ``[*L, *B, *G]`` of actions ``[*L, *B, *G, A]`` in the states ``[*B]``, ``*L`` of ``leading`` dims.

        The critics see a batch ``[*L, *B]``, or with ``fold`` ``[L B_0, B_1, ...]``.
        """
        lead, batch = action.shape[:leading], states.batch_size
        states = states.expand(*lead, *batch)
        if fold:
            states, action = states.flatten(0, leading), action.flatten(0, leading)
        states.set(self.tensor_keys.action, action)
        value = self._reduce_critics(self._vmap_qnetworkN0(states, params).get(self.tensor_keys.state_action_value))
        if value.shape != action.shape[:-1]:
            raise ValueError(
                f"{type(self).__name__}: the critics must give one value per action, got values of shape "
                f"{tuple(value.shape)} for actions of shape {tuple(action.shape)}."
            )
        return value.unflatten(0, (*lead, batch[0])) if fold else value

    def _must_fold(self, states: TensorDictBase, action: Tensor, leading: int, params: TensorDictBase) -> bool:
        """Whether the critics want ``*L`` inside the first batch dimension; asked of them once for each kind of batch.

        Modules that know ``[*B, ...]`` take any leading dimension. Those that know a single batch dimension
        (``nn.GRU``, ``nn.Conv2d``, ``nn.BatchNorm1d``) do not.
        """
        kind = (states.ndim, leading, self.qvalue_network.training)
        fold = self._folds.get(kind)
        if fold is not None:
            return fold
        if not can_look_at(action):
            return False
        fold = self._find_fold(states, action, leading, params)
        if fold is not None:
            self._folds[kind] = fold
        return bool(fold)

    @torch.no_grad()
    def _find_fold(self, states: TensorDictBase, action: Tensor, leading: int, params: TensorDictBase) -> bool | None:
        """The layout in which the last proposal gets the value that it gets alone; ``None`` if values cannot tell.

        Raises:
            ValueError: if it gets that value in neither.
        """
        flat = action.flatten(0, leading - 1)

        def evaluate(action: Tensor, leading: int, *, fold: bool) -> Tensor:
            # copies: a critic may keep statistics
            return self._evaluate(states, action, leading, params.data.clone(), fold=fold)

        # a critic may draw numbers, which the run must not miss
        with torch.random.fork_rng(devices=[action.device] if action.is_cuda else []):
            alone = evaluate(flat[-1], 0, fold=False)
            ran: list[tuple[bool, Tensor]] = []
            why = ""
            for fold in (False, True) if states.ndim else (False,):
                try:
                    value = evaluate(flat, 1, fold=fold)
                except (RuntimeError, ValueError, IndexError) as error:
                    why = why or f"it raises {type(error).__name__}: {str(error).splitlines()[0]}"
                    continue
                ran.append((fold, value))
                if _agree(value[-1], alone, value):
                    return fold if value.any() else None
            if ran and not _agree(evaluate(flat[-1], 0, fold=False), alone, alone):
                return ran[0][0]  # a critic that draws gives no two values alike
        if ran:
            apart = (ran[0][1][-1] - alone).abs().max().item()
            why = f"a proposal's value beside the others is up to {apart:.2g} from its value alone"
        raise ValueError(
            f"{type(self).__name__}: the critics cannot score the experts' proposals in one call, where these are the "
            f"first dimension of states {tuple(states.batch_size)}: {why}. A critic must treat what comes before the "
            "batch as separate inputs: no batch normalisation in training mode, no time or agents read from the first "
            "dimension."
        )

    @torch.no_grad()
    def score_proposals(self, tensordict: TensorDictBase, action: Tensor) -> Tensor:
        """Value of every expert's proposal, for acting on the best one.

        Args:
            tensordict: states ``[*B]``.
            action: proposals ``[*B, K, A]``; of the agents of a group, ``[*B, *G, K, A]``. An expert's proposals of all
                agents are scored together.

        Returns:
            ``[*B, K]``, or ``[*B, *G, K]``.

        Raises:
            ValueError: if the critics cannot score all proposals in one call.
        """
        # those that a collector has put in place, which TorchRL's cache does not know
        return self._critic_value(tensordict, action, per_expert=True, params=self.qvalue_network_params)

    def _routing(self, scored: Scored) -> Tensor:
        """Routing loss ``[*B]`` before its coefficient."""
        dist, value, log_prob = scored
        draws = value.ndim > len(dist.batch_shape) + 1

        def over_draws(x: Tensor) -> Tensor:
            return x.mean(0) if draws else x

        if self.routing is RoutingGradient.NONE:
            return value.new_zeros(dist.batch_shape)
        if self.routing is RoutingGradient.MARGINAL:
            return (dist.probs * over_draws(self._temperature * log_prob - value)).sum(-1)
        if self.routing is RoutingGradient.SCORE_FUNCTION:
            index = dist.sample_expert(value.shape[:1] if draws else ())
            return over_draws(score_function_loss(dist.logits, self._temperature * log_prob - value, index))
        if self.routing is RoutingGradient.FREQUENCY:
            frequency = over_draws(best_proposal(value))
        else:
            # only differences matter to the softmax; those to the best keep a small temperature from overflowing
            mean = over_draws(wide(value))
            gap = mean - mean.amax(-1, keepdim=True)
            temperature = self._temperature.to(gap.dtype).clamp_min(torch.finfo(gap.dtype).tiny)
            exponent = gap / temperature - over_draws(wide(log_prob))
            frequency = soft_frequency(exponent, dist.logits if dist.score == "mixture" else None)
        frequency = frequency.to(dist.logits.dtype)
        if self.routing_loss == "brier":
            return brier_loss(dist.probs, frequency)
        return log_loss(dist.logits, frequency)

    @torch.no_grad()
    def _diagnostics(self, scored: Scored) -> dict[str, Tensor]:
        log_probs = scored.dist.logits.log_softmax(-1).reshape(-1, scored.dist.num_experts)
        probs = log_probs.exp()
        return {
            "routing_entropy": -(probs * log_probs).sum(-1).mean(),
            "expert_usage": probs.mean(0),
            "best_expert_value": scored.value.amax(-1).mean(),
        }


def _path(key: NestedKey) -> tuple[str, ...]:
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else key


def _agree(value: Tensor, other: Tensor, scale: Tensor) -> bool:
    """Whether two values differ by rounding alone, which may be that of another kernel; ``scale`` holds their size."""
    single = value.is_cuda and value.dtype is torch.float32
    reduced = single and torch.get_float32_matmul_precision() != "highest"
    if reduced or torch.is_autocast_enabled(value.device.type):
        eps = torch.finfo(torch.bfloat16).eps
    elif single:
        # convolutions and recurrent kernels may round to TF32's ten bits, whatever is asked of matrix products
        eps = torch.finfo(torch.float16).eps
    else:
        eps = torch.finfo(value.dtype).eps
    size = scale.nan_to_num(0.0, 0.0, 0.0).abs().amax().item()
    return torch.allclose(value, other, rtol=0.0, atol=32 * eps + eps**0.4 * size, equal_nan=True)


class CriticScoredSACLoss(CriticScoredLoss, SACLoss):
    """What a SAC-like loss adds: the experts learn from the critics' scores too, through ``backprop``."""

    def _set_experts(
        self,
        *,
        backprop: Literal["max", "all", "routed", "weighted"],
        decoupled: bool,
        entropy_from: Literal["policy", "winner"],
    ) -> None:
        name = type(self).__name__
        if backprop not in BACKPROP:
            raise ValueError(f"{name}: backprop={backprop!r} is unknown; allowed: {', '.join(BACKPROP)}.")
        if entropy_from not in ENTROPY_FROM:
            raise ValueError(f"{name}: entropy_from={entropy_from!r} is unknown; allowed: {', '.join(ENTROPY_FROM)}.")
        if not isinstance(decoupled, bool):
            raise ValueError(f"{name}: decoupled={decoupled!r} must be True or False.")
        if decoupled and backprop != "max":
            raise ValueError(
                f"{name}: decoupled=True goes with backprop='max' alone, which selects by score; got {backprop!r}."
            )
        self.backprop = backprop
        self.decoupled = decoupled
        self.entropy_from = entropy_from
        self._set_target_entropy()

    def _set_target_entropy(self) -> None:
        """Turn ``"auto"`` into a number, and refuse a number that no policy reaches."""
        target: Any = self._target_entropy
        units = action_units(self.actor_network, self._action_leaf())
        if target == "auto":
            # without a spec the parent says at the first call what it misses
            if units is not None:
                delattr(self, "_target_entropy")
                self.register_buffer("_target_entropy", units.target_entropy(type(self).__name__).to(self.device))
            return
        if isinstance(target, Tensor) and target.numel() == 1:
            target = target.item()
        if isinstance(target, bool) or not isinstance(target, int | float) or not math.isfinite(target):
            raise ValueError(f"{type(self).__name__}: target_entropy={target!r} must be 'auto' or a finite number.")
        largest = math.inf if units is None else units.largest_entropy
        if target > largest:
            raise ValueError(
                f"{type(self).__name__}: target_entropy={target} cannot be reached; it must be at most {largest:.4g}, "
                "the entropy of the uniform distribution between the action's bounds."
            )

    def _action_leaf(self) -> TensorSpec | None:
        """Spec of the action alone, if there is one."""
        spec = self._action_spec if self._action_spec is not None else getattr(self.actor_network, "spec", None)
        if isinstance(spec, Composite):
            key = unravel_key(self.tensor_keys.action)
            return spec[key] if key in spec.keys(True, True) else None
        return spec

    @property
    def _needs_density(self) -> bool:
        return self.entropy_from == "policy" or super()._needs_density

    @property
    def _temperature(self) -> Tensor:
        return self._alpha

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the experts through ``backprop``, with the routing loss and the diagnostics as metadata.

        Args:
            tensordict: a batch ``[*B]``.

        Returns:
            The loss as ``reduction`` says, and ``log_prob`` ``[*B]`` (minus the entropy that ``entropy_from`` names),
            ``loss_routing`` and the diagnostics.

        Raises:
            ValueError: if the actor's distribution is not a mixture.
        """
        weights = self._maybe_get_priority_weight(tensordict)
        with (
            set_exploration_type(ExplorationType.RANDOM),
            self.actor_network_params.to_module(self.actor_network, preserve_module_state=False),
        ):
            dist = self.actor_network.get_dist(tensordict)
        self._check_mixture(dist, tensordict)
        draws = self._draws
        proposals = dist.propose(draws)
        if self.backprop in ("max", "routed"):
            loss, log_prob, scored = self._one_expert(tensordict, dist, proposals)
        else:
            loss, log_prob, scored = self._every_expert(tensordict, dist, proposals)
        if self.entropy_from == "policy":
            # one draw of each expert, as often as the router draws it: [*M, *B, K] to [*M, *B]
            log_prob = (dist.probs.detach() * scored.log_prob).sum(-1)
        if draws:
            loss, log_prob = loss.mean(0), log_prob.mean(0)
        loss = self._reduce_loss(loss, tensordict=tensordict, weights=weights)
        routing = self.routing_coef * self._routing(scored)
        metadata = {
            "log_prob": log_prob.detach(),
            "loss_routing": self._reduce_loss(routing, tensordict=tensordict, weights=weights),
            **self._diagnostics(scored),
        }
        return loss, metadata

    def _one_expert(
        self, tensordict: TensorDictBase, dist: NormalMixture, proposals: ExpertProposals
    ) -> tuple[Tensor, Tensor, Scored]:
        with torch.no_grad():
            value = self._critic_value(tensordict, proposals.action, per_expert=True, draws=len(self._draws))
            draws = value.shape[: -1 - len(dist.batch_shape)]
            index = value.argmax(-1) if self.backprop == "max" else dist.sample_expert(draws)
            density = proposals.log_prob() if self._needs_density else torch.zeros_like(value)
        # the noise that won is not standard normal, so a decoupled loss draws the expert that won anew
        action, log_prob = proposals.redraw(index) if self.decoupled else proposals.select(index)
        loss = self._alpha * log_prob - self._critic_value(tensordict, action, per_expert=False, draws=len(draws))
        return loss, log_prob, Scored(dist, value, density)

    def _every_expert(
        self, tensordict: TensorDictBase, dist: NormalMixture, proposals: ExpertProposals
    ) -> tuple[Tensor, Tensor, Scored]:
        value = self._critic_value(tensordict, proposals.action, per_expert=True, draws=len(self._draws))
        density = proposals.log_prob()
        loss = self._alpha * density - value
        scored = Scored(dist, value.detach(), density.detach())
        if self.backprop == "all":
            return loss.mean(-1), density.mean(-1), scored
        share = dist.probs.detach()
        return (share * loss).sum(-1), (share * density).sum(-1), scored

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The parent's losses, ``loss_routing`` and the diagnostics.

        Args:
            tensordict: a batch ``[*B]`` of transitions.
        """
        self._check_critic_keys()
        weights = self._maybe_get_priority_weight(tensordict)
        loss_qvalue, value_metadata = self.qvalue_v2_loss(tensordict)
        loss_actor, metadata = self.actor_loss(tensordict)
        log_prob = metadata.pop("log_prob")
        loss_alpha = self._reduce_loss(self._alpha_loss(log_prob=log_prob), tensordict=tensordict, weights=weights)
        tensordict.set(self.tensor_keys.priority, value_metadata["td_error"])
        losses = {
            "loss_actor": loss_actor,
            "loss_qvalue": loss_qvalue,
            "loss_alpha": loss_alpha,
        }
        routing = {"loss_routing": metadata.pop("loss_routing")}
        scalars = {"alpha": self._alpha, "entropy": -log_prob.mean()}
        if self.reduction == "none":
            out = TensorDict({**losses, **routing}, batch_size=tensordict.batch_size)
            if self.scalar_output_mode == "non_tensor":
                for name, value in {**scalars, **metadata}.items():
                    out.set_non_tensor(name, value)
        else:
            out = TensorDict({**losses, **scalars, **routing, **metadata}, batch_size=[])
        self._clear_weakrefs(
            tensordict,
            out,
            "actor_network_params",
            "qvalue_network_params",
            "target_actor_network_params",
            "target_qvalue_network_params",
        )
        return out
