"""Double Actor-Critic: Proximal Policy Optimisation over options, a rival of the mixture of experts.

    python recipes/dac.py env=HalfCheetah-v4 num_options=4

Every key is in ``recipes/config/dac.yaml``. What is not said here is that of ``recipes/ppo_pmoe.py``.
"""

from __future__ import annotations

if __name__ == "__main__":
    import process

    process.begin()

import math
from pathlib import Path

import backends
import common
import hydra
import ppo_pmoe
import resume
import runs
import torch
from normalization import NormalizedPolicy
from omegaconf import DictConfig
from policies import describe
from rules import Rule, choice, integer, number
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import InitTracker
from torchrl.modules import IndependentNormal, TanhNormal, ValueOperator

from torchrl_pmoe.baselines import DACLoss, DoubleGAE, OptionActor

_SHARED = ("env", "env_kwargs", "seed", "total_frames", "actions", "device", "resume", "on_nonfinite")
# keys of PPO about experts and the Q-network
_NOT_HERE = (
    "network.qvalue_hidden_sizes",
    "optim.qvalue_grad_clip",
    "loss.qvalue_coeff",
    "loss.routing_coef",
    "loss.routing_loss",
    "loss.num_proposals",
    "logger.eval_expert",
)
RULES: dict[str, Rule] = {
    **{key: rule for key, rule in ppo_pmoe.RULES.items() if key in _SHARED or ("." in key and key not in _NOT_HERE)},
    "recipe": choice("dac"),
    "policy": choice("dac"),
    "num_options": integer(1, 1024),
    "loss.high_entropy_coeff": number(at_least=0),
    "logger.eval_option": choice("drawn", "largest"),
}
READ = ["observation", "is_init", "previous_option"]
TRAINED_ON = [
    *READ,
    "option",
    "option_log_prob",
    "action",
    "action_log_prob",
    "advantage_high",
    "advantage_low",
    "value_target",
    "option_value",
]
LOSS_COLUMNS = (
    "loss_objective_high",
    "loss_objective_low",
    "loss_entropy",
    "loss_critic",
    "explained_variance",
    "clip_fraction",
    "clip_fraction_high",
    "kl_approx",
    "kl_approx_high",
    "termination_prob",
)


def resolve_config(cfg: DictConfig) -> None:
    """Check the config."""
    common.check_config(cfg, RULES)
    ppo_pmoe.refuse_batches(cfg)
    backends.refuse(cfg)
    runs.resolve_compile(cfg, ppo_pmoe.updates(cfg))


# --------------------------------------------------------------------------------------------- parts


def build_actor(cfg: DictConfig, spec: TensorSpec, observation_size: int) -> OptionActor:
    """The policy over options, of the same networks as the mixture's in ``ppo_pmoe.py``."""
    net, bounded = cfg.network, cfg.actions == "bounded"
    linear = net.router == "linear"
    actor = OptionActor(
        cfg.num_options,
        spec=spec,
        in_features=observation_size,
        num_cells=tuple(net.hidden_sizes),
        activation_class=common.ACTIVATIONS[net.activation],
        router=nn.Linear(observation_size, 2 * cfg.num_options, device=cfg.device) if linear else net.router,
        distribution_class=TanhNormal if bounded else IndependentNormal,
        device=cfg.device,
    )
    network = actor.network.module
    ppo_pmoe.orthogonal_(network.trunk, math.sqrt(2))
    ppo_pmoe.orthogonal_(network.experts, net.head_gain)
    ppo_pmoe.orthogonal_(network.router, net.head_gain)
    nn.init.constant_(network.log_scale, net.log_std_init)
    return actor


