"""What happens around a training, whatever is trained: trainer, evaluation, diagnostics."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import common
import numpy as np
import process
import resume
import torch
from common import Interrupted, RunError, UsageError, cause, last_words, leaves, make_gym, raw_action_policy
from omegaconf import DictConfig, OmegaConf
from recording import CheckpointLog, RunRecorder, replace
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torchrl.checkpoint import CheckpointError, GlobalRNGState
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import LossModule, TargetNetUpdater
from torchrl.record.loggers import Logger
from torchrl.trainers import Trainer

from torchrl_pmoe import NormalMixture
from torchrl_pmoe.envs import EpisodeState
from torchrl_pmoe.envs.simulators import generator_state, load_generator_state
from torchrl_pmoe.runs import run_logger
from torchrl_pmoe.trainers import (
    ExpertCollapse,
    FiniteBatch,
    FusedOptimizationStepper,
    NonFiniteError,
    PeriodicEvaluation,
    ProgressBar,
    VerifiedCheckpoint,
    mixture_diagnostics,
    saturation,
)

# updates that win back the time of compiling them, with much to spare
WORTH_COMPILING = 50_000
NO_COMPILER = "there is no C++ compiler: g++, clang++ on macOS, or what CXX names"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)

# ------------------------------------------------------------------------------------------- evaluation


class Evaluator:
    """Runs whole episodes on environments of its own, all at once, without touching the run's randomness.

    Args:
        name: Gymnasium id.
        policy: reads ``observation`` and writes ``action``; asked for its deterministic action. What it writes into
            ``next`` is there again in the next step of the episode.
        episodes: how many episodes make one evaluation.
        max_steps: an episode is cut here.
        seed: of the environments and of what the policy may draw.
        device: of the policy.
        env_kwargs: of the environments.
        stopped: asked at every step whether the evaluation is to be given up.
    """

    def __init__(
        self,
        name: str,
        policy: TensorDictModuleBase,
        *,
        episodes: int,
        max_steps: int,
        seed: int,
        device: str = "cpu",
        env_kwargs: Mapping[str, Any] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.policy = policy
        self.stopped = stopped
        self.max_steps = max_steps
        self.device = device
        self.seed = seed
        self.envs = [make_gym(name, env_kwargs) for _ in range(episodes)]
        for index, env in enumerate(self.envs):
            env.reset(seed=seed + index)

    @torch.no_grad()
    def __call__(self) -> Tensor | None:
        """The return of every episode, ``[episodes]``.

        ``None`` where it was given up: it can be done again as if nothing had been.
        """
        before = self.state_dict()
        with isolated_rng(self.seed), set_exploration_type(ExplorationType.DETERMINISTIC):
            returns = self._episodes()
        if returns is None:
            self.load_state_dict(before)
        return returns

    def _episodes(self) -> Tensor | None:
        returns = torch.zeros(len(self.envs), dtype=torch.float64)
        observation = np.stack([env.reset()[0] for env in self.envs])
        running = list(range(len(self.envs)))
        carried = TensorDict({}, [len(running)])
        for _ in range(self.max_steps):
            if self.stopped():
                return None
            batch = torch.as_tensor(observation[running], dtype=torch.float32, device=self.device)
            td = self.policy(carried.set("observation", batch))
            actions = td.get("action").cpu().numpy()
            if not np.isfinite(actions).all():
                raise NonFiniteError(
                    "the policy returned a NaN or infinite action in an evaluation: the run stops here"
                )
            still = []
            for index, action in zip(running, actions, strict=True):
                observation[index], reward, terminated, truncated, _ = self.envs[index].step(action)
                returns[index] += float(reward)
                if not (np.isfinite(observation[index]).all() and math.isfinite(reward)):
                    raise NonFiniteError(
                        "the evaluation met a NaN or infinite reward or observation: the run stops here"
                    )
                if not (terminated or truncated):
                    still.append(index)
            kept = [row for row, index in enumerate(running) if index in still]
            carried = td.get("next", TensorDict({}, [len(running)]))[kept]
            running = still
            if not running:
                break
        return returns

    def state_dict(self) -> dict[str, Any]:
        """The random generators of the environments; every evaluation begins with new episodes."""
        return {"generators": [generator_state(env) for env in self.envs]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the random generators."""
        for env, state in zip(self.envs, state_dict["generators"], strict=False):
            load_generator_state(env, state)

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()


