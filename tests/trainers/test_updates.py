"""What one update sees, clips and keeps, eagerly and in a graph."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict
from test_compiled_stepper import EAGER, LOSSES, TRACED, B, Regression, assert_same, fresh_compiler, run
from torch import nn

from torchrl_pmoe.trainers import FusedOptimizationStepper

__all__ = ["fresh_compiler"]  # a fixture of every test here, too


class Weighted(Regression):
    """A loss with an option, in a module of its own as distributions and networks have theirs."""

    def __init__(self):
        super().__init__()
        self.options = nn.Identity()
        self.options.weight = 1.0

    def forward(self, batch):
        losses = super().forward(batch)
        return losses.set("loss_qvalue", losses["loss_qvalue"] * self.options.weight)


class Defaults(Regression):
    """A loss whose option is a default of its class, and another that is a list."""

    weight = 1.0

    def __init__(self):
        super().__init__()
        self.weights = [1.0]

    def forward(self, batch):
        losses = super().forward(batch)
        return losses.set("loss_qvalue", losses["loss_qvalue"] * self.weight * sum(self.weights))


def reweigh(trainer, batch, calls):
    calls.append(batch)
    trainer.loss_module.options.weight = float(len(calls))


def override(trainer, batch, calls):
    calls.append(batch)
    if len(calls) > 2:
        trainer.loss_module.weight = float(len(calls))


def lengthen(trainer, batch, calls):
    calls.append(batch)
    trainer.loss_module.weights.append(float(len(calls)))


def shorten(trainer, batch, calls):
    calls.append(batch)
    return batch[: B - len(calls)]


def unfreeze(trainer, batch, calls):
    calls.append(batch)
    trainer.loss_module.net.bias.requires_grad_(len(calls) % 2 == 0)


def bound(trainer, batch, calls):
    calls.append(batch)
    trainer.clip_norm = 0.1 * len(calls)


@pytest.mark.parametrize(
    ("loss", "change"),
    [
        (Weighted, reweigh),
        (Weighted, shorten),
        (Weighted, unfreeze),
        (Weighted, bound),
        (Defaults, override),
        (Defaults, lengthen),
    ],
)
def test_what_changes_in_a_training_is_seen_by_compiled_updates(loss, change, monkeypatch):
    monkeypatch.setitem(LOSSES, "weighted", loss)

    def changing(trainer):
        calls = []
        trainer.register_op("process_optim_batch", lambda batch: change(trainer, batch, calls))

    eager, means, _, _ = run("weighted", steps=5, before=changing)
    fixed, _, _, _ = run("weighted", steps=5)
    compiled, compiled_means, told, _ = run("weighted", steps=5, before=changing, compile=EAGER)
    assert_same(compiled, eager)
    assert compiled_means == pytest.approx(means, rel=1e-9)
    assert any((eager[key] != fixed[key]).any() for key in fixed)
    assert not any("eagerly" in line for line in told)


class Doubled(Regression):
    """Another loss of the same shapes."""

    def forward(self, batch):
        losses = super().forward(batch)
        return losses.set("loss_qvalue", 2 * losses["loss_qvalue"])


def test_the_graph_of_one_loss_is_not_another_ones(monkeypatch):
    """In one process, without a reset of the compiler in between."""
    monkeypatch.setitem(LOSSES, "doubled", Doubled)
    for name in ("regression", "doubled"):
        assert_same(run(name, compile=EAGER)[0], run(name)[0])


def test_the_update_that_is_recorded_hands_over_what_it_has_found(monkeypatch):
    """Without a GPU TorchRL's graph calls the function itself: what goes in and out is the same."""
    eager, means, _, _ = run("regression")
    made = FusedOptimizationStepper.__init__

    def as_on_a_gpu(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            made(self, *args, **kwargs)

    monkeypatch.setattr(FusedOptimizationStepper, "__init__", as_on_a_gpu)
    errors = []

    def watch(trainer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer.register_op("post_loss", lambda batch: errors.append(batch["td_error"].clone()))

    recorded, recorded_means, _, _ = run("regression", before=watch, cudagraphs=True)
    assert_same(recorded, eager)
    assert recorded_means == pytest.approx(means, rel=1e-9)
    assert len(errors) == 3


class Mixed(nn.Module):
    """A scalar parameter of another dtype than the rest."""

    def __init__(self):
        super().__init__()
        self.weight, self.scalar = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones((), dtype=torch.bfloat16))

    def forward(self, batch):
        return TensorDict(
            loss=(self.weight * batch["observation"][0, :3]).sum() + 5 * self.scalar.to(self.weight.dtype)
        )


def test_a_gradient_keeps_its_dtype_when_it_is_clipped(monkeypatch):
    monkeypatch.setitem(LOSSES, "mixed", Mixed)
    found = run("mixed")[0]
    assert found["scalar"].dtype == torch.bfloat16
    assert found["scalar"] < 1


class Wandering(Regression):
    """A loss whose diagnostics come in another order, and one of them later than the first update."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, batch):
        self.calls += 1
        losses = super().forward(batch)
        if self.calls == 1:
            return losses
        return TensorDict(late=losses["error"] + 1, **{key: losses[key] for key in reversed(list(losses.keys()))})


def test_means_keep_their_names_whatever_the_order_of_the_outputs(monkeypatch):
    monkeypatch.setitem(LOSSES, "wandering", Wandering)
    assert run("wandering")[1] == pytest.approx(run("regression")[1], rel=1e-9)


class Shared(nn.Module):
    """Two parameters that get one gradient, the same tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, batch):
        return TensorDict(loss=((self.first + self.second) * batch["observation"][0, :3]).sum())


@pytest.mark.parametrize("backend", [EAGER, TRACED])
def test_a_gradient_that_two_parameters_share_is_clipped_once(backend, monkeypatch):
    monkeypatch.setitem(LOSSES, "shared", Shared)
    assert_same(run("shared", compile=backend)[0], run("shared")[0])
