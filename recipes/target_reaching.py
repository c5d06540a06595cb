"""Who uses the routes: several policies on the target-reaching task, several seeds each.

    python recipes/target_reaching.py

Trains SAC with every policy that ``policies`` names, lets each act, and draws what they did. ``resume=DIR``, or the
same command with the same ``hydra.run.dir``, goes on with what is not finished, from the last checkpoints. Every key is
in ``recipes/config/target_reaching.yaml``.
"""

from __future__ import annotations

if __name__ == "__main__":
    import process

    process.begin()

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import common
import hydra
import numpy as np
import process
import resume
import routes_report
import runs
import sac_pmoe
import torch
from common import UsageError
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rules import Rule, choice, integer
from tensordict import TensorDict
from torch import Tensor
from torchrl.modules import ProbabilisticActor
from tqdm import tqdm
from yaml import YAMLError

from torchrl_pmoe import NormalMixture, PMOEActor
from torchrl_pmoe.distributions.proposals import take_expert
from torchrl_pmoe.envs import BatchedTargetReachingEnv

POLICIES: dict[str, dict[str, Any]] = {
    "gaussian": {"policy": "gaussian"},
    "gating": {"policy": "gating"},
    "mcp": {"policy": "mcp"},
    "pmoe_all": {"routing": "frequency", "backprop": "all", "score": "mixture"},
    "pmoe_max": {"routing": "frequency", "backprop": "max", "score": "mixture"},
    "pmoe": {},
    "pmoe_decoupled": {"loss.decoupled": True},
    "pmoe_paper": {"preset": "paper"},
    "pmoe_soft": {"routing": "soft_frequency", "backprop": "weighted", "score": "mixture"},
}
"""The policies by name: what each sets in a config of ``sac_pmoe.py``."""
SET_BY_POLICIES = ("preset", "scoring", "routing", "backprop", "score", "acting")
ENV = "PMOE/TargetReaching-v0"
MAY_CHANGE = ("num_workers", "logger.progress_bar", "checkpoint.", "compile.", "optim.num_threads")
"""Keys that may change when an experiment goes on."""


def names() -> Rule:
    """A list of policies, each once."""

    def parse(value: Any) -> list[str]:
        if not isinstance(value, list) or not value or len(set(value)) < len(value):
            raise ValueError
        return [choice(*POLICIES).parse(name) for name in value]

    return Rule(f"a list of {', '.join(POLICIES)}, each once", parse)


OWN_RULES: dict[str, Rule] = {
    "recipe": choice("target_reaching"),
    "env": choice(ENV),
    "policies": names(),
    "num_seeds": integer(1),
    "num_workers": integer(1),
    "episodes": integer(10),
    "exploration_frames": integer(1),
}
RULES: dict[str, Rule] = {**sac_pmoe.RULES, **OWN_RULES}
OWN_KEYS = [key for key in OWN_RULES if key not in sac_pmoe.RULES]


# --------------------------------------------------------------------------------------------- config


def resolve_config(cfg: DictConfig) -> dict[str, DictConfig]:
    """Check the config; the resolved config of every run by its name."""
    common.check_config(cfg, RULES)
    if cfg.policy != "pmoe":
        raise UsageError(f"policy={cfg.policy}: must be named in policies")
    common.refuse(
        cfg,
        {
            **{
                key: (OmegaConf.select(cfg, key) is not None, "null, each of policies has its own")
                for key in SET_BY_POLICIES
            },
            "loss.decoupled": (cfg.loss.decoupled, "false, that is what pmoe_decoupled of policies has"),
            "collector.backend": (
                cfg.collector.backend != "serial",
                "serial, the task is one batch of environments in this process",
            ),
            "collector.num_envs": (
                cfg.exploration_frames % cfg.collector.num_envs != 0,
                f"a divisor of exploration_frames={cfg.exploration_frames}",
            ),
            "exploration_frames": (
                cfg.exploration_frames > cfg.total_frames,
                f"at most total_frames={cfg.total_frames}",
            ),
            "replay_buffer.size": (
                cfg.replay_buffer.size < cfg.total_frames + cfg.collector.num_envs,
                f"above total_frames={cfg.total_frames}: the first frames are read from it at the end",
            ),
            "blend": (
                cfg.blend != "parameters" and "gating" not in cfg.policies,
                "parameters where policies has no gating",
            ),
        },
    )
    sac_pmoe.refuse_target_entropy(cfg, make_env(cfg, 1).action_spec.shape[-1])
    configs = {}
    for name in cfg.policies:
        for seed in range(cfg.seed, cfg.seed + cfg.num_seeds):
            run = cfg.copy()
            OmegaConf.set_struct(run, False)
            for key in OWN_KEYS:
                run.pop(key)
            for key, value in POLICIES[name].items():
                OmegaConf.update(run, key, value)
            run.recipe, run.seed, run.num_seeds = "sac_pmoe", seed, 1
            if run.replay_buffer.scratch_dir is not None:
                run.replay_buffer.scratch_dir = f"{run.replay_buffer.scratch_dir}/{name}-seed{seed}"
            if run.policy != "gating":
                run.blend = "parameters"
            sac_pmoe.resolve_config(run)
            configs[f"{name}-seed{seed}"] = run
    return configs


