"""A run directory has one owner; the other one is another process, as in life."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from torchrl_pmoe.runs import DirectoryInUseError, RunDirectory, directory

# the file by itself: importing the package takes seconds
OWNER = f"""
import importlib.util, os, subprocess, sys, time
spec = importlib.util.spec_from_file_location("directory", {directory.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.RunDirectory(sys.argv[1]).own():
    read, write = os.pipe()
    children = [subprocess.Popen(["sleep", "600"], close_fds=False).pid, os.fork()]
    if not children[-1]:
        os.write(write, b"begun")
        time.sleep(600)
    os.read(read, 5)
    print(*children, flush=True)
    time.sleep(600)
"""


@contextmanager
def another_owner(path: Path):
    """A process that owns the directory, and the two children that it has started meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(path)], stdout=subprocess.PIPE, text=True)
    children = []
    try:
        assert process.stdout is not None
        children = [int(pid) for pid in process.stdout.readline().split()]
        yield process, children
    finally:
        process.kill()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_second_process_is_refused_at_once_and_told_who_the_owner_is(tmp_path):
    with another_owner(tmp_path / "run") as (process, _):
        with pytest.raises(DirectoryInUseError, match=rf"^process {process.pid} on {os.uname().nodename} uses it$"):
            RunDirectory(tmp_path / "run").own().__enter__()
        assert (tmp_path / "run" / RunDirectory.LOCK).is_file()  # what was refused took nothing away


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
def test_the_lock_ends_with_a_killed_process_though_its_children_live(tmp_path):
    with another_owner(tmp_path / "run") as (process, children):
        process.send_signal(signal.SIGKILL)
        process.wait()
        with RunDirectory(tmp_path / "run").own():
            assert all(map(is_alive, children))
            assert (tmp_path / "run" / RunDirectory.LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_a_directory_has_one_owner_within_a_process_too_and_a_new_one_afterwards(tmp_path):
    for _ in range(2):
        with RunDirectory(tmp_path).own() as path:
            assert path == tmp_path
            with pytest.raises(DirectoryInUseError):
                RunDirectory(str(tmp_path)).own().__enter__()
    assert not list(tmp_path.iterdir())


def test_a_directory_that_was_made_stays_if_something_was_put_into_it(tmp_path):
    with RunDirectory(tmp_path / "a" / "b").own():
        pass
    assert not list(tmp_path.iterdir())
    with RunDirectory(tmp_path / "a" / "b").own() as path:
        (path / "metrics.csv").touch()
    assert [found.name for found in (tmp_path / "a" / "b").iterdir()] == ["metrics.csv"]


def test_the_end_of_a_run_that_was_moved_leaves_its_successor_alone(tmp_path):
    with RunDirectory(tmp_path / "run").own():
        (tmp_path / "run").rename(tmp_path / "moved")
        successor = RunDirectory(tmp_path / "run").own()
        successor.__enter__()
    with pytest.raises(DirectoryInUseError):
        RunDirectory(tmp_path / "run").own().__enter__()
    successor.__exit__(None, None, None)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(RuntimeWarning, match=rf"{tmp_path}: its file system has no locks \({os.strerror(number)}\)"),
        RunDirectory(tmp_path).own(),
    ):
        (tmp_path / "metrics.csv").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_directory_that_cannot_be_written_to_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        RunDirectory(tmp_path / "file" / "run").own().__enter__()


def test_what_a_run_has_left_is_known_from_what_a_user_has(tmp_path):
    assert RunDirectory(tmp_path / "nowhere").outputs() == []
    for name in ("notes.txt", "seeds.txt", ".lock", "seed0", "metrics.csv", "checkpoints"):
        (tmp_path / name).mkdir()
    assert RunDirectory(tmp_path).outputs() == ["checkpoints", "metrics.csv", "seed0"]


def test_a_run_has_finished_when_it_says_so_with_enough_frames(tmp_path):
    run = RunDirectory(tmp_path)
    assert not run.finished(1)
    run.finish(100)
    assert run.finished(100)
    assert not run.finished(101)  # it is to go on for longer
    assert run.outputs() == [RunDirectory.FINISHED]
    (tmp_path / RunDirectory.FINISHED).write_text("")
    assert not run.finished(1)
