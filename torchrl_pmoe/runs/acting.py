"""Ways for a trained policy to act, and the episodes that it plays, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_pmoe.baselines import MCPActor, OptionActor
from torchrl_pmoe.distributions.proposals import take_expert
from torchrl_pmoe.modules.actors import BestOfExpertsActor, CommittedExpertsActor, ExpertsActor, PMOEActor
from torchrl_pmoe.runs.evaluation import Evaluator

__all__ = ["KINDS", "Acted", "CarriedOptionPolicy", "Episode", "EpisodePlayer", "Kind", "WatchedPolicy", "acting"]

Kind = Literal["deterministic", "drawn", "stochastic", "committed"]
"""The mean of the likeliest expert, the mean of an expert that is drawn at every step, a draw of the whole policy, or
the mean of a drawn expert that keeps acting."""
KINDS: tuple[str, ...] = get_args(Kind)


class Acted(NamedTuple):
    """What a policy did in states ``[*B]``.

    Args:
        tensordict: with ``action``.
        expert: that acted, ``[*B]``; ``None`` for a policy that draws no expert.
        weights: of all experts, ``[*B, K]``: the router's probabilities, or the weights of a blend; ``None`` without.
    """

    tensordict: TensorDictBase
    expert: Tensor | None
    weights: Tensor | None


Act = Callable[[TensorDictBase], Acted]


def acting(actor: TensorDictModuleBase, kind: Kind, *, commit_steps: int | None = None) -> Act:
    """A function of states that says who acted, with what weights.

    Args:
        actor: a :class:`PMOEActor`, one of its rivals, a :class:`BestOfExpertsActor` around one, or any other actor of
            TorchRL; without what normalises its input.
        kind: how it acts. Without a draw of an expert, and for a :class:`BestOfExpertsActor`, ``"drawn"`` is
            ``"deterministic"``. ``"committed"`` is for a :class:`PMOEActor`; see :class:`CommittedExpertsActor` for
            what travels in the tensordict.

    Keyword Args:
        commit_steps: for how many steps a ``"committed"`` expert acts; the whole episode if not given.

    Raises:
        ValueError: for another kind, for ``"committed"`` where no expert is drawn, and for fewer steps than one.
    """
    if kind not in KINDS:
        raise ValueError(f"acting: kind={kind!r} must be one of {', '.join(KINDS)}.")
    if kind == "committed":
        if not isinstance(actor, PMOEActor):
            raise ValueError(
                f"act=committed: must be deterministic, drawn or stochastic with {type(actor).__name__}, "
                "where no expert can keep acting"
            )
        return _of_committed(CommittedExpertsActor(actor, commit_steps=commit_steps, deterministic=True))
    if isinstance(actor, OptionActor):
        return _of_options(actor, kind)
    if isinstance(actor, PMOEActor):
        return _of_mixture(actor, kind)
    kept: dict[str, Tensor] = {}
    if isinstance(actor, BestOfExpertsActor):
        _keep_choice(actor, kept)
    elif isinstance(actor, ExpertsActor):
        _keep_gates(actor, kept)
    exploration = ExplorationType.RANDOM if kind == "stochastic" else ExplorationType.DETERMINISTIC

    def act(states: TensorDictBase) -> Acted:
        with set_exploration_type(exploration):
            acted = actor(states)
        return Acted(acted, kept.get("expert"), kept.get("weights"))

    return act


def _of_mixture(actor: PMOEActor, kind: Kind) -> Act:
    def act(states: TensorDictBase) -> Acted:
        dist = actor.get_dist(states)
        proposals = dist.propose().action if kind == "stochastic" else dist.expert_mode  # [*B, K, A]
        expert = dist.logits.argmax(-1) if kind == "deterministic" else dist.sample_expert()
        return Acted(states.set("action", take_expert(proposals, expert)), expert, dist.probs)

    return act


def _of_committed(actor: CommittedExpertsActor) -> Act:
    def act(states: TensorDictBase) -> Acted:
        probs = actor.get_dist(states).probs
        acted = actor(states)
        return Acted(acted, acted["expert"].squeeze(-1), probs)

    return act


def _of_options(actor: OptionActor, kind: Kind) -> Act:
    def act(states: TensorDictBase) -> Acted:
        probs = actor.get_dist_high(states).probs
        acted = actor.act(states, draw_option=kind != "deterministic", draw_action=kind == "stochastic")
        return Acted(acted, acted["option"].squeeze(-1), probs)

    return act


def _keep_choice(actor: BestOfExpertsActor, kept: dict[str, Tensor]) -> None:
    """Keep what the critics choose, and the router's probabilities."""
    score = actor.score_proposals

    def score_and_keep(states: TensorDictBase, proposals: Tensor) -> Tensor:
        values = score(states, proposals)  # [*B, K]
        kept.update(expert=values.argmax(-1), weights=actor.get_dist(states).probs)
        return values

    actor.score_proposals = score_and_keep


