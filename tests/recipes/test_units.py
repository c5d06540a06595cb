"""Recipes train the same policy whatever the units of the environment's actions."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import recipe_runs

from torchrl_pmoe.envs import EnvironmentFault, make_env
from torchrl_pmoe.envs.making import make_gym_env

import dac  # isort: skip
import evaluate  # isort: skip
import ppo_pmoe  # isort: skip
import sac_pmoe  # isort: skip
import sac_many_seeds  # isort: skip
from parts.errors import UsageError  # isort: skip
import target_reaching  # isort: skip

POINT = ["env=recipe_envs:Point-v0", "seed=3", "logger.eval_episodes=2", "compile.enabled=false"]
SMALL_SAC = [
    *POINT,
    "total_frames=60",
    "network.hidden_sizes=[8,8]",
    "optim.batch_size=8",
    "collector.init_random_frames=20",
    "logger.eval_interval=30",
    "checkpoint.interval=60",
]
SMALL_PPO = [*recipe_runs.SMALL_PPO, *POINT, "total_frames=256", "network.log_std_init=1.0"]
SMALL_DAC = [override for override in SMALL_PPO if not override.startswith("num_experts")]


@pytest.fixture(autouse=True)
def _point(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def record(recipe, run, half, overrides):
    """What a run records of its training, and what a loaded policy does afterwards."""
    several = recipe is sac_many_seeds
    recipe.train(
        recipe_runs.resolve(recipe, "device=cpu", "logger.progress_bar=false", *overrides, f"+env_kwargs.half={half}"),
        run,
    )
    agent = ["--agent", "3"] if several else []
    assert evaluate.main([str(run), "--no-video", "--episodes", "2", "--act", "stochastic", *agent]) == 0
    found = [
        [{key: value for key, value in row.items() if key not in recipe_runs.CLOCKS} for row in csv.DictReader(file)]
        for path in sorted(run.rglob("*.csv"))
        if path.name != "checkpoints.csv"
        for file in [path.open()]
    ]
    assert len(found) >= 3
    return found


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        (sac_pmoe, SMALL_SAC),
        (sac_pmoe, [*SMALL_SAC, "policy=gaussian", "collector.num_envs=2"]),
        (sac_pmoe, [*SMALL_SAC, "acting=best_of_experts"]),
        (sac_many_seeds, [*SMALL_SAC, "num_seeds=2"]),
        (ppo_pmoe, [*SMALL_PPO, "scoring=critic"]),
        (ppo_pmoe, [*SMALL_PPO, "actions=bounded", "policy=gating"]),
        (ppo_pmoe, [*SMALL_PPO, "collector.backend=parallel", "collector.num_envs=2"]),
        (dac, [*SMALL_DAC]),
    ],
    ids=lambda given: given.__name__ if not isinstance(given, list) else given[-1],
)
def test_a_run_is_the_same_whatever_the_bounds_of_the_action(recipe, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda env, policy, episode, path: None)
    # powers of two: not even the rounding differs
    unit, narrow = (record(recipe, tmp_path / str(half), half, overrides) for half in (1.0, 0.0625))
    assert narrow == unit
    assert unit[-1][-1]["return_mean"] != ""


@pytest.mark.parametrize("env", ["Pendulum-v1", "HumanoidStandup-v4"])
@pytest.mark.parametrize("overrides", [[], ["scoring=gradient"], ["policy=gaussian"], ["policy=mcp"]], ids=str)
def test_the_automatic_target_entropy_is_minus_the_size_of_the_action(env, overrides):
    cfg = recipe_runs.resolve(sac_pmoe, f"env={env}", "device=cpu", *overrides)
    made = make_env(env)
    spec, size = made.action_spec_unbatched, made.observation_spec["observation"].shape[-1]
    _, loss = sac_pmoe.build_agent(cfg, spec, size)
    assert loss.target_entropy.item() == -spec.shape[-1]


def test_a_target_entropy_that_no_policy_reaches_is_refused(tmp_path):
    uniform = 2 * math.log(2)
    reached = [*SMALL_SAC, "total_frames=20", f"optim.target_entropy={uniform - 0.01}", "+env_kwargs.half=0.05"]
    recipe_runs.run_here(sac_pmoe, tmp_path / "reached", *reached)
    line = rf"optim\.target_entropy=1\.4: must be auto or at most {uniform:.4g}"
    with pytest.raises(UsageError, match=line):
        recipe_runs.run_here(sac_many_seeds, tmp_path / "not", *SMALL_SAC, "optim.target_entropy=1.4", "num_seeds=2")
    with pytest.raises(UsageError, match=line):
        target_reaching.experiment(recipe_runs.composed(target_reaching, "optim.target_entropy=1.4"), tmp_path / "not")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"low": 0.5, "half": 0.5}, "an environment with actions whose bounds differ, this one has Box("),
        ({"low": 1.0, "half": 1.00000001}, "an environment with actions whose bounds differ, this one has Box("),
        ({"half": float("inf")}, "an environment with bounded actions, which are scaled to [-1, 1]; this one has Box("),
        ({"half": 3e38}, "an environment with bounded actions, which are scaled to [-1, 1]; this one has Box("),
    ],
    ids=["equal", "nearly equal", "infinite", "too wide"],
)
def test_bounds_that_cannot_be_scaled_are_refused_in_one_line(kwargs, why):
    with pytest.raises(EnvironmentFault) as error:
        make_gym_env("recipe_envs:Point-v0", kwargs)
    assert str(error.value).startswith(f"env=recipe_envs:Point-v0: must be {why}")
    assert "\n" not in str(error.value)
