"""Critics that score the experts' proposals, and what every critic-scored loss shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from tensordict import NestedKey, TensorDictBase, TensorDictParams, unravel_key
from tensordict.nn import CompositeDistribution, TensorDictModule
from torch import Tensor, nn
from torchrl.objectives import LossModule, TQCLoss
from torchrl.objectives.utils import _vmap_func

from torchrl_pmoe.distributions import NormalMixture
from torchrl_pmoe.distributions.routing import (
    RoutingEstimator,
    RoutingGradient,
    ScoredProposals,
    find_estimator,
    host_can_read,
)
from torchrl_pmoe.modules.specs import refuse_unknown
from torchrl_pmoe.objectives.units import mixture_of

__all__ = [
    "CriticScoredLoss",
    "check_critic_keys",
    "mean_of_quantiles",
    "score_proposals",
    "smallest_of_critics",
]

ROUTING_LOSSES = ("brier", "log")
_DISTANCES = ("l2", "l1", "smooth_l1")
PARENT_CHOICES: dict[str, tuple[str | None, ...]] = {
    "loss_function": _DISTANCES,
    "loss_critic_type": _DISTANCES,
    "reduction": (None, "mean", "sum", "none"),
    "scalar_output_mode": (None, "exclude", "non_tensor"),
}
"""Options that TorchRL's own losses check in the first call only."""


Layouts = dict[tuple[int, int, bool], bool]
"""Whether critics need the leading dimensions folded into the batch, by the kind of batch; see :func:`_must_fold`."""


@torch.no_grad()
def score_proposals(
    loss: LossModule, tensordict: TensorDictBase, action: Tensor, *, per_critic: bool = False
) -> Tensor:
    """Value of every expert's proposal by the critics of a loss, all in one call and without gradient.

    The critics see the proposals as a new leading dimension, ``[K, *B, *G, A]``: they may read the last batch
    dimension as time or as agents.

    Args:
        loss: ours, or one of TorchRL's that holds a ``qvalue_network`` (``SACLoss``, ``TQCLoss``, ``CrossQLoss``, …).
        tensordict: states ``[*B]``.
        action: proposals ``[*B, K, A]``; of the agents of a group, ``[*B, *G, K, A]``. An expert's proposals of all
            agents are scored together.
        per_critic: give the value of each critic. Otherwise the critics are reduced to the value that the actor's loss
            maximises: the smallest, or for TQC the mean over critics and quantiles.

    Returns:
        ``[*B, K]``, or ``[*B, *G, K]``; with ``per_critic`` ``[N, *B, K]``, or ``[N, *B, *G, K]``, for ``N`` critics.

    Raises:
        KeyError: if the critics write no ``state_action_value`` or do not read the action.
        ValueError: if the critics cannot score all proposals in one call.
    """
    reduce: Callable[[Tensor], Tensor]
    if per_critic:
        reduce = _each_critic
    elif isinstance(loss, CriticScoredLoss):
        reduce = loss._reduce_critics
    else:
        reduce = mean_of_quantiles if isinstance(loss, TQCLoss) else smallest_of_critics
    # kept apart from what the loss's own updates found: a compiled update would be compiled again for a new entry
    answers = getattr(loss, "_scoring_layouts", None)
    if answers is None:
        answers = loss._scoring_layouts = {}
    action = action.movedim(-2, 0)  # [K, *B, *G, A]
    # not TorchRL's cache of them, which does not notice that a collector has put other parameters in place
    value = _values(loss, tensordict, action, 1, loss.qvalue_network_params, reduce, answers)
    return value.movedim(int(per_critic), -1)  # [(N,) K, *B, *G] to [(N,) *B, *G, K]


def smallest_of_critics(state_action_value: Tensor) -> Tensor:
    """Smallest value ``[*B]`` of the critics' ``[N, *B, 1]``."""
    return state_action_value.squeeze(-1).amin(0)


def mean_of_quantiles(state_action_value: Tensor) -> Tensor:
    """Mean ``[*B]`` over critics and quantiles ``[N, *B, quantiles]``."""
    return state_action_value.mean((0, -1))


def _each_critic(state_action_value: Tensor) -> Tensor:
    """Value ``[N, *B]`` of each critic, the mean of its outputs ``[N, *B, outputs]``."""
    return state_action_value.mean(-1)


