"""Mixtures written a second time, with ``torch.distributions`` and plain formulas, to compare with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributions as D

from torchrl_pmoe import NormalMixture, TanhNormalMixture

Params = tuple[Tensor, Tensor, Tensor]


def make_params(
    *batch: int,
    experts: int = 3,
    size: int = 2,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    requires_grad: bool = False,
    seed: int = 0,
) -> Params:
    """Random logits ``[*B, K]``, loc ``[*B, K, A]``, scale ``[*B, K, A]`` of ordinary size."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(*batch, experts, generator=rng, dtype=torch.float64)
    loc = torch.randn(*batch, experts, size, generator=rng, dtype=torch.float64)
    scale = 0.2 + torch.rand(*batch, experts, size, generator=rng, dtype=torch.float64)
    logits, loc, scale = (x.to(device=device, dtype=dtype).requires_grad_(requires_grad) for x in (logits, loc, scale))
    return logits, loc, scale


def normal_reference(logits: Tensor, loc: Tensor, scale: Tensor) -> D.Distribution:
    return D.MixtureSameFamily(D.Categorical(logits=logits), D.Independent(D.Normal(loc, scale), 1))


def squash_transforms(low: float | Tensor, high: float | Tensor) -> list[D.Transform]:
    middle, half = (high + low) / 2, (high - low) / 2
    return [D.TanhTransform(), D.AffineTransform(middle, half)]


def tanh_reference(
    logits: Tensor, loc: Tensor, scale: Tensor, low: float | Tensor = -1.0, high: float | Tensor = 1.0
) -> D.Distribution:
    return D.TransformedDistribution(normal_reference(logits, loc, scale), squash_transforms(low, high))


def expert_reference(loc: Tensor, scale: Tensor, low: float | Tensor = -1.0, high: float | Tensor = 1.0):
    """Every expert by itself, as one distribution of batch shape ``[*B, K]``."""
    return D.TransformedDistribution(D.Independent(D.Normal(loc, scale), 1), squash_transforms(low, high))


def brier_gradient(logits: Tensor, frequency: Tensor, coef: float = 1.0) -> Tensor:
    """Gradient on the logits of Definition 3.1's loss, through an explicit softmax Jacobian."""
    w = logits.detach().softmax(-1)
    batch, experts = max(1, w[..., 0].numel()), w.shape[-1]
    d_w = coef * 2 * (w - frequency) / (batch * experts)
    jacobian = torch.diag_embed(w) - w.unsqueeze(-1) * w.unsqueeze(-2)
    return (jacobian @ d_w.unsqueeze(-1)).squeeze(-1)


def one_hot_of_largest(score: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(score.argmax(-1), score.shape[-1]).to(score.dtype)


def mixture_of(cls: type[NormalMixture], params: Params, **options) -> NormalMixture:
    return cls(*params, **options)


BOTH = (NormalMixture, TanhNormalMixture)
