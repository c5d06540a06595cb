"""Where the time of a training frame goes in the SAC recipe.

    python recipes/benchmarks/profile_frame.py

Whole runs of ``recipes/sac_pmoe.py`` (one environment, one update a frame, no evaluation) with a clock put around its
parts from outside. A part's time is its own: what it calls that is a part too is not in it, so that the parts add up
to the frame. Figures are milliseconds a frame, after a warm-up. Keys of the recipe may follow, as for the recipe:

    python recipes/benchmarks/profile_frame.py env=HalfCheetah-v4 compile.enabled=true
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import sac_pmoe
import watched_runs
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rounds import alternate, at_least_one, command_line, place, print_table, stop, write_csv
from torchrl.envs import EnvBase
from torchrl.envs.libs.gym import GymWrapper
from torchrl.trainers import Trainer

from torchrl_pmoe.trainers import FiniteBatch, FiniteLoss, MeanLossStepper, PeriodicEvaluation, ProgressBar

VARIANTS = {
    "gaussian": ["policy=gaussian"],
    "gradient-scored, K=4": ["num_experts=4", "scoring=gradient"],
    "critic-scored, K=4, max": ["num_experts=4", "scoring=critic"],
}
PARTS = (
    "simulator",
    "environment's wrappers",
    "policy",
    "collector",
    "buffer, extend",
    "buffer, sample",
    "loss, actor and router",
    "loss, critics and target",
    "loss, rest",
    "backward",
    "optimiser",
    "target update",
    "stepper, rest",
    "finite checks and running means",
    "evaluation hook and progress bar",
    "trainer, rest",
)
REST = PARTS[-1]


class Clock:
    """Seconds spent in each part, without those in the parts that it calls.

    Use as a context manager; on leaving it gives the classes that it has wrapped their own methods back.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._counting = False
        self._running = [REST]
        self._last = 0.0
        self._undo = ExitStack()

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def start(self) -> None:
        """Forget what was measured so far."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._counting = True
        self._last = perf_counter()

    def stop(self) -> None:
        """Count the time up to now, and no more."""
        self._turn()
        self._counting = False

    def _turn(self) -> None:
        now = perf_counter()
        if self._counting:
            self.seconds[self._running[-1]] += now - self._last
        self._last = now

    def wrap(self, owner: Any, attribute: str, part: str) -> None:
        """Count the calls of ``owner.attribute`` (an object's or a class's) as ``part``."""
        inner = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._running.append(part)
            try:
                return inner(*args, **kwargs)
            finally:
                self._turn()
                self._running.pop()

        setattr(owner, attribute, timed)
        if isinstance(owner, type):
            self._undo.callback(setattr, owner, attribute, inner)


def simulators(env: EnvBase) -> list[Any]:
    """The Gymnasium environments behind an environment of this process."""
    inner = getattr(env, "base_env", env)
    if isinstance(inner, GymWrapper):
        return [inner._env]
    return [gym for one in getattr(inner, "_envs", None) or [] for gym in simulators(one)]


def instrument(clock: Clock, trainer: Trainer, *, inside_update: bool) -> None:
    """Put the clock around the parts of a training.

    Args:
        clock: of the run.
        trainer: with its hooks.
        inside_update: look into the update too; a compiled one is a single part ("stepper, rest").
    """
    collector, loss, optimizer = trainer.collector, trainer.loss_module, trainer.optimizer
    for simulator in simulators(collector.env):
        clock.wrap(simulator, "step", "simulator")
        clock.wrap(simulator, "reset", "simulator")
    clock.wrap(collector.env, "step_and_maybe_reset", "environment's wrappers")
    clock.wrap(collector, "_wrapped_policy", "policy")
    clock.wrap(collector, "rollout", "collector")
    clock.wrap(trainer.replay_buffer, "extend", "buffer, extend")
    clock.wrap(trainer.replay_buffer, "sample", "buffer, sample")
    clock.wrap(trainer.optimization_stepper, "step", "stepper, rest")
    clock.wrap(MeanLossStepper, "_accumulate", "finite checks and running means")
    for check in (FiniteBatch, FiniteLoss):
        clock.wrap(check, "__call__", "finite checks and running means")
    for shown in (PeriodicEvaluation, ProgressBar):
        clock.wrap(shown, "__call__", "evaluation hook and progress bar")
    clock.wrap(trainer.target_net_updater, "step", "target update")
    if not inside_update:
        return
    clock.wrap(loss, "forward", "loss, rest")
    clock.wrap(loss, "actor_loss", "loss, actor and router")
    clock.wrap(loss, "qvalue_v2_loss", "loss, critics and target")
    clock.wrap(torch.Tensor, "backward", "backward")
    clock.wrap(optimizer, "step", "optimiser")
    clock.wrap(optimizer, "zero_grad", "optimiser")


def profile(cfg: DictConfig, warm_up: int, frames: int) -> dict[str, float]:
    """Milliseconds a frame by part, of one run of the recipe."""
    compiled = bool(OmegaConf.select(cfg, "compile.enabled"))
    with Clock() as clock:

        def after_batch(collected: int) -> None:
            if collected >= warm_up + frames:
                clock.stop()
                raise watched_runs.Finished
            if collected >= warm_up and not clock.seconds:
                clock.start()

        watched_runs.run(sac_pmoe, cfg, after_batch, partial(instrument, clock, inside_update=not compiled))
        return {part: 1e3 * seconds / frames for part, seconds in clock.seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile, print the table, keep the raw figures."""
    parser = command_line(__doc__, "profile_frame.csv")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of recipes/sac_pmoe.py for all")
    parser.add_argument("--frames", type=at_least_one, default=500, help="measured, of one run (500)")
    parser.add_argument("--warm-up", type=at_least_one, default=300, help="frames before them (300)")
    args = parser.parse_args(arguments)
    given = [
        f"optim.num_threads={args.threads}",
        f"collector.init_random_frames={args.warm_up // 2}",
        "device=cpu",
        *args.overrides,
    ]
    try:
        configs = {name: watched_runs.resolve(sac_pmoe, [*options, *given]) for name, options in VARIANTS.items()}
    except (common.UsageError, HydraException) as error:
        stop(error)
    found = alternate(
        {name: partial(profile, cfg, args.warm_up, args.frames) for name, cfg in configs.items()}, args.rounds
    )
    print(place(args.threads, args.rounds))
    rows, totals = [], {}
    for name, results in found.items():
        totals[name] = median(sum(result.values()) for result in results)
    for part in PARTS:
        cells = []
        for name, results in found.items():
            value = median(result[part] for result in results)
            cells.append(f"{value:.2f} ({value / totals[name]:.0%})")
        rows.append([part, *cells])
    rows.append(["frame", *(f"{total:.2f}" for total in totals.values())])
    rows.append(["frames/s", *(f"{1e3 / total:.0f}" for total in totals.values())])
    print_table(["ms a frame (share)", *found], rows)
    write_csv(
        args.output,
        ["variant", "part", *(f"ms_{index}" for index in range(args.rounds))],
        [[name, part, *(result[part] for result in results)] for name, results in found.items() for part in PARTS],
    )


if __name__ == "__main__":
    main()
