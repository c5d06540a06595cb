"""The config of ``recipes/sac_pmoe.py``: keys, what goes with what, presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from parts.errors import UsageError
from parts.networks import UNIMODAL, ActorOptions
from parts.training import choose_compile
from pydantic import Field
from torchrl.data import TensorSpec

from config import shared
from config.shared import Activation, Experts, PolicyName, Positive, refuse
from config.typed import (
    Allowed,
    Flag,
    Integer,
    Number,
    Size,
    Text,
    Widths,
    config_class,
    field,
    get,
    group,
    register,
)


@config_class
class Network:
    """Policy and critics."""

    hidden_sizes: Widths = field([256, 256], "of policy and critics")
    activation: Activation = field("relu", "of both")
    router: Literal["detached", "shared", "separate"] | None = field(
        None, "null: detached for pmoe, shared for gating and mcp"
    )
    log_std_min: Number = field(-20.0, "bounds of the log of every scale")
    log_std_max: Number = field(2.0)
    head_init: Positive = field(1e-3, "the policy's heads start uniform in +-head_init")


@config_class
class Optim(shared.Optim):
    """The optimiser, and how SAC uses it."""

    batch_size: Annotated[Integer, Field(ge=1, le=2**24)] = field(256)
    utd_ratio: Positive = field(1.0, "gradient steps per frame")
    loss_function: shared.LossFunction = field("l2", "of the critics")
    target_update_polyak: Annotated[Number, Field(ge=0.5, le=1)] = field(0.995)
    alpha_init: Positive = field(1.0, "temperature")
    fixed_alpha: Flag = field(False)
    target_entropy: Number | Literal["auto"] = field(
        "auto", "in nats of actions in [-1, 1]; auto: minus the action size"
    )


@config_class
class Collector(shared.Collector):
    """Where frames come from."""

    frames_per_batch: Size | None = field(None, "null: one step of every environment, then its updates")
    init_random_frames: Annotated[Integer, Field(ge=0)] = field(1000, "by random actions, before the first update")


@config_class
class ReplayBuffer:
    """The replay buffer."""

    size: Size = field(1_000_000, "frames")
    prb: Flag = field(False, "prioritised")
    scratch_dir: Text | None = field(None, "keeps the frames in files there; null: in memory")


@config_class
class Loss:
    """The routing loss."""

    routing_coef: Annotated[Number, Field(ge=0)] = field(1.0)
    routing_loss: Literal["brier", "log"] = field("brier", "log: scoring=critic only")
    num_proposals: Experts = field(1, "draws of each expert a state, averaged (scoring=critic)")
    decoupled: Flag = field(False, "backprop=max: the best expert learns from a fresh draw, not from the one that won")
    entropy_from: Literal["policy", "winner"] | None = field(
        None, "what the temperature sees (scoring=critic); winner: the best draws (preset=paper)"
    )
    temperature: Positive = field(1.0, "of routing=gumbel_softmax")
    straight_through: Flag = field(True, "routing=gumbel_softmax: act on one expert; false blends the draws")


@config_class
class Checkpoint(shared.Checkpoint):
    """Checkpoints of the run."""

    replay_buffer: Flag = field(True, "what is new since the last one; false: a run cannot go on")

    def unsaved(self) -> frozenset[str]:
        """The components that a checkpoint leaves out."""
        return frozenset() if self.replay_buffer else frozenset({"replay_buffer"})


@config_class
class SACConfig(shared.Run):
    """Every key of ``recipes/sac_pmoe.py``."""

    recipe: Literal["sac_pmoe"] = field("sac_pmoe", "tells what a run is a run of")
    num_seeds: Annotated[
        Literal[1], Allowed("1; python recipes/sac_many_seeds.py num_seeds=N trains several agents at once")
    ] = field(1, "sac_many_seeds.py trains several at once")
    num_experts: Experts | None = field(None, "null: the paper's number for its MuJoCo tasks, 4 elsewhere")
    policy: PolicyName = field("pmoe", "gaussian: TorchRL's own TanhNormal, the control")
    blend: Literal["parameters", "actions"] = field("parameters", "policy=gating: what is blended")
    preset: Literal["default", "paper", "diverse"] | None = field(
        None, "paper: the authors' combination, evaluation included; diverse: keeps several solutions"
    )
    scoring: Literal["critic", "gradient"] | None = field(
        None, "critic: PMOESACLoss; gradient: TorchRL's unmodified SACLoss; null, here and below: see the first line"
    )
    routing: Literal["frequency", "soft_frequency", "gumbel_softmax", "score_function", "marginal", "none"] | None = (
        field(None, "how the router learns; gumbel_softmax: gradient only; score_function, marginal: critic only")
    )
    backprop: Literal["max", "all", "routed", "weighted"] | None = field(
        None, "the experts that the actor's loss flows through (critic only)"
    )
    score: Literal["mixture", "expert"] | None = field(None, "the log-density that SAC sees")
    acting: Literal["policy", "best_of_experts", "committed"] | None = field(
        None,
        "best_of_experts: the proposal that the critics rank highest; committed: an expert that the router draws acts "
        "for commit_steps",
    )
    commit_steps: Size | Literal["episode"] = field("episode", "acting=committed: how long an expert acts")
    network: Network = group(Network)
    optim: Optim = group(Optim)
    collector: Collector = group(Collector)
    replay_buffer: ReplayBuffer = group(ReplayBuffer)
    loss: Loss = group(Loss)
    logger: shared.ExpertLogger = group(shared.ExpertLogger)
    checkpoint: Checkpoint = group(Checkpoint)

    @property
    def frames_per_batch(self) -> int:
        """Frames that are collected at a time: no more than the run has, in whole steps of all environments."""
        number = self.collector.num_envs
        assert self.collector.frames_per_batch is not None
        return min(self.collector.frames_per_batch, -(-self.total_frames // number) * number)

    @property
    def updates(self) -> float:
        """How many updates a run makes."""
        return self.total_frames * self.optim.utd_ratio

    @property
    def commitment(self) -> int | None:
        """For how many steps an expert acts that is committed; ``None`` for the whole episode."""
        return None if self.commit_steps == "episode" else self.commit_steps

    def actor_options(self, spec: TensorSpec, in_features: int) -> ActorOptions:
        """What the policy is made from, for observations of ``in_features`` numbers."""
        net = self.network
        assert self.num_experts is not None
        assert net.router is not None
        mixture: dict[str, Any] = {"score": self.score}
        if self.scoring == "gradient":
            mixture.update(
                routing=self.routing,
                routing_coef=self.loss.routing_coef,
                temperature=self.loss.temperature,
                straight_through=self.loss.straight_through,
            )
        return ActorOptions(
            spec,
            in_features,
            num_experts=self.num_experts,
            hidden_sizes=net.hidden_sizes,
            activation=net.activation,
            router=net.router,
            log_std_bounds=(net.log_std_min, net.log_std_max),
            head_init=net.head_init,
            mixture_kwargs=mixture,
            blend=self.blend,
            device=self.device,
        )

    def loss_kwargs(self) -> dict[str, Any]:
        """What is told to TorchRL's ``SACLoss``."""
        return {
            "num_qvalue_nets": 2,
            "loss_function": self.optim.loss_function,
            "alpha_init": self.optim.alpha_init,
            "fixed_alpha": self.optim.fixed_alpha,
            "target_entropy": self.optim.target_entropy,
        }

    def routing_kwargs(self) -> dict[str, Any] | None:
        """What is told to ``PMOESACLoss`` besides; ``None`` where no critic scores experts."""
        if self.policy in UNIMODAL or self.scoring != "critic":
            return None
        names = ("routing_coef", "routing_loss", "num_proposals", "decoupled", "entropy_from")
        return {
            "routing": self.routing,
            "backprop": self.backprop,
            **{name: getattr(self.loss, name) for name in names},
        }


