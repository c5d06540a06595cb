import importlib.util
import os
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs.utils import RandomPolicy, check_env_specs

from torchrl_pmoe.envs import envpool as envpool_module
from torchrl_pmoe.envs.envpool import EnvPoolEnv

needs_envpool = pytest.mark.skipif(
    not EnvPoolEnv.available("Hopper-v4"), reason="EnvPool is not installed: pip install envpool"
)
needs_gymnasium_mujoco = pytest.mark.skipif(
    importlib.util.find_spec("mujoco") is None, reason="Gymnasium's own tasks need MuJoCo"
)

# Largest error of an observation, relative above 1, allowed in half of the steps, in 99 of 100, and of a reward.
# Measured over 1,000 random actions against MuJoCo 3.6, which EnvPool 1.2 has inside: at most 2e-12, and 6e-8 in the
# reward, which EnvPool rounds to float32. Against MuJoCo 4.0 the three planar tasks keep that. Where many contacts
# press at once its solver ends at other forces: Ant 1e-5 / 8e-4 / 1e-2, Humanoid 2e-5 / 1e-3 / 1e-4 and
# HumanoidStandup 1e-4 / 2e-2 / 6e-4 (half / 99 of 100 / reward).
EXACT = (1e-10, 1e-10, 2e-7)
OTHER_SOLVER = {
    "Ant-v4": (2e-4, 1e-2, 5e-2),
    "Humanoid-v4": (2e-4, 1e-2, 2e-3),
    "HumanoidStandup-v4": (1e-3, 1e-1, 5e-3),
}
TASKS = ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4", "HumanoidStandup-v4"]


