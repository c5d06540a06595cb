"""Evaluating and watching a finished run, as a user does."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import recipe_runs
import torch
from recipe_runs import SMALL_PPO
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_pmoe import MeanOfDrawnExpertActor
from torchrl_pmoe.envs import MultiGoalEnv, MultiGoalTask
from torchrl_pmoe.runs import Episode, EpisodePlayer

import evaluate  # isort: skip
import ppo_pmoe  # isort: skip
import sac_many_seeds  # isort: skip
import sac_pmoe  # isort: skip
from parts import figures, video  # isort: skip

TINY_SAC = [
    "seed=3",
    "num_experts=3",
    "total_frames=60",
    "network.hidden_sizes=[8,8]",
    "network.head_init=1.0",
    "optim.batch_size=8",
    "collector.init_random_frames=20",
    "logger.eval_interval=60",
    "logger.eval_episodes=1",
    "logger.eval_max_steps=20",
    "checkpoint.interval=30",
]
TINY_PPO = [*SMALL_PPO, "seed=3", "total_frames=128", "logger.eval_max_steps=20", "network.head_gain=1.0"]
SEED = 3 + 4_000_000
STEPS = 20
Policy = Callable[[torch.Tensor], torch.Tensor]
draw = evaluate.draw
needs_ffmpeg = pytest.mark.skipif(find_spec("imageio_ffmpeg") is None, reason="no imageio-ffmpeg")


class Made(NamedTuple):
    """A run, and what its training left in memory."""

    run: Path
    agent: Any


def config(recipe: Any, *overrides: str) -> Any:
    return recipe_runs.resolve(recipe, "device=cpu", "logger.progress_bar=false", *overrides)


def train_and_keep(recipe: Any, run: Path, *overrides: str) -> list[Any]:
    """Train; the agents, as they are in memory."""
    agents: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        build, make = recipe.build_agent, getattr(recipe, "build_env", None)

        def build_agent(*given: Any) -> Any:
            built = build(*given)
            agents.append(SimpleNamespace(actor=built[0], loss=built[-1]))
            return built

        def build_env(cfg: Any) -> Any:
            normalizations.append(make(cfg))
            return normalizations[-1]

        normalizations: list[Any] = []
        patch.setattr(recipe, "build_agent", build_agent)
        if make is not None:
            patch.setattr(recipe, "build_env", build_env)
        recipe.train(config(recipe, *overrides), run)
    for agent, (_, normalization) in zip(agents, normalizations, strict=False):
        agent.normalization = normalization
    return agents


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[..., Made]:
    """Trains with a recipe and overrides, once."""
    made: dict[Any, Made] = {}

    def train(recipe: Any, *overrides: str) -> Made:
        if (recipe, overrides) not in made:
            run = tmp_path_factory.mktemp("run")
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                agents = train_and_keep(recipe, run, *(TINY_SAC if recipe is sac_pmoe else TINY_PPO), *overrides)
            made[recipe, overrides] = Made(run, agents[0])
        return made[recipe, overrides]

    return train


@pytest.fixture(autouse=True)
def _settings_of_the_process_stay():
    threads, checks = torch.get_num_threads(), torch.distributions.Distribution._validate_args
    yield
    torch.set_num_threads(threads)
    torch.distributions.Distribution.set_default_validate_args(checks)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """They are half of the time, and have a test of their own."""
    monkeypatch.setattr(evaluate, "draw", lambda env, policy, episode, path: path.write_bytes(b""))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def columns(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.stack([column(rows, key) for key in rows[0] if key.startswith(name)], 1)


def rollout(name: str, policy: Policy, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Observations before every step, and rewards."""
    env = gym.make(name)
    observations, rewards = [], []
    observation, _ = env.reset(seed=seed)
    torch.manual_seed(seed)
    for _ in range(STEPS):
        observations.append(observation)
        with torch.no_grad():
            action = policy(torch.as_tensor(observation, dtype=torch.float32)[None])
        # the bounds of these tasks are 2 and 1: policies act in [-1, 1]
        raw = np.clip(action[0].numpy(), -1, 1) * env.action_space.high
        observation, reward, terminated, truncated, _ = env.step(raw)
        rewards.append(float(reward))
        if terminated or truncated:
            break
    return np.stack(observations), np.array(rewards)


