"""Losses stacked over agents against the same losses one by one."""

from __future__ import annotations

import threading

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from torchrl_pmoe import NormalMixture, PMOEActor, PMOESACLoss
from torchrl_pmoe.objectives import StackedLoss, StackedPolicy
from torchrl_pmoe.objectives.stacked import _OutOfPlaceNormals

SEEDS, OBS, ACT, B = 3, 5, 2, 16
SPEC = Bounded(-1, 1, (ACT,))


def gaussian():
    network = nn.Sequential(MLP(in_features=OBS, out_features=2 * ACT, num_cells=[8]), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=SPEC,
        distribution_class=TanhNormal,
    )


def mixture(**kwargs):
    return PMOEActor(3, spec=SPEC, in_features=OBS, num_cells=(8,), distribution_kwargs=kwargs)


def critic():
    return ValueOperator(MLP(in_features=OBS + ACT, out_features=1, num_cells=[8]), in_keys=["observation", "action"])


LOSSES = {
    "Gaussian": lambda: SACLoss(gaussian(), critic(), alpha_init=0.3),
    "gradient-scored": lambda: SACLoss(mixture(routing="soft_frequency"), critic(), alpha_init=0.3),
    "frequency, max, expert": lambda: PMOESACLoss(mixture(score="expert"), critic(), alpha_init=0.3),
    "decoupled": lambda: PMOESACLoss(mixture(), critic(), decoupled=True, num_proposals=2, alpha_init=0.3),
    "soft, weighted": lambda: PMOESACLoss(
        mixture(), critic(), routing="soft_frequency", backprop="weighted", num_proposals=2, alpha_init=0.3
    ),
    "marginal, all": lambda: PMOESACLoss(mixture(), critic(), routing="marginal", backprop="all", fixed_alpha=True),
}


def made(name, seeds=range(SEEDS)):
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        loss = LOSSES[name]()
        loss.make_value_estimator(gamma=0.9)
        SoftUpdate(loss, eps=0.9)
        found.append(loss)
    return found


def batches(seed=7):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.empty(SEEDS, B, *shape).normal_(generator=generator)

    return TensorDict(
        observation=normal(OBS),
        action=normal(ACT).tanh(),
        next=TensorDict(
            observation=normal(OBS),
            reward=normal(1),
            done=normal(1) > 1,
            terminated=normal(1) > 1,
            batch_size=[SEEDS, B],
        ),
        batch_size=[SEEDS, B],
    )


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def same_noise(monkeypatch, double):
    """Every draw of a shape is the same numbers, with agents side by side as for one alone."""
    pattern = torch.linspace(-1.5, 1.5, 9973)[torch.randperm(9973, generator=torch.Generator().manual_seed(0))]

    def fixed(*shape, **kwargs):
        size = torch.Size(shape[0] if isinstance(shape[0], (tuple, list, torch.Size)) else shape)
        return pattern[: size.numel()].reshape(size).clone()

    monkeypatch.setattr(torch, "randn", fixed)
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", lambda shape, dtype, device: fixed(shape))
    monkeypatch.setattr(
        NormalMixture, "sample_expert", lambda self, shape=(): torch.ones_like(self.logits[..., 0]).long()
    )


def total(found):
    return sum(value.sum() for key, value in found.items() if key.startswith("loss"))


@pytest.mark.parametrize("name", LOSSES)
def test_every_agent_has_the_outputs_and_gradients_of_its_own_loss(name, same_noise):
    batch = batches()
    stacked = StackedLoss(made(name))
    found = stacked(batch.clone())
    total(found).backward()
    gradients = {key: value.grad for key, value in stacked.named_parameters()}
    for index, loss in enumerate(made(name)):
        alone = loss(batch[index].clone())
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(found[key][index], value, rtol=1e-10, atol=1e-12)
        total(alone).backward()
        for key, value in loss.named_parameters():
            torch.testing.assert_close(gradients[key][index], value.grad, rtol=1e-9, atol=1e-12)
    assert gradients.keys() == dict(loss.named_parameters()).keys()


