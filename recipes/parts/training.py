"""What every recipe needs around its loss: optimiser, collector, trainer, evaluation and records."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torchrl._utils import logger as torchrl_logger
from torchrl.checkpoint import CheckpointError, GlobalRNGState
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase
from torchrl.envs.transforms import Transform
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import LossModule, SACLoss
from torchrl.record.loggers import Logger
from torchrl.trainers import Trainer

from parts import process
from parts.endings import run_to_the_end
from parts.errors import UsageError
from parts.figures import draw_learning_curve
from parts.resume import command_to_resume, does_not_fit, from_here, interpreter
from torchrl_pmoe.baselines import OptionActor
from torchrl_pmoe.collectors import ClusterError, ReplaceableRayCollector
from torchrl_pmoe.envs import NormalizeObservationAndReward
from torchrl_pmoe.modules.actors import ExpertsActor
from torchrl_pmoe.runs import (
    EpisodeState,
    Evaluator,
    MetricsFile,
    PolicyParts,
    RecordedEvaluation,
    RunDirectory,
    SavedPolicies,
    VerifiedCheckpoint,
    read_metrics,
    run_logger,
)
from torchrl_pmoe.runs.acting import Kind
from torchrl_pmoe.runs.evaluation import isolated_rng
from torchrl_pmoe.trainers import (
    ExpertCollapse,
    FiniteBatch,
    FiniteLoss,
    FusedOptimizationStepper,
    PeriodicEvaluation,
    ProgressBar,
)

# a run with so many updates wins back the time of compilation many times
WORTH_COMPILING = 50_000
NO_COMPILER = "there is no C++ compiler: g++, clang++ on macOS, or what CXX names"


# ------------------------------------------------------------------------------------------------ process


def seed_everything(seed: int) -> None:
    """Seed the global generators of PyTorch and NumPy."""
    torch.manual_seed(seed)
    # environments may still draw from NumPy's global generator
    np.random.seed(seed)  # noqa: NPY002


def prepare_torch(num_threads: int | None) -> None:
    """Set the number of threads; turn off TorchRL's notes and the checks of distributions' parameters."""
    torchrl_logger.setLevel("WARNING")
    # checking the parameters costs more than drawing the sample
    torch.distributions.Distribution.set_default_validate_args(False)
    if num_threads is not None:
        torch.set_num_threads(num_threads)


# ----------------------------------------------------------------------------------------------- compiling


def has_compiler() -> bool:
    """Whether PyTorch finds a C++ compiler. Compiled updates need one, on a GPU too, for the code of the host."""
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return False
    return True


def choose_compile(options: Any, updates: float) -> None:
    """Choose ``compile.enabled`` if it is null.

    The number of updates decides. A machine without a C++ compiler runs all updates eagerly, and :func:`announce` says
    so.

    Args:
        options: config group with ``enabled``, changed in place.
        updates: number of updates of the whole run.

    Raises:
        UsageError: if ``enabled`` is true and there is no compiler.
    """
    if options.enabled is None:
        options.enabled = updates >= WORTH_COMPILING and has_compiler()
    elif options.enabled and not has_compiler():
        raise UsageError(f"compile.enabled=True: must be false or null where {NO_COMPILER}")


def announce(about: str, updates: float, *, compiled: bool) -> None:
    """Print what will be trained, and whether its updates are compiled."""
    as_wished = compiled or updates < WORTH_COMPILING or has_compiler()
    why = "" if as_wished else f" ({NO_COMPILER})"
    print(f"{about}, compile.enabled={str(compiled).lower()}{why}")
    if compiled:
        print("updates are compiled: the first takes about half a minute (compile.enabled=false leaves it out)")


# ------------------------------------------------------------------------------------------- what trains


def build_optimizer(
    loss: LossModule,
    actor: ExpertsActor | OptionActor | None = None,
    *,
    lr: float,
    eps: float,
    weight_decay: float = 0.0,
    router_lr: float | None = None,
) -> torch.optim.Optimizer:
    """One Adam for all parameters of the loss; with ``router_lr``, the actor's router has its own learning rate."""
    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if router_lr is not None:
        assert actor is not None
        apart = {id(parameter) for parameter in actor.router_parameters()}
        groups = [
            {"params": [p for p in parameters if id(p) not in apart]},
            {"params": [p for p in parameters if id(p) in apart], "lr": router_lr},
        ]
    return torch.optim.Adam(groups, lr=lr, eps=eps, weight_decay=weight_decay, fused=True)


@dataclass(frozen=True)
class RayOptions:
    """Workers that collect frames; see :class:`torchrl_pmoe.collectors.ReplaceableRayCollector`.

    Args:
        create_env: makes the environments of one worker, by functions of the library.
        num_envs: of all workers.
        num_workers: Ray actors.
        seed: of the run.
        sync: whether all workers collect with the same weights.
        address: of a Ray cluster; ``None`` starts Ray on this machine.
        patience: seconds without an answer after which a worker counts as dead.
        max_restarts: how many times in a row a worker is replaced.
    """

    create_env: Callable[[], EnvBase]
    num_envs: int
    num_workers: int
    seed: int
    sync: bool = True
    address: str | None = None
    patience: float = 300.0
    max_restarts: int = 3


