"""The target-reaching recipe as a user starts it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import recipe_runs
import torch
from recipe_runs import RECIPES, UsageError, assert_one_line

from torchrl_pmoe.envs import BatchedTargetReachingEnv
from torchrl_pmoe.envs.making import make_gym_env
from torchrl_pmoe.runs import RunDirectory
from torchrl_pmoe.runs.acting import Acted

sys.path.insert(0, str(RECIPES / "benchmarks"))

import matched_routes  # isort: skip
import target_reaching  # isort: skip
from config.sac_pmoe import DEFAULTS, PAPER, SACConfig, refuse_target_entropy  # isort: skip
from parts import route_episodes, routes_report  # isort: skip
from parts.resume import open_run  # isort: skip

start = partial(recipe_runs.start, "target_reaching")

SMALL = [
    "total_frames=480",
    "exploration_frames=400",
    "episodes=12",
    "num_experts=3",
    "network.hidden_sizes=[16,16]",
    "optim.batch_size=16",
    "collector.init_random_frames=200",
    "logger.eval_interval=240",
    "logger.eval_episodes=2",
    "hydra.run.dir=run",
]
PICTURES = ["trajectories", "experts", "exploration", "learning_curves", "routes"]


def configs(*overrides: str) -> dict[str, SACConfig]:
    """The config of every training, after what the recipe looks at before the first."""
    cfg = recipe_runs.composed(target_reaching, *overrides)
    found = target_reaching.resolve(cfg)
    refuse_target_entropy(cfg, target_reaching.make_task(cfg, 1).action_spec.shape[-1])
    return found


@pytest.fixture(scope="module")
def two_policies(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    directory = tmp_path_factory.mktemp("reach")
    args = [*SMALL, "policies=[gaussian,pmoe_soft]", "num_seeds=2", "num_workers=2"]
    return directory / "run", start(*args, directory=directory)


def test_run_leaves_tables_and_pictures(two_policies):
    run, done = two_policies
    assert done.returncode == 0, done.stderr
    assert "| gaussian |" in done.stdout
    for name in PICTURES:
        assert (run / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    data = pd.read_csv(run / "routes.csv")
    kinds = {(policy, kind): len(part) for (policy, kind), part in data.groupby(["policy", "kind"])}
    assert kinds == {
        ("gaussian", "stochastic"): 2,
        ("gaussian", "deterministic"): 2,
        ("pmoe_soft", "stochastic"): 2,
        ("pmoe_soft", "deterministic"): 2,
        ("pmoe_soft", "drawn"): 2,
    }
    assert data["success"].between(0, 1).all()
    assert np.isfinite(data["entropy"]).all()


def test_every_policy_warms_up_with_the_same_random_actions_and_every_seed_with_others(two_policies):
    run, _ = two_policies

    def warm_up(name: str) -> np.ndarray:
        return np.load(run / name / "episodes.npz")["visited"][:200]

    np.testing.assert_array_equal(warm_up("gaussian-seed0"), warm_up("pmoe_soft-seed0"))
    assert (warm_up("gaussian-seed0") != warm_up("gaussian-seed1")).any()


def test_episodes_follow_the_dynamics_and_name_their_experts(two_policies):
    run, _ = two_policies
    record = np.load(run / "pmoe_soft-seed0" / "episodes.npz")
    path, expert = record["stochastic_path"], record["stochastic_expert"]
    steps = np.abs(np.diff(path, axis=1))
    assert np.nanmax(steps) <= 0.1 + 1e-6
    assert ((expert >= 0) == ~np.isnan(path[:, 1:, 0])).all()
    assert set(np.unique(expert)) <= {-1, 0, 1, 2}
    for k in range(3):
        alone = record[f"alone{k}_expert"]
        assert set(np.unique(alone[alone >= 0])) == {k}


def test_a_second_start_trains_nothing_again_and_adds_what_is_asked(two_policies):
    run, _ = two_policies
    before = {path: path.stat().st_mtime_ns for path in run.glob("*/episodes.npz")}
    args = [*SMALL, "policies=[gaussian,pmoe_soft,mcp]", "num_seeds=1"]
    done = start(*args, directory=run.parent)
    assert done.returncode == 0, done.stderr
    assert "mcp-seed0" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (run / "mcp-seed0" / "episodes.npz").is_file()


def test_another_config_in_the_same_folder_is_refused(two_policies):
    run, _ = two_policies
    done = start(*SMALL, "policies=[gaussian]", "optim.lr=0.1", directory=run.parent)
    assert_one_line(done, "optim.lr=0.1: must be 0.001 in ")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("episodes=20", "episodes=20: must be 12 in "),
        ("exploration_frames=480", "exploration_frames=480: must be 400 in "),
    ],
)
def test_other_records_in_the_same_folder_are_refused(two_policies, override, line):
    run, _ = two_policies
    cfg = configs(*SMALL[:-1], "policies=[gaussian]", override)["gaussian-seed0"]
    asked = {"episodes": 12, "exploration_frames": 400} | {key: int(value) for key, value in [override.split("=")]}
    with pytest.raises(UsageError) as error:
        target_reaching.finished(cfg, run / "gaussian-seed0", **asked)
    assert str(error.value).startswith(line)


def test_entropy_is_that_of_agents_still_on_their_way():
    env = BatchedTargetReachingEnv(2)

    def act(states):
        # straight up, then over the disc and down into the target: the agents arrive, log-densities say when
        x, y = states["observation"][:, :1], states["observation"][:, 1:2]
        up, right = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        action = torch.where((y < 0.5) & (x < 0), up, torch.where(x < 0.7, right, -up))
        return Acted(states.set("action", action), torch.zeros(len(x), dtype=torch.int64), None)

    actor = SimpleNamespace(get_dist=lambda states: SimpleNamespace(log_prob=lambda action: 2.0 + 0 * action[:, 0]))
    found = route_episodes.roll(env, actor, act, seed=0)
    assert found["success"].all()
    steps = (found["expert"] >= 0).sum(1)
    assert (np.isfinite(found["log_prob"]).sum(1) == steps).all()
    assert np.nanmean(found["log_prob"]) == 2.0
    assert steps.max() < 40


def test_routes_start_where_the_task_says_even_if_training_starts_anywhere(tmp_path):
    short = ["total_frames=80", "exploration_frames=80", "collector.init_random_frames=40", "optim.batch_size=8"]
    asked = ["logger.eval_interval=80", "logger.eval_episodes=1", "network.hidden_sizes=[8]", "device=cpu"]
    cfg = configs("policies=[gaussian]", "env_kwargs.start=random", *short, *asked)["gaussian-seed0"]
    cfg.logger.progress_bar = False
    target_reaching.train(cfg, tmp_path / "run", 12, 80)
    with np.load(tmp_path / "run" / "episodes.npz") as recorded:
        path, visited = recorded["stochastic_path"], recorded["visited"]
    assert len(path) == 12
    assert (path[:, 0] == path[0, 0]).all()
    # a step is 0.1: the first places of the eight environments are of other starts
    assert np.abs(visited[:8] - path[0, 0]).max() > 0.2
    assert cfg.env_kwargs["start"] == "random"


def test_when_a_passage_closes_the_policy_is_tried_and_trained_on(tmp_path):
    short = ["total_frames=160", "exploration_frames=80", "collector.init_random_frames=40", "optim.batch_size=8"]
    asked = ["logger.eval_interval=80", "logger.eval_episodes=1", "network.hidden_sizes=[8]", "device=cpu"]
    cfg = recipe_runs.composed(
        target_reaching, "policies=[pmoe]", "episodes=12", "blocked=lower", "blocked_frames=80", *short, *asked,
        "checkpoint.interval=80", "replay_buffer.size=500", "logger.progress_bar=false", "num_experts=2",
    )  # fmt: skip
    resolved = target_reaching.resolve(cfg)
    ((name, run),) = resolved.items()
    target_reaching.train_all(cfg, resolved, tmp_path)
    directory = tmp_path / name / "lower_closed_80"
    rows = pd.read_csv(directory / "success.csv")
    assert rows["when"].unique().tolist() == ["before", "closed", "trained on"]
    with np.load(tmp_path / name / "episodes.npz") as record:
        for kind in ("stochastic", "deterministic", "drawn"):
            (before,) = rows.loc[(rows["when"] == "before") & (rows["kind"] == kind), "success"]
            assert before == record[f"{kind}_success"].mean()
    # the training itself stays as it was; its successor has its frames, and 80 in the task with the passage closed
    assert RunDirectory(tmp_path / name).checkpoints()[0].name == "checkpoint-000000000160"
    config, checkpoint = open_run(directory)
    assert checkpoint.name == "checkpoint-000000000240"
    assert config["env_kwargs"]["blocked"] == "lower"
    assert "blocked" not in run.env_kwargs
    assert pd.read_csv(directory / "metrics.csv")["frames"].tolist() == [240]
    assert target_reaching.unfinished(cfg, resolved, tmp_path) == {}
    (directory / "success.csv").unlink()
    assert list(target_reaching.unfinished(cfg, resolved, tmp_path)) == [name]
    shutil.rmtree(tmp_path / name / RunDirectory.CHECKPOINTS)
    with pytest.raises(UsageError, match=r"blocked=lower: must be null in .* has no checkpoint to go on from"):
        target_reaching.unfinished(cfg, resolved, tmp_path)


def test_the_table_of_a_closing_has_the_means_over_seeds(tmp_path):
    for seed, rates in enumerate([(1.0, 0.0, 0.5), (1.0, 0.5, 1.0)]):
        (tmp_path / str(seed)).mkdir()
        rows = {"when": ["before", "closed", "trained on"], "kind": "stochastic", "success": rates}
        pd.DataFrame(rows).to_csv(tmp_path / str(seed) / "success.csv", index=False)
    text = routes_report.report_closing(tmp_path, {f"pmoe-seed{seed}": tmp_path / str(seed) for seed in (0, 1)})
    header, _, row = text.splitlines()
    assert header == "| success | kind | before | closed | trained on |"
    cells = [cell.split("[")[0].strip() for cell in row.split("|")[1:-1]]
    assert cells == ["pmoe", "stochastic", "1.00", "0.25", "0.75"]
    assert len(pd.read_csv(tmp_path / "closing.csv")) == 6


def test_an_episode_that_ends_in_the_bait_or_in_a_crash_is_no_success():
    class Actor:
        def get_dist(self, states):
            return SimpleNamespace(log_prob=lambda action: 0 * action[:, 0])

    def act(states):
        action = torch.full((len(states), 2), -1.0) * torch.tensor([1.0, 0.0])
        return Acted(states.set("action", action), None, None)

    for layout in ("deceptive", "paper"):
        found = route_episodes.roll(BatchedTargetReachingEnv(3, layout), Actor(), act, seed=0)
        assert not found["success"].any()
        # to the left, into the bait or the wall
        assert found["path"].shape[1] - 1 == {"deceptive": 2, "paper": 10}[layout]


def test_the_authors_arena_has_its_own_reward_and_length_on_both_sides():
    (cfg,) = configs("policies=[gaussian]", "env_kwargs.layout=paper").values()
    assert cfg.env_kwargs == {"layout": "paper", "start": "fixed", "reward": "paper", "max_episode_steps": 200}
    env = target_reaching.make_task(cfg, 2)
    assert (env.task.reward, env.max_episode_steps) == ("paper", 200)
    assert make_gym_env(cfg.env, cfg.env_kwargs).observation_space.shape == (6,)


@pytest.mark.parametrize(("layout", "reward"), [("one", "dense"), ("deceptive", "sparse"), ("paper", "paper")])
def test_a_reward_that_is_not_asked_for_has_its_name_in_the_config(layout, reward):
    for kwargs in ({"layout": layout, "reward": None}, {"layout": layout}):
        cfg = recipe_runs.composed(target_reaching, "policies=[gaussian]")
        cfg.env_kwargs = kwargs
        (run,) = target_reaching.resolve(cfg).values()
        assert (cfg.env_kwargs["reward"], run.env_kwargs["reward"]) == (reward, reward)


def test_a_passage_that_cannot_be_closed_is_refused_before_any_training(tmp_path):
    cfg = recipe_runs.composed(target_reaching, "blocked=upper", "+env_kwargs.starts=[[0.0,0.6]]")
    with pytest.raises(UsageError, match=r"^blocked=upper: TargetReachingTask: starts must lie outside"):
        target_reaching.experiment(cfg, tmp_path)
    assert not list(tmp_path.iterdir())


def test_each_policy_is_what_its_name_says():
    names = "gaussian,gating,mcp,pmoe_all,pmoe_max,pmoe,pmoe_decoupled,pmoe_paper,pmoe_soft"
    runs = configs(f"policies=[{names}]", "num_seeds=2", "seed=5")
    assert len(runs) == 18
    found = {name: (cfg.policy, cfg.routing, cfg.backprop, cfg.score) for name, cfg in runs.items() if "seed5" in name}
    assert found == {
        "gaussian-seed5": ("gaussian", None, None, None),
        "gating-seed5": ("gating", None, None, None),
        "mcp-seed5": ("mcp", None, None, None),
        "pmoe_all-seed5": ("pmoe", "frequency", "all", "mixture"),
        "pmoe_max-seed5": ("pmoe", "frequency", "max", "mixture"),
        "pmoe-seed5": ("pmoe", *(DEFAULTS[key] for key in ("routing", "backprop", "score"))),
        "pmoe_decoupled-seed5": ("pmoe", *(DEFAULTS[key] for key in ("routing", "backprop", "score"))),
        "pmoe_paper-seed5": ("pmoe", *(PAPER[key] for key in ("routing", "backprop", "score"))),
        "pmoe_soft-seed5": ("pmoe", "soft_frequency", "weighted", "mixture"),
    }
    assert {name for name, cfg in runs.items() if cfg.loss.decoupled} == {
        "pmoe_decoupled-seed5",
        "pmoe_decoupled-seed6",
    }
    assert {name for name, cfg in runs.items() if cfg.loss.entropy_from == "winner"} == {
        "pmoe_paper-seed5", "pmoe_paper-seed6",
    }  # fmt: skip
    assert {cfg.seed for cfg in runs.values()} == {5, 6}
    assert {cfg.env_kwargs["layout"] for cfg in runs.values()} == {"one"}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("policies=[gaussian,bang]", "policies=['gaussian', 'bang']: must be a list of gaussian, "),
        ("policies=[pmoe,pmoe]", "policies=['pmoe', 'pmoe']: must be a list of "),
        ("policy=gating", "policy=gating: must be named in policies"),
        ("routing=marginal", "routing=marginal: must be null, each of policies has its own"),
        ("loss.decoupled=true", "loss.decoupled=True: must be false, that is what pmoe_decoupled of policies has"),
        ("env=Pendulum-v1", "env=Pendulum-v1: must be one of PMOE/TargetReaching-v0"),
        ("env_kwargs.layout=five", "env_kwargs: TargetReachingTask: layout"),
        ("+env_kwargs.bang=1", "env_kwargs: "),
        ("exploration_frames=30000", "exploration_frames=30000: must be at most total_frames=20000"),
        ("replay_buffer.size=20000", "replay_buffer.size=20000: must be above total_frames=20000"),
        ("loss.temperature=0.5", "loss.temperature=0.5: must be 1 with routing="),
        ("env_kwargs.reward=5", "env_kwargs: TargetReachingTask: reward"),
        ("+env_kwargs.max_step=a", "env_kwargs: TargetReachingTask: max_step must be a finite number"),
        ("collector.num_envs=7", "collector.num_envs=7: must be a divisor of exploration_frames"),
        ("num_workers=0", "num_workers=0: must be an integer >= 1"),
        ("blocked=upper_middle", "blocked=upper_middle: must be null or one of upper, lower with layout=one"),
        ("env_kwargs.layout=five blocked=upper", "env_kwargs: TargetReachingTask: layout"),
        (
            "blocked=upper +env_kwargs.blocked=lower",
            "blocked=upper: must be null with env_kwargs.blocked, a passage that never opens",
        ),
        ("blocked_frames=0", "blocked_frames=0: must be an integer >= 1"),
        (
            "+env_kwargs.blocked=left",
            "env_kwargs: TargetReachingTask: blocked='left' is unknown; allowed: upper, lower",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(override, line):
    with pytest.raises(UsageError) as error:
        configs(*override.split())
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_cells_count_each_square_once():
    visited = np.array([[-1.0, -1.0], [-0.99, -0.99], [0.99, 0.99], [1.0, 1.0], [-1.0, -1.0], [0.05, 0.05]])
    assert routes_report.cells_over_frames(visited).tolist() == [1, 1, 2, 2, 2, 3]


def test_routes_are_counted_over_successful_episodes_alone():
    task = BatchedTargetReachingEnv(1).task
    above = np.array([[-0.8, 0.0], [-0.4, 0.6], [0.4, 0.6], [0.8, 0.05]])
    below = above * [1, -1]
    lost = np.array([[-0.8, 0.0], [-0.9, 0.0], [-0.9, 0.5], [-0.9, -0.5]])
    record = {
        "stochastic_path": np.stack([above, below, above, below, lost, lost]),
        "stochastic_success": np.array([True, True, True, True, False, False]),
        "stochastic_start": np.zeros(6, dtype=int),
    }
    row = routes_report.route_row(record, "stochastic", task)
    assert row == {"success": pytest.approx(4 / 6), "routes": 2.0, "effective_routes": pytest.approx(2.0)}
    record["stochastic_success"][:] = False
    assert routes_report.route_row(record, "stochastic", task) == {
        "success": 0.0, "routes": 0.0, "effective_routes": 0.0,
    }  # fmt: skip


def test_each_policy_is_matched_with_the_gaussian_of_the_nearest_entropy(tmp_path):
    def file(name: str, **entropies: float) -> Path:
        rows = [
            {"policy": policy, "seed": seed, "kind": "stochastic", "success": 1.0, "entropy": entropy + 0.01 * seed,
             "effective_routes": 2.0 if policy == "pmoe" else entropy}
            for policy, entropy in entropies.items() for seed in range(4)
        ]  # fmt: skip
        pd.DataFrame(rows).to_csv(tmp_path / name, index=False)
        return tmp_path / name

    for name in "abc":
        (tmp_path / name).mkdir()
    # every run calls its file the same
    files = [
        file("a/routes.csv", gaussian=0.2, pmoe=1.0),
        file("b/routes.csv", gaussian=0.9, gating=0.9),
        file("c/routes.csv", gaussian=-2),
    ]
    text = matched_routes.main([*map(str, files), "--out", str(tmp_path / "x.png")])
    (row,) = [line for line in text.splitlines() if line.startswith("| pmoe")]
    assert "gating" not in text
    assert row.split("|")[5].startswith(" 0.9")
    assert row.split("|")[8].strip() == "1.00 [1.00, 1.00]"
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
