"""Hooks of the trainer, called as it calls them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from torchrl_pmoe.trainers import ExpertCollapse, PeriodicEvaluation, ProgressBar


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
