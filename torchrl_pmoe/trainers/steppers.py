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

__all__ = ["FusedOptimizationStepper"]

# in-graph gradients make one graph of loss and backward; PyTorch's own generator keeps the draws of the eager update
_DYNAMO = {"trace_autograd_ops": True} if hasattr(torch._dynamo.config, "trace_autograd_ops") else {}
_COMPILER: dict[str, Any] = {"dynamic": False, "options": {"fallback_random": True}}


class FusedOptimizationStepper(OptimizationStepper):
    """Loss, backward, optimiser and target update as one function of one batch, without a host synchronisation.

    The ``Trainer``'s own stepper reads the gradient norm back after every update and averages every output of the loss
    one by one. This one minimises the sum of all ``loss_*`` terms and adds the outputs to running sums on the
    device, to be read when they are wanted. It calls the ``post_loss`` and ``process_loss`` hooks, which the
    ``Trainer`` skips when it is given a stepper.

    Compiled (from the second update on), loss and backward are one graph of :func:`torch.compile`: the same update to
    the last digits of a float, with the same random draws unless the loss itself draws otherwise there
    (``ClipPPOLoss`` draws twice for its entropy). What the loss writes into the batch (``td_error``) is there for the
    ``post_loss`` hooks, which are then called after the update. Where the compiler fails, and while ``process_loss``
    hooks are registered (they stand between loss and backward), updates run eagerly, after one warning.

    Args:
        target_updater: stepped after the optimiser.
        clip_apart: groups of parameters whose gradients are clipped to the trainer's ``clip_norm`` by their own norm;
            the parameters in none of them are clipped together.
        compile: run loss and backward under :func:`torch.compile`; a mapping holds keyword arguments of it.
        cudagraphs: replay the whole update as one CUDA graph. The batch must keep its shape; the optimiser is made
            ``capturable`` and its learning rates become tensors, which schedulers change in place.
        shape: of the outputs whose means are kept, beside those of one element.

    Raises:
        ValueError: with ``cudagraphs`` where no CUDA device is, or for a target updater other than ``SoftUpdate``,
            which counts its calls on the host.
    """

    def __init__(
        self,
        target_updater: TargetNetUpdater | None = None,
        *,
        clip_apart: Sequence[Iterable[nn.Parameter]] = (),
        compile: bool | Mapping[str, Any] = False,
        cudagraphs: bool = False,
        shape: Sequence[int] = (),
    ) -> None:
        if cudagraphs and not torch.cuda.is_available():
            raise ValueError(f"{type(self).__name__}: cudagraphs=True needs a CUDA device, there is none.")
        if cudagraphs and not isinstance(target_updater, SoftUpdate | None):
            raise ValueError(
                f"{type(self).__name__}: cudagraphs=True allows a SoftUpdate or none, "
                f"got {type(target_updater).__name__}."
            )
        self.target_updater = target_updater
        self.compile = bool(compile) or isinstance(compile, Mapping)
        self._compiler = {**_COMPILER, **(compile if isinstance(compile, Mapping) else {})}
        if self._compiler.get("backend", "inductor") != "inductor":
            del self._compiler["options"]
        self.cudagraphs = cudagraphs
        self._apart = [list(group) for group in clip_apart]
        self._shape = torch.Size(shape)
        self._gradients: Callable[..., tuple] | None = None
        self._graphed: CudaGraphModule | None = None
        self._keys: list[str] = []
        self._sums: list[Tensor] = []
        self._count = 0

    # ------------------------------------------------------------------------------------------- the update

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Update the trainer's parameters once from ``sub_batch``."""
        if not (self.compile or self.cudagraphs) or self._hooked(trainer):
            losses = trainer.compute_loss(sub_batch)
            trainer._post_loss_hook(sub_batch)
            losses = trainer._process_loss_hook(sub_batch, losses)
            sum(value.sum() for key, value in losses.items() if key.startswith("loss")).backward()
            self._descend(trainer)
            self._accumulate({key: value.detach() for key, value in losses.items()})
            return TensorDict()
        outputs = self._fused(trainer, sub_batch)
        sub_batch.update(outputs.pop("batch"))
        trainer._post_loss_hook(sub_batch)
        self._accumulate(dict(outputs.items()))
        return TensorDict()

    def _hooked(self, trainer: Trainer) -> bool:
        if not trainer._process_loss_ops:
            return False
        self._fall_back("process_loss hooks stand between loss and backward")
        return True

    def _fall_back(self, reason: str) -> None:
        asked = " and ".join(name for name in ("compile", "cudagraphs") if getattr(self, name))
        warnings.warn(f"{asked}: updates run eagerly, {reason}.", stacklevel=2)
        self.compile = self.cudagraphs = False

    def _fused(self, trainer: Trainer, batch: TensorDictBase) -> TensorDictBase:
        if self.cudagraphs:
            if self._graphed is None:
                self._make_capturable(trainer)
                # keys of the batch, not of a module: an empty list says that a tensordict comes
                self._graphed = CudaGraphModule(lambda td: self._update(trainer, td), warmup=3, in_keys=[], out_keys=[])
            return self._graphed(batch)
        return self._update(trainer, batch)

    def _update(self, trainer: Trainer, batch: TensorDictBase) -> TensorDictBase:
        parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        gradients, outputs, written = self._compiled(trainer.loss_module, parameters, batch)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self._descend(trainer)
        return TensorDict(outputs).set("batch", TensorDict(written))

    def _compiled(self, *args: Any) -> tuple:
        """Gradients of one update: eager at first, compiled from the second on."""
        if self._gradients is None:
            # what losses make in their first call would break the graph
            self._gradients = self._compile if self.compile else _gradients
            return _gradients(*args)
        return self._gradients(*args)

    def _compile(self, *args: Any) -> tuple:
        compiled = torch._dynamo.config.patch(_DYNAMO)(torch.compile(_gradients, **self._compiler))
        self._gradients = compiled
        try:
            with warnings.catch_warnings():
                # tensordict asks for a setting of the compiler that is always on by now
                warnings.filterwarnings("ignore", message=".*inline_inbuilt_nn_modules", category=FutureWarning)
                return compiled(*args)
        # whatever stops the compiler, the eager update is right; what is wrong with the loss itself shows in it again
        except Exception as error:
            cause = getattr(error, "inner_exception", error)
            reason = (str(cause).strip().splitlines() or [""])[0]
            self._fall_back(f"the compiler could not take the loss ({type(cause).__name__}: {reason})")
            self._gradients = _gradients
            return _gradients(*args)

    def _descend(self, trainer: Trainer) -> None:
        if trainer.clip_norm is not None:
            clip = nn.utils.clip_grad_norm_ if trainer.clip_grad_norm else nn.utils.clip_grad_value_
            for group in self._clip_groups(trainer):
                clip(group, trainer.clip_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if self.target_updater is not None:
            self.target_updater.step()

    def _clip_groups(self, trainer: Trainer) -> list[list[nn.Parameter]]:
        apart = {id(parameter) for group in self._apart for parameter in group}
        every = (parameter for group in trainer.optimizer.param_groups for parameter in group["params"])
        return [[parameter for parameter in every if id(parameter) not in apart], *self._apart]

    @staticmethod
    def _make_capturable(trainer: Trainer) -> None:
        optimizer = trainer.optimizer
        for group in optimizer.param_groups:
            device = group["params"][0].device
            group["capturable"] = True
            group["lr"] = torch.as_tensor(group["lr"], device=device)
            for parameter in group["params"]:
                if "step" in optimizer.state[parameter]:
                    optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].to(device)

    # ------------------------------------------------------------------------------------------- the means

    @torch.no_grad()
    def _accumulate(self, outputs: dict[str, Tensor]) -> None:
        if not self._sums:
            self._keys = [key for key, value in outputs.items() if value.numel() == 1 or value.shape == self._shape]
            self._sums = [outputs[key].clone() for key in self._keys]
        else:
            torch._foreach_add_(self._sums, [outputs[key] for key in self._keys])
        self._count += 1

    def finite(self) -> bool:
        """Whether every output of the loss that is kept has been a finite number since :meth:`reset`."""
        return not self._sums or bool(torch.stack([x.isfinite().all() for x in self._sums]).all())

    def means(self) -> dict[str, float]:
        """Mean of every output that is kept since :meth:`reset`, over its elements (empty before the first update)."""
        return {key: value.mean().item() for key, value in self.means_by_element().items()}

    def means_by_element(self) -> dict[str, Tensor]:
        """Mean of every output that is kept since :meth:`reset`, ``[]`` or ``shape``, on the CPU."""
        if not self._sums:
            return {}
        # one copy from the device for all of them
        sums = torch.stack([x.double().reshape(-1).expand(self._shape.numel()) for x in self._sums]).cpu()
        means = (sums / self._count).unbind()
        return {key: mean.reshape(self._shape) for key, mean in zip(self._keys, means, strict=True)}

    def reset(self) -> None:
        """Start new means."""
        self._sums, self._count = [], 0


def _gradients(
    loss_module: Callable[[TensorDictBase], TensorDictBase], parameters: list[nn.Parameter], batch: TensorDictBase
) -> tuple[tuple[Tensor | None, ...], dict[str, Tensor], dict]:
    """Gradients of the summed losses, every output of the loss, and what it wrote into the batch: all detached."""
    scratch = batch.copy()
    losses = loss_module(scratch)
    total = sum(value.sum() for key, value in losses.items() if key.startswith("loss"))
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    written = {
        key: value.detach()
        for key, value in scratch.items()
        if isinstance(value, Tensor) and value is not batch.get(key, None)
    }
    return gradients, {key: value.detach() for key, value in losses.items()}, written
