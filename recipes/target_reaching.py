"""Who uses the routes: several policies on the target-reaching task, several seeds each.

    python recipes/target_reaching.py

Trains SAC with every policy that ``policies`` names, lets each act, and draws what they did. ``resume=DIR``, or the
same command with the same ``hydra.run.dir``, goes on with what is not finished, from the last checkpoints. ``--help``
prints every key.
"""

from __future__ import annotations

if __name__ == "__main__":
    from parts import process

    process.begin()

import copy
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import hydra
import numpy as np
import pandas as pd
import sac_pmoe
from config.sac_pmoe import SACConfig, refuse_target_entropy
from config.target_reaching import MAY_CHANGE, TargetReachingConfig, resolve
from config.typed import build, described_keys, get
from omegaconf import DictConfig
from parts import routes_report
from parts.errors import Interrupted, UsageError
from parts.launch import (
    apply_changes,
    keep_config,
    launch,
    one_line_errors,
    own_run_directory,
    own_scratch,
    owned,
    read,
)
from parts.resume import from_here, how_to_resume, open_run, read_config
from parts.route_episodes import record_episodes, success_rates
from parts.training import prepare_torch
from parts.workers import run_in_workers
from torchrl.modules import ProbabilisticActor
from tqdm import tqdm

from torchrl_pmoe.envs import BatchedTargetReachingEnv
from torchrl_pmoe.runs import RunDirectory


def make_task(cfg: SACConfig, num_envs: int, **env_kwargs: str) -> BatchedTargetReachingEnv:
    """The task for several agents at once, seeded."""
    try:
        return BatchedTargetReachingEnv(num_envs, seed=cfg.seed, device=cfg.device, **{**cfg.env_kwargs, **env_kwargs})
    except (TypeError, ValueError) as error:
        key = f"blocked={env_kwargs['blocked']}" if "blocked" in env_kwargs else "env_kwargs"
        raise UsageError(f"{key}: {' '.join(str(error).split())}") from error


# ------------------------------------------------------------------------------------------- trainings


def train(
    cfg: SACConfig,
    run_dir: Path,
    episodes: int,
    exploration_frames: int,
    blocked: str | None = None,
    blocked_frames: int = 0,
) -> None:
    """One training, the record of its episodes and of the places it explored, and what follows if a passage closes."""
    prepare_torch(cfg.optim.num_threads)
    with owned(run_dir, from_here(run_dir), "a run that no other process uses"), own_scratch(cfg, run_dir):
        create_env = partial(BatchedTargetReachingEnv, seed=cfg.seed, **cfg.env_kwargs)
        trained = sac_pmoe.train(cfg, run_dir, create_env, only_if_unfinished=True)
        visited = trained.buffer[:exploration_frames]["next", "observation"][:, :2].numpy()
        # routes are counted start by start
        many, few = (make_task(cfg, number, start="fixed") for number in (episodes, 10))
        recorded = record_episodes(trained.actor, many, few, cfg.seed + 3_000_000)
        part = run_dir / "episodes.part.npz"
        np.savez_compressed(part, visited=visited, **recorded)
        part.replace(run_dir / "episodes.npz")
        if blocked is not None:
            close_passage(cfg, run_dir, trained.actor, episodes, blocked, blocked_frames)


def after_closing(run_dir: Path, blocked: str, frames: int) -> Path:
    """The directory of the training that goes on from a run when a passage is closed."""
    return run_dir / f"{blocked}_closed_{frames}"


def close_passage(
    cfg: SACConfig, run_dir: Path, actor: ProbabilisticActor, episodes: int, blocked: str, frames: int
) -> None:
    """Try a trained policy before and after a passage is closed, train it for some frames more, and try it again."""
    directory, seed = after_closing(run_dir, blocked, frames), cfg.seed + 3_000_000
    found, env = {}, make_task(cfg, episodes, start="fixed", blocked=blocked)
    found["before"] = success_rates(actor, make_task(cfg, episodes, start="fixed"), seed)
    found["closed"] = success_rates(actor, env, seed)
    run = copy.deepcopy(cfg)
    run.env_kwargs["blocked"] = blocked
    # a training may have some frames more than it was asked for
    (last, *_) = RunDirectory(run_dir).checkpoints()
    run.total_frames = int(last.name.rpartition("-")[2]) + frames
    run.replay_buffer.scratch_dir = None
    begun = RunDirectory(directory).checkpoints()
    run.resume = str(open_run(directory if begun else run_dir)[1])
    create_env = partial(BatchedTargetReachingEnv, seed=cfg.seed, **run.env_kwargs)
    trained = sac_pmoe.train(run, directory, create_env, only_if_unfinished=True)
    found["trained on"] = success_rates(trained.actor, env, seed)
    rows = [{"when": when, "kind": kind, "success": rate} for when, of in found.items() for kind, rate in of.items()]
    directory.mkdir(exist_ok=True)
    part = directory / "success.csv.part"
    pd.DataFrame(rows).to_csv(part, index=False)
    part.replace(directory / "success.csv")


