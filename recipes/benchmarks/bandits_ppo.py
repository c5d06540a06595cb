"""Every scoring of PPO on bandits whose best policy is known: the actions are drawn on-policy, the values learned.

    python recipes/benchmarks/bandits_ppo.py                  # the whole table
    python recipes/benchmarks/bandits_ppo.py --fast           # two scorings, one problem, a few seconds
    python recipes/benchmarks/bandits_ppo.py --problems two_equal --only critic
    python recipes/benchmarks/bandits_ppo.py --show recipes/results/bandits_ppo.csv

What is trained is what a user trains: a :class:`PMOEActor` by TorchRL's own ``ClipPPOLoss`` (*gaussian*, one expert;
*responsibility*, ``log_prob_routing="exact"``; *frequency*, ``log_prob_routing="frequency"``), or by
``PMOEClipPPOLoss`` (*critic*), whose Q-network learns from the rewards of the drawn actions, or is the bandit's known
value to tell its error from the method's. Every iteration draws actions from the policy; the reward is their value,
the baseline its mean, and the entropy counts ``alpha``: the soft objective that ``bandits.py`` maximises off-policy.
Actors and Q-networks are rows of tables that train side by side without touching each other, as there.

What is reported is described there as well. *Rank correlation* is Spearman's, between the Q-network and the known
value over fresh proposals of all experts: at the end, and as mean over the iterations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from bandits import KnownValue, ParameterTable
from known_optimum import ALPHA, BANDITS, Bandit
from outcomes import Outcome, add_arguments, chosen, finish, outcomes, shown, sweep, table
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.objectives import ClipPPOLoss

from torchrl_pmoe import PMOEActor, PMOEClipPPOLoss

RESULTS = Path(__file__).parents[1] / "results" / "bandits_ppo.csv"
PROPOSALS = 64
"""Of each expert, for one rank correlation."""


@dataclass(frozen=True)
class Method:
    """One way to train a mixture on-policy."""

    scoring: Literal["gaussian", "responsibility", "frequency", "critic"]
    routing: str = "none"
    qvalue: Literal["none", "learned", "known"] = "none"

    def __str__(self) -> str:
        return f"critic / {self.routing} / {self.qvalue} Q" if self.scoring == "critic" else self.scoring


METHODS = (
    Method("gaussian"),
    Method("responsibility"),
    Method("frequency"),
    *(Method("critic", routing, "learned") for routing in ("frequency", "soft_frequency", "marginal", "none")),
    *(Method("critic", routing, "known") for routing in ("frequency", "soft_frequency", "marginal")),
)
FAST = (METHODS[1], METHODS[4])


@dataclass(frozen=True)
class Setting:
    """What all methods have in common.

    Args:
        iterations: each draws fresh actions.
        batch: actions of every policy an iteration.
        epochs: passes over them.
        minibatch: actions of every policy a step of Adam.
        lr: of Adam, for actor and Q-network.
        clip: of the ratio.
        routing_coef: of the critic-scored routing loss.
        cells: of each of the Q-network's two hidden layers.
        loc_spread: locs start uniform in ``[-loc_spread, loc_spread]`` before the tanh.
    """

    iterations: int = 250
    batch: int = 256
    epochs: int = 4
    minibatch: int = 64
    lr: float = 1e-2
    clip: float = 0.2
    routing_coef: float = 1.0
    cells: int = 64
    loc_spread: float = 1.0


@dataclass(frozen=True)
class OnPolicyOutcome(Outcome):
    """One policy trained on-policy."""

    combination_type = Method

    combination: Method
    rank_correlation: float = nan
    mean_rank_correlation: float = nan


class RowLinear(nn.Module):
    """A linear layer per row, initialised as ``nn.Linear`` by the row's generator."""

    def __init__(self, generators: Iterable[torch.Generator], in_features: int, out_features: int) -> None:
        super().__init__()
        limit = in_features**-0.5
        shape = (in_features + 1, out_features)  # the bias comes last
        rows = [torch.empty(shape).uniform_(-limit, limit, generator=generator) for generator in generators]
        self.weight = nn.Parameter(torch.stack(rows))

    def forward(self, x: Tensor) -> Tensor:
        """``[*L, R, N, in_features]`` to ``[*L, R, N, out_features]``."""
        return x @ self.weight[:, :-1] + self.weight[:, -1:]


