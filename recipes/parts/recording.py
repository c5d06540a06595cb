"""The run of a training: its agents, their evaluations and records, and what is printed first and last."""

from __future__ import annotations

import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import CheckpointError
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import SACLoss
from torchrl.record.loggers import Logger
from torchrl.trainers import Trainer

from parts import process
from parts.endings import run_to_the_end
from parts.errors import UsageError
from parts.resume import command_to_resume, does_not_fit, from_here, interpreter
from parts.training import CheckpointOptions, announce
from torchrl_pmoe.envs import NormalizeObservationAndReward
from torchrl_pmoe.runs import (
    CARD,
    AgentResult,
    Evaluator,
    MetricsFile,
    PolicyParts,
    RecordedEvaluation,
    RunDirectory,
    SavedPolicies,
    read_metrics,
    run_logger,
    source_commit,
    write_model_card,
)
from torchrl_pmoe.runs.acting import Kind
from torchrl_pmoe.trainers import (
    FusedOptimizationStepper,
    PeriodicEvaluation,
    ProgressBar,
)


@dataclass(frozen=True)
class EvaluationOptions:
    """How a policy is evaluated during a run.

    Args:
        env: Gymnasium id.
        env_kwargs: of the environment.
        interval: frames between two evaluations.
        episodes: number of episodes of an evaluation.
        max_steps: a longer episode is cut.
        device: of the policy.
    """

    env: str
    env_kwargs: Mapping[str, Any]
    interval: int
    episodes: int
    max_steps: int
    device: str

    def evaluator(self, policy: TensorDictModuleBase, seed: int, stopped: Callable[[], bool]) -> Evaluator:
        """An evaluator of a policy with actions in ``[-1, 1]``; its episodes have other seeds than the training's."""
        return Evaluator(
            self.env,
            policy,
            episodes=self.episodes,
            max_steps=self.max_steps,
            seed=seed + 1_000_000,
            device=self.device,
            env_kwargs=self.env_kwargs,
            stopped=stopped,
        )


@dataclass(frozen=True)
class LoggerOptions:
    """Where a run is recorded beside ``metrics.csv``.

    Args:
        backend: name, see :func:`torchrl_pmoe.runs.run_logger`; ``None`` for no logger.
        project: name of the project in the service.
        hparams: hyperparameters, sent to the service.
        progress_bar: whether to show one.
    """

    backend: str | None = None
    project: str = "torchrl_pmoe"
    hparams: Mapping[str, Any] = field(default_factory=dict)
    progress_bar: bool = True

    @contextmanager
    def open(self, run_dir: Path) -> Iterator[Logger | None]:
        """Open the logger; yields ``None`` if there is no backend.

        Raises:
            UsageError: if it cannot be opened.
        """
        with ExitStack() as stack:
            logger = None
            if self.backend is not None:
                try:
                    logger = stack.enter_context(
                        run_logger(self.backend, run_dir, project=self.project, hparams=self.hparams)
                    )
                # a service may raise any exception
                except Exception as error:
                    raise UsageError(
                        f"logger.backend={self.backend}: must be one that can be written to ({process.describe(error)})"
                    ) from error
            yield logger


@dataclass(frozen=True)
class Agent:
    """One agent of a run, and how it is evaluated and saved.

    Args:
        policy: the policy to evaluate. It reads raw observations and acts in ``[-1, 1]``.
        seed: seed of the agent.
        directory: of its ``metrics.csv`` and its picture.
        title: of its picture.
        actor: the network that is trained.
        kind: how ``policy`` chooses an action from ``actor``.
        normalization: of the observations, if there is one.
        commit_steps: for how many steps an expert acts, of ``kind="committed"``; ``None`` for the whole episode.
        critics: the loss whose critics choose among the proposals (``acting=best_of_experts``).
    """

    policy: TensorDictModuleBase
    seed: int
    directory: Path
    title: str
    actor: ProbabilisticActor
    kind: Kind = "deterministic"
    normalization: NormalizeObservationAndReward | None = None
    commit_steps: int | None = None
    critics: SACLoss | None = None

    def parts(self, evaluation: EvaluationOptions, evaluator: Evaluator) -> PolicyParts:
        """The parts of the policy that a checkpoint saves."""
        box: Any = evaluator.envs[0].action_space
        return PolicyParts(
            self.actor,
            self.seed,
            evaluation.env,
            evaluation.env_kwargs,
            self.kind,
            low=torch.as_tensor(box.low, dtype=torch.float32),
            high=torch.as_tensor(box.high, dtype=torch.float32),
            max_steps=evaluation.max_steps,
            normalization=self.normalization,
            commit_steps=self.commit_steps,
            critic=None if self.critics is None else self.critics.qvalue_network,
            critic_params=None if self.critics is None else self.critics.qvalue_network_params,
        )


Measure = Callable[[], list[dict[str, float]]]
"""Returns one row for each agent: all columns but clocks and returns, always the same ones."""


