"""TorchRL's ``ParallelEnv`` made so that its processes end with the run, however the run ends."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from torchrl.envs import EnvBase, EnvCreator, ParallelEnv

__all__ = ["parallel_env"]


def parallel_env(num_envs: int, create: Callable[[], EnvBase]) -> ParallelEnv:
    """A started :class:`~torchrl.envs.ParallelEnv` of ``num_envs`` processes, to be closed with its ``close()``.

    Where ``close()`` is never reached, the processes end with this one, by an exception, an interrupt or a signal. An
    interrupt from the keyboard reaches this process alone; one that comes while the processes start, which takes
    seconds, is raised when they have. ``SIGTERM`` kills Python without a last word, and then each process prints that
    it lost its owner: have it raise ``SystemExit``, as the recipes do, for a silent end.

    A script must start its work under ``if __name__ == "__main__":``, since the processes import it.

    Args:
        num_envs: number of processes, one environment each.
        create: makes one environment, of batch size ``[]``; sent to the processes with cloudpickle, and called once
            more in this one, for the specs.

    Returns:
        An environment of batch size ``[num_envs]``, on the CPU; ``to(device)`` before ``set_seed`` for another device.

    Raises:
        ValueError: for fewer than one environment.

    Examples:
        >>> env = parallel_env(4, lambda: GymEnv("Pendulum-v1"))
        >>> env.rollout(5).shape
        torch.Size([4, 5])
        >>> env.close()
    """
    if not isinstance(num_envs, int) or num_envs < 1:
        raise ValueError(f"parallel_env: num_envs must be an integer of at least 1, got {num_envs!r}.")
    # without daemon, Python waits at its exit for processes that wait for it; without a device, the first collector
    # to name one would seed the environments again, with a warning
    env = ParallelEnv(num_envs, EnvCreator(create), device="cpu", mp_start_method=_start_method(), daemon=True)
    with _interrupts_held():
        env.start()
    return env


def _start_method() -> str:
    """Processes with no thread and no open pipe of this one; from a server that imports TorchRL once for all."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(["torchrl.envs", "gymnasium", "mujoco"])
    return "forkserver"


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back ``SIGINT`` here, and for good in the processes that are started meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # its first start would let the signal through again
    resource_tracker.ensure_running()
    held: list[int] = []
    # PyTorch's threads do not have this one's mask: what one of them gets, Python's handler would raise here
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number)) if in_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)
