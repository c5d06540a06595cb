"""The SAC recipe as a user starts it."""

from __future__ import annotations

import math
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import recipe_runs
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from recipe_runs import assert_a_line_and_a_progress_bar, assert_one_line, assert_refused, rows, timeless_rows
from tensordict import TensorDict
from torchrl.objectives import SACLoss

from torchrl_pmoe import GatingActor, MCPActor, PMOEActor, PMOESACLoss
from torchrl_pmoe.envs import EnvironmentFault, make_env
from torchrl_pmoe.envs.making import make_gym_env

import sac_pmoe  # isort: skip
from config.sac_pmoe import PARTNERS, combination  # isort: skip
from parts.errors import UsageError  # isort: skip
from parts.off_policy import build_replay_buffer  # isort: skip

start = partial(recipe_runs.start, "sac_pmoe")
resolve = partial(recipe_runs.resolve, sac_pmoe)

SMALL = [
    "env=Pendulum-v1",
    "total_frames=240",
    "network.hidden_sizes=[16,16]",
    "optim.batch_size=16",
    "collector.init_random_frames=80",
    "logger.eval_interval=120",
    "logger.eval_episodes=2",
    "logger.eval_max_steps=40",
    "checkpoint.interval=120",
]


@pytest.fixture(scope="module")
def pmoe_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    directory = tmp_path_factory.mktemp("pmoe")
    return directory / "run", start(*SMALL, "num_experts=3", "hydra.run.dir=run", directory=directory)


def test_run_ends_well_and_prints_what_is_trained_and_a_progress_bar(pmoe_run):
    _, done = pmoe_run
    # trunk 64 + 272, experts 17 * 6, router 17 * 3; a critic 80 + 272 + 17
    assert recipe_runs.about_line(done.stdout) == (
        "Pendulum-v1: policy pmoe of 3 experts, 489 parameters (51 of them the router's); critics 738 parameters; "
        "scoring=critic routing=frequency backprop=max score=expert acting=policy loss.entropy_from=policy "
        "logger.eval_expert=largest; 1 environment, collector.backend=serial, compile.enabled=false"
    )
    bars = assert_a_line_and_a_progress_bar(done)
    assert "return=" in bars[-1]
    assert "routing entropy=" in bars[-1]


def test_run_directory_holds_config_metrics_checkpoints_and_plot(pmoe_run):
    run, _ = pmoe_run
    config = OmegaConf.load(run / "config.yaml")
    assert config.num_experts == 3
    assert (config.collector.backend, config.compile.enabled) == ("serial", False)
    assert config.collector.frames_per_batch == 1
    assert None not in (config.scoring, config.routing, config.backprop, config.score, config.acting, config.device)
    assert (run / "learning_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert any((run / "checkpoints").iterdir())
    table = rows(run)
    assert [row["frames"] for row in table] == ["120", "240"]
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
        ["routing=marginal", "backprop=all", "replay_buffer.scratch_dir=scratch", "collector.num_envs=2",
         "collector.frames_per_batch=20"],
    ],
    ids=lambda args: args[0],
)  # fmt: skip
def test_every_kind_of_run_ends_well(args, tmp_path):
    done = start(*SMALL, "hydra.run.dir=run", *args, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["frames"] for row in rows(tmp_path / "run")] == ["120", "240"]


TINY = [
    "env=Pendulum-v1",
    "total_frames=40",
    "network.hidden_sizes=[16,16]",
    "optim.batch_size=16",
    "collector.init_random_frames=20",
    "logger.eval_interval=20",
    "logger.eval_episodes=1",
    "logger.eval_max_steps=20",
    "checkpoint.interval=40",
]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["policy=gating"], "gating of 4 experts, 540 parameters (68 of them the router's)"),
        (["policy=gating", "blend=actions", "num_experts=1", "optim.router_lr=1e-3"],
         "gating of 1 experts, 387 parameters (17 of them the router's)"),
        (["policy=mcp", "network.router=separate"], "mcp of 4 experts, 876 parameters (404 of them the router's)"),
        (["policy=gaussian"], "gaussian, 370 parameters"),
        (["routing=gumbel_softmax"], "pmoe of 4 experts, 540 parameters (68 of them the router's)"),
        (["routing=gumbel_softmax", "loss.straight_through=false", "loss.temperature=0.5", "acting=best_of_experts"],
         "pmoe of 4 experts, 540 parameters (68 of them the router's)"),
        (["routing=score_function", "loss.num_proposals=2"],
         "pmoe of 4 experts, 540 parameters (68 of them the router's)"),
        (["loss.decoupled=true"], "pmoe of 4 experts, 540 parameters (68 of them the router's)"),
    ],
    ids=lambda x: "-".join(x[:2]) if isinstance(x, list) else "",
)  # fmt: skip
def test_every_rival_runs_and_says_how_large_it_is(args, line, tmp_path, capsys):
    recipe_runs.run_here(sac_pmoe, tmp_path, *TINY, *args)
    how = combination(resolve(*TINY, *args))
    assert recipe_runs.about_line(capsys.readouterr().out) == (
        f"Pendulum-v1: policy {line}; critics 738 parameters; {how + '; ' * bool(how)}"
        "1 environment, collector.backend=serial, compile.enabled=false"
    )
    table = rows(tmp_path)
    assert [row["frames"] for row in table] == ["20", "40"]
    assert table[-1]["return_mean"] != ""
    assert table[-1]["loss_actor"] != ""
    assert (table[-1]["loss_routing"] != "") == (args[0] in ("routing=score_function", "loss.decoupled=true"))


