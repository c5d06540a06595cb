"""Frames from Ray's workers: the same whoever dies."""

from __future__ import annotations

import copy
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from collectors import collector_envs
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType

ray = pytest.importorskip("ray")

from torchrl_pmoe import PMOEActor  # noqa: E402
from torchrl_pmoe.collectors import ClusterError, ReplaceableRayCollector, WorkerError, connect  # noqa: E402
from torchrl_pmoe.collectors.ray_collector import seed_of  # noqa: E402
from torchrl_pmoe.envs import EnvironmentFault, NormalizeObservationAndReward, make_env  # noqa: E402

TWO = partial(make_env, "Pendulum-v1", num_envs=2)
BATCH = {"num_envs": 4, "num_workers": 2, "frames_per_batch": 32}


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    connect(num_cpus=2)
    yield
    ray.shutdown()


def make_actor():
    torch.manual_seed(0)
    env = make_env("Pendulum-v1")
    return PMOEActor(2, spec=env.action_spec, in_features=3, num_cells=(8,))


@pytest.fixture(scope="module")
def shared():
    """One collector for several tests, and the lines that it has said."""
    said = []
    collector = ReplaceableRayCollector(TWO, make_actor(), **BATCH, init_random_frames=32, seed=7, report=said.append)
    collector.said = said
    collector.as_new = copy.deepcopy((collector.state_dict(), collector.episodes.state_dict()))
    yield collector
    collector.shutdown()


def restart(collector):
    """Back to the first frame."""
    collector.said.clear()
    collector.load_state_dict(collector.as_new[0])
    collector.episodes.load_state_dict(collector.as_new[1])


def some_batches(collector, number, between=lambda index: None):
    batches = []
    for batch in collector:
        batches.append(batch)
        if len(batches) == number:
            return torch.stack(batches)
        between(len(batches))
    raise AssertionError


def pid_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def assert_equal(first, second):
    assert set(first.keys(True, True)) == set(second.keys(True, True))
    for key, value in first.items(True, True):
        assert torch.equal(value, second[key]), key


def test_frames_are_those_of_local_collectors(shared):
    restart(shared)
    found = some_batches(shared, 4)
    assert found.shape == (4, 4, 8)
    for worker in range(2):
        env = TWO()
        local = Collector(
            env,
            shared.policy,
            frames_per_batch=16,
            total_frames=-1,
            init_random_frames=16,
            exploration_type=ExplorationType.RANDOM,
            track_traj_ids=False,
        )
        seed = seed_of(7, worker, 0)
        torch.manual_seed(seed)
        env.set_seed(seed)
        local.reset()
        frames = torch.stack([batch for batch, _ in zip(local, range(4), strict=False)])
        for key in ("observation", "action", ("next", "reward")):
            torch.testing.assert_close(found[:, 2 * worker : 2 * worker + 2][key], frames[key], rtol=1e-5, atol=1e-5)
        local.shutdown()


def test_weights_are_the_latest(shared):
    restart(shared)

    def learn(index):
        with torch.no_grad():
            for parameter in shared.policy.parameters():
                parameter.add_(0.01 * index)

    before = copy.deepcopy(shared.policy.state_dict())
    for index, batch in enumerate(shared):
        if index:  # the first batch is random
            expected = shared.policy(batch.select("observation"))
            torch.testing.assert_close(batch["loc"], expected["loc"], rtol=1e-5, atol=1e-6)
        if index == 2:
            break
        learn(index + 1)
    shared.policy.load_state_dict(before)


def test_killed_and_frozen_workers_lose_no_frame(shared):
    restart(shared)
    expected = some_batches(shared, 6)
    assert not shared.said
    restart(shared)

    def harm(index):
        if index == 2:
            os.kill(pid_of(shared.actors[1]), signal.SIGKILL)
        if index == 4:
            os.kill(pid_of(shared.actors[0]), signal.SIGSTOP)
            shared.patience = 1.0

    shared.report = lambda line: (shared.said.append(line), setattr(shared, "patience", 600.0))
    assert_equal(some_batches(shared, 6, harm), expected)
    killed, frozen = shared.said
    assert killed.startswith("worker 1 is replaced at frame 64, no frame is lost: ActorDiedError")
    assert frozen == "worker 0 is replaced at frame 128, no frame is lost: no answer for 1 s"


def test_a_state_that_was_saved_goes_on(shared):
    restart(shared)
    states = []
    expected = some_batches(shared, 5, lambda index: states.append(copy.deepcopy(shared.episodes.state_dict())))
    restart(shared)
    shared.load_state_dict({"frames": 64})
    shared.episodes.load_state_dict(states[1])
    assert not shared.episodes.fresh
    assert_equal(some_batches(shared, 3), expected[2:])


