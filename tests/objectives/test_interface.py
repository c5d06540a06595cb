"""How our losses stand in for TorchRL's: the order of what they return, their keys, and options that do not exist."""

from __future__ import annotations

import functools

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import CompositeDistribution, TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss, SACLoss, TQCLoss, ValueEstimators

from objectives.helpers import (
    ACTION,
    OBSERVATION,
    make_actor,
    make_batch,
    make_critic,
    make_onpolicy_batch,
    make_policy,
    make_value,
)
from torchrl_pmoe import (
    GatingActor,
    MCPActor,
    MixtureParamExtractor,
    PMOEActor,
    PMOEClipPPOLoss,
    PMOESACLoss,
    PMOETQCLoss,
    TanhNormalMixture,
)
from torchrl_pmoe.baselines.options import OptionActor

SPEC = Bounded(-1, 1, (ACTION,))


def off_policy(parent, child, outputs):
    def make():
        actor = make_actor()
        torch.manual_seed(0)
        theirs = parent(actor, make_critic(outputs)).double()
        torch.manual_seed(0)
        return theirs, child(actor, make_critic(outputs)).double(), make_batch()

    return make


def on_policy():
    actor, value = make_policy(), make_value()
    torch.manual_seed(0)
    return ClipPPOLoss(actor, value), PMOEClipPPOLoss(actor, value, make_critic()), make_onpolicy_batch(actor)


PAIRS = {
    "SAC": off_policy(SACLoss, PMOESACLoss, 1),
    "TQC": off_policy(TQCLoss, PMOETQCLoss, 5),
    "PPO": on_policy,
}


@pytest.mark.parametrize("pair", PAIRS)
def test_called_with_keywords_the_parents_outputs_come_first(pair):
    """tensordict's dispatch returns a tuple, of which scripts unpack the parent's part by position."""
    torch.manual_seed(0)
    theirs, ours, batch = PAIRS[pair]()
    found = {}
    for loss in (theirs, ours):
        loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
        torch.manual_seed(1)
        keywords = {"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in loss.in_keys}
        found[loss] = loss(**keywords)
    shared = len(theirs.out_keys)
    assert ours.out_keys[:shared] == theirs.out_keys
    assert ours.out_keys[shared:] == list(ours._own_out_keys)
    assert len(found[ours]) == len(ours.out_keys)
    # what does not depend on how experts are drawn has the parent's number, in the parent's place
    same = "loss_qvalue" if pair != "PPO" else "loss_objective"
    place = theirs.out_keys.index(same)
    torch.testing.assert_close(found[ours][place], found[theirs][place])
    assert [x.shape for x in found[ours][:shared]] == [x.shape for x in found[theirs]]
    # the loss itself names them alike
    whole = ours(batch.copy())
    assert set(whole.keys()) - {"explained_variance"} == set(ours.out_keys)
    # it depends on the states alone
    torch.testing.assert_close(found[ours][-2], whole["expert_usage"])


@pytest.mark.parametrize("pair", PAIRS)
def test_outputs_can_be_chosen_as_from_the_parent(pair):
    _, ours, _ = PAIRS[pair]()
    ours.select_out_keys("loss_routing")
    assert ours.out_keys == ["loss_routing"]


# ---------------------------------------------------------------------------------------------- keys


def renamed(critic_in, critic_out=None):
    """An actor whose action is ``act``, and a critic."""
    actor = PMOEActor(3, spec=Composite(act=SPEC), in_features=OBSERVATION, return_log_prob=True)
    critic = ValueOperator(
        make_critic(dtype=torch.float32).module, in_keys=["observation", critic_in], out_keys=critic_out
    )
    batch = make_batch(dtype=torch.float32).rename_key_("action", "act")
    batch = actor(batch).detach()
    batch["action"] = torch.zeros(8, ACTION)
    batch["advantage"], batch["value_target"] = torch.zeros(8, 1), torch.zeros(8, 1)
    return actor, critic, batch


def losses_of(actor, critic):
    ppo = PMOEClipPPOLoss(actor, make_value(torch.float32), critic)
    ppo.set_keys(action="act", sample_log_prob="act_log_prob")
    sac = PMOESACLoss(actor, critic)
    sac.make_value_estimator(gamma=0.9)
    return ppo, sac


@pytest.mark.parametrize("which", [0, 1])
def test_a_critic_that_writes_another_key_is_an_error_that_names_both(which):
    """ValueOperator calls its output "state_value" where the action is not called "action"."""
    actor, critic, batch = renamed("act")
    loss = losses_of(actor, critic)[which]
    with pytest.raises(KeyError, match=r"writes \['state_value'\], and 'state_action_value' is not among them"):
        loss(batch)
    with pytest.raises(KeyError, match="'state_action_value' is not among them"):
        loss.score_proposals(batch, torch.zeros(8, 3, ACTION))
    loss.set_keys(state_action_value="state_value")
    assert loss(batch)["loss_routing"].isfinite()


@pytest.mark.parametrize("which", [0, 1])
def test_a_critic_that_does_not_read_the_action_is_an_error_that_names_it(which):
    """It would read the stored ``action`` of the batch for every expert, and score them all the same."""
    actor, critic, batch = renamed("action", ["state_action_value"])
    loss = losses_of(actor, critic)[which]
    with pytest.raises(KeyError, match=r"reads \['observation', 'action'\], and the action 'act' is not among them"):
        loss(batch)


# ------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rooting": "none"}, TypeError, "unexpected keyword argument 'rooting'; did you mean 'routing'"),
        ({"xyz": 1}, TypeError, "unexpected keyword argument 'xyz'"),
        ({"reduction": "foo"}, ValueError, "reduction='foo' is unknown; allowed: None, mean, sum, none"),
        ({"num_qvalue_nets": 0}, ValueError, "num_qvalue_nets=0 must be an integer of at least 1"),
    ],
)
@pytest.mark.parametrize("kind", [PMOESACLoss, PMOETQCLoss, PMOEClipPPOLoss])
def test_options_that_do_not_exist_are_errors_at_construction_under_our_name(kind, options, error, message):
    args = (make_policy(), make_value(), make_critic()) if kind is PMOEClipPPOLoss else (make_actor(), make_critic())
    with pytest.raises(error, match=f"^{kind.__name__}: .*{message}"):
        kind(*args, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PMOESACLoss, {"loss_function": "foo"}),
        (PMOESACLoss, {"alpha_init": 0.0}),
        (PMOESACLoss, {"alpha_init": float("nan")}),
        (PMOETQCLoss, {"scalar_output_mode": "foo"}),
        (PMOEClipPPOLoss, {"loss_critic_type": "foo"}),
    ],
)
def test_values_that_torchrl_would_meet_in_the_first_call_are_refused_before(kind, options):
    args = (make_policy(), make_value(), make_critic()) if kind is PMOEClipPPOLoss else (make_actor(), make_critic())
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^{kind.__name__}: {name}={value!r} "):
        kind(*args, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (functools.partial(PMOEActor, 3), {"flor": 0.1}),
        (functools.partial(GatingActor, 3), {"floor": 0.1}),
        (functools.partial(MCPActor, 3), {"blend": "actions"}),
    ],
)
def test_an_option_that_an_actor_does_not_have_is_an_error_under_its_name(kind, options):
    with pytest.raises(TypeError, match=rf"^{kind.func.__name__}: got an unexpected keyword argument '{min(options)}'"):
        kind(spec=SPEC, in_features=OBSERVATION, **options)


