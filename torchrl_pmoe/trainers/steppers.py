"""Optimisation steppers for :class:`torchrl.trainers.Trainer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import CudaGraphModule
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate, TargetNetUpdater
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper

from torchrl_pmoe.trainers.descent import soft_update_tensors, step_optimizer, step_targets
from torchrl_pmoe.trainers.nonfinite import BAD_IN_A_ROW, NonFiniteError, OnNonFinite, check_choice
from torchrl_pmoe.trainers.updates import (
    DYNAMO,
    UpdateOptions,
    UpdateResult,
    compiler_arguments,
    compute_gradients,
    in_layout_of,
    judge_and_clip,
)

__all__ = ["FusedOptimizationStepper"]

_VALUES, _BAD, _WRITTEN = "_values", "_bad", "_written"


class _StopCompilingError(BaseException):
    """Raised out of the compiler, which catches every ``Exception``."""


class FusedOptimizationStepper(OptimizationStepper):
    """Loss, backward, optimiser and target update as one function of one batch, without a host synchronisation.

    The ``Trainer``'s own stepper reads the gradient norm back after every update and averages every output of the loss
    one by one. This one minimises the sum of all ``loss_*`` terms and adds the outputs to running sums on the
    device, to be read when they are wanted. It calls the ``post_loss`` and ``process_loss`` hooks, which the
    ``Trainer`` skips when it is given a stepper.

    Compiled (from the second update on), loss, backward, clipping and the check for NaN are one graph of
    :func:`torch.compile`: the same update to the last digits of a float, with the same random draws unless the loss
    itself draws otherwise there (``ClipPPOLoss`` draws twice for its entropy). A change of shapes, of the keys of the
    batch, or of an attribute of the loss or of its modules compiles again; another function, hook or class put in the
    place of one is not looked for. What the loss writes into the batch (``td_error``) is there for the
    ``post_loss`` hooks, which are called after the update. Where the compiler fails, and while ``process_loss``
    hooks are registered (they stand between loss and backward), updates run eagerly, after one warning.

    An update with a NaN or infinite loss or norm of the gradient changes nothing: neither parameters, nor the
    optimiser's state, nor the means; and no ``post_loss`` hook is called, so that no NaN priority is kept. It raises
    (``on_nonfinite="stop"``) or is left out (``"skip"``, after one warning). On a GPU the update is judged and left out
    there, if the optimiser is ``fused`` (a target update goes on); under ``"stop"`` all later ones are left out too,
    until :meth:`check` is called and raises. For other optimisers, and where there are ``post_loss`` hooks, the host
    asks the GPU once an update.

    Args:
        target_updater: stepped after the optimiser.
        clip_apart: groups of parameters whose gradients are clipped to the trainer's ``clip_norm`` by their own norm;
            the parameters in none of them are clipped together.
        compile: run all but the optimiser and the target update under :func:`torch.compile`; a mapping holds keyword
            arguments of it.
        cudagraphs: replay the whole update as one CUDA graph. The batch must keep its shape; the optimiser is made
            ``capturable`` and its learning rates become tensors, which schedulers change in place.
        shape: of the outputs whose means are kept, beside those of one element.
        on_nonfinite: ``"stop"`` or ``"skip"``.

    Raises:
        ValueError: with ``cudagraphs`` where no CUDA device is, or for a target updater other than ``SoftUpdate``,
            which counts its calls on the host; for another ``on_nonfinite``; on the first update, with ``cudagraphs``
            for an optimiser that is not ``fused``.
    """

    def __init__(
        self,
        target_updater: TargetNetUpdater | None = None,
        *,
        clip_apart: Sequence[Iterable[nn.Parameter]] = (),
        compile: bool | Mapping[str, Any] = False,
        cudagraphs: bool = False,
        shape: Sequence[int] = (),
        on_nonfinite: OnNonFinite = "stop",
    ) -> None:
        self.on_nonfinite = check_choice(type(self).__name__, on_nonfinite)
        if cudagraphs and not torch.cuda.is_available():
            raise ValueError(f"{type(self).__name__}: cudagraphs=True needs a CUDA device, there is none.")
        if cudagraphs and not isinstance(target_updater, SoftUpdate | None):
            raise ValueError(
                f"{type(self).__name__}: cudagraphs=True allows a SoftUpdate or none, "
                f"got {type(target_updater).__name__}."
            )
        self.target_updater = target_updater
        self._soft_update = soft_update_tensors(target_updater)
        self.compile = bool(compile) or isinstance(compile, Mapping)
        self._compiler = compiler_arguments(compile if isinstance(compile, Mapping) else {})
        self.cudagraphs = cudagraphs
        self._apart = [list(group) for group in clip_apart]
        self._groups: tuple[tuple[int, ...], ...] = ()
        self._grouped: list[int] = []
        self._written: tuple[str, ...] = ()
        self._shape = torch.Size(shape)
        self._gradients: Callable[..., tuple] | None = None
        self._compiling = self._told_to_stop = False
        self._graphed: CudaGraphModule | None = None
        self._keys: Sequence[str] = ()  # of the sums
        self._found: Sequence[str] = ()  # of the last update
        self._sums: Tensor | None = None
        self._count: int | Tensor = 0
        self.updates = 0
        self._resumed = False
        # of updates judged on a GPU: which outputs were bad in the first bad one, its number, how many there were
        self._stopped: Tensor | None = None
        self._first: tuple[Tensor, Tensor] | None = None
        self._judged: Sequence[str] = ()
        self._skipped: int | Tensor = 0
        self._in_a_row: int | Tensor = 0
        self._longest: int | Tensor = 0
        self._warned = False

    # ------------------------------------------------------------------------------------------- the update

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Update the trainer's parameters once from ``sub_batch``.

        Raises:
            NonFiniteError: on a CPU, as :meth:`check`.
        """
        self.updates += 1
        parameters = [p for group in trainer.optimizer.param_groups for p in group["params"] if p.requires_grad]
        options = self._options(trainer, parameters)
        if not (self.compile or self.cudagraphs) or self._hooked(trainer):
            losses = trainer._process_loss_hook(sub_batch, trainer.compute_loss(sub_batch))
            sum(value.sum() for key, value in losses.items() if key.startswith("loss")).backward()
            outputs = {key: value.detach() for key, value in losses.items()}
            found = judge_and_clip([parameter.grad for parameter in parameters], outputs, options)
            self._descend(trainer, parameters, found)
            values, bad = found.values, found.bad
        elif self.cudagraphs:
            values, bad = self._replay(trainer, parameters, sub_batch, options)
        else:
            values, bad = self._update(trainer, parameters, sub_batch, options)
        self._conclude(trainer, values, bad)
        self._post_loss(trainer, sub_batch, bad)
        return TensorDict()

    def _post_loss(self, trainer: Trainer, batch: TensorDictBase, bad: Tensor) -> None:
        """Call the hooks, unless the update was left out: its priorities are NaN and would never leave the replay."""
        if not getattr(trainer, "_post_loss_ops", True):
            return
        # priorities go to the host anyway
        if not bad[-1]:
            trainer._post_loss_hook(batch)
        elif bad.device.type != "cpu":
            self.check()

    def _hooked(self, trainer: Trainer) -> bool:
        if not trainer._process_loss_ops:
            return False
        self._fall_back("process_loss hooks stand between loss and backward")
        return True

    def _fall_back(self, reason: str) -> None:
        asked = " and ".join(name for name in ("compile", "cudagraphs") if getattr(self, name))
        warnings.warn(f"{asked}: updates run eagerly, {reason}.", stacklevel=2)
        self.compile = self.cudagraphs = False

    def _options(self, trainer: Trainer, parameters: Sequence[nn.Parameter]) -> UpdateOptions:
        if trainer.clip_norm is None:
            return UpdateOptions(self._shape, None, False, ())
        places = {id(parameter): index for index, parameter in enumerate(parameters)}
        if self._grouped != list(places):
            self._grouped = list(places)
            apart = [tuple(places[id(p)] for p in group if id(p) in places) for group in self._apart]
            rest = tuple(index for index in places.values() if not any(index in group for group in apart))
            self._groups = tuple(group for group in (rest, *apart) if group)
        return UpdateOptions(self._shape, trainer.clip_norm, trainer.clip_grad_norm, self._groups)

    def _replay(
        self, trainer: Trainer, parameters: list[nn.Parameter], batch: TensorDictBase, options: UpdateOptions
    ) -> tuple[Tensor, Tensor]:
        """The update as one CUDA graph, the mean of its outputs and what is bad in it."""
        if self._graphed is None:
            self._make_capturable(trainer)

            def update(td: TensorDictBase) -> TensorDictBase:
                # what the capture reads must stay what it was
                scratch = td.copy()
                values, bad = self._update(trainer, parameters, scratch, options)
                return TensorDict({_VALUES: values, _BAD: bad, _WRITTEN: scratch.select(*self._written)})

            # keys of the batch, not of a module: an empty list says that a tensordict comes
            self._graphed = CudaGraphModule(update, warmup=3, in_keys=[], out_keys=[])
        found = self._graphed(batch)
        batch.update(found[_WRITTEN])
        return found[_VALUES], found[_BAD]

    def _update(
        self, trainer: Trainer, parameters: list[nn.Parameter], batch: TensorDictBase, options: UpdateOptions
    ) -> tuple[Tensor, Tensor]:
        found, written = self._compiled(trainer.loss_module, parameters, batch, options)
        if written:
            batch.update(written)
        self._written = tuple(written)
        self._descend(trainer, parameters, found)
        return found.values, found.bad

    def _compiled(self, *args: Any) -> tuple:
        """Gradients of one update: eager at first, compiled from the second on."""
        if self._gradients is None:
            # what losses make in their first call would break the graph
            self._gradients = self._compile if self.compile else compute_gradients
            if not (self._resumed and self.compile):
                return compute_gradients(*args)
            # here the run that went before has its updates compiled already
            with torch.random.fork_rng():
                compute_gradients(*args)
        return self._gradients(*args)

    def _compile(self, *args: Any) -> tuple:
        self._gradients = torch._dynamo.config.patch(DYNAMO)(torch.compile(compute_gradients, **self._compiler))
        try:
            return self._call_compiler(*args)
        except _StopCompilingError:
            self.compile = False
        # whatever stops the compiler, the eager update is right; what is wrong with the loss itself shows in it again
        except Exception as error:
            cause = getattr(error, "inner_exception", error)
            reason = (str(cause).strip().splitlines() or [""])[0]
            self._fall_back(f"the compiler could not take the loss ({type(cause).__name__}: {reason})")
        self._gradients = compute_gradients
        return compute_gradients(*args)

    def _call_compiler(self, *args: Any) -> tuple:
        assert self._gradients is not None
        self._compiling = True
        try:
            if self._told_to_stop:
                raise _StopCompilingError
            with warnings.catch_warnings():
                # tensordict asks for a setting of the compiler that is always on by now
                warnings.filterwarnings("ignore", message=".*inline_inbuilt_nn_modules", category=FutureWarning)
                return self._gradients(*args)
        finally:
            self._compiling = False

    def stop_compiling(self) -> None:
        """Leave the compiler, if it is at work or about to be: updates run eagerly. For a handler of signals.

        The compiler takes half a minute and longer, and a run that is told to stop will not use what it makes.
        """
        self._told_to_stop = True
        if self._compiling:
            self._compiling = False
            raise _StopCompilingError

    def _descend(self, trainer: Trainer, parameters: Sequence[nn.Parameter], found: UpdateResult) -> None:
        """Step, unless something is bad."""
        self._found, self._judged = found.keys, found.judged
        optimizer, bad = trainer.optimizer, found.bad
        for parameter, gradient in zip(parameters, found.gradients, strict=True):
            parameter.grad = in_layout_of(parameter, gradient)
        if bad.device.type == "cpu" or not optimizer.defaults.get("fused"):
            # a capture cannot ask the host: `_make_capturable` has seen to it that the optimiser is fused
            if not bad[-1]:
                self._step(optimizer)
            elif bad.device.type != "cpu" and self.on_nonfinite == "stop":
                self._complain(bad.tolist(), self.updates, "")
        else:
            # as PyTorch's GradScaler does: a fused optimiser leaves the update out by itself
            optimizer.grad_scale, optimizer.found_inf = None, self._leave_out(bad[-1])
            self._step(optimizer)
            del optimizer.grad_scale, optimizer.found_inf
        for parameter in parameters:
            parameter.grad = None

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        step_optimizer(optimizer)
        if self.target_updater is not None:
            step_targets(self.target_updater, self._soft_update)

    def _leave_out(self, bad: Tensor) -> Tensor:
        if self.on_nonfinite == "stop":
            if self._stopped is None:
                self._stopped = torch.zeros_like(bad)
            bad = self._stopped.logical_or_(bad)
        return bad.float()

    @staticmethod
    def _make_capturable(trainer: Trainer) -> None:
        optimizer = trainer.optimizer
        if not optimizer.defaults.get("fused"):
            raise ValueError("FusedOptimizationStepper: cudagraphs=True needs an optimiser with fused=True.")
        for group in optimizer.param_groups:
            device = group["params"][0].device
            group["capturable"] = True
            group["lr"] = torch.as_tensor(group["lr"], device=device)
            for parameter in group["params"]:
                if "step" in optimizer.state[parameter]:
                    optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].to(device)

    # ------------------------------------------------------------------------------------------- bad updates

    def _conclude(self, trainer: Trainer, values: Tensor, bad: Tensor) -> None:
        """Keep the means and remember what was bad; where that needs no copy from a GPU, say so at once."""
        if bad.device.type != "cpu":
            self._remember(bad)
            self._accumulate(values.masked_fill(bad[-1], 0), ~bad[-1])
            return
        if not bad[-1]:
            self._in_a_row = 0
            self._accumulate(values, 1)
            return
        self._skipped, self._in_a_row = int(self._skipped) + 1, int(self._in_a_row) + 1
        frames = getattr(trainer, "collected_frames", None)
        self._complain(bad.tolist(), self.updates, "" if frames is None else f" (frame {frames})")

    def _remember(self, bad: Tensor) -> None:
        bad = bad.clone()  # a graph's memory is written again by its next replay
        every = bad[-1]
        if self._first is None:
            self._first = (bad, every * self.updates)
        else:
            before, number = self._first
            new = every & ~before[-1]
            self._first = (torch.where(new, bad, before), torch.where(new, self.updates, number))
        self._skipped = self._skipped + every.long()
        self._in_a_row = (self._in_a_row + every.long()) * every
        self._longest = torch.maximum(torch.as_tensor(self._longest, device=every.device), self._in_a_row)

    def check(self) -> None:
        """Look at what updates on a GPU have left.

        Raises:
            NonFiniteError: under ``"stop"`` if an update was bad, under ``"skip"`` if the last 100 were.
        """
        if self._first is not None:
            bad, number = self._first[0].tolist(), int(self._first[1])
            if bad[-1]:
                self._complain(bad, number, "")
                self._first, self._longest = None, 0

    def _complain(self, bad: list[bool], update: int, where: str) -> None:
        names = [key for key, is_bad in zip([*self._judged, "a gradient"], bad[:-1], strict=True) if is_bad]
        line = f"{' and '.join(names)} became NaN or infinite in update {update}{where}"
        if self.on_nonfinite == "stop":
            raise NonFiniteError(f"{line}: the run stops here")
        if max(int(self._longest), int(self._in_a_row)) >= BAD_IN_A_ROW:
            raise NonFiniteError(f"{line}, as in {BAD_IN_A_ROW} one after the other: the run stops here")
        if not self._warned:
            self._warned = True
            warnings.warn(f"{line}: that update was left out, and so will others be.", stacklevel=2)

    @property
    def skipped(self) -> int:
        """How many updates were left out."""
        return int(self._skipped)

    # ------------------------------------------------------------------------------------------- the means

    def _accumulate(self, values: Tensor, updates: int | Tensor) -> None:
        self._count = self._count + updates
        if self._sums is None:
            self._keys, self._sums = self._found, values
            return
        if list(self._found) != list(self._keys):
            values = values[[self._found.index(key) for key in self._keys]]
        # sums of a checkpoint come to the device of the updates with the first of them
        self._sums = self._sums.to(values.device) + values

    def means(self) -> dict[str, float]:
        """Mean of every output that is kept since :meth:`reset`, over its elements (empty before the first update)."""
        return {key: value.mean().item() for key, value in self.means_by_element().items()}

    def means_by_element(self) -> dict[str, Tensor]:
        """Mean of every output that is kept since :meth:`reset`, ``[]`` or ``shape``, on the CPU."""
        if self._sums is None:
            return {}
        # one copy from the device for all of them
        means = (self._sums.double() / self._count).cpu().unbind()
        return {key: mean.reshape(self._shape) for key, mean in zip(self._keys, means, strict=True)}

    def reset(self) -> None:
        """Start new means."""
        self._sums, self._count = None, 0

    def state_dict(self) -> dict[str, Any]:
        """The means so far, and what was counted.

        Raises:
            NonFiniteError: as :meth:`check`.
        """
        self.check()
        return {
            "keys": list(self._keys),
            "sums": self._sums,
            "count": int(self._count),
            "updates": self.updates,
            "skipped": self.skipped,
            "in_a_row": int(self._in_a_row),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the means and counts of an earlier run."""
        self._keys, self._sums, self._count = state_dict["keys"], state_dict["sums"], state_dict["count"]
        self.updates, self._resumed = state_dict["updates"], state_dict["updates"] > 0
        self._skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]