@pytest.mark.parametrize("name", ["Gaussian", "frequency, max, expert"])
def test_updates_of_all_are_the_updates_of_each(name, same_noise):
    batch = batches()
    stacked, singles = StackedLoss(made(name)), made(name)

    def descend(loss, data):
        optimizer, target = torch.optim.Adam(loss.parameters(), lr=1e-2, eps=1e-4), SoftUpdate(loss, eps=0.9)
        for _ in range(4):
            total(loss(data.clone())).backward()
            optimizer.step()
            optimizer.zero_grad()
            target.step()

    descend(stacked, batch)
    stacked.write_back()
    for index, single in enumerate(singles):
        descend(single, batch[index])
        theirs = stacked.losses[index].state_dict()
        for key, value in single.state_dict().items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


def test_data_of_one_agent_moves_no_other(same_noise):
    name = "frequency, max, expert"

    def after(batch):
        stacked = StackedLoss(made(name))
        optimizer = torch.optim.Adam(stacked.parameters(), lr=1e-2)
        for _ in range(3):
            total(stacked(batch.clone())).backward()
            optimizer.step()
            optimizer.zero_grad()
        return stacked.stacked().data

    batch = batches()
    other = batch.clone()
    other[1] = batches(seed=8)[1]
    one, two = after(batch), after(other)
    difference = (one - two).abs()
    for key, value in difference.items(True, True):
        assert not value[[0, 2]].any(), key
    assert difference["actor_network_params"][1].sum(reduce=True) > 0


@pytest.mark.parametrize("name", ["Gaussian", "gradient-scored"])
def test_agents_draw_noise_of_their_own(name):
    # the same agent in the same states, three times
    policy = StackedPolicy(StackedLoss(made(name, seeds=[0, 0, 0])))
    torch.manual_seed(0)
    rows = 20_000
    states = TensorDict(observation=torch.ones(SEEDS * rows, OBS), batch_size=[SEEDS * rows])
    with set_exploration_type(ExplorationType.RANDOM):
        action = policy(states)["action"].reshape(SEEDS, rows, ACT)
    alone = made(name, seeds=[0])[0]
    dist = alone.actor_network.get_dist
    with alone.actor_network_params.to_module(alone.actor_network), torch.no_grad():
        expected = dist(states[:rows]).sample()
    error = 4 * expected.std(0) * (2 / rows) ** 0.5
    assert ((action.mean(1) - expected.mean(0)).abs() < error).all()
    torch.testing.assert_close(action.std(1), expected.std(0).expand(SEEDS, ACT), rtol=0.05, atol=0)
    correlation = torch.corrcoef(action[..., 0])
    assert (correlation - torch.eye(SEEDS)).abs().max() < 4 / rows**0.5


def test_out_of_place_draws_are_the_same_numbers():
    torch.manual_seed(0)
    usual = torch.distributions.Normal(torch.zeros(100), 1.0).rsample((3,))
    torch.manual_seed(0)
    with _OutOfPlaceNormals():
        ours = torch.distributions.Normal(torch.zeros(100), 1.0).rsample((3,))
    assert torch.equal(ours, usual)


def test_the_rows_of_a_batch_of_environments_go_to_their_agents():
    losses = made("frequency, max, expert")
    policy = StackedPolicy(StackedLoss(losses))
    state = torch.randn(2, OBS)
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        found = policy(TensorDict(observation=state.repeat(SEEDS, 1), batch_size=[2 * SEEDS]))["action"]
        for index, loss in enumerate(losses):
            with loss.actor_network_params.to_module(loss.actor_network):
                own = loss.actor_network(TensorDict(observation=state, batch_size=[2]))["action"]
            torch.testing.assert_close(found[2 * index : 2 * index + 2], own)


def test_losses_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="at least one loss"):
        StackedLoss([])
    with pytest.raises(ValueError, match="parameters of the same shapes"):
        StackedLoss([*made("Gaussian", [0]), *made("gradient-scored", [0])])


def test_nothing_of_torch_is_changed_while_agents_draw(monkeypatch):
    """Draws of the Gaussian are out of place within the call; another thread's, at the same time, are torch's own."""
    seen = {}
    names = ("_standard_normal", "Normal")
    before = {name: getattr(torch.distributions.normal, name) for name in names}
    in_place = []

    def elsewhere():
        value = torch.empty(3)
        in_place.append(value.normal_() is value)

    forward = SACLoss.forward

    def watched(self, tensordict):
        seen.update({name: getattr(torch.distributions.normal, name) for name in names})
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return forward(self, tensordict)

    monkeypatch.setattr(SACLoss, "forward", watched)
    StackedLoss(made("Gaussian"))(batches())
    assert seen == before
    assert in_place == [True]
