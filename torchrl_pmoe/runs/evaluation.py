"""Evaluations of a policy during a run, and what is recorded of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_pmoe.envs.action_units import RawActionPolicy
from torchrl_pmoe.envs.making import Env, make_gym_env
from torchrl_pmoe.runs.metrics import MetricsFile
from torchrl_pmoe.runs.simulators import generator_state, load_generator_state
from torchrl_pmoe.trainers.nonfinite import NonFiniteError

__all__ = ["Evaluator", "RecordedEvaluation", "isolated_rng", "summarize_returns"]


class Evaluator:
    """Plays whole episodes in environments of its own, all at once, without touching the run's randomness.

    Args:
        name: environment, as :func:`~torchrl_pmoe.envs.make_env` takes it.
        policy: reads ``observation`` and writes ``action`` in ``[-1, 1]``, as in an environment of
            :func:`~torchrl_pmoe.envs.make_env`. It is asked for its deterministic action. What it writes into ``next``
            is there again in the next step of the episode.

    Keyword Args:
        episodes: how many episodes make one evaluation.
        max_steps: an episode is cut here.
        seed: of the environments and of what the policy may draw.
        device: of the policy.
        env_kwargs: arguments of the environments.
        stopped: asked at every step whether to give the evaluation up.

    Raises:
        EnvironmentFault: where the environment cannot be made.

    Examples:
        >>> returns = Evaluator("Pendulum-v1", actor, episodes=10, max_steps=1000, seed=1)()
        >>> returns.shape
        torch.Size([10])
    """

    def __init__(
        self,
        name: Env,
        policy: TensorDictModuleBase,
        *,
        episodes: int,
        max_steps: int = 10_000,
        seed: int = 0,
        device: torch.device | str = "cpu",
        env_kwargs: Mapping[str, Any] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.max_steps = max_steps
        self.device = device
        self.seed = seed
        self.stopped = stopped
        self.envs = [make_gym_env(name, env_kwargs) for _ in range(episodes)]
        for index, env in enumerate(self.envs):
            env.reset(seed=seed + index)
        box: Any = self.envs[0].action_space
        low, high = (torch.as_tensor(bound, dtype=torch.float32, device=device) for bound in (box.low, box.high))
        self.policy = RawActionPolicy(policy, low, high)

    @torch.no_grad()
    def __call__(self) -> Tensor | None:
        """Play one evaluation.

        Returns:
            The return of every episode, ``[episodes]``; ``None`` where the evaluation was given up, which leaves
            everything as it was before.

        Raises:
            NonFiniteError: where an action, a reward or an observation is NaN or infinite.
        """
        before = self.state_dict()
        with isolated_rng(self.seed), set_exploration_type(ExplorationType.DETERMINISTIC):
            returns = self._play()
        if returns is None:
            self.load_state_dict(before)
        return returns

    def _play(self) -> Tensor | None:
        returns = torch.zeros(len(self.envs), dtype=torch.float64)
        observation = np.stack([env.reset()[0] for env in self.envs])  # [episodes, O]
        running = list(range(len(self.envs)))
        carried = TensorDict({}, [len(running)])
        for _ in range(self.max_steps):
            if self.stopped():
                return None
            # only the rows of the episodes that still run
            batch = torch.as_tensor(observation[running], dtype=torch.float32, device=self.device)
            td = self.policy(carried.set("observation", batch))
            actions = td.get("action").cpu().numpy()
            if not np.isfinite(actions).all():
                raise NonFiniteError(
                    "the policy returned a NaN or infinite action in an evaluation: the run stops here"
                )
            still = []
            for index, action in zip(running, actions, strict=True):
                observation[index], reward, terminated, truncated, _ = self.envs[index].step(action)
                returns[index] += float(reward)
                if not (np.isfinite(observation[index]).all() and math.isfinite(reward)):
                    raise NonFiniteError(
                        "the evaluation met a NaN or infinite reward or observation: the run stops here"
                    )
                if not (terminated or truncated):
                    still.append(index)
            rows = [row for row, index in enumerate(running) if index in still]
            carried = td.get("next", TensorDict({}, [len(running)]))[rows]
            running = still
            if not running:
                break
        return returns

    def state_dict(self) -> dict[str, Any]:
        """The random generators of the environments; every evaluation begins with new episodes."""
        return {"generators": [generator_state(env) for env in self.envs]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the random generators."""
        for env, state in zip(self.envs, state_dict["generators"], strict=False):
            load_generator_state(env, state)

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()


class RecordedEvaluation:
    """Evaluates one or several agents, and writes a row for each when all of them are through.

    An evaluation that is given up leaves what was measured beside it in the checkpoint, so that a run that goes on
    begins with the episodes that are missing, and writes the rows that it would have written.

    Args:
        evaluators: one for each agent.
        metrics: one for each agent.
        measure: returns the other columns of each agent's row.
        written: called with the rows and the frames.
    """

    def __init__(
        self,
        evaluators: Sequence[Evaluator],
        metrics: Sequence[MetricsFile],
        measure: Callable[[], list[dict[str, float]]],
        written: Callable[[list[dict[str, float]], int], None] = lambda rows, frames: None,
    ) -> None:
        self.evaluators, self.metrics = evaluators, metrics
        self.measure, self.written = measure, written
        self.given_up: list[dict[str, float]] = []

    def __call__(self, frames: int) -> bool:
        """Add a row to every record.

        Args:
            frames: of each agent so far.

        Returns:
            Whether the evaluation came to its end.
        """
        # the clocks of all stand still while one is evaluated
        with ExitStack() as paused:
            rows = [metrics.clock(frames) for metrics in self.metrics]
            for metrics in self.metrics:
                paused.enter_context(metrics.paused())
            measured = self.given_up or self.measure()
            before = self.state_dict()
            for row, evaluator, columns in zip(rows, self.evaluators, measured, strict=True):
                returns = evaluator()
                if returns is None:
                    # those that are through must give the same returns again
                    self.load_state_dict({**before, "given_up": measured})
                    return False
                row.update({**summarize_returns(returns), **columns})
            self.given_up = []
            for row, metrics in zip(rows, self.metrics, strict=True):
                metrics.write(row)
            self.written(rows, frames)
        return True

    def resume(self, frames: int) -> None:
        """Go on with the records after ``frames`` frames of each agent."""
        for metrics in self.metrics:
            metrics.resume(frames - bool(self.given_up))

    def state_dict(self) -> dict[str, Any]:
        """The evaluators, and what was measured beside an evaluation that was given up."""
        return {"evaluators": [evaluator.state_dict() for evaluator in self.evaluators], "given_up": self.given_up}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the evaluators, and what was measured."""
        for evaluator, state in zip(self.evaluators, state_dict["evaluators"], strict=True):
            evaluator.load_state_dict(state)
        self.given_up = state_dict["given_up"]

    def close(self) -> None:
        """Close the environments."""
        for evaluator in self.evaluators:
            evaluator.close()


def summarize_returns(returns: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the returns of an evaluation, ``[episodes]``."""
    return {"return_mean": returns.mean().item(), "return_std": returns.std(correction=0).item()}


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Draw from PyTorch generators seeded with ``seed``, and put the run's own back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
