"""PMOEActor where TorchRL runs a policy: environments, collectors, worker processes."""

from __future__ import annotations

import pytest
import torch
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs import DoubleToFloat, GymEnv, SerialEnv, TransformedEnv

from torchrl_pmoe import PMOEActor, TanhNormalMixture

KEYS = {"logits", "loc", "scale", "action", "action_log_prob", "observation"}


def make_env() -> TransformedEnv:
    return TransformedEnv(GymEnv("Pendulum-v1"), DoubleToFloat())


def make_actor(env) -> PMOEActor:
    return PMOEActor(3, spec=env.action_spec, num_cells=(8,), in_features=3, return_log_prob=True)


def assert_rollout(data, *shape: int) -> None:
    assert set(data.keys()) >= KEYS
    assert (data.shape, data["action"].shape, data["loc"].shape) == (shape, (*shape, 1), (*shape, 3, 1))
    assert (data["action"].abs() <= 2).all()
    dist = TanhNormalMixture(data["logits"], data["loc"], data["scale"], -2.0, 2.0)
    torch.testing.assert_close(data["action_log_prob"], dist.log_prob(data["action"]))


def test_rollout_in_one_environment():
    env = make_env()
    assert_rollout(env.rollout(5, make_actor(env)), 5)


def test_rollout_in_a_serial_env():
    env = SerialEnv(2, make_env)
    assert_rollout(env.rollout(5, make_actor(env)), 2, 5)
    env.close()


@pytest.mark.parametrize("serial", [False, True])
def test_collector(serial):
    env = SerialEnv(2, make_env) if serial else make_env()
    collector = Collector(
        env, make_actor(env), frames_per_batch=10, total_frames=20, auto_register_policy_transforms=False
    )
    batches = list(collector)
    collector.shutdown()
    assert len(batches) == 2
    assert_rollout(batches[-1], *((2, 5) if serial else (10,)))


def test_multi_sync_collector_runs_the_policy_in_a_worker_process():
    actor = make_actor(make_env())
    collector = MultiSyncCollector([make_env], actor, frames_per_batch=10, total_frames=10, cat_results=0)
    batches = list(collector)
    collector.shutdown()
    assert_rollout(batches[0], 10)
