from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import recipe_runs
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(recipe_runs.RECIPES / "benchmarks"))

import ppo_pmoe
import qvalue_rank
from qvalue_rank import _Copies, proposal_ranking, rank_correlation


def measure(monkeypatch, capsys, run, *args):
    monkeypatch.setattr(sys, "argv", ["qvalue_rank.py", str(run), *args])
    qvalue_rank.main()
    return [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]


def test_the_q_network_of_a_finished_run_is_measured(tmp_path, monkeypatch, capsys):
    recipe_runs.run_here(ppo_pmoe, tmp_path / "run", *recipe_runs.SMALL_PPO, "scoring=critic", "total_frames=128")
    args = (tmp_path / "run", "--states", "2", "--rollouts", "2", "--horizon", "3")
    name, states, correlation, reliability = first = measure(monkeypatch, capsys, *args)
    assert (name, states) == ("run", "2")
    assert -1 <= float(correlation.split(" ± ")[0]) <= 1
    assert -1 <= float(reliability) <= 1
    # the run's seed decides
    assert measure(monkeypatch, capsys, *args) == first


def test_rank_correlation_is_spearmans_over_the_experts_of_a_state():
    rng = np.random.default_rng(0)
    scores, returns = rng.normal(size=(5, 7)), rng.normal(size=(5, 7, 4))
    found = rank_correlation(scores, returns)
    expected = [spearmanr(scores[s], returns[s].mean(-1)).statistic for s in range(5)]
    assert found.correlation == pytest.approx(np.mean(expected))
    assert found.standard_error == pytest.approx(np.std(expected, ddof=1) / math.sqrt(5))
    halves = [spearmanr(returns[s, :, :2].mean(-1), returns[s, :, 2:].mean(-1)).statistic for s in range(5)]
    assert found.reliability == pytest.approx(np.mean(halves))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ranking_of_a_known_value_is_found(sign):
    """On the pendulum, one step long: the cost of a torque is what the environment says it is."""
    torques = np.array([[-2.0], [-0.7], [0.1], [1.3]], dtype=np.float32)

    def propose(observation):
        return torques, -sign * torques.squeeze(-1) ** 2

    found = proposal_ranking(
        "Pendulum-v1",
        lambda observation: np.zeros((len(observation), 1), dtype=np.float32),
        propose,
        num_experts=4,
        states=3,
        gamma=0.9,
        seed=0,
        horizon=1,
        warmup=20,
        show=False,
    )
    assert found.correlation == pytest.approx(sign)
    assert found.reliability == pytest.approx(1.0)


def test_what_follows_a_proposal_is_the_same_luck_for_every_one():
    """Equal actions have equal returns in each rollout, and the rollouts differ."""
    copies = _Copies("Pendulum-v1", 6)
    copies.reset(0)
    returns = copies.apart(np.zeros((3, 1), dtype=np.float32), lambda o: torch.randn(len(o), 1).numpy(), 20, 0.99)
    copies.close()
    assert (returns == returns[0]).all()
    assert returns[0, 0] != returns[0, 1]
