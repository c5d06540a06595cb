"""Steps by their kernels are the steps of the optimiser's and the target updater's own classes, to the last bit."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from test_compiled_stepper import LOSSES
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchrl.objectives import HardUpdate, SoftUpdate

from torchrl_pmoe.trainers import FusedOptimizationStepper
from torchrl_pmoe.trainers.descent import soft_update_tensors, step_optimizer, step_targets

ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD


def parameters():
    torch.manual_seed(0)
    sizes = (3, 5), (7,), (), (2, 40)
    return [nn.Parameter(torch.randn(size)) for size in sizes] + [nn.Parameter(torch.randn(4, dtype=torch.float64))]


def train(step, cls, resume_at=None, **kwargs):
    """Parameters and the optimiser's state after updates with a schedule, one frozen parameter and a late one."""
    found = parameters()

    def build():
        groups = [{"params": found[:2]}, {"params": found[2:], "lr": 0.3}]
        optimizer = cls(groups, lr=0.1, **kwargs)
        return optimizer, LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))

    optimizer, schedule = build()
    torch.manual_seed(1)
    for update in range(8):
        if update == resume_at:
            saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
            optimizer, schedule = build()
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        for index, parameter in enumerate(found):
            gradient = torch.randn_like(parameter)
            absent = index == 1 or (index == 3 and update < 4)
            parameter.grad = None if absent else gradient
        step(optimizer)
        schedule.step()
    return found, optimizer.state_dict()


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (ADAM, {}),
        (ADAM, {"weight_decay": 0.1, "amsgrad": True, "eps": 1e-3, "betas": (0.8, 0.9)}),
        (ADAMW, {"weight_decay": 0.1, "maximize": True}),
        (ADAM, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        (ADAM, {"fused": False}),
        (SGD, {"momentum": 0.9, "fused": False}),
    ],
)
def test_steps_and_state_are_those_of_the_optimizer_itself(cls, kwargs):
    kwargs = {"fused": True, **kwargs}
    expected, state = train(lambda optimizer: optimizer.step(), cls, **kwargs)
    for resume_at in (None, 5):
        found, its_state = train(step_optimizer, cls, resume_at, **kwargs)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert its_state["param_groups"] == state["param_groups"]
        torch.testing.assert_close(its_state["state"], state["state"], rtol=0, atol=0)


def spied(monkeypatch):
    """Calls of Adam's own step."""
    calls = []
    own = ADAM.step
    monkeypatch.setattr(ADAM, "step", lambda self, *args: calls.append(self) or own(self, *args))
    return calls


def test_a_fused_adam_steps_by_itself_once(monkeypatch):
    calls = spied(monkeypatch)
    train(step_optimizer, ADAM, fused=True)
    # and once more when the late parameter comes
    assert len(calls) == 2


class Subclass(ADAM):
    def step(self, closure=None):
        self.called = True


HOW = ["subclass", "replaced", "replaced, then scheduled", "pre hook", "post hook", "hook of all", "scale"]


@pytest.mark.parametrize("how", HOW)
def test_what_stands_around_a_step_is_called(how, monkeypatch, request):
    weight = nn.Parameter(torch.ones(2))
    optimizer = (Subclass if how == "subclass" else ADAM)([weight], fused=True)
    weight.grad = torch.ones(2)
    ADAM.step(optimizer)
    optimizer.called = False

    def called(*args):
        optimizer.called = True

    if how.startswith("replaced"):
        optimizer.step = MethodType(called, optimizer)
        if how.endswith("scheduled"):
            LambdaLR(optimizer, lambda epoch: 1.0)
    elif how == "hook of all":
        request.addfinalizer(register_optimizer_step_pre_hook(called).remove)
    elif how == "scale":
        monkeypatch.setattr(ADAM, "step", called)
        optimizer.found_inf = torch.ones(())
    elif how == "pre hook":
        optimizer.register_step_pre_hook(called)
    elif how == "post hook":
        optimizer.register_step_post_hook(called)
    step_optimizer(optimizer)
    assert optimizer.called


def test_an_optimizer_that_is_none_of_pytorchs_steps_by_itself():
    class Wrapper(ADAM):
        def __init__(self):
            self.called = False  # no more, as those that hand all on to another

        def step(self, closure=None):
            self.called = True

    optimizer = Wrapper()
    step_optimizer(optimizer)
    assert optimizer.called


def test_a_schedule_that_is_new_to_a_resumed_optimizer_does_not_miss_its_step(recwarn):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    before = ADAM([weight], fused=True)
    before.step()
    optimizer = ADAM([weight], fused=True)
    optimizer.load_state_dict(before.state_dict())
    schedule = LambdaLR(optimizer, lambda epoch: 1.0)
    step_optimizer(optimizer)
    schedule.step()
    assert not recwarn


def test_the_stepper_steps_so(monkeypatch):
    """What it does with losses is tested with it; here, that it calls these steps."""
    loss = LOSSES["SACLoss, Gaussian"]()
    stepper = FusedOptimizationStepper(SoftUpdate(loss, eps=0.9))
    optimizer = ADAM([p for p in loss.parameters() if p.requires_grad], fused=True)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    calls = spied(monkeypatch)
    monkeypatch.setattr(SoftUpdate, "step", lambda self: calls.append(self))
    before = loss.target_qvalue_network_params.clone()
    stepper._step(optimizer)
    assert not calls
    assert (loss.target_qvalue_network_params != before).any()


@pytest.mark.parametrize(
    "build", [lambda loss: SoftUpdate(loss, eps=0.9), lambda loss: HardUpdate(loss, value_network_update_interval=2)]
)
def test_targets_are_those_of_the_updater_itself(build):
    torch.manual_seed(0)
    loss = LOSSES["SACLoss, Gaussian"]()
    twin = copy.deepcopy(loss)
    updater, own = build(loss), build(twin)
    tensors = soft_update_tensors(updater)
    assert (tensors is None) == isinstance(updater, HardUpdate)
    for _ in range(4):
        for ours, theirs in zip(loss.parameters(), twin.parameters(), strict=True):
            ours.data.add_(torch.randn_like(ours))
            theirs.data.copy_(ours.data)
        step_targets(updater, tensors)
        own.step()
    torch.testing.assert_close(loss.target_qvalue_network_params, twin.target_qvalue_network_params, rtol=0, atol=0)