def asked(policy: Any, kind: ExplorationType = ExplorationType.DETERMINISTIC) -> Policy:
    def act(observation: torch.Tensor) -> torch.Tensor:
        with set_exploration_type(kind):
            return policy(TensorDict({"observation": observation}, [1]))["action"]

    return act


def scaled(agent: Any, observation: torch.Tensor) -> torch.Tensor:
    """By the statistics that the training ended with."""
    found = agent.normalization.observations
    mean, std = found.mean, (found.var + 1e-8).sqrt()
    return ((observation - mean.float()) / std.float()).clamp(-10, 10)


def evaluated(run: Path, *args: str) -> Path:
    assert evaluate.main([str(run), "--no-video", *args]) == 0
    return run / "evaluation"


def digests(run: Path) -> dict[Path, str]:
    files = [path for path in run.rglob("*") if path.is_file() and "evaluation" not in path.parts]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --------------------------------------------------------------------------------------------- returns


@pytest.mark.parametrize("kind", ["deterministic", "drawn", "stochastic"])
def test_every_episode_is_the_one_that_its_seed_makes(trained, kind):
    run, agent = trained(sac_pmoe, "env=Pendulum-v1")
    rows = table(evaluated(run, "--episodes", "3", "--act", kind) / "episodes.csv")
    assert [row["seed"] for row in rows] == [str(SEED), str(SEED + 1), str(SEED + 2)]
    policy = {
        "deterministic": asked(agent.actor),
        "drawn": asked(MeanOfDrawnExpertActor(agent.actor)),
        "stochastic": asked(agent.actor, ExplorationType.RANDOM),
    }[kind]
    for row in rows:
        _, rewards = rollout("Pendulum-v1", policy, int(row["seed"]))
        assert float(row["return"]) == pytest.approx(rewards.sum(), abs=1e-6)
        assert row["length"] == str(STEPS)
    assert "success" not in rows[0]


def test_on_policy_agents_see_normalised_observations_and_their_actions_are_clipped(trained):
    run, agent = trained(ppo_pmoe, "network.log_std_init=2.0")
    rows = table(evaluated(run, "--episodes", "2", "--act", "stochastic") / "episodes.csv")
    drawn = asked(agent.actor, ExplorationType.RANDOM)
    for row in rows:
        _, rewards = rollout("Pendulum-v1", lambda o: drawn(scaled(agent, o)), int(row["seed"]))
        assert float(row["return"]) == pytest.approx(rewards.sum(), abs=1e-4)


def test_a_run_is_evaluated_as_it_evaluated_itself(trained, capsys):
    run, agent = trained(ppo_pmoe, "network.log_std_init=2.0")
    (row,) = table(evaluated(run, "--episodes", "1") / "episodes.csv")
    assert "acting drawn as in the run's own evaluations" in capsys.readouterr().out
    drawn = asked(MeanOfDrawnExpertActor(agent.actor))
    _, rewards = rollout("Pendulum-v1", lambda o: drawn(scaled(agent, o)), SEED)
    assert float(row["return"]) == pytest.approx(rewards.sum(), abs=1e-4)


def test_the_same_command_gives_the_same_numbers_and_a_seed_the_same_episode_in_any_company(trained):
    run, _ = trained(ppo_pmoe, "network.log_std_init=2.0")
    first, again = (
        {path.name: path.read_text() for path in evaluated(run, "--episodes", "2").glob("*.csv")} for _ in range(2)
    )
    assert first == again
    assert set(first) == {"episodes.csv", "experts.csv"}
    lines = first["episodes.csv"].splitlines()
    assert lines[1].split(",")[1] != lines[2].split(",")[1]
    alone = (evaluated(run, "--episodes", "1", "--seed", str(SEED + 1)) / "episodes.csv").read_text()
    assert alone.splitlines() == [lines[0], lines[2]]


