"""SAC and TQC whose critics score the experts of a mixture policy."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor
from torchrl.data import Composite, TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SACLoss, TQCLoss

from torchrl_pmoe.distributions import ExpertProposals, NormalMixture
from torchrl_pmoe.distributions.routing import RoutingEstimator, RoutingGradient, ScoredProposals
from torchrl_pmoe.objectives.scoring import (
    CriticScoredLoss,
    check_critic_keys,
    mean_of_quantiles,
    smallest_of_critics,
)
from torchrl_pmoe.objectives.units import action_units

__all__ = ["CriticScoredSACLoss", "PMOESACLoss", "PMOETQCLoss"]

BACKPROP = ("max", "all", "routed", "weighted")
ENTROPY_FROM = ("policy", "winner")


class CriticScoredSACLoss(CriticScoredLoss, SACLoss):
    """What critic-scored losses of the SAC family share: the actor's loss of the experts, through ``backprop``."""

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
        """Turn ``"auto"`` into a number, and refuse a number that no policy can reach."""
        target: Any = self._target_entropy
        units = action_units(self.actor_network, self._single_action_spec())
        if target == "auto":
            # without a spec the parent's first call says what it misses
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

    def _single_action_spec(self) -> TensorSpec | None:
        """Spec of the action alone, if there is one."""
        spec = self._action_spec if self._action_spec is not None else getattr(self.actor_network, "spec", None)
        if isinstance(spec, Composite):
            key = unravel_key(self.tensor_keys.action)
            return spec[key] if key in spec.keys(True, True) else None
        return spec

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
        proposals = dist.propose(self._draws)
        if self.backprop in ("max", "routed"):
            loss, log_prob, scored = self._one_expert(tensordict, dist, proposals)
        else:
            loss, log_prob, scored = self._every_expert(tensordict, dist, proposals)
        if self.entropy_from == "policy":
            # one draw of each expert, weighted by how often the router draws it: [*M, *B, K] to [*M, *B]
            log_prob = (dist.probs.detach() * scored.log_prob).sum(-1)
        loss, log_prob = scored.mean_over_draws(loss), scored.mean_over_draws(log_prob)  # [*M, *B] to [*B]
        metadata = {
            "log_prob": log_prob.detach(),
            "loss_routing": self._reduce_loss(self._loss_routing(scored), tensordict=tensordict, weights=weights),
            **self._diagnostics(scored),
        }
        return self._reduce_loss(loss, tensordict=tensordict, weights=weights), metadata

    def _one_expert(
        self, tensordict: TensorDictBase, dist: NormalMixture, proposals: ExpertProposals
    ) -> tuple[Tensor, Tensor, ScoredProposals]:
        """Actor's loss and log-density ``[*M, *B]`` of the best or the drawn expert, and what was scored."""
        draws = len(self._draws)
        with torch.no_grad():
            values = self._critic_value(tensordict, proposals.action, per_expert=True, draws=draws)  # [*M, *B, K]
            index = values.argmax(-1) if self.backprop == "max" else dist.sample_expert(self._draws)  # [*M, *B]
        # the noise that won is not standard normal, so a decoupled loss draws the expert that won anew
        action, log_prob = proposals.redraw(index) if self.decoupled else proposals.select(index)
        # a second call of the critics, with gradient on one action a state: cheaper than K actions with gradient
        loss = self._alpha * log_prob - self._critic_value(tensordict, action, per_expert=False, draws=draws)
        return loss, log_prob, self._scored(dist, values, proposals.log_prob)

    def _every_expert(
        self, tensordict: TensorDictBase, dist: NormalMixture, proposals: ExpertProposals
    ) -> tuple[Tensor, Tensor, ScoredProposals]:
        """Actor's loss and log-density ``[*M, *B]`` over all experts, and what was scored."""
        values = self._critic_value(tensordict, proposals.action, per_expert=True, draws=len(self._draws))
        density = proposals.log_prob()
        loss = self._alpha * density - values  # [*M, *B, K]
        scored = self._scored(dist, values.detach(), density.detach())
        if self.backprop == "all":
            return loss.mean(-1), density.mean(-1), scored
        share = dist.probs.detach()  # [*B, K]
        return (share * loss).sum(-1), (share * density).sum(-1), scored

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The parent's losses, ``loss_routing`` and the diagnostics.

        Args:
            tensordict: a batch ``[*B]`` of transitions.
        """
        check_critic_keys(self)
        weights = self._maybe_get_priority_weight(tensordict)
        loss_qvalue, value_metadata = self.qvalue_v2_loss(tensordict)
        loss_actor, metadata = self.actor_loss(tensordict)
        log_prob = metadata.pop("log_prob")
        loss_alpha = self._reduce_loss(self._alpha_loss(log_prob=log_prob), tensordict=tensordict, weights=weights)
        tensordict.set(self.tensor_keys.priority, value_metadata["td_error"])
        losses = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue, "loss_alpha": loss_alpha}
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


class PMOESACLoss(CriticScoredSACLoss, SACLoss):
    """SAC for a mixture policy with critic-scored routing (PMOE, arXiv 2104.09122, section 3).

    Every expert proposes an action, and the critics score all ``B K`` proposals in one call,
    ``score_k = min_j Q_j(s, a_k)``. The router learns from the scores. The critics' loss, the target and the
    temperature's loss are those of :class:`~torchrl.objectives.SACLoss`.

    Args:
        actor_network: any actor whose ``get_dist`` returns a ``NormalMixture`` or ``TanhNormalMixture``. Its ``score``
            names the log-density; its own ``routing`` is not used.
        qvalue_network: the critic, as in :class:`~torchrl.objectives.SACLoss`.

    Keyword Args:
        routing: what the router learns: ``"frequency"``, the one-hot of the best proposal (Definition 3.1);
            ``"soft_frequency"``, its maximum-entropy counterpart; ``"marginal"``, the soft objective enumerated over
            the experts; ``"score_function"``, the likelihood-ratio estimate of the same with the router's mean as
            baseline; ``"none"``; or a function from a :class:`~torchrl_pmoe.distributions.ScoredProposals` to a loss
            ``[*B]``.
        routing_coef: factor on the routing loss.
        routing_loss: ``"brier"`` (the paper) or ``"log"``, for the two frequencies.
        backprop: the experts that learn from the actor's loss: ``"max"``, the one with the best proposal (the paper's
            back-prop-max); ``"all"``, every expert equally (back-prop-all); ``"routed"``, the one that the router
            drew; ``"weighted"``, every expert times its detached weight, which keeps modes together with the soft
            frequency and the mixture's density.
        decoupled: with ``backprop="max"``, select the best expert on one set of draws and learn from a fresh draw of
            it. The draw that won is no random draw of its expert, and learning from it pushes the scales up (like
            Q-learning's maximisation bias).
        entropy_from: the entropy that the temperature's loss and the output ``entropy`` use: ``"policy"``,
            ``-sum_k w_k log pi(a_k)`` with one draw ``a_k`` of every expert, for every ``backprop``; or ``"winner"``,
            that of the draws that the actor's loss uses (the authors' code).
        target_entropy: a number of nats in the action's own units, or ``"auto"``: ``-A`` nats of actions scaled to
            ``[-1, 1]``, which is ``-A + sum_i log((high_i - low_i) / 2)``.
        num_proposals: draws of each expert, ``M``; frequencies, exponents and losses average over them.
        **kwargs: of :class:`~torchrl.objectives.SACLoss`, without ``value_network`` (SAC v1).

    Returns (on a call): the parent's keys, ``loss_routing`` (coefficient included) and the diagnostics
    ``routing_entropy`` (mean over states, nats), ``expert_usage`` (``[K]``, mean probability) and
    ``best_expert_value``. With ``reduction="none"`` losses are ``[*B]``, and diagnostics are handled as ``alpha`` is.

    Raises:
        ValueError: for a value that an option cannot have, SAC v1, an actor whose distribution is not a mixture, or a
            ``target_entropy`` above the entropy of the uniform distribution, ``sum_i log(high_i - low_i)``.
        TypeError: for an unknown option.
        KeyError: in a call, where the critics write no ``state_action_value`` or read no action.
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        value_network: None = None,
        *,
        routing: str | RoutingGradient | RoutingEstimator = RoutingGradient.FREQUENCY,
        routing_coef: float = 1.0,
        routing_loss: Literal["brier", "log"] = "brier",
        backprop: Literal["max", "all", "routed", "weighted"] = "max",
        decoupled: bool = False,
        entropy_from: Literal["policy", "winner"] = "policy",
        num_proposals: int = 1,
        **kwargs: Any,
    ) -> None:
        if value_network is not None:
            raise ValueError(f"{type(self).__name__}: value_network (SAC v1) is not supported; leave it out.")
        self._check_options(kwargs, SACLoss)
        self._check_actor(type(self).__name__, actor_network)
        super().__init__(actor_network, self._unlisted(qvalue_network), **kwargs)
        self._set_routing(
            routing=routing,
            routing_coef=routing_coef,
            routing_loss=routing_loss,
            num_proposals=num_proposals,
        )
        self._set_experts(backprop=backprop, decoupled=decoupled, entropy_from=entropy_from)

    _reduce_critics = staticmethod(smallest_of_critics)


