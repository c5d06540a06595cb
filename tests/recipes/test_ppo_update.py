"""The PPO recipe's update against TorchRL's loss as it comes, and as the compiler sees it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import recipe_runs
import torch
from tensordict import TensorDict

from torchrl_pmoe.trainers import FusedOptimizationStepper

import ppo_pmoe  # isort: skip

B = 64
POLICIES = {
    "gaussian": ["policy=gaussian"],
    "responsibility": ["num_experts=3"],
    "critic-scored": ["num_experts=3", "scoring=critic"],
}


def agent_and_batch(policy, clip_value="true"):
    overrides = [*recipe_runs.SMALL_PPO, *POLICIES[policy], "loss.clip_epsilon=0.05", f"loss.clip_value={clip_value}"]
    agent = ppo_pmoe.build_agent(recipe_runs.resolve(ppo_pmoe, "device=cpu", *overrides))
    generator = torch.Generator().manual_seed(3)
    draw = {key: torch.randn(B, width, generator=generator) for key, width in (("observation", 3), ("action", 1))}
    scalars = ("advantage", "value_target", "state_value")
    draw.update({key: torch.randn(B, 1, generator=generator) for key in scalars})
    batch = TensorDict(draw, B)
    batch["action_log_prob"] = agent.actor.get_dist(batch).log_prob(batch["action"]).detach() + 0.1
    # within the bound for some frames and beyond it for others
    batch["state_value"] = agent.value(batch.copy())["state_value"].detach() + 0.1 * draw["state_value"]
    return agent, batch


def outputs(loss, batch):
    torch.manual_seed(0)
    return loss(batch.copy()).detach()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_bound_of_the_values_move_is_torchrls(policy, monkeypatch):
    agent, batch = agent_and_batch(policy)
    monkeypatch.setattr(ppo_pmoe, "branch_on_the_host", lambda loss: loss)
    untouched, _ = agent_and_batch(policy)
    free, _ = agent_and_batch(policy, "false")
    assert isinstance(untouched.loss.clip_value, torch.Tensor)
    ours, theirs = outputs(agent.loss, batch), outputs(untouched.loss, batch)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    assert outputs(free.loss, batch)["loss_critic"] != ours["loss_critic"]


@pytest.mark.parametrize("policy", POLICIES)
def test_loss_and_backward_are_one_graph(policy):
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    agent, batch = agent_and_batch(policy)
    optimizer = torch.optim.Adam(agent.loss.parameters())
    trainer = SimpleNamespace(
        loss_module=agent.loss,
        compute_loss=agent.loss,
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
