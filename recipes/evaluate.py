"""Evaluate a trained agent, and watch it.

    python recipes/evaluate.py outputs/sac_pmoe/...

``RUN`` is the directory of a run of ``sac_pmoe.py``, ``ppo_pmoe.py`` or ``dac.py``, of one training of
``target_reaching.py``, or a checkpoint of one of them; of a run with ``num_seeds`` above 1, ``RUN/seed<n>``, or ``RUN``
with ``--agent``. The last checkpoint is loaded. The seed of an episode decides all of it: that of ``--seed 5`` is also
the sixth of ``--seed 0``. The first is by default 4,000,000 above the agent's own seed, where training and the run's
evaluations have none. What is written replaces what an earlier evaluation left in the same place:

- ``episodes.csv``: seed, return and length of every episode, and where the environment reports them success and
  ``outcome``, a text or an integer in its last ``info`` that tells ends or ways apart;
- ``experts.csv``, ``experts.png``: step by step along the first episode, the router's probabilities, the expert that
  acts and the reward; of ``gating`` and ``mcp``, which blend, the weights of the blend (of ``mcp``, each gate over the
  sum of all);
- ``episode.mp4``: the first episode. Where it cannot be rendered, a line says why, and the rest is there; with
  ``--video`` the exit status is 1 then. MuJoCo renders without a display through EGL, or else OSMesa.

With ``--export FILE`` no episode is played. The policy becomes a program that runs without this package:
``policy.onnx`` for ONNX Runtime, ``policy.pt2`` for torch.export.
"""

from __future__ import annotations

if __name__ == "__main__":
    from parts import process

    process.begin()

import argparse
import csv
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import compress
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from parts import process
from parts.errors import UsageError
from parts.intervals import interquartile_mean
from parts.launch import owned, usage_line
from parts.networks import UNIMODAL, describe
from parts.resume import open_run
from parts.training import prepare_torch
from parts.video import NoVideoError, progress, write_video
from torchrl.checkpoint import CheckpointError

from torchrl_pmoe.baselines import GatingActor, GaussianActor, MCPActor, OptionActor
from torchrl_pmoe.envs import EnvironmentFault
from torchrl_pmoe.envs.target_reaching.routes import effective_routes, routes
from torchrl_pmoe.runs import Episode, EpisodePlayer, LoadedPolicy, RunDirectory, load_policy, summarize_returns
from torchrl_pmoe.runs.acting import KINDS
from torchrl_pmoe.trainers import NonFiniteError

SEED_OFFSET = 4_000_000

# ---------------------------------------------------------------------------------------------- loading


def load(
    path: Path,
    *,
    agent: int | None = None,
    act: str | int | None = None,
    commit_steps: int | Literal["episode"] | None = None,
    on: str = "cpu",
) -> LoadedPolicy:
    """The agent of a run.

    Args:
        path: see the module.
        agent: seed of one of several.
        act: how it acts, or the expert that acts alone; unset, as in the evaluations of its run.
        commit_steps: for how many steps an expert acts that is committed; unset, as in its run.
        on: device.

    Raises:
        UsageError: in one line, for anything but an intact run and a way in which its policy can act.
    """
    path, agent = _locate(path, agent)
    config, checkpoint = open_run(path)
    policy, chosen_by_critics = str(config.get("policy")), config.get("acting") == "best_of_experts"
    if act in ("drawn", "committed") and (policy in UNIMODAL or (chosen_by_critics and act == "drawn")):
        why = f"policy={policy}, which {UNIMODAL[policy]}" if policy in UNIMODAL else "acting=best_of_experts"
        raise UsageError(f"--act={act}: must be deterministic or stochastic with {why}")
    if commit_steps is not None and (config.get("acting") if act is None else act) != "committed":
        raise UsageError(f"--commit-steps={commit_steps}: must be given with --act committed only")
    try:
        loaded = load_policy(checkpoint, agent=agent, act=act, commit_steps=commit_steps, device=on)  # type: ignore[arg-type]
    except CheckpointError as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        # its arguments are ours
        raise UsageError(f"--{error}") from error
    # one state at a time, and numbers that do not depend on the machine's cores
    prepare_torch(1)
    return loaded


def _is_checkpoint(path: Path) -> bool:
    return path.resolve().parent.name == RunDirectory.CHECKPOINTS


def _locate(path: Path, agent: int | None) -> tuple[Path, int | None]:
    """The run or the checkpoint, and the agent, that ``path`` names."""
    full = path.resolve()
    if _is_checkpoint(path):
        return full, agent
    number = re.fullmatch(r"seed(\d+)", full.name)
    parent, checkpoints = full.parent, RunDirectory.CHECKPOINTS
    if not number or (full / checkpoints).exists() or not (parent / checkpoints).exists():
        return path, agent
    if agent not in (None, int(number[1])):
        raise UsageError(f"--agent={agent}: must be {number[1]} with {path}")
    return parent, int(number[1])


