"""The SAC recipe as a user starts it."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import recipe_runs
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from recipe_runs import assert_one_line, assert_only_a_progress_bar, assert_refused, common, rows, timeless_rows

import sac_pmoe  # isort: skip

start = partial(recipe_runs.start, "sac_pmoe")
resolve = partial(recipe_runs.resolve, sac_pmoe)

SMALL = [
    "env=Pendulum-v1",
    "total_frames=400",
    "network.hidden_sizes=[16,16]",
    "optim.batch_size=16",
    "collector.init_random_frames=100",
    "logger.eval_interval=200",
    "logger.eval_episodes=2",
    "checkpoint.interval=200",
]


@pytest.fixture(scope="module")
def pmoe_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    directory = tmp_path_factory.mktemp("pmoe")
    return directory / "run", start(*SMALL, "num_experts=3", "hydra.run.dir=run", directory=directory)


def test_run_ends_well_and_prints_a_progress_bar_alone(pmoe_run):
    _, done = pmoe_run
    bars = assert_only_a_progress_bar(done)
    assert "return=" in bars[-1]
    assert "routing entropy=" in bars[-1]


def test_run_directory_holds_config_metrics_checkpoints_and_plot(pmoe_run):
    run, _ = pmoe_run
    config = OmegaConf.load(run / "config.yaml")
    assert config.num_experts == 3
    assert config.collector.frames_per_batch == 1
    assert None not in (config.scoring, config.routing, config.backprop, config.score, config.acting, config.device)
    assert (run / "learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert any((run / "checkpoints").iterdir())
    table = rows(run)
    assert [row["frames"] for row in table] == ["200", "400"]
    for row in table:
        assert sum(float(row[f"usage_{k}"]) for k in range(3)) == pytest.approx(1.0, abs=1e-4)
        for name in ("return_mean", "return_std", "loss_actor", "loss_qvalue", "loss_alpha", "loss_routing", "alpha",
                     "effective_experts", "effective_experts_per_state", "mutual_information", "dead_fraction",
                     "proposal_margin", "saturation"):  # fmt: skip
            assert row[name] != "", name


def test_same_seed_gives_the_same_metrics(pmoe_run, tmp_path):
    run, _ = pmoe_run
    start(*SMALL, "num_experts=3", "hydra.run.dir=run", directory=tmp_path)
    assert timeless_rows(run) == timeless_rows(tmp_path / "run")


@pytest.mark.parametrize(
    "args",
    [
        ["policy=gaussian"],
        ["scoring=gradient", "routing=soft_frequency"],
        ["preset=paper"],
        ["acting=best_of_experts", "backprop=weighted", "routing=soft_frequency", "loss.num_proposals=2"],
        ["routing=marginal", "backprop=all", "replay_buffer.scratch_dir=scratch", "collector.env_per_collector=2",
         "collector.frames_per_batch=20"],
    ],
    ids=lambda args: args[0],
)  # fmt: skip
def test_every_kind_of_run_ends_well(args, tmp_path):
    done = start(*SMALL, "hydra.run.dir=run", *args, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["frames"] for row in rows(tmp_path / "run")] == ["200", "400"]


def test_batches_default_to_one_step_of_every_environment():
    assert resolve("collector.env_per_collector=3").collector.frames_per_batch == 3


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("num_experts=0", "an integer >= 1"),
        ("num_experts=two", "an integer >= 1"),
        ("total_frames=-1", "an integer >= 1"),
        ("seed=-1", "an integer >= 0"),
        ("policy=foo", "one of pmoe, gaussian"),
        ("scoring=foo", "one of critic, gradient"),
        ("routing=foo", "one of frequency, soft_frequency, marginal, none"),
        ("backprop=foo", "one of max, all, routed, weighted"),
        ("score=foo", "one of mixture, expert"),
        ("preset=foo", "one of paper"),
        ("device=foo", "a device of this machine"),
        ("device=cuda:97", "a device of this machine"),
        ("network.hidden_sizes=[0]", "a list of integers >= 1"),
        ("optim.batch_size=0", "an integer >= 1"),
        ("optim.lr=-1", "a number > 0"),
        ("logger.eval_interval=0", "an integer >= 1"),
        ("loss.routing_loss=foo", "one of brier, log"),
        ("optim.utd_ratio=0.5", "a whole number of steps per batch"),
    ],
)
def test_bad_value_is_named_with_what_is_allowed(override, allowed):
    assert_refused(sac_pmoe, override, allowed)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["scoring=gradient", "backprop=max"], "backprop"),
        (["scoring=gradient", "routing=marginal"], "routing"),
        (["scoring=gradient", "loss.num_proposals=2"], "loss.num_proposals"),
        (["scoring=gradient", "loss.routing_loss=log"], "loss.routing_loss"),
        (["policy=gaussian", "acting=best_of_experts"], "acting"),
        (["policy=gaussian", "preset=paper"], "preset"),
        (["preset=paper", "score=mixture"], "score"),
    ],
)
def test_combination_that_does_not_exist_is_refused(overrides, key):
    with pytest.raises(common.UsageError, match=f"^{re.escape(key)}="):
        resolve(*overrides)


def test_unknown_key_is_refused_by_hydra_before_anything_else():
    with pytest.raises(ConfigCompositionException, match="total_frmaes"):
        resolve("total_frmaes=10")


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ("NoSuchEnv-v0", "id of an installed Gymnasium environment"),
        ("CartPole-v1", "continuous actions"),
        ("recipe_envs:Pixels-v0", "Box vector of observations"),
        ("recipe_envs:Unbounded-v0", "bounded actions"),
    ],
)
def test_environment_that_cannot_be_run_is_refused(env, why, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(common.UsageError, match=why) as error:
        common.make_gym(env)
    assert str(error.value).startswith(f"env={env}: must be ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args", [["policy=foo"], ["total_frmaes=10"], ["env=CartPole-v1"], ["device=cuda:97"]], ids=lambda args: args[0]
)
def test_bad_input_ends_in_one_line_with_status_2_and_leaves_nothing(args, tmp_path):
    done = start(*args, directory=tmp_path)
    assert_one_line(done, f"{args[0]}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("env", ["Walker2d-v4", "HalfCheetah-v4"])
def test_the_readmes_tasks_can_be_made_in_this_environment(env):
    """Gymnasium's MuJoCo tasks import packages that Gymnasium itself does not require."""
    common.make_gym(env).close()


@pytest.mark.parametrize("what", ["Reward", "Observation"])
def test_nan_from_the_environment_stops_the_run_and_leaves_the_checkpoint_whole(what, tmp_path):
    env = f"env=recipe_envs:Nan{what}-v0"
    done = start(*SMALL, env, "total_frames=10_000", "hydra.run.dir=run", directory=tmp_path)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert f"NaN or infinite next.{what.lower()}" in message
    assert "Traceback" not in done.stderr
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints
    # the environment goes bad at frame 330: the last checkpoint is the one of frame 200
    assert any("200" in path.name for path in checkpoints)