def make_env(cfg: DictConfig, num_envs: int) -> BatchedTargetReachingEnv:
    """The task for several agents at once, seeded."""
    try:
        kwargs: Any = OmegaConf.to_container(cfg.env_kwargs)
        return BatchedTargetReachingEnv(num_envs, seed=cfg.seed, device=cfg.device, **kwargs)
    except (TypeError, ValueError) as error:
        raise UsageError(f"env_kwargs: {' '.join(str(error).split())}") from error


# ------------------------------------------------------------------------------------------ episodes


Act = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From observations ``[N, 4]`` to actions ``[N, 2]``, the expert behind each and its log-density ``[N]``."""


def acting(actor: ProbabilisticActor, kind: str) -> Act:
    """How the policy acts; log-densities are the policy's own.

    Args:
        actor: the policy.
        kind: ``"stochastic"``, ``"deterministic"`` (of a mixture the expert of largest weight, its squashed loc) or
            ``"drawn"`` (of a mixture a drawn expert's squashed loc).
    """

    def act(observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = TensorDict({"observation": observation}, observation.shape[:1])
        dist = actor.get_dist(states)
        nobody = torch.zeros(len(observation), dtype=torch.int64)
        if not isinstance(dist, NormalMixture):
            action = dist.sample() if kind == "stochastic" else dist.deterministic_sample
            index = nobody
        elif kind == "deterministic":
            action, index = dist.deterministic_sample, dist.logits.argmax(-1)
        else:
            index = dist.sample_expert()
            action = (
                dist.propose().select_action(index) if kind == "stochastic" else take_expert(dist.expert_mode, index)
            )
        return action, index, dist.log_prob(action)

    return act


def expert_acting(actor: PMOEActor, expert: int) -> Act:
    """How one expert acts alone, with its noise."""
    alone = actor.expert(expert)

    def act(observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = TensorDict({"observation": observation}, observation.shape[:1])
        dist = alone.get_dist(states)
        action = dist.sample()
        return action, torch.full((len(observation),), expert), dist.log_prob(action)

    return act


@torch.no_grad()
def roll(env: BatchedTargetReachingEnv, act: Act, seed: int) -> dict[str, np.ndarray]:
    """One episode of every agent.

    Returns:
        ``path`` ``[N, T + 1, 2]``, nan after the end; ``expert`` ``[N, T]``, -1 after the end; ``success`` ``[N]``;
        ``start`` ``[N]``, numbered by place; ``log_prob`` ``[N, T]``, nan after the end.
    """
    env.set_seed(seed)
    with runs.isolated_rng(seed):
        td = env.reset()
        number = len(td)
        running = torch.ones(number, dtype=torch.bool, device=env.device)
        success = torch.zeros_like(running)
        paths, experts, log_probs = [env.position.clone()], [], []
        while running.any():
            action, index, log_prob = act(td["observation"])
            td = env.step(td.set("action", action))["next"]
            paths.append(torch.where(running.unsqueeze(-1), env.position, torch.nan))
            experts.append(torch.where(running, index.to(env.device), -1))
            log_probs.append(torch.where(running, log_prob, torch.nan))
            success |= running & td["terminated"].squeeze(-1)
            running = running & ~td["done"].squeeze(-1)
    path = torch.stack(paths, 1).cpu().numpy()
    _, start = np.unique(path[:, 0], axis=0, return_inverse=True)
    return {
        "path": path,
        "expert": torch.stack(experts, 1).cpu().numpy().astype(np.int8),
        "success": success.cpu().numpy(),
        "start": start.reshape(-1),
        "log_prob": torch.stack(log_probs, 1).cpu().numpy(),
    }


def record_episodes(cfg: DictConfig, actor: ProbabilisticActor, episodes: int) -> dict[str, Any]:
    """What the trained policy does from the fixed starts: episodes of each kind, and of each expert alone."""
    cfg = cfg.copy()
    cfg.env_kwargs.start = "fixed"  # routes are counted start by start
    env = make_env(cfg, episodes)
    seed = cfg.seed + 3_000_000
    recorded: dict[str, Any] = {}
    mixture = isinstance(actor, PMOEActor)
    for kind in ("stochastic", "deterministic", *(("drawn",) if mixture else ())):
        recorded.update({f"{kind}_{key}": value for key, value in roll(env, acting(actor, kind), seed).items()})
    recorded["entropy"] = -np.nanmean(recorded["stochastic_log_prob"][:, : routes_report.ENTROPY_STEPS])
    if mixture:
        env = make_env(cfg, 10)
        for expert in range(cfg.num_experts):
            found = roll(env, expert_acting(actor, expert), seed)
            recorded.update({f"alone{expert}_{key}": value for key, value in found.items()})
    return recorded


# ------------------------------------------------------------------------------------------- trainings


def train(cfg: DictConfig, run_dir: Path, episodes: int, exploration_frames: int) -> None:
    """One training, and the record of its episodes and of the places it explored."""
    common.prepare_torch(cfg)
    named = resume.from_here(run_dir)
    with resume.owned(run_dir, named, "a run that no other process uses"), resume.own_scratch(cfg, run_dir):
        trained = sac_pmoe.train(cfg, run_dir, make_env(cfg, cfg.collector.num_envs), only_if_unfinished=True)
        visited = trained.buffer[:exploration_frames]["next", "observation"][:, :2].numpy()
        recorded = record_episodes(cfg, trained.actor, episodes)
        part = run_dir / "episodes.part.npz"
        np.savez_compressed(part, visited=visited, **recorded)
        part.replace(run_dir / "episodes.npz")


def finished(cfg: DictConfig, run_dir: Path, episodes: int, exploration_frames: int) -> bool:
    """Whether a run is done.

    Raises:
        UsageError: if it was done with another config.
    """
    if not (run_dir / "episodes.npz").is_file():
        return False
    try:
        before = OmegaConf.load(run_dir / "config.yaml")
        with np.load(run_dir / "episodes.npz") as record:
            had = {"episodes": len(record["stochastic_success"]), "exploration_frames": len(record["visited"])}
    except (OSError, EOFError, ValueError, KeyError, BadZipFile, YAMLError, OmegaConfBaseException) as error:
        raise UsageError(
            f"{run_dir}: must hold config.yaml and episodes.npz as they were written, one is damaged; "
            "without episodes.npz it is made again"
        ) from error
    _refuse_changes(before, cfg, run_dir)
    for key, now in (("episodes", episodes), ("exploration_frames", exploration_frames)):
        if had[key] != now:
            raise UsageError(f"{key}={now}: must be {had[key]} in {run_dir.parent}, where {run_dir.name} had that")
    return True


def _refuse_changes(before: Any, cfg: DictConfig, run_dir: Path) -> None:
    for key in RULES:
        then, now = OmegaConf.select(before, key), OmegaConf.select(cfg, key)
        if then != now and not key.startswith(("recipe", "resume", "device", *MAY_CHANGE)):
            raise UsageError(f"{key}={now}: must be {then} in {run_dir.parent}, where {run_dir.name} had that")


def unfinished(cfg: DictConfig, configs: dict[str, DictConfig], directory: Path) -> dict[str, DictConfig]:
    """The configs of the runs that are to be trained, from their last checkpoint where there is one.

    Raises:
        UsageError: if a run was begun with another config.
    """
    todo = {}
    for name, run in configs.items():
        if finished(run, directory / name, cfg.episodes, cfg.exploration_frames):
            continue
        run.logger.progress_bar = cfg.logger.progress_bar and cfg.num_workers == 1
        run.resume = None
        if any((directory / name / resume.CHECKPOINTS).glob("checkpoint-*")):
            before, checkpoint = resume.open_run(directory / name)
            _refuse_changes(before, run, directory / name)
            run.resume = resume.literal(str(checkpoint))
        todo[name] = run
    return todo


def _begin_worker() -> None:
    """In a worker: what a terminal sends is for the parent; its SIGTERM ends the job, not the process with its locks.

    A parent that was killed sends nothing: then the worker tells itself.
    """
    process.speak_plainly()
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _train_in_worker(*args: Any) -> None:
    """As :func:`train`; where nobody waits for the result any more, the worker ends."""
    try:
        train(*args)
    finally:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)


def train_all(cfg: DictConfig, configs: dict[str, DictConfig], directory: Path) -> None:
    """Train what is not finished, ``num_workers`` at a time."""
    args = (cfg.episodes, cfg.exploration_frames)
    todo = unfinished(cfg, configs, directory)
    runs.keep_config(cfg, directory)
    finished_before = len(configs) - len(todo)
    if cfg.num_workers == 1:
        for place, (name, run) in enumerate(todo.items(), finished_before + 1):
            print(f"run {place} of {len(configs)}: {name}")
            train(run, directory / name, *args)
        return
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=len(configs), initial=finished_before, unit="run", disable=not cfg.logger.progress_bar) as bar,
        ProcessPoolExecutor(cfg.num_workers, context, initializer=_begin_worker) as pool,
    ):
        waiting = [(run, directory / name, *args) for name, run in todo.items()]
        try:
            jobs = {pool.submit(_train_in_worker, *job) for job in waiting[: cfg.num_workers]}
            del waiting[: cfg.num_workers]
            while jobs:
                done, jobs = wait(jobs, return_when=FIRST_COMPLETED)
                for job in done:
                    job.result()
                    bar.update()
                    if waiting:
                        jobs.add(pool.submit(_train_in_worker, *waiting.pop(0)))
        except BaseException as error:
            # each writes a checkpoint and is waited for
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(error, KeyboardInterrupt | SystemExit):
                status = 128 + signal.SIGTERM if isinstance(error, SystemExit) else 128 + signal.SIGINT
                number = int(getattr(error, "code", None) or status) - 128
                raise common.Interrupted(number, "with a checkpoint of every training") from None
            raise


def resumed_config(cfg: DictConfig) -> DictConfig:
    """The config of the experiment that ``resume`` names.

    Raises:
        UsageError: where there is none, or a key was given that must stay.
    """
    old = read_config(Path(str(cfg.resume)))
    if old is None:
        raise UsageError(
            f"resume={cfg.resume}: must be the directory of a run of target_reaching.py, with its config.yaml"
        )
    resume.apply_changes(old, cfg, MAY_CHANGE)
    old.resume = resume.literal(str(cfg.resume))
    return old


def is_experiment(directory: Path) -> bool:
    """Whether a directory is that of a run of this recipe."""
    return read_config(directory) is not None


def read_config(directory: Path) -> DictConfig | None:
    """The config of an experiment, ``None`` where there is none."""
    try:
        config = OmegaConf.load(directory / "config.yaml")
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError):
        return None
    if not isinstance(config, DictConfig) or resume.recipe_of(config) != "target_reaching":
        return None
    config.recipe = "target_reaching"
    return config


def experiment(cfg: DictConfig, directory: Path) -> None:
    """Check the config, train, draw."""
    if cfg.resume is not None:
        cfg = resumed_config(cfg)
    configs = resolve_config(cfg)
    common.prepare_torch(cfg)
    try:
        train_all(cfg, configs, directory)
    except common.Interrupted as interrupted:
        interrupted.advice = resume.how_to_go_on(directory)
        raise
    task = make_env(cfg, 1).task
    print(routes_report.report(directory, list(configs), task, cfg.exploration_frames))


@hydra.main(version_base="1.3", config_path="config", config_name="target_reaching")
def main(cfg: DictConfig) -> None:
    """Check the config, train, draw."""
    with common.one_line_errors(), resume.own_run_directory(cfg, may_hold=is_experiment) as directory:
        experiment(cfg, directory)


if __name__ == "__main__":
    common.launch(main, RULES)
