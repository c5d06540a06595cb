"""Actions in ``[-1, 1]``, whatever the units of the environment, so that entropies mean the same everywhere."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.transforms import ActionScaling, ClipTransform, Compose, Transform

__all__ = ["RawActionPolicy", "normalize_actions"]


def normalize_actions(env: EnvBase, *, clip: bool = False) -> EnvBase:
    """The environment with every dimension of its action scaled to ``[-1, 1]``; itself, where that is its box.

    Args:
        env: with a bounded ``action`` ``[*B, A]``, the lower bound below the upper one in every dimension.

    Keyword Args:
        clip: take actions of any size and clip them into ``[-1, 1]`` first.

    Raises:
        RuntimeError: for an action without such bounds.

    Examples:
        >>> env = normalize_actions(GymEnv("Pendulum-v1"))  # a torque within 2 newton metres
        >>> env.action_spec.space.high
        tensor([1.])
    """
    box = env.action_spec.space
    transforms: list[Transform] = []
    if (box.low != -1).any() or (box.high != 1).any():
        transforms.append(ActionScaling())
    if clip:
        # behind the scaling: on the way to the environment, the last transform is the first
        transforms.append(ClipTransform(in_keys_inv=["action"], low=-1.0, high=1.0))
    if not transforms:
        return env
    if not isinstance(env, TransformedEnv):
        return TransformedEnv(env, transforms[0] if len(transforms) == 1 else Compose(*transforms))
    for transform in transforms:
        env.append_transform(transform)
    return env


class RawActionPolicy(TensorDictModuleBase):
    """A policy of normalised actions as one for the environment as it was made.

    Writes what the policy writes, with ``action`` ``[*B, A]`` clipped into ``[-1, 1]`` and scaled to the bounds.

    Args:
        policy: trained in an environment of :func:`normalize_actions`.
        low: lower bound of the environment's action, ``[A]``.
        high: upper bound of the environment's action, ``[A]``.

    Raises:
        ValueError: where the bounds are equal in a dimension.

    Examples:
        >>> policy = RawActionPolicy(actor, torch.tensor([-2.0]), torch.tensor([2.0]))
        >>> GymEnv("Pendulum-v1").rollout(3, policy)["action"].abs().max() <= 2
        tensor(True)
    """

    def __init__(self, policy: TensorDictModuleBase, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys
        self.policy = policy
        self.scaling = ActionScaling(loc=(high + low) / 2, scale=(high - low) / 2)

    def to_raw(self, action: Tensor) -> Tensor:
        """Actions ``[*B, A]`` in the environment's units."""
        return self.scaling.denormalize(action.clamp(-1, 1))

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act."""
        acted = self.policy(tensordict)
        return acted.set("action", self.to_raw(acted["action"]))
