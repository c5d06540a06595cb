"""A policy that was loaded acts as the one that was trained."""

from __future__ import annotations

import csv
import json
import random
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.checkpoint import CheckpointError
from torchrl.data import Bounded
from torchrl.envs import GymEnv, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, TanhNormal

from torchrl_pmoe import PMOEActor
from torchrl_pmoe.runs import (
    Evaluator,
    PolicyParts,
    SavedPolicies,
    VerifiedCheckpoint,
    construct,
    export,
    load_policy,
    push_to_hub,
)
from torchrl_pmoe.runs import hub as hub_module

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import recipe_runs  # isort: skip
import dac  # isort: skip
import ppo_pmoe  # isort: skip
import sac_many_seeds  # isort: skip
import sac_pmoe  # isort: skip
from parts import resume  # isort: skip

SAC = [
    "env=Pendulum-v1",
    "num_experts=3",
    "total_frames=60",
    "network.hidden_sizes=[8,8]",
    "network.head_init=1.0",
    "optim.batch_size=8",
    "collector.init_random_frames=20",
    "logger.eval_interval=60",
    "checkpoint.interval=60",
]
PPO = [*recipe_runs.SMALL_PPO, "total_frames=128", "logger.eval_interval=128", "network.head_gain=1.0"]
RUNS = {
    "pmoe": (sac_pmoe, SAC),
    "gaussian": (sac_pmoe, [*SAC, "policy=gaussian"]),
    "gating": (sac_pmoe, [*SAC, "policy=gating", "env=Hopper-v4"]),
    "best_of_experts": (sac_pmoe, [*SAC, "acting=best_of_experts"]),
    "committed": (sac_pmoe, [*SAC, "acting=committed", "commit_steps=7"]),
    "ppo": (ppo_pmoe, [*PPO, "num_experts=3"]),
    "ppo bounded": (ppo_pmoe, [*PPO, "policy=gaussian", "actions=bounded"]),
    "dac": (dac, PPO),
    "dac largest": (dac, [*PPO, "logger.eval_option=largest"]),
    "two agents": (sac_many_seeds, [*SAC, "num_seeds=2"]),
}
EPISODES, STEPS = 2, 30
WAYS = "deterministic, drawn, stochastic, committed"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains one of the runs, once: its directory, and the agents as they are in memory."""
    made = {}

    def train(name):
        if name not in made:
            recipe, overrides = RUNS[name]
            run, agents, transforms = tmp_path_factory.mktemp("run"), [], []
            with (
                pytest.MonkeyPatch.context() as patch,
                redirect_stdout(StringIO()),
                redirect_stderr(StringIO()),
            ):
                build, make = recipe.build_agent, getattr(recipe, "build_env", None)

                def build_agent(*given):
                    actor, *_, loss = built = build(*given)
                    agents.append(SimpleNamespace(actor=actor, loss=loss))
                    return built

                patch.setattr(recipe, "build_agent", build_agent)
                if make is not None:
                    patch.setattr(recipe, "build_env", lambda cfg: transforms.append(make(cfg)) or transforms[-1])
                evaluated = [f"logger.eval_episodes={EPISODES}", f"logger.eval_max_steps={STEPS}"]
                recipe_runs.run_here(recipe, run, *overrides, "seed=3", *evaluated)
            for agent, (_, transform) in zip(agents, transforms, strict=False):
                agent.transform = transform
            made[name] = run, agents
        return made[name]

    return train


def normalized(agent, observation):
    """By the statistics that the training ended with."""
    if not hasattr(agent, "transform"):
        return observation
    found = agent.transform.observations
    return ((observation - found.mean) / (found.var + 1e-8).sqrt()).clamp(-10, 10).float()


def seen(name, number=50):
    """Observations as the environment of a run has them."""
    torch.manual_seed(1)
    return torch.randn(number, 11 if name == "gating" else 3)


def raw(name, action):
    return action.clamp(-1, 1) * (1.0 if name == "gating" else 2.0)


def asked(actor, observation, kind=ExplorationType.DETERMINISTIC):
    with torch.no_grad(), set_exploration_type(kind):
        return actor(TensorDict(observation=observation, batch_size=observation.shape[:1]))["action"]


def loaded_action(policy, observation):
    return policy(TensorDict(observation=observation, batch_size=observation.shape[:1]))["action"]


@pytest.mark.parametrize("name", RUNS)
def test_a_loaded_policy_has_the_returns_that_its_run_has_written_down(name, trained):
    run, agents = trained(name)
    for seed in range(3, 3 + len(agents)):
        policy = load_policy(run, agent=seed)
        directory = run / f"seed{seed}" if name == "two agents" else run
        with (directory / "metrics.csv").open(newline="") as file:
            row = list(csv.DictReader(file))[-1]
        evaluator = Evaluator(
            policy.env, policy.in_unit_box, episodes=EPISODES, max_steps=policy.max_steps, seed=seed + 1_000_000
        )
        returns = evaluator()
        assert returns.mean().item() == pytest.approx(float(row["return_mean"]), rel=1e-5)
        assert returns.std(correction=0).item() == pytest.approx(float(row["return_std"]), rel=1e-4)
        evaluator.close()


@pytest.mark.parametrize("name", ["pmoe", "gaussian", "gating", "ppo", "ppo bounded"])
@pytest.mark.parametrize("kind", ["deterministic", "stochastic"])
def test_a_loaded_policy_reads_and_writes_the_units_of_the_environment(name, kind, trained):
    run, (agent,) = trained(name)
    policy, observation = load_policy(run, act=kind), seen(name)
    exploration = ExplorationType.RANDOM if kind == "stochastic" else ExplorationType.DETERMINISTIC
    torch.manual_seed(5)
    expected = raw(name, asked(agent.actor, normalized(agent, observation), exploration))
    torch.manual_seed(5)
    torch.testing.assert_close(loaded_action(policy, observation), expected, rtol=1e-4, atol=1e-5)
    assert policy.kind == kind


@pytest.mark.parametrize("name", ["pmoe", "ppo"])
def test_a_drawn_expert_acts_by_its_mean_and_is_drawn_by_the_router(name, trained):
    run, (agent,) = trained(name)
    policy, observation = load_policy(run, act="drawn"), seen(name, 1).expand(4000, 3).clone()
    with torch.no_grad():
        states = TensorDict(observation=normalized(agent, observation[:1]), batch_size=[1])
        dist = agent.actor.get_dist(states)
        means, probs = raw(name, dist.expert_mode[0]), dist.logits.softmax(-1)[0]
    action = loaded_action(policy, observation)
    near = (action.unsqueeze(1) - means).abs().squeeze(-1)  # [4000, K]
    assert near.amin(1).max() < 1e-5
    torch.testing.assert_close(near.argmin(1).bincount(minlength=3) / 4000, probs, rtol=0, atol=0.04)


@pytest.mark.parametrize(("given", "length"), [({}, 7), ({"act": "committed", "commit_steps": 4}, 4),
                                               ({"commit_steps": "episode"}, STEPS)])  # fmt: skip
def test_a_committed_expert_keeps_acting_in_an_environment(given, length, trained):
    run, (agent,) = trained("committed")
    policy = load_policy(run, **given)
    assert policy.kind == "committed"
    torch.manual_seed(6)
    played = GymEnv("Pendulum-v1").rollout(STEPS, policy)
    experts = played["expert"].squeeze(-1)
    if length < STEPS:
        assert len(set(experts[::length].tolist())) > 1
    assert [len(set(part.tolist())) for part in experts.split(length)] == [1] * -(-STEPS // length)
    with torch.no_grad():
        means = raw("committed", agent.actor.get_dist(played.select("observation")).expert_mode)  # [T, K, 1]
    expected = means[torch.arange(STEPS), experts]
    torch.testing.assert_close(played["action"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pmoe", "ppo", "gating"])
def test_one_expert_acts_alone_by_its_mean(name, trained):
    run, (agent,) = trained(name)
    observation = seen(name)
    with torch.no_grad():
        _, loc, _ = agent.actor._experts()(normalized(agent, observation))
    bounded = name != "ppo"
    for expert in range(3):
        expected = raw(name, loc[:, expert].tanh() if bounded else loc[:, expert])
        action = loaded_action(load_policy(run, act=expert), observation)
        torch.testing.assert_close(action, expected, rtol=1e-4, atol=1e-5)


def test_the_critics_choose_where_they_did_in_training(trained):
    run, (agent,) = trained("best_of_experts")
    policy, observation = load_policy(run), seen("best_of_experts")
    with torch.no_grad():
        proposals = agent.actor.get_dist(TensorDict(observation=observation, batch_size=50)).expert_mode
    network, values = agent.loss.qvalue_network, torch.empty(50, 3)
    for expert in range(3):
        critics = []
        for params in agent.loss.qvalue_network_params.data.unbind(0):
            with torch.no_grad(), params.to_module(network, preserve_module_state=False):
                critics.append(network(observation, proposals[:, expert]).squeeze(-1))
        values[:, expert] = torch.stack(critics).amin(0)
    chosen = values.argmax(-1)
    assert len(chosen.unique()) > 1
    expected = raw("best_of_experts", proposals[torch.arange(50), chosen])
    torch.testing.assert_close(loaded_action(policy, observation), expected, rtol=1e-4, atol=1e-5)


def test_options_are_carried_from_step_to_step(trained):
    """Along an episode of the environment as it was made, the likeliest option each time."""
    run, (agent,) = trained("dac largest")
    policy, env = load_policy(run), GymEnv("Pendulum-v1")
    env.set_seed(0)
    played = env.rollout(20, policy)
    option = None
    for step in played:
        with torch.no_grad():
            high = agent.actor.get_policy(
                TensorDict(observation=normalized(agent, step["observation"])[None], batch_size=1)
            )
        probs = high.logits.softmax(-1)[0]
        if option is not None:
            ends = high.termination_logits.sigmoid()[0, option]
            probs = ends * probs + (1 - ends) * nn.functional.one_hot(torch.tensor(option), len(probs))
        option = int(probs.argmax())
        torch.testing.assert_close(step["action"], 2 * high.loc[0, option].clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_a_loaded_policy_plays_in_an_environment_of_float64(trained):
    run, (agent,) = trained("gating")
    env = GymEnv("Hopper-v4")
    played = env.rollout(5, load_policy(run))
    assert played["observation"].dtype == torch.float64
    torch.testing.assert_close(
        played["action"], asked(agent.actor, played["observation"].float()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("act", ["deterministic", "drawn", "stochastic", 1])
def test_a_loaded_policy_plays_in_one_environment_and_in_several(act, trained):
    policy = load_policy(trained("pmoe")[0], act=act)
    assert GymEnv("Pendulum-v1").rollout(3, policy)["action"].shape == (3, 1)
    assert SerialEnv(2, lambda: GymEnv("Pendulum-v1")).rollout(3, policy)["action"].shape == (2, 3, 1)
    # and keeps nothing of the steps
    assert policy.watched.pop() == (None, None)


def test_a_path_may_be_relative_and_a_policy_tells_where_it_is_from(trained, monkeypatch):
    run, _ = trained("pmoe")
    policy = load_policy(str(run))
    assert (policy.env, policy.env_kwargs, policy.seed, policy.kind, policy.max_steps) == (
        "Pendulum-v1", {}, 3, "deterministic", STEPS,
    )  # fmt: skip
    checkpoint = run / "checkpoints" / "checkpoint-000000000060"
    assert policy.checkpoint == checkpoint
    assert load_policy(checkpoint).checkpoint == checkpoint
    monkeypatch.chdir(run / "checkpoints")
    assert load_policy(checkpoint.name).checkpoint.samefile(checkpoint)


def test_nothing_of_the_process_is_changed(trained):
    run, _ = trained("best_of_experts")
    checks = torch.distributions.Distribution._validate_args
    torch.set_num_threads(3)
    torch.distributions.Distribution.set_default_validate_args(True)
    torch.manual_seed(4)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    try:
        policy = load_policy(run)
        assert torch.get_num_threads() == 3
        assert torch.distributions.Distribution._validate_args
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
        assert random.getstate() == before[2]
        assert torch.is_grad_enabled()
        assert not loaded_action(policy, seen("best_of_experts")).requires_grad
    finally:
        torch.set_num_threads(1)
        torch.distributions.Distribution.set_default_validate_args(checks)


# ------------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"agent": 7}, "agent=7: must be one of the seeds 3"),
        ({"act": "wildly"}, f"act='wildly': must be one of {WAYS} or the number of an expert"),
        ({"commit_steps": 5}, "commit_steps=5: must be left out with act=deterministic, where no expert keeps acting"),
        ({"act": 3}, f"act=3: must be one of {WAYS} or an expert below 3"),
        ({"act": -1}, f"act=-1: must be one of {WAYS} or an expert below 3"),
        ({"act": True}, f"act=True: must be one of {WAYS} or the number of an expert"),
    ],
)
def test_what_a_run_does_not_have_is_told_in_one_line(given, line, trained):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_policy(trained("pmoe")[0], **given)
    assert str(error.value) == line


@pytest.mark.parametrize("name", ["gaussian", "dac"])
def test_a_policy_without_experts_has_none_to_act(name, trained):
    with pytest.raises(ValueError, match=r"^act=0: must be one of deterministic, drawn, stochastic$"):
        load_policy(trained(name)[0], act=0)


def test_one_of_several_agents_must_be_named(trained):
    run, _ = trained("two agents")
    for given, line in (({}, "agent: must be given, one of"), ({"agent": 5}, "agent=5: must be one of")):
        with pytest.raises(ValueError, match=f"^{line} the seeds 3, 4$"):
            load_policy(run, **given)


def test_a_run_without_a_checkpoint_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=f"^{tmp_path} has no checkpoint$"):
        load_policy(tmp_path)
    checkpoint = VerifiedCheckpoint(net=nn.Linear(2, 1)).save(tmp_path / "checkpoints" / "checkpoint-000000000001")
    with pytest.raises(CheckpointError, match="agents") as error:
        load_policy(checkpoint)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- blueprints

SPEC = Bounded(-torch.ones(2), torch.ones(2), (2,))


def saved(directory, actor):
    """A checkpoint of an actor alone."""
    parts = PolicyParts(actor, 0, "Pendulum-v1", {}, "deterministic", low=-torch.ones(2), high=torch.ones(2))
    checkpoint = VerifiedCheckpoint()
    SavedPolicies([parts]).register(checkpoint)
    return checkpoint.save(directory / "checkpoints" / "checkpoint-000000000001")


def test_what_was_noted_is_made_again():
    given = {"num_cells": [5], "activation_class": nn.ELU}
    layer = construct(MLP, in_features=3, out_features=2, device="cpu", **given)
    note = json.loads(layer.blueprint)
    assert note == {
        "new": "torchrl.modules.models.models.MLP",
        "args": [],
        "kwargs": {
            "in_features": 3,
            "out_features": 2,
            "num_cells": [5],
            "activation_class": {"class": "torch.nn.modules.activation.ELU"},
        },
    }


def test_an_actor_is_made_on_the_device_that_is_asked_for(device, tmp_path):
    actor = construct(PMOEActor, 2, spec=SPEC, in_features=3, router=construct(nn.Linear, 3, 2), num_cells=(4,))
    policy = load_policy(saved(tmp_path, actor), device=device)
    assert {parameter.device.type for parameter in policy.actor.parameters()} == {device.type}
    observation = torch.randn(5, 3)
    action = loaded_action(policy, observation.to(device))
    assert action.device.type == device.type
    torch.testing.assert_close(action.cpu(), asked(actor, observation))


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.Popen",
        "builtins.exec",
        "os.system",
        "torch.nn.modules.nope.Nope",
        "torch.nn.modules.module.Nope",
        # a class that such a module has imported
        "torch.nn.modules.module.OrderedDict",
        "torch.nn.modules.module.functools.partial",
        "tensordict.nn.common.Path",
        # no module of a network: reads a file, starts an environment, loads from the net
        "torchrl.envs.libs.gym.GymEnv",
        "torchrl.record.loggers.csv.CSVLogger",
        "torchrl.envs.transforms.r3m.R3MTransform",
        "torchrl.modules.llm.policies.transformers_wrapper.TransformersWrapper",
        # no module at all
        "torchrl.modules.distributions.continuous.TanhNormal",
        "torchrl_pmoe_evil.Layer",
        "",
        "Linear",
    ],
)
def test_a_blueprint_names_networks_and_nothing_else(name, tmp_path):
    actor = construct(nn.Linear, 3, 2)
    actor.blueprint = json.dumps({"new": name, "args": [], "kwargs": {}})
    checkpoint = saved(tmp_path, actor)
    with pytest.raises(CheckpointError) as error:
        load_policy(checkpoint)
    assert str(error.value) == f"{name} is no class that a policy is made of"


@pytest.mark.parametrize("name", ["subprocess.Popen", "torchrl.envs.libs.gym.GymEnv", "torch.nn.modules.module.Any"])
def test_a_class_in_a_blueprint_is_one_of_networks_and_distributions(name, tmp_path):
    actor = construct(MLP, in_features=3, out_features=2, activation_class=nn.ELU)
    actor.blueprint = actor.blueprint.replace("torch.nn.modules.activation.ELU", name)
    with pytest.raises(CheckpointError, match="is no class that a policy is made of"):
        load_policy(saved(tmp_path, actor))


class Own(nn.Linear):
    """A user's."""


