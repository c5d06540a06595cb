"""The keys that several recipes have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from parts.errors import UsageError
from parts.networks import ACTIVATIONS, POLICIES, UNIMODAL
from parts.recording import EvaluationOptions, LoggerOptions
from parts.resume import metadata
from parts.training import CheckpointOptions, RayOptions
from pydantic import AfterValidator, Field
from torchrl.envs import EnvBase

from config.typed import (
    Allowed,
    Device,
    Flag,
    Integer,
    Kwargs,
    Number,
    RunPath,
    Text,
    config_class,
    field,
    get,
    group,
    hparams,
    set_,
    to_dict,
)
from torchrl_pmoe.envs.making import Backend, faster_backend, full_id, make_env, unavailable


def _one_of(names: Any, value: str) -> str:
    if value not in names:
        raise ValueError(f"must be one of {', '.join(names)}")
    return value


# the registry is asked when a config is read, so that a script may add a policy of its own
PolicyName = Annotated[
    Text, AfterValidator(lambda value: _one_of(POLICIES, value)), Allowed("one of " + ", ".join(POLICIES))
]
Activation = Annotated[
    Text, AfterValidator(lambda value: _one_of(ACTIVATIONS, value)), Allowed("one of " + ", ".join(ACTIVATIONS))
]
Experts = Annotated[Integer, Field(ge=1, le=1024)]
Positive = Annotated[Number, Field(gt=0)]
Threads = Annotated[Integer, Field(ge=1, le=256)]
Seed = Annotated[Integer, Field(ge=0, le=2**31 - 1)]
Frames = Annotated[Integer, Field(ge=1)]
EvalExpert = Literal["largest", "drawn"]
LossFunction = Literal["l2", "l1", "smooth_l1"]


@config_class
class Compile:
    """``torch.compile`` and CUDA graphs for the updates."""

    enabled: Flag | None = field(None, "null: for a run of 20,000 updates or more; needs a C++ compiler")
    cudagraphs: Flag = field(False, "replay an update as one CUDA graph (device=cuda)")


@config_class
class Logger:
    """What is recorded, and how often a policy is evaluated."""

    backend: Literal["csv", "tensorboard", "wandb", "mlflow", "trackio"] | None = field(None, "beside metrics.csv")
    project_name: Text = field("torchrl_pmoe", "of the service")
    eval_interval: Frames = field(10_000, "frames between two evaluations")
    eval_episodes: Annotated[Integer, Field(ge=1, le=10_000)] = field(10, "episodes of an evaluation")
    eval_max_steps: Frames = field(10_000, "an episode without a time limit of its own ends here")
    progress_bar: Flag = field(True, "show one")


@config_class
class ExpertLogger(Logger):
    """As :class:`Logger`, for a policy of experts."""

    eval_expert: EvalExpert | None = field(
        None, "largest: the mixture's mode; drawn: an expert from the router, its mean; null: the preset's"
    )


@config_class
class Checkpoint:
    """Checkpoints of the run."""

    interval: Frames = field(20_000, "frames between two checkpoints")
    keep: Frames = field(2, "the newest ones")

    def unsaved(self) -> frozenset[str]:
        """The components that a checkpoint leaves out."""
        return frozenset()


@config_class
class RayWorkers:
    """Workers of ``collector.backend=ray``, on this machine or on others."""

    address: Text | None = field(None, "host:port of a cluster's head, or auto; null: Ray on this machine alone")
    workers: Annotated[Integer, Field(ge=1, le=2**16)] | None = field(None, "they share num_envs; null: num_envs")
    sync: Flag = field(True, "all collect with the same weights, runs repeat exactly; false: nobody waits")
    backend: Backend = field("serial", "how a worker steps its environments")
    patience: Positive = field(300.0, "seconds without an answer after which a worker is replaced")
    max_restarts: Annotated[Integer, Field(ge=0, le=2**20)] = field(3, "of a worker that dies again and again")


@config_class
class Collector:
    """Where frames come from."""

    num_envs: Annotated[Integer, Field(ge=1, le=2**20)] = field(1, "environments")
    backend: Literal[Backend, "ray"] | None = field(
        "serial",
        "one after the other | threads, for long steps | processes | extra envpool | extra mjx (device=cuda too) | "
        "extra ray, workers on many machines | null: serial or threads, which a measurement says is faster",
    )
    ray: RayWorkers = group(RayWorkers)

    def described(self) -> str:
        """How many environments there are, and where they run."""
        what = f"{self.num_envs} environment{'s' * (self.num_envs > 1)}, collector.backend={self.backend}"
        if self.backend != "ray":
            return what
        ray = self.ray
        waiting = "sync" if ray.sync else "async"
        return f"{what}, {ray.workers} {waiting} worker{'s' * (ray.workers != 1)} at {ray.address or 'this machine'}"


@config_class
class Optim:
    """The optimiser."""

    lr: Positive = field(3e-4, "of Adam")
    router_lr: Positive | None = field(None, "of the router; null: lr")
    weight_decay: Annotated[Number, Field(ge=0)] = field(0.0)
    adam_eps: Positive = field(1e-8)
    gamma: Annotated[Number, Field(ge=0, le=1)] = field(0.99, "discount")
    num_threads: Threads | None = field(None, "null: PyTorch's own choice")

    def adam(self) -> dict[str, Any]:
        """Keyword arguments of :func:`parts.training.build_optimizer`."""
        return {
            "lr": self.lr,
            "router_lr": self.router_lr,
            "weight_decay": self.weight_decay,
            "eps": self.adam_eps,
        }


@config_class
class Run:
    """The keys of every recipe, and what the recipes make of them."""

    env: Text = field("Walker2d-v4", "any Gymnasium id with a vector of observations and a bounded Box of actions")
    env_kwargs: Kwargs = field({}, "of the environment: +env_kwargs.NAME=VALUE")
    seed: Seed = field(0)
    total_frames: Frames = field(1_000_000, "whole batches of collector.frames_per_batch, rounded up")
    device: Device = field(None, "null: cuda where there is one, else cpu")
    resume: RunPath = field(None, "an earlier run, to go on from its last checkpoint, or one of its checkpoints")
    on_nonfinite: Literal["stop", "skip"] = field("stop", "an update in which a number is NaN or infinite")
    optim: Optim = group(Optim)
    compile: Compile = group(Compile)
    collector: Collector = group(Collector)
    logger: Logger = group(Logger)
    checkpoint: Checkpoint = group(Checkpoint)

    @property
    def updates(self) -> float:
        """How many updates a run makes."""
        raise NotImplementedError

    def choose_backend(self, agents: int = 1) -> None:
        """Measure where the environments of some agents step faster, if ``collector.backend`` is null.

        The frames are the same. A run that goes on keeps what was chosen.
        """
        if self.collector.backend is None:
            self.collector.backend = faster_backend(self.env, self.collector.num_envs * agents, self.env_kwargs)

    def environments(self, agents: int = 1) -> dict[str, Any]:
        """Keyword arguments of :func:`torchrl_pmoe.envs.make_env`, for the environments of some agents.

        Where others step them, one is made here, for its specs.
        """
        remote = self.collector.backend == "ray"
        return {
            "num_envs": 1 if remote else self.collector.num_envs * agents,
            "seed": self.seed,
            "env_kwargs": self.env_kwargs,
            "backend": "serial" if remote else self.collector.backend,
            "device": self.device,
        }

    def ray_options(
        self, create_env: Callable[..., EnvBase] | None = None, *, clip_actions: bool = False
    ) -> RayOptions | None:
        """The workers that collect frames; ``None`` where this process does.

        Args:
            create_env: makes ``num_envs`` environments of a worker; made from the keys if not given.

        Keyword Args:
            clip_actions: whether the environments made from the keys clip actions.
        """
        collector, ray = self.collector, self.collector.ray
        if collector.backend != "ray":
            return None
        assert ray.workers is not None
        if create_env is None:
            kwargs: dict[str, Any] = {"env_kwargs": self.env_kwargs, "backend": ray.backend}
            create_env = partial(make_env, self.env, **kwargs, clip_actions=clip_actions)
        return RayOptions(
            partial(create_env, num_envs=collector.num_envs // ray.workers),
            num_envs=collector.num_envs,
            num_workers=ray.workers,
            seed=self.seed,
            sync=ray.sync,
            address=ray.address,
            patience=ray.patience,
            max_restarts=ray.max_restarts,
        )

    def stepping(self) -> dict[str, Any]:
        """Keyword arguments of :class:`torchrl_pmoe.trainers.FusedOptimizationStepper`."""
        return {
            "compile": bool(self.compile.enabled),
            "cudagraphs": self.compile.cudagraphs,
            "on_nonfinite": self.on_nonfinite,
        }

    def recording(self, agents: int = 1) -> dict[str, Any]:
        """Keyword arguments of :func:`parts.recording.train_and_record`, for a run of some agents."""
        return {
            "updates": self.updates,
            "evaluation": self.evaluation_options(),
            "logging": self.logger_options(),
            "checkpoints": self.checkpoint_options(agents),
        }

    def evaluation_options(self) -> EvaluationOptions:
        """How policies are evaluated."""
        log = self.logger
        return EvaluationOptions(
            self.env, self.env_kwargs, log.eval_interval, log.eval_episodes, log.eval_max_steps, self.device
        )

    def logger_options(self) -> LoggerOptions:
        """Where the run is recorded."""
        return LoggerOptions(self.logger.backend, self.logger.project_name, hparams(self), self.logger.progress_bar)

    def checkpoint_options(self, agents: int = 1) -> CheckpointOptions:
        """Checkpoints of a run of some agents, whose frames are all counted."""
        kept = self.checkpoint
        return CheckpointOptions(kept.interval * agents, kept.keep, metadata(to_dict(self)), kept.unsaved())


# ----------------------------------------------------------------------------------------- rules over several keys


def refuse(config: Any, refused: dict[str, tuple[bool, str]]) -> None:
    """Raise for the first key whose condition holds.

    Args:
        config: a typed config.
        refused: by key, whether its value cannot go with the others, and what it must be.

    Raises:
        UsageError: the line for that key.
    """
    for key, (bad, must) in refused.items():
        if bad:
            value = get(config, key)
            raise UsageError(f"{key}={'null' if value is None else value}: must be {must}")


def fit_to_machine(config: Any) -> None:
    """Take the newest version of an ``env`` without one, and refuse what this machine does not have.

    Raises:
        UsageError: for a logger or a backend whose package is missing, and for CUDA graphs without a GPU.
    """
    # a run keeps the version that it took
    config.env = full_id(config.env)
    backend = config.logger.backend
    if backend not in (None, "csv") and find_spec(backend) is None:
        raise UsageError(
            f"logger.backend={backend}: must be csv or null without the package {backend}: pip install {backend}"
        )
    on_gpu = str(config.device).startswith("cuda")
    collector = config.collector
    remote = collector.backend == "ray"
    why = {
        "collector.backend": None
        if collector.backend in (None, "ray")
        else unavailable(collector.backend, config.env, config.env_kwargs),
        "collector.ray.backend": unavailable(collector.ray.backend, config.env, config.env_kwargs) if remote else None,
    }
    if remote and find_spec("ray") is None:
        why["collector.backend"] = "without the package ray: pip install ray"
    refuse(
        config,
        {
            "compile.cudagraphs": (config.compile.cudagraphs and not on_gpu, f"false with device={config.device}"),
            **{key: (reason is not None, f"serial or parallel {reason}") for key, reason in why.items()},
        },
    )
    if remote:
        if collector.ray.workers is None:
            collector.ray.workers = collector.num_envs
        workers = collector.ray.workers
        allowed = f"a multiple of collector.ray.workers={workers}"
        refuse(config, {"collector.num_envs": (collector.num_envs % workers != 0, allowed)})


def fill(
    config: Any,
    presets: Mapping[str, Mapping[str, Any]],
    otherwise: Mapping[str, Any],
    *,
    for_unimodal: tuple[str, ...] = (),
) -> None:
    """Fill in the keys that were left to the preset; a policy without a draw of experts has only ``for_unimodal``.

    Args:
        config: changed in place.
        presets: what each value of ``preset`` stands for.
        otherwise: the values of the keys that are null, without a preset.
        for_unimodal: the keys that mean something to a policy that draws no expert.

    Raises:
        UsageError: where a key contradicts the preset.
    """
    refuse(
        config,
        {
            "preset": (
                config.preset is not None and config.policy in UNIMODAL,
                f"null with policy={config.policy}, it is a combination for policy=pmoe",
            )
        },
    )
    chosen = otherwise if config.preset is None else presets[config.preset]
    for key, value in chosen.items():
        given = get(config, key)
        contradicts = config.preset is not None and given not in (None, value)
        refuse(config, {key: (contradicts, f"{value} or null with preset={config.preset}")})
        if config.policy in UNIMODAL and key not in for_unimodal:
            set_(config, key, None)  # a sweep over policies may name them
        elif given is None:
            set_(config, key, value)


def fill_num_experts(config: Any, by_task: dict[str, int]) -> None:
    """The paper's number of experts for its tasks, by their names without a version; 4 elsewhere."""
    if config.num_experts is None:
        config.num_experts = by_task.get(config.env.split("-")[0], 4)


__all__ = [
    "Activation",
    "Checkpoint",
    "Collector",
    "Compile",
    "EvalExpert",
    "ExpertLogger",
    "Experts",
    "Frames",
    "Logger",
    "LossFunction",
    "Optim",
    "PolicyName",
    "Positive",
    "RayWorkers",
    "Run",
    "Seed",
    "fill",
    "fill_num_experts",
    "fit_to_machine",
    "refuse",
]
