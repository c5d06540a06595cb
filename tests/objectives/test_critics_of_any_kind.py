"""Critics and actors that read batch dimensions as time or agents: every proposal gets the value it gets alone."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Bounded, Composite
from torchrl.modules import (
    MLP,
    GRUModule,
    LSTMModule,
    MultiAgentMLP,
    ProbabilisticActor,
    ValueOperator,
    set_recurrent_mode,
)
from torchrl.objectives import CQLLoss, CrossQLoss, SACLoss, TQCLoss

from torchrl_pmoe import (
    BestOfExpertsActor,
    MixtureParamExtractor,
    PMOEActor,
    PMOEClipPPOLoss,
    PMOESACLoss,
    PMOETQCLoss,
    TanhNormalMixture,
)
from torchrl_pmoe.distributions import mixture
from torchrl_pmoe.objectives import score_proposals

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("seeded")]

# as many steps, rows and agents as experts: nothing but the values can tell which dimension is which
K = B = T = AGENTS = 3
OBSERVATION, ACTION, HIDDEN = 4, 2, 8


@pytest.fixture
def seeded():
    torch.manual_seed(0)


def same_noise(monkeypatch):
    """The distribution's draws depend on their shape alone, from here on."""
    randn = torch.randn

    def same(*shape, **kwargs):
        return randn(*shape, generator=torch.Generator().manual_seed(0), **kwargs)

    monkeypatch.setattr(mixture.torch, "randn", same)


# ------------------------------------------------------------------------------------------- states and critics


def flags(*shape):
    return torch.zeros(*shape, 1, dtype=torch.bool)


def make_batch(*shape):
    """Transitions ``[*shape]`` of an environment with a recurrent policy, one trajectory a row."""

    def states():
        is_init = flags(*shape)
        is_init[..., 0, :] = True
        hidden = {name: torch.zeros(*shape, 1, HIDDEN).double() for name in ("h", "c", "q_h", "q_c")}
        return {"observation": torch.randn(*shape, OBSERVATION).double(), "is_init": is_init, **hidden}

    batch = TensorDict(states(), batch_size=shape)
    batch["action"] = torch.rand(*shape, ACTION).double() * 1.8 - 0.9
    rewards = {"reward": torch.randn(*shape, 1).double(), "done": flags(*shape), "terminated": flags(*shape)}
    batch["next"] = TensorDict({**states(), **rewards}, batch_size=shape)
    batch["next", "is_init"].zero_()
    return batch


def head(size, outputs):
    return ValueOperator(
        MLP(in_features=size + ACTION, out_features=outputs, num_cells=[8]), in_keys=["seen", "action"]
    )


def lstm(outputs, *, python_based=False):
    keys = {"in_keys": ["observation", "q_h", "q_c"], "out_keys": ["seen", ("next", "q_h"), ("next", "q_c")]}
    reader = LSTMModule(input_size=OBSERVATION, hidden_size=HIDDEN, python_based=python_based, **keys)
    return TensorDictSequential(reader, head(HIDDEN, outputs)).double()


def gru(outputs, *, python_based=False):
    """Reads the actions as well: what it has seen of an expert's actions must not reach another's."""
    join = TensorDictModule(lambda *x: torch.cat(x, -1), in_keys=["observation", "action"], out_keys=["both"])
    keys = {"in_keys": ["both", "q_h"], "out_keys": ["seen", ("next", "q_h")]}
    reader = GRUModule(input_size=OBSERVATION + ACTION, hidden_size=HIDDEN, python_based=python_based, **keys)
    return TensorDictSequential(join, reader, head(HIDDEN, outputs)).double()


class OneBatchDimension(nn.Module):
    """Modules of torch that know ``[B, T, ...]`` and nothing larger."""

    def __init__(self, outputs, **kwargs):
        super().__init__()
        self.read = nn.GRU(OBSERVATION + ACTION, HIDDEN, **kwargs)
        self.value = nn.Linear(HIDDEN, outputs)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.value(self.read(torch.cat((observation, action), -1))[0])