def _keep_gates(actor: ExpertsActor, kept: dict[str, Tensor]) -> None:
    """Keep the weights by which experts are blended: a softmax, or for MCP the gates' shares of their sum."""

    def keep(composition: Any, inputs: tuple[Tensor, ...]) -> None:
        gates = inputs[0].sigmoid() if isinstance(actor, MCPActor) else inputs[0].softmax(-1)
        kept["weights"] = gates / gates.sum(-1, keepdim=True)

    actor[0].module[-1].register_forward_pre_hook(keep)


class CarriedOptionPolicy(TensorDictModuleBase):
    """A policy over options that needs no transform in the environment.

    It writes its option into ``next``, from where the next step reads it. An episode begins where there is no option
    yet. An environment that resets by itself between two calls needs TorchRL's ``InitTracker``, whose ``is_init`` is
    used where it is there.

    Args:
        policy: reads ``observation``, ``is_init`` and ``previous_option``.
    """

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.policy = policy

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action``, and the option for the next step."""
        begins, told = "previous_option" not in tensordict, "is_init" in tensordict
        states = tensordict.copy()
        if begins or not told:
            states["is_init"] = torch.full((*states.shape, 1), begins, device=states["observation"].device)
        if begins:
            states["previous_option"] = torch.zeros_like(states["is_init"], dtype=torch.int64)
        acted = self.policy(states)
        # a mark of our own would stay in the tensordict for the steps that follow
        return acted if told else acted.exclude("is_init")


class WatchedPolicy(TensorDictModuleBase):
    """A policy that remembers the expert and the weights of every step.

    Args:
        act: made by :func:`acting`.
    """

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.act = act
        self.clear()

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action``."""
        acted = self.act(tensordict)
        if acted.expert is not None:
            self._experts.append(acted.expert)
        if acted.weights is not None:
            self._weights.append(acted.weights)
        return acted.tensordict

    def pop(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Experts ``[T]`` and weights ``[T, K]`` of the steps since the last call, ``None`` where there are none."""
        experts, weights = (torch.cat(rows).cpu().numpy() if rows else None for rows in (self._experts, self._weights))
        self.clear()
        return experts, weights

    def clear(self) -> None:
        """Forget all steps."""
        self._experts: list[Tensor] = []
        self._weights: list[Tensor] = []


# ------------------------------------------------------------------------------------------------ episodes


@dataclass(frozen=True)
class Episode:
    """One episode of ``T`` steps.

    Args:
        seed: of the environment and of what the policy draws.
        rewards: ``[T]``.
        actions: in the environment's units, ``[T, A]``.
        success: as the environment reports it at the end, ``None`` where it does not.
        experts: who acted, ``[T]``; ``None`` for a policy that draws no expert.
        weights: of all experts, ``[T, K]``: the router's probabilities, or the weights of a blend; ``None`` without.
        outcome: which of several ends it came to, or by which way: the text or integer ``outcome`` of the last
            ``info``; ``None`` without.
    """

    seed: int
    rewards: np.ndarray
    actions: np.ndarray
    success: bool | None
    experts: np.ndarray | None
    weights: np.ndarray | None
    outcome: str | int | None = None


class _RecordedEnv(gym.Wrapper):
    """Begins every episode from ``seed`` and keeps what happens in it."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.seed = 0
        self.rewards: list[float] = []
        self.actions: list[np.ndarray] = []
        self.success: bool | None = None
        self.outcome: str | int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.rewards, self.actions, self.success, self.outcome = [], [], None, None
        return self.env.reset(seed=self.seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.rewards.append(float(reward))
        self.actions.append(action)
        success = info.get("is_success", info.get("success"))
        self.success = None if success is None else bool(success)
        outcome, self.outcome = info.get("outcome"), None
        if isinstance(outcome, str | int | np.integer) and not isinstance(outcome, bool):
            self.outcome = outcome if isinstance(outcome, str) else int(outcome)
        return observation, reward, terminated, truncated, info


class EpisodePlayer:
    """Plays episodes one by one; the seed of an episode decides all of it.

    Args:
        name: Gymnasium id.
        policy: reads raw observations and writes actions in ``[-1, 1]``.
        watched: the part of ``policy`` that says who acts.

    Keyword Args:
        max_steps: an episode is cut here.
        device: of the policy.
        env_kwargs: arguments of the environment.
    """

    def __init__(
        self,
        name: str,
        policy: TensorDictModuleBase,
        watched: WatchedPolicy,
        *,
        max_steps: int = 10_000,
        device: torch.device | str = "cpu",
        env_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.watched = watched
        self.evaluator = Evaluator(name, policy, episodes=1, max_steps=max_steps, device=device, env_kwargs=env_kwargs)
        self.env = _RecordedEnv(self.evaluator.envs[0])
        self.evaluator.envs = [self.env]

    def __call__(self, seed: int) -> Episode:
        """The episode of ``seed``."""
        self.evaluator.seed = self.env.seed = seed
        # environments may still draw from NumPy's global generator
        np.random.seed(seed)  # noqa: NPY002
        self.evaluator()
        experts, weights = self.watched.pop()
        env = self.env
        rewards, actions = np.array(env.rewards), np.stack(env.actions)
        return Episode(seed, rewards, actions, env.success, experts, weights, env.outcome)

    def close(self) -> None:
        """Close the environment."""
        self.evaluator.close()
