r"""What a classifier of models that write action by action learns from: whole trajectories, and losses that know what such models know.

Notation: trajectory :math:`\tau` from :math:`s_0` to x, ``l`` states of all trajectories of a batch, ``u`` different states
among them, ``o`` odds, ``m`` anchors, ``k`` label sets. :math:`f(x) = \Pi_{k \ge 2} \, p_v(y_k|x)` by the terminal head.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.actions.recordings import Trajectories, record, retrace
from sculpt.actions.states import NEG_INF, distinct
from sculpt.chain import Selection, Settings, run, watch
from sculpt.classifier.store import Batch, Draw, Store
from sculpt.formula import Posterior
from sculpt.training import seed_of_step

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel
    from sculpt.classifier.heads import Classifier

__all__ = ["TrajectoryStore"]

GUIDED = 2
"""Guided trajectories in a batch, for each trajectory of one model."""
RENEW = 32
"""Steps until there are new guided trajectories."""
NEW = 3
"""How many sets of them there are then, each of one composition."""
SET = 256
"""Trajectories in such a set."""
KEEP = 30
"""How many sets are kept."""


class TrajectoryStore(Store):
    """Trajectories of every base model, kept until each was used about ``reuse`` times.

    Where models hardly overlap, their own trajectories never show what a composition is about. ``composed`` adds trajectories of
    compositions: some of harmonic means, by tracked densities and drawn once, and twice as many that the classifier guides as it is, one
    composition after the other, so that it sees where it errs. It wants converged flows or one parent per state.

    Args:
        models: the base models.
        samples: trajectories of each that are kept at a time.
        reuse: how often each is used.
        children: whether a head over actions scores all children of a state in one pass; by default for more than 64 actions.
        composed: whether there are trajectories of compositions.
        seed: of drawing them.
        progress: not used: nothing takes long.
        checkpoint: not used: all but guided trajectories is drawn again.
    """

    def __init__(
        self,
        models: Sequence[ActionModel],
        *,
        samples: int = 20_000,
        reuse: float = 1.0,
        children: bool | None = None,
        composed: bool = False,
        seed: int = 0,
        progress: bool = True,
        checkpoint: str | Path | None = None,
    ):
        self.models, self.samples, self.reuse, self.seed = tuple(models), samples, reuse, seed
        self.n_actions, self.device, self.composed = models[0].n_actions, models[0].device, composed
        self.head = self.n_actions > 64 if children is None else children
        self.fillings: dict[bool, tuple[int, list[Trajectories]]] = {}
        self.harmonic: dict[bool, Trajectories] = {}
        self.guided: collections.deque[Trajectories] = collections.deque(maxlen=KEEP)
        self.renewed = -1

    @property
    def children(self) -> int:
        # Column 0 of the head is the state itself, column 1 + a its child by action a; the exit goes through the terminal head.
        return self.n_actions if self.head else 1

    @property
    def batch_size(self) -> int:
        # A head over thousands of children is a large table per state.
        return max(8, min(256, 2**19 // (self.n_actions * len(self.models)))) if self.head else 256

    def default_network(self) -> nn.Module:
        return self.models[0].default_network()

    def draw(self, draw: Draw) -> Batch:
        part, size, generator = self.trajectories(draw), draw.size, draw.generator
        some = torch.randperm(len(part.states), generator=generator)[: 8 * size * len(self.models)]
        states, owner, child = part.states[some], part.owner[some], None
        if self.head:
            inner = part.actions[some] < self.n_actions - 1
            child = torch.cat([torch.zeros_like(some), 1 + part.actions[some][inner]])
            states, owner = torch.cat([states, states[inner]]), torch.cat([owner, owner[inner]])
        y = torch.arange(len(self.models)).repeat_interleave(size)
        return Batch(part.x, y, (states,), owner, child)

    # The trajectories

    def trajectories(self, draw: Draw) -> Trajectories:
        """So many trajectories of each model, from the filling of this step or from the held-out one."""
        held_out, uses = draw.held_out, max(1, int(self.samples * self.reuse / draw.size))
        filling = -1 if held_out else seed_of_step(self.seed, draw.step) // uses
        if held_out not in self.fillings or self.fillings[held_out][0] != filling:
            n = self.samples if not held_out else min(self.samples, 4096)
            fresh = torch.Generator().manual_seed((self.seed + 1) * 7919 + filling + 1)
            self.fillings[held_out] = filling, [record(model, self.models, n, fresh) for model in self.models]
        return Trajectories.join([part.pick(draw.size, draw.generator) for part in self.fillings[held_out][1]])

    def _compositions(self, draw: Draw, teacher: Classifier) -> list[Trajectories]:
        """Trajectories of harmonic means, as many as of one model, and guided ones to train on."""
        size, generator, held_out = draw.size, draw.generator, draw.held_out
        if held_out not in self.harmonic:
            fresh = torch.Generator().manual_seed((self.seed + 1) * 7919 - 1 - held_out)
            self.harmonic[held_out] = self._harmonic(self.samples if not held_out else min(self.samples, 1024), fresh)
        parts = [self.harmonic[held_out].pick(size, generator)]
        if held_out:
            return parts
        if (now := seed_of_step(self.seed, draw.step) // RENEW) != self.renewed:
            self.renewed = now
            self.guided.extend(self._guided(draw, teacher) for _ in range(NEW))
        counts = torch.randint(len(self.guided), (GUIDED * size,), generator=generator).bincount().tolist()
        return parts + [part.pick(k, generator) for part, k in zip(self.guided, counts, strict=False)]

    def _harmonic(self, n: int, generator: torch.Generator) -> Trajectories:
        """n trajectories of the harmonic means of any two or more of the models, from four particles each: their weights differ."""
        m, first, x = len(self.models), self.models[0], []
        sets = [labels for k in range(2, m + 1) for labels in itertools.combinations(range(m), k)]
        each = -(-n // len(sets))
        for labels in sets:
            settings, formula = Settings(generator=generator), Posterior(m, labels)
            chain = first.tracked(formula, self.models, settings)
            x.append(watch(run(chain, each, str(formula), settings, selection=Selection(4 * each)), show=False).x)
        return retrace(self.models, torch.cat(x), generator)

    def _guided(self, draw: Draw, teacher: Classifier) -> Trajectories:
        """Trajectories of one composition, guided by the classifier as it is."""
        anchor = int(torch.randint(teacher.m, (), generator=draw.generator))
        sets = [*teacher.set_head.sets, *teacher.set_head.smaller]
        labels = sets[int(torch.randint(len(sets), (), generator=draw.generator))]
        odds = draw.log_odds(1, teacher)
        posterior = Posterior(teacher.m, (anchor, *labels), None if odds is None else odds[0].exp().tolist())
        return record(self.models[anchor].guided(posterior, self.models, teacher), self.models, SET, draw.generator)

    def state_dict(self) -> dict[str, Tensor]:
        """The guided trajectories: they come from classifiers that are gone."""
        if not self.composed:
            return {}
        kept = {f"{i}.{name}": value for i, part in enumerate(self.guided) for name, value in vars(part).items()}
        return {"renewed": torch.tensor(self.renewed), **kept}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        parts: dict[int, dict[str, Tensor]] = collections.defaultdict(dict)
        for key, value in state.items():
            number, _, name = key.partition(".")
            if name:
                parts[int(number)][name] = value
        self.guided.extend(Trajectories(**parts[i]) for i in sorted(parts))
        self.renewed = int(state.get("renewed", torch.tensor(-1)))

    # The losses

    def losses(self, classifier: Classifier, teacher: Classifier, draw: Draw) -> dict[str, Tensor]:
        r"""Cross-entropies with :math:`p(y_1 = i|\tau)` in the place of the label, and the balance of whole trajectories.

        The guided chain :math:`P_i(s'|s) h_i(s') / N_i(s)` has the target's weights on all trajectories if and only if

        .. math:: R_i(\tau) = \log h_i(s_0) + \sum_t \bigl[ \log h_i(s_{t+1}) - \log N_i(s_t) \bigr] - \log f(x) = 0,

        where the exit's h is f: minus the log-weight that would correct the chain. At the optimum the residual is zero on every
        trajectory, so the gradient has no variance there; the cross-entropy of label sets drawn at the ends of trajectories has it
        everywhere.
        """
        # A sum over a whole trajectory asks for more digits than bfloat16 has.
        with torch.autocast(self.device.type, enabled=False):
            parts = [self.trajectories(draw), *(self._compositions(draw, teacher) if self.composed else [])]
            return self._losses(classifier, teacher, Trajectories.join(parts).to(self.device), draw)

    def _losses(self, classifier: Classifier, teacher: Classifier, part: Trajectories, draw: Draw) -> dict[str, Tensor]:
        states, rows = distinct(part.states)
        with torch.no_grad():
            log_P = torch.stack([model.log_pf(states) for model in self.models], dim=-1).float()
        odds = draw.log_odds(self._odds_each(log_P, classifier), classifier)
        odds = None if odds is None else odds.to(states.device)
        features, start, log_h = self._log_h(classifier, states, (log_P > NEG_INF).any(-1), odds)
        with torch.no_grad():
            log_f = self._log_f(classifier, teacher.terminal(states), odds)
        steps = self._steps(log_P, log_h, log_f, rows, part.actions)
        log_f = log_f[:, rows[part.last], None]
        R = start - log_f + steps.new_zeros(len(steps), len(part.x), *steps.shape[2:]).index_add(1, part.owner, steps)
        w = self._importance(part.p[None, :, :, None], log_f, start.detach(), R.detach(), 0 if draw.held_out else GUIDED)
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

    def _odds_each(self, log_P: Tensor, classifier: Classifier) -> int:
        """How many odds a batch is seen under: the trajectories are the same, so they cost the heads only."""
        return max(1, min(4, 2**22 // (int((log_P > NEG_INF).sum()) * len(classifier.set_head.sets))))

    def _log_h(
        self, classifier: Classifier, states: Tensor, allowed: Bool[Tensor, "u a"], odds: Tensor | None
    ) -> tuple[Float[Tensor, "u w"], Float[Tensor, "o 1 m k"], Float[Tensor, "o c m k"]]:
        """Features of the states, and log h of the start and of each allowed child but the exit."""
        if self.head:
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
        parent, action = torch.cat([of, exits]), torch.cat([action, torch.full_like(exits, self.n_actions - 1)])
        log_h = torch.cat([log_h, log_f[:, exits, None].expand(-1, -1, log_h.shape[2], -1)], dim=1)
        N = _logsumexp_by(log_P[parent, action][None, ..., None] + log_h, parent, len(log_P))
        entry = torch.empty(allowed.shape, dtype=torch.long, device=log_P.device)
        entry[parent, action] = torch.arange(len(parent), device=log_P.device)
        return log_h[:, entry[rows, actions]] - N[:, rows]

    def _importance(
        self,
        p: Float[Tensor, "1 n m 1"],
        log_f: Float[Tensor, "o n 1 k"],
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
            return p * (0.7 * log_f.exp() / log_f.exp().mean(1, keepdim=True) + 0.3)
        log_target = p.clamp(min=1e-30).log() + log_f - start  # over the sum of the base models' densities
        target, steered = log_target.clamp(max=60).exp(), (log_target + R).clamp(max=60).exp()
        drawn = 1 + target.mean((-1, -2), keepdim=True) + guided * steered.mean((-1, -2), keepdim=True)
        drawn = drawn / (len(self.models) + 1 + guided)
        # A density that is not among those drawn from would make weights without bound.
        return (0.4 * target + (0.4 * steered if guided else 0.0) + 0.2 * p) / drawn


def _logsumexp_by(x: Float[Tensor, "o e m k"], index: Int[Tensor, "e"], size: int) -> Float[Tensor, "o u m k"]:
    """log Σ exp over the entries of each index."""
    x = x.transpose(0, 1)
    top = torch.full((size, *x.shape[1:]), NEG_INF, device=x.device)
    top = top.scatter_reduce_(0, index[:, None, None, None].expand(x.shape), x.detach(), "amax")
    return (top + torch.zeros_like(top).index_add(0, index, (x - top[index]).exp()).log()).transpose(0, 1)
