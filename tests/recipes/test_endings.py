"""However a run ends, it says so in one line, keeps what it can, and leaves the others alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import recipe_runs
from recipe_runs import RECIPES, in_background, wait_for

from parts import launch as launching  # isort: skip
from parts import process, resume, training  # isort: skip

SMALL = [
    "env=Pendulum-v1",
    "total_frames=400",
    "network.hidden_sizes=[16,16]",
    "optim.batch_size=16",
    "optim.utd_ratio=0.1",
    "collector.frames_per_batch=10",
    "collector.init_random_frames=50",
    "logger.eval_interval=400",
    "logger.eval_episodes=2",
    "logger.eval_max_steps=20",
    "logger.progress_bar=false",
    "checkpoint.interval=100",
]


def test_what_nobody_has_foreseen_is_one_line_with_the_traceback_in_a_file(launch, tmp_path):
    status, lines = launch("sac_pmoe", *SMALL, "env=recipe_envs:Breaks-v0", "hydra.run.dir=run")
    assert status == 1
    assert lines == [
        "error: frame 330: ValueError: the hinge broke: no more steps (the traceback is in run/error.log); "
        "the run stops here, checkpoint-000000000300 is whole; goes on with: "
        f"{resume.interpreter()} {RECIPES / 'sac_pmoe.py'} resume=run"
    ]
    kept = (tmp_path / "run" / "error.log").read_text()
    assert 'raise ValueError("the hinge broke' in kept
    assert "Traceback (most recent call last)" in kept


def test_an_error_before_the_first_frame_is_one_line_too(launch, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    # the script is run as a new module, which takes the name from here
    monkeypatch.setattr(training, "build_collector", broken)
    status, lines = launch("sac_pmoe", *SMALL, "hydra.run.dir=run")
    assert (status, lines) == (1, ["error: ZeroDivisionError; the traceback is in run/error.log"])
    assert "ZeroDivisionError" in (tmp_path / "run" / "error.log").read_text()


def test_a_traceback_that_cannot_be_kept_in_the_run_is_kept_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    line = process.keep_traceback(ValueError("no"), tmp_path / "missing")
    (file,) = tmp_path.glob("torchrl_pmoe-*-error.log")
    assert line == f"the traceback is in {file}"
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path / "missing"))
    assert process.keep_traceback(ValueError("no")) == "there is no room for the traceback"


# ------------------------------------------------------------------------------------------------ sweeps


def test_jobs_of_a_sweep_that_fail_leave_the_others_their_turn_and_are_told_at_the_end(launch, tmp_path):
    envs = ["recipe_envs:Breaks-v0", "recipe_envs:Hungry-v0", "nope", "recipe_envs:NanReward-v0", "Pendulum-v1"]
    sweep = ["hydra.sweep.dir=s", "hydra.sweep.subdir=${hydra.job.num}"]
    status, lines = launch("sac_pmoe", "-m", *SMALL[1:], f"env={','.join(envs)}", *sweep)
    assert status == 1
    assert recipe_runs.rows(tmp_path / "s" / "4")[-1]["frames"] == "400"
    at_once, told = lines[:4], lines[4:]
    assert [line.split(":")[0] for line in at_once] == ["error"] * 4
    assert len(told) == 4
    for index, (line, before, why) in enumerate(
        zip(told, at_once, ["the hinge broke", "more memory than there is", "must be the id", "NaN"], strict=True)
    ):
        written = envs[index].replace(":", "\\:")
        assert line.startswith(f"failed: env={written} in s/{index}: ")
        assert line.endswith(before.removeprefix("error: "))
        assert why in line
    assert (tmp_path / "s" / "0" / "error.log").is_file()
    # as a run of its own, a job whose config is refused leaves nothing
    assert not (tmp_path / "s" / "2").exists()
    assert (tmp_path / "s" / "multirun.yaml").is_file()


def test_a_sweep_in_which_every_config_is_refused_leaves_nothing(launch, tmp_path):
    status, lines = launch("sac_pmoe", "-m", "env=nope", "seed=0,1", "hydra.sweep.dir=a/s")
    assert status == 2
    assert [line[:16] for line in lines] == ["error: env=nope:"] * 2 + ["failed: seed=0 i", "failed: seed=1 i"]
    assert not list(tmp_path.iterdir())


def test_a_job_in_a_process_of_another_launcher_hands_its_error_to_hydra(monkeypatch):
    monkeypatch.setattr(launching, "sweep", launching.Sweep())
    launching.sweep.parent = os.getpid() + 1
    with pytest.raises(launching.JobError) as error:
        launching.sweep.fail("error: no", 1)
    assert (error.value.line, error.value.status) == ("error: no", 1)


def test_an_interrupt_ends_a_sweep_once_the_running_job_has_its_checkpoint(tmp_path):
    endless = ["total_frames=1e6", "compile.enabled=false"]  # so many updates would be compiled
    sweep = ["seed=nope,0,1", "hydra.sweep.dir=s", "hydra.sweep.subdir=${hydra.job.num}", *endless]
    job = tmp_path / "s" / "1"
    with in_background("sac_pmoe", "-m", *SMALL, *sweep, directory=tmp_path) as running:
        wait_for(lambda: list(job.glob("checkpoints/checkpoint-*")), running)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate()
    assert running.returncode == 130
    refused, told, stopped, failed = (line for line in err.splitlines() if line)
    assert refused.startswith("error: seed=nope: ")
    assert told.startswith("stopping: ")
    assert stopped.startswith("stopped at frame ")
    assert stopped.endswith("resume=s/1")
    assert failed.startswith("failed: seed=nope in s/0: ")
    assert [path.name for path in Path(tmp_path, "s").iterdir() if path.is_dir()] == ["1"]


# ----------------------------------------------------------------------------------------------- terminals


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.no_such_backend", "nonsense", "pdf"])
def test_pictures_are_drawn_whatever_backend_a_notebook_has_left(backend, tmp_path):
    code = (
        "import os; from parts import figures; figure, axes = figures.subplots(figsize=(1, 1)); axes.plot([1, 2]);"
        "figure.savefig('a.png'); print(os.environ['MPLBACKEND'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(RECIPES)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, backend), done.stderr
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_imports_of_a_recipe_end_in_one_line_for_a_renderer_that_is_none(tmp_path):
    done = subprocess.run(
        [sys.executable, str(RECIPES / "evaluate.py"), "run"],
        cwd=tmp_path,
        env={**os.environ, "MUJOCO_GL": "nonsense"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: MUJOCO_GL=nonsense: must be egl, osmesa, glfw or disable")


def test_a_cache_of_the_compiler_that_cannot_be_written_is_named(monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nope")
    with pytest.raises(FileNotFoundError) as error:
        os.makedirs("/proc/nope/triton")
    process._unexpected(error.type, error.value, None)
    expected = "error: TORCHINDUCTOR_CACHE_DIR=/proc/nope: must be a directory that can be written (No such file or"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize("recipe", ["sac_pmoe", "evaluate"])
def test_an_interrupt_while_modules_are_imported_is_one_line(recipe, tmp_path):
    # a module that stands for PyTorch, of which a second is enough
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(600)")
    running = subprocess.Popen(
        [sys.executable, str(RECIPES / f"{recipe}.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert running.stdout.readline() == "importing\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=600)
    assert (running.returncode, err) == (130, "interrupted\n")


def test_a_warning_is_one_line_and_odd_letters_do_not_end_a_run(tmp_path):
    code = (
        "import warnings; from parts import process; process.begin(); warnings.warn('two\\nlines', stacklevel=1);"
        "print('1 \u00b1 2'); raise ValueError('\u00e9')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(RECIPES), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == "1 \\xb1 2\n"
    warning, error = done.stderr.splitlines()
    assert warning == r"warning: two\nlines"
    assert error.startswith(r"error: ValueError: \xe9; the traceback is in ")


# ------------------------------------------------------------------------------------------------ workers


def processes_of(session):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, of = stat.read_text().rsplit(")", 1)[1].split()[:4]
            if int(of) == session and state not in "ZX":
                found.append(stat.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="finds processes through /proc")
def test_workers_of_an_experiment_that_was_killed_end_with_checkpoints(tmp_path):
    small = [value for value in SMALL if not value.startswith(("env=", "logger.eval_interval"))]
    args = ["policies=[gaussian,pmoe]", "num_workers=2", "total_frames=1e6", "exploration_frames=100", "episodes=10"]
    args += ["replay_buffer.size=2e6", "logger.eval_interval=1e6", "collector.num_envs=10", "compile.enabled=false"]
    runs_of = [tmp_path / "run" / name for name in ("gaussian-seed0", "pmoe-seed0")]

    def written():
        return [sorted(run.glob("checkpoints/checkpoint-*")) for run in runs_of]

    with in_background("target_reaching", *small, *args, "hydra.run.dir=run", directory=tmp_path) as running:
        wait_for(lambda: all(written()), running)
        os.kill(running.pid, signal.SIGKILL)
        running.communicate()
        while processes_of(running.pid):
            time.sleep(0.05)
        _, err = running.communicate()
    assert err.count("stopping: ") == 2
    assert "Traceback" not in err
    for run in runs_of:
        frames = [int(row.split(",")[0]) for row in (run / "checkpoints.csv").read_text().splitlines()[1:]]
        # the last one was written because of the signal, not because of its interval
        _, checkpoint = resume.open_run(run)
        assert int(checkpoint.name.split("-")[1]) == frames[-1]
