"""What an environment needs to go on where it stands, as tensors, numbers and texts."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.utils.seeding import RandomNumberGenerator
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymWrapper, SerialEnv, TransformedEnv

from torchrl_pmoe.envs import MultiGoalEnv, TargetReachingEnv
from torchrl_pmoe.envs.points import BatchedPointEnv, PointEnv

__all__ = ["EpisodeState", "SimulatorState", "generator_state", "load_generator_state"]

_OTHER: Any = object()
# what every wrapper of Gymnasium has, and a generator that is kept by itself; the checker's copy of the last step
_NO_STATE = (
    "env",
    "_action_space",
    "_observation_space",
    "_metadata",
    "_cached_spec",
    "_saved_kwargs",
    "_np_random",
    "_previous_data",
)
# all that these tasks know of an episode is in their plain attributes and, for the first, in MuJoCo's data
_KNOWN = (
    "gymnasium.envs.mujoco.",
    "gymnasium.envs.classic_control.",
    TargetReachingEnv.__module__,
    MultiGoalEnv.__module__,
)


class SimulatorState:
    """The state of environments in this process, for checkpoints: simulator, wrappers and random generators.

    Known are Gymnasium's MuJoCo and classic-control tasks and this library's tasks of a point agent, alone or in a
    batch in this process; after :meth:`load_state_dict` a step gives what it would have given, to the last bit. Of a
    batched task with another geometry, such as a passage that is closed, the random generator alone is loaded.
    Gymnasium's wrappers around them may keep numbers, flags, texts, arrays, running statistics, and lists of these;
    what a function closes over is not looked into. Of other environments of Gymnasium the random generators are kept,
    and of environments elsewhere nothing.

    Args:
        env: made like the one whose state is loaded.
    """

    def __init__(self, env: EnvBase) -> None:
        while isinstance(env, TransformedEnv):
            env = env.base_env
        self.env = env

    @property
    def complete(self) -> bool:
        """Whether an episode can go on."""
        return bool(parts := self._parts()) and all(
            isinstance(part, BatchedPointEnv)
            or (
                type(part.unwrapped).__module__.startswith(_KNOWN)
                and all(_is_kept(layer) for layer in _layers(part) if isinstance(layer, gymnasium.Wrapper))
            )
            for part in parts
        )

    def continues(self, state_dict: dict[str, Any]) -> bool:
        """Whether the episodes of a state can go on here: all of it is known, and the tasks are the same."""
        return bool(state_dict["complete"]) and all(map(_is_same_task, self._parts(), state_dict["parts"]))

    def state_dict(self) -> dict[str, Any]:
        """What is kept of every environment, in order."""
        return {"complete": self.complete, "parts": [_state(part, whole=self.complete) for part in self._parts()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put every environment where it was.

        Raises:
            ValueError: where there are other environments.
        """
        parts, states = self._parts(), state_dict["parts"]
        if len(parts) != len(states):
            raise ValueError(f"it has {len(states)} environments, here are {len(parts)}")
        for part, state in zip(parts, states, strict=True):
            _load_state(part, state)

    def _parts(self) -> list[gymnasium.Env | BatchedPointEnv]:
        if isinstance(self.env, GymWrapper) and isinstance(self.env._env, SyncVectorEnv):
            return list(self.env._env.envs)
        envs = [self.env]
        if isinstance(self.env, SerialEnv):
            if self.env.is_closed:
                self.env.start()
            envs = list(self.env._envs)
        found: list[gymnasium.Env | BatchedPointEnv] = []
        for env in envs:
            while isinstance(env, TransformedEnv):
                env = env.base_env
            if isinstance(env, GymWrapper):
                found.append(env._env)
            elif isinstance(env, BatchedPointEnv):
                found.append(env)
            else:
                return []
        return found


