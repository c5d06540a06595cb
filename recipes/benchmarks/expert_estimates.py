"""What each ``backprop`` teaches the experts, against quadrature: the second table of ``estimators.py``.

Two truths, both by quadrature in float64 on the mixtures of ``router_estimates.py``:

- the gradient of ``J = E[Q] + alpha H(pi)`` on loc and scale, where an expert counts by its weight ``w_k``;
- *random draws*: the same, where an expert counts by how often its proposal is the best, ``f_k``. That is what choosing
  an expert by score and learning from a random draw of it means. What back-prop-max has besides is *selection*: the
  draw that won is no random draw of its expert.

Estimates are what ``PMOESACLoss`` hands back for locs and scales that are leaves ``[samples, K]``; sign and bias are
those of ``estimators.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from known_optimum import _draws, evaluate
from router_estimates import BANDIT, BLACK, BLUE, GREEN, ORANGE, RED, Estimator, Instance, mixtures, sample
from torch import Tensor

PARAMETERS = ("loc", "scale")
EXPERT_ESTIMATORS = tuple(
    Estimator(name, "critic", "none", style, options)
    for name, style, options in (
        ("max", (RED, "D"), {"backprop": "max"}),
        ("max, decoupled", (GREEN, "^"), {"backprop": "max", "decoupled": True}),
        ("all", (ORANGE, "P"), {"backprop": "all"}),
        ("routed", (BLUE, "s"), {"backprop": "routed"}),
        ("weighted", (BLACK, "o"), {"backprop": "weighted"}),
    )
)


@dataclass(frozen=True)
class ExpertRow:
    """One ``backprop`` at one number of experts, for one parameter; one row of ``estimators_experts.csv``."""

    experts: int
    estimator: str
    parameter: str
    cosine: float
    """Of the mean with ``dJ``, mean over the mixtures."""
    downhill: float
    bias: float
    """Of the mean against ``dJ``, after the best constant for all mixtures."""
    bias_resolution: float
    """What the bias of an unbiased estimator would be at this number of samples; the same for the next but one."""
    from_random: float
    """Distance of the mean from that of random draws of the best expert, over the latter's size."""
    from_random_resolution: float
    pushed_up: float
    """Mean of the mean's distance from that of random draws, over the latter's size; of a scale, > 0 is wider."""
    noise_to_signal: float


def best_frequency(instance: Instance) -> Tensor:
    """How often each expert's proposal is the best, by quadrature, ``[K]``."""
    noise, share = _draws(BANDIT.action_size)
    latent = instance.loc.unsqueeze(1) + instance.scale.unsqueeze(1) * noise
    value = BANDIT.value(latent.tanh())  # [K, G]
    # P(expert j's value is below a given one), the middle of its step where values are equal
    below = value.new_ones(value.shape)
    for j, row in enumerate(value):
        order = row.argsort()
        mass = torch.nn.functional.pad(share[order].cumsum(0), (1, 0))
        sorted_values = row[order]
        left = torch.searchsorted(sorted_values, value.flatten())
        right = torch.searchsorted(sorted_values, value.flatten(), right=True)
        chance = (0.5 * (mass[left] + mass[right])).view_as(value)
        chance[j] = 1.0
        below = below * chance
    frequency = below @ share
    return frequency / frequency.sum()


def true_gradients(instance: Instance, share: Tensor) -> list[Tensor]:
    """Gradient of ``sum_k share_k E_k[Q - alpha log pi]`` on loc and scale by quadrature, ``[K]`` each."""
    loc, scale = (getattr(instance, name).clone().requires_grad_() for name in PARAMETERS)
    report = evaluate(BANDIT, instance.logits[None], loc[None], scale[None])
    found = torch.autograd.grad((share * report.expert_value[0]).sum(), (loc, scale))
    return [gradient.squeeze(-1) for gradient in found]


def run_experts(
    experts: Sequence[int], instances: int, samples: int, tick: Callable[[int], object] = lambda n: None
) -> Iterator[ExpertRow]:
    """Measure every ``backprop`` at every number of experts; rows come as they are found."""
    for num_experts in experts:
        cases = mixtures(num_experts, instances)
        truths = [true_gradients(case, case.logits.softmax(-1)) for case in cases]
        random = [true_gradients(case, best_frequency(case)) for case in cases]
        for estimator in EXPERT_ESTIMATORS:
            draws = [sample(estimator, case, samples, tick, PARAMETERS).squeeze(-1) for case in cases]
            for i, parameter in enumerate(PARAMETERS):
                here = [one[:, i].double() for one in draws]
                yield _summarise(
                    estimator.name,
                    parameter,
                    torch.stack([x.mean(0) for x in here]),
                    torch.stack([x.var(0).sum() for x in here]),
                    torch.stack([t[i] for t in truths]),
                    torch.stack([t[i] for t in random]),
                    samples,
                )


def _summarise(
    name: str, parameter: str, mean: Tensor, variance: Tensor, truth: Tensor, random: Tensor, samples: int
) -> ExpertRow:
    """Of means ``[I, K]`` and variances ``[I]`` of single samples over the mixtures ``[I]``."""
    scale = ((mean * truth).sum() / mean.square().sum()).clamp_min(0.0)
    error = variance.sum().div(samples).sqrt()
    cosine = torch.cosine_similarity(mean, truth, dim=-1)
    gap = mean - random
    return ExpertRow(
        experts=mean.shape[-1],
        estimator=name,
        parameter=parameter,
        cosine=cosine.mean().item(),
        downhill=(cosine < 0).double().mean().item(),
        bias=((scale * mean - truth).norm() / truth.norm()).item(),
        bias_resolution=(scale * error / truth.norm()).item(),
        from_random=(gap.norm() / random.norm()).item(),
        from_random_resolution=(error / random.norm()).item(),
        pushed_up=(gap.sum(-1).mean() / random.abs().sum(-1).mean()).item(),
        noise_to_signal=(variance.mean() / mean.square().sum(-1).mean()).item(),
    )


def expert_table(rows: Sequence[ExpertRow]) -> str:
    """Markdown, one row a ``backprop`` and number of experts, loc and scale side by side."""
    titles = ["K", "backprop"]
    titles += [f"{parameter}: {what}" for parameter in PARAMETERS for what in ("cosine", "bias", "from random draws")]
    titles += ["scale: pushed up", "noise to signal, loc", "scale"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]

    def shown(value: float, resolution: float) -> str:
        return f"< {2 * resolution:.3f}" if value < 2 * resolution else f"{value:.2f}"

    for loc, scale in zip(rows[::2], rows[1::2], strict=True):
        cells = [str(loc.experts), loc.estimator]
        for row in (loc, scale):
            cells += [
                f"{row.cosine:+.2f}",
                shown(row.bias, row.bias_resolution),
                shown(row.from_random, row.from_random_resolution),
            ]
        cells += [f"{scale.pushed_up:+.2f}", f"{loc.noise_to_signal:,.1f}", f"{scale.noise_to_signal:,.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
