"""Whatever the overrides, a run ends well or with one clear line, and leaves nothing behind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import overrides
import pytest
from overrides import RULES, Command, Outcome, Runner, Server, command, faults, refuses, tame_values, wild_values

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and Path("/proc/self/task").is_dir()), reason="watches processes through /proc"
)

SMALL = {
    recipe: tuple(f"{key}={text}" for key, text in {**base, "total_frames": "48"}.items())
    for recipe, base in overrides.BASES.items()
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Server:
    return Server(tmp_path_factory.mktemp("commands"))


def complaint(outcome: Outcome) -> str:
    return "\n".join([str(outcome.command), *faults(outcome), outcome.stdout, outcome.stderr])


def check(run: Runner, commands: Iterator[Command]) -> None:
    bad = [complaint(outcome) for outcome in map(run, commands) if faults(outcome)]
    assert not bad, "\n\n".join(bad)


def test_random_commands_end_well_or_with_one_line(run):
    check(run, (command(0, index) for index in range(24)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_three_hundred_random_commands_end_well_or_with_one_line(run, seed):
    check(run, (command(seed, index) for index in range(300)))


def test_the_same_seed_gives_the_same_commands():
    assert [command(3, index) for index in range(50)] == [command(3, index) for index in range(50)]
    assert command(3, 0) != command(4, 0)


@pytest.mark.parametrize("recipe", list(RULES))
def test_every_key_has_values_that_are_allowed_and_values_that_are_not(recipe):
    for key in RULES[recipe]:
        assert not all(refuses(recipe, key, text) for text in tame_values(recipe, key)), key
        assert wild_values(recipe, key)[1], key


# ------------------------------------------------------------------------------------------- the harness itself


ALIKE = [
    ("sac_pmoe", SMALL["sac_pmoe"]),
    ("sac_pmoe", ("num_experts=0",)),
    ("sac_pmoe", ("-m", *SMALL["sac_pmoe"], "seed=0,1", "hydra.sweep.dir=s")),
    ("sac_pmoe", ("sed=1",)),
    ("ppo_pmoe", (*SMALL["ppo_pmoe"], "scoring=critic", "hydra.run.dir=a b")),
    ("ppo_pmoe", ("optim.lr=",)),
    ("ppo_pmoe", ("--help",)),
    ("dac", SMALL["dac"]),
    ("dac", ("env=CartPole-v1",)),
    ("target_reaching", ("--cfg", "job")),
]


def timeless(text: str) -> str:
    """Without times: the numbers of a progress bar, and what the checkpoints took."""
    return re.sub(r"\[[^]]*\]|in [\d.]+ s, [\d.]+%", "", text)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "args"), ALIKE, ids=lambda value: value if isinstance(value, str) else value[0])
def test_a_forked_run_is_that_of_a_process_of_its_own(recipe, args, run, tmp_path):
    forked, alone = run(Command(recipe, args)), Runner(tmp_path)(Command(recipe, args))
    assert (forked.status, faults(forked)) == (alone.status, faults(alone)), complaint(alone)
    assert timeless(forked.stdout) == timeless(alone.stdout)
    assert timeless(forked.stderr) == timeless(alone.stderr)


REFUSE = "import sys; print('error: a=1: must be 2', file=sys.stderr); sys.exit(2)"
FAKES = {
    "hangs": "import time; time.sleep(600)",
    "prints a traceback": "raise ValueError('no')",
    "leaves the process": "import subprocess; subprocess.Popen(['sleep', '600'])",
    "leaves the process sleep 601": "import subprocess; subprocess.Popen(['sleep', '601'], start_new_session=True)",
    "leaves the temporary file": "import tempfile; tempfile.mkstemp()",
    "leaves no metrics.csv": "pass",
    "prints 1 lines on stderr though it ends well": "import sys; print('watch out', file=sys.stderr)",
    "prints 2 lines on stderr, not one": "import sys; sys.exit('error: one\\nerror: two')",
    "prints 0 lines on stderr, not one": "import sys; sys.exit(2)",
    "prints a line that does not begin with error:": "import sys; sys.exit('no')",
    "prints on stdout before it refuses": f"print('off we go'); {REFUSE}",
    "leaves outputs though it refuses": f"import os; os.mkdir('outputs'); {REFUSE}",
    "ends with status 3": "import sys; sys.exit(3)",
    "ends with status -9": "import os; os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize(("fault", "code"), FAKES.items(), ids=FAKES)
def test_a_run_at_fault_is_caught(fault, code, run, tmp_path, monkeypatch):
    if fault == "hangs":
        monkeypatch.setattr(run, "limit", 1.0)
    monkeypatch.setattr(overrides, "GRACE", 0.1)
    recipe = tmp_path / "fake.py"
    recipe.write_text(code)
    outcome = run(Command(str(recipe), ()))
    assert any(line.startswith(fault) for line in faults(outcome)), complaint(outcome)


GOOD = {
    "ends well": "open('metrics.csv', 'w').write('frames')",
    "ends with one line": REFUSE,
    "ends with a line behind a bar": (
        "import sys, tqdm; bar = tqdm.tqdm(total=9, unit='frames'); bar.update(3); bar.close(); sys.exit('error: nan')"
    ),
}


@pytest.mark.parametrize("code", GOOD.values(), ids=GOOD)
def test_a_run_without_fault_is_left_alone(code, run, tmp_path):
    recipe = tmp_path / "fake.py"
    recipe.write_text(code)
    assert faults(run(Command(str(recipe), ()))) == []


def test_a_refused_value_must_not_run(run, tmp_path):
    recipe = tmp_path / "fake.py"
    recipe.write_text(GOOD["ends well"])
    assert faults(run(Command(str(recipe), (), bad=True))) == ["accepts a value that its rule refuses"]


def test_what_a_killed_run_has_started_is_killed_too(run, tmp_path, monkeypatch):
    monkeypatch.setattr(overrides, "GRACE", 0.1)
    recipe = tmp_path / "fake.py"
    recipe.write_text(
        "import subprocess, time; child = subprocess.Popen(['sleep', '600'], start_new_session=True);"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    for limit in (1.0, 10.0, 100.0):  # until it has had the time to start something
        monkeypatch.setattr(run, "limit", limit)
        outcome = run(Command(str(recipe), ()))
        if outcome.stdout:
            break
    state = Path(f"/proc/{outcome.stdout.strip()}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
