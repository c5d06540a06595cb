"""SAC and PPO each in one plain loop over a simulator, with PyTorch, NumPy and Gymnasium, as CleanRL writes them.

Nothing of TorchRL and nothing of this project's library is used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from numpy.typing import NDArray
from raw_sac import Batch, RawSAC
from torch import Tensor, nn
from torch.distributions import Normal
from workers import MissingPackage

Array = NDArray[Any]


def train_sac(env: gym.Env, random_frames: int, batch_size: int = 256, buffer_size: int = 1_000_000) -> Iterator[int]:
    """SAC with compiled losses, an update a frame; yields the number of frames so far, without end."""
    seen, space = (cast(gym.spaces.Box, space) for space in (env.observation_space, env.action_space))
    observation_size, action_size = seen.shape[0], space.shape[0]
    agent = RawSAC(observation_size, action_size)
    agent.losses = torch.compile(agent.losses)  # type: ignore[method-assign]
    act = torch.compile(agent.act)

    def rows(*shape: int) -> Array:
        return np.zeros((buffer_size, *shape), dtype=np.float32)

    observations, next_observations = rows(observation_size), rows(observation_size)
    actions, rewards, ends = rows(action_size), rows(), rows()
    random = np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    frames = 0
    while True:
        if frames < random_frames:
            action = random.uniform(-1, 1, action_size).astype(np.float32)
        else:
            with torch.no_grad():
                action = act(torch.as_tensor(observation, dtype=torch.float32)[None])[0][0].numpy()
        following, reward, terminated, truncated, _ = env.step(space.low + (action + 1) / 2 * (space.high - space.low))
        row = frames % buffer_size
        observations[row], next_observations[row], actions[row] = observation, following, action
        rewards[row], ends[row] = reward, terminated
        observation = env.reset()[0] if terminated or truncated else following
        frames += 1
        if frames > random_frames:
            chosen = random.integers(min(frames, buffer_size), size=batch_size)
            fields = (observations, actions, rewards, next_observations, ends)
            agent.update(Batch(*(torch.from_numpy(field[chosen]) for field in fields)))
        yield frames


class NormalizedPool:
    """A vector environment whose observations and rewards are normalised and clipped to ±10.

    Args:
        envs: ``N`` environments with the methods of :class:`gymnasium.vector.VectorEnv`.
        num_envs: ``N``.
        gamma: discount of the return whose variance divides the rewards.
    """

    def __init__(self, envs: Any, num_envs: int, gamma: float = 0.99) -> None:
        self.envs, self.num_envs, self.gamma = envs, num_envs, gamma
        space = getattr(envs, "single_observation_space", envs.observation_space)
        actions = getattr(envs, "single_action_space", envs.action_space)
        self.observation_size, self.action_size = space.shape[0], actions.shape[0]
        self.low, self.high = actions.low, actions.high
        self._observations, self._returns = RunningMeanStd(shape=(self.observation_size,)), RunningMeanStd()
        self._return = np.zeros(num_envs)

    def reset(self) -> Array:
        """First observations ``[N, O]``."""
        return self._normalize(self.envs.reset()[0])

    def step(self, action: Array) -> tuple[Array, Array, Array]:
        """Observations ``[N, O]``, rewards ``[N]``, and ends ``[N]`` as 0.0 or 1.0."""
        observation, reward, terminated, truncated, _ = self.envs.step(np.clip(action, self.low, self.high))
        ends = terminated | truncated
        self._return = self._return * self.gamma + reward
        self._returns.update(self._return)
        self._return[ends] = 0
        reward = np.clip(reward / np.sqrt(self._returns.var + 1e-8), -10, 10)
        return self._normalize(observation), reward.astype(np.float32), ends.astype(np.float32)

    def _normalize(self, observation: Array) -> Array:
        self._observations.update(observation)
        scaled = (observation - self._observations.mean) / np.sqrt(self._observations.var + 1e-8)
        return np.clip(scaled, -10, 10).astype(np.float32)


def make_pool(name: str, num_envs: int, threads: int) -> NormalizedPool:
    """EnvPool's environments, normalised.

    Raises:
        MissingPackage: where EnvPool is not installed.
    """
    try:
        import envpool
    except ImportError as error:
        raise MissingPackage(f"pip install -e '.[envpool]' brings what it needs ({error})") from error
    if name not in envpool.list_all_envs():
        raise MissingPackage(f"EnvPool has no {name}")
    return NormalizedPool(
        envpool.make(name, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=0), num_envs
    )


def layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    """A linear layer with orthogonal weights."""
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


class Agent(nn.Module):
    """A Gaussian policy with a scale of its own, and a value; tanh networks of 2 x 64."""

    def __init__(self, observation_size: int, action_size: int) -> None:
        super().__init__()

        def network(outputs: int, gain: float) -> nn.Sequential:
            hidden = [layer(observation_size, 64), nn.Tanh(), layer(64, 64), nn.Tanh()]
            return nn.Sequential(*hidden, layer(64, outputs, gain))

        self.actor, self.critic = network(action_size, 0.01), network(1, 1.0)
        self.log_std = nn.Parameter(torch.zeros(action_size))

    def policy(self, observation: Tensor) -> Normal:
        """Of every action dimension, ``[B, A]``."""
        return Normal(self.actor(observation), self.log_std.exp(), validate_args=False)

    def value(self, observation: Tensor) -> Tensor:
        """``[B]``."""
        return self.critic(observation).squeeze(-1)


def advantages_of(
    rewards: Tensor, values: Tensor, ends: Tensor, last_value: Tensor, gamma: float = 0.99, lmbda: float = 0.95
) -> Tensor:
    """Generalised advantages ``[T, N]``.

    Args:
        rewards: ``[T, N]``.
        values: of the observations before the steps, ``[T, N]``.
        ends: whether an episode ended with a step, ``[T, N]``.
        last_value: of the observation after the last step, ``[N]``.
        gamma: discount.
        lmbda: of the average over horizons.
    """
    advantages = torch.zeros_like(rewards)
    following, later = last_value, torch.zeros_like(last_value)
    for step in reversed(range(len(rewards))):
        goes_on = 1 - ends[step]
        error = rewards[step] + gamma * following * goes_on - values[step]
        advantages[step] = later = error + gamma * lmbda * goes_on * later
        following = values[step]
    return advantages


def train_ppo(
    envs: NormalizedPool, frames_per_batch: int = 2048, num_minibatches: int = 32, epochs: int = 10, clip: float = 0.2
) -> Iterator[int]:
    """PPO with clipped values; yields the number of frames so far, without end."""
    agent = Agent(envs.observation_size, envs.action_size)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-4, eps=1e-5, fused=True)
    steps = frames_per_batch // envs.num_envs
    grid = (steps, envs.num_envs)
    observations = torch.zeros(*grid, envs.observation_size)
    actions = torch.zeros(*grid, envs.action_size)
    log_probs, rewards, ends, values = (torch.zeros(grid) for _ in range(4))
    observation = torch.from_numpy(envs.reset())
    frames = 0
    while True:
        with torch.no_grad():
            for step in range(steps):
                policy = agent.policy(observation)
                action = policy.sample()
                observations[step], actions[step] = observation, action
                log_probs[step], values[step] = policy.log_prob(action).sum(-1), agent.value(observation)
                following, reward, ended = envs.step(action.numpy())
                observation = torch.from_numpy(following)
                rewards[step], ends[step] = torch.from_numpy(reward), torch.from_numpy(ended)
            advantages = advantages_of(rewards, values, ends, agent.value(observation))
        flat = [field.flatten(0, 1) for field in (observations, actions, log_probs, advantages, values)]
        flat.append(flat[3] + flat[4])
        for _ in range(epochs):
            for chosen in torch.randperm(steps * envs.num_envs).chunk(num_minibatches):
                seen, taken, before, advantage, value_before, target = (field[chosen] for field in flat)
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                ratio = (agent.policy(seen).log_prob(taken).sum(-1) - before).exp()
                gain = torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
                value = agent.value(seen)
                near = value_before + (value - value_before).clamp(-clip, clip)
                error = torch.maximum((value - target).square(), (near - target).square()).mean()
                optimizer.zero_grad()
                (0.25 * error - gain).backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        frames += steps * envs.num_envs
        yield frames
