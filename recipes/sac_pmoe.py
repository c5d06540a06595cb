"""Soft Actor-Critic with a mixture-of-experts policy.

    python recipes/sac_pmoe.py env=Walker2d-v4

``--help`` prints every key.
"""

from __future__ import annotations

if __name__ == "__main__":
    from parts import process

    process.begin()

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hydra
from config.sac_pmoe import SACConfig, combination, refuse_target_entropy, resolve
from omegaconf import DictConfig
from parts import off_policy
from parts.launch import keep_config, launch, start_or_resume
from parts.networks import POLICIES, UNIMODAL, build_qvalue, describe
from parts.recording import Agent, mean_columns, train_and_record
from parts.resume import checkpoint_to_resume
from parts.training import (
    build_collector,
    build_optimizer,
    build_trainer,
    seed_everything,
    watch_experts,
)
from tensordict.nn import TensorDictModuleBase
from torchrl.data import TensorDictReplayBuffer, TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import SACLoss, SoftUpdate

from torchrl_pmoe import BestOfExpertsActor, CommittedExpertsActor, MeanOfDrawnExpertActor
from torchrl_pmoe.envs import make_env
from torchrl_pmoe.envs.making import try_env
from torchrl_pmoe.objectives import score_proposals
from torchrl_pmoe.runs.acting import Kind
from torchrl_pmoe.runs.evaluation import isolated_rng
from torchrl_pmoe.trainers import EpisodeReturns, FusedOptimizationStepper


@dataclass(frozen=True)
class Trained:
    """What a training leaves in memory."""

    actor: ProbabilisticActor
    buffer: TensorDictReplayBuffer


def build_agent(cfg: SACConfig, spec: TensorSpec, observation_size: int) -> tuple[ProbabilisticActor, SACLoss]:
    """The policy, and the loss with its critics."""
    refuse_target_entropy(cfg, spec.shape[-1])
    actor = POLICIES[cfg.policy](cfg.actor_options(spec, observation_size))
    net = cfg.network
    qvalue = build_qvalue(observation_size + spec.shape[-1], net.hidden_sizes, net.activation, cfg.device)
    loss = off_policy.build_loss(
        actor, qvalue, gamma=cfg.optim.gamma, sac=cfg.loss_kwargs(), routing=cfg.routing_kwargs()
    )
    return actor, loss


def explorer_and_evaluated(
    cfg: SACConfig, actor: ProbabilisticActor, loss: SACLoss
) -> tuple[TensorDictModuleBase, TensorDictModuleBase]:
    """The policy that collects frames, and the one that is evaluated."""
    if cfg.acting == "best_of_experts":
        best = BestOfExpertsActor(actor, partial(score_proposals, loss))
        return best, best
    if cfg.acting == "committed":
        # an evaluation asks for deterministic actions: then the drawn expert acts by its mean
        committed = CommittedExpertsActor(actor, commit_steps=cfg.commitment)
        return committed, committed
    drawn = cfg.policy not in UNIMODAL and cfg.logger.eval_expert == "drawn"
    return actor, MeanOfDrawnExpertActor(actor) if drawn else actor