def build_loss(cfg: DictConfig, actor: OptionActor, value: ValueOperator) -> DACLoss:
    """The clipped losses over options and over actions."""
    return DACLoss(
        actor,
        value,
        clip_epsilon=cfg.loss.clip_epsilon,
        clip_value=cfg.loss.clip_value,
        normalize_advantage=cfg.loss.normalize_advantage,
        critic_coeff=cfg.loss.critic_coeff,
        loss_critic_type=cfg.loss.loss_critic_type,
        entropy_coeff=cfg.loss.entropy_coeff,
        high_entropy_coeff=cfg.loss.high_entropy_coeff,
    )


def build_agent(cfg: DictConfig) -> ppo_pmoe.Agent:
    """Everything that a resolved config describes, seeded."""
    env, normalization = ppo_pmoe.build_env(cfg)
    common.seed_everything(cfg.seed)
    spec, observation_size = env.action_spec_unbatched, env.observation_spec["observation"].shape[-1]
    actor = build_actor(cfg, spec, observation_size)
    value = ppo_pmoe.build_value(cfg, observation_size, cfg.num_options, "option_value")
    env = env.append_transform(InitTracker()).append_transform(actor.make_tensordict_primer())
    loss = build_loss(cfg, actor, value)
    return ppo_pmoe.Agent(env, normalization, actor, value, loss)


class MeanOfDrawnOption(TensorDictModuleBase):
    """Draws the options from the high level and acts on the centres of their Gaussians.

    Args:
        actor: a policy over options.
    """

    def __init__(self, actor: OptionActor) -> None:
        super().__init__()
        self.in_keys, self.out_keys = actor.in_keys, actor.out_keys
        self.actor = actor

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act."""
        return self.actor.act(tensordict, draw_option=True, draw_action=False)


class NormalizedOptions(NormalizedPolicy):
    """A policy over options that reads raw observations; an episode begins where no option has been carried."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action``, and the option for the next step."""
        states = tensordict.copy()
        states["observation"] = self.normalization.normalize(states["observation"])
        begins = "previous_option" not in states
        states["is_init"] = torch.full((*states.shape, 1), begins, device=states["observation"].device)
        if begins:
            states["previous_option"] = torch.zeros_like(states["is_init"], dtype=torch.int64)
        done = self.policy(states)
        tensordict.set("action", done["action"])
        return tensordict.set("next", done["next"])


# --------------------------------------------------------------------------------------------- training


def train(cfg: DictConfig, run_dir: Path) -> None:
    """Run one training from a resolved config and leave its records in ``run_dir``."""
    agent = build_agent(cfg)
    actor = agent.actor
    checkpoint = resume.checkpoint_to_resume(cfg)
    collector = runs.build_collector(cfg, agent.env, actor, frames_per_batch=cfg.collector.frames_per_batch)
    buffer = ppo_pmoe.build_buffer(cfg)
    gae = DoubleGAE(actor, agent.value, gamma=cfg.optim.gamma, lmbda=cfg.loss.gae_lambda)
    trainer, schedule = ppo_pmoe.build_trainer(cfg, run_dir, agent, collector, buffer, gae=gae, trained_on=TRAINED_ON)
    evaluated = MeanOfDrawnOption(actor) if cfg.logger.eval_option == "drawn" else actor
    runs.train_and_record(
        cfg,
        run_dir,
        trainer,
        NormalizedOptions(evaluated, agent.normalization),
        algorithm="PPO",
        about=f"{describe(cfg, actor)}; {backends.describe(cfg)}",
        updates=ppo_pmoe.updates(cfg),
        loss_columns=LOSS_COLUMNS,
        diagnose=lambda: ppo_pmoe.diagnose_agent(agent, buffer[:].select(*READ)),
        checkpoint=checkpoint,
        on_resume=lambda: ppo_pmoe.rescale(schedule),
    )


@hydra.main(version_base="1.3", config_path="config", config_name="dac")
def main(cfg: DictConfig) -> None:
    """Check the config, then train."""
    resume.start_or_resume(cfg, resolve_config, train)


if __name__ == "__main__":
    common.launch(main, RULES)