class PMOETQCLoss(CriticScoredSACLoss, TQCLoss):
    """TQC for a mixture policy with critic-scored routing; options as in :class:`PMOESACLoss`.

    A proposal's score is what TQC's actor maximises: the mean over critics and quantiles.

    Args:
        actor_network: as in :class:`PMOESACLoss`.
        qvalue_network: the quantile critic, as in :class:`~torchrl.objectives.TQCLoss`.

    Keyword Args:
        routing: see :class:`PMOESACLoss` for this and all that follow.
        routing_coef: factor on the routing loss.
        routing_loss: ``"brier"`` or ``"log"``.
        backprop: the experts that learn from the actor's loss.
        decoupled: whether ``"max"`` learns from a fresh draw.
        entropy_from: the entropy that the temperature's loss uses.
        num_proposals: draws of each expert.
        **kwargs: of :class:`~torchrl.objectives.TQCLoss`.

    Raises:
        ValueError: for a value that an option cannot have, an actor whose distribution is not a mixture, or a
            ``target_entropy`` that cannot be reached.
        TypeError: for an unknown option.
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        routing: str | RoutingGradient | RoutingEstimator = RoutingGradient.FREQUENCY,
        routing_coef: float = 1.0,
        routing_loss: Literal["brier", "log"] = "brier",
        backprop: Literal["max", "all", "routed", "weighted"] = "max",
        decoupled: bool = False,
        entropy_from: Literal["policy", "winner"] = "policy",
        num_proposals: int = 1,
        **kwargs: Any,
    ) -> None:
        self._check_options(kwargs, TQCLoss)
        self._check_actor(type(self).__name__, actor_network)
        super().__init__(actor_network, self._unlisted(qvalue_network), **kwargs)
        self._set_routing(
            routing=routing,
            routing_coef=routing_coef,
            routing_loss=routing_loss,
            num_proposals=num_proposals,
        )
        self._set_experts(backprop=backprop, decoupled=decoupled, entropy_from=entropy_from)

    _reduce_critics = staticmethod(mean_of_quantiles)
