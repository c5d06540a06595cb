"""A process that has imported what every recipe imports, and forks for every command.

A recipe imports for six seconds what hardly changes from run to run. The child is a process of its own: it runs the
recipe's file as ``python recipes/NAME.py ARGUMENTS`` does, with signals, exit status, standard streams, working
directory and variables of its own. What Python reads from the environment as it starts, and what goes wrong while the
recipe imports, it does not show: that takes a process that Python starts anew.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
RECIPES = TESTS.parent / "recipes"
AVAILABLE = hasattr(os, "fork") and hasattr(os, "pidfd_open") and Path("/proc/self/task").is_dir()
"""Whether this system can fork for a command; Linux can."""

# a run draws at its end
_IMPORTS = ("matplotlib.pyplot", "dac", "ppo_pmoe", "sac_many_seeds", "sac_pmoe", "target_reaching")
_MOST_BYTES = 2**20


def environment() -> dict[str, str]:
    """The variables of every command."""
    paths = [str(TESTS / "recipes"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


class Forked:
    """A command in a process that was forked for it; what :class:`subprocess.Popen` has of it.

    Args:
        server: the process's parent.
        args: the script's file and its arguments.
        pid: of the process, which leads a session of its own.
    """

    def __init__(self, server: ForkServer, args: Sequence[str], pid: int) -> None:
        self.args, self.pid = list(args), pid
        self.returncode: int | None = None
        self._server = server
        self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; ``None`` while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, ``timeout`` seconds at most.

        Raises:
            subprocess.TimeoutExpired: if it still runs.
        """
        if self.returncode is None:
            if not select.select([self._handle], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            os.close(self._handle)
            self.returncode = self._server.ask({"wait": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


@cache
def shared() -> ForkServer:
    """The one of this process."""
    return ForkServer(environment())


class ForkServer:
    """Starts commands in processes that are forked from one that has imported the recipes.

    Args:
        env: variables of that process; a command has its own.

    It is made at the first command. It ends with this process, and so do commands that still run.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        args: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        files: tuple[int, int],
        memory: int | None = None,
    ) -> Forked:
        """Run a script.

        Args:
            args: its file and its arguments.
            cwd: its working directory.
            env: all its variables.
            files: descriptors of what it prints to, and of what it prints errors to.
            memory: bytes of addresses that it may have; no limit by default.
        """
        request = {"args": [str(arg) for arg in args], "cwd": str(cwd), "env": dict(env), "memory": memory}
        return Forked(self, request["args"], self.ask(request, *files))

    def ask(self, request: Mapping[str, Any], *files: int) -> int:
        """Send a request and the files that it is about, and wait for the answer."""
        if self._process is None:
            self._begin()
        socket.send_fds(self._link, [json.dumps(request).encode()], files)
        answer = self._link.recv(8)
        if not answer:
            self._log.seek(0)
            raise RuntimeError(f"the fork server has ended: {self._log.read().decode(errors='replace')}")
        return int.from_bytes(answer, "big", signed=True)

    def _begin(self) -> None:
        # each message arrives as it was sent, or not at all
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the server lives)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve())],
                env=self._env,
                stdin=theirs,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )


def _serve(link: socket.socket) -> dict[str, Any] | None:
    """Fork for every request; returns it in the child, and ``None`` in this process when there are no more."""
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("a process with threads cannot be forked")
    gc.freeze()  # or every child copies what its collector walks over
    running: set[int] = set()
    while True:
        data, files, _, _ = socket.recv_fds(link, _MOST_BYTES, 2)
        if not data:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            return None
        request = json.loads(data)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            running.discard(request["wait"])
        else:
            answer = os.fork()
            if answer == 0:
                link.close()
                _become(request, files)
                return request
            running.add(answer)
        for file in files:
            os.close(file)
        link.send(answer.to_bytes(8, "big", signed=True))


def _become(request: Mapping[str, Any], files: Sequence[int]) -> None:
    """What a shell does for a command, in a process that was forked for it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has its children ignore it
    if request["memory"] is not None:
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None


def _leave(status: object) -> None:
    """Leave as Python does, but for taking down every module that was imported, which takes most of a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = 120  # what Python says of output that was lost
    os._exit((status or 0) & 0xFF)


if __name__ == "__main__":
    sys.path.insert(0, str(RECIPES))
    for name in _IMPORTS:
        import_module(name)
    request = _serve(socket.socket(fileno=os.dup(0)))
    if request is not None:
        sys.argv = request["args"]
        sys.path[:2] = [str(Path(sys.argv[0]).parent)]  # as Python has it
        status: object = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        _leave(status)
