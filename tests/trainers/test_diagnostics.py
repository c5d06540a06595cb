"""Diagnostics of mixtures whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from torchrl_pmoe import NormalMixture
from torchrl_pmoe.trainers import mixture_diagnostics, saturation


def mixture(probs, distance):
    """Experts at multiples of ``distance``, scale one."""
    logits = torch.tensor(probs, dtype=torch.float64).log()
    experts = torch.arange(logits.shape[-1], dtype=torch.float64)
    loc = (distance * experts)[:, None].expand(*logits.shape, 1)
    return NormalMixture(logits, loc, torch.ones_like(loc))


def test_a_router_that_looks_at_the_state_uses_more_experts_than_each_state_does():
    found = mixture_diagnostics(mixture([[0.5, 0.5, 1e-12, 1e-12], [1e-12, 1e-12, 0.5, 0.5]], 1.0))
    assert found["effective_experts"].item() == pytest.approx(4.0)
    assert found["effective_experts_per_state"].item() == pytest.approx(2.0)
    assert found["routing_entropy"].item() == pytest.approx(math.log(2))
    torch.testing.assert_close(found["usage"], torch.full((4,), 0.25, dtype=torch.float64))


def test_experts_apart_tell_all_and_duplicates_nothing():
    torch.manual_seed(0)
    probs = [[0.7, 0.3]] * 64
    apart, same = (mixture_diagnostics(mixture(probs, distance)) for distance in (1e3, 0.0))
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    assert apart["mutual_information"].item() == pytest.approx(entropy)
    assert same["mutual_information"].item() == pytest.approx(0.0, abs=1e-12)


def test_an_expert_below_a_tenth_of_its_share_is_dead():
    found = mixture_diagnostics(mixture([[0.9, 0.08, 0.02]], 1.0))
    assert found["dead_fraction"].item() == pytest.approx(1 / 3)


def test_margin_is_in_units_of_the_critics_disagreement():
    dist = mixture([[0.5, 0.5]] * 3, 1.0)
    value = torch.tensor([[1.0, 4.0], [2.0, 2.5], [0.0, -1.0]], dtype=torch.float64)
    found = mixture_diagnostics(dist, lambda action: torch.stack((value, value + 2.0)))
    assert found["proposal_margin"].item() == pytest.approx((3.0 + 0.5 + 1.0) / 3 / 2.0)
    assert mixture_diagnostics(dist)["proposal_margin"].isnan()


def test_saturation_counts_entries_near_either_bound():
    action = torch.tensor([[0.0, 9.99], [2.0, 5.0], [1.0, 0.0]])
    low, high = torch.tensor([0.0, 0.0]), torch.tensor([2.0, 10.0])
    assert saturation(action, low, high).item() == pytest.approx(4 / 6)
