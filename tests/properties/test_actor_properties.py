"""PMOEActor and MixtureParamExtractor over sizes, keys, boxes, routers and dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from properties.reference import assert_within, density
from properties.strategies import DTYPES, Box, boxes, nested_keys, numbers, reseed, seeds, shapes, spec_at
from tensordict import TensorDict
from tensordict.nn import InteractionType, set_interaction_type
from torch import nn
from torchrl.data import Bounded, Unbounded

from torchrl_pmoe import MixtureParamExtractor, NormalMixture, PMOEActor

ROUTERS = ("detached", "shared", "separate")
EXPLORATION = (InteractionType.RANDOM, InteractionType.DETERMINISTIC)
PARAMS = ("logits", "loc", "scale")


@dataclass(frozen=True)
class Policy:
    """An actor with a network of its own, and states to act in; weights and states come from the seed."""

    experts: int
    size: int
    inputs: tuple[int, ...]  # sizes of what the network reads
    batch: tuple[int, ...]
    dtype: torch.dtype
    box: Box | None
    width: float  # of the initial heads: large ones saturate
    options: dict[str, Any]
    seed: int

    def names(self):
        return [f"observation{i}" for i in range(len(self.inputs))]

    def actor(self, *, in_keys=None, action_key="action", lazy=False, **kwargs):
        reseed(self.seed)
        if self.box is None:
            spec, kind = Unbounded((self.size,), dtype=self.dtype), NormalMixture
        else:
            spec, kind = self.box.spec(self.size, self.dtype), None
        return PMOEActor(
            self.experts,
            spec=spec_at(action_key, spec),
            in_features=None if lazy else sum(self.inputs),
            in_keys=in_keys or self.names(),
            num_cells=(6, 5),
            head_init=self.width,
            return_log_prob=True,
            **({"distribution_class": kind} if kind else {}),
            **{**self.options, **kwargs},
        ).to(self.dtype)

    def states(self, keys=None):
        reseed(self.seed + 1)
        found = TensorDict({}, batch_size=self.batch)
        for key, size in zip(keys or self.names(), self.inputs, strict=True):
            found[key] = torch.randn(*self.batch, size, dtype=self.dtype)
        return found

    def act(self, actor, states, exploration=InteractionType.RANDOM):
        reseed(self.seed + 2)
        with set_interaction_type(exploration):
            return actor(states)


def policies(dtypes=DTYPES, batch=None, bounded=None):
    options = st.fixed_dictionaries(
        {
            "router": st.sampled_from(ROUTERS),
            "state_dependent_scale": st.booleans(),
            "floor": st.sampled_from([0.0, 0.1]),
            "distribution_kwargs": st.fixed_dictionaries(
                {
                    "score": st.sampled_from(["mixture", "expert"]),
                    "routing": st.sampled_from(["frequency", "soft_frequency", "gumbel_softmax", "none"]),
                }
            ),
        }
    )
    return st.builds(
        Policy,
        experts=st.integers(1, 5),
        size=st.integers(1, 4),
        inputs=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
        batch=shapes() if batch is None else batch,
        dtype=st.sampled_from(dtypes),
        box=boxes(decades=2) if bounded else st.none() | boxes(decades=2),
        width=st.sampled_from([0.3, 30.0]),
        options=options,
        seed=seeds,
    )


# ---------------------------------------------------------------------- what it writes


@given(policies(), st.sampled_from(EXPLORATION))
def test_it_writes_parameters_an_action_in_the_box_and_the_mixtures_density_of_it(policy, exploration):
    actor = policy.actor()
    out = policy.act(actor, policy.states(), exploration)
    per_expert = (*policy.batch, policy.experts, policy.size)
    assert {key: tuple(out[key].shape) for key in actor.out_keys} == {
        "logits": per_expert[:-1],
        "loc": per_expert,
        "scale": per_expert,
        "action": (*policy.batch, policy.size),
        "action_log_prob": policy.batch,
    }
    assert {out[key].dtype for key in actor.out_keys} == {policy.dtype}
    if out["action"].numel():
        assert actor.spec["action"].is_in(out["action"])
    dist = actor.get_dist(policy.states())
    if policy.box is not None:
        space = actor.spec["action"].space
        for bound, wanted in ((dist.low, space.low), (dist.high, space.high)):
            assert torch.equal(torch.as_tensor(bound, dtype=policy.dtype).expand(policy.size), wanted)
    assert torch.equal(out["action_log_prob"], dist.log_prob(out["action"]))
    expected = density(dist, out["action"])
    assert_within(out["action_log_prob"], expected.mixture, expected.mixture_error)


@given(policies(), st.data(), st.sampled_from(EXPLORATION))
def test_names_and_nesting_of_the_keys_change_nothing(policy, data, exploration):
    plain = policy.actor()
    *in_keys, action, logits, loc, scale, log_prob = data.draw(nested_keys(len(policy.inputs) + 5))
    renamed = policy.actor(in_keys=in_keys, action_key=action, param_keys=[logits, loc, scale], log_prob_key=log_prob)
    found = policy.act(renamed, policy.states(in_keys), exploration)
    expected = policy.act(plain, policy.states(), exploration)
    assert set(renamed.out_keys) == {action, logits, loc, scale, log_prob}
    theirs = ("logits", "loc", "scale", "action", "action_log_prob")
    for key, usual in zip((logits, loc, scale, action, log_prob), theirs, strict=True):
        assert torch.equal(found[key], expected[usual]), key


@given(policies(dtypes=DTYPES[:2]), st.sampled_from(EXPLORATION))
def test_an_actor_that_learns_its_input_size_from_the_first_call_becomes_the_sized_one(policy, exploration):
    lazy, sized = policy.actor(lazy=True), policy.actor()
    lazy(policy.states())
    shapes_of = lambda actor: {name: x.shape for name, x in actor.state_dict().items()}
    assert shapes_of(lazy) == shapes_of(sized)
    lazy.load_state_dict(sized.state_dict())
    found, expected = (policy.act(actor, policy.states(), exploration) for actor in (lazy, sized))
    assert (found == expected).all()


@given(policies(batch=shapes(smallest=1)))
def test_deterministically_it_plays_the_squashed_loc_of_the_largest_weight(policy):
    actor = policy.actor()
    out = policy.act(actor, policy.states(), InteractionType.DETERMINISTIC)
    index = out["logits"].argmax(-1)[..., None, None]
    loc = out["loc"].take_along_dim(index, -2).squeeze(-2).double()
    if policy.box is None:
        assert torch.equal(out["action"].double(), loc)
        return
    low, high = (getattr(actor.spec["action"].space, name).double() for name in ("low", "high"))
    expected = (high + low) / 2 + (high - low) / 2 * loc.tanh()
    assert_within(out["action"], expected, 4 * torch.finfo(policy.dtype).eps * (high - low + (high + low).abs()))


@given(policies(batch=st.just((50,))))
def test_the_mean_of_the_policy_is_an_action_of_its_space(policy):
    actor = policy.actor()
    out = policy.act(actor, policy.states(), InteractionType.MEAN)
    assert actor.spec["action"].is_in(out["action"])
    assert out["action_log_prob"].isfinite().all()


# ---------------------------------------------------------------------- one expert alone


@given(policies(dtypes=DTYPES[:2], batch=shapes(smallest=1)), st.data())
def test_an_expert_is_the_mixture_without_the_others(policy, data):
    actor = policy.actor()
    k = data.draw(st.integers(0, policy.experts - 1))
    whole, alone = actor.get_dist(policy.states()), actor.expert(k).get_dist(policy.states())
    parameters = alone if hasattr(alone, "loc") else alone.base_dist
    assert torch.equal(parameters.loc, whole.loc[..., k, :])
    assert torch.equal(parameters.scale, whole.scale[..., k, :])
    assert {id(x) for x in actor.expert(k).parameters()} == {id(x) for x in actor.parameters()}
    played = policy.act(actor.expert(k), policy.states(), InteractionType.DETERMINISTIC)["action"]
    torch.testing.assert_close(played, whole.expert_mode[..., k, :], rtol=1e-5, atol=1e-5 * float(whole_width(actor)))
    if policy.box is not None:
        for name in ("low", "high"):
            ours, theirs = (torch.as_tensor(getattr(x, name)).double() for x in (whole, alone))
            torch.testing.assert_close(theirs.expand(policy.size), ours.expand(policy.size), rtol=1e-6, atol=0)


def whole_width(actor):
    space = actor.spec["action"]
    return (space.space.high - space.space.low).max() if isinstance(space, Bounded) else 1.0


@given(policies(batch=st.just((1,))), st.integers())
def test_an_expert_out_of_range_is_answered_with_their_number(policy, k):
    assume(not 0 <= k < policy.experts)
    with pytest.raises(IndexError, match=f"^expert {k} is out of range for {policy.experts} experts"):
        policy.actor().expert(k)


# ---------------------------------------------------------------------- who learns from what


@given(policies(dtypes=DTYPES[1:2], batch=shapes(2, smallest=1)))
def test_router_and_experts_own_what_their_names_say(policy):
    """The logits move the router, and the trunk only where it is shared; loc and scale never move the router."""
    actor = policy.actor(floor=0.0, activation_class=nn.Tanh)
    network = actor[0].module[0]
    dist = actor.get_dist(policy.states())

    def moved(output):
        rng = torch.Generator().manual_seed(policy.seed)
        weight = torch.randn(output.shape, generator=rng, dtype=output.dtype)
        grads = torch.autograd.grad(
            (output * weight).sum(), list(actor.parameters()), retain_graph=True, allow_unused=True
        )
        return {id(p) for p, g in zip(actor.parameters(), grads, strict=True) if g is not None and g.any()}

    router = {id(p) for p in actor.router_parameters()}
    trunk = {id(p) for p in network.trunk.parameters()}
    every = {id(p) for p in actor.parameters()}
    assert moved(dist.logits) == router | (trunk if policy.options["router"] == "shared" else set())
    assert moved(dist.loc) | moved(dist.scale) == every - router


# ---------------------------------------------------------------------- the extractor


@given(st.integers(1, 6), st.integers(1, 5), shapes(), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.2, 0.9]), seeds)
def test_the_extractor_takes_features_apart_and_keeps_every_expert_above_the_floor(k, a, batch, dtype, floor, seed):
    reseed(seed)
    parts = [torch.randn(*batch, k), torch.randn(*batch, k, a), torch.randn(*batch, k, a)]
    parts = [(10 * x).to(dtype) for x in parts]
    features = torch.cat((parts[0], parts[1].flatten(-2), parts[2].flatten(-2)), -1)
    logits, loc, scale = MixtureParamExtractor(k, nn.Identity(), 0.0, floor=floor)(features)
    assert torch.equal(loc, parts[1])
    assert torch.equal(scale, parts[2])
    expected = (1 - floor) * parts[0].double().softmax(-1) + floor / k
    eps = torch.finfo(dtype).eps
    assert_within(
        logits.softmax(-1), expected, 16 * eps * expected * (1 + parts[0].double().abs().amax(-1, keepdim=True))
    )


@given(st.integers(1, 6), st.integers(0, 80), st.none() | st.integers(1, 5))
def test_features_fit_exactly_when_they_are_k_times_an_odd_number_of_at_least_three(k, size, action_size):
    extractor = MixtureParamExtractor(k, action_size=action_size)
    fitting = [a for a in range(1, 41) if k * (2 * a + 1) == size and action_size in (None, a)]
    if fitting:
        assert extractor(torch.zeros(2, size))[1].shape == (2, k, fitting[0])
        return
    with pytest.raises(ValueError, match=rf"\(2, {size}\) do not fit.*K=\s*{k}"):
        extractor(torch.zeros(2, size))


# ---------------------------------------------------------------------- what does not exist


@given(policies(), st.text(max_size=20))
def test_a_router_that_does_not_exist_is_answered_with_those_that_do(policy, text):
    assume(text not in ROUTERS)
    with pytest.raises(ValueError, match="PMOEActor: router=") as caught:
        policy.actor(router=text)
    assert f"{text!r} is unknown; allowed: detached, shared, separate, or a module" in str(caught.value)


@given(st.integers(max_value=0) | st.floats() | st.booleans() | st.text(max_size=3) | st.none())
def test_the_number_of_experts_is_a_positive_integer(experts):
    for make in (MixtureParamExtractor, lambda n: PMOEActor(n, spec=Bounded(-1, 1, (2,)), in_features=3)):
        with pytest.raises(ValueError, match="must be an integer of at least 1") as caught:
            make(experts)
        assert f"num_experts={experts!r}" in str(caught.value)


@given(numbers)
def test_the_floor_lies_in_zero_to_one(floor):
    if 0 <= floor < 1:
        assert MixtureParamExtractor(2, floor=floor).floor == floor
        return
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        MixtureParamExtractor(2, floor=floor)
