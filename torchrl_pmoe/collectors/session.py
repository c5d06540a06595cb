"""A connection to Ray, on this machine or to a cluster."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

__all__ = ["ClusterError", "connect"]


class ClusterError(ValueError):
    """Ray is not installed, or there is no cluster at an address; one line says what must be."""


def connect(address: str | None = None, *, num_cpus: int | None = None) -> bool:
    """Connect this process to Ray. One that is connected stays as it is.

    Args:
        address: of a cluster's head, ``host:6379``, or ``auto`` for one that runs on this machine; ``None`` starts Ray
            on this machine, for this process alone.

    Keyword Args:
        num_cpus: how many cores a Ray that is started here shares out.

    Returns:
        Whether the connection is new, and is to be ended with ``ray.shutdown()``.

    Raises:
        ClusterError: in one line, if that cannot be.
    """
    if find_spec("ray") is None:
        raise ClusterError("the package ray is missing: pip install ray")
    # what Ray would say of accelerators, and send to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return False
    local = address in (None, "local")
    if address is not None and (why := _why_silent(address)) is not None:
        raise ClusterError(f"no Ray cluster answers at {address} ({why})")
    with _own_signals():
        try:
            ray.init(
                address="local" if local else address,
                num_cpus=num_cpus if local else None,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        # Ray raises whatever it met
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            what = "Ray cannot start here" if local else f"no Ray cluster answers at {address}"
            raise ClusterError(f"{what} ({type(error).__name__}: {words})") from error
    return True


def _why_silent(address: str) -> str | None:
    """Why nothing answers at an address, if that is so; Ray itself takes minutes to say it."""
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if found is None:
        return None
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
