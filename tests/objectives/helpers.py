"""Small actors, critics and batches for the tests of the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch import distributions as D
from torchrl.data import Bounded, Unbounded
from torchrl.modules import MLP, ValueOperator

from torchrl_pmoe import NormalMixture, PMOEActor, TanhNormalMixture

OBSERVATION, ACTION = 5, 3


class Features(nn.Module):
    """A linear network whose three outputs can be looked at separately."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(OBSERVATION, num_experts)
        self.experts = nn.Linear(OBSERVATION, 2 * num_experts * ACTION)

    def forward(self, observation: Tensor) -> Tensor:
        return torch.cat((self.router(observation), self.experts(observation)), -1)


class Mean(nn.Module):
    """One row of features for the whole batch."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(0)


def make_actor(num_experts: int = 4, dtype: torch.dtype = torch.float64, **distribution_kwargs: Any) -> PMOEActor:
    return PMOEActor(
        num_experts,
        spec=Bounded(-1, 1, (ACTION,), dtype=dtype),
        network=Features(num_experts).to(dtype),
        distribution_kwargs=distribution_kwargs,
    )


def router_of(actor: PMOEActor) -> nn.Linear:
    return actor[0].module[0].router


def make_critic(outputs: int = 1, dtype: torch.dtype = torch.float64) -> ValueOperator:
    mlp = MLP(in_features=OBSERVATION + ACTION, out_features=outputs, num_cells=[16], activation_class=nn.Tanh)
    return ValueOperator(mlp.to(dtype), in_keys=["observation", "action"])


class Blind(nn.Module):
    """A critic that looks at the state alone."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.value = nn.Linear(OBSERVATION, outputs).double()

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.value(observation) + 0.0 * action.sum(-1, keepdim=True)


def make_blind_critic(outputs: int = 1) -> TensorDictModule:
    return ValueOperator(Blind(outputs), in_keys=["observation", "action"])


def make_batch(size: int = 8, dtype: torch.dtype = torch.float64) -> TensorDict:
    def flag() -> Tensor:
        return torch.zeros(size, 1, dtype=torch.bool)

    return TensorDict(
        {
            "observation": torch.randn(size, OBSERVATION, dtype=dtype),
            "action": torch.rand(size, ACTION, dtype=dtype) * 1.8 - 0.9,
            "next": {
                "observation": torch.randn(size, OBSERVATION, dtype=dtype),
                "reward": torch.randn(size, 1, dtype=dtype),
                "done": flag(),
                "terminated": flag(),
            },
        },
        batch_size=size,
    )


def total(losses: TensorDict) -> Tensor:
    return sum(value.sum() for key, value in losses.items() if key.startswith("loss_"))


# ---------------------------------------------------------------------- on-policy


class Table(nn.Module):
    """Features that are parameters themselves, one row ``[logits, loc, scale]`` for each state of the batch."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = nn.Parameter(features)

    def forward(self, observation: Tensor) -> Tensor:
        return self.features


def make_table(size: int, num_experts: int, dtype: torch.dtype = torch.float64) -> Table:
    """Rows of ordinary size; with the identity for a scale mapping the last third are the scales."""
    logits = torch.randn(size, num_experts, dtype=dtype)
    loc = 0.5 * torch.randn(size, num_experts * ACTION, dtype=dtype)
    scale = 0.3 + torch.rand(size, num_experts * ACTION, dtype=dtype)
    return Table(torch.cat((logits, loc, scale), -1))


def make_policy(
    num_experts: int = 4,
    dtype: torch.dtype = torch.float64,
    *,
    bounded: bool = True,
    network: nn.Module | None = None,
    **distribution_kwargs: Any,
) -> PMOEActor:
    """An actor for on-policy losses; a ``Table`` in place of the network states the parameters of each mixture."""
    identity = {"scale_mapping": nn.Identity()} if isinstance(network, Table) else {}
    return PMOEActor(
        num_experts,
        spec=Bounded(-1, 1, (ACTION,), dtype=dtype) if bounded else Unbounded((ACTION,), dtype=dtype),
        network=Features(num_experts).to(dtype) if network is None else network,
        distribution_class=TanhNormalMixture if bounded else NormalMixture,
        distribution_kwargs=distribution_kwargs,
        return_log_prob=True,
        **identity,
    )


def make_value(dtype: torch.dtype = torch.float64) -> ValueOperator:
    return ValueOperator(nn.Linear(OBSERVATION, 1).to(dtype), in_keys=["observation"])


def make_onpolicy_batch(actor: PMOEActor, size: int = 8, dtype: torch.dtype = torch.float64) -> TensorDict:
    """Transitions with advantages of both signs, a value target and log-densities of another policy.

    The ratios are evenly spread over 0.55 to 1.5, on both sides of every clip at 0.2 and on none.
    """
    batch = make_batch(size, dtype)
    with torch.no_grad():
        dist = actor.get_dist(batch.copy())
        ratio = torch.linspace(0.55, 1.5, size, dtype=dtype)
        # the parameters as well: KLPENPPOLoss compares with the policy they describe
        batch.update({"logits": 0.5 * dist.logits, "loc": dist.loc + 0.1, "scale": dist.scale * 1.1})
        batch["action_log_prob"] = dist.log_prob(batch["action"]) - ratio.log()
    sign = torch.tensor([1.0, -1.0], dtype=dtype).repeat(size)[:size]
    batch["advantage"] = (sign * (0.5 + torch.rand(size, dtype=dtype))).unsqueeze(-1)
    batch["value_target"] = torch.randn(size, 1, dtype=dtype)
    return batch


def pre_tanh_reference(logits: Tensor, loc: Tensor, scale: Tensor) -> D.Distribution:
    """The mixture before any squashing, by ``torch.distributions``."""
    return D.MixtureSameFamily(D.Categorical(logits=logits), D.Independent(D.Normal(loc, scale), 1))


def central_differences(function: Callable[[], Tensor], parameter: Tensor, step: float = 1e-6) -> Tensor:
    """Derivative of ``function() [B]`` by ``parameter [B, F]``, whose rows do not see each other, ``[B, F]``."""
    columns = []
    with torch.no_grad():
        for column in parameter.unbind(-1):
            kept = column.clone()
            column.copy_(kept + step)
            above = function()
            column.copy_(kept - step)
            columns.append((above - function()) / (2.0 * step))
            column.copy_(kept)
    return torch.stack(columns, -1)


def assert_compiled_equals_eager(loss: nn.Module, batch: TensorDict, parameters: list[nn.Parameter]) -> None:
    """Outputs and gradients, on the same random numbers."""

    def run(function: Any) -> tuple[TensorDict, tuple[Tensor, ...]]:
        torch.manual_seed(1)
        out = function(batch.copy())
        return out, torch.autograd.grad(total(out), parameters)

    # a backend that keeps PyTorch's own random numbers
    compiled, compiled_gradients = run(torch.compile(loss, backend="aot_eager"))
    eager, gradients = run(loss)
    assert set(compiled.keys()) == set(eager.keys())
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value)
    for ours, theirs in zip(compiled_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def moved_by(losses, owners):
    """Names of the ``owners``, lists of parameters, that each loss has a gradient for; nothing else may have one."""
    moved = {}
    for key, value in losses.items():
        if not key.startswith("loss_"):
            assert not value.requires_grad, key
            continue
        gradients = {
            name: torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            for name, parameters in owners.items()
        }
        moved[key] = {name for name, found in gradients.items() if any(g is not None and g.any() for g in found)}
    return moved
