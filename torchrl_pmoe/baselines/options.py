"""Actors over options: a master policy picks an option, which acts until its termination ends it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import InteractionType, TensorDictModule, TensorDictModuleBase
from tensordict.nn.probabilistic import interaction_type
from tensordict.nn.utils import mappings
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, one_hot
from torchrl.data import Categorical, TensorSpec
from torchrl.envs import TensorDictPrimer
from torchrl.modules import IndependentNormal, TanhNormal

from torchrl_pmoe.distributions import NormalMixture, TanhNormalMixture
from torchrl_pmoe.modules.heads import ClampedExp
from torchrl_pmoe.modules.networks import ExpertNetwork, ExpertOptions, expert_network, pop_expert_options
from torchrl_pmoe.modules.specs import box_of_floats, refuse_unknown, try_distribution, with_bounds

__all__ = ["OptionActor", "OptionPolicy"]


def _log_prob_key(key: NestedKey) -> NestedKey:
    """``action_log_prob`` for ``action``, beside it where it is nested."""
    *parents, name = (key,) if isinstance(key, str) else key
    return unravel_key((*parents, f"{name}_log_prob"))


def _of_option(values: Tensor, option: Tensor) -> Tensor:
    """From ``values`` ``[*B, K, ...]`` those of one option ``[*B, 1]`` per state, ``[*B, ...]``."""
    index = option.reshape(*option.shape, *[1] * (values.ndim - option.ndim))
    return values.take_along_dim(index, option.ndim - 1).squeeze(option.ndim - 1)


@dataclass(frozen=True)
class OptionPolicy:
    """Master policy, terminations and the options' own policies in a batch of states.

    Args:
        logits: of the master policy ``pi(o | s)``, ``[*B, K]``.
        termination_logits: of the probability ``beta_o(s)`` that option ``o`` ends in ``s``, ``[*B, K]``.
        loc: of the options' Gaussians, ``[*B, K, A]``.
        scale: of the options' Gaussians, ``[*B, K, A]``.
        distribution_class: of an option's action.
        distribution_kwargs: more of its arguments.
    """

    logits: Tensor
    termination_logits: Tensor
    loc: Tensor
    scale: Tensor
    distribution_class: type[IndependentNormal | TanhNormal]
    distribution_kwargs: Mapping[str, Any]

    @property
    def termination_prob(self) -> Tensor:
        """``beta_o(s)``, ``[*B, K]``."""
        return self.termination_logits.sigmoid()

    @property
    def master_log_prob(self) -> Tensor:
        """``log pi(o | s)``, ``[*B, K]``."""
        return self.logits.log_softmax(-1)

    def option_log_prob(self, previous_option: Tensor, is_init: Tensor | None = None) -> Tensor:
        """The high level's ``log pi^H(o | o', s)`` of every option.

        ``pi^H = (1 - beta_o'(s)) 1[o = o'] + beta_o'(s) pi(o | s)``, and ``pi`` alone where an episode begins.

        Args:
            previous_option: ``o'``, ``[*B, 1]`` or ``[*B]``; ignored where an episode begins.
            is_init: whether an episode begins, ``[*B, 1]`` or ``[*B]``; unset, none does.

        Returns:
            ``[*B, K]``.
        """
        master = self.master_log_prob
        previous_option = previous_option.reshape(*master.shape[:-1], 1)
        ends = self.termination_logits.take_along_dim(previous_option, -1)  # logit of beta_o'(s), [*B, 1]
        # in logarithms, because probabilities near 0 and 1 would lose their digits
        same = one_hot(previous_option.squeeze(-1), master.shape[-1]).bool()  # [*B, K]
        stays = torch.where(same, logsigmoid(-ends), -torch.inf)
        log_prob = torch.logaddexp(stays, logsigmoid(ends) + master)
        if is_init is None:
            return log_prob
        return torch.where(is_init.reshape(*master.shape[:-1], 1), master, log_prob)

    def dist_high(self, previous_option: Tensor, is_init: Tensor | None = None) -> torch.distributions.Categorical:
        """The high level's distribution over options, with the arguments of :meth:`option_log_prob`."""
        return torch.distributions.Categorical(logits=self.option_log_prob(previous_option, is_init))

    def dist_low(self, option: Tensor) -> IndependentNormal | TanhNormal:
        """The low level's ``pi^L(a | o, s) = pi_o(a | s)`` for options ``[*B, 1]`` or ``[*B]``."""
        option = option.reshape(*self.logits.shape[:-1], 1)
        return self.distribution_class(
            _of_option(self.loc, option), _of_option(self.scale, option), **self.distribution_kwargs
        )

    def dist(self, previous_option: Tensor, is_init: Tensor | None = None) -> NormalMixture:
        """The action's distribution over all options: a mixture with the weights ``pi^H``."""
        logits = self.option_log_prob(previous_option, is_init)
        if issubclass(self.distribution_class, TanhNormal):
            bounds = {name: self.distribution_kwargs[name] for name in ("low", "high")}
            return TanhNormalMixture(logits, self.loc, self.scale, **bounds)
        return NormalMixture(logits, self.loc, self.scale)


