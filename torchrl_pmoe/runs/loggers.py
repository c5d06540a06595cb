"""TorchRL's loggers for a run that may be stopped and go on."""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrl.record.loggers import Logger, get_logger

from torchrl_pmoe.runs.files import replace_file

__all__ = ["run_logger"]

RECORD = "logger.json"
"""The file of a run directory that tells, by backend, the name and the id under which a service knows the run."""


@contextmanager
def run_logger(
    backend: str, directory: str | os.PathLike[str], *, project: str, hparams: Mapping[str, Any]
) -> Iterator[Logger]:
    """A logger from :func:`~torchrl.record.loggers.get_logger`; a run that goes on writes to the run that it has begun.

    Args:
        backend: ``"csv"``, ``"tensorboard"``, ``"wandb"``, ``"mlflow"`` or ``"trackio"``.
        directory: of the run. What the backend keeps on this machine goes into ``logs``, how it calls the run into
            ``logger.json``.
        project: of W&B and trackio.
        hparams: sent when the run begins, and to W&B when it goes on, where they may have changed.

    Yields:
        The logger. It is closed at the end.
    """
    directory = Path(directory)
    file = directory / RECORD
    records = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    begun = records.get(backend)
    name = directory.resolve().name if begun is None else begun["name"]
    identity = None if begun is None else begun["id"]
    kwargs: dict[str, Any] = {}
    if backend == "wandb":
        identity = identity or secrets.token_hex(8)
        kwargs["wandb_kwargs"] = {"project": project, "id": identity}
    elif backend == "trackio":
        # it knows a run by its name: a new one must not go on with another of the same name
        kwargs["trackio_kwargs"] = {"project": project, "resume": "never" if begun is None else "allow"}
    elif backend == "mlflow":
        # TorchRL's logger writes files, which MLflow refuses since 3.10 unless it is told not to
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        if identity is not None:
            # and hands it no id; it reads this one, once
            os.environ["MLFLOW_RUN_ID"] = identity
    logger = get_logger(backend, str(directory / "logs"), name, **kwargs)
    assert logger is not None
    try:
        if backend == "mlflow":
            identity = logger.experiment.info.run_id
        elif backend == "trackio":
            name = logger.experiment.name
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps({**records, backend: {"name": name, "id": identity}}))
        if begun is None or backend == "wandb":
            logger.log_hparams({key: _plain(value) for key, value in hparams.items()})
        yield logger
    finally:
        # the run has ended, and metrics.csv has all that the service may have missed
        try:
            _close(backend, logger)
        except Exception as error:
            warnings.warn(f"the {backend} logger could not be closed ({type(error).__name__}: {error})", stacklevel=2)


def _plain(value: Any) -> int | float | str | bool:
    return value if isinstance(value, int | float | str | bool) else str(value)


def _close(backend: str, logger: Logger) -> None:
    logger.close()
    if backend == "mlflow":
        import mlflow

        # the run that is active is the process's, and the next one could not begin
        mlflow.end_run()
