"""What the properties range over: mixtures in boxes, keys, actors and losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from tensordict import NestedKey, TensorDict
from torch import Tensor, nn
from torchrl.data import Bounded, Composite
from torchrl.modules import MLP, ValueOperator

from torchrl_pmoe import NormalMixture, PMOEActor, PMOEClipPPOLoss, PMOESACLoss, PMOETQCLoss, TanhNormalMixture

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EXACT = (torch.float64,)

seeds = st.integers(0, 2**16)

# any float, and often one at which a check could go wrong
numbers = st.floats() | st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf")])

# for properties whose every example makes a loss
costly = settings(max_examples=2 * settings.default.max_examples // 5)


def reseed(seed: int) -> None:
    # torch.manual_seed queues a seed for CUDA as well, which takes longer than the draws
    torch.default_generator.manual_seed(seed)


def shapes(max_dims: int = 3, smallest: int = 0) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(smallest, 3), max_size=max_dims).map(tuple)


# ---------------------------------------------------------------------- boxes


@dataclass(frozen=True)
class Box:
    """Bounds of the action: numbers, or tensors of a different width in every dimension."""

    offset: float  # of the middle from the origin, in half-widths
    half: float
    tensors: str  # which of the two bounds are tensors: "low", "high", "both", neither (""), or both of no dimension

    def bounds(self, size: int, dtype: torch.dtype) -> dict[str, Any]:
        middle, widths = self.offset * self.half, self.half * (1.0 + torch.arange(size) % 3).to(dtype)
        if self.tensors == "scalar":
            low, high = (torch.tensor(middle + sign * self.half).to(dtype) for sign in (-1, 1))
            return {"low": low, "high": high}
        low = middle - (widths if self.tensors in ("low", "both") else self.half)
        high = middle + (widths if self.tensors in ("high", "both") else self.half)
        return {"low": low, "high": high}

    def spec(self, size: int, dtype: torch.dtype) -> Bounded:
        low, high = (torch.as_tensor(x, dtype=dtype).expand(size) for x in self.bounds(size, dtype).values())
        return Bounded(low, high, (size,), dtype=dtype)


def boxes(decades: int = 3) -> st.SearchStrategy[Box]:
    """Widths over ``2 * decades`` powers of ten, as far as eight half-widths from the origin."""
    half = st.just(1.0) | st.floats(-decades, decades).map(lambda x: 10.0**x)
    offset = st.just(0.0) | st.floats(-8, 8)
    return st.builds(Box, offset, half, st.sampled_from(["", "both", "low", "high", "scalar"]))


# ---------------------------------------------------------------------- mixtures


@dataclass(frozen=True)
class Recipe:
    """A mixture, as what it is made of: a report of a failure shows this and not its numbers."""

    batch: tuple[int, ...]
    experts: int
    size: int
    dtype: torch.dtype
    box: Box | None
    spread: float
    buried: bool
    locs: float
    scales: tuple[float, float]
    seed: int

    def params(self, *, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Logits within ``+-spread``, locs within ``+-locs``, scales between two powers of ten."""
        rng = torch.Generator().manual_seed(self.seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*self.batch, self.experts, *shape, generator=rng, dtype=torch.float64)

        logits = self.spread * (2.0 * uniform() - 1.0)
        loc = self.locs * (2.0 * uniform(self.size) - 1.0)
        smallest, largest = self.scales
        scale = 10.0 ** (smallest + (largest - smallest) * uniform(self.size))
        if self.buried:
            logits[..., 0] = -1e4
        return tuple(x.to(self.dtype).requires_grad_(requires_grad) for x in (logits, loc, scale))

    @property
    def cls(self) -> type[NormalMixture]:
        return NormalMixture if self.box is None else TanhNormalMixture

    @property
    def bounds(self) -> dict[str, Any]:
        return {} if self.box is None else self.box.bounds(self.size, self.dtype)

    def dist(self, params: Sequence[Tensor] | None = None, **options: Any) -> NormalMixture:
        return self.cls(*(self.params() if params is None else params), **self.bounds, **options)

    def reseed(self) -> None:
        reseed(self.seed)

    def points(self, dist: NormalMixture) -> Tensor:
        """Values ``[N, *B, A]``: draws, others from all over the support, its edges and what lies beyond."""
        self.reseed()
        drawn = dist.sample((3,))
        if self.box is None:
            return torch.cat((drawn, 10.0 * torch.randn_like(drawn)))
        low, high = (torch.as_tensor(x, dtype=self.dtype) for x in (dist.low, dist.high))
        uniform = torch.rand_like(drawn)
        steps = torch.tensor([-0.1, 0.0, 1.0, 1.1], dtype=self.dtype).reshape(-1, *[1] * (drawn.ndim - 1))
        edges = (low + (high - low) * steps).expand(4, *drawn.shape[1:])
        return torch.cat((drawn, low + (high - low) * uniform, edges))


