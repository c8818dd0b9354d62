r"""Exact answers where the states can be counted: no sampling, float64.

Notation: S states, E edges of the DAG without the exits, :math:`u_i(s)` the probability that model i passes through s,
:math:`p_i(x) = u_i(x) P_i(\text{exit}|x)` its terminal distribution, :math:`h_i(s) = p(y_2 \dots y_n | s, y_1 = i)`.
Distributions are vectors over ``dag(model).states``, in lexicographic order: a 2-D grid's reshape to a picture.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from gfn.env import DiscreteEnv
from gfn.estimators import DiscretePolicyEstimator
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from sculpt.actions.states import NEG_INF, state_keys
from sculpt.classifier.guide import Guide, with_odds
from sculpt.formula import Formula
from sculpt.gflownet.environments import states_of, title
from sculpt.gflownet.estimators import LogProbPolicy
from sculpt.gflownet.model import GFlowNet, GuidedGFlowNet

__all__ = ["DAG", "ExactClassifier", "dag", "histogram", "js", "l1", "marginals", "solve", "target", "terminal_distribution"]

LIMIT = 200_000


@dataclass(frozen=True, eq=False)
class DAG:
    """All states and edges of an environment. Layer k: the states whose longest path from s₀ has k steps, and the edges they send.

    Example:
        >>> graph = sculpt.exact.dag(one)
        >>> graph.states.shape, len(graph.source)
        (torch.Size([1024, 2]), 1984)
    """

    states: Shaped[Tensor, "S *s"]
    keys: Int[Tensor, "S"]
    """hashes of the states, ascending, and"""
    places: Int[Tensor, "S"]
    """which state each belongs to"""
    source: Int[Tensor, "E"]
    action: Int[Tensor, "E"]
    target: Int[Tensor, "E"]
    layers: tuple[tuple[Tensor, slice], ...]
    allowed: Bool[Tensor, "S a"]
    start: int

    def index(self, states: Shaped[Tensor, "b *s"]) -> Int[Tensor, "b"]:
        """Where these states are in ``states``."""
        place = self.places[torch.searchsorted(self.keys, state_keys(states)).clamp_(max=len(self.keys) - 1)]
        if (wrong := (self.states[place] != states).flatten(1).any(-1)).any():
            raise ValueError(f"State {states[wrong][0].tolist()} cannot be reached from the initial state of this environment.")
        return place


_DAGS: weakref.WeakKeyDictionary[DiscreteEnv, DAG] = weakref.WeakKeyDictionary()


def dag(of: GFlowNet | GuidedGFlowNet | DiscreteEnv, limit: int = LIMIT) -> DAG:
    """Enumerate an environment from its initial state, by its own masks and steps.

    Example:
        >>> sculpt.exact.dag(one).states[:2]
        tensor([[0, 0],
                [0, 1]])
    """
    env = of if isinstance(of, DiscreteEnv) else of.env
    if env not in _DAGS:
        _DAGS[env] = _enumerate(env, limit)
    return _DAGS[env]


def _enumerate(env: DiscreteEnv, limit: int) -> DAG:
    def refuse(size: str) -> None:
        raise ValueError(
            f"{title(env)} has {size} states; exact answers count at most {limit}. Raise limit=, or sample instead."
        )

    with contextlib.suppress(NotImplementedError, AttributeError):  # some environments know before we count
        if env.n_states > limit:
            refuse(str(env.n_states))
    # A throw-away model for its children: any policy will do.
    model = GFlowNet(env, _Nothing(env.n_actions))
    wave = env.s0[None].clone()
    states, keys = wave, state_keys(wave)
    allowed, edges, first = [], [], 0
    while len(wave):
        mask = states_of(env, wave.clone()).forward_masks
        rows, actions, children = model.children(wave, mask)
        child_keys = state_keys(children)
        allowed.append(mask)
        new, place = torch.unique(child_keys, return_inverse=True)
        fresh = ~torch.isin(new, keys)
        # Any child with a new key stands for all of them; index() checks that no two states share one.
        some = torch.empty_like(new).scatter_(0, place, torch.arange(len(children), device=new.device))
        edges.append((rows + first, actions, children))
        first += len(wave)
        wave = children[some[fresh]]
        states, keys = torch.cat([states, wave]), torch.cat([keys, new[fresh]])
        if len(states) > limit:
            refuse(f"more than {limit}")
    order = _lexicographic(states)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    found = DAG(states[order], *keys[order].sort(), *[rank[:0]] * 3, (), torch.cat(allowed)[order], int(rank[0]))
    source, action, children = (torch.cat(parts) for parts in zip(*edges, strict=True))
    source, target = rank[source], found.index(children)
    order, layers = _topological(source, target, len(states), env)
    return replace(found, source=source[order], action=action[order], target=target[order], layers=layers)


def _lexicographic(states: Tensor) -> Int[Tensor, "S"]:
    order = torch.arange(len(states), device=states.device)
    for column in reversed(states.flatten(1).unbind(1)):
        order = order[column[order].argsort(stable=True)]
    return order


def _topological(source: Tensor, target: Tensor, n: int, env: DiscreteEnv) -> tuple[Tensor, tuple[tuple[Tensor, slice], ...]]:
    """Edges sorted by the layer of their source, and the layers."""
    layer = torch.full((n,), -1, device=source.device)
    waiting = torch.bincount(target, minlength=n)
    ready, depth = waiting == 0, 0
    while ready.any():
        layer[ready] = depth
        waiting = waiting - torch.bincount(target[ready[source]], minlength=n)
        ready, depth = (waiting == 0) & (layer < 0), depth + 1
    if (layer < 0).any():
        raise ValueError(f"{title(env)} has cycles: a GFlowNet's states have to form a directed acyclic graph.")
    order = layer[source].argsort(stable=True)
    ends = torch.bincount(layer[source], minlength=depth).cumsum(0).tolist()
    return order, tuple(((layer == k).nonzero()[:, 0], slice(a, b)) for k, (a, b) in enumerate(itertools.pairwise([0, *ends])))


# What base models and compositions do, exactly


def marginals(model: GFlowNet | GuidedGFlowNet, limit: int = LIMIT) -> Float[Tensor, "S"]:
    """u(s): mass one poured in at s₀ and pushed along the policy.

    Example:
        >>> float(sculpt.exact.marginals(one)[0])  # every trajectory passes the start
        1.0
    """
    return _push(model, dag(model, limit))[0]


def terminal_distribution(model: GFlowNet | GuidedGFlowNet, limit: int = LIMIT) -> Float[Tensor, "S"]:
    """p(x): where the mass leaves. Sums to one; zero for states that are no sample.

    Example:
        >>> p = sculpt.exact.terminal_distribution(one)
        >>> round(float(p.sum()), 6)
        1.0
    """
    u, P = _push(model, dag(model, limit))
    return u * P[:, -1]


@torch.no_grad()
def _push(model: GFlowNet | GuidedGFlowNet, graph: DAG) -> tuple[Float[Tensor, "S"], Float[Tensor, "S a"]]:
    """u(s) and P(s'|s), layer by layer. A policy is only asked about states that it reaches; elsewhere P is left at zero."""
    P = torch.zeros(graph.allowed.shape, dtype=torch.float64, device=model.device)
    u = torch.zeros(len(graph.states), dtype=torch.float64, device=model.device)
    u[graph.start] = 1.0
    for states, edges in graph.layers:
        reached = states[u[states] > 0]
        if len(reached):
            P[reached] = model.log_pf(graph.states[reached]).exp()
        source = graph.source[edges]
        u.index_add_(0, graph.target[edges], u[source] * P[source, graph.action[edges]])
    return u, P


def target(formula: Formula, distributions: Sequence[Float[Tensor, "S"]]) -> Float[Tensor, "S"]:
    r""":math:`\exp \Phi(\log p_1, \dots, \log p_m)`, normalised

    Example:
        >>> p, q = (sculpt.exact.terminal_distribution(model) for model in (one, two))
        >>> target = sculpt.exact.target((one & two).formula, [p, q])
        >>> torch.allclose(target, p * q / (p + q) / (p * q / (p + q)).sum())
        True
    """
    return torch.softmax(formula.value(torch.stack(list(distributions), dim=-1).log()), dim=0)


def histogram(
    of: GFlowNet | GuidedGFlowNet | DiscreteEnv, x: Shaped[Tensor, "n *s"], log_weights: Tensor | None = None
) -> Float[Tensor, "S"]:
    """The samples' distribution, over the same states.

    Example:
        >>> shares = sculpt.exact.histogram(one, one.sample(500, generator=seed).x)
        >>> shares.shape, round(float(shares.sum()), 6)
        (torch.Size([1024]), 1.0)
    """
    graph = dag(of)
    w = (
        torch.full((len(x),), 1 / len(x), dtype=torch.float64)
        if log_weights is None
        else torch.softmax(log_weights.double(), 0)
    )
    return torch.zeros(len(graph.states), dtype=torch.float64, device=x.device).index_add_(0, graph.index(x), w.to(x.device))


def l1(p: Float[Tensor, "S"], q: Float[Tensor, "S"]) -> float:
    r""":math:`\sum_x |p(x) - q(x)|`, between 0 and 2

    Example:
        >>> p, q = (sculpt.exact.terminal_distribution(model) for model in (one, two))
        >>> 0 == sculpt.exact.l1(p, p) < sculpt.exact.l1(p, q) < 2
        True
    """
    return (p - q).abs().sum().item()


def js(p: Float[Tensor, "S"], q: Float[Tensor, "S"]) -> float:
    """Jensen–Shannon divergence in nats, between 0 and log 2.

    Example:
        >>> p, q = (sculpt.exact.terminal_distribution(model) for model in (one, two))
        >>> 0 < sculpt.exact.js(p, q) < 0.6932  # log 2
        True
    """
    mean = (p + q) / 2
    return float(sum(torch.special.xlogy(r, r / mean).nan_to_num(0.0).sum() for r in (p, q)) / 2)


class ExactClassifier(Guide):
    r"""The classifier that training is to approximate, by a backward recursion from the end.

    .. math:: h_i(s) = P_i(\text{exit}|s) \prod_{k \ge 2} p_v(y_k|s) + \sum_{s'} P_i(s'|s) \, h_i(s')

    Example:
        >>> guided = sculpt.exact.terminal_distribution((one & two).guided(sculpt.exact.ExactClassifier([one, two])))
        >>> p, q = (sculpt.exact.terminal_distribution(model) for model in (one, two))
        >>> sculpt.exact.l1(guided, sculpt.exact.target((one & two).formula, [p, q])) < 1e-3
        True
    """

    def __init__(self, models: Sequence[GFlowNet | GuidedGFlowNet], observations: int = 2, limit: int = LIMIT):
        for model in models[1:]:
            models[0].check_composable(model)
        self.m, self.observations, self.keys = len(models), observations, tuple(model.key for model in models)
        self.dag = dag(models[0], limit)
        u, self._P = zip(*[_push(model, self.dag) for model in models], strict=True)
        self._marginal = _shares(torch.stack(u, dim=-1))
        self._terminal = _shares(torch.stack([u_i * P[:, -1] for u_i, P in zip(u, self._P, strict=True)], dim=-1))
        self._log_h: dict[tuple, Tensor] = {}

    def marginal(self, *state):
        return self._marginal[self.dag.index(*state)]

    def terminal(self, x):
        return self._terminal[self.dag.index(x)]

    def log_h(self, *state, labels, odds=None):
        at = (labels[0], *sorted(labels[1:]), odds and tuple(odds))
        if at not in self._log_h:
            self._log_h[at] = self._recursion(labels, odds)
        return self._log_h[at][self.dag.index(*state)]

    def _recursion(self, labels, odds) -> Float[Tensor, "S"]:
        P = self._P[labels[0]]
        h = P[:, -1] * with_odds(self._terminal, odds)[:, list(labels[1:])].sum(-1).exp()
        for _, edges in reversed(self.dag.layers):
            source = self.dag.source[edges]
            h.index_add_(0, source, P[source, self.dag.action[edges]] * h[self.dag.target[edges]])
        return h.log()


def _shares(p: Float[Tensor, "S m"]) -> Float[Tensor, "S m"]:
    """log p_i / Σ p; equal where no model comes."""
    return torch.where(p.sum(-1, keepdim=True) > 0, p / p.sum(-1, keepdim=True), 1 / p.shape[-1]).log()


# Base models with exact flows


def solve(
    env: DiscreteEnv,
    log_reward: Callable[[Tensor], Tensor] | Float[Tensor, "S"],
    backward: DiscretePolicyEstimator | None = None,
    *,
    name: str | None = None,
    limit: int = LIMIT,
) -> GFlowNet:
    r"""The GFlowNet that perfect training would give: :math:`P(s'|s) = F(s \to s') / F(s)`, flows summed backwards from the rewards.

    .. math:: F(s) = R(s) + \sum_{s'} F(s') \, P_B(s|s')

    Example:
        >>> uniform = sculpt.exact.solve(one.env, lambda x: torch.zeros(len(x)), name="uniform")
        >>> torch.allclose(sculpt.exact.terminal_distribution(uniform), torch.full((1024,), 1 / 1024).double())
        True
    """
    graph = dag(env, limit)
    log_R = log_reward(graph.states) if callable(log_reward) else log_reward
    log_R = torch.where(graph.allowed[:, -1], log_R.double(), NEG_INF)
    top = log_R.max()
    F = (log_R - top).exp()
    edge = torch.zeros(graph.allowed.shape, dtype=torch.float64, device=F.device)
    edge[:, -1] = F
    parents = GFlowNet(env, _Nothing(env.n_actions), backward)
    with torch.no_grad():
        P_B = parents.log_pb(graph.states).exp()
    for _, edges in reversed(graph.layers):
        source, action, child = graph.source[edges], graph.action[edges], graph.target[edges]
        flow = F[child] * P_B[child, action]
        edge[source, action] = flow
        F.index_add_(0, source, flow)
    # Where no reward can be reached no trajectory comes; any policy will do.
    edge = torch.where((F > 0)[:, None], edge, graph.allowed.double())
    return GFlowNet(env, TablePolicy(graph, (edge / edge.sum(-1, keepdim=True)).log()), backward, name=name)


class TablePolicy(LogProbPolicy):
    """Log-probabilities looked up per state."""

    def __init__(self, graph: DAG, log_P: Float[Tensor, "S a"]):
        super().__init__(nn.Identity(), log_P.shape[1])
        self.graph = graph
        self.register_buffer("log_P", log_P)

    def log_pf(self, states):
        return self.log_P[self.graph.index(states)]


class _Nothing(LogProbPolicy):
    """A place holder: enumeration asks for children, never for probabilities."""

    def __init__(self, n_actions: int):
        super().__init__(nn.Identity(), n_actions)

    def log_pf(self, states):
        raise NotImplementedError