def diagnose(
    actor: ProbabilisticActor,
    states: TensorDictBase,
    qvalues: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Diagnostics of a policy, of a mixture all that there are.

    Args:
        actor: the policy.
        states: what it reads, ``[B]``.
        qvalues: maps proposals ``[B, K, A]`` to the critics' values ``[num_critics, B, K]``.
    """
    with torch.no_grad():
        dist = actor.get_dist(states)
        share = {"saturation": saturation(dist.sample()).item()}
        if not isinstance(dist, NormalMixture):
            return share
        found = mixture_diagnostics(dist, qvalues)
    usage = found.pop("usage").tolist()
    row = {key: value.item() for key, value in found.items()}
    return {**row, **share, **{f"usage_{k}": value for k, value in enumerate(usage)}}


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Draw from PyTorch generators seeded with ``seed``, and put the run's own back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


# ------------------------------------------------------------------------------------------- training


def build_optimizer(cfg: DictConfig, loss: LossModule, actor: ProbabilisticActor | None) -> torch.optim.Optimizer:
    """One Adam for everything that the loss trains; the router of an actor may have a rate of its own."""
    optim = cfg.optim
    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    groups = [{"params": parameters}]
    if optim.router_lr is not None and actor is not None:
        router = {id(p) for p in actor.router_parameters()}
        groups = [
            {"params": [p for p in parameters if id(p) not in router]},
            {"params": [p for p in parameters if id(p) in router], "lr": optim.router_lr},
        ]
    return torch.optim.Adam(groups, lr=optim.lr, eps=optim.adam_eps, weight_decay=optim.weight_decay, fused=True)


def has_compiler() -> bool:
    """Whether PyTorch finds the C++ compiler that compiled updates need, on a GPU for the code of the host."""
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return False
    return True


def resolve_compile(cfg: DictConfig, updates: float) -> None:
    """Put true or false in the place of an unset ``compile.enabled``.

    The number of updates decides, and nothing that is installed; only where updates are to be compiled and there is no
    compiler they run eagerly, and :func:`announce` says so.

    Args:
        cfg: a checked config.
        updates: of the whole run.

    Raises:
        UsageError: where updates were asked to be compiled and there is no compiler.
    """
    asked = cfg.compile.enabled
    if asked is None:
        cfg.compile.enabled = updates >= WORTH_COMPILING and has_compiler()
    common.refuse(cfg, {"compile.enabled": (bool(asked) and not has_compiler(), f"false or null where {NO_COMPILER}")})


def build_stepper(
    cfg: DictConfig,
    target_updater: TargetNetUpdater | None = None,
    clip_apart: Sequence[Iterable[nn.Parameter]] = (),
    shape: Sequence[int] = (),
) -> FusedOptimizationStepper:
    """What makes one update.

    Args:
        cfg: a resolved config; ``compile`` is read.
        target_updater: stepped after the optimiser.
        clip_apart: parameters whose gradients are clipped by their own norm.
        shape: of the outputs of the loss.
    """
    return FusedOptimizationStepper(
        target_updater,
        clip_apart=clip_apart,
        compile=cfg.compile.enabled,
        cudagraphs=cfg.compile.cudagraphs,
        shape=shape,
        on_nonfinite=cfg.on_nonfinite,
    )


def announce(cfg: DictConfig, about: str, updates: float) -> None:
    """Say what is about to be trained, whether its updates are compiled, and why the first takes long, where it does.

    Args:
        cfg: a resolved config; ``compile`` is read.
        about: the policy and where frames come from.
        updates: of the whole run.
    """
    as_wished = cfg.compile.enabled or updates < WORTH_COMPILING or has_compiler()
    why = "" if as_wished else f" ({NO_COMPILER})"
    print(f"{about}, compile.enabled={str(cfg.compile.enabled).lower()}{why}")
    if cfg.compile.enabled:
        print("updates are compiled: the first takes about half a minute (compile.enabled=false leaves it out)")


def build_evaluator(cfg: DictConfig, policy: TensorDictModuleBase, seed: int, stopped: Callable[[], bool]) -> Evaluator:
    """Evaluates a policy of normalised actions as ``logger`` says, until it is ``stopped``; ``seed`` is the run's."""
    return Evaluator(
        cfg.env,
        raw_action_policy(cfg, policy),
        episodes=cfg.logger.eval_episodes,
        max_steps=cfg.logger.eval_max_steps,
        seed=seed + 1_000_000,
        device=cfg.device,
        env_kwargs=cfg.env_kwargs,
        stopped=stopped,
    )


class Evaluation:
    """The rows of a run, agent by agent: evaluated, measured, and written when all of them are complete.

    An evaluation that is given up leaves what was measured beside it in the checkpoint, so that a run that goes on
    begins with the episodes that are missing, and writes the rows that it would have written.

    Args:
        evaluators: one an agent.
        recorders: of their rows.
        measure: the columns of every row but clocks and returns.
        written: called with the rows and the frames.
    """

    def __init__(
        self,
        evaluators: Sequence[Evaluator],
        recorders: Sequence[RunRecorder],
        measure: Callable[[], list[dict[str, float]]],
        written: Callable[[list[dict[str, float]], int], None],
    ) -> None:
        self.evaluators, self.recorders = evaluators, recorders
        self.measure, self.written = measure, written
        self.given_up: list[dict[str, float]] = []

    def __call__(self, frames: int) -> bool:
        """Add a row to every record, after ``frames`` frames of each agent; whether the evaluation came to its end."""
        # the clocks of all stand still while one is evaluated
        with ExitStack() as paused:
            rows = [recorder.clock(frames) for recorder in self.recorders]
            for recorder in self.recorders:
                paused.enter_context(recorder.paused())
            measured = self.given_up or self.measure()
            before = self.state_dict()
            for row, evaluator, columns in zip(rows, self.evaluators, measured, strict=True):
                returns = evaluator()
                if returns is None:
                    # those that are through must give the same returns again
                    self.load_state_dict({**before, "given_up": measured})
                    return False
                row.update({**summarize(returns), **columns})
            self.given_up = []
            for row, recorder in zip(rows, self.recorders, strict=True):
                recorder.write(row)
            self.written(rows, frames)
        return True

    def resume(self, frames: int) -> None:
        """Go on with the records after ``frames`` frames of each agent."""
        for recorder in self.recorders:
            recorder.resume(frames - bool(self.given_up))

    def state_dict(self) -> dict[str, Any]:
        """Of the evaluators, and what was measured beside an evaluation that was given up."""
        return {"evaluators": [evaluator.state_dict() for evaluator in self.evaluators], "given_up": self.given_up}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of the evaluators."""
        for evaluator, state in zip(self.evaluators, state_dict["evaluators"], strict=True):
            evaluator.load_state_dict(state)
        self.given_up = state_dict["given_up"]

    def close(self) -> None:
        """Close the environments."""
        for evaluator in self.evaluators:
            evaluator.close()

    def plot(self) -> None:
        """Draw every record."""
        for recorder in self.recorders:
            recorder.plot()


def summarize(returns: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the returns of an evaluation, ``[episodes]``."""
    return {"return_mean": returns.mean().item(), "return_std": returns.std(correction=0).item()}


def build_collector(
    cfg: DictConfig, env: EnvBase, policy: TensorDictModuleBase, *, frames_per_batch: int, init_random_frames: int = 0
) -> Collector:
    """Collects batches of frames with the policy that is being trained, random actions first."""
    return Collector(
        env,
        policy,
        frames_per_batch=frames_per_batch,
        total_frames=-1,
        # whole batches, as the collector makes of it with a warning
        init_random_frames=-(-init_random_frames // frames_per_batch) * frames_per_batch,
        policy_device=cfg.device,
        # frames stay where the environments make them: with mjx on a GPU, nothing passes through the host
        env_device=env.device or "cpu",
        storing_device=env.device or "cpu",
        exploration_type=ExplorationType.RANDOM,
        track_traj_ids=False,
        trust_policy=True,
        auto_register_policy_transforms=False,
    )


@contextmanager
def build_logger(cfg: DictConfig, run_dir: Path) -> Iterator[Logger | None]:
    """The logger that ``logger.backend`` names, beside ``metrics.csv``; ``None`` without one.

    Raises:
        UsageError: where it cannot be opened.
    """
    if cfg.logger.backend is None:
        yield None
        return
    hparams = {key: value for key, value in leaves(cfg) if key != "resume"}
    with ExitStack() as stack:
        try:
            logger = stack.enter_context(
                run_logger(cfg.logger.backend, run_dir, project=cfg.logger.project_name, hparams=hparams)
            )
        # services of other people raise what they like
        except Exception as error:
            raise UsageError(
                f"logger.backend={cfg.logger.backend}: must be one that can be written to ({process.describe(error)})"
            ) from error
        yield logger


def build_trainer(
    cfg: DictConfig,
    run_dir: Path,
    *,
    collector: Collector,
    loss: LossModule,
    optimizer: torch.optim.Optimizer,
    stepper: FusedOptimizationStepper,
    **kwargs: Any,
) -> Trainer:
    """TorchRL's trainer with checkpoints in ``run_dir``, and a stop before a bad batch gets anywhere.

    Args:
        cfg: ``total_frames`` and ``checkpoint`` are read.
        run_dir: the run's own.
        collector: of frames.
        loss: to be minimised.
        optimizer: of its parameters.
        stepper: of the optimiser.
        **kwargs: of the trainer.
    """
    trainer = Trainer(
        collector=collector,
        total_frames=cfg.total_frames,
        frame_skip=1,
        loss_module=loss,
        optimizer=optimizer,
        optimization_stepper=stepper,
        progress_bar=False,
        # the trainer saves once more frames than this have passed
        save_trainer_interval=cfg.checkpoint.interval - 1,
        checkpoint=VerifiedCheckpoint(rng=GlobalRNGState(), episodes=EpisodeState(collector, cfg.seed)),
        checkpoint_rotation=resume.rotation(run_dir, cfg.checkpoint.keep),
        checkpoint_metadata=resume.metadata(cfg),
        auto_log_optim_steps=False,
        **kwargs,
    )
    FiniteBatch(["observation", ("next", "observation"), ("next", "reward")]).register(trainer)
    return trainer


def watch_experts(trainer: Trainer, actor: ProbabilisticActor, states: Callable[[], TensorDictBase]) -> None:
    """Warn once when one expert takes over.

    Args:
        trainer: of the run.
        actor: the policy.
        states: that it has met lately, ``[B]``.
    """

    @torch.no_grad()
    def usage() -> Tensor:
        return actor.get_dist(states()).probs.mean(0)

    ExpertCollapse(
        usage,
        advice="a smaller optim.router_lr slows that, routing=soft_frequency keeps several experts, "
        "and routing=none tells whether they are needed (README)",
    ).register(trainer)


@contextmanager
def finish_on_signal(trainer: Trainer, received: list[int]) -> Iterator[None]:
    """Let the first signal end the training after its batch, with a checkpoint; another one acts at once.

    Args:
        trainer: to be stopped.
        received: filled with the numbers of the signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in process.endings()}

    def handle(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if name == "SIGHUP":
            # a closed terminal sends it, and so does the shell that it ends: it is no second word
            process.leave_terminal()
        elif any(signal.Signals(other).name != "SIGHUP" for other in received):
            usual = before[number]
            if callable(usual):
                usual(number, frame)
            else:
                # the system's own, where no recipe was started: in a user's script or another launcher's process
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        received.append(number)
        trainer.request_stop(name)
        # the interpreter may be printing just now, and whoever reads that may have ended by the same signal
        with suppress(OSError):
            os.write(2, b"\nstopping: this batch is finished and a checkpoint written (once more: at once)\n")
        trainer.optimization_stepper.stop_compiling()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def train_and_record(
    cfg: DictConfig,
    run_dir: Path,
    trainer: Trainer,
    policy: TensorDictModuleBase,
    *,
    algorithm: str,
    about: str,
    updates: float,
    loss_columns: Sequence[str],
    diagnose: Callable[[], Mapping[str, float]],
    checkpoint: Path | None = None,
    on_resume: Callable[[], None] = lambda: None,
    unsaved: Sequence[str] = (),
    only_if_unfinished: bool = False,
) -> None:
    """Train to the end; leave ``metrics.csv`` and ``learning_curve.png`` in ``run_dir``.

    Args:
        cfg: the resolved config.
        run_dir: the run's own.
        trainer: made by :func:`build_trainer`, with its hooks.
        policy: what is evaluated.
        algorithm: its name, for the title of the plot.
        about: printed before the first frame, after all that can be wrong with the input.
        updates: of the whole run.
        loss_columns: outputs of the loss whose means are recorded.
        diagnose: more columns; the same ones every time.
        checkpoint: to go on from.
        on_resume: called once it is loaded.
        unsaved: components that checkpoints leave out.
        only_if_unfinished: a checkpoint that has all frames is loaded, and no more than that.
    """
    stepper = trainer.optimization_stepper
    received: list[int] = []
    evaluator = build_evaluator(cfg, policy, cfg.seed, lambda: bool(received))
    recorder = RunRecorder(run_dir, title=f"{algorithm}, {cfg.policy}, {cfg.env}, seed {cfg.seed}")

    def measure() -> list[dict[str, float]]:
        stepper.check()
        means = stepper.means()
        columns = {key: means.get(key, float("nan")) for key in loss_columns}
        with isolated_rng(cfg.seed):
            columns.update(diagnose())
        if cfg.on_nonfinite == "skip":
            columns.update(skipped_updates=stepper.skipped)
        return [columns]

    def written(rows: list[dict[str, float]], frames: int) -> None:
        stepper.reset()
        if logger is not None:
            for key, value in rows[0].items():
                logger.log_scalar(key, value, step=frames)

    evaluation = Evaluation([evaluator], [recorder], measure, written)
    PeriodicEvaluation(evaluation, cfg.logger.eval_interval).register(trainer)
    trainer.checkpoint.register("evaluation", evaluation)
    trainer.checkpoint.save_components = frozenset(trainer.checkpoint.components) - set(unsaved)
    if checkpoint is not None:
        go_on(cfg, run_dir, trainer, checkpoint, evaluation, finished=only_if_unfinished)
        if trainer.collected_frames >= cfg.total_frames and not evaluation.given_up:
            evaluation.close()
            return
        on_resume()
        evaluation.resume(trainer.collected_frames)

    def status() -> dict[str, str]:
        entropy = stepper.means().get("routing_entropy", recorder.last.get("routing_entropy"))
        shown = {"return": recorder.last.get("return_mean"), "routing entropy": entropy}
        return {key: f"{value:.4g}" for key, value in shown.items() if value is not None}

    with closing(evaluation), build_logger(cfg, run_dir) as logger:
        keep_config(cfg, run_dir)
        announce(cfg, about, updates)
        bar = ProgressBar(
            cfg.total_frames, status, initial=trainer.collected_frames, disable=not cfg.logger.progress_bar
        )
        bar.register(trainer)
        with closing(bar):
            run_to_the_end(trainer, run_dir, evaluation, received)
    if cfg.on_nonfinite == "skip":
        print(f"left out: {stepper.skipped} updates")


def go_on(
    cfg: DictConfig,
    run_dir: Path,
    trainer: Trainer,
    checkpoint: Path,
    evaluation: Evaluation,
    *,
    finished: bool = False,
) -> None:
    """Load a checkpoint into a trainer whose hooks are registered, and clear up behind the run that wrote it.

    Raises:
        UsageError: where it does not fit, or has the frames already and may not (``finished``).
    """
    try:
        trainer.load_from_file(checkpoint)
    except CheckpointError as error:
        raise UsageError(f"resume={resume.does_not_fit(checkpoint, error)}") from error
    if trainer.collected_frames >= trainer.total_frames and not (finished or evaluation.given_up):
        frames = trainer.collected_frames * cfg.total_frames // trainer.total_frames
        raise UsageError(
            f"total_frames={cfg.total_frames}: must be above the {frames} frames that resume={cfg.resume} has"
        )
    resume.tidy(run_dir, checkpoint)
    line = f"goes on at frame {trainer.collected_frames:,} from {checkpoint.name}"
    if trainer.checkpoint.components["episodes"].fresh:
        line += "; this environment's state cannot be restored: new episodes begin"
    print(line)


def keep_config(cfg: DictConfig, run_dir: Path) -> None:
    """Write ``config.yaml``."""
    kept = cfg.copy()
    kept.resume = None
    run_dir.mkdir(parents=True, exist_ok=True)
    replace(run_dir / "config.yaml", OmegaConf.to_yaml(kept))


def run_to_the_end(trainer: Trainer, run_dir: Path, evaluation: Evaluation, received: list[int]) -> None:
    """Train; whatever ends it, the picture is drawn.

    Args:
        trainer: with its hooks.
        run_dir: the run's own.
        evaluation: one that an earlier run gave up comes first.
        received: filled with the numbers of the signals that end it.

    Raises:
        Interrupted: if a signal has ended it, after a checkpoint.
        RunError: in one line, for any other end; the last checkpoint stays whole.
    """
    trainer.checkpoint.on_saved = log = CheckpointLog(run_dir)
    # a collector that is shut down lets go of it, and its processes may have said what went wrong
    env = trainer.collector.env
    undrawn = None
    with finish_on_signal(trainer, received):
        try:
            _train(trainer, evaluation, received)
        except Exception as error:
            # a tensordict's context manager answers an interrupt with an error of its own
            if isinstance(error.__context__, KeyboardInterrupt):
                raise
            with suppress(Exception):
                # its processes, where the next job of a sweep has its own
                trainer.collector.shutdown()
            raise RunError(f"{what_ended(error, trainer, env, run_dir)}, {what_is_left(run_dir)}") from error
        finally:
            try:
                evaluation.plot()
            # what ended the run is told, and a full disk has no room for a picture either
            except Exception as error:
                undrawn = error
    print(log)
    if undrawn is not None:
        warnings.warn(f"there is no picture of the run ({process.describe(undrawn)})", stacklevel=1)
    if received and (trainer.collected_frames < trainer.total_frames or evaluation.given_up):
        raise Interrupted(received[0], f"at frame {trainer.collected_frames:,}, with a checkpoint")


def _train(trainer: Trainer, evaluation: Evaluation, received: list[int]) -> None:
    if evaluation.given_up:
        trainer._modules["periodic_evaluation"].now()
    if trainer.collected_frames < trainer.total_frames and not received:
        trainer.train()
        return
    if not evaluation.given_up:
        trainer.save_trainer(force_save=True)
    trainer.collector.shutdown()


def what_ended(error: Exception, trainer: Trainer, env: EnvBase, run_dir: Path) -> str:
    """Why a training could not go on, in one line; the traceback of what nobody has foreseen is kept."""
    if isinstance(error, NonFiniteError):
        return str(error)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        reason = f"a file could not be written: {error.strerror}"
    elif isinstance(error, CheckpointError):
        reason = str(error)
    else:
        if (told := last_words(env)) is not None:
            line, trace = told
            error.__cause__ = RuntimeError(f"in a process of its own:\n{trace}")
        else:
            line = cause(error)
        reason = f"{line} ({process.keep_traceback(error, run_dir)})"
    return f"frame {trainer.collected_frames}: {reason}; the run stops here"


def what_is_left(run_dir: Path) -> str:
    """The last checkpoint of a run, and how to go on from it."""
    last = resume.rotation(run_dir).latest()
    if last is None:
        return "there is no checkpoint yet"
    return f"{last.name} is whole; {resume.how_to_go_on(run_dir)}"