SPEC = make_env("Pendulum-v1").action_spec_unbatched


def built(*overrides):
    """What the recipe makes of a config: the actor and the loss."""
    cfg = resolve("env=Pendulum-v1", *overrides)
    return sac_pmoe.build_agent(cfg, SPEC, 3)


def test_a_policy_and_its_blend_are_those_of_that_name():
    kinds = {"gating": GatingActor, "mcp": MCPActor, "pmoe": PMOEActor}
    for policy, kind in kinds.items():
        blend = ["blend=actions"] if policy == "gating" else []
        actor, loss = built(f"policy={policy}", *blend, "num_experts=2")
        assert type(actor) is kind
        assert type(loss) is (PMOESACLoss if policy == "pmoe" else SACLoss)
        if policy == "gating":
            assert actor[0].module[-1].blend == "actions"


@pytest.mark.parametrize("policy", ["pmoe", "gating", "mcp"])
def test_the_router_reads_the_trunk_as_the_policy_needs_it_unless_said_otherwise(policy):
    expected = "detached" if policy == "pmoe" else "shared"
    assert built(f"policy={policy}")[0][0].module[0].reads == expected
    for router in ("detached", "shared", "separate"):
        assert built(f"policy={policy}", f"network.router={router}")[0][0].module[0].reads == router


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["routing=gumbel_softmax"], ("gradient", "gumbel_softmax", None, "mixture")),
        (["routing=gumbel_softmax", "score=expert"], ("gradient", "gumbel_softmax", None, "expert")),
        (["routing=score_function"], ("critic", "score_function", "routed", "mixture")),
        (["routing=soft_frequency"], ("critic", "soft_frequency", "weighted", "mixture")),
        (["routing=soft_frequency", "backprop=max"], ("critic", "soft_frequency", "max", "mixture")),
        (["routing=soft_frequency", "score=expert"], ("critic", "soft_frequency", "weighted", "expert")),
        (["routing=marginal"], ("critic", "marginal", "all", "mixture")),
        (["routing=none"], ("critic", "none", "weighted", "mixture")),
        (["routing=frequency"], ("critic", "frequency", "max", "expert")),
        (["scoring=gradient"], ("gradient", "frequency", None, "mixture")),
        (["scoring=gradient", "routing=soft_frequency"], ("gradient", "soft_frequency", None, "mixture")),
        (["preset=paper"], ("critic", "frequency", "max", "expert")),
        (["preset=default"], ("critic", "frequency", "max", "expert")),
        (["preset=diverse"], ("critic", "soft_frequency", "weighted", "mixture")),
        (["routing=score_function", "backprop=max", "score=expert"], ("critic", "score_function", "max", "expert")),
        (["policy=gating", "routing=score_function"], (None, None, None, None)),
        ([], ("critic", "frequency", "max", "expert")),
    ],
    ids=str,
)
def test_a_routing_brings_what_goes_with_it(overrides, expected):
    cfg = resolve(*overrides)
    assert (cfg.scoring, cfg.routing, cfg.backprop, cfg.score) == expected
    if None not in (cfg.backprop, cfg.score):
        actor, loss = built(*overrides)
        assert (loss.routing, loss.backprop, actor[-1].distribution_kwargs["score"]) == expected[1:]
    said = combination(cfg)
    names = zip(("scoring", "routing", "backprop", "score"), expected, strict=True)
    assert said.startswith(" ".join(f"{name}={value}" for name, value in names if value is not None))


