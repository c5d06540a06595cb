"""DACLoss against PPO where there is one option, and against loops written out."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from objectives.helpers import ACTION, OBSERVATION, assert_compiled_equals_eager, moved_by, total
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Unbounded
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss, ValueEstimators
from torchrl.objectives.value import GAE

from torchrl_pmoe.baselines.dac import DACLoss
from torchrl_pmoe.baselines.double_gae import DoubleGAE, double_advantage_estimate
from torchrl_pmoe.baselines.options import OptionActor

K = 3
F64 = torch.float64
EXACT = 1e-6  # TorchRL's vectorised advantages decay in single precision
LOSSES = ("loss_objective_high", "loss_objective_low", "loss_entropy", "loss_critic")


def make_actor(num_options=K, bounded=False, **kwargs):
    spec = Bounded(-1, 1, (ACTION,), dtype=F64) if bounded else Unbounded((ACTION,), dtype=F64)
    kind = TanhNormal if bounded else IndependentNormal
    actor = OptionActor(
        num_options,
        spec=spec,
        in_features=OBSERVATION,
        num_cells=(8,),
        head_init=0.5,
        distribution_class=kind,
        **kwargs,
    )
    nn.init.normal_(actor.network.module.log_scale, std=0.5)
    return actor.double()


def make_critic(num_options=K, key="option_value"):
    mlp = MLP(in_features=OBSERVATION, out_features=num_options, num_cells=[8], activation_class=nn.Tanh)
    return ValueOperator(mlp.double(), in_keys=["observation"], out_keys=[key])


def make_rollout(actor, *batch, ratio=0.3):
    """Trajectories ``[*B, T]`` in which some steps terminate, some truncate, and most go on."""
    end = torch.rand(*batch, 1)
    done, terminated = end < 0.4, end < 0.2
    is_init = torch.cat((torch.ones_like(done[..., :1, :]), done[..., :-1, :]), -2)
    observation, following = torch.randn(2, *batch, OBSERVATION, dtype=F64)
    goes_on = ~done[..., :-1, :]
    following[..., :-1, :] = torch.where(goes_on, observation[..., 1:, :], following[..., :-1, :])
    td = TensorDict(
        {
            "observation": observation,
            "is_init": is_init,
            "previous_option": torch.randint(actor.num_options, (*batch, 1)),
            "next": {
                "observation": following,
                "reward": torch.randn(*batch, 1, dtype=F64),
                "done": done,
                "terminated": terminated,
            },
        },
        batch,
    )
    with torch.no_grad():
        actor(td)
    for key in ("option_log_prob", "action_log_prob"):  # ratios on both sides of every clip
        td[key] = td[key] + ratio * torch.randn(batch, dtype=F64)
    return td


def generalized_advantage(value, following, reward, done, terminated, gamma, lmbda):
    """``[T]``, the definition in a loop."""
    advantage, last = np.zeros_like(value), 0.0
    for t in reversed(range(len(value))):
        delta = reward[t] + gamma * following[t] * (not terminated[t]) - value[t]
        last = delta + gamma * lmbda * last * (not done[t])
        advantage[t] = last
    return advantage


# ---------------------------------------------------------------------- one option


class OneGaussian(nn.Module):
    """Loc and scale of an actor's only option."""

    def __init__(self, actor):
        super().__init__()
        self.actor = actor

    def forward(self, observation):
        policy = self.actor.get_policy(TensorDict({"observation": observation}, observation.shape[:-1]))
        return policy.loc.squeeze(-2), policy.scale.squeeze(-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_advantage": True, "loss_critic_type": "l2", "clip_value": True, "critic_coeff": 0.25},
        {"clip_epsilon": 0.1, "clip_value": 0.05, "reduction": "sum", "entropy_coeff": 0.3},
        {"loss_critic_type": "l1", "reduction": "none"},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_with_one_option_it_is_ppo(options):
    torch.manual_seed(0)
    ours, critic = make_actor(1), make_critic(1)
    theirs, value = copy.deepcopy(ours), copy.deepcopy(critic)
    value = ValueOperator(value.module, in_keys=["observation"])
    gaussian = ProbabilisticActor(
        TensorDictModule(OneGaussian(theirs), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    batch = make_rollout(ours, 60)
    DoubleGAE(ours, critic, gamma=0.9, lmbda=0.8)(batch)
    # the value has moved since, further than the clip
    batch["option_value"] = batch["option_value"] + 0.3 * torch.randn(60, 1, dtype=F64)
    batch["advantage"], batch["state_value"] = batch["advantage_low"], batch["option_value"]
    found = DACLoss(ours, critic, high_entropy_coeff=0.7, **options)(batch)
    expected = ClipPPOLoss(gaussian, value, **options)(batch)
    names = {"loss_objective_low": "loss_objective"}
    for key in found.keys() & {"loss_objective_low", *expected.keys()}:
        torch.testing.assert_close(found[key], expected[names.get(key, key)].reshape(found[key].shape), msg=key)
    assert found["clip_fraction"] > 0.1
    assert ("value_clip_fraction" in found) == ("clip_value" in options)
    high = found["loss_objective_high"]
    assert (high == 0).all()
    assert not high.requires_grad
    assert found["entropy_high"] == 0
    total(found).backward()
    total(expected).backward()
    shared = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if ".router." in name:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, shared[name].grad)
    for mine, other in zip(critic.parameters(), value.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_with_one_option_the_advantages_are_those_of_ppo():
    actor, critic = make_actor(1), make_critic(1)
    batch = make_rollout(actor, 2, 40)
    value = ValueOperator(critic.module, in_keys=["observation"])
    GAE(gamma=0.9, lmbda=0.8, value_network=value)(batch)
    target = batch["value_target"].clone()
    DoubleGAE(actor, critic, gamma=0.9, lmbda=0.8)(batch)
    for key in ("advantage_high", "advantage_low"):
        torch.testing.assert_close(batch[key], batch["advantage"])
    torch.testing.assert_close(batch["value_target"], target)


# ---------------------------------------------------------------------- advantages


def test_advantages_of_both_levels_are_the_definitions_in_a_loop():
    """Terminated and truncated in the middle, and several trajectories cut off by the end of the batch."""
    torch.manual_seed(1)
    gamma, lmbda, batch, time = 0.9, 0.8, 3, 50
    value, following = torch.randn(2, batch, time, K, dtype=F64)
    prob, next_prob = torch.rand(2, batch, time, K, dtype=F64).softmax(-1)
    option = torch.randint(K, (batch, time, 1))
    reward, end = torch.randn(batch, time, 1, dtype=F64), torch.rand(batch, time, 1)
    done, terminated = end < 0.4, end < 0.2
    assert (done & ~terminated).any()
    assert not done[:, -1].all()
    found = double_advantage_estimate(gamma, lmbda, value, following, prob, next_prob, option, reward, done, terminated)
    for b in range(batch):
        ends, stops, gains = (x[b, :, 0].numpy() for x in (done, terminated, reward))
        high = (prob[b] * value[b]).sum(-1).numpy()
        low = np.array([value[b, t, option[b, t, 0]] for t in range(time)])
        mean = (next_prob[b] * following[b]).sum(-1).numpy()
        known = [t + 1 < time and not ends[t] for t in range(time)]
        next_low = np.array([low[t + 1] if known[t] else mean[t] for t in range(time)])
        expected_high = generalized_advantage(high, mean, gains, ends, stops, gamma, lmbda)
        expected_low = generalized_advantage(low, next_low, gains, ends, stops, gamma, lmbda)
        for ours, expected in zip(found, (expected_high, expected_low, expected_low + low), strict=True):
            np.testing.assert_allclose(ours[b, :, 0].numpy(), expected, atol=EXACT)


def test_what_follows_is_seen_with_the_option_that_was_taken():
    """``v^H(o_t, s_t+1)`` continues ``o_t``, whatever ``is_init`` and the option before say."""
    actor, critic = make_actor(), make_critic()
    batch = make_rollout(actor, 1)
    batch["next", "done"][:] = batch["next", "terminated"][:] = False
    DoubleGAE(actor, critic, gamma=0.9, lmbda=0.8)(batch)
    after = batch["next"].select("observation")
    after.update({"previous_option": batch["option"], "is_init": torch.zeros(1, 1, dtype=torch.bool)})
    following = (actor.get_dist_high(after).probs * critic(after)["option_value"]).sum()
    taken = batch["option_value"][0, batch["option"].item()]
    torch.testing.assert_close(batch["advantage_low"][0, 0], batch["next", "reward"][0, 0] + 0.9 * following - taken)


def test_advantages_and_targets_have_no_gradient():
    actor, critic = make_actor(), make_critic()
    batch = make_rollout(actor, 2, 5)
    DoubleGAE(actor, critic, gamma=0.9, lmbda=0.8)(batch)
    for key in ("advantage_high", "advantage_low", "value_target", "option_value"):
        assert not batch[key].requires_grad


def test_the_loss_finds_missing_advantages_itself():
    actor, critic = make_actor(), make_critic()
    batch = make_rollout(actor, 2, 9)
    loss = DACLoss(actor, critic)
    loss.make_value_estimator(gamma=0.7, lmbda=0.6)
    found = loss(batch.copy())
    DoubleGAE(actor, critic, gamma=0.7, lmbda=0.6)(batch)
    for key, expected in loss(batch).items():
        torch.testing.assert_close(found[key], expected)


# ---------------------------------------------------------------------- the loss


def prepared(actor, critic, size=40):
    torch.manual_seed(2)
    batch = make_rollout(actor, size)
    return DoubleGAE(actor, critic, gamma=0.9, lmbda=0.8)(batch)


def clipped_surrogate(ratio, advantage, epsilon=0.2):
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


@pytest.mark.parametrize("normalize", [False, True])
def test_losses_follow_their_formulas(normalize):
    actor, critic = make_actor(), make_critic()
    batch = prepared(actor, critic)
    loss = DACLoss(
        actor,
        critic,
        reduction="none",
        entropy_coeff=0.25,
        high_entropy_coeff=0.5,
        critic_coeff=0.125,
        loss_critic_type="l2",
        normalize_advantage=normalize,
    )
    found = loss(batch)
    policy = actor.get_policy(batch)
    option = batch["option"].squeeze(-1)
    rows = torch.arange(len(option))
    master, ends = policy.logits.softmax(-1), policy.termination_logits.sigmoid()
    before = batch["previous_option"].squeeze(-1)
    high = ends[rows, before, None] * master
    high[rows, before] += 1 - ends[rows, before]
    high = torch.where(batch["is_init"], master, high)
    normal = torch.distributions.Normal(policy.loc[rows, option], policy.scale[rows, option])
    ratios = {
        "high": high[rows, option] / batch["option_log_prob"].exp(),
        "low": (normal.log_prob(batch["action"]).sum(-1) - batch["action_log_prob"]).exp(),
    }
    for level, ratio in ratios.items():
        advantage = batch[f"advantage_{level}"].squeeze(-1)
        if normalize:
            advantage = (advantage - advantage.mean()) / advantage.std()
        expected = clipped_surrogate(ratio, advantage)
        torch.testing.assert_close(found[f"loss_objective_{level}"], expected, rtol=1e-6, atol=1e-6)
        suffix = "_high" if level == "high" else ""
        torch.testing.assert_close(found[f"kl_approx{suffix}"], -ratio.log().mean())
        outside = ((ratio < 0.8) | (ratio > 1.2)).to(F64).mean()
        torch.testing.assert_close(found[f"clip_fraction{suffix}"], outside)
        torch.testing.assert_close(found[f"ESS{suffix}"], ratio.sum() ** 2 / (ratio**2).sum() / len(ratio))
    entropy_high, entropy = -(high * high.log()).sum(-1), normal.entropy().sum(-1)
    torch.testing.assert_close(found["loss_entropy"], -0.25 * entropy - 0.5 * entropy_high)
    torch.testing.assert_close(found["entropy"], entropy.mean())
    torch.testing.assert_close(found["entropy_high"], entropy_high.mean())
    gap = batch["value_target"].squeeze(-1) - batch["option_value"][rows, option]
    torch.testing.assert_close(found["loss_critic"], 0.125 * gap**2)
    going_on = ~batch["is_init"].squeeze(-1)
    torch.testing.assert_close(found["termination_prob"], ends[rows, before][going_on].mean())
    torch.testing.assert_close(found["option_usage"], torch.bincount(option, minlength=K).to(F64) / len(option))


def test_each_loss_moves_its_own_parameters_alone():
    actor, critic = make_actor(), make_critic()
    losses = DACLoss(actor, critic)(prepared(actor, critic))
    network = actor.network.module
    owners = {
        "router": list(network.router.parameters()),
        "options": [*network.trunk.parameters(), *network.experts.parameters(), network.log_scale],
        "critic": list(critic.parameters()),
    }
    assert moved_by(losses, owners) == {
        "loss_objective_high": {"router"},
        "loss_objective_low": {"options"},
        "loss_entropy": {"router", "options"},
        "loss_critic": {"critic"},
    }


def test_an_option_that_was_not_taken_is_left_alone():
    actor, critic = make_actor(), make_critic()
    batch = prepared(actor, critic)
    batch["option"][:] = 1
    losses = DACLoss(actor, critic, high_entropy_coeff=0.0)(batch)
    (scale,) = torch.autograd.grad(losses["loss_objective_low"], actor.network.module.log_scale, retain_graph=True)
    assert [row.any().item() for row in scale.reshape(K, -1)] == [False, True, False]
    (bias,) = torch.autograd.grad(losses["loss_critic"], list(critic.parameters())[-1])
    assert [entry.item() != 0 for entry in bias] == [False, True, False]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_reductions(reduction):
    actor, critic = make_actor(), make_critic()
    batch = prepared(actor, critic)
    apart = DACLoss(actor, critic, reduction="none")(batch)
    found = DACLoss(actor, critic, reduction=reduction)(batch)
    for key in LOSSES:
        assert apart[key].shape == batch.shape
        torch.testing.assert_close(found[key], apart[key] if reduction == "none" else getattr(apart[key], reduction)())


def test_bounded_actions_have_an_entropy_too():
    actor, critic = make_actor(bounded=True), make_critic()
    losses = DACLoss(actor, critic, entropy_coeff=0.1)(prepared(actor, critic))
    assert all(losses[key].isfinite() for key in LOSSES)
    (gradient,) = torch.autograd.grad(losses["loss_entropy"], actor.network.module.log_scale)
    assert gradient.any()


@pytest.mark.parametrize("clip_value", [None, True])
def test_keys_are_as_announced_and_keywords_stand_in_for_a_tensordict(clip_value):
    actor, critic = make_actor(), make_critic()
    batch = make_rollout(actor, 2, 9)
    loss = DACLoss(actor, critic, clip_value=clip_value)
    expected = loss(batch.copy())
    assert set(expected.keys()) == set(loss.out_keys)
    found = loss(**{"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in loss.in_keys})
    for key, value in zip(loss.out_keys, found, strict=True):
        torch.testing.assert_close(value, expected[key])


def test_keys_can_be_renamed():
    actor, critic = make_actor(), make_critic(key=("values", "q"))
    names = {"option_key": ("hi", "o"), "previous_option_key": ("hi", "before"), "is_init_key": "first"}
    torch.manual_seed(3)
    renamed = make_actor(action_key=("lo", "a"), **names)
    renamed.load_state_dict(actor.state_dict())
    plain = make_critic()
    plain.load_state_dict(critic.state_dict())
    batch = prepared(actor, plain, 12).exclude("advantage_high", "advantage_low", "value_target", "option_value")
    other = batch.copy()
    for old, new in (
        ("option", ("hi", "o")), ("option_log_prob", ("hi", "o_log_prob")), ("previous_option", ("hi", "before")),
        ("is_init", "first"), ("action", ("lo", "a")), ("action_log_prob", ("lo", "a_log_prob")),
        (("next", "reward"), ("next", "gain")),
    ):  # fmt: skip
        other.rename_key_(old, new)
    loss = DACLoss(renamed, critic)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    loss.set_keys(value=("values", "q"), reward="gain", advantage_low="low")
    assert ("next", "gain") in loss.in_keys
    reference = DACLoss(actor, plain)
    reference.make_value_estimator(gamma=0.9, lmbda=0.8)
    found = loss(other)
    for key, expected in reference(batch).items():
        torch.testing.assert_close(found[key], expected)


def test_flat_options_are_read_as_columns_are():
    actor, critic = make_actor(), make_critic()
    batch = make_rollout(actor, 2, 9)
    flat = batch.copy()
    for key in ("option", "previous_option", "is_init"):
        flat[key] = flat[key].squeeze(-1)
    loss = DACLoss(actor, critic)
    found = loss(flat)
    for key, expected in loss(batch).items():
        torch.testing.assert_close(found[key], expected)


def test_compiled_equals_eager():
    actor, critic = make_actor(), make_critic()
    batch = prepared(actor, critic)
    loss = DACLoss(actor, critic, clip_value=True)
    assert_compiled_equals_eager(loss, batch, list(loss.parameters()))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "option",
    [
        {"clip_epsilon": 0.0}, {"clip_epsilon": 1.0}, {"entropy_coeff": -0.1}, {"high_entropy_coeff": math.inf},
        {"critic_coeff": -1.0}, {"loss_critic_type": "l3"}, {"reduction": "median"}, {"clip_value": 0.0},
    ],
    ids=lambda option: str(*option),
)  # fmt: skip
def test_bad_option_is_named_in_one_line(option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"^DACLoss: {name}=") as error:
        DACLoss(make_actor(), make_critic(), **option)
    assert "\n" not in str(error.value)


def test_an_actor_without_options_is_refused():
    with pytest.raises(ValueError, match=r"^DACLoss: actor_network must be an OptionActor, got ValueOperator"):
        DACLoss(make_critic(), make_critic())


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="entropy_coef"):
        DACLoss(make_actor(), make_critic(), entropy_coef=0.1)


@pytest.mark.parametrize("name", ["gamma", "lmbda"])
def test_bad_discount_is_refused(name):
    with pytest.raises(ValueError, match=f"^DoubleGAE: {name}=1.1 must lie in"):
        DoubleGAE(make_actor(), make_critic(), **{"gamma": 0.9, "lmbda": 0.9, name: 1.1})


def test_a_critic_with_another_number_of_values_is_refused():
    actor, critic = make_actor(), make_critic(K + 1)
    batch = make_rollout(actor, 2, 9)
    with pytest.raises(ValueError, match="a value for each of 3 options, got 4"):
        DACLoss(actor, critic)(batch)


def test_a_critic_that_writes_elsewhere_is_refused():
    actor, critic = make_actor(), make_critic(key="state_value")
    batch = make_rollout(actor, 2, 9)
    with pytest.raises(KeyError, match="the critic writes no 'option_value'; it writes 'state_value'"):
        DACLoss(actor, critic)(batch)


def test_missing_values_are_named():
    actor, critic = make_actor(), make_critic()
    batch = prepared(actor, critic)
    with pytest.raises(KeyError, match="there is no 'value_target' in the input"):
        DACLoss(actor, critic)(batch.exclude("value_target"))
    with pytest.raises(KeyError, match="there is no 'option_value' in the input"):
        DACLoss(actor, critic, clip_value=True)(batch.exclude("option_value"))


def test_another_estimator_is_refused():
    with pytest.raises(NotImplementedError, match="must be GAE"):
        DACLoss(make_actor(), make_critic()).make_value_estimator(ValueEstimators.TD0)


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="advantage is no key"):
        DoubleGAE(make_actor(), make_critic(), gamma=0.9, lmbda=0.9).set_keys(advantage="a")
    with pytest.raises(ValueError, match="advantage is not an accepted"):
        DACLoss(make_actor(), make_critic()).set_keys(advantage="a")
