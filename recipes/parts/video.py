"""Episodes of a trained policy, step by step: who acts, with what weight, and what that looks like."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import gymnasium as gym
import numpy as np
import runs
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor
from tqdm import tqdm

from torchrl_pmoe import BestOfExpertsActor, MCPActor, PMOEActor
from torchrl_pmoe.baselines import OptionActor
from torchrl_pmoe.distributions.proposals import take_expert
from torchrl_pmoe.modules.actors import ExpertsActor

KINDS = ("deterministic", "drawn", "stochastic")
"""The centre of the likeliest expert, the centre of a drawn one, or a draw of the action as in training."""

Act = Callable[[TensorDictBase], tuple[TensorDictBase, "Tensor | None", "Tensor | None"]]
"""Writes ``action``; returns the expert behind it ``[*B]`` and the weights of all ``[*B, K]``, where there are any."""

# ---------------------------------------------------------------------------------------------- acting


def acting(actor: ProbabilisticActor | BestOfExpertsActor | OptionActor, kind: str) -> Act:
    """How a policy acts.

    Args:
        actor: a policy of any recipe, without what normalises its input.
        kind: one of :data:`KINDS`; for a policy without a draw of an expert and for :class:`BestOfExpertsActor`,
            ``"drawn"`` is not among them.
    """
    if isinstance(actor, OptionActor):
        return _of_options(actor, kind)
    if isinstance(actor, PMOEActor):
        return _of_mixture(actor, kind)
    kept: dict[str, Tensor] = {}
    if isinstance(actor, BestOfExpertsActor):
        _keep_choice(actor, kept)
    elif isinstance(actor, ExpertsActor):
        _keep_gates(actor, kept)
    exploration = ExplorationType.RANDOM if kind == "stochastic" else ExplorationType.DETERMINISTIC

    def act(states: TensorDictBase) -> tuple[TensorDictBase, Tensor | None, Tensor | None]:
        with set_exploration_type(exploration):
            acted = actor(states)
        return acted, kept.get("expert"), kept.get("weights")

    return act


def _of_mixture(actor: PMOEActor, kind: str) -> Act:
    def act(states: TensorDictBase) -> tuple[TensorDictBase, Tensor, Tensor]:
        dist = actor.get_dist(states)
        proposals = dist.propose().action if kind == "stochastic" else dist.expert_mode
        expert = dist.logits.argmax(-1) if kind == "deterministic" else dist.sample_expert()
        return states.set("action", take_expert(proposals, expert)), expert, dist.probs

    return act


def _of_options(actor: OptionActor, kind: str) -> Act:
    def act(states: TensorDictBase) -> tuple[TensorDictBase, Tensor, Tensor]:
        probs = actor.get_dist_high(states).probs
        acted = actor.act(states, draw_option=kind != "deterministic", draw_action=kind == "stochastic")
        return acted, acted["option"].squeeze(-1), probs

    return act


def _keep_choice(actor: BestOfExpertsActor, kept: dict[str, Tensor]) -> None:
    """Keep what the critics choose, and the router's probabilities."""
    score = actor.score_proposals

    def score_and_keep(states: TensorDictBase, proposals: Tensor) -> Tensor:
        values = score(states, proposals)
        kept.update(expert=values.argmax(-1), weights=actor.get_dist(states).probs)
        return values

    actor.score_proposals = score_and_keep


def _keep_gates(actor: ExpertsActor, kept: dict[str, Tensor]) -> None:
    """Keep the weights by which experts are blended: a softmax, or for MCP the gates' shares of their sum."""

    def keep(composition: Any, inputs: tuple[Tensor, ...]) -> None:
        gates = inputs[0].sigmoid() if isinstance(actor, MCPActor) else inputs[0].softmax(-1)
        kept["weights"] = gates / gates.sum(-1, keepdim=True)

    actor[0].module[-1].register_forward_pre_hook(keep)


class Watched(TensorDictModuleBase):
    """A policy that keeps expert and weights of every step of one environment.

    Args:
        act: made by :func:`acting`.
    """

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["observation"], ["action"]
        self.act = act
        self.experts: list[Tensor] = []
        self.weights: list[Tensor] = []

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action``."""
        acted, expert, weights = self.act(tensordict)
        if expert is not None:
            self.experts.append(expert)
        if weights is not None:
            self.weights.append(weights)
        return acted

    def pop(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Experts ``[T]`` and weights ``[T, K]`` since the last call, ``None`` where there are none."""
        found = [torch.cat(rows).cpu().numpy() if rows else None for rows in (self.experts, self.weights)]
        self.experts, self.weights = [], []
        return found[0], found[1]


