"""Soft Actor-Critic for several agents in one process: their updates, policies and data side by side.

    python recipes/sac_many_seeds.py env=Walker2d-v4 num_seeds=8

``--help`` prints every key. Each agent is the one that ``sac_pmoe.py`` would train with its seed.
"""

from __future__ import annotations

if __name__ == "__main__":
    from parts import process

    process.begin()

from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from config.sac_many_seeds import ManySeedsConfig, resolve
from omegaconf import DictConfig
from parts import off_policy
from parts.launch import keep_config, launch, start_or_resume
from parts.off_policy import DIAGNOSED_STATES, LOSS_COLUMNS, NEEDED_TO_RESUME, STORED
from parts.recording import train_and_record
from parts.resume import checkpoint_to_resume
from parts.training import (
    build_collector,
    build_optimizer,
    build_trainer,
    seed_everything,
)
from sac_pmoe import about, as_agent, build_agent, explorer_and_evaluated
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import RandomSampler, TensorDictReplayBuffer
from torchrl.envs import EnvBase, SerialEnv
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import SACLoss, SoftUpdate
from torchrl.trainers.trainers import SelectKeys

from torchrl_pmoe.envs import make_env
from torchrl_pmoe.envs.making import try_env
from torchrl_pmoe.objectives import StackedLoss, StackedPolicy
from torchrl_pmoe.runs.evaluation import isolated_rng
from torchrl_pmoe.trainers import EpisodeReturns, FlatReplay, FusedOptimizationStepper


class SeedSampler(RandomSampler):
    """Draws ``batch_size`` rows of every agent, of a storage that holds their rows in turn.

    Args:
        num_seeds: how many agents.
    """

    def __init__(self, num_seeds: int) -> None:
        super().__init__()
        self.num_seeds = num_seeds

    def sample(self, storage: Any, batch_size: int) -> tuple[Tensor, dict]:
        """Indices ``[num_seeds * batch_size]``, the first agent's first, each drawn for itself."""
        steps = len(storage) // self.num_seeds
        drawn = torch.randint(steps, (self.num_seeds, batch_size), device=storage.device)
        own = torch.arange(self.num_seeds, device=storage.device).unsqueeze(-1)
        return (drawn * self.num_seeds + own).flatten(), {}


class SeedReplay(FlatReplay):
    """Stores one step of every agent after the other, and hands out batches ``[num_seeds, batch_size]``."""

    def __init__(self, buffer: TensorDictReplayBuffer, num_seeds: int, device: str | None) -> None:
        super().__init__(buffer, device=device)
        self.num_seeds = num_seeds

    def extend(self, batch: TensorDictBase) -> TensorDictBase:
        """Store collected frames ``[num_seeds * N, T]``."""
        steps = batch.reshape(self.num_seeds, -1, batch.shape[-1]).permute(2, 1, 0)  # [T, N, num_seeds]
        return super().extend(steps.contiguous())

    def sample(self, batch: TensorDictBase) -> TensorDictBase:
        """A batch for every agent."""
        return super().sample(batch).reshape(self.num_seeds, -1)


def make_envs(cfg: ManySeedsConfig) -> EnvBase:
    """The environments of all agents in one batch, those of the first agent first; seeded as in runs of their own."""
    try_env(cfg.env, cfg.env_kwargs)
    cfg.choose_backend(cfg.num_seeds)
    options = cfg.environments(cfg.num_seeds)
    if options["num_envs"] == 1 and options["backend"] in ("serial", "threads"):
        # a single environment has no batch dimension, and the agents' has one
        return SerialEnv(1, partial(make_env, cfg.env, **options))
    return make_env(cfg.env, runs=cfg.num_seeds, **options)


