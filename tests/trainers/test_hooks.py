"""Hooks of the trainer, called as it calls them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from torchrl_pmoe.trainers import FiniteBatch, FiniteLoss, NonFiniteError, PeriodicEvaluation, ProgressBar


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


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_batch_with_a_bad_number_is_named_with_its_frames(bad):
    hook = FiniteBatch(["observation", ("next", "reward")])
    hook.register(make_trainer())
    good = TensorDict(observation=torch.zeros(5), next=TensorDict(reward=torch.zeros(5), batch_size=5), batch_size=5)
    hook(good)
    worse = good.clone()
    worse["next", "reward"][3] = bad
    with pytest.raises(NonFiniteError, match=r"NaN or infinite next\.reward between frames 5 and 10"):
        hook(worse)


def test_a_loss_that_went_bad_is_named():
    stepper = SimpleNamespace(finite=lambda: False, means=lambda: {"loss_a": 1.0, "loss_b": float("nan")})
    hook = FiniteLoss(stepper)
    hook.register(make_trainer(collected_frames=7))
    with pytest.raises(NonFiniteError, match=r"^loss_b became NaN or infinite before frame 7"):
        hook()


def test_the_bar_starts_where_an_earlier_run_ended(capsys):
    bar = ProgressBar(100, lambda: {"return": "3"}, initial=60)
    bar(TensorDict(batch_size=[40]))
    bar.close()
    shown = capsys.readouterr().err
    assert "60/100" in shown
    assert "100/100" in shown
    assert "return=3" in shown
