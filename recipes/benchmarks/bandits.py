"""Every router, backprop and score on bandits whose best policy is known.

    python recipes/benchmarks/bandits.py                  # the whole table
    python recipes/benchmarks/bandits.py --fast           # two combinations, one problem, a few seconds
    python recipes/benchmarks/bandits.py --problems four_peaks --only weighted
    python recipes/benchmarks/bandits.py --show recipes/results/bandits.csv

What is trained is what a user trains: a :class:`PMOEActor` by ``PMOESACLoss.actor_loss``, or by TorchRL's own
``SACLoss.actor_loss`` where the routing is gradient-scored. The critic is the bandit's known value, the temperature is
fixed. An actor here is one free parameter vector; the observation is its row in a table, so that all seeds, and all
problems of one shape, train side by side in one batch without touching each other.

What is reported comes from quadrature (``known_optimum.py``): ``J`` over that of the best policy; peaks kept (the
policy has at least half of the best policy's mass on them, above half their height); the distance between the
policy's mass per peak and the closed form, ``sum_p |m_p - m*_p|``; the router's largest weight.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from known_optimum import ALPHA, BANDITS, Bandit, evaluate, solve
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.objectives import SACLoss
from tqdm import tqdm

from torchrl_pmoe import PMOEActor, PMOESACLoss

RESULTS = Path(__file__).parents[1] / "results" / "bandits.csv"
KEPT = 0.5

Scoring = Literal["critic", "gradient", "none"]
Backprop = Literal["max", "all", "routed", "weighted"]


@dataclass(frozen=True)
class Combination:
    """One way to train a mixture; ``scoring="none"`` is a single Gaussian."""

    scoring: Scoring
    routing: str
    backprop: Backprop
    score: str

    def __str__(self) -> str:
        if self.scoring == "none":
            return "Gaussian"
        prefix = "gradient-scored " if self.scoring == "gradient" else ""
        return f"{prefix}{self.routing} / {self.backprop} / {self.score}"


@dataclass(frozen=True)
class Setting:
    """What all combinations have in common.

    Args:
        steps: of Adam.
        batch: identical states a step.
        lr: of Adam.
        loc_spread: locs start uniform in ``[-loc_spread, loc_spread]`` before the tanh.
        routing_loss: of the critic-scored frequencies.
    """

    steps: int = 2000
    batch: int = 64
    lr: float = 1e-2
    loc_spread: float = 1.0
    routing_loss: Literal["brier", "log"] = "brier"


@dataclass(frozen=True)
class Outcome:
    """One trained policy, one row of a CSV."""

    combination_type: ClassVar[type] = Combination

    problem: str
    combination: object
    """How the policy was trained; its fields are columns of the CSV, its name stands in the table."""
    seed: int
    objective: float
    optimum: float
    share: float
    peaks_kept: int
    peaks: int
    least_peak: float
    """Mass on the peak that fares worst, over that of the best policy there."""
    mass_distance: float
    largest_weight: float


SomeOutcome = TypeVar("SomeOutcome", bound=Outcome)
SomeCombination = TypeVar("SomeCombination")

SCORES = ("mixture", "expert")
PAPER = Combination("critic", "frequency", "max", "expert")
BEST = Combination("critic", "soft_frequency", "weighted", "mixture")
COMBINATIONS = (
    Combination("none", "none", "routed", "mixture"),
    *(
        Combination("critic", routing, backprop, score)
        for routing, backprop, score in itertools.product(
            ("frequency", "soft_frequency", "marginal", "none"), get_args(Backprop), SCORES
        )
    ),
    *(
        Combination("gradient", routing, "routed", score)
        for routing, score in itertools.product(("frequency", "soft_frequency"), SCORES)
    ),
)


class ParameterTable(nn.Module):
    """Free parameters ``[R, K (2A + 1)]``; the observation is the row.

    Logits start at zero, log-scales at zero, locs uniform in ``[-loc_spread, loc_spread]``, the same for a seed
    whatever is trained.
    """

    def __init__(self, seeds: Iterable[int], num_experts: int, action_size: int, loc_spread: float) -> None:
        super().__init__()
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            row = torch.zeros(num_experts * (2 * action_size + 1))
            row[num_experts : num_experts * (1 + action_size)].uniform_(-loc_spread, loc_spread, generator=generator)
            rows.append(row)
        self.weight = nn.Parameter(torch.stack(rows))

    def forward(self, observation: Tensor) -> Tensor:
        """Parameters of the row that ``observation`` ``[*B, 1]`` names, ``[*B, K (2A + 1)]``."""
        return nn.functional.embedding(observation.squeeze(-1), self.weight)


class KnownValue(nn.Module):
    """The value of one bandit per row, in a critic's place."""

    centres: Tensor
    heights: Tensor
    width: Tensor

    def __init__(self, bandits: Sequence[Bandit]) -> None:
        super().__init__()
        peaks = max(len(bandit.centres) for bandit in bandits)
        centres = torch.zeros(len(bandits), peaks, bandits[0].action_size)
        heights = torch.zeros(len(bandits), peaks)  # a peak of height zero pads
        for row, bandit in enumerate(bandits):
            centres[row, : len(bandit.centres)] = torch.tensor(bandit.centres)
            heights[row, : len(bandit.centres)] = torch.tensor(bandit.heights)
        self.register_buffer("centres", centres)
        self.register_buffer("heights", heights)
        self.register_buffer("width", torch.tensor([bandit.width for bandit in bandits]))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Value ``[*B, 1]`` of ``action`` ``[*B, A]`` in the row that ``observation`` ``[*B, 1]`` names."""
        row = observation.squeeze(-1)
        distance = (action.unsqueeze(-2) - self.centres[row]).square().sum(-1)
        bumps = self.heights[row] * (-distance / self.width[row].square().unsqueeze(-1)).exp()
        return bumps.sum(-1, keepdim=True)


def train(
    combination: Combination,
    bandits: Sequence[Bandit],
    seeds: Sequence[int],
    setting: Setting,
    tick: Callable[[], object] = lambda: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Train one actor per bandit and seed, side by side.

    Args:
        combination: how.
        bandits: with the same number of experts and the same action size.
        seeds: of the initial parameters.
        setting: steps, batch and the like.
        tick: called after every step.

    Returns:
        ``logits`` ``[R, K]``, ``loc`` and ``scale`` ``[R, K, A]`` of the final policies; bandit by bandit, in each
        seed by seed.
    """
    torch.manual_seed(seeds[0])
    rows = [bandit for bandit in bandits for _ in seeds]
    size = bandits[0].action_size
    num_experts = 1 if combination.scoring == "none" else bandits[0].num_experts
    table = ParameterTable([seed for _ in bandits for seed in seeds], num_experts, size, setting.loc_spread)
    gradient_scored = combination.scoring == "gradient"
    actor = PMOEActor(
        num_experts,
        spec=Bounded(-1.0, 1.0, (size,)),
        network=table,
        distribution_kwargs={
            "routing": combination.routing if gradient_scored else "none",
            # the distribution divides by all states of the batch, and only those of one row are its own
            "routing_coef": float(len(rows)),
            "score": combination.score,
        },
    )
    critic = TensorDictModule(KnownValue(rows), in_keys=["observation", "action"], out_keys=["state_action_value"])
    options: dict[str, Any] = {
        "num_qvalue_nets": 1,
        "alpha_init": ALPHA,
        "fixed_alpha": True,
        "target_entropy": 0.0,
        "reduction": "none",
        "scalar_output_mode": "exclude",
        "delay_qvalue": False,
    }
    loss_module: SACLoss
    if combination.scoring == "critic":
        loss_module = PMOESACLoss(
            actor,
            critic,
            routing=combination.routing,
            backprop=combination.backprop,
            routing_loss=setting.routing_loss,
            **options,
        )
    else:
        loss_module = SACLoss(actor, critic, **options)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=setting.lr)
    states = TensorDict(
        observation=torch.arange(len(rows))[:, None, None].expand(-1, setting.batch, 1).contiguous(),
        batch_size=[len(rows), setting.batch],
    )
    for _ in range(setting.steps):
        loss, metadata = loss_module.actor_loss(states)
        loss = loss + metadata.get("loss_routing", 0.0)
        optimizer.zero_grad()
        loss.mean(-1).sum().backward()  # mean over a row's states, sum over rows: rows do not see each other
        optimizer.step()
        tick()
    with torch.no_grad():
        dist = actor.get_dist(TensorDict(observation=torch.arange(len(rows))[:, None], batch_size=[len(rows)]))
    return dist.logits, dist.loc, dist.scale