def build_agents(cfg: ManySeedsConfig, env: EnvBase) -> list[tuple[ProbabilisticActor, SACLoss]]:
    """Policy and loss of every agent, each made under its own seed."""
    spec, observation_size = env.action_spec_unbatched, env.observation_spec["observation"].shape[-1]
    agents = []
    for seed in range(cfg.seed, cfg.seed + cfg.num_seeds):
        seed_everything(seed)
        agents.append(build_agent(cfg, spec, observation_size))
    return agents


def train(cfg: ManySeedsConfig, run_dir: Path) -> None:
    """Train ``num_seeds`` agents at once; leave ``seed<n>/metrics.csv`` of each in ``run_dir``."""
    env, number = make_envs(cfg), cfg.num_seeds
    built = build_agents(cfg, env)
    agents = [
        as_agent(cfg, run_dir / f"seed{seed}", seed, actor, loss, explorer_and_evaluated(cfg, actor, loss)[1])
        for seed, (actor, loss) in enumerate(built, cfg.seed)
    ]
    loss = StackedLoss([loss for _, loss in built])
    seed_everything(cfg.seed)

    buffer = off_policy.build_replay_buffer(
        cfg.replay_buffer.size * number, cfg.optim.batch_size, device=env.device or "cpu"
    )
    buffer.set_sampler(SeedSampler(number))
    replay = SeedReplay(buffer, number, device=None if cfg.device == "cpu" else cfg.device)
    collector = build_collector(
        env,
        StackedPolicy(loss),
        frames_per_batch=cfg.frames_per_batch * number,
        init_random_frames=cfg.collector.init_random_frames * number,
        device=cfg.device,
    )
    targets = SoftUpdate(loss, eps=cfg.optim.target_update_polyak)
    optimizer = build_optimizer(loss, **cfg.optim.adam())
    stepper = FusedOptimizationStepper(targets, **cfg.stepping(), shape=(number,))
    # the trainer counts the frames of all agents
    trainer = build_trainer(
        run_dir,
        collector=collector,
        total_frames=cfg.total_frames * number,
        loss=loss,
        optimizer=optimizer,
        stepper=stepper,
        checkpoints=cfg.checkpoint_options(number),
        seed=cfg.seed,
        optim_steps_per_batch=max(1, round(cfg.optim.utd_ratio * cfg.frames_per_batch)),
        replay_buffer=buffer,
        target_net_updater=targets,
    )
    returns = EpisodeReturns()
    returns.register(trainer)
    SelectKeys(STORED).register(trainer)
    trainer.register_op("batch_process", replay.extend)
    trainer.register_op("process_optim_batch", replay.sample)

    def measure() -> list[dict[str, float]]:
        loss.write_back()
        means = stepper.means_by_element()
        rows = []
        for index, agent in enumerate(agents):
            found = {key: value[index].item() for key, value in means.items()}
            row = {key: found.get(key, float("nan")) for key in LOSS_COLUMNS}
            with isolated_rng(agent.seed):
                drawn = torch.randint(len(buffer) // number, (DIAGNOSED_STATES,)) * number + index
                states = buffer[drawn].select("observation").to(cfg.device)
                row.update(off_policy.diagnose(*built[index], states))
            rows.append(row)
        return rows

    train_and_record(
        trainer,
        run_dir,
        agents,
        measure,
        about=about(cfg, *built[0], where=f"{number} seeds at once, {cfg.collector.described()} each"),
        train_return=returns.mean,
        **cfg.recording(number),
        checkpoint=checkpoint_to_resume(cfg.resume, NEEDED_TO_RESUME),
        # an evaluation that was given up has measured already, and does not write them back
        on_resume=loss.write_back,
        begin=lambda: keep_config(cfg, run_dir),
        before_saving=loss.write_back,
    )


@hydra.main(version_base="1.3", config_path="config", config_name="sac_many_seeds")
def main(cfg: DictConfig) -> None:
    """Check the config, then train."""
    start_or_resume(cfg, ManySeedsConfig, resolve, train)


if __name__ == "__main__":
    launch(main, ManySeedsConfig)
