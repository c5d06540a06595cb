"""The PPO recipe as a user starts it."""

from __future__ import annotations

import re
import shutil
from functools import partial

import pytest
import recipe_runs
import torch
from omegaconf import OmegaConf
from recipe_runs import (
    UsageError,
    assert_a_line_and_a_progress_bar,
    assert_one_line,
    assert_refused,
    rows,
    timeless_rows,
)
from torchrl.data import Bounded

from torchrl_pmoe.envs import NormalizeObservationAndReward, make_env

import ppo_pmoe  # isort: skip
from parts.on_policy import NORMALIZATION, build_schedule, rescale  # isort: skip
from parts.resume import load_components, open_run  # isort: skip

start = partial(recipe_runs.start, "ppo_pmoe")
resolve = partial(recipe_runs.resolve, ppo_pmoe)

SMALL = recipe_runs.SMALL_PPO
MIXTURE_COLUMNS = ("return_mean", "return_std", "loss_objective", "loss_critic", "explained_variance", "clip_fraction",
                   "kl_approx", "train_return", "entropy", "effective_experts", "effective_experts_per_state",
                   "mutual_information", "dead_fraction", "saturation")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ppo")
    done = start(*SMALL, "num_experts=3", "scoring=critic", "hydra.run.dir=run", directory=directory)
    return directory / "run", done


def test_run_ends_well_and_prints_what_is_trained_and_progress_bars(run):
    # trunk 64 + 272, locs 17 * 3, scales 3, router 4 * 3
    assert recipe_runs.about_line(run[1].stdout) == (
        "Pendulum-v1: policy pmoe of 3 experts, 402 parameters (12 of them the router's); "
        "1 environment, collector.backend=serial, compile.enabled=false"
    )
    bars = assert_a_line_and_a_progress_bar(run[1])
    assert "return=" in bars[-1]
    assert "routing entropy=" in bars[-1]


