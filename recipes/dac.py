"""Double Actor-Critic: Proximal Policy Optimisation over options, a rival of the mixture of experts.

    python recipes/dac.py env=HalfCheetah-v4 num_options=4

``--help`` prints every key.
"""

from __future__ import annotations

if __name__ == "__main__":
    from parts import process

    process.begin()

from pathlib import Path

import hydra
from config.dac import DACConfig, resolve
from omegaconf import DictConfig
from parts.launch import keep_config, launch, start_or_resume
from parts.networks import ACTIVATIONS, build_value, describe, orthogonal_, orthogonal_policy_
from parts.on_policy import build_buffer, build_on_policy_trainer, build_schedule, diagnose, rescale
from parts.recording import Agent, mean_columns, train_and_record
from parts.resume import checkpoint_to_resume
from parts.training import (
    build_collector,
    build_optimizer,
    seed_everything,
)
from ppo_pmoe import build_env
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import InitTracker
from torchrl.modules import IndependentNormal, TanhNormal, ValueOperator

from torchrl_pmoe.baselines import DACLoss, DoubleGAE, OptionActor
from torchrl_pmoe.envs import NormalizedPolicy
from torchrl_pmoe.runs import CarriedOptionPolicy, construct
from torchrl_pmoe.runs.evaluation import isolated_rng
from torchrl_pmoe.trainers import FusedOptimizationStepper

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


def build_agent(cfg: DACConfig, spec: TensorSpec, observation_size: int) -> tuple[OptionActor, ValueOperator, DACLoss]:
    """The policy over options, of the same networks as the mixture's in ``ppo_pmoe.py``, its values and its loss."""
    net, device = cfg.network, cfg.device
    router = net.router
    actor = construct(
        OptionActor,
        cfg.num_options,
        spec=spec,
        in_features=observation_size,
        num_cells=tuple(net.hidden_sizes),
        activation_class=ACTIVATIONS[net.activation],
        router=construct(nn.Linear, observation_size, 2 * cfg.num_options, device=device)
        if router == "linear"
        else router,
        distribution_class=TanhNormal if cfg.actions == "bounded" else IndependentNormal,
        device=device,
    )
    orthogonal_policy_(actor, net.head_gain, net.log_std_init)
    value = build_value(
        observation_size, net.hidden_sizes, net.activation, device, num_values=cfg.num_options, key="option_value"
    )
    orthogonal_(value, 1.0)
    loss = DACLoss(actor, value, high_entropy_coeff=cfg.loss.high_entropy_coeff, **cfg.loss_kwargs())
    return actor, value, loss


def train(cfg: DACConfig, run_dir: Path) -> None:
    """Run one training and leave its records in ``run_dir``."""
    env, normalization = build_env(cfg)
    seed_everything(cfg.seed)
    actor, value, loss = build_agent(cfg, env.action_spec_unbatched, env.observation_spec["observation"].shape[-1])
    env = env.append_transform(InitTracker()).append_transform(actor.make_tensordict_primer())

    frames = cfg.collector.frames_per_batch
    collector = build_collector(
        env,
        actor,
        frames_per_batch=frames,
        device=cfg.device,
        ray=cfg.ray_options(clip_actions=cfg.actions == "unbounded"),
        transforms=[cfg.make_normalization(), InitTracker, actor.make_tensordict_primer],
        normalization=normalization,
    )
    buffer = build_buffer(frames, cfg.device)
    optimizer = build_optimizer(loss, actor, **cfg.optim.adam())
    schedule = build_schedule(optimizer, -(-cfg.total_frames // frames), falling=cfg.optim.anneal_lr)
    stepper = FusedOptimizationStepper(**cfg.stepping())
    trainer = build_on_policy_trainer(
        run_dir,
        collector=collector,
        buffer=buffer,
        advantages=DoubleGAE(actor, value, gamma=cfg.optim.gamma, lmbda=cfg.loss.gae_lambda),
        trained_on=TRAINED_ON,
        normalization=normalization,
        optimizer=optimizer,
        schedule=schedule,
        device=cfg.device,
        total_frames=cfg.total_frames,
        loss=loss,
        stepper=stepper,
        checkpoints=cfg.checkpoint_options(),
        seed=cfg.seed,
        clip_norm=cfg.optim.max_grad_norm,
        num_minibatches=cfg.loss.num_minibatches,
        num_epochs=cfg.loss.ppo_epochs,
    )

    def measure() -> list[dict[str, float]]:
        row = mean_columns(stepper, LOSS_COLUMNS)
        with isolated_rng(cfg.seed):
            return [{**row, **diagnose(actor, normalization, buffer[:].select(*READ))}]

    drawn = cfg.logger.eval_option == "drawn"
    acting = CarriedOptionPolicy(MeanOfDrawnOption(actor) if drawn else actor)
    agent = Agent(
        NormalizedPolicy(acting, normalization.normalize),
        cfg.seed,
        run_dir,
        f"DAC, {cfg.env}, seed {cfg.seed}",
        actor,
        kind="drawn" if drawn else "deterministic",
        normalization=normalization,
    )
    train_and_record(
        trainer,
        run_dir,
        [agent],
        measure,
        about=f"{describe(cfg.env, cfg.policy, actor)}; {cfg.collector.described()}",
        train_return=normalization.train_return,
        **cfg.recording(),
        checkpoint=checkpoint_to_resume(cfg.resume),
        on_resume=lambda: rescale(schedule),
        begin=lambda: keep_config(cfg, run_dir),
    )


@hydra.main(version_base="1.3", config_path="config", config_name="dac")
def main(cfg: DictConfig) -> None:
    """Check the config, then train."""
    start_or_resume(cfg, DACConfig, resolve, train)


if __name__ == "__main__":
    launch(main, DACConfig)
