"""Proximal Policy Optimisation with a mixture-of-experts policy.

    python recipes/ppo_pmoe.py env=Walker2d-v4

Every key is in ``recipes/config/ppo_pmoe.yaml``.
"""

from __future__ import annotations

if __name__ == "__main__":
    import process

    process.begin()

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backends
import common
import hydra
import resume
import runs
import torch
from common import UsageError
from normalization import NormalizedPolicy, RunningNormalization
from omegaconf import DictConfig
from policies import build_experts_actor, describe
from rules import Rule, choice, either, flag, integer, number, widths
from tensordict import TensorDictBase
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule, TensorDictModuleBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer, TensorSpec
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import LRSchedulerHook

from torchrl_pmoe import MeanOfDrawnExpertActor, NormalMixture, PMOEClipPPOLoss, TanhNormalMixture
from torchrl_pmoe.trainers import FiniteLoss, FlatReplay

RULES: dict[str, Rule] = {
    **common.RULES,
    "recipe": choice("ppo_pmoe"),
    "scoring": either(choice("responsibility", "frequency", "critic"), None),
    "routing": either(choice("frequency", "soft_frequency", "score_function", "marginal", "none"), None),
    "actions": choice("unbounded", "bounded"),
    "network.qvalue_hidden_sizes": widths(),
    "network.router": choice("linear", "detached", "shared", "separate"),
    "network.head_gain": number(above=0),
    "network.log_std_init": number(),
    "optim.anneal_lr": flag(),
    "optim.max_grad_norm": number(above=0),
    "optim.qvalue_grad_clip": either(choice("apart", "together"), None),
    "collector.frames_per_batch": integer(1, 2**31 - 1),
    "normalization.observation": flag(),
    "normalization.reward": flag(),
    "normalization.clip": number(above=0),
    "loss.num_minibatches": integer(1, 2**31 - 1),
    "loss.ppo_epochs": integer(1),
    "loss.gae_lambda": number(at_least=0, at_most=1),
    "loss.clip_epsilon": number(above=0, below=1),
    "loss.clip_value": flag(),
    "loss.normalize_advantage": flag(),
    "loss.critic_coeff": number(above=0),
    "loss.loss_critic_type": choice("l2", "l1", "smooth_l1"),
    "loss.entropy_coeff": number(at_least=0),
    "loss.qvalue_coeff": number(above=0),
}

