"""What workers on Ray are said to gain, and how that is measured. No Ray is started here."""

from __future__ import annotations

import argparse
import heapq
import math
import sys

import pytest
import torch
from recipe_runs import RECIPES
from tensordict import TensorDict
from torchrl.collectors import Collector

sys.path.insert(0, str(RECIPES / "benchmarks"))

import sac_pmoe
import scale
import slow_simulator
import watched_runs
from scale import Costs

from torchrl_pmoe.trainers import FusedOptimizationStepper


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def simulated(costs, workers, *, sync, frames=20_000):
    """Frames a second, event by event: workers bring a frame each, and go on while the learner learns from it."""
    if sync:
        seconds = 0.0
        for _ in range(frames // workers):
            # all collect one frame; then the learner learns from all of them
            seconds += costs.step
            seconds += workers * costs.learning
        return frames / seconds
    # the first frames come one after the other
    arrivals = [costs.step * (1 + index / workers) for index in range(workers)]
    free = 0.0
    for _ in range(frames):
        taken = max(free, heapq.heappop(arrivals))
        heapq.heappush(arrivals, taken + costs.step)
        free = taken + costs.learning
    return frames / free


@pytest.mark.parametrize("workers", [1, 2, 5, 16])
@pytest.mark.parametrize("costs", [Costs(5.0, 2.0, 1.0), Costs(1.0, 12.0, 1 / 64), Costs(1.0, 8.0, 2.0)])
def test_formulas_agree_with_a_simulation_event_by_event(costs, workers):
    assert costs.asynchronous(workers) == pytest.approx(simulated(costs, workers, sync=False), rel=1e-2)
    assert costs.synchronous(workers) == pytest.approx(simulated(costs, workers, sync=True), rel=1e-2)


def test_one_worker_that_waits_is_one_process():
    costs = Costs(3.0, 5.0, 0.5)
    assert costs.synchronous(1) == costs.here() == pytest.approx(1 / 5.5)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it."""
    now = [0.0]
    for module in (scale, slow_simulator):
        monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    return now


def test_costs_of_a_recipe_are_told_apart(monkeypatch, clock):
    """A batch of four frames takes 6 s to collect, and each of its two updates 5 s."""

    def taking(seconds, inner):
        def call(*args, **kwargs):
            clock[0] += seconds
            return inner(*args, **kwargs)

        return call

    monkeypatch.setattr(Collector, "rollout", taking(6.0, Collector.rollout))
    monkeypatch.setattr(FusedOptimizationStepper, "step", taking(5.0, FusedOptimizationStepper.step))
    keys = ["env=Pendulum-v1", "network.hidden_sizes=[8]", "optim.batch_size=4", "collector.init_random_frames=4"]
    keys += ["collector.num_envs=2", "collector.frames_per_batch=4", "optim.utd_ratio=0.5", "device=cpu"]
    costs = scale.measure_costs(sac_pmoe, watched_runs.resolve(sac_pmoe, keys), warm_up=12, frames=16)
    assert costs == Costs(6.0 / 4, 5.0, 0.5)


class Batches:
    """A collector whose every batch takes a second, and which the kill of a worker stops for some."""

    def __init__(self, clock, standstill):
        self.clock, self.standstill, self.killed = clock, standstill, False

    def __iter__(self):
        while True:
            self.clock[0] += 1.0
            if self.killed:
                if math.isinf(self.standstill):
                    raise RuntimeError("a worker is dead")
                self.clock[0] += self.standstill
                self.killed = False
            yield TensorDict({}, [2, 8])


@pytest.mark.parametrize(("standstill", "gap"), [(7.0, 8.0), (math.inf, math.inf)])
def test_speed_and_the_longest_gap_after_a_kill(monkeypatch, clock, standstill, gap):
    learned = []
    learner = argparse.Namespace(learn=lambda batch, updates: learned.append(updates))
    args = argparse.Namespace(workers=[1, 2], seconds=10.0, updates_per_frame=1 / 12)
    monkeypatch.setattr(slow_simulator, "kill_one", lambda collector: setattr(collector, "killed", True))
    found = slow_simulator.drive(Batches(clock, standstill), learner, args, kill=True)
    assert found.speed == pytest.approx(16.0)  # frames a second
    assert found.gap == gap
    # 16 frames a batch make 4/3 updates: what is left over is made later
    assert sum(learned) == len(learned) * 16 // 12


def test_table_of_what_to_expect(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(scale, "measure_costs", lambda *args: Costs(4.0, 2.0, 0.5))
    scale.main(["env=Pendulum-v1", "--rounds", "1", "--workers", "2", "8", "--output", str(tmp_path / "costs.csv")])
    printed = capsys.readouterr().out
    assert "| 2 | 0 (2.50) | 0 (1.67) |" in printed  # 1/2 and 1/3 of a frame a second over 1/5
    assert "| 8 | 1 (5.00) | 1 (3.33) |" in printed
    assert "from 4 async workers on, the learner sets the pace" in printed
    kept = (tmp_path / "costs.csv").read_text().splitlines()
    assert kept == ["round,step_s,update_s,updates_per_frame", "0,4,2,0.5"]