def test_an_episode_is_cut_where_asked_and_success_is_told_where_it_is_known(trained, capsys):
    run, _ = trained(sac_pmoe, "env=PMOE/TargetReaching-v0", "policy=gating")
    rows = table(evaluated(run, "--episodes", "2", "--max-steps", "7") / "episodes.csv")
    assert [row["length"] for row in rows] == ["7", "7"]
    assert [row["success"] for row in rows] == ["0", "0"]
    assert "success in 0 of 2 episodes" in capsys.readouterr().out


def test_outcomes_that_the_environment_names_are_told_and_counted(trained, capsys, monkeypatch):
    run, _ = trained(sac_pmoe, "env=PMOE/MultiGoal-v0", "policy=gating")
    # nobody moves: an episode ends where it begins
    monkeypatch.setattr(MultiGoalTask, "step", lambda task, state, action: (state, 0.0, False))
    ways = {SEED: (4.3, 0.0), SEED + 1: (0.0, -4.3), SEED + 2: (4.3, 0.0), SEED + 3: (0.0, 0.0)}
    monkeypatch.setattr(
        MultiGoalEnv, "_draw_start", lambda env, options: np.array(ways.get(env.np_random_seed, (0.0, 0.0)))
    )
    rows = table(evaluated(run, "--episodes", "4", "--max-steps", "1") / "episodes.csv")
    assert [(row["success"], row["outcome"]) for row in rows] == [
        ("1", "east"),
        ("1", "south"),
        ("1", "east"),
        ("0", ""),
    ]
    entropy = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    line = f"outcomes of 3 episodes: east 67%, south 33%; exp of their entropy {np.exp(entropy):.2f}"
    assert line in capsys.readouterr().out.splitlines()


