"""``collector.backend=ray``: runs whose workers die, runs that go on, and what is said before a run."""

from __future__ import annotations

import signal

import numpy as np
import psutil
import pytest
from recipe_runs import (
    SMALL_PPO,
    assert_refused,
    composed,
    in_background,
    resolve,
    run_here,
    timeless_rows,
    wait_for,
)

ray = pytest.importorskip("ray")

import dac  # noqa: E402
import ppo_pmoe  # noqa: E402
import sac_many_seeds  # noqa: E402
import sac_pmoe  # noqa: E402
import target_reaching  # noqa: E402
from config import shared  # noqa: E402
from parts import training  # noqa: E402
from parts.errors import UsageError  # noqa: E402

from torchrl_pmoe.collectors import ReplaceableRayCollector, connect  # noqa: E402
from torchrl_pmoe.envs import EnvironmentFault  # noqa: E402
from torchrl_pmoe.runs import RunDirectory  # noqa: E402

RAY = ["collector.backend=ray", "collector.num_envs=4", "collector.ray.workers=2"]
SAC = [
    *RAY,
    "env=Pendulum-v1",
    "total_frames=512",
    "network.hidden_sizes=[16,16]",
    "collector.frames_per_batch=64",
    "collector.init_random_frames=128",
    "optim.utd_ratio=0.0625",
    "optim.batch_size=16",
    "logger.eval_interval=256",
    "logger.eval_episodes=1",
    "logger.eval_max_steps=40",
    "checkpoint.interval=256",
]


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    connect(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted")
    run_here(sac_pmoe, run, *SAC)
    return run


@pytest.fixture
def kills(monkeypatch):
    """Kill one of the workers after the second batch of a run; gets what is said of it."""
    said = []

    class Killing(ReplaceableRayCollector):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, report=said.append, **kwargs)

        def iterator(self):
            for number, batch in enumerate(super().iterator(), 1):
                yield batch
                if number == 2:
                    ray.kill(self.actors[-1])

    monkeypatch.setattr(training, "ReplaceableRayCollector", Killing)
    return said


def test_a_run_whose_worker_was_killed_has_equal_metrics(uninterrupted, kills, tmp_path):
    run_here(sac_pmoe, tmp_path, *SAC)
    assert [line.partition(",")[0] for line in kills] == ["worker 1 is replaced at frame 128"]
    assert timeless_rows(tmp_path) == timeless_rows(uninterrupted)


def test_ppo_has_equal_metrics_when_a_worker_was_killed(request, tmp_path):
    """The running statistics of both workers meet on the learner, in one order."""
    runs = [tmp_path / "first", tmp_path / "second"]
    run_here(ppo_pmoe, runs[0], *RAY, *SMALL_PPO)
    kills = request.getfixturevalue("kills")
    run_here(ppo_pmoe, runs[1], *RAY, *SMALL_PPO)
    assert len(kills) == 1
    first, second = map(timeless_rows, runs)
    assert first == second
    assert len(first) == 2


@pytest.mark.parametrize(
    "number", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP", "SIGKILL"))]
)
def test_a_learner_that_was_ended_goes_on_with_equal_metrics_and_leaves_no_worker(
    uninterrupted, tmp_path, number, capfd, monkeypatch
):
    run = tmp_path / "run"
    arguments = [*SAC, "device=cpu", "logger.progress_bar=false", "checkpoint.interval=64", f"hydra.run.dir={run}"]
    # Ray has set it for this process, and had not when the one that forks imported it
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with in_background("sac_pmoe", *arguments, directory=tmp_path) as running:
        wait_for(lambda: RunDirectory(run).checkpoints(), running)
        children = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(getattr(signal, number))
        running.communicate()
    ended = -9 if number == "SIGKILL" else 128 + getattr(signal, number)
    assert running.returncode == ended, running.communicate()
    _, alive = psutil.wait_procs(children, timeout=600)
    assert not alive
    checkpoint = RunDirectory(run).checkpoints()[0]
    assert checkpoint.name < "checkpoint-000000000512"
    run_here(sac_pmoe, run, *SAC, "checkpoint.interval=64", f"resume={checkpoint}")
    assert "new episodes begin" not in capfd.readouterr().out
    assert timeless_rows(run) == timeless_rows(uninterrupted)


