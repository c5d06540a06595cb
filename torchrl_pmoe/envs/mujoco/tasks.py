"""Gymnasium's six MuJoCo v4 tasks as batches of environments, on TorchRL's :class:`MujocoEnv`.

Assets, frame skip, reset noise, observations, rewards and ends are those of Gymnasium's v4 tasks with their default
arguments. The xml files are read from the installed Gymnasium. There are two engines:

``"mujoco"``
    MuJoCo itself, in double precision on the CPU, one row after the other in this process. Every row equals the
    Gymnasium environment to the last bit, before observations and rewards are rounded to float32.
``"mjx"``
    MuJoCo in JAX, all rows in one call, on the CPU or the GPU that the tensors are on. From the same state and action,
    positions and velocities after one step differ from Gymnasium's by less than 1e-4 (Hopper: 4e-6) in 99 of 100
    steps, in units of 1 + |value|. One of 1,000 steps of HumanoidStandup differed by 2e-2: in float32 a contact began
    one substep sooner, as it does in MuJoCo itself with a state rounded to float32. With ``jax_enable_x64`` every step
    is within 1e-12 for HalfCheetah, Hopper and Walker2d, 1e-7 for Ant, and 2e-4 for the humanoids, whose assets ask for
    a solver that MJX does not have. Speeds are computed from float32 positions, so at ``x`` metres from the start their
    error is ``1e-7 x / dt``. These numbers hold for MuJoCo of MJX's own version, which the extra ``mjx`` installs:
    MuJoCo 4.0 integrates Ant's free joint in another way than MJX 3.17 (up to 1e-3 in 99 of 100 steps, 2e-1 in one).
"""

from __future__ import annotations

import abc
import importlib.util
from pathlib import Path
from typing import Any, ClassVar, Literal

import gymnasium
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.common import _EnvPostInit
from torchrl.envs.custom.mujoco.base import MujocoEnv, _MujocoMeta

from torchrl_pmoe.envs.mujoco.engines import MJXEngine, MujocoEngine, has_mjx

__all__ = ["MUJOCO_TASKS", "MujocoTask", "mujoco_task"]

MAX_EPISODE_STEPS = 1000


