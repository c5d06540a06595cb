"""Several seeds at once, as a user runs them."""

from __future__ import annotations

import pytest
import recipe_runs
import torch
from recipe_runs import rows
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from torchrl_pmoe.envs import make_env

import sac_many_seeds  # isort: skip
import sac_pmoe  # isort: skip
from parts.errors import UsageError  # isort: skip
from parts.training import seed_everything  # isort: skip

TINY = [
    "env=Pendulum-v1",
    "seed=4",
    "total_frames=60",
    "network.hidden_sizes=[8,8]",
    "optim.batch_size=8",
    "collector.init_random_frames=20",
    "logger.eval_interval=30",
    "logger.eval_episodes=2",
    "logger.eval_max_steps=10",
]


def config(*overrides, recipe=sac_pmoe):
    return recipe_runs.resolve(recipe, "device=cpu", "logger.progress_bar=false", *TINY, *overrides)


@pytest.mark.parametrize("overrides", [[], ["policy=gaussian"], ["scoring=gradient", "collector.num_envs=2"]])
def test_every_seed_leaves_the_record_of_a_run_of_its_own(overrides, tmp_path, recwarn):
    (tmp_path / "all").mkdir()
    sac_many_seeds.train(config("num_seeds=3", *overrides, recipe=sac_many_seeds), tmp_path / "all")
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    (tmp_path / "one").mkdir()
    sac_pmoe.train(config(*overrides), tmp_path / "one")
    alone = rows(tmp_path / "one")
    returns = set()
    for seed in (4, 5, 6):
        found = rows(tmp_path / "all" / f"seed{seed}")
        assert [row["frames"] for row in found] == [row["frames"] for row in alone]
        assert list(found[0]) == list(alone[0])
        # what a run of its own fills, is filled here
        assert [key for key, value in found[-1].items() if value] == [key for key, value in alone[-1].items() if value]
        assert (tmp_path / "all" / f"seed{seed}" / "learning_curve.png").is_file()
        returns.add(found[-1]["loss_qvalue"])
    assert len(returns) == 3


def test_a_single_seed_trains_too(tmp_path):
    sac_many_seeds.train(config("num_seeds=1", recipe=sac_many_seeds), tmp_path)
    assert [row["frames"] for row in rows(tmp_path / "seed4")] == ["30", "60"]


def test_agents_and_environments_begin_as_in_runs_of_their_own():
    cfg = config("num_seeds=3", "collector.num_envs=2", recipe=sac_many_seeds)
    env = sac_many_seeds.make_envs(cfg)
    agents = sac_many_seeds.build_agents(cfg, env)
    first = env.reset()["observation"].reshape(3, 2, -1)
    for index, (agent, _) in enumerate(agents):
        own = config(f"seed={4 + index}", "collector.num_envs=2")
        alone = make_env(own.env, num_envs=2, seed=own.seed)
        torch.testing.assert_close(first[index], alone.reset()["observation"], rtol=0, atol=0)
        seed_everything(own.seed)
        actor, _ = sac_pmoe.build_agent(own, alone.action_spec_unbatched, 3)
        for ours, theirs in zip(agent.parameters(), actor.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    env.close()


def test_every_agent_reads_its_own_frames_each_drawn_for_itself():
    number, envs, steps, size = 3, 2, 50, 4000
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(number * envs * steps), sampler=sac_many_seeds.SeedSampler(number), batch_size=size
    )
    replay = sac_many_seeds.SeedReplay(buffer, number, device=None)
    step = torch.arange(steps).expand(number * envs, steps)
    row = torch.arange(number * envs).unsqueeze(-1).expand(number * envs, steps)
    # twice: the second fills the places of the first
    for round_ in range(2):
        batch = TensorDict(step=step + 1000 * round_, row=row, batch_size=[number * envs, steps])
        replay.extend(batch)
    torch.manual_seed(0)
    drawn = replay.sample(batch)
    assert drawn.shape == (number, size)
    for index in range(number):
        assert set(drawn["row"][index].tolist()) == {2 * index, 2 * index + 1}
        assert drawn["step"][index].min() >= 1000
        counts = torch.bincount((drawn["step"][index] - 1000) * envs + drawn["row"][index] % envs)
        expected = size / (envs * steps)
        # chi-squared with 99 degrees of freedom: beyond 150 once in a thousand
        assert ((counts - expected) ** 2 / expected).sum() < 150
    assert torch.corrcoef(drawn["step"].double()).fill_diagonal_(0).abs().max() < 4 / size**0.5


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("replay_buffer.prb=True", "false with num_seeds=2"),
        ("acting=best_of_experts", "policy with num_seeds=2"),
        ("collector.backend=parallel", "serial, threads, envpool or mjx with num_seeds=2"),
        ("optim.router_lr=0.001", "null with num_seeds=2"),
    ],
)
def test_what_several_seeds_cannot_have_is_refused(override, allowed):
    key, value = override.split("=", 1)
    with pytest.raises(UsageError) as error:
        config("num_seeds=2", override, recipe=sac_many_seeds)
    assert str(error.value).startswith(f"{key}={value}: must be {allowed}")
