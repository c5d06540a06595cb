"""Back-prop-max, coupled and decoupled, against quadrature where the value is known."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from torchrl_pmoe import PMOEActor, PMOESACLoss, PMOETQCLoss

K, ALPHA, DRAWS = 3, 0.2, 40_000
LOGITS, LOC, SCALE = [0.3, -0.2, 0.8], [-0.5, 0.2, 0.6], [0.3, 0.6, 0.2]


class Rows(nn.Module):
    """Every state has parameters of its own, all the same, so that every gradient can be looked at."""

    def __init__(self, rows):
        super().__init__()
        self.features = nn.Parameter(torch.tensor([*LOGITS, *LOC, *SCALE]).double().repeat(rows, 1))

    def forward(self, observation):
        return self.features


def value_of(action):
    return -2.0 * (action - 0.4).square().sum(-1, keepdim=True) + 0.5 * (9.0 * action).sin().sum(-1, keepdim=True)


class Known(nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        self.outputs, self.gain = outputs, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, observation, action):
        return (self.gain * value_of(action)).expand(*action.shape[:-1], self.outputs)


def gradients_of_the_loss(score, rows, kind=PMOESACLoss, **options):
    """Per state, on loc and scale, ``[rows, K]`` each."""
    network = Rows(rows)
    actor = PMOEActor(
        K,
        spec=Bounded(-1, 1, (1,), dtype=torch.float64),
        network=network,
        scale_mapping=nn.Identity(),
        distribution_kwargs={"score": score},
    )
    critic = ValueOperator(Known(5 if kind is PMOETQCLoss else 1), in_keys=["observation", "action"])
    loss = kind(
        actor,
        critic,
        num_qvalue_nets=1,
        alpha_init=ALPHA,
        fixed_alpha=True,
        routing="none",
        reduction="none",
        scalar_output_mode="exclude",
        **options,
    )
    states = TensorDict(observation=torch.zeros(rows, 1).double(), batch_size=[rows])
    loss.actor_loss(states)[0].sum().backward()
    return network.features.grad[:, K : 2 * K], network.features.grad[:, 2 * K :]


def exact(score, *, coupled):
    """The expectation by quadrature, loc and scale ``[K]``: of the draw that wins, or of any draw of the winner."""
    noise = torch.linspace(-7, 7, 4001, dtype=torch.float64)
    share = torch.distributions.Normal(0.0, 1.0).log_prob(noise).softmax(0)
    loc = torch.tensor(LOC).double().requires_grad_()
    scale = torch.tensor(SCALE).double().requires_grad_()
    latent = loc.unsqueeze(-1) + scale.unsqueeze(-1) * noise  # [K, G]
    value = value_of(latent.tanh().unsqueeze(-1)).squeeze(-1)
    every = torch.distributions.Normal(loc, scale).log_prob(latent.unsqueeze(-1))  # [K, G, K]
    log_prob = every.diagonal(dim1=0, dim2=2).T
    if score == "mixture":
        log_prob = (every + torch.tensor(LOGITS).double().log_softmax(0)).logsumexp(-1)
    loss = ALPHA * (log_prob + 2 * latent.cosh().log()) - value
    # P(an expert's draw is worth less than each value), [K, K * G]
    flat = value.detach().flatten()
    order = [v.sort() for v in value.detach()]
    below = torch.stack(
        [nn.functional.pad(share[o.indices].cumsum(0), (1, 0))[torch.searchsorted(o.values, flat)] for o in order]
    ).unflatten(1, (K, -1))
    wins = torch.stack([below[[j for j in range(K) if j != k], k].prod(0) for k in range(K)])  # [K, G]
    how_often = wins if coupled else (wins * share).sum(-1, keepdim=True)
    total = (how_often * share * loss).sum()
    return torch.autograd.grad(total, (loc, scale))


def assert_unbiased(found, expected):
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected).abs() < 4.5 * error).all()
    # narrow enough to see a bias of a tenth
    assert error.max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("score", ["mixture", "expert"])
@pytest.mark.parametrize("kind", [PMOESACLoss, PMOETQCLoss])
def test_decoupled_max_has_the_gradient_of_a_random_draw_of_the_chosen_expert(kind, score):
    torch.manual_seed(0)
    for found, expected in zip(
        gradients_of_the_loss(score, DRAWS, kind, decoupled=True), exact(score, coupled=False), strict=True
    ):
        assert_unbiased(found, expected)


@pytest.mark.parametrize("score", ["mixture", "expert"])
def test_coupled_max_has_the_gradient_of_the_winning_draw_which_widens_the_experts(score):
    torch.manual_seed(0)
    loc, scale = gradients_of_the_loss(score, DRAWS)
    for found, winning in zip((loc, scale), exact(score, coupled=True), strict=True):
        assert_unbiased(found, winning)
    # a step is minus the gradient
    push = exact(score, coupled=False)[1] - scale.mean(0)
    assert push.abs().max() > 20 * scale.std(0).max() / math.sqrt(DRAWS)
    assert push.sum() > 0


def test_several_proposals_are_as_many_selections_each_with_a_fresh_draw():
    torch.manual_seed(0)
    found = gradients_of_the_loss("mixture", DRAWS // 2, decoupled=True, num_proposals=2)
    for ours, expected in zip(found, exact("mixture", coupled=False), strict=True):
        assert_unbiased(ours, expected)


def test_the_fresh_draw_is_another_one_in_every_call_and_leaves_the_proposals_as_they_were():
    losses = []
    for options in ({}, {"decoupled": True}, {"decoupled": True}):
        torch.manual_seed(0)
        losses.append(gradients_of_the_loss("expert", 50, **options)[1])
    torch.testing.assert_close(losses[1], losses[2])
    # the same expert is chosen: its scale alone has a gradient
    assert ((losses[0] != 0) == (losses[1] != 0)).all()
    assert (losses[0] != losses[1]).any(-1).all()
