"""Where the time of a training frame goes in the SAC recipe, or in the PPO recipe.

    python recipes/benchmarks/profile_frame.py
    python recipes/benchmarks/profile_frame.py --recipe ppo_pmoe

Whole runs of the recipe, with no evaluation and a clock put around its parts from outside. A part's time is its own:
what it calls that is a part too is not in it, so that the parts add up to the frame. Figures are milliseconds a frame,
after a warm-up. Loss and backward of a compiled update are one part, the stepper. Keys of the recipe may follow:

    python recipes/benchmarks/profile_frame.py env=HalfCheetah-v4 collector.num_envs=4
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial, wraps
from pathlib import Path
from statistics import median
from time import perf_counter
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import gymnasium as gym
import ppo_pmoe
import sac_pmoe
import watched_runs
from hydra.errors import HydraException
from parts.errors import UsageError
from rounds import RESULTS, Finished, alternate, at_least_one, chosen, command_line, place, print_table, stop, write_csv
from torchrl.data import TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.envs.libs.gym import GymWrapper
from torchrl.objectives.value import GAE
from torchrl.trainers import Trainer

from torchrl_pmoe.trainers import FiniteBatch, FiniteLoss, PeriodicEvaluation, ProgressBar, steppers

SCORINGS = {
    sac_pmoe: {"gradient-scored, K=4": "gradient", "critic-scored, K=4": "critic"},
    ppo_pmoe: {"responsibility, K=4": "responsibility", "critic-scored, K=4": "critic"},
}
FRAMES = {sac_pmoe: (300, 500), ppo_pmoe: (2048, 4096)}
OUTPUTS = {sac_pmoe: "profile_frame.csv", ppo_pmoe: "profile_frame_ppo.csv"}
PARTS = (
    "simulator",
    "Gymnasium's wrappers",
    "TorchRL's environment",
    "policy",
    "collector",
    "advantages",
    "buffer, extend",
    "buffer, sample",
    "loss, actor and router",
    "loss, critics and target",
    "loss, rest",
    "backward",
    "clipping, finite losses",
    "optimiser",
    "target update",
    "stepper, rest",
    "finite checks and running means",
    "evaluation hook and progress bar",
    "trainer, rest",
)
REST = PARTS[-1]


def variants(recipe: ModuleType) -> dict[str, list[str]]:
    """Names and keys of the recipe."""
    scored = {name: ["num_experts=4", f"scoring={scoring}"] for name, scoring in SCORINGS[recipe].items()}
    return {"gaussian": ["policy=gaussian"], **scored}


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

        @wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._running.append(part)
            try:
                return inner(*args, **kwargs)
            finally:
                self._turn()
                self._running.pop()

        if isinstance(owner, type | ModuleType):
            own = attribute in vars(owner)
            self._undo.callback(*((setattr, owner, attribute, inner) if own else (delattr, owner, attribute)))
        setattr(owner, attribute, timed)


def simulators(env: EnvBase) -> list[gym.Env]:
    """The Gymnasium environments behind an environment of this process."""
    inner = getattr(env, "base_env", env)
    if isinstance(inner, GymWrapper):
        return [inner._env]
    return [gym for one in getattr(inner, "_envs", None) or [] for gym in simulators(one)]


def instrument(clock: Clock, trainer: Trainer) -> None:
    """Put the clock around the parts of a training; what the recipe does not have is left out.

    Args:
        clock: of the run.
        trainer: with its hooks.
    """
    collector, loss, stepper = trainer.collector, trainer.loss_module, trainer.optimization_stepper
    parts: list[tuple[Any, str, str]] = [
        (collector.env, "step_and_maybe_reset", "TorchRL's environment"),
        (collector, "_wrapped_policy", "policy"),
        (collector, "rollout", "collector"),
        (GAE, "forward", "advantages"),
        (TensorDictReplayBuffer, "extend", "buffer, extend"),
        (TensorDictReplayBuffer, "sample", "buffer, sample"),
        (steppers, "step_optimizer", "optimiser"),
        (steppers, "step_targets", "target update"),
        (stepper, "step", "stepper, rest"),
        (stepper, "_accumulate", "finite checks and running means"),
        (FiniteBatch, "__call__", "finite checks and running means"),
        (FiniteLoss, "__call__", "finite checks and running means"),
        (PeriodicEvaluation, "__call__", "evaluation hook and progress bar"),
        (ProgressBar, "__call__", "evaluation hook and progress bar"),
    ]
    for simulator in simulators(collector.env):
        for method in ("step", "reset"):
            parts.append((simulator, method, "Gymnasium's wrappers"))
            parts.append((simulator.unwrapped, method, "simulator"))
    # inside a compiled function a clock would be a hole in the graph
    if not getattr(stepper, "compile", False):
        parts += [
            (loss, "forward", "loss, rest"),
            (loss, "actor_loss", "loss, actor and router"),
            (loss, "_log_weight", "loss, actor and router"),
            (loss, "qvalue_v2_loss", "loss, critics and target"),
            (loss, "loss_critic", "loss, critics and target"),
            (torch.Tensor, "backward", "backward"),
            (steppers, "judge_and_clip", "clipping, finite losses"),
        ]
    for owner, attribute, part in parts:
        if hasattr(owner, attribute):
            clock.wrap(owner, attribute, part)


def profile(recipe: ModuleType, cfg: Any, warm_up: int, frames: int) -> dict[str, float]:
    """Milliseconds a frame by part, of one run of the recipe."""
    begun = 0
    with Clock() as clock:

        def after_batch(collected: int) -> None:
            nonlocal begun
            if begun and collected >= begun + frames:
                clock.stop()
                begun = collected - begun
                raise Finished
            if not begun and collected >= warm_up:
                begun = collected
                clock.start()

        watched_runs.run(recipe, cfg, after_batch, partial(instrument, clock))
    # by now the number of frames between the two
    return {part: 1e3 * seconds / begun for part, seconds in clock.seconds.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile, print the table, keep the raw figures."""
    parser = command_line(__doc__, " or ".join(OUTPUTS.values()))
    parser.set_defaults(output=None)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe, for all variants")
    names = [recipe.__name__ for recipe in FRAMES]
    parser.add_argument("--recipe", choices=names, default=names[0], help=f"({names[0]})")
    parser.add_argument("--frames", type=at_least_one, help="measured, of one run (SAC 500, PPO 4096)")
    parser.add_argument("--warm-up", type=at_least_one, help="frames before them (SAC 300, PPO 2048)")
    args = parser.parse_intermixed_args(arguments)
    recipe = next(recipe for recipe in FRAMES if recipe.__name__ == args.recipe)
    warm_up, frames = (given or usual for given, usual in zip((args.warm_up, args.frames), FRAMES[recipe], strict=True))
    given = [f"optim.num_threads={args.threads}", "device=cpu"]
    if recipe is sac_pmoe:
        given.append(f"collector.init_random_frames={warm_up // 2}")
    options = variants(recipe)
    try:
        configs = {
            name: watched_runs.resolve(recipe, [*options[name], *given, *args.overrides])
            for name in chosen(options, args.only)
        }
    except (UsageError, HydraException) as error:
        stop(error)
    found = alternate(
        {name: partial(profile, recipe, cfg, warm_up, frames) for name, cfg in configs.items()}, args.rounds
    )
    print(place(args.threads, args.rounds))
    totals = {name: median(sum(result.values()) for result in results) for name, results in found.items()}
    rows = []
    for part in PARTS:
        values = {name: median(result[part] for result in results) for name, results in found.items()}
        if any(values.values()):
            rows.append([part, *(f"{value:.3f} ({value / totals[name]:.0%})" for name, value in values.items())])
    rows.append(["frame", *(f"{total:.2f}" for total in totals.values())])
    rows.append(["frames/s", *(f"{1e3 / total:.0f}" for total in totals.values())])
    print_table(["ms a frame (share)", *found], rows)
    write_csv(
        args.output or RESULTS / OUTPUTS[recipe],
        ["variant", "part", *(f"ms_{index}" for index in range(args.rounds))],
        [[name, part, *(result[part] for result in results)] for name, results in found.items() for part in PARTS],
    )


if __name__ == "__main__":
    main()