class OptionActor(TensorDictModuleBase):
    """Actor over ``K`` options: Gaussians, a termination each, and a master policy that picks the next one.

    The policy of the option framework, as the two levels of DAC (Zhang and Whiteson, *DAC: The Double Actor-Critic
    Architecture for Learning Options*, arXiv 1904.12691). In every step the high level draws an option from
    ``pi^H(o | o', s) = (1 - beta_o'(s)) 1[o = o'] + beta_o'(s) pi(o | s)``, or from ``pi(o | s)`` where an episode
    begins. Then the low level draws an action from ``pi_o(a | s)``.

    Reads what the network reads, ``is_init`` and ``previous_option``. Writes ``option`` and ``("next",
    "previous_option")``, both int64 ``[*B, 1]``, ``action`` ``[*B, A]`` and the log-densities ``option_log_prob`` and
    ``action_log_prob`` ``[*B]``, the latter of the action as stored. The environment must carry the option to the next
    step: give it an :class:`~torchrl.envs.InitTracker` and the transform of :meth:`make_tensordict_primer`. The option
    then lasts across the batches of a collector too.

    Exploration types other than ``RANDOM`` take the most probable option of ``pi^H`` and the centre of its Gaussian.

    Args:
        num_options: ``K``.

    Keyword Args:
        spec: of the action; its bounds become those of a ``TanhNormal``.
        in_features: size of the input; unset, the first call decides (lazy layers).
        in_keys: what the network reads; several are concatenated.
        network: any module that ends in ``K (2A + 2)`` features, in place of the built-in MLP: ``K`` master logits,
            ``K`` termination logits, ``K A`` locs and ``K A`` values for the scale, the last two option by option.
        num_cells: hidden layers of the built-in MLP, a trunk that the options share.
        router: what master policy and terminations read: ``"separate"`` for an MLP of their own, ``"shared"`` features
            of the trunk, ``"detached"`` without their gradient, or a module from the inputs to ``2K`` logits.
        distribution_class: ``TanhNormal`` or ``IndependentNormal``, TorchRL's.
        distribution_kwargs: options of the distribution.
        action_key: where the action goes.
        option_key: where the option goes.
        previous_option_key: where the option of the step before is read.
        is_init_key: where the mark of an episode's first step is read.
        default_interaction_type: used where no ``set_exploration_type`` says otherwise.
        device: of the built-in network.
        **kwargs: ``activation_class`` (``nn.Tanh``), ``state_dependent_scale`` (``False``), ``scale_mapping`` and
            ``head_init``; see :class:`~torchrl_pmoe.modules.ExpertOptions`.

    Raises:
        TypeError: for an unknown option.
        ValueError: for fewer than one option, a spec that is not a box of floats, a bounded distribution over
            unbounded actions, or an unknown option.
        KeyError: on a call, where the option of the step before or the mark of a first step is missing.

    Examples:
        >>> actor = OptionActor(4, spec=Bounded(-1, 1, (6,)), in_features=17)
        >>> env = TransformedEnv(GymEnv("HalfCheetah-v4"), Compose(DoubleToFloat(), InitTracker()))
        >>> env = env.append_transform(actor.make_tensordict_primer())
        >>> env.rollout(3, actor)["option"].shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        num_options: int,
        *,
        spec: TensorSpec,
        in_features: int | None = None,
        in_keys: Sequence[NestedKey] = ("observation",),
        network: nn.Module | None = None,
        num_cells: Sequence[int] = (64, 64),
        router: Literal["detached", "shared", "separate"] | nn.Module = "separate",
        distribution_class: type[IndependentNormal | TanhNormal] = TanhNormal,
        distribution_kwargs: Mapping[str, Any] | None = None,
        action_key: NestedKey = "action",
        option_key: NestedKey = "option",
        previous_option_key: NestedKey = "previous_option",
        is_init_key: NestedKey = "is_init",
        default_interaction_type: InteractionType = InteractionType.RANDOM,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(OptionActor, kwargs, ExpertOptions, without=["scale_lb", "loc_spread", "floor"])
        options = pop_expert_options(kwargs, activation_class=nn.Tanh, state_dependent_scale=False)
        if isinstance(num_options, bool) or not isinstance(num_options, int) or num_options < 1:
            raise ValueError(f"OptionActor: num_options={num_options!r} must be an integer of at least 1.")
        spec = box_of_floats("OptionActor", spec if device is None else spec.to(device))
        kinds = (TanhNormal, IndependentNormal)
        if not (isinstance(distribution_class, type) and issubclass(distribution_class, kinds)):
            name = getattr(distribution_class, "__name__", repr(distribution_class))
            raise ValueError(f"OptionActor: distribution_class must be TanhNormal or IndependentNormal, got {name}.")
        bounds: Mapping[str, Any] = distribution_kwargs or {}
        if issubclass(distribution_class, TanhNormal):
            bounds = with_bounds("OptionActor", spec, bounds, bounded="TanhNormal", unbounded="IndependentNormal")
        # the density of the mixture over options knows no such map
        if bounds.get("tanh_loc"):
            raise ValueError("OptionActor: tanh_loc=True is not supported: the mixture of the options has no such loc.")
        try_distribution("OptionActor", distribution_class, bounds, loc=spec.zero(), scale=spec.zero() + 1)
        if network is None:
            network = expert_network(
                "OptionActor",
                num_options,
                spec.shape[-1],
                router_size=2 * num_options,
                in_features=in_features,
                num_cells=num_cells,
                router=router,
                options=options,
                device=device,
            )
        in_keys = [in_keys] if isinstance(in_keys, str) else list(in_keys)
        self.num_options = num_options
        self.action_size = spec.shape[-1]
        self.network = TensorDictModule(network, in_keys=in_keys, out_keys=["option_features"])
        scale_mapping = ClampedExp() if options.scale_mapping is None else options.scale_mapping
        self.scale_mapping = mappings(scale_mapping) if isinstance(scale_mapping, str) else scale_mapping
        self.distribution_class = distribution_class
        self.distribution_kwargs = bounds
        self.action_key = unravel_key(action_key)
        self.option_key = unravel_key(option_key)
        self.previous_option_key = unravel_key(previous_option_key)
        self.is_init_key = unravel_key(is_init_key)
        self.log_prob_key, self.option_log_prob_key = map(_log_prob_key, (self.action_key, self.option_key))
        self.default_interaction_type = default_interaction_type
        self.in_keys = [*in_keys, self.is_init_key, self.previous_option_key]
        self.out_keys = [
            self.option_key,
            self.option_log_prob_key,
            self.action_key,
            self.log_prob_key,
            unravel_key(("next", self.previous_option_key)),
        ]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """Transform that gives an environment the entry ``previous_option``; use it with an ``InitTracker``."""
        spec = Categorical(self.num_options, shape=(1,), dtype=torch.int64)
        return TensorDictPrimer({self.previous_option_key: spec}, default_value=0, expand_specs=True)

    def get_policy(self, tensordict: TensorDictBase) -> OptionPolicy:
        """Master policy, terminations and options in the states of ``tensordict``.

        Raises:
            ValueError: if the network ends in another number of features.
        """
        inputs = (tensordict.get(key) for key in self.network.in_keys)
        features = self.network.module(*inputs)
        options, size = self.num_options, self.num_options * self.action_size
        if features.shape[-1] != 2 * (options + size):
            raise ValueError(
                f"OptionActor: the network must end in {options} * (2 * {self.action_size} + 2) = "
                f"{2 * (options + size)} features, got {features.shape[-1]}."
            )
        # [*B, K], [*B, K], [*B, K A], [*B, K A]; the last two become [*B, K, A]
        logits, termination_logits, loc, scale = features.split((options, options, size, size), -1)
        return OptionPolicy(
            logits,
            termination_logits,
            loc.unflatten(-1, (options, self.action_size)),
            self.scale_mapping(scale).unflatten(-1, (options, self.action_size)),
            self.distribution_class,
            self.distribution_kwargs,
        )

    def _previous_option(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Option of the step before, and whether this is an episode's first step, ``[*B, 1]`` each."""
        found = [tensordict.get(key, None) for key in (self.previous_option_key, self.is_init_key)]
        for key, value in zip((self.previous_option_key, self.is_init_key), found, strict=True):
            if value is None:
                raise KeyError(
                    f"OptionActor: there is no {key!r} in the input; the environment needs an InitTracker and "
                    "actor.make_tensordict_primer()."
                )
        return found[0], found[1]

    def get_dist(self, tensordict: TensorDictBase) -> NormalMixture:
        """The action's distribution over all options, a mixture with the weights ``pi^H``."""
        return self.get_policy(tensordict).dist(*self._previous_option(tensordict))

    def get_dist_high(self, tensordict: TensorDictBase) -> torch.distributions.Categorical:
        """The distribution ``pi^H`` over options, given the one before."""
        return self.get_policy(tensordict).dist_high(*self._previous_option(tensordict))

    def get_dist_low(self, tensordict: TensorDictBase) -> IndependentNormal | TanhNormal:
        """The distribution of the action under the option that ``tensordict`` holds."""
        return self.get_policy(tensordict).dist_low(tensordict.get(self.option_key))

    def act(self, tensordict: TensorDictBase, *, draw_option: bool, draw_action: bool) -> TensorDictBase:
        """Write option, action and their log-densities into ``tensordict``.

        Args:
            tensordict: the states, ``[*B]``.
            draw_option: draw the option, and do not take the most probable one.
            draw_action: draw the action, and do not take the centre of the option's Gaussian.
        """
        policy = self.get_policy(tensordict)
        # the high level first: the low level's Gaussian is that of the option it draws
        high = policy.dist_high(*self._previous_option(tensordict))
        option = high.sample() if draw_option else high.logits.argmax(-1)
        low = policy.dist_low(option)
        action = low.sample() if draw_action else low.deterministic_sample
        # the environment hands next.previous_option to the following step
        option_entry = option.unsqueeze(-1)  # [*B] to [*B, 1]
        tensordict.set(self.option_key, option_entry)
        tensordict.set(self.option_log_prob_key, high.log_prob(option))
        tensordict.set(self.action_key, action)
        tensordict.set(self.log_prob_key, low.log_prob(action))
        return tensordict.set(unravel_key(("next", self.previous_option_key)), option_entry)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act as the exploration type says."""
        draw = (interaction_type() or self.default_interaction_type) is InteractionType.RANDOM
        return self.act(tensordict, draw_option=draw, draw_action=draw)

    def router_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the master policy and the terminations, for an optimiser group of their own.

        Raises:
            ValueError: if the actor was made with ``network``.
        """
        if not isinstance(self.network.module, ExpertNetwork):
            raise ValueError("OptionActor: only the built-in network has a router that can be told apart.")
        return self.network.module.router.parameters()