PAPER = {
    "scoring": "critic",
    "routing": "frequency",
    "logger.eval_expert": "drawn",
    "optim.qvalue_grad_clip": "together",
}
# an expert is a good policy in turn with the others, not alone: the largest one at every step gets stuck (README)
DEFAULTS = {
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
TRAINED_ON = ["observation", "action", "action_log_prob", "advantage", "value_target", "state_value"]
NORMALIZATION = "normalization"
LOSS_COLUMNS = (
    "loss_objective",
    "loss_critic",
    "loss_qvalue",
    "loss_routing",
    "explained_variance",
    "clip_fraction",
    "kl_approx",
)


# --------------------------------------------------------------------------------------------- config


def resolve_config(cfg: DictConfig) -> None:
    """Check the config and fill in what it leaves to the preset, the defaults or the environment."""
    common.check_config(cfg, RULES)
    if cfg.preset == "paper" and cfg.actions != "unbounded":
        raise UsageError(f"actions={cfg.actions}: must be unbounded with preset=paper")
    given = cfg.routing
    common.fill_preset(cfg, PAPER, PAPER if cfg.preset == "paper" else DEFAULTS, PAPER_NUM_EXPERTS)
    if cfg.policy == "pmoe" and cfg.scoring != "critic":
        if given is not None:
            raise UsageError(
                f"routing={given}: must be null with scoring={cfg.scoring}, where the log-density trains the router"
            )
        cfg.routing = None
    refuse_batches(cfg)
    backends.refuse(cfg)
    common.refuse(
        cfg,
        {
            "blend": (
                cfg.policy != "gating" and cfg.blend != "parameters",
                f"parameters with policy={cfg.policy}; only gating blends",
            ),
            "routing": (
                cfg.routing == "soft_frequency" and cfg.loss.entropy_coeff == 0,
                "frequency with loss.entropy_coeff=0, the soft one's temperature; above 0 it is another one",
            ),
            "optim.router_lr": (
                cfg.policy == "gaussian" and cfg.optim.router_lr is not None,
                "null with policy=gaussian, which has no router",
            ),
        },
    )
    runs.resolve_compile(cfg, updates(cfg))


def updates(cfg: DictConfig) -> float:
    """How many updates a run of ``total_frames`` makes."""
    return cfg.total_frames / cfg.collector.frames_per_batch * cfg.loss.num_minibatches * cfg.loss.ppo_epochs


def refuse_batches(cfg: DictConfig) -> None:
    """Raise where a batch of frames cannot be shared out among environments and minibatches."""
    frames, envs, parts = cfg.collector.frames_per_batch, cfg.collector.num_envs, cfg.loss.num_minibatches
    allowed = f"a multiple of collector.num_envs={envs} and of loss.num_minibatches={parts}"
    common.refuse(cfg, {"collector.frames_per_batch": (frames % math.lcm(envs, parts) != 0, allowed)})


def critic_scored(cfg: DictConfig) -> bool:
    """Whether there is a Q-network."""
    return cfg.policy == "pmoe" and cfg.scoring == "critic"


# --------------------------------------------------------------------------------------------- parts


def orthogonal_(module: nn.Module, last_gain: float, hidden_gain: float = math.sqrt(2)) -> None:
    """Initialise the linear layers of ``module`` orthogonally, the last one with a gain of its own; biases are zero."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, last_gain if layer is layers[-1] else hidden_gain)
        nn.init.zeros_(layer.bias)


def build_actor(cfg: DictConfig, spec: TensorSpec, observation_size: int) -> ProbabilisticActor:
    """The policy: an actor of several experts, or a Gaussian of TorchRL's own of the same size.

    Scales do not depend on the state.
    """
    net, bounded = cfg.network, cfg.actions == "bounded"
    activation = common.ACTIVATIONS[net.activation]
    if cfg.policy != "gaussian":
        linear = net.router == "linear"
        actor = build_experts_actor(
            cfg,
            spec,
            mixture={
                "distribution_class": TanhNormalMixture if bounded else NormalMixture,
                "distribution_kwargs": {"log_prob_routing": "frequency" if cfg.scoring == "frequency" else "exact"},
            },
            blended={"distribution_class": TanhNormal if bounded else IndependentNormal},
            in_features=observation_size,
            num_cells=tuple(net.hidden_sizes),
            activation_class=activation,
            router=nn.Linear(observation_size, cfg.num_experts, device=cfg.device) if linear else net.router,
            state_dependent_scale=False,
            return_log_prob=True,
        )
        network = actor[0].module[0]
        orthogonal_(network.trunk, math.sqrt(2))
        orthogonal_(network.experts, net.head_gain)
        orthogonal_(network.router, net.head_gain)
        nn.init.constant_(network.log_scale, net.log_std_init)
        return actor
    mlp = MLP(
        in_features=observation_size,
        out_features=spec.shape[-1],
        num_cells=list(net.hidden_sizes),
        activation_class=activation,
        device=cfg.device,
    )
    orthogonal_(mlp, net.head_gain)
    scale = AddStateIndependentNormalScale(
        spec.shape[-1], device=cfg.device, scale_mapping="exp", init_value=net.log_std_init
    )
    limits = {"low": spec.space.low, "high": spec.space.high} if bounded else {}
    return ProbabilisticActor(
        TensorDictModule(nn.Sequential(mlp, scale), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        spec=spec.to(cfg.device),
        distribution_class=TanhNormal if bounded else IndependentNormal,
        distribution_kwargs={name: bound.to(cfg.device) for name, bound in limits.items()},
        return_log_prob=True,
        default_interaction_type=ExplorationType.RANDOM,
    )


def build_value(cfg: DictConfig, observation_size: int, num_values: int = 1, key: str = "state_value") -> ValueOperator:
    """The state-value network, or one with several values of a state."""
    mlp = MLP(
        in_features=observation_size,
        out_features=num_values,
        num_cells=list(cfg.network.hidden_sizes),
        activation_class=common.ACTIVATIONS[cfg.network.activation],
        device=cfg.device,
    )
    orthogonal_(mlp, 1.0)
    return ValueOperator(mlp, in_keys=["observation"], out_keys=[key])


def build_qvalue(cfg: DictConfig, spec: TensorSpec, observation_size: int) -> ValueOperator:
    """The Q-network that scores the experts' proposals."""
    mlp = MLP(
        in_features=observation_size + spec.shape[-1],
        out_features=1,
        num_cells=list(cfg.network.qvalue_hidden_sizes),
        activation_class=nn.ReLU,
        device=cfg.device,
    )
    orthogonal_(mlp, 1.0)
    return ValueOperator(mlp, in_keys=["observation", "action"])


def build_loss(
    cfg: DictConfig, actor: ProbabilisticActor, value: ValueOperator, qvalue: ValueOperator | None
) -> ClipPPOLoss:
    """``PMOEClipPPOLoss`` where a Q-network scores the experts, else TorchRL's unmodified ``ClipPPOLoss``."""
    kwargs: dict[str, Any] = {
        "clip_epsilon": cfg.loss.clip_epsilon,
        "clip_value": cfg.loss.clip_value,
        "normalize_advantage": cfg.loss.normalize_advantage,
        "critic_coeff": cfg.loss.critic_coeff,
        "loss_critic_type": cfg.loss.loss_critic_type,
        "entropy_bonus": cfg.loss.entropy_coeff > 0,
        "entropy_coeff": cfg.loss.entropy_coeff,
    }
    if qvalue is None:
        return branch_on_the_host(ClipPPOLoss(actor, value, **kwargs))
    names = ("routing_coef", "routing_loss", "num_proposals", "qvalue_coeff")
    return branch_on_the_host(
        PMOEClipPPOLoss(actor, value, qvalue, routing=cfg.routing, **{name: cfg.loss[name] for name in names}, **kwargs)
    )


def branch_on_the_host(loss: ClipPPOLoss) -> ClipPPOLoss:
    """Make the bound of the value's move a plain number.

    TorchRL keeps it as a tensor and asks whether it is zero: that waits for a GPU and cuts a compiled update in six.
    """
    bound = None if loss.clip_value is None else float(loss.clip_value)
    del loss.clip_value
    loss.clip_value = bound
    return loss


@dataclass(frozen=True)
class Agent:
    """What is trained, and the environment that it is trained in."""

    env: EnvBase
    normalization: RunningNormalization
    actor: ProbabilisticActor
    value: ValueOperator
    loss: ClipPPOLoss

    def for_raw_observations(self, policy: TensorDictModuleBase) -> NormalizedPolicy:
        """A policy of this agent that reads observations as the environment makes them."""
        return NormalizedPolicy(policy, self.normalization)


def build_env(cfg: DictConfig) -> tuple[EnvBase, RunningNormalization]:
    """The seeded environment, and what normalises its observations and rewards."""
    raw = common.make_gym(cfg.env, cfg.env_kwargs)
    device = {"serial": None, "mjx": cfg.device}.get(cfg.collector.backend, "cpu")
    normalization = RunningNormalization(
        raw.observation_space,  # type: ignore[arg-type]
        observation=cfg.normalization.observation,
        reward=cfg.normalization.reward,
        clip=cfg.normalization.clip,
        gamma=cfg.optim.gamma,
        device=device,
    )
    raw.close()
    clip_actions = cfg.actions == "unbounded"
    if device is None:
        return backends.make_env(cfg, normalization.wrap, clip_actions=clip_actions), normalization
    return normalization.transform(backends.make_env(cfg, clip_actions=clip_actions)), normalization


def build_agent(cfg: DictConfig) -> Agent:
    """Everything that a resolved config describes, seeded."""
    env, normalization = build_env(cfg)
    common.seed_everything(cfg.seed)
    spec, observation_size = env.action_spec_unbatched, env.observation_spec["observation"].shape[-1]
    actor, value = build_actor(cfg, spec, observation_size), build_value(cfg, observation_size)
    loss = build_loss(cfg, actor, value, build_qvalue(cfg, spec, observation_size) if critic_scored(cfg) else None)
    return Agent(env, normalization, actor, value, loss)


class MinibatchSampler(SamplerWithoutReplacement):
    """TorchRL's; an order that is loaded comes to the frames, on whose device later ones are drawn.

    Args:
        device: of the frames.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = device

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the order of a checkpoint."""
        order = state_dict["_sample_list"]
        super().load_state_dict({**state_dict, "_sample_list": None if order is None else order.to(self.device)})


def build_buffer(cfg: DictConfig) -> TensorDictReplayBuffer:
    """Holds the last batch of frames and hands it out in minibatches, each frame once an epoch."""
    frames = cfg.collector.frames_per_batch
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(frames, device=cfg.device),
        sampler=MinibatchSampler(cfg.device),
        batch_size=frames // cfg.loss.num_minibatches,
    )


