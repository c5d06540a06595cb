"""The recipes learn, started as a user starts them."""

from __future__ import annotations

import time

import pytest
from recipe_runs import in_background, rows

MARK = -250.0
"""A policy that has learned to swing up returns -150 and more, a random one -1,200."""


def learns(recipe: str, *overrides: str, directory) -> bool:
    """Whether an evaluation of a training, in a process of its own, reaches :data:`MARK`; the training ends there."""
    with in_background(recipe, *overrides, "hydra.run.dir=run", directory=directory, anew=True) as running:
        while True:
            ended = running.poll() is not None
            if any(float(row["return_mean"]) >= MARK for row in evaluations(directory / "run")):
                return True
            if ended:
                assert running.returncode == 0, running.communicate()
                return False
            time.sleep(0.5)


def evaluations(run) -> list[dict[str, str]]:
    return [row for row in rows(run) if row.get("return_mean")] if (run / "metrics.csv").is_file() else []


SAC = ("env=Pendulum-v1", "total_frames=10_000", "logger.eval_interval=2500")


def test_the_default_policy_learns_pendulum_with_compiled_updates(tmp_path):
    assert learns("sac_pmoe", *SAC, "compile.enabled=true", directory=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("compile.enabled=false",), ("policy=gaussian", "compile.enabled=true")], ids=["eager", "gaussian"]
)
def test_other_ways_to_train_learn_pendulum(overrides, tmp_path):
    assert learns("sac_pmoe", *SAC, *overrides, directory=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["pmoe", "gaussian"])
def test_ppo_learns_pendulum_with_compiled_updates(policy, tmp_path):
    # settings of its own: the recipe's are those of locomotion, with a discount too long for a swing-up
    overrides = ("env=Pendulum-v1", "total_frames=200_000", f"policy={policy}", "compile.enabled=true")
    rates = ("optim.lr=1e-3", "optim.gamma=0.9", "logger.eval_interval=20_000")
    assert learns("ppo_pmoe", *overrides, *rates, directory=tmp_path)