def check_critic_keys(loss: Any) -> None:
    """Refuse critics that write no value or read no action.

    Raises:
        KeyError: with the key that is missing.
    """
    name, keys = type(loss).__name__, loss.tensor_keys
    written = [unravel_key(key) for key in loss.qvalue_network.out_keys]
    if unravel_key(keys.state_action_value) not in written:
        raise KeyError(
            f"{name}: the Q-network writes {written}, and {keys.state_action_value!r} is not among them; give it "
            f"out_keys=[{keys.state_action_value!r}] or call set_keys(state_action_value=...)."
        )
    action, read = _path(keys.action), [_path(key) for key in loss.qvalue_network.in_keys]
    # a Q-network may read the tensordict that holds the action
    if not any(action[: len(key)] == key for key in read):
        raise KeyError(
            f"{name}: the Q-network reads {loss.qvalue_network.in_keys}, and the action {keys.action!r} is not "
            "among them; proposals could not be told apart. Name it in the in_keys or call set_keys(action=...)."
        )


def _path(key: NestedKey) -> tuple[str, ...]:
    key = unravel_key(key)
    return (key,) if isinstance(key, str) else key


def _values(
    loss: Any,
    tensordict: TensorDictBase,
    action: Tensor,
    leading: int,
    params: TensorDictBase,
    reduce: Callable[[Tensor], Tensor],
    answers: Layouts,
) -> Tensor:
    """Values ``[*L, *B, *G]`` of actions ``[*L, *B, *G, A]`` in the states ``[*B]``, by one call of the critics.

    Args:
        loss: whose critics and keys count.
        tensordict: states ``[*B]``.
        action: ``[*L, *B, *G, A]``.
        leading: dimensions of ``*L``.
        params: of the critics.
        reduce: from the critics' outputs ``[N, *L, *B, *G, outputs]`` to the values that are returned.
        answers: see :func:`_must_fold`.
    """
    check_critic_keys(loss)
    states = tensordict.select(*loss.qvalue_network.in_keys, strict=False).exclude(loss.tensor_keys.action)
    fold = leading > 0 and _must_fold(loss, states, action, leading, answers)
    return _evaluate(loss, states, action, leading, params, reduce, fold=fold)


def _evaluate(
    loss: Any,
    states: TensorDictBase,
    action: Tensor,
    leading: int,
    params: TensorDictBase,
    reduce: Callable[[Tensor], Tensor],
    *,
    fold: bool,
) -> Tensor:
    """:func:`_values` in one of two layouts: the critics see a batch ``[*L, *B]``, or folded ``[L B_0, B_1, ...]``."""
    lead, batch = action.shape[:leading], states.batch_size
    states = states.expand(*lead, *batch)
    inputs = action
    if fold:
        states, inputs = states.flatten(0, leading), action.flatten(0, leading)
    states.set(loss.tensor_keys.action, inputs)
    outputs = _critics_of(loss)(states, params).get(loss.tensor_keys.state_action_value)
    if fold:
        outputs = outputs.unflatten(1, (*lead, batch[0]))  # [N, L B_0, ...] to [N, *L, *B, *G, outputs]
    value = reduce(outputs)
    found = value.shape[1:] if reduce is _each_critic else value.shape
    if found != action.shape[:-1]:
        raise ValueError(
            f"{type(loss).__name__}: the critics must give one value per action, got values of shape "
            f"{tuple(found)} for actions of shape {tuple(action.shape)}."
        )
    return value


def _critics_of(loss: Any) -> Callable[[TensorDictBase, TensorDictBase], TensorDictBase]:
    """All critics as one function of states and parameters; its outputs have the critics as first dimension."""
    found = getattr(loss, "_vmap_qnetworkN0", None)
    if found is not None:
        return found
    # TorchRL's losses name this function in several ways
    off = getattr(loss, "deactivate_vmap", False)
    return _vmap_func(loss.qvalue_network, (None, 0), randomness=loss.vmap_randomness, pseudo_vmap=off)


