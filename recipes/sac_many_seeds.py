"""Several agents in one process: their updates, their policies and their data side by side."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import backends
import common
import resume
import runs
import sac_pmoe
import torch
from omegaconf import DictConfig
from recording import RunRecorder
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl._utils import seed_generator
from torchrl.data import RandomSampler, TensorDictReplayBuffer
from torchrl.envs import EnvBase, SerialEnv
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import SACLoss, SoftUpdate
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import SelectKeys

from torchrl_pmoe.objectives import StackedLoss, StackedPolicy
from torchrl_pmoe.trainers import FiniteLoss, FlatReplay, PeriodicEvaluation, ProgressBar


def refuse(cfg: DictConfig) -> None:
    """Refuse what several agents at once cannot have."""
    several = f"with num_seeds={cfg.num_seeds}"
    common.refuse(
        cfg,
        {
            "replay_buffer.prb": (cfg.replay_buffer.prb, f"false {several}"),
            "replay_buffer.scratch_dir": (cfg.replay_buffer.scratch_dir is not None, f"null {several}"),
            "acting": (cfg.acting == "best_of_experts", f"policy {several}"),
            "optim.router_lr": (cfg.optim.router_lr is not None, f"null {several}"),
            "on_nonfinite": (cfg.on_nonfinite == "skip", f"stop {several}"),
            "logger.backend": (cfg.logger.backend is not None, f"null {several}; every seed has its metrics.csv"),
            "collector.backend": (cfg.collector.backend == "parallel", f"serial, envpool or mjx {several}"),
        },
    )


# --------------------------------------------------------------------------------------------- parts


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
        steps = batch.reshape(self.num_seeds, -1, batch.shape[-1]).permute(2, 1, 0)
        return super().extend(steps.contiguous())

    def sample(self, batch: TensorDictBase) -> TensorDictBase:
        """A batch for every agent."""
        return super().sample(batch).reshape(self.num_seeds, -1)


@dataclass(frozen=True)
class Agent:
    """One of the agents, with its weights as they were last written back."""

    seed: int
    actor: ProbabilisticActor
    loss: SACLoss
    evaluated: TensorDictModuleBase


def make_env(cfg: DictConfig) -> EnvBase:
    """The environments of all agents in one batch, those of the first agent first; seeded as in runs of their own."""
    number = cfg.collector.num_envs
    if cfg.collector.backend != "serial":
        wide = cfg.copy()
        wide.collector.num_envs = number * cfg.num_seeds
        return backends.make_env(wide)
    common.try_env(cfg.env, cfg.env_kwargs)
    seeds = []
    for index in range(cfg.num_seeds):
        seed = cfg.seed + index
        for _ in range(number):
            seeds.append(seed)
            seed = seed_generator(seed)
    makers = [lambda seed=seed: common.make_env(cfg.env, seed, kwargs=cfg.env_kwargs) for seed in seeds]
    return SerialEnv(len(makers), makers)


def build_agents(cfg: DictConfig, env: EnvBase) -> list[Agent]:
    """The agents, each made under its own seed."""
    spec, observation_size = env.action_spec_unbatched, env.observation_spec["observation"].shape[-1]
    agents = []
    for seed in range(cfg.seed, cfg.seed + cfg.num_seeds):
        common.seed_everything(seed)
        actor = sac_pmoe.build_actor(cfg, spec, observation_size)
        loss = sac_pmoe.build_loss(cfg, actor, sac_pmoe.build_qvalue(cfg, spec, observation_size))
        agents.append(Agent(seed, actor, loss, sac_pmoe.build_policies(cfg, actor, loss)[1]))
    return agents


def build_trainer(cfg: DictConfig, run_dir: Path, env: EnvBase, loss: StackedLoss) -> tuple[Trainer, SeedReplay]:
    """The trainer of all agents; it counts the frames of all of them."""
    number = cfg.num_seeds
    whole = cfg.copy()
    whole.total_frames *= number
    whole.checkpoint.interval *= number
    whole.replay_buffer.size *= number
    buffer = sac_pmoe.build_replay_buffer(whole, env.device or "cpu")
    buffer.set_sampler(SeedSampler(number))
    replay = SeedReplay(buffer, number, device=None if cfg.device == "cpu" else cfg.device)
    collector = runs.build_collector(
        cfg,
        env,
        StackedPolicy(loss),
        frames_per_batch=cfg.collector.frames_per_batch * number,
        init_random_frames=cfg.collector.init_random_frames * number,
    )
    target_updater = SoftUpdate(loss, eps=cfg.optim.target_update_polyak)
    optimizer = runs.build_optimizer(cfg, loss, None)
    stepper = runs.build_stepper(cfg, target_updater, shape=(number,))
    trainer = runs.build_trainer(
        whole,
        run_dir,
        collector=collector,
        loss=loss,
        optimizer=optimizer,
        stepper=stepper,
        optim_steps_per_batch=max(1, round(cfg.optim.utd_ratio * cfg.collector.frames_per_batch)),
        replay_buffer=buffer,
        target_net_updater=target_updater,
    )
    trainer.checkpoint_metadata = resume.metadata(cfg)
    SelectKeys(sac_pmoe.STORED).register(trainer)
    trainer.register_op("batch_process", replay.extend)
    trainer.register_op("process_optim_batch", replay.sample)
    FiniteLoss(stepper).register(trainer)
    return trainer, replay


# --------------------------------------------------------------------------------------------- training


def build_evaluation(
    cfg: DictConfig,
    run_dir: Path,
    agents: list[Agent],
    loss: StackedLoss,
    trainer: Trainer,
    replay: SeedReplay,
    received: list[int],
) -> runs.Evaluation:
    """Evaluates every agent, and keeps its record in a directory of its own.

    Args:
        cfg: the resolved config.
        run_dir: of all agents.
        agents: what is evaluated.
        loss: written back before an evaluation.
        trainer: its stepper's means are recorded.
        replay: states for the diagnostics are drawn from it.
        received: signals that give an evaluation up.
    """
    stepper = trainer.optimization_stepper
    recorders = []
    for agent in agents:
        directory = run_dir / f"seed{agent.seed}"
        directory.mkdir(parents=True, exist_ok=True)
        recorders.append(RunRecorder(directory, title=f"SAC, {cfg.policy}, {cfg.env}, seed {agent.seed}"))

    def diagnose(index: int) -> dict[str, float]:
        agent, number = agents[index], cfg.num_seeds
        buffer = replay.replay_buffer
        drawn = torch.randint(len(buffer) // number, (sac_pmoe.DIAGNOSED_STATES,)) * number + index
        states = buffer[drawn].select("observation").to(cfg.device)
        return sac_pmoe.diagnose(agent.actor, agent.loss, states)

    def measure() -> list[dict[str, float]]:
        stepper.check()
        loss.write_back()
        means = stepper.means_by_element()
        rows = []
        for index, agent in enumerate(agents):
            found = {key: value[index].item() for key, value in means.items()}
            row = {key: found.get(key, float("nan")) for key in sac_pmoe.LOSS_COLUMNS}
            with runs.isolated_rng(agent.seed):
                row.update(diagnose(index))
            rows.append(row)
        return rows

    evaluators = [runs.build_evaluator(cfg, agent.evaluated, agent.seed, lambda: bool(received)) for agent in agents]
    return runs.Evaluation(evaluators, recorders, measure, lambda rows, frames: stepper.reset())


def train(cfg: DictConfig, run_dir: Path) -> list[Agent]:
    """Train ``num_seeds`` agents at once; leave ``seed<n>/metrics.csv`` of each in ``run_dir``."""
    env = make_env(cfg)
    agents = build_agents(cfg, env)
    loss = StackedLoss([agent.loss for agent in agents])
    common.seed_everything(cfg.seed)
    trainer, replay = build_trainer(cfg, run_dir, env, loss)
    received: list[int] = []
    number = cfg.num_seeds
    evaluation = build_evaluation(cfg, run_dir, agents, loss, trainer, replay, received)
    PeriodicEvaluation(lambda frames: evaluation(frames // number), cfg.logger.eval_interval * number).register(trainer)
    trainer.checkpoint.register("evaluation", evaluation)
    unsaved = set() if cfg.checkpoint.replay_buffer else {"replay_buffer"}
    trainer.checkpoint.save_components = frozenset(trainer.checkpoint.components) - unsaved
    checkpoint = resume.checkpoint_to_resume(cfg, sac_pmoe.NEEDED)
    if checkpoint is not None:
        runs.go_on(cfg, run_dir, trainer, checkpoint, evaluation)
        evaluation.resume(trainer.collected_frames // number)
        # an evaluation that was given up has measured already, and does not write them back
        loss.write_back()
    runs.keep_config(cfg, run_dir)
    one = sac_pmoe.about(cfg, agents[0].actor, agents[0].loss)
    runs.announce(cfg, f"{one}; {number} seeds at once, {backends.describe(cfg)} each", sac_pmoe.updates(cfg))

    def status() -> dict[str, str]:
        returns = [recorder.last["return_mean"] for recorder in evaluation.recorders if recorder.last]
        return {"mean return": f"{sum(returns) / len(returns):.4g}"} if returns else {}

    bar = ProgressBar(
        trainer.total_frames,
        status,
        initial=trainer.collected_frames,
        disable=not cfg.logger.progress_bar,
    )
    bar.register(trainer)
    with closing(bar), closing(evaluation):
        runs.run_to_the_end(trainer, run_dir, evaluation, received)
    return agents