def train(
    cfg: SACConfig,
    run_dir: Path,
    create_env: Callable[..., EnvBase] | None = None,
    *,
    only_if_unfinished: bool = False,
) -> Trained:
    """Run one training and leave its records in ``run_dir``.

    Args:
        cfg: resolved.
        run_dir: of the run.
        create_env: makes ``num_envs`` environments on a ``device``; made from the config if not given.

    Keyword Args:
        only_if_unfinished: a checkpoint that has all frames is loaded, and no more than that.
    """
    if create_env is None:
        try_env(cfg.env, cfg.env_kwargs)
        cfg.choose_backend()
        env = make_env(cfg.env, **cfg.environments())
    else:
        env = create_env(num_envs=cfg.environments()["num_envs"], device=cfg.device)
    seed_everything(cfg.seed)
    actor, loss = build_agent(cfg, env.action_spec_unbatched, env.observation_spec["observation"].shape[-1])
    explorer, evaluated = explorer_and_evaluated(cfg, actor, loss)
    transforms = []
    if isinstance(explorer, CommittedExpertsActor):
        transforms.append(explorer.make_tensordict_primer)
        env = env.append_transform(explorer.make_tensordict_primer())

    buffer = off_policy.build_replay_buffer(
        cfg.replay_buffer.size,
        cfg.optim.batch_size,
        device=env.device or "cpu",
        scratch_dir=cfg.replay_buffer.scratch_dir,
        prioritized=cfg.replay_buffer.prb,
    )
    collector = build_collector(
        env,
        explorer,
        frames_per_batch=cfg.frames_per_batch,
        init_random_frames=cfg.collector.init_random_frames,
        device=cfg.device,
        ray=cfg.ray_options(create_env),
        transforms=transforms,
        keys=off_policy.STORED,
    )
    # the networks have drawn as many numbers as they have weights: every policy warms up with the same random actions
    seed_everything(cfg.seed)

    targets = SoftUpdate(loss, eps=cfg.optim.target_update_polyak)
    optimizer = build_optimizer(loss, actor, **cfg.optim.adam())
    stepper = FusedOptimizationStepper(targets, **cfg.stepping())
    trainer = build_trainer(
        run_dir,
        collector=collector,
        total_frames=cfg.total_frames,
        loss=loss,
        optimizer=optimizer,
        stepper=stepper,
        checkpoints=cfg.checkpoint_options(),
        seed=cfg.seed,
        optim_steps_per_batch=max(1, round(cfg.optim.utd_ratio * collector.requested_frames_per_batch)),
        replay_buffer=buffer,
        target_net_updater=targets,
    )
    returns = EpisodeReturns(num_envs=cfg.collector.num_envs)
    returns.register(trainer)
    off_policy.replay_steps(trainer, buffer, cfg.device, prioritized=cfg.replay_buffer.prb)
    if cfg.policy not in UNIMODAL:
        watch_experts(trainer, actor, lambda: off_policy.latest(buffer).select("observation").to(cfg.device))

    def measure() -> list[dict[str, float]]:
        row = mean_columns(stepper, off_policy.LOSS_COLUMNS)
        with isolated_rng(cfg.seed):
            states = off_policy.some(buffer).select("observation").to(cfg.device)
            return [{**row, **off_policy.diagnose(actor, loss, states)}]

    train_and_record(
        trainer,
        run_dir,
        [as_agent(cfg, run_dir, cfg.seed, actor, loss, evaluated)],
        measure,
        about=about(cfg, actor, loss),
        train_return=returns.mean,
        **cfg.recording(),
        checkpoint=checkpoint_to_resume(cfg.resume, off_policy.NEEDED_TO_RESUME),
        begin=lambda: keep_config(cfg, run_dir),
        only_if_unfinished=only_if_unfinished,
    )
    return Trained(actor, buffer)


def as_agent(
    cfg: SACConfig,
    directory: Path,
    seed: int,
    actor: ProbabilisticActor,
    loss: SACLoss,
    evaluated: TensorDictModuleBase,
) -> Agent:
    """What is recorded of an agent."""
    kinds: dict[type, Kind] = {MeanOfDrawnExpertActor: "drawn", CommittedExpertsActor: "committed"}
    return Agent(
        evaluated,
        seed,
        directory,
        f"SAC, {cfg.policy}, {cfg.env}, seed {seed}",
        actor,
        kind=kinds.get(type(evaluated), "deterministic"),
        commit_steps=cfg.commitment,
        critics=loss if cfg.acting == "best_of_experts" else None,
    )


def about(cfg: SACConfig, actor: ProbabilisticActor, loss: SACLoss, where: str | None = None) -> str:
    """One line on what is about to be trained, how, and where frames come from."""
    what = describe(cfg.env, cfg.policy, actor, loss.qvalue_network_params)
    return "; ".join(part for part in (what, combination(cfg), where or cfg.collector.described()) if part)


@hydra.main(version_base="1.3", config_path="config", config_name="sac_pmoe")
def main(cfg: DictConfig) -> None:
    """Check the config, then train."""
    start_or_resume(cfg, SACConfig, resolve, train)


if __name__ == "__main__":
    launch(main, SACConfig)