class LearnedValue(nn.Module):
    """A Q-network per row: two hidden layers over the action, the same for a seed whatever is trained."""

    def __init__(self, seeds: Iterable[int], action_size: int, cells: int) -> None:
        super().__init__()
        rows = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.layers = nn.Sequential(
            RowLinear(rows, action_size, cells),
            nn.ReLU(),
            RowLinear(rows, cells, cells),
            nn.ReLU(),
            RowLinear(rows, cells, 1),
        )

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Value ``[*L, R, N, 1]`` of ``action`` ``[*L, R, N, A]``: what comes before the rows are experts and draws."""
        return self.layers(action)


class Learner(NamedTuple):
    """Policies of several rows, the loss that trains them, and the bandits they act in."""

    actor: PMOEActor
    loss_module: ClipPPOLoss
    bandits: KnownValue

    def states(self, batch: int) -> TensorDict:
        """Every row ``batch`` times, ``[R, batch]``."""
        rows = len(self.bandits.width)
        observation = torch.arange(rows)[:, None, None].expand(rows, batch, 1).contiguous()
        return TensorDict(observation=observation, batch_size=[rows, batch])

    @torch.no_grad()
    def act(self, batch: int) -> TensorDictBase:
        """Draw actions with their rewards; the advantage is over the mean reward of the row."""
        found = self.actor(self.states(batch)).select("observation", "action", "action_log_prob")
        reward = self.bandits(found["observation"], found["action"])
        return found.update({"value_target": reward, "advantage": reward - reward.mean(1, keepdim=True)})

    def loss(self, batch: TensorDictBase) -> Tensor:
        """Of every row, ``[R]``: all that the loss module asks to be summed, mean over the row's actions."""
        losses = self.loss_module(batch)
        return torch.stack([value for key, value in losses.items() if key.startswith("loss_")]).sum(0).mean(-1)

    @torch.no_grad()
    def rank_correlation(self) -> Tensor:
        """Spearman's, between Q-network and known value over fresh proposals of all experts, ``[R]``."""
        if not isinstance(self.loss_module, PMOEClipPPOLoss):
            return self.bandits.width.new_full(self.bandits.width.shape, nan)
        states = self.states(PROPOSALS)
        action, _ = self.actor.get_dist(states).rsample_experts()
        learned = self.loss_module.score_proposals(states, action)
        known = self.bandits(states["observation"].unsqueeze(-2).expand(*action.shape[:-1], 1), action).squeeze(-1)
        return spearman(learned.flatten(1), known.flatten(1))


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension of ``[*B, N]``, ``[*B]``; equal values rank as they come."""
    ranks = torch.stack((x, y)).argsort(dim=-1, stable=True).argsort(-1).double()
    ranks = ranks - ranks.mean(-1, keepdim=True)
    return (ranks[0] * ranks[1]).sum(-1) / ranks[0].square().sum(-1)


def build(method: Method, bandits: Sequence[Bandit], seeds: Sequence[int], setting: Setting) -> Learner:
    """Untrained policies of one method, one per bandit and seed, and their loss.

    Args:
        method: how they are to be trained.
        bandits: with the same number of experts and the same action size.
        seeds: of the initial parameters.
        setting: of all methods.
    """
    rows = [bandit for bandit in bandits for _ in seeds]
    row_seeds = [seed for _ in bandits for seed in seeds]
    size = bandits[0].action_size
    num_experts = 1 if method.scoring == "gaussian" else bandits[0].num_experts
    actor = PMOEActor(
        num_experts,
        spec=Bounded(-1.0, 1.0, (size,)),
        network=ParameterTable(row_seeds, num_experts, size, setting.loc_spread),
        distribution_kwargs={"log_prob_routing": "frequency" if method.scoring == "frequency" else "exact"},
        return_log_prob=True,
    )
    known = KnownValue(rows)
    options: dict[str, Any] = {
        "clip_epsilon": setting.clip,
        "entropy_coeff": ALPHA,
        "normalize_advantage": False,
        "loss_critic_type": "l2",
        "reduction": "none",
    }
    if method.scoring != "critic":
        return Learner(actor, ClipPPOLoss(actor, None, **options), known)
    network = known if method.qvalue == "known" else LearnedValue(row_seeds, size, setting.cells)
    qvalue = TensorDictModule(network, in_keys=["observation", "action"], out_keys=["state_action_value"])
    loss_module = PMOEClipPPOLoss(
        actor, None, qvalue, routing=method.routing, routing_coef=setting.routing_coef, **options
    )
    return Learner(actor, loss_module, known)


def train(
    method: Method,
    bandits: Sequence[Bandit],
    seeds: Sequence[int],
    setting: Setting,
    tick: Callable[[], object] = lambda: None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Train one actor per bandit and seed, side by side.

    Args:
        method: how.
        bandits: with the same number of experts and the same action size.
        seeds: of the initial parameters.
        setting: of all methods.
        tick: called after every iteration.

    Returns:
        ``logits`` ``[R, K]``, ``loc`` and ``scale`` ``[R, K, A]`` of the final policies, bandit by bandit, in each
        seed by seed; and the Q-networks' rank correlations at the end and as mean over the iterations, ``[R, 2]``.
    """
    torch.manual_seed(seeds[0])
    learner = build(method, bandits, seeds, setting)
    optimizer = torch.optim.Adam(learner.loss_module.parameters(), lr=setting.lr)
    correlations = []
    for _ in range(setting.iterations):
        batch = learner.act(setting.batch)
        for _ in range(setting.epochs):
            for index in torch.randperm(setting.batch).split(setting.minibatch):
                optimizer.zero_grad()
                learner.loss(batch[:, index]).sum().backward()  # sum over rows: rows do not see each other
                optimizer.step()
        correlations.append(learner.rank_correlation())
        tick()
    with torch.no_grad():
        dist = learner.actor.get_dist(learner.states(1).squeeze(1))
    return (dist.logits, dist.loc, dist.scale), torch.stack((correlations[-1], torch.stack(correlations).mean(0)), -1)