def finished(
    cfg: SACConfig,
    run_dir: Path,
    episodes: int,
    exploration_frames: int,
    blocked: str | None = None,
    blocked_frames: int = 0,
) -> bool:
    """Whether a run is done.

    Raises:
        UsageError: if it was done with another config, or has left no checkpoint from which it could go on.
    """
    if not (run_dir / "episodes.npz").is_file():
        return False
    damaged = (
        f"{run_dir}: must hold config.yaml and episodes.npz as they were written, one is damaged; "
        "without episodes.npz it is made again"
    )
    try:
        with np.load(run_dir / "episodes.npz") as record:
            had = {"episodes": len(record["stochastic_success"]), "exploration_frames": len(record["visited"])}
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise UsageError(damaged) from error
    if (before := read_config(run_dir)) is None:
        raise UsageError(damaged)
    refuse_changes(build(SACConfig, before), cfg, run_dir)
    for key, now in (("episodes", episodes), ("exploration_frames", exploration_frames)):
        if had[key] != now:
            raise UsageError(f"{key}={now}: must be {had[key]} in {run_dir.parent}, where {run_dir.name} had that")
    if blocked is None or (after_closing(run_dir, blocked, blocked_frames) / "success.csv").is_file():
        return True
    if not RunDirectory(run_dir).checkpoints():
        raise UsageError(
            f"blocked={blocked}: must be null in {run_dir.parent}, where {run_dir.name} has no checkpoint to go on from"
        )
    return False


def refuse_changes(before: SACConfig, cfg: SACConfig, run_dir: Path) -> None:
    """Raise where a run was begun with another config."""
    for key in described_keys(SACConfig):
        then, now = get(before, key), get(cfg, key)
        if then != now and not key.startswith(("resume", "device", *MAY_CHANGE)):
            raise UsageError(f"{key}={now}: must be {then} in {run_dir.parent}, where {run_dir.name} had that")


def unfinished(cfg: TargetReachingConfig, configs: dict[str, SACConfig], directory: Path) -> dict[str, SACConfig]:
    """The configs of the runs that are to be trained, from their last checkpoint where there is one.

    Raises:
        UsageError: if a run was begun with another config.
    """
    todo = {}
    for name, run in configs.items():
        if finished(run, directory / name, *cfg.recorded):
            continue
        run.logger.progress_bar = cfg.logger.progress_bar and cfg.num_workers == 1
        run.resume = None
        if RunDirectory(directory / name).checkpoints():
            before, checkpoint = open_run(directory / name)
            refuse_changes(build(SACConfig, before), run, directory / name)
            run.resume = str(checkpoint)
        todo[name] = run
    return todo


def train_all(cfg: TargetReachingConfig, configs: dict[str, SACConfig], directory: Path) -> None:
    """Train what is not finished, ``num_workers`` at a time."""
    todo = unfinished(cfg, configs, directory)
    keep_config(cfg, directory)
    jobs = [(run, directory / name, *cfg.recorded) for name, run in todo.items()]
    before = len(configs) - len(todo)
    if cfg.num_workers == 1:
        for place, job in enumerate(jobs, before + 1):
            print(f"run {place} of {len(configs)}: {job[1].name}")
            train(*job)
        return
    with tqdm(total=len(configs), initial=before, unit="run", disable=not cfg.logger.progress_bar) as bar:
        run_in_workers(train, jobs, cfg.num_workers, bar)


# ------------------------------------------------------------------------------------------ the experiment


def is_experiment(directory: Path) -> bool:
    """Whether a directory is that of a run of this recipe."""
    config = read_config(directory)
    return config is not None and config["recipe"] == "target_reaching"


def resumed(cfg: TargetReachingConfig) -> TargetReachingConfig:
    """The config of the experiment that ``resume`` names.

    Raises:
        UsageError: where there is none, or a key was given that must stay.
    """
    directory = Path(str(cfg.resume))
    if not is_experiment(directory):
        raise UsageError(
            f"resume={cfg.resume}: must be the directory of a run of target_reaching.py, with its config.yaml"
        )
    old = build(TargetReachingConfig, read_config(directory) or {})
    apply_changes(old, cfg, MAY_CHANGE)
    old.resume = cfg.resume
    return old


def experiment(cfg: TargetReachingConfig, directory: Path) -> None:
    """Check the config, train, draw."""
    if cfg.resume is not None:
        cfg = resumed(cfg)
    configs = resolve(cfg)
    task = make_task(cfg, 1)
    if cfg.blocked is not None:
        make_task(cfg, 1, blocked=cfg.blocked)
    refuse_target_entropy(cfg, task.action_spec.shape[-1])
    prepare_torch(cfg.optim.num_threads)
    try:
        train_all(cfg, configs, directory)
    except Interrupted as interrupted:
        interrupted.advice = how_to_resume(directory)
        raise
    print(routes_report.report(directory, list(configs), task.task, cfg.exploration_frames))
    if cfg.blocked is not None:
        files = {name: after_closing(directory / name, cfg.blocked, cfg.blocked_frames) for name in configs}
        print(routes_report.report_closing(directory, files))
    RunDirectory(directory).finish(cfg.total_frames)


@hydra.main(version_base="1.3", config_path="config", config_name="target_reaching")
def main(cfg: DictConfig) -> None:
    """Check the config, train, draw."""
    with one_line_errors(), own_run_directory(cfg, may_hold=is_experiment) as directory:
        experiment(read(cfg, TargetReachingConfig), directory)


if __name__ == "__main__":
    launch(main, TargetReachingConfig)
