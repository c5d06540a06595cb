"""The PPO recipe's update against TorchRL's loss as it comes, and as the compiler sees it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import recipe_runs
import torch
from tensordict import TensorDict
from torchrl.data import Bounded

from torchrl_pmoe.trainers import FusedOptimizationStepper

import ppo_pmoe  # isort: skip

B = 64
POLICIES = {
    "gaussian": ["policy=gaussian"],
    "responsibility": ["num_experts=3"],
    "critic-scored": ["num_experts=3", "scoring=critic"],
}


def loss_and_batch(policy, clip_value="true"):
    overrides = [*recipe_runs.SMALL_PPO, *POLICIES[policy], "loss.clip_epsilon=0.05", f"loss.clip_value={clip_value}"]
    cfg = recipe_runs.resolve(ppo_pmoe, "device=cpu", *overrides)
    torch.manual_seed(0)
    actor, value, loss = ppo_pmoe.build_agent(cfg, Bounded(-torch.ones(1), torch.ones(1), (1,)), 3)
    generator = torch.Generator().manual_seed(3)
    draw = {key: torch.randn(B, width, generator=generator) for key, width in (("observation", 3), ("action", 1))}
    scalars = ("advantage", "value_target", "state_value")
    draw.update({key: torch.randn(B, 1, generator=generator) for key in scalars})
    batch = TensorDict(draw, B)
    batch["action_log_prob"] = actor.get_dist(batch).log_prob(batch["action"]).detach() + 0.1
    # within the bound for some frames and beyond it for others
    batch["state_value"] = value(batch.copy())["state_value"].detach() + 0.1 * draw["state_value"]
    return loss, batch


def outputs(loss, batch):
    torch.manual_seed(0)
    return loss(batch.copy()).detach()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_bound_of_the_values_move_is_torchrls(policy, monkeypatch):
    loss, batch = loss_and_batch(policy)
    monkeypatch.setattr(ppo_pmoe, "branch_on_the_host", lambda loss: loss)
    untouched, _ = loss_and_batch(policy)
    free, _ = loss_and_batch(policy, "false")
    assert isinstance(untouched.clip_value, torch.Tensor)
    ours, theirs = outputs(loss, batch), outputs(untouched, batch)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    assert outputs(free, batch)["loss_critic"] != ours["loss_critic"]


@pytest.mark.parametrize("policy", POLICIES)
def test_loss_and_backward_are_one_graph(policy):
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    loss, batch = loss_and_batch(policy)
    optimizer = torch.optim.Adam(loss.parameters())
    trainer = SimpleNamespace(
        loss_module=loss,
        compute_loss=loss,
        optimizer=optimizer,
        clip_norm=0.5,
        clip_grad_norm=True,
        _process_loss_ops=[],
        _post_loss_hook=lambda batch: None,
    )
    stepper = FusedOptimizationStepper(compile={"backend": backend, "fullgraph": True})
    torch._dynamo.reset()
    try:
        for _ in range(4):
            stepper.step(trainer, batch.copy())
    finally:
        torch._dynamo.reset()
    assert len(seen) == 1
