"""What a run does the same on every machine: where frames are collected, and whether updates are compiled."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import recipe_runs
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from torchrl_pmoe.envs import make_env, making
from torchrl_pmoe.envs.mujoco.engines import has_mjx
from torchrl_pmoe.trainers import FlatReplay

import dac  # isort: skip
import ppo_pmoe  # isort: skip
import sac_pmoe  # isort: skip
import target_reaching  # isort: skip
from config import shared  # isort: skip
from parts import training  # isort: skip
from parts.errors import UsageError  # isort: skip

SMALL_SAC = [
    "env=HalfCheetah-v4",
    "num_experts=2",
    "total_frames=48",
    "network.hidden_sizes=[8,8]",
    "optim.batch_size=4",
    "collector.init_random_frames=8",
    "logger.eval_interval=24",
    "logger.eval_episodes=1",
    "logger.eval_max_steps=5",
]
INSTALLED = {"serial": True, "parallel": True, "envpool": find_spec("envpool") is not None, "mjx": has_mjx()}


def installed(name, *marks):
    reason = f"the extra {name} is not installed"
    return pytest.param(name, marks=[pytest.mark.skipif(not INSTALLED[name], reason=reason), *marks])


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(making, "find_spec", lambda name: None)
    monkeypatch.setattr(making, "has_mjx", lambda: False)
    monkeypatch.setattr(making.EnvPoolEnv, "available", staticmethod(lambda name: False))


@pytest.fixture
def everything_installed(monkeypatch):
    monkeypatch.setattr(making, "find_spec", lambda name: object())
    monkeypatch.setattr(making, "has_mjx", lambda: True)
    monkeypatch.setattr(making.EnvPoolEnv, "available", staticmethod(lambda name: name == "Ant-v4"))


@pytest.mark.parametrize("installed", ["nothing_installed", "everything_installed"])
@pytest.mark.parametrize("recipe", [sac_pmoe, ppo_pmoe, dac])
def test_the_default_backend_does_not_depend_on_what_is_installed(recipe, installed, request):
    request.getfixturevalue(installed)
    assert recipe_runs.resolve(recipe, "env=Ant-v4", "collector.num_envs=8").collector.backend == "serial"


def test_a_backend_that_was_measured_is_in_the_config_of_the_run(monkeypatch):
    faster = {8: "threads", 2: "serial"}
    monkeypatch.setattr(shared, "faster_backend", lambda env, num_envs, kwargs: faster[num_envs])
    for number, backend in faster.items():
        cfg = recipe_runs.resolve(ppo_pmoe, "env=Ant-v4", f"collector.num_envs={number}", "collector.backend=null")
        assert cfg.collector.backend is None
        cfg.choose_backend()
        assert cfg.collector.backend == backend
        assert f"collector.backend={backend}" in cfg.collector.described()


@pytest.fixture
def no_compiler():
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield


# 1 update a frame; 320 updates in 2,048 frames
@pytest.mark.parametrize(("recipe", "frames"), [(sac_pmoe, 20_000), (ppo_pmoe, 128_000), (dac, 128_000)])
def test_updates_are_compiled_where_there_are_twenty_thousand(recipe, frames, monkeypatch, capsys):
    monkeypatch.setattr(training, "has_compiler", lambda: True)
    for total_frames, compiled in ((frames, True), (frames - 1, False)):
        cfg = recipe_runs.resolve(recipe, f"total_frames={total_frames}")
        assert cfg.compile.enabled is compiled
        training.announce("about", total_frames * 20_000 / frames, compiled=cfg.compile.enabled)
        assert f"about, compile.enabled={str(compiled).lower()}\n" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", [sac_pmoe, ppo_pmoe, dac])
def test_without_a_compiler_long_runs_are_eager_and_say_so(recipe, no_compiler, capsys):
    cfg = recipe_runs.resolve(recipe)
    assert cfg.compile.enabled is False
    training.announce("about", cfg.total_frames, compiled=cfg.compile.enabled)
    assert capsys.readouterr().out == (
        "about, compile.enabled=false (there is no C++ compiler: g++, clang++ on macOS, or what CXX names)\n"
    )
    line = r"compile\.enabled=True: must be false or null where there is no C\+\+ compiler"
    with pytest.raises(UsageError, match=line):
        recipe_runs.resolve(recipe, "compile.enabled=true")


def test_a_run_that_goes_on_keeps_its_choice():
    cfg = recipe_runs.resolve(sac_pmoe, "total_frames=100")
    cfg.total_frames = 1_000_000
    sac_pmoe.resolve(cfg)
    assert cfg.compile.enabled is False


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("collector.backend=envpool", "serial or parallel without the package envpool: pip install"),
        ("collector.backend=mjx", "serial or parallel without jax and mujoco-mjx: pip install"),
        ("collector.backend=brax", "one of serial, threads, parallel, envpool, mjx"),
    ],
)
def test_a_backend_that_is_missing_is_refused(override, allowed, nothing_installed):
    recipe_runs.assert_refused(sac_pmoe, override, allowed)


@pytest.mark.parametrize(
    ("backend", "override", "why"),
    [
        ("envpool", "env=Pendulum-v1", "with env=Pendulum-v1, which EnvPool does not have"),
        ("mjx", "env=Pendulum-v1", "with env=Pendulum-v1; mjx has HalfCheetah-v4, "),
        ("envpool", "+env_kwargs.ctrl_cost_weight=1", "with env_kwargs, which EnvPool's tasks do not take"),
        ("mjx", "+env_kwargs.ctrl_cost_weight=1", "with env_kwargs, which mjx's tasks do not take"),
    ],
)
def test_a_task_that_a_backend_lacks_is_refused(backend, override, why, everything_installed):
    with pytest.raises(UsageError) as error:
        recipe_runs.resolve(ppo_pmoe, "env=Ant-v4", f"collector.backend={backend}", override)
    assert str(error.value).startswith(f"collector.backend={backend}: must be serial or parallel {why}")


def test_target_reaching_has_environments_of_its_own():
    with pytest.raises(UsageError, match=r"collector\.backend=envpool: must be serial"):
        recipe_runs.resolve(target_reaching, "collector.backend=envpool")


@pytest.mark.parametrize("backend", [installed("parallel"), installed("envpool"), installed("mjx")])
def test_sac_trains_on_every_backend(backend, tmp_path, capsys):
    where = [f"collector.backend={backend}", "collector.num_envs=2", "optim.utd_ratio=0.5"]
    recipe_runs.run_here(sac_pmoe, tmp_path, *SMALL_SAC, *where)
    assert [row["frames"] for row in recipe_runs.rows(tmp_path)] == ["24", "48"]
    assert f"2 environments, collector.backend={backend}" in capsys.readouterr().out


@pytest.mark.parametrize("backend", [installed("parallel"), installed("envpool"), installed("mjx")])
def test_ppo_trains_and_resumes_on_every_backend(backend, tmp_path):
    where = ["env=HalfCheetah-v4", "num_experts=2", f"collector.backend={backend}", "collector.num_envs=2"]
    recipe_runs.run_here(ppo_pmoe, tmp_path, *recipe_runs.SMALL_PPO, *where, "logger.eval_max_steps=5")
    assert [row["frames"] for row in recipe_runs.rows(tmp_path)] == ["256", "512"]


@pytest.mark.filterwarnings("error::UserWarning")
def test_serial_and_parallel_collect_the_same_frames():
    def first(backend):
        overrides = [*SMALL_SAC, f"collector.backend={backend}", "collector.num_envs=2"]
        cfg = recipe_runs.resolve(sac_pmoe, "device=cpu", *overrides)
        env = make_env(cfg.env, num_envs=2, seed=cfg.seed, backend=backend)
        ones = lambda td: td.set("action", torch.ones(2, 6))
        collector = training.build_collector(env, ones, frames_per_batch=40)
        try:
            return next(iter(collector))
        finally:
            collector.shutdown()

    serial, parallel = first("serial"), first("parallel")
    for key in ("observation", ("next", "observation"), ("next", "reward"), ("next", "done")):
        torch.testing.assert_close(parallel[key], serial[key], rtol=0, atol=0)


def test_collected_frames_are_stored_flat_and_not_through_the_host(monkeypatch):
    def through_the_host(self):
        raise AssertionError("copied to the host")

    monkeypatch.setattr(TensorDict, "cpu", through_the_host)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=2)
    batch = TensorDict(observation=torch.arange(24.0).reshape(2, 3, 4), batch_size=(2, 3))
    stored = FlatReplay(buffer).extend(batch)
    assert stored.shape == (6,)
    torch.testing.assert_close(buffer[:]["observation"], batch["observation"].reshape(6, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and INSTALLED["mjx"]), reason="no CUDA device, or no mjx")
@pytest.mark.parametrize(("recipe", "small"), [(sac_pmoe, SMALL_SAC), (ppo_pmoe, recipe_runs.SMALL_PPO)])
def test_frames_stay_on_the_gpu(recipe, small, tmp_path):
    where = ["env=HalfCheetah-v4", "num_experts=2", "device=cuda", "collector.backend=mjx", "collector.num_envs=4"]
    cfg = recipe_runs.resolve(recipe, *small, *where, "logger.progress_bar=false")
    env = make_env(cfg.env, num_envs=4, seed=cfg.seed, backend="mjx", device="cuda")
    zeros = lambda td: td.set("action", torch.zeros(4, 6, device="cuda"))
    collector = training.build_collector(env, zeros, frames_per_batch=16, device="cuda")
    assert next(iter(collector))["next", "observation"].device.type == "cuda"
    collector.shutdown()
    recipe.train(cfg, tmp_path)
