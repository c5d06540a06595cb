"""Small actors, critics and batches for the tests of the losses."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import MLP, ValueOperator

from torchrl_pmoe import PMOEActor

OBSERVATION, ACTION = 5, 3


class Features(nn.Module):
    """A linear network whose three outputs can be looked at separately."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(OBSERVATION, num_experts)
        self.experts = nn.Linear(OBSERVATION, 2 * num_experts * ACTION)

    def forward(self, observation: Tensor) -> Tensor:
        return torch.cat((self.router(observation), self.experts(observation)), -1)


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
