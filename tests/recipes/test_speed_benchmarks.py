"""What the speed benchmarks compare does the same work, and each command runs."""

from __future__ import annotations

import argparse
import csv
import sys

import gymnasium as gym
import pytest
import torch
from recipe_runs import RECIPES, resolve
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.data import Bounded
from torchrl.objectives import SoftUpdate
from torchrl.objectives.value.functional import generalized_advantage_estimate

sys.path.insert(0, str(RECIPES / "benchmarks"))

import baselines3
import cleanrl_style
import memory
import ppo_speed
import profile_frame
import raw_sac
import rounds
import sac_pmoe
import sac_speed
import stock
import update
import workers
from parts.off_policy import STORED
from rounds import Finished
from workers import MissingPackage

from torchrl_pmoe.envs import make_env
from torchrl_pmoe.envs.making import make_gym_env

OBSERVATION, ACTION, BATCH, CELLS = 5, 2, 32, (16, 16)
SMALL = ["env=Pendulum-v1", "total_frames=1000", "network.hidden_sizes=[16,16]"]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _torchrl_and_raw():
    """TorchRL's loss behind the recipe's Gaussian, and the hand-written one with the same weights."""
    cfg = resolve(sac_pmoe, "policy=gaussian", "device=cpu", f"network.hidden_sizes={list(CELLS)}")
    spec = Bounded(-1, 1, (ACTION,))
    _, loss = sac_pmoe.build_agent(cfg, spec, OBSERVATION)
    raw = raw_sac.RawSAC(OBSERVATION, ACTION, CELLS)
    pairs = [(loss.actor_network_params, [raw.actor])]
    pairs += [(loss.qvalue_network_params, raw.critics), (loss.target_qvalue_network_params, raw.targets)]
    for params, networks in pairs:
        for mine, theirs in _matched(params, networks):
            mine.data.copy_(theirs)
    return loss, raw, pairs


def _matched(params, networks):
    flat = params.data.flatten_keys(".")
    for index, network in enumerate(networks):
        for name, mine in network.named_parameters():
            (key,) = (key for key in flat.keys() if key.endswith(f".{name}"))  # noqa: SIM118
            yield mine, flat[key][index] if len(networks) > 1 else flat[key]


def _transitions():
    ended = torch.rand(BATCH, 1) < 0.3
    reward, following = torch.randn(BATCH, 1), torch.randn(BATCH, OBSERVATION)
    data = {
        "observation": torch.randn(BATCH, OBSERVATION),
        "action": torch.rand(BATCH, ACTION) * 2 - 1,
        "next": {"observation": following, "reward": reward, "done": ended.clone(), "terminated": ended},
    }
    return TensorDict(data, batch_size=BATCH)


def test_update_in_pytorch_alone_computes_what_torchrl_computes(float64, monkeypatch):
    loss, raw, pairs = _torchrl_and_raw()
    theirs = stock.off_policy_update(loss, stock.adam(loss), SoftUpdate(loss, eps=0.995))
    start = [parameter.clone() for parameter in raw.targets[0].parameters()]
    draws = []
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *args, **kwargs: draws.pop(0))
    for _ in range(3):
        batch, noise = _transitions(), torch.randn(2, BATCH, ACTION).unbind()
        draws[:] = [*noise]
        expected = loss(batch.copy())
        draws[:] = [*noise]
        theirs(batch.copy())
        ended = batch["next", "terminated"].squeeze(-1).double()
        found = raw.update(update.raw_batch(batch)._replace(terminated=ended), noise)
        for name in ("actor", "qvalue", "alpha"):
            assert_close(getattr(found, name), expected[f"loss_{name}"])
        for params, networks in pairs:
            for mine, theirs_now in _matched(params, networks):
                assert_close(mine.data, theirs_now)
        assert_close(raw.log_alpha.data, loss.log_alpha.data.reshape(()))
    assert raw.log_alpha.item() != 0
    assert not torch.equal(start[0], next(raw.targets[0].parameters()))


def test_ratio_is_taken_within_a_round():
    # the machine was three times slower in the second round, for both
    assert rounds.ratio([2.0, 6.6, 2.0], [1.0, 3.0, 1.1]) == pytest.approx(2.0)


@pytest.mark.parametrize(("at_least", "held"), [(True, "no"), (False, "yes")])
def test_claim_says_whether_its_bound_holds(at_least, held):
    claim = rounds.Claim("a over b", "a", "b", 1.5, at_least)
    row = claim.row({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]})
    assert row is not None
    assert row[1] == "1.00"
    assert row[3] == held
    assert claim.row({"a": [1.0]}) is None