@pytest.mark.parametrize("partners", PARTNERS.items(), ids=lambda found: "-".join(found[0]))
def test_a_config_with_the_partners_of_its_routing_written_out_is_the_same(partners):
    (scoring, routing), fills = partners
    given = [f"scoring={scoring}", f"routing={routing}"]
    written = [f"{key}={value}" for key, value in fills.items() if value is not None]
    assert resolve(*given) == resolve(*given, *written)


def test_decoupled_max_reaches_the_loss():
    assert [built(*given)[1].decoupled for given in ([], ["loss.decoupled=true"])] == [False, True]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "policy"),
        (["routing=marginal"], "policy"),
        (["preset=paper"], "winner"),
        (["loss.entropy_from=winner"], "winner"),
        (["scoring=gradient"], None),
        (["policy=gaussian", "loss.entropy_from=winner"], None),
    ],
    ids=str,
)
def test_the_temperature_sees_the_policy_but_in_the_authors_combination(overrides, expected):
    cfg = resolve(*overrides)
    assert cfg.loss.entropy_from == expected
    if cfg.scoring == "critic":
        assert built(*overrides)[1].entropy_from == expected


@pytest.mark.parametrize("policy", ["pmoe", "gaussian", "gating"])
def test_an_entropy_that_no_policy_reaches_is_refused(policy):
    # the largest is that of uniform actions
    largest = math.log((SPEC.space.high - SPEC.space.low).item())
    assert built(f"policy={policy}", f"optim.target_entropy={largest - 0.1}")[1].target_entropy.item() < largest
    with pytest.raises(UsageError, match=rf"^optim.target_entropy=9.0: must be auto or at most {largest:.4g}, "):
        built(f"policy={policy}", "optim.target_entropy=9")


def test_gumbel_softmax_reaches_the_distribution_with_its_options():
    options = ["loss.temperature=0.3", "loss.straight_through=false", "loss.routing_coef=2"]
    actor, loss = built("routing=gumbel_softmax", *options)
    dist = actor.get_dist(TensorDict(observation=torch.zeros(2, 3), batch_size=2))
    assert (dist.routing.value, dist.temperature, dist.straight_through) == ("gumbel_softmax", 0.3, False)
    assert (dist.score, dist.routing_coef) == ("mixture", 2.0)
    assert type(loss) is SACLoss


@pytest.mark.skipif(recipe_runs.HAS_EXTENSION, reason="TorchRL's extension loads")
def test_prioritised_replay_names_what_it_needs():
    with_this = re.escape(torch.__version__)
    line = rf"^replay_buffer\.prb=True: must be false with torch {with_this}, .*torchrl 0.*does not load"
    with pytest.raises(UsageError, match=line):
        build_replay_buffer(10, 2, prioritized=True)


