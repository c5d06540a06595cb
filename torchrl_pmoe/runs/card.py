"""The model card of a run, as the Hugging Face Hub shows one."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from torchrl_pmoe.runs.files import replace_file

__all__ = ["CARD", "AgentResult", "source_commit", "write_model_card"]

CARD = "model_card.md"
"""The file of a run's directory that :func:`write_model_card` writes. On the Hub it is ``README.md``."""
_PACKAGES = ("torchrl_pmoe", "torchrl", "tensordict", "torch", "gymnasium")


class AgentResult(NamedTuple):
    """The last evaluation of one agent.

    Args:
        seed: of the agent.
        return_mean: over the episodes of the evaluation.
        return_std: over the same episodes.
    """

    seed: int
    return_mean: float
    return_std: float


def write_model_card(
    directory: Path,
    *,
    title: str,
    env: str,
    env_kwargs: Mapping[str, Any],
    frames: int,
    episodes: int,
    kind: str,
    results: Sequence[AgentResult],
    commit: str | None,
) -> None:
    """Write what a run has trained, on what, with which versions, and what it has reached.

    The header is the Hub's metadata (``model-index``), which it checks, searches and ranks by.

    Args:
        directory: of the run.

    Keyword Args:
        title: heading of the card, such as ``"SAC, pmoe, Hopper-v4"``.
        env: Gymnasium id.
        env_kwargs: arguments of the environment.
        frames: of each agent.
        episodes: of the evaluation.
        kind: how the policy acts in it, as ``load_policy(act=...)`` names it.
        results: of every agent.
        commit: see :func:`source_commit`, as it was when the run began.
    """
    task = {"type": "reinforcement-learning", "name": "reinforcement-learning"}
    metrics = [
        {"type": "mean_reward", "name": f"mean_reward, seed {seed}", "value": f"{mean:.2f} +/- {std:.2f}"}
        for seed, mean, std in results
    ]
    result = {"task": task, "dataset": {"type": env, "name": env}, "metrics": metrics}
    header = {
        "library_name": "torchrl_pmoe",
        "tags": ["reinforcement-learning", "torchrl", "mixture-of-experts", env],
        "model-index": [{"name": title, "results": [result]}],
    }
    # JSON is YAML
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---"]
    given = f", `{json.dumps(dict(env_kwargs))}`" if env_kwargs else ""
    returns = [f"seed {seed}: {mean:,.2f} ± {std:,.2f}" for seed, mean, std in results]
    installed = [f"{name} {_version(name)}" for name in _PACKAGES]
    rows = {
        "environment": f"`{env}`{given}",
        "frames": f"{frames:,}" if len(results) == 1 else f"{frames:,} of each agent",
        "return": f"{'; '.join(returns)} (mean ± standard deviation over {episodes} episodes of the last evaluation)",
        "acting there": f"`{kind}`",
        "versions": ", ".join([*installed, f"Python {platform.python_version()}"]),
        "commit": commit or "unknown",
    }
    several = f", agent={results[0].seed}" if len(results) > 1 else ""
    lines += [
        f"# {title}",
        "",
        "A policy that was trained with `torchrl_pmoe`, in TorchRL.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "`RUN` is this directory, or `hf://owner/name` of a repository on the Hub:",
        "",
        "```python",
        "from torchrl_pmoe.runs import load_policy",
        "",
        f'policy = load_policy("RUN"{several})',
        "```",
        "",
        "`python recipes/evaluate.py RUN` plays episodes of a directory.",
    ]
    replace_file(directory / CARD, "\n".join(lines) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a nightly build has another name, sources on the path have none
        return "of unknown version"


def source_commit() -> str | None:
    """The commit of this package's sources, with ``-dirty`` where files differ from it; ``None`` for a wheel."""
    root = Path(__file__).parents[2]
    # a wheel may be installed below a repository of somebody else
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