ABOUT = "Soft Actor-Critic with a mixture-of-experts policy."
EXAMPLES = (
    "python recipes/sac_pmoe.py env=Walker2d-v4",
    "python recipes/sac_pmoe.py -m env=HalfCheetah-v4 policy=pmoe,gaussian seed=0,1,2",
)
register("sac_pmoe", SACConfig, ABOUT, *EXAMPLES)

PAPER: dict[str, Any] = {
    "scoring": "critic",
    "routing": "frequency",
    "backprop": "max",
    "score": "expert",
    "acting": "policy",
    "loss.entropy_from": "winner",
    "logger.eval_expert": "drawn",
}
# the highest return measured (docs, results): the paper's routing, the policy's own entropy, the largest expert
DEFAULTS = {**PAPER, "loss.entropy_from": "policy", "logger.eval_expert": "largest"}
PARTNERS: dict[tuple[str, str], dict[str, str | None]] = {
    ("critic", "frequency"): {},
    ("critic", "soft_frequency"): {"backprop": "weighted", "score": "mixture"},
    ("critic", "score_function"): {"backprop": "routed", "score": "mixture"},
    ("critic", "marginal"): {"backprop": "all", "score": "mixture"},
    ("critic", "none"): {"backprop": "weighted", "score": "mixture"},
    **{
        # no critic call there, so no backprop
        ("gradient", routing): {"backprop": None, "score": "mixture", "loss.entropy_from": None}
        for routing in ("frequency", "soft_frequency", "gumbel_softmax", "none")
    },
}
"""By scoring and routing: what differs from the defaults where a routing did best.

Measured on the bandits whose optimum is known, but for ``frequency``, which has the highest return. The first row that
fits what a config names is taken; what it names besides stays.
"""
PRESETS: dict[str, dict[str, Any]] = {
    "default": DEFAULTS,
    "paper": PAPER,
    "diverse": {**DEFAULTS, "routing": "soft_frequency", **PARTNERS["critic", "soft_frequency"]},
}
"""What ``preset`` stands for; a key that is named besides must have the preset's value."""
PAPER_NUM_EXPERTS = {"HalfCheetah": 2, "Humanoid": 10, "HumanoidStandup": 10}


