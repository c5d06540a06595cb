"""The config of ``recipes/dac.py``."""

from __future__ import annotations

from typing import Annotated, Literal

from parts.training import choose_compile
from pydantic import Field

from config import shared
from config.ppo_pmoe import Loss, OnPolicyConfig, refuse_batches
from config.shared import Experts
from config.typed import Number, Text, config_class, field, group, register


@config_class
class OptionLoss(Loss):
    """The clipped losses of both levels."""

    high_entropy_coeff: Annotated[Number, Field(ge=0)] = field(0.01, "of the policy over options")


@config_class
class OptionLogger(shared.Logger):
    """As :class:`config.shared.Logger`, for a policy over options."""

    eval_option: Literal["drawn", "largest"] = field("drawn", "the option that acts in an evaluation")


@config_class
class DACConfig(OnPolicyConfig):
    """Every key of ``recipes/dac.py``."""

    recipe: Literal["dac"] = field("dac", "tells what a run is a run of")
    policy: Literal["dac"] = field("dac", "named in outputs")
    env: Text = field("HalfCheetah-v4", "any Gymnasium id with a vector of observations and a bounded Box of actions")
    num_options: Experts = field(4, "as in the paper; 1 is PPO with a Gaussian")
    loss: OptionLoss = group(OptionLoss)
    logger: OptionLogger = group(OptionLogger, eval_interval=50_000)


ABOUT = "Double Actor-Critic: Proximal Policy Optimisation over options, a rival of the mixture of experts."
EXAMPLES = ("python recipes/dac.py env=HalfCheetah-v4 num_options=4",)
register("dac", DACConfig, ABOUT, *EXAMPLES)


def resolve(config: DACConfig) -> None:
    """Refuse what does not go together.

    Raises:
        UsageError: in one line, for the first key that cannot stay.
    """
    shared.fit_to_machine(config)
    refuse_batches(config)
    choose_compile(config.compile, config.updates)