def test_what_cannot_be_made_again_is_refused_at_once():
    for given in ({"activation_class": Own}, {"activation_class": gym.Env}, {"activation_class": lambda: nn.ELU()}):
        with pytest.raises(TypeError, match=r"^construct: "):
            construct(MLP, in_features=3, out_features=2, **given)
    with pytest.raises(TypeError, match=r"^construct: .*Own is no class of PyTorch, "):
        construct(Own, 3, 2)
    assert construct(MLP, in_features=3, out_features=2, activation_class=TanhNormal, depth=0).blueprint


def test_an_actor_of_ones_own_is_given_and_takes_the_weights(tmp_path):
    def make(cells):
        return PMOEActor(2, spec=SPEC, in_features=3, num_cells=cells)

    actor = make((4,))
    checkpoint, observation = saved(tmp_path, actor), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"^actor: must be given, the run's own was not made by "):
        load_policy(checkpoint)
    policy = load_policy(checkpoint, actor=make((4,)))
    torch.testing.assert_close(loaded_action(policy, observation), asked(actor, observation))
    with pytest.raises(ValueError, match=r"^actor: must have the parameters of the run's own ") as error:
        load_policy(checkpoint, actor=make((5,)))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- programs


def program_of(policy, path):
    """From observations and noise to actions, by ONNX Runtime or PyTorch alone."""
    policy.export(path)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(one.name, one.shape[0]) for one in session.get_outputs()] == [("action", "batch")]
    return lambda observation, **noise: torch.from_numpy(
        session.run(None, {key: x.numpy() for key, x in {"observation": observation, **noise}.items()})[0]
    )


