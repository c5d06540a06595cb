"""Theorem 3.1 of PMOE (arXiv 2104.09122), measured: what the frequency gradient approaches, how fast, and its worth.

    python recipes/benchmarks/theorem.py            # the table, results/theorem.csv and results/theorem.png
    python recipes/benchmarks/theorem.py --fast     # N up to 10,000 and nothing written

Over ``N`` draws the accumulated gradient of the routing loss on the logits approaches that of ``|w - f|^2``, where
``f_k`` is the probability that expert ``k``'s proposal is the best. The draws go through the package's own functions;
``f`` comes from quadrature; the error is the root mean square of its norm over repeats. As the draws are independent,
the error is ``c N^(-1/2)``, and ``c`` follows from the covariance ``diag(f) - f f^T`` of one draw: it is printed too.

That gradient is not the gradient of the soft objective ``J = E[Q] + alpha H(pi)``. The last columns say how far off it
is: the cosine between the two directions of ascent on the logits, and ``J`` at the routing loss's optimum ``w* = f``
beside the largest ``J`` that these experts allow. ``f`` knows nothing of ``alpha``, and of several proposals it asks
for the highest, not for the best on average: it favours wide experts beside a safe one.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from known_optimum import ALPHA, BANDITS, Bandit, best_logits, evaluate, router_gradient
from torch import Tensor
from tqdm import tqdm

from torchrl_pmoe import TanhNormalMixture
from torchrl_pmoe.distributions.routing import best_proposal, brier_loss

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parents[1] / "results"
CHUNK = 1_000_000  # draws of all experts in memory at once, repeats included


@dataclass(frozen=True)
class Case:
    """A router and one-dimensional experts on a bandit.

    Args:
        name: of the case.
        bandit: what scores the proposals.
        weights: of the router, ``K`` numbers that sum to one.
        loc: of the experts before the tanh.
        scale: of the experts before the tanh.
    """

    name: str
    bandit: Bandit
    weights: tuple[float, ...]
    loc: tuple[float, ...]
    scale: tuple[float, ...]

    def params(self) -> tuple[Tensor, Tensor, Tensor]:
        """``logits`` ``[K]``, ``loc`` and ``scale`` ``[K, 1]`` in float64."""
        weights, loc, scale = (torch.tensor(x, dtype=torch.float64) for x in (self.weights, self.loc, self.scale))
        return weights.log(), loc.unsqueeze(-1), scale.unsqueeze(-1)


_EVEN = (0.25,) * 4
CASES = (
    # as a training starts: broad experts anywhere, an undecided router
    Case("early", BANDITS["two_equal"], _EVEN, (-0.9, -0.3, 0.2, 0.8), (1.0, 1.0, 1.0, 1.0)),
    # experts on both peaks, the better ones with little weight
    Case("late", BANDITS["two_equal"], (0.1, 0.4, 0.4, 0.1), (-0.69, -0.5, 0.5, 0.69), (0.08, 0.3, 0.3, 0.08)),
    # a narrow expert beside the peak, trusted, and wide ones on it: one of these often draws higher, rarely well
    Case("wide", BANDITS["one_peak"], (0.7, 0.1, 0.1, 0.1), (0.58, 0.69, 0.69, 0.69), (0.03, 0.2, 0.3, 0.4)),
    # all on one peak, of different width: the narrowest wins, whatever entropy is worth
    Case("nested", BANDITS["one_peak"], _EVEN, (0.69, 0.69, 0.69, 0.69), (0.02, 0.07, 0.25, 0.8)),
)


@dataclass(frozen=True)
class Measurement:
    """Error of the accumulated gradient after ``draws`` draws, one row of the CSV."""

    case: str
    draws: int
    error: float
    predicted: float
    relative: float


class Verdict(NamedTuple):
    """What one case shows."""

    slope: float
    cosine: float
    objective_now: float
    objective_frequency: float
    objective_best: float
    frequency: Tensor
    best_weights: Tensor


def best_frequency(case: Case, nodes: int = 400_001) -> Tensor:
    """``f_k``, the probability that expert ``k``'s proposal has the highest value, by quadrature, ``[K]``.

    ``f_k = E_k[prod_{j != k} F_j(Q(a))]`` with ``F_j`` the distribution function of ``Q`` under expert ``j``, read off
    a grid of latent actions sorted by value.
    """
    _, loc, scale = case.params()
    reach = 10.0 * scale.max().item() + loc.abs().max().item()
    latent = torch.linspace(-reach, reach, nodes, dtype=torch.float64)
    order = case.bandit.value(latent.tanh().unsqueeze(-1)).argsort()
    mass = (-0.5 * ((latent[order] - loc) / scale).square()).exp()  # [K, G]
    mass = mass / mass.sum(-1, keepdim=True)
    below = mass.cumsum(-1) - 0.5 * mass
    others = torch.stack([torch.cat((below[:k], below[k + 1 :])).prod(0) for k in range(len(loc))])
    return (mass * others).sum(-1)


def limit_gradient(case: Case, frequency: Tensor) -> Tensor:
    """Gradient of the routing loss on the logits with ``f`` in place of the one-hot, ``[K]``."""
    logits = case.params()[0].requires_grad_()
    return torch.autograd.grad(brier_loss(logits.softmax(-1), frequency), logits)[0]


def predicted_error(case: Case, frequency: Tensor) -> float:
    """Root mean square error of the gradient of one draw; after ``N`` it is this over ``sqrt(N)``."""
    weights = case.params()[0].softmax(-1)
    softmax = weights.diag() - weights.outer(weights)
    one_hot = frequency.diag() - frequency.outer(frequency)
    return 2.0 / len(weights) * (softmax @ one_hot @ softmax).trace().sqrt().item()


def accumulated_gradient(case: Case, draws: int, repeats: int) -> Tensor:
    """Gradient of the routing loss on the logits, accumulated over ``draws`` draws, ``[repeats, K]``."""
    logits, loc, scale = (x.float() for x in case.params())
    logits = logits.expand(repeats, -1).clone().requires_grad_()
    dist = TanhNormalMixture(logits, loc.expand(repeats, -1, -1), scale.expand(repeats, -1, -1))
    total = torch.zeros(repeats, len(loc), dtype=torch.float64)
    chunk = max(1, CHUNK // (repeats * len(loc)))
    for start in range(0, draws, chunk):
        with torch.no_grad():
            action = dist.propose((min(chunk, draws - start),)).action
            winner = best_proposal(case.bandit.value(action))  # [N, repeats, K]
        loss = brier_loss(dist.probs, winner).sum()
        total += torch.autograd.grad(loss, logits)[0]
    return total / draws


def measure(case: Case, draws: Sequence[int], repeats: int, bar: tqdm | None = None) -> list[Measurement]:
    """Error of the accumulated gradient for every number of draws."""
    frequency = best_frequency(case)
    limit = limit_gradient(case, frequency)
    once = predicted_error(case, frequency)
    found = []
    for n in draws:
        gap = accumulated_gradient(case, n, repeats) - limit
        error = gap.square().sum(-1).mean().sqrt().item()
        found.append(Measurement(case.name, n, error, once / math.sqrt(n), error / limit.norm().item()))
        if bar is not None:
            bar.update(n)
    return found


def slope(measurements: Sequence[Measurement]) -> float:
    """Least-squares slope of the error over the number of draws, both logarithmic."""
    x = torch.tensor([m.draws for m in measurements], dtype=torch.float64).log()
    y = torch.tensor([m.error for m in measurements], dtype=torch.float64).log()
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def judge(case: Case, measurements: Sequence[Measurement], alpha: float = ALPHA) -> Verdict:
    """The measured slope, and what the gradient it belongs to is worth to the soft objective."""
    logits, loc, scale = case.params()
    frequency = best_frequency(case)

    def objective(logits: Tensor) -> tuple[float, Tensor]:
        report = evaluate(case.bandit, logits[None], loc[None], scale[None], alpha)
        return report.objective[0].item(), report.expert_value[0]

    now, expert_value = objective(logits)
    best = best_logits(case.bandit, loc, scale, alpha)
    cosine = torch.cosine_similarity(-limit_gradient(case, frequency), router_gradient(logits, expert_value), dim=0)
    return Verdict(
        slope(measurements),
        cosine.item(),
        now,
        objective(frequency.clamp_min(1e-30).log())[0],
        objective(best)[0],
        frequency,
        best.softmax(-1),
    )


def table(verdicts: dict[str, Verdict]) -> str:
    """Markdown, one row a case."""

    def numbers(x: Tensor) -> str:
        return " ".join(f"{value:.2f}" for value in x.tolist())

    lines = [
        "| case | slope | cosine to the gradient of J | J(w) now | J(w* = f) | max J | f | weights of max J |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {v.slope:.3f} | {v.cosine:+.2f} | {v.objective_now:.3f} | {v.objective_frequency:.3f} "
        f"| {v.objective_best:.3f} | {numbers(v.frequency)} | {numbers(v.best_weights)} |"
        for name, v in verdicts.items()
    ]
    return "\n".join(lines)


def plot(measurements: Sequence[Measurement], verdicts: dict[str, Verdict], path: Path) -> None:
    """Error over draws, both logarithmic; dashed, what the covariance of one draw predicts."""
    from parts.figures import subplots

    styles = zip(("#0072B2", "#D55E00", "#009E73", "#000000"), ("o", "s", "^", "D"), strict=True)
    figure, axes = subplots(figsize=(8, 5.5))
    for (name, verdict), (colour, marker) in zip(verdicts.items(), styles, strict=False):
        here = [m for m in measurements if m.case == name]
        draws = [m.draws for m in here]
        label = f"{name}: slope {verdict.slope:.3f}"
        axes.loglog(draws, [m.error for m in here], marker, color=colour, markersize=9, label=label)
        axes.loglog(draws, [m.predicted for m in here], "--", color=colour, linewidth=1.5)
    axes.set_xlabel("draws N", fontsize=16)
    axes.set_ylabel("RMS error of the gradient on the logits", fontsize=16)
    axes.set_title(r"Frequency gradient, dashed: exact $c\,N^{-1/2}$", fontsize=16)
    axes.tick_params(labelsize=14)
    axes.legend(fontsize=14, frameon=False)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> dict[str, Verdict]:
    """Parse the command line, measure, print the table, write the CSV and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200, help="per number of draws (default: %(default)s)")
    parser.add_argument("--max-draws", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of theorem.csv and theorem.png")
    parser.add_argument("--fast", action="store_true", help="N up to 10,000; writes nothing")
    args = parser.parse_args(argv)
    if args.repeats < 2 or args.max_draws < 100:
        parser.error("--repeats must be at least 2 and --max-draws at least 100")
    torch.manual_seed(args.seed)
    top = math.log10(min(args.max_draws, 10_000) if args.fast else args.max_draws)
    points = round(2 * (top - 1)) + 1
    draws = [round(n) for n in torch.logspace(1, top, points, dtype=torch.float64).tolist()]
    found: list[Measurement] = []
    verdicts = {}
    with tqdm(total=len(CASES) * sum(draws), unit="draw", unit_scale=True, disable=args.fast) as bar:
        for case in CASES:
            here = measure(case, draws, args.repeats, bar)
            found += here
            verdicts[case.name] = judge(case, here)
    print(table(verdicts))
    if not args.fast:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / "theorem.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(found[0])))
            writer.writeheader()
            for m in found:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(m).items()})
        plot(found, verdicts, args.out / "theorem.png")
        print(f"Wrote theorem.csv and theorem.png to {args.out}.")
    return verdicts


if __name__ == "__main__":
    main()
