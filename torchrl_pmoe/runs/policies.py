"""A trained policy, kept in every checkpoint of a run and loaded again without the script that trained it."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.checkpoint import CheckpointError
from torchrl.data import Bounded
from torchrl.objectives import SACLoss

from torchrl_pmoe.baselines import OptionActor
from torchrl_pmoe.envs.action_units import RawActionPolicy
from torchrl_pmoe.envs.making import make_gym_env
from torchrl_pmoe.envs.normalization import NormalizedPolicy, NormalizeObservationAndReward, normalize_observation
from torchrl_pmoe.modules.actors import BestOfExpertsActor, ExpertsActor, PMOEActor
from torchrl_pmoe.objectives import score_proposals
from torchrl_pmoe.runs.acting import KINDS, CarriedOptionPolicy, Kind, WatchedPolicy, acting
from torchrl_pmoe.runs.checkpoints import POLICIES, StateReader, VerifiedCheckpoint
from torchrl_pmoe.runs.directory import RunDirectory
from torchrl_pmoe.runs.export import check_export_path, export_policy
from torchrl_pmoe.runs.hub import HUB, download_checkpoint

__all__ = ["LoadedPolicy", "PolicyParts", "SavedPolicies", "construct", "load_policy"]

# where the classes of networks and distributions are: a blueprint may name those, and nothing that reads files, loads
# what is not installed or starts an environment
_TRUSTED = (
    "torch.nn.modules.",
    "tensordict.nn.",
    "torchrl.modules.distributions.",
    "torchrl.modules.models.",
    "torchrl.modules.tensordict_module.",
    "torchrl_pmoe.baselines.",
    "torchrl_pmoe.distributions.",
    "torchrl_pmoe.modules.",
)


# ----------------------------------------------------------------------------------------------- blueprints


def construct(cls: Callable[..., nn.Module], /, *args: Any, **kwargs: Any) -> Any:
    """``cls(*args, **kwargs)``, with a note of how it was made, so that :func:`load_policy` can make it again.

    Args:
        cls: a module of PyTorch, TensorDict, TorchRL or this package.
        *args: numbers, texts, bounded specs, classes of modules and distributions of those packages, sequences and
            mappings of these, and modules that were made by this function.
        **kwargs: likewise.

    Returns:
        The module; its ``blueprint`` is the note, a JSON text.

    Raises:
        TypeError: for another class, or an argument of another type.

    Examples:
        >>> layer = construct(torch.nn.Linear, 3, 2)
        >>> layer.blueprint
        '{"new": "torch.nn.modules.linear.Linear", "args": [3, 2], "kwargs": {}}'
    """
    # before the call: a constructor may change what it is given
    note = {
        "new": _name(cls),
        "args": [_encode(value) for value in args],
        "kwargs": {key: _encode(value) for key, value in kwargs.items() if key != "device"},
    }
    made: Any = cls(*args, **kwargs)
    made.blueprint = json.dumps(note)
    return made


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"mapping": {str(key): _encode(item) for key, item in value.items()}}
    if isinstance(value, type):
        return {"class": _name(value)}
    if isinstance(blueprint := getattr(value, "blueprint", None), str):
        return json.loads(blueprint)
    if isinstance(value, Bounded):
        return {"bounds": [value.space.low.tolist(), value.space.high.tolist()]}
    raise TypeError(f"construct: {type(value).__name__} cannot be noted down.")


def _name(cls: Any) -> str:
    name = f"{cls.__module__}.{cls.__qualname__}"
    if not name.startswith(_TRUSTED):
        raise TypeError(f"construct: {name} is no class of PyTorch, TensorDict, TorchRL or torchrl_pmoe.")
    return name


def _decode(note: Any, device: torch.device | str) -> Any:
    if isinstance(note, list):
        return [_decode(item, device) for item in note]
    if not isinstance(note, dict):
        return note
    if "mapping" in note:
        return {key: _decode(item, device) for key, item in note["mapping"].items()}
    if "class" in note:
        return _find(note["class"])
    if "bounds" in note:
        low, high = (torch.tensor(bound) for bound in note["bounds"])
        return Bounded(low, high, low.shape, dtype=low.dtype)
    made = _find(note["new"], nn.Module)(
        *_decode(note["args"], device), **{key: _decode(item, device) for key, item in note["kwargs"].items()}
    )
    return made.to(device)


def _find(name: str, kind: type = object) -> type:
    """The class of a name, where a policy may be made of it."""
    module, _, attribute = name.rpartition(".")
    found = None
    if name.startswith(_TRUSTED):
        with suppress(ImportError):
            found = getattr(importlib.import_module(module), attribute, None)
    # those modules have classes of others among their names
    if not isinstance(found, type) or found.__module__ != module or not issubclass(found, kind):
        raise CheckpointError(f"{name} is no class that a policy is made of")
    return found


# ------------------------------------------------------------------------------------------------- saving


@dataclass(frozen=True)
class PolicyParts:
    """What it takes to act as an agent does.

    Args:
        actor: made by :func:`construct`, or one that must be given to :func:`load_policy`.
        seed: of the agent.
        env: Gymnasium id.
        env_kwargs: arguments of the environment.
        kind: how the agent acts in its run's evaluations.
        low: lower bounds of the environment's action, ``[A]``.
        high: upper bounds, ``[A]``.
        max_steps: where evaluations cut an episode.
        normalization: of the observations.
        commit_steps: for how many steps an expert acts, of ``kind="committed"``; ``None`` for the whole episode.
        critic: one critic, made by :func:`construct`, for an agent that acts by the proposal its critics rank highest.
        critic_params: stacked parameters of all critics, ``[num_critics]``.
    """

    actor: TensorDictModuleBase
    seed: int
    env: str
    env_kwargs: Mapping[str, Any]
    kind: Kind
    low: Tensor
    high: Tensor
    max_steps: int = 10_000
    normalization: NormalizeObservationAndReward | None = None
    commit_steps: int | None = None
    critic: TensorDictModuleBase | None = None
    critic_params: TensorDictBase | None = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and texts."""
        state: dict[str, Any] = {
            "blueprint": getattr(self.actor, "blueprint", None),
            "actor": self.actor.state_dict(),
            "seed": self.seed,
            "env": self.env,
            "env_kwargs": json.dumps(dict(self.env_kwargs)),
            "kind": self.kind,
            "max_steps": self.max_steps,
            "commit_steps": self.commit_steps,
            "low": self.low,
            "high": self.high,
        }
        if (norm := self.normalization) is not None and norm.normalizes_observation:
            state["normalization"] = {
                "mean": norm.observations.mean.clone(), "var": norm.observations.var.clone(), "clip": norm.clip,
            }  # fmt: skip
        if self.critic is not None:
            assert self.critic_params is not None
            params = self.critic_params.data.flatten_keys(".")
            state["critic"] = getattr(self.critic, "blueprint", None)
            state["critic_params"] = {key: value for key, value in params.items() if isinstance(value, Tensor)}
        return state


