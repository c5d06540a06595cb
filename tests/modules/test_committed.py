"""An expert that keeps acting: how long, from when on, and by what."""

from __future__ import annotations

import pickle

import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import Bounded
from torchrl.envs import GymEnv, InitTracker, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_pmoe import CommittedExpertsActor, NormalMixture, PMOEActor

EXPERTS, EPISODE = 4, 12


def mixture(seed=0, **kwargs):
    """A router that prefers no expert much, and experts that differ."""
    torch.manual_seed(seed)
    actor = PMOEActor(EXPERTS, spec=Bounded(-1, 1, (1,)), in_features=3, num_cells=(8,), **kwargs)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return actor


def env_for(actor, num_envs=3):
    env = SerialEnv(num_envs, lambda: GymEnv("Pendulum-v1", max_episode_steps=EPISODE))
    env = TransformedEnv(env, InitTracker())
    env.set_seed(0)
    return env.append_transform(actor.make_tensordict_primer())


def expected_left(steps, commit_steps):
    """Steps that an expert still acts after each step of an episode."""
    return [commit_steps - 1 - t % EPISODE % commit_steps for t in range(steps)]


@pytest.mark.parametrize("commit_steps", [1, 5, EPISODE, 100])
def test_an_expert_acts_for_its_steps_and_no_longer_than_the_episode(commit_steps):
    actor = CommittedExpertsActor(mixture(), commit_steps=commit_steps)
    steps = 5 * EPISODE
    rollout = env_for(actor).rollout(steps, actor, break_when_any_done=False)
    expert, left = rollout["expert"].squeeze(-1), rollout["steps_left"].squeeze(-1)  # [3, T]
    assert left.tolist() == [expected_left(steps, commit_steps)] * 3
    begins = torch.tensor([t % EPISODE % commit_steps == 0 for t in range(steps)])
    changes = torch.cat([torch.ones(3, 1, dtype=torch.bool), expert[:, 1:] != expert[:, :-1]], -1)
    assert not (changes & ~begins).any()
    # three quarters of the draws name another expert
    assert changes[:, begins].float().mean() > 0.4
    # both entries of the step after are those of this one
    for key in ("expert", "steps_left"):
        assert torch.equal(rollout[key], rollout["next", key])


def test_an_expert_acts_for_a_whole_episode():
    actor = CommittedExpertsActor(mixture())
    rollout = env_for(actor).rollout(8 * EPISODE, actor, break_when_any_done=False)
    episodes = rollout["expert"].reshape(3, 8, EPISODE)
    assert (episodes == episodes[..., :1]).all()
    assert len(episodes[..., 0].unique()) == EXPERTS


def test_a_commitment_lasts_across_the_batches_of_a_collector():
    actor = CommittedExpertsActor(mixture(), commit_steps=7)
    collector = Collector(env_for(actor), actor, frames_per_batch=3 * 5, total_frames=3 * 60)
    batches = torch.cat([batch["steps_left"].squeeze(-1) for batch in collector], -1)
    assert batches.tolist() == [expected_left(60, 7)] * 3


def make_pendulum():
    env = TransformedEnv(GymEnv("Pendulum-v1", max_episode_steps=EPISODE), InitTracker())
    return env.append_transform(CommittedExpertsActor(mixture()).make_tensordict_primer())


@pytest.mark.filterwarnings("ignore")
def test_a_worker_of_a_collector_keeps_commitments_and_gets_new_weights():
    actor = pickle.loads(pickle.dumps(CommittedExpertsActor(mixture(), commit_steps=7, deterministic=True)))
    experts = actor.actor[0].module[0].experts
    with torch.no_grad():
        experts.weight.zero_()
        experts.bias.fill_(1.0)  # all of them push to one side
    collector = MultiSyncCollector([make_pendulum], actor, frames_per_batch=5, total_frames=500)
    try:
        batches = iter(collector)
        first = [next(batches) for _ in range(2)]
        assert all((batch["action"] > 0).all() for batch in first)
        left = torch.cat([batch["steps_left"].flatten() for batch in first])
        assert left.tolist() == expected_left(10, 7)
        with torch.no_grad():
            experts.bias.fill_(-1.0)
        collector.update_policy_weights_()
        next(batches)  # may have been under way
        assert (next(batches)["action"] < 0).all()
    finally:
        collector.shutdown()