def train_and_record(
    trainer: Trainer,
    run_dir: Path,
    agents: Sequence[Agent],
    measure: Measure,
    *,
    about: str,
    updates: float,
    train_return: Callable[[], float],
    evaluation: EvaluationOptions,
    logging: LoggerOptions,
    checkpoints: CheckpointOptions,
    checkpoint: Path | None = None,
    on_resume: Callable[[], None] = lambda: None,
    begin: Callable[[], None] = lambda: None,
    before_saving: Callable[[], None] = lambda: None,
    only_if_unfinished: bool = False,
) -> None:
    """Train to the end. Every agent gets its ``metrics.csv`` and ``learning_curve.png``.

    Args:
        trainer: made by :func:`build_trainer`, with its hooks. It counts the frames of all agents.
        run_dir: directory of the run.
        agents: the agents to evaluate.
        measure: returns the other columns of their rows.

    Keyword Args:
        about: line that is printed before the first frame, once the input has been checked.
        updates: number of updates of the whole run.
        train_return: returns the mean return of the latest training episodes, nan before the first one has ended.
        evaluation: how policies are evaluated; its interval counts the frames of one agent.
        logging: where the rows go besides ``metrics.csv``.
        checkpoints: how often they are written, and what they hold.
        checkpoint: path of the checkpoint to resume from.
        on_resume: called when the checkpoint is loaded.
        begin: called before the first frame, once the input has been checked.
        before_saving: called before the agents' policies are saved in a checkpoint.
        only_if_unfinished: if the checkpoint has all frames, load it and return.

    Raises:
        Interrupted: if a signal has ended the run, after it has written a checkpoint.
        RunError: in one line, if something else has ended the run. The last checkpoint stays whole.
        UsageError: if the checkpoint or the logger cannot be used.
    """
    stepper, number = trainer.optimization_stepper, len(agents)
    received: list[int] = []
    metrics = [MetricsFile(agent.directory) for agent in agents]
    evaluators = [evaluation.evaluator(agent.policy, agent.seed, lambda: bool(received)) for agent in agents]

    def checked() -> list[dict[str, float]]:
        stepper.check()
        columns = measure()
        if stepper.on_nonfinite == "skip":
            columns = [{**row, "skipped_updates": stepper.skipped} for row in columns]
        return columns

    def written(rows: list[dict[str, float]], frames: int) -> None:
        stepper.reset()
        if logger is not None:
            for key, value in rows[0].items():
                logger.log_scalar(key, value, step=frames)

    recorded = RecordedEvaluation(evaluators, metrics, checked, written)
    PeriodicEvaluation(lambda frames: recorded(frames // number), evaluation.interval * number).register(trainer)
    trainer.checkpoint.register("evaluation", recorded)
    kept = [agent.parts(evaluation, evaluator) for agent, evaluator in zip(agents, evaluators, strict=True)]
    SavedPolicies(kept, before_saving).register(trainer.checkpoint)
    trainer.checkpoint.save_components = frozenset(trainer.checkpoint.components) - checkpoints.unsaved
    if checkpoint is not None:
        _resume(trainer, run_dir, checkpoint, recorded, number, finished=only_if_unfinished)
        if only_if_unfinished and trainer.collected_frames >= trainer.total_frames and not recorded.given_up:
            recorded.close()
            # its workers would keep the cores that the next training needs
            trainer.collector.shutdown()
            return
        on_resume()
        recorded.resume(trainer.collected_frames // number)

    def status() -> dict[str, str]:
        returns = [one.last["return_mean"] for one in metrics if "return_mean" in one.last]
        entropy = stepper.means().get("routing_entropy", metrics[0].last.get("routing_entropy"))
        shown = {
            "return" if number == 1 else "mean return": sum(returns) / len(returns) if returns else None,
            "train return": train_return(),
            "routing entropy": entropy,
        }
        return {key: f"{value:.4g}" for key, value in shown.items() if value is not None and not math.isnan(value)}

    with closing(recorded), logging.open(run_dir) as logger:
        for agent in agents:
            agent.directory.mkdir(parents=True, exist_ok=True)
        begin()
        # what it says of an earlier end holds no more; sources may change while a run goes on
        (run_dir / CARD).unlink(missing_ok=True)
        commit = source_commit()
        print(f"run directory: {from_here(run_dir)}")
        announce(about, updates, compiled=stepper.compile)
        # the second update compiles; only later ones have the speed that the bar is to show
        usual = stepper.updates + (2 if stepper.compile else 1)
        # frames come in whole batches
        batch = trainer.collector.requested_frames_per_batch
        bar = ProgressBar(
            -(-trainer.total_frames // batch) * batch,
            status,
            initial=trainer.collected_frames,
            begun=lambda: stepper.updates >= usual,
            disable=not logging.progress_bar,
        )
        bar.register(trainer)
        with closing(bar):
            run_to_the_end(trainer, run_dir, recorded, received, lambda: _draw(agents, metrics))
    if stepper.on_nonfinite == "skip":
        print(f"{stepper.skipped} updates were skipped")
    frames = trainer.collected_frames // number
    _write_card(run_dir, agents, [one.last for one in metrics], evaluation, frames, commit)
    RunDirectory(run_dir).finish(trainer.total_frames // number)
    # a training of an experiment has as many frames as the others of the experiment
    print(what_next(run_dir, agents, [one.last for one in metrics], longer=not only_if_unfinished))


def _write_card(
    run_dir: Path,
    agents: Sequence[Agent],
    last: Sequence[Mapping[str, float]],
    evaluation: EvaluationOptions,
    frames: int,
    commit: str | None,
) -> None:
    results = [
        AgentResult(agent.seed, row["return_mean"], row["return_std"])
        for agent, row in zip(agents, last, strict=True)
        if "return_mean" in row
    ]
    try:
        write_model_card(
            run_dir,
            title=agents[0].title if len(agents) == 1 else f"{agents[0].title} and {len(agents) - 1} more",
            env=evaluation.env,
            env_kwargs=evaluation.env_kwargs,
            frames=frames,
            episodes=evaluation.episodes,
            kind=agents[0].kind,
            results=results,
            commit=commit,
        )
    except OSError as error:
        warnings.warn(f"there is no model card of the run ({process.describe(error)})", stacklevel=1)


def what_next(
    run_dir: Path, agents: Sequence[Agent], last: Sequence[Mapping[str, float]], *, longer: bool = True
) -> str:
    """What is printed at the end: the return, the run directory, and the next commands.

    Args:
        run_dir: directory of the run.
        agents: that were trained.
        last: the last row of each.

    Keyword Args:
        longer: whether the run can go on for longer.
    """
    returns = [f"{row['return_mean']:,.1f} ± {row['return_std']:,.1f}" for row in last if "return_mean" in row]
    where = shlex.quote(from_here(run_dir))
    python, recipes = shlex.quote(interpreter()), Path(sys.argv[0]).parent
    scripts = {name: shlex.quote(str(recipes / f"{name}.py")) for name in ("evaluate", "plot")}
    # the commands name the first agent as an example
    agent, files = "", "metrics.csv, learning_curve.png, checkpoints"
    if len(agents) > 1:
        agent = f" --agent {agents[0].seed}"
        files = f"{from_here(agents[0].directory)}/metrics.csv and so on, checkpoints"
    lines = [
        f"return of the last evaluation (mean ± std over episodes): {', '.join(returns)}",
        f"run directory: {from_here(run_dir)} ({files})",
        f"evaluate and watch:  {python} {scripts['evaluate']} {where}{agent}",
        f"plot and compare:    {python} {scripts['plot']} {where}",
    ]
    if longer:
        lines.append(f"go on for longer:    {command_to_resume(run_dir)} total_frames=...")
    return "\n".join(lines)


def mean_columns(stepper: FusedOptimizationStepper, columns: Sequence[str]) -> dict[str, float]:
    """Means of some outputs of the loss since the last evaluation; nan for an output that it does not have."""
    means = stepper.means()
    return {key: means.get(key, float("nan")) for key in columns}


def _draw(agents: Sequence[Agent], metrics: Sequence[MetricsFile]) -> None:
    # matplotlib takes a second to import, which the first frame need not wait for
    from parts.figures import draw_learning_curve

    for agent, one in zip(agents, metrics, strict=True):
        if one.last:
            draw_learning_curve(read_metrics(one.path), agent.title, agent.directory / "learning_curve.png")


def _resume(
    trainer: Trainer, run_dir: Path, checkpoint: Path, recorded: RecordedEvaluation, agents: int, *, finished: bool
) -> None:
    """Load a checkpoint into a trainer with registered hooks.

    Raises:
        UsageError: if it does not fit, or if it has all frames already and ``finished`` is false.
    """
    directory = RunDirectory(run_dir)
    later = [path for path in directory.checkpoints() if path.name > checkpoint.name]
    try:
        directory.resume(trainer, checkpoint)
    except CheckpointError as error:
        raise UsageError(f"resume={does_not_fit(checkpoint, error)}") from error
    beyond = trainer.collected_frames - trainer.total_frames
    # a run that was killed between its last checkpoint and its end still has its picture to draw
    killed = beyond < trainer.collector.requested_frames_per_batch and not directory.finished(
        trainer.total_frames // agents
    )
    if beyond >= 0 and not (finished or recorded.given_up or killed):
        raise UsageError(
            f"total_frames={trainer.total_frames // agents}: must be above the {trainer.collected_frames // agents} "
            f"frames that resume={checkpoint} has"
        )
    for path in later:
        print(f"{path} is of a later frame: now set-aside-{path.name}")
    line = f"goes on at frame {trainer.collected_frames:,} from {checkpoint.name}"
    if trainer.checkpoint.components["episodes"].fresh:
        line += "; this environment's state cannot be restored: new episodes begin"
    print(line)


__all__ = [
    "Agent",
    "EvaluationOptions",
    "LoggerOptions",
    "mean_columns",
    "train_and_record",
]