def export(loaded: LoadedPolicy, path: Path) -> None:
    """Write the policy as a program.

    Raises:
        UsageError: in one line, for a file or a policy of which there is none.
    """
    try:
        loaded.export(path)
    except EnvironmentFault:
        raise
    except (ImportError, ValueError) as error:
        # a policy that has no program names the option by itself
        named = "--" if str(error).startswith("act=") else "--export="
        raise UsageError(f"{named}{error}") from error
    print(f"{describe(loaded.env, name_of(loaded), loaded.actor)}, acting {loaded.kind}: {path}")


def directory_of(loaded: LoadedPolicy) -> Path:
    """Where the records of an agent are."""
    run = loaded.checkpoint.parent.parent
    own = run / f"seed{loaded.seed}"
    return own if own.is_dir() else run


# ---------------------------------------------------------------------------------------------- records


def summary(returns: Sequence[float]) -> str:
    """Mean, standard deviation and interquartile mean over episodes, in one line."""
    if len(returns) < 2:
        return f"return {returns[0]:,.2f}"
    found = summarize_returns(torch.tensor(returns, dtype=torch.float64))
    middle = interquartile_mean(returns)
    return (
        f"return {found['return_mean']:,.2f} ± {found['return_std']:,.2f} (mean ± std), "
        f"interquartile mean {middle.value:,.2f} [{middle.low:,.2f}, {middle.high:,.2f}] (95 %)"
    )


def describe_outcomes(outcomes: Sequence[str | int]) -> str:
    """How often each one came, and how many they are worth, in one line."""
    shares = ", ".join(f"{outcome} {share:.0%}" for outcome, share in routes(outcomes, min_share=0.0).items())
    number = effective_routes(outcomes, min_share=0.0)
    return f"outcomes of {len(outcomes)} episodes: {shares}; exp of their entropy {number:.2f}"


def name_of(loaded: LoadedPolicy) -> str:
    """What ``policy`` of the run is."""
    kinds = {GaussianActor: "gaussian", GatingActor: "gating", MCPActor: "mcp", OptionActor: "dac"}
    return next((name for kind, name in kinds.items() if isinstance(loaded.actor, kind)), "pmoe")


def describe_experts(policy: str, episode: Episode) -> str:
    """Who acted in an episode, in one line."""
    if episode.experts is None:
        return f"policy {policy} {UNIMODAL.get(policy, 'draws no expert')}"
    name = "options" if policy == "dac" else "experts"
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


def draw(env: str, policy: str, episode: Episode, path: Path) -> None:
    """Weights of the experts, who acts, and the sum of rewards, along an episode."""
    from parts.figures import expert_colors, expert_legend, subplots

    name = "option" if policy == "dac" else "expert"
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
    panels[0].set_title(f"{env}, policy {policy}, seed {episode.seed}: return {episode.rewards.sum():,.2f}")
    if weights is not None:
        number = weights.shape[1]
        colors = expert_colors(number)
        held = np.concatenate([weights, weights[-1:]]).T
        panels[0].stackplot(
            edges, held, step="post", antialiased=False, colors=colors, labels=[str(k) for k in range(number)]
        )
        panels[0].set(ylabel="weight in the blend" if experts is None else f"{name}'s probability", ylim=(0, 1))
        expert_legend(panels[0], number, name)
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