def states(number):
    return TensorDict(observation=torch.randn(1, 3).expand(number, 3).clone(), batch_size=number)


def test_experts_are_drawn_from_the_router():
    inner = mixture()
    td = states(20_000)
    drawn = CommittedExpertsActor(inner)(td)["expert"].squeeze(-1)
    probs = inner.get_dist(td).probs[0].detach()
    counts = torch.bincount(drawn, minlength=EXPERTS)
    assert stats.chisquare(counts.numpy(), (20_000 * probs.double() / probs.double().sum()).numpy()).pvalue > 1e-3


def test_a_stochastic_action_is_a_draw_of_its_expert():
    inner = mixture()
    td = CommittedExpertsActor(inner)(states(20_000))
    loc, scale = (td[key][0, :, 0] for key in ("loc", "scale"))
    for k in range(EXPERTS):
        latent = td["action"][td["expert"].squeeze(-1) == k].atanh().squeeze(-1)
        assert stats.kstest(((latent - loc[k]) / scale[k]).double().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("how", ["deterministic", "exploration type"])
def test_a_deterministic_action_is_the_mean_of_its_expert(how):
    actor = CommittedExpertsActor(mixture(), deterministic=how == "deterministic")
    exploration = ExplorationType.RANDOM if how == "deterministic" else ExplorationType.DETERMINISTIC
    with set_exploration_type(exploration):
        td = actor(states(50))
    rows = torch.arange(50)
    torch.testing.assert_close(td["action"], td["loc"][rows, td["expert"].squeeze(-1)].tanh())
    assert len(td["expert"].unique()) > 1


def test_begins_where_is_init_says_so_and_goes_on_elsewhere():
    actor = CommittedExpertsActor(mixture(), commit_steps=10)
    td = states(1000)
    td["expert"], td["steps_left"] = torch.full((1000, 1), 2), torch.full((1000, 1), 6)
    td["is_init"] = torch.arange(1000).unsqueeze(-1) % 2 == 0
    out = actor(td.clone())
    assert (out["expert"][1::2] == 2).all()
    assert (out["steps_left"][1::2] == 5).all()
    assert (out["steps_left"][::2] == 9).all()
    assert (out["expert"][::2] != 2).any()


@pytest.mark.parametrize("shape", [(), (5,), (2, 5)])
def test_any_batch_shape(shape):
    actor = CommittedExpertsActor(mixture(), commit_steps=3)
    td = TensorDict(
        observation=torch.randn(*shape, 3), is_init=torch.ones(*shape, 1, dtype=torch.bool), batch_size=shape
    )
    out = actor(actor(td)["next"].update({"observation": td["observation"], "is_init": ~td["is_init"]}))
    assert out["action"].shape == (*shape, 1)
    assert out["expert"].shape == out["steps_left"].shape == out["next", "expert"].shape == (*shape, 1)
    assert (out["steps_left"] == 1).all()


def test_each_agent_of_a_group_has_an_expert_of_its_own():
    inner = mixture(in_keys=[("agents", "observation")], distribution_class=NormalMixture)
    actor = CommittedExpertsActor(inner, commit_steps=2)
    td = TensorDict(
        {("agents", "observation"): torch.randn(6, 3, 3), "is_init": torch.ones(6, 1, dtype=torch.bool)}, [6]
    )
    first = actor(td)
    assert first["expert"].shape == (6, 3, 1)
    carried = first["next"].update({"agents": td["agents"].select("observation"), "is_init": td["is_init"].clone()})
    carried["is_init"][2:] = False
    second = actor(carried)
    assert torch.equal(second["expert"][2:], first["expert"][2:])
    assert second["steps_left"][:, 0, 0].tolist() == [1, 1, 0, 0, 0, 0]


def test_compiled_it_keeps_its_expert_too():
    actor = CommittedExpertsActor(mixture(), commit_steps=4, deterministic=True)
    compiled = torch.compile(actor, backend="eager", fullgraph=True)
    td = states(20)
    td["expert"], td["steps_left"] = torch.arange(20).unsqueeze(-1) % EXPERTS, torch.full((20, 1), 3)
    ours, theirs = compiled(td.clone()), actor(td.clone())
    for key in ("action", "expert", "steps_left"):
        torch.testing.assert_close(ours[key], theirs[key])


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match="commit_steps must be an integer of at least 1, or None, got"):
        CommittedExpertsActor(mixture(), commit_steps=steps)
