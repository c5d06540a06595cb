"""PPO whose Q-network scores the experts of a mixture policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor
from torch.distributions import Distribution
from torchrl.objectives import ClipPPOLoss, PPOLoss
from torchrl.objectives.utils import _cache_values, _vmap_func, distance_loss

from torchrl_pmoe.distributions.mixture import NormalMixture
from torchrl_pmoe.distributions.routing import RoutingEstimator, RoutingGradient, ScoredProposals
from torchrl_pmoe.objectives.scoring import CriticScoredLoss, check_critic_keys, smallest_of_critics

__all__ = ["PMOEClipPPOLoss"]


class PMOEClipPPOLoss(CriticScoredLoss, ClipPPOLoss):
    """Clipped PPO for a mixture policy with critic-scored routing (PMOE, arXiv 2104.09122; the authors' form of PPO).

    The surrogate is that of :class:`~torchrl.objectives.ClipPPOLoss`, with the mixture's density in the ratio. A
    Q-network is fitted to the value target at the stored action. It scores a fresh proposal of every expert,
    ``score_k = min_j Q_j(s, a_k)``, and the router learns from the scores.

    Args:
        actor_network: any actor whose ``get_dist`` returns a ``NormalMixture`` or ``TanhNormalMixture``; its
            ``log_prob_routing`` names the gradient of the ratio, its own ``routing`` is not used.
        critic_network: the state-value network, as in :class:`~torchrl.objectives.ClipPPOLoss`.
        qvalue_network: a network over observation and action that writes ``state_action_value`` ``[*B, 1]``.

    Keyword Args:
        routing: what the router learns besides the surrogate: ``"frequency"``, the one-hot of the best proposal
            (Definition 3.1); ``"soft_frequency"``, its maximum-entropy counterpart at the temperature
            ``entropy_coeff``, which must be above 0 (also with ``entropy_bonus=False``); ``"marginal"``,
            ``sum_k w_k (entropy_coeff log pi(a_k) - Q(s, a_k))``; ``"score_function"``, the likelihood-ratio estimate
            of the same; ``"none"``; or a function from a :class:`~torchrl_pmoe.distributions.ScoredProposals` to a
            loss ``[*B]``.
        routing_coef: factor on the routing loss.
        routing_loss: ``"brier"`` (the paper) or ``"log"``, for the two frequencies.
        num_proposals: draws of each expert, ``M``; frequencies and exponents average over them.
        num_qvalue_nets: number of Q-networks, which start from different weights; the smallest value counts.
        qvalue_coeff: factor on ``loss_qvalue``, whose distance is the parent's ``loss_critic_type``.
        **kwargs: of :class:`~torchrl.objectives.ClipPPOLoss`.

    Returns (on a call): the parent's keys, ``loss_routing`` and ``loss_qvalue`` (coefficients included) and the
    diagnostics ``routing_entropy`` (mean over states, nats), ``expert_usage`` (``[K]``, mean probability) and
    ``best_expert_value``. With ``reduction="none"`` both losses are ``[*B]``.

    Raises:
        ValueError: for a value that an option cannot have, ``functional=False``, or an actor whose distribution is not
            a mixture.
        TypeError: for an unknown option.

    Examples:
        >>> actor = PMOEActor(4, spec=Bounded(-1, 1, (6,)), in_features=17, return_log_prob=True)
        >>> value = ValueOperator(MLP(in_features=17, out_features=1), in_keys=["observation"])
        >>> qvalue = ValueOperator(MLP(in_features=23, out_features=1), in_keys=["observation", "action"])
        >>> loss = PMOEClipPPOLoss(actor, value, qvalue, routing="frequency")
    """

    @dataclass
    class _AcceptedKeys(ClipPPOLoss._AcceptedKeys):
        """The parent's keys, and where the Q-network writes its value."""

        state_action_value: NestedKey = "state_action_value"

    default_keys = _AcceptedKeys

    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModule,
        qvalue_network: TensorDictModule | list[TensorDictModule],
        *,
        routing: str | RoutingGradient | RoutingEstimator = RoutingGradient.FREQUENCY,
        routing_coef: float = 1.0,
        routing_loss: Literal["brier", "log"] = "brier",
        num_proposals: int = 1,
        num_qvalue_nets: int = 1,
        qvalue_coeff: float = 1.0,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        self._check_options({**kwargs, "num_qvalue_nets": num_qvalue_nets}, ClipPPOLoss, PPOLoss)
        if isinstance(kwargs.get("entropy_coeff"), Mapping):
            raise ValueError(f"{name}: entropy_coeff must be a number, one action has one entropy.")
        if not kwargs.get("functional", True):
            raise ValueError(f"{name}: functional=False is not supported; leave it out.")
        if not 0.0 <= qvalue_coeff < float("inf"):
            raise ValueError(f"{name}: qvalue_coeff={qvalue_coeff!r} must be finite and not negative.")
        self._check_actor(name, actor_network)
        super().__init__(actor_network, critic_network, **kwargs)
        self._set_routing(
            routing=routing, routing_coef=routing_coef, routing_loss=routing_loss, num_proposals=num_proposals
        )
        if self.routing is RoutingGradient.SOFT_FREQUENCY and self.entropy_coeff == 0:
            raise ValueError(
                f"{name}: routing='soft_frequency' has entropy_coeff for its temperature, and at 0 it is the hard "
                "'frequency'; take that one, or an entropy_coeff above 0."
            )
        self.num_qvalue_nets = num_qvalue_nets
        self.qvalue_coeff = qvalue_coeff
        self._batch_and_mixture: list[tuple[TensorDictBase, NormalMixture]] | None = None
        # a single network stays as it is: stacking would draw its weights anew and cost time in every call
        self.convert_to_functional(
            self._unlisted(qvalue_network),
            "qvalue_network",
            expand_dim=num_qvalue_nets if num_qvalue_nets > 1 else None,
            create_target_params=False,
            compare_against=list(actor_network.parameters()) if self.separate_losses else None,
        )
        self._make_vmap()
        self._in_keys = None  # the parent has listed them without those of the Q-network

    def _make_vmap(self) -> None:
        if self.num_qvalue_nets == 1:
            self._vmap_qnetworkN0 = self._one_qnetwork
        else:
            self._vmap_qnetworkN0 = _vmap_func(self.qvalue_network, (None, 0), randomness=self.vmap_randomness)

    def _one_qnetwork(self, tensordict: TensorDictBase, params: TensorDictParams) -> TensorDictBase:
        with params.to_module(self.qvalue_network, preserve_module_state=False):
            return self.qvalue_network(tensordict).unsqueeze(0)

    @property
    @_cache_values
    def _cached_detached_qvalue_params(self) -> Any:
        return self.qvalue_network_params.detach()

    @property
    def _temperature(self) -> Tensor:
        return self.entropy_coeff

    _reduce_critics = staticmethod(smallest_of_critics)

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        known = [unravel_key(key) for key in self._in_keys or ()]
        self._in_keys = known + [key for key in map(unravel_key, self.qvalue_network.in_keys) if key not in known]

    _in_keys: list[NestedKey] | None
    _own_out_keys = ("loss_routing", "loss_qvalue", "routing_entropy", "expert_usage", "best_expert_value")

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> tuple[Tensor, Distribution, Any, Any]:
        # the parent's forward returns neither the mixture nor its batch with the value target; both pass through here
        found = super()._log_weight(tensordict, adv_shape)
        self._check_mixture(found[1], tensordict)
        if self._batch_and_mixture is not None:
            self._batch_and_mixture.append((tensordict, found[1]))
        return found

    def loss_qvalue(self, tensordict: TensorDictBase) -> Tensor:
        """Distance of the Q-networks to the value target at the stored action, summed over networks.

        Args:
            tensordict: a batch ``[*B]`` with the value target.

        Returns:
            ``[*B]``, with ``qvalue_coeff``.

        Raises:
            KeyError: if there is no value target.
        """
        check_critic_keys(self)
        states = tensordict.select(*self.qvalue_network.in_keys, strict=False)
        if self.separate_losses:  # as the parent does for the value network
            states = states.detach()
        states = self._vmap_qnetworkN0(states, self.qvalue_network_params)
        value = states.get(self.tensor_keys.state_action_value)
        target = tensordict.get(self.tensor_keys.value_target, None)
        if target is None:
            raise KeyError(
                f"{type(self).__name__}: the Q-network is fitted to the value target, and there is no "
                f"{self.tensor_keys.value_target!r} in the input."
            )
        target = target.expand_as(value)  # [*B, 1] to [N, *B, 1]
        return self.qvalue_coeff * distance_loss(value, target, loss_function=self.loss_critic_type).squeeze(-1).sum(0)

    @torch.no_grad()
    def _score_fresh_proposals(self, tensordict: TensorDictBase, dist: NormalMixture) -> ScoredProposals:
        """A draw of every expert in the states ``[*B]`` and its values ``[*M, *B, K]``."""
        proposals = dist.propose(self._draws)
        values = self._critic_value(tensordict, proposals.action, per_expert=True, draws=len(self._draws))
        return self._scored(dist, values, proposals.log_prob)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The parent's losses, ``loss_routing``, ``loss_qvalue`` and the diagnostics.

        Args:
            tensordict: a batch ``[*B]`` of transitions with advantage and value target, or trajectories for the value
                estimator to compute them from.
        """
        self._batch_and_mixture = []
        try:
            losses = super().forward(tensordict)
            ((batch, dist),) = self._batch_and_mixture
        finally:
            self._batch_and_mixture = None
        scored = self._score_fresh_proposals(batch, dist)
        losses.set("loss_routing", self._reduce_loss(self._loss_routing(scored), batch))
        losses.set("loss_qvalue", self._reduce_loss(self.loss_qvalue(batch), batch))
        losses.update(self._diagnostics(scored))
        self._clear_weakrefs(tensordict, losses, "qvalue_network_params")
        return losses
