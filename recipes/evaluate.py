"""Evaluate a trained agent, and watch it.

    python recipes/evaluate.py outputs/sac_pmoe/...

``RUN`` is the directory of a run of ``sac_pmoe.py``, ``ppo_pmoe.py`` or ``dac.py``, of one training of
``target_reaching.py``, or a checkpoint of one of them; of a run with ``num_seeds`` above 1, ``RUN/seed<n>``, or ``RUN``
with ``--agent``. The last checkpoint is loaded. The seed of an episode decides all of it: that of ``--seed 5`` is also
the sixth of ``--seed 0``. The first is by default 4,000,000 above the agent's own seed, where training and the run's
evaluations have none. What is written replaces what an earlier evaluation left in the same place:

- ``episodes.csv``: seed, return and length of every episode, and success where the environment reports it;
- ``experts.csv``, ``experts.png``: step by step along the first episode, the router's probabilities, the expert that
  acts and the reward; of ``gating`` and ``mcp``, which blend, the weights of the blend (of ``mcp``, each gate over the
  sum of all);
- ``episode.mp4``: the first episode. Where it cannot be rendered, a line says why, and the rest is there; with
  ``--video`` the exit status is 1 then. MuJoCo renders without a display through EGL, or else OSMesa.
"""

from __future__ import annotations

if __name__ == "__main__":
    import process

    process.begin()

import argparse
import csv
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import common
import dac
import numpy as np
import ppo_pmoe
import process
import runs
import sac_pmoe
import seeds
import torch
from common import UsageError
from episodes import KINDS, Episode, NoVideoError, Player, Watched, acting, progress, write_video
from intervals import interquartile_mean
from normalization import NormalizedPolicy
from omegaconf import DictConfig, OmegaConf
from policies import UNIMODAL, describe
from resume import CHECKPOINTS, load_components, open_run, owned
from rules import device, integer
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.objectives import SoftUpdate

from torchrl_pmoe.objectives import StackedLoss
from torchrl_pmoe.runs import RunDirectory
from torchrl_pmoe.trainers import NonFiniteError

SEED_OFFSET = 4_000_000
RECIPES = {"sac_pmoe": sac_pmoe, "ppo_pmoe": ppo_pmoe, "dac": dac}

# ---------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Trained:
    """An agent as a checkpoint left it.

    Args:
        cfg: of its run.
        checkpoint: it was read from.
        directory: its own, where its records are.
        seed: its own.
        actor: counted in the first line.
        policy: for the environment as Gymnasium makes it.
        watched: inside ``policy``.
        kind: how it acts.
    """

    cfg: DictConfig
    checkpoint: Path
    directory: Path
    seed: int
    actor: nn.Module
    policy: TensorDictModuleBase
    watched: Watched
    kind: str


def load(path: Path, *, agent: int | None = None, act: str | None = None, on: str = "cpu") -> Trained:
    """The agent of a run.

    Args:
        path: see the module.
        agent: seed of one of several.
        act: how it acts; unset, as in the evaluations of its run.
        on: device.

    Raises:
        UsageError: in one line, for anything but an intact run and a way in which its policy can act.
    """
    path, agent = _locate(path, agent)
    cfg, checkpoint = open_run(path)
    run = path.parent.parent if _is_checkpoint(path) else path
    # nothing is collected, updated or logged here: what that needs need not be there
    serial = {"collector.num_envs": 1, "collector.backend": "serial"}
    for key, value in {"device": on, **serial, "compile.cudagraphs": False, "logger.backend": None}.items():
        OmegaConf.update(cfg, key, value)
    if cfg.recipe not in RECIPES:
        raise UsageError(f"{run}: must be a run of {', '.join(RECIPES)}, it is one of {cfg.recipe}")
    recipe: Any = RECIPES[cfg.recipe]
    try:
        common.check_config(cfg, recipe.RULES)
        kind = _kind(cfg, act)
    except UsageError as error:
        raise UsageError(f"{run}: {error}") from error
    common.prepare_torch(cfg)
    # one state at a time, and numbers that do not depend on the machine's cores
    torch.set_num_threads(1)
    build = _load_sac if recipe is sac_pmoe else _load_ppo
    directory, seed = run, cfg.seed
    if recipe is sac_pmoe and cfg.num_seeds > 1:
        known = range(cfg.seed, cfg.seed + cfg.num_seeds)
        if agent not in known:
            given = "must be given" if agent is None else f"{agent} is not there"
            raise UsageError(f"{run}: --agent: {given}, its agents are those of seeds {known[0]} to {known[-1]}")
        directory, seed = run / f"seed{agent}", agent
    elif agent not in (None, seed):
        raise UsageError(f"--agent={agent}: must be left out, {run} has one agent")
    actor, policy, watched = build(cfg, checkpoint, seed, kind)
    raw = common.raw_action_policy(cfg, policy)
    return Trained(cfg, checkpoint, directory, seed, actor, raw, watched, kind)