def test_batches_default_to_one_step_of_every_environment():
    assert resolve("collector.num_envs=3").collector.frames_per_batch == 3


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("num_experts=0", "an integer >= 1"),
        ("num_experts=two", "an integer >= 1"),
        ("total_frames=-1", "an integer >= 1"),
        ("seed=-1", "an integer >= 0"),
        ("policy=foo", "one of pmoe, gaussian, gating, mcp"),
        ("blend=x", "one of parameters, actions"),
        ("loss.temperature=0", "a number > 0"),
        ("loss.straight_through=1", "true or false"),
        ("network.router=linear", "one of detached, shared, separate or null"),
        ("scoring=foo", "one of critic, gradient"),
        ("routing=foo", "one of frequency, soft_frequency, gumbel_softmax, score_function, marginal, none"),
        ("backprop=foo", "one of max, all, routed, weighted"),
        ("score=foo", "one of mixture, expert"),
        ("preset=foo", "one of default, paper, diverse or null"),
        ("device=foo", "a device of this machine"),
        ("device=cuda:97", "a device of this machine"),
        ("network.hidden_sizes=[0]", "a list of integers >= 1"),
        ("optim.batch_size=0", "an integer >= 1"),
        ("optim.lr=-1", "a number > 0"),
        ("logger.eval_interval=0", "an integer >= 1"),
        ("loss.routing_loss=foo", "one of brier, log"),
        ("loss.entropy_from=foo", "one of policy, winner or null"),
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
        (["scoring=gradient", "loss.entropy_from=policy"], "loss.entropy_from"),
        (["preset=paper", "loss.entropy_from=policy"], "loss.entropy_from"),
        (["policy=gaussian", "acting=best_of_experts"], "acting"),
        (["policy=gaussian", "preset=paper"], "preset"),
        (["preset=paper", "score=mixture"], "score"),
        (["preset=diverse", "backprop=max"], "backprop"),
        (["preset=paper", "routing=gumbel_softmax"], "routing"),
        (["routing=gumbel_softmax", "scoring=critic"], "routing"),
        (["routing=score_function", "scoring=gradient"], "routing"),
        (["routing=gumbel_softmax", "backprop=max"], "backprop"),
        (["routing=gumbel_softmax", "loss.straight_through=false", "score=expert"], "score"),
        (["loss.straight_through=false"], "loss.straight_through"),
        (["loss.temperature=0.5"], "loss.temperature"),
        (["loss.decoupled=true", "backprop=all"], "loss.decoupled"),
        (["loss.decoupled=true", "routing=marginal"], "loss.decoupled"),
        (["loss.decoupled=true", "scoring=gradient"], "loss.decoupled"),
        (["loss.decoupled=true", "preset=paper"], "loss.decoupled"),
        (["policy=mcp", "blend=actions"], "blend"),
        (["policy=gating", "preset=paper"], "preset"),
        (["policy=mcp", "preset=paper"], "preset"),
        (["policy=gating", "acting=best_of_experts"], "acting"),
        (["policy=mcp", "acting=best_of_experts"], "acting"),
        (["policy=mcp", "acting=committed"], "acting"),
        (["commit_steps=5"], "commit_steps"),
        (["acting=committed", "commit_steps=0"], "commit_steps"),
        (["acting=committed", "logger.eval_expert=drawn"], "logger.eval_expert"),
    ],
)
def test_combination_that_does_not_exist_is_refused(overrides, key):
    with pytest.raises(UsageError, match=rf"^{re.escape(key)}=.*: must be [^\n]*\Z"):
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
    with pytest.raises(EnvironmentFault, match=why) as error:
        make_gym_env(env)
    assert str(error.value).startswith(f"env={env}: must be ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args",
    [["policy=foo"], ["total_frmaes=10"], ["env=CartPole-v1"], ["device=cuda:97"],
     ["routing=gumbel_softmax", "scoring=critic"]],
    ids=lambda args: args[0],
)  # fmt: skip
def test_bad_input_ends_in_one_line_with_status_2_and_leaves_nothing(args, tmp_path):
    done = start(*args, directory=tmp_path)
    assert_one_line(done, f"{args[0]}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("env", ["Walker2d-v4", "HalfCheetah-v4"])
def test_the_readmes_tasks_can_be_made_in_this_environment(env):
    """Gymnasium's MuJoCo tasks import packages that Gymnasium itself does not require."""
    make_gym_env(env).close()


@pytest.mark.parametrize("what", ["Reward", "Observation"])
def test_nan_from_the_environment_stops_the_run_and_leaves_the_checkpoint_whole(what, tmp_path):
    env = f"env=recipe_envs:Nan{what}-v0"
    bounds = ["total_frames=10_000", "collector.init_random_frames=300", "hydra.run.dir=run"]
    done = start(*SMALL, env, *bounds, directory=tmp_path)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert f"NaN or infinite next.{what.lower()}" in message
    assert "Traceback" not in done.stderr
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints
    # the environment goes bad at frame 330: the last checkpoint is the one of frame 240
    assert any("240" in path.name for path in checkpoints)


@pytest.mark.parametrize("where", [".", "x/.."])
def test_a_refused_run_leaves_the_users_own_directory(where, tmp_path):
    (tmp_path / "empty").mkdir()
    done = start("num_experts=0", f"hydra.run.dir={where}", directory=tmp_path / "empty")
    assert_one_line(done, "num_experts=0: must be ")
    assert (tmp_path / "empty").is_dir()


def test_frames_are_collected_by_committed_experts(tmp_path, monkeypatch):
    steps_left = []
    build = sac_pmoe.build_collector

    def watched(env, explorer, **kwargs):
        collector = build(env, explorer, **kwargs)
        iterate = collector.iterator

        def iterator():
            for batch in iterate():
                steps_left.append(batch["steps_left"].flatten(1))  # [N, T]
                yield batch

        collector.iterator = iterator
        return collector

    monkeypatch.setattr(sac_pmoe, "build_collector", watched)
    where = ["collector.num_envs=2", "collector.init_random_frames=0", "+env_kwargs.max_episode_steps=6"]
    recipe_runs.run_here(sac_pmoe, tmp_path, *TINY, "acting=committed", "commit_steps=4", *where)
    found = torch.cat(steps_left, 1)[:, :12]
    # four steps, then the two that are left of an episode of six
    assert found.tolist() == [[3, 2, 1, 0, 3, 2] * 2] * 2
