"""The option recipe as a user starts it."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import recipe_runs
import torch
import yaml
from recipe_runs import assert_a_line_and_a_progress_bar, assert_one_line, assert_refused, rows, timeless_rows
from tensordict import TensorDict
from torchrl.data import Bounded

from torchrl_pmoe.runs import CarriedOptionPolicy

import dac  # isort: skip
import ppo_pmoe  # isort: skip
from config.typed import to_dict  # isort: skip

start = partial(recipe_runs.start, "dac")
resolve = partial(recipe_runs.resolve, dac)

SMALL = recipe_runs.SMALL_PPO
SPEC = Bounded(-torch.ones(6), torch.ones(6), (6,))
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
    assert recipe_runs.about_line(run[1].stdout).startswith("Pendulum-v1: policy dac of 3 options, ")


def test_run_directory_holds_config_metrics_checkpoints_and_plot(run):
    directory, _ = run
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["num_options"] == 3
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
    ours, theirs = (to_dict(recipe_runs.composed(recipe)) for recipe in (dac, ppo_pmoe))
    for group in ("network", "optim", "collector", "normalization", "loss", "logger", "checkpoint"):
        shared = ours[group].keys() & theirs[group].keys()
        assert shared
        assert {key: ours[group][key] for key in shared} == {key: theirs[group][key] for key in shared}


def test_drawn_options_act_on_their_centres():
    actor, _, _ = dac.build_agent(resolve("device=cpu"), SPEC, 3)
    policy = CarriedOptionPolicy(dac.MeanOfDrawnOption(actor))
    with torch.no_grad():
        centres = torch.tensor([-1.5, -0.5, 0.5, 1.5])
        actor.network.module.experts.bias.copy_(centres.repeat_interleave(6))
        actor.network.module.experts.weight.zero_()
        td = policy(TensorDict({"observation": torch.randn(400, 3)}, [400]))
    assert td["action"].unique().tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert (td["action"] == td["action"][:, :1]).all()


def test_networks_are_those_of_the_mixture():
    """As many parameters as ``K`` experts, and a linear termination for each option."""
    options, _, _ = dac.build_agent(resolve("device=cpu"), SPEC, 17)
    experts, _, _ = ppo_pmoe.build_agent(recipe_runs.resolve(ppo_pmoe, "device=cpu", "num_experts=4"), SPEC, 17)
    ours, theirs = (sum(p.numel() for p in actor.parameters()) for actor in (options, experts))
    assert ours == theirs + 4 * (17 + 1)
