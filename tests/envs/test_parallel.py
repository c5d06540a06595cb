import os
import signal
import time
from importlib.util import find_spec

import pytest
from fork_server import AVAILABLE, environment, shared
from torchrl.envs import GymEnv

from torchrl_pmoe.envs.parallel import parallel_env

SCRIPT = """
import signal, sys
import torch
from torchrl.envs import GymEnv, SerialEnv
from torchrl_pmoe.envs.parallel import parallel_env

def run(env):
    env.set_seed(0)
    torch.manual_seed(0)
    return env.rollout(20)["next", "observation"]

def main(case):
    if case == "terminate":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    create = lambda: GymEnv("Pendulum-v1")
    if case == "start":
        print("ready", flush=True)
    env = parallel_env(2, create)
    assert torch.equal(run(env), run(SerialEnv(2, create)))
    print("ready", flush=True)
    if case == "raise":
        raise ValueError("the user's own")
    while case in ("interrupt", "terminate", "start"):
        env.rollout(20)

if __name__ == "__main__":
    main(sys.argv[1])
"""


# Python ends by the signal that interrupts it; Ray's hook for exceptions, which TorchRL imports where it is installed,
# makes that an exit with status 1
INTERRUPTED = -signal.SIGINT if find_spec("ray") is None else 1


@pytest.mark.skipif(not AVAILABLE, reason="processes that are forked, and their groups")
@pytest.mark.parametrize(
    ("case", "sent", "status", "tracebacks"),
    [
        ("raise", None, 1, 1),
        ("interrupt", signal.SIGINT, INTERRUPTED, 1),
        ("start", signal.SIGINT, INTERRUPTED, 1),
        ("terminate", signal.SIGTERM, 143, 0),
    ],
)
def test_its_processes_end_with_the_run(tmp_path, case, sent, status, tracebacks):
    script, out, err = (tmp_path / name for name in ("run.py", "out", "err"))
    script.write_text(SCRIPT)
    with out.open("wb") as stdout, err.open("wb") as stderr:
        files = stdout.fileno(), stderr.fileno()
        process = shared().start([script, case], cwd=tmp_path, env=environment(), files=files)
    try:
        wait_for(lambda: out.read_text() == "ready\n" or process.poll() is not None)
        if case == "start":
            time.sleep(0.5)
        if sent == signal.SIGINT:  # the terminal sends it to all
            os.killpg(process.pid, sent)
        elif sent is not None:
            process.send_signal(sent)
        assert process.wait() == status
        errors = err.read_text()
        assert errors.count("Traceback") == tracebacks, errors
        assert bool(errors) == bool(tracebacks)
        wait_for(lambda: not group_lives(process.pid))
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition):
    while not condition():
        time.sleep(0.02)


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_environment_is_refused():
    with pytest.raises(ValueError, match="num_envs must be an integer of at least 1, got 0"):
        parallel_env(0, lambda: GymEnv("Pendulum-v1"))