@pytest.mark.parametrize(
    ("name", "act", "noise", "suffix"),
    [
        ("pmoe", "deterministic", [], ".pt2"),
        ("pmoe", "stochastic", ["normal", "uniform"], ".onnx"),
        ("gaussian", "stochastic", ["normal"], ".onnx"),
        ("gating", "deterministic", [], ".pt2"),
        ("ppo", "stochastic", ["normal", "uniform"], ".pt2"),
        ("ppo", "drawn", ["uniform"], ".onnx"),
        ("ppo", 1, [], ".onnx"),
    ],
)
def test_a_program_acts_as_the_policy_does(name, act, noise, suffix, trained, tmp_path):
    policy, observation = load_policy(trained(name)[0], act=act), 3 * seen(name, 40)
    if name == "gating":  # Hopper shows float64
        observation = observation.double()
    torch.manual_seed(7)
    expected = loaded_action(policy, observation)
    torch.manual_seed(7)
    drawn = {
        "normal": lambda: torch.randn(40, 1) if name == "gaussian" else torch.randn(40, 3, 1),
        "uniform": lambda: torch.rand(40, 1),
    }
    given = {key: drawn[key]() for key in noise}
    program = program_of(policy, tmp_path / "deeper" / f"policy{suffix}")
    torch.testing.assert_close(program(observation, **given), expected, rtol=0, atol=1e-5)
    # one state alone, and the policy as it was
    one = program(observation[:1], **{key: x[:1] for key, x in given.items()})
    torch.testing.assert_close(one, expected[:1], rtol=0, atol=1e-5)
    torch.manual_seed(7)
    assert torch.equal(loaded_action(policy, observation), expected)
    # units, normalisation and the choice of an expert are at work
    assert expected.abs().max() > (0.1 if name == "gating" else 1.0)


