"""Soft Actor-Critic with a mixture-of-experts policy.

    python recipes/sac_pmoe.py env=Walker2d-v4

Every key is in ``recipes/config/sac_pmoe.yaml``.
"""

from __future__ import annotations

if __name__ == "__main__":
    import process

    process.begin()

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backends
import common
import hydra
import resume
import runs
import seeds
import torch
import torchrl
from common import UsageError
from omegaconf import DictConfig, OmegaConf
from policies import UNIMODAL, build_experts_actor, describe
from rules import Rule, choice, either, flag, integer, number, text
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictModuleBase, add_custom_mapping
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
    TensorSpec,
)
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import SelectKeys

from torchrl_pmoe import BestOfExpertsActor, MeanOfDrawnExpertActor, PMOESACLoss
from torchrl_pmoe.modules.heads import ClampedExp
from torchrl_pmoe.objectives import score_proposals
from torchrl_pmoe.trainers import FiniteLoss, FlatReplay

RULES: dict[str, Rule] = {
    **common.RULES,
    "recipe": choice("sac_pmoe"),
    "scoring": either(choice("critic", "gradient"), None),
    "routing": either(
        choice("frequency", "soft_frequency", "gumbel_softmax", "score_function", "marginal", "none"), None
    ),
    "backprop": either(choice("max", "all", "routed", "weighted"), None),
    "score": either(choice("mixture", "expert"), None),
    "acting": either(choice("policy", "best_of_experts"), None),
    "network.router": either(choice("detached", "shared", "separate"), None),
    "network.log_std_min": number(),
    "network.log_std_max": number(),
    "network.head_init": number(above=0),
    "num_seeds": integer(1, 1024),
    "optim.batch_size": integer(1, 2**24),
    "optim.utd_ratio": number(above=0),
    "optim.loss_function": choice("l2", "l1", "smooth_l1"),
    "optim.target_update_polyak": number(at_least=0.5, at_most=1),
    "optim.alpha_init": number(above=0),
    "optim.fixed_alpha": flag(),
    "optim.target_entropy": either(number(), "auto"),
    "collector.frames_per_batch": either(integer(1, 2**31 - 1), None),
    "collector.init_random_frames": integer(0),
    "loss.decoupled": flag(),
    "loss.entropy_from": either(choice("policy", "winner"), None),
    "loss.temperature": number(above=0),
    "loss.straight_through": flag(),
    "replay_buffer.size": integer(1, 2**31 - 1),
    "replay_buffer.prb": flag(),
    "replay_buffer.scratch_dir": either(text(), None),
    "checkpoint.replay_buffer": flag(),
}

PAPER = {
    "scoring": "critic",
    "routing": "frequency",
    "backprop": "max",
    "score": "expert",
    "acting": "policy",
    "loss.entropy_from": "winner",
    "logger.eval_expert": "drawn",
}
# the highest return measured (README): the paper's routing, the policy's own entropy, the expert of largest weight
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