def _must_fold(loss: Any, states: TensorDictBase, action: Tensor, leading: int, answers: Layouts) -> bool:
    """Whether the critics want ``*L`` inside the first batch dimension; asked of them once for each kind of batch.

    Modules that know ``[*B, ...]`` take any leading dimension. Those that know a single batch dimension
    (``nn.GRU``, ``nn.Conv2d``, ``nn.BatchNorm1d``) do not. ``answers`` keeps what was found.
    """
    kind = (states.ndim, leading, loss.qvalue_network.training)
    fold = answers.get(kind)
    if fold is not None:
        return fold
    if not host_can_read(action):
        return False
    fold = _find_fold(loss, states, action, leading)
    if fold is not None:
        answers[kind] = fold
    return bool(fold)


@torch.no_grad()
def _find_fold(loss: Any, states: TensorDictBase, action: Tensor, leading: int) -> bool | None:
    """The layout in which the last proposal gets the value that it gets alone; ``None`` if values cannot tell.

    Random weights and disturbed actions are tried first: critics whose last layer starts at zero, or experts that
    propose the same action, give all proposals one value in every layout.

    Raises:
        ValueError: if the proposal gets that value in neither layout.
    """
    flat = action.flatten(0, leading - 1)  # [L, *B, *G, A]
    weights: TensorDictBase

    def evaluate(action: Tensor, leading: int, *, fold: bool) -> Tensor:
        # a copy of the weights: a critic may keep statistics
        return _evaluate(loss, states, action, leading, weights.clone(), _each_critic, fold=fold)

    # a critic may draw random numbers, and those of the run must stay as they are
    with torch.random.fork_rng(devices=[action.device] if action.is_cuda else []):
        disturbed = flat + torch.randn_like(flat)
        weights = _random_weights(loss.qvalue_network_params)
        alone = evaluate(disturbed[-1], 0, fold=False)
        if alone.isfinite().any():
            flat = disturbed
        else:  # these critics take no other weights or actions than their own
            weights = loss.qvalue_network_params.data
            alone = evaluate(flat[-1], 0, fold=False)
        ran: list[tuple[bool, Tensor]] = []
        why = ""
        for fold in (False, True) if states.ndim else (False,):
            try:
                value = evaluate(flat, 1, fold=fold)  # [N, L, *B, *G]
            except (RuntimeError, ValueError, IndexError) as error:
                why = why or f"it raises {type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            ran.append((fold, value[:, -1]))
            if _agree(value[:, -1], alone, value):
                return fold if value.any() else None
        if ran and not _agree(evaluate(flat[-1], 0, fold=False), alone, alone):
            return ran[0][0]  # a critic that draws random numbers never gives the same value twice
    if ran:
        apart = (ran[0][1] - alone).abs().max().item()
        why = f"a proposal's value beside the others is up to {apart:.2g} from its value alone"
    raise ValueError(
        f"{type(loss).__name__}: the critics cannot score the experts' proposals in one call, where these are the "
        f"first dimension of states {tuple(states.batch_size)}: {why}. A critic must treat what comes before the "
        "batch as separate inputs: no batch normalisation in training mode, no time or agents read from the first "
        "dimension."
    )


def _random_weights(params: TensorDictParams) -> TensorDictBase:
    """A copy of the critics' parameters with random weights, which keep an input's size; buffers (statistics) stay."""
    drawn = params.data.clone()
    for key, weight in params.items(True, True):
        if isinstance(weight, nn.Parameter) and weight.is_floating_point():
            # matrices are [N, ..., inputs], with N for the critics; the rest are biases, small beside the inputs
            size = weight.shape[-1] ** -0.5 if weight.ndim > params.ndim + 1 else 0.1
            drawn.set(key, size * torch.randn_like(weight))
    return drawn


def _agree(value: Tensor, other: Tensor, scale: Tensor) -> bool:
    """Whether two values differ by rounding alone, perhaps of two kernels; ``scale`` has numbers of their size."""
    single = value.is_cuda and value.dtype is torch.float32
    reduced = single and torch.get_float32_matmul_precision() != "highest"
    if reduced or torch.is_autocast_enabled(value.device.type):
        eps = torch.finfo(torch.bfloat16).eps
    elif single:
        # convolutions and recurrent kernels may round to TF32's ten bits, whatever the setting for matrix products
        eps = torch.finfo(torch.float16).eps
    else:
        eps = torch.finfo(value.dtype).eps
    size = scale.nan_to_num(0.0, 0.0, 0.0).abs().amax().item()
    return torch.allclose(value, other, rtol=0.0, atol=32 * eps + eps**0.4 * size, equal_nan=True)