def test_a_program_needs_pytorch_alone_and_leaves_the_generator_as_it_was(trained, tmp_path):
    policy = load_policy(trained("pmoe")[0], act="drawn")
    before = torch.get_rng_state()
    policy.export(tmp_path / "policy.pt2")
    assert torch.equal(torch.get_rng_state(), before)
    code = (
        "import sys, torch\n"
        f"act = torch.export.load({str(tmp_path / 'policy.pt2')!r}).module()\n"
        "action = act(torch.zeros(5, 3), uniform=torch.rand(5, 1))\n"
        "print(tuple(action.shape), action.requires_grad, {'tensordict', 'torchrl', 'torchrl_pmoe'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(5, 1) False set()\n"


@pytest.mark.parametrize(
    ("name", "act", "line"),
    [
        ("committed", None, "act=committed: cannot be exported, because it carries who acts from step to step; one "
                            "expert can be: act=0"),
        ("dac", "stochastic", "act=stochastic: cannot be exported, because it carries who acts from step to step"),
        ("best_of_experts", None, "act=deterministic: cannot be exported, because critics choose its actions; one "
                                  "expert can be: act=0"),
    ],
)  # fmt: skip
def test_a_policy_that_no_program_can_be_is_refused_in_one_line(name, act, line, trained, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_policy(trained(name)[0], act=act).export(tmp_path / "policy.pt2")
    assert str(error.value) == line
    assert not any(tmp_path.iterdir())


def test_a_program_in_another_format_or_without_its_packages_is_refused(trained, tmp_path, monkeypatch):
    policy = load_policy(trained("pmoe")[0])
    with pytest.raises(ValueError, match=r"policy\.pt: must end in \.pt2 \(torch\.export\) or \.onnx$"):
        policy.export(tmp_path / "policy.pt")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs onnx and onnxscript: pip install 'torchrl_pmoe\[onnx\]'$"):
        policy.export(tmp_path / "policy.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("draw", "line"),
    [
        (lambda x: torch.randn(len(x), 2) + torch.randn(len(x), 2), "draws normal numbers more than once"),
        (lambda x: x[:, :2].exp().multinomial(1).float(), "draws by aten.multinomial"),
    ],
)
def test_what_is_drawn_in_another_way_is_refused(draw, line, tmp_path):
    policy = TensorDictModule(draw, in_keys=["observation"], out_keys=["action"])
    with pytest.raises(ValueError, match=f"^a policy that {line}.* cannot be exported$"):
        export.export_policy(policy, tmp_path / "policy.pt2", torch.zeros(2, 3))


# ----------------------------------------------------------------------------------------- cards, and the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub: repositories as folders, and a cache of links to files, as the Hub's own is."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    api, server = create_autospec(huggingface_hub.HfApi), tmp_path / "server"

    def create_repo(repo_id, *, exist_ok, private):
        (server / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(*, repo_id, folder_path, delete_patterns, commit_message):
        for old in [path for path in (server / repo_id).rglob("*") if path.is_file()]:
            if any(fnmatch(old.relative_to(server / repo_id).as_posix(), pattern) for pattern in delete_patterns):
                old.unlink()
        shutil.copytree(folder_path, server / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        if not (server / repo_id).is_dir():
            raise FileNotFoundError(f"404 Client Error\n{repo_id}")
        cache = tmp_path / "cache" / str(revision) / str(len([*tmp_path.glob("cache/*/*")]))
        for file in (path for path in (server / repo_id).rglob("*") if path.is_file()):
            name = file.relative_to(server / repo_id)
            if fnmatch(name.as_posix(), allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (cache / name).symlink_to(file)
        return str(cache)

    api.return_value.create_repo.side_effect = create_repo
    api.return_value.upload_folder.side_effect = upload_folder
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    download = create_autospec(huggingface_hub.snapshot_download, side_effect=snapshot_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return server


@pytest.mark.parametrize("name", ["ppo", "two agents"])
def test_a_pushed_run_is_loaded_from_the_hub_without_what_training_needs(name, trained, hub):
    run, agents = trained(name)
    assert push_to_hub(run, "me/pendulum") == "https://hub/me/pendulum/commit/1"
    (checkpoint,) = (hub / "me" / "pendulum" / "checkpoints").iterdir()
    assert [path.name for path in checkpoint.glob("components/*/*")] == ["state.pt"]
    for seed in range(3, 3 + len(agents)):
        ours, theirs = (load_policy(one, agent=seed) for one in (run, "hf://me/pendulum"))
        actions = []
        for policy in (ours, theirs):
            observation = seen(name)  # what it draws is the same, too
            actions.append(loaded_action(policy, observation))
        assert torch.equal(*actions)
        assert (theirs.env, theirs.kind, theirs.max_steps) == (ours.env, ours.kind, ours.max_steps)
    pushed = {path.relative_to(hub / "me" / "pendulum").as_posix() for path in (hub / "me").rglob("*.csv")}
    assert pushed == ({"metrics.csv"} if len(agents) == 1 else {"seed3/metrics.csv", "seed4/metrics.csv"})


def test_a_run_from_the_hub_can_be_evaluated_by_its_recipe(trained, hub):
    push_to_hub(trained("pmoe")[0], "me/pendulum")
    config, checkpoint = resume.open_run(hub / "me" / "pendulum")
    assert (config["env"], checkpoint.name) == ("Pendulum-v1", "checkpoint-000000000060")


def test_a_push_replaces_the_run_that_was_there(trained, hub):
    for name in ("ppo", "two agents", "pmoe"):  # the first one has more frames
        push_to_hub(trained(name)[0], "me/pendulum")
    there = {path.relative_to(hub / "me" / "pendulum").as_posix() for path in (hub / "me").rglob("*") if path.is_file()}
    records = {name for name in there if not name.startswith("checkpoints/")}
    assert records == {"README.md", "config.yaml", "metrics.csv", "learning_curve.png"}
    assert load_policy("hf://me/pendulum").checkpoint.name == "checkpoint-000000000060"
    assert "cache/v1" in load_policy("hf://me/pendulum@v1").checkpoint.as_posix()


def test_what_is_not_on_the_hub_is_told_in_one_line(trained, hub, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"^hf://me/nothing cannot be read: 404 Client Error me/nothing$"):
        load_policy("hf://me/nothing")
    with pytest.raises(CheckpointError, match=r"has no checkpoint$"):
        push_to_hub(tmp_path, "me/nothing")
    import huggingface_hub

    refused = huggingface_hub.errors.HTTPError("no\nroute")
    monkeypatch.setattr(huggingface_hub.HfApi.return_value.create_repo, "side_effect", refused)
    with pytest.raises(OSError, match=r"^me/pendulum cannot be written: no route$"):
        push_to_hub(trained("pmoe")[0], "me/pendulum")
    monkeypatch.setattr(hub_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^hf://me/it: needs .* pip install 'torchrl_pmoe\[hub\]'$"):
        load_policy("hf://me/it")


@pytest.mark.parametrize("name", ["pmoe", "two agents"])
def test_the_card_of_a_run_says_what_the_hub_asks_for(name, trained):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    run, agents = trained(name)
    card = huggingface_hub.ModelCard.load(run / "model_card.md")
    header = card.data.to_dict()
    assert (header["library_name"], header["tags"][-1]) == ("torchrl_pmoe", "Pendulum-v1")
    for seed, result in zip(range(3, 3 + len(agents)), card.data.eval_results, strict=True):
        directory = run if name == "pmoe" else run / f"seed{seed}"
        with (directory / "metrics.csv").open(newline="") as file:
            row = list(csv.DictReader(file))[-1]
        assert (result.task_type, result.dataset_type, result.metric_type, result.metric_name) == (
            "reinforcement-learning", "Pendulum-v1", "mean_reward", f"mean_reward, seed {seed}",
        )  # fmt: skip
        mean, std = (float(number) for number in result.metric_value.split(" +/- "))
        assert mean == pytest.approx(float(row["return_mean"]), abs=0.01)
        assert std == pytest.approx(float(row["return_std"]), abs=0.01)
    assert f"| frames | {int(row['frames'])}" in card.text
    assert f"torch {torch.__version__}" in card.text
    where = Path(__file__).parents[2]
    if (where / ".git").exists() and shutil.which("git"):
        head = subprocess.run(["git", "-C", str(where), "rev-parse", "HEAD"], capture_output=True, text=True)
        assert f"| commit | {head.stdout.strip()}" in card.text