def build_schedule(cfg: DictConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate by collected batches: linearly to zero over the run, or constant."""
    batches = -(-cfg.total_frames // cfg.collector.frames_per_batch)
    falling = cfg.optim.anneal_lr
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda batch: max(0.0, 1.0 - batch / batches) if falling else 1.0
    )


def rescale(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Set the rates to what the schedule says now: those of a checkpoint belong to another ``total_frames``."""
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)


def build_trainer(
    cfg: DictConfig,
    run_dir: Path,
    agent: Agent,
    collector: Collector,
    buffer: TensorDictReplayBuffer,
    *,
    gae: Callable[[TensorDictBase], TensorDictBase] | None = None,
    trained_on: Sequence[str] = TRAINED_ON,
) -> tuple[Trainer, torch.optim.lr_scheduler.LambdaLR]:
    """The trainer with the hooks of on-policy learning, and the schedule of its learning rates.

    Args:
        cfg: the resolved config.
        run_dir: the run's own.
        agent: what is trained.
        collector: of frames.
        buffer: made by :func:`build_buffer`.
        gae: writes the advantages; unset, TorchRL's for one policy and a value of the state.
        trained_on: what the updates read.
    """
    loss = agent.loss
    optimizer = runs.build_optimizer(cfg, loss, agent.actor)
    apart = critic_scored(cfg) and cfg.optim.qvalue_grad_clip == "apart"
    stepper = runs.build_stepper(
        cfg,
        clip_apart=[loss.qvalue_network_params.parameters()] if apart else [],
    )
    trainer = runs.build_trainer(
        cfg,
        run_dir,
        collector=collector,
        loss=loss,
        optimizer=optimizer,
        stepper=stepper,
        clip_norm=cfg.optim.max_grad_norm,
        optim_steps_per_batch=cfg.loss.num_minibatches,
        num_epochs=cfg.loss.ppo_epochs,
    )
    advantages = gae or GAE(
        gamma=cfg.optim.gamma, lmbda=cfg.loss.gae_lambda, value_network=agent.value, device=cfg.device
    )

    def estimate(batch: TensorDictBase) -> TensorDictBase:
        return advantages(batch.to(cfg.device)).select(*trained_on).reshape(-1)

    trainer.register_op("batch_process", estimate)
    replay = FlatReplay(buffer)
    trainer.register_op("batch_process", replay.extend)
    trainer.register_op("process_optim_batch", replay.sample)
    FiniteLoss(stepper).register(trainer)
    schedule = build_schedule(cfg, optimizer)
    LRSchedulerHook(schedule).register(trainer)
    trainer.register_module(NORMALIZATION, agent.normalization)
    # the order of the first epoch is drawn when the last one ends
    trainer.register_module("sampler", buffer.sampler)
    return trainer, schedule


