"""What is wrong with an environment is told in one line, before any work."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import pytest
import recipe_runs
from gymnasium.spaces import Box, Dict

from torchrl_pmoe.envs import EnvironmentFault, making

import dac  # isort: skip
import ppo_pmoe  # isort: skip
import sac_many_seeds  # isort: skip
import sac_pmoe  # isort: skip
from parts import process  # isort: skip
from parts.errors import RunError  # isort: skip
from parts.launch import usage_line  # isort: skip

SAC = [
    "total_frames=40",
    "network.hidden_sizes=[8,8]",
    "optim.batch_size=8",
    "collector.init_random_frames=20",
    "logger.eval_interval=20",
    "logger.eval_episodes=1",
    "logger.eval_max_steps=5",
]
PPO = [*recipe_runs.SMALL_PPO, "total_frames=128", "logger.eval_max_steps=5"]
ENV = "env=recipe_envs:Odd-v0"
CAN = "env=recipe_envs:Odd-v0: must be an environment "
FAULTS = {
    "constructor": "that can be made; with env_kwargs={'fault': 'constructor'} it raised ZeroDivisionError: no motor",
    "reset": "that can be reset and stepped; its reset raised ZeroDivisionError: no motor",
    "step": "that can be reset and stepped; its step raised ZeroDivisionError: no motor",
    "shape": "with observations of shape (2,) as its space says; its reset returned shape (5,)",
    "none": "whose reward is a number (gymnasium.wrappers.TransformReward makes it one), this one has NoneType",
    "vector": "whose reward is a number (gymnasium.wrappers.TransformReward makes it one), this one has shape (1,)",
    "text": "whose reward is a number (gymnasium.wrappers.TransformReward makes it one), this one has str",
}
RECIPES = [
    (sac_pmoe.train, sac_pmoe, SAC),
    (sac_pmoe.train, sac_pmoe, [*SAC, "collector.backend=parallel", "collector.num_envs=2"]),
    (sac_many_seeds.train, sac_many_seeds, [*SAC, "num_seeds=2"]),
    (ppo_pmoe.train, ppo_pmoe, PPO),
    (dac.train, dac, PPO),
]


@pytest.fixture(autouse=True)
def _odd(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(making, "_TRIED", set())
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("train", "recipe", "small"), RECIPES, ids=["sac", "parallel", "seeds", "ppo", "dac"])
def test_a_fault_of_the_environment_is_told_before_any_work(train, recipe, small, fault, tmp_path):
    cfg = recipe_runs.resolve(recipe, "device=cpu", *small, ENV, f"+env_kwargs.fault={fault}")
    with pytest.raises(EnvironmentFault) as error:
        train(cfg, tmp_path / "run")
    line = usage_line(error.value)
    assert line.startswith(CAN + FAULTS[fault]), line
    assert "\n" not in line
    assert not (tmp_path / "run").exists()
    raised = fault in ("constructor", "reset", "step")
    assert len(list(tmp_path.glob("*-error.log"))) == raised
    if raised:
        (kept,) = tmp_path.glob("*-error.log")
        assert str(kept) in line
        assert 'raise ZeroDivisionError("no motor")' in kept.read_text()


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [({"nope": 1}, "TypeError: Odd.__init__() got an unexpected keyword argument 'nope'"),
     ({"fault": "value"}, "ValueError: fault=value is not known")],
    ids=["unknown", "refused"],
)  # fmt: skip
def test_arguments_are_blamed_and_not_the_id(kwargs, reason):
    with pytest.raises(EnvironmentFault) as error:
        making.make_gym_env("recipe_envs:Odd-v0", kwargs)
    assert str(error.value).startswith(f"env_kwargs={kwargs}: must be arguments of recipe_envs:Odd-v0 ({reason}")


@pytest.mark.parametrize("name", ["nomodule:Env-v0", "recipe_envs:Nobody-v0", "Pendulum-v9", "json:Env-v0"])
def test_an_id_that_is_not_there_is_blamed_whatever_the_arguments(name):
    with pytest.raises(EnvironmentFault) as error:
        making.make_gym_env(name, {"nope": 1})
    assert str(error.value).startswith(f"env={name}: must be the id of an installed Gymnasium environment (")


@pytest.mark.parametrize(
    ("space", "wrapper"),
    [(Dict(a=Box(-1, 1, (2,)), b=Box(-1, 1, (3, 3))), "FlattenObservation makes one of others"),
     (Box(-1, 1, (3, 1)), "FlattenObservation makes one of others"),
     (Box(-9, 9, (3,), int), "DtypeObservation casts others")],
    ids=["dictionary", "matrix", "integers"],
)  # fmt: skip
def test_observations_that_a_wrapper_would_mend_are_refused_by_its_name(space, wrapper):
    class Other(gym.Env):
        observation_space, action_space = space, Box(-1, 1, (1,))

    gym.register("Other-v0", entry_point=Other)
    try:
        with pytest.raises(EnvironmentFault, match=rf"^env=Other-v0: must be .*\(gymnasium\.wrappers\.{wrapper}\)"):
            making.make_gym_env("Other-v0")
    finally:
        del gym.registry["Other-v0"]


@pytest.mark.parametrize("number", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("recipe", "small"), [(sac_pmoe, SAC), (ppo_pmoe, PPO)])
def test_observations_and_actions_of_any_floating_point_type_train(recipe, small, number, tmp_path):
    types = [f"+env_kwargs.obs={number}", f"+env_kwargs.act={number}"]
    recipe_runs.run_here(recipe, tmp_path, *small, ENV, *types)
    assert recipe_runs.rows(tmp_path)[-1]["return_mean"] == "5"


def test_what_an_environment_raises_in_a_process_of_its_own_is_told_in_one_line(tmp_path, capfd):
    where = ["env=recipe_envs:Breaks-v0", "collector.backend=parallel", "collector.num_envs=2"]
    frames = ["total_frames=1000", "collector.init_random_frames=900", "checkpoint.interval=200"]
    with pytest.raises(RunError) as error:
        recipe_runs.run_here(sac_pmoe, tmp_path / "run", *SAC, *where, *frames, "logger.eval_interval=1000")
    assert str(error.value).startswith("frame 660: ValueError: the hinge broke: no more steps (the traceback is in ")
    assert "checkpoint-000000000600 is whole" in str(error.value)
    assert 'raise ValueError("the hinge broke' in (tmp_path / "run" / process.TRACEBACK).read_text()
    assert "Traceback" not in capfd.readouterr().err
