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
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from known_optimum import BANDITS, SAC_OPTIONS, Bandit
from outcomes import Outcome, add_arguments, chosen, finish, outcomes, shown, sweep, table
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.objectives import SACLoss

from torchrl_pmoe import PMOEActor, PMOESACLoss

RESULTS = Path(__file__).parents[1] / "results" / "bandits.csv"

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
class OffPolicyOutcome(Outcome):
    """One policy trained with critics."""

    combination_type = Combination

    combination: Combination


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
    options: dict[str, Any] = {"num_qvalue_nets": 1, **SAC_OPTIONS}
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


def run(
    combinations: Sequence[Combination], bandits: Sequence[Bandit], seeds: Sequence[int], setting: Setting
) -> Iterator[Outcome]:
    """Train and measure every combination on every bandit; outcomes come as they are found."""

    def measure(combination: Combination, group: Sequence[Bandit], tick: Callable[[], object]) -> list[Outcome]:
        return outcomes(combination, group, seeds, train(combination, group, seeds, setting, tick))

    return sweep(combinations, bandits, setting.steps, measure)


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
        return shown(parser, args.show, OffPolicyOutcome, table)
    combinations = chosen(parser, args, COMBINATIONS, [PAPER, BEST])
    if args.fast:
        args.steps = min(args.steps, 1000)
    if min(args.seeds, args.steps, args.batch) < 1:
        parser.error("--seeds, --steps and --batch must be at least 1")
    setting = Setting(args.steps, args.batch, args.lr, args.loc_spread, args.routing_loss)
    stream = run(combinations, [BANDITS[name] for name in args.problems], range(args.seeds), setting)
    return finish(stream, args.csv or (None if args.fast else RESULTS), OffPolicyOutcome, table)


if __name__ == "__main__":
    main()
