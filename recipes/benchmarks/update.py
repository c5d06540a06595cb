"""Cost of one update with a mixture policy, as a ratio to TorchRL's own TanhNormal actor.

    python recipes/benchmarks/update.py

One update is loss, backward, Adam step and target update on a batch of 256, networks of 2 x 256, 17 observations and
6 actions. The variants take turns, a block of updates each, so that a change in the machine's speed hits all of them;
the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import platform
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
from tqdm import tqdm

from torchrl_pmoe import PMOEActor, PMOESACLoss

Backprop = Literal["max", "all", "routed", "weighted"]
OBSERVATION, ACTION, BATCH, CELLS = 17, 6, 256, (256, 256)
RESULTS = Path(__file__).parents[1] / "results" / "update.csv"


def gaussian() -> ProbabilisticActor:
    """TorchRL's own actor."""
    mlp = MLP(in_features=OBSERVATION, out_features=2 * ACTION, num_cells=list(CELLS), activation_class=nn.ReLU)
    return ProbabilisticActor(
        TensorDictModule(nn.Sequential(mlp, NormalParamExtractor()), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=Bounded(-1, 1, (ACTION,)),
        distribution_class=TanhNormal,
    )


def pmoe(num_experts: int) -> PMOEActor:
    """A mixture actor of the same trunk."""
    return PMOEActor(num_experts, spec=Bounded(-1, 1, (ACTION,)), in_features=OBSERVATION, num_cells=CELLS)


def make_update(actor: ProbabilisticActor, backprop: Backprop | None, device: str) -> Callable[[], None]:
    """One update as a function; ``backprop=None`` takes TorchRL's unmodified ``SACLoss``."""
    critic = ValueOperator(
        MLP(in_features=OBSERVATION + ACTION, out_features=1, num_cells=list(CELLS), activation_class=nn.ReLU),
        in_keys=["observation", "action"],
    )
    kwargs: dict[str, Any] = {"loss_function": "l2"}
    if backprop is None:
        loss: SACLoss = SACLoss(actor, critic, **kwargs)
    else:
        routing = "soft_frequency" if backprop == "weighted" else "frequency"
        loss = PMOESACLoss(actor, critic, routing=routing, backprop=backprop, **kwargs)
    loss.make_value_estimator(gamma=0.99)
    loss.to(device)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4, fused=True)
    target = SoftUpdate(loss, eps=0.995)
    no = torch.zeros(BATCH, 1, dtype=torch.bool)
    batch = TensorDict(
        {
            "observation": torch.randn(BATCH, OBSERVATION),
            "action": torch.rand(BATCH, ACTION) * 2 - 1,
            "next": {
                "observation": torch.randn(BATCH, OBSERVATION),
                "reward": torch.randn(BATCH, 1),
                "done": no,
                "terminated": no,
            },
        },
        batch_size=BATCH,
        device=device,
    )

    def update() -> None:
        losses = loss(batch.copy())
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        optimizer.step()
        optimizer.zero_grad()
        target.step()

    return update


def measure(updates: dict[str, Callable[[], None]], rounds: int, block: int, device: str) -> dict[str, list[float]]:
    """Seconds an update, per variant and round."""

    def timed(update: Callable[[], None]) -> float:
        start = perf_counter()
        for _ in range(block):
            update()
        if device != "cpu":
            torch.cuda.synchronize()
        return (perf_counter() - start) / block

    for update in updates.values():
        timed(update)
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for _ in tqdm(range(rounds), unit="round"):
        for name, update in updates.items():
            seconds[name].append(timed(update))
    return seconds


def main() -> None:
    """Measure, print the table, keep the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=int, default=20, help="updates in a row per round and variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    # the target updater is stepped by hand, and TorchRL would check every distribution's parameters
    warnings.filterwarnings("ignore", message="No target network updater")
    torch.distributions.Distribution.set_default_validate_args(False)
    torch.set_num_threads(args.threads)

    variants: dict[str, tuple[Callable[[], ProbabilisticActor], Backprop | None]] = {
        "SACLoss, TanhNormal": (gaussian, None),
        "SACLoss, PMOEActor K=4 (gradient-scored)": (partial(pmoe, 4), None),
        "PMOESACLoss, K=4, frequency / max": (partial(pmoe, 4), "max"),
        "PMOESACLoss, K=4, frequency / routed": (partial(pmoe, 4), "routed"),
        "PMOESACLoss, K=4, frequency / all": (partial(pmoe, 4), "all"),
        "PMOESACLoss, K=4, soft frequency / weighted": (partial(pmoe, 4), "weighted"),
    }
    for k in (1, 2, 8, 16, 32):
        variants[f"SACLoss, PMOEActor K={k} (gradient-scored)"] = (partial(pmoe, k), None)
        variants[f"PMOESACLoss, K={k}, frequency / max"] = (partial(pmoe, k), "max")
    updates = {name: make_update(actor(), backprop, args.device) for name, (actor, backprop) in variants.items()}
    seconds = measure(updates, args.rounds, args.block, args.device)

    base = seconds["SACLoss, TanhNormal"]
    where = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine()
    print(f"{where}, {args.threads} threads, torch {torch.__version__}, medians of {args.rounds} rounds")
    print("| update | ms | ratio |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = median(value / reference for value, reference in zip(values, base, strict=True))
        print(f"| {name} | {1e3 * median(values):.2f} | {ratio:.2f} |")
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", *(f"ms_{i}" for i in range(args.rounds))])
        writer.writerows([name, *(f"{1e3 * value:.3f}" for value in values)] for name, values in seconds.items())


if __name__ == "__main__":
    main()
