from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from torchrl_pmoe import TanhNormalMixture

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import bandits
import theorem
from known_optimum import ALPHA, BANDITS, best_logits, evaluate, router_gradient, solve


def _mixture(bandit):
    torch.manual_seed(3)
    k, size = 3, bandit.action_size
    return (
        torch.randn(1, k, dtype=torch.float64),
        torch.randn(1, k, size, dtype=torch.float64),
        torch.rand(1, k, size, dtype=torch.float64) * 0.4 + 0.3,
    )


@pytest.mark.parametrize(("name", "optimum"), [("two_equal", 1.818), ("four_peaks", 1.682)])
def test_optimum_shares_its_mass_between_equal_peaks(name, optimum):
    solution = solve(BANDITS[name])
    assert solution.objective == pytest.approx(optimum, abs=1e-3)
    assert_close(solution.basin_mass, torch.full_like(solution.basin_mass, 1 / len(BANDITS[name].centres)))


def test_optimum_of_one_peak_agrees_with_the_gaussian_integral():
    # around its top the peak is 2 - 2 d^2 / width^2: a Gaussian policy of variance alpha width^2 / 4
    bandit = BANDITS["one_peak"]
    around_the_top = 2.0 + ALPHA * 0.5 * torch.tensor(2 * torch.pi * ALPHA * bandit.width**2 / 4).log().item()
    assert solve(bandit).objective == pytest.approx(around_the_top, abs=0.01)


@pytest.mark.parametrize("name", ["unequal", "four_peaks"])
def test_objective_from_latents_agrees_with_quadrature_over_actions(name):
    bandit = BANDITS[name]
    logits, loc, scale = _mixture(bandit)
    size = bandit.action_size
    # actions spaced evenly before the tanh, so that the mass beside the bounds is resolved
    latent = torch.linspace(-8, 8, 4001 if size == 1 else 601, dtype=torch.float64)
    action = torch.cartesian_prod(*[latent.tanh()] * size).reshape(-1, size)
    volume = (1 - action.square()).prod(-1) * (latent[1] - latent[0]) ** size
    log_prob = TanhNormalMixture(logits, loc, scale).log_prob(action.unsqueeze(1)).squeeze(1)
    mass = log_prob.exp() * volume
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-6)
    report = evaluate(bandit, logits, loc, scale)
    assert_close(report.objective[0], (mass * (bandit.value(action) - ALPHA * log_prob)).sum(), atol=1e-5, rtol=0)
    assert_close(report.basin_mass.sum(), torch.ones((), dtype=torch.float64))
    assert report.objective[0] < solve(bandit).objective


def test_router_gradient_agrees_with_finite_differences():
    bandit = BANDITS["unequal"]
    logits, loc, scale = _mixture(bandit)
    step = 1e-4 * torch.eye(3, dtype=torch.float64)
    up, down = (evaluate(bandit, logits + s, loc.expand(3, -1, -1), scale.expand(3, -1, -1)) for s in (step, -step))
    gradient = router_gradient(logits, evaluate(bandit, logits, loc, scale).expert_value)[0]
    assert_close(gradient, (up.objective - down.objective) / 2e-4, atol=1e-7, rtol=1e-5)


def test_best_logits_are_a_maximum():
    bandit = BANDITS["two_equal"]
    _, loc, scale = _mixture(bandit)
    best = best_logits(bandit, loc[0], scale[0])
    others = best.softmax(-1) * 0.98 + 0.02 * torch.eye(3, dtype=torch.float64)
    reports = evaluate(bandit, torch.cat((best[None], others.log())), loc.expand(4, -1, -1), scale.expand(4, -1, -1))
    assert (reports.objective[0] >= reports.objective[1:] - 1e-9).all()