def torch_gru(outputs, *, batch_first=True):
    module = OneBatchDimension(outputs, batch_first=batch_first).double()
    return ValueOperator(module, in_keys=["observation", "action"])


class Agents(nn.Module):
    """The last batch dimension is the agents."""

    def __init__(self, outputs, **kwargs):
        super().__init__()
        self.net = MultiAgentMLP(OBSERVATION + ACTION, outputs, n_agents=AGENTS, depth=1, num_cells=8, **kwargs)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat((observation, action), -1))


def agents(outputs, *, share_params, centralized):
    module = Agents(outputs, share_params=share_params, centralized=centralized).double()
    return ValueOperator(module, in_keys=["observation", "action"])


class Normalised(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(OBSERVATION + ACTION, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, outputs)
        )

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.layers(torch.cat((observation, action), -1))


def plain(outputs, **kwargs):
    mlp = MLP(in_features=OBSERVATION + ACTION, out_features=outputs, num_cells=[8], **kwargs).double()
    return ValueOperator(mlp, in_keys=["observation", "action"])


def normalised(outputs):
    return ValueOperator(Normalised(outputs).double(), in_keys=["observation", "action"])


CRITICS = {
    "LSTM": lstm,
    "LSTM in Python": lambda outputs: lstm(outputs, python_based=True),
    "GRU": gru,
    "GRU in Python": lambda outputs: gru(outputs, python_based=True),
    "torch's GRU": torch_gru,
    **{
        f"agents, {'shared' if share else 'own'} parameters, {'joint' if joint else 'own'} inputs": (
            lambda outputs, share=share, joint=joint: agents(outputs, share_params=share, centralized=joint)
        )
        for share in (True, False)
        for joint in (True, False)
    },
}
UNVECTORISED = ("LSTM", "GRU", "torch's GRU")
"""``vmap`` has no rule for torch's own recurrent kernels."""


def make_actor(**kwargs):
    actor = PMOEActor(
        K, spec=Bounded(-1, 1, (ACTION,)), in_features=OBSERVATION, num_cells=(8,), head_init=0.5, **kwargs
    )
    return actor.double()


def make_loss(kind, critic, actor=None, *, vectorised=True, **kwargs):
    actor = make_actor(return_log_prob=True) if actor is None else actor
    if kind is PMOEClipPPOLoss:
        value = ValueOperator(MLP(in_features=OBSERVATION, out_features=1, num_cells=[8]).double())
        return kind(actor, value, critic(1), num_qvalue_nets=2 if vectorised else 1, **kwargs)
    outputs = 5 if kind is PMOETQCLoss else 1
    loss = kind(actor, critic(outputs), deactivate_vmap=not vectorised, **kwargs)
    loss.make_value_estimator(gamma=0.9)
    return loss


def alone(loss, states, action):
    """Values ``[*B, *G]`` of the actions of one expert, critic by critic."""
    keys, network = loss.tensor_keys, loss.qvalue_network
    params = loss.qvalue_network_params.detach()
    values = []
    for one in [params] if params.ndim == 0 else params.unbind(0):
        one_expert = states.select(*network.in_keys, strict=False)
        one_expert.set(keys.action, action)
        with one.to_module(network, preserve_module_state=False):
            values.append(network(one_expert).get(keys.state_action_value))
    values = torch.stack(values)
    return values.mean((0, -1)) if isinstance(loss, PMOETQCLoss) else values.squeeze(-1).amin(0)


def one_by_one(loss, states, proposals):
    """Values ``[*B, *G, K]`` of proposals ``[*B, *G, K, A]``, one call per expert."""
    return torch.stack([alone(loss, states, action) for action in proposals.unbind(-2)], -1)


def random_actions(*shape):
    return torch.rand(*shape, ACTION).double() * 2 - 1


