"""SAC and TQC whose critics score the experts of a mixture policy."""

from __future__ import annotations

from typing import Any, Literal

from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule
from torchrl.objectives import SACLoss, TQCLoss

from torchrl_pmoe.distributions.routing import RoutingGradient
from torchrl_pmoe.objectives.scoring import CriticScoredSACLoss, mean_of_quantiles, smallest_of_critics

__all__ = ["PMOESACLoss", "PMOETQCLoss"]


class PMOESACLoss(CriticScoredSACLoss, SACLoss):
    """SAC for a mixture policy with critic-scored routing (PMOE, arXiv 2104.09122, section 3).

    Every expert proposes an action, the critics score all ``B K`` of them in one call, ``score_k = min_j Q_j(s, a_k)``,
    and the router learns from the scores. The critics' own loss, the target and the temperature are the parent's.

    Args:
        actor_network: any actor whose ``get_dist`` returns a ``NormalMixture`` or ``TanhNormalMixture``. Its ``score``
            names the log-density; its own ``routing`` is not used.
        qvalue_network: the critic, as in :class:`~torchrl.objectives.SACLoss`.

    Keyword Args:
        routing: what the router learns: ``"frequency"``, the one-hot of the best proposal (Definition 3.1);
            ``"soft_frequency"``, its maximum-entropy counterpart; ``"marginal"``, the soft objective enumerated over
            the experts; ``"score_function"``, the likelihood-ratio estimate of the same with the router's mean as
            baseline; ``"none"``.
        routing_coef: factor on the routing loss.
        routing_loss: ``"brier"`` (the paper) or ``"log"``, for the two frequencies.
        backprop: the experts that the actor's loss flows through: ``"max"``, the best proposal (the paper's
            back-prop-max); ``"all"``, every one equally (back-prop-all); ``"routed"``, the one that the router drew;
            ``"weighted"``, every one times its detached weight; with the soft frequency and the mixture's density
            that is what keeps modes.
        decoupled: with ``backprop="max"``, select the best expert on one set of draws and learn from a fresh draw of
            it. The draw that won is no random draw of its expert, and learning from it pushes the scales up (the
            actor's twin of Q-learning's maximisation bias).
        entropy_from: whose entropy the temperature's loss and the output ``entropy`` see: ``"policy"``,
            ``-sum_k w_k log pi(a_k)`` with one draw ``a_k`` of every expert, whatever ``backprop`` trains; or
            ``"winner"``, that of the draws that the actor's loss flows through (the authors' code).
        target_entropy: a number of nats in the action's own units, or ``"auto"``: ``-A`` nats of actions scaled to
            ``[-1, 1]``, which is ``-A + sum_i log((high_i - low_i) / 2)``.
        num_proposals: draws of each expert, ``M``; frequencies, exponents and losses average over them.
        **kwargs: of :class:`~torchrl.objectives.SACLoss`, without ``value_network`` (SAC v1).

    Returns (on a call): the parent's keys, ``loss_routing`` (coefficient included) and the diagnostics
    ``routing_entropy`` (mean over states, nats), ``expert_usage`` (``[K]``, mean probability) and
    ``best_expert_value``. With ``reduction="none"`` losses are ``[*B]`` and diagnostics go where ``alpha`` goes.

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
        routing: str | RoutingGradient = RoutingGradient.FREQUENCY,
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
        routing: see :class:`PMOESACLoss`, as for all of these.
        routing_coef: factor on the routing loss.
        routing_loss: ``"brier"`` or ``"log"``.
        backprop: the experts that the actor's loss flows through.
        decoupled: whether ``"max"`` learns from a fresh draw.
        entropy_from: whose entropy the temperature's loss sees.
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
        routing: str | RoutingGradient = RoutingGradient.FREQUENCY,
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
