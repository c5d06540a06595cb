"""DACLoss against a small chain that is solved exactly: the values of both levels, and both policy gradients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tensordict import TensorDict
from torch import nn
from torchrl.data import Unbounded
from torchrl.modules import IndependentNormal, ValueOperator

from torchrl_pmoe.baselines.dac import DACLoss
from torchrl_pmoe.baselines.double_gae import DoubleGAE
from torchrl_pmoe.baselines.options import OptionActor

K = 3
F64 = torch.float64
EXACT = 1e-6  # TorchRL's vectorised advantages decay in single precision

GAMMA, STATES, NODES = 0.9, 4, 160
START = np.array([0.4, 0.3, 0.2, 0.1])
BASE, SLOPE = np.array([0.3, -0.5, 0.2, 1.0]), np.array([0.4, -0.3, 0.6, 0.2])


class Chain:
    """States in a row; an action ``a`` goes right with probability ``Phi(a)``, else left; right of the last it ends.

    Everything is solved exactly, in NumPy, from the table of the policy's features ``[K (2 + 2), S]``.
    """

    def __init__(self, table):
        logits, ends, loc, log_scale = np.split(table, 4)  # [K, S] each
        weights = np.exp(logits)
        self.master = weights / weights.sum(0)
        self.ends = 1.0 / (1.0 + np.exp(-ends))
        self.loc, self.scale = loc, np.exp(log_scale)
        self.high = np.zeros((K, STATES, K))  # [o', s, o]
        for before, s, o in itertools.product(range(K), range(STATES), range(K)):
            goes_on = (1.0 - self.ends[before, s]) * (before == o)
            self.high[before, s, o] = goes_on + self.ends[before, s] * self.master[o, s]
        right = norm.cdf(loc / np.sqrt(1.0 + self.scale**2))
        self.move = np.zeros((K, STATES, STATES))  # [o, s, s'], the rest ends the episode
        for o, s in itertools.product(range(K), range(STATES)):
            self.move[o, s, max(s - 1, 0)] += 1.0 - right[o, s]
            if s + 1 < STATES:
                self.move[o, s, s + 1] += right[o, s]
        self.reward = BASE + SLOPE * loc - 0.1 * (loc**2 + self.scale**2)  # [o, s], its mean over actions
        # the augmented chain over (o', s)
        self.step = np.einsum("bso,ost->bsot", self.high, self.move).reshape(K * STATES, K * STATES)
        mean = np.einsum("bso,os->bs", self.high, self.reward).reshape(-1)
        self.value_high = np.linalg.solve(np.eye(K * STATES) - GAMMA * self.step, mean).reshape(K, STATES)
        self.value_low = self.reward + GAMMA * np.einsum("ost,ot->os", self.move, self.value_high)

    @property
    def performance(self):
        return np.einsum("s,os,os->", START, self.master, self.value_low)

    def visits(self):
        """Discounted visits of ``(o', s)`` after the first step, ``[K, S]``."""
        first = GAMMA * np.einsum("s,os,ost->ot", START, self.master, self.move).reshape(-1)
        return np.linalg.solve(np.eye(K * STATES) - GAMMA * self.step.T, first).reshape(K, STATES)

    def advantage_of_action(self, o, s, a):
        left, right = self.value_high[o, max(s - 1, 0)], self.value_high[o, s + 1] if s + 1 < STATES else 0.0
        reward = BASE[s] + SLOPE[s] * a - 0.1 * a**2
        return reward + GAMMA * (norm.cdf(a) * right + norm.cdf(-a) * left) - self.value_low[o, s]


@pytest.fixture
def chain():
    """The chain under a random policy, the same policy as an actor, and a critic that knows the truth."""
    table = 0.7 * np.random.default_rng(0).normal(size=(4 * K, STATES))
    network = nn.Linear(STATES, 4 * K, bias=False, dtype=F64)
    network.weight.data.copy_(torch.as_tensor(table))
    actor = OptionActor(
        K,
        spec=Unbounded((1,), dtype=F64),
        network=network,
        scale_mapping="exp",
        distribution_class=IndependentNormal,
    )
    solved = Chain(table)
    truth = nn.Linear(STATES, K, bias=False, dtype=F64)
    truth.weight.data.copy_(torch.as_tensor(solved.value_low))
    return table, solved, actor, ValueOperator(truth, in_keys=["observation"], out_keys=["option_value"])


def every_first_step():
    """``(o', s, first)`` that there is; where an episode begins ``o'`` is one that does not matter."""
    yield from ((before, s, False) for before, s in itertools.product(range(K), range(STATES)))
    yield from ((2, s, True) for s in range(STATES))


def test_values_of_both_levels_solve_the_chain(chain):
    """Over every trajectory of two steps: the critic's truth is what the targets say, and nobody has an advantage."""
    _, solved, actor, critic = chain
    rows, weights = [], []
    for (before, s, first), o, t, o2, u in itertools.product(
        every_first_step(), range(K), range(STATES + 1), range(K), range(STATES + 1)
    ):
        high = solved.master[o, s] if first else solved.high[before, s, o]
        ends = t == STATES
        # after an end the next episode has begun, in the first state
        s2 = 0 if ends else t
        high2 = solved.master[o2, 0] if ends else solved.high[o, t, o2]

        def leads(option, here, there):
            move = solved.move[option, here]
            return 1.0 - move.sum() if there == STATES else move[there]

        weight = high * leads(o, s, t) * high2 * leads(o2, s2, u)
        if weight > 0:
            rows.append((before, s, first, o, t, s2, ends, o2, u))
            weights.append(weight)
    before, s, first, o, t, s2, ends, o2, u = (torch.tensor(column) for column in zip(*rows, strict=True))
    weights = torch.tensor(weights, dtype=F64)
    seen = nn.functional.one_hot(torch.stack((s, s2), -1), STATES).to(F64)
    follows = nn.functional.one_hot(torch.stack((t, u), -1), STATES + 1)[..., :STATES].to(F64)
    option = torch.stack((o, o2), -1)
    reward = torch.as_tensor(solved.reward)[option, torch.stack((s, s2), -1)]
    done = torch.stack((ends, u == STATES), -1).unsqueeze(-1)
    td = TensorDict(
        {
            "observation": seen,
            "is_init": torch.stack((first, ends), -1).unsqueeze(-1),
            "previous_option": torch.stack((before, o), -1).unsqueeze(-1),
            "option": option.unsqueeze(-1),
            "next": {"observation": follows, "reward": reward.unsqueeze(-1), "done": done, "terminated": done},
        },
        option.shape,
    )
    DoubleGAE(actor, critic, gamma=GAMMA, lmbda=0.7)(td)

    def mean(key, chosen):
        values = td[key][:, 0, 0][chosen]
        return ((values * weights[chosen]).sum() / weights[chosen].sum()).item()

    for was, state, begins in every_first_step():
        here = (before == was) & (s == state) & (first == begins)
        expected = np.einsum("o,o->", solved.master[:, state], solved.value_low[:, state])
        value = expected if begins else solved.value_high[was, state]
        policy = actor.get_policy(td[here][:1, 0])
        probs = policy.option_log_prob(td[here]["previous_option"][:1, 0], td[here]["is_init"][:1, 0]).exp()
        found = (probs * td[here]["option_value"][:1, 0]).sum().item()
        assert found == pytest.approx(value, abs=1e-10)
        assert mean("advantage_high", here) == pytest.approx(0.0, abs=EXACT)
        for taken in range(K):
            one = here & (o == taken)
            truth = solved.value_low[taken, state]
            assert mean("advantage_high", one) == pytest.approx(truth - value, abs=EXACT)
            assert mean("advantage_low", one) == pytest.approx(0.0, abs=EXACT)
            assert mean("value_target", one) == pytest.approx(truth, abs=EXACT)


def test_gradients_of_both_levels_are_finite_differences_of_the_exact_return(chain):
    """With exact advantages and every state, option and action weighed as often as it is met, discounted."""
    table, solved, actor, critic = chain
    nodes, node_weights = np.polynomial.hermite.hermgauss(NODES)
    visits = solved.visits()
    rows = []
    for (before, s, first), o, (x, w) in itertools.product(
        every_first_step(), range(K), zip(nodes, node_weights, strict=True)
    ):
        here = START[s] if first else visits[before, s]
        high = solved.master[o, s] if first else solved.high[before, s, o]
        value = solved.master[:, s] @ solved.value_low[:, s] if first else solved.value_high[before, s]
        action = solved.loc[o, s] + solved.scale[o, s] * math.sqrt(2.0) * x
        advantages = solved.value_low[o, s] - value, solved.advantage_of_action(o, s, action)
        rows.append((before, s, first, o, action, *advantages, here * high * w / math.sqrt(math.pi)))
    before, s, first, o, action, high, low, weight = (torch.tensor(column) for column in zip(*rows, strict=True))
    td = TensorDict(
        {
            "observation": nn.functional.one_hot(s, STATES).to(F64),
            "is_init": first.unsqueeze(-1),
            "previous_option": before.unsqueeze(-1),
            "option": o.unsqueeze(-1),
            "action": action.unsqueeze(-1),
            "advantage_high": high.unsqueeze(-1),
            "advantage_low": low.unsqueeze(-1),
            "value_target": torch.zeros(len(rows), 1, dtype=F64),
        },
        [len(rows)],
    )
    with torch.no_grad():
        td["option_log_prob"] = actor.get_dist_high(td).log_prob(o)
        td["action_log_prob"] = actor.get_dist_low(td).log_prob(td["action"])
    losses = DACLoss(actor, critic, reduction="none")(td)
    expected = np.zeros_like(table)
    for index in np.ndindex(*table.shape):
        moved = []
        for step in (1e-6, -1e-6):
            other = table.copy()
            other[index] += step
            moved.append(Chain(other).performance)
        expected[index] = (moved[0] - moved[1]) / 2e-6
    for level, part in (("high", slice(0, 2 * K)), ("low", slice(2 * K, 4 * K))):
        loss = (weight * losses[f"loss_objective_{level}"]).sum()
        (gradient,) = torch.autograd.grad(-loss, actor.network.module.weight, retain_graph=True)
        wanted = np.zeros_like(table)
        wanted[part] = expected[part]
        assert np.abs(wanted).max() > 0.01
        np.testing.assert_allclose(gradient.numpy(), wanted, atol=1e-8)
