from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import norm
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import estimators
import router_estimates
from expert_estimates import EXPERT_ESTIMATORS, best_frequency, run_experts, true_gradients
from known_optimum import ALPHA
from router_estimates import BANDIT, ESTIMATORS, Instance

INSTANCES = [Instance.random(num_experts, 0) for num_experts in (2, 4, 16)]
several_experts = pytest.mark.parametrize("instance", INSTANCES, ids=lambda instance: f"K={len(instance.logits)}")


@several_experts
def test_true_gradient_agrees_with_finite_differences_of_the_objective(instance):
    gradient = instance.true_gradient()
    step = torch.randn(3, len(gradient), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = (
        instance.objective(instance.logits + 1e-4 * step) - instance.objective(instance.logits - 1e-4 * step)
    ) / 2e-4
    assert slope.norm() > 0.01
    assert_close(step @ gradient, slope, atol=1e-7, rtol=1e-6)


@several_experts
def test_true_gradient_agrees_with_an_integral_over_the_actions(instance):
    logits, loc, scale = instance.logits.numpy(), instance.loc.squeeze(-1).numpy(), instance.scale.squeeze(-1).numpy()
    weights = np.exp(logits - logsumexp(logits))

    def log_density(action):
        return norm.logpdf(np.arctanh(action), loc, scale) - np.log1p(-(action**2))

    def soft_value(action):
        log_prob = logsumexp(log_density(action), b=weights)
        peaks = zip(BANDIT.heights, BANDIT.centres, strict=True)
        return sum(h * np.exp(-(((action - c) / BANDIT.width) ** 2)) for h, (c,) in peaks) - ALPHA * log_prob

    def advantage(action, expert):
        return np.exp(log_density(action)[expert]) * soft_value(action)

    edge = 1 - 1e-12
    values = np.array(
        [
            quad(advantage, -edge, edge, (k,), points=[np.tanh(loc[k]), -0.99, 0.99], limit=500)[0]
            for k in range(len(loc))
        ]
    )
    expected = weights * (values - weights @ values)
    assert_close(instance.true_gradient(), torch.from_numpy(expected), atol=1e-6, rtol=1e-5)


@several_experts
@pytest.mark.parametrize("name", ["marginal", "score function"])
def test_mean_of_an_unbiased_estimator_is_the_true_gradient(name, instance):
    torch.manual_seed(0)
    estimator = next(estimator for estimator in ESTIMATORS if estimator.name == name)
    draws = estimators.sample(estimator, instance, 60_000).double()
    standard_error = draws.std(0) / len(draws) ** 0.5
    away = (draws.mean(0) - instance.true_gradient()) / standard_error
    assert away.abs().max() < 4.5
    assert (standard_error < 0.1 * instance.true_gradient().norm()).all()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.name)
def test_samples_are_as_strong_as_a_batch_of_one_state(estimator, monkeypatch):
    torch.manual_seed(0)
    together = estimators.sample(estimator, INSTANCES[1], 4000)
    monkeypatch.setattr(router_estimates, "CHUNK", 1)
    alone = estimators.sample(estimator, INSTANCES[1], 100)
    strength, spread = together.norm(dim=-1), together.norm(dim=-1).std() / len(alone) ** 0.5
    assert strength.mean() > 0
    assert (alone.norm(dim=-1).mean() - strength.mean()).abs() < 5 * spread


def test_slopes_are_evaluated_once_and_critics_score_every_expert(monkeypatch):
    evaluated = []
    forward = router_estimates.KnownValue.forward

    def counted(self, action):
        evaluated.append(action[..., 0].numel())
        return forward(self, action)

    monkeypatch.setattr(router_estimates.KnownValue, "forward", counted)
    for estimator in ESTIMATORS:
        evaluated.clear()
        estimators.sample(estimator, INSTANCES[1], 10)
        # before its own, a critic-scored loss asks a critic once how it takes proposals
        assert evaluated[-1] == 10 * estimator.critic_calls(4), estimator.name
        assert estimator.scoring == "critic" or len(evaluated) == 1


def test_curve_of_an_unbiased_estimator_falls_as_the_root_of_samples():
    torch.manual_seed(0)
    marginal = ESTIMATORS[0]
    sizes, repeats = (1, 10, 100, 1000), 20
    samples = estimators.measure(marginal, INSTANCES[1:2], sizes, repeats)
    points = estimators.curve(marginal, samples, sizes, repeats)
    errors = torch.tensor([point.error for point in points])
    assert_close(errors[:-1] / errors[1:], torch.full((3,), 10**0.5), atol=0, rtol=0.25)
    assert [point.repeats for point in points] == [20_000, 2000, 200, 20]
    row = estimators.summarise(marginal, samples, 20_000, 1.0, 1.0)
    assert row.bias_as_is < 4 * row.bias_resolution
    assert row.calls_to_target == pytest.approx(4 * (errors[0].item() / 0.25) ** 2, rel=0.1)


