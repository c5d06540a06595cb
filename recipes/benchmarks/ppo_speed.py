"""Training frames per second of PPO, end to end, against what people would pick instead.

Stable-Baselines3, SBX, a loop over EnvPool in the style of CleanRL, and TorchRL's own parts in a plain loop:

    python recipes/benchmarks/ppo_speed.py --num-envs 8 --backends serial envpool

Batches of 2,048 frames, 32 minibatches of 64, 10 epochs, tanh networks of 2 x 64, no evaluation. The recipe and the
loop in CleanRL's style normalise observations and rewards, the other three do not. A turn is a whole number of batches.
Every variant is a process of its own that is warm before its first turn; they take turns, and the figures are medians
over the rounds. A backend that the recipe refuses is left out, with the reason. Keys of the recipe may follow, for all
of its variants.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import baselines3
import cleanrl_style
import ppo_pmoe
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

PLAIN, STOCK = "CleanRL's style, EnvPool", "TorchRL's parts in a loop"
BACKENDS = ("serial", "threads", "parallel", "envpool", "mjx")
POLICIES = {
    "gaussian": ["policy=gaussian"],
    "pmoe": ["policy=pmoe"],
    "pmoe-frequency": ["scoring=frequency"],
    "pmoe-critic": ["scoring=critic"],
}
DEFAULT_POLICIES = ("gaussian", "pmoe")


def variant(policy: str, backend: str | None) -> str:
    """Name of one of the recipe's variants; ``None`` is the recipe's own choice of backend."""
    return f"recipe, {policy}" if backend is None else f"recipe, {policy}, {backend}"


def overrides(args: argparse.Namespace, options: Sequence[str], backend: str | None) -> list[str]:
    """Keys of the recipe for one variant."""
    return [
        f"env={args.env}",
        "device=cpu",
        f"optim.num_threads={args.threads}",
        f"collector.num_envs={args.num_envs}",
        *([] if backend is None else [f"collector.backend={backend}"]),
        *options,
        *args.overrides,
    ]


def recipe_variants(args: argparse.Namespace) -> dict[str, list[str]]:
    """The recipe's variants, by name, as keys of its config."""
    return {
        variant(policy, backend): overrides(args, POLICIES[policy], backend)
        for backend in args.backends or [None]
        for policy in args.policies
    }


def train(args: argparse.Namespace, turns: Turns) -> None:
    """The training that ``--worker`` names."""
    if args.worker in (SB3, SBX):
        baselines3.train_ppo(args.env, args.num_envs, turns, args.worker)
        return
    if args.worker == PLAIN:
        for frames in cleanrl_style.train_ppo(cleanrl_style.make_pool(args.env, args.num_envs, args.threads)):
            turns(frames)
        return
    if args.worker == STOCK:
        prepare_torch(watched_runs.resolve(ppo_pmoe, overrides(args, [], None)).optim.num_threads)
        env = make_env(args.env, num_envs=args.num_envs, clip_actions=True)
        for frames in stock.train_ppo(env):
            turns(frames)
        return
    watched_runs.run(ppo_pmoe, watched_runs.resolve(ppo_pmoe, recipe_variants(args)[args.worker]), turns)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, keep the raw figures."""
    parser = command_line(__doc__, "ppo_speed.csv", rounds=7)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of recipes/ppo_pmoe.py")
    parser.add_argument("--env", default="HalfCheetah-v4", help="Gymnasium id (HalfCheetah-v4)")
    parser.add_argument("--num-envs", type=at_least_one, default=1, help="of every variant (1)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="collector.backend (the recipe's choice)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=DEFAULT_POLICIES, help="(gaussian pmoe)")
    parser.add_argument("--frames", type=at_least_one, default=2048, help="of a turn, at least (2048)")
    parser.add_argument("--warm-up", type=at_least_one, default=2048, help="frames before the first turn (2048)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(arguments)
    if args.worker is not None:
        serve(args, train)
    recipe = recipe_variants(args)
    try:
        watched_runs.resolve(ppo_pmoe, overrides(args, [], None))
        make_gym_env(args.env).close()
    except (UsageError, EnvironmentFault, HydraException) as error:
        stop(error)
    found = measure(Path(__file__), chosen((SB3, SBX, PLAIN, STOCK, *recipe), args.only), arguments, args)
    print(f"{args.env}, {args.num_envs} environment(s); {place(args.threads, args.rounds)}")
    claims = [Claim(f"{name} over {SB3}", name, SB3, 1.0) for name in recipe]
    report(found, unit="frames/s", base=SB3, claims=claims, output=args.output)


if __name__ == "__main__":
    main()
