"""The compiled update against the same update run eagerly, inside TorchRL's own trainer."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, HardUpdate, SACLoss, SoftUpdate
from torchrl.trainers import Trainer

from torchrl_pmoe import PMOEActor, PMOESACLoss
from torchrl_pmoe.trainers import FusedOptimizationStepper

OBS, A, B = 5, 2, 16
EAGER = {"backend": "eager"}
TRACED = {"backend": "aot_eager"}
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")


class Frames:
    """As much of a collector as the trainer asks for."""

    init_random_frames = 0
    requested_frames_per_batch = B

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return (batch.clone() for batch in self.batches)

    def shutdown(self):
        pass


def batches(count, device="cpu"):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def one():
        return TensorDict(
            observation=normal(B, OBS),
            action=normal(B, A).tanh(),
            action_log_prob=normal(B),
            advantage=normal(B, 1),
            value_target=normal(B, 1),
            state_value=normal(B, 1),
            next=TensorDict(
                observation=normal(B, OBS),
                reward=normal(B, 1),
                done=torch.zeros(B, 1, dtype=torch.bool),
                terminated=normal(B, 1) > 1,
                batch_size=B,
            ),
            batch_size=B,
            device=device,
        )

    return [one() for _ in range(count)]


def critic():
    return ValueOperator(MLP(in_features=OBS + A, out_features=1, num_cells=[8]), in_keys=["observation", "action"])


def gaussian():
    return ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(MLP(in_features=OBS, out_features=2 * A, num_cells=[8]), NormalParamExtractor()),
            ["observation"],
            ["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        spec=Bounded(-1, 1, (A,)),
        distribution_class=TanhNormal,
    )


def mixture(**kwargs):
    return PMOEActor(3, spec=Bounded(-1, 1, (A,)), in_features=OBS, num_cells=(8,), **kwargs)


class Regression(nn.Module):
    """A loss that takes the compiler no time, for what does not depend on the loss; it writes into the batch, too."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(OBS, 1)

    def forward(self, batch):
        error = self.net(batch["observation"]) - batch["next", "reward"]
        batch["td_error"] = error.detach().abs().squeeze(-1)
        return TensorDict(loss_qvalue=error.square().mean(), error=error.detach().mean())


LOSSES = {
    "regression": Regression,
    "SACLoss, Gaussian": lambda: SACLoss(gaussian(), critic()),
    "SACLoss, gradient-scored": lambda: SACLoss(mixture(distribution_kwargs={"routing": "soft_frequency"}), critic()),
    "PMOESACLoss, max": lambda: PMOESACLoss(mixture(), critic()),
    "PMOESACLoss, weighted": lambda: PMOESACLoss(mixture(), critic(), routing="marginal", backprop="weighted"),
    "ClipPPOLoss": lambda: ClipPPOLoss(
        mixture(return_log_prob=True),
        ValueOperator(MLP(in_features=OBS, out_features=1, num_cells=[8])),
        # TorchRL draws once more for it under the compiler
        entropy_bonus=False,
    ),
}