def test_asynchronous_frames_count_once_each(shared):
    """Every worker's episodes go on where its own last frames have ended, whoever dies."""
    restart(shared)
    shared.sync = False
    try:
        batches, last = [], {}
        for batch in shared:
            batches.append(batch)
            first = batch["collector", "environment"][0, 0].item()
            if first in last:
                torch.testing.assert_close(batch["observation"][:, 0], last[first], rtol=0, atol=0)
            last[first] = batch["next", "observation"][:, -1]
            if len(batches) == 3:
                ray.kill(shared.actors[1])
            if len(batches) >= 8 and len(last) == 2 and shared.said:
                break
        assert len(shared.said) == 1
        assert shared.state_dict()["frames"] == sum(batch.numel() for batch in batches)
    finally:
        shared.sync = True


def test_where_no_state_is_known_new_episodes_begin():
    said = []
    create = partial(make_env, collector_envs.Line)
    env = create()
    actor = PMOEActor(2, spec=env.action_spec, in_features=2, num_cells=(8,))
    collector = ReplaceableRayCollector(
        create, actor, num_envs=1, num_workers=1, frames_per_batch=8, seed=3, report=said.append
    )
    found = some_batches(collector, 3, lambda index: ray.kill(collector.actors[0]) if index == 2 else None)
    assert len(said) == 1
    starts = []
    for rounds in (0, 2):
        env.set_seed(seed_of(3, 0, rounds))
        starts.append(env.reset()["observation"])
    # one start for two batches, then that of the new episode
    torch.testing.assert_close(found["observation"][:, 0, 0], torch.stack([starts[0], starts[0], starts[1]]))
    saved = collector.episodes.state_dict()
    collector.episodes.load_state_dict(saved)
    assert collector.episodes.fresh
    collector.shutdown()


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"breaks_after": 10}, "ValueError: the hinge broke: no more steps"),
        ({"dies_after": 10}, "ActorDiedError"),
    ],
    ids=["raises", "dies"],
)
def test_a_worker_that_keeps_dying_is_given_up(fault, line):
    create = partial(make_env, collector_envs.Line, env_kwargs=fault)
    env = create()
    actor = PMOEActor(2, spec=env.action_spec, in_features=2, num_cells=(8,))
    collector = ReplaceableRayCollector(create, actor, num_envs=1, num_workers=1, frames_per_batch=16, max_restarts=0)
    with pytest.raises(WorkerError, match=f"^worker 0 is given up: {line}") as error:
        next(iter(collector))
    assert "\n" not in str(error.value)
    if "breaks_after" in fault:
        assert "collector_envs.py" in str(error.value.__cause__)


def test_an_environment_that_cannot_be_made_in_a_worker_is_one_line():
    with pytest.raises(EnvironmentFault, match=r"^worker 0 cannot make its environments: .*no motor") as error:
        ReplaceableRayCollector(collector_envs.no_motor, make_actor(), num_envs=1, num_workers=1, frames_per_batch=8)
    assert "\n" not in str(error.value)


def test_more_workers_than_cores_are_a_warning(monkeypatch):
    monkeypatch.setattr(ReplaceableRayCollector, "_make_actor", lambda self, num_cpus: sys.exit("made"))
    with pytest.warns(UserWarning, match="3 workers share 2 cores"), pytest.raises(SystemExit):
        ReplaceableRayCollector(TWO, make_actor(), num_envs=3, num_workers=3, frames_per_batch=6)


def test_running_statistics_gather_what_all_workers_see():
    """The learner counts every observation, the first of every episode included."""
    env = make_env("Pendulum-v1")
    learner = NormalizeObservationAndReward()
    env = env.append_transform(learner)
    collector = ReplaceableRayCollector(
        TWO, make_actor(), **BATCH, transforms=[NormalizeObservationAndReward], normalization=learner, env=env
    )
    some_batches(collector, 3)
    assert abs(learner.observations.count - (3 * 32 + 4)) < 1e-3
    assert abs(learner.returns.count - 3 * 32) < 1e-3
    collector.shutdown()


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_envs=3 must be a multiple of num_workers=2"):
        ReplaceableRayCollector(TWO, make_actor(), num_envs=3, num_workers=2, frames_per_batch=6)
    with pytest.raises(ValueError, match="frames_per_batch=6 must be a multiple of num_envs=4"):
        ReplaceableRayCollector(TWO, make_actor(), num_envs=4, num_workers=2, frames_per_batch=6)


def test_no_ray_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("torchrl_pmoe.collectors.session.find_spec", lambda name: None)
    with pytest.raises(ClusterError, match="pip install ray"):
        connect()
