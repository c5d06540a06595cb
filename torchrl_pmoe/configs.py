"""Our actor and losses in the configs of TorchRL's own trainers, by name.

Import this module beside ``torchrl.trainers.algorithms.configs``. Then the defaults list of a config, or a command
line, can name ``model: pmoe`` and ``loss: pmoe_sac``, ``pmoe_tqc`` or ``pmoe_ppo``::

    defaults:
      - model@models.policy_model: pmoe
      - loss@loss: pmoe_sac

Keywords of the actor and of the losses are keys. This module alone needs Hydra, and nothing else in the library imports
it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from enum import Enum
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, ListConfig
from tensordict.nn import InteractionType
from torch import nn
from torchrl.data import Bounded
from torchrl.objectives import LossModule
from torchrl.trainers.algorithms.configs.common import _normalize_hydra_keys
from torchrl.trainers.algorithms.configs.modules import ActivationConfig, ModelConfig
from torchrl.trainers.algorithms.configs.objectives import LossConfig, PPOLossConfig, SACLossConfig, TQCLossConfig

from torchrl_pmoe.distributions import NormalMixture, TanhNormalMixture
from torchrl_pmoe.modules import PMOEActor
from torchrl_pmoe.objectives import PMOEClipPPOLoss, PMOESACLoss, PMOETQCLoss

__all__ = ["PMOEActorConfig", "make_actor", "make_ppo_loss", "make_sac_loss", "make_tqc_loss"]

DISTRIBUTIONS = {"tanh_normal": TanhNormalMixture, "normal": NormalMixture}


@dataclass
class PMOEActorConfig(ModelConfig):
    """``model: pmoe``, a :class:`~torchrl_pmoe.PMOEActor`.

    Args:
        action_size: ``A``; a config has no action spec.
        low: bounds of the action, a number or one for each dimension.
        high: as ``low``.
        num_experts: ``K``.
        distribution: ``tanh_normal``, bounded, or ``normal``, as PPO often has it.
        exploration_type: used where no ``set_exploration_type`` says otherwise.
        eval_mode: whether the module is put into evaluation mode.

    The other keys are keywords of :class:`~torchrl_pmoe.PMOEActor`.
    """

    action_size: int = MISSING
    low: Any = -1.0
    high: Any = 1.0
    num_experts: int = 4
    distribution: str = "tanh_normal"
    distribution_kwargs: Any = None
    in_features: int | None = None
    network: Any = None
    num_cells: Any = field(default_factory=lambda: [256, 256])
    router: Any = None
    activation_class: Any = field(default_factory=lambda: ActivationConfig("torch.nn.ReLU", _partial_=True))
    state_dependent_scale: bool = True
    scale_mapping: str | None = None
    scale_lb: float = 0.0
    head_init: float = 1e-3
    loc_spread: float = 0.0
    floor: float = 0.0
    param_keys: Any = field(default_factory=lambda: ["logits", "loc", "scale"])
    return_log_prob: bool = False
    exploration_type: str = "RANDOM"
    eval_mode: bool = False
    device: Any = None
    _target_: str = "torchrl_pmoe.configs.make_actor"


def make_actor(
    *,
    action_size: int,
    low: float | Sequence[float] = -1.0,
    high: float | Sequence[float] = 1.0,
    distribution: str = "tanh_normal",
    exploration_type: str = "RANDOM",
    eval_mode: bool = False,
    shared: bool = False,
    **kwargs: Any,
) -> PMOEActor:
    """What :class:`PMOEActorConfig` describes.

    Raises:
        ValueError: for an unknown distribution, or as :class:`~torchrl_pmoe.PMOEActor` does.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution={distribution!r}: must be one of {', '.join(DISTRIBUTIONS)}.")
    bounds = [torch.as_tensor(_plain(bound), dtype=torch.get_default_dtype()) for bound in (low, high)]
    if any(bound.shape not in ((), (action_size,)) for bound in bounds):
        raise ValueError(f"low={low}, high={high}: must be a number or action_size={action_size} of them.")
    spec = Bounded(*(bound.expand(action_size) for bound in bounds), (action_size,))
    # a key that is left open in a config has the actor's own default
    given = {key: _plain(value) for key, value in kwargs.items() if value is not None}
    for key in given.keys() & {"in_keys", "out_keys", "param_keys"}:
        given[key] = _normalize_hydra_keys(given[key])
    if "network" in given:
        given["network"] = _network(given["network"])
    actor = PMOEActor(
        spec=spec,
        distribution_class=DISTRIBUTIONS[distribution],
        default_interaction_type=InteractionType.from_str(exploration_type),
        **given,
    )
    if shared:
        actor.share_memory()
    return actor.eval() if eval_mode else actor