def test_clock_counts_a_part_without_the_parts_it_calls_and_puts_classes_back(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(profile_frame, "perf_counter", lambda: now[0])

    class Outer:
        def work(self):
            now[0] += 2
            inner.work()
            now[0] += 3

    class Inner:
        def work(self):
            now[0] += 7

    inner, own = Inner(), Outer.work
    with profile_frame.Clock() as clock:
        clock.wrap(Outer, "work", "policy")
        clock.wrap(inner, "work", "simulator")
        Outer().work()
        clock.start()
        now[0] += 1
        Outer().work()
        clock.stop()
        Outer().work()
    assert {part: seconds for part, seconds in clock.seconds.items() if seconds} == {
        "policy": 5,
        "simulator": 7,
        profile_frame.REST: 1,
    }
    assert Outer.work is own


class _Until:
    """Ends a training after so many frames."""

    def __init__(self, frames):
        self.frames, self.seen = frames, []

    def __call__(self, frames):
        self.seen.append(frames)
        if frames >= self.frames:
            raise Finished


def test_plain_loop_makes_one_update_a_frame_once_the_random_frames_are_over(monkeypatch):
    updates = []
    monkeypatch.setattr(stock, "off_policy_update", lambda *args: updates.append)
    frames = stock.train_sac(make_env("Pendulum-v1"), random_frames=5, batch_size=4, buffer_size=100)
    assert [next(frames) for _ in range(12)] == list(range(1, 13))
    assert len(updates) == 8
    assert all(batch.batch_size == (4,) for batch in updates)
    # what the recipe stores, and the index that the buffer itself writes
    assert set(updates[0].keys(True, True)) - {"index"} == set(STORED)


def test_plain_loops_in_pytorch_learn_once_a_frame_and_once_a_minibatch(monkeypatch):
    updates = []
    monkeypatch.setattr(cleanrl_style.torch, "compile", lambda function: function)
    monkeypatch.setattr(raw_sac.RawSAC, "update", lambda agent, batch: updates.append(batch))
    frames = cleanrl_style.train_sac(make_gym_env("Pendulum-v1"), random_frames=5, batch_size=4, buffer_size=8)
    assert [next(frames) for _ in range(12)] == list(range(1, 13))
    assert len(updates) == 7
    assert updates[0].observation.shape == (4, 3)

    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: updates.append(optimizer))
    pool = cleanrl_style.NormalizedPool(gym.make_vec("Pendulum-v1", 2), 2)
    updates.clear()
    frames = cleanrl_style.train_ppo(pool, frames_per_batch=16, num_minibatches=2, epochs=3)
    assert [next(frames) for _ in range(2)] == [16, 32]
    assert len(updates) == 12


def test_plain_advantages_are_those_of_torchrl():
    shape = (6, 3, 1)
    rewards, values, following = (torch.randn(shape) for _ in range(3))
    ends = torch.rand(shape) < 0.3
    following[:-1] = torch.where(ends[:-1], following[:-1], values[1:])
    expected, _ = generalized_advantage_estimate(0.99, 0.95, values, following, rewards, ends, ends, time_dim=0)
    found = cleanrl_style.advantages_of(*(x.squeeze(-1) for x in (rewards, values, ends.float(), following[-1])))
    assert_close(found, expected.squeeze(-1))


@pytest.mark.parametrize(("train", "frames"), [("train_sac", 1), ("train_ppo", 2048)])
def test_stable_baselines3_reports_its_frames(train, frames):
    pytest.importorskip("stable_baselines3")
    turns = _Until(frames)
    with pytest.raises(Finished):
        getattr(baselines3, train)("Pendulum-v1", 1, turns)
    assert turns.seen[-1] == frames


@pytest.mark.parametrize(
    ("library", "module", "extra"),
    [(baselines3.SB3, "stable_baselines3", "benchmarks"), (baselines3.SBX, "sbx", "sbx")],
)
def test_a_missing_library_is_one_line_that_says_what_to_install(library, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage, match=rf"pip install -e '\.\[{extra}\]'"):
        baselines3.train_sac("Pendulum-v1", 1, _Until(1), library)


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("recipe", "keys", "without"),
    [
        ("sac_pmoe", ["optim.batch_size=16"], {"advantages"}),
        ("ppo_pmoe", ["collector.frames_per_batch=16", "loss.num_minibatches=2"], {"target update"}),
    ],
)
def test_profile_command_meets_every_part_of_a_frame(recipe, keys, without, tmp_path, capsys):
    output = tmp_path / "out" / "profile.csv"
    options = ["--rounds", "1", "--frames", "5", "--warm-up", "20", "--threads", "1", "--output", str(output)]
    profile_frame.main([*options, "--recipe", recipe, *SMALL, *keys])
    printed = capsys.readouterr().out
    rows = _rows(output)
    assert len({row["variant"] for row in rows}) == 3
    assert all(f"| {row['variant']} |" in printed for row in rows)
    for row in rows:
        assert (float(row["ms_0"]) > 0) == (row["part"] not in without), row


