"""The option recipe as a user starts it."""

from __future__ import annotations

import shutil
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import recipe_runs
import torch
from omegaconf import OmegaConf
from recipe_runs import assert_a_line_and_a_progress_bar, assert_one_line, assert_refused, rows, timeless_rows
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Unbounded

import dac  # isort: skip
import ppo_pmoe  # isort: skip
import runs  # isort: skip
from normalization import RunningNormalization  # isort: skip

start = partial(recipe_runs.start, "dac")
resolve = partial(recipe_runs.resolve, dac)

SMALL = recipe_runs.SMALL_PPO
# PPO's, but for those of a Q-network
COLUMNS = ("return_mean", "return_std", "loss_objective_high", "loss_objective_low", "loss_critic", "loss_entropy",
           "explained_variance", "clip_fraction", "clip_fraction_high", "kl_approx", "kl_approx_high",
           "termination_prob", "train_return", "entropy", "effective_experts", "effective_experts_per_state",
           "mutual_information", "dead_fraction", "saturation")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dac")
    done = start(*SMALL, "num_options=3", "hydra.run.dir=run", directory=directory)
    return directory / "run", done


def test_run_ends_well_and_says_what_it_trains(run):
    assert "return=" in assert_a_line_and_a_progress_bar(run[1])[-1]
    assert run[1].stdout.startswith("Pendulum-v1: policy dac of 3 options, ")


