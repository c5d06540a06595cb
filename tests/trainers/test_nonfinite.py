"""Numbers that are NaN or infinite: found in the update or the batch in which they appear, and handled as said."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from tensordict import TensorDict
from test_compiled_stepper import LOSSES, B, Frames, Regression, batches
from torchrl.objectives import SACLoss, SoftUpdate
from torchrl.trainers import Trainer

from torchrl_pmoe.trainers import FiniteBatch, FiniteLoss, FusedOptimizationStepper, NonFiniteError

NAN, INF = float("nan"), float("inf")


# ------------------------------------------------------------------------------------------------- frames


def frames(time, *, envs=None):
    """Frames that count, of one environment or several."""
    shape = (time,) if envs is None else (envs, time)
    count = torch.arange(time).float().expand(shape).clone()
    flag = torch.zeros(*shape, 1, dtype=torch.bool)
    following = TensorDict(
        observation=torch.stack([count, count], -1) + 1,
        reward=count.unsqueeze(-1).clone(),
        done=flag,
        terminated=flag.clone(),
        truncated=flag.clone(),
        batch_size=shape,
    )
    return TensorDict(observation=torch.stack([count, count], -1), next=following, batch_size=shape)


KEYS = ["observation", ("next", "observation"), ("next", "reward")]


@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_batch_with_a_bad_number_is_named_with_its_frames(bad):
    hook = FiniteBatch(KEYS)
    hook(frames(5))
    worse = frames(5)
    worse["next", "reward"][3] = bad
    with pytest.raises(NonFiniteError, match=r"NaN or infinite next\.reward between frames 5 and 10"):
        hook(worse)


def test_a_bad_action_in_a_good_state_is_the_policys_fault():
    """Whatever the environment makes of it; in a state that is bad itself the environment is named, as before."""
    hook = FiniteBatch(KEYS)
    hook(frames(5).set("action", torch.zeros(5, 2)))
    diverged = frames(5).set("action", torch.zeros(5, 2))
    diverged["action"][3, 1] = NAN
    diverged["next", "observation"][3:] = NAN
    diverged["observation"][4] = diverged["action"][4] = NAN
    with pytest.raises(NonFiniteError, match=r"^the policy returned a NaN or infinite action .* frames 5 and 10"):
        hook(diverged)
    blown_up = frames(5).set("action", torch.zeros(5, 2))
    blown_up["next", "observation"][3] = blown_up["observation"][4] = blown_up["action"][4] = NAN
    with pytest.raises(NonFiniteError, match=r"^the environment returned a NaN or inf"):
        FiniteBatch(KEYS)(blown_up)


def test_frames_are_counted_on_after_a_resume():
    first, second = FiniteBatch(KEYS), FiniteBatch(KEYS)
    first(frames(3))
    second.load_state_dict(first.state_dict())
    worse = frames(2, envs=2)
    worse["next", "reward"][1, 0] = INF
    with pytest.raises(NonFiniteError, match="between frames 3 and 7"):
        second(worse)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="on_nonfinite='ignore' must be 'stop' or 'skip'"):
        FusedOptimizationStepper(on_nonfinite="ignore")


# ------------------------------------------------------------------------------------------------ updates


def train(data, on_nonfinite, *, device="cpu", name="PMOESACLoss, max", hook=True, before=None, **kwargs):
    """Parameters, targets and optimiser state after the updates of some batches, and the stepper."""
    torch.manual_seed(0)
    loss = LOSSES[name]().to(device)
    target = SoftUpdate(loss, eps=0.9) if isinstance(loss, SACLoss) else None
    stepper = FusedOptimizationStepper(target, on_nonfinite=on_nonfinite, **kwargs)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2, eps=1e-2, fused=True)
    trainer = Trainer(
        collector=Frames([batch.to(device) for batch in data]),
        total_frames=len(data) * B,
        frame_skip=1,
        optim_steps_per_batch=1,
        loss_module=loss,
        optimizer=optimizer,
        optimization_stepper=stepper,
        clip_norm=0.5,
        progress_bar=False,
    )
    if hook:
        FiniteLoss(stepper, look_every=1).register(trainer)
    if before is not None:
        before(trainer)
    # the draws of a batch are its own, whatever came before
    trainer.register_op("process_optim_batch", lambda batch: torch.manual_seed(int(batch["seed"][0])) and None)
    error = None
    try:
        trainer.train()
    except NonFiniteError as raised:
        error = raised
    state = {key: value.detach().cpu().clone() for key, value in loss.state_dict().items()}
    moments = [s.detach().cpu().clone() for p in loss.parameters() for s in optimizer.state.get(p, {}).values()]
    return state, moments, stepper, error


def numbered(count):
    data = batches(count)
    for seed, batch in enumerate(data):
        batch["seed"] = torch.full((B, 1), seed)
    return data


def poisoned(data, index, value=NAN):
    data = [batch.clone() for batch in data]
    data[index]["next", "reward"][3] = value
    return data


def assert_equal(found, expected):
    assert found[0].keys() == expected[0].keys()
    for key, value in expected[0].items():
        assert torch.equal(found[0][key], value), key
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert torch.equal(ours, theirs)


# compiled, the same function judges what comes from another place: a loss that compiles in no time shows it
UPDATES = pytest.mark.parametrize(
    ("name", "compile"),
    [("PMOESACLoss, max", False), ("regression", {"backend": "eager"})],
    ids=["eager", "fused"],
)


@UPDATES
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_loss_stops_in_its_update_and_leaves_the_weights_of_the_one_before(bad, name, compile):
    data = numbered(5)
    before = train(data[:2], "stop", name=name, compile=compile)
    found = train(poisoned(data, 2, bad), "stop", name=name, compile=compile)
    # a loss that is infinite may have a finite slope
    assert re.match(r"loss_qvalue( and a gradient)? became NaN or infinite in update 3 \(frame 48\)", str(found[3]))
    assert_equal(found, before)


@UPDATES
def test_a_skipped_update_is_as_if_its_batch_had_never_been(name, compile):
    data = numbered(6)
    expected = train([*data[:3], *data[4:]], "skip", name=name, compile=compile)
    with pytest.warns(UserWarning, match=r"loss_qvalue and a gradient became NaN or infinite in update 4 \(frame 64\)"):
        found = train(poisoned(data, 3), "skip", name=name, compile=compile)
    assert_equal(found, expected)
    assert found[2].compile == bool(compile)
    assert (found[2].skipped, expected[2].skipped) == (1, 0)
    assert found[2].means() == pytest.approx(expected[2].means(), rel=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:loss_qvalue")
@pytest.mark.parametrize("compile", [False, {"backend": "eager"}], ids=["eager", "fused"])
@pytest.mark.parametrize("on_nonfinite", ["skip", "stop"])
def test_the_priorities_of_a_bad_update_are_not_written(on_nonfinite, compile):
    """Prioritised replay would keep a NaN for good; ``post_loss`` hooks write what the loss left in the batch."""
    written = []

    def keep(trainer):
        trainer.register_op("post_loss", lambda batch: written.append(batch["td_error"].clone()))

    train(poisoned(numbered(5), 2), on_nonfinite, compile=compile, before=keep)
    assert len(written) == (4 if on_nonfinite == "skip" else 2)
    assert torch.stack(written).isfinite().all()


def test_a_bad_gradient_of_finite_losses_is_found():
    x = torch.nn.Parameter(torch.zeros(1))

    class Root(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = x

        def forward(self, batch):
            return TensorDict(loss=x.abs().sqrt().sum())

    trainer = Trainer(
        collector=Frames(numbered(1)),
        total_frames=B,
        frame_skip=1,
        optim_steps_per_batch=1,
        loss_module=Root(),
        optimizer=torch.optim.SGD([x], lr=1.0),
        optimization_stepper=FusedOptimizationStepper(),
        progress_bar=False,
    )
    with pytest.raises(NonFiniteError, match=r"^a gradient became NaN or infinite in update 1"):
        trainer.train()
    assert x.item() == 0


class Undefined(Regression):
    """A loss with a diagnostic that is NaN."""

    def forward(self, batch):
        return super().forward(batch).set("explained_variance", torch.tensor(NAN))


def test_diagnostics_may_be_anything(monkeypatch):
    monkeypatch.setitem(LOSSES, "undefined", Undefined)
    expected, found = train(numbered(3), "stop", name="regression"), train(numbered(3), "stop", name="undefined")
    assert found[3] is None
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value)
    assert found[2].means()["explained_variance"] != found[2].means()["explained_variance"]


def test_a_hundred_bad_updates_in_a_row_stop_a_run_that_skips():
    data = numbered(2)
    endless = [data[0], *[poisoned(data, 1)[1]] * 120]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = train(endless, "skip", name="SACLoss, Gaussian")
    assert "as in 100 one after the other" in str(found[3])
    assert found[2].updates == 101


def test_means_and_counts_go_on_after_a_checkpoint():
    data = numbered(4)
    whole = train(data, "stop")[2]
    half = train(data[:2], "stop")[2]
    other = FusedOptimizationStepper()
    other.load_state_dict(half.state_dict())
    assert other.updates == 2
    other._found = whole._keys
    other._accumulate(whole._sums - half._sums, 2)
    assert other.means() == pytest.approx(whole.means(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cudagraphs", [False, True])
def test_updates_on_a_gpu_are_judged_and_left_out_there(cudagraphs):
    data = numbered(9)
    # the targets take their step, the rest does not: later updates would see other targets, so the last one is bad
    expected = train(data[:8], "skip", device="cuda", hook=False, cudagraphs=cudagraphs)
    found = train(poisoned(data, 8), "skip", device="cuda", hook=False, cudagraphs=cudagraphs)
    for key, value in expected[0].items():
        if not key.startswith("target_"):
            torch.testing.assert_close(found[0][key], value)
    assert found[2].skipped == 1
    later = train(poisoned(data, 6), "skip", device="cuda", hook=False, cudagraphs=cudagraphs)
    assert (later[2].skipped, later[2].updates) == (1, 9)
    assert all(value.isfinite().all() for value in later[0].values())
    stopped = train(poisoned(data, 6), "stop", device="cuda", cudagraphs=cudagraphs)
    assert "in update 7" in str(stopped[3])
    assert all(value.isfinite().all() for value in stopped[0].values())