LOSSES = [PMOESACLoss, PMOETQCLoss, PMOEClipPPOLoss]


# ------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("shape", [(B, T), (2, B, T)], ids=str)
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("kind", LOSSES)
def test_every_proposal_gets_the_value_that_it_gets_alone(kind, critic, shape):
    if critic == "torch's GRU" and len(shape) > 2:
        pytest.skip("takes [B, T] and nothing larger, with one action too")
    loss = make_loss(kind, CRITICS[critic], vectorised=critic not in UNVECTORISED)
    states, proposals = make_batch(*shape), random_actions(*shape, K)
    with set_recurrent_mode(True):
        value = loss.score_proposals(states, proposals)
        expected = one_by_one(loss, states, proposals)
    torch.testing.assert_close(value, expected)
    assert (expected.std(-1) > 1e-4).all()  # the experts can be told apart


@pytest.mark.parametrize("critic", ["LSTM", "GRU", "LSTM in Python"])
def test_trajectories_that_begin_within_a_row_are_kept_apart(critic):
    loss = make_loss(PMOESACLoss, CRITICS[critic], vectorised=False)
    states, proposals = make_batch(B, 5), random_actions(B, 5, K)
    states["is_init"][0, 2] = states["is_init"][1, 4] = states["is_init"][1, 1] = True
    states["q_h"].normal_(), states["q_c"].normal_()
    with set_recurrent_mode(True):
        torch.testing.assert_close(loss.score_proposals(states, proposals), one_by_one(loss, states, proposals))


@pytest.mark.parametrize("shape", [(T,), (B, T), ()], ids=str)
@pytest.mark.parametrize("recurrent", [True, False])
def test_a_single_trajectory_and_single_steps_are_scored_as_alone(recurrent, shape):
    """In recurrent mode the last dimension of the batch is time, with nothing before it too; else there is no time."""
    loss = make_loss(PMOESACLoss, lstm, vectorised=False)
    states = make_batch(*shape) if shape else make_batch(1)[0]
    states["is_init"].zero_()
    states["q_h"].normal_(), states["q_c"].normal_()
    proposals = random_actions(*shape, K)
    with set_recurrent_mode(recurrent):
        if recurrent and not shape:
            with pytest.raises(ValueError, match="at least one batch dim"):  # TorchRL's own, never K as time
                loss.score_proposals(states, proposals)
            return
        torch.testing.assert_close(loss.score_proposals(states, proposals), one_by_one(loss, states, proposals))


@pytest.mark.parametrize("num_proposals", [1, 2])
@pytest.mark.parametrize("backprop", ["max", "all"])
@pytest.mark.parametrize("critic", ["GRU", "torch's GRU", "agents, own parameters, own inputs"])
def test_the_loss_reads_those_values(critic, backprop, num_proposals, monkeypatch):
    """Several draws are a dimension of their own, which must not be read as time either."""
    loss = make_loss(
        PMOESACLoss,
        CRITICS[critic],
        vectorised=critic not in UNVECTORISED,
        backprop=backprop,
        num_proposals=num_proposals,
    )
    states = make_batch(B, T)
    same_noise(monkeypatch)
    draws = () if num_proposals == 1 else (num_proposals,)
    with set_recurrent_mode(True):
        value, metadata = loss.actor_loss(states)
        with torch.no_grad():
            dist = loss.actor_network.get_dist(states)
            proposals = dist.propose(draws)
            each = proposals.action.reshape(num_proposals, B, T, K, ACTION)
            scores = torch.stack([one_by_one(loss, states, action) for action in each])
            best = torch.nn.functional.one_hot(scores.argmax(-1), K).double()
            density = proposals.log_prob().reshape(scores.shape)
            if backprop == "max":  # the winners are judged as one row of actions
                won = (best.unsqueeze(-1) * each).sum(-2)
                density, judged = (best * density).sum(-1), torch.stack([alone(loss, states, a) for a in won])
            else:
                judged = scores
    torch.testing.assert_close(value, (density - judged).mean())  # the temperature is 1
    torch.testing.assert_close(metadata["loss_routing"], (dist.probs - best.mean(0)).square().mean())
    torch.testing.assert_close(metadata["best_expert_value"], scores.amax(-1).mean())


