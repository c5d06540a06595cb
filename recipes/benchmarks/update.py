"""Cost of one SAC update, with TorchRL's own TanhNormal actor as the measure.

    python recipes/benchmarks/update.py

One update is loss, backward, Adam step and target update on a batch of 256, networks of 2 x 256, 17 observations and
6 actions. Beside the recipe's policies stand TorchRL's unmodified parts and a hand-written update in PyTorch alone,
each as written and under ``torch.compile``. The variants take turns, a block of updates each; medians over the rounds.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import Bounded
from torchrl.objectives import LossModule, SoftUpdate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import raw_sac
import sac_pmoe
import stock
import watched_runs
from hydra.errors import HydraException
from parts.errors import UsageError
from parts.training import build_optimizer, prepare_torch
from rounds import Claim, alternate, at_least_one, chosen, command_line, place, report, stop

from torchrl_pmoe.trainers import FusedOptimizationStepper

OBSERVATION, ACTION, BATCH = 17, 6, 256
BASE, GAUSSIAN, RAW = "TorchRL SACLoss + TanhNormal", "recipe, gaussian", "PyTorch alone"
MODES = ("eager", "compiled")
BACKPROPS = {
    "max": "routing=frequency",
    "routed": "routing=frequency",
    "all": "routing=frequency",
    "weighted": "routing=soft_frequency",
}
Update = Callable[[], object]


def gradient_scored(num_experts: int) -> str:
    """Name of the recipe's ``SACLoss`` + ``PMOEActor``."""
    return f"SACLoss + PMOEActor, K={num_experts}"


def critic_scored(num_experts: int, backprop: str) -> str:
    """Name of the recipe's ``PMOESACLoss``."""
    return f"PMOESACLoss, K={num_experts}, {backprop}"


def recipe_options(experts: Sequence[int]) -> dict[str, list[str]]:
    """The recipe's variants, by name, as keys of its config."""
    options = {GAUSSIAN: ["policy=gaussian"]}
    for k in experts:
        options[gradient_scored(k)] = [f"num_experts={k}", "scoring=gradient"]
        for backprop, routing in BACKPROPS.items():
            if k == 4 or backprop == "max":
                options[critic_scored(k, backprop)] = [f"num_experts={k}", f"backprop={backprop}", routing]
    return options


def make_batch(device: str) -> TensorDict:
    """Random transitions of the recipe's form."""
    none = torch.zeros(BATCH, 1, dtype=torch.bool)
    following = {"observation": torch.randn(BATCH, OBSERVATION), "reward": torch.randn(BATCH, 1)}
    return TensorDict(
        {
            "observation": torch.randn(BATCH, OBSERVATION),
            "action": torch.rand(BATCH, ACTION) * 2 - 1,
            "next": {**following, "done": none, "terminated": none.clone()},
        },
        batch_size=BATCH,
        device=device,
    )


def stock_update(device: str, compiled: bool) -> stock.Update:
    """TorchRL's own components."""
    _, loss = stock.sac_loss(Bounded(-1, 1, (ACTION,)), OBSERVATION, device=device)
    update = stock.off_policy_update(loss, stock.adam(loss), SoftUpdate(loss, eps=0.995))
    return torch.compile(update) if compiled else update


def recipe_update(overrides: Sequence[str], device: str, compiled: bool) -> stock.Update:
    """The recipe's own parts, made by its own builders."""
    cfg = watched_runs.resolve(sac_pmoe, [f"device={device}", *overrides])
    spec = Bounded(-1, 1, (ACTION,))
    _, loss = sac_pmoe.build_agent(cfg, spec, OBSERVATION)
    loss = loss.to(device)
    optimizer = build_optimizer(loss, lr=cfg.optim.lr, eps=cfg.optim.adam_eps)
    target = SoftUpdate(loss, eps=cfg.optim.target_update_polyak)
    stepper = FusedOptimizationStepper(target, compile=compiled, cudagraphs=cfg.compile.cudagraphs)
    trainer = stand_in(loss, optimizer)
    return lambda batch: stepper.step(trainer, batch)


def stand_in(loss: LossModule, optimizer: torch.optim.Optimizer) -> Any:
    """What a stepper asks of a ``Trainer``, without hooks, collector or gradient clipping."""
    return SimpleNamespace(
        loss_module=loss,
        compute_loss=loss,
        optimizer=optimizer,
        clip_norm=None,
        _process_loss_ops=[],
        _post_loss_ops=[],
        _process_loss_hook=lambda batch, losses: losses,
    )


