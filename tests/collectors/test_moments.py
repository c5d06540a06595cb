"""Statistics of several workers are those of all their rows."""

from __future__ import annotations

import torch

from torchrl_pmoe.collectors.moments import add_gathered, begin_gathering, combined, difference, gathered, moments_of
from torchrl_pmoe.collectors.transport import PolicyReceiver, PolicySender
from torchrl_pmoe.envs import NormalizeObservationAndReward, make_env


def of(rows):
    return rows.mean(0), rows.var(0, correction=0), torch.tensor(float(len(rows)), dtype=torch.float64)


def rows(number, seed):
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(number, 5, generator=generator, dtype=torch.float64)


def test_the_moments_of_two_sets_are_those_of_their_union():
    first, second = rows(1000, 0), 10 + rows(7, 1)
    torch.testing.assert_close(combined(of(first), of(second)), of(torch.cat([first, second])))


def test_what_was_seen_in_between_is_what_was_added():
    first, second = rows(100_000, 0), 10 + rows(16, 1)
    torch.testing.assert_close(difference(of(torch.cat([first, second])), of(first)), of(second), rtol=1e-7, atol=1e-9)


def test_nothing_seen_changes_nothing():
    first = of(rows(10, 0))
    torch.testing.assert_close(combined(first, difference(first, first)), first, rtol=0, atol=0)


def normalized(seed):
    env = make_env("Pendulum-v1", num_envs=2, seed=seed)
    normalization = NormalizeObservationAndReward()
    return env.append_transform(normalization), normalization


def test_workers_together_count_what_one_environment_would():
    """The learner's statistics after a round are those of all raw observations of all workers."""
    _, learner = normalized(0)
    raw, before = [], moments_of(learner)
    for seed in range(3):
        env, own = normalized(seed)
        begin_gathering(own, before)
        torch.manual_seed(seed)
        env.rollout(30)
        add_gathered(learner, gathered(own, before))
        plain = make_env("Pendulum-v1", num_envs=2, seed=seed)
        torch.manual_seed(seed)
        frames = plain.rollout(30)
        raw += [frames[:, :1]["observation"].reshape(-1, 3), frames["next", "observation"].reshape(-1, 3)]
    mean, var, count = of(torch.cat(raw).double())
    assert abs(learner.observations.count - count) < 1e-3
    torch.testing.assert_close(learner.observations.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learner.observations.var, var, rtol=1e-4, atol=1e-4)


def test_episodes_that_have_ended_in_workers_count_in_the_train_return():
    _, learner = normalized(0)
    before = moments_of(learner)
    env, own = normalized(1)
    begin_gathering(own, before)
    env.rollout(450, break_when_any_done=False)
    seen = gathered(own, before)
    assert len(seen["returns"]) == 4
    add_gathered(learner, seen)
    assert learner.train_return() == seen["returns"].mean()


class Holder(torch.nn.Module):
    """A policy that holds a critic in a function, which its ``state_dict`` does not show."""

    def __init__(self):
        super().__init__()
        critic = torch.nn.Linear(2, 1)
        self.own = torch.nn.Linear(2, 2)
        self.critics = critic
        self.score = lambda x: critic(x)
        del self.critics
        self.critic = [critic]
        self.place = torch.device("cuda:3")
        self.low = torch.zeros(2, dtype=torch.bfloat16)

    def forward(self, x):
        return self.score(self.own(x) + self.low)


def test_a_policy_travels_with_all_that_it_holds():
    policy = Holder()
    sender = PolicySender(policy)
    receiver = PolicyReceiver(sender.structure)
    x = torch.ones(3, 2)
    with torch.no_grad():
        for parameter in (policy.own.weight, policy.critic[0].bias, policy.low):
            parameter.add_(1.0)
    receiver.load(sender.weights())
    torch.testing.assert_close(receiver.content(x), policy(x), rtol=0, atol=0)
    assert receiver.content.place == torch.device("cpu")
    assert receiver.content.low.dtype == torch.bfloat16
