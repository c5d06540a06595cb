"""Advantages of both levels of a policy over options, from one critic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

from torchrl_pmoe.baselines.options import OptionActor

__all__ = [
    "ACTOR_KEYS",
    "DoubleGAE",
    "DoubleGAEKeys",
    "double_advantage_estimate",
    "option_values",
    "required_entry",
]


def double_advantage_estimate(
    gamma: float,
    lmbda: float,
    option_value: Tensor,
    next_option_value: Tensor,
    option_prob: Tensor,
    next_option_prob: Tensor,
    option: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Generalized advantages of both levels, from the values ``q(s, o)`` of one critic.

    The high level sees states ``(o', s)``, whose value is ``v^H(o', s) = sum_o pi^H(o | o', s) q(s, o)``. The low level
    sees states ``(o, s)``, whose value is ``v^L(o, s) = q(s, o)``. Both get the same rewards. The next value of step
    ``t`` is ``v^H(o_t, s_t+1)`` for the high level. For the low level it is ``v^L(o_t+1, s_t+1)`` with the option that
    was taken, as in the low level's own MDP. At the end of the batch and of a truncated trajectory no next option was
    taken; there the low level gets the expectation ``v^H(o_t, s_t+1)``, which has the same mean without the noise of a
    draw.

    Args:
        gamma: discount.
        lmbda: of the exponential mean.
        option_value: ``q(s_t, .)``, ``[*B, T, K]``.
        next_option_value: ``q(s_t+1, .)``, ``[*B, T, K]``.
        option_prob: ``pi^H(. | o_t-1, s_t)``, ``[*B, T, K]``.
        next_option_prob: ``pi^H(. | o_t, s_t+1)``, ``[*B, T, K]``.
        option: the option that was taken, ``[*B, T, 1]``.
        reward: ``[*B, T, 1]``.
        done: where a trajectory ends, ``[*B, T, 1]``.
        terminated: where nothing follows, ``[*B, T, 1]``.

    Returns:
        advantages of the high and of the low level and the target of ``q(s_t, o_t)``, each ``[*B, T, 1]``.
    """
    # over the options, [*B, T, K] to [*B, T, 1]
    high = (option_prob * option_value).sum(-1, keepdim=True)
    low = option_value.take_along_dim(option, -1)
    expected = (next_option_prob * next_option_value).sum(-1, keepdim=True)
    # the low value of the next step, shifted by one; the last step of the batch has none
    taken = torch.cat((low[..., 1:, :], expected[..., -1:, :]), -2)
    next_low = torch.where(done, expected, taken)
    advantage_high, _ = vec_generalized_advantage_estimate(gamma, lmbda, high, expected, reward, done, terminated)
    advantage_low, target = vec_generalized_advantage_estimate(gamma, lmbda, low, next_low, reward, done, terminated)
    return advantage_high, advantage_low, target


@dataclass
class DoubleGAEKeys:
    """Keys that the advantages are computed from, and keys that they are written to."""

    advantage_high: NestedKey = "advantage_high"
    advantage_low: NestedKey = "advantage_low"
    value_target: NestedKey = "value_target"
    value: NestedKey = "option_value"
    option: NestedKey = "option"
    previous_option: NestedKey = "previous_option"
    is_init: NestedKey = "is_init"
    reward: NestedKey = "reward"
    done: NestedKey = "done"
    terminated: NestedKey = "terminated"


# the attribute of the actor that holds each key
ACTOR_KEYS = {
    "action": "action_key",
    "action_log_prob": "log_prob_key",
    "option": "option_key",
    "option_log_prob": "option_log_prob_key",
    "previous_option": "previous_option_key",
    "is_init": "is_init_key",
}


class DoubleGAE(nn.Module):
    """Writes the advantages of both levels, the critic's target and its values into a batch of trajectories.

    The sibling of TorchRL's ``GAE``, with the formulas of :func:`double_advantage_estimate` and without gradient.

    Args:
        actor_network: the policy over options.
        critic_network: writes ``q(s, .)`` ``[*B, K]``.

    Keyword Args:
        gamma: discount.
        lmbda: of the exponential mean.

    Raises:
        ValueError: for ``gamma`` or ``lmbda`` outside ``[0, 1]`` or, on a call, a critic with another number of values
            than there are options.
        KeyError: on a call, if the options or the marks of first steps are missing.
    """

    _AcceptedKeys = DoubleGAEKeys

    def __init__(
        self, actor_network: OptionActor, critic_network: TensorDictModule, *, gamma: float, lmbda: float
    ) -> None:
        super().__init__()
        for name, value in (("gamma", gamma), ("lmbda", lmbda)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"DoubleGAE: {name}={value!r} must lie in [0, 1].")
        self.actor_network = actor_network
        self.critic_network = critic_network
        self.gamma, self.lmbda = float(gamma), float(lmbda)
        self.tensor_keys = DoubleGAEKeys()
        known = DoubleGAEKeys.__dataclass_fields__
        self.set_keys(**{key: getattr(actor_network, name) for key, name in ACTOR_KEYS.items() if key in known})

    def set_keys(self, **kwargs: NestedKey) -> None:
        """Rename keys.

        Raises:
            ValueError: for a key that does not exist.
        """
        known = DoubleGAEKeys.__dataclass_fields__
        for key, value in kwargs.items():
            if key not in known:
                raise ValueError(f"DoubleGAE: {key} is no key; allowed: {', '.join(known)}.")
            setattr(self.tensor_keys, key, value)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write into ``tensordict`` ``[*B, T]``, whose last dimension is time."""
        keys = self.tensor_keys
        following = tensordict.get("next")
        option = required_entry("DoubleGAE", tensordict, keys.option)
        value = option_values(self.critic_network, tensordict, keys.value, self.actor_network.num_options)
        next_value = option_values(self.critic_network, following, keys.value, self.actor_network.num_options)
        previous, is_init = (
            required_entry("DoubleGAE", tensordict, key) for key in (keys.previous_option, keys.is_init)
        )
        log_prob = self.actor_network.get_policy(tensordict).option_log_prob(previous, is_init)
        next_log_prob = self.actor_network.get_policy(following).option_log_prob(option)
        done = following.get(keys.done)
        high, low, target = double_advantage_estimate(
            self.gamma,
            self.lmbda,
            value,
            next_value,
            log_prob.exp(),
            next_log_prob.exp(),
            option,
            following.get(keys.reward),
            done,
            following.get(keys.terminated, done),
        )
        tensordict.set(keys.advantage_high, high)
        tensordict.set(keys.advantage_low, low)
        tensordict.set(keys.value_target, target)
        return tensordict.set(keys.value, value)


def option_values(critic: TensorDictModule, tensordict: TensorDictBase, key: NestedKey, num_options: int) -> Tensor:
    """Value of every option by the critic, ``[*B, K]``; ``tensordict`` stays as it is.

    Raises:
        KeyError: if the critic does not write ``key``.
        ValueError: if it writes another number of values.
    """
    value = critic(tensordict.select(*critic.in_keys, strict=False)).get(key, None)
    if value is None:
        raise KeyError(f"the critic writes no {key!r}; it writes {', '.join(map(repr, critic.out_keys))}.")
    if value.shape[-1] != num_options:
        raise ValueError(f"the critic must have a value for each of {num_options} options, got {value.shape[-1]}.")
    return value


def required_entry(owner: str, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """The entry ``key`` as ``[*B, 1]``.

    Raises:
        KeyError: if there is none.
    """
    found = tensordict.get(key, None)
    if found is None:
        raise KeyError(f"{owner}: there is no {key!r} in the input.")
    return found.reshape(*tensordict.shape, 1)
