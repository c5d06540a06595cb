"""When do workers on Ray pay? What a recipe would gain from them, and what they do with a slow simulator.

    python recipes/benchmarks/scale.py env=HalfCheetah-v4
    python recipes/benchmarks/scale.py --measure --step-ms 5

The first command trains a recipe in this process for a moment, with no evaluation. It measures e, the seconds that
collecting takes a frame, and u, the seconds that an update takes with all that goes with it, and prints what W workers
would do with r updates a frame: without waiting for each other min(W/e, 1/(r u)) frames a second, with waiting
1/(e/W + r u). Keys of the recipe may follow.

The second command measures. A simulator sleeps ``--step-ms`` a step, as one does that computes elsewhere, so that more
workers than cores can be measured; the learner makes real updates, ``--updates-per-frame`` of them. TorchRL's
``RayCollector`` collects the same frames in the same session, and takes turns with ours. In the last round one worker
of each collector is killed, and the longest time without a batch is noted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import ppo_pmoe
import sac_pmoe
import slow_simulator
import watched_runs
from hydra.errors import HydraException
from parts.errors import UsageError
from rounds import RESULTS, Finished, at_least_one, command_line, place, print_table, stop, write_csv
from torchrl.trainers import Trainer
from tqdm import tqdm

WORKERS = (1, 2, 4, 8)
WARM_UP = {sac_pmoe: 1500, ppo_pmoe: 2048}
COLUMNS = ["workers", "mode", "ideal", "ours", "of ideal", "RayCollector", "of ideal"]


# ------------------------------------------------------------------------------------------ what to expect


@dataclass(frozen=True)
class Costs:
    """Where the time of a frame goes.

    Args:
        step: e, seconds that collecting takes a frame in one process.
        update: u, seconds that an update takes, with all that the learner does around it.
        updates_per_frame: r.
    """

    step: float
    update: float
    updates_per_frame: float

    @property
    def learning(self) -> float:
        """The learner's seconds a frame, ``r u``."""
        return self.updates_per_frame * self.update

    def here(self) -> float:
        """Frames a second of one process that collects and learns in turn."""
        return 1 / (self.step + self.learning)

    def asynchronous(self, workers: int) -> float:
        """Frames a second where nobody waits: the slower side sets the pace."""
        return min(workers / self.step, 1 / self.learning if self.learning else math.inf)

    def synchronous(self, workers: int) -> float:
        """Frames a second where the learner waits for all workers, and they for it."""
        return 1 / (self.step / workers + self.learning)


def measure_costs(recipe: ModuleType, cfg: Any, warm_up: int, frames: int) -> Costs:
    """The costs of a recipe as it runs in this process, after ``warm_up`` frames, over ``frames`` of them."""
    collecting = 0.0
    trainers: list[Trainer] = []
    marks: list[tuple[float, ...]] = []  # frames, updates, seconds, seconds of collecting

    def prepare(trainer: Trainer) -> None:
        trainers.append(trainer)
        rollout = trainer.collector.rollout

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal collecting
            began = perf_counter()
            try:
                return rollout(*args, **kwargs)
            finally:
                collecting += perf_counter() - began

        trainer.collector.rollout = timed

    def after_batch(collected: int) -> None:
        if collected >= (marks[0][0] + frames if marks else warm_up):
            updates = trainers[0].optimization_stepper.updates
            marks.append((collected, updates, perf_counter(), collecting))
        if len(marks) == 2:
            raise Finished

    watched_runs.run(recipe, cfg, after_batch, prepare)
    number, updates, seconds, collected = (after - before for before, after in zip(*marks, strict=True))
    return Costs(collected / number, (seconds - collected) / max(1, updates), updates / number)


def expectation(costs: Costs, workers: Sequence[int]) -> list[list[str]]:
    """Lines of the table: workers, frames a second without and with waiting, and both over one process."""
    rows = []
    for number in workers:
        speeds = (costs.asynchronous(number), costs.synchronous(number))
        rows.append([str(number), *(f"{speed:,.0f} ({speed / costs.here():.2f})" for speed in speeds)])
    return rows