def resolve(config: SACConfig) -> None:
    """Fill in what a config leaves open, and refuse what does not go together.

    Raises:
        UsageError: in one line, for the first key that cannot stay.
    """
    shared.fit_to_machine(config)
    # a preset refuses by itself what contradicts it
    alone = config.policy in UNIMODAL or config.preset is not None
    fills: Mapping[str, Any] = DEFAULTS if alone else partners(config)
    shared.fill(config, PRESETS, fills, for_unimodal=("acting",))
    shared.fill_num_experts(config, PAPER_NUM_EXPERTS)
    if config.network.router is None:
        config.network.router = "shared" if config.policy in UNIMODAL else "detached"
    if config.collector.frames_per_batch is None:
        config.collector.frames_per_batch = config.collector.num_envs
    _refuse_combinations(config)
    choose_compile(config.compile, config.updates)


def partners(config: SACConfig) -> Mapping[str, str | None]:
    """The values of the keys that a config leaves null, as its scoring and its routing did best with."""
    for (scoring, routing), others in PARTNERS.items():
        if config.scoring in (None, scoring) and config.routing in (None, routing):
            return {**DEFAULTS, "scoring": scoring, "routing": routing, **others}
    allowed = ", ".join(routing for scoring, routing in PARTNERS if scoring == config.scoring)
    raise UsageError(f"routing={config.routing}: must be one of {allowed} with scoring={config.scoring}")