def test_update_command_compares_all_updates(tmp_path, capsys):
    output = tmp_path / "update.csv"
    options = ["--modes", "eager", "--experts", "1", "4", "--rounds", "1", "--block", "1", "--threads", "1"]
    update.main([*options, "--output", str(output)])
    printed = capsys.readouterr().out
    assert f"| {update.RAW} (eager) |" in printed
    assert "| rate of SACLoss + PMOEActor, K=4 (eager) over" in printed
    names = {row["variant"].removesuffix(" (eager)") for row in _rows(output)}
    assert names == {update.BASE, update.RAW, *update.recipe_options([1, 4])}


def test_memory_command_counts_the_bytes_of_a_frame(tmp_path, capsys):
    output = tmp_path / "memory.csv"
    memory.main(["--rounds", "1", "--threads", "1", "--output", str(output), "replay_buffer.size=2000"])
    assert "2,000 frames of 17 observations, 6 actions" in capsys.readouterr().out
    found = {row["quantity"]: float(row["round_0"]) for row in _rows(output)}
    # two observations, an action and a reward in four bytes each, two ends in one
    assert found["bytes a frame, minimum"] == 4 * (17 + 6 + 1 + 17) + 2
    assert found["bytes a frame, stored"] >= found["bytes a frame, minimum"]
    assert found["size of the saved buffer, MiB"] * 2**20 >= 2000 * found["bytes a frame, stored"]


def test_sac_speed_command_times_a_plain_loop(tmp_path, capsys):
    output = tmp_path / "speed.csv"
    options = ["--env", "Pendulum-v1", "--rounds", "2", "--frames", "3", "--warm-up", "202", "--threads", "1"]
    sac_speed.main([*options, "--output", str(output), "--only", sac_speed.STOCK])
    assert f"| {sac_speed.STOCK} |" in capsys.readouterr().out
    (row,) = _rows(output)
    assert float(row["round_0"]) > 0
    assert float(row["round_1"]) > 0


WORKERS = """
import argparse, sys
sys.path.insert(0, {benchmarks!r})
from workers import serve
from parts.errors import UsageError

def train(args, turns):
    if args.worker == "refused":
        raise UsageError("why\\nit cannot run")
    if args.worker == "broken":
        sys.exit(3)
    print("said on the way")
    for frames in range(0, 10_000, 10):
        turns(frames)

serve(argparse.Namespace(frames=25, warm_up=15, threads=1, worker=sys.argv[-1]), train)
"""


def _measure_workers(directory, *names):
    script = directory / "script.py"
    script.write_text(WORKERS.format(benchmarks=str(RECIPES / "benchmarks")))
    return workers.measure(script, names, [], argparse.Namespace(rounds=3, threads=1))


def test_worker_that_breaks_ends_the_comparison_in_one_line(tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        _measure_workers(tmp_path, "broken")
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "error: broken: the training ended by itself, with status 3"


def test_worker_that_cannot_run_is_left_out_with_the_reason(tmp_path, capfd):
    found = _measure_workers(tmp_path, "timed", "refused")
    assert list(found) == ["timed"]
    assert len(found["timed"]) == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "refused: left out, why it cannot run\n" in err
    assert "said on the way" in err


def test_ppo_speed_command_times_the_recipe(tmp_path, capsys):
    output = tmp_path / "speed.csv"
    options = ["--env", "Pendulum-v1", "--rounds", "1", "--frames", "64", "--warm-up", "64", "--threads", "1"]
    small = ["total_frames=1000", "collector.frames_per_batch=64", "loss.num_minibatches=2", "loss.ppo_epochs=1"]
    ppo_speed.main([*options, *small, "--output", str(output), "--only", "recipe, pmoe"])
    assert "| recipe, pmoe |" in capsys.readouterr().out
    assert [row["variant"] for row in _rows(output)] == ["recipe, pmoe"]


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        (sac_speed, ["--rounds", "0"], "argument --rounds: must be a whole number of at least 1, got 0"),
        (sac_speed, ["--env", "Nowhere-v0"], "error: env=Nowhere-v0: must be the id of an installed"),
        (ppo_speed, ["--only", "foo"], "error: --only 'foo': must be among 'Stable-Baselines3'"),
        (profile_frame, ["optim.batch_size=0"], "error: optim.batch_size=0: must be"),
        (memory, ["replay_buffer.size=-1"], "error: replay_buffer.size=-1: must be"),
    ],
)
def test_bad_input_ends_in_one_line(script, arguments, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