def make_gymnasium(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make(name)
    env.reset(seed=0)
    return env.unwrapped


def put_in_state(env, observation, name):
    """Set the simulator to an observation; what it does not hold, root position and clipped speeds, stays."""
    position, speed = env.data.qpos.copy(), env.data.qvel.copy()
    hidden = 2 if name.startswith(("Ant", "Humanoid")) else 1
    shown = len(position) - hidden
    position[hidden:] = observation[:shown]
    seen = observation[shown : shown + len(speed)]
    clipped = (np.abs(seen) >= 10) & name.startswith(("Hopper", "Walker2d"))
    # written as it is: set_state would run the solver once more, from another start than EnvPool's
    env.data.qpos[:], env.data.qvel[:] = position, np.where(clipped, speed, seen)


def start_anew(env, observation, name):
    import mujoco

    mujoco.mj_resetData(env.model, env.data)
    put_in_state(env, observation, name)
    mujoco.mj_forward(env.model, env.data)


def error(found, expected):
    return np.max(np.abs(found - expected) / np.maximum(1, np.abs(expected)))


@needs_envpool
@needs_gymnasium_mujoco
@pytest.mark.parametrize("name", TASKS)
def test_every_step_is_gymnasiums(name):
    import mujoco

    torch.manual_seed(0)
    env, reference = EnvPoolEnv(name, 1, seed=1), make_gymnasium(name)
    data, errors, reward_errors = env.reset(), [], []
    start_anew(reference, env._state[0], name)
    for _ in range(1000):
        put_in_state(reference, env._state[0], name)
        data = env.rand_step(data)
        observation, reward, terminated, _, _ = reference.step(data["action"][0].double().numpy())
        after = data["next"]
        errors.append(error(env._state[0], observation))
        reward_errors.append(error(after["reward"].item(), reward))
        assert after["terminated"].item() == terminated
        assert torch.equal(after["observation"], torch.from_numpy(env._state).float())
        data = after.exclude("reward")
        if after["done"].item():
            data = env.reset()
            start_anew(reference, env._state[0], name)
    same = mujoco.__version__.startswith("3.6.")
    half, most, reward_limit = EXACT if same else OTHER_SOLVER.get(name, EXACT)
    assert np.median(errors) < half
    assert np.quantile(errors, 0.99) < most
    assert max(reward_errors) < reward_limit


@needs_envpool
@pytest.mark.parametrize("name", TASKS)
def test_spaces_and_time_limit_are_gymnasiums(name):
    env, spec = EnvPoolEnv(name, 3), gym.spec(name)
    reference = make_gymnasium(name)
    assert env.observation_spec["observation"].shape == (3, *reference.observation_space.shape)
    assert torch.equal(env.action_spec.space.low[0], torch.as_tensor(reference.action_space.low).float())
    assert torch.equal(env.action_spec.space.high[2], torch.as_tensor(reference.action_space.high).float())
    assert env._max_episode_steps == spec.max_episode_steps == 1000


@needs_envpool
def test_a_time_limit_truncates_and_does_not_terminate():
    data = EnvPoolEnv("HalfCheetah-v4", 2).rollout(1100, break_when_any_done=False)["next"]
    expected = torch.zeros(2, 1100, 1, dtype=torch.bool)
    expected[:, 999] = True
    assert torch.equal(data["truncated"], expected)
    assert torch.equal(data["done"], expected)
    assert not data["terminated"].any()


@needs_envpool
def test_an_episode_that_fails_in_its_last_step_is_terminated_and_truncated(monkeypatch):
    torch.manual_seed(0)
    first = EnvPoolEnv("Hopper-v4", 1, seed=3).rollout(1000)
    assert first["next", "terminated"][0, -1]
    assert not first["next", "truncated"].any()
    observation, action, config = envpool_module._task("Hopper-v4")
    shorter = (observation, action, {**config, "max_episode_steps": first.shape[1]})
    monkeypatch.setattr(envpool_module, "_task", lambda name: shorter)
    env = EnvPoolEnv("Hopper-v4", 1, seed=3)
    torch.manual_seed(0)
    last = env.rollout(1000)["next"][:, -1]
    assert last["terminated"].item()
    assert last["truncated"].item()


def collect(num_envs=4, per_batch=400, batches=3):
    """Transitions of a Hopper under random actions, ``[N, T]``."""
    torch.manual_seed(0)
    env = EnvPoolEnv("Hopper-v4", num_envs, seed=5)
    collector = Collector(
        env, RandomPolicy(env.action_spec), frames_per_batch=per_batch, total_frames=batches * per_batch
    )
    data = torch.cat([batch.exclude("collector").clone() for batch in collector], 1)
    collector.shutdown()
    return data


@needs_envpool
@needs_gymnasium_mujoco
def test_every_collected_transition_is_one_that_gymnasium_makes():
    data = collect().reshape(-1)
    env = make_gymnasium("Hopper-v4")
    assert data["next", "done"].sum() > 20
    for step in data:
        start_anew(env, step["observation"].double().numpy(), "Hopper-v4")
        observation, reward, terminated, _, _ = env.step(step["action"].double().numpy())
        # stored as float32
        assert error(step["next", "observation"].numpy(), observation) < 1e-3
        assert step["next", "reward"].item() == pytest.approx(reward, abs=1e-3)
        assert step["next", "terminated"].item() == terminated


@needs_envpool
def test_a_collector_sees_episodes_one_after_the_other_and_nothing_between():
    data = collect()
    assert data.shape == (4, 300)
    done = data["next", "done"][:, :-1, 0]
    assert done.any(1).all()
    assert not torch.equal(done[0], done[1])
    follows, after = data["observation"][:, 1:], data["next", "observation"][:, :-1]
    assert torch.equal(follows[~done], after[~done])
    # Hopper starts within 0.005 of standing still at height 1.25
    standing = torch.zeros(11)
    standing[0] = 1.25
    starts = torch.cat([data["observation"][:, 0], follows[done]])
    assert (starts - standing).abs().max() < 0.00501
    assert ((after[done] - standing).abs().amax(-1) > 0.1).all()
    assert starts.unique(dim=0).shape == starts.shape
    assert (data["next", "reward"] != 0).all()


@needs_envpool
def test_resetting_one_row_leaves_the_others_where_they_are():
    torch.manual_seed(0)
    alone, disturbed = EnvPoolEnv("HalfCheetah-v4", 3, seed=2), EnvPoolEnv("HalfCheetah-v4", 3, seed=2)
    data, other = alone.reset(), disturbed.reset()
    mask = torch.tensor([[False], [True], [False]])
    for step in range(20):
        assert torch.equal(data["observation"][~mask[:, 0]], other["observation"][~mask[:, 0]])
        assert torch.equal(data["observation"][1], other["observation"][1]) == (step < 10)
        if step == 9:
            before = other["observation"].clone()
            other = disturbed.reset(other.set("_reset", mask))
            assert torch.equal((other["observation"] != before).any(-1), mask[:, 0])
        action = alone.action_spec.rand()
        data = alone.step(data.set("action", action))["next"].exclude("reward")
        other = disturbed.step(other.set("action", action))["next"].exclude("reward")


@needs_envpool
@pytest.mark.parametrize("name", ["Hopper-v4", "Pendulum-v1"])
def test_what_was_handed_out_is_not_changed_later(name):
    env = EnvPoolEnv(name, 2)
    data = env.rand_step(env.reset())
    kept = data.clone()
    env.rand_step(data["next"].exclude("reward"))
    env.reset()
    assert (data == kept).all()


@needs_envpool
def test_an_ended_row_is_not_stepped_before_its_reset():
    env = EnvPoolEnv("Hopper-v4", 2)
    with pytest.raises(RuntimeError, match=r"environments \[0, 1\] must be reset before"):
        env.rand_step()
    data = env.rollout(500)
    ended = data["next", "done"][:, -1, 0].nonzero()[:, 0].tolist()
    with pytest.raises(RuntimeError, match=rf"environments \[{ended[0]}"):
        env.rand_step(data["next"][:, -1].exclude("reward"))


@needs_envpool
def test_a_rollout_until_all_are_done_holds_the_rows_that_are():
    data = EnvPoolEnv("Hopper-v4", 4, seed=5).rollout(500, break_when_all_done=True)["next"]
    assert data["done"][:, -1].all()
    for row in data:
        end = int(row["done"].int().argmax())
        assert (row["observation"][end:] == row["observation"][end]).all()


@needs_envpool
@pytest.mark.parametrize("name", ["Hopper-v4", "Humanoid-v4", "Pendulum-v1"])
def test_specs_hold(name):
    check_env_specs(EnvPoolEnv(name, 3))


def rollout(env):
    torch.manual_seed(0)
    return env.rollout(50, break_when_any_done=False)["next", "observation"]


@needs_envpool
def test_a_seed_gives_the_same_run_again():
    expected = rollout(EnvPoolEnv("Hopper-v4", 3, seed=7, num_threads=1))
    env = EnvPoolEnv("Hopper-v4", 3, seed=1, num_threads=3)
    assert not torch.equal(rollout(env), expected)
    env.set_seed(7)
    assert torch.equal(rollout(env), expected)
    assert not torch.equal(rollout(env), expected)


@needs_envpool
def test_neighbouring_seeds_share_no_start():
    starts = torch.cat([EnvPoolEnv("Hopper-v4", 8, seed=seed).reset()["observation"] for seed in range(4)])
    assert len(starts.unique(dim=0)) == 32


@needs_envpool
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads where Linux lists them")
def test_close_ends_the_threads():
    before = len(os.listdir("/proc/self/task"))
    env = EnvPoolEnv("Hopper-v4", 4, num_threads=4)
    env.rollout(3)
    assert len(os.listdir("/proc/self/task")) >= before + 4
    env.set_seed(3)
    env.close()
    assert env.is_closed
    assert len(os.listdir("/proc/self/task")) == before


@needs_envpool
@pytest.mark.parametrize("name", ["HalfCheetah-v4", "Pendulum-v1", "LunarLanderContinuous-v2"])
def test_nothing_is_printed(name, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = EnvPoolEnv(name, 2)
        env.rollout(20, break_when_any_done=False)
        env.close()
    assert capfd.readouterr() == ("", "")


@needs_envpool
@pytest.mark.parametrize(
    ("name", "num_envs", "options", "message"),
    [
        ("Hopper-v9", 2, {}, "EnvPool has no task 'Hopper-v9'"),
        ("CartPole-v1", 2, {}, r"CartPole-v1 must have a Box vector of actions .* it has Discrete\(2\)"),
        ("FetchReach-v4", 2, {}, "FetchReach-v4 must have a Box vector of observations"),
        ("Hopper-v4", 0, {}, "num_envs must be an integer of at least 1, got 0"),
        ("Hopper-v4", 2.0, {}, "num_envs must be an integer of at least 1, got 2.0"),
        ("Hopper-v4", 2, {"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ("Hopper-v4", 2, {"num_threads": 0}, "num_threads must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(name, num_envs, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        EnvPoolEnv(name, num_envs, **options)
    assert "\n" not in str(caught.value)


def test_without_envpool_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(envpool_module.importlib.util, "find_spec", lambda name: None)
    assert not EnvPoolEnv.available("Hopper-v4")
    with pytest.raises(ValueError, match=r"pip install envpool"):
        EnvPoolEnv("Hopper-v4", 2)


@needs_envpool
def test_available_knows_the_tasks():
    assert EnvPoolEnv.available("HumanoidStandup-v4")
    assert not EnvPoolEnv.available("PMOE/TargetReaching-v0")
