"""Every estimator of the router's gradient where the true one is known: bias, variance and cost at K = 2, 4 and 16.

    python recipes/benchmarks/estimators.py            # the table, results/estimators*.csv and results/estimators.png
    python recipes/benchmarks/estimators.py --fast     # few samples and nothing written
    python recipes/benchmarks/estimators.py --only experts   # the experts' gradients alone (expert_estimates.py)

One state, a known ``Q`` with two unequal peaks, ``alpha = 0.1``, and mixtures with random weights, locs and scales.
The truth is the gradient of the soft objective ``J = E[Q] + alpha H(pi)`` on the logits, by quadrature in float64
(``known_optimum.py``, which uses none of the package's densities). Estimates are what the package's own losses hand
back: ``PMOESACLoss`` where critics score every proposal, TorchRL's unmodified ``SACLoss`` where the distribution
routes by slopes or relaxes the draw. Logits are one leaf ``[samples, K]``, so that one backward pass gives that many
independent estimates, each as strong as that of a batch of one state.

Sign: all that is compared points uphill. An estimate is *minus* the gradient of the loss, the truth ``+dJ/dlogits``.

The frequencies pull the router towards a distribution and do not claim to be the gradient of ``J``: only directions can
be compared. So an estimator is multiplied by the positive constant ``c`` that brings its mean closest to the truth, one
for all mixtures, as an optimiser has one for all states. ``t`` being the truth and ``m`` the mean of all samples, norms
being root mean squares over the mixtures:

- cosine between ``m`` and ``t``, mean and standard deviation over the mixtures; *downhill*, the share of mixtures where
  it is negative. With two experts a gradient on the logits has one direction, up to its sign;
- bias: ``|c m - t| / |t|``, 1 where nothing is better than the estimate; *own c*, were the best constant of every
  mixture known; *as it is*, ``|m - t| / |t|``, for the estimators that claim to be the gradient;
- noise to signal: total variance of one sample over ``|m|^2``;
- error: root mean square of ``|c mean_N - t| / |t|`` over disjoint groups of ``N`` samples;
- cost: actions that the critics evaluate per state, how many of them it takes to an error of a quarter, and the time
  of forward and backward pass of the whole actor's loss on a batch of 256 with two critics of 2 x 256 units, as a ratio
  to the marginal's, taking turns. Critic-scored losses use ``backprop="weighted"`` here, which evaluates nothing but
  the ``K`` proposals; ``max`` and ``routed`` evaluate one more.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from expert_estimates import EXPERT_ESTIMATORS, ExpertRow, expert_table, run_experts
from router_estimates import (
    BANDIT,
    ESTIMATORS,
    KEYS,
    Estimator,
    Instance,
    backward,
    mixtures,
    sample,
)
from torch import Tensor, nn
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import SACLoss
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parents[1] / "results"
EXPERTS = (2, 4, 16)
DRAWS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
TARGET = 0.25  # an error to be reached
BATCH, CELLS = 256, (256, 256)


class Samples(NamedTuple):
    """What an estimator's samples are on mixtures ``[I]``, or ``[]``."""

    truth: Tensor
    """``dJ/dlogits``, ``[I, K]``."""
    mean: Tensor
    """Of all samples, ``[I, K]``."""
    variance: Tensor
    """Of one sample, summed over the logits, ``[I]``."""
    power: Tensor
    """``|mean_N|^2``, mean over the groups of every size, ``[I, sizes]``."""
    overlap: Tensor
    """``mean_N t``, their inner product's mean over the groups, ``[I, sizes]``."""
    cosine: Tensor
    """Of the averages of groups with the truth, their mean, ``[I, sizes]``."""


@dataclass(frozen=True)
class Point:
    """Error of the average of ``draws`` samples; one row of ``estimators_curves.csv``."""

    experts: int
    estimator: str
    draws: int
    repeats: int
    """Groups, all mixtures together."""
    error: float
    error_lower: float
    """Quartile over the mixtures, each relative to its own truth; as the next."""
    error_upper: float
    cosine: float


