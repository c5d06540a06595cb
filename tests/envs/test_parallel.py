import os
import signal
import subprocess
import sys
import time

import pytest
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
    if case == "close":
        env.close()
    if case == "raise":
        raise ValueError("the user's own")
    while case in ("interrupt", "terminate", "start"):
        env.rollout(20)

if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="process groups and signals of POSIX")
@pytest.mark.parametrize(
    ("case", "sent", "status", "tracebacks"),
    [
        ("close", None, 0, 0),
        ("leave", None, 0, 0),
        ("raise", None, 1, 1),
        ("interrupt", signal.SIGINT, -signal.SIGINT, 1),
        ("start", signal.SIGINT, -signal.SIGINT, 1),
        ("terminate", signal.SIGTERM, 143, 0),
    ],
)
def test_its_processes_end_with_the_run(tmp_path, case, sent, status, tracebacks):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, case],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        if case == "start":
            time.sleep(0.5)
        if sent == signal.SIGINT:  # the terminal sends it to all
            os.killpg(process.pid, sent)
        elif sent is not None:
            process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status
        assert errors.count("Traceback") == tracebacks, errors
        assert bool(errors) == bool(tracebacks)
        for _ in range(100):
            if not group_lives(process.pid):
                break
            time.sleep(0.1)
        assert not group_lives(process.pid)
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_environment_is_refused():
    with pytest.raises(ValueError, match="num_envs must be an integer of at least 1, got 0"):
        parallel_env(0, lambda: GymEnv("Pendulum-v1"))
