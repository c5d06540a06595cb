"""What several seeds at once cost: one update of S stacked agents over one update of one agent.

    python recipes/benchmarks/many_seeds.py

An update is loss, backward, Adam and target update of the SAC recipe on a batch of 256 for every agent, 17 observations
and 6 actions. Ratios are to one agent in the same mode: a ratio of S is what S processes after one another would take.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.objectives import SoftUpdate

sys.path.insert(0, str(Path(__file__).parents[1]))

import sac_pmoe
import update
import watched_runs
from hydra.errors import HydraException
from parts.errors import UsageError
from parts.training import build_optimizer, prepare_torch
from rounds import Claim, alternate, at_least_one, command_line, place, report, stop
from tqdm import tqdm

from torchrl_pmoe.objectives import StackedLoss
from torchrl_pmoe.trainers import FusedOptimizationStepper


def stacked_update(overrides: Sequence[str], seeds: int, device: str, compiled: bool) -> update.Update:
    """One update of ``seeds`` agents, the recipe's own parts."""
    cfg = watched_runs.resolve(sac_pmoe, [f"device={device}", *overrides])
    spec = Bounded(-1, 1, (update.ACTION,))
    losses = [sac_pmoe.build_agent(cfg, spec, update.OBSERVATION)[1].to(device) for _ in range(seeds)]
    loss = losses[0] if seeds == 1 else StackedLoss(losses)
    target = SoftUpdate(loss, eps=cfg.optim.target_update_polyak)
    shape = () if seeds == 1 else (seeds,)
    stepper = FusedOptimizationStepper(target, compile=compiled, cudagraphs=cfg.compile.cudagraphs, shape=shape)
    trainer = update.stand_in(loss, build_optimizer(loss, lr=cfg.optim.lr, eps=cfg.optim.adam_eps))
    batches = [update.make_batch(device) for _ in range(seeds)]
    batch = batches[0] if seeds == 1 else TensorDict.stack(batches)
    return lambda: stepper.step(trainer, batch.copy())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, keep the raw figures."""
    parser = command_line(__doc__, "many_seeds.csv", rounds=7, variants=False)
    parser.add_argument("--block", type=at_least_one, default=10, help="updates in a row, a round and variant (10)")
    parser.add_argument("--seeds", type=at_least_one, nargs="+", default=[1, 2, 4, 8], help="S (1 2 4 8)")
    parser.add_argument("--modes", choices=update.MODES, nargs="+", default=list(update.MODES), help="(eager compiled)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*", help="keys of recipes/sac_pmoe.py, num_experts=4 for one")
    args = parser.parse_args(arguments)
    # tensordict and the compiler, about what neither of them can change
    warnings.filterwarnings("ignore", module="torch._dynamo|tensordict|torch._inductor")
    try:
        prepare_torch(watched_runs.resolve(sac_pmoe, [f"device={args.device}", *args.overrides]).optim.num_threads)
    except (UsageError, HydraException) as error:
        stop(error)
    torch.set_num_threads(args.threads)
    updates = {}
    with tqdm(total=len(args.modes) * len(args.seeds), desc="warming up and compiling", unit="variant") as bar:
        for mode in args.modes:
            for seeds in args.seeds:
                made = stacked_update(args.overrides, seeds, args.device, mode == "compiled")
                update.timed(made, 3, args.device)
                updates[f"{seeds} at once ({mode})"] = made
                bar.update()
    found = alternate(
        {name: partial(update.timed, made, args.block, args.device) for name, made in updates.items()}, args.rounds
    )
    print(place(args.threads, args.rounds, args.device))
    many, one = f"{max(args.seeds)} at once", "1 at once"
    claims = [
        Claim(f"cost of {many} over one ({mode})", f"{many} ({mode})", f"{one} ({mode})", 2.0, at_least=False)
        for mode in args.modes
        # asked of a GPU, where one agent leaves most of it idle; a CPU has no room to spare
        if 1 in args.seeds and args.device != "cpu"
    ]
    report(found, unit="ms", base=next(iter(updates)), claims=claims, output=args.output)


if __name__ == "__main__":
    main()
