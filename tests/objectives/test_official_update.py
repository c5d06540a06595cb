"""One SAC update of the authors' own code, number by number (float64)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import ValueOperator

from objectives.helpers import total
from torchrl_pmoe import NormalMixture, PMOEActor, PMOESACLoss, TanhNormalMixture

OFFICIAL = Path(__file__).parents[1] / "data" / "official_sac_update.npz"
K, A = 4, 6


class _Heads(nn.Module):
    """The authors' policy network, its outputs in this package's order."""

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(17, 32), nn.Linear(32, 32)
        self.last_fc, self.last_fc_log_std = nn.Linear(32, K * A), nn.Linear(32, K * A)
        self.mixing_coefficient_fc = nn.Linear(32, K)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        h = self.fc1(self.fc0(observation).relu()).relu()
        logits = self.mixing_coefficient_fc(h.detach())
        return torch.cat((logits, self.last_fc(h), self.last_fc_log_std(h)), -1)


class _Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1, self.last_fc = nn.Linear(23, 32), nn.Linear(32, 32), nn.Linear(32, 1)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        h = torch.cat((observation, action), -1)
        return self.last_fc(self.fc1(self.fc0(h).relu()).relu())


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    with np.load(OFFICIAL) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


@pytest.fixture
def double() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def update(official, double, monkeypatch):
    """The loss module, its outputs and gradients on the authors' parameters, batch and noise."""

    def load(module: nn.Module, prefix: str) -> nn.Module:
        module.load_state_dict(
            {name[len(prefix) :]: value for name, value in official.items() if name.startswith(prefix)}
        )
        return module

    policy = load(_Heads(), "param/policy/")
    actor = PMOEActor(
        K, spec=Bounded(-1, 1, (A,), dtype=torch.float64), network=policy, distribution_kwargs={"score": "expert"}
    )
    critics = [
        ValueOperator(load(_Critic(), f"param/{name}/"), in_keys=["observation", "action"]) for name in ("qf1", "qf2")
    ]
    loss = PMOESACLoss(actor, critics, loss_function="l2", routing="frequency", backprop="max", entropy_from="winner")
    loss.make_value_estimator(gamma=0.99)
    loss.log_alpha.data.copy_(official["param/log_alpha"].squeeze())
    for i, name in enumerate(("target_qf1", "target_qf2")):
        source = {k: v for k, v in official.items() if k.startswith(f"param/{name}/")}
        for key, value in source.items():
            layer, kind = key.rsplit("/", 1)[1].split(".")
            loss.target_qvalue_network_params["module", layer, kind].data[i].copy_(value)

    batch = TensorDict(
        {
            "observation": official["batch/observations"],
            "action": official["batch/actions"],
            "next": {
                "observation": official["batch/next_observations"],
                "reward": official["batch/rewards"],
                "terminated": official["batch/terminals"].bool(),
                "done": official["batch/terminals"].bool(),
            },
        },
        batch_size=32,
    )
    # the target comes first (next states), then the actor's proposals
    noise = iter((official["noise/next_observations"], official["noise/observations"]))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(noise))
    monkeypatch.setattr(NormalMixture, "sample_expert", lambda self, shape=(): official["noise/next_expert"])
    return loss, loss(batch)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_expert_outputs_agree(official, double, monkeypatch):
    dist = TanhNormalMixture(
        official["head/observations/logits"],
        official["head/observations/loc"],
        official["head/observations/log_std"].clamp(-20, 2).exp(),
    )
    monkeypatch.setattr(torch, "randn", lambda *_, **__: official["noise/observations"])
    action, log_prob = dist.rsample_experts()
    torch.testing.assert_close(action, official["out/expert_action"], rtol=1e-10, atol=1e-12)
    assert relative(log_prob, official["out/expert_log_prob"]) < 2e-4
    torch.testing.assert_close(dist.probs, official["out/mixing_coefficient"], rtol=1e-10, atol=1e-12)


def test_scores_and_best_expert_agree(official, update):
    loss, _ = update
    states = TensorDict({"observation": official["batch/observations"]}, batch_size=32)
    value = loss.score_proposals(states, official["out/expert_action"])
    torch.testing.assert_close(value, official["out/expert_min_q"], rtol=1e-10, atol=1e-12)
    assert (value.argmax(-1) == official["out/best_expert"]).all()


def test_losses_agree(official, update):
    _, out = update
    assert relative(out["loss_actor"], official["out/loss_policy"]) < 2e-4
    assert relative(out["loss_routing"], official["out/loss_mixing"]) < 2e-4
    assert relative(out["loss_alpha"], official["out/loss_alpha"]) < 2e-4
    # TorchRL sums the critics
    assert relative(out["loss_qvalue"], official["stat/qf1_loss"] + official["stat/qf2_loss"]) < 2e-4


def test_every_gradient_agrees(official, update):
    loss, out = update
    total(out).backward()
    checked = 0
    for name, param in loss.actor_network_params.flatten_keys(".").items():
        theirs = official["grad/policy/" + ".".join(name.split(".")[-2:])]
        assert relative(param.grad, theirs) < 1e-3, name
        checked += 1
    for name, param in loss.qvalue_network_params.flatten_keys(".").items():
        for i, critic in enumerate(("qf1", "qf2")):
            theirs = official[f"grad/{critic}/" + ".".join(name.split(".")[-2:])]
            assert relative(param.grad[i], theirs) < 1e-3, (critic, name)
            checked += 1
    assert relative(loss.log_alpha.grad, official["grad/log_alpha"].squeeze()) < 1e-3
    assert checked == 10 + 12


def test_gradients_on_the_heads_agree(official, update, double, monkeypatch):
    loss, _ = update
    head = {
        name: official[f"head/observations/{name}"].clone().requires_grad_() for name in ("logits", "loc", "log_std")
    }
    monkeypatch.setattr(torch, "randn", lambda *_, **__: official["noise/observations"])
    dist = TanhNormalMixture(head["logits"], head["loc"], head["log_std"].clamp(-20, 2).exp(), score="expert")
    monkeypatch.setattr(type(loss.actor_network), "get_dist", lambda *_: dist)
    total, metadata = loss.actor_loss(TensorDict({"observation": official["batch/observations"]}, batch_size=32))
    (total + metadata["loss_routing"]).backward()
    for name, tensor in head.items():
        assert relative(tensor.grad, official[f"grad/head/{name}"]) < 1e-3, name