Measured on the bandits whose optimum is known, but for ``frequency``, which has the highest return (README). The first
row that fits what a config names is taken; what it names besides stays.
"""
PAPER_NUM_EXPERTS = {"HalfCheetah": 2, "Humanoid": 10, "HumanoidStandup": 10}
STORED = ["observation", "action", *[("next", key) for key in ("observation", "reward", "done", "terminated")]]
NEEDED = {"replay_buffer": "the replay buffer (checkpoint.replay_buffer=true)"}
DIAGNOSED_STATES = 1000


# --------------------------------------------------------------------------------------------- config


def resolve_config(cfg: DictConfig) -> None:
    """Check the config and fill in what it leaves to the preset, the defaults or the environment."""
    common.check_config(cfg, RULES)
    fills: Mapping[str, str | None] = DEFAULTS if cfg.policy in UNIMODAL else partners(cfg)
    if cfg.preset == "paper":
        fills = PAPER
    common.fill_preset(cfg, PAPER, fills, PAPER_NUM_EXPERTS, for_unimodal=("acting",))
    if cfg.network.router is None:
        cfg.network.router = "detached" if cfg.policy == "pmoe" else "shared"
    if cfg.collector.frames_per_batch is None:
        cfg.collector.frames_per_batch = cfg.collector.num_envs
    _refuse_combinations(cfg)
    backends.refuse(cfg)
    if cfg.num_seeds > 1:
        seeds.refuse(cfg)
    runs.resolve_compile(cfg, updates(cfg))


def updates(cfg: DictConfig) -> float:
    """How many updates a run of ``total_frames`` makes."""
    return cfg.total_frames * cfg.optim.utd_ratio


def partners(cfg: DictConfig) -> Mapping[str, str | None]:
    """The values of the keys that a config leaves null, as its scoring and its routing did best with."""
    for (scoring, routing), others in PARTNERS.items():
        if cfg.scoring in (None, scoring) and cfg.routing in (None, routing):
            return {**DEFAULTS, "scoring": scoring, "routing": routing, **others}
    allowed = ", ".join(routing for scoring, routing in PARTNERS if scoring == cfg.scoring)
    raise UsageError(f"routing={cfg.routing}: must be one of {allowed} with scoring={cfg.scoring}")


def combination(cfg: DictConfig) -> str:
    """What a resolved config trains a mixture by, as on a command line; nothing for other policies."""
    keys = (*DEFAULTS, "loss.decoupled") if cfg.policy == "pmoe" else ()
    given = {key: OmegaConf.select(cfg, key) for key in keys}
    return " ".join(f"{key}={value}" for key, value in given.items() if value not in (None, False))


def _refuse_combinations(cfg: DictConfig) -> None:
    steps = cfg.optim.utd_ratio * cfg.collector.frames_per_batch
    refused: dict[str, tuple[bool, str]] = {
        "backprop": (
            cfg.scoring == "gradient" and cfg.backprop is not None,
            "null with scoring=gradient, where the loss's own draw carries the gradient",
        ),
        "loss.entropy_from": (
            cfg.scoring == "gradient" and cfg.loss.entropy_from is not None,
            "null with scoring=gradient, where the temperature sees the loss's own draw",
        ),
        "loss.decoupled": (
            cfg.policy == "pmoe" and cfg.loss.decoupled and (cfg.backprop != "max" or cfg.preset == "paper"),
            f"false with {'preset=paper' if cfg.preset == 'paper' else f'backprop={cfg.backprop}'}; "
            "only max selects an expert by score",
        ),
        "blend": (
            cfg.policy != "gating" and cfg.blend != "parameters",
            f"parameters with policy={cfg.policy}; only gating blends",
        ),
        "loss.temperature": (
            cfg.routing != "gumbel_softmax" and cfg.loss.temperature != 1,
            f"1 with routing={cfg.routing}; only gumbel_softmax has one",
        ),
        "loss.straight_through": (
            cfg.routing != "gumbel_softmax" and not cfg.loss.straight_through,
            f"true with routing={cfg.routing}; only gumbel_softmax has a draw to relax",
        ),
        "score": (
            cfg.routing == "gumbel_softmax" and not cfg.loss.straight_through and cfg.score == "expert",
            "mixture with loss.straight_through=false, a blend of draws is no expert's",
        ),
        "loss.routing_loss": (
            cfg.scoring == "gradient" and cfg.loss.routing_loss != "brier",
            "brier with scoring=gradient",
        ),
        "loss.num_proposals": (
            cfg.scoring == "gradient" and cfg.loss.num_proposals != 1,
            "1 with scoring=gradient",
        ),
        "acting": (
            cfg.policy in UNIMODAL and cfg.acting == "best_of_experts",
            f"policy with policy={cfg.policy}, which {UNIMODAL.get(cfg.policy)}",
        ),
        "optim.router_lr": (
            cfg.policy == "gaussian" and cfg.optim.router_lr is not None,
            "null with policy=gaussian, which has no router",
        ),
        "logger.eval_expert": (
            cfg.acting == "best_of_experts" and cfg.logger.eval_expert != "largest",
            "largest or null with acting=best_of_experts, which takes the critics' choice",
        ),
        "network.log_std_min": (
            cfg.network.log_std_min >= cfg.network.log_std_max,
            f"below network.log_std_max={cfg.network.log_std_max}",
        ),
        "collector.frames_per_batch": (
            cfg.collector.frames_per_batch % cfg.collector.num_envs != 0,
            f"a multiple of collector.num_envs={cfg.collector.num_envs}",
        ),
        "optim.utd_ratio": (
            steps < 1 or abs(steps - round(steps)) > 1e-6,
            f"a whole number of steps per batch of collector.frames_per_batch={cfg.collector.frames_per_batch}",
        ),
    }
    common.refuse(cfg, refused)


def refuse_target_entropy(cfg: DictConfig, action_size: int) -> None:
    """Raise where no policy has the target entropy: the temperature would grow for ever.

    Args:
        cfg: a checked config.
        action_size: dimensions of the action, each of which is in ``[-1, 1]``.

    Raises:
        UsageError: the line for ``optim.target_entropy``.
    """
    target, largest = cfg.optim.target_entropy, action_size * math.log(2)
    allowed = f"auto or at most {largest:.4g}, the entropy of the uniform distribution between the action's bounds"
    common.refuse(cfg, {"optim.target_entropy": (target != "auto" and target > largest, allowed)})


# --------------------------------------------------------------------------------------------- parts


def build_actor(cfg: DictConfig, spec: TensorSpec, observation_size: int) -> ProbabilisticActor:
    """The policy: an actor of several experts, or TorchRL's own TanhNormal actor of the same size."""
    net = cfg.network
    if cfg.policy != "gaussian":
        distribution_kwargs: dict[str, Any] = {"score": cfg.score}
        if cfg.scoring == "gradient":
            distribution_kwargs.update(
                routing=cfg.routing,
                routing_coef=cfg.loss.routing_coef,
                temperature=cfg.loss.temperature,
                straight_through=cfg.loss.straight_through,
            )
        return build_experts_actor(
            cfg,
            spec,
            mixture={"distribution_kwargs": distribution_kwargs},
            blended={},
            in_features=observation_size,
            num_cells=tuple(net.hidden_sizes),
            activation_class=common.ACTIVATIONS[net.activation],
            router=net.router,
            scale_mapping=ClampedExp(net.log_std_min, net.log_std_max),
            head_init=net.head_init,
        )
    add_custom_mapping("clamped_exp", ClampedExp(net.log_std_min, net.log_std_max))
    mlp = MLP(
        in_features=observation_size,
        out_features=2 * spec.shape[-1],
        num_cells=list(net.hidden_sizes),
        activation_class=common.ACTIVATIONS[net.activation],
        device=cfg.device,
    )
    for parameter in mlp[-1].parameters():
        nn.init.uniform_(parameter, -net.head_init, net.head_init)
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(mlp, NormalParamExtractor("clamped_exp", scale_lb=0.0)), ["observation"], ["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        spec=spec.to(cfg.device),
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low.to(cfg.device), "high": spec.space.high.to(cfg.device)},
        default_interaction_type=ExplorationType.RANDOM,
    )


