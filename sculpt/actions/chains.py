r"""The chains of models that write their samples action by action: one alone, one steered by a classifier, several tracked.

Only particles that are still going are touched, equal states are evaluated once, and all randomness is one inverse-cdf draw per
step from ``generator``. ``b`` particles, ``a`` actions with the exit last, ``m`` models, ``u`` different states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sculpt.actions.factors import Factors, Filled
from sculpt.actions.paths import ONE_PARENT, Disagreement, children_log_pb, disagreement, path_ratios
from sculpt.actions.reading import Reading, emptied, read
from sculpt.actions.states import NEG_INF, draw
from sculpt.chain import Chain, Settings
from sculpt.diagnostics import APART
from sculpt.formula import Formula, Nested
from sculpt.particles import systematic
from sculpt.state import State

if TYPE_CHECKING:
    from sculpt.actions.guidance import Guidance
    from sculpt.actions.model import ActionModel, GuidedActions
    from sculpt.factor import Factor
    from sculpt.particles import Population

__all__ = ["ActionChain", "DensityCorrectedChain", "GuidedChain", "TrackedChain", "Written"]

LOOKED_AT = 64
"""Finished samples whose paths are compared."""


@dataclass
class Written(State):
    """What has been written so far, whether it goes on, what is carried along (log h, log-densities), and what the policies keep of it."""

    states: Shaped[Tensor, "b *s"]
    going: Bool[Tensor, "b"]
    carry: Float[Tensor, "b k"] | None = None
    memory: tuple[Any, ...] | None = None


Proposal = tuple[Float[Tensor, "b"] | None, Int[Tensor, "b"], Float[Tensor, "b k"] | None]
"""The log-weight increments, the actions, and what to carry on."""


class ActionChain(Chain):
    """One model alone."""

    def __init__(self, model: ActionModel, settings: Settings, road: str = "base model"):
        self.model, self.road, self.device = model, road, model.device
        self.exit, self.longest = model.n_actions - 1, model.longest
        self.batch_size = settings.batch_size or model.batch_size
        self.generator, self.said = settings.generator, []  # type: ignore[var-annotated]
        self.readers: tuple[ActionModel, ...] = (model,)

    def start(self, n, generator):
        going = torch.ones(n, dtype=torch.bool, device=self.device)
        return Written(self.model.start(n), going, self.carried(n)), self.first(n)

    def step(self, state, log_w, generator):
        reading = read(self.readers, state.states, state.memory)
        increment, actions, carry = self.propose(reading, state.carry, generator)
        go = actions != self.exit
        on = go.nonzero()[:, 0]
        states = self.model.step(state.states[on], actions[on])
        if len(on) < len(go):
            states = state.states.index_copy(0, on, states)
        return Written(states, go, carry, reading.memory), increment

    def done(self, state):
        return ~state.going

    def at_rest(self, state):
        return state if state.memory is None else replace(state, memory=emptied(state.memory))

    def end(self, state, log_w, generator):
        return state.states, None

    def notes(self, x, generator):
        return [*self.said, *self.model.notes(x)]

    def follow(self, found: Disagreement) -> float:
        """Keep what the verdict and the notes want to know; what it adds to log Z."""
        self.apart, self.said = found.apart, [found.said] if found.said else []
        return found.shift

    def carried(self, n: int) -> Tensor | None:
        """What n particles carry along at first."""
        return None

    def first(self, n: int) -> Tensor | None:
        """Their first log-weights."""
        return None

    def propose(self, reading: Reading, carry: Tensor | None, generator: torch.Generator | None) -> Proposal:
        """One action for each particle."""
        return None, draw(reading.log_p[0], reading.rows, generator), None


class GuidedChain(ActionChain):
    r"""A guided composition with the weights of its paths, as a diagnostic or, ``corrected``, to select:

    .. math::
        \log w_0 = \log h(s_0), \qquad
        \log w \mathrel{+}= \log h(s') - \log h(s) + \log P_{y_1}(s'|s) - \log P(s'|s)

    With :math:`P(s'|s) = P_{y_1}(s'|s) h(s') / N(s)` a step adds :math:`\log N(s) - \log h(s)`, h(s) as it was when s was entered.
    At the exit h is the terminal head's, so corrected samples are exact for it, whatever h is in between.
    """

    def __init__(self, model: GuidedActions, settings: Settings, corrected: bool = False):
        super().__init__(model, settings, "classifier, anchored form" + ", corrected" * corrected)
        self.guidance: Guidance = model.guidance
        self.log_scale, self.corrected, self.readers = 0.0, corrected, self.guidance.asked

    def carried(self, n):
        return self.guidance.log_h(self.model.start(1)).expand(n)[:, None].clone()

    def first(self, n):
        return self.guidance.log_h(self.model.start(1)).expand(n) + self.log_scale

    def propose(self, reading, carry, generator):
        rows = reading.rows
        log_p, log_h = self.guidance.scores(reading.states, reading.log_p)
        log_N = torch.logsumexp(log_p + log_h, dim=-1)
        actions = draw(log_p + log_h - log_N[:, None], rows, generator)
        return log_N[rows] - carry[:, 0], actions, log_h[rows, actions, None]

    def slip(self, state, population):
        """Weights are exact for the terminal head and cannot see its own errors; models that know their densities can."""
        guidance = self.guidance
        if self.corrected and all(model.knows_density for model in guidance.models) and len(guidance.labels) > 1:
            x = _some(state, population, self.generator)
            try:
                ell = path_ratios(guidance.models, x, self.generator, made_by=guidance.labels[0], paths=None)
            except NotImplementedError:  # the models cannot walk backwards
                return 0.0
            off = (guidance.log_h_end(x) - guidance.log_h_of(ell)).nan_to_num(nan=0.0)
            if not (apart := float(off.std(correction=0))) <= APART:
                self.doubt = (
                    f"the terminal head differs by {apart:.2g} nats from the models' own densities. Train the classifier longer, or take "
                    "correct='densities'."
                )
        return 0.0


class DensityCorrectedChain(GuidedChain):
    """Each trajectory carries the base models' log-densities along, and they take the terminal head's place at the exit: exact whatever
    the classifier, where a state has one parent or the flows balance. It selects at the end alone, unless told otherwise: by h,
    trajectories are thrown away on the word of a classifier that the densities overrule.
    """

    threshold = 0.0

    def __init__(self, model: GuidedActions, settings: Settings):
        super().__init__(model, settings, corrected=True)
        self.road += " by densities"
        self.readers = self.guidance.models
        self.batch_size = settings.batch_size or max(1, self.batch_size // len(self.guidance.models))

    def carried(self, n):
        log_h = super().carried(n)
        return torch.cat([log_h, log_h.new_zeros(n, len(self.guidance.models))], dim=1)

    def propose(self, reading, carry, generator):
        guidance, (log_h, ell), rows = self.guidance, carry.split([1, len(self.guidance.models)], dim=1), reading.rows
        anchor = reading.log_p[guidance.labels[0]]
        log_p, log_h_next = (part[rows] for part in guidance.scores(reading.states, [anchor]))
        ratio = _log_ratios(guidance.models, reading)
        stop = log_p[:, -1] > NEG_INF
        log_h_next[stop, -1] = guidance.log_h_of((ell + ratio[rows, -1])[stop])
        log_N = torch.logsumexp(log_p + log_h_next, dim=-1)
        dead = ~log_N.isfinite()  # only the exit is left, and not all labels are possible there
        log_pi = torch.where(dead[:, None], log_p, log_p + log_h_next - log_N[:, None])
        actions = draw(log_pi, torch.arange(len(rows), device=rows.device), generator)
        entered = log_h_next.gather(1, actions[:, None])
        carry = torch.cat([entered, ell + ratio[rows, actions]], dim=1)
        return torch.where(dead, log_N, log_N - log_h[:, 0]), actions, carry

    def slip(self, state, population):
        guidance, x = self.guidance, _some(state, population, self.generator)
        return self.follow(disagreement(guidance.posterior, guidance.models, x, self.generator, guidance.labels[0]))


class TrackedChain(ActionChain):
    r"""Any formula of the models' densities, which each trajectory carries along: nothing is trained.

    .. math::
        \ell_i(s') = \ell_i(s) + \log P_i(s'|s) - \log P_B^i(s|s'), \qquad \pi(s'|s) \propto e^{\Phi(\ell(s'))} P_B(s|s'), \qquad
        \log w \mathrel{+}= \log \textstyle\sum_{s'} e^{\Phi(\ell(s'))} P_B(s|s') - \Phi(\ell(s))
    """

    def __init__(self, formula: Formula, models: Sequence[ActionModel], settings: Settings, factors: Sequence[Factor] = ()):
        weighed = f", weighed by {', '.join(map(str, factors))}" if factors else ""
        super().__init__(models[0], settings, ("tracked densities" if len(models) > 1 else "base model") + weighed)
        self.target, self.models, self.readers, self.m = formula, models, tuple(models), len(models)
        self.factors = Factors(factors, models[0])
        self.batch_size = settings.batch_size or max(1, models[0].batch_size // len(models))
        self.shared = len({model.backward_key for model in models}) == 1
        # A common P_B only shifts the log-densities, and a formula of degree one takes a shift out of itself: then it cancels
        # in proposal and weight, and the children need not be visited. Nor are they where it is 1.
        self.cancels = self.shared and (_degree_one(formula) or models[0].backward_key == ONE_PARENT)

    def carried(self, n):
        return torch.zeros(n, self.m + len(self.factors), dtype=torch.float64, device=self.device)

    def first(self, n):
        return self.target.value(self.carried(n))

    def end(self, state, log_w, generator):
        x, carry = state.states, state.carry
        if not len(self.factors):
            return x, None
        known = torch.cat([carry[:, : self.m], self.factors.final(x)], dim=1)
        return x, self.target.value(known) - self.target.value(carry)

    def propose(self, reading, carry, generator):
        ell, (first, *others), unique, rows = carry, self.models, reading.states, reading.rows
        log_p = torch.stack(reading.log_p).movedim(0, -1)  # models first in memory: sums over them are then over whole tables
        log_b = torch.zeros(()).to(log_p) if self.cancels else children_log_pb(first, unique, log_p)
        own = [] if self.shared else [children_log_pb(model, unique, log_p) for model in others]
        # One column serves all where it is shared.
        ratio = log_p if self.cancels else log_p - torch.stack([log_b, *own]).movedim(0, -1)
        if len(self.factors):
            # What is said of children takes the place of what was said of the state.
            ell = torch.cat([ell[:, : self.m], torch.zeros_like(ell[:, self.m :])], dim=1)
            ratio = torch.cat([ratio, self.factors.ahead(unique, (log_p > NEG_INF).any(-1))], dim=-1)
        phi = self._phi(ell, ratio, rows) + (log_b if self.cancels else log_b[rows])
        log_N = torch.logsumexp(phi, dim=-1)
        dead = ~log_N.isfinite()
        if dead.any():  # nothing is left to go on with: the particle is lost, and any way out will do
            phi[dead] = log_p[rows[dead]].logsumexp(-1)
        log_pi = phi - torch.where(dead, 0.0, log_N)[:, None]
        actions = draw(log_pi, torch.arange(len(rows), device=rows.device), generator)
        return torch.where(dead, log_N, log_N - self.target.value(carry)), actions, ell + ratio[rows, actions]

    def _phi(self, ell: Float[Tensor, "b m"], ratio: Float[Tensor, "u a m"], rows: Int[Tensor, "b"]) -> Float[Tensor, "b a"]:
        """The formula at every child, minus infinity where no model goes."""
        there = (ratio[..., : self.m] > NEG_INF).any(-1)
        if 2 * there.count_nonzero() > there.numel():  # most children are there
            children = ell.T[..., None] + ratio.movedim(-1, 0)[:, rows]
            return torch.where(there[rows], self.target.value(children.movedim(0, -1)), NEG_INF)
        each, action = there[rows].nonzero(as_tuple=True)
        phi = torch.full((len(rows), ratio.shape[1]), NEG_INF, dtype=torch.float64, device=rows.device)
        phi[each, action] = self.target.value(ell[each] + ratio[rows[each], action])
        return phi

    def slip(self, state, population):
        x = _some(state, population, self.generator)
        shift = self.follow(disagreement(self._target(x), self.models, x, self.generator))
        return math.hypot(shift, self._missed(population)) if _pushes(self.target) else shift

    def _target(self, x: Shaped[Tensor, "k *s"]) -> Formula:
        """The formula of the models' densities at these samples, with what the factors say of them."""
        return Filled(self.target, self.factors.final(x)) if len(self.factors) else self.target

    def _missed(self, population: Population) -> float:
        """By how much log Z is larger, say samples of the model that counts most, each with its weight.

        Where a formula pushes away from a model, particles may all leave at once for where it is small, and their equal weights see nothing of
        the rest.
        """
        a = self.target.gradient(torch.zeros(self.target.m, dtype=torch.float64))[: self.m]
        i, n = int(a.argmax()), max(2, population.n // 2)
        x = self.models[i].sample(n, generator=self.generator, progress=False).x
        try:
            ell = path_ratios(self.models, x, self.generator, made_by=i)
        except NotImplementedError:  # the models cannot walk backwards
            return 0.0
        log_w = self._target(x).value(ell) - ell[:, i]
        return max(0.0, float(log_w.logsumexp(0)) - math.log(n) - population.log_z)


def _some(state: Written, population: Population, generator: torch.Generator | None) -> Shaped[Tensor, "k *s"]:
    """Some of the finished samples, as their weights say."""
    return state.states[systematic(population.log_w, LOOKED_AT, generator)]


def _log_ratios(models: Sequence[ActionModel], reading: Reading) -> Float[Tensor, "u a m"]:
    r""":math:`\log P_i(s'|s) - \log P_B^i(s|s')` of every action, up to a common term where the models share their backward policy."""
    log_p = torch.stack(reading.log_p, dim=-1)
    if len({model.backward_key for model in models}) == 1:
        return log_p
    return log_p - torch.stack([children_log_pb(model, reading.states, log_p) for model in models], dim=-1)


def _pushes(formula: Formula) -> bool:
    """Whether a formula pushes away from one of its models: it falls where all densities are equal and that one rises."""
    a = formula.gradient(torch.zeros(formula.m, dtype=torch.float64)).clone()
    a[list(formula.factors)] = 0
    return bool((a < 0).any())


def _degree_one(formula: Formula) -> bool:
    if isinstance(formula, Nested):
        return all(_degree_one(part) for part in (formula.outer, *formula.parts))
    return abs(formula.degree - 1) < 1e-12
