"""Proximal Policy Optimisation with a mixture-of-experts policy.

    python recipes/ppo_pmoe.py env=Walker2d-v4

``--help`` prints every key.
"""

from __future__ import annotations

if __name__ == "__main__":
    from parts import process

    process.begin()

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
from config.ppo_pmoe import OnPolicyConfig, PPOConfig, resolve
from omegaconf import DictConfig
from parts.launch import keep_config, launch, start_or_resume
from parts.networks import POLICIES, UNIMODAL, build_qvalue, build_value, describe, orthogonal_, orthogonal_policy_
from parts.on_policy import (
    branch_on_the_host,
    build_buffer,
    build_on_policy_trainer,
    build_schedule,
    diagnose,
    rescale,
)
from parts.recording import Agent, mean_columns, train_and_record
from parts.resume import checkpoint_to_resume
from parts.training import (
    build_collector,
    build_optimizer,
    seed_everything,
    watch_experts,
)
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from torchrl_pmoe import MeanOfDrawnExpertActor, PMOEClipPPOLoss
from torchrl_pmoe.envs import NormalizedPolicy, NormalizeObservationAndReward, make_env
from torchrl_pmoe.envs.making import try_env
from torchrl_pmoe.runs.evaluation import isolated_rng
from torchrl_pmoe.trainers import FusedOptimizationStepper

TRAINED_ON = ["observation", "action", "action_log_prob", "advantage", "value_target", "state_value"]
LOSS_COLUMNS = (
    "loss_objective",
    "loss_critic",
    "loss_qvalue",
    "loss_routing",
    "explained_variance",
    "clip_fraction",
    "kl_approx",
)


def build_env(cfg: OnPolicyConfig) -> tuple[EnvBase, NormalizeObservationAndReward]:
    """The seeded environment, and what normalises its observations and rewards."""
    try_env(cfg.env, cfg.env_kwargs)
    cfg.choose_backend()
    env = make_env(cfg.env, clip_actions=cfg.actions == "unbounded", **cfg.environments())
    normalization = cfg.make_normalization()()
    return env.append_transform(normalization), normalization


def build_agent(
    cfg: PPOConfig, spec: TensorSpec, observation_size: int
) -> tuple[ProbabilisticActor, ValueOperator, ClipPPOLoss]:
    """The policy, the value, and the loss; a Q-network in it where one scores the experts."""
    net = cfg.network
    actor = POLICIES[cfg.policy](cfg.actor_options(spec, observation_size))
    orthogonal_policy_(actor, net.head_gain, net.log_std_init)
    value = build_value(observation_size, net.hidden_sizes, net.activation, cfg.device)
    orthogonal_(value, 1.0)
    bonus: dict[str, Any] = {"entropy_bonus": cfg.loss.entropy_coeff > 0}
    if not cfg.critic_scored:
        return actor, value, branch_on_the_host(ClipPPOLoss(actor, value, **cfg.loss_kwargs(), **bonus))
    qvalue = build_qvalue(observation_size + spec.shape[-1], net.qvalue_hidden_sizes, device=cfg.device)
    orthogonal_(qvalue, 1.0)
    loss = PMOEClipPPOLoss(actor, value, qvalue, **cfg.routing_kwargs(), **cfg.loss_kwargs(), **bonus)
    return actor, value, branch_on_the_host(loss)


def train(cfg: PPOConfig, run_dir: Path) -> None:
    """Run one training and leave its records in ``run_dir``."""
    env, normalization = build_env(cfg)
    seed_everything(cfg.seed)
    actor, value, loss = build_agent(cfg, env.action_spec_unbatched, env.observation_spec["observation"].shape[-1])

    frames = cfg.collector.frames_per_batch
    collector = build_collector(
        env,
        actor,
        frames_per_batch=frames,
        device=cfg.device,
        ray=cfg.ray_options(clip_actions=cfg.actions == "unbounded"),
        transforms=[cfg.make_normalization()],
        normalization=normalization,
    )
    buffer = build_buffer(frames, cfg.device)
    optimizer = build_optimizer(loss, actor, **cfg.optim.adam())
    schedule = build_schedule(optimizer, -(-cfg.total_frames // frames), falling=cfg.optim.anneal_lr)
    apart: list[Iterable[nn.Parameter]] = []
    if cfg.critic_scored and cfg.optim.qvalue_grad_clip == "apart":
        apart = [loss.qvalue_network_params.parameters()]
    stepper = FusedOptimizationStepper(clip_apart=apart, **cfg.stepping())
    trainer = build_on_policy_trainer(
        run_dir,
        collector=collector,
        buffer=buffer,
        advantages=GAE(gamma=cfg.optim.gamma, lmbda=cfg.loss.gae_lambda, value_network=value, device=cfg.device),
        trained_on=TRAINED_ON,
        normalization=normalization,
        optimizer=optimizer,
        schedule=schedule,
        device=cfg.device,
        total_frames=cfg.total_frames,
        loss=loss,
        stepper=stepper,
        checkpoints=cfg.checkpoint_options(),
        seed=cfg.seed,
        clip_norm=cfg.optim.max_grad_norm,
        num_minibatches=cfg.loss.num_minibatches,
        num_epochs=cfg.loss.ppo_epochs,
    )
    if cfg.policy not in UNIMODAL:
        watch_experts(trainer, actor, lambda: buffer[:].select("observation"))

    def measure() -> list[dict[str, float]]:
        row = mean_columns(stepper, LOSS_COLUMNS)
        with isolated_rng(cfg.seed):
            return [{**row, **diagnose(actor, normalization, buffer[:].select("observation"))}]

    drawn = cfg.policy not in UNIMODAL and cfg.logger.eval_expert == "drawn"
    acting = MeanOfDrawnExpertActor(actor) if drawn else actor
    agent = Agent(
        NormalizedPolicy(acting, normalization.normalize),
        cfg.seed,
        run_dir,
        f"PPO, {cfg.policy}, {cfg.env}, seed {cfg.seed}",
        actor,
        kind="drawn" if drawn else "deterministic",
        normalization=normalization,
    )
    train_and_record(
        trainer,
        run_dir,
        [agent],
        measure,
        about=f"{describe(cfg.env, cfg.policy, actor)}; {cfg.collector.described()}",
        train_return=normalization.train_return,
        **cfg.recording(),
        checkpoint=checkpoint_to_resume(cfg.resume),
        on_resume=lambda: rescale(schedule),
        begin=lambda: keep_config(cfg, run_dir),
    )


@hydra.main(version_base="1.3", config_path="config", config_name="ppo_pmoe")
def main(cfg: DictConfig) -> None:
    """Check the config, then train."""
    start_or_resume(cfg, PPOConfig, resolve, train)


if __name__ == "__main__":
    launch(main, PPOConfig)
