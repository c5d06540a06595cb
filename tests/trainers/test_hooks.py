"""Hooks of the trainer, called as it calls them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer

from torchrl_pmoe.trainers import EpisodeReturns, ExpertCollapse, MinibatchReplay, PeriodicEvaluation, ProgressBar


def make_trainer(**kwargs):
    registered = {}
    trainer = SimpleNamespace(
        register_op=lambda place, op: registered.setdefault(place, []).append(op),
        register_module=lambda name, module: registered.setdefault("modules", {}).update({name: module}),
        registered=registered,
        collected_frames=0,
        total_frames=100,
    )
    vars(trainer).update(kwargs)
    return trainer


def evaluated_at(hook, trainer, frames):
    for now in frames:
        trainer.collected_frames = now
        hook(None)


def test_evaluation_comes_once_an_interval_and_at_the_end():
    seen, trainer = [], make_trainer()
    hook = PeriodicEvaluation(seen.append, 30)
    hook.register(trainer)
    evaluated_at(hook, trainer, [20, 40, 50, 60, 80, 100])
    assert seen == [40, 60, 100]
    assert trainer.registered["modules"] == {"periodic_evaluation": hook}


def test_evaluation_does_not_come_twice_after_a_restart():
    seen, trainer = [], make_trainer()
    first = PeriodicEvaluation(seen.append, 30)
    first.register(trainer)
    evaluated_at(first, trainer, [40, 50])
    second = PeriodicEvaluation(seen.append, 30)
    second.register(trainer)
    second.load_state_dict(first.state_dict())
    evaluated_at(second, trainer, [55, 70])
    assert seen == [40, 70]


def usage_over_time(*shares):
    """Mean probabilities of two experts, one look after the other."""
    looks = iter(shares)
    return lambda: torch.tensor([1 - (share := next(looks)), share])


@pytest.mark.filterwarnings("error")
def test_one_expert_that_stays_above_the_share_is_told_once():
    trainer = make_trainer()
    hook = ExpertCollapse(usage_over_time(0.5, 0.995, 0.999, 1.0, 1.0), frames=20, look_every=10)
    hook.register(trainer)
    evaluated_at(hook, trainer, [5, 10, 20, 30])
    with pytest.warns(UserWarning, match=r"expert 1 of 2 has had 100\.0 % .* since frame 20: .*floor"):
        evaluated_at(hook, trainer, [40])
    evaluated_at(hook, trainer, [50, 60, 90])


@pytest.mark.filterwarnings("error")
def test_experts_that_take_turns_or_come_back_are_not_told():
    trainer = make_trainer()
    hook = ExpertCollapse(usage_over_time(0.999, 0.001, 0.999, 0.5, 0.999, 0.999), frames=20, look_every=10)
    hook.register(trainer)
    evaluated_at(hook, trainer, [10, 20, 30, 40, 50, 60])


@pytest.mark.filterwarnings("error")
def test_one_expert_alone_takes_over_from_nobody():
    trainer = make_trainer()
    hook = ExpertCollapse(lambda: torch.ones(1), frames=20, look_every=10)
    hook.register(trainer)
    evaluated_at(hook, trainer, [10, 20, 30, 40])


def test_a_collapse_is_remembered_in_checkpoints():
    trainer = make_trainer()
    first = ExpertCollapse(usage_over_time(1.0, 1.0), frames=20, look_every=10)
    first.register(trainer)
    evaluated_at(first, trainer, [10, 20])
    second = ExpertCollapse(usage_over_time(1.0), frames=20, look_every=10)
    second.register(trainer)
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="since frame 10"):
        evaluated_at(second, trainer, [30])


def test_the_bar_starts_where_an_earlier_run_ended(capsys):
    bar = ProgressBar(100, lambda: {"return": "3"}, initial=60)
    bar(TensorDict(batch_size=[40]))
    bar.close()
    shown = capsys.readouterr().err
    assert "60/100" in shown
    assert "100/100" in shown
    assert "return=3" in shown


def test_slow_first_frames_do_not_count_for_the_time_that_is_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("torchrl_pmoe.trainers.hooks.time.time", lambda: now[0])
    monkeypatch.setattr("torchrl_pmoe.trainers.hooks.time.monotonic", lambda: now[0])
    bar = ProgressBar(1000, dict, begun=lambda: now[0] >= 60)
    bar._bar._time = lambda: now[0]
    bar._bar.start_t = bar._bar.last_print_t = 0.0
    for frames, seconds in ((10, 60), (90, 9), (100, 10)):
        now[0] += seconds
        bar(TensorDict(batch_size=[frames]))
    # 10 frames a second since the first minute, in which there was something to compile
    shown = bar._bar.format_dict
    assert (shown["n"] - shown["initial"]) / shown["elapsed"] == pytest.approx(10)


def episodes(shape, steps, generator):
    reward = torch.randn(*shape, steps, 1, generator=generator)
    done = torch.rand(*shape, steps, 1, generator=generator) < 0.3
    return TensorDict(next=TensorDict(reward=reward, done=done, batch_size=[*shape, steps]), batch_size=[*shape, steps])


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
@pytest.mark.parametrize("steps", [1, 7])
def test_returns_of_training_episodes_are_those_of_a_loop(shape, steps):
    generator = torch.Generator().manual_seed(0)
    hook, running, returns = EpisodeReturns(recent=5), torch.zeros(shape).double(), []
    assert math.isnan(hook.mean())
    for index in range(40):
        batch = episodes(shape, steps, generator)
        hook(batch)
        if index == 6:
            resumed = EpisodeReturns(recent=5)
            resumed.load_state_dict(hook.state_dict())
            hook = resumed
        for step in range(steps):
            running = running + batch["next", "reward"][..., step, 0].double()
            done = batch["next", "done"][..., step, 0]
            returns += running[done].tolist() if shape else [running.item()] * bool(done)
            running = running * ~done
        if returns:
            assert hook.mean() == pytest.approx(sum(returns[-5:]) / len(returns[-5:]))
    assert len(returns) > 5


def test_every_frame_is_handed_out_once_an_epoch_in_a_new_order():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(12), sampler=SamplerWithoutReplacement(), batch_size=12)
    trainer, hook = make_trainer(), MinibatchReplay(buffer, 3)
    hook.register(trainer)
    (extend,), (shuffle,), (sample,) = (
        trainer.registered[place] for place in ("batch_process", "pre_epoch", "process_optim_batch")
    )
    for first in (0, 100):
        # [N, T] = [2, 6]
        frames = TensorDict(observation=torch.arange(first, first + 12.0).reshape(2, 6, 1), batch_size=[2, 6])
        assert extend(frames).shape == (12,)
        orders = []
        for _ in range(2):
            assert shuffle(frames) is frames
            minibatches = [sample(frames) for _ in range(3)]
            assert [len(minibatch) for minibatch in minibatches] == [4, 4, 4]
            orders.append(torch.cat([minibatch["observation"] for minibatch in minibatches]).flatten())
        for order in orders:
            assert sorted(order.tolist()) == list(range(first, first + 12))
        assert (orders[0] != orders[1]).any()


def test_minibatches_that_do_not_come_out_even_are_refused():
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(12), sampler=SamplerWithoutReplacement(), batch_size=12)
    hook = MinibatchReplay(buffer, 5)
    frames = hook.extend(TensorDict(observation=torch.zeros(12, 1), batch_size=[12]))
    with pytest.raises(ValueError, match="the 12 frames of a batch must be a multiple of num_minibatches=5"):
        hook.shuffle(frames)
