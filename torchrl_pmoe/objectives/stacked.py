"""Independent agents in one call: their losses, vectorised over stacked parameters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchrl.objectives import LossModule, SACLoss

from torchrl_pmoe.distributions import NormalMixture
from torchrl_pmoe.objectives.units import mixture_of

__all__ = ["StackedLoss", "StackedPolicy"]


class _OutOfPlaceNormals(TorchFunctionMode):
    """``torch.distributions`` draws in place, which ``vmap`` refuses; out of place the numbers are the same.

    A mode of this thread's torch functions, between entering and leaving it: nothing of torch itself is changed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.normal_ and len(args) == 1 and not kwargs:
            return torch.randn_like(args[0])
        return func(*args, **(kwargs or {}))


def _drawing(actor: nn.Module) -> AbstractContextManager:
    """What the draws of an actor need under ``vmap``; ours are out of place, and a mode costs time in every call."""
    kind, _ = mixture_of(actor)
    ours = isinstance(kind, type) and issubclass(kind, NormalMixture)
    return nullcontext() if ours else _OutOfPlaceNormals()


class StackedLoss(LossModule):
    """``S`` SAC-like losses of one architecture as one: parameters stacked, the call vectorised by ``torch.vmap``.

    Every agent has its own weights, targets, temperature, batch and noise. Minimise the sum over agents: their
    parameters share no gradient, and optimisers that work on single numbers (Adam, the soft update of targets) treat
    each agent as if it were alone. Works with :class:`~torchrl.objectives.SACLoss` and what inherits from it.

    Args:
        losses: one an agent, made alike. They keep their weights of now until :meth:`write_back`.

    Raises:
        ValueError: without any loss, or for losses of different shapes.
    """

    # as LossModule wants them declared
    actor_network_params: TensorDictParams
    qvalue_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(self, losses: Sequence[SACLoss]) -> None:
        if not losses:
            raise ValueError(f"{type(self).__name__}: at least one loss is needed.")
        super().__init__()
        # what is made in the first call must be there before it is stacked
        for loss in losses:
            _ = loss.target_entropy
            # their targets move here
            loss._has_update_associated = dict.fromkeys(loss._has_update_associated, True)
        # no children: what is trained are the stacked parameters
        self.__dict__["losses"] = list(losses)
        self._make_vmap = False
        states = [_state(loss) for loss in losses]
        shapes = [{key: value.shape for key, value in state.items(True, True)} for state in states]
        if any(other != shapes[0] for other in shapes):
            raise ValueError(f"{type(self).__name__}: losses must have parameters of the same shapes.")
        self._own: list[str] = []
        for name, first in states[0].items():
            entries = [state.get(name).detach() for state in states]
            if isinstance(first, Tensor):
                self._register(name, torch.stack(entries), trained=first.requires_grad)
            elif any(leaf.requires_grad for leaf in first.values(True, True)):
                setattr(self, name, TensorDictParams(TensorDict.stack(entries).clone()))
            else:
                setattr(self, name, TensorDictParams(TensorDict.stack(entries).clone(), no_convert=True))
            if name.startswith("target_"):
                # TorchRL asks it whether a SoftUpdate has been made
                self._has_update_associated[name.removeprefix("target_").removesuffix("_params")] = False
            self._own.append(name)

    def _register(self, name: str, value: Tensor, *, trained: bool) -> None:
        if trained:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def num_agents(self) -> int:
        """``S``."""
        return len(self.losses)

    def stacked(self) -> TensorDict:
        """All that is stacked, every entry with ``S`` first."""
        return TensorDict({name: getattr(self, name) for name in self._own}, batch_size=[self.num_agents])

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Outputs of the losses, each with ``S`` first, for batches ``[S, B]``."""
        template = self.losses[0]

        def single(params: TensorDictBase, batch: TensorDictBase) -> TensorDictBase:
            # TorchRL caches detached parameters, which belong to the call that made them
            template.__dict__["_cache"] = {}
            with params.to_module(template):
                return template(batch)

        with _drawing(template.actor_network):
            found = torch.vmap(single, (0, 0), randomness="different")(self.stacked(), tensordict)
        template.__dict__["_cache"] = {}
        return found

    @torch.no_grad()
    def write_back(self) -> None:
        """Put every agent's parameters of now into its loss, and so into the actor and critics that it was made of."""
        for index, loss in enumerate(self.losses):
            _state(loss).data.update_(self.stacked()[index].data)
            loss.__dict__["_cache"] = {}


def _state(loss: SACLoss) -> TensorDict:
    """Parameters, targets, temperature; the value estimator's constants are the same for all."""
    return TensorDict.from_module(loss).exclude("_value_estimator")


class StackedPolicy(TensorDictModuleBase):
    """The actors of a :class:`StackedLoss` on the rows of one batch of environments, agent by agent.

    Args:
        loss: its parameters are read at every call. The rows ``[S * N]`` are ``N`` of the first agent, ``N`` of the
            second, and so on.
    """

    def __init__(self, loss: StackedLoss) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.__dict__["loss"] = loss

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action``."""
        actor: Any = self.loss.losses[0].actor_network

        def single(params: TensorDictBase, states: TensorDictBase) -> Tensor:
            with params.to_module(actor):
                return actor(states).get("action")

        params = self.loss.actor_network_params.data
        states = tensordict.select("observation").reshape(self.loss.num_agents, -1)
        with _drawing(actor):
            action = torch.vmap(single, (0, 0), randomness="different")(params, states)
        return tensordict.set("action", action.flatten(0, 1))