def test_run_directory_holds_config_metrics_checkpoints_and_plot(run):
    directory, _ = run
    config = OmegaConf.load(directory / "config.yaml")
    assert config.num_options == 3
    assert (directory / "learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert any((directory / "checkpoints").iterdir())
    table = rows(directory)
    assert [row["frames"] for row in table] == ["256", "512"]
    for row in table:
        assert sum(float(row[f"usage_{k}"]) for k in range(3)) == pytest.approx(1.0, abs=1e-4)
        for name in COLUMNS:
            assert row[name] != "", name


def test_both_levels_are_trained(run):
    for row in rows(run[0]):
        for name in ("kl_approx", "kl_approx_high"):
            assert abs(float(row[name])) > 1e-8


def test_same_seed_gives_the_same_metrics(run, tmp_path):
    start(*SMALL, "num_options=3", "hydra.run.dir=run", directory=tmp_path)
    assert timeless_rows(run[0]) == timeless_rows(tmp_path / "run")


@pytest.mark.parametrize(
    "args",
    [
        ["num_options=1", "loss.clip_value=false", "normalization.observation=false"],
        ["actions=bounded", "network.router=separate", "loss.entropy_coeff=0.01", "logger.eval_option=largest"],
        ["collector.num_envs=2", "network.router=shared", "optim.router_lr=1e-3"],
    ],
    ids=lambda args: args[0],
)
def test_every_kind_of_run_ends_well(args, tmp_path):
    recipe_runs.run_here(dac, tmp_path, *SMALL, *args)
    assert [row["frames"] for row in rows(tmp_path)] == ["256", "512"]


def test_a_resumed_run_goes_on_where_it_was(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    before = rows(tmp_path / "run")
    done = start("resume=run", "total_frames=1024", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    after = rows(tmp_path / "run")
    assert after[:2] == before
    assert [row["frames"] for row in after] == ["256", "512", "768", "1024"]


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("num_options=0", "an integer >= 1"),
        ("policy=pmoe", "one of dac"),
        ("actions=foo", "one of unbounded, bounded"),
        ("loss.high_entropy_coeff=-1", "a number >= 0"),
        ("logger.eval_option=foo", "one of drawn, largest"),
        ("network.router=foo", "one of linear, detached, shared, separate"),
        ("collector.frames_per_batch=2000", "a multiple of"),
    ],
)
def test_bad_value_is_named_with_what_is_allowed(override, allowed):
    assert_refused(dac, override, allowed)


@pytest.mark.parametrize(
    ("args", "begins"),
    [
        (["num_experts=3"], "num_experts=3: no such key"),
        (["env=CartPole-v1"], "env=CartPole-v1: must be"),
        (["resume=nowhere"], "resume=nowhere: must be the directory of a run"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_input_ends_in_one_line_with_status_2_and_leaves_nothing(args, begins, tmp_path):
    assert_one_line(start(*args, directory=tmp_path), begins)
    assert list(tmp_path.iterdir()) == []


def test_what_ppo_and_options_share_has_the_same_value():
    """Two rivals that are trained alike."""
    ours, theirs = (OmegaConf.load(recipe_runs.RECIPES / "config" / f"{name}.yaml") for name in ("dac", "ppo_pmoe"))
    for group in ("network", "optim", "collector", "normalization", "loss", "logger", "checkpoint"):
        shared = ours[group].keys() & theirs[group].keys()
        assert shared
        assert {key: ours[group][key] for key in shared} == {key: theirs[group][key] for key in shared}


# -------------------------------------------------------------------------------------------- evaluation


class Named(gym.Env):
    """Shows its name in the first observation alone, and pays for every action that says it; lengths differ."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-100.0, 100.0, (1,), np.float32)
    name = 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.name = seed
        self.steps = 0
        return np.array([float(self.name)]), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1), float(action[0] == self.name), self.steps == 2 + 3 * (self.name % 3), False, {}


class Memory(TensorDictModuleBase):
    """Says in every step what it saw in the first."""

    in_keys, out_keys = ("observation",), ("action",)

    def forward(self, tensordict):
        said = tensordict.get("said", tensordict["observation"])
        return tensordict.update({"action": said, "next": {"said": said}})


def test_an_evaluated_policy_finds_what_it_has_carried_in_each_episode():
    gym.register("Named-v0", entry_point=Named, disable_env_checker=True)
    evaluator = runs.Evaluator("Named-v0", Memory(), episodes=4, max_steps=100, seed=7)
    for _ in range(2):  # and nothing from one evaluation to the next
        assert evaluator().tolist() == [2 + 3 * (name % 3) for name in range(7, 11)]
    evaluator.close()


class Spy(TensorDictModuleBase):
    """Keeps what it reads, and goes from option to option."""

    in_keys, out_keys = ("observation", "is_init", "previous_option"), ("action",)

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, tensordict):
        self.seen.append(tensordict.clone())
        following = tensordict["previous_option"] + 1
        return tensordict.update({"action": 9.0 * tensordict["observation"], "next": {"previous_option": following}})


def test_evaluated_options_begin_with_the_episode_and_are_carried():
    space = gym.spaces.Box(-1, 1, (2,))
    normalization = RunningNormalization(space, observation=True, reward=False, clip=10.0, gamma=0.9)
    normalization.statistics["observation"].mean = np.array([1.0, 2.0])
    spy = Spy()
    policy = dac.NormalizedOptions(spy, normalization)
    carried = TensorDict({}, [3])
    for _ in range(3):
        observation = torch.tensor([[1.5, 2.0]]).expand(3, 2)
        td = policy(carried.set("observation", observation.clone()))
        torch.testing.assert_close(td["observation"], observation)
        torch.testing.assert_close(td["action"], torch.tensor([[4.5, 0.0]]).expand(3, 2))
        carried = td["next"]
    assert [seen["is_init"].all().item() for seen in spy.seen] == [True, False, False]
    assert [seen["is_init"].any().item() for seen in spy.seen] == [True, False, False]
    assert [seen["previous_option"].unique().tolist() for seen in spy.seen] == [[0], [1], [2]]
    torch.testing.assert_close(spy.seen[0]["observation"], torch.tensor([[0.5, 0.0]]).expand(3, 2))


def test_drawn_options_act_on_their_centres():
    cfg = resolve("env=Pendulum-v1", "device=cpu")
    agent = dac.build_agent(cfg)
    policy = dac.NormalizedOptions(dac.MeanOfDrawnOption(agent.actor), agent.normalization)
    with torch.no_grad():
        agent.actor.network.module.experts.bias.copy_(torch.tensor([-1.5, -0.5, 0.5, 1.5]))
        agent.actor.network.module.experts.weight.zero_()
        td = policy(TensorDict({"observation": torch.randn(400, 3)}, [400]))
    assert td["action"].unique().tolist() == [-1.5, -0.5, 0.5, 1.5]
    agent.env.close()


def test_networks_are_those_of_the_mixture():
    """As many parameters as ``K`` experts, and a linear termination for each option."""
    spec = Unbounded((6,))
    options = dac.build_actor(resolve("device=cpu"), spec, 17)
    experts = ppo_pmoe.build_actor(recipe_runs.resolve(ppo_pmoe, "device=cpu", "num_experts=4"), spec, 17)
    ours, theirs = (sum(p.numel() for p in actor.parameters()) for actor in (options, experts))
    assert ours == theirs + 4 * (17 + 1)
