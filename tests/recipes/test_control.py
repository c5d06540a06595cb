"""The recipes learn, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from recipe_runs import RECIPES, rows


def last_return(recipe: str, *overrides: str, directory) -> float:
    """Evaluation return at the end of a training of its own process."""
    done = subprocess.run(
        [sys.executable, str(RECIPES / f"{recipe}.py"), *overrides, "hydra.run.dir=run"],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(rows(directory / "run")[-1]["return_mean"])


SAC = ("env=Pendulum-v1", "total_frames=10_000")


def test_the_default_policy_learns_pendulum_with_compiled_updates(tmp_path):
    assert last_return("sac_pmoe", *SAC, "compile.enabled=true", directory=tmp_path) >= -250


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("compile.enabled=false",), ("policy=gaussian", "compile.enabled=true")], ids=["eager", "gaussian"]
)
def test_other_ways_to_train_learn_pendulum(overrides, tmp_path):
    assert last_return("sac_pmoe", *SAC, *overrides, directory=tmp_path) >= -250


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["pmoe", "gaussian"])
def test_ppo_learns_pendulum_with_compiled_updates(policy, tmp_path):
    # settings of its own: the recipe's are those of locomotion, with a discount too long for a swing-up
    overrides = ("env=Pendulum-v1", "total_frames=200_000", f"policy={policy}", "compile.enabled=true")
    rates = ("optim.lr=1e-3", "optim.gamma=0.9", "logger.eval_interval=200_000")
    assert last_return("ppo_pmoe", *overrides, *rates, directory=tmp_path) >= -250