# -------------------------------------------------------------------------------------------- episodes


@dataclass(frozen=True)
class Episode:
    """One episode of ``T`` steps.

    Args:
        seed: of the environment and of what the policy draws.
        rewards: ``[T]``.
        actions: ``[T, A]``.
        success: as the environment reports it at the end, ``None`` where it does not.
        experts: who acted, ``[T]``; ``None`` for a policy without a draw of an expert.
        weights: of all experts, ``[T, K]``: the router's probabilities, or the weights of a blend.
    """

    seed: int
    rewards: np.ndarray
    actions: np.ndarray
    success: bool | None
    experts: np.ndarray | None
    weights: np.ndarray | None


class _Recorded(gym.Wrapper):
    """Begins every episode from ``seed`` and keeps what happens in it."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.seed = 0
        self.rewards: list[float] = []
        self.actions: list[np.ndarray] = []
        self.success: bool | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.rewards, self.actions, self.success = [], [], None
        return self.env.reset(seed=self.seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.rewards.append(float(reward))
        self.actions.append(action)
        success = info.get("is_success", info.get("success"))
        self.success = None if success is None else bool(success)
        return observation, reward, terminated, truncated, info


class Player:
    """Plays episodes one by one, each of which its seed decides alone.

    Args:
        cfg: ``env``, ``env_kwargs`` and ``device`` are read.
        policy: for the environment as Gymnasium makes it.
        watched: inside ``policy``.
        max_steps: an episode is cut here.
    """

    def __init__(self, cfg: DictConfig, policy: TensorDictModuleBase, watched: Watched, max_steps: int) -> None:
        self.watched = watched
        self.evaluator = runs.Evaluator(
            cfg.env, policy, episodes=1, max_steps=max_steps, seed=0, device=cfg.device, env_kwargs=cfg.env_kwargs
        )
        self.env = _Recorded(self.evaluator.envs[0])
        self.evaluator.envs = [self.env]

    def __call__(self, seed: int) -> Episode:
        """The episode of ``seed``."""
        common.seed_everything(seed)
        self.evaluator.seed = self.env.seed = seed
        self.evaluator()
        experts, weights = self.watched.pop()
        return Episode(seed, np.array(self.env.rewards), np.stack(self.env.actions), self.env.success, experts, weights)

    def close(self) -> None:
        """Close the environment."""
        self.evaluator.close()


# ----------------------------------------------------------------------------------------------- video

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


def write_video(cfg: DictConfig, episode: Episode, path: Path) -> None:
    """Play an episode's actions again and film it, one picture before the first step and one after each.

    Args:
        cfg: ``env`` and ``env_kwargs`` are read.
        episode: to be filmed.
        path: of the mp4 file, which is there as a whole or not at all.

    Raises:
        NoVideoError: where the environment cannot be rendered here, or a package is missing.
    """
    if find_spec("imageio_ffmpeg") is None:
        raise NoVideoError("imageio-ffmpeg is missing (pip install 'torchrl_pmoe[recipes]')")
    kwargs: Any = OmegaConf.to_container(cfg.env_kwargs)
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    display = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if sys.platform == "linux" and not display:
        # pygame's, of the classic tasks
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        with closing(common.make_gym(cfg.env, {**kwargs, "render_mode": "rgb_array"})) as env:
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
        raise NoVideoError(f"{cfg.env} could not be rendered ({reason})") from error
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
    fps = env.metadata.get("render_fps", 30)
    env.reset(seed=episode.seed)
    with (
        writer(path, format="FFMPEG", fps=fps, codec="libx264", macro_block_size=1) as video,
        progress(len(episode.rewards) + 1, "frame") as bar,
    ):
        video.append_data(_picture(env))
        bar.update()
        for action, reward in zip(episode.actions, episode.rewards, strict=True):
            if float(env.step(action)[1]) != reward:
                raise NoVideoError("the environment does not repeat an episode from its seed")
            video.append_data(_picture(env))
            bar.update()


def _picture(env: gym.Env) -> np.ndarray:
    """What the environment looks like, cut to even sides, which the codec needs."""
    picture = np.asarray(env.render())
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    return picture[:height, :width]
