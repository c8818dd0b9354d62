r"""Base models guided by a classifier, one action at a time.

Notation: :math:`P_i(s'|s)` policy of base model i, :math:`h(s) = p(y_2 \dots y_n \mid s, y_1)` with :math:`y_1` the anchor's label,
:math:`p_v(i|x)` the terminal head under the odds v. Children s' are named by the action a that leads there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sculpt.actions.reading import Memory, policy, read
from sculpt.actions.states import NEG_INF, distinct
from sculpt.classifier.guide import Guide
from sculpt.classifier.heads import Classifier
from sculpt.formula import Posterior
from sculpt.model import BaseModel, Steppable

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel

__all__ = ["Guidance"]


class Guidance:
    r"""The posterior of base models under n observations, one action at a time.

    .. math::
        \text{anchored}\quad P(s'|s, y) &\propto P_{y_1}(s'|s) \, h(s') \\
        \text{mixture}\quad P(s'|s, y) &\propto \sum_i p(y_1 = i|s) \, P_i(s'|s) \; p(y|s')

    At the exit the terminal head stands in for h: :math:`h(x) = \prod_{k \ge 2} p_v(y_k|x)`.
    """

    def __init__(
        self, posterior: Posterior, models: Sequence[BaseModel], classifier: Guide, form: str = "anchored", chunk: int = 2**16
    ):
        self.posterior, self.labels = posterior, posterior.labels
        self.odds = None if len(set(posterior.odds)) == 1 else posterior.odds
        self.models, self.classifier, self.form, self.chunk = tuple(models), classifier, form, chunk
        self.anchor: ActionModel = self.models[posterior.labels[0]]
        # A head over the children leaves their marginals out, which the mixture form wants.
        self.one_pass = form == "anchored" and isinstance(classifier, Classifier) and classifier.n_children > 1

    def log_h(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b"]:
        """log h(s), in the mixture form log p(y|s)."""
        log_h = torch.zeros(len(states), dtype=torch.float64, device=states.device)
        if len(self.labels) > 1:
            log_h = self.classifier.log_h(states, labels=self.labels, odds=self.odds).double()
        if self.form == "mixture":
            log_h = log_h + self.classifier.marginal(states)[:, self.labels[0]]
        self._check(log_h.isnan(), "the classifier's output is not a number", states)
        return log_h

    def log_h_end(self, x: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b"]:
        """The same where the trajectory ends, by the terminal head."""
        log_h = self.classifier.log_h_terminal(x, labels=self.labels, odds=self.odds).double()
        return log_h + self.classifier.terminal(x)[:, self.labels[0]] if self.form == "mixture" else log_h

    def log_h_of(self, ell: Float[Tensor, "b m"]) -> Float[Tensor, "b"]:
        """The same from the base models' log-densities, up to a constant common to them (anchored form)."""
        return self.posterior.value(ell) - ell[:, self.labels[0]]

    def check_densities(self) -> None:
        """Raise where one of the models has no density of its own to be carried along."""
        if other := [model for model in self.models if not isinstance(model, Steppable)]:
            raise ValueError(
                f"{other[0]} is a composition without a classifier of its own, so its density cannot be carried along a trajectory. "
                "Pass correct=True, or bind the inner classifier: inner.guided(its_classifier)."
            )

    @property
    def asked(self) -> tuple[ActionModel, ...]:
        """The models whose policies the classifier reweights: the anchor, or all of them."""
        return (self.anchor,) if self.form == "anchored" else self.models

    def proposal(self, states: Shaped[Tensor, "b *s"], log_p: Sequence[Float[Tensor, "b a"]]) -> Float[Tensor, "b a"]:
        """What the classifier is to reweight: the anchor's policy, or the mixture of all."""
        if self.form == "anchored":
            return log_p[0]
        each = torch.stack(list(log_p), dim=1)
        return torch.logsumexp(self.classifier.marginal(states).double()[..., None] + each, dim=1)

    def children_log_h(self, states: Shaped[Tensor, "b *s"], allowed: Tensor) -> Float[Tensor, "b a"]:
        """log h of every allowed child: by one pass where the classifier has a head over actions, else by visiting the children."""
        out = torch.full(allowed.shape, NEG_INF, dtype=torch.float64, device=states.device)
        if self.one_pass and len(self.labels) > 1:
            # Column 0 is the state itself, column 1 + a its child by a.
            scores = self.classifier.select(self.classifier.joint(states, odds=self.odds), self.labels)
            out[:, :-1] = torch.where(allowed[:, :-1], scores[:, 1:].double(), NEG_INF)
        else:
            few = max(1, self.chunk // allowed.shape[1])
            for first in range(0, len(states), few):
                rows, actions, children = self.anchor.children(states[first : first + few], allowed[first : first + few])
                unique, index = distinct(children)
                out[first + rows, actions] = self.log_h(unique)[index] if len(rows) else 0.0
        stop = allowed[:, -1]
        if stop.any():
            out[stop, -1] = self.log_h_end(states[stop])
        return out

    def scores(
        self, states: Shaped[Tensor, "b *s"], log_p: Sequence[Float[Tensor, "b a"]] | None = None
    ) -> tuple[Float[Tensor, "b a"], Float[Tensor, "b a"]]:
        r""":math:`\log P(s'|s)` of the proposal and :math:`\log h(s')`.

        Args:
            states: these.
            log_p: the policies of the models that are ``asked``, where they are known.
        """
        own = self.proposal(states, [policy(model, states) for model in self.asked] if log_p is None else log_p)
        log_h = self.children_log_h(states, own > NEG_INF)
        self._check(log_h.isnan().any(-1), "the classifier's output is not a number", states)
        self._check((own + log_h == NEG_INF).all(-1), "no action leads to where all labels are possible", states)
        return own, log_h

    def _check(self, bad: Tensor, why: str, states: Tensor) -> None:
        if bad.any():
            models = ", ".join(map(str, self.models))
            raise ValueError(f"The composition of {models} with labels {self.labels}: {why}, state {states[bad][0].tolist()}.")

    def log_pf(self, states: Shaped[Tensor, "b *s"]) -> Float[Tensor, "b a"]:
        """The guided policy, normalised, in float64."""
        unique, rows = distinct(states)
        return self._normalised(unique)[rows]

    def read(self, states: Shaped[Tensor, "b *s"], memory: Memory | None) -> tuple[Float[Tensor, "b a"], Memory | None]:
        """The same, with what the models have kept of the states before, and keep of these."""
        reading = read(self.asked, states, None if memory is None else memory.tensors)
        log_p = self._normalised(reading.states, reading.log_p)[reading.rows]
        return log_p, None if reading.memory is None else Memory(reading.memory)

    def _normalised(
        self, states: Shaped[Tensor, "u *s"], log_p: Sequence[Float[Tensor, "u a"]] | None = None
    ) -> Float[Tensor, "u a"]:
        own, log_h = self.scores(states, log_p)
        # With the exact classifier the sum over children is already h(s). A learned one drifts, so we normalise by the
        # sum instead of evaluating h(s).
        return torch.log_softmax(own + log_h, dim=-1)