def test_target_reaching_trains_though_a_worker_is_killed(kills, tmp_path):
    small = ["total_frames=512", "exploration_frames=400", "network.hidden_sizes=[8]", "optim.batch_size=16"]
    small += ["collector.frames_per_batch=64", "collector.init_random_frames=128", "logger.eval_interval=256"]
    small += ["logger.eval_episodes=1", "logger.progress_bar=false", "device=cpu", "policies=[gaussian]"]
    (cfg,) = target_reaching.resolve(
        composed(target_reaching, *RAY, "collector.ray.workers=1", "collector.num_envs=8", *small)
    ).values()
    target_reaching.train(cfg, tmp_path / "run", 12, 400)
    assert [line.partition(",")[0] for line in kills] == ["worker 0 is replaced at frame 128"]
    with np.load(tmp_path / "run" / "episodes.npz") as recorded:
        visited = recorded["visited"]
    # environment by environment, 8 frames of each a batch: a step is no longer than 0.1, and an episode than 100 steps
    steps = np.abs(np.diff(visited[:384].reshape(6, 8, 8, 2), axis=2))
    assert steps.max() <= 0.1 + 1e-6
    assert [row["frames"] for row in timeless_rows(tmp_path / "run")] == ["256", "512"]


def test_dac_trains(tmp_path):
    run_here(dac, tmp_path, *RAY, *SMALL_PPO, "collector.ray.workers=1")
    assert [row["frames"] for row in timeless_rows(tmp_path)] == ["256", "512"]


def test_critics_that_choose_the_action_are_in_the_workers_and_nobody_waits(tmp_path):
    run_here(sac_pmoe, tmp_path, *SAC, "collector.ray.sync=false", "acting=best_of_experts")
    assert [row["frames"] for row in timeless_rows(tmp_path)] == ["256", "512"]


# --------------------------------------------------------------------------------------------- before a run


def test_an_environment_that_the_workers_do_not_have_is_one_line_before_the_run(tmp_path):
    """Registered in this process alone."""
    import recipe_envs

    with pytest.raises(EnvironmentFault, match=r"worker 0 cannot make its environments: .*Point-v0"):
        run_here(sac_pmoe, tmp_path / "run", *SAC, "env=Point-v0", "collector.ray.workers=1")
    assert recipe_envs
    assert not (tmp_path / "run").exists()


def test_a_wrong_address_is_one_line_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UsageError, match=r"^collector.ray.address=127.0.0.1:1: must be the address of a Ray") as error:
        run_here(sac_pmoe, tmp_path / "run", *SAC, "collector.ray.address=127.0.0.1:1")
    assert "\n" not in str(error.value)


def test_without_the_package_the_line_says_how_to_install_it(monkeypatch):
    find = shared.find_spec
    monkeypatch.setattr(shared, "find_spec", lambda name: None if name == "ray" else find(name))
    assert_refused(sac_pmoe, "collector.backend=ray", "pip install ray")


def test_environments_are_shared_out_evenly():
    with pytest.raises(UsageError, match=r"^collector.num_envs=3: must be a multiple of collector.ray.workers=2"):
        resolve(sac_pmoe, "collector.backend=ray", "collector.num_envs=3", "collector.ray.workers=2")
    cfg = resolve(ppo_pmoe, "collector.backend=ray", "collector.num_envs=4")
    assert cfg.collector.ray.workers == 4


def test_many_seeds_share_one_process():
    assert_refused(sac_many_seeds, "collector.backend=ray", "serial, threads, envpool or mjx")
