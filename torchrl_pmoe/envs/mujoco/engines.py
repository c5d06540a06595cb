"""Physics engines of the MuJoCo tasks, which give the same numbers as Gymnasium's environments.

Gymnasium reads more than ``qpos`` and ``qvel`` (body positions, inertias, contact forces), in the state after the last
substep. TorchRL's engines keep float32 copies of ``qpos`` and ``qvel`` only, and recompute the rest for the whole batch
when one row is reset. The two engines here return any array of MuJoCo's data in the engine's own precision, and a reset
changes its own rows only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrl.envs.custom.mujoco._backends import _MJXBackend, _PhysicsBackend
from tqdm import tqdm

__all__ = ["MJXEngine", "MujocoEngine", "quiet_mujoco"]

DIVERGED = 1e10
"""The size of a position, velocity or acceleration at which MuJoCo resets a simulation."""


@contextlib.contextmanager
def quiet_mujoco() -> Iterator[None]:
    """Suppress MuJoCo's warning about ``settotalmass``, which Gymnasium's HalfCheetah asset causes."""
    if importlib.util.find_spec("mujoco") is None:
        yield
        return
    import mujoco

    previous = mujoco.get_mju_user_warning()

    def show(message: str) -> None:
        if "settotalmass" in message:
            return
        if previous is not None:
            previous(message)
        else:
            print(f"MuJoCo: {message}", file=sys.stderr)

    mujoco.set_mju_user_warning(show)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(previous)


def load_model(path: Path, *, pgs: bool = True) -> Any:
    """The compiled ``mujoco.MjModel`` of an xml file; without ``pgs``, Newton's method replaces that solver."""
    import mujoco

    with quiet_mujoco():
        model = mujoco.MjModel.from_xml_path(str(path))
    if not pgs and model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    return model


class _Engine(_PhysicsBackend):
    """What the environments need from an engine besides TorchRL's own interface.

    Args:
        source: an xml file.
        num_envs: ``N``, the number of rows.
        device: of the tensors that are returned.
        fields: arrays of MuJoCo's data that are read besides ``qpos`` and ``qvel``, for example ``"cfrc_ext"``.
    """

    def __init__(self, source: Path, *, num_envs: int, device: torch.device, fields: Sequence[str] = ()) -> None:
        self._fields = ("qpos", "qvel", "time", *fields)
        _PhysicsBackend.__init__(self, source, num_envs=num_envs, device=device)

    def read(self, field: str) -> Tensor:
        """One array of MuJoCo's data, ``[N, *shape]``; do not write to it."""
        raise NotImplementedError

    def _describe(self, model: Any, dtype: torch.dtype) -> None:
        """Set the attributes that TorchRL reads."""
        self.nq, self.nv, self.nu = int(model.nq), int(model.nv), int(model.nu)
        self.timestep = float(model.opt.timestep)
        self.qpos0 = torch.tensor(model.qpos0, dtype=dtype, device=self.device)
        self.qvel0 = torch.zeros(self.nv, dtype=dtype, device=self.device)
        bounds = torch.tensor(model.actuator_ctrlrange, dtype=torch.float32, device=self.device)
        self.actuator_lo, self.actuator_hi = bounds.unbind(-1)
        self.actuator_ctrllimited = torch.tensor(model.actuator_ctrllimited, dtype=torch.bool, device=self.device)

    @property
    def qpos(self) -> Tensor:
        return self.read("qpos")

    @property
    def qvel(self) -> Tensor:
        return self.read("qvel")

    @property
    def time(self) -> Tensor:
        return self.read("time")


# ------------------------------------------------------------------------------------------- MuJoCo itself