class CriticScoredLoss:
    """Mixin that trains a router by the scores of a loss's critics; name it before TorchRL's loss among the bases.

    TorchRL's loss has ``actor_network``, ``qvalue_network`` with its parameters, and the keys ``action`` and
    ``state_action_value``. A subclass defines :meth:`_reduce_critics`, from its critics' outputs to one value, and
    :attr:`_temperature`, the weight of the entropy in the soft objective. The options are described in
    :class:`~torchrl_pmoe.objectives.PMOESACLoss`.
    """

    # not a LossModule itself: the metaclass would put an empty forward before the parent's
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    tensor_keys: Any
    _vmap_qnetworkN0: Callable[..., TensorDictBase]
    _cached_detached_qvalue_params: Any
    _make_vmap: Callable[[], None]

    def __getstate__(self) -> dict[str, Any]:
        # TorchRL caches the detached parameters, and a copy would score with those of the original; the vmapped
        # network is a local function, which cannot be pickled
        state = {**self.__dict__, "_cache": {}}
        del state["_vmap_qnetworkN0"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._make_vmap()

    def _set_routing(
        self,
        *,
        routing: str | RoutingGradient | RoutingEstimator,
        routing_coef: float,
        routing_loss: Literal["brier", "log"],
        num_proposals: int,
    ) -> None:
        name = type(self).__name__
        if routing_loss not in ROUTING_LOSSES:
            raise ValueError(f"{name}: routing_loss={routing_loss!r} is unknown; allowed: {', '.join(ROUTING_LOSSES)}.")
        if isinstance(num_proposals, bool) or not isinstance(num_proposals, int) or num_proposals < 1:
            raise ValueError(f"{name}: num_proposals={num_proposals!r} must be an integer of at least 1.")
        if not 0.0 <= routing_coef < float("inf"):
            raise ValueError(f"{name}: routing_coef={routing_coef!r} must be finite and not negative.")
        self.routing, self._estimator = find_estimator(routing, owner=name)
        self.routing_coef = routing_coef
        self.routing_loss = routing_loss
        self.num_proposals = num_proposals
        self._layouts: Layouts = {}

    @staticmethod
    def _unlisted(qvalue_network: Any) -> Any:
        """A list of one network becomes that network: TorchRL would register no parameters for the list."""
        single = isinstance(qvalue_network, list) and len(qvalue_network) == 1
        return qvalue_network[0] if single else qvalue_network

    @classmethod
    def _check_options(cls, options: Mapping[str, Any], *parents: type) -> None:
        """Refuse options that the parents do not know, and values that they would refuse in the first call only.

        Raises:
            TypeError: for an unknown option.
            ValueError: for a value that an option cannot have.
        """
        refuse_unknown(cls, options, *parents)
        for name, allowed in PARENT_CHOICES.items():
            if options.get(name, allowed[0]) not in allowed:
                raise ValueError(
                    f"{cls.__name__}: {name}={options[name]!r} is unknown; allowed: {', '.join(map(str, allowed))}."
                )
        number = options.get("num_qvalue_nets", 1)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{cls.__name__}: num_qvalue_nets={number!r} must be an integer of at least 1.")
        if not 0.0 < options.get("alpha_init", 1.0) < math.inf:
            raise ValueError(f"{cls.__name__}: alpha_init={options['alpha_init']!r} must be finite and positive.")

    @staticmethod
    def _check_actor(owner: str, actor: Any) -> None:
        kind, _ = mixture_of(actor)
        if isinstance(kind, type) and not issubclass(kind, NormalMixture):
            composite = " (critics can score the experts of one mixture only)" * issubclass(kind, CompositeDistribution)
            raise ValueError(
                f"{owner}: the actor's distribution must be NormalMixture or TanhNormalMixture, "
                f"got {kind.__name__}{composite}."
            )

    _own_out_keys: ClassVar[Sequence[str]] = ("loss_routing", "routing_entropy", "expert_usage", "best_expert_value")
    _out_keys: list[NestedKey] | None

    @property
    def out_keys(self) -> list[NestedKey]:
        """Keys of the output: the parent's, then ours. A call with keywords returns a tuple in this order."""
        if self._out_keys is None:
            self._out_keys = [*super().out_keys, *self._own_out_keys]  # type: ignore[misc]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[NestedKey]) -> None:
        self._out_keys = values

    def _reduce_critics(self, state_action_value: Tensor) -> Tensor:
        """One value per action, ``[*L, *B, *G]``, from the critics' outputs ``[N, *L, *B, *G, outputs]``."""
        raise NotImplementedError

    @property
    def _temperature(self) -> Tensor:
        """Weight of the entropy in the soft objective."""
        raise NotImplementedError

    @property
    def _draws(self) -> tuple[int, ...]:
        return (self.num_proposals,) if self.num_proposals > 1 else ()

    def _check_mixture(self, dist: Any, tensordict: TensorDictBase) -> None:
        if not isinstance(dist, NormalMixture):
            raise ValueError(
                f"{type(self).__name__}: the actor must describe a NormalMixture or TanhNormalMixture, "
                f"got {type(dist).__name__}."
            )
        # the mixture may have more batch dimensions than the tensordict: the agents of a group, an action each
        if dist.batch_shape[: tensordict.ndim] != tensordict.batch_size:
            raise ValueError(
                f"{type(self).__name__}: every state needs an action, got a mixture of batch shape "
                f"{tuple(dist.batch_shape)} for a tensordict of batch size {tuple(tensordict.batch_size)}."
            )

    def _critic_value(
        self,
        tensordict: TensorDictBase,
        action: Tensor,
        *,
        per_expert: bool,
        draws: int = 0,
    ) -> Tensor:
        """Value of actions in the states ``[*B]`` of ``tensordict``, by one call of the detached critics.

        Args:
            tensordict: states ``[*B]``.
            action: ``[*M, *B, *G, A]``, or ``[*M, *B, *G, K, A]`` per expert. ``*G`` are the agents of a group, if
                any.
            per_expert: whether the actions are proposals of the experts.
            draws: dimensions of ``*M``.

        Returns:
            ``[*M, *B, *G]``, or ``[*M, *B, *G, K]`` per expert.
        """
        params = self._cached_detached_qvalue_params
        if not per_expert:
            return _values(self, tensordict, action, draws, params, self._reduce_critics, self._layouts)
        action = action.movedim(-2, 0)  # [K, *M, *B, *G, A]
        value = _values(self, tensordict, action, draws + 1, params, self._reduce_critics, self._layouts)
        return value.movedim(0, -1)  # [K, *M, *B, *G] to [*M, *B, *G, K]

    def score_proposals(self, tensordict: TensorDictBase, action: Tensor, *, per_critic: bool = False) -> Tensor:
        """:func:`score_proposals` by the critics of this loss; :class:`BestOfExpertsActor` takes this method."""
        return score_proposals(self, tensordict, action, per_critic=per_critic)

    def _scored(self, dist: NormalMixture, values: Tensor, log_prob: Tensor | Callable[[], Tensor]) -> ScoredProposals:
        return ScoredProposals(dist, values, self._temperature, log_prob, self.routing_loss)

    def _loss_routing(self, scored: ScoredProposals) -> Tensor:
        """Routing loss ``[*B]``, coefficient included."""
        loss = self._estimator(scored)
        if loss.shape != scored.dist.batch_shape:
            raise ValueError(
                f"{type(self).__name__}: routing must return a loss of shape {tuple(scored.dist.batch_shape)}, one "
                f"number for each state, got shape {tuple(loss.shape)}."
            )
        return self.routing_coef * loss

    @torch.no_grad()
    def _diagnostics(self, scored: ScoredProposals) -> dict[str, Tensor]:
        log_probs = scored.logits.log_softmax(-1).reshape(-1, scored.dist.num_experts)  # [*B, K] to [B, K]
        probs = log_probs.exp()
        return {
            "routing_entropy": -(probs * log_probs).sum(-1).mean(),
            "expert_usage": probs.mean(0),
            "best_expert_value": scored.values.amax(-1).mean(),
        }