def recipes(
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    batch: st.SearchStrategy[tuple[int, ...]] | None = None,
    mild: bool | None = None,
    bounded: bool | None = None,
    min_experts: int = 1,
) -> st.SearchStrategy[Recipe]:
    """Mixtures; ``mild`` ones have overlapping experts of ordinary width, none of them saturated or buried."""
    if mild is None:
        shared = {"batch": batch, "bounded": bounded, "min_experts": min_experts}
        return recipes(dtypes=dtypes, mild=True, **shared) | recipes(dtypes=dtypes, mild=False, **shared)
    power = st.floats(-1.0, 0.0) if mild else st.floats(-3.0, 2.0)
    box = {True: boxes(), False: st.none(), None: st.none() | boxes()}[bounded]
    return st.builds(
        Recipe,
        batch=shapes() if batch is None else batch,
        experts=st.integers(min_experts, 6),
        size=st.integers(1, 5),
        dtype=st.sampled_from(dtypes),
        box=box,
        spread=st.floats(0.0, 2.0 if mild else 50.0),
        buried=st.just(False) if mild else st.booleans(),
        locs=st.floats(0.0, 1.0 if mild else 30.0),
        scales=st.tuples(power, power).map(lambda pair: tuple(sorted(pair))),
        seed=seeds,
    )


# ---------------------------------------------------------------------- keys


@st.composite
def nested_keys(draw: st.DrawFn, number: int) -> list[NestedKey]:
    """Different keys, at the root or nested once or twice."""
    where = st.sampled_from([(), ("agents",), ("agents", "group"), ("world",)])
    found = [(*draw(where), f"key{i}") for i in range(number)]
    return [key if len(key) > 1 else key[0] for key in found]


def spec_at(key: NestedKey, leaf: Bounded) -> Composite:
    for name in reversed((key,) if isinstance(key, str) else key):
        leaf = Composite({name: leaf})
    return leaf


# ---------------------------------------------------------------------- losses

KINDS = {"sac": PMOESACLoss, "tqc": PMOETQCLoss, "ppo": PMOEClipPPOLoss}
ROUTINGS = ("frequency", "soft_frequency", "marginal", "score_function", "none")
BACKPROPS = ("max", "all", "routed", "weighted")
OBSERVATION = 3
TEMPERATURE = 0.25  # of SAC at first, and PPO's entropy coefficient

USUAL = {
    "observation": "observation",
    "action": "action",
    "action_log_prob": "action_log_prob",
    "state_action_value": "state_action_value",
    "state_value": "state_value",
    "reward": "reward",
    "done": "done",
    "terminated": "terminated",
    "priority_weight": "priority_weight",
    "priority": "td_error",
    "advantage": "advantage",
    "value_target": "value_target",
}


