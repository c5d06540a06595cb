"""PPO over options: the double actor-critic, two levels of a policy that get the same rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl._utils import _standardize
from torchrl.modules.distributions.utils import has_analytic_entropy
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import _clip_value_loss, distance_loss

from torchrl_pmoe.baselines.double_gae import ACTOR_KEYS, DoubleGAE, DoubleGAEKeys, option_values, required_entry
from torchrl_pmoe.baselines.options import OptionActor

__all__ = ["DACLoss"]


class DACLoss(LossModule):
    """Clipped PPO on both levels of an option policy (DAC, Zhang and Whiteson, NeurIPS 2019, arXiv 1904.12691).

    The high level's state is ``(o', s)``, the option of the step before and the state; its action is the option ``o``,
    drawn from ``pi^H(o | o', s)``. The low level's state is ``(o, s)``; its action is ``a``, drawn from
    ``pi_o(a | s)``. Each level has a clipped surrogate with its own ratio and its own advantage. Both advantages come
    from one critic ``q(s, o)``, which is fitted to the low level's returns (see :class:`DoubleGAE`). ``v^H`` stands in
    the advantages alone, so the critic's gradient reaches neither the master policy nor the terminations. With one
    option there is no high level: its objective and entropy are zero, and the rest is
    :class:`~torchrl.objectives.ClipPPOLoss`.

    Args:
        actor_network: the policy over options.
        critic_network: a network over the observation that writes ``option_value`` ``[*B, K]``.

    Keyword Args:
        clip_epsilon: both ratios are clipped to ``[1 - clip_epsilon, 1 + clip_epsilon]``.
        entropy_coeff: factor on the entropy of the action under the option that was taken.
        high_entropy_coeff: factor on the entropy of ``pi^H``.
        critic_coeff: factor on ``loss_critic``.
        loss_critic_type: ``"l1"``, ``"l2"`` or ``"smooth_l1"``.
        normalize_advantage: standardise each level's advantages over the batch.
        clip_value: how far the value may move from the stored one; ``True`` for ``clip_epsilon``.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Returns (on a call): ``loss_objective_high``, ``loss_objective_low``, ``loss_entropy`` and ``loss_critic``
    (coefficients included), and the diagnostics ``entropy`` and ``entropy_high``; ``clip_fraction``, ``kl_approx`` and
    ``ESS`` of the low level and ``clip_fraction_high``, ``kl_approx_high`` and ``ESS_high`` of the high one;
    ``explained_variance``; ``termination_prob``, the mean probability that the option of the step before ends, without
    the first steps of episodes; ``option_usage`` ``[K]``, the share of steps in each option; with ``clip_value`` also
    ``value_clip_fraction``.
    With ``reduction="none"`` the losses are ``[*B]``.

    Raises:
        ValueError: for a value that an option cannot have, or an actor that is no :class:`OptionActor`.

    Examples:
        >>> actor = OptionActor(4, spec=Bounded(-1, 1, (6,)), in_features=17)
        >>> value = ValueOperator(MLP(in_features=17, out_features=4), ["observation"], ["option_value"])
        >>> loss = DACLoss(actor, value)
        >>> loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    """

    @dataclass
    class _AcceptedKeys(DoubleGAEKeys):
        """Keys of advantages and values, and of what the actor did; the defaults are the actor's own."""

        option_log_prob: NestedKey = "option_log_prob"
        action: NestedKey = "action"
        action_log_prob: NestedKey = "action_log_prob"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.GAE

    actor_network: OptionActor
    critic_network: TensorDictModule
    actor_network_params: TensorDictParams
    critic_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_critic_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: OptionActor,
        critic_network: TensorDictModule,
        *,
        clip_epsilon: float = 0.2,
        entropy_coeff: float = 0.01,
        high_entropy_coeff: float = 0.01,
        critic_coeff: float = 1.0,
        loss_critic_type: Literal["l1", "l2", "smooth_l1"] = "smooth_l1",
        normalize_advantage: bool = False,
        clip_value: bool | float | None = None,
        reduction: Literal["none", "mean", "sum"] = "mean",
    ) -> None:
        name = type(self).__name__
        if not isinstance(actor_network, OptionActor):
            raise ValueError(f"{name}: actor_network must be an OptionActor, got {type(actor_network).__name__}.")
        if not 0.0 < clip_epsilon < 1.0:
            raise ValueError(f"{name}: clip_epsilon={clip_epsilon!r} must lie in (0, 1).")
        coefficients = {
            "entropy_coeff": entropy_coeff,
            "high_entropy_coeff": high_entropy_coeff,
            "critic_coeff": critic_coeff,
        }
        for key, number in coefficients.items():
            if not 0.0 <= number < float("inf"):
                raise ValueError(f"{name}: {key}={number!r} must be finite and not negative.")
        for key, choice, allowed in (
            ("loss_critic_type", loss_critic_type, ("l1", "l2", "smooth_l1")),
            ("reduction", reduction, ("none", "mean", "sum")),
        ):
            if choice not in allowed:
                raise ValueError(f"{name}: {key}={choice!r} is unknown; allowed: {', '.join(allowed)}.")
        if not isinstance(clip_value, bool) and clip_value is not None and not 0.0 < clip_value < float("inf"):
            raise ValueError(f"{name}: clip_value={clip_value!r} must be finite and above 0, or true or false.")
        self._in_keys: list[NestedKey] | None = None
        self._out_keys: list[NestedKey] | None = None
        super().__init__()
        self.convert_to_functional(actor_network, "actor_network")
        self.convert_to_functional(critic_network, "critic_network")
        device = next(actor_network.parameters()).device
        self.register_buffer("clip_epsilon", torch.tensor(clip_epsilon, device=device))
        for key, number in coefficients.items():
            self.register_coeff_buffer(key, number, device=device)
        if isinstance(clip_value, bool):
            clip_value = clip_epsilon if clip_value else None
        self.register_coeff_buffer("clip_value", clip_value, device=device)
        self.loss_critic_type = loss_critic_type
        self.normalize_advantage = normalize_advantage
        self.reduction = reduction
        self.set_keys(**{key: getattr(actor_network, name) for key, name in ACTOR_KEYS.items()})

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        if self._value_estimator is not None:
            self._value_estimator.set_keys(**{key: getattr(self.tensor_keys, key) for key in DoubleGAEKeys().__dict__})
        self._in_keys = None

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys of the input."""
        if self._in_keys is None:
            keys = self.tensor_keys
            networks = [*self.actor_network.network.in_keys, *self.critic_network.in_keys]
            root = [
                *networks,
                keys.is_init,
                keys.previous_option,
                keys.option,
                keys.option_log_prob,
                keys.action,
                keys.action_log_prob,
            ]
            following = [*networks, keys.reward, keys.done, keys.terminated]
            # a dict keeps the order and drops keys that come twice
            found = dict.fromkeys(map(unravel_key, [*root, *(("next", key) for key in following)]))
            self._in_keys = list(found)
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    @property
    def out_keys(self) -> list[NestedKey]:
        """Keys of the output."""
        if self._out_keys is None:
            levels = ["loss_objective", "clip_fraction", "kl_approx", "ESS"]
            self._out_keys = [
                *(f"{key}_high" for key in levels),
                *("loss_objective_low" if key == "loss_objective" else key for key in levels),
                "entropy_high",
                "entropy",
                "loss_entropy",
                "loss_critic",
                "explained_variance",
                *(["value_clip_fraction"] if self.clip_value is not None else []),
                "termination_prob",
                "option_usage",
            ]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    def make_value_estimator(
        self, value_type: ValueEstimators | DoubleGAE | None = None, **hyperparams: Any
    ) -> DACLoss:
        """Choose how a batch without advantages gets them.

        Args:
            value_type: ``ValueEstimators.GAE``, which makes a :class:`DoubleGAE`, or one that you have made.
            **hyperparams: ``gamma`` (0.99) and ``lmbda`` (0.95).

        Raises:
            NotImplementedError: for another estimator.
        """
        if isinstance(value_type, DoubleGAE):
            self._value_estimator = value_type
        elif value_type in (None, ValueEstimators.GAE):
            hyperparams.pop("device", None)  # the estimator has no buffers
            hyperparams = {"gamma": 0.99, "lmbda": 0.95, **hyperparams}
            self._value_estimator = DoubleGAE(self.actor_network, self.critic_network, **hyperparams)
        else:
            raise NotImplementedError(f"{type(self).__name__}: the value estimator must be GAE, got {value_type}.")
        self.value_type = ValueEstimators.GAE
        self._forward_value_estimator_keys()
        return self

    def _with_advantages(self, tensordict: TensorDictBase) -> TensorDictBase:
        keys = self.tensor_keys
        if all(tensordict.get(key, None) is not None for key in (keys.advantage_high, keys.advantage_low)):
            return tensordict
        # the estimator calls both networks, whose parameters the loss holds
        with (
            self.actor_network_params.to_module(self.actor_network, preserve_module_state=False),
            self.critic_network_params.to_module(self.critic_network, preserve_module_state=False),
        ):
            return self.value_estimator(tensordict)

    def _surrogate(self, log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> dict[str, Tensor]:
        """Clipped objective ``[*B, 1]`` of one level and its diagnostics, from log-densities ``[*B]``."""
        if old_log_prob.requires_grad:
            raise RuntimeError(f"{type(self).__name__}: the stored log-densities require grad.")
        log_weight = (log_prob - old_log_prob.reshape(log_prob.shape)).unsqueeze(-1)  # [*B, 1], as the advantage
        if self.normalize_advantage and advantage.numel() > 1:
            advantage = _standardize(advantage, ())
        # clipped in logarithms, as TorchRL's ClipPPOLoss does
        clipped = log_weight.clamp((-self.clip_epsilon).log1p(), self.clip_epsilon.log1p())
        gain = torch.minimum(log_weight.exp() * advantage, clipped.exp() * advantage)
        flat = log_weight.detach().flatten()  # [B]
        return {
            "loss_objective": -gain,
            "clip_fraction": (clipped != log_weight).to(flat.dtype).mean(),
            "kl_approx": -flat.mean(),
            "ESS": (2 * flat.logsumexp(0) - (2 * flat).logsumexp(0)).exp() / flat.shape[0],
        }

    @staticmethod
    def _entropy(dist: Distribution) -> Tensor:
        """``[*B, 1]``, from one draw where there is no formula."""
        if has_analytic_entropy(dist):
            return dist.entropy().unsqueeze(-1)
        return -dist.log_prob(dist.rsample()).unsqueeze(-1)

    def loss_critic(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor | None, Tensor]:
        """Distance of ``q(s, o)`` to its target, with ``critic_coeff``.

        Args:
            tensordict: a batch ``[*B]`` with the value target.

        Returns:
            the loss ``[*B, 1]``, the share of clipped values (``None`` without ``clip_value``) and the explained
            variance.

        Raises:
            KeyError: if the value target is missing, or with ``clip_value`` the stored values.
        """
        keys = self.tensor_keys
        needed = [keys.value_target, *([keys.value] if self.clip_value is not None else [])]
        target, *old = (tensordict.get(key, None) for key in needed)
        for key, found in zip(needed, (target, *old), strict=True):
            if found is None:
                raise KeyError(f"{type(self).__name__}: there is no {key!r} in the input.")
        option = required_entry(type(self).__name__, tensordict, keys.option)
        with self.critic_network_params.to_module(self.critic_network, preserve_module_state=False):
            values = option_values(self.critic_network, tensordict, keys.value, self.actor_network.num_options)
        value = values.take_along_dim(option, -1)  # [*B, K] to [*B, 1]
        loss = distance_loss(target, value, loss_function=self.loss_critic_type)
        clip_fraction = None
        if old:
            loss, clip_fraction = _clip_value_loss(
                old[0].take_along_dim(option, -1), value, self.clip_value, target, loss, self.loss_critic_type
            )
        with torch.no_grad():
            # 1 - Var(target - value) / Var(target)
            total = target.flatten().var(correction=0)
            explained = 1.0 - (target - value).flatten().var(correction=0) / (total + torch.finfo(total.dtype).eps)
        return self.critic_coeff * loss, clip_fraction, explained

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The losses of both levels and of the critic, and the diagnostics.

        Args:
            tensordict: a batch ``[*B]`` of transitions with both advantages and the value target, or trajectories
                ``[*B, T]`` without.
        """
        keys = self.tensor_keys
        tensordict = self._with_advantages(tensordict.clone(False))
        name = type(self).__name__
        previous, is_init, option = (
            required_entry(name, tensordict, key) for key in (keys.previous_option, keys.is_init, keys.option)
        )
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            policy = self.actor_network.get_policy(tensordict)

        # the low level: a ~ pi_o(a | s)
        low_dist = policy.dist_low(option)
        low = self._surrogate(
            low_dist.log_prob(tensordict.get(keys.action)),
            tensordict.get(keys.action_log_prob),
            tensordict.get(keys.advantage_low),
        )
        entropy = self._entropy(low_dist)
        # the high level: o ~ pi^H(o | o', s)
        high_dist = policy.dist_high(previous, is_init)
        high = self._surrogate(
            high_dist.log_prob(option.squeeze(-1)),
            tensordict.get(keys.option_log_prob),
            tensordict.get(keys.advantage_high),
        )
        entropy_high = self._entropy(high_dist)
        if self.actor_network.num_options == 1:  # there is nothing to choose
            entropy_high = torch.zeros_like(entropy_high.detach())
            high["loss_objective"] = entropy_high
        loss_critic, value_clip_fraction, explained_variance = self.loss_critic(tensordict)

        out = TensorDict({f"{key}_high": value for key, value in high.items()})
        out.set("loss_objective_low", low.pop("loss_objective"))
        out.update(low)
        out.set("entropy_high", entropy_high.detach().mean())
        out.set("entropy", entropy.detach().mean())
        out.set("loss_entropy", -self.entropy_coeff * entropy - self.high_entropy_coeff * entropy_high)
        out.set("loss_critic", loss_critic)
        out.set("explained_variance", explained_variance)
        if value_clip_fraction is not None:
            out.set("value_clip_fraction", value_clip_fraction)
        with torch.no_grad():
            ends = policy.termination_prob.take_along_dim(previous, -1)  # [*B, 1]
            has_previous = ~is_init
            out.set("termination_prob", (ends * has_previous).sum() / has_previous.sum().clamp_min(1))
            # [B, K] to [K]
            taken = nn.functional.one_hot(option.flatten(), self.actor_network.num_options)
            out.set("option_usage", taken.to(ends.dtype).mean(0))
        out = out.named_apply(
            lambda name, value: self._reduce_loss(value, tensordict).squeeze(-1) if name.startswith("loss_") else value,
        )
        self._clear_weakrefs(tensordict, out, "actor_network_params", "critic_network_params")
        return out