def test_mean_spread_and_interquartile_mean_are_those_of_the_table(trained, capsys):
    run, _ = trained(sac_pmoe, "env=Pendulum-v1")
    returns = np.sort(column(table(evaluated(run, "--episodes", "4") / "episodes.csv"), "return"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("return"))
    assert line.startswith(f"return {returns.mean():,.2f} ± {returns.std():,.2f} (mean ± std)")
    assert f"interquartile mean {returns[1:3].mean():,.2f} [" in line


def test_each_of_several_agents_can_be_asked_for(tmp_path, capsys):
    agents = train_and_keep(sac_many_seeds, tmp_path, *TINY_SAC, "env=Pendulum-v1", "num_seeds=2")
    ways = [[str(tmp_path), "--agent", "3"], [str(tmp_path / "seed4")]]
    for seed, agent, way in zip((3, 4), agents, ways, strict=True):
        assert evaluate.main([*way, "--episodes", "1", "--no-video"]) == 0
        (row,) = table(tmp_path / f"seed{seed}" / "evaluation" / "episodes.csv")
        assert row["seed"] == str(seed + 4_000_000)
        _, rewards = rollout("Pendulum-v1", asked(agent.actor), int(row["seed"]))
        assert float(row["return"]) == pytest.approx(rewards.sum(), abs=1e-6)
    capsys.readouterr()
    for wrong, line in (([], "--agent: must be given, "), (["--agent", "5"], "--agent=5: must be ")):
        assert evaluate.main([str(tmp_path), *wrong]) == 2
        assert capsys.readouterr().err == f"error: {line}one of the seeds 3, 4\n"
    assert evaluate.main([str(tmp_path / "seed4"), "--agent", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: --agent=3: must be 4 with ")


def test_an_earlier_checkpoint_is_another_agent_with_a_record_of_its_own(trained):
    run, _ = trained(sac_pmoe, "env=Pendulum-v1")
    last = table(evaluated(run, "--episodes", "1") / "episodes.csv")
    evaluated(run / "checkpoints" / "checkpoint-000000000030", "--episodes", "1")
    earlier = table(run / "evaluation" / "checkpoint-000000000030" / "episodes.csv")
    assert earlier[0]["seed"] == last[0]["seed"]
    assert earlier[0]["return"] != last[0]["return"]
    assert table(run / "evaluation" / "episodes.csv") == last


# --------------------------------------------------------------------------------------------- experts


def test_experts_are_the_likeliest_of_the_router_step_by_step(trained):
    run, agent = trained(sac_pmoe, "env=Pendulum-v1")
    steps = table(evaluated(run, "--episodes", "2") / "experts.csv")
    observations, rewards = rollout("Pendulum-v1", asked(agent.actor), SEED)
    states = TensorDict({"observation": torch.tensor(observations)}, [STEPS])
    with torch.no_grad():
        probs = agent.actor.get_dist(states).probs.numpy()
    assert list(steps[0]) == ["t", "expert", "probability_0", "probability_1", "probability_2", "reward"]
    np.testing.assert_array_equal(column(steps, "t"), np.arange(STEPS))
    np.testing.assert_allclose(columns(steps, "probability"), probs, atol=1e-5)
    np.testing.assert_array_equal(column(steps, "expert"), probs.argmax(-1))
    np.testing.assert_allclose(column(steps, "reward"), rewards, atol=1e-6)


@pytest.mark.parametrize("policy", ["gating", "mcp"])
def test_of_a_blend_the_weights_are_told_and_no_expert(trained, policy, capsys):
    run, agent = trained(sac_pmoe, "env=PMOE/TargetReaching-v0", f"policy={policy}")
    steps = table(evaluated(run, "--episodes", "1") / "experts.csv")
    assert list(steps[0]) == ["t", "weight_0", "weight_1", "weight_2", "reward"]
    observations, _ = rollout("PMOE/TargetReaching-v0", asked(agent.actor), SEED)
    with torch.no_grad():
        logits, _, _ = agent.actor._experts()(torch.tensor(observations))
    gates = logits.exp() if policy == "gating" else 1 / (1 + (-logits).exp())
    np.testing.assert_allclose(columns(steps, "weight"), gates / gates.sum(-1, keepdim=True), atol=1e-5)
    assert f"policy {policy} " in capsys.readouterr().out


def test_a_gaussian_has_one_expert(trained, capsys):
    run, agent = trained(sac_pmoe, "env=Hopper-v4", "policy=gaussian")
    directory = evaluated(run, "--episodes", "1")
    assert list(table(directory / "experts.csv")[0]) == ["t", "reward"]
    assert "policy gaussian has one expert" in capsys.readouterr().out
    _, rewards = rollout("Hopper-v4", asked(agent.actor), SEED)
    assert float(table(directory / "episodes.csv")[0]["return"]) == pytest.approx(rewards.sum(), abs=1e-4)


@pytest.mark.parametrize(
    ("policy", "experts", "panels"), [("pmoe", 1, 3), ("pmoe", 16, 3), ("dac", 4, 3), ("mcp", 4, 2), ("gaussian", 0, 1)]
)
def test_a_picture_shows_weights_who_acts_and_rewards_where_there_are_any(policy, experts, panels, tmp_path):
    steps, generator = 30, np.random.default_rng(0)
    weights = generator.dirichlet(np.ones(experts), steps) if experts else None
    acts = weights.argmax(-1) if weights is not None and policy != "mcp" else None
    rewards = generator.standard_normal(steps)
    shown: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        made = figures.Figure
        patch.setattr(figures, "Figure", lambda **kwargs: shown.append(made(**kwargs)) or shown[-1])
        episode = Episode(7, rewards, np.zeros((steps, 2)), None, acts, weights)
        draw("Some-v0", policy, episode, tmp_path / "experts.png")
    assert (tmp_path / "experts.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (figure,) = shown
    axes = figure.axes
    assert len(axes) == panels
    assert all(axis.get_ylabel() for axis in axes)
    assert axes[0].get_title() == f"Some-v0, policy {policy}, seed 7: return {rewards.sum():,.2f}"
    assert axes[-1].get_xlabel() == "step"
    np.testing.assert_allclose(axes[-1].lines[0].get_ydata()[1:], rewards.cumsum())
    if experts:
        assert len(axes[0].get_legend().get_texts()) == experts
    if acts is not None:
        strip = axes[1].images[0].get_array()
        np.testing.assert_array_equal(np.asarray(strip)[..., 3].argmax(0), acts)
        np.testing.assert_array_equal((np.asarray(strip)[..., 3] > 0).sum(0), 1)


# ----------------------------------------------------------------------------------------------- video


@needs_ffmpeg
def test_the_video_has_a_picture_before_every_step_and_one_at_the_end(trained):
    from imageio_ffmpeg import count_frames_and_secs

    run, _ = trained(sac_pmoe, "env=PMOE/TargetReaching-v0", "policy=gating")
    assert evaluate.main([str(run), "--episodes", "1", "--video", "--max-steps", "9"]) == 0
    film = run / "evaluation" / "episode.mp4"
    assert film.read_bytes()[4:8] == b"ftyp"
    frames, seconds = count_frames_and_secs(str(film))
    assert frames == 10
    assert seconds == pytest.approx(10 / 20, abs=0.06)
    assert sorted(path.name for path in film.parent.iterdir()) == sorted(evaluate.FILES)


@needs_ffmpeg
def test_mujoco_is_filmed_without_a_display(trained, capsys, monkeypatch):
    from imageio_ffmpeg import count_frames_and_secs

    monkeypatch.setenv("MUJOCO_GL", "")
    run, _ = trained(sac_pmoe, "env=Hopper-v4", "policy=gaussian")
    status = evaluate.main([str(run), "--episodes", "1", "--video", "--max-steps", "7"])
    line = capsys.readouterr().err
    if status and "Debian: apt-get install" in line:
        pytest.skip(line)
    assert status == 0, line
    frames, seconds = count_frames_and_secs(str(run / "evaluation" / "episode.mp4"))
    # of 125 steps a second every third is shown, at the speed of the environment
    assert frames == 3
    assert seconds == pytest.approx(9 / 125, abs=0.01)


def test_numbers_are_there_where_there_can_be_no_video(trained, monkeypatch, capsys):
    run, _ = trained(sac_pmoe, "env=PMOE/TargetReaching-v0", "policy=gating")
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "episode.mp4").write_bytes(b"of an earlier evaluation")
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    for demanded, status in (([], 0), (["--video"], 1)):
        assert evaluate.main([str(run), "--episodes", "1", *demanded]) == status
        shown = capsys.readouterr()
        assert shown.err == "no video: imageio-ffmpeg is missing (pip install imageio-ffmpeg)\n"
        assert "episodes.csv, experts.csv, experts.png in " in shown.out
        assert {path.name for path in (run / "evaluation").iterdir()} == {*evaluate.FILES} - {"episode.mp4"}


@needs_ffmpeg
def test_a_renderer_that_gives_up_leaves_a_line_and_no_half_video(trained, monkeypatch, capsys):
    run, _ = trained(sac_pmoe, "env=PMOE/TargetReaching-v0", "policy=gating")
    show, shown = video._picture, []

    def give_up(env: gym.Env) -> np.ndarray:
        shown.append(env)
        if len(shown) > 3:
            raise RuntimeError("no more\npictures")
        return show(env)

    monkeypatch.setattr(video, "_picture", give_up)
    assert evaluate.main([str(run), "--episodes", "1"]) == 0
    line = "no video: PMOE/TargetReaching-v0 could not be rendered (no more pictures)\n"
    assert capsys.readouterr().err == line
    assert not list((run / "evaluation").glob("*.mp4"))


@needs_ffmpeg
def test_an_episode_that_does_not_repeat_is_not_filmed(trained, tmp_path):
    run, _ = trained(sac_pmoe, "env=PMOE/TargetReaching-v0", "policy=gating")
    found = evaluate.load(run)
    play = EpisodePlayer(found.env, found.in_unit_box, found.watched, max_steps=5)
    play(SEED)
    episode = play(SEED + 1)
    assert episode.weights is not None
    assert len(episode.weights) == len(episode.rewards) == 5
    episode.rewards[3] += 1e-3
    with pytest.raises(video.NoVideoError, match="does not repeat"):
        video.write_video(found.env, found.env_kwargs, episode, tmp_path / "episode.mp4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("display", "works", "chosen"),
    [
        (False, ["glfw", "egl", "osmesa"], "egl"),
        (True, ["glfw", "egl", "osmesa"], "glfw"),
        (True, ["egl", "osmesa"], "egl"),
        (False, ["osmesa"], "osmesa"),
    ],
)
def test_mujoco_renders_through_the_first_backend_that_works(display, works, chosen, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr(
        subprocess, "run", lambda *_, env, **__: SimpleNamespace(returncode=int(env["MUJOCO_GL"] not in works))
    )
    video.choose_gl(display)
    assert os.environ["MUJOCO_GL"] == chosen
    works.clear()
    video.choose_gl(display)  # what is set stays
    monkeypatch.setenv("MUJOCO_GL", "")
    with pytest.raises(video.NoVideoError, match="libegl1 libgl1-mesa-dri, or libosmesa6"):
        video.choose_gl(display)


def test_pictures_are_cut_to_even_sides():
    env: Any = SimpleNamespace(render=lambda: np.zeros((5, 8, 3), np.uint8))
    assert video._picture(env).shape == (4, 8, 3)


# ----------------------------------------------------------------------------------------------- input


def test_nothing_of_the_run_is_touched(trained, tmp_path):
    run, _ = trained(sac_pmoe, "env=Pendulum-v1")
    before = digests(run)
    evaluated(run, "--episodes", "1", "--output", str(tmp_path / "there" / "it is"))
    assert digests(run) == before
    assert {path.name for path in (tmp_path / "there" / "it is").iterdir()} == {*evaluate.FILES} - {"episode.mp4"}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--episodes", "0"], "argument --episodes: 0: must be an integer >= 1"),
        (["--episodes", "many"], "argument --episodes: many: must be an integer >= 1"),
        (["--seed", "-1"], "argument --seed: -1: must be an integer >= 0"),
        (["--max-steps", "0"], "argument --max-steps: 0: must be an integer >= 1"),
        (["--device", "gpu9"], "argument --device: gpu9: must be a device of this machine (cpu"),
        (
            ["--act", "wildly"],
            "argument --act: wildly: must be one of deterministic, drawn, stochastic, committed, or ",
        ),
        (["--act", "3"], "--act=3: must be one of deterministic, drawn, stochastic, committed or an expert below 3"),
        (["--export", "policy.bin"], "--export=policy.bin: must end in .pt2 (torch.export) or .onnx"),
        (["--export", "policy.pt2", "--act", "committed"], "--act=committed: cannot be exported, because it carries "),
        (["--agent", "7"], "--agent=7: must be one of the seeds 3"),
        (["--output", __file__], f"--output={__file__}: must be a directory"),
        (["--bang"], "unrecognized arguments: --bang"),
    ],
)
def test_bad_arguments_get_one_line_and_leave_nothing(trained, args, line, capsys):
    run, _ = trained(sac_pmoe, "env=Pendulum-v1")
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    assert status(str(run), *args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {line}")
    assert shown.err.count("\n") == 1
    assert not (run / "evaluation").exists()


def test_an_expert_that_is_evaluated_alone_is_the_one_that_is_exported(trained, tmp_path, capsys):
    run, _ = trained(sac_pmoe, "env=Pendulum-v1")
    (row,) = table(evaluated(run, "--episodes", "1", "--act", "2") / "episodes.csv")
    assert "acting 2\n" in capsys.readouterr().out
    shutil.rmtree(run / "evaluation")
    assert evaluate.main([str(run), "--act", "2", "--export", str(tmp_path / "two.pt2")]) == 0
    assert capsys.readouterr().out.endswith(f", acting 2: {tmp_path / 'two.pt2'}\n")
    assert not (run / "evaluation").exists()
    act, env = torch.export.load(tmp_path / "two.pt2").module(), gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=SEED)
    total = 0.0
    for _ in range(STEPS):
        observation, reward, *_ = env.step(act(torch.as_tensor(observation)[None])[0].numpy())
        total += reward
    assert total == pytest.approx(float(row["return"]), rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["env=Hopper-v4", "policy=gaussian"], "with policy=gaussian, which has one expert"),
        (["env=Pendulum-v1", "acting=best_of_experts"], "with acting=best_of_experts"),
    ],
)
def test_an_expert_is_drawn_only_where_there_are_several_to_draw_from(trained, overrides, line):
    run, _ = trained(sac_pmoe, *overrides)
    with pytest.raises(evaluate.UsageError, match="--act=drawn: must be deterministic or stochastic") as error:
        evaluate.load(run, act="drawn")
    assert str(error.value).endswith(line)