def build_qvalue(cfg: DictConfig, spec: TensorSpec, observation_size: int) -> ValueOperator:
    """A critic over observation and action."""
    return ValueOperator(
        MLP(
            in_features=observation_size + spec.shape[-1],
            out_features=1,
            num_cells=list(cfg.network.hidden_sizes),
            activation_class=common.ACTIVATIONS[cfg.network.activation],
            device=cfg.device,
        ),
        in_keys=["observation", "action"],
    )


def build_loss(cfg: DictConfig, actor: ProbabilisticActor, qvalue: ValueOperator) -> SACLoss:
    """``PMOESACLoss`` where the critics score the experts, else TorchRL's unmodified ``SACLoss``."""
    refuse_target_entropy(cfg, actor.spec["action"].shape[-1])
    kwargs: dict[str, Any] = {
        "num_qvalue_nets": 2,
        "loss_function": cfg.optim.loss_function,
        "alpha_init": cfg.optim.alpha_init,
        "fixed_alpha": cfg.optim.fixed_alpha,
        "target_entropy": cfg.optim.target_entropy,
    }
    if cfg.policy == "pmoe" and cfg.scoring == "critic":
        names = ("routing_coef", "routing_loss", "num_proposals", "decoupled", "entropy_from")
        kwargs.update({name: cfg.loss[name] for name in names})
        loss = PMOESACLoss(actor, qvalue, routing=cfg.routing, backprop=cfg.backprop, **kwargs)
    else:
        loss = SACLoss(actor, qvalue, **kwargs)
    loss.make_value_estimator(gamma=cfg.optim.gamma)
    return loss


