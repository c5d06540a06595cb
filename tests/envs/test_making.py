"""Environments by name, or by a function of one's own, from whatever library they come."""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
import torch
from torchrl.envs import GymEnv, PendulumEnv
from torchrl.modules import MLP
from torchrl.modules.tensordict_module import Actor

from torchrl_pmoe.envs import BatchedTargetReachingEnv, EnvironmentFault, make_env
from torchrl_pmoe.envs.libraries import GymnasiumView, library_of
from torchrl_pmoe.envs.making import full_id, make_gym_env, try_env
from torchrl_pmoe.runs import Evaluator

HAS_DM_CONTROL = pytest.mark.skipif(
    find_spec("dm_control") is None or version("mujoco").startswith("4."), reason="no dm_control, or MuJoCo 4"
)


def test_an_id_without_a_version_is_the_newest_one(monkeypatch):
    newest = max(int(key.rsplit("-v", 1)[1]) for key in gym.registry if key.startswith("Pendulum-v"))
    assert full_id("Pendulum") == f"Pendulum-v{newest}"
    for name in ("Pendulum-v1", "Nobody", "dm_control:cheetah-run"):
        assert full_id(name) == name
    assert make_gym_env("Pendulum").spec.id == f"Pendulum-v{newest}"


def test_the_version_is_looked_for_in_the_module_that_is_named(monkeypatch, tmp_path):
    (tmp_path / "my_tasks.py").write_text(
        "import gymnasium\n"
        "for version in (2, 10):\n"
        "    gymnasium.register(f'Mine-v{version}', entry_point='gymnasium.envs.classic_control:PendulumEnv')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert full_id("my_tasks:Mine") == "my_tasks:Mine-v10"
    finally:
        sys.modules.pop("my_tasks", None)
        for version in (2, 10):
            gym.registry.pop(f"Mine-v{version}", None)


def test_a_function_makes_the_environment():
    ours, theirs = make_env(lambda: gym.make("Pendulum-v1"), seed=3), make_env("Pendulum-v1", seed=3)
    for made in (ours, theirs):
        torch.manual_seed(0)
        made.first = made.rollout(20)
    for key in ("observation", ("next", "reward")):
        torch.testing.assert_close(ours.first[key], theirs.first[key], rtol=0, atol=0)


def test_a_torchrl_environment_is_trained_on_as_it_is_and_seen_by_gymnasiums_means():
    env = make_env(GymTorque, num_envs=2, seed=5)
    rollout = env.rollout(5)
    assert rollout["observation"].shape == (2, 5, 3)
    assert env.action_spec.space.high.unique().tolist() == [1.0]
    view = make_gym_env(GymTorque)
    assert isinstance(view, GymnasiumView)
    reference = gym.make("Pendulum-v1")
    torchrl_env = GymTorque()
    view.env.set_seed(1), torchrl_env.set_seed(1)
    seen, td = view.reset()[0], torchrl_env.reset()
    np.testing.assert_allclose(seen, td["observation"], rtol=1e-6)
    for _ in range(200):
        action = reference.action_space.sample()
        seen, reward, terminated, truncated, _ = view.step(action)
        td = torchrl_env.step(td.set("action", torch.as_tensor(action)))["next"]
        np.testing.assert_allclose(seen, td["observation"], rtol=1e-6)
        assert (reward, terminated, truncated) == (td["reward"].item(), td["terminated"].item(), td["truncated"].item())
    assert truncated


def GymTorque():
    """TorchRL's own wrapper of Gymnasium, which ends after 200 steps."""
    return GymEnv("Pendulum-v1")


def test_observations_under_several_names_become_one():
    made, theirs = make_env(PendulumEnv), PendulumEnv()
    assert sorted(set(theirs.observation_spec.keys()) - {"params"}) == ["th", "thdot"]
    assert made.reset()["observation"].shape == (2,)
    assert made.observation_spec["observation"].dtype == torch.float32


def test_an_evaluation_plays_what_a_function_makes():
    actor = Actor(MLP(in_features=3, out_features=1, num_cells=[4]), spec=make_env(GymTorque).action_spec)
    found = [Evaluator(env, actor, episodes=3, max_steps=30, seed=2)() for env in (GymTorque, "Pendulum-v1")]
    assert found[0].shape == found[1].shape == (3,)
    assert (found[0] < 0).all()


def test_a_fault_shows_as_itself_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_tasks.py").write_text("class Arm:\n    def __init__(self):\n        raise KeyError('elbow')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    gym.register("Arm-v0", entry_point="broken_tasks:Arm")
    try:
        with pytest.raises(EnvironmentFault) as error:
            make_gym_env("Arm-v0")
    finally:
        gym.registry.pop("Arm-v0")
        sys.modules.pop("broken_tasks", None)
    assert str(error.value) == (
        "env=Arm-v0: must be an environment that can be made; it raised KeyError: 'elbow' (broken_tasks.py, line 3)"
    )


def test_a_batch_of_environments_and_other_backends_are_refused_in_one_line():
    with pytest.raises(EnvironmentFault, match=r"must be an environment of batch size \[\], this one has \[4\]"):
        make_env(lambda: BatchedTargetReachingEnv(4))
    with pytest.raises(EnvironmentFault, match="must be serial or parallel with a function"):
        make_env(GymTorque, backend="mjx")


def test_libraries_are_those_that_have_a_name():
    assert library_of("dm_control:cheetah-run") == "dm_control"
    assert library_of("brax:ant") == "brax"
    assert library_of("recipe_envs:Odd-v0") is library_of("Pendulum-v1") is None


@pytest.mark.skipif(find_spec("brax") is not None, reason="brax is installed")
def test_a_library_that_is_missing_says_what_to_install():
    with pytest.raises(
        EnvironmentFault, match=r"^env=brax:ant: must be .*its package is missing: pip install brax 'mujoco<4'$"
    ):
        try_env("brax:ant")


@HAS_DM_CONTROL
def test_dm_control_gives_what_its_own_environment_gives():
    from dm_control import suite

    own = suite.load("cartpole", "swingup", task_kwargs={"random": 7})
    env = make_env("dm_control:cartpole-swingup", env_kwargs={"random": 7})
    base = env
    while hasattr(base, "base_env"):
        base = base.base_env
    base._env = own
    td = env.reset()
    for step in range(1000):
        before = own.physics.get_state().copy()
        action = torch.tensor([0.3 if step % 50 < 25 else -0.3])
        td = env.step(td.set("action", action))["next"]
        expected = np.concatenate(
            [np.atleast_1d(own.task.get_observation(own.physics)[key]) for key in ("position", "velocity")]
        )
        np.testing.assert_allclose(td["observation"], expected, rtol=1e-5, atol=1e-6)
        assert not np.array_equal(before, own.physics.get_state())
        if td["done"]:
            break
    # a time limit, and no failure
    assert (step, td["truncated"].item(), td["terminated"].item()) == (999, True, False)


@pytest.mark.skipif(find_spec("brax") is None, reason="brax is not installed")
def test_brax_gives_what_torchrls_own_environment_gives():
    from torchrl.envs.libs.brax import BraxEnv

    ours, theirs = make_env("brax:fast", seed=3), BraxEnv("fast")
    theirs.set_seed(3)
    td, other = ours.reset(), theirs.reset()
    for _ in range(5):
        torch.testing.assert_close(td["observation"], other["observation"])
        action = 0.3 * torch.ones(ours.action_spec.shape)
        td = ours.step(td.set("action", action))["next"]
        other = theirs.step(other.set("action", action))["next"]
        torch.testing.assert_close(td["reward"], other["reward"])
    with pytest.raises(EnvironmentFault, match="must be one of Brax's tasks, such as ant"):
        make_env("brax:antt")


@HAS_DM_CONTROL
def test_a_task_that_dm_control_does_not_have_is_refused_with_what_is_close():
    with pytest.raises(EnvironmentFault, match=r"must be one of dm_control's tasks, such as .*cheetah-run"):
        make_env("dm_control:cheeta-run")
