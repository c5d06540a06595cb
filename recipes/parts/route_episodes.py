"""Episodes of trained policies on the target-reaching task, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.modules import ProbabilisticActor

from torchrl_pmoe import PMOEActor
from torchrl_pmoe.envs import BatchedTargetReachingEnv
from torchrl_pmoe.runs import acting
from torchrl_pmoe.runs.acting import Act, Acted, Kind
from torchrl_pmoe.runs.evaluation import isolated_rng

ENTROPY_STEPS = 15
"""Where the route is chosen; later on an agent waits before the target or has reached it."""


def one_expert(actor: PMOEActor, expert: int) -> Act:
    """How one expert acts alone, with its noise."""
    alone = acting(actor.expert(expert), "stochastic")

    def act(states: TensorDictBase) -> Acted:
        acted = alone(states).tensordict
        return Acted(acted, torch.full(acted.shape, expert, device=acted["action"].device), None)

    return act


@torch.no_grad()
def roll(env: BatchedTargetReachingEnv, actor: ProbabilisticActor, act: Act, seed: int) -> dict[str, np.ndarray]:
    """One episode of every agent.

    Args:
        env: of ``N`` agents.
        actor: its log-density of the actions is recorded.
        act: how it acts.
        seed: of the episodes.

    Returns:
        ``path`` ``[N, T + 1, 2]``, nan after the end; ``expert`` ``[N, T]``, -1 after the end; ``success`` ``[N]``;
        ``start`` ``[N]``, numbered by place; ``log_prob`` ``[N, T]``, nan after the end.
    """
    env.set_seed(seed)
    with isolated_rng(seed):
        td = env.reset()
        running = torch.ones(td.shape, dtype=torch.bool, device=env.device)
        success = torch.zeros_like(running)
        paths, experts, log_probs = [env.position.clone()], [], []
        while running.any():
            states = td.select("observation")
            acted = act(states)
            action = acted.tensordict["action"]
            log_prob = actor.get_dist(states).log_prob(action)
            expert = torch.zeros_like(running, dtype=torch.int64) if acted.expert is None else acted.expert
            td = env.step(td.set("action", action))["next"]
            paths.append(torch.where(running.unsqueeze(-1), env.position, torch.nan))
            experts.append(torch.where(running, expert.to(env.device), -1))
            log_probs.append(torch.where(running, log_prob, torch.nan))
            success |= running & td["is_success"].squeeze(-1)
            running = running & ~td["done"].squeeze(-1)
    path = torch.stack(paths, 1).cpu().numpy()
    _, start = np.unique(path[:, 0], axis=0, return_inverse=True)
    return {
        "path": path,
        "expert": torch.stack(experts, 1).cpu().numpy().astype(np.int8),
        "success": success.cpu().numpy(),
        "start": start.reshape(-1),
        "log_prob": torch.stack(log_probs, 1).cpu().numpy(),
    }


def kinds_of(actor: ProbabilisticActor) -> tuple[Kind, ...]:
    """The ways of acting that are recorded."""
    return ("stochastic", "deterministic", *(("drawn",) if isinstance(actor, PMOEActor) else ()))


def success_rates(actor: ProbabilisticActor, env: BatchedTargetReachingEnv, seed: int) -> dict[Kind, float]:
    """The share of the agents of ``env`` that arrive, by the way of acting."""
    return {kind: float(roll(env, actor, acting(actor, kind), seed)["success"].mean()) for kind in kinds_of(actor)}


def record_episodes(
    actor: ProbabilisticActor, env: BatchedTargetReachingEnv, few: BatchedTargetReachingEnv, seed: int
) -> dict[str, Any]:
    """What a trained policy does: episodes of each kind of acting, and of each expert alone.

    Args:
        actor: the policy.
        env: of as many agents as there are to be episodes of a kind.
        few: of as many agents as there are to be episodes of an expert.
        seed: of the episodes.
    """
    recorded: dict[str, Any] = {}
    for kind in kinds_of(actor):
        found = roll(env, actor, acting(actor, kind), seed)
        recorded.update({f"{kind}_{key}": value for key, value in found.items()})
    recorded["entropy"] = -np.nanmean(recorded["stochastic_log_prob"][:, :ENTROPY_STEPS])
    if isinstance(actor, PMOEActor):
        for expert in range(actor.num_experts):
            found = roll(few, actor.expert(expert), one_expert(actor, expert), seed)
            recorded.update({f"alone{expert}_{key}": value for key, value in found.items()})
    return recorded
