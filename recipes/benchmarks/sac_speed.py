"""Training frames per second of SAC, end to end, against what people would pick instead.

Stable-Baselines3, SBX, a compiled loop in the style of CleanRL, and TorchRL's own parts in a plain loop:

    python recipes/benchmarks/sac_speed.py

One environment, one update of batch 256 a frame, networks of 2 x 256, no evaluation. Every variant is a process of its
own that is warm before its first turn; they take turns, and the figures are medians over the rounds. Keys of the recipe
may follow, for all of its variants:

    python recipes/benchmarks/sac_speed.py --env HalfCheetah-v4 compile.enabled=true
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import baselines3
import cleanrl_style
import sac_pmoe
import stock
import watched_runs
from baselines3 import SB3, SBX
from hydra.errors import HydraException
from parts.errors import UsageError
from parts.training import prepare_torch
from rounds import Claim, at_least_one, chosen, command_line, place, report, stop
from workers import Turns, measure, serve

from torchrl_pmoe.envs import EnvironmentFault, make_env
from torchrl_pmoe.envs.making import make_gym_env

PLAIN, STOCK = "CleanRL's style, compiled", "TorchRL's parts in a loop"
GAUSSIAN = "recipe, gaussian"
GRADIENT, CRITIC = "recipe, pmoe K=4, gradient-scored", "recipe, pmoe K=4, critic-scored max"
RECIPE = {
    GAUSSIAN: ["policy=gaussian"],
    GRADIENT: ["num_experts=4", "scoring=gradient"],
    CRITIC: ["num_experts=4", "scoring=critic", "routing=frequency", "backprop=max"],
}
CLAIMS = (
    Claim(f"{GAUSSIAN} over {SB3}", GAUSSIAN, SB3, 1.6),
    Claim(f"{GAUSSIAN} over {SBX}", GAUSSIAN, SBX, 1.0),
    Claim(f"{GRADIENT} over {SB3}", GRADIENT, SB3, 1.4),
    Claim(f"{CRITIC} over {SB3}", CRITIC, SB3, 1.15),
)
RANDOM_FRAMES = 200


def overrides(args: argparse.Namespace, options: Sequence[str]) -> list[str]:
    """Keys of the recipe for one variant."""
    return [
        f"env={args.env}",
        "device=cpu",
        f"optim.num_threads={args.threads}",
        f"collector.init_random_frames={RANDOM_FRAMES}",
        *options,
        *args.overrides,
    ]


def train(args: argparse.Namespace, turns: Turns) -> None:
    """The training that ``--worker`` names."""
    if args.worker in (SB3, SBX):
        baselines3.train_sac(args.env, RANDOM_FRAMES, turns, args.worker)
        return
    if args.worker == PLAIN:
        for frames in cleanrl_style.train_sac(make_gym_env(args.env), RANDOM_FRAMES):
            turns(frames)
        return
    cfg = watched_runs.resolve(sac_pmoe, overrides(args, RECIPE.get(args.worker, [])))
    if args.worker in RECIPE:
        watched_runs.run(sac_pmoe, cfg, turns)
        return
    prepare_torch(cfg.optim.num_threads)
    for frames in stock.train_sac(make_env(args.env, seed=cfg.seed), RANDOM_FRAMES):
        turns(frames)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, keep the raw figures."""
    parser = command_line(__doc__, "sac_speed.csv", rounds=11)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of recipes/sac_pmoe.py")
    parser.add_argument("--env", default="Walker2d-v4", help="Gymnasium id (Walker2d-v4)")
    parser.add_argument("--frames", type=at_least_one, default=150, help="of a turn (150)")
    parser.add_argument("--warm-up", type=at_least_one, default=300, help="frames before the first turn (300)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(arguments)
    if args.worker is not None:
        serve(args, train)
    try:
        watched_runs.resolve(sac_pmoe, overrides(args, []))
        make_gym_env(args.env).close()
    except (UsageError, EnvironmentFault, HydraException) as error:
        stop(error)
    found = measure(Path(__file__), chosen((SB3, SBX, PLAIN, STOCK, *RECIPE), args.only), arguments, args)
    print(place(args.threads, args.rounds))
    report(found, unit="frames/s", base=SB3, claims=CLAIMS, output=args.output)


if __name__ == "__main__":
    main()
