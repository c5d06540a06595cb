"""One optimiser step by the stepper, against the same step by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_pmoe.trainers import FusedOptimizationStepper


def make_trainer(losses, parameters, **kwargs):
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    calls = []
    trainer = SimpleNamespace(
        compute_loss=losses,
        optimizer=optimizer,
        clip_norm=None,
        clip_grad_norm=True,
        _post_loss_hook=lambda batch: calls.append("post_loss"),
        _process_loss_hook=lambda batch, losses: calls.append("process_loss") or losses,
        calls=calls,
    )
    vars(trainer).update(kwargs)
    return trainer


def two_parameters():
    return [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))]


def losses_of(a, b):
    def losses(batch):
        return TensorDict(
            loss_a=(a * torch.tensor([3.0, 4.0])).sum(),
            loss_b=(12.0 * b).sum(),
            other=a.detach().sum(),
            explained=b.detach() / 2,  # one element, as PPO's explained variance
            usage=a.detach(),
        )

    return losses


def test_step_minimises_the_sum_of_what_begins_with_loss():
    a, b = two_parameters()
    trainer = make_trainer(losses_of(a, b), [a, b])
    FusedOptimizationStepper().step(trainer, TensorDict())
    torch.testing.assert_close(a.detach(), torch.tensor([1.0 - 3.0, 2.0 - 4.0]))
    torch.testing.assert_close(b.detach(), torch.tensor([3.0 - 12.0]))
    assert a.grad is None
    assert trainer.calls == ["process_loss", "post_loss"]


def test_gradients_are_clipped_by_their_common_norm():
    a, b = two_parameters()
    FusedOptimizationStepper().step(make_trainer(losses_of(a, b), [a, b], clip_norm=1.3), TensorDict())
    # the norm of (3, 4, 12) is 13
    torch.testing.assert_close(a.detach(), torch.tensor([1.0 - 0.3, 2.0 - 0.4]))
    torch.testing.assert_close(b.detach(), torch.tensor([3.0 - 1.2]))


def test_parameters_named_apart_are_clipped_by_their_own_norm():
    a, b = two_parameters()
    stepper = FusedOptimizationStepper(clip_apart=[iter([b])])
    for _ in range(2):
        stepper.step(make_trainer(losses_of(a, b), [a, b], clip_norm=1.0), TensorDict())
    torch.testing.assert_close(a.detach(), torch.tensor([1.0 - 2 * 0.6, 2.0 - 2 * 0.8]))
    torch.testing.assert_close(b.detach(), torch.tensor([3.0 - 2 * 1.0]))


def test_values_are_clipped_where_the_trainer_says_so():
    a, b = two_parameters()
    FusedOptimizationStepper().step(
        make_trainer(losses_of(a, b), [a, b], clip_norm=3.5, clip_grad_norm=False), TensorDict()
    )
    torch.testing.assert_close(a.detach(), torch.tensor([1.0 - 3.0, 2.0 - 3.5]))
    torch.testing.assert_close(b.detach(), torch.tensor([3.0 - 3.5]))


def test_means_are_over_the_steps_since_the_reset():
    a, b = two_parameters()
    stepper, trainer = FusedOptimizationStepper(), make_trainer(losses_of(a, b), [a, b])
    assert stepper.means() == {}
    stepper.step(trainer, TensorDict())
    stepper.reset()
    for _ in range(2):
        stepper.step(trainer, TensorDict())
    # a was (-2, -2) and (-5, -6) at the two steps, b was -9 and -21
    means = stepper.means()
    assert means.keys() == {"loss_a", "loss_b", "other", "explained"}
    assert means["other"] == pytest.approx((-4 - 11) / 2)
    assert means["loss_b"] == pytest.approx(12 * (-9 - 21) / 2)
    assert means["explained"] == pytest.approx((-4.5 - 10.5) / 2)
