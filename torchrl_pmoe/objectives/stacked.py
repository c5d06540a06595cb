"""Several independent agents trained in one call, vectorised over their stacked parameters."""

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
    """Makes draws of ``torch.distributions`` out of place, because ``vmap`` refuses their in-place ones.

    The numbers are the same. It is a mode of this thread's torch functions while it is entered; torch is not changed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.normal_ and len(args) == 1 and not kwargs:
            return torch.randn_like(args[0])
        return func(*args, **(kwargs or {}))


def _draws_under_vmap(actor: nn.Module) -> AbstractContextManager:
    """Context in which an actor can draw under ``vmap``. Our mixtures need none, and a mode costs time."""
    kind, _ = mixture_of(actor)
    ours = isinstance(kind, type) and issubclass(kind, NormalMixture)
    return nullcontext() if ours else _OutOfPlaceNormals()


class StackedLoss(LossModule):
    """``S`` losses of one architecture as one loss: their parameters are stacked, ``torch.vmap`` runs the call.

    Every agent has its own weights, targets, temperature, batch and noise. Minimise the sum over agents: no parameter
    of one agent has a gradient from another, and Adam and the soft update of targets treat every number by itself, so
    each agent learns as if it were alone. Works with :class:`~torchrl.objectives.SACLoss` and its subclasses.

    Args:
        losses: one for each agent, made with the same options. Their own weights change at :meth:`write_back` only.

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
        # made in its first call, and it must exist before the losses are stacked
        for loss in losses:
            _ = loss.target_entropy
            # TorchRL warns about targets without an updater; these targets are updated in the stack
            loss._has_update_associated = dict.fromkeys(loss._has_update_associated, True)
        # kept outside nn.Module's children: the stacked parameters are trained, not those of the losses
        self.__dict__["losses"] = list(losses)
        self._make_vmap = False
        states = [_state(loss) for loss in losses]
        shapes = [{key: value.shape for key, value in state.items(True, True)} for state in states]
        if any(other != shapes[0] for other in shapes):
            raise ValueError(f"{type(self).__name__}: losses must have parameters of the same shapes.")
        self._stacked_names: list[str] = []
        for name, first in states[0].items():
            entries = [state.get(name).detach() for state in states]
            if isinstance(first, Tensor):
                self._register(name, torch.stack(entries), trained=first.requires_grad)
            elif any(leaf.requires_grad for leaf in first.values(True, True)):
                setattr(self, name, TensorDictParams(TensorDict.stack(entries).clone()))
            else:
                setattr(self, name, TensorDictParams(TensorDict.stack(entries).clone(), no_convert=True))
            if name.startswith("target_"):
                # TorchRL asks this table whether a SoftUpdate has been made
                self._has_update_associated[name.removeprefix("target_").removesuffix("_params")] = False
            self._stacked_names.append(name)

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
        """All stacked parameters and buffers, with ``S`` as first dimension."""
        return TensorDict({name: getattr(self, name) for name in self._stacked_names}, batch_size=[self.num_agents])

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Outputs of the losses, with ``S`` as first dimension, for batches ``[S, B]``."""
        template = self.losses[0]

        def single(params: TensorDictBase, batch: TensorDictBase) -> TensorDictBase:
            # TorchRL caches detached parameters; those of another call must not be used
            template.__dict__["_cache"] = {}
            with params.to_module(template):
                return template(batch)

        with _draws_under_vmap(template.actor_network):
            found = torch.vmap(single, (0, 0), randomness="different")(self.stacked(), tensordict)
        template.__dict__["_cache"] = {}
        return found

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy every agent's parameters into its loss, and so into the actor and the critics of that loss."""
        for index, loss in enumerate(self.losses):
            _state(loss).data.update_(self.stacked()[index].data)
            loss.__dict__["_cache"] = {}


def _state(loss: SACLoss) -> TensorDict:
    """Parameters, targets and temperature, without the value estimator, whose constants all agents share."""
    return TensorDict.from_module(loss).exclude("_value_estimator")


class StackedPolicy(TensorDictModuleBase):
    """The actors of a :class:`StackedLoss`, each acting in its own rows of one batch of environments.

    Args:
        loss: its parameters are read at every call. Of the rows ``[S * N]`` the first ``N`` belong to the first agent,
            the next ``N`` to the second, and so on.
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
        states = tensordict.select("observation").reshape(self.loss.num_agents, -1)  # [S N] to [S, N]
        with _draws_under_vmap(actor):
            action = torch.vmap(single, (0, 0), randomness="different")(params, states)
        return tensordict.set("action", action.flatten(0, 1))  # [S, N, A] to [S N, A]
