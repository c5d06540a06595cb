"""What every recipe needs around its loss: process, compiling, optimiser, collector and trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase
from torchrl.envs.transforms import Transform
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import LossModule
from torchrl.trainers import Trainer

from parts.errors import UsageError
from torchrl_pmoe.baselines import OptionActor
from torchrl_pmoe.collectors import ClusterError, ReplaceableRayCollector
from torchrl_pmoe.envs import NormalizeObservationAndReward
from torchrl_pmoe.modules.actors import ExpertsActor
from torchrl_pmoe.runs import (
    EpisodeState,
    RunDirectory,
    VerifiedCheckpoint,
)
from torchrl_pmoe.trainers import (
    ExpertCollapse,
    FiniteBatch,
    FiniteLoss,
    FusedOptimizationStepper,
)

# compiling takes as long as it saves in some 5,000 updates
WORTH_COMPILING = 20_000
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


__all__ = [
    "CheckpointOptions",
    "RayOptions",
    "announce",
    "build_collector",
    "build_optimizer",
    "build_trainer",
    "choose_compile",
    "prepare_torch",
    "seed_everything",
    "watch_experts",
]