class MujocoEngine(_Engine):
    """MuJoCo in double precision, one ``MjData`` per row, in this process and on the CPU.

    It makes the same calls as Gymnasium in the same order, so a row equals the Gymnasium environment to the last bit.
    """

    def _init_model(self, source: Path) -> None:
        import mujoco

        self._mujoco, self._model = mujoco, load_model(source)
        self._set_rows([mujoco.MjData(self._model) for _ in range(self.num_envs)])
        self._describe(self._model, torch.float64)
        self.reset(self.qpos0.expand(self.num_envs, -1), self.qvel0.expand(self.num_envs, -1))

    def _set_rows(self, rows: list[Any]) -> None:
        self._rows = rows
        # views of MuJoCo's own memory, which every step writes to
        self._views = {name: [getattr(row, name) for row in rows] for name in self._fields if name != "time"}

    def _collect(self) -> None:
        """Copy the rows' arrays into tensors ``[N, *shape]``."""
        self._read = {name: torch.from_numpy(np.stack(views)) for name, views in self._views.items()}
        self._read["time"] = torch.tensor([row.time for row in self._rows], dtype=torch.float64)

    def read(self, field: str) -> Tensor:
        """See :class:`_Engine`; double precision."""
        return self._read[field].to(self.device)

    def reset(self, qpos: Tensor, qvel: Tensor) -> None:
        """Start every row from its ``qpos`` ``[N, nq]`` and ``qvel`` ``[N, nv]``."""
        self._reset(range(self.num_envs), qpos, qvel)

    def reset_mask(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        """Start the rows where ``mask`` ``[N]`` is true, and leave the others as they are."""
        self._reset(mask.nonzero().flatten().tolist(), qpos, qvel)

    def _reset(self, rows: Sequence[int], qpos: Tensor, qvel: Tensor) -> None:
        positions, velocities = qpos.detach().cpu().numpy(), qvel.detach().cpu().numpy()
        for row in rows:
            data = self._rows[row]
            self._mujoco.mj_resetData(self._model, data)
            data.qpos[:], data.qvel[:] = positions[row], velocities[row]
            self._mujoco.mj_forward(self._model, data)
        self._collect()

    def step(self, ctrl: Tensor, frame_skip: int) -> None:
        """Advance by ``frame_skip`` substeps under ``ctrl`` ``[N, nu]``, which MuJoCo clips."""
        forces = "cfrc_ext" in self._views
        for data, row in zip(self._rows, ctrl.detach().cpu().numpy(), strict=True):
            data.ctrl[:] = row
            self._mujoco.mj_step(self._model, data, nstep=frame_skip)
            # Gymnasium does the same: MuJoCo computes contact forces on request only
            if forces:
                self._mujoco.mj_rnePostConstraint(self._model, data)
        self._collect()

    def clone_batch(self, index: Any, num_envs: int) -> MujocoEngine:
        """A new engine whose rows start in the states of the indexed rows."""
        engine = copy(self)
        engine.num_envs = num_envs
        engine._set_rows([copy(self._rows[row]) for row in self._row_numbers(index)])
        engine._collect()
        return engine

    def set_batch(self, index: Any, source: _PhysicsBackend) -> None:
        """Put the indexed rows into the states of the rows of ``source``."""
        if not isinstance(source, MujocoEngine):
            raise TypeError(f"MujocoEngine: rows can be set from another MujocoEngine, got {type(source).__name__}.")
        rows = list(self._rows)
        for row, data in zip(self._row_numbers(index), source._rows, strict=True):
            rows[row] = copy(data)
        self._set_rows(rows)
        self._collect()

    def _row_numbers(self, index: Any) -> list[int]:
        return torch.arange(self.num_envs)[index.cpu() if isinstance(index, Tensor) else index].tolist()

    @property
    def mj_model(self) -> Any:
        """The compiled ``mujoco.MjModel``."""
        return self._model

    def render(
        self,
        *,
        camera_id: int = 0,
        width: int = 64,
        height: int = 64,
        background: tuple[float, float, float] | None = None,
    ) -> Tensor:
        """Every row as seen by a camera, ``[N, height, width, 3]`` of type ``uint8``."""
        renderer = self._mujoco.Renderer(self._model, height=height, width=width)
        frames = []
        for data in self._rows:
            renderer.update_scene(data, camera=camera_id)
            frames.append(torch.from_numpy(renderer.render().copy()))
        renderer.close()
        return torch.stack(frames).to(self.device)


# ----------------------------------------------------------------------------------------------------- MJX


class _Programs(NamedTuple):
    """A model on a device with its initial state and its compiled functions; jax compiles for every batch size."""

    model: Any
    first: Any
    step: Callable[..., Any]
    reset: Callable[..., Any]


class MJXEngine(_Engine, _MJXBackend):
    """MJX: MuJoCo in JAX, all rows in one compiled call for all substeps, shared with torch through DLPack.

    It runs in single precision unless ``jax_enable_x64`` is set before the engine is made. MJX has no projected
    Gauss-Seidel solver: for assets that ask for one (both humanoids) Newton's method solves the same problem. A row
    that diverges continues from the model's initial state, as it does in MuJoCo.
    """

    def _init_model(self, source: Path) -> None:
        jax, self._mjx = import_mjx()
        self._jax, self._m_mj = jax, load_model(source, pgs=False)
        self._jax_device = jax_device(jax, self.device)
        forces = "cfrc_ext" in self._fields
        self._programs = _programs(source, forces, self._jax_device, bool(jax.config.jax_enable_x64))
        # the names that TorchRL's engine uses
        self._mx, self._dx0_single = self._programs.model, self._programs.first
        self._describe(self._m_mj, torch.float64 if jax.config.jax_enable_x64 else torch.float32)
        rows = jax.device_put(jax.numpy.arange(self.num_envs), self._jax_device)
        self._dx = jax.vmap(lambda _: self._dx0_single)(rows)

    def warm_up(self, frame_skip: int, label: str) -> None:
        """Compile reset and step behind a progress bar that disappears, then restore the initial state."""
        with tqdm(total=2, desc=f"MJX compiles {label}", leave=False, disable=None) as bar:
            start = self.qpos0.expand(self.num_envs, -1), self.qvel0.expand(self.num_envs, -1)
            self.reset(*start)
            bar.update()
            # the step is for the compiler only
            before = self._dx
            self.step(torch.zeros(self.num_envs, self.nu, device=self.device), frame_skip)
            self._jax.block_until_ready(self._dx)
            self._dx = before
            bar.update()

    def read(self, field: str) -> Tensor:
        """See :class:`_Engine`; the tensor shares its memory with jax."""
        # some arrays stand one level deeper, in what MJX calls its implementation
        data = self._dx if field in self._dx.__dataclass_fields__ else self._dx._impl
        return torch.from_dlpack(getattr(data, field)).to(self.device)

    def reset(self, qpos: Tensor, qvel: Tensor) -> None:
        """Start every row from its ``qpos`` ``[N, nq]`` and ``qvel`` ``[N, nv]``."""
        self.reset_mask(torch.ones(self.num_envs, dtype=torch.bool, device=self.device), qpos, qvel)

    def reset_mask(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        """Start the rows where ``mask`` ``[N]`` is true, and leave the others as they are."""
        given = mask.to(torch.uint8), qpos.to(self.qpos0.dtype), qvel.to(self.qpos0.dtype)
        # copies: jax uses torch's memory itself, and may still do so after this call has returned
        self._dx = self._programs.reset(self._dx, *(self._torch_to_jax(tensor.clone()) for tensor in given))

    def step(self, ctrl: Tensor, frame_skip: int) -> None:
        """Advance by ``frame_skip`` substeps under ``ctrl`` ``[N, nu]``, which MJX clips."""
        ctrl = self._torch_to_jax(ctrl.to(self.qpos0.dtype, copy=True))
        self._dx = self._programs.step(self._dx, ctrl, frame_skip)


def import_mjx() -> tuple[Any, Any]:
    """The modules ``jax`` and ``mujoco.mjx``, without the lines that MJX prints where NVIDIA's Warp is missing."""
    # by default jax reserves three quarters of a GPU's memory, and torch needs some too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with contextlib.redirect_stdout(io.StringIO()):
        import jax
        from mujoco import mjx
    return jax, mjx


def has_mjx() -> bool:
    """Whether ``jax`` and ``mujoco.mjx`` are installed."""
    # find_spec of a submodule imports its parent, so the parents are looked for first
    installed = all(importlib.util.find_spec(name) is not None for name in ("jax", "mujoco"))
    return installed and importlib.util.find_spec("mujoco.mjx") is not None


def jax_device(jax: Any, device: torch.device) -> Any:
    """The jax device of a torch device.

    Raises:
        ValueError: if jax has none.
    """
    logger = logging.getLogger("jax._src.xla_bridge")  # it warns of a GPU that it cannot use, also when asked for a CPU
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if device.type == "cpu":
            return jax.devices("cpu")[0]
        index = torch.cuda.current_device() if device.index is None else device.index
        return jax.devices("gpu")[index]
    except (RuntimeError, IndexError):
        install = "jax has no such device, install it with CUDA: pip install 'jax[cuda12]' or 'jax[cuda13]'"
        raise ValueError(f"device={device}: must be a device of jax too ({install}).") from None
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _mujocos_contact_frames() -> Iterator[None]:
    """While jax traces, friction of a capsule on a plane acts along the capsule and across it, as in MuJoCo.

    MJX takes fixed axes instead if the capsule stands within 30 degrees of upright. The friction cone is a pyramid on
    these axes, so a step of the Ant differed from MuJoCo's by up to 1.5 rad/s.

    The only place to change it is MJX's own table of collision functions. The function that stands there meanwhile
    changes calls of the threads within this context and passes on all others; the last thread to leave restores the
    table.
    """
    from mujoco.mjx._src import collision_driver

    table = getattr(collision_driver, "_COLLISION_FUNC", {})
    pair = next((types for types in table if [kind.name for kind in types] == ["PLANE", "CAPSULE"]), None)
    if pair is None:
        yield
        return
    with _tracing.lock:
        if not _tracing.contexts:
            _tracing.original = table[pair]
            table[pair] = _along_the_capsule(_tracing.original)
        _tracing.contexts += 1
    _tracing.thread.depth = getattr(_tracing.thread, "depth", 0) + 1
    try:
        yield
    finally:
        _tracing.thread.depth -= 1
        with _tracing.lock:
            _tracing.contexts -= 1
            if not _tracing.contexts:
                table[pair] = _tracing.original


class _Tracing:
    """Number of contexts of :func:`_mujocos_contact_frames` that are entered, in all threads and in this one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.contexts = 0
        self.original: Any = None
        self.thread = threading.local()


_tracing = _Tracing()


def _along_the_capsule(collide: Callable[..., Any]) -> Callable[..., Any]:
    """MJX's collision of planes and capsules with other frames ``[pairs * 2, 3, 3]``: normal, along, across."""
    jp = import_mjx()[0].numpy

    @functools.wraps(collide)
    def inner(model: Any, data: Any, key: Any, geom: Any) -> Any:
        dist, pos, frame = collide(model, data, key, geom)
        if not getattr(_tracing.thread, "depth", 0):
            return dist, pos, frame
        # two contacts per pair, so [pairs, 3] becomes [pairs * 2, 3]
        normal, axis = frame[:, 0], jp.repeat(data.geom_xmat[geom[:, 1]][:, :, 2], 2, axis=0)
        along = axis - normal * (normal * axis).sum(-1, keepdims=True)
        length = jp.linalg.norm(along, axis=-1, keepdims=True)
        along = jp.where(length < 1e-6, frame[:, 1], along / jp.maximum(length, 1e-6))
        return dist, pos, jp.stack([normal, along, jp.cross(normal, along)], 1)

    return inner


@functools.cache
def _programs(source: Path, forces: bool, device: Any, x64: bool) -> _Programs:
    """Compiled functions, cached so that a second environment of a task does not compile them again."""
    jax, mjx = import_mjx()
    model = load_model(source, pgs=False)
    mx = mjx.put_model(model, device=device, impl="jax")
    first = mjx.make_data(model, device=device, impl="jax")

    def choose(condition: Any, yes: Any, no: Any) -> Any:
        return jax.tree_util.tree_map(lambda yes, no: jax.numpy.where(condition, yes, no), yes, no)

    def exact(function: Callable[..., Any]) -> Callable[..., Any]:
        # on NVIDIA's GPUs jax would multiply with ten bits of mantissa (TF32)
        @functools.wraps(function)
        def inner(*args: Any) -> Any:
            with jax.default_matmul_precision("highest"), _mujocos_contact_frames():
                return function(*args)

        return inner

    @exact
    def step(data: Any, ctrl: Any, frame_skip: int) -> Any:
        def one(row: Any, ctrl: Any) -> Any:
            row = jax.lax.fori_loop(0, frame_skip, lambda _, row: mjx.step(mx, row), row.replace(ctrl=ctrl))
            row = mjx.rne_postconstraint(mx, row) if forces else row
            # NaN compares false, so a row with NaN starts anew too
            state = jax.numpy.concatenate([row.qpos, row.qvel, row.qacc])
            return choose((jax.numpy.abs(state) < DIVERGED).all(), row, first)

        return jax.vmap(one)(data, ctrl)

    @exact
    def reset(data: Any, mask: Any, qpos: Any, qvel: Any) -> Any:
        def one(row: Any, chosen: Any, qpos: Any, qvel: Any) -> Any:
            return choose(chosen > 0, mjx.forward(mx, first.replace(qpos=qpos, qvel=qvel)), row)

        return jax.vmap(one)(data, mask, qpos, qvel)

    return _Programs(mx, first, jax.jit(step, static_argnums=2), jax.jit(reset))