def outcomes(
    combination: object, bandits: Sequence[Bandit], seeds: Sequence[int], params: tuple[Tensor, Tensor, Tensor]
) -> list[Outcome]:
    """What the policies that :func:`train` returned achieve."""
    found = []
    for bandit, *chunk in zip(bandits, *(p.split(len(seeds)) for p in params), strict=True):
        best = solve(bandit)
        report = evaluate(bandit, *chunk)
        on_peak = report.peak_mass / best.peak_mass
        kept = (on_peak >= KEPT).sum(-1)
        distance = (report.basin_mass - best.basin_mass).abs().sum(-1)
        largest = chunk[0].softmax(-1).amax(-1)
        found += [
            Outcome(
                problem=bandit.name,
                combination=combination,
                seed=seed,
                objective=report.objective[i].item(),
                optimum=best.objective,
                share=report.objective[i].item() / best.objective,
                peaks_kept=int(kept[i]),
                peaks=len(bandit.centres),
                least_peak=on_peak[i].min().item(),
                mass_distance=distance[i].item(),
                largest_weight=largest[i].item(),
            )
            for i, seed in enumerate(seeds)
        ]
    return found


def sweep(
    combinations: Sequence[SomeCombination],
    bandits: Sequence[Bandit],
    steps: int,
    measure: Callable[[SomeCombination, Sequence[Bandit], Callable[[], object]], Iterable[SomeOutcome]],
) -> Iterator[SomeOutcome]:
    """Hand every combination, with the bandits of one shape at a time, to ``measure``; outcomes come as they are found.

    Args:
        combinations: ways to train.
        bandits: to train on.
        steps: how often ``measure`` calls its last argument, which moves the progress bar.
        measure: trains a combination on bandits of one shape and says what the policies achieve.
    """
    groups: dict[tuple[int, int], list[Bandit]] = defaultdict(list)
    for bandit in bandits:
        groups[bandit.num_experts, bandit.action_size].append(bandit)
    with tqdm(total=len(combinations) * len(groups) * steps, unit="step", mininterval=1.0) as bar:
        for combination in combinations:
            bar.set_description(str(combination))
            for group in groups.values():
                yield from measure(combination, group, bar.update)


