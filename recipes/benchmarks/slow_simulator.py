"""A simulator that sleeps, a learner that learns, and the collectors that bring frames from the one to the other.

``scale.py --measure`` measures with these.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import gymnasium as gym
import numpy as np
import sac_pmoe
import stock
import watched_runs
from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector
from torchrl.collectors.distributed import RayCollector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase
from torchrl.objectives import SoftUpdate
from tqdm import tqdm

from torchrl_pmoe.collectors import ReplaceableRayCollector
from torchrl_pmoe.envs import make_env

Found = dict[tuple[int, bool, str], list["Measured"]]
"""What was measured, by the number of workers, whether they wait for each other, and the collector."""


class SlowEnv(gym.Env):
    """A point in the plane that is to stay at the origin; a step sleeps.

    Args:
        seconds: that a step takes.
        limit: steps of an episode.
    """

    def __init__(self, seconds: float, limit: int = 200) -> None:
        self.seconds, self.limit = seconds, limit
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (17,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (6,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode somewhere near the origin."""
        super().reset(seed=seed)
        self._place, self._steps = self.np_random.normal(size=17).astype(np.float32), 0
        return self._place.copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Move, after a sleep."""
        time.sleep(self.seconds)
        self._place[: len(action)] += 0.1 * action
        self._steps += 1
        return self._place.copy(), -float(self._place @ self._place), False, self._steps >= self.limit, {}


def make_slow(seconds: float, num_envs: int = 1) -> EnvBase:
    """Some slow environments of one worker, which steps one after the other."""
    return make_env(partial(SlowEnv, seconds), num_envs=num_envs)


class Learner:
    """Updates of the SAC recipe's networks on stored frames.

    Args:
        threads: of PyTorch.
        batch_size: of an update.
    """

    def __init__(self, threads: int, batch_size: int = 256) -> None:
        torch.set_num_threads(threads)
        cfg = watched_runs.resolve(sac_pmoe, ["device=cpu", "num_experts=4"])
        self.env = make_slow(0.0)
        spec, size = self.env.action_spec_unbatched, self.env.observation_spec["observation"].shape[-1]
        self.actor, loss = sac_pmoe.build_agent(cfg, spec, size)
        self._update = stock.off_policy_update(loss, stock.adam(loss), SoftUpdate(loss, eps=0.995))
        self._buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000), batch_size=batch_size)

    def learn(self, frames: TensorDictBase, updates: int) -> None:
        """Store frames and make some updates."""
        self._buffer.extend(frames.select(*stock.SAC_STORED).reshape(-1))
        for _ in range(updates):
            self._update(self._buffer.sample())

    def seconds_per_update(self, number: int = 30) -> float:
        """Of an update, by the median of some."""
        with closing(self.env):
            self.learn(self.env.rollout(32), 5)
        found = []
        for _ in range(number):
            began = perf_counter()
            self._update(self._buffer.sample())
            found.append(perf_counter() - began)
        return median(found)


def ours(learner: Learner, args: argparse.Namespace, workers: int, sync: bool) -> BaseCollector:
    """This library's collector; one environment a worker."""
    return ReplaceableRayCollector(
        partial(make_slow, args.step_ms / 1e3),
        learner.actor,
        num_envs=workers,
        num_workers=workers,
        frames_per_batch=args.batch * workers if sync else args.batch,
        sync=sync,
        # the kill is to show in the table alone
        report=lambda line: None,
    )


def theirs(learner: Learner, args: argparse.Namespace, workers: int, sync: bool) -> BaseCollector:
    """TorchRL's collector of the same frames, which sends new weights after every batch."""
    collector = RayCollector(
        [partial(make_slow, args.step_ms / 1e3) for _ in range(workers)],
        learner.actor,
        frames_per_batch=args.batch * workers if sync else args.batch,
        # at -1 it sends no frames
        total_frames=10**9,
        sync=sync,
        update_after_each_batch=True,
        # no more cores than there are: a sleeping worker takes none
        remote_configs={"num_cpus": 0},
        collector_kwargs=[{} for _ in range(workers)],
        trust_policy=True,
    )
    collector.update_policy_weights_(learner.actor)
    return collector


COLLECTORS: dict[str, Callable[[Learner, argparse.Namespace, int, bool], BaseCollector]] = {
    "ours": ours,
    "RayCollector": theirs,
}


@dataclass(frozen=True)
class Measured:
    """One collector with one number of workers.

    Args:
        speed: frames a second, updates included.
        gap: longest seconds without a batch when a worker was killed; nan where none was, inf where the run ended.
    """

    speed: float
    gap: float = math.nan


def kill_one(collector: BaseCollector) -> None:
    """Kill the first worker, as a node that goes does."""
    import ray

    ray.kill((collector.remote_collectors if isinstance(collector, RayCollector) else collector.actors)[0])


def drive(collector: BaseCollector, learner: Learner, args: argparse.Namespace, kill: bool) -> Measured:
    """Collect and learn for ``args.seconds``; then, if asked, kill a worker and go on for as long again."""
    due = 0.0

    def batches() -> Iterator[int]:
        nonlocal due
        for batch in collector:
            due += args.updates_per_frame * batch.numel()
            learner.learn(batch, int(due))
            due -= int(due)
            yield batch.numel()

    running = batches()
    # every worker has sent some, and none has the first weights
    for _ in range(2 * max(args.workers)):
        next(running)
    began, frames = perf_counter(), 0
    while perf_counter() - began < args.seconds:
        frames += next(running)
    speed = frames / (perf_counter() - began)
    if not kill:
        return Measured(speed)
    kill_one(collector)
    gap, last, began = 0.0, perf_counter(), perf_counter()
    try:
        while perf_counter() - began < args.seconds:
            next(running)
            gap, last = max(gap, perf_counter() - last), perf_counter()
    # TorchRL's raises what Ray does
    except Exception as error:
        tqdm.write(f"{type(collector).__name__}: {type(error).__name__} {perf_counter() - began:.1f} s after the kill")
        gap = math.inf
    return Measured(speed, gap)


def measure(learner: Learner, args: argparse.Namespace) -> Found:
    """Both collectors with every number of workers, in turn, in one session of Ray."""
    import ray

    # a sleeping worker takes no core
    ray.init(num_cpus=max(args.workers), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    found: Found = {}
    cells = [(number, sync) for number in args.workers for sync in (True, False)]
    try:
        with tqdm(total=args.rounds * len(cells) * len(COLLECTORS), unit="run") as bar:
            for turn in range(args.rounds):
                for number, sync in cells:
                    # the last one of all, so that nothing is measured after it
                    kill = turn == args.rounds - 1 and number == max(args.workers)
                    for name, make in COLLECTORS.items():
                        bar.set_postfix_str(f"{name}, {number} workers, {'sync' if sync else 'async'}")
                        collector = make(learner, args, number, sync)
                        try:
                            found.setdefault((number, sync, name), []).append(drive(collector, learner, args, kill))
                        finally:
                            # one whose worker is dead may fail at its end
                            with suppress(Exception):
                                shut_down(collector)
                        bar.update()
    finally:
        ray.shutdown()
    return found


def shut_down(collector: BaseCollector) -> None:
    """End a collector's workers, and leave Ray."""
    if isinstance(collector, RayCollector):
        collector.shutdown(shutdown_ray=False)
    else:
        collector.shutdown()
