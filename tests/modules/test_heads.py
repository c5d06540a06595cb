"""MixtureParamExtractor: order, scale mappings, errors."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import NormalParamExtractor
from torch import nn

from torchrl_pmoe import MixtureParamExtractor
from torchrl_pmoe.modules.heads import ClampedExp


@pytest.mark.parametrize("batch", [(), (0,), (5,), (2, 5)])
@pytest.mark.parametrize(("experts", "size"), [(1, 1), (3, 2), (64, 6)])
def test_features_hold_logits_then_locs_then_scales_expert_by_expert(batch, experts, size):
    expected = (
        torch.randn(*batch, experts),
        torch.randn(*batch, experts, size),
        0.1 + torch.rand(*batch, experts, size),
    )
    features = torch.cat((expected[0], *(x.flatten(-2) for x in expected[1:])), -1)
    logits, loc, scale = MixtureParamExtractor(experts, lambda x: x)(features)
    torch.testing.assert_close((logits, loc, scale), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mapping", ["biased_softplus_1.0", "biased_softplus_0.2", "softplus", "exp", "expln"])
@pytest.mark.parametrize("lower_bound", [0.0, 1e-4, 0.5])
def test_scale_mappings_are_those_of_normal_param_extractor(mapping, lower_bound):
    features = 3 * torch.randn(50, 3 * 5)
    _, loc, scale = MixtureParamExtractor(3, mapping, lower_bound)(features)
    theirs = NormalParamExtractor(mapping, lower_bound)(features[:, 3:])
    torch.testing.assert_close((loc.flatten(-2), scale.flatten(-2)), tuple(theirs), rtol=0, atol=0)


def test_the_default_scale_is_that_of_normal_param_extractor():
    features = torch.randn(50, 15)
    torch.testing.assert_close(
        MixtureParamExtractor(3)(features)[2].flatten(-2), NormalParamExtractor()(features[:, 3:])[1], rtol=0, atol=0
    )


def test_tensors_beyond_the_features_are_handed_through():
    hidden = torch.randn(4, 7)
    assert MixtureParamExtractor(3)(torch.randn(4, 15), hidden)[3] is hidden


def test_in_a_sequential_it_ends_a_network():
    network = nn.Sequential(nn.Linear(4, 3 * 5), MixtureParamExtractor(3))
    assert [x.shape for x in network(torch.randn(2, 4))] == [(2, 3), (2, 3, 2), (2, 3, 2)]


@pytest.mark.parametrize("size", [0, 3, 6, 8, 14, 16])
def test_features_that_do_not_divide_into_experts_are_quoted(size):
    with pytest.raises(ValueError, match=rf"\(4, {size}\).*K \(2A \+ 1\) with K=3"):
        MixtureParamExtractor(3)(torch.randn(4, size))


def test_features_of_another_action_size_are_quoted():
    with pytest.raises(ValueError, match=r"\(4, 15\).*K=3, A=4: 27"):
        MixtureParamExtractor(3, action_size=4)(torch.randn(4, 15))


@pytest.mark.parametrize("experts", [0, -1, 2.0, True, None])
def test_num_experts_is_a_positive_integer(experts):
    with pytest.raises(ValueError, match=f"num_experts={experts!r}"):
        MixtureParamExtractor(experts)


def test_floor_mixes_the_router_with_the_uniform_one():
    features = 100 * torch.randn(20, 15)
    logits = MixtureParamExtractor(3, floor=0.3)(features)[0]
    torch.testing.assert_close(logits.softmax(-1), 0.7 * features[:, :3].softmax(-1) + 0.1)


@pytest.mark.parametrize("floor", [-0.1, 1.0, 2.0])
def test_floor_lies_between_zero_and_one(floor):
    with pytest.raises(ValueError, match=f"floor={floor}"):
        MixtureParamExtractor(3, floor=floor)


def test_clamped_exp_is_the_authors_scale():
    features = torch.tensor([-30.0, -20.0, 0.5, 2.0, 5.0])
    expected = torch.tensor([-20.0, -20.0, 0.5, 2.0, 2.0]).exp()
    torch.testing.assert_close(ClampedExp()(features), expected)
