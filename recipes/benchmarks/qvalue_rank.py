"""What the Q-network of a finished PPO run is worth: does it rank the experts' proposals as their returns do?

    python recipes/benchmarks/qvalue_rank.py RUN_DIR --states 64

``RUN_DIR`` is that of a run of ``recipes/ppo_pmoe.py`` with ``scoring=critic``; its last checkpoint is loaded. In each
state that the policy meets, every expert's proposal goes through the simulator several times, the policy going on with
the same random numbers for every proposal. Spearman's rank correlation over the experts of a state between scores and
mean discounted returns, averaged over states; *reliability* is that between the two halves of the rollouts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor
from tqdm import tqdm

from torchrl_pmoe import PMOEClipPPOLoss
from torchrl_pmoe.envs import NormalizedPolicy, NormalizeObservationAndReward, RawActionPolicy
from torchrl_pmoe.envs.making import make_gym_env

sys.path.insert(0, str(Path(__file__).parents[1]))

from config.ppo_pmoe import PPOConfig, resolve
from config.typed import build
from parts.errors import UsageError
from parts.on_policy import NORMALIZATION
from parts.resume import load_components, open_run
from parts.training import prepare_torch
from ppo_pmoe import build_agent, build_env

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """Spearman's rank correlation over the experts of a state, averaged over states.

    Args:
        correlation: of scores and returns.
        standard_error: of it, over states.
        reliability: correlation of the returns of one half of the rollouts with those of the other: what the noise of
            the returns leaves to be found.
    """

    correlation: float
    standard_error: float
    reliability: float


def rank_correlation(scores: Array, returns: Array) -> Ranking:
    """Compare scores with returns.

    Args:
        scores: ``[S, K]``, one per state and expert.
        returns: ``[S, K, R]``, one per state, expert and rollout; ``R`` is at least 2.
    """
    found = _per_state(scores, returns.mean(-1))
    half = returns.shape[-1] // 2
    reliability = _per_state(returns[..., :half].mean(-1), returns[..., half:].mean(-1))
    return Ranking(
        float(np.nanmean(found)),
        float(np.nanstd(found, ddof=1) / np.sqrt(np.isfinite(found).sum())),
        float(np.nanmean(reliability)),
    )


def _per_state(first: Array, second: Array) -> Array:
    ranks = (pd.DataFrame(values).rank(axis=1) for values in (first, second))
    one, other = (frame.sub(frame.mean(axis=1), axis=0).to_numpy() for frame in ranks)
    with np.errstate(invalid="ignore"):  # all equal: no correlation is defined
        return (one * other).sum(1) / np.sqrt((one**2).sum(1) * (other**2).sum(1))


class _Copies:
    """Copies of one environment that take the same steps until they are sent apart."""

    def __init__(self, name: str, count: int, env_kwargs: Mapping[str, Any] | None = None) -> None:
        self.envs: list[gym.Env] = [make_gym_env(name, env_kwargs) for _ in range(count)]

    def reset(self, seed: int | None) -> Array:
        observations = [env.reset(seed=seed)[0] for env in self.envs]
        return observations[0]

    def together(self, action: Array) -> tuple[Array, bool]:
        """All take one action: the observation of all of them, and whether the episode has ended."""
        steps = [env.step(action) for env in self.envs]
        observation, _, terminated, truncated, _ = steps[0]
        return observation, terminated or truncated

    def apart(self, action: Array, act: Callable[[Array], Array], horizon: int, gamma: float) -> Array:
        """Discounted returns of actions ``[K, A]``, each taken by ``R`` of the copies, ``[K, R]``.

        ``act`` goes on with the same random numbers for every action: what differs is the action, not the luck.
        """
        copies = np.array(self.envs, dtype=object).reshape(len(action), -1)
        returns = np.zeros(copies.shape)
        observation = np.zeros((*copies.shape, *self.envs[0].observation_space.shape))  # type: ignore[misc]
        going = np.ones(copies.shape, dtype=bool)
        following = action[:, None].repeat(copies.shape[1], axis=1)
        seeds = torch.randint(2**62, (horizon,)).tolist()
        for step, seed in enumerate(seeds):
            for place in zip(*going.nonzero(), strict=True):
                observation[place], reward, terminated, truncated, _ = copies[place].step(following[place])
                returns[place] += gamma**step * float(reward)
                going[place] = not (terminated or truncated)
            if not going.any():
                break
            for row in np.flatnonzero(going.any(1)):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    following[row] = act(observation[row])
        return returns

    def close(self) -> None:
        for env in self.envs:
            env.close()


def proposal_ranking(
    name: str,
    act: Callable[[Array], Array],
    propose: Callable[[Array], tuple[Array, Array]],
    *,
    num_experts: int,
    states: int,
    gamma: float,
    seed: int,
    rollouts: int = 16,
    horizon: int = 100,
    warmup: int = 300,
    show: bool = True,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Ranking:
    """Send every expert's proposal through the simulator and compare what comes with the Q-network's scores.

    Each state is met by the policy itself, after up to ``warmup`` steps. Copies of the environment with one seed go
    there by the same actions; there each takes the proposal of one expert, and the policy goes on.

    Args:
        name: Gymnasium id of an environment that one seed makes deterministic.
        act: the policy, from observations ``[N, O]`` to drawn actions ``[N, A]``.
        propose: from an observation ``[O]`` to every expert's action ``[K, A]`` and its score ``[K]``.
        num_experts: ``K``.
        states: ``S``.
        gamma: discount.
        seed: of environments, states and draws.
        rollouts: returns per proposal.
        horizon: steps of a rollout.
        warmup: largest number of steps before a state.
        show: a progress bar.
    """
    chooser = np.random.default_rng(seed)
    torch.manual_seed(seed)
    copies = _Copies(name, num_experts * rollouts, env_kwargs)
    scores = np.zeros((states, num_experts))
    returns = np.zeros((states, num_experts, rollouts))
    for state in tqdm(range(states), desc="ranking", unit="state", leave=False, disable=not show):
        observation = copies.reset(seed + state)
        for _ in range(chooser.integers(warmup)):
            observation, ended = copies.together(act(observation[None])[0])
            if ended:
                observation = copies.reset(None)
        proposals, scores[state] = propose(observation)
        returns[state] = copies.apart(proposals, act, horizon, gamma)
    copies.close()
    return rank_correlation(scores, returns)


class ScoredAgent(NamedTuple):
    """An agent of a run with a Q-network."""

    actor: ProbabilisticActor
    loss: PMOEClipPPOLoss
    normalization: NormalizeObservationAndReward


def measure_ranking(cfg: PPOConfig, agent: ScoredAgent, states: int, **kwargs: Any) -> Ranking:
    """How well the Q-network ranks the experts' proposals, by Monte-Carlo returns.

    Args:
        cfg: the config.
        agent: with a loss that scores.
        states: that the policy meets.
        **kwargs: of :func:`proposal_ranking`.
    """
    with closing(make_gym_env(cfg.env, cfg.env_kwargs)) as env:
        box: Any = env.action_space
    low, high = (torch.as_tensor(bound, dtype=torch.float32, device=cfg.device) for bound in (box.low, box.high))
    policy = RawActionPolicy(NormalizedPolicy(agent.actor, agent.normalization.normalize), low, high)

    def read(observation: np.ndarray) -> TensorDict:
        states = torch.as_tensor(observation, dtype=torch.float32, device=cfg.device)
        return TensorDict({"observation": states}, states.shape[:-1])

    def act(observation: np.ndarray) -> np.ndarray:
        return policy(read(observation))["action"].cpu().numpy()

    def propose(observation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        states = read(observation)
        states["observation"] = agent.normalization.normalize(states["observation"])
        proposals = agent.actor.get_dist(states).propose().action
        score = agent.loss.score_proposals(states, proposals)
        return policy.to_raw(proposals).cpu().numpy(), score.cpu().numpy()

    assert cfg.num_experts is not None
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        return proposal_ranking(
            cfg.env,
            act,
            propose,
            num_experts=cfg.num_experts,
            states=states,
            gamma=cfg.optim.gamma,
            seed=cfg.seed + 2_000_000,
            env_kwargs=cfg.env_kwargs,
            **kwargs,
        )


def load(run: Path) -> tuple[PPOConfig, ScoredAgent]:
    """The config of a run, and its agent as the last checkpoint left it."""
    values, path = open_run(run)
    if values["recipe"] != "ppo_pmoe" or (values["policy"], values["scoring"]) != ("pmoe", "critic"):
        raise UsageError(f"{run}: must be a run with policy=pmoe and scoring=critic, which has a Q-network")
    cfg = build(PPOConfig, values)
    resolve(cfg)
    env, normalization = build_env(cfg)
    actor, _, loss = build_agent(cfg, env.action_spec_unbatched, env.observation_spec["observation"].shape[-1])
    load_components(path, {"loss_module": loss, f"trainer_module.{NORMALIZATION}": normalization})
    env.close()
    return cfg, ScoredAgent(actor, loss, normalization)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=16, help="of every proposal")
    parser.add_argument("--horizon", type=int, default=100, help="steps of a rollout")
    args = parser.parse_args()
    if args.states < 2 or args.rollouts < 2 or args.horizon < 1:
        parser.error("--states and --rollouts must be at least 2, --horizon at least 1")
    try:
        cfg, agent = load(args.run)
    except UsageError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    prepare_torch(cfg.optim.num_threads)
    found = measure_ranking(cfg, agent, args.states, rollouts=args.rollouts, horizon=args.horizon)
    print("| run | states | rank correlation | reliability |\n|---|---|---|---|")
    print(
        f"| {args.run.name} | {args.states} | {found.correlation:+.3f} ± {found.standard_error:.3f} "
        f"| {found.reliability:.2f} |"
    )


if __name__ == "__main__":
    main()