def test_a_committed_expert_acts_for_as_many_steps_as_are_asked_for(trained):
    run, _ = trained(sac_pmoe, "env=Pendulum-v1")
    output = evaluated(run, "--episodes", "1", "--act", "committed", "--commit-steps", "2")
    experts = [row["expert"] for row in table(output / "experts.csv")]
    assert experts[::2] == experts[1::2]
    assert len(set(experts)) > 1
    whole = table(evaluated(run, "--episodes", "1", "--act", "committed", "--commit-steps", "episode") / "experts.csv")
    assert len({row["expert"] for row in whole}) == 1


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"act": "drawn", "commit_steps": 5}, "--commit-steps=5: must be given with --act committed only"),
        ({"commit_steps": 5}, "--commit-steps=5: must be given with --act committed only"),
    ],
)
def test_steps_of_a_committed_expert_are_for_one_that_is(trained, given, line):
    run, _ = trained(sac_pmoe, "env=Pendulum-v1")
    with pytest.raises(evaluate.UsageError) as error:
        evaluate.load(run, **given)
    assert str(error.value) == line


def test_what_is_no_intact_run_gets_one_line_and_stays_as_it_was(trained, tmp_path, capsys):
    run, _ = trained(sac_pmoe, "env=Pendulum-v1")
    empty, damaged = tmp_path / "empty", tmp_path / "damaged"
    empty.mkdir()
    shutil.copytree(run, damaged, ignore=shutil.ignore_patterns("evaluation"))
    last = damaged / "checkpoints" / "checkpoint-000000000060"
    state = next(path for path in last.rglob("*loss_module/*") if path.is_file())
    state.write_bytes(state.read_bytes()[:-1])
    for path in (tmp_path / "nowhere", tmp_path / "no\nwhere", empty, damaged, Path(__file__)):
        before = digests(tmp_path)
        assert status(str(path)) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: ")
        assert shown.err.count("\n") == 1
        assert digests(tmp_path) == before
        assert not (path / "evaluation").exists()


def test_an_environment_that_is_not_installed_gets_one_line(trained, monkeypatch, capsys):
    run, _ = trained(sac_pmoe, "env=Pendulum-v1")
    monkeypatch.delitem(gym.registry, "Pendulum-v1")
    assert status(str(run)) == 2
    assert capsys.readouterr().err.startswith("error: env=Pendulum-v1: must be the id of an installed Gymnasium")


def status(*args: str) -> int | str | None:
    try:
        return evaluate.main(args)
    except SystemExit as stop:
        return stop.code
