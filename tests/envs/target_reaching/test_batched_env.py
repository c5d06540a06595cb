"""BatchedTargetReachingEnv: agrees with the Gymnasium environment, resets by rows, seeds, copies, collectors."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.ndimage
import torch
from envs.target_reaching.reference import STEPPED, clearance, hostile_actions
from tensordict import TensorDict
from torch._subclasses import FakeTensorMode
from torchrl.collectors import Collector
from torchrl.envs import check_env_specs

from torchrl_pmoe.envs import BatchedTargetReachingEnv, TargetReachingEnv, TargetReachingTask
from torchrl_pmoe.envs.target_reaching.task import BLOCKS, LAYOUTS, START_REGION

STARTS = [(-0.8, -0.5), (-0.8, 0.5)]


def actions(env: BatchedTargetReachingEnv, value: tuple[float, float]) -> TensorDict:
    action = torch.tensor(value, device=env.device).expand(*env.batch_size, 2)
    return TensorDict(action=action, batch_size=env.batch_size, device=env.device)


@pytest.mark.parametrize("start", ["fixed", "random"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_specs_hold(layout, start, device):
    env = BatchedTargetReachingEnv(5, layout, start=start, device=device)
    check_env_specs(env)
    assert env.batch_size == (5,)
    assert set(env.reset().keys()) == {"observation", "is_success", "done", "terminated", "truncated"}
    step = env.rand_step(env.reset())["next"]
    assert set(step.keys()) == {"observation", "is_success", "done", "terminated", "truncated", "reward"}
    assert step["observation"].dtype == torch.float32
    assert step["reward"].shape == step["is_success"].shape == (5, 1)


# a reward knows nothing of the layout but whether there is a stop
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        *((layout, {"reward": "dense"}) for layout in STEPPED),
        ("two", {"reward": "sparse"}),
        ("deceptive", {}),
        *((layout, {"blocked": "lower"}) for layout in STEPPED),
    ],
    ids=str,
)
def test_it_agrees_with_the_gymnasium_environment_step_by_step(layout, options):
    number, rng = 6, np.random.default_rng(0)
    batched = BatchedTargetReachingEnv(number, layout, max_episode_steps=10_000, **options)
    single = [TargetReachingEnv(layout, **options) for _ in range(number)]
    np.testing.assert_allclose(batched.reset()["observation"], np.stack([env.reset()[0] for env in single]))
    keys = ("observation", "reward", "terminated", "is_success")
    found, expected, stops = [], [], 0
    for step in range(1000):
        here = batched.position.double().numpy()
        action = hostile_actions(here, single[0].task.obstacles, rng).astype(np.float32)
        if step % 3 == 0:  # to and past the target
            action[:] = (single[0].task.target[:2] - here) * 5 + rng.normal(size=action.shape)
            action = action.clip(-1, 1)
        out = batched.step(TensorDict(action=torch.tensor(action), batch_size=number))["next"]
        found.append(torch.cat([out[key].double() for key in keys], -1))
        for row, env in enumerate(single):
            env.position = here[row]
            observation, gain, terminated, _, info = env.step(action[row])
            expected.append([*observation, gain, terminated, info["is_success"]])
            stops += info["collided"]
    expected = np.array(expected, dtype=np.float64)
    np.testing.assert_allclose(torch.cat(found), expected, atol=2e-6)
    assert stops > 200
    assert expected[:, -1].sum() > 10


def test_the_authors_arena_agrees_with_the_gymnasium_environment_over_whole_episodes():
    """Half go for the target, the others for any point, also beyond the walls."""
    number, rng = 8, np.random.default_rng(0)
    options = {"blocked": "upper_middle", "starts": [(-0.9013, -0.8987), (-0.2031, 0.2017), (0.3071, 0.0113)]}
    batched = BatchedTargetReachingEnv(number, "paper", seed=0, **options)
    single = [TargetReachingEnv("paper", **options) for _ in range(number)]
    goals, ends = np.full((number, 2), 0.6), set()
    td = batched.reset()
    for env, start in zip(single, td["observation"][:, :2].double().numpy(), strict=True):
        env.reset()
        env.position = start
    for _ in range(400):
        at, velocity = np.split(np.stack([env.state for env in single]), 2, axis=1)
        action = (5 * (goals - at) - velocity + rng.normal(0, 0.5, at.shape)).clip(-2, 2).astype(np.float32)
        td = batched.step(td.set("action", torch.tensor(action)))["next"]
        for row, env in enumerate(single):
            observation, reward, terminated, _, info = env.step(action[row])
            np.testing.assert_allclose(td["observation"][row], observation, atol=1e-5)
            assert td["reward"][row].item() == pytest.approx(reward, abs=1e-5)
            assert td["terminated"][row].item() == terminated
            assert td["is_success"][row].item() == info["is_success"]
            if terminated:
                ends.add(reward)
        done = td["done"].flatten().numpy()
        if done.any():
            goals[done] = np.where(rng.random((number, 1)) < 0.5, 0.6, rng.uniform(-1.5, 1.5, (number, 2)))[done]
            td = batched.reset(td.exclude("reward").set("_reset", td["done"]))
            for row in np.flatnonzero(done):
                single[row].reset()
                single[row].state = batched.state[row].double().numpy()
    assert ends == {100.0, -10.0, -100.0}


@pytest.mark.parametrize("layout", STEPPED)
def test_no_agent_ever_enters_an_obstacle(layout):
    env = BatchedTargetReachingEnv(200, layout, start="random", max_episode_steps=10_000)
    env.reset()
    rng, obstacles = np.random.default_rng(1), env.task.obstacles.double().numpy()
    for _ in range(200):
        before = env.position.double().numpy()
        action = torch.tensor(hostile_actions(before, obstacles, rng), dtype=torch.float32)
        env.step(TensorDict(action=action, batch_size=200))
        assert clearance(before, env.position.numpy(), obstacles).min() > 0


def test_mirrored_actions_make_the_mirrored_path():
    env, mirror = BatchedTargetReachingEnv(2, max_episode_steps=10_000), torch.tensor([1.0, -1.0])
    env.reset()
    for _ in range(200):
        action = torch.rand(2) * 1.7 - 0.7
        env.step(TensorDict(action=torch.stack((action, action * mirror)), batch_size=2))
        torch.testing.assert_close(env.position[0], env.position[1] * mirror, rtol=0, atol=0)


def test_an_episode_is_truncated_after_its_steps_and_terminated_in_the_target():
    env = BatchedTargetReachingEnv(2, obstacles=[], max_episode_steps=15)
    env.reset()
    env.position[1, 1] = 0.9
    for step in range(1, 16):
        out = env.step(actions(env, (1.0, 0.0)))["next"]
        reached, late = [step in (15,), False], [step == 15] * 2
        assert out["terminated"].flatten().tolist() == out["is_success"].flatten().tolist() == reached
        assert out["truncated"].flatten().tolist() == late
        assert out["done"].flatten().tolist() == [a or b for a, b in zip(reached, late, strict=True)]


def test_actions_beyond_their_bounds_are_clipped():
    env = BatchedTargetReachingEnv(1)
    env.reset()
    env.step(actions(env, (5.0, -3.0)))
    torch.testing.assert_close(env.position, torch.tensor([[-0.7, -0.1]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_blocked_passage_is_closed_and_the_others_are_not(layout):
    """Walks on a fine grid of free points, from the start to the target, see what is connected."""
    ticks = np.linspace(-1, 1, 401)
    grid = np.stack(np.meshgrid(ticks, ticks), -1)

    def arrives(obstacles: np.ndarray) -> bool:
        free = (np.hypot(*np.moveaxis(grid[:, :, None] - obstacles[:, :2], -1, 0)) > obstacles[:, 2]).all(-1)
        labels, _ = scipy.ndimage.label(free)
        start, target = (np.abs(ticks[:, None] - point).argmin(0) for point in (task.starts[0], task.target[:2]))
        return labels[start[1], start[0]] == labels[target[1], target[0]]

    every = []
    for passage, discs in BLOCKS[layout].items():
        task = TargetReachingTask(layout, blocked=passage)
        assert arrives(task.obstacles)
        np.testing.assert_array_equal(task.landmarks, TargetReachingTask(layout).obstacles)
        every.extend(discs)
    others = {"two": [(0.0, 0.0, 0.15)]}.get(layout, [])
    assert not arrives(np.concatenate((task.landmarks, every, np.array(others).reshape(-1, 3))))


# ---------------------------------------------------------------------- resets and seeds


def test_a_partial_reset_touches_its_rows_alone(device):
    env = BatchedTargetReachingEnv(4, start="random", device=device)
    env.reset()
    out = env.step(actions(env, (0.5, 0.5)))["next"]
    before, mask = env.position.clone(), torch.tensor([[True], [False], [False], [True]], device=device)
    reset = env.reset(out.exclude("reward").set("_reset", mask))
    rows = mask.flatten()
    assert (env.position[rows] != before[rows]).all()
    torch.testing.assert_close(env.position[~rows], before[~rows], rtol=0, atol=0)
    torch.testing.assert_close(reset["observation"][:, :2], env.position, rtol=0, atol=0)
    assert env.steps.flatten().tolist() == [0, 1, 1, 0]


def test_a_rollout_through_the_ends_of_episodes_starts_each_anew():
    env = BatchedTargetReachingEnv(3, starts=STARTS, max_episode_steps=7)
    data = env.rollout(20, break_when_any_done=False)
    starts = torch.cat((data["observation"][:, 0], data["observation"][data["next", "done"].squeeze(-1).roll(1, 1)]))
    assert data["next", "truncated"].sum() == 6
    assert {tuple(start) for start in starts[:, :2].tolist()} == {tuple(np.float32(start).tolist()) for start in STARTS}
    inner = ~data["next", "done"][:, :-1].squeeze(-1)
    torch.testing.assert_close(data["next", "observation"][:, :-1][inner], data["observation"][:, 1:][inner])


@pytest.mark.parametrize("options", [{"starts": STARTS}, {"start": "random"}], ids=["fixed", "random"])
def test_seeds_fix_the_starts(options, device):
    def draws(env: BatchedTargetReachingEnv) -> torch.Tensor:
        return torch.stack([env.reset()["observation"] for _ in range(5)])

    def make(**seed: int) -> BatchedTargetReachingEnv:
        return BatchedTargetReachingEnv(8, device=device, **options, **seed)

    first, again, other = (draws(make(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    env = make(seed=5)
    env.set_seed(1)
    assert torch.equal(draws(env), first)
    torch.manual_seed(3)
    one = draws(make())
    torch.manual_seed(3)
    assert torch.equal(draws(make()), one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_starts_are_in_free_space(layout):
    env = BatchedTargetReachingEnv(5000, layout, start="random")
    start = env.reset()["observation"][:, :2].numpy()
    assert clearance(start, start, env.task.obstacles.numpy()).min() > 0
    low, high = np.float32(START_REGION)
    assert ((start >= low) & (start <= high)).all()
    np.testing.assert_allclose(start.mean(0), (low + high) / 2, atol=0.05)
    assert len(np.unique(start, axis=0)) > 4990


# ---------------------------------------------------------------------- copies, devices, collectors


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_goes_on_by_itself_and_alike(duplicate):
    env = BatchedTargetReachingEnv(4, start="random", seed=0)
    env.reset()
    env.step(actions(env, (1.0, 0.3)))
    twin = duplicate(env)
    for _ in range(2):
        torch.testing.assert_close(twin.position, env.position, rtol=0, atol=0)
        before = twin.position.clone()
        one = env.step(actions(env, (0.2, 1.0)))["next"]
        torch.testing.assert_close(twin.position, before, rtol=0, atol=0)
        other = twin.step(actions(twin, (0.2, 1.0)))["next"]
        torch.testing.assert_close(one.to_dict(), other.to_dict(), rtol=0, atol=0)
        assert torch.equal(env.reset()["observation"], twin.reset()["observation"])


def test_it_moves_between_devices(device):
    env = BatchedTargetReachingEnv(3, start="random", seed=0).to(device)
    check_env_specs(env)
    assert env.reset().device.type == device.type


def test_a_step_reads_no_value_back_from_the_device():
    env = BatchedTargetReachingEnv(3, "three")
    env.reset()
    action = actions(env, (1.0, 0.0))
    with FakeTensorMode(allow_non_fake_inputs=True):  # raises on .item() and on branches
        env._step(action)


def test_a_collector_runs_it_through_many_episodes():
    env = BatchedTargetReachingEnv(16, start="random", max_episode_steps=10)
    collector = Collector(env, frames_per_batch=16 * 8, total_frames=16 * 8 * 4)
    data = torch.cat([batch.clone() for batch in collector], 1)
    collector.shutdown()
    assert data.shape == (16, 32)
    assert data["next", "truncated"].sum() >= 16 * 3 - data["next", "terminated"].sum()
    inside = ~data["next", "done"][:, :-1].squeeze(-1)
    torch.testing.assert_close(data["next", "observation"][:, :-1][inside], data["observation"][:, 1:][inside])
    begins = data["observation"][:, 1:][~inside]
    assert len(begins)
    assert (begins[:, 0] <= START_REGION[1][0]).all()


@pytest.mark.parametrize(("kwargs", "message"), [({}, "num_envs"), ({"max_episode_steps": 0}, "max_episode_steps")])
def test_there_is_at_least_one_agent_and_one_step(kwargs, message):
    with pytest.raises(ValueError, match=f"{message} must be an integer of at least 1, got 0"):
        BatchedTargetReachingEnv(1 if kwargs else 0, **kwargs)
    with pytest.raises(ValueError, match="layout='four' is unknown"):
        BatchedTargetReachingEnv(1, "four")