@pytest.mark.parametrize("case", theorem.CASES, ids=lambda case: case.name)
def test_best_frequency_agrees_with_counted_draws(case):
    _, loc, scale = case.params()
    value = case.bandit.value((loc + scale * torch.randn(200_000, *loc.shape, dtype=torch.float64)).tanh())
    counted = torch.bincount(value.argmax(-1), minlength=len(loc)) / len(value)
    frequency = theorem.best_frequency(case)
    assert frequency.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert_close(frequency, counted.double(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("case", theorem.CASES, ids=lambda case: case.name)
def test_frequency_gradient_approaches_its_limit_as_the_root_of_draws(case):
    found = theorem.measure(case, (10, 32, 100, 316, 1000, 3162, 10_000), repeats=200)
    assert theorem.slope(found) == pytest.approx(-0.5, abs=0.05)
    for measurement in found:
        assert measurement.error == pytest.approx(measurement.predicted, rel=0.2)


def test_frequency_gradient_is_not_the_gradient_of_the_soft_objective():
    case = next(case for case in theorem.CASES if case.name == "wide")
    verdict = theorem.judge(case, theorem.measure(case, (10, 100), repeats=100))
    assert verdict.cosine < 0
    assert verdict.objective_frequency < verdict.objective_now < verdict.objective_best


def test_best_combination_reaches_the_optimum_and_keeps_both_peaks():
    setting = bandits.Setting(steps=1000)
    found = list(bandits.run([bandits.BEST], [BANDITS["two_equal"]], [0, 1], setting))
    assert len(found) == 2
    for outcome in found:
        assert 0.98 <= outcome.share <= 1.0
        assert outcome.peaks_kept == outcome.peaks == 2
        assert outcome.mass_distance < 0.1


def _first_step(monkeypatch, combination, problems, batch):
    """Gradient that the first of several rows gets in one step: plain descent at rate one shows it."""
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    setting = bandits.Setting(steps=1, batch=batch, lr=1.0)
    before = bandits.ParameterTable([0], 4, 1, setting.loc_spread).weight[0].detach().split(4)
    after = bandits.train(combination, [BANDITS[name] for name in problems], [0], setting)
    logits, loc, scale = (x[0].flatten() for x in after)
    return before[0] - logits, before[1] - loc, before[2] - scale.log()


PROBLEMS = ["one_peak", "two_equal", "unequal"]


def test_problems_in_one_batch_do_not_touch_each_other(monkeypatch):
    # this combination draws nothing but the proposals, and the first row's come first
    alone = _first_step(monkeypatch, bandits.BEST, PROBLEMS[:1], 64)
    together = _first_step(monkeypatch, bandits.BEST, PROBLEMS, 64)
    assert alone[0].abs().max() > 0.01
    assert_close(together, alone)


def test_gradient_scored_routing_is_as_strong_in_one_batch_as_alone(monkeypatch):
    combination = bandits.Combination("gradient", "frequency", "routed", "mixture")
    alone, _, _ = _first_step(monkeypatch, combination, PROBLEMS[:1], 16_384)
    together, _, _ = _first_step(monkeypatch, combination, PROBLEMS, 16_384)
    assert alone.abs().max() > 0.01
    assert_close(together, alone, atol=3e-3, rtol=0)


def test_bandits_command_prints_a_table_and_writes_a_row_per_policy(tmp_path, capsys):
    path = tmp_path / "out" / "bandits.csv"
    arguments = ["--problems", "two_equal", "four_peaks", "--only", "soft_frequency / weighted", "--seeds", "2"]
    bandits.main([*arguments, "--steps", "3", "--batch", "4", "--csv", str(path)])
    printed = capsys.readouterr().out
    assert "### two_equal (optimum 1.818, 2 peaks, 2 seeds)" in printed
    assert printed.count("| soft_frequency / weighted / mixture |") == 2
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    assert {row["seed"] for row in rows} == {"0", "1"}
    bandits.main(["--show", str(path)])
    assert capsys.readouterr().out.strip() == printed[: printed.index("Wrote")].strip()


def test_bandits_command_refuses_a_combination_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        bandits.main(["--only", "foo"])
    assert stop.value.code == 2
    assert "--only='foo' matches no combination" in capsys.readouterr().err


def test_theorem_command_writes_its_table_and_plot(tmp_path, capsys):
    theorem.main(["--repeats", "4", "--max-draws", "1000", "--out", str(tmp_path)])
    assert "| wide |" in capsys.readouterr().out
    with (tmp_path / "theorem.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["draws"]) for row in rows[:5]] == [10, 32, 100, 316, 1000]
    assert len(rows) == 5 * len(theorem.CASES)
    assert (tmp_path / "theorem.png").stat().st_size > 10_000
