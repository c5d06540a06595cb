"""TorchRL's own components in plain loops: what the recipes are measured against.

Nothing of this project is used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from tensordict import TensorDictBase
from tensordict.nn import AddStateIndependentNormalScale, NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer, TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, LossModule, SACLoss, SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.objectives.value import GAE

Update = Callable[[TensorDictBase], None]
SAC_STORED = ["observation", "action", *[("next", key) for key in ("observation", "reward", "done", "terminated")]]


def sac_loss(
    spec: TensorSpec, observation_size: int, cells: Sequence[int] = (256, 256), device: str = "cpu"
) -> tuple[ProbabilisticActor, SACLoss]:
    """A ``TanhNormal`` actor and its ``SACLoss`` with two critics."""
    actions = spec.shape[-1]

    def network(inputs: int, outputs: int) -> MLP:
        return MLP(
            in_features=inputs, out_features=outputs, num_cells=list(cells), activation_class=nn.ReLU, device=device
        )

    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(network(observation_size, 2 * actions), NormalParamExtractor()),
            in_keys=["observation"],
            out_keys=["loc", "scale"],
        ),
        in_keys=["loc", "scale"],
        spec=spec.to(device),
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low.to(device), "high": spec.space.high.to(device)},
    )
    qvalue = ValueOperator(network(observation_size + actions, 1), in_keys=["observation", "action"])
    loss = SACLoss(actor, qvalue, num_qvalue_nets=2, loss_function="l2")
    loss.make_value_estimator(gamma=0.99)
    return actor, loss


def adam(loss: LossModule, eps: float = 1e-8) -> torch.optim.Adam:
    """Adam for everything that a loss trains."""
    return torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=3e-4, eps=eps, fused=True)


def off_policy_update(loss: LossModule, optimizer: torch.optim.Optimizer, target: TargetNetUpdater) -> Update:
    """Loss, backward, optimiser and target update on one batch, as one function."""

    def update(batch: TensorDictBase) -> None:
        losses = loss(batch)
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        optimizer.step()
        optimizer.zero_grad()
        target.step()

    return update


def train_sac(env: EnvBase, random_frames: int, batch_size: int = 256, buffer_size: int = 1_000_000) -> Iterator[int]:
    """Collect a frame, store it, update once; yields the number of frames so far, without end."""
    spec, observation_size = env.action_spec_unbatched, env.observation_spec["observation"].shape[-1]
    actor, loss = sac_loss(spec, observation_size)
    update = off_policy_update(loss, adam(loss), SoftUpdate(loss, eps=0.995))
    collector = Collector(
        env,
        actor,
        frames_per_batch=1,
        total_frames=-1,
        init_random_frames=random_frames,
        device="cpu",
        auto_register_policy_transforms=False,
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(buffer_size), batch_size=batch_size)
    frames = 0
    for data in collector:
        buffer.extend(data.select(*SAC_STORED).reshape(-1))
        frames += data.numel()
        if frames >= random_frames:
            update(buffer.sample())
        yield frames


def train_ppo(
    env: EnvBase,
    frames_per_batch: int = 2048,
    num_minibatches: int = 32,
    epochs: int = 10,
    cells: Sequence[int] = (64, 64),
) -> Iterator[int]:
    """Collect a batch, estimate advantages, update on minibatches; yields the number of frames so far, without end."""
    spec, observation_size = env.action_spec_unbatched, env.observation_spec["observation"].shape[-1]
    actions = spec.shape[-1]
    mean = MLP(in_features=observation_size, out_features=actions, num_cells=list(cells), activation_class=nn.Tanh)
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(mean, AddStateIndependentNormalScale(actions)), ["observation"], ["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        spec=spec,
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    critic = ValueOperator(
        MLP(in_features=observation_size, out_features=1, num_cells=list(cells), activation_class=nn.Tanh),
        in_keys=["observation"],
    )
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    loss = ClipPPOLoss(actor, critic, clip_epsilon=0.2, normalize_advantage=True, entropy_bonus=False, critic_coeff=0.5)
    optimizer = adam(loss, eps=1e-5)
    collector = Collector(
        env,
        actor,
        frames_per_batch=frames_per_batch,
        total_frames=-1,
        device="cpu",
        auto_register_policy_transforms=False,
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(frames_per_batch),
        sampler=SamplerWithoutReplacement(),
        batch_size=frames_per_batch // num_minibatches,
    )
    frames = 0
    for data in collector:
        advantage(data)
        buffer.empty()
        buffer.extend(data.reshape(-1))
        for _ in range(epochs):
            for batch in buffer:
                losses = loss(batch)
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        frames += data.numel()
        yield frames