def make_sac_loss(**kwargs: Any) -> PMOESACLoss:
    """What ``loss: pmoe_sac`` describes."""
    return _make_loss(PMOESACLoss, kwargs)


def make_tqc_loss(**kwargs: Any) -> PMOETQCLoss:
    """What ``loss: pmoe_tqc`` describes."""
    return _make_loss(PMOETQCLoss, kwargs)


def make_ppo_loss(**kwargs: Any) -> PMOEClipPPOLoss:
    """What ``loss: pmoe_ppo`` describes."""
    return _make_loss(PMOEClipPPOLoss, kwargs)


def _make_loss(loss: type[LossModule], kwargs: dict[str, Any]) -> Any:
    gamma = kwargs.pop("gamma", None)
    for key, value in kwargs.items():
        if key.endswith("_network"):
            kwargs[key] = _network(value)
        elif isinstance(value, ListConfig):
            kwargs[key] = tuple(value)
    made = loss(**kwargs)
    if gamma is not None:
        made.make_value_estimator(gamma=gamma)
    return made


def _network(made: Any) -> nn.Module:
    return made if isinstance(made, nn.Module) else made()  # a partial of Hydra


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, ListConfig) else value


def _loss_config(
    name: str, loss: type[LossModule], parent: type[LossConfig], make: Callable[..., LossModule], without: Sequence[str]
) -> type:
    """A config with the keys of TorchRL's for the parent of a loss, and those that the loss adds.

    Args:
        name: of the config's class.
        loss: ours.
        parent: TorchRL's config.
        make: makes the loss.
        without: keys of ``parent`` that are for its other losses.
    """
    keys: dict[str, Any] = {f.name: f for f in fields(parent) if f.name not in ("_target_", *without)}
    made = [(key, Any, field(default=old.default, default_factory=old.default_factory)) for key, old in keys.items()]
    for key, parameter in inspect.signature(loss).parameters.items():
        if key not in (*keys, *without, "kwargs"):
            default = None if parameter.default is parameter.empty else parameter.default
            made.append((key, Any, field(default=default.value if isinstance(default, Enum) else default)))
    target = ("_target_", str, field(default=f"{make.__module__}.{make.__name__}"))
    return make_dataclass(name, [*made, target], bases=(LossConfig,))


PMOESACLossConfig = _loss_config(
    "PMOESACLossConfig",
    PMOESACLoss,
    SACLossConfig,
    make_sac_loss,
    without=("discrete", "action_space", "num_actions", "target_entropy_weight", "value_network", "delay_value"),
)
PMOETQCLossConfig = _loss_config("PMOETQCLossConfig", PMOETQCLoss, TQCLossConfig, make_tqc_loss, without=())
PMOEPPOLossConfig = _loss_config(
    "PMOEPPOLossConfig",
    PMOEClipPPOLoss,
    PPOLossConfig,
    make_ppo_loss,
    without=(
        *("loss_type", "dtarg", "beta", "increment", "decrement", "samples_mc_kl"),
        *("log_explained_variance", "advantage_key", "value_target_key", "value_key", "functional", "actor", "critic"),
    ),
)

_store = ConfigStore.instance()
_store.store(group="model", name="pmoe", node=PMOEActorConfig)
_store.store(group="loss", name="pmoe_sac", node=PMOESACLossConfig)
_store.store(group="loss", name="pmoe_tqc", node=PMOETQCLossConfig)
_store.store(group="loss", name="pmoe_ppo", node=PMOEPPOLossConfig)
