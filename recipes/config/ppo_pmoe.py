"""The config of ``recipes/ppo_pmoe.py``: keys, what goes with what, presets."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from parts.networks import UNIMODAL, ActorOptions
from parts.training import choose_compile
from pydantic import Field
from torchrl.data import TensorSpec

from config import shared
from config.shared import Activation, Experts, Frames, PolicyName, Positive, refuse
from config.typed import (
    Flag,
    Number,
    Size,
    Widths,
    config_class,
    field,
    group,
    register,
)
from torchrl_pmoe.envs import NormalizeObservationAndReward


@config_class
class Network:
    """Policy and value; everything is initialised orthogonally."""

    hidden_sizes: Widths = field([64, 64], "of policy and value")
    activation: Activation = field("tanh", "of both")
    router: Literal["linear", "detached", "shared", "separate"] = field("linear", "linear: on the observation")
    log_std_init: Number = field(0.0, "every expert's, independent of the state")
    head_gain: Positive = field(0.01, "of the policy's last layers")


@config_class
class QValueNetwork(Network):
    """As :class:`Network`, and the Q-network."""

    qvalue_hidden_sizes: Widths = field([64, 64, 64], "of the Q-network (scoring=critic), always relu")


@config_class
class Optim(shared.Optim):
    """The optimiser, and how PPO uses it."""

    anneal_lr: Flag = field(True, "linearly to zero over total_frames")
    adam_eps: Positive = field(1e-5)
    max_grad_norm: Positive = field(0.5)


@config_class
class QValueOptim(Optim):
    """As :class:`Optim`, with a Q-network."""

    qvalue_grad_clip: Literal["apart", "together"] | None = field(
        None, "apart: the Q-network by its own norm; together: preset=paper"
    )


@config_class
class Collector(shared.Collector):
    """Where frames come from."""

    frames_per_batch: Size = field(2048, "between two rounds of updates")


@config_class
class Normalization:
    """Running normalisation of what the policy and the value see."""

    observation: Flag = field(True)
    reward: Flag = field(True, "by the standard deviation of the discounted return")
    clip: Positive = field(10.0, "bound of both after normalisation")


@config_class
class Loss:
    """The clipped losses."""

    num_minibatches: Size = field(32)
    ppo_epochs: Frames = field(10)
    gae_lambda: Annotated[Number, Field(ge=0, le=1)] = field(0.95)
    clip_epsilon: Annotated[Number, Field(gt=0, lt=1)] = field(0.2)
    clip_value: Flag = field(True, "the value moves by clip_epsilon at most")
    normalize_advantage: Flag = field(True)
    critic_coeff: Positive = field(0.25, "of the squared error")
    loss_critic_type: shared.LossFunction = field("l2")
    entropy_coeff: Annotated[Number, Field(ge=0)] = field(0.0)


@config_class
class ExpertLoss(Loss):
    """As :class:`Loss`, with a Q-network that scores the experts."""

    qvalue_coeff: Positive = field(0.25, "scoring=critic, as the next three")
    routing_coef: Annotated[Number, Field(ge=0)] = field(1.0)
    routing_loss: Literal["brier", "log"] = field("brier")
    num_proposals: Experts = field(1, "draws of each expert a state, averaged")


@config_class
class OnPolicyConfig(shared.Run):
    """The keys of PPO that do not speak of experts."""

    actions: Literal["unbounded", "bounded"] = field(
        "unbounded", "unbounded: Gaussians, clipped into [-1, 1]; bounded: behind a tanh"
    )
    network: Network = group(Network)
    optim: Optim = group(Optim)
    collector: Collector = group(Collector)
    normalization: Normalization = group(Normalization)
    loss: Loss = group(Loss)
    logger: shared.Logger = group(shared.Logger, eval_interval=50_000)
    checkpoint: shared.Checkpoint = group(shared.Checkpoint, interval=50_000)

    def loss_kwargs(self) -> dict[str, Any]:
        """What is told to TorchRL's ``ClipPPOLoss``."""
        loss = self.loss
        return {
            "clip_epsilon": loss.clip_epsilon,
            "clip_value": loss.clip_value,
            "normalize_advantage": loss.normalize_advantage,
            "critic_coeff": loss.critic_coeff,
            "loss_critic_type": loss.loss_critic_type,
            "entropy_coeff": loss.entropy_coeff,
        }

    def make_normalization(self) -> Callable[[], NormalizeObservationAndReward]:
        """What makes the transform that normalises observations and rewards."""
        wanted = self.normalization
        return partial(
            NormalizeObservationAndReward,
            observation=wanted.observation,
            reward=wanted.reward,
            clip=wanted.clip,
            gamma=self.optim.gamma,
        )

    @property
    def updates(self) -> float:
        """How many updates a run makes."""
        batches = self.total_frames / self.collector.frames_per_batch
        return batches * self.loss.num_minibatches * self.loss.ppo_epochs