def raw_batch(batch: TensorDict) -> raw_sac.Batch:
    """The same transitions for the hand-written update."""
    following = batch["next"]
    return raw_sac.Batch(
        batch["observation"],
        batch["action"],
        following["reward"].squeeze(-1),
        following["observation"],
        following["terminated"].squeeze(-1).to(torch.float32),
    )


def make_updates(experts: Sequence[int], device: str) -> dict[str, Callable[[], Update]]:
    """Names, and what builds an update without arguments."""
    batch = make_batch(device)
    plain = raw_batch(batch)

    def on_copies(make: Callable[[], stock.Update]) -> Update:
        update = make()
        # the loss writes priorities into what it is given
        return lambda: update(batch.copy())

    def raw(compiled: bool) -> Update:
        update = raw_sac.RawSAC(OBSERVATION, ACTION, device=device).update
        return partial(torch.compile(update) if compiled else update, plain)

    updates: dict[str, Callable[[], Update]] = {}
    for mode in MODES:
        compiled = mode == "compiled"
        updates[f"{BASE} ({mode})"] = partial(on_copies, partial(stock_update, device, compiled))
        updates[f"{RAW} ({mode})"] = partial(raw, compiled)
        for name, overrides in recipe_options(experts).items():
            updates[f"{name} ({mode})"] = partial(on_copies, partial(recipe_update, overrides, device, compiled))
    return updates


def timed(update: Update, block: int, device: str) -> float:
    """Milliseconds an update, over ``block`` in a row."""
    start = perf_counter()
    for _ in range(block):
        update()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (perf_counter() - start) / block


def claims(mode: str) -> list[Claim]:
    """What is asked of the costs."""
    four, one, many = (f"{gradient_scored(k)} ({mode})" for k in (4, 1, 32))
    best, gaussian, stock_eager = f"{critic_scored(4, 'max')} ({mode})", f"{GAUSSIAN} ({mode})", f"{BASE} (eager)"
    return [
        Claim(f"rate of {four} over {stock_eager}", stock_eager, four, 1.3),
        Claim(f"rate of {one} over {stock_eager}", stock_eager, one, 1.3),
        Claim(f"cost of {best} over {gaussian}", best, gaussian, 1.5, at_least=False),
        Claim(f"cost of {many} over {one}", many, one, 1.5, at_least=False),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, keep the raw figures."""
    parser = command_line(__doc__, "update.csv", rounds=9)
    parser.add_argument("--block", type=at_least_one, default=20, help="updates in a row, a round and variant (20)")
    parser.add_argument("--experts", type=at_least_one, nargs="+", default=[1, 4, 32], help="K (1 4 32)")
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES), help="(eager compiled)")
    parser.add_argument("--compile-all", action="store_true", help="those that no claim is made for, too")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    # the target updater is stepped by hand
    warnings.filterwarnings("ignore", message="No target network updater")
    # tensordict and the compiler, about what neither of them can change
    warnings.filterwarnings("ignore", module="torch._dynamo|tensordict|torch._inductor")
    try:
        prepare_torch(watched_runs.resolve(sac_pmoe, [f"device={args.device}"]).optim.num_threads)
    except (UsageError, HydraException) as error:
        stop(error)
    torch.set_num_threads(args.threads)
    builders = make_updates(args.experts, args.device)
    names = [name for name in builders if any(mode in name for mode in args.modes)]
    if not args.compile_all:
        slow = tuple(f"{backprop} (compiled)" for backprop in ("routed", "all", "weighted"))
        slow += tuple(f"{critic_scored(k, 'max')} (compiled)" for k in args.experts if k != 4)
        names = [name for name in names if not name.endswith(slow)]
    updates: dict[str, Update] = {}
    with tqdm(chosen(names, args.only), desc="warming up and compiling", unit="variant") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            updates[name] = builders[name]()
            timed(updates[name], max(3, args.block), args.device)
    found = alternate(
        {name: partial(timed, update, args.block, args.device) for name, update in updates.items()}, args.rounds
    )
    print(place(args.threads, args.rounds, args.device))
    report(
        found,
        unit="ms",
        base=next((name for name in updates if name.startswith(BASE)), next(iter(updates))),
        claims=[claim for mode in args.modes for claim in claims(mode)],
        output=args.output,
    )


if __name__ == "__main__":
    main()