def _is_checkpoint(path: Path) -> bool:
    return path.resolve().parent.name == CHECKPOINTS


def _locate(path: Path, agent: int | None) -> tuple[Path, int | None]:
    """The run or the checkpoint, and the agent, that ``path`` names."""
    full = path.resolve()
    if _is_checkpoint(path):
        return full, agent
    number = re.fullmatch(r"seed(\d+)", full.name)
    if not number or (full / CHECKPOINTS).exists() or not (full.parent / CHECKPOINTS).exists():
        return path, agent
    if agent not in (None, int(number[1])):
        raise UsageError(f"--agent={agent}: must be {number[1]} with {path}")
    return full.parent, int(number[1])


def _kind(cfg: DictConfig, act: str | None) -> str:
    """How the policy acts: as asked, or as in the evaluations of its run."""
    chosen_by_critics = cfg.get("acting") == "best_of_experts"
    if act == "drawn" and (cfg.policy in UNIMODAL or chosen_by_critics):
        why = "acting=best_of_experts" if chosen_by_critics else f"policy={cfg.policy}, which {UNIMODAL[cfg.policy]}"
        raise UsageError(f"--act=drawn: must be deterministic or stochastic with {why}")
    expert = cfg.logger.eval_option if cfg.policy == "dac" else cfg.logger.eval_expert
    return act or ("drawn" if expert == "drawn" and cfg.policy not in UNIMODAL else "deterministic")


Loaded = tuple[nn.Module, TensorDictModuleBase, Watched]


def _load_sac(cfg: DictConfig, checkpoint: Path, seed: int, kind: str) -> Loaded:
    env = common.make_env(cfg.env, seed, kwargs=cfg.env_kwargs)
    agents = seeds.build_agents(cfg, env)
    env.close()
    found = agents[seed - cfg.seed]
    if cfg.num_seeds > 1:
        loss = StackedLoss([agent.loss for agent in agents])
        SoftUpdate(loss, eps=cfg.optim.target_update_polyak)  # TorchRL warns of a loss without
        load_components(checkpoint, {"loss_module": loss})
        loss.write_back()
    else:
        load_components(checkpoint, {"loss_module": found.loss})
    explorer, _ = sac_pmoe.build_policies(cfg, found.actor, found.loss)
    watched = Watched(acting(explorer, kind))
    return found.actor, watched, watched


def _load_ppo(cfg: DictConfig, checkpoint: Path, seed: int, kind: str) -> Loaded:
    agent = (dac if cfg.policy == "dac" else ppo_pmoe).build_agent(cfg)
    agent.env.close()
    normalization = {f"trainer_module.{ppo_pmoe.NORMALIZATION}": agent.normalization}
    load_components(checkpoint, {"loss_module": agent.loss, **normalization})
    watched = Watched(acting(agent.actor, kind))
    wrapper: type[NormalizedPolicy] = dac.NormalizedOptions if cfg.policy == "dac" else NormalizedPolicy
    return agent.actor, wrapper(watched, agent.normalization), watched


# ---------------------------------------------------------------------------------------------- records


def summary(returns: Sequence[float]) -> str:
    """Mean, standard deviation and interquartile mean over episodes, in one line."""
    if len(returns) < 2:
        return f"return {returns[0]:,.2f}"
    found = runs.summarize(torch.tensor(returns, dtype=torch.float64))
    middle = interquartile_mean(returns)
    return (
        f"return {found['return_mean']:,.2f} ± {found['return_std']:,.2f} (mean ± std), "
        f"interquartile mean {middle.value:,.2f} [{middle.low:,.2f}, {middle.high:,.2f}] (95 %)"
    )


