r"""The losses of whole trajectories of models that write action by action: cross-entropies, and the balance of the guided chain.

Notation: trajectory :math:`\tau` from :math:`s_0` to x, ``l`` states of all trajectories of a batch, ``u`` different states
among them, ``o`` odds, ``m`` anchors, ``k`` label sets. :math:`f(x) = \Pi_{k \ge 2} \, p_v(y_k|x)` by the terminal head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sculpt.actions.recordings import Trajectories
from sculpt.actions.states import NEG_INF, distinct
from sculpt.classifier.store import Draw

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel
    from sculpt.classifier.heads import Classifier

__all__ = ["GUIDED", "Balance", "Common", "odds_each"]

GUIDED = 2
"""Guided trajectories in a batch, for each trajectory of one model."""

Common = tuple[Tensor | None, Tensor | None]
"""What the parts of a batch share: its odds ``(o, m)``, and the mean of f over its samples ``(o, 1, 1, k)``."""


@dataclass(frozen=True)
class Balance:
    r"""Cross-entropies with :math:`p(y_1 = i|\tau)` in the place of the label, and the balance of whole trajectories.

    The guided chain :math:`P_i(s'|s) h_i(s') / N_i(s)` has the target's weights on all trajectories if and only if

    .. math:: R_i(\tau) = \log h_i(s_0) + \sum_t \bigl[ \log h_i(s_{t+1}) - \log N_i(s_t) \bigr] - \log f(x) = 0,

    where the exit's h is f: minus the log-weight that would correct the chain. At the optimum the residual is zero on every
    trajectory, so the gradient has no variance there; the cross-entropy of label sets drawn at the ends of trajectories has it
    everywhere.

    Args:
        models: the base models.
        composed: whether there are trajectories of compositions among those of the models.
    """

    models: tuple[ActionModel, ...]
    composed: bool

    def losses(
        self, classifier: Classifier, teacher: Classifier, part: Trajectories, draw: Draw, common: Common | None = None
    ) -> dict[str, Tensor]:
        """The losses of a batch, or of a part of one with what is common to all parts."""
        states, rows = distinct(part.states)
        log_P = self._log_P(states)
        odds, mean = common or (self._odds(classifier, draw, int((log_P > NEG_INF).sum())), None)
        features, start, log_h = self._log_h(classifier, states, (log_P > NEG_INF).any(-1), odds)
        with torch.no_grad():
            log_f = self._log_f(classifier, teacher.terminal(states), odds)
        steps = self._steps(log_P, log_h, log_f, rows, part.actions)
        log_f = log_f[:, rows[part.last], None]
        R = start - log_f + steps.new_zeros(len(steps), len(part.x), *steps.shape[2:]).index_add(1, part.owner, steps)
        w = self._importance(part.p[None, :, :, None], log_f, mean, start.detach(), R.detach(), 0 if draw.held_out else GUIDED)
        terminal = torch.log_softmax(classifier.terminal_head(features).float(), dim=-1)[rows[part.last]]
        end = -(part.p * terminal).sum(-1).mean()
        if self.composed:
            # A composition can live where p(y|x) is a thousandth, of which a cross-entropy sees nothing.
            said, true = (self._log_f(classifier, log_p, odds) for log_p in (terminal, part.p.clamp(min=1e-30).log()))
            end = end + (w * F.huber_loss(said, true, reduction="none")[:, :, None]).mean()
        return {
            "terminal": end,
            "marginal": F.cross_entropy(classifier.marginal_head(features).float()[rows], part.so_far),
            "joint": (w * F.huber_loss(R, torch.zeros_like(R), reduction="none", delta=5.0 if self.composed else 1.0)).mean(),
        }

    @torch.no_grad()
    def common(self, classifier: Classifier, teacher: Classifier, batch: Trajectories, draw: Draw) -> Common:
        """What all parts of this batch share."""
        chunks = distinct(batch.states)[0].split(self.models[0].batch_size)
        allowed = (
            sum(int((self._log_P(part.to(self.models[0].device)) > NEG_INF).sum()) for part in chunks) if classifier.odds else 1
        )
        odds = self._odds(classifier, draw, allowed)
        log_f = (self._log_f(classifier, teacher.terminal(x.to(self.models[0].device)), odds) for x in batch.x.split(256))
        return odds, sum(part.exp().sum(1, keepdim=True) for part in log_f)[:, :, None] / len(batch.x)

    @torch.no_grad()
    def _log_P(self, states: Tensor) -> Float[Tensor, "u a m"]:
        """All models' log-probabilities of all actions."""
        return torch.stack([model.log_pf(states).float() for model in self.models], dim=-1)

    def _odds(self, classifier: Classifier, draw: Draw, allowed: int) -> Float[Tensor, "o m"] | None:
        """The odds that a batch with so many allowed actions is seen under: trajectories are the same, so they cost the heads only."""
        odds = draw.log_odds(odds_each(allowed * len(classifier.set_head.sets)), classifier)
        return None if odds is None else odds.to(self.models[0].device)

    def _log_h(
        self, classifier: Classifier, states: Tensor, allowed: Bool[Tensor, "u a"], odds: Tensor | None
    ) -> tuple[Float[Tensor, "u w"], Float[Tensor, "o 1 m k"], Float[Tensor, "o c m k"]]:
        """Features of the states, and log h of the start and of each allowed child but the exit."""
        if classifier.n_children > 1:
            # Column 0 is the state itself, column 1 + a its child by a.
            every, place, (of, column) = states, torch.arange(len(states), device=states.device), allowed[:, :-1].nonzero().T
            column = column + 1
        else:
            # Most children are states of other trajectories, and want the network once.
            every, place = distinct(torch.cat([states, self.models[0].children(states, allowed)[2]]))
            of, column = place[len(states) :], torch.zeros_like(place[len(states) :])
        start = (every == self.models[0].start(1)).flatten(1).all(-1).nonzero()[0]
        features = classifier.network(every)
        of, column = torch.cat([start, of]), torch.cat([torch.zeros_like(start), column])
        each = [None] if odds is None else [v.expand(len(features), -1) for v in odds]
        log_h = torch.stack([classifier.set_head(features, v, of, column) for v in each])
        if self.composed:  # fewer observations are balanced too where there are compositions among the trajectories
            log_h = classifier.set_head.with_smaller(log_h)
        return features[place[: len(states)]], log_h[:, :1], log_h[:, 1:]

    def _log_f(
        self, classifier: Classifier, log_p: Float[Tensor, "n m"], odds: Float[Tensor, "o m"] | None
    ) -> Float[Tensor, "o n k"]:
        r""":math:`\log \Pi_{k \ge 2} \, p_v(y_k|x)` of every label set, under each of the odds"""
        log_p = log_p[None] if odds is None else torch.log_softmax(log_p[None] + odds[:, None], dim=-1)
        log_f = classifier.set_head.log_f(log_p)
        return log_f if self.composed else log_f[..., : len(classifier.set_head.sets)]

    def _steps(
        self,
        log_P: Float[Tensor, "u a m"],
        log_h: Float[Tensor, "o c m k"],
        log_f: Float[Tensor, "o u k"],
        rows: Int[Tensor, "l"],
        actions: Int[Tensor, "l"],
    ) -> Float[Tensor, "o l m k"]:
        r""":math:`\log h_i(s_{t+1}) - \log N_i(s_t)` of every step. The exit is one more child, with f in the place of h."""
        allowed = (log_P > NEG_INF).any(-1)
        (of, action), exits = allowed[:, :-1].nonzero().T, allowed[:, -1].nonzero()[:, 0]
        parent, action = torch.cat([of, exits]), torch.cat([action, torch.full_like(exits, log_P.shape[1] - 1)])
        log_h = torch.cat([log_h, log_f[:, exits, None].expand(-1, -1, log_h.shape[2], -1)], dim=1)
        N = _logsumexp_by(log_P[parent, action][None, ..., None] + log_h, parent, len(log_P))
        entry = torch.empty(allowed.shape, dtype=torch.long, device=log_P.device)
        entry[parent, action] = torch.arange(len(parent), device=log_P.device)
        return log_h[:, entry[rows, actions]] - N[:, rows]

    def _importance(
        self,
        p: Float[Tensor, "1 n m 1"],
        log_f: Float[Tensor, "o n 1 k"],
        mean: Float[Tensor, "o 1 1 k"] | None,
        start: Float[Tensor, "o 1 m k"],
        R: Float[Tensor, "o n m k"],
        guided: int,
    ) -> Float[Tensor, "o n m k"]:
        r"""How much a trajectory's balance counts for each composition.

        With compositions among the trajectories, as if two fifths came from the target, two from the guided chain and one from the
        anchor. All densities are known: the target's :math:`\pi = P_i f / h_i(s_0)`, the guided chain's :math:`\pi e^{R}` and the base
        models'. So are their shares of the batch: one for each base model, one for harmonic means, ``guided`` for guided chains.
        """
        if not self.composed:
            # Where the guided chain goes: the anchor's trajectories, those with large f more often than not.
            f = log_f.exp()
            return p * (0.7 * f / (f.mean(1, keepdim=True) if mean is None else mean) + 0.3)
        log_target = p.clamp(min=1e-30).log() + log_f - start  # over the sum of the base models' densities
        target, steered = log_target.clamp(max=60).exp(), (log_target + R).clamp(max=60).exp()
        drawn = 1 + target.mean((-1, -2), keepdim=True) + guided * steered.mean((-1, -2), keepdim=True)
        drawn = drawn / (len(self.models) + 1 + guided)
        # A density that is not among those drawn from would make weights without bound.
        return (0.4 * target + (0.4 * steered if guided else 0.0) + 0.2 * p) / drawn


def odds_each(outputs: float) -> int:
    """How many odds a batch with so many outputs of the head is seen under."""
    return int(max(1, min(4, 2**22 // max(1, outputs))))


def _logsumexp_by(x: Float[Tensor, "o e m k"], index: Int[Tensor, "e"], size: int) -> Float[Tensor, "o u m k"]:
    """log Σ exp over the entries of each index."""
    x = x.transpose(0, 1)
    top = torch.full((size, *x.shape[1:]), NEG_INF, device=x.device)
    top = top.scatter_reduce_(0, index[:, None, None, None].expand(x.shape), x.detach(), "amax")
    return (top + torch.zeros_like(top).index_add(0, index, (x - top[index]).exp()).log()).transpose(0, 1)