class _InProcess(_MujocoMeta):
    """Metaclass that keeps all rows in this process; TorchRL's own starts a process for every ``mujoco`` row."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _EnvPostInit.__call__(cls, *args, **kwargs)


class MujocoTask(MujocoEnv, metaclass=_InProcess):
    """One of Gymnasium's v4 tasks, ``num_envs`` rows at once; :func:`mujoco_task` makes them by name.

    Reads ``action`` ``[N, A]``; writes ``observation`` ``[N, O]``, ``reward``, ``terminated``, ``truncated`` and
    ``done`` ``[N, 1]``. A ``"_reset"`` mask resets its rows and leaves the others as they are.
    ``env.reset(TensorDict(qpos=..., qvel=...), set_state=True)`` starts an episode from the given state.

    Keyword Args:
        num_envs: ``N``.
        seed: of the reset noise; drawn from torch's global generator if not given.
        device: of the tensors that are read and written.
        backend: ``"mjx"`` or ``"mujoco"``.
        max_episode_steps: steps after which an episode is truncated.
        dtype: of actions, observations and rewards.
    """

    ASSET: ClassVar[str]
    RESET_NOISE_SCALE: ClassVar[float] = 0.01
    NORMAL_VELOCITIES: ClassVar[bool] = False
    """Whether the noise of the velocities is normal; that of the positions is always uniform."""
    FIELDS: ClassVar[tuple[str, ...]] = ()
    """Arrays of MuJoCo's data that observation and reward need besides ``qpos`` and ``qvel``."""
    CTRL_COST_WEIGHT: ClassVar[float]

    def __init__(
        self,
        *,
        num_envs: int = 1,
        seed: int | None = None,
        device: str | torch.device | None = "cpu",
        backend: Literal["mjx", "mujoco"] = "mjx",
        max_episode_steps: int = MAX_EPISODE_STEPS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # skips MujocoEnv's constructor, which would make one of TorchRL's engines
        EnvBase.__init__(self, device=torch.device(device or "cpu"), batch_size=torch.Size([num_envs]))
        self.num_envs, self.dtype, self.backend_name = num_envs, dtype, backend
        self.frame_skip, self.max_episode_steps = self.FRAME_SKIP, max_episode_steps
        self.reset_noise_scale = self.RESET_NOISE_SCALE
        # attributes that MujocoEnv's methods read
        self.from_pixels = self.pixels_only = False
        self.render_width = self.render_height = 480
        self.render_every, self.camera_id, self._render_counter, self._last_pixels = 1, 0, 0, None
        engine = MJXEngine if backend == "mjx" else MujocoEngine
        asset = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / self.ASSET
        self._backend: Any = engine(asset, num_envs=num_envs, device=self.device, fields=self.FIELDS)
        # compile now, not in the first step of a training
        if isinstance(self._backend, MJXEngine):
            self._backend.warm_up(self.frame_skip, type(self).__name__)
        self.dt = self._backend.timestep * self.frame_skip
        self.rng = None
        self.set_seed(int(torch.randint(2**31, ())) if seed is None else seed)
        self._step_count = torch.zeros(num_envs, dtype=torch.long, device=self.device)
        self._make_specs()

    def to(self, device: torch.device | str | int) -> MujocoTask:
        """The environment itself, if it is on that device already.

        Raises:
            ValueError: for another device. The engine and its compiled code cannot be moved.
        """
        if torch.empty(0, device=device).device != torch.empty(0, device=self.device).device:
            raise ValueError(f"{type(self).__name__}: made on {self.device}, cannot move to {device}; make it there.")
        return self

    def _state_td(self) -> TensorDict:
        fields = ("qpos", "qvel", "time", *self.FIELDS)
        read = {name: self._backend.read(name) for name in fields}
        return TensorDict(read, batch_size=(self.num_envs,), device=self.device)

    def _sample_initial_state(self, n: int, tensordict: TensorDictBase | None = None) -> tuple[Tensor, Tensor]:
        scale, rng = self.reset_noise_scale, self.rng
        # [n, nq] and [n, nv]
        qpos = self._backend.qpos0.expand(n, -1).clone()
        qvel = self._backend.qvel0.expand(n, -1).clone()
        qpos += torch.empty_like(qpos).uniform_(-scale, scale, generator=rng)
        if self.NORMAL_VELOCITIES:
            qvel += torch.empty_like(qvel).normal_(0, scale, generator=rng)
        else:
            qvel += torch.empty_like(qvel).uniform_(-scale, scale, generator=rng)
        return qpos, qvel

    def _make_obs_spec(self) -> Composite:
        observation = Unbounded(self._make_obs(self._state_td()).shape, dtype=self.dtype, device=self.device)
        return Composite(observation=observation, shape=(self.num_envs,), device=self.device)

    def _make_obs(self, state: TensorDictBase) -> Tensor:
        return torch.cat([state["qpos"][..., self.SKIP_QPOS :], state["qvel"]], -1).to(self.dtype)

    def _control_cost(self, action: Tensor) -> Tensor:
        return self.CTRL_COST_WEIGHT * action.square().sum(-1)

    def _compute_done(self, state: TensorDictBase, next_state: TensorDictBase) -> Tensor:
        return ~self._is_healthy(next_state)

    @abc.abstractmethod
    def _is_healthy(self, state: TensorDictBase) -> Tensor:
        """Whether an episode continues, ``[N]``; false for a state with NaN."""


class _Runner(MujocoTask):
    """Tasks whose reward is the speed along x, plus a bonus for every step, minus a cost of control."""

    HEALTHY_REWARD: ClassVar[float] = 1.0
    FORWARD_WEIGHT: ClassVar[float] = 1.0

    def _x(self, state: TensorDictBase) -> Tensor:
        return state["qpos"][..., 0]

    def _compute_reward(self, state: TensorDictBase, action: Tensor, next_state: TensorDictBase) -> Tensor:
        speed = (self._x(next_state) - self._x(state)) / self.dt
        return self.FORWARD_WEIGHT * speed + self.HEALTHY_REWARD - self._control_cost(action)


class HalfCheetah(_Runner):
    """HalfCheetah-v4: 17 observations, 6 actions, no ends."""

    ASSET, FRAME_SKIP, SKIP_QPOS = "half_cheetah.xml", 5, 1
    RESET_NOISE_SCALE, NORMAL_VELOCITIES = 0.1, True
    CTRL_COST_WEIGHT, HEALTHY_REWARD = 0.1, 0.0

    def _is_healthy(self, state: TensorDictBase) -> Tensor:
        return torch.ones(self.num_envs, dtype=torch.bool, device=self.device)


class _Planar(_Runner):
    """Hopper and Walker2d: velocities observed within ±10, ends by height and angle of the torso."""

    FRAME_SKIP, SKIP_QPOS = 4, 1
    RESET_NOISE_SCALE = 5e-3
    CTRL_COST_WEIGHT = 1e-3

    def _make_obs(self, state: TensorDictBase) -> Tensor:
        return torch.cat([state["qpos"][..., 1:], state["qvel"].clamp(-10, 10)], -1).to(self.dtype)


class Hopper(_Planar):
    """Hopper-v4: 11 observations, 3 actions."""

    ASSET = "hopper.xml"

    def _is_healthy(self, state: TensorDictBase) -> Tensor:
        height, angle = state["qpos"][..., 1], state["qpos"][..., 2]
        # Gymnasium checks all but the first two positions
        rest = torch.cat([state["qpos"][..., 2:], state["qvel"]], -1)
        return (rest.abs() < 100).all(-1) & (height > 0.7) & (height < torch.inf) & (angle.abs() < 0.2)


class Walker2d(_Planar):
    """Walker2d-v4: 17 observations, 6 actions."""

    ASSET = "walker2d.xml"

    def _is_healthy(self, state: TensorDictBase) -> Tensor:
        height, angle = state["qpos"][..., 1], state["qpos"][..., 2]
        return (height > 0.8) & (height < 2.0) & (angle.abs() < 1.0)


class Ant(_Runner):
    """Ant-v4: 27 observations, 8 actions; by v4's default contact forces are neither observed nor in the reward."""

    ASSET, FRAME_SKIP, SKIP_QPOS, FIELDS = "ant.xml", 5, 2, ("xpos",)
    RESET_NOISE_SCALE, NORMAL_VELOCITIES = 0.1, True
    CTRL_COST_WEIGHT = 0.5

    def _x(self, state: TensorDictBase) -> Tensor:
        return state["xpos"][..., 1, 0]  # the torso is the first body after the world

    def _is_healthy(self, state: TensorDictBase) -> Tensor:
        height = state["qpos"][..., 2]
        finite = state["qpos"].isfinite().all(-1) & state["qvel"].isfinite().all(-1)
        return finite & (height >= 0.2) & (height <= 1.0)


class _Bodies(MujocoTask):
    """Both humanoids, which observe inertia and velocity of every body and the forces on joints and bodies.

    The forces on bodies (``cfrc_ext``) are zero in the observation of a reset, as in Gymnasium.
    """

    FRAME_SKIP, SKIP_QPOS = 5, 2
    FIELDS = ("xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    CTRL_COST_WEIGHT = 0.1

    def _make_obs(self, state: TensorDictBase) -> Tensor:
        parts = [state["qpos"][..., 2:], state["qvel"]]
        # [N, bodies, n] to [N, bodies n]
        parts += [state[name].flatten(1) for name in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")]
        return torch.cat(parts, -1).to(self.dtype)


class Humanoid(_Bodies, _Runner):
    """Humanoid-v4: 376 observations, 17 actions; the speed is that of the centre of mass."""

    ASSET = "humanoid.xml"
    HEALTHY_REWARD, FORWARD_WEIGHT = 5.0, 1.25

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # the centre of mass is the mean of the bodies' centres, weighted by mass: [bodies]
        mass = torch.tensor(self._backend.mj_model.body_mass, dtype=self._backend.qpos0.dtype, device=self.device)
        self.mass_share = mass / mass.sum()

    def _x(self, state: TensorDictBase) -> Tensor:
        return (state["xipos"][..., 0] * self.mass_share).sum(-1)

    def _is_healthy(self, state: TensorDictBase) -> Tensor:
        height = state["qpos"][..., 2]
        return (height > 1.0) & (height < 2.0)


class HumanoidStandup(_Bodies):
    """HumanoidStandup-v4: 376 observations, 17 actions, no ends; height over the simulator's timestep, as v4 has it."""

    ASSET = "humanoidstandup.xml"

    def _compute_reward(self, state: TensorDictBase, action: Tensor, next_state: TensorDictBase) -> Tensor:
        # v4 divides the height by the timestep and calls it a speed
        lift = next_state["qpos"][..., 2] / self._backend.timestep
        impact = (0.5e-6 * next_state["cfrc_ext"].square().sum((-2, -1))).clamp(max=10)
        return lift - self._control_cost(action) - impact + 1

    def _is_healthy(self, state: TensorDictBase) -> Tensor:
        return torch.ones(self.num_envs, dtype=torch.bool, device=self.device)


MUJOCO_TASKS: dict[str, type[MujocoTask]] = {
    "HalfCheetah-v4": HalfCheetah,
    "Hopper-v4": Hopper,
    "Walker2d-v4": Walker2d,
    "Ant-v4": Ant,
    "Humanoid-v4": Humanoid,
    "HumanoidStandup-v4": HumanoidStandup,
}
"""The tasks by their Gymnasium id."""


def mujoco_task(
    name: str,
    num_envs: int,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    backend: Literal["mjx", "mujoco"] = "mjx",
) -> EnvBase:
    """A batch of one of Gymnasium's v4 tasks; see :class:`MujocoTask` for what it reads and writes.

    Args:
        name: one of :data:`MUJOCO_TASKS`.
        num_envs: ``N``.

    Keyword Args:
        seed: of the reset noise.
        device: of the tensors; with ``"mjx"`` of the physics too.
        backend: ``"mjx"``, one compiled call a step for all rows; ``"mujoco"``, MuJoCo itself.

    Raises:
        ValueError: for an unknown name or backend, fewer than one row, or a missing package or device.

    Examples:
        >>> mujoco_task("Hopper-v4", 2, seed=0, backend="mujoco").rollout(5)["next", "reward"].shape
        torch.Size([2, 5, 1])
    """
    if name not in MUJOCO_TASKS:
        raise ValueError(f"mujoco_task: name must be one of {', '.join(MUJOCO_TASKS)}, got {name!r}.")
    if not isinstance(num_envs, int) or num_envs < 1:
        raise ValueError(f"mujoco_task: num_envs must be an integer of at least 1, got {num_envs!r}.")
    if backend not in ("mjx", "mujoco"):
        raise ValueError(f"mujoco_task: backend must be 'mjx' or 'mujoco', got {backend!r}.")
    if backend == "mjx" and not has_mjx():
        raise ValueError("mujoco_task: backend='mjx' needs jax and mujoco-mjx: pip install jax mujoco-mjx.")
    if importlib.util.find_spec("mujoco") is None:
        raise ValueError("mujoco_task: backend='mujoco' needs mujoco: pip install mujoco.")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"mujoco_task: device must be one that torch has, got {str(device)!r} and no CUDA device.")
    return MUJOCO_TASKS[name](num_envs=num_envs, seed=seed, device=device, backend=backend)
