"""Modules from features to the parameters of a mixture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict.nn.utils import mappings
from torch import Tensor, nn

__all__ = ["ClampedExp", "MixtureParamExtractor"]


class ClampedExp(nn.Module):
    """``exp(clamp(x, low, high))``: the authors' map from a network's output to a standard deviation.

    Args:
        low: lower bound of the log standard deviation.
        high: upper bound of the log standard deviation.
    """

    def __init__(self, low: float = -20.0, high: float = 2.0) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        """Standard deviation of the same shape as ``x``."""
        return x.clamp(self.low, self.high).exp()

    def extra_repr(self) -> str:
        """The bounds."""
        return f"low={self.low}, high={self.high}"


class MixtureParamExtractor(nn.Module):
    """Splits features into ``logits``, ``loc`` and ``scale`` of a mixture.

    The sibling of :class:`tensordict.nn.NormalParamExtractor`. Features ``[..., K (2A + 1)]`` hold ``K`` logits, then
    ``K A`` locs, then ``K A`` values for the scale; locs and scales are ordered expert by expert.

    Args:
        num_experts: ``K``.
        scale_mapping: positive map for the scale: a name that :func:`tensordict.nn.mappings` knows, or a callable.
        scale_lb: smallest scale.
        floor: share of the probability that is spread over all experts, ``w = (1 - floor) softmax + floor / K``; a
            remedy against dead experts, off by default.
        action_size: ``A``, which the features are checked against; unset, it follows from the features.

    Raises:
        ValueError: if ``num_experts < 1``, ``floor`` is outside ``[0, 1)``, or, on a call, the features do not
            divide into experts.

    Examples:
        >>> logits, loc, scale = MixtureParamExtractor(3)(torch.randn(5, 3 * (2 * 2 + 1)))
        >>> logits.shape, loc.shape, scale.shape
        (torch.Size([5, 3]), torch.Size([5, 3, 2]), torch.Size([5, 3, 2]))
    """

    def __init__(
        self,
        num_experts: int,
        scale_mapping: str | Callable[[Tensor], Tensor] = "biased_softplus_1.0",
        scale_lb: float = 1e-4,
        *,
        floor: float = 0.0,
        action_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
            raise ValueError(f"num_experts={num_experts!r} must be an integer of at least 1.")
        if not 0.0 <= floor < 1.0:
            raise ValueError(f"floor={floor!r} must lie in [0, 1).")
        self.num_experts = num_experts
        self.scale_mapping = mappings(scale_mapping) if isinstance(scale_mapping, str) else scale_mapping
        self.scale_lb = scale_lb
        self.floor = floor
        self.action_size = action_size

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Parameters of the mixture; tensors beyond the first are returned as they are.

        Args:
            *tensors: features ``[*B, K (2A + 1)]``, then anything.

        Returns:
            ``logits`` ``[*B, K]``, ``loc`` ``[*B, K, A]``, ``scale`` ``[*B, K, A]``, then the other tensors.
        """
        features, *others = tensors
        size, experts = features.shape[-1], self.num_experts
        action = (size // experts - 1) // 2  # A, from K (2A + 1) features
        if action < 1 or size != experts * (2 * action + 1) or self.action_size not in (None, action):
            expected = f"K (2A + 1) with K={experts}"
            if self.action_size is not None:
                expected += f", A={self.action_size}: {experts * (2 * self.action_size + 1)}"
            raise ValueError(
                f"MixtureParamExtractor: features of shape {tuple(features.shape)} do not fit; "
                f"their last dimension must be {expected}."
            )
        # [*B, K], [*B, K A], [*B, K A]; the last two become [*B, K, A]
        logits, loc, scale = features.split((experts, experts * action, experts * action), -1)
        if self.floor:
            # back to logits, which the mixture takes
            logits = torch.log((1.0 - self.floor) * logits.softmax(-1) + self.floor / experts)
        loc = loc.unflatten(-1, (experts, action))
        scale = self.scale_mapping(scale.unflatten(-1, (experts, action)))
        if self.scale_lb > 0:
            scale = scale.clamp_min(self.scale_lb)
        return (logits, loc, scale, *others)