def test_curve_of_a_biased_estimator_ends_at_its_bias():
    torch.manual_seed(0)
    frequency = next(estimator for estimator in ESTIMATORS if estimator.name == "frequency, Brier")
    cases = estimators.mixtures(4, 3)
    samples = estimators.measure(frequency, cases, (1, 5000), 4)
    row = estimators.summarise(frequency, samples, 20_000, 1.0, 1.0)
    last = estimators.curve(frequency, samples, (1, 5000), 4)[-1]
    assert row.bias_own_c <= row.bias <= 1
    assert row.bias > 0.1
    assert last.error == pytest.approx(row.bias, abs=0.02)
    # the scale is the best there is
    truth, mean = samples.truth.flatten(), samples.mean.flatten()
    residual = truth - torch.linalg.lstsq(mean[:, None], truth[:, None]).solution * mean
    assert row.bias == pytest.approx((residual.norm() / truth.norm()).item(), rel=1e-6)


def test_mixtures_have_a_router_with_something_to_learn():
    cases = estimators.mixtures(2, 20)
    assert len(cases) == 20
    assert all(case.true_gradient().norm() >= router_estimates.LEAST_GRADIENT for case in cases)
    assert any(Instance.random(2, seed).true_gradient().norm() < router_estimates.LEAST_GRADIENT for seed in range(20))


def test_estimators_command_writes_its_tables_and_plot(tmp_path, capsys):
    arguments = ["--experts", "2", "4", "--instances", "2", "--repeats", "2", "--max-draws", "10", "--rounds", "1"]
    rows, points, expert_rows = estimators.main([*arguments, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for name, found in (
        ("estimators.csv", rows), ("estimators_curves.csv", points), ("estimators_experts.csv", expert_rows),
    ):  # fmt: skip
        with (tmp_path / name).open() as file:
            written = list(csv.DictReader(file))
        assert [row["estimator"] for row in written] == [row.estimator for row in found]
    assert len(rows) == 2 * len(ESTIMATORS)
    assert len(expert_rows) == 4 * len(EXPERT_ESTIMATORS)
    assert [point.draws for point in points[:3]] == [1, 3, 10]
    assert all(f"| 4 | {estimator.name} |" in printed for estimator in ESTIMATORS)
    assert (tmp_path / "estimators.png").stat().st_size > 10_000


def test_estimators_command_refuses_a_router_without_a_choice(capsys):
    with pytest.raises(SystemExit) as stop:
        estimators.main(["--experts", "1"])
    assert stop.value.code == 2
    assert "--experts at least 2" in capsys.readouterr().err


# ------------------------------------------------------------------------- the experts' gradients


@several_experts
def test_true_gradients_of_the_experts_agree_with_finite_differences_of_the_objective(instance):
    weights = instance.logits.softmax(-1)
    step = torch.randn(instance.loc.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for parameter, gradient in zip(("loc", "scale"), true_gradients(instance, weights), strict=True):
        size = 1e-5 * (instance.scale if parameter == "scale" else 1.0)
        ends = []
        for sign in (1, -1):
            moved = replace(instance, **{parameter: getattr(instance, parameter) + sign * size * step})
            ends.append(moved.objective(instance.logits[None])[0])
        assert_close((size * step).squeeze(-1) @ gradient, (ends[0] - ends[1]) / 2, atol=1e-9, rtol=1e-4)


@several_experts
def test_the_best_experts_frequency_is_that_of_draws(instance):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, *instance.loc.shape, generator=generator, dtype=torch.float64)
    best = BANDIT.value((instance.loc + instance.scale * noise).tanh()).argmax(-1)
    found = torch.bincount(best, minlength=len(instance.loc)) / len(best)
    assert_close(best_frequency(instance), found.double(), atol=0.005, rtol=0)


def test_weighted_and_routed_follow_the_objective_decoupled_max_random_draws_and_max_neither():
    torch.manual_seed(0)
    rows = {(row.estimator, row.parameter): row for row in run_experts([4], 2, 20_000)}
    for parameter in ("loc", "scale"):
        for name in ("weighted", "routed"):
            assert rows[name, parameter].bias < 3 * rows[name, parameter].bias_resolution
        decoupled, coupled = rows["max, decoupled", parameter], rows["max", parameter]
        assert decoupled.from_random < 3 * decoupled.from_random_resolution
        assert coupled.from_random > 10 * coupled.from_random_resolution
    assert rows["max", "scale"].pushed_up > 0.1
