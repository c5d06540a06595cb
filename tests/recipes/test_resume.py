"""Runs that are stopped, killed, damaged and resumed, against runs that were left alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recipe_runs
import torch
from recipe_runs import assert_one_line, in_background, start, timeless_rows, wait_for

from torchrl_pmoe.runs import Evaluator, RunDirectory, VerifiedCheckpoint

import dac  # isort: skip
import ppo_pmoe  # isort: skip
import sac_many_seeds  # isort: skip
import sac_pmoe  # isort: skip
import target_reaching  # isort: skip
from parts import recording, resume  # isort: skip
from parts.errors import Interrupted, RunError, UsageError  # isort: skip
from parts.training import has_compiler  # isort: skip
from config.typed import build  # isort: skip

SAC = [
    "env=Hopper-v4",
    "total_frames=240",
    "network.hidden_sizes=[16,16]",
    "optim.batch_size=16",
    # two updates for ten frames: they are what a run spends its time with
    "optim.utd_ratio=0.2",
    "collector.frames_per_batch=10",
    "collector.init_random_frames=50",
    "logger.eval_interval=60",
    "logger.eval_episodes=2",
    "logger.eval_max_steps=20",
    "checkpoint.interval=50",
    "checkpoint.keep=100",
]
PPO = [*recipe_runs.SMALL_PPO, "total_frames=768", "checkpoint.interval=128", "checkpoint.keep=100"]
EXTENSION = pytest.mark.skipif(not recipe_runs.HAS_EXTENSION, reason="TorchRL's extension is built for another torch")
HERE = ["device=cpu", "logger.progress_bar=false"]


def frames_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("checkpoint-*"))


def interrupted_copy(run: Path, copy: Path, after: int) -> None:
    """What a run that was killed some time after frame ``after`` has left."""
    shutil.copytree(run, copy)
    for checkpoint in checkpoints(copy):
        if frames_of(checkpoint) > after:
            shutil.rmtree(checkpoint)


def go_on_here(recipe, run: Path, **changes) -> None:
    values, checkpoint = resume.open_run(run)
    cfg = build(recipe_runs.CONFIGS[recipe.__name__], {**values, "resume": str(checkpoint), **changes})
    recipe.resolve(cfg)
    recipe.train(cfg, run)


@pytest.mark.parametrize(
    ("recipe", "overrides", "after"),
    [
        (sac_pmoe, [*SAC, "collector.frames_per_batch=1", "optim.utd_ratio=1"], 150),
        (sac_pmoe, [*SAC, "env=Pendulum-v1", "policy=gaussian", "collector.num_envs=2", "replay_buffer.size=64"], 150),
        (sac_pmoe, [*SAC, "acting=best_of_experts", "scoring=gradient", "replay_buffer.scratch_dir=SCRATCH"], 100),
        (sac_pmoe, [*SAC, "on_nonfinite=skip", "optim.router_lr=1e-3"], 120),
        (sac_pmoe, [*SAC, "acting=committed", "commit_steps=7", "collector.num_envs=2"], 150),
        (sac_pmoe, [*SAC, "collector.init_random_frames=120"], 60),
        pytest.param(sac_pmoe, [*SAC, "replay_buffer.prb=true", "replay_buffer.size=64"], 150, marks=EXTENSION),
        (ppo_pmoe, [*PPO, "env=HalfCheetah-v4", "scoring=critic", "collector.num_envs=2"], 512),
        (ppo_pmoe, [*PPO, "collector.backend=serial", "on_nonfinite=skip", "actions=bounded"], 384),
        (dac, [*PPO], 384),
    ],
    ids=["sac", "gaussian", "memmap", "skip", "committed", "random frames", "prioritised", "critic", "ppo skip",
         "dac"],
)  # fmt: skip
def test_an_interrupted_run_ends_with_the_metrics_of_one_that_was_left_alone(recipe, overrides, after, tmp_path):
    overrides = [value.replace("SCRATCH", str(tmp_path / "scratch")) for value in overrides]
    recipe_runs.run_here(recipe, tmp_path / "whole", *overrides)
    interrupted_copy(tmp_path / "whole", tmp_path / "half", after)
    torch.manual_seed(99)  # what another process would have
    go_on_here(recipe, tmp_path / "half")
    assert timeless_rows(tmp_path / "half") == timeless_rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("recipe", "small", "change"),
    [(sac_pmoe, SAC, ("stop", "skip")), (ppo_pmoe, PPO, ("skip", "stop"))],
    ids=["sac, then skip", "ppo, then stop"],
)
def test_a_run_goes_on_with_another_word_on_bad_numbers(recipe, small, change, tmp_path):
    """Where there are none, that changes nothing but the columns that count them."""
    before, after = change
    recipe_runs.run_here(recipe, tmp_path / "whole", *small, f"on_nonfinite={before}")
    interrupted_copy(tmp_path / "whole", tmp_path / "half", 384 if recipe is ppo_pmoe else 150)
    go_on_here(recipe, tmp_path / "half", on_nonfinite=after)
    found, expected = (
        [{key: value for key, value in row.items() if "skipped" not in key} for row in timeless_rows(tmp_path / run)]
        for run in ("half", "whole")
    )
    assert found == expected


def test_several_seeds_at_once_go_on(tmp_path):
    recipe_runs.run_here(sac_many_seeds, tmp_path / "whole", *SAC, "num_seeds=2")
    interrupted_copy(tmp_path / "whole", tmp_path / "half", 150)
    go_on_here(sac_many_seeds, tmp_path / "half")
    for name in ("seed0", "seed1"):
        assert timeless_rows(tmp_path / "half" / name) == timeless_rows(tmp_path / "whole" / name)


def test_a_compiled_run_goes_on_compiled(tmp_path):
    pytest.importorskip("torch._inductor")
    if not has_compiler():
        pytest.skip("no C++ compiler here")
    recipe_runs.run_here(sac_pmoe, tmp_path / "whole", *SAC, "policy=gaussian", "compile.enabled=true")
    interrupted_copy(tmp_path / "whole", tmp_path / "half", 150)
    torch._dynamo.reset()
    go_on_here(sac_pmoe, tmp_path / "half")
    assert timeless_rows(tmp_path / "half") == timeless_rows(tmp_path / "whole")


ROUTES = [
    "policies=[pmoe]",
    "total_frames=160",
    "exploration_frames=80",
    "episodes=10",
    "network.hidden_sizes=[16,16]",
    "optim.batch_size=16",
    "collector.init_random_frames=40",
    "logger.eval_interval=40",
    "logger.eval_episodes=2",
    "checkpoint.interval=40",
    "checkpoint.keep=100",
    "replay_buffer.size=500",
]


def test_target_reaching_goes_on_with_each_of_its_trainings(tmp_path):
    def configs():
        cfg = recipe_runs.composed(target_reaching, *HERE, *ROUTES)
        return cfg, target_reaching.resolve(cfg)

    cfg, found = configs()
    target_reaching.train_all(cfg, found, tmp_path / "whole")
    (name,) = found
    for after in (80, 160):  # 160: killed between the last frame and its episodes
        half = tmp_path / f"half{after}"
        interrupted_copy(tmp_path / "whole" / name, half / name, after)
        (half / name / "episodes.npz").unlink()
        target_reaching.train_all(*configs(), half)
        assert timeless_rows(half / name) == timeless_rows(tmp_path / "whole" / name)
        whole = tmp_path / "whole" / name / "episodes.npz"
        with np.load(half / name / "episodes.npz") as ours, np.load(whole) as theirs:
            for key in theirs.files:
                np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


# --------------------------------------------------------------------------------------------- signals


ENDLESS = ["total_frames=1e6", "compile.enabled=false", "logger.progress_bar=false", "checkpoint.keep=2"]


@pytest.mark.parametrize(("recipe", "number"), [("sac_pmoe", signal.SIGINT), ("ppo_pmoe", signal.SIGTERM)])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(recipe, number, tmp_path):
    small = SAC if recipe == "sac_pmoe" else PPO
    with in_background(recipe, *small, *ENDLESS, "hydra.run.dir=run", directory=tmp_path) as process:
        wait_for(lambda: checkpoints(tmp_path / "run"), process)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 128 + number
    told, last = err.strip().splitlines()
    assert told.startswith("stopping: this batch is finished and a checkpoint written")
    found = re.fullmatch(r"stopped at frame ([\d,]+), with a checkpoint; goes on with: (.+)", last)
    assert found is not None, last
    frame = int(found[1].replace(",", ""))
    assert frames_of(checkpoints(tmp_path / "run")[-1]) == frame
    python, script, argument = found[2].split(" ")
    assert (Path(python).name[:6], Path(script).name, argument) == ("python", f"{recipe}.py", "resume=run")
    done = start(recipe, argument, f"total_frames={frame + 128}", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"goes on at frame {frame:,} from checkpoint-{frame:012d}\n")


@pytest.fixture
def hangups_are_heard():
    # tests that nohup has started ignore them, and so would a run
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("recipe", "small", "which"),
    [
        (sac_pmoe, SAC, 2),
        (ppo_pmoe, PPO, -1),
        (sac_many_seeds, [*SAC, "num_seeds=2"], 2),
        (sac_many_seeds, [*SAC, "num_seeds=2"], -1),
    ],
    ids=["sac, on the way", "ppo, the last one", "seeds, on the way", "seeds, the last one"],
)
def test_a_signal_in_an_evaluation_gives_it_up_and_the_run_goes_on_with_it(
    recipe, small, which, tmp_path, monkeypatch, capfd, hangups_are_heard
):
    # one of them is a hangup
    number = signal.SIGHUP if small is SAC and which == 2 else signal.SIGTERM
    recipe_runs.run_here(recipe, tmp_path / "whole", *small)
    done = Evaluator.__call__
    calls, steps = [], []

    def nudged(self):
        calls.append(self)
        if len(calls) == (which if which > 0 else total):
            signal.raise_signal(number)
            monkeypatch.setattr(self.envs[0], "step", steps.append)
        return done(self)

    total = {sac_pmoe: 4, ppo_pmoe: 3, sac_many_seeds: 8}[recipe]
    monkeypatch.setattr(Evaluator, "__call__", nudged)
    with pytest.raises(Interrupted) as stop:
        recipe_runs.run_here(recipe, tmp_path / "half", *small)
    assert stop.value.number == number
    assert not steps
    assert "stopping: " in capfd.readouterr().err
    monkeypatch.undo()
    torch.manual_seed(99)  # what another process would have
    go_on_here(recipe, tmp_path / "half")
    for directory in ("seed0", "seed1") if recipe is sac_many_seeds else (".",):
        whole = timeless_rows(tmp_path / "whole" / directory)
        assert timeless_rows(tmp_path / "half" / directory) == whole
    if which == -1:
        with pytest.raises(UsageError, match="must be above the"):
            go_on_here(recipe, tmp_path / "half")


@pytest.mark.parametrize(
    ("recipe", "small"), [(sac_pmoe, SAC), (sac_many_seeds, [*SAC, "num_seeds=2"])], ids=["sac", "seeds"]
)
def test_a_run_that_was_killed_between_its_last_checkpoint_and_its_end_comes_to_its_end(recipe, small, tmp_path):
    run = tmp_path / "run"
    recipe_runs.run_here(recipe, run, *small)
    agents = [run / "seed0", run / "seed1"] if recipe is sac_many_seeds else [run]
    before = [timeless_rows(agent) for agent in agents]
    for left in (RunDirectory(run).path / RunDirectory.FINISHED, *(agent / "learning_curve.png" for agent in agents)):
        left.unlink()
    with pytest.raises(UsageError, match="must be above the"):
        go_on_here(recipe, run, total_frames=200)  # it has more than that
    go_on_here(recipe, run)
    assert RunDirectory(run).finished(240)
    assert [timeless_rows(agent) for agent in agents] == before
    assert all((agent / "learning_curve.png").is_file() for agent in agents)
    with pytest.raises(UsageError, match="must be above the"):
        go_on_here(recipe, run)


def test_a_kill_while_a_checkpoint_is_written_loses_nothing_before_it(tmp_path):
    run = tmp_path / "run"

    def writing():
        return len(checkpoints(run)) >= 2 and list((run / "checkpoints").glob(".checkpoint-*partial"))

    every = [*SAC, *ENDLESS, "checkpoint.interval=1", "hydra.run.dir=run"]
    with in_background("sac_pmoe", *every, directory=tmp_path) as process:
        wait_for(writing, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    _, newest = resume.open_run(run)
    assert newest == checkpoints(run)[-1]
    frame = frames_of(newest)
    (run / "checkpoints" / ".checkpoint-000000099999.partial").mkdir(exist_ok=True)
    with (run / "metrics.csv").open("a") as file:
        file.write(f"{frame + 1000},1.5,")  # a torn row of the future
    done = start("sac_pmoe", "resume=run", f"total_frames={frame + 60}", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"goes on at frame {frame:,} ")
    assert not list((run / "checkpoints").glob(".checkpoint-*"))
    numbers = [int(row["frames"]) for row in recipe_runs.rows(run)]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == frame + 60


# ------------------------------------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    recipe_runs.run_here(sac_pmoe, run, *SAC, "checkpoint.keep=2")
    return run


def test_a_longer_run_stays_longer_though_it_was_killed_before_its_first_checkpoint(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    # what a resumed run writes first
    text = (run / "config.yaml").read_text()
    changed = text.replace("total_frames: 240", "total_frames: 300").replace("on_nonfinite: stop", "on_nonfinite: skip")
    (run / "config.yaml").write_text(changed)
    values, checkpoint = resume.open_run(run)
    assert (values["total_frames"], values["on_nonfinite"]) == (300, "skip")
    assert checkpoint == checkpoints(run)[-1]
    (run / "config.yaml").write_text(text.replace("batch_size: 16", "batch_size: 32"))
    with pytest.raises(UsageError, match=r"was written with optim\.batch_size=16, config\.yaml has 32"):
        resume.open_run(run)


def test_the_card_of_a_run_goes_when_the_run_goes_on(finished, tmp_path, monkeypatch):
    """What it says holds for the end that it was written at."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert "| frames | 240 |" in (run / "model_card.md").read_text()

    def stopped(*args):
        raise RunError("the disk is full")

    monkeypatch.setattr(recording, "run_to_the_end", stopped)
    with pytest.raises(RunError, match="full"):
        recipe_runs.run_here(sac_pmoe, run, *SAC, "total_frames=300", f"resume={checkpoints(run)[-1]}")
    assert not (run / "model_card.md").exists()


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