def run(
    combinations: Sequence[Combination], bandits: Sequence[Bandit], seeds: Sequence[int], setting: Setting
) -> Iterator[Outcome]:
    """Train and measure every combination on every bandit; outcomes come as they are found."""

    def measure(combination: Combination, group: Sequence[Bandit], tick: Callable[[], object]) -> list[Outcome]:
        return outcomes(combination, group, seeds, train(combination, group, seeds, setting, tick))

    return sweep(combinations, bandits, setting.steps, measure)


def table(
    found: Sequence[Outcome], title: str = "router / backprop / score", extra: Mapping[str, str] | None = None
) -> str:
    """Markdown, one table a problem.

    Args:
        found: what to show.
        title: of the column that names the combinations.
        extra: titles of further columns, and the attribute of the outcomes whose mean each shows.
    """
    extra = extra or {}
    titles = "".join(f"| {name} " for name in extra)
    lines = []
    for problem in dict.fromkeys(outcome.problem for outcome in found):
        here = [outcome for outcome in found if outcome.problem == problem]
        seeds = len({outcome.seed for outcome in here})
        lines += [
            f"### {problem} (optimum {here[0].optimum:.3f}, {here[0].peaks} peaks, {seeds} seeds)",
            "",
            f"| {title} | share of the optimum: mean (min) | peaks kept | seeds keeping all "
            f"| distance to the closed-form mass | largest weight {titles}|",
            "|---" * (6 + len(extra)) + "|",
        ]
        for name in dict.fromkeys(o.combination for o in here):
            group = [o for o in here if o.combination == name]
            shares = [o.share for o in group]
            kept = sorted({o.peaks_kept for o in group})
            means = [mean(getattr(o, attribute) for o in group) for attribute in extra.values()]
            lines.append(
                f"| {name} | {mean(shares):.1%} ({min(shares):.1%}) "
                f"| {'-'.join(str(n) for n in dict.fromkeys((kept[0], kept[-1])))} "
                f"| {sum(o.peaks_kept == o.peaks for o in group)} of {len(group)} "
                f"| {mean(o.mass_distance for o in group):.2f} | {mean(o.largest_weight for o in group):.2f} "
                + "".join("| - " if isnan(value) else f"| {value:.2f} " for value in means)
                + "|"
            )
        lines.append("")
    return "\n".join(lines)


def _columns(kind: type[Outcome]) -> dict[str, type]:
    """Columns of a CSV of such outcomes and what they hold."""
    how = fields(kind.combination_type)
    columns = [c for field in fields(kind) for c in (how if field.name == "combination" else (field,))]
    return {column.name: {"int": int, "float": float}.get(str(column.type), str) for column in columns}