def describe_experts(cfg: DictConfig, episode: Episode) -> str:
    """Who acted in an episode, in one line."""
    if episode.experts is None:
        return f"policy {cfg.policy} {UNIMODAL[cfg.policy]}"
    name = "options" if cfg.policy == "dac" else "experts"
    usage = np.bincount(episode.experts) / len(episode.experts)
    shares = ", ".join(f"{expert} ({share:.0%})" for expert, share in enumerate(usage) if share)
    return f"{name} that act in the episode of seed {episode.seed}: {shares}"


def write_steps(episode: Episode, path: Path) -> None:
    """One row a step: expert, weights of all experts, reward."""
    columns: dict[str, Sequence[Any]] = {"t": range(len(episode.rewards))}
    if episode.experts is not None:
        columns["expert"] = episode.experts.tolist()
    if episode.weights is not None:
        name = "weight" if episode.experts is None else "probability"
        columns.update({f"{name}_{k}": column.tolist() for k, column in enumerate(episode.weights.T)})
    columns["reward"] = episode.rewards.tolist()
    _write_rows(path, list(columns), zip(*columns.values(), strict=True))


def _write_rows(path: Path, header: Sequence[str], rows: Any) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def draw(cfg: DictConfig, episode: Episode, path: Path) -> None:
    """Weights of the experts, who acts, and the sum of rewards, along an episode."""
    from figures import mpl, subplots

    name = "option" if cfg.policy == "dac" else "expert"
    steps, weights, experts = len(episode.rewards), episode.weights, episode.experts
    edges = np.arange(steps + 1)
    heights = [2.5]
    if experts is not None and weights is not None:
        heights = [3, 0.4 + 0.08 * weights.shape[1], 2.5]
    elif weights is not None:
        heights = [3, 2.5]
    fig, axes = subplots(
        len(heights), 1, sharex=True, squeeze=False, height_ratios=heights,
        figsize=(9, 1.2 + sum(heights)),
    )  # fmt: skip
    panels = list(axes[:, 0])
    panels[0].set_title(f"{cfg.env}, policy {cfg.policy}, seed {episode.seed}: return {episode.rewards.sum():,.2f}")
    if weights is not None:
        number = weights.shape[1]
        # cividis keeps its order of lightness under every kind of colour blindness
        colors = mpl.colormaps["cividis"](np.linspace(0.05, 0.95, number))
        held = np.concatenate([weights, weights[-1:]]).T
        panels[0].stackplot(
            edges, held, step="post", antialiased=False, colors=colors, labels=[str(k) for k in range(number)]
        )
        panels[0].set(ylabel="weight in the blend" if experts is None else f"{name}'s probability", ylim=(0, 1))
        panels[0].legend(
            title=name, loc="upper left", bbox_to_anchor=(1, 1.02), reverse=True, ncols=1 + (number > 8),
            columnspacing=1, handlelength=1.2,
        )  # fmt: skip
        if experts is not None:
            strip = np.where(np.arange(number)[:, None, None] == experts[:, None], colors[:, None], 0.0)
            panels[1].imshow(
                strip, aspect="auto", interpolation="none", origin="lower", extent=(0, steps, -0.5, number - 0.5)
            )
            panels[1].set(ylabel="acts", yticks=range(0, number, 1 + (number - 1) // 8))
    panels[-1].plot(edges, np.concatenate([[0.0], episode.rewards.cumsum()]), color="#0072B2")
    panels[-1].set(ylabel="sum of rewards", xlabel="step")
    panels[-1].grid(alpha=0.3)
    panels[-1].yaxis.set_major_formatter("{x:,.5g}")
    panels[-1].set_xlim(0, steps)
    fig.align_ylabels(panels)
    fig.savefig(path, dpi=150)


# ------------------------------------------------------------------------------------------------- main

FILES = ("episodes.csv", "experts.csv", "experts.png", "episode.mp4")


def evaluate(trained: Trained, output: Path, *, number: int, seed: int, max_steps: int, video: bool) -> str | None:
    """Play episodes, print what they brought and leave :data:`FILES` in ``output``.

    Args:
        trained: the agent.
        output: a directory, made if it is not there.
        number: of episodes.
        seed: of the first.
        max_steps: an episode is cut here.
        video: whether to film the first.

    Returns:
        Why there is no video, if there should be one.
    """
    cfg = trained.cfg
    rows: list[tuple[Any, ...]] = []
    with closing(Player(cfg, trained.policy, trained.watched, max_steps)) as play, progress(number, "episode") as bar:
        for index in range(number):
            episode = play(seed + index)
            if not index:
                first = episode
            success = "" if episode.success is None else int(episode.success)
            rows.append((episode.seed, float(episode.rewards.sum()), len(episode.rewards), success))
            bar.update()
    header: Sequence[str] = ("seed", "return", "length", "success")
    successes = [row[3] for row in rows if row[3] != ""]
    if not successes:
        header, rows = header[:3], [row[:3] for row in rows]
    print(" ".join(f"{name:>12}" for name in header))
    for which, total, *others in rows:
        print(" ".join([f"{which:>12}", f"{total:>12,.2f}", *(f"{value:>12}" for value in others)]))
    print(summary([row[1] for row in rows]))
    if successes:
        print(f"success in {successes.count(1)} of {len(successes)} episodes")
    print(describe_experts(cfg, first))
    output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (output / name).unlink(missing_ok=True)
    _write_rows(output / "episodes.csv", header, rows)
    write_steps(first, output / "experts.csv")
    draw(cfg, first, output / "experts.png")
    reason = None
    if video:
        try:
            write_video(cfg, first, output / "episode.mp4")
        except NoVideoError as error:
            reason = str(error)
    print(f"{', '.join(name for name in FILES if (output / name).exists())} in {output}")
    return reason


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Without the usage."""
        process.complain(f"error: {message}")
        sys.exit(2)


def _integer(at_least: int, at_most: int | None = None) -> Callable[[str], int]:
    rule = integer(at_least, at_most)

    def parse(given: str) -> int:
        try:
            return rule.parse(int(given))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{given}: must be {rule.allowed}") from None

    return parse


def _device(given: str) -> str:
    rule = device()
    try:
        return rule.parse(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given}: must be {rule.allowed.removesuffix(' or null')}") from None


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    first, _, rest = __doc__.partition("\n")
    parser = _Parser(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="directory of a run, or of one of its checkpoints")
    add("--episodes", type=_integer(1), default=10, metavar="N", help="how many (10)")
    add("--seed", type=_integer(0, 2**31 - 1), help="of the first episode (the agent's + 4,000,000)")
    add("--act", choices=KINDS, help="how the agent acts (as in the run's own evaluations)")
    add("--max-steps", type=_integer(1), metavar="N", help="cut an episode here (logger.eval_max_steps of the run)")
    add("--agent", type=_integer(0), metavar="SEED", help="which one, of a run with num_seeds above 1")
    add("--output", type=Path, metavar="DIR", help="where the files go (RUN/evaluation)")
    add("--video", action=argparse.BooleanOptionalAction, help="film the first episode (if that is possible)")
    add("--device", type=_device, default="cpu", help="where the policy runs (cpu)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Load, play, report; the exit status."""
    args = _parser().parse_args(argv)
    try:
        trained = load(args.run, agent=args.agent, act=args.act, on=args.device)
        output = args.output
        if output is None:
            output = trained.directory / "evaluation"
            if _is_checkpoint(args.run):
                output /= trained.checkpoint.name
        if there := RunDirectory(output).outputs():
            raise UsageError(f"--output={output}: must be a directory without a run, it has {', '.join(there)}")
        how = args.act or f"{trained.kind} as in the run's own evaluations"
        with owned(output, f"--output={output}", "a directory that no other process uses"):
            print(describe(trained.cfg, trained.actor))
            print(f"{trained.checkpoint.name}, agent of seed {trained.seed}, acting {how}")
            reason = evaluate(
                trained,
                output,
                number=args.episodes,
                seed=trained.seed + SEED_OFFSET if args.seed is None else args.seed,
                max_steps=args.max_steps or trained.cfg.logger.eval_max_steps,
                video=args.video is not False,
            )
    except (UsageError, NonFiniteError) as error:
        process.complain(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        process.complain(f"error: {place}{error.strerror or error}")
        return 1
    except (KeyboardInterrupt, RuntimeError) as error:
        # a tensordict's context manager answers an interrupt with an error of its own
        if KeyboardInterrupt not in (type(error), type(error.__context__)):
            raise
        process.complain("interrupted")
        return 130
    if reason is not None:
        process.complain(f"no video: {reason}")
    return int(reason is not None and args.video is True)


if __name__ == "__main__":
    # a film that is not finished is taken away
    process.ready()
    sys.exit(main())
