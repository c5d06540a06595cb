"""A run directory has one owner: two real processes, and what one of them has left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import recipe_runs
from hydra import compose, initialize_config_dir
from recipe_runs import RECIPES, UsageError

from torchrl_pmoe.runs import DirectoryInUseError, RunDirectory

import evaluate  # isort: skip
import sac_pmoe  # isort: skip
import target_reaching  # isort: skip
from config.sac_pmoe import SACConfig  # isort: skip
from parts import resume  # isort: skip
from parts.launch import own_scratch  # isort: skip
from config.typed import build, to_dict  # isort: skip

SMALL = [
    "env=Pendulum-v1",
    "total_frames=120",
    "network.hidden_sizes=[8,8]",
    "optim.batch_size=16",
    "collector.init_random_frames=40",
    "logger.eval_interval=60",
    "logger.eval_episodes=1",
    "logger.eval_max_steps=20",
    "checkpoint.interval=40",
    "compile.enabled=false",
    "device=cpu",
    "logger.progress_bar=false",
]


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def in_session(leader: int) -> set[int]:
    """The living processes of a session, but for its leader."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state not in "ZX":
            found.add(int(stat.parent.name))
    return found - {leader}


@contextmanager
def training(directory: Path, *args: str):
    """A run without end, in a process of its own, from its first checkpoint on."""
    with (directory / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(RECIPES / "sac_pmoe.py"), *SMALL, "total_frames=1e6", "hydra.run.dir=run", *args],
            cwd=directory, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        try:
            end = time.monotonic() + 600
            while not list(directory.glob("run/checkpoints/checkpoint-*")):
                assert process.poll() is None, (directory / "said").read_text()
                assert time.monotonic() < end
                time.sleep(0.02)
            yield process
        finally:
            for pid in (process.pid, *in_session(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


# ------------------------------------------------------------------------------------------- two processes


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
def test_a_run_that_trains_is_left_alone_and_its_directory_is_free_once_it_is_killed(launch, capfd, tmp_path):
    new = [*SMALL, "hydra.run.dir=run"]
    parallel = ["collector.num_envs=2", "collector.backend=parallel", "replay_buffer.scratch_dir=scratch"]
    with training(tmp_path, *parallel) as process:
        uses = f"process {process.pid} on {os.uname().nodename} uses it"
        free = "must be a directory that no other process uses"
        config = (tmp_path / "run" / "config.yaml").read_bytes()
        begun = {
            ("sac_pmoe", *new): f"hydra.run.dir=run: {free}; {uses}",
            ("ppo_pmoe", "env=Pendulum-v1", "hydra.run.dir=run"): f"hydra.run.dir=run: {free}; {uses}",
            ("target_reaching", "hydra.run.dir=run"): f"hydra.run.dir=run: {free}; {uses}",
            ("sac_pmoe", "resume=run"): f"resume=run: must be a run that no other process uses; {uses}",
            ("sac_pmoe", *SMALL, "replay_buffer.scratch_dir=scratch", "hydra.run.dir=other"): (
                f"replay_buffer.scratch_dir=scratch: {free}; {uses}"
            ),
        }
        for args, line in begun.items():
            assert launch(*args) == (2, [f"error: {line}"])
        assert evaluate.main([str(tmp_path / "run"), "--output", str(tmp_path / "run"), "--episodes", "1"]) == 2
        assert "must be a directory without a run" in capfd.readouterr().err
        assert (tmp_path / "run" / "config.yaml").read_bytes() == config
        assert not (tmp_path / "other").exists()
        workers = in_session(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for place in ("run", "scratch"):
            with RunDirectory(tmp_path / place).own():
                pass
        assert len(workers) > 2
    rows = [int(row["frames"]) for row in recipe_runs.rows(tmp_path / "run")]
    assert rows == sorted(set(rows))


def test_two_evaluations_do_not_write_to_one_place(finished, tmp_path, capsys):
    place = tmp_path / "evaluation"
    with RunDirectory(place).own():
        assert evaluate.main([str(finished), "--output", str(place), "--episodes", "1", "--no-video"]) == 2
        line = f"error: --output={place}: must be a directory that no other process uses; process {os.getpid()} on "
        assert capsys.readouterr().err.startswith(line)
        assert [path.name for path in place.iterdir()] == [RunDirectory.LOCK]


# ------------------------------------------------------------------------------------------- what one has left


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    recipe_runs.run_here(sac_pmoe, run, *SMALL)
    return run


@pytest.mark.parametrize("recipe", ["sac_pmoe", "dac", "target_reaching"])
def test_a_new_run_does_not_begin_where_another_has_been(recipe, finished, launch, tmp_path):
    shutil.copytree(finished, tmp_path / "bob's run")
    before = snapshot(tmp_path)
    small = SMALL if recipe == "sac_pmoe" else []
    status, (line,) = launch(recipe, *small, 'hydra.run.dir="bob\'s run"')
    assert status == 2
    assert line == (
        "error: hydra.run.dir=bob's run: must be a directory without a run, it has checkpoints, checkpoints.csv, "
        "config.yaml, finished, learning_curve.png, metrics.csv, model_card.md; "
        "resume='bob\\'s run' goes on with that run"
    )
    assert snapshot(tmp_path) == before


def test_a_directory_with_other_things_may_become_that_of_a_run(launch, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    status, lines = launch("sac_pmoe", *SMALL, "hydra.run.dir=.")
    assert (status, lines) == (0, [])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / RunDirectory.LOCK).exists()


def test_runs_of_the_same_second_have_directories_of_their_own():
    def directories(recipe: str) -> tuple[str, str]:
        with initialize_config_dir(str(RECIPES / "config"), version_base="1.3"):
            hydra = compose(recipe, return_hydra_config=True).hydra
        hydra.job.num = 0
        assert hydra.sweep.dir == hydra.sweep.dir  # of all its jobs
        return hydra.run.dir, hydra.sweep.dir

    for recipe in ("sac_pmoe", "sac_many_seeds", "ppo_pmoe", "dac", "target_reaching"):
        for one, other in zip(directories(recipe), directories(recipe), strict=True):
            assert one != other
            assert re.search(r"/[\d-]{10}_[\d-]{8}-[0-9a-f]{8}$", one)


def test_the_records_of_another_experiment_are_not_written_over(tmp_path, monkeypatch):
    """Of a run that was begun and is not finished; the config that is there stays."""
    cfg = recipe_runs.composed(target_reaching, *SMALL[1:-2], "policies=[gaussian]", "exploration_frames=40")
    name, run = next(iter(target_reaching.resolve(cfg).items()))
    before = to_dict(run)
    monkeypatch.setattr(target_reaching, "open_run", lambda path: (before, path / "checkpoint-000000000040"))
    (tmp_path / name / "checkpoints" / "checkpoint-000000000040").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("recipe: target_reaching\n")
    assert target_reaching.unfinished(cfg, {name: run}, tmp_path)[name].resume.endswith("checkpoint-000000000040")
    cfg.optim.lr = 0.1
    with pytest.raises(UsageError, match=r"optim\.lr=0\.1: must be 0\.001 in "):
        target_reaching.train_all(cfg, target_reaching.resolve(cfg), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "recipe: target_reaching\n"


# ------------------------------------------------------------------------------------------- replay on disk


def config(scratch: Path, before: str | None) -> SACConfig:
    return build(SACConfig, {"replay_buffer": {"scratch_dir": str(scratch)}, "resume": before})


def test_frames_on_disk_have_one_run(tmp_path):
    scratch, run, other = tmp_path / "scratch", tmp_path / "run", tmp_path / "other"
    run.mkdir(), other.mkdir()
    with own_scratch(config(scratch, None), run):
        assert scratch.is_dir()
    assert not scratch.exists()
    with own_scratch(config(scratch, None), run):
        (scratch / "observation.memmap").touch()
        with pytest.raises(DirectoryInUseError):
            RunDirectory(scratch).own().__enter__()
    for before, directory, line in (
        (None, other, "must be empty or not there"),
        ("checkpoint", other, f"must be that of the run that goes on, it is that of {run}"),
    ):
        with pytest.raises(UsageError, match=re.escape(f"replay_buffer.scratch_dir={scratch}: {line}")):
            own_scratch(config(scratch, before), directory).__enter__()
    # None: it was killed before its first checkpoint, and begins again
    for before in (None, "checkpoint"):
        with own_scratch(config(scratch, before), run):
            pass
    run.rename(tmp_path / "moved")
    with own_scratch(config(scratch, "checkpoint"), tmp_path / "moved"):
        pass
    assert (scratch / "observation.memmap").exists()


def test_frames_on_disk_need_a_directory_that_can_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"must be a directory that can be written to \(Not a directory\)"):
        own_scratch(config(tmp_path / "file" / "scratch", None), tmp_path).__enter__()


def test_every_training_of_an_experiment_has_its_frames_in_a_place_of_its_own():
    args = ["policies=[gaussian,pmoe]", "num_seeds=2", "replay_buffer.scratch_dir=there"]
    found = target_reaching.resolve(recipe_runs.composed(target_reaching, *args))
    assert {cfg.replay_buffer.scratch_dir for cfg in found.values()} == {f"there/{name}" for name in found}


# ------------------------------------------------------------------------------------------- what a run is told to be


def test_a_run_says_of_which_recipe_it_is(finished):
    assert resume.read_config(finished)["recipe"] == "sac_pmoe"
    assert resume.open_run(finished)[0]["recipe"] == "sac_pmoe"


def test_a_run_that_cannot_go_on_is_not_told_to(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sac_pmoe.py"])
    assert resume.how_to_resume(finished) == f"goes on with: {resume.interpreter()} sac_pmoe.py resume={finished}"
    (tmp_path / "config.yaml").write_text("recipe: sac_pmoe\ncheckpoint:\n  replay_buffer: false\n")
    assert resume.how_to_resume(tmp_path).startswith("it cannot go on, with checkpoint.replay_buffer=false ")


# ------------------------------------------------------------------------------------------- services


class Service(ModuleType):
    """W&B or MLflow, as far as TorchRL's loggers and :func:`torchrl_pmoe.runs.run_logger` know them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.runs: list[str] = []
        self.params: list[dict] = []
        self.metrics: list[tuple[str, str, int]] = []

    # W&B

    def init(self, *, id, name, project, **_):
        self.runs.append(id)
        self.names = (name, project)
        return SimpleNamespace(
            id=id,
            config=SimpleNamespace(update=lambda config, **_: self.params.append(config)),
            define_metric=lambda *_, **__: None,
            log=lambda row, **_: self.metrics.extend((id, name, row["step"]) for name in row if name != "step"),
            finish=lambda: None,
        )

    # MLflow

    def start_run(self, experiment_id):
        assert self.active is None
        self.active = os.environ.pop("MLFLOW_RUN_ID", f"run{len(self.runs)}")
        self.runs.append(self.active)
        return SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    active = None
    set_tracking_uri = set_experiment = create_experiment = lambda *_, **__: "experiment"
    get_experiment_by_name = lambda *_, **__: None

    def log_params(self, params):
        self.params.append(params)

    def log_metric(self, *, key, value, step):
        self.metrics.append((self.active, key, step))

    def end_run(self):
        self.active = None


@pytest.mark.parametrize("backend", ["wandb", "mlflow"])
def test_a_run_that_goes_on_writes_to_the_run_of_the_service_that_it_has_begun(
    backend, finished, tmp_path, monkeypatch
):
    service = Service(backend)
    monkeypatch.setitem(sys.modules, backend, service)
    for module in ("wandb", "mlflow"):
        monkeypatch.setattr(sys.modules[f"torchrl.record.loggers.{module}"], f"_has_{module}", True)
    recipe_runs.run_here(sac_pmoe, tmp_path / "run", *SMALL, f"logger.backend={backend}", "checkpoint.keep=10")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-000000000120")
    values, checkpoint = resume.open_run(tmp_path / "run")
    cfg = build(SACConfig, {**values, "resume": str(checkpoint)})
    sac_pmoe.resolve(cfg)
    sac_pmoe.train(cfg, tmp_path / "run")
    recipe_runs.run_here(sac_pmoe, tmp_path / "another" / "run", *SMALL, f"logger.backend={backend}")
    first, again, another = service.runs
    assert first == again != another
    returns = [(run, step) for run, name, step in service.metrics if name == "return_mean"]
    assert returns == [(first, 60), (first, 120), (first, 120), (another, 60), (another, 120)]
    sent = [params for params in service.params if "env" in params and "optim.lr" in params]
    assert sent[0]["env"] == "Pendulum-v1"
    assert sent[0]["optim.lr"] == 3e-4
    assert sent[0]["network.hidden_sizes"] == "[8, 8]"
    assert len(sent) == (3 if backend == "wandb" else 2)


def test_a_service_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    service = Service("wandb")
    monkeypatch.setattr(service, "init", lambda **_: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setattr(sys.modules["torchrl.record.loggers.wandb"], "_has_wandb", True)
    with pytest.raises(UsageError, match=r"logger\.backend=wandb: must be one that can be written to \(ZeroDiv"):
        recipe_runs.run_here(sac_pmoe, tmp_path / "run", *SMALL, "logger.backend=wandb")
    assert not RunDirectory(tmp_path / "run").outputs() or RunDirectory(tmp_path / "run").outputs() == ["logs"]


def test_a_service_that_fails_when_it_is_closed_is_a_warning(tmp_path, monkeypatch):
    service = Service("wandb")
    begin = service.init
    monkeypatch.setattr(
        service, "init", lambda **kwargs: SimpleNamespace(**vars(begin(**kwargs)) | {"finish": lambda: 1 / 0})
    )
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setattr(sys.modules["torchrl.record.loggers.wandb"], "_has_wandb", True)
    with pytest.warns(UserWarning, match=r"the wandb logger could not be closed \(ZeroDivisionError"):
        recipe_runs.run_here(sac_pmoe, tmp_path / "run", *SMALL, "logger.backend=wandb")
    assert "checkpoints" in RunDirectory(tmp_path / "run").outputs()