# -------------------------------------------------------------------------- critics that cannot be scored so


@pytest.mark.parametrize("kind", LOSSES)
def test_batch_statistics_of_other_proposals_are_refused(kind):
    """In evaluation mode a batch normalisation reads each row by itself; in training mode it reads the others too."""
    loss = make_loss(kind, normalised)
    states, proposals = make_batch(B), random_actions(B, K)
    kept = loss.qvalue_network_params.clone()
    with pytest.raises(ValueError, match=f"{kind.__name__}: the critics cannot score .* no batch normalisation in tra"):
        loss.score_proposals(states, proposals)
    assert (kept == loss.qvalue_network_params).all()  # looking has not moved the running statistics
    loss.qvalue_network.eval()
    torch.testing.assert_close(loss.score_proposals(states, proposals), one_by_one(loss, states, proposals))


def test_time_in_front_is_refused():
    """``[T, B]``: what comes before it would be read as time."""
    loss = make_loss(PMOESACLoss, lambda outputs: torch_gru(outputs, batch_first=False), vectorised=False)
    for shape in ((T, B), (T,)):
        with pytest.raises(ValueError, match=r"the critics cannot score .* is up to .* from its value alone"):
            loss.score_proposals(make_batch(*shape), random_actions(*shape, K))


def test_a_critic_that_draws_numbers_is_taken_and_takes_none_of_the_runs():
    """Values with dropout differ from call to call: there is nothing to compare them with."""

    loss = make_loss(PMOESACLoss, lambda outputs: plain(outputs, dropout=0.5))
    states, proposals = make_batch(B), random_actions(B, K)
    torch.manual_seed(1)
    first = loss.score_proposals(states, proposals)
    torch.manual_seed(1)
    torch.testing.assert_close(loss.score_proposals(states, proposals), first)


def test_values_that_are_not_numbers_are_no_fault_of_the_shape():
    loss = make_loss(PMOESACLoss, gru, vectorised=False)
    states = make_batch(B, T)
    states["observation"][-1] = float("nan")
    with set_recurrent_mode(True):
        value = loss.score_proposals(states, random_actions(B, T, K))
    assert value[-1].isnan().all()
    assert value[:-1].isfinite().all()


@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("same_actions", [False, True], ids=["actions differ", "one action"])
def test_critics_that_start_constant_are_not_taken_for_critics_that_know_any_batch(bias, same_actions):
    """Their first values are the same in every layout; those after some updates are not."""
    loss = make_loss(PMOESACLoss, torch_gru, vectorised=False)
    states, proposals = make_batch(B, T), random_actions(B, T, K)
    kept = loss.qvalue_network_params.data.clone()
    head = loss.qvalue_network_params.data["module", "value"]
    head["weight"].zero_()
    head["bias"].fill_(bias)
    first = random_actions(1).expand(B, T, K, ACTION) if same_actions else proposals
    torch.testing.assert_close(loss.score_proposals(states, first), torch.full((B, T, K), bias).double())
    loss.qvalue_network_params.data.copy_(kept)
    torch.testing.assert_close(loss.score_proposals(states, proposals), one_by_one(loss, states, proposals))


def test_batch_statistics_are_refused_where_all_experts_propose_the_same_at_first():
    """Copies of one batch have its statistics: nothing is wrong with the values, until experts differ."""
    loss = make_loss(PMOESACLoss, normalised)
    with pytest.raises(ValueError, match="the critics cannot score"):
        loss.score_proposals(make_batch(B), random_actions(B, 1).expand(B, K, ACTION))


