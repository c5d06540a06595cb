"""A video of an episode, rendered with or without a display."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from torchrl_pmoe.envs.libraries import library_of
from torchrl_pmoe.envs.making import make_gym_env
from torchrl_pmoe.runs import Episode

MAX_FPS = 60
"""Most players show no more; of a faster environment pictures are left out, and its speed is kept."""
INSTALL_GL = "Debian: apt-get install libegl1 libgl1-mesa-dri, or libosmesa6"
_PROBE = """
import mujoco
context = mujoco.GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
"""


class NoVideoError(Exception):
    """Why there is no video, in one line."""


def progress(total: int, unit: str) -> tqdm:
    """A bar that appears after five seconds."""
    # a log file gets a line now and then, a terminal a bar that moves
    return tqdm(total=total, unit=unit, delay=5, mininterval=0.2 if sys.stderr.isatty() else 30)


def write_video(name: str, env_kwargs: Mapping[str, Any], episode: Episode, path: Path) -> None:
    """Play an episode's actions again and film it, at the speed of the environment.

    Args:
        name: Gymnasium id.
        env_kwargs: arguments of the environment.
        episode: to be filmed.
        path: of the mp4 file, which is there as a whole or not at all.

    Raises:
        NoVideoError: where the environment cannot be rendered here, or a package is missing.
    """
    if find_spec("imageio_ffmpeg") is None:
        raise NoVideoError("imageio-ffmpeg is missing (pip install imageio-ffmpeg)")
    if library_of(name) is not None:
        raise NoVideoError(f"{name} is an environment of TorchRL's, of which none is filmed")
    with closing(make_gym_env(name, env_kwargs, checked=False)) as env:
        if "rgb_array" not in (env.metadata.get("render_modes") or ()):
            raise NoVideoError(f"{name} renders no pictures (its metadata['render_modes'] has no rgb_array)")
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    display = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if sys.platform == "linux" and not display:
        # pygame's, of the classic tasks
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        with closing(make_gym_env(name, {**env_kwargs, "render_mode": "rgb_array"})) as env:
            if hasattr(env.unwrapped, "mujoco_renderer"):
                choose_gl(display)
                quality = env.unwrapped.model.vis.quality  # type: ignore[attr-defined]
                # software renders in a third of the time, and the eye sees no difference
                quality.shadowsize, quality.offsamples = 1024, 0
            _film(env, episode, part)
        part.replace(path)
    except NoVideoError:
        raise
    # a renderer may raise anything
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NoVideoError(f"{name} could not be rendered ({reason})") from error
    finally:
        part.unlink(missing_ok=True)


def choose_gl(display: bool) -> None:
    """Set ``MUJOCO_GL``, where it is not, to what MuJoCo can render through: the display, EGL or OSMesa.

    Each is tried in a process of its own: a driver may end the process, and the first that is loaded keeps the others
    out.

    Args:
        display: whether there seems to be one.

    Raises:
        NoVideoError: if none works.
    """
    if sys.platform != "linux" or os.environ.get("MUJOCO_GL"):
        return
    for backend in (*(["glfw"] if display else []), "egl", "osmesa"):
        variables = {**os.environ, "MUJOCO_GL": backend}
        if not subprocess.run([sys.executable, "-c", _PROBE], env=variables, capture_output=True).returncode:
            os.environ["MUJOCO_GL"] = backend
            return
    raise NoVideoError(f"MuJoCo finds neither EGL nor OSMesa to render without a display ({INSTALL_GL})")


def _film(env: gym.Env, episode: Episode, path: Path) -> None:
    import imageio.v2 as imageio

    writer: Any = imageio.get_writer
    steps_per_second = env.metadata.get("render_fps", 30)
    every = math.ceil(steps_per_second / MAX_FPS)
    fps = steps_per_second / every
    env.reset(seed=episode.seed)
    with (
        writer(path, format="FFMPEG", fps=fps, codec="libx264", macro_block_size=1) as video,
        progress(len(episode.rewards) + 1, "frame") as bar,
    ):
        video.append_data(_picture(env))
        bar.update()
        for step, (action, reward) in enumerate(zip(episode.actions, episode.rewards, strict=True), 1):
            if float(env.step(action)[1]) != reward:
                raise NoVideoError("the environment does not repeat an episode from its seed")
            if step % every == 0:
                video.append_data(_picture(env))
            bar.update()


def _picture(env: gym.Env) -> np.ndarray:
    """What the environment looks like, cut to even sides, which the codec needs."""
    picture = np.asarray(env.render())
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    return picture[:height, :width]