class SavedPolicies:
    """The component of a checkpoint that :func:`load_policy` reads.

    Args:
        agents: of the run.
        before: called before the agents are read.
    """

    def __init__(self, agents: Sequence[PolicyParts], before: Callable[[], None] = lambda: None) -> None:
        self.agents = agents
        self.before = before

    def state_dict(self) -> dict[str, Any]:
        """Of every agent."""
        self.before()
        return {"agents": [agent.state_dict() for agent in self.agents]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: a run that goes on has its weights from its loss."""
        del state_dict

    def register(self, checkpoint: VerifiedCheckpoint) -> None:
        """Keep the policies in every checkpoint."""
        checkpoint.register(POLICIES, self)


# ------------------------------------------------------------------------------------------------- loading


class LoadedPolicy(TensorDictModuleBase):
    """A trained policy for the environment as it was made: raw observations in, raw actions out.

    Reads ``observation`` ``[*B, O]``, writes ``action`` ``[*B, A]`` within the environment's bounds.

    Attributes:
        actor: the network that was trained; it reads normalised observations and acts in ``[-1, 1]``.
        env: Gymnasium id.
        env_kwargs: arguments of the environment.
        seed: of the agent.
        kind: how it acts.
        checkpoint: it was read from.
        max_steps: where the run's evaluations cut an episode.
        in_unit_box: the same policy with actions in ``[-1, 1]``.
        watched: the part of it that remembers who acted.
    """

    def __init__(
        self,
        actor: TensorDictModuleBase,
        in_unit_box: TensorDictModuleBase,
        watched: WatchedPolicy,
        state: Mapping[str, Any],
        checkpoint: Path,
        kind: str,
        not_exported: str | None = None,
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.actor, self.in_unit_box, self.watched = actor, in_unit_box, watched
        self.env, self.env_kwargs = state["env"], json.loads(state["env_kwargs"])
        self.seed, self.kind, self.checkpoint = state["seed"], kind, checkpoint
        self.max_steps = state["max_steps"]
        self._not_exported = not_exported
        device, self._dtype = (parameter := next(actor.parameters())).device, parameter.dtype
        self._raw = RawActionPolicy(in_unit_box, state["low"].to(device), state["high"].to(device))

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act."""
        observation = tensordict.get("observation")
        # an environment may show float64
        acted = self._raw(tensordict.set("observation", observation.to(self._dtype)))
        self.watched.clear()
        return acted.set("observation", observation)

    def export(self, path: str | Path) -> None:
        """Write the policy, acting as it does, as a program that needs neither this package nor TorchRL.

        Its input ``observation`` ``[B, O]`` is the environment's, in the type that the environment has; its output
        ``action`` ``[B, A]`` is within the environment's bounds. It draws nothing by itself: a policy that draws has
        further inputs, ``uniform`` numbers in ``[0, 1)`` for the expert, ``[B, 1]``, and standard ``normal`` ones for
        the action, ``[B, K, A]``, or ``[B, A]`` without experts.

        Args:
            path: ends in ``.pt2``, for ``torch.export.load(path).module()``, or in ``.onnx``.

        Raises:
            ValueError: for another ending, and for a policy that carries something from step to step, or whose critics
                choose its actions.
            ImportError: where the packages that ONNX needs are not installed.
            EnvironmentFault: where the environment, which is asked for its observations, cannot be made.
            OSError: where the file cannot be written.

        Examples:
            >>> load_policy("outputs/sac_pmoe/Walker2d-v4-pmoe-seed0/...", act="drawn").export("walker.onnx")
        """
        path = Path(path)
        check_export_path(path)
        if self._not_exported is not None:
            instead = "; one expert can be: act=0" if isinstance(self.actor, PMOEActor) else ""
            raise ValueError(f"act={self.kind}: cannot be exported, because {self._not_exported}{instead}")
        env = make_gym_env(self.env, self.env_kwargs)
        space: Any = env.observation_space
        env.close()
        # two rows: the tracer takes a batch of one for a constant
        observation = torch.as_tensor(np.zeros((2, *space.shape), space.dtype), device=next(self.parameters()).device)
        export_policy(self, path, observation)


def load_policy(
    run: str | Path,
    *,
    act: Kind | int | None = None,
    commit_steps: int | Literal["episode"] | None = None,
    agent: int | None = None,
    device: torch.device | str = "cpu",
    actor: TensorDictModuleBase | None = None,
) -> LoadedPolicy:
    """The policy of a run, from its last checkpoint.

    Every byte is checked before it is read; no code of the files runs, and nothing of this process is changed.

    Args:
        run: directory of a run, one of its checkpoints, or ``"hf://owner/name"`` of a repository on the Hugging Face
            Hub that :func:`push_to_hub` has filled; ``"hf://owner/name@revision"`` for another revision than ``main``.

    Keyword Args:
        act: ``"deterministic"``, ``"drawn"``, ``"stochastic"``, ``"committed"``, or the number of the expert that acts
            alone, by its mean; as in the evaluations of the run if not given.
        commit_steps: for how many steps a ``"committed"`` expert acts; as in the run if not given, which is
            ``"episode"`` where the run had no such experts. An environment that resets by itself between two calls
            needs TorchRL's ``InitTracker``, so that an expert does not act on in the next episode.
        agent: seed of one agent, of a run that has several.
        device: of the policy.
        actor: takes the weights, where the run's own actor was not made by :func:`construct`.

    Raises:
        CheckpointError: in one line, where there is no whole checkpoint with a policy.
        ImportError: where the Hub is asked and ``huggingface_hub`` is not installed.
        ValueError: for an agent, a kind or an expert that the run does not have, and for ``commit_steps`` where no
            expert is committed.

    Examples:
        >>> policy = load_policy("outputs/sac_pmoe/Walker2d-v4-pmoe-seed0/...")
        >>> GymEnv("Walker2d-v4").rollout(1000, policy)["next", "reward"].sum()
    """
    states, checkpoint = _read_policies(run)
    if agent is None and len(states) == 1:
        agent = next(iter(states))
    if agent not in states:
        given = "agent: must be given," if agent is None else f"agent={agent}: must be"
        raise ValueError(f"{given} one of the seeds {', '.join(map(str, states))}")
    state = states[agent]
    made = _make(state["blueprint"], device, actor)
    try:
        made.load_state_dict(state["actor"])
    except RuntimeError as error:
        raise ValueError(
            f"actor: must have the parameters of the run's own ({' '.join(str(error).split())})"
        ) from error
    kind = state["kind"] if act is None else act
    if commit_steps is not None and kind != "committed":
        raise ValueError(
            f"commit_steps={commit_steps!r}: must be left out with act={kind}, where no expert keeps acting"
        )
    policy: TensorDictModuleBase = made
    if isinstance(kind, int) and not isinstance(kind, bool):
        if not isinstance(made, ExpertsActor) or not 0 <= kind < made.num_experts:
            experts = f" or an expert below {made.num_experts}" if isinstance(made, ExpertsActor) else ""
            kinds = [one for one in KINDS if one != "committed" or isinstance(made, PMOEActor)]
            raise ValueError(f"act={kind}: must be one of {', '.join(kinds)}{experts}")
        policy, kind = made.expert(kind), "deterministic"
    elif kind not in KINDS:
        raise ValueError(f"act={kind!r}: must be one of {', '.join(KINDS)} or the number of an expert")
    elif kind != "committed" and state.get("critic") is not None:
        policy = BestOfExpertsActor(made, _critics(state, made, device))
    if commit_steps is None:
        commit_steps = state.get("commit_steps")
    watched = WatchedPolicy(acting(policy, kind, commit_steps=None if commit_steps == "episode" else commit_steps))
    in_unit_box: TensorDictModuleBase = CarriedOptionPolicy(watched) if isinstance(made, OptionActor) else watched
    if (norm := state.get("normalization")) is not None:
        mean, var = norm["mean"].to(device), norm["var"].to(device)
        in_unit_box = NormalizedPolicy(in_unit_box, lambda raw: normalize_observation(raw, mean, var, norm["clip"]))
    not_exported = None
    if isinstance(made, OptionActor) or kind == "committed":
        not_exported = "it carries who acts from step to step"
    elif isinstance(policy, BestOfExpertsActor):
        not_exported = "critics choose its actions"
    acts = str(act if act is not None else kind)
    return LoadedPolicy(made, in_unit_box, watched, state, checkpoint, acts, not_exported)


def _read_policies(run: str | Path) -> tuple[dict[int, Mapping[str, Any]], Path]:
    """The states of all agents by their seeds, and the checkpoint that holds them."""
    on_hub = str(run).startswith(HUB)
    path = Path(run)
    checkpoint: Path | None = path
    if on_hub:
        checkpoint = download_checkpoint(str(run))
    elif path.absolute().parent.name != RunDirectory.CHECKPOINTS:
        checkpoint = next(iter(RunDirectory(path).checkpoints()), None)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint")
    found = StateReader()
    with TemporaryDirectory() as folder:
        # the Hub's cache has links in the place of files, and a checkpoint holds none
        source = shutil.copytree(checkpoint, Path(folder) / checkpoint.name) if on_hub else checkpoint
        VerifiedCheckpoint(**{POLICIES: found}).load(source, components=[POLICIES], map_location="cpu")
    return {state["seed"]: state for state in found.state["agents"]}, checkpoint


def _make(blueprint: str | None, device: torch.device | str, actor: TensorDictModuleBase | None) -> Any:
    if actor is not None:
        return actor.to(device)
    if blueprint is None:
        raise ValueError("actor: must be given, the run's own was not made by torchrl_pmoe.runs.construct")
    # weights are drawn for a moment, and the process's generators are left as they were
    place = torch.device(device)
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        return _decode(json.loads(blueprint), device)


def _critics(
    state: Mapping[str, Any], actor: TensorDictModuleBase, device: torch.device | str
) -> Callable[[TensorDictBase, Tensor], Tensor]:
    """The critics' value of proposals ``[*B, K, A]``, ``[*B, K]``: the one that the agent was trained with."""
    critic = _make(state["critic"], device, None)
    params = TensorDict(state["critic_params"]).to(device)
    number = len(next(iter(params.values())))
    place = torch.device(device)
    # the loss draws weights for its critics, which are thrown away
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        loss = SACLoss(actor, critic, num_qvalue_nets=number)
    loss.qvalue_network_params.data.update_(params.unflatten_keys("."))
    return partial(score_proposals, loss)
