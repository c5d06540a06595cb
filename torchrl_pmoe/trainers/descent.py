"""Steps of an optimiser and of target networks that call PyTorch's kernels at once.

Both are the steps of their classes to the last bit. For networks of a policy's size those classes spend more time
around their kernels than in them. Loops that the compiler makes of the same arithmetic are slower than the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torchrl.objectives import SoftUpdate, TargetNetUpdater

__all__ = ["soft_update_tensors", "step_optimizer", "step_targets"]

_ADAMS = (torch.optim.Adam, torch.optim.AdamW)
# a number would become a tensor again for every parameter
_ONE = torch.ones((), device="cpu")


@torch.no_grad()
def step_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Step a fused ``Adam`` or ``AdamW`` on a CPU by its kernel; let any other optimiser step by itself.

    By itself steps also an optimiser with hooks, with the scale of a ``GradScaler``, or with a ``step`` that was put in
    the place of its class's, and one that has no state yet for a parameter.
    """
    if not _is_its_kernel(optimizer):
        optimizer.step()
        return
    # a scheduler asks whether there was a step before its own
    optimizer._opt_called = True  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [optimizer.state[parameter] for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, _ONE, alpha=1)
        # an Adam decouples the decay too where it is told to
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        kernel(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )


def _is_its_kernel(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is one call of a kernel for every group."""
    # a class of another's making may lack the rest
    if type(optimizer) not in _ADAMS:
        return False
    step = vars(optimizer).get("step")
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    if (
        any((*hooks, _global_optimizer_pre_hooks, _global_optimizer_post_hooks))
        # a scheduler's only notes that it was called
        or not (step is None or _wrapped_by_scheduler(step) is type(optimizer).step)
        or any(getattr(optimizer, scale, None) is not None for scale in ("grad_scale", "found_inf"))
    ):
        return False
    return all(
        group["fused"]
        and not any(isinstance(beta, Tensor) for beta in group["betas"])
        and all(p.grad is None or (p.device.type == "cpu" and optimizer.state.get(p)) for p in group["params"])
        and any(p.grad is not None for p in group["params"])
        for group in optimizer.param_groups
    )


def _wrapped_by_scheduler(step: Callable[..., Any]) -> Callable[..., Any] | None:
    return getattr(step, "__wrapped__", None) if hasattr(step, "_wrapped_by_lr_sched") else None


def soft_update_tensors(updater: TargetNetUpdater | None) -> tuple[list[Tensor], list[Tensor]] | None:
    """The targets of a ``SoftUpdate`` and their sources, in one order; ``None`` for any other updater."""
    if updater is None or type(updater) is not SoftUpdate:
        return None
    # both are locked since the updater was made
    sources = dict(updater._sources.items(True, True))
    targets = [updater._targets[_of_target(key)] for key in sources]
    return targets, list(sources.values())


def _of_target(key: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return f"target_{key}" if isinstance(key, str) else (f"target_{key[0]}", *key[1:])


@torch.no_grad()
def step_targets(updater: TargetNetUpdater, tensors: tuple[list[Tensor], list[Tensor]] | None) -> None:
    """Step ``updater``, by one call for all of its ``tensors`` where :func:`soft_update_tensors` has found them."""
    if tensors is None:
        updater.step()
    else:
        torch._foreach_lerp_(*tensors, 1 - updater.eps)
