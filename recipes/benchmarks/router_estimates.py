"""Every estimator of the router's gradient, and mixtures whose true one is known by quadrature."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from known_optimum import BANDITS, SAC_OPTIONS, evaluate, router_gradient
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import SACLoss

from torchrl_pmoe import PMOESACLoss, TanhNormalMixture

BANDIT = BANDITS["unequal"]
CHUNK = 10_000  # samples in one backward pass
LEAST_GRADIENT = 0.01
KEYS = ["logits", "loc", "scale"]
# eight hues that stay apart under every kind of colour blindness (Okabe and Ito)
BLACK, BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999",
)  # fmt: skip


class KnownValue(nn.Module):
    """The bandit's value in a critic's place."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))  # TorchRL's losses want a parameter somewhere

    def forward(self, action: Tensor) -> Tensor:
        """Value ``[*B, 1]`` of ``action`` ``[*B, A]``."""
        return self.gain * BANDIT.value(action).unsqueeze(-1)


@dataclass(frozen=True)
class Estimator:
    """One way to a gradient of the router.

    Args:
        name: in the tables.
        scoring: ``"critic"``, by ``PMOESACLoss``, or ``"gradient"``, by the distribution inside ``SACLoss``.
        routing: of that loss or that distribution.
        style: colour and marker, shared by variants of one estimator.
        options: of the same.
        gradient: whether it claims to be the gradient of ``J`` and not only a direction.
        variant: drawn with open markers and a dashed line.
    """

    name: str
    scoring: Literal["critic", "gradient"]
    routing: str
    style: tuple[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    gradient: bool = False
    variant: bool = False

    def critic_calls(self, num_experts: int) -> int:
        """Actions that the critics evaluate per state."""
        return num_experts if self.scoring == "critic" else 1

    def loss(self, critic: TensorDictModule, rows: int, **options: Any) -> SACLoss:
        """The loss whose backward pass makes the estimate, for a batch of ``rows`` mixtures."""
        routed_by_distribution: dict[str, Any] = {"routing": "none"}
        if self.scoring == "gradient":
            # the frequencies are divided by all states of the batch, and here each is a sample of its own
            coef = 1.0 if self.routing == "gumbel_softmax" else float(rows)
            routed_by_distribution = {"routing": self.routing, "routing_coef": coef, **self.options}
        actor = ProbabilisticActor(
            TensorDictModule(lambda *params: params, in_keys=KEYS, out_keys=KEYS),
            in_keys=KEYS,
            spec=Bounded(-1.0, 1.0, (BANDIT.action_size,)),
            distribution_class=TanhNormalMixture,
            distribution_kwargs=routed_by_distribution,
        )
        options |= SAC_OPTIONS
        if self.scoring == "gradient":
            return SACLoss(actor, critic, **options)
        return PMOESACLoss(actor, critic, routing=self.routing, **{"backprop": "weighted", **self.options, **options})


ESTIMATORS = (
    Estimator("marginal", "critic", "marginal", (BLACK, "o"), gradient=True),
    Estimator("score function", "critic", "score_function", (BLUE, "s"), gradient=True),
    Estimator("frequency, Brier", "critic", "frequency", (RED, "D")),
    Estimator("frequency, log", "critic", "frequency", (RED, "D"), {"routing_loss": "log"}, variant=True),
    Estimator("soft frequency, Brier", "critic", "soft_frequency", (GREEN, "^")),
    Estimator("soft frequency, log", "critic", "soft_frequency", (GREEN, "^"), {"routing_loss": "log"}, variant=True),
    Estimator("slope frequency", "gradient", "frequency", (PINK, "v")),
    Estimator("slope soft frequency", "gradient", "soft_frequency", (ORANGE, "P")),
    *(
        Estimator(
            f"Gumbel {kind}, τ={temperature}",
            "gradient",
            "gumbel_softmax",
            style,
            {"temperature": temperature, "straight_through": kind == "one-hot"},
            gradient=True,
            variant=temperature < 1,
        )
        for kind, style in (("one-hot", (SKY, "X")), ("blend", (GREY, "*")))
        for temperature in (1.0, 0.3)
    ),
)


@dataclass(frozen=True)
class Instance:
    """A mixture, ``logits`` ``[K]``, ``loc`` and ``scale`` ``[K, A]`` in float64."""

    logits: Tensor
    loc: Tensor
    scale: Tensor

    @classmethod
    def random(cls, num_experts: int, seed: int) -> Instance:
        """Weights from a standard normal's softmax, experts all over the actions, narrow to broad."""
        generator = torch.Generator().manual_seed(1000 * num_experts + seed)
        shape = (num_experts, BANDIT.action_size)
        logits = torch.randn(num_experts, generator=generator, dtype=torch.float64)
        loc = 2.0 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1.0
        scale = 0.1 * 8.0 ** torch.rand(shape, generator=generator, dtype=torch.float64)
        # what the package sees, exactly
        return cls(logits.float().double(), loc.float().double(), scale.float().double())

    def objective(self, logits: Tensor) -> Tensor:
        """``J`` with other ``logits`` ``[R, K]``, by quadrature, ``[R]``."""
        rows = len(logits)
        return evaluate(BANDIT, logits, self.loc.expand(rows, -1, -1), self.scale.expand(rows, -1, -1)).objective

    def true_gradient(self) -> Tensor:
        """``dJ/dlogits`` by quadrature, ``[K]``."""
        report = evaluate(BANDIT, self.logits[None], self.loc[None], self.scale[None])
        return router_gradient(self.logits, report.expert_value[0])

    def batch(self, rows: int) -> TensorDict:
        """Float32 parameters as ``rows`` leaves of their own, with a state."""
        params = {key: getattr(self, key).float().expand(rows, *getattr(self, key).shape).clone() for key in KEYS}
        return TensorDict({**params, "observation": torch.zeros(rows, 1)}, batch_size=[rows])


def mixtures(num_experts: int, count: int) -> list[Instance]:
    """The first ``count`` whose router has something to learn: relative errors mean nothing beside a zero gradient."""
    found = (Instance.random(num_experts, seed) for seed in itertools.count())
    return list(itertools.islice((x for x in found if x.true_gradient().norm() >= LEAST_GRADIENT), count))


def backward(loss_module: SACLoss, batch: TensorDict) -> None:
    """The actor's loss and the routing loss, summed over rows that do not see each other."""
    loss, metadata = loss_module.actor_loss(batch)
    (loss + metadata.get("loss_routing", 0.0)).sum().backward()


def sample(
    estimator: Estimator,
    instance: Instance,
    samples: int,
    tick: Callable[[int], object] = lambda n: None,
    parameters: Sequence[str] = (),
) -> Tensor:
    """Independent estimates of ``dJ/dlogits`` from one state each, ``[samples, K]``.

    With ``parameters`` (of one shape, ``loc`` and ``scale``) of the gradients on these, ``[samples, P, K, A]``.
    """
    critic = TensorDictModule(KnownValue(), ["action"], ["state_action_value"])
    found = []
    for start in range(0, samples, CHUNK):
        rows = min(CHUNK, samples - start)
        batch = instance.batch(rows)
        leaves = [batch[key].requires_grad_() for key in parameters or ("logits",)]
        backward(estimator.loss(critic, rows, num_qvalue_nets=1), batch)
        gradients = [-leaf.grad for leaf in leaves if leaf.grad is not None]
        assert len(gradients) == len(leaves)
        found.append(torch.stack(gradients, 1) if parameters else gradients[0])
        tick(rows)
    return torch.cat(found)