def evaluate(
    loaded: LoadedPolicy, output: Path, *, number: int, seed: int, max_steps: int, video: bool, device: str = "cpu"
) -> str | None:
    """Play episodes, print what they brought and leave :data:`FILES` in ``output``.

    Args:
        loaded: the agent.
        output: a directory, made if it is not there.

    Keyword Args:
        number: of episodes.
        seed: of the first.
        max_steps: an episode is cut here.
        video: whether to film the first.
        device: of the policy.

    Returns:
        Why there is no video, if there should be one.
    """
    policy = name_of(loaded)
    rows: list[tuple[Any, ...]] = []
    player = EpisodePlayer(
        loaded.env,
        loaded.in_unit_box,
        loaded.watched,
        max_steps=max_steps,
        device=device,
        env_kwargs=loaded.env_kwargs,
    )
    with closing(player) as play, progress(number, "episode") as bar:
        for index in range(number):
            episode = play(seed + index)
            if not index:
                first = episode
            success = "" if episode.success is None else int(episode.success)
            outcome = "" if episode.outcome is None else episode.outcome
            rows.append((episode.seed, float(episode.rewards.sum()), len(episode.rewards), success, outcome))
            bar.update()
    header = ("seed", "return", "length", "success", "outcome")
    successes, outcomes = ([row[column] for row in rows if row[column] != ""] for column in (3, 4))
    told = [True, True, True, bool(successes), bool(outcomes)]
    header, *rows = (tuple(compress(row, told)) for row in (header, *rows))
    print(" ".join(f"{name:>12}" for name in header))
    for which, total, *others in rows:
        print(" ".join([f"{which:>12}", f"{total:>12,.2f}", *(f"{value:>12}" for value in others)]))
    print(summary([row[1] for row in rows]))
    if successes:
        print(f"success in {successes.count(1)} of {len(successes)} episodes")
    if outcomes:
        print(describe_outcomes(outcomes))
    print(describe_experts(policy, first))
    output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (output / name).unlink(missing_ok=True)
    _write_rows(output / "episodes.csv", header, rows)
    write_steps(first, output / "experts.csv")
    draw(loaded.env, policy, first, output / "experts.png")
    reason = None
    if video:
        try:
            write_video(loaded.env, loaded.env_kwargs, first, output / "episode.mp4")
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
    def parse(given: str) -> int:
        upper = "" if at_most is None else f" and <= {at_most}"
        try:
            value = int(given)
        except ValueError:
            value = at_least - 1
        if value < at_least or (at_most is not None and value > at_most):
            raise argparse.ArgumentTypeError(f"{given}: must be an integer >= {at_least}{upper}")
        return value

    return parse


def _act(given: str) -> int | str:
    if given in KINDS or given.isdecimal():
        return given if given in KINDS else int(given)
    raise argparse.ArgumentTypeError(f"{given}: must be one of {', '.join(KINDS)}, or the number of an expert")


def _steps(given: str) -> int | str:
    return given if given == "episode" else _integer(1, 2**31 - 1)(given)


def _device(given: str) -> str:
    try:
        torch.zeros(1, device=given).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise argparse.ArgumentTypeError(
            f"{given}: must be a device of this machine ({', '.join(['cpu', *gpus])})"
        ) from None
    return given


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    first, _, rest = __doc__.partition("\n")
    parser = _Parser(description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="directory of a run, or of one of its checkpoints")
    add("--episodes", type=_integer(1), default=10, metavar="N", help="how many (10)")
    add("--seed", type=_integer(0, 2**31 - 1), help="of the first episode (the agent's + 4,000,000)")
    ways = f"how the agent acts: {', '.join(KINDS)}, or the number of an expert (as in the run's own evaluations)"
    add("--act", type=_act, metavar="HOW", help=ways)
    steps = "with --act committed: for how many steps an expert acts, or episode (as in the run, else episode)"
    add("--commit-steps", type=_steps, metavar="N", help=steps)
    add("--max-steps", type=_integer(1), metavar="N", help="cut an episode here (logger.eval_max_steps of the run)")
    add("--agent", type=_integer(0), metavar="SEED", help="which one, of a run with num_seeds above 1")
    add("--output", type=Path, metavar="DIR", help="where the files go (RUN/evaluation)")
    add("--video", action=argparse.BooleanOptionalAction, help="film the first episode (if that is possible)")
    add("--device", type=_device, default="cpu", help="where the policy runs (cpu)")
    add("--export", type=Path, metavar="FILE", help="write the policy as a program, .onnx or .pt2, and play no episode")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Load, play, report; the exit status."""
    args = _parser().parse_args(argv)
    try:
        loaded = load(args.run, agent=args.agent, act=args.act, commit_steps=args.commit_steps, on=args.device)
        if args.export is not None:
            export(loaded, args.export)
            return 0
        output = args.output
        if output is None:
            output = directory_of(loaded) / "evaluation"
            if _is_checkpoint(args.run):
                output /= loaded.checkpoint.name
        if there := RunDirectory(output).outputs():
            raise UsageError(f"--output={output}: must be a directory without a run, it has {', '.join(there)}")
        how = f"{loaded.kind} as in the run's own evaluations" if args.act is None else args.act
        with owned(output, f"--output={output}", "a directory that no other process uses"):
            print(describe(loaded.env, name_of(loaded), loaded.actor))
            print(f"{loaded.checkpoint.name}, agent of seed {loaded.seed}, acting {how}")
            reason = evaluate(
                loaded,
                output,
                number=args.episodes,
                seed=loaded.seed + SEED_OFFSET if args.seed is None else args.seed,
                max_steps=args.max_steps or loaded.max_steps,
                video=args.video is not False,
                device=args.device,
            )
    except (UsageError, EnvironmentFault, NonFiniteError) as error:
        process.complain(f"error: {error if isinstance(error, NonFiniteError) else usage_line(error)}")
        return 1 if isinstance(error, NonFiniteError) else 2
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