def combination(config: SACConfig) -> str:
    """What a resolved config trains a mixture by, as on a command line; nothing for other policies."""
    keys = () if config.policy in UNIMODAL else (*DEFAULTS, "loss.decoupled")
    if config.acting == "committed":
        keys = (*keys, "commit_steps")
    given = {key: get(config, key) for key in keys}
    return " ".join(f"{key}={value}" for key, value in given.items() if value not in (None, False))


def _refuse_combinations(config: SACConfig) -> None:
    loss, collector, gradient = config.loss, config.collector, config.scoring == "gradient"
    assert collector.frames_per_batch is not None
    steps = config.optim.utd_ratio * collector.frames_per_batch
    coupled_by = "preset=paper" if config.preset == "paper" else f"backprop={config.backprop}"
    refuse(
        config,
        {
            "backprop": (
                gradient and config.backprop is not None,
                "null with scoring=gradient, where the loss's own draw carries the gradient",
            ),
            "loss.entropy_from": (
                gradient and loss.entropy_from is not None,
                "null with scoring=gradient, where the temperature sees the loss's own draw",
            ),
            "loss.decoupled": (
                config.policy not in UNIMODAL
                and loss.decoupled
                and (config.backprop != "max" or config.preset == "paper"),
                f"false with {coupled_by}; only max selects an expert by score",
            ),
            "blend": (
                config.policy != "gating" and config.blend != "parameters",
                f"parameters with policy={config.policy}; only gating blends",
            ),
            "loss.temperature": (
                config.routing != "gumbel_softmax" and loss.temperature != 1,
                f"1 with routing={config.routing}; only gumbel_softmax has one",
            ),
            "loss.straight_through": (
                config.routing != "gumbel_softmax" and not loss.straight_through,
                f"true with routing={config.routing}; only gumbel_softmax has a draw to relax",
            ),
            "score": (
                config.routing == "gumbel_softmax" and not loss.straight_through and config.score == "expert",
                "mixture with loss.straight_through=false, a blend of draws is no expert's",
            ),
            "loss.routing_loss": (gradient and loss.routing_loss != "brier", "brier with scoring=gradient"),
            "loss.num_proposals": (gradient and loss.num_proposals != 1, "1 with scoring=gradient"),
            "acting": (
                config.policy in UNIMODAL and config.acting != "policy",
                f"policy with policy={config.policy}, which {UNIMODAL.get(config.policy)}",
            ),
            "commit_steps": (
                config.acting != "committed" and config.commit_steps != "episode",
                f"episode with acting={config.acting}; only a committed expert acts for so long",
            ),
            "optim.router_lr": (
                config.policy == "gaussian" and config.optim.router_lr is not None,
                "null with policy=gaussian, which has no router",
            ),
            "logger.eval_expert": (
                config.acting != "policy" and config.logger.eval_expert != "largest",
                f"largest or null with acting={config.acting}, which is evaluated as it acts",
            ),
            "network.log_std_min": (
                config.network.log_std_min >= config.network.log_std_max,
                f"below network.log_std_max={config.network.log_std_max}",
            ),
            "collector.frames_per_batch": (
                collector.frames_per_batch % collector.num_envs != 0,
                f"a multiple of collector.num_envs={collector.num_envs}",
            ),
            "optim.utd_ratio": (
                steps < 1 or abs(steps - round(steps)) > 1e-6,
                f"a whole number of steps per batch of collector.frames_per_batch={collector.frames_per_batch}",
            ),
        },
    )


def refuse_target_entropy(config: SACConfig, action_size: int) -> None:
    """Raise where no policy has the target entropy: the temperature would grow for ever.

    Args:
        config: a config.
        action_size: dimensions of the action, each of which is in ``[-1, 1]``.

    Raises:
        UsageError: the line for ``optim.target_entropy``.
    """
    target, largest = config.optim.target_entropy, action_size * math.log(2)
    allowed = f"auto or at most {largest:.4g}, the entropy of the uniform distribution between the action's bounds"
    refuse(config, {"optim.target_entropy": (target != "auto" and target > largest, allowed)})
