"""Our actor and losses by name in the configs of TorchRL's own trainers."""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import fields

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.utils import instantiate
from omegaconf import ListConfig
from tensordict import TensorDict
from torch import nn

from torchrl_pmoe import NormalMixture, PMOEActor, PMOEClipPPOLoss, PMOESACLoss, PMOETQCLoss, TanhNormalMixture

# TorchRL's groups are called as keys of the recipes are (env, optimizer), whose tests may follow in this process
Plugins.instance()  # they store entries too, once
store = ConfigStore.instance()
of_the_recipes, store.repo = store.repo, deepcopy(store.repo)
from torchrl_pmoe import configs  # noqa: E402

with_torchrl, store.repo = store.repo, of_the_recipes


def config_of(trainer: str, loss: str, sampler: str, **more: dict) -> dict:
    """What a user of TorchRL writes for one of its trainers, with the names that are ours in it."""
    groups = {
        "env": "gym",
        "model@models.policy": "pmoe",
        "model@models.value": "value",
        "network@networks.value": "mlp",
        "collector": "sync",
        "replay_buffer": "tensordict",
        "storage@replay_buffer.storage": "lazy_tensor",
        "writer@replay_buffer.writer": "round_robin",
        "sampler@replay_buffer.sampler": sampler,
        "optimizer": "adam",
        "trainer": trainer,
        "loss": loss,
    }
    policy = {"action_size": 1, "low": -2.0, "high": 2.0, "num_experts": 2, "num_cells": [8], "in_features": 3}
    names = ("collector", "optimizer", "replay_buffer")
    return {
        "defaults": [*({group: name} for group, name in groups.items()), "_self_"],
        "env": {"env_name": "Pendulum-v1"},
        "models": {"policy": policy | {"return_log_prob": True}, "value": {"network": "${networks.value}"}},
        "networks": {"value": {"num_cells": [8], "out_features": 1, "in_features": 3}},
        "collector": {
            "create_env_fn": "${env}",
            "policy": "${models.policy}",
            "total_frames": 64,
            "frames_per_batch": 32,
            "_partial_": True,
        },
        "replay_buffer": {"storage": {"max_size": 64, "ndim": 1}, "batch_size": 16},
        "loss": {"actor_network": "${models.policy}"},
        "trainer": {
            **{name: f"${{{name}}}" for name in names},
            "loss_module": "${loss}",
            "logger": None,
            "total_frames": 64,
            "clip_norm": 1.0,
            "progress_bar": False,
            "seed": 0,
            "save_trainer_file": None,
            "enable_logging": False,
        },
    }


@pytest.fixture
def composed(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "repo", with_torchrl)

    def compose_from(config: dict, *overrides: str):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return compose("config", overrides=list(overrides))

    return compose_from


ROUTER = "actor_network_params.module.0.module.0.router"


def moved(trainer) -> bool:
    """Whether a training has moved the router's weights and the critics'."""
    before = {name: value.clone() for name, value in trainer.loss_module.state_dict().items()}
    trainer.train()
    after = trainer.loss_module.state_dict()
    parts = [[name for name in before if name.startswith(part)] for part in (ROUTER, "qvalue_network_params")]
    assert all(parts)
    return all(any(not torch.equal(before[name], after[name]) for name in names) for names in parts)


@pytest.mark.parametrize(("name", "loss"), [("pmoe_sac", PMOESACLoss), ("pmoe_tqc", PMOETQCLoss)])
def test_the_sac_trainer_takes_them_by_name(composed, name, loss):
    config = config_of("sac", "sac", "random")
    quantiles = 25 if loss is PMOETQCLoss else 1
    config["networks"]["value"] |= {"in_features": 4, "out_features": quantiles}
    config["models"]["value"] |= {"in_keys": ["observation", "action"], "out_keys": ["state_action_value"]}
    config["loss"]["qvalue_network"] = "${models.value}"
    updater = {"_target_": "torchrl.objectives.SoftUpdate", "tau": 0.01, "_partial_": True}
    config["trainer"] |= {"target_net_updater": updater, "optim_steps_per_batch": 2}
    cfg = composed(config, f"loss={name}", "loss.routing=soft_frequency", "loss.backprop=weighted")
    trainer = instantiate(cfg.trainer)
    assert type(trainer.loss_module) is loss
    assert (trainer.loss_module.routing.value, trainer.loss_module.backprop) == ("soft_frequency", "weighted")
    assert moved(trainer)