class InsideTheUnitBox(nn.Module):
    """A critic of numbers only for actions inside the box, and with its own weights."""

    def __init__(self, outputs, centred):
        super().__init__()
        self.gain = nn.Parameter(torch.full((outputs,), 0.5).double())
        self.centred = centred

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        if self.centred:
            action = (action - action.mean(0)) / 2
        inside = (1 - action.square()).log().sum(-1, keepdim=True)  # NaN outside
        return inside * (0.01 - (self.gain - 0.5).square()).sqrt() + observation.sum(-1, keepdim=True)


@pytest.mark.parametrize("centred", [False, True])
def test_a_critic_that_bears_no_other_weights_is_asked_with_its_own(centred):
    loss = make_loss(PMOESACLoss, lambda n: ValueOperator(InsideTheUnitBox(n, centred), ["observation", "action"]))
    loss.qvalue_network_params.data.apply_(lambda gain: gain.fill_(0.5))  # stacking drew them anew
    states, proposals = make_batch(B), random_actions(B, K)
    if centred:
        with pytest.raises(ValueError, match="the critics cannot score"):
            loss.score_proposals(states, proposals)
        return
    torch.testing.assert_close(loss.score_proposals(states, proposals), one_by_one(loss, states, proposals))


@pytest.mark.parametrize("kind", [SACLoss, TQCLoss, CrossQLoss, CQLLoss])
def test_the_critics_of_torchrls_own_losses_score_proposals_too(kind):
    loss = kind(make_actor(), plain(5 if kind is TQCLoss else 1))
    states, proposals = make_batch(2, B), random_actions(2, B, K)
    each = score_proposals(loss, states, proposals, per_critic=True)
    expected = []  # one critic after the other, one expert after the other
    for params in loss.qvalue_network_params.data.unbind(0):
        with params.to_module(loss.qvalue_network, preserve_module_state=False):
            values = [loss.qvalue_network.module(states["observation"], a) for a in proposals.unbind(-2)]
        expected.append(torch.stack([value.mean(-1) for value in values], -1))
    torch.testing.assert_close(each, torch.stack(expected))
    assert (each[0] - each[1]).abs().min() > 1e-6
    value = each.mean(0) if kind is TQCLoss else each.amin(0)
    torch.testing.assert_close(score_proposals(loss, states, proposals), value)


@pytest.mark.parametrize("kind", LOSSES)
def test_each_critic_of_our_losses_can_be_told_apart(kind):
    loss = make_loss(kind, plain)
    states, proposals = make_batch(B, T), random_actions(B, T, K)
    each = loss.score_proposals(states, proposals, per_critic=True)
    assert each.shape == (5 if kind is PMOETQCLoss else 2, B, T, K)
    value = each.mean(0) if kind is PMOETQCLoss else each.amin(0)
    torch.testing.assert_close(value, one_by_one(loss, states, proposals))
    assert (each[0] - each[1]).abs().min() > 1e-6


# ------------------------------------------------------------------------------------------------------- agents


def at(name):
    return ("agents", name)


GROUP = {name: at(name) for name in ("action", "reward", "done", "terminated", "state_action_value")}


def make_group(rows, steps):
    """A batch as TorchRL's multi-agent environments give it, ``[rows, steps]`` with a group of agents behind."""
    shape = (rows, steps, AGENTS)

    def group(**entries):
        return TensorDict(observation=torch.randn(*shape, OBSERVATION).double(), **entries, batch_size=shape)

    batch = TensorDict(agents=group(action=random_actions(*shape) * 0.9), batch_size=shape[:2])
    rewards = {"reward": torch.randn(*shape, 1).double(), "done": flags(*shape), "terminated": flags(*shape)}
    batch["next"] = TensorDict(agents=group(**rewards), batch_size=shape[:2])
    return batch