def recorded(found: Iterable[SomeOutcome], path: Path, kind: type[Outcome] = Outcome) -> Iterator[SomeOutcome]:
    """Hand outcomes through and write each, as it comes, to a row of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(_columns(kind)))
        writer.writeheader()
        for outcome in found:
            row = asdict(outcome)
            row |= row.pop("combination")
            writer.writerow({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()})
            file.flush()
            yield outcome


def read(path: Path, kind: type[SomeOutcome] = Outcome) -> list[SomeOutcome]:  # type: ignore[assignment]
    """What :func:`recorded` wrote.

    Raises:
        ValueError: if the columns of ``path`` are not those of ``kind``.
    """
    kinds = _columns(kind)
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or set(rows.fieldnames) != set(kinds):
            raise ValueError(f"its columns must be {', '.join(kinds)}")
        found = []
        for row in rows:
            values = {k: kinds[k](v) for k, v in row.items()}
            how = {field.name: values.pop(field.name) for field in fields(kind.combination_type)}
            found.append(kind(combination=kind.combination_type(**how), **values))
    return found


def add_arguments(
    parser: argparse.ArgumentParser, *, results: Path, fast: str, batch: int, lr: float, loc_spread: float
) -> None:
    """The options that every benchmark on bandits has, with their defaults."""
    parser.add_argument("--problems", nargs="+", choices=list(BANDITS), default=list(BANDITS))
    parser.add_argument("--only", default="", help="combinations whose name contains this")
    parser.add_argument("--seeds", type=int, default=6, help="number of seeds (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--loc-spread", type=float, default=loc_spread)
    parser.add_argument("--csv", type=Path, default=None, help=f"where rows go (default, unless --fast: {results})")
    parser.add_argument("--fast", action="store_true", help=fast)
    parser.add_argument("--show", type=Path, default=None, help="print the tables of this CSV and train nothing")


def shown(
    parser: argparse.ArgumentParser, path: Path, kind: type[SomeOutcome], view: Callable[[Sequence[SomeOutcome]], str]
) -> list[SomeOutcome]:
    """Print what ``--show`` asks for."""
    if not path.is_file():
        parser.error(f"--show={path}: there is no such file")
    try:
        found = read(path, kind)
    except ValueError as reason:
        parser.error(f"--show={path}: {reason}")
    print(view(found))
    return found


def chosen(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    combinations: Sequence[SomeCombination],
    fast: Sequence[SomeCombination],
) -> list[SomeCombination]:
    """The combinations that ``--fast`` and ``--only`` leave; ``--fast`` sets problems and seeds as well."""
    if args.csv is not None and args.csv.is_dir():
        parser.error(f"--csv={args.csv}: it is a folder")
    if args.fast:
        args.problems, args.seeds = ["two_equal"], 2
        return list(fast)
    found = [combination for combination in combinations if args.only in str(combination)]
    if not found:
        parser.error(f"--only={args.only!r} matches no combination")
    return found


def finish(
    stream: Iterable[SomeOutcome],
    path: Path | None,
    kind: type[SomeOutcome],
    view: Callable[[Sequence[SomeOutcome]], str],
) -> list[SomeOutcome]:
    """Run to the end, print the tables, and say where the rows are."""
    found = list(stream if path is None else recorded(stream, path, kind))
    print(view(found))
    if path is not None:
        print(f"Wrote {path}.")
    return found


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    """Parse the command line, run, print the tables, write the CSV."""
    default = Setting()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(
        parser,
        results=RESULTS,
        fast="paper and best combination, two equal peaks, 2 seeds",
        batch=default.batch,
        lr=default.lr,
        loc_spread=default.loc_spread,
    )
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--routing-loss", choices=("brier", "log"), default=default.routing_loss)
    args = parser.parse_args(argv)
    if args.show is not None:
        return shown(parser, args.show, Outcome, table)
    combinations = chosen(parser, args, COMBINATIONS, [PAPER, BEST])
    if args.fast:
        args.steps = min(args.steps, 1000)
    if min(args.seeds, args.steps, args.batch) < 1:
        parser.error("--seeds, --steps and --batch must be at least 1")
    setting = Setting(args.steps, args.batch, args.lr, args.loc_spread, args.routing_loss)
    stream = run(combinations, [BANDITS[name] for name in args.problems], range(args.seeds), setting)
    return finish(stream, args.csv or (None if args.fast else RESULTS), Outcome, table)


if __name__ == "__main__":
    main()
