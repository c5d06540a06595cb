"""Runs on the Hugging Face Hub."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torchrl.checkpoint import CheckpointError

from torchrl_pmoe.runs.card import CARD
from torchrl_pmoe.runs.checkpoints import POLICIES, StateReader, VerifiedCheckpoint
from torchrl_pmoe.runs.directory import RunDirectory

__all__ = ["HUB", "download_checkpoint", "push_to_hub"]

HUB = "hf://"
"""Begins the address of a run on the Hub: ``hf://owner/name``, or ``hf://owner/name@revision``."""
_RECORDS = ("config.yaml", "metrics.csv", "learning_curve.png")
_EARLIER = [f"{RunDirectory.CHECKPOINTS}/*", "seed*/*", "README.md", *_RECORDS]
"""What a push may have put into a repository."""


def push_to_hub(run: str | Path, repo_id: str, *, private: bool | None = None) -> str:
    """Put a run into a repository of the Hugging Face Hub, where :func:`load_policy` finds it.

    What is there of an earlier push is replaced. The repository holds the policies of the last checkpoint, without what
    training alone needs, the model card as ``README.md``, ``config.yaml``, and of every agent ``metrics.csv`` and
    ``learning_curve.png``. Log in first: ``hf auth login``, or the variable ``HF_TOKEN``.

    Args:
        run: directory of a run.
        repo_id: ``owner/name``; made if it is not there.

    Keyword Args:
        private: whether a repository that is made is private; what the owner's settings say if not given.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: in one line, where there is no whole checkpoint with a policy.
        ImportError: where ``huggingface_hub`` is not installed.
        OSError: in one line, where the Hub does not answer or refuses.

    Examples:
        >>> push_to_hub("outputs/sac_pmoe/Walker2d-v4-pmoe-seed0/...", "me/walker2d-pmoe")
        >>> policy = load_policy("hf://me/walker2d-pmoe")
    """
    hub = _huggingface_hub(repo_id)
    api = hub.HfApi()
    directory = RunDirectory(run)
    checkpoint = next(iter(directory.checkpoints()), None)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint")
    with TemporaryDirectory() as folder:
        staged = Path(folder)
        _copy_policies(checkpoint, staged / RunDirectory.CHECKPOINTS / checkpoint.name)
        for place in (directory.path, *directory.path.glob("seed[0-9]*")):
            for record in (place / name for name in _RECORDS):
                if record.is_file():
                    target = staged / record.relative_to(directory.path)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(record, target)
        if (directory.path / CARD).is_file():
            shutil.copyfile(directory.path / CARD, staged / "README.md")
        try:
            api.create_repo(repo_id, exist_ok=True, private=private)
            pushed = api.upload_folder(
                repo_id=repo_id, folder_path=staged, delete_patterns=_EARLIER, commit_message=checkpoint.name
            )
        except _errors(hub) as error:
            raise OSError(f"{repo_id} cannot be written: {' '.join(str(error).split())}") from error
    return str(pushed.commit_url)


def _copy_policies(checkpoint: Path, target: Path) -> None:
    """A checkpoint with the policies of another one alone."""
    held = StateReader()
    kept = VerifiedCheckpoint(**{POLICIES: held})
    kept.load(checkpoint, components=[POLICIES], map_location="cpu")
    kept.save(target, metadata=VerifiedCheckpoint.manifest(checkpoint)["metadata"])


def download_checkpoint(address: str) -> Path:
    """The last checkpoint of a run on the Hub, in the Hub's cache on this machine: its files may be links there.

    Args:
        address: see :data:`HUB`.

    Raises:
        CheckpointError: in one line, where there is no such repository, or none with a checkpoint.
        ImportError: where ``huggingface_hub`` is not installed.
    """
    repo_id, _, revision = address.removeprefix(HUB).partition("@")
    hub = _huggingface_hub(address)
    try:
        found = hub.snapshot_download(repo_id, revision=revision or None, allow_patterns="checkpoints/*")
    except _errors(hub) as error:
        raise CheckpointError(f"{address} cannot be read: {' '.join(str(error).split())}") from error
    checkpoint = next(iter(RunDirectory(found).checkpoints()), None)
    if checkpoint is None:
        raise CheckpointError(f"{address} has no checkpoint")
    return checkpoint


def _errors(hub: Any) -> tuple[type[Exception], ...]:
    """What its functions raise where the Hub does not answer, refuses, or an address is none."""
    # older versions raise those of requests, which are OSErrors
    return OSError, ValueError, getattr(hub.errors, "HTTPError", OSError)


def _huggingface_hub(wanted: str) -> Any:
    if find_spec("huggingface_hub") is None:
        raise ImportError(f"{wanted}: needs a package that is not installed: pip install 'torchrl_pmoe[hub]'")
    import huggingface_hub.errors

    return huggingface_hub