def make_group_actor():
    actor = PMOEActor(
        K,
        spec=Composite(agents=Composite(action=Bounded(-1, 1, (AGENTS, ACTION)), shape=(AGENTS,))),
        in_features=OBSERVATION,
        in_keys=[at("observation")],
        param_keys=[at("logits"), at("loc"), at("scale")],
        num_cells=(8,),
        head_init=0.5,
        return_log_prob=True,
    )
    return actor.double()


def group_critic(outputs, **kwargs):
    keys = {"in_keys": [at("observation"), at("action")], "out_keys": [at("state_action_value")]}
    return ValueOperator(Agents(outputs, **kwargs).double(), **keys)


def make_group_loss(kind, **kwargs):
    actor, options = make_group_actor(), {"share_params": True, "centralized": False, **kwargs}
    if kind is PMOEClipPPOLoss:
        mlp = MLP(in_features=OBSERVATION, out_features=1, num_cells=[8]).double()
        value = ValueOperator(mlp, in_keys=[at("observation")], out_keys=[at("state_value")])
        loss = kind(actor, value, group_critic(1, **options))
        names = {"value": "state_value", "sample_log_prob": "action_log_prob"}
        names |= {name: name for name in ("advantage", "value_target")}
        loss.set_keys(**GROUP, **{name: at(key) for name, key in names.items()})
    else:
        loss = kind(actor, group_critic(5 if kind is PMOETQCLoss else 1, **options), target_entropy=-2.0)
        loss.set_keys(**GROUP, log_prob=at("action_log_prob"))
    loss.make_value_estimator(gamma=0.9)
    return loss


@pytest.mark.parametrize("centralized", [True, False])
@pytest.mark.parametrize("share_params", [True, False])
@pytest.mark.parametrize("kind", LOSSES)
def test_agents_of_a_group_are_scored_each(kind, share_params, centralized, monkeypatch):
    """Batches ``[E, T]`` with actions ``[E, T, n, A]``: the router learns from every agent."""
    loss = make_group_loss(kind, share_params=share_params, centralized=centralized)
    batch = make_group(2, 4)
    same_noise(monkeypatch)
    with torch.no_grad():
        if kind is PMOEClipPPOLoss:
            batch = loss.actor_network(batch)
        dist = loss.actor_network.get_dist(batch.clone())
        proposals = dist.propose().action
        scores = one_by_one(loss, batch, proposals)
        torch.testing.assert_close(loss.score_proposals(batch, proposals), scores)
    assert scores.shape == (2, 4, AGENTS, K)
    if kind is PMOETQCLoss:
        pytest.skip("TorchRL's TQCLoss takes no batches with agents behind; their proposals are scored all the same")
    best = torch.nn.functional.one_hot(scores.argmax(-1), K).double()
    expected = (dist.probs - best).square().mean(-1)
    out = loss(batch)
    torch.testing.assert_close(out["loss_routing"], expected.mean())
    torch.testing.assert_close(out["best_expert_value"], scores.amax(-1).mean())
    assert out["expert_usage"].shape == (K,)
    sum(value for key, value in out.items() if key.startswith("loss_")).backward()
    assert all(p.grad.norm() > 0 for p in loss.actor_network_params.values(True, True) if p.requires_grad)
    loss.reduction, loss.scalar_output_mode = "none", "exclude"
    torch.testing.assert_close(loss(batch)["loss_routing"], expected)


class Joint(Agents):
    """One value for all agents of a state."""

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return super().forward(observation, action).mean(-2)


def test_one_value_for_the_actions_of_several_agents_is_refused():
    keys = {"in_keys": [at("observation"), at("action")], "out_keys": ["state_action_value"]}
    critic = ValueOperator(Joint(1, share_params=True, centralized=True).double(), **keys)
    loss = PMOESACLoss(make_group_actor(), critic)
    loss.set_keys(action=at("action"))
    with pytest.raises(
        ValueError, match=r"one value per action, got values of shape \(2, 4\) for actions of shape \(2"
    ):
        loss.score_proposals(make_group(2, 4), random_actions(2, 4, AGENTS, K))