def test_run_directory_holds_config_metrics_checkpoints_and_plot(run):
    directory, _ = run
    config = OmegaConf.load(directory / "config.yaml")
    assert config.num_experts == 3
    assert (config.collector.backend, config.compile.enabled) == ("serial", False)
    assert config.resume is None
    assert None not in (config.scoring, config.routing, config.device, config.logger.eval_expert)
    assert (directory / "learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = rows(directory)
    assert [row["frames"] for row in table] == ["256", "512"]
    for row in table:
        assert sum(float(row[f"usage_{k}"]) for k in range(3)) == pytest.approx(1.0, abs=1e-4)
        for name in (*MIXTURE_COLUMNS, "loss_routing", "loss_qvalue"):
            assert row[name] != "", name


def test_same_seed_gives_the_same_metrics(run, tmp_path):
    start(*SMALL, "num_experts=3", "scoring=critic", "hydra.run.dir=run", directory=tmp_path)
    assert timeless_rows(run[0]) == timeless_rows(tmp_path / "run")


@pytest.mark.parametrize(
    "args",
    [
        ["policy=gaussian"],
        ["policy=gaussian", "actions=bounded", "optim.anneal_lr=false", "loss.clip_value=false"],
        ["scoring=responsibility", "actions=bounded", "loss.entropy_coeff=0.01", "network.router=detached"],
        ["scoring=frequency", "optim.router_lr=1e-3", "collector.num_envs=2", "normalization.reward=false"],
        ["preset=paper"],
        ["scoring=critic", "routing=soft_frequency", "loss.entropy_coeff=0.01", "loss.num_proposals=2",
         "normalization.observation=false"],
    ],
    ids=lambda args: "-".join(args[:2]),
)  # fmt: skip
def test_every_kind_of_run_ends_well(args, tmp_path):
    done = start(*SMALL, "hydra.run.dir=run", *args, directory=tmp_path)
    assert_a_line_and_a_progress_bar(done)
    assert [row["frames"] for row in rows(tmp_path / "run")] == ["256", "512"]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["policy=gating"], "gating of 4 experts, 424 parameters (16 of them the router's)"),
        (["policy=gating", "blend=actions", "actions=bounded", "network.router=shared", "optim.router_lr=1e-3"],
         "gating of 4 experts, 476 parameters (68 of them the router's)"),
        (["policy=mcp", "actions=bounded"], "mcp of 4 experts, 424 parameters (16 of them the router's)"),
        (["policy=gaussian"], "gaussian, 354 parameters"),
        (["scoring=critic", "routing=score_function"],
         "pmoe of 4 experts, 424 parameters (16 of them the router's)"),
    ],
    ids=lambda x: "-".join(x[:2]) if isinstance(x, list) else "",
)  # fmt: skip
def test_every_rival_runs_and_says_how_large_it_is(args, line, tmp_path, capsys):
    tiny = ["total_frames=256", "logger.eval_interval=128", "logger.eval_episodes=1", "logger.eval_max_steps=20"]
    recipe_runs.run_here(ppo_pmoe, tmp_path, *SMALL, *tiny, *args)
    assert recipe_runs.about_line(capsys.readouterr().out) == (
        f"Pendulum-v1: policy {line}; 1 environment, collector.backend=serial, compile.enabled=false"
    )
    table = rows(tmp_path)
    assert [row["frames"] for row in table] == ["128", "256"]
    assert all(row["return_mean"] != "" and row["loss_objective"] != "" for row in table)
    assert (table[-1]["loss_routing"] != "") == ("routing=score_function" in args)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("scoring=foo", "one of responsibility, frequency, critic"),
        ("scoring=gradient", "one of responsibility, frequency, critic"),
        ("routing=foo", "one of frequency, soft_frequency, score_function, marginal, none"),
        ("routing=gumbel_softmax", "one of frequency, soft_frequency, score_function, marginal, none"),
        ("policy=foo", "one of pmoe, gaussian, gating, mcp"),
        ("blend=x", "one of parameters, actions"),
        ("routing=frequency", "null with scoring=responsibility"),
        ("actions=foo", "one of unbounded, bounded"),
        ("num_experts=0", "an integer >= 1"),
        ("collector.frames_per_batch=2000", "a multiple of"),
        ("loss.clip_epsilon=0", "a number > 0 and < 1"),
        ("loss.clip_epsilon=1", "a number > 0 and < 1"),
        ("loss.gae_lambda=1.5", "a number >= 0 and <= 1"),
        ("optim.max_grad_norm=-1", "a number > 0"),
        ("optim.qvalue_grad_clip=foo", "one of apart, together or null"),
        ("normalization.clip=0", "a number > 0"),
        ("network.router=foo", "one of linear, detached, shared, separate"),
    ],
)  # fmt: skip
def test_bad_value_is_named_with_what_is_allowed(override, allowed):
    assert_refused(ppo_pmoe, override, allowed)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["preset=paper", "actions=bounded"], "actions"),
        (["preset=paper", "scoring=frequency"], "scoring"),
        (["preset=paper", "policy=gaussian"], "preset"),
        (["preset=paper", "policy=gating"], "preset"),
        (["preset=paper", "policy=mcp"], "preset"),
        (["routing=score_function", "scoring=frequency"], "routing"),
        (["routing=soft_frequency", "scoring=critic"], "routing"),
        (["policy=gaussian", "optim.router_lr=1e-3"], "optim.router_lr"),
    ],
)
def test_combination_that_does_not_exist_is_refused(overrides, key):
    with pytest.raises(UsageError, match=f"^{re.escape(key)}="):
        resolve(*overrides)


def test_the_papers_number_of_experts_is_the_default():
    assert {env: resolve(f"env={env}-v4").num_experts for env in ("Ant", "Hopper", "Walker2d", "HalfCheetah")} == {
        "Ant": 16,
        "Hopper": 12,
        "Walker2d": 4,
        "HalfCheetah": 8,
    }
    assert resolve("env=Pendulum-v1").num_experts == 4