def test_the_ppo_trainer_takes_them_by_name(composed):
    config = config_of("ppo", "pmoe_ppo", "without_replacement")
    config["defaults"][-1:] = [{"model@models.qvalue": "value"}, {"network@networks.qvalue": "mlp"}, "_self_"]
    config["networks"]["qvalue"] = {"num_cells": [8], "out_features": 1, "in_features": 4}
    config["models"]["qvalue"] = {
        "network": "${networks.qvalue}",
        "in_keys": ["observation", "action"],
        "out_keys": ["state_action_value"],
    }
    config["models"]["value"] |= {"in_keys": ["observation"], "out_keys": ["state_value"]}
    config["loss"] |= {"critic_network": "${models.value}", "qvalue_network": "${models.qvalue}", "gamma": 0.9}
    config["loss"]["clip_epsilon"] = [0.2, 0.28]
    config["trainer"] |= {"num_epochs": 2, "optim_steps_per_batch": None}
    trainer = instantiate(composed(config, "models.policy.distribution=normal").trainer)
    assert type(trainer.loss_module) is PMOEClipPPOLoss
    assert trainer.loss_module.value_estimator.gamma == 0.9
    assert moved(trainer)


def test_the_actor_is_what_its_keys_say():
    options = {"action_size": 2, "low": [-1.0, -3.0], "high": 3.0, "activation_class": nn.Tanh, "floor": 0.1}
    actor = configs.make_actor(**options, num_experts=3, in_features=5, eval_mode=True)
    dist = actor.get_dist(TensorDict(observation=torch.randn(4, 5), batch_size=4))
    assert type(dist) is TanhNormalMixture
    assert dist.loc.shape == (4, 3, 2)
    assert dist.low.tolist() == [-1.0, -3.0]
    assert (dist.high == 3.0).all()
    assert (dist.probs >= 0.1 / 3 - 1e-6).all()
    assert any(isinstance(module, nn.Tanh) for module in actor.modules())
    assert not actor.training
    normal = configs.make_actor(action_size=1, num_experts=2, in_features=1, distribution="normal")
    assert type(normal.get_dist(TensorDict(observation=torch.randn(1), batch_size=[]))) is NormalMixture
    nested = configs.make_actor(
        action_size=1, num_experts=2, in_features=1, in_keys=ListConfig([["agents", "observation"]])
    )
    assert nested.in_keys == [("agents", "observation")]
    with pytest.raises(
        ValueError, match=r"^low=\[-1.0, -1.0\], high=1.0: must be a number or action_size=3 of them\.$"
    ):
        configs.make_actor(action_size=3, low=[-1.0, -1.0])
    with pytest.raises(ValueError, match=r"^distribution='beta': must be one of tanh_normal, normal\.$"):
        configs.make_actor(action_size=1, distribution="beta")


@pytest.mark.parametrize(
    ("config", "made", "left_out"),
    [
        (configs.PMOESACLossConfig, PMOESACLoss, {"value_network"}),
        (configs.PMOETQCLossConfig, PMOETQCLoss, set()),
        (configs.PMOEPPOLossConfig, PMOEClipPPOLoss, set()),
        (configs.PMOEActorConfig, PMOEActor, {"spec", "distribution_class", "default_interaction_type"}),
    ],
)
def test_every_keyword_is_a_key_with_the_same_default(config, made, left_out):
    keys = {f.name: f.default for f in fields(config)}
    for name, parameter in inspect.signature(made).parameters.items():
        if name in left_out or parameter.kind is parameter.VAR_KEYWORD:
            continue
        assert name in keys, name
        if isinstance(parameter.default, float | bool | str) and parameter.default is not parameter.empty:
            assert keys[name] == getattr(parameter.default, "value", parameter.default), name