class EpisodeState:
    """Where a collector stands in its episodes, for checkpoints.

    Where the environment's state is known and its task is the same (:class:`SimulatorState`) the episodes go on, to the
    last bit; else new ones begin, with the random generators of known environments where they were and a new seed for
    others. They begin in :meth:`after_load`: what the first observation passes through (running statistics) is loaded
    then.
    :class:`~torchrl_pmoe.runs.VerifiedCheckpoint` calls it; behind another checkpoint, do it yourself.

    Args:
        collector: in this process.
        seed: of the run.

    Attributes:
        fresh: whether new episodes have begun when a state was loaded.
    """

    def __init__(self, collector: Collector, seed: int) -> None:
        self.collector = collector
        self.seed = seed
        self.fresh = False

    def state_dict(self) -> dict[str, Any]:
        """Simulators, and what the policy reads next."""
        return {
            "simulators": SimulatorState(self.collector.env).state_dict(),
            "carried": self.collector._carrier.flatten_keys("/").to_dict(),
            "frames": self.collector._frames,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, or get ready to begin anew."""
        simulators = SimulatorState(self.collector.env)
        simulators.load_state_dict(state_dict["simulators"])
        self.fresh = not simulators.continues(state_dict["simulators"])
        if self.fresh:
            if not state_dict["simulators"]["parts"]:
                self.collector.env.set_seed((self.seed + state_dict["frames"]) % 2**31)
            return
        carrier = self.collector._carrier
        carried = TensorDict(state_dict["carried"], carrier.batch_size).unflatten_keys("/")
        # the next step writes what is not there yet, the action and the policy's parameters
        known = carried.select(*carrier.keys(True, True), strict=False)
        # entry by entry: those of the environment and those of the policy may lie on two devices
        for key, value in known.items(True, True):
            known.set(key, value.to(carrier.get(key).device))
        self.collector._carrier = carrier.clone().update(known)

    def after_load(self) -> None:
        """Begin new episodes where none can go on."""
        if self.fresh:
            self.collector.reset()


def generator_state(env: gymnasium.Env) -> str:
    """The state of an environment's random generator, ``""`` where it is none of Gymnasium's or was never used."""
    bits = getattr(env.unwrapped._np_random, "bit_generator", None)
    return json.dumps(bits.state) if isinstance(bits, np.random.PCG64) else ""


def load_generator_state(env: gymnasium.Env, state: str) -> None:
    """Set an environment's random generator; ``""`` leaves it alone."""
    if state:
        bits = np.random.PCG64()
        bits.state = json.loads(state)
        env.unwrapped._np_random = RandomNumberGenerator(bits)


def _state(part: gymnasium.Env | BatchedPointEnv, *, whole: bool) -> dict[str, Any]:
    if isinstance(part, BatchedPointEnv):
        # under the name that it had before some tasks had a velocity too: earlier runs go on
        return {
            "position": part.state,
            "steps": part.steps,
            "generator": part._generator.get_state(),
            "task": _geometry(part),
        }
    state: dict[str, Any] = {"generator": generator_state(part)}
    if whole:
        state["layers"] = [_plain(layer) for layer in _layers(part)]
        state["mujoco"] = {name: torch.from_numpy(value.copy()) for name, value in _mujoco(part).items()}
        task: Any = part.unwrapped
        state["time"] = float(task.data.time) if state["mujoco"] else 0.0
    return state


def _load_state(part: gymnasium.Env | BatchedPointEnv, state: dict[str, Any]) -> None:
    if isinstance(part, BatchedPointEnv):
        part._generator.set_state(state["generator"].cpu())
        # an agent may stand where there is an obstacle now
        if _is_same_task(part, state):
            part.state = state["position"].to(part.device)
            part.steps = state["steps"].to(part.device)
        return
    load_generator_state(part, state["generator"])
    for layer, values in zip(_layers(part), state.get("layers", []), strict="layers" in state):
        for name, value in values.items():
            # what the state of these tasks was called before some of them had a velocity too
            name = "_state" if isinstance(layer, PointEnv) and name == "_position" else name
            setattr(layer, name, _unpack(value, getattr(layer, name, None)))
    fields = _mujoco(part) if state.get("mujoco") else {}
    for name, value in fields.items():
        value[...] = state["mujoco"][name].numpy()
    if fields:
        task: Any = part.unwrapped
        task.data.time = state["time"]


def _geometry(part: BatchedPointEnv) -> dict[str, torch.Tensor]:
    """Where everything lies that a task is made of."""
    return {name: value.cpu() for name in part.task.arrays if (value := getattr(part.task, name)) is not None}


def _is_same_task(part: gymnasium.Env | BatchedPointEnv, state: dict[str, Any]) -> bool:
    """Whether a state is of a task with the same geometry. Earlier versions have not kept that: no."""
    if not isinstance(part, BatchedPointEnv):
        return True
    now, then = _geometry(part), state.get("task", {})
    return now.keys() == then.keys() and all(torch.equal(now[name], then[name].cpu()) for name in now)


def _layers(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """The environment and what is wrapped in it, outermost first."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _plain(layer: gymnasium.Env) -> dict[str, Any]:
    """The attributes of one layer that can be kept."""
    packed = {name: _pack(value) for name, value in vars(layer).items() if name not in _NO_STATE}
    return {name: value for name, value in packed.items() if value is not _OTHER}


def _is_kept(wrapper: gymnasium.Wrapper) -> bool:
    """Whether all that a wrapper may change in a step is kept, as far as its attributes tell."""
    stateless: tuple[type, ...] = (gymnasium.Space, type, np.dtype)
    if type(wrapper).__module__.startswith("gymnasium."):
        # its functions are the constructor's arguments
        stateless = (*stateless, Callable)  # type: ignore[arg-type]
    return all(
        name in _NO_STATE or isinstance(value, stateless) or _pack(value) is not _OTHER
        for name, value in vars(wrapper).items()
    )


def _pack(value: Any) -> Any:
    """A value of tensors, numbers and texts alone; ``_OTHER`` for one that cannot be told so."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, RunningMeanStd):
        return {"moments": [_pack(part) for part in (value.mean, value.var, value.count)]}
    if type(value) in (deque, list, tuple):
        items = [_OTHER if isinstance(item, RunningMeanStd) else _pack(item) for item in value]
        return _OTHER if any(item is _OTHER for item in items) else {type(value).__name__: items}
    return _OTHER


def _unpack(value: Any, there: Any) -> Any:
    """What was packed; lists and statistics are filled where they are, since others may hold them too."""
    if isinstance(value, torch.Tensor):
        return value.numpy()[()].copy()
    if not isinstance(value, dict):
        return value
    ((kind, packed),) = value.items()
    items = [_unpack(item, None) for item in packed]
    if kind == "moments":
        there.mean, there.var, there.count = items
        return there
    if kind == "tuple":
        return tuple(items)
    found: Any = there if isinstance(there, deque | list) else {"deque": deque, "list": list}[kind]()
    found.clear()
    found.extend(items)
    return found


def _mujoco(env: gymnasium.Env) -> dict[str, np.ndarray]:
    """Views of all of MuJoCo's data but the contacts and constraints, which every step makes anew.

    Positions and velocities alone do not do: tasks read what the last substep has left (centres of mass, contact
    forces), and that belongs to the state before it.
    """
    task: Any = env.unwrapped
    data = getattr(task, "data", None)
    if data is None or not find_spec("mujoco"):
        return {}
    import mujoco

    if not isinstance(data, mujoco.MjData):
        return {}
    fresh = mujoco.MjData(task.model)
    views: dict[str, np.ndarray] = {}
    for name in dir(data):
        if name.startswith(("_", "efc_", "iefc_")):
            continue
        value = getattr(data, name)
        if isinstance(value, np.ndarray) and value.size and value.shape == getattr(fresh, name).shape:
            views[name] = value
    return views
