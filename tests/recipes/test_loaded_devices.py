"""Nothing that is loaded keeps the device of its checkpoint. ``meta`` stands for a GPU; checkpoints are on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import recipe_runs
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import GymEnv
from torchrl.modules import RandomPolicy

from torchrl_pmoe.envs import NormalizeObservationAndReward, make_env
from torchrl_pmoe.runs import EpisodeState, VerifiedCheckpoint
from torchrl_pmoe.trainers import FusedOptimizationStepper

import ppo_pmoe  # isort: skip
import sac_pmoe  # isort: skip
from parts.on_policy import build_buffer  # isort: skip
from parts.resume import open_run  # isort: skip
from config.typed import build  # isort: skip

SAC = [
    "env=Pendulum-v1",
    "total_frames=240",
    "network.hidden_sizes=[16,16]",
    "optim.batch_size=16",
    "collector.init_random_frames=50",
    "logger.eval_interval=60",
    "checkpoint.interval=50",
]


def test_means_go_on_where_the_updates_are():
    def update(stepper, device):
        weight = nn.Parameter(torch.ones(3, device=device))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        if device == "meta":
            # as a fused optimiser on a GPU, which judges by itself; numbers on meta cannot be asked for
            optimizer.defaults["fused"], optimizer.step = True, lambda: None
        trainer = SimpleNamespace(
            optimizer=optimizer,
            clip_norm=None,
            compute_loss=lambda batch: TensorDict(loss_a=weight.sum(), other=weight.detach().mean()),
            _post_loss_ops=[],
            _process_loss_hook=lambda batch, losses: losses,
        )
        stepper.step(trainer, TensorDict())

    before, after = FusedOptimizationStepper(), FusedOptimizationStepper()
    update(before, "cpu")
    after.load_state_dict(before.state_dict())
    assert after.means() == before.means() == {"loss_a": 3.0, "other": 1.0}
    for _ in range(2):
        update(after, "meta")
    assert after.updates == 3


def frames(device, number=4):
    rows = TensorDict(observation=torch.zeros(number, 3), batch_size=[number])
    rows["next"] = TensorDict(reward=torch.zeros(number, 1), done=torch.zeros(number, 1).bool(), batch_size=[number])
    return rows.to(device)


def buffer_of(device, **kwargs):
    return TensorDictReplayBuffer(storage=LazyTensorStorage(20, device=device), batch_size=2, **kwargs)


def test_replay_rows_and_their_order_come_to_the_storage(tmp_path):
    before, after = (buffer_of(device, sampler=SamplerWithoutReplacement()) for device in ("cpu", "meta"))
    before.extend(frames("cpu", 8))
    before.sample()
    VerifiedCheckpoint(buffer=after).load(VerifiedCheckpoint(buffer=before).save(tmp_path / "checkpoint"))
    assert {value.device.type for value in after[:].values(True, True)} == {"meta"}
    # an order of 6 is left; when it has run out, the next one is drawn on the same device
    assert after.sampler.state_dict()["_sample_list"].device.type == "meta"
    for _ in range(4):
        after.sample()
    assert after.sampler.state_dict()["_sample_list"].device.type == "meta"


def test_the_order_of_minibatches_comes_to_the_frames():
    before = build_buffer(128, "cpu")
    before.extend(frames("cpu", 128))
    before.sample()
    after = build_buffer(128, "meta")
    after.sampler.load_state_dict(before.sampler.state_dict())
    assert after.sampler.state_dict()["_sample_list"].device.type == "meta"
    fresh = build_buffer(128, "meta")
    fresh.sampler.load_state_dict(build_buffer(128, "cpu").sampler.state_dict())
    assert fresh.sampler.state_dict()["_sample_list"] is None


def test_what_the_collector_carries_stays_where_each_of_its_entries_is():
    collector = Collector(
        GymEnv("Pendulum-v1"),
        RandomPolicy(GymEnv("Pendulum-v1").action_spec),
        frames_per_batch=4,
        total_frames=-1,
        track_traj_ids=False,
    )
    next(iter(collector))
    episodes = EpisodeState(collector, 0)
    state = episodes.state_dict()
    # the environment on the CPU, the policy elsewhere
    carried = collector._carrier.clone().clear_device_()
    carried["action"] = carried["action"].to("meta")
    collector._carrier = carried
    episodes.load_state_dict(state)
    assert not episodes.fresh
    devices = {key: value.device.type for key, value in collector._carrier.items(True, True)}
    assert devices.pop("action") == "meta"
    assert set(devices.values()) == {"cpu"}


def test_statistics_come_to_the_environments(tmp_path):
    before, after = NormalizeObservationAndReward(), NormalizeObservationAndReward()
    for transform in (before, after):
        make_env("Pendulum-v1", num_envs=2).append_transform(transform)
    # as where the environments make their frames on a GPU
    after.to("meta")
    VerifiedCheckpoint(after=after).load(VerifiedCheckpoint(after=before).save(tmp_path / "checkpoint"))
    assert {value.device.type for value in after.state_dict().values()} == {"meta"}


def test_a_checkpoint_is_read_where_its_device_is_not(tmp_path, monkeypatch):
    before, after = nn.Linear(2, 1), nn.Linear(2, 1)
    with monkeypatch.context() as patched:
        # as a machine with several GPUs would write it
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        path = VerifiedCheckpoint(net=before).save(tmp_path / "checkpoint")
    VerifiedCheckpoint(net=after).load(path)
    torch.testing.assert_close(after.weight, before.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("skip", ["on_nonfinite=stop", "on_nonfinite=skip"])
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [(sac_pmoe, SAC), (ppo_pmoe, [*recipe_runs.SMALL_PPO, "total_frames=768", "checkpoint.interval=128"])],
    ids=["sac", "ppo"],
)
def test_a_run_on_a_gpu_goes_on(recipe, overrides, skip, tmp_path):
    options = ["device=cuda", "logger.progress_bar=false", "logger.eval_episodes=2", "logger.eval_max_steps=20"]
    cfg = recipe_runs.resolve(recipe, *overrides, *options, skip)
    whole = cfg.total_frames
    cfg.total_frames = whole // 2 + 10  # between two evaluations: sums are under way
    recipe.train(cfg, tmp_path)
    values, checkpoint = open_run(tmp_path)
    cfg = build(type(cfg), values)
    cfg.resume, cfg.total_frames = str(checkpoint), whole
    recipe.resolve(cfg)
    recipe.train(cfg, tmp_path)
    assert int(recipe_runs.rows(tmp_path)[-1]["frames"]) == whole
