"""Checkpoints against what happens to files: broken, hostile, full disks; and increments against the whole buffer."""

from __future__ import annotations

import hashlib
import os
import pickle
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler, SamplerWithoutReplacement

from torchrl_pmoe.runs import VerifiedCheckpoint


def make_buffer(size=100, *, memmap=None, **kwargs):
    storage = LazyTensorStorage(size) if memmap is None else LazyMemmapStorage(size, scratch_dir=memmap)
    return TensorDictReplayBuffer(storage=storage, batch_size=4, **kwargs)


def rows(start, number):
    index = torch.arange(start, start + number)
    return TensorDict(
        observation=torch.stack([index, -index], -1).float(),
        half=index.bfloat16().unsqueeze(-1),
        next=TensorDict(done=(index % 3 == 0).unsqueeze(-1), reward=index.double(), batch_size=number),
        batch_size=number,
    )


def row_files(checkpoint):
    return {file.name: file for file in checkpoint.rglob("rows-*.npz")}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a network and a buffer."""
    torch.manual_seed(3)
    buffer = make_buffer()
    buffer.extend(rows(0, 10))
    return VerifiedCheckpoint(net=nn.Linear(2, 2), buffer=buffer).save(tmp_path / "checkpoint-000000000010")


@pytest.mark.parametrize("memmap", [False, True])
@pytest.mark.parametrize("steps", [[10], [40, 40, 40], [7] * 40, [100, 100], [99, 2], [3, 100, 1]])
def test_a_buffer_comes_back_row_by_row_with_its_cursor(steps, memmap, tmp_path):
    buffer, start = make_buffer(memmap=tmp_path / "a" if memmap else None), 0
    checkpoint = VerifiedCheckpoint(replay_buffer=buffer)
    rotation = CheckpointRotation(tmp_path / "checkpoints", keep_last=1)
    for step in steps:
        buffer.extend(rows(start, step))
        start += step
        path = rotation.save(checkpoint, step=start)
    other = make_buffer(memmap=tmp_path / "b" if memmap else None)
    VerifiedCheckpoint(replay_buffer=other).load(path)
    assert (other[:] == buffer[:]).all()
    assert other.writer.state_dict() == buffer.writer.state_dict()
    for both in (buffer, other):
        both.extend(rows(start, 30))
    assert (other[:] == buffer[:]).all()
    # and the resumed buffer goes on with its files
    again = VerifiedCheckpoint(replay_buffer=other)
    again.last = path
    assert len(row_files(again.save(tmp_path / "again"))) >= 1


def test_only_new_rows_are_written_and_old_ones_are_the_same_file(tmp_path):
    buffer = make_buffer()
    checkpoint = VerifiedCheckpoint(replay_buffer=buffer)
    buffer.extend(rows(0, 60))
    first = checkpoint.save(tmp_path / "first")
    buffer.extend(rows(60, 5))
    second = checkpoint.save(tmp_path / "second")
    old, new = row_files(first), row_files(second)
    assert new.keys() - old.keys() == {"rows-000000000000060-000000000000065.npz"}
    for name, file in old.items():
        assert new[name].samefile(file)
    shutil.rmtree(first)
    VerifiedCheckpoint.verify(second)
    # what is overwritten as a whole is left out
    buffer.extend(rows(65, 95))
    third = row_files(checkpoint.save(tmp_path / "third"))
    assert third.keys() == {f"rows-{start:015d}-{stop:015d}.npz" for start, stop in ((60, 65), (65, 160))}


def test_what_is_shared_with_the_checkpoint_that_was_loaded_is_not_counted_again(tmp_path):
    buffer, other = make_buffer(10_000), make_buffer(10_000)
    buffer.extend(rows(0, 5000))
    first = VerifiedCheckpoint(replay_buffer=buffer).save(tmp_path / "first")
    resumed, sizes = VerifiedCheckpoint(replay_buffer=other), []
    resumed.on_saved = lambda path, seconds, size: sizes.append(size)
    resumed.load(first)
    other.extend(rows(5000, 10))
    resumed.save(tmp_path / "second")
    assert sizes[0] < sum(file.stat().st_size for file in row_files(first).values()) / 2


def test_files_are_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def none(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", none)
    buffer = make_buffer()
    checkpoint = VerifiedCheckpoint(replay_buffer=buffer)
    for number in range(3):
        buffer.extend(rows(20 * number, 20))
        path = checkpoint.save(tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number - 1), ignore_errors=True)
    other = make_buffer()
    VerifiedCheckpoint(replay_buffer=other).load(path)
    assert (other[:] == buffer[:]).all()


def test_rows_whose_file_is_gone_are_written_again(tmp_path):
    buffer = make_buffer()
    checkpoint = VerifiedCheckpoint(replay_buffer=buffer)
    buffer.extend(rows(0, 60))
    shutil.rmtree(checkpoint.save(tmp_path / "first"))
    buffer.extend(rows(60, 5))
    other = make_buffer()
    VerifiedCheckpoint(replay_buffer=other).load(checkpoint.save(tmp_path / "second"))
    assert (other[:] == buffer[:]).all()


def test_a_smaller_buffer_is_refused(tmp_path):
    buffer = make_buffer()
    buffer.extend(rows(0, 60))
    path = VerifiedCheckpoint(replay_buffer=buffer).save(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="60 rows, the buffer room for 50"):
        VerifiedCheckpoint(replay_buffer=make_buffer(50)).load(path)


def test_the_order_of_a_sampler_goes_on(tmp_path):
    buffer, other = (make_buffer(sampler=SamplerWithoutReplacement()) for _ in range(2))
    buffer.extend(rows(0, 20))
    buffer.sample()
    VerifiedCheckpoint(buffer=other).load(VerifiedCheckpoint(buffer=buffer).save(tmp_path / "checkpoint"))
    for _ in range(4):
        torch.testing.assert_close(other.sample()["observation"], buffer.sample()["observation"])


class Tree:
    """What TorchRL's compiled trees can be asked, where its extension does not load."""

    def __init__(self, size):
        self._values = torch.zeros(size, dtype=torch.float64)

    def __getitem__(self, index):
        return self._values[index].clone()

    def __setitem__(self, index, value):
        self._values[index] = value

    def __reduce__(self):
        raise TypeError("a tree is no tensor")