def reseal(checkpoint: Path, change) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    change(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    sums = (checkpoint / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    sums = [f"{digest}  manifest.json" if line.endswith("  manifest.json") else line for line in sums]
    (checkpoint / "SHA256SUMS").write_text("\n".join(sums) + "\n")


def older_format(checkpoint: Path) -> None:
    reseal(checkpoint, lambda manifest: manifest["metadata"]["torchrl_pmoe"].update(format=2))


def other_config(checkpoint: Path) -> None:
    reseal(checkpoint, lambda manifest: manifest["metadata"]["torchrl_pmoe"]["config"].update(num_experts=7))


BAD = {
    "truncated": (lambda c: truncate(next(c.glob("*/*optimizer/state.pt"))), "optimizer/state.pt is damaged"),
    "bit": (lambda c: flip(next(c.glob("*/*replay_buffer/rows*"))), r"rows-\S+\.npz is damaged"),
    "empty": (lambda c: next(c.glob("*/*loss_module/state.pt")).write_bytes(b""), "loss_module/state.pt is empty"),
    "manifest": (lambda c: (c / "manifest.json").write_text("{"), "manifest.json is damaged"),
    "gone": (lambda c: shutil.rmtree(next(c.glob("*/*rng"))), "rng/state.pt is missing"),
    "foreign file": (lambda c: (c / "weights.pt").write_bytes(b"x"), "holds weights.pt, which is no file of a"),
    "before checksums": (lambda c: (c / "SHA256SUMS").unlink(), "was written by an older version, or in part"),
    "older format": (older_format, "is of format 2, this version reads 4"),
    "foreign": (lambda c: (shutil.rmtree(c), c.mkdir()), "is no checkpoint of this package"),
}


ODD = [
    lambda manifest: manifest.update(metadata=[1]),
    lambda manifest: manifest.pop("metadata"),
    lambda manifest: manifest["metadata"]["torchrl_pmoe"].pop("config"),
    lambda manifest: manifest["metadata"]["torchrl_pmoe"].update(config=[1, 2]),
    lambda manifest: manifest["metadata"]["torchrl_pmoe"].update(config=None),
    lambda manifest: manifest["metadata"]["torchrl_pmoe"].update(config={}),
    lambda manifest: manifest["metadata"].update(torchrl_pmoe="${"),
    lambda manifest: manifest["metadata"]["torchrl_pmoe"].update(config={"env": "${"}),
    lambda manifest: manifest.update(components={"a": 3}),
]


@pytest.mark.parametrize("change", ODD)
def test_a_manifest_with_odd_content_is_one_line_whatever_its_checksum(change, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    reseal(checkpoints(tmp_path / "run")[-1], change)
    with pytest.raises(UsageError, match=r"must hold a whole checkpoint; [^\n]*an older one is whole"):
        resume.open_run(tmp_path / "run")


@pytest.mark.parametrize("text", ["a: ${", "[" * 3000, "\xff\xfe", "", "- 1"])
def test_a_config_that_cannot_be_read_is_one_line(text, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"config\.yaml") as error:
        resume.open_run(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_pipe_in_a_checkpoint_does_not_hang(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    state = next(checkpoints(tmp_path / "run")[-1].glob("*/*rng/state.pt"))
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(UsageError, match=r"rng/state\.pt is missing"):
        resume.open_run(tmp_path / "run")


@pytest.mark.parametrize("value", ["5", "nowhere"])
def test_target_reaching_refuses_what_is_no_experiment(value, tmp_path):
    assert_one_line(
        start("target_reaching", f"resume={value}", directory=tmp_path),
        f"resume={value}: must be the directory of a run",
    )


@pytest.mark.parametrize(("damage", "why"), BAD.values(), ids=list(BAD))
def test_a_bad_checkpoint_is_one_line_and_a_whole_older_one_is_offered(damage, why, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    older, newest = checkpoints(tmp_path / "run")
    damage(newest)
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=why) as error:
        resume.open_run(tmp_path / "run")
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"{tmp_path / 'run'}: must hold a whole checkpoint; ")
    assert line.endswith(f"an older one is whole: {older}")
    assert snapshot(tmp_path) == before
    assert resume.open_run(older)[1] == older


def test_a_run_without_a_whole_checkpoint_says_so(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for checkpoint in checkpoints(tmp_path / "run"):
        truncate(checkpoint / "manifest.json")
    with pytest.raises(UsageError, match="no older one is whole"):
        resume.open_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UsageError, match="there is no checkpoint yet"):
        resume.open_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda run: other_config(checkpoints(run)[-1]), "was written with num_experts=7, config.yaml has 4"),
        (lambda run: truncate(run / "config.yaml"), "config.yaml"),
        (lambda run: (run / "config.yaml").unlink(), "must hold the run's config.yaml, which is missing or damaged"),
    ],
    ids=["other run's checkpoint", "damaged config", "no config"],
)
def test_a_config_that_does_not_belong_to_the_checkpoint_is_refused(spoil, why, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(UsageError, match=re.escape(why)) as error:
        resume.open_run(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_bad_resumes_on_the_command_line_leave_everything_as_it_was(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    older, newest = checkpoints(tmp_path / "run")
    flip(next(newest.glob("*/*optimizer/state.pt")))
    before = snapshot(tmp_path)
    assert_one_line(
        start("sac_pmoe", "resume=run", "total_frames=300", directory=tmp_path), "resume=run: must hold a whole"
    )
    assert_one_line(
        start("ppo_pmoe", "resume=run/checkpoints/" + older.name, directory=tmp_path), "resume=run/checkpoints"
    )
    assert snapshot(tmp_path) == before
    # what is offered works; the damaged one is set aside
    done = start("sac_pmoe", f"resume=run/checkpoints/{older.name}", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"now set-aside-{newest.name}" in done.stdout
    assert timeless_rows(tmp_path / "run") == timeless_rows(finished)
    assert frames_of(checkpoints(tmp_path / "run")[-1]) == 240


def test_a_run_without_its_replay_buffer_cannot_go_on(tmp_path):
    recipe_runs.run_here(sac_pmoe, tmp_path / "run", *SAC, "checkpoint.replay_buffer=false")
    assert not list((tmp_path / "run").rglob("rows-*"))
    with pytest.raises(UsageError, match="must hold the replay buffer"):
        go_on_here(sac_pmoe, tmp_path / "run")


def test_a_full_disk_ends_the_run_with_a_line_and_the_last_checkpoint_whole(tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = VerifiedCheckpoint._seal
    saves = []

    def fill(self, root):
        saves.append(root)
        if len(saves) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        return write(self, root)

    monkeypatch.setattr(VerifiedCheckpoint, "_seal", fill)
    try:
        with pytest.raises(RunError) as error:
            recipe_runs.run_here(sac_pmoe, tmp_path / "run", *SAC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = str(error.value)
    assert "checkpoint-000000000150 could not be written: File too large; the run stops here" in line
    assert "checkpoint-000000000100 is whole; goes on with: " in line
    assert "\n" not in line
    monkeypatch.undo()
    assert resume.open_run(tmp_path / "run")[1].name == "checkpoint-000000000100"
    go_on_here(sac_pmoe, tmp_path / "run")
    recipe_runs.run_here(sac_pmoe, tmp_path / "alone", *SAC)
    assert timeless_rows(tmp_path / "run") == timeless_rows(tmp_path / "alone")


AWKWARD = [
    "run",
    "bob's run",
    "a b=c",
    "a,b",
    "[a]",
    "{a:b}",
    "-a",
    "5",
    "null",
    "1e-3",
    "é漢",
    "a\\b",
    "a\\'",
    "${a}",
    "\\${",
    "x(1)",
]


@pytest.mark.parametrize("name", [*AWKWARD, "\"'`$~!*?;&|<>#%^"])
def test_the_command_that_goes_on_names_the_directory_whatever_its_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["my recipes/sac_pmoe.py"])
    # what the shell makes of it, then Hydra, then OmegaConf
    told = resume.command_to_resume(tmp_path / name)
    shell = subprocess.run(["sh", "-c", f"printf '%s\\n' {told}"], capture_output=True, text=True, check=True)
    python, script, argument = shell.stdout.splitlines()
    assert (python, script) == (resume.interpreter(), "my recipes/sac_pmoe.py")
    assert recipe_runs.composed(sac_pmoe, argument).resume == name


def test_a_plain_path_is_not_quoted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipes/sac_pmoe.py"])
    monkeypatch.setattr(resume.shutil, "which", lambda name: sys.executable)
    assert resume.command_to_resume(tmp_path / "a" / "run-1") == "python recipes/sac_pmoe.py resume=a/run-1"


def test_the_interpreter_that_runs_is_the_one_that_is_advised(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(resume.shutil, "which", lambda name: "/usr/bin/python")
    assert resume.interpreter() == ".venv/bin/python"
    monkeypatch.setattr(resume.shutil, "which", lambda name: sys.executable)
    assert resume.interpreter() == "python"


# ----------------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("recipe", [sac_pmoe, ppo_pmoe])
@pytest.mark.parametrize("what", ["Reward", "Observation"])
def test_a_bad_frame_stops_a_run_that_leaves_bad_updates_out(recipe, what, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    small = [*(SAC if recipe is sac_pmoe else PPO), f"env=recipe_envs:Nan{what}-v0", "total_frames=1000"]
    with pytest.raises(RunError, match="the environment returned a NaN or infinite"):
        recipe_runs.run_here(recipe, tmp_path, *HERE, *small, "on_nonfinite=skip", "logger.eval_max_steps=10")
    assert [row["skipped_updates"] for row in recipe_runs.rows(tmp_path)] == ["0"] * len(recipe_runs.rows(tmp_path))
    assert "skipped_frames" not in recipe_runs.rows(tmp_path)[0]
