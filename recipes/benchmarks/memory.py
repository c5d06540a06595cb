"""What a full replay buffer of the SAC recipe costs: memory, and the time and space to save it.

    python recipes/benchmarks/memory.py

The recipe's own buffer is filled with random transitions of Walker2d's sizes; ``replay_buffer.size`` and the other keys
may follow. Resident memory is what the process has gained (Linux). The minimum is observation, action, reward, both
ends and next observation, once each. Saving and loading are those of a run: the whole buffer when there is no
checkpoint yet, then what is new, here :data:`INCREMENT` frames.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import sac_pmoe
import watched_runs
from config.sac_pmoe import SACConfig
from hydra.errors import HydraException
from parts import off_policy
from parts.errors import UsageError
from parts.training import prepare_torch
from rounds import alternate, at_least_one, command_line, place, print_table, stop, write_csv

from torchrl_pmoe.runs import VerifiedCheckpoint

MIB = 2**20
CHUNK = 10_000
INCREMENT = 20_000
"""Frames between two checkpoints, the recipe's default."""


def transitions(frames: int, observation_size: int, action_size: int) -> TensorDict:
    """What the recipe stores of ``frames`` random frames."""
    ends = torch.zeros(frames, 1, dtype=torch.bool)
    following = {"observation": torch.randn(frames, observation_size), "reward": torch.randn(frames, 1)}
    data = {
        "observation": torch.randn(frames, observation_size),
        "action": torch.rand(frames, action_size) * 2 - 1,
        "next": {**following, "done": ends, "terminated": ends.clone()},
    }
    return TensorDict(data, batch_size=frames).select(*off_policy.STORED)


def num_bytes(data: TensorDict) -> int:
    """Of all entries."""
    return sum(value.numel() * value.element_size() for value in data.values(include_nested=True, leaves_only=True))


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def fill(buffer: TensorDictReplayBuffer, frames: int, observation_size: int, action_size: int) -> int:
    """Put ``frames`` frames into a buffer and return the bytes of resident memory that they take."""
    transitions(CHUNK, observation_size, action_size)  # what the allocator keeps is not the buffer's
    before = resident()
    with tqdm(total=frames, unit="frame", unit_scale=True, desc="filling") as bar:
        for first in range(0, frames, CHUNK):
            chunk = transitions(min(CHUNK, frames - first), observation_size, action_size)
            buffer.extend(chunk)
            bar.update(chunk.numel())
    return resident() - before


def saved(buffer: TensorDictReplayBuffer, path: Path) -> float:
    """Seconds to write a whole buffer."""
    start = perf_counter()
    VerifiedCheckpoint(replay_buffer=buffer).save(path)
    return perf_counter() - start


def incremented(buffer: TensorDictReplayBuffer, checkpoint: VerifiedCheckpoint, sizes: tuple[int, int]) -> float:
    """Seconds to write what is new since the last checkpoint."""
    before = checkpoint.last
    assert before is not None
    buffer.extend(transitions(min(INCREMENT, len(buffer)), *sizes))
    start = perf_counter()
    checkpoint.save(before.with_name(f"{before.name}+"))
    seconds = perf_counter() - start
    shutil.rmtree(before)
    return seconds


def loaded(cfg: SACConfig, path: Path) -> float:
    """Seconds to read it into an empty one."""
    buffer = off_policy.build_replay_buffer(cfg.replay_buffer.size, cfg.optim.batch_size)
    start = perf_counter()
    VerifiedCheckpoint(replay_buffer=buffer).load(path)
    seconds = perf_counter() - start
    assert len(buffer) == cfg.replay_buffer.size
    return seconds


def measure(cfg: SACConfig, args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds by operation and round, and the figures that are measured once."""
    frames, sizes = cfg.replay_buffer.size, (args.observation_size, args.action_size)
    buffer = off_policy.build_replay_buffer(cfg.replay_buffer.size, cfg.optim.batch_size)
    gained = fill(buffer, frames, *sizes)
    process = resident()
    minimum = num_bytes(transitions(1, *sizes))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint"
        saved(buffer, path)
        checkpoint = VerifiedCheckpoint(replay_buffer=buffer)
        checkpoint.save(path.with_name("running"))
        on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        operations = {
            "save": partial(saved, buffer, path),
            "save an increment": partial(incremented, buffer, checkpoint, sizes),
            "load": partial(loaded, cfg, path),
        }
        seconds = alternate(operations, args.rounds)
    once = {
        "resident memory, MiB": gained / MIB,
        "of the whole process, MiB": process / MIB,
        "bytes a frame, resident": gained / frames,
        "bytes a frame, stored": num_bytes(buffer[:]) / frames,
        "bytes a frame, minimum": minimum,
        "resident over minimum": gained / frames / minimum,
        "size of the saved buffer, MiB": on_disk / MIB,
    }
    return seconds, once


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep the figures."""
    parser = command_line(__doc__, "memory.csv", variants=False)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of recipes/sac_pmoe.py")
    parser.add_argument("--observation-size", type=at_least_one, default=17, help="(17, Walker2d)")
    parser.add_argument("--action-size", type=at_least_one, default=6, help="(6, Walker2d)")
    args = parser.parse_intermixed_args(arguments)
    try:
        cfg = watched_runs.resolve(sac_pmoe, args.overrides)
        prepare_torch(cfg.optim.num_threads)
        torch.set_num_threads(args.threads)
        seconds, once = measure(cfg, args)
    except (UsageError, HydraException) as error:
        stop(error)
    print(place(args.threads, args.rounds))
    print(f"{cfg.replay_buffer.size:,} frames of {args.observation_size} observations, {args.action_size} actions")
    timings = {f"{name}, seconds": values for name, values in seconds.items()}
    rows = {**{name: [value] for name, value in once.items()}, **timings}
    print_table(["quantity", "value"], [[name, f"{median(values):,.4g}"] for name, values in rows.items()])
    write_csv(
        args.output,
        ["quantity", *(f"round_{index}" for index in range(args.rounds))],
        [[name, *values] for name, values in rows.items()],
    )


if __name__ == "__main__":
    main()