def build_replay_buffer(cfg: DictConfig, device: torch.device | str = "cpu") -> TensorDictReplayBuffer:
    """A buffer of single steps, uniform or prioritised.

    Args:
        cfg: a resolved config.
        device: of the steps, where they are kept in memory.
    """
    size, scratch_dir = cfg.replay_buffer.size, cfg.replay_buffer.scratch_dir
    storage: LazyTensorStorage = (
        LazyTensorStorage(size, device=device)
        if scratch_dir is None
        # a run that goes on finds the files of the one before, and fills them from its checkpoint
        else LazyMemmapStorage(size, scratch_dir=scratch_dir, existsok=True)
    )
    if cfg.replay_buffer.prb:
        try:
            return TensorDictPrioritizedReplayBuffer(
                alpha=0.7, beta=0.5, storage=storage, batch_size=cfg.optim.batch_size
            )
        except RuntimeError as error:
            raise UsageError(
                f"replay_buffer.prb=True: must be false with torch {torch.__version__}, with which the compiled "
                f"extension of torchrl {torchrl.__version__} does not load (README, Versions)"
            ) from error
    return TensorDictReplayBuffer(storage=storage, batch_size=cfg.optim.batch_size)


def build_policies(
    cfg: DictConfig, actor: ProbabilisticActor, loss: SACLoss
) -> tuple[TensorDictModuleBase, TensorDictModuleBase]:
    """What explores, and what is evaluated."""
    if cfg.acting == "best_of_experts":
        policy = BestOfExpertsActor(actor, lambda states, action: score_proposals(loss, states, action))
        return policy, policy
    if cfg.policy == "pmoe" and cfg.logger.eval_expert == "drawn":
        return actor, MeanOfDrawnExpertActor(actor)
    return actor, actor


# --------------------------------------------------------------------------------------------- training


LOSS_COLUMNS = ("loss_actor", "loss_qvalue", "loss_alpha", "loss_routing", "alpha", "entropy")


def build_trainer(
    cfg: DictConfig,
    collector: Collector,
    loss: SACLoss,
    optimizer: torch.optim.Optimizer,
    buffer: TensorDictReplayBuffer,
    run_dir: Path,
) -> Trainer:
    """The trainer with the hooks of off-policy learning."""
    target_updater = SoftUpdate(loss, eps=cfg.optim.target_update_polyak)
    stepper = runs.build_stepper(cfg, target_updater)
    trainer = runs.build_trainer(
        cfg,
        run_dir,
        collector=collector,
        loss=loss,
        optimizer=optimizer,
        stepper=stepper,
        optim_steps_per_batch=max(1, round(cfg.optim.utd_ratio * collector.requested_frames_per_batch)),
        replay_buffer=buffer,
        target_net_updater=target_updater,
    )
    SelectKeys(STORED).register(trainer)
    replay = FlatReplay(buffer, device=None if cfg.device == "cpu" else cfg.device)
    trainer.register_op("batch_process", replay.extend)
    trainer.register_op("process_optim_batch", replay.sample)
    if cfg.replay_buffer.prb:
        with warnings.catch_warnings():
            # "will be replaced by OptimizationStepper": ours calls this hook
            warnings.simplefilter("ignore", FutureWarning)
            trainer.register_op("post_loss", replay.update_priority)
    FiniteLoss(stepper).register(trainer)
    return trainer


