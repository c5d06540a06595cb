"""A sweep is a table of idempotent runs, whatever ends it; most of these tests run a recipe that trains nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import recipe_runs
from recipe_runs import RECIPES

import sweep  # isort: skip
from config.sweep import OWN, RECIPES as SWEPT, read_command, table  # isort: skip
from config.typed import described_keys  # isort: skip
from parts import cells, engines  # isort: skip
from parts.cells import Cell, Outcome, run_cell, state_of  # isort: skip

STUB = Path(__file__).with_name("stub_recipe.py")


def make(directory: Path, seed: int = 0, *overrides: str, frames: int = 100) -> Cell:
    made = directory / f"seed={seed}"
    made.mkdir(parents=True, exist_ok=True)
    more = (f"total_frames={frames}", *overrides)
    return Cell(made, (sys.executable, str(STUB)), (f"seed={seed}", *more), more, frames, working_directory=directory)


def starts(cell: Cell) -> list[str]:
    """The commands that were started in a cell."""
    log = cell.directory / cells.LOG
    return re.findall(r"^\$ (.*)$", log.read_text(), re.MULTILINE) if log.exists() else []


def wait_for(condition) -> None:
    for _ in range(60_000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("ten minutes have passed")


def half_done(cell: Cell) -> bool:
    return bool(cell.run.checkpoints()) and int(cell.run.checkpoints()[0].name.split("-")[1]) == cell.frames // 2


# ------------------------------------------------------------------------------------------------- the table


def names(*arguments: str) -> list[str]:
    cfg, overrides = read_command(arguments)
    return [cell.name for cell in table(cfg.recipe, overrides)]


def test_every_combination_is_a_cell_named_by_what_it_is():
    assert names("env=Hopper-v4,Walker2d-v4", "policy=pmoe,gaussian", "seed=0..1", "total_frames=1e6") == [
        f"env={env}_policy={policy}_seed={seed}"
        for env in ("Hopper-v4", "Walker2d-v4")
        for policy in ("pmoe", "gaussian")
        for seed in (0, 1)
    ]


def test_the_name_of_a_cell_does_not_depend_on_the_others_or_on_the_order():
    (one,) = names("optim.lr=1e-3", "seed=3", "env=Hopper-v4")
    assert one == "env=Hopper-v4_policy=pmoe_seed=3_optim.lr=0.001"
    assert names("seed=3,4", "env=Hopper-v4,Ant-v4", "optim.lr=1e-3,3e-4")[0] == one
    # what a run may be given on its way does not make it another one, unless the table is about that
    assert names("seed=0", "total_frames=50", "logger.eval_episodes=2") == names("seed=0")
    assert [name.partition("seed=0_")[2] for name in names("total_frames=50,60")] == [
        "total_frames=50",
        "total_frames=60",
    ]


@pytest.mark.parametrize("seeds", ["0..3", "range(0,4)", "0..1,2,3", "choice(0,1,2,3)"])
def test_values_are_written_as_in_hydra_and_as_first_and_last(seeds):
    assert [re.search(r"seed=(\d+)", name)[1] for name in names(f"seed={seeds}")] == ["0", "1", "2", "3"]


def test_cells_that_are_the_same_run_are_one():
    found = names("policy=pmoe,gaussian", "routing=frequency,soft_frequency", "optim.lr=1e-3,0.001")
    assert [re.sub(r"env=[^_]+_|_optim.lr=0.001", "", name) for name in found] == [
        "policy=pmoe_seed=0_routing=frequency",
        "policy=pmoe_seed=0_routing=soft_frequency",
        "policy=gaussian_seed=0",
    ]


def test_names_are_short_and_plain():
    for name in names("env=PMOE/TargetReaching-v0", "network.hidden_sizes=[64,64],[8]", "+env_kwargs.layout='a b*:?'"):
        assert re.fullmatch(r"[\w.=+-]+", name, re.ASCII)
    widths = ",".join(f"[{','.join(['64'] * count)}]" for count in (30, 60))
    long = names("env=Hopper-v4", f"network.hidden_sizes={widths}", "optim.batch_size=16")
    assert len(set(long)) == 2
    assert all(len(name) <= 120 and name.startswith("env=Hopper-v4_policy=pmoe_seed=0_") for name in long)


def test_no_recipe_has_a_key_that_the_sweep_has():
    for name, recipe in SWEPT.items():
        assert OWN & {key.split(".")[0] for key in described_keys(recipe.config_class)} == {"recipe"}, name
        assert name in recipe_runs.CONFIGS
    assert set(SWEPT) == set(recipe_runs.CONFIGS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["status"], "status: must be written key=value"),
        (["recipe=sac"], "recipe=sac: must be one of sac_pmoe, ppo_pmoe, dac, sac_many_seeds, target_reaching"),
        (["engine=slrum"], "engine=slrum: must be one of local, ray, slurm"),
        (["engine=local,ray"], "engine=local,ray: must be one value, it holds for the whole sweep"),
        (["seed=0..4", "jobs=0"], "jobs=0: must be an integer >= 1 and <= 100000 or null"),
        (["seed=4..0"], "4..0: must be first..last, where last is not below first, and 100,000 values at most"),
        (["seed=0,1", "seed=2"], "seed=2: must be given once, as seed=value,value"),
        (["resume=x"], "resume=x: must be left out, every cell has a directory of its own"),
        (["hydra.run.dir=x"], "hydra.run.dir=x: must be left out, every cell has a directory of its own"),
        (["~seed"], "~seed: must be written key=value, key=value,value or key=first..last"),
        (["optim.lr=interval(0,1)"], "optim.lr=interval(0,1): must be written key=value, key=value,value or key="),
        (["seed=0,1", "optim.learning_rate=1"], "optim.learning_rate=1: no such key; allowed are optim.lr, "),
        (["env_kwargs.x=1,2"], "env_kwargs.x=1: must be written +env_kwargs.x=1, an argument of the environment is"),
        (["policy=pmoe,gausian"], "policy=gausian: must be one of "),
        (["optim.lr=1e-3,-1"], "optim.lr=-1: must be a number > 0"),
        (["policy=pmoe,gaussian", "optim.router_lr=1e-3"], "optim.router_lr=0.001: must be null with policy=gaussian"),
        (["env=Hopper-v4", "+env_kwargs.x='a:b','a;b'"], "env=Hopper-v4 +env_kwargs.x='a;b': must differ from"),
    ],
)
def test_what_is_wrong_with_any_cell_is_one_line_before_any_begins(arguments, line, launch, tmp_path):
    status, (said,) = launch("sweep", *arguments)
    assert status == 2
    assert said.startswith(f"error: {line}")
    assert list(tmp_path.iterdir()) == []


def test_a_cell_is_refused_where_its_directory_holds_another_run(launch, tmp_path):
    old = tmp_path / "outputs" / "sweeps" / "sac_pmoe" / "env=Hopper-v4_policy=pmoe_seed=0"
    old.mkdir(parents=True)
    (old / cells.PLAN).write_text('{"recipe": "sac_pmoe", "num_experts": 7, "logger": {"eval_episodes": 3}}')
    status, (said,) = launch("sweep", "env=Hopper-v4", "seed=0,1")
    assert status == 2
    assert said.startswith(f"error: num_experts=4: must be 7 in {old.relative_to(tmp_path)}, where the run has that")


def test_a_run_goes_on_to_the_frames_of_the_table_whether_they_are_given_or_not(tmp_path):
    for arguments, changes in (
        (("seed=0",), ("total_frames=1000000", "optim.num_threads=1", "logger.progress_bar=false")),
        (
            ("total_frames=50", "optim.num_threads=2"),
            ("total_frames=50", "optim.num_threads=2", "logger.progress_bar=false"),
        ),
        (("recipe=target_reaching",), ("optim.num_threads=1", "logger.progress_bar=false")),
    ):
        cfg, overrides = read_command(arguments)
        (planned,) = table(cfg.recipe, overrides)
        assert sweep.make_cell(cfg, tmp_path, planned).changes == changes


def test_status_prints_the_table_and_starts_nothing(launch, tmp_path):
    assert launch("sweep", "env=Hopper-v4", "policy=pmoe,gaussian", "status=true") == (0, [])
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_key(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--help"])
    sweep.main()
    printed = capsys.readouterr().out
    assert all(f"  {name}=" in printed for name in ("engine", "ray.address", "slurm.partition", "retry", "status"))


def test_multirun_of_hydra_names_the_sweep_that_goes_on(launch, tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    launch("sac_pmoe", "-m", "env=Hopper-v4", "seed=0,1", "policy=nobody")
    assert printed[0].endswith("sweep.py recipe=sac_pmoe env=Hopper-v4 seed=0,1 policy=nobody")


# ------------------------------------------------------------------------------------------------- one cell


def test_a_cell_runs_once_and_its_state_is_read_from_its_files(tmp_path):
    cell = make(tmp_path)
    assert state_of(cell) == "new"
    assert run_cell(cell) == Outcome("finished")
    assert state_of(cell) == "finished"
    assert run_cell(cell) == Outcome("finished")
    assert len(starts(cell)) == 1
    assert cells.progress_of(cell) == cells.Progress(100, 1.5, 100.0)


def test_more_frames_go_on_with_the_same_run(tmp_path):
    run_cell(make(tmp_path))
    longer = make(tmp_path, frames=150)
    assert state_of(longer) == "resumable"
    assert run_cell(longer) == Outcome("finished")
    # names with = are quoted as Hydra needs it
    assert starts(longer)[1].endswith("resume='\"'\"'seed=0'\"'\"'' total_frames=150")


def test_a_run_that_left_no_checkpoint_begins_anew(tmp_path):
    cell = make(tmp_path)
    (cell.directory / "config.yaml").write_text("{}")
    (cell.directory / "logs").mkdir()
    assert state_of(cell) == "new"
    assert run_cell(cell) == Outcome("finished")


def test_a_failed_cell_waits_for_retry_and_says_why(tmp_path):
    cell = make(tmp_path, 0, "fail=no such thing")
    failure = cells.Failure("no such thing", 1)
    assert run_cell(cell) == Outcome("failed", failure)
    assert run_cell(cell) == Outcome("failed", failure)
    assert (len(starts(cell)), state_of(cell)) == (1, "failed")
    well = make(tmp_path, 0)
    assert run_cell(well, retry=True) == Outcome("failed", failure)  # its own config holds, and that fails
    assert len(starts(cell)) == 2


def test_a_killed_cell_has_not_failed(tmp_path):
    cell = make(tmp_path, 0, "kill=SIGKILL")
    assert run_cell(cell) == Outcome("resumable", cells.Failure("ended by SIGKILL", -9))
    assert state_of(cell) == "resumable"
    assert run_cell(make(tmp_path, 0, "kill=")) == Outcome("finished")


@pytest.mark.parametrize("more", [1, 2], ids=["told once", "told twice"])
def test_a_stop_ends_the_process_with_its_checkpoint_and_a_second_one_at_once(more, tmp_path):
    cell = make(tmp_path, 0, f"hold={tmp_path / 'go'}")
    stops = []
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_cell, cell, stops=lambda: len(stops))
        wait_for(lambda: half_done(cell))
        assert (state_of(cell), run_cell(cell)) == ("running", Outcome("running"))
        stops += [0] * more
        assert future.result() == Outcome("resumable")
    assert len(starts(cell)) == 1


def test_a_signal_to_the_whole_group_is_heard_once(tmp_path):
    """A manager of jobs tells every process, and so does the sweep."""
    cell = make(tmp_path, 0, f"hold={tmp_path / 'go'}")
    read, _ = os.pipe()
    with (cell.directory / cells.LOG).open("ab") as log:
        process = cells.start([*cell.command, *cells._begin(cell)], cell, log.fileno())
    wait_for(lambda: half_done(cell))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):  # a terminal's, and those of a manager
        process.send_signal(number)
    process.terminate()
    wait_for(lambda: process.poll() is not None or b"stopping: " in (cell.directory / cells.LOG).read_bytes())
    cells.end(process, cell, 0)
    assert process.wait() == 128 + signal.SIGTERM
    os.close(read)


def test_a_lease_ends_with_its_process(tmp_path):
    cell = make(tmp_path)
    code = (
        f"import sys, time; sys.path.insert(0, {str(RECIPES)!r}); from parts.cells import Cell, lease\n"
        f"from pathlib import Path\nwith lease(Cell(Path({str(cell.directory)!r}), (), (), (), 1)) as free:\n"
        "    print(free, flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    assert run_cell(cell) == Outcome("running")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run_cell, cell, wait=True)
        holder.kill()
        holder.communicate()
        assert waiting.result() == Outcome("finished")


# --------------------------------------------------------------------------------------------- many cells


def rows_of(made: list[Cell]) -> list[sweep.Row]:
    return [sweep.look(cell) for cell in made]


def sweep_through(made: list[Cell], received=(), jobs: int = 2, retry: bool = False) -> list[sweep.Row]:
    rows = rows_of(made)
    engine = engines.Local(retry=retry, jobs=jobs)
    display = sweep.Display(rows, disable=True)
    sweep.run(engine, rows, display, received)
    display.close()
    engine.close()
    return rows


def test_a_failed_cell_does_not_end_the_others_and_has_one_line_with_its_log(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [make(tmp_path, 0), make(tmp_path, 1, "fail=a bad day"), make(tmp_path, 2)]
    rows = sweep_through(made)
    assert [row.state for row in rows] == ["finished", "failed", "finished"]
    assert capsys.readouterr().err == "failed: seed=1: a bad day; its log is seed=1/log.txt\n"
    assert sweep.summary(rows) == "2 finished, 1 failed"
    assert [line.split("|")[2].strip() for line in list(sweep.lines(rows))[2:]] == ["finished", "failed", "finished"]


def test_two_sweeps_over_the_same_cells_share_them_and_run_none_twice(tmp_path):
    made = [make(tmp_path, seed) for seed in range(6)]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(sweep_through, made) for _ in range(2)]
        for one in both:
            assert [row.state for row in one.result()] == ["finished"] * 6
    assert [len(starts(cell)) for cell in made] == [1] * 6


def test_a_signal_ends_every_cell_with_its_checkpoint_and_the_same_sweep_goes_on(tmp_path, capsys):
    hold = tmp_path / "go"
    made = [make(tmp_path, seed, f"hold={hold}") for seed in range(4)]
    received: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        sweeping = pool.submit(sweep_through, made, received)
        wait_for(lambda: sum(map(half_done, made)) == 2)
        received.append(signal.SIGTERM)
        rows = sweeping.result()
    assert [row.state for row in rows] == ["resumable", "resumable", "new", "new"]
    assert [row.failure for row in rows] == [None] * 4
    hold.touch()
    assert [row.state for row in sweep_through(made)] == ["finished"] * 4
    assert [len(starts(cell)) for cell in made] == [2, 2, 1, 1]


def test_time_left_is_that_of_the_cell_or_else_of_the_others(tmp_path):
    made = [make(tmp_path, seed) for seed in range(3)]
    rows = [
        sweep.Row(made[0], "running", cells.Progress(50, 10.0, 1.0)),
        sweep.Row(made[1], "running", cells.Progress(25, 20.0, 1.0)),
        sweep.Row(made[2], "new", cells.Progress(0, 0.0, float("nan"))),
    ]
    assert [sweep.seconds_left(rows, row) for row in rows] == [10.0, 60.0, 40.0]


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed_is_one_line(engine, package, launch, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    status, (line,) = launch("sweep", "env=Hopper-v4", f"engine={engine}")
    assert status == 2
    assert re.match(rf"error: engine={engine}: must be local or \w+ without the package {package}: pip install", line)
