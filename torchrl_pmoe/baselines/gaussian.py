"""The control: TorchRL's own Gaussian policy, as one class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict.nn import AddStateIndependentNormalScale, NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, TanhNormal

from torchrl_pmoe.modules.heads import ClampedExp

__all__ = ["GaussianActor"]


class GaussianActor(ProbabilisticActor):
    """TorchRL's ``ProbabilisticActor`` with one Gaussian, of the same networks as :class:`~torchrl_pmoe.PMOEActor`.

    Reads ``observation`` ``[*B, in_features]``; writes ``loc`` and ``scale`` ``[*B, A]`` and ``action`` ``[*B, A]``.

    Args:
        spec: of the action ``[A]``.
        in_features: size of the observation.

    Keyword Args:
        num_cells: widths of the hidden layers.
        activation_class: between them.
        log_std_bounds: of the log of a scale that depends on the state; ``None`` for scales that do not.
        head_init: the last layer starts uniform in ``[-head_init, head_init]``, where scales depend on the state.
        distribution_class: :class:`~torchrl.modules.TanhNormal`, within the bounds of ``spec``, or
            :class:`~torchrl.modules.IndependentNormal`.
        return_log_prob: write ``action_log_prob``.
        device: of the parameters.
    """

    def __init__(
        self,
        spec: TensorSpec,
        in_features: int,
        *,
        num_cells: Sequence[int] = (256, 256),
        activation_class: type[nn.Module] = nn.ReLU,
        log_std_bounds: tuple[float, float] | None = (-20.0, 2.0),
        head_init: float = 1e-3,
        distribution_class: type[TanhNormal] | type[IndependentNormal] = TanhNormal,
        return_log_prob: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        size = spec.shape[-1]
        mlp = MLP(
            in_features=in_features,
            out_features=size if log_std_bounds is None else 2 * size,
            num_cells=list(num_cells),
            activation_class=activation_class,
            device=device,
        )
        scale: nn.Module
        if log_std_bounds is None:
            scale = AddStateIndependentNormalScale(size, device=device, scale_mapping="exp", init_value=0.0)
        else:
            scale = NormalParamExtractor("exp", scale_lb=0.0)
            # it takes names alone, and a name of ours would be one for the whole process
            scale.scale_mapping = ClampedExp(*log_std_bounds)
            for parameter in mlp[-1].parameters():
                nn.init.uniform_(parameter, -head_init, head_init)
        bounds: dict[str, Any] = {}
        if issubclass(distribution_class, TanhNormal):
            bounds = {"low": spec.space.low.to(device), "high": spec.space.high.to(device)}
        super().__init__(
            TensorDictModule(nn.Sequential(mlp, scale), ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            spec=spec.to(device) if device is not None else spec,
            distribution_class=distribution_class,
            distribution_kwargs=bounds,
            return_log_prob=return_log_prob,
            default_interaction_type=ExplorationType.RANDOM,
        )