def latest(buffer: TensorDictReplayBuffer) -> TensorDictBase:
    """The steps that were stored last."""
    stop, number = buffer.write_count, min(len(buffer), DIAGNOSED_STATES)
    return buffer.storage.get(torch.arange(stop - number, stop) % buffer.storage.max_size)


def diagnose(actor: ProbabilisticActor, loss: SACLoss, states: TensorDictBase) -> dict[str, float]:
    """Diagnostics of a policy in the states that it has met, its proposals judged by the critics."""
    return runs.diagnose(actor, states, lambda action: score_proposals(loss, states, action, per_critic=True))


def about(cfg: DictConfig, actor: ProbabilisticActor, loss: SACLoss) -> str:
    """One line on what is about to be trained, and how."""
    parts = (describe(cfg, actor, loss.qvalue_network_params), combination(cfg))
    return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Trained:
    """What a training leaves in memory."""

    actor: ProbabilisticActor
    buffer: TensorDictReplayBuffer


def train(cfg: DictConfig, run_dir: Path, env: EnvBase | None = None, *, only_if_unfinished: bool = False) -> Trained:
    """Run one training from a resolved config and leave its records in ``run_dir``.

    Args:
        cfg: the config.
        run_dir: of the run.
        env: seeded, of ``collector.num_envs`` agents; made from ``env`` of the config if not given.
        only_if_unfinished: a checkpoint that has all frames is loaded, and no more than that.
    """
    if env is None:
        env = backends.make_env(cfg)
    common.seed_everything(cfg.seed)
    spec, observation_size = env.action_spec_unbatched, env.observation_spec["observation"].shape[-1]
    actor = build_actor(cfg, spec, observation_size)
    loss = build_loss(cfg, actor, build_qvalue(cfg, spec, observation_size))
    buffer = build_replay_buffer(cfg, env.device or "cpu")
    explorer, evaluated = build_policies(cfg, actor, loss)
    collector = runs.build_collector(
        cfg,
        env,
        explorer,
        frames_per_batch=min(
            cfg.collector.frames_per_batch,
            -(-cfg.total_frames // cfg.collector.num_envs) * cfg.collector.num_envs,
        ),
        init_random_frames=cfg.collector.init_random_frames,
    )
    # the networks have drawn as many numbers as they have weights: every policy warms up with the same random actions
    common.seed_everything(cfg.seed)
    trainer = build_trainer(cfg, collector, loss, runs.build_optimizer(cfg, loss, actor), buffer, run_dir)

    if cfg.policy == "pmoe":
        runs.watch_experts(trainer, actor, lambda: latest(buffer).select("observation").to(cfg.device))

    def diagnose_run() -> dict[str, float]:
        states = buffer[torch.randint(len(buffer), (DIAGNOSED_STATES,))].select("observation").to(cfg.device)
        return diagnose(actor, loss, states)

    runs.train_and_record(
        cfg,
        run_dir,
        trainer,
        evaluated,
        algorithm="SAC",
        about=f"{about(cfg, actor, loss)}; {backends.describe(cfg)}",
        updates=updates(cfg),
        loss_columns=LOSS_COLUMNS,
        diagnose=diagnose_run,
        unsaved=() if cfg.checkpoint.replay_buffer else ("replay_buffer",),
        checkpoint=resume.checkpoint_to_resume(cfg, NEEDED),
        only_if_unfinished=only_if_unfinished,
    )
    return Trained(actor, buffer)


@hydra.main(version_base="1.3", config_path="config", config_name="sac_pmoe")
def main(cfg: DictConfig) -> None:
    """Check the config, then train."""
    resume.start_or_resume(
        cfg, resolve_config, lambda cfg, run: (seeds.train if cfg.num_seeds > 1 else train)(cfg, run)
    )


if __name__ == "__main__":
    common.launch(main, RULES)