@config_class
class PPOConfig(OnPolicyConfig):
    """Every key of ``recipes/ppo_pmoe.py``."""

    recipe: Literal["ppo_pmoe"] = field("ppo_pmoe", "tells what a run is a run of")
    num_experts: Experts | None = field(None, "null: the paper's number for its MuJoCo tasks, 4 elsewhere")
    policy: PolicyName = field("pmoe", "gaussian: TorchRL's own IndependentNormal or TanhNormal, the control")
    blend: Literal["parameters", "actions"] = field("parameters", "policy=gating: what is blended")
    preset: Literal["default", "paper"] | None = field(None, "paper: the authors' combination, evaluation included")
    scoring: Literal["responsibility", "frequency", "critic"] | None = field(
        None, "responsibility, frequency: TorchRL's unmodified ClipPPOLoss; critic: PMOEClipPPOLoss"
    )
    routing: Literal["frequency", "soft_frequency", "score_function", "marginal", "none"] | None = field(
        None, "how the router learns from the Q-network (scoring=critic)"
    )
    network: QValueNetwork = group(QValueNetwork)
    optim: QValueOptim = group(QValueOptim)
    loss: ExpertLoss = group(ExpertLoss)
    logger: shared.ExpertLogger = group(shared.ExpertLogger, eval_interval=50_000)

    @property
    def critic_scored(self) -> bool:
        """Whether there is a Q-network."""
        return self.policy not in UNIMODAL and self.scoring == "critic"

    def actor_options(self, spec: TensorSpec, in_features: int) -> ActorOptions:
        """What the policy is made from, for observations of ``in_features`` numbers; scales ignore the state."""
        assert self.num_experts is not None
        return ActorOptions(
            spec,
            in_features,
            num_experts=self.num_experts,
            hidden_sizes=self.network.hidden_sizes,
            activation=self.network.activation,
            router=self.network.router,
            log_std_bounds=None,
            bounded=self.actions == "bounded",
            mixture_kwargs={"log_prob_routing": "frequency" if self.scoring == "frequency" else "exact"},
            blend=self.blend,
            return_log_prob=True,
            device=self.device,
        )

    def routing_kwargs(self) -> dict[str, Any]:
        """What is told to ``PMOEClipPPOLoss`` besides."""
        names = ("routing_coef", "routing_loss", "num_proposals", "qvalue_coeff")
        return {"routing": self.routing, **{name: getattr(self.loss, name) for name in names}}


ABOUT = "Proximal Policy Optimisation with a mixture-of-experts policy."
EXAMPLES = (
    "python recipes/ppo_pmoe.py env=Walker2d-v4",
    "python recipes/ppo_pmoe.py -m env=HalfCheetah-v4 policy=pmoe,gaussian seed=0,1,2",
)
register("ppo_pmoe", PPOConfig, ABOUT, *EXAMPLES)

PAPER: dict[str, Any] = {
    "scoring": "critic",
    "routing": "frequency",
    "logger.eval_expert": "drawn",
    "optim.qvalue_grad_clip": "together",
}
# an expert is a good policy in turn with the others; the largest one alone gets stuck (docs: results)
DEFAULTS: dict[str, Any] = {
    "scoring": "responsibility",
    "routing": "frequency",
    "logger.eval_expert": "drawn",
    "optim.qvalue_grad_clip": "apart",
}
PAPER_NUM_EXPERTS = {
    "Ant": 16,
    "HalfCheetah": 8,
    "Hopper": 12,
    "Humanoid": 8,
    "HumanoidStandup": 4,
    "Walker2d": 4,
}


def resolve(config: PPOConfig) -> None:
    """Fill in what a config leaves open, and refuse what does not go together.

    Raises:
        UsageError: in one line, for the first key that cannot stay.
    """
    shared.fit_to_machine(config)
    refuse(
        config,
        {"actions": (config.preset == "paper" and config.actions != "unbounded", "unbounded with preset=paper")},
    )
    given = config.routing
    shared.fill(config, {"default": DEFAULTS, "paper": PAPER}, DEFAULTS)
    shared.fill_num_experts(config, PAPER_NUM_EXPERTS)
    if config.policy not in UNIMODAL and config.scoring != "critic":
        why = f"null with scoring={config.scoring}, where the log-density trains the router"
        refuse(config, {"routing": (given is not None, why)})
        config.routing = None
    refuse_batches(config)
    refuse(
        config,
        {
            "blend": (
                config.policy != "gating" and config.blend != "parameters",
                f"parameters with policy={config.policy}; only gating blends",
            ),
            "routing": (
                config.routing == "soft_frequency" and config.loss.entropy_coeff == 0,
                "frequency with loss.entropy_coeff=0, the soft one's temperature; above 0 it is another one",
            ),
            "optim.router_lr": (
                config.policy == "gaussian" and config.optim.router_lr is not None,
                "null with policy=gaussian, which has no router",
            ),
        },
    )
    choose_compile(config.compile, config.updates)


def refuse_batches(config: OnPolicyConfig) -> None:
    """Raise where a batch of frames cannot be shared out among environments and minibatches."""
    frames, envs = config.collector.frames_per_batch, config.collector.num_envs
    parts = config.loss.num_minibatches
    allowed = f"a multiple of collector.num_envs={envs} and of loss.num_minibatches={parts}"
    refuse(config, {"collector.frames_per_batch": (frames % math.lcm(envs, parts) != 0, allowed)})