@dataclass(frozen=True)
class Setup:
    """A loss on a batch, small enough to read: actor, critics and transitions come from the seed."""

    kind: str
    batch: tuple[int, ...]
    experts: int
    size: int
    dtype: torch.dtype
    box: Box
    score: str
    critics: int
    options: dict[str, Any]
    seed: int

    def reseed(self) -> None:
        reseed(self.seed)

    def network(self) -> nn.Module:
        self.reseed()
        return nn.Linear(OBSERVATION, self.experts * (2 * self.size + 1)).to(self.dtype)

    def actor(self, network: nn.Module | None = None, keys: dict[str, NestedKey] = USUAL, **options: Any) -> PMOEActor:
        """Over a linear network, or any other."""
        return PMOEActor(
            self.experts,
            spec=spec_at(keys["action"], self.box.spec(self.size, self.dtype)),
            in_keys=[keys["observation"]],
            network=self.network() if network is None else network,
            distribution_kwargs={"score": self.score},
            return_log_prob=True,
            log_prob_key=keys["action_log_prob"],
            **options,
        )

    def _operator(self, outputs: int, inputs: int, in_keys: list[NestedKey], out_key: NestedKey) -> ValueOperator:
        mlp = MLP(in_features=inputs, out_features=outputs, num_cells=[6], activation_class=nn.Tanh).to(self.dtype)
        return ValueOperator(mlp, in_keys=in_keys, out_keys=[out_key])

    def state_value(self, keys: dict[str, NestedKey] = USUAL) -> ValueOperator:
        self.reseed()
        return self._operator(1, OBSERVATION, [keys["observation"]], keys["state_value"])

    def loss(self, actor: PMOEActor, keys: dict[str, NestedKey] = USUAL, **options: Any) -> nn.Module:
        """The same critics for every call."""
        self.reseed()
        options = {**self.options, "num_qvalue_nets": self.critics, **options}
        state, action = keys["observation"], keys["action"]
        outputs = 4 if self.kind == "tqc" else 1
        critic = self._operator(outputs, OBSERVATION + self.size, [state, action], keys["state_action_value"])
        renamed = {"state_action_value": keys["state_action_value"]}
        renamed.update((name, keys[name]) for name in ("reward", "done", "terminated"))
        if self.kind == "ppo":
            found = PMOEClipPPOLoss(actor, self.state_value(keys), critic, entropy_coeff=TEMPERATURE, **options)
            found.set_keys(
                **renamed,
                value=keys["state_value"],
                advantage=keys["advantage"],
                value_target=keys["value_target"],
            )
            return found
        options = {"alpha_init": TEMPERATURE, "scalar_output_mode": "exclude", **options}
        found = KINDS[self.kind](actor, critic, **options).to(self.dtype)
        found.make_value_estimator(gamma=0.9)
        found.set_keys(**renamed, priority=keys["priority"], priority_weight=keys["priority_weight"])
        return found

    def transitions(self, actor: PMOEActor, keys: dict[str, NestedKey] = USUAL) -> TensorDict:
        """What off-policy and on-policy losses read, in one; the actor's own densities, a little off."""
        self.reseed()
        like = {"dtype": self.dtype}
        bounds = self.box.spec(self.size, self.dtype).space
        batch = TensorDict({}, batch_size=self.batch)
        action = bounds.low + (bounds.high - bounds.low) * (0.05 + 0.9 * torch.rand(*self.batch, self.size, **like))
        batch[keys["observation"]] = torch.randn(*self.batch, OBSERVATION, **like)
        batch[keys["action"]] = action
        batch[("next", *_path(keys["observation"]))] = torch.randn(*self.batch, OBSERVATION, **like)
        batch[("next", *_path(keys["reward"]))] = torch.randn(*self.batch, 1, **like)
        for name in ("done", "terminated"):
            batch[("next", *_path(keys[name]))] = torch.zeros(*self.batch, 1, dtype=torch.bool)
        batch[keys["advantage"]] = torch.randn(*self.batch, 1, **like)
        batch[keys["value_target"]] = torch.randn(*self.batch, 1, **like)
        with torch.no_grad():
            log_prob = actor.get_dist(batch.copy()).log_prob(action)
        batch[keys["action_log_prob"]] = log_prob + 0.3 * torch.randn(self.batch, **like)
        return batch

    def outputs(self, loss: nn.Module, batch: TensorDict) -> TensorDict:
        reseed(self.seed + 1)
        return loss(batch.copy())


def _path(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


@st.composite
def setups(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    dtypes: Sequence[torch.dtype] = EXACT,
    routings: Sequence[str] = ROUTINGS,
    min_experts: int = 1,
    reductions: Sequence[str] = ("mean", "sum", "none"),
) -> Setup:
    """Every combination of the losses' options, over shapes."""
    kind = draw(st.sampled_from(kinds))
    options = {
        "routing": draw(st.sampled_from(routings)),
        "routing_coef": draw(st.sampled_from([1.0, 0.5, 3.0])),
        "routing_loss": draw(st.sampled_from(["brier", "log"])),
        "num_proposals": draw(st.integers(1, 3)),
        "reduction": draw(st.sampled_from(reductions)),
    }
    if kind != "ppo":
        options["backprop"] = draw(st.sampled_from(BACKPROPS))
        options["decoupled"] = options["backprop"] == "max" and draw(st.booleans())
        options["entropy_from"] = draw(st.sampled_from(["policy", "winner"]))
    return Setup(
        kind=kind,
        # PPO's diagnostics need a dimension
        batch=draw(st.lists(st.integers(1, 4), min_size=kind == "ppo", max_size=2).map(tuple)),
        experts=draw(st.integers(min_experts, 5)),
        size=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(dtypes)),
        box=draw(boxes(decades=1)),
        score=draw(st.sampled_from(["mixture", "expert"])),
        critics=draw(st.integers(1, 3)),
        options=options,
        seed=draw(seeds),
    )