def run(name, steps=3, *, hooks=(), before=lambda trainer: None, device="cpu", dtype=torch.float64, **kwargs):
    """Parameters, means, warnings and what the hooks saw after some updates in a trainer."""
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        loss = LOSSES[name]().to(device)
        target = SoftUpdate(loss, eps=0.9) if isinstance(loss, SACLoss) else None
        frames = batches(steps, device)
        stepper = FusedOptimizationStepper(target, **kwargs)
        trainer = Trainer(
            collector=Frames(frames),
            total_frames=steps * B,
            frame_skip=1,
            optim_steps_per_batch=1,
            loss_module=loss,
            optimizer=torch.optim.Adam(loss.parameters(), lr=1e-2, eps=1e-2, fused=True),
            optimization_stepper=stepper,
            clip_norm=0.5,
            progress_bar=False,
        )
        calls = []

        def recorder(stage):
            return lambda *args, **kwargs: calls.append(stage)

        for stage in hooks:
            trainer.register_op(stage, recorder(stage))
        before(trainer)
        torch.manual_seed(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # hidden from users: PyTorch and TorchRL to themselves
            warnings.simplefilter("ignore", DeprecationWarning)
            trainer.train()
    finally:
        torch.set_default_dtype(torch.float32)
    found = {key: value.detach().cpu() for key, value in loss.state_dict().items()}
    return found, stepper.means(), [str(w.message) for w in caught], calls


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(ours, theirs, rtol=1e-9):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        # TorchRL makes the target entropy of another float type when it is traced
        torch.testing.assert_close(
            ours[key], value, rtol=rtol, atol=rtol / 10, check_dtype=False, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize(
    ("name", "backend"),
    # the graph of the loss that has a backward of its own is rewritten by autograd's tracer, too; what becomes of the
    # others, test_compiled_training.py shows
    [("SACLoss, gradient-scored", TRACED), ("PMOESACLoss, weighted", EAGER), ("ClipPPOLoss", EAGER)],
)
def test_traced_updates_are_the_eager_ones(name, backend):
    eager, means, _, _ = run(name)
    # in one graph, or the compiler would say so in a warning
    traced, traced_means, warned, _ = run(name, compile={**backend, "fullgraph": True})
    assert_same(traced, eager)
    assert traced_means == pytest.approx(means, rel=1e-9)
    assert warned == []


STAGES = ("pre_optim_steps", "process_optim_batch", "post_loss", "post_optim", "post_optim_log", "post_steps")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_hook_is_called_as_in_an_eager_update():
    _, _, _, eager = run("regression", steps=2, hooks=STAGES)
    _, _, _, fused = run("regression", steps=2, hooks=STAGES, compile=EAGER)
    assert fused == eager
    assert set(eager) == set(STAGES)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_post_loss_hooks_find_what_the_loss_wrote():
    def watch(errors, stale):
        def before(trainer):
            if stale:
                # a prioritised buffer hands out the error of an earlier update
                trainer.register_op("process_optim_batch", lambda batch: batch.set("td_error", -torch.ones(B)))
            trainer.register_op("post_loss", lambda batch: errors.append(batch["td_error"].clone()))

        return before

    for stale in (False, True):
        eager, fused = [], []
        run("regression", before=watch(eager, stale))
        run("regression", before=watch(fused, stale), compile=EAGER)
        torch.testing.assert_close(torch.stack(fused), torch.stack(eager), rtol=1e-9, atol=1e-10)
        assert len(eager) == 3


def test_process_loss_hooks_change_the_update_and_end_compiling_with_one_warning():
    def double(trainer):
        trainer.register_op("process_loss", lambda batch, losses: losses.apply(lambda x: 2 * x))

    eager, _, _, _ = run("SACLoss, Gaussian", before=double)
    plain, _, _, _ = run("SACLoss, Gaussian")
    fused, _, warned, _ = run("SACLoss, Gaussian", before=double, compile=EAGER)
    assert_same(fused, eager)
    assert any((fused[key] != plain[key]).any() for key in plain)
    assert [line for line in warned if "eagerly" in line] == [
        "compile: updates run eagerly, process_loss hooks stand between loss and backward."
    ]


def test_a_compiler_that_fails_is_told_once_and_nothing_is_lost():
    def broken(graph, inputs):
        raise RuntimeError("no such instruction\nmore lines")

    eager, means, _, _ = run("regression")
    fused, fused_means, warned, _ = run("regression", compile={"backend": broken})
    assert_same(fused, eager)
    assert fused_means == pytest.approx(means, rel=1e-9)
    told = [line for line in warned if "eagerly" in line]
    reason = "the compiler could not take the loss (RuntimeError: no such instruction)"
    assert told == [f"compile: updates run eagerly, {reason}."]


@pytest.mark.parametrize("early", [False, True])
def test_a_signal_leaves_the_compiler_and_nothing_is_lost(early, monkeypatch):
    steppers = []
    started = FusedOptimizationStepper._call_compiler

    def call(self, *args):
        steppers.append(self)
        if early:
            self.stop_compiling()
        return started(self, *args)

    monkeypatch.setattr(FusedOptimizationStepper, "_call_compiler", call)

    def interrupted(graph, inputs):
        assert early is False
        steppers[0].stop_compiling()

    eager, means, _, _ = run("SACLoss, Gaussian")
    fused, fused_means, warned, _ = run("SACLoss, Gaussian", compile={"backend": interrupted})
    assert len(steppers) == 1
    assert_same(fused, eager)
    assert fused_means == pytest.approx(means, rel=1e-9)
    assert not [line for line in warned if "eagerly" in line]
    steppers[0].stop_compiling()  # it is not at work: nothing happens


def test_an_error_of_the_loss_itself_is_raised():
    def missing(trainer):
        trainer.register_op("process_optim_batch", lambda batch: batch.exclude("action"))

    with pytest.raises(KeyError, match="action"):
        run("SACLoss, Gaussian", before=missing, compile=EAGER)


def test_cudagraphs_need_a_gpu_and_a_target_updater_that_counts_nothing(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            FusedOptimizationStepper(cudagraphs=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loss = LOSSES["SACLoss, Gaussian"]()
    with pytest.raises(ValueError, match="allows a SoftUpdate or none, got HardUpdate"):
        FusedOptimizationStepper(HardUpdate(loss), cudagraphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["SACLoss, gradient-scored", "PMOESACLoss, max", "ClipPPOLoss"])
def test_graphed_updates_follow_the_eager_ones(name, compile, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # replayed draws are others than eager ones: with no noise, and always the first expert, the updates must agree
    for name_of_draw in ("randn", "rand"):
        draw = getattr(torch, name_of_draw)
        monkeypatch.setattr(torch, name_of_draw, partial(without_noise, draw))
    eager, _, _, _ = run(name, steps=12, device="cuda")
    graphed, _, told, _ = run(name, steps=12, device="cuda", compile=compile, cudagraphs=True)
    assert_same(graphed, eager, rtol=1e-6)
    assert not any("eagerly" in line for line in told)


def without_noise(draw, *size, generator=None, **kwargs):
    """Zeros; the data of the tests have a generator of their own and stay as they are."""
    return torch.zeros(*size, **kwargs) if generator is None else draw(*size, generator=generator, **kwargs)