def measure(
    seeds: Sequence[int],
    setting: Setting,
    method: Method,
    bandits: Sequence[Bandit],
    tick: Callable[[], object] = lambda: None,
) -> list[OnPolicyOutcome]:
    """Train a method on bandits of one shape and say what its policies achieve."""
    params, correlations = train(method, bandits, seeds, setting, tick)
    found = outcomes(method, bandits, seeds, params)
    return [
        OnPolicyOutcome(**vars(o), rank_correlation=last, mean_rank_correlation=average)
        for o, (last, average) in zip(found, correlations.tolist(), strict=True)
    ]


def run(
    methods: Sequence[Method], bandits: Sequence[Bandit], seeds: Sequence[int], setting: Setting
) -> Iterator[OnPolicyOutcome]:
    """Train and measure every method on every bandit; outcomes come as they are found."""
    return sweep(methods, bandits, setting.iterations, partial(measure, seeds, setting))


def view(found: Sequence[OnPolicyOutcome]) -> str:
    """Markdown, one table a problem."""
    extra = {"rank correlation of Q": "rank_correlation", "mean over training": "mean_rank_correlation"}
    return table(found, "scoring", extra)


def main(argv: Sequence[str] | None = None) -> list[OnPolicyOutcome]:
    """Parse the command line, run, print the tables, write the CSV."""
    default = Setting()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fast = "responsibility and critic / soft_frequency / learned Q, two equal peaks, 2 seeds"
    add_arguments(parser, results=RESULTS, fast=fast, batch=default.batch, lr=default.lr, loc_spread=default.loc_spread)
    parser.add_argument("--iterations", type=int, default=default.iterations, help="each draws --batch actions")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="passes over the actions of an iteration")
    parser.add_argument("--minibatch", type=int, default=default.minibatch)
    parser.add_argument("--routing-coef", type=float, default=default.routing_coef)
    args = parser.parse_args(argv)
    if args.show is not None:
        return shown(parser, args.show, OnPolicyOutcome, view)
    methods = chosen(parser, args, METHODS, FAST)
    if args.fast:
        args.iterations = min(args.iterations, 40)
    if min(args.seeds, args.iterations, args.batch, args.epochs, args.minibatch) < 1:
        parser.error("--seeds, --iterations, --batch, --epochs and --minibatch must be at least 1")
    if args.batch % args.minibatch:
        parser.error(f"--minibatch={args.minibatch} must divide --batch={args.batch}")
    if not (0.0 < args.lr < inf and 0.0 <= args.routing_coef < inf and 0.0 <= args.loc_spread < inf):
        parser.error("--lr must be positive, --routing-coef and --loc-spread not negative, and all finite")
    setting = Setting(
        iterations=args.iterations,
        batch=args.batch,
        epochs=args.epochs,
        minibatch=args.minibatch,
        lr=args.lr,
        routing_coef=args.routing_coef,
        loc_spread=args.loc_spread,
    )
    stream = run(methods, [BANDITS[name] for name in args.problems], range(args.seeds), setting)
    return finish(stream, args.csv or (None if args.fast else RESULTS), OnPolicyOutcome, view)


if __name__ == "__main__":
    main()
