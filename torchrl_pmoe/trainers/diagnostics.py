"""What can go wrong with a mixture, as numbers: collapse, dead or duplicate experts, saturation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.modules import ProbabilisticActor

from torchrl_pmoe.distributions import NormalMixture

__all__ = ["mixture_diagnostics", "policy_diagnostics", "saturation"]


def saturation(
    action: Tensor, low: Tensor | float = -1.0, high: Tensor | float = 1.0, threshold: float = 0.99
) -> Tensor:
    """Share of action entries beyond ``threshold`` once ``[low, high]`` is mapped to ``[-1, 1]``."""
    unit = (2 * action - (high + low)) / (high - low)
    return (unit.abs() > threshold).float().mean()


@torch.no_grad()
def mixture_diagnostics(
    dist: NormalMixture,
    qvalues: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Diagnostics of a mixture policy over a batch of states.

    Args:
        dist: a mixture of batch shape ``[B]``.
        qvalues: maps proposals ``[B, K, A]`` to the critics' values ``[num_critics, B, K]``.

    Returns:
        scalars ``effective_experts`` (``exp H(E_s w)``), ``effective_experts_per_state``
        (``exp E_s H(w)``), ``routing_entropy`` (``E_s H(w)``), ``mutual_information`` (``I(A; Z | s)``, in
        nats), ``dead_fraction`` (share of experts used less than ``1 / (10 K)``), ``proposal_margin``
        (mean margin between the best and the second proposal over the critics' mean disagreement; nan
        without critics or with one expert) and the vector ``usage`` ``[K]``.
    """
    probs = dist.probs
    num_experts = probs.shape[-1]
    usage = probs.mean(0)
    entropy = torch.special.entr(probs).sum(-1).mean()
    action, _ = dist.rsample_experts()
    # the sample dimension of `responsibilities` leads: [K, B, A] -> [K, B, K]
    own = dist.responsibilities(action.movedim(-2, 0)).diagonal(dim1=0, dim2=-1)
    tiny = torch.finfo(probs.dtype).tiny
    information = (probs * (own.clamp_min(tiny).log() - probs.clamp_min(tiny).log())).sum(-1).mean()
    margin = probs.new_full((), float("nan"))
    if qvalues is not None and num_experts > 1:
        q = qvalues(action)
        best, second = q.min(0).values.topk(2, dim=-1).values.unbind(-1)
        spread = (q.max(0).values - q.min(0).values).mean()
        margin = (best - second).mean() / spread
    return {
        "effective_experts": torch.special.entr(usage).sum().exp(),
        "effective_experts_per_state": entropy.exp(),
        "routing_entropy": entropy,
        "mutual_information": information,
        "dead_fraction": (usage < 1 / (10 * num_experts)).float().mean(),
        "proposal_margin": margin,
        "usage": usage,
    }


@torch.no_grad()
def policy_diagnostics(
    actor: ProbabilisticActor, states: TensorDictBase, qvalues: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """Diagnostics of a policy with actions in ``[-1, 1]``, as the columns of a record.

    Args:
        actor: any policy; of a mixture there is all that :func:`mixture_diagnostics` tells, ``usage_k`` by expert.
        states: what it reads, ``[B]``.
        qvalues: as in :func:`mixture_diagnostics`.
    """
    dist = actor.get_dist(states)
    columns = {"saturation": saturation(dist.sample()).item()}
    if not isinstance(dist, NormalMixture):
        return columns
    found = mixture_diagnostics(dist, qvalues)
    usage = found.pop("usage").tolist()
    row = {key: value.item() for key, value in found.items()}
    return {**row, **columns, **{f"usage_{k}": value for k, value in enumerate(usage)}}