class Priorities(RandomSampler):
    """Keeps a priority of every row in a tree."""

    def __init__(self, size):
        super().__init__()
        self.tree = Tree(size)

    def extend(self, index):
        self.tree[index] = 1.0

    def state_dict(self):
        return {"_beta": 0.5, "_max_priority": (torch.tensor(7.0), torch.tensor(3)), "_sum_tree": self.tree}

    def load_state_dict(self, state):
        self.tree = state["_sum_tree"]


@pytest.mark.parametrize("number", [8, 130])
def test_priorities_come_back_in_the_places_of_their_rows(number, tmp_path):
    buffer, other = (make_buffer(sampler=Priorities(100)) for _ in range(2))
    for start in range(0, number, 2):
        buffer.extend(rows(start, 2))
    held = min(number, 100)
    buffer.sampler.tree[torch.arange(held)] = torch.rand(held, dtype=torch.float64)
    VerifiedCheckpoint(buffer=other).load(VerifiedCheckpoint(buffer=buffer).save(tmp_path / "checkpoint"))
    everywhere = torch.arange(100)
    torch.testing.assert_close(other.sampler.tree[everywhere], buffer.sampler.tree[everywhere], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- bad files


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def reseal(root: Path) -> None:
    """What a forger does: checksums that fit."""
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(root).as_posix()}\n" for f in files]
    (root / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize("file", ["*/*net/state.pt", "*/*buffer/state.pt", "*/*buffer/rows*.npz", "manifest.json"])
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (flip, "damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-7]), "damaged"),
        (lambda file: file.write_bytes(b""), "empty"),
        (Path.unlink, "missing"),
        (lambda file: (file.rename(f"{file}.x"), file.symlink_to(f"{file}.x")), "no file of|is missing"),
    ],
    ids=["bit", "truncated", "empty", "missing", "link"],
)
def test_every_damaged_file_is_named_in_one_line(saved, file, damage, word):
    (found,) = saved.glob(file)
    damage(found)
    with pytest.raises(CheckpointError, match=word) as error:
        VerifiedCheckpoint.verify(saved)
    assert "\n" not in str(error.value)
    assert found.stem in str(error.value)