@pytest.mark.parametrize("actions", ["unbounded", "bounded"])
@pytest.mark.parametrize("policy", ["pmoe", "gaussian", "gating", "mcp"])
def test_every_policy_begins_orthogonal_with_small_heads_and_one_scale(policy, actions):
    spec = Bounded(-1, 1, (3,))
    cfg = resolve("device=cpu", f"policy={policy}", f"actions={actions}", "network.log_std_init=-0.7")
    actor, value, _ = ppo_pmoe.build_agent(cfg, spec, 5)
    weights = [parameter for parameter in actor.parameters() if parameter.ndim == 2]
    first, second, *heads = weights
    assert [tuple(weight.shape) for weight in (first, second)] == [(64, 5), (64, 64)]
    # sqrt(2) times an orthogonal matrix, in whichever of its sides is the shorter
    torch.testing.assert_close(first.t() @ first, 2 * torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(second.t() @ second, 2 * torch.eye(64), rtol=0, atol=1e-5)
    for head in heads:
        gain = cfg.network.head_gain**2
        torch.testing.assert_close(head @ head.t(), gain * torch.eye(len(head)), rtol=0, atol=1e-7)
    vectors = {name: parameter for name, parameter in actor.named_parameters() if parameter.ndim == 1}
    scales = [parameter for name, parameter in vectors.items() if "scale" in name]
    torch.testing.assert_close(scales, [torch.full_like(scales[0], -0.7)])
    assert not any(parameter.any() for name, parameter in vectors.items() if "bias" in name)
    last = [parameter for parameter in value.parameters() if parameter.ndim == 2][-1]
    torch.testing.assert_close(last @ last.t(), torch.eye(1), rtol=0, atol=1e-5)


def test_paper_preset_clips_the_qvalue_network_with_the_policy():
    assert resolve("preset=paper").optim.qvalue_grad_clip == "together"
    assert resolve("scoring=critic").optim.qvalue_grad_clip == "apart"


@pytest.mark.parametrize(
    ("args", "begins"),
    [
        (["loss.num_minibatches=7"], "collector.frames_per_batch=2048: must be a multiple of"),
        (["env=CartPole-v1"], "env=CartPole-v1: must be"),
        (["totl_frames=3"], "totl_frames=3: no such key"),
        (["resume=nowhere"], "resume=nowhere: must be the directory of a run"),
        (["resume=5"], "resume=5: must be the directory of a run"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_input_ends_in_one_line_with_status_2_and_leaves_nothing(args, begins, tmp_path):
    assert_one_line(start(*args, directory=tmp_path), begins)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["Reward", "Observation"])
def test_nan_from_the_environment_stops_the_run(what, tmp_path):
    env = f"env=recipe_envs:Nan{what}-v0"
    done = start(*SMALL, env, "total_frames=10_000", "hydra.run.dir=run", directory=tmp_path)
    assert done.returncode == 1
    assert re.search(rf"^error: .* NaN or infinite (next\.)?{what.lower()}", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ resume


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, run):
    directory = tmp_path_factory.mktemp("resume")
    shutil.copytree(run[0], directory / "run")
    before = rows(directory / "run")
    done = start("resume=run", "total_frames=1024", directory=directory)
    return directory, before, done


def test_a_resumed_run_goes_on_where_it_was(resumed):
    directory, before, done = resumed
    assert done.returncode == 0, done.stderr
    after = rows(directory / "run")
    assert after[:2] == before
    assert [row["frames"] for row in after] == ["256", "512", "768", "1024"]
    assert sorted(path.name for path in directory.iterdir()) == ["run"]


def test_a_refused_resume_leaves_the_run_as_it_was(resumed):
    config = (resumed[0] / "run" / "config.yaml").read_text()
    start("resume=run", "total_frames=256", "logger.eval_interval=77", directory=resumed[0])
    assert (resumed[0] / "run" / "config.yaml").read_text() == config


def test_a_run_may_be_called_by_a_number():
    """As the jobs of a sweep are."""
    assert recipe_runs.composed(ppo_pmoe, "resume=0").resume == "0"
    for wrong in ("resume=true", "resume=0.5", "resume=[a]"):
        with pytest.raises(UsageError, match=r"^resume=.*: must be the directory of a run"):
            recipe_runs.composed(ppo_pmoe, wrong)


def test_learning_rates_follow_the_new_number_of_frames():
    optimizers = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1) for _ in range(2)]
    first, second = (
        build_schedule(optimizer, batches, falling=True) for optimizer, batches in zip(optimizers, (4, 8), strict=True)
    )
    for _ in range(4):
        optimizers[0].step()
        first.step()
    assert first.get_last_lr() == [0.0]
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    second.load_state_dict(first.state_dict())
    rescale(second)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1 * 4 / 8)


def test_statistics_go_on_counting_after_a_resume(resumed):
    directory, _, _ = resumed
    statistics = NormalizeObservationAndReward()
    make_env("Pendulum-v1").append_transform(statistics)
    load_components(open_run(directory / "run")[1], {f"trainer_module.{NORMALIZATION}": statistics})
    # one more per reset: the start, and five ended episodes
    assert float(statistics.observations.count) == pytest.approx(1024 + 1 + 5, abs=0.5)
    assert float(statistics.returns.count) == pytest.approx(1024, abs=0.5)


@pytest.mark.parametrize(
    ("args", "begins"),
    [
        ([], "total_frames=1024: must be above the 1024 frames"),
        (["env=Hopper-v4"], "env=Hopper-v4: must be left out with resume=run"),
    ],
    ids=["finished", "other-env"],
)
def test_a_resume_that_makes_no_sense_is_one_line(args, begins, resumed):
    assert_one_line(start("resume=run", *args, directory=resumed[0]), begins)