def build_collector(
    env: EnvBase,
    policy: TensorDictModuleBase,
    *,
    frames_per_batch: int,
    init_random_frames: int = 0,
    device: torch.device | str = "cpu",
    ray: RayOptions | None = None,
    transforms: Sequence[Callable[[], Transform]] = (),
    normalization: NormalizeObservationAndReward | None = None,
    keys: Sequence[NestedKey] | None = None,
) -> BaseCollector:
    """A collector of frames, which takes random actions first.

    Args:
        env: steps here; with ``ray``, only its specs are used.
        policy: acts.

    Keyword Args:
        frames_per_batch: of all environments.
        init_random_frames: by random actions.
        device: of the policy.
        ray: workers that collect in place of this process.
        transforms: with ``ray``, each makes a transform of a worker's environments.
        normalization: with ``ray``, gathers the running statistics of all workers.
        keys: with ``ray``, what is sent of a frame; all of it if not given.

    Raises:
        UsageError: where Ray cannot be reached.
        EnvironmentFault: where a worker cannot make its environments.
    """
    # rounded up to whole batches; the collector would do so with a warning
    init_random_frames = -(-init_random_frames // frames_per_batch) * frames_per_batch
    if ray is not None:
        try:
            return ReplaceableRayCollector(
                policy=policy,
                frames_per_batch=frames_per_batch,
                init_random_frames=init_random_frames,
                transforms=transforms,
                normalization=normalization,
                keys=keys,
                env=env,
                **vars(ray),
            )
        except ClusterError as error:
            address = ray.address or "null"
            raise UsageError(
                f"collector.ray.address={address}: must be the address of a Ray cluster that runs, or null ({error})"
            ) from error
    # frames stay on the device of the environments: with mjx on a GPU, nothing passes through the host
    there = env.device or "cpu"
    return Collector(
        env,
        policy,
        frames_per_batch=frames_per_batch,
        total_frames=-1,
        init_random_frames=init_random_frames,
        policy_device=device,
        env_device=there,
        storing_device=there,
        exploration_type=ExplorationType.RANDOM,
        track_traj_ids=False,
        trust_policy=True,
        auto_register_policy_transforms=False,
    )


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints of a run.

    Args:
        interval: number of frames between two checkpoints.
        keep: how many of the newest are kept.
        metadata: description of the run, saved in every checkpoint.
        unsaved: components that are not saved.
    """

    interval: int
    keep: int = 2
    metadata: Mapping[str, Any] = field(default_factory=dict)
    unsaved: frozenset[str] = frozenset()


def build_trainer(
    run_dir: Path,
    *,
    collector: BaseCollector,
    total_frames: int,
    loss: LossModule,
    optimizer: torch.optim.Optimizer,
    stepper: FusedOptimizationStepper,
    checkpoints: CheckpointOptions,
    seed: int,
    **kwargs: Any,
) -> Trainer:
    """TorchRL's trainer with checkpoints in ``run_dir``. It stops at the first frame that is NaN or infinite.

    Args:
        run_dir: directory of the run.

    Keyword Args:
        collector: collects the frames.
        total_frames: number of frames of the run.
        loss: minimised.
        optimizer: of the loss's parameters.
        stepper: makes the updates.
        checkpoints: how often they are written, and what they hold.
        seed: of the run. An environment whose state cannot be saved starts again from it after a resume.
        **kwargs: further arguments of the trainer.
    """
    metadata = dict(checkpoints.metadata)
    remote = isinstance(collector, ReplaceableRayCollector)
    episodes = collector.episodes if remote else EpisodeState(collector, seed)
    trainer = Trainer(
        collector=collector,
        total_frames=total_frames,
        frame_skip=1,
        loss_module=loss,
        optimizer=optimizer,
        optimization_stepper=stepper,
        progress_bar=False,
        # the trainer saves when more frames than this have passed
        save_trainer_interval=checkpoints.interval - 1,
        checkpoint=VerifiedCheckpoint(rng=GlobalRNGState(), episodes=episodes),
        checkpoint_rotation=RunDirectory(run_dir).rotation(checkpoints.keep),
        checkpoint_metadata=lambda trainer: metadata,
        auto_log_optim_steps=False,
        **kwargs,
    )
    FiniteBatch(["observation", ("next", "observation"), ("next", "reward")]).register(trainer)
    FiniteLoss(stepper).register(trainer)
    return trainer


def watch_experts(trainer: Trainer, actor: ProbabilisticActor, states: Callable[[], TensorDictBase]) -> None:
    """Warn once when the router uses one expert only.

    Args:
        trainer: of the run.
        actor: the policy.
        states: returns recent states ``[B]``.
    """

    @torch.no_grad()
    def usage() -> Tensor:
        return actor.get_dist(states()).probs.mean(0)

    ExpertCollapse(
        usage,
        advice="a smaller optim.router_lr slows this down, routing=soft_frequency keeps several experts, "
        "and routing=none shows whether they are needed",
    ).register(trainer)


# ------------------------------------------------------------------------------------------ train and record


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
    RunDirectory(run_dir).finish(trainer.total_frames // number)
    # a training of an experiment has as many frames as the others of the experiment
    print(what_next(run_dir, agents, [one.last for one in metrics], longer=not only_if_unfinished))


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
    "CheckpointOptions",
    "EvaluationOptions",
    "LoggerOptions",
    "RayOptions",
    "announce",
    "build_collector",
    "build_optimizer",
    "build_trainer",
    "choose_compile",
    "isolated_rng",
    "mean_columns",
    "prepare_torch",
    "seed_everything",
    "train_and_record",
    "watch_experts",
]