def test_every_single_bit_of_the_checksums_counts(saved):
    whole = (saved / "SHA256SUMS").read_bytes()
    for position in range(0, len(whole), 11):
        data = bytearray(whole)
        data[position] ^= 4
        (saved / "SHA256SUMS").write_bytes(data)
        with pytest.raises(CheckpointError):
            VerifiedCheckpoint.verify(saved)


def test_a_checkpoint_of_somebody_else_is_refused(tmp_path):
    foreign = Checkpoint(net=nn.Linear(2, 2)).save(tmp_path / "checkpoint")
    for path in (foreign, tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint of this package"):
            VerifiedCheckpoint.verify(path)


def test_a_component_of_another_shape_is_refused(saved):
    with pytest.raises(CheckpointError, match="size mismatch"):
        VerifiedCheckpoint(net=nn.Linear(3, 2)).load(saved)


class Hostile:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["pickle", "torch", "npz", "sidecar", "tensordict"])
def test_no_code_of_a_file_is_run_even_if_its_checksums_fit(saved, how, tmp_path):
    proof = tmp_path / "executed"
    (state,), (npz,) = saved.glob("*/*net/state.pt"), saved.glob("*/*buffer/rows*.npz")
    if how == "pickle":
        state.write_bytes(pickle.dumps(Hostile(proof)))
    elif how == "torch":
        torch.save({"weight": Hostile(proof)}, state)
    elif how == "npz":
        import numpy as np

        with npz.open("wb") as file:
            np.savez(file, names=np.array([Hostile(proof)], dtype=object), allow_pickle=True)
    elif how == "sidecar":
        (state.parent / "other.pickle").write_bytes(pickle.dumps(Hostile(proof)))
    else:
        # as TorchRL's own checkpoints are read
        state.unlink()
        (state.parent / "state").mkdir()
        (state.parent / "state" / "meta.json").write_text('{"_type": "<class \'tensordict.NonTensorData\'>"}')
        (state.parent / "state" / "other.pickle").write_bytes(pickle.dumps(Hostile(proof)))
    reseal(saved)
    with pytest.raises(CheckpointError):
        VerifiedCheckpoint(net=nn.Linear(2, 2), buffer=make_buffer()).load(saved)
    assert not proof.exists()


def test_sha256sum_agrees(saved):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=saved, check=True)


def test_a_full_disk_leaves_the_checkpoints_before_whole(tmp_path):
    class Large:
        size = 10

        def state_dict(self):
            return {"x": torch.zeros(self.size)}

        def load_state_dict(self, state):
            pass

    large = Large()
    rotation = CheckpointRotation(tmp_path, keep_last=1)
    checkpoint = VerifiedCheckpoint(large=large)
    first = rotation.save(checkpoint, step=1)
    large.size = 10**6
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-000000000002 could not be written: File too large"):
            rotation.save(checkpoint, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [first]
    VerifiedCheckpoint.verify(first)
    large.size = 10
    assert rotation.save(checkpoint, step=2).is_dir()


def test_a_checkpoint_of_the_same_frame_takes_the_place_of_the_other(tmp_path):
    net = nn.Linear(1, 1)
    checkpoint = VerifiedCheckpoint(net=net)
    checkpoint.save(tmp_path / "here")
    nn.init.constant_(net.weight, 7.0)
    checkpoint.save(tmp_path / "here")
    other = nn.Linear(1, 1)
    VerifiedCheckpoint(net=other).load(tmp_path / "here")
    assert other.weight.item() == 7.0
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
