"""A sweep of real trainings is killed with all its processes, and the same command goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import recipe_runs
from recipe_runs import RECIPES
from tqdm import tqdm

sys.path.insert(0, str(RECIPES / "benchmarks"))

import sac_pmoe  # isort: skip
import sweep_kills  # isort: skip

SETTINGS = [*sweep_kills.SETTINGS, "total_frames=600", "checkpoint.interval=100", "logger.eval_interval=300"]
OF_THE_SWEEP = ("progress_bar",)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks at processes through /proc")
def test_a_sweep_that_is_killed_ends_as_one_that_never_was(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killed = tmp_path / "killed"
    arguments = ["env=Pendulum-v1", "policy=pmoe,gaussian", "seed=0", "jobs=2", *SETTINGS]
    with tqdm(total=1, disable=True) as bar:
        kills = sweep_kills.torture(arguments, killed, kills=1, longest=1.0, bar=bar)
    assert len(kills) == 1
    cells = sweep_kills.cells_of(killed)
    assert len(cells) == 2
    # each is the run that its own command makes
    shared = [setting for setting in SETTINGS if not setting.startswith(OF_THE_SWEEP)]
    for cell in cells:
        policy, seed = (part.partition("=")[2] for part in cell.name.split("_")[1:3])
        alone = tmp_path / "alone" / cell.name
        recipe_runs.run_here(
            sac_pmoe, alone, "env=Pendulum-v1", f"policy={policy}", f"seed={seed}", "optim.num_threads=1", *shared
        )
        assert recipe_runs.timeless_rows(cell) == recipe_runs.timeless_rows(alone)