def expect(args: argparse.Namespace) -> None:
    """Measure a recipe and print what workers would do for it."""
    recipe = next(one for one in WARM_UP if one.__name__ == args.recipe)
    given = [f"optim.num_threads={args.threads}", "device=cpu", "collector.backend=serial"]
    try:
        cfg = watched_runs.resolve(recipe, [*given, *args.overrides])
    except (UsageError, HydraException) as error:
        stop(error)
    found = [measure_costs(recipe, cfg, args.warm_up or WARM_UP[recipe], args.frames) for _ in tqdm(range(args.rounds))]
    costs = Costs(*(median(getattr(one, name) for one in found) for name in ("step", "update", "updates_per_frame")))
    print(place(args.threads, args.rounds))
    print(
        f"e = {1e3 * costs.step:.3f} ms a frame, u = {1e3 * costs.update:.3f} ms an update, "
        f"r = {costs.updates_per_frame:g} updates a frame; one process: {costs.here():,.0f} frames/s"
    )
    print_table(["workers", "async, frames/s (gain)", "sync, frames/s (gain)"], expectation(costs, args.workers))
    enough = math.ceil(costs.step / costs.learning) if costs.learning else math.inf
    print(f"from {enough} async workers on, the learner sets the pace; a worker takes a core")
    if args.output is not None:
        rows = [[str(turn), *(f"{value:.6g}" for value in astuple(one))] for turn, one in enumerate(found)]
        write_csv(args.output, ["round", "step_s", "update_s", "updates_per_frame"], rows)


# --------------------------------------------------------------------------------------- what was measured


def measure(args: argparse.Namespace) -> None:
    """Measure workers, print what they did beside the ideal, and keep the raw figures."""
    learner = slow_simulator.Learner(args.threads)
    costs = Costs(args.step_ms / 1e3, learner.seconds_per_update(), args.updates_per_frame)
    found = slow_simulator.measure(learner, args)
    print(place(args.threads, args.rounds))
    print(
        f"a step sleeps {args.step_ms:g} ms, an update alone takes {1e3 * costs.update:.2f} ms, "
        f"{args.updates_per_frame:g} updates a frame, {args.batch} frames of a worker at a time"
    )
    rows = []
    for number in args.workers:
        for sync in (True, False):
            ideal = costs.synchronous(number) if sync else costs.asynchronous(number)
            row = [str(number), "sync" if sync else "async", f"{ideal:,.0f}"]
            for name in slow_simulator.COLLECTORS:
                speed = median(one.speed for one in found[number, sync, name])
                row += [f"{speed:,.0f}", f"{speed / ideal:.0%}"]
            rows.append(row)
    print_table(COLUMNS, rows)
    print(f"\nlongest time without a batch when one of {max(args.workers)} workers is killed")
    gaps = [
        [name, "sync" if sync else "async", "the run ends" if math.isinf(gap) else f"{gap:.1f} s"]
        for (_, sync, name), values in found.items()
        if not math.isnan(gap := values[-1].gap)
    ]
    print_table(["collector", "mode", "gap"], gaps)
    settings = {"step_ms": args.step_ms, "update_ms": 1e3 * costs.update, "updates_per_frame": args.updates_per_frame}
    write_csv(
        args.output or RESULTS / "scale.csv",
        ["workers", "sync", "collector", *settings, "round", "frames_per_second", "gap_s"],
        [
            [str(number), str(sync), name, *settings.values(), str(turn), one.speed, one.gap]
            for (number, sync, name), values in found.items()
            for turn, one in enumerate(values)
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Say what to expect of workers, or measure them."""
    parser = command_line(__doc__, "scale.csv", rounds=3, threads=1, variants=False)
    names = [recipe.__name__ for recipe in WARM_UP]
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--recipe", choices=names, default=names[0], help=f"({names[0]})")
    parser.add_argument("--workers", type=at_least_one, nargs="+", default=WORKERS, help="numbers of them (1 2 4 8)")
    parser.add_argument("--frames", type=at_least_one, default=2048, help="of a recipe that are measured (2048)")
    parser.add_argument("--warm-up", type=at_least_one, help="frames before them (SAC 1500, PPO 2048)")
    parser.add_argument("--measure", action="store_true", help="measure workers with a simulator that sleeps")
    parser.add_argument("--step-ms", type=float, default=5.0, help="of that simulator's step (5)")
    parser.add_argument("--updates-per-frame", type=float, default=1 / 64, help="of the learner (1/64)")
    parser.add_argument("--batch", type=at_least_one, default=32, help="frames of a worker at a time (32)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a turn (20)")
    parser.set_defaults(output=None)
    args = parser.parse_intermixed_args(arguments)
    if args.measure:
        measure(args)
    else:
        expect(args)


if __name__ == "__main__":
    main()