@pytest.mark.parametrize("kind", [PMOEActor, GatingActor, MCPActor, OptionActor])
@pytest.mark.parametrize("shape", [(ACTION,), (2, ACTION)])
def test_an_option_that_the_distribution_does_not_take_is_an_error_at_construction(kind, shape):
    spec = Bounded(-1, 1, shape)
    with pytest.raises(TypeError, match=rf"^{kind.__name__}: distribution_kwargs: .*'nope'"):
        kind(3, spec=spec, in_features=OBSERVATION, distribution_kwargs={"nope": 1})
    kind(3, spec=spec, in_features=OBSERVATION)


def test_a_value_that_the_mixture_does_not_take_is_an_error_at_construction():
    with pytest.raises(ValueError, match=r"^PMOEActor: distribution_kwargs: TanhNormalMixture: score='foo' is unknown"):
        PMOEActor(3, spec=SPEC, in_features=OBSERVATION, distribution_kwargs={"score": "foo"})
    with pytest.raises(ValueError, match=r"^PMOEActor: TanhNormalMixture needs a bounded action spec"):
        PMOEActor(3, spec=Unbounded((ACTION,)), in_features=OBSERVATION)


def test_a_mixture_is_looked_for_in_a_partial():
    features = nn.Sequential(nn.Linear(OBSERVATION, 3 * (2 * ACTION + 1)), MixtureParamExtractor(3))

    def actor(distribution_class, keys, spec):
        return ProbabilisticActor(
            TensorDictModule(features, ["observation"], keys),
            in_keys=keys if keys[0] == "logits" else ["params"],
            distribution_class=distribution_class,
            spec=spec,
        )

    composite = functools.partial(CompositeDistribution, distribution_map={"a": TanhNormalMixture})
    nested = [("params", "a", name) for name in ("logits", "loc", "scale")]
    spec = Composite(action=Composite(a=SPEC))
    with pytest.raises(ValueError, match=r"PMOESACLoss: .*got CompositeDistribution"):
        PMOESACLoss(actor(composite, nested, spec), make_critic(), action_spec=SPEC)
    narrow = functools.partial(TanhNormalMixture, low=-0.5, high=0.5)
    loss = PMOESACLoss(actor(narrow, ["logits", "loc", "scale"], SPEC), make_critic(dtype=torch.float32))
    assert loss.target_entropy.item() == pytest.approx(ACTION * (torch.tensor(0.5).log().item() - 1))
    loss.make_value_estimator(gamma=0.9)
    assert isinstance(loss(make_batch(dtype=torch.float32)), TensorDict)