# --------------------------------------------------------------------------------------------- training


def diagnose_agent(agent: Agent, seen: TensorDictBase) -> dict[str, float]:
    """Return of the latest episodes, entropy and diagnostics of the policy in the states ``seen``."""
    row = {"train_return": agent.normalization.train_return()}
    with torch.no_grad():
        dist = agent.actor.get_dist(seen)
        row["entropy"] = -dist.log_prob(dist.sample()).mean().item()
    return {**row, **runs.diagnose(agent.actor, seen)}


def train(cfg: DictConfig, run_dir: Path) -> None:
    """Run one training from a resolved config and leave its records in ``run_dir``."""
    agent = build_agent(cfg)
    actor = agent.actor
    collector = runs.build_collector(cfg, agent.env, actor, frames_per_batch=cfg.collector.frames_per_batch)
    buffer = build_buffer(cfg)
    trainer, schedule = build_trainer(cfg, run_dir, agent, collector, buffer)
    drawn = cfg.policy == "pmoe" and cfg.logger.eval_expert == "drawn"

    if cfg.policy == "pmoe":
        runs.watch_experts(trainer, actor, lambda: buffer[:].select("observation"))
    checkpoint = resume.checkpoint_to_resume(cfg)
    runs.train_and_record(
        cfg,
        run_dir,
        trainer,
        agent.for_raw_observations(MeanOfDrawnExpertActor(actor) if drawn else actor),
        algorithm="PPO",
        about=f"{describe(cfg, actor)}; {backends.describe(cfg)}",
        updates=updates(cfg),
        loss_columns=LOSS_COLUMNS,
        diagnose=lambda: diagnose_agent(agent, buffer[:].select("observation")),
        checkpoint=checkpoint,
        on_resume=lambda: rescale(schedule),
    )


@hydra.main(version_base="1.3", config_path="config", config_name="ppo_pmoe")
def main(cfg: DictConfig) -> None:
    """Check the config, then train."""
    resume.start_or_resume(cfg, resolve_config, train)


if __name__ == "__main__":
    common.launch(main, RULES)
