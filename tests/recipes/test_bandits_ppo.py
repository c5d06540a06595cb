from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import bandits
import bandits_ppo
from bandits_ppo import METHODS, Method, Setting
from known_optimum import BANDITS, evaluate

RESPONSIBILITY = Method("responsibility")
LEARNED = Method("critic", "soft_frequency", "learned")
SHORT = Setting(iterations=2, batch=32, epochs=2, minibatch=16, cells=8)
ids = {"argvalues": METHODS, "ids": str}


def _start(bandit, num_experts):
    """Parameters of a policy in the middle of training, in the order of the table."""
    torch.manual_seed(3)
    size = num_experts * bandit.action_size
    return torch.cat((torch.randn(num_experts), torch.randn(size), torch.randn(size) * 0.3 - 1.0))


def _gradient_of_the_soft_objective(bandit, start):
    """By quadrature along paths, where PPO has ratios; and of the logits alone."""
    params = start.double().requires_grad_()
    k, size = bandit.num_experts, bandit.action_size
    logits, loc, log_scale = params.split((k, k * size, k * size))
    report = evaluate(bandit, logits[None], loc.reshape(1, k, size), log_scale.exp().reshape(1, k, size))
    (gradient,) = torch.autograd.grad(report.objective.sum(), params)
    return gradient


@pytest.mark.parametrize("name", ["unequal", "four_peaks"])
@pytest.mark.parametrize(
    ("method", "factor"),
    [
        (RESPONSIBILITY, 1.0),
        (Method("critic", "none", "learned"), 1.0),
        # enumerating the experts under the known value gives the logits the same gradient a second time
        (Method("critic", "marginal", "known"), 2.0),
    ],
    ids=str,
)
def test_first_gradient_is_that_of_the_soft_objective(name, method, factor):
    bandit = BANDITS[name]
    start = _start(bandit, bandit.num_experts)
    # every row is an estimate of its own: the spread between them is the error
    learner = bandits_ppo.build(method, [bandit], range(32), Setting())
    (weight,) = (p for p in learner.actor.parameters() if p.shape == (32, len(start)))
    weight.data.copy_(start)
    learner.loss(learner.act(1024)).sum().backward()
    found = -weight.grad.double()
    error = found.std(0) / len(found) ** 0.5
    expected = _gradient_of_the_soft_objective(bandit, start)
    expected[: bandit.num_experts] *= factor
    assert error.norm() < 0.1 * expected.norm()
    assert ((found.mean(0) - expected).abs() < 4.0 * error).all()


@pytest.mark.parametrize("method", **ids)
def test_policies_do_not_notice_what_the_others_learn(method):
    def trained(*names):
        params, correlations = bandits_ppo.train(method, [BANDITS[name] for name in names], [4, 5], SHORT)
        return [x[:2] for x in (*params, correlations)]

    with_one = trained("unequal", "two_equal")
    with_another = trained("unequal", "one_peak")
    for one, another in zip(with_one, with_another, strict=True):
        assert_close(one, another, rtol=0, atol=0, equal_nan=True)


def test_seeds_begin_with_their_own_actor_and_critic():
    def beginning(*seeds):
        learner = bandits_ppo.build(LEARNED, [BANDITS["two_equal"]], seeds, SHORT)
        return list(learner.loss_module.parameters()), learner

    together, learner = beginning(4, 5)
    alone, _ = beginning(5)
    assert len(together) == 4  # the table of actors, three layers
    for both, one in zip(together, alone, strict=True):
        assert_close(both[1:], one)
        assert not torch.equal(both[0], both[1])
    # what is trained is what scores
    before = learner.rank_correlation()
    for weight in learner.loss_module.qvalue_network_params.parameters():
        weight.data.normal_()
    assert not torch.equal(learner.rank_correlation(), before)


def test_rank_correlation_agrees_with_scipy():
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 50)
    y = y + x
    for found, a, b in zip(bandits_ppo.spearman(x, y), x, y, strict=True):
        assert found.item() == pytest.approx(spearmanr(a, b).statistic)


def test_known_value_ranks_as_itself():
    learner = bandits_ppo.build(Method("critic", "frequency", "known"), [BANDITS["four_peaks"]], [0, 1], SHORT)
    assert_close(learner.rank_correlation(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("method", [RESPONSIBILITY, LEARNED], ids=str)
def test_a_short_training_learns_policies_and_values(method):
    bandit = BANDITS["two_equal"]
    start, _ = bandits_ppo.train(method, [bandit], [0, 1], replace(SHORT, lr=1e-9))
    found = list(bandits_ppo.run([method], [bandit], [0, 1], Setting(iterations=20)))
    for outcome, before in zip(found, evaluate(bandit, *start).objective, strict=True):
        assert outcome.objective > before.item() + 0.6
        assert 0.85 < outcome.share <= 1.0
        assert method is RESPONSIBILITY or outcome.rank_correlation > 0.9


def test_command_prints_a_table_and_writes_a_row_per_policy(tmp_path, capsys):
    path = tmp_path / "out" / "bandits_ppo.csv"
    size = ["--seeds", "2", "--iterations", "2", "--batch", "8", "--minibatch", "4", "--epochs", "1"]
    found = bandits_ppo.main(["--problems", "two_equal", "unequal", *size, "--csv", str(path)])
    printed = capsys.readouterr().out
    assert "### two_equal (optimum 1.818, 2 peaks, 2 seeds)" in printed
    for method in METHODS:
        assert printed.count(f"| {method} |") == 2
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * len(METHODS)
    assert {row["seed"] for row in rows} == {"0", "1"}
    # only a Q-network has a rank correlation
    assert all((row["rank_correlation"] == "nan") == (row["scoring"] != "critic") for row in rows)
    for again, outcome in zip(bandits_ppo.main(["--show", str(path)]), found, strict=True):
        assert vars(again) == pytest.approx(vars(outcome), abs=1e-5, nan_ok=True)
    assert capsys.readouterr().out.count("\n") == printed[: printed.index("Wrote")].count("\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "foo"], "--only='foo' matches no combination"),
        (["--batch", "100", "--minibatch", "64"], "--minibatch=64 must divide --batch=100"),
        (["--iterations", "0"], "must be at least 1"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--show", "nowhere.csv"], "--show=nowhere.csv: there is no such file"),
        (["--show", str(bandits.RESULTS)], "its columns must be problem, scoring, routing, qvalue, seed"),
        (["--csv", "."], "--csv=.: it is a folder"),
    ],
)
def test_command_refuses_in_one_line_before_any_work(arguments, reason, monkeypatch, capsys):
    monkeypatch.setattr(bandits_ppo, "run", lambda *_: pytest.fail("work began"))
    with pytest.raises(SystemExit) as stop:
        bandits_ppo.main(arguments)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]