@dataclass(frozen=True)
class Row:
    """One estimator at one number of experts; one row of ``estimators.csv``."""

    experts: int
    estimator: str
    cosine: float
    cosine_sd: float
    downhill: float
    bias: float
    bias_resolution: float
    """What the bias of an unbiased estimator would be at this number of samples."""
    bias_own_c: float
    bias_as_is: float
    noise_to_signal: float
    noise_to_signal_lower: float
    """Quartile over the mixtures, as the next."""
    noise_to_signal_upper: float
    critic_calls: int
    calls_to_target: float
    milliseconds: float
    time_ratio: float


def best_scale(estimate: Tensor, truth: Tensor) -> Tensor:
    """The constant ``c >= 0`` that minimises ``|c estimate - truth|``, ``[*I]`` for vectors ``[*I, K]``."""
    return ((estimate * truth).sum(-1) / estimate.square().sum(-1)).clamp_min(0.0)


def judge(draws: Tensor, truth: Tensor, sizes: Sequence[int]) -> Samples:
    """Compare samples ``[S, K]`` of one mixture, and averages of them, with the truth ``[K]``."""
    centre = draws.mean(0, dtype=torch.float64)
    variance = (draws - centre).square().sum(-1).mean()
    power, overlap, cosine = [], [], []
    for size in sizes:
        groups = draws[: len(draws) // size * size].unflatten(0, (-1, size)).mean(1, dtype=torch.float64)
        power.append(groups.square().sum(-1).mean())
        overlap.append((groups @ truth).mean())
        cosine.append(torch.cosine_similarity(groups, truth, dim=-1).mean())
    return Samples(truth, centre, variance, torch.stack(power), torch.stack(overlap), torch.stack(cosine))


def measure(
    estimator: Estimator,
    instances: Sequence[Instance],
    sizes: Sequence[int],
    repeats: int,
    tick: Callable[[int], object] = lambda n: None,
) -> Samples:
    """Draw ``repeats`` groups of the largest size on every mixture and compare them with the truth."""
    found = []
    for instance in instances:
        draws = sample(estimator, instance, repeats * max(sizes), tick)
        found.append(judge(draws, instance.true_gradient(), sizes))
    return Samples(*(torch.stack(x) for x in zip(*found, strict=True)))


def curve(estimator: Estimator, samples: Samples, sizes: Sequence[int], repeats: int) -> list[Point]:
    """Error and cosine over the number of samples averaged."""
    squared_truth = samples.truth.square().sum(-1)
    scale = best_scale(samples.mean.flatten(), samples.truth.flatten())
    squared_error = scale**2 * samples.power - 2 * scale * samples.overlap + squared_truth.unsqueeze(-1)
    errors = (squared_error.mean(0) / squared_truth.mean()).sqrt()
    lower, upper = (squared_error.T / squared_truth).sqrt().quantile(torch.tensor([0.25, 0.75]).double(), dim=-1)
    return [
        Point(
            experts=samples.truth.shape[-1],
            estimator=estimator.name,
            draws=size,
            repeats=len(squared_truth) * (repeats * max(sizes) // size),
            error=errors[i].item(),
            error_lower=lower[i].item(),
            error_upper=upper[i].item(),
            cosine=samples.cosine[:, i].mean().item(),
        )
        for i, size in enumerate(sizes)
    ]


def summarise(estimator: Estimator, samples: Samples, count: int, time: float, unit: float) -> Row:
    """One row of the table from ``count`` samples a mixture; ``time`` and its ``unit`` are in seconds."""
    truth, centre, variance = samples.truth, samples.mean, samples.variance

    def relative(gap: Tensor) -> float:
        return (gap.norm() / truth.norm()).item()

    scale = best_scale(centre.flatten(), truth.flatten())
    own_scale = best_scale(centre, truth).unsqueeze(-1)
    bias, noise = relative(scale * centre - truth), relative(scale * variance.sqrt())
    cosine = torch.cosine_similarity(centre, truth, dim=-1)
    ratio = variance / centre.square().sum(-1)
    lower, upper = ratio.quantile(torch.tensor([0.25, 0.75]).double()).tolist()
    calls = estimator.critic_calls(truth.shape[-1])
    return Row(
        experts=truth.shape[-1],
        estimator=estimator.name,
        cosine=cosine.mean().item(),
        cosine_sd=cosine.std(correction=0).item(),
        downhill=(cosine < 0).double().mean().item(),
        bias=bias,
        bias_resolution=noise / math.sqrt(count),
        bias_own_c=relative(own_scale * centre - truth),
        bias_as_is=relative(centre - truth) if estimator.gradient else math.nan,
        noise_to_signal=(variance.mean() / centre.square().sum(-1).mean()).item(),
        noise_to_signal_lower=lower,
        noise_to_signal_upper=upper,
        critic_calls=calls,
        calls_to_target=calls * noise**2 / (TARGET**2 - bias**2) if bias < TARGET else math.inf,
        milliseconds=1e3 * time,
        time_ratio=time / unit,
    )


def seconds(instance: Instance, rounds: int, block: int, tick: Callable[[], object] = lambda: None) -> list[float]:
    """Median time of one forward and backward pass of each estimator, taking turns."""
    # a critic of the usual size: the known value would cost nothing
    size = 1 + BANDIT.action_size
    mlp = MLP(in_features=size, out_features=1, num_cells=list(CELLS), activation_class=nn.ReLU)
    critic = ValueOperator(mlp, in_keys=["observation", "action"])
    losses = [estimator.loss(critic, BATCH, num_qvalue_nets=2) for estimator in ESTIMATORS]
    batch = instance.batch(BATCH)
    for key in KEYS:
        batch[key].requires_grad_()

    def timed(loss_module: SACLoss) -> float:
        start = perf_counter()
        for _ in range(block):
            backward(loss_module, batch)
        return (perf_counter() - start) / block

    for loss_module in losses:
        timed(loss_module)
    times = []
    for _ in range(rounds):
        times.append([timed(loss_module) for loss_module in losses])
        tick()
    return [median(column) for column in zip(*times, strict=True)]


def run(
    experts: Sequence[int], instances: int, sizes: Sequence[int], repeats: int, rounds: int, block: int
) -> Iterator[tuple[Row, list[Point]]]:
    """Measure every estimator at every number of experts; rows come as they are found."""
    total = len(experts) * len(ESTIMATORS) * instances * repeats * max(sizes)
    with tqdm(total=total, unit="sample", unit_scale=True, mininterval=1.0) as bar:
        for num_experts in experts:
            cases = mixtures(num_experts, instances)
            bar.set_description(f"K={num_experts}, timing")
            times = seconds(cases[0], rounds, block)
            marginal = times[[estimator.name for estimator in ESTIMATORS].index("marginal")]
            for estimator, time in zip(ESTIMATORS, times, strict=True):
                bar.set_description(f"K={num_experts}, {estimator.name}")
                samples = measure(estimator, cases, sizes, repeats, bar.update)
                row = summarise(estimator, samples, repeats * max(sizes), time, marginal)
                yield row, curve(estimator, samples, sizes, repeats)


def table(rows: Sequence[Row], points: Sequence[Point]) -> str:
    """Markdown, one row an estimator and number of experts."""
    sizes = sorted({point.draws for point in points})
    shown = [size for size in (1, 100, 10_000) if size in sizes]
    error = {(point.experts, point.estimator, point.draws): point.error for point in points}
    titles = ["K", "estimator", "cosine of the mean", "downhill", "bias", "own c", "as it is", "noise to signal"]
    titles += [f"error, N={size:,}" for size in shown]
    titles += ["critic calls", f"calls to an error of {TARGET}", "time"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        least = 2 * row.bias_resolution  # less is not told from none

        def bias(value: float, least: float = least) -> str:
            return "-" if math.isnan(value) else f"< {least:.3f}" if value < least else f"{value:.3f}"

        cells = [
            str(row.experts),
            row.estimator,
            f"{row.cosine:+.3f} ± {row.cosine_sd:.3f}",
            f"{row.downhill:.0%}",
            *(bias(value) for value in (row.bias, row.bias_own_c, row.bias_as_is)),
            f"{row.noise_to_signal:,.1f}",
            *(f"{error[row.experts, row.estimator, size]:.3f}" for size in shown),
            str(row.critic_calls),
            "never" if math.isinf(row.calls_to_target) else f"{row.calls_to_target:,.0f}",
            f"{row.time_ratio:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(points: Sequence[Point], path: Path) -> None:
    """Error over samples, both logarithmic, one panel a number of experts."""
    from parts.figures import subplots

    experts = sorted({point.experts for point in points})
    figure, axes = subplots(1, len(experts), figsize=(5.6 * len(experts), 8), sharex=True, sharey=True, squeeze=False)
    for axis, num_experts in zip(axes[0], experts, strict=True):
        axis.axhline(1.0, color="black", linestyle=":", linewidth=1.5)
        for i, estimator in enumerate(ESTIMATORS):
            here = [p for p in points if p.experts == num_experts and p.estimator == estimator.name]
            colour, marker = estimator.style
            axis.loglog(
                [p.draws for p in here],
                [p.error for p in here],
                "--" if estimator.variant else "-",
                color=colour,
                marker=marker,
                markevery=(i % 4, 4),  # lines on top of each other show their markers in turn
                markersize=14 if marker == "*" else 10,
                markerfacecolor="white" if estimator.variant else colour,
                linewidth=2,
                label=estimator.name,
            )
        axis.set_title(f"K = {num_experts}", fontsize=20)
        axis.set_xlabel("samples N", fontsize=18)
        axis.tick_params(labelsize=16)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("relative RMS error (dotted: zero gradient)", fontsize=18)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle("Averages of N samples against the true gradient on the router's logits", fontsize=20)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=16, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write(rows: Sequence[Row] | Sequence[Point] | Sequence[ExpertRow], path: Path) -> None:
    """A CSV of dataclasses of one kind."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def main(argv: Sequence[str] | None = None) -> tuple[list[Row], list[Point], list[ExpertRow]]:
    """Parse the command line, measure, print the tables, write the CSVs and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=list(EXPERTS), help="K (default: 2 4 16)")
    parser.add_argument("--instances", type=int, default=20, help="random mixtures for every K (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="groups of the largest N on each (default: %(default)s)")
    parser.add_argument("--max-draws", type=int, default=DRAWS[-1], help="largest N (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing (default: %(default)s)")
    parser.add_argument("--only", choices=("router", "experts"), help="one of the two tables (default: both)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of estimators*.csv and estimators.png")
    parser.add_argument("--fast", action="store_true", help="four mixtures, N up to 1,000; writes nothing")
    args = parser.parse_args(argv)
    if args.fast:
        args.instances, args.max_draws, args.rounds = 4, min(args.max_draws, 1000), 2
    if min(args.instances, args.max_draws, args.rounds) < 1 or args.repeats < 2 or min(args.experts) < 2:
        parser.error("--instances, --max-draws and --rounds must be at least 1, --repeats and --experts at least 2")
    torch.manual_seed(args.seed)
    sizes = [size for size in DRAWS if size <= args.max_draws]
    rows: list[Row] = []
    points: list[Point] = []
    expert_rows: list[ExpertRow] = []
    if args.only != "experts":
        for row, here in run(args.experts, args.instances, sizes, args.repeats, args.rounds, block=3):
            rows.append(row)
            points += here
        print(table(rows, points))
    if args.only != "router":
        samples = args.repeats * max(sizes)
        total = len(args.experts) * len(EXPERT_ESTIMATORS) * args.instances * samples
        with tqdm(total=total, desc="experts", unit="sample", unit_scale=True, mininterval=1.0) as bar:
            expert_rows += run_experts(args.experts, args.instances, samples, bar.update)
        print(expert_table(expert_rows))
    if not args.fast:
        args.out.mkdir(parents=True, exist_ok=True)
        if rows:
            write(rows, args.out / "estimators.csv")
            write(points, args.out / "estimators_curves.csv")
            plot(points, args.out / "estimators.png")
        if expert_rows:
            write(expert_rows, args.out / "estimators_experts.csv")
        print(f"Wrote estimators*.csv{' and estimators.png' * bool(rows)} to {args.out}.")
    return rows, points, expert_rows


if __name__ == "__main__":
    main()