def test_entries_may_go_on_behind_the_batch():
    """A batch of size ``[]`` around eight rows is what TorchRL's own losses take too."""
    loss = make_loss(PMOESACLoss, plain)
    batch = make_batch(8)
    with torch.random.fork_rng():
        expected = loss.actor_loss(batch)[1]["best_expert_value"]
    batch.batch_size = []
    torch.testing.assert_close(loss.actor_loss(batch)[1]["best_expert_value"], expected)


# ---------------------------------------------------------------------------------------------- recurrent actors


def make_recurrent_actor(kind):
    if kind == "LSTM":
        keys = {"in_keys": ["observation", "h", "c"], "out_keys": ["features", ("next", "h"), ("next", "c")]}
        trunk = LSTMModule(input_size=OBSERVATION, hidden_size=HIDDEN, **keys)
    else:
        keys = {"in_keys": ["observation", "h"], "out_keys": ["features", ("next", "h")]}
        trunk = GRUModule(input_size=OBSERVATION, hidden_size=HIDDEN, **keys)
    params = ["logits", "loc", "scale"]
    heads = nn.Sequential(nn.Linear(HIDDEN, K * (2 * ACTION + 1)), MixtureParamExtractor(K))
    actor = ProbabilisticActor(
        TensorDictSequential(trunk, TensorDictModule(heads, in_keys=["features"], out_keys=params)),
        in_keys=params,
        distribution_class=TanhNormalMixture,
        return_log_prob=True,
        spec=Bounded(-1, 1, (ACTION,)),
    )
    return actor.double()


def stepped(actor, batch):
    """The mixture ``[B, T]``, the trunk run step by step."""
    dists, hidden = [], {}
    for step in batch.unbind(-1):
        step = step.select("observation", "is_init", "h", "c").update(hidden)
        dists.append(actor.get_dist(step))
        hidden = {name: step["next", name] for name in ("h", "c") if ("next", name) in step.keys(True)}
    parts = (torch.stack([getattr(dist, name) for dist in dists], 1) for name in ("logits", "loc", "scale"))
    return TanhNormalMixture(*parts)


@pytest.mark.parametrize("critic", ["GRU", "agents, shared parameters, own inputs"])
@pytest.mark.parametrize("trunk", ["LSTM", "GRU"])
@pytest.mark.parametrize("kind", LOSSES)
def test_recurrent_actors_learn_from_every_step(kind, trunk, critic, monkeypatch):
    actor, batch = make_recurrent_actor(trunk), make_batch(B, T)
    same_noise(monkeypatch)
    with torch.no_grad():
        dist = stepped(actor, batch)
    loss = make_loss(kind, CRITICS[critic], actor, vectorised=False)
    with set_recurrent_mode(True):
        with torch.no_grad():
            scores = one_by_one(loss, batch, dist.propose().action)
        if kind is PMOEClipPPOLoss:
            batch["action_log_prob"] = dist.log_prob(batch["action"])
            batch["advantage"], batch["value_target"] = torch.rand(2, B, T, 1).double()
        out = loss(batch)
    best = torch.nn.functional.one_hot(scores.argmax(-1), K).double()
    torch.testing.assert_close(out["loss_routing"], (dist.probs - best).square().mean())
    out["loss_routing"].backward()
    assert all(p.grad.norm() > 0 for key, p in actor.named_parameters() if "weight_hh" in key)


def test_the_best_expert_of_a_recurrent_actor_acts_and_remembers():
    actor = make_recurrent_actor("LSTM")
    loss = make_loss(PMOESACLoss, lstm, actor, vectorised=False)
    states = make_batch(B, 1)[:, 0].exclude("action", "next")
    acted = BestOfExpertsActor(actor, loss.score_proposals)(states)
    assert acted["action"].shape == (B, ACTION)
    assert acted["next", "h"].abs().sum() > 0
