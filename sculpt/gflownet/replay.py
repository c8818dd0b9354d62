r"""Training a classifier on GFlowNets: trajectories of the base models, and losses that use what a GFlowNet knows.

Notation: trajectory :math:`\tau` from :math:`s_0` to x, ``l`` states of all trajectories of a batch, ``u`` different states
among them, ``o`` odds, ``m`` anchors, ``k`` label sets. :math:`f(x) = \Pi_{k \ge 2} \, p_v(y_k|x)` by the terminal head.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.classifier import Batch, Classifier
from sculpt.formula import Posterior
from sculpt.gflownet.model import GFlowNet, distinct
from sculpt.gflownet.policy import guide
from sculpt.gflownet.sampler import backward_paths, batch_of, rollout, track
from sculpt.training import Replay, draw_log_odds

__all__ = ["GFlowNetReplay"]


class GFlowNetReplay(Replay):
    """``samples`` trajectories per model are kept; after each was used about ``reuse`` times come new ones.

    ``children`` asks for a head over actions, which scores all children of a state in one pass; by default where there are more
    than 64 actions. ``composed`` adds trajectories of compositions: where models hardly overlap, their own never show what a
    composition is about. Some are of harmonic means, by tracked densities and drawn once; twice as many come from the classifier as it
    is, one composition after the other, so that it sees where it errs. It wants converged flows or one parent per state.
    """

    GUIDED, RENEW, NEW, KEEP = 2, 32, 3, 30
    """Guided trajectories a step, as a multiple of one model's; after how many steps come how many new sets of 256; how many are kept."""

    def __init__(
        self,
        models: Sequence[GFlowNet],
        *,
        samples: int = 20_000,
        reuse: float = 1.0,
        children: bool | None = None,
        composed: bool = False,
        seed: int = 0,
        progress: bool = True,
        checkpoint: object = None,
    ):
        self.models, self.samples, self.reuse, self.seed = tuple(models), samples, reuse, seed
        self.actions, self.composed = models[0].env.n_actions, composed
        self.head = self.actions > 64 if children is None else children
        self.stores: dict[bool, tuple[int, list[Trajectories]]] = {}
        self.harmonic: dict[bool, Trajectories] = {}
        self.guided: collections.deque[Trajectories] = collections.deque(maxlen=self.KEEP)
        self.renewed = -1

    @property
    def children(self) -> int:
        # Column 0 of the head is the state itself, column 1 + a its child by action a; the exit goes through the terminal head.
        return self.actions if self.head else 1

    @property
    def batch_size(self) -> int:
        # A head over thousands of children is a large table per state.
        return max(8, min(256, 2**19 // (self.actions * len(self.models)))) if self.head else 256

    def default_network(self) -> nn.Module:
        return self.models[0].default_network()

    def draw(self, size: int, generator: torch.Generator, held_out: bool = False) -> Batch:
        part = self.trajectories(size, generator, held_out)
        some = torch.randperm(len(part.states), generator=generator)[: 8 * size * len(self.models)]
        states, owner, child = part.states[some], part.owner[some], None
        if self.head:
            inner = part.actions[some] < self.actions - 1
            child = torch.cat([torch.zeros_like(some), 1 + part.actions[some][inner]])
            states, owner = torch.cat([states, states[inner]]), torch.cat([owner, owner[inner]])
        y = torch.arange(len(self.models)).repeat_interleave(size)
        return Batch(part.x, y, (states,), owner, child)

    def losses(
        self,
        classifier: Classifier,
        teacher: Classifier,
        size: int,
        generator: torch.Generator,
        log_odds_range: float,
        device: torch.device,
        held_out: bool = False,
    ) -> dict[str, Tensor]:
        r"""Cross-entropies with :math:`p(y_1 = i|\tau)` in the place of the label, and the balance of whole trajectories.

        The guided chain :math:`P_i(s'|s) h_i(s') / N_i(s)` has the target's weights on all trajectories if and only if

        .. math:: R_i(\tau) = \log h_i(s_0) + \sum_t \bigl[ \log h_i(s_{t+1}) - \log N_i(s_t) \bigr] - \log f(x) = 0,

        where the exit's h is f: minus the log-weight that would correct the chain. Its square has no noise where it is least,
        which the cross-entropy of label sets drawn at the end of trajectories has everywhere.
        """
        # A sum over a whole trajectory asks for more digits than bfloat16 has.
        with torch.autocast(device.type, enabled=False):
            parts = [self.trajectories(size, generator, held_out)]
            if self.composed:
                parts += self._compositions(size, teacher, generator, log_odds_range, held_out)
            return self._losses(classifier, teacher, Trajectories.join(parts).to(device), generator, log_odds_range, held_out)

    def _losses(self, classifier, teacher, part, generator, log_odds_range, held_out):
        device = part.x.device
        states, rows = distinct(part.states)
        with torch.no_grad():
            log_P = torch.stack([model.log_pf(states.to(model.device)).to(device) for model in self.models], dim=-1).float()
        odds = draw_log_odds(self._odds_each(log_P, classifier), classifier, log_odds_range, generator)
        odds = None if odds is None else odds.to(device)
        allowed = (log_P > float("-inf")).any(-1)
        features, start, log_h = self._log_h(classifier, states, allowed, odds)
        with torch.no_grad():
            log_f = self._log_f(classifier, teacher.terminal(states), odds)
        # The exit is one more child, with f in the place of h. Entries ``e``: parent and action of every child.
        parent, action = (torch.cat(pair) for pair in zip(allowed[:, :-1].nonzero().T, self._exits(allowed), strict=True))
        if self.composed:  # fewer observations are balanced too where there are compositions among the trajectories
            start, log_h = classifier.set_head.with_smaller(start), classifier.set_head.with_smaller(log_h)
        log_h = torch.cat([log_h, log_f[:, parent[log_h.shape[1] :], None].expand(-1, -1, classifier.m, -1)], dim=1)
        N = _logsumexp_by(log_P[parent, action][None, ..., None] + log_h, parent, len(states))
        entry = torch.empty(allowed.shape, dtype=torch.long, device=device)
        entry[parent, action] = torch.arange(len(parent), device=device)
        steps = log_h[:, entry[rows, part.actions]] - N[:, rows]
        log_f = log_f[:, rows[part.last], None]
        R = start - log_f + torch.zeros(len(N), len(part.x), *N.shape[2:], device=device).index_add(1, part.owner, steps)
        w = self._importance(part.p[None, :, :, None], log_f, start.detach(), R.detach(), 0 if held_out else self.GUIDED)
        terminal = torch.log_softmax(classifier.terminal_head(features).float(), dim=-1)[rows[part.last]]
        end = -(part.p * terminal).sum(-1).mean()
        if self.composed:
            # A composition can live where p(y|x) is a thousandth, of which a cross-entropy sees nothing.
            error = [self._log_f(classifier, log_p, odds) for log_p in (terminal, part.p.clamp(min=1e-30).log())]
            end = end + (w * F.huber_loss(*error, reduction="none")[:, :, None]).mean()
        return {
            "terminal": end,
            "marginal": F.cross_entropy(classifier.marginal_head(features).float()[rows], part.so_far),
            "joint": (w * F.huber_loss(R, torch.zeros_like(R), reduction="none", delta=5.0 if self.composed else 1.0)).mean(),
        }

    def _importance(
        self,
        p: Float[Tensor, "1 n m 1"],
        log_f: Float[Tensor, "o n 1 k"],
        start: Float[Tensor, "o 1 m k"],
        R: Tensor,
        share: int,
    ) -> Float[Tensor, "o n m k"]:
        r"""What a trajectory's balance counts for each composition.

        With compositions among the trajectories, as if two fifths came from the target, two from the guided chain and one from
        the anchor: all densities are known, :math:`\pi = P_i f / h_i(s_0)` and :math:`\pi e^{R}`, those of the base models too, and the shares of the batch:
        of each base model one, of compositions one, of guided chains ``share``.
        """
        if not self.composed:
            # Where the guided chain goes: the anchor's trajectories, those with large f more often than not.
            return p * (0.7 * log_f.exp() / log_f.exp().mean(1, keepdim=True) + 0.3)
        log_target = p.clamp(min=1e-30).log() + log_f - start  # over the sum of the base models' densities
        target, guided = log_target.clamp(max=60).exp(), (log_target + R).clamp(max=60).exp()
        drawn = 1 + target.mean((-1, -2), keepdim=True) + share * guided.mean((-1, -2), keepdim=True)
        drawn = drawn / (len(self.models) + 1 + share)
        # A density that is not among those drawn from would make weights without bound.
        return (0.4 * target + (0.4 * guided if share else 0.0) + 0.2 * p) / drawn

    def _exits(self, allowed: Bool[Tensor, "u a"]) -> tuple[Int[Tensor, "c"], Int[Tensor, "c"]]:
        rows = allowed[:, -1].nonzero()[:, 0]
        return rows, torch.full_like(rows, self.actions - 1)

    def _log_h(
        self, classifier: Classifier, states: Tensor, allowed: Bool[Tensor, "u a"], odds: Tensor | None
    ) -> tuple[Float[Tensor, "u w"], Float[Tensor, "o 1 m k"], Float[Tensor, "o c m k"]]:
        """Features of the states, and log h of the start and of each allowed child but the exit."""
        if self.head:
            # Column 0 is the state itself, column 1 + a its child by a.
            every, place, (of, column) = states, torch.arange(len(states), device=states.device), allowed[:, :-1].nonzero().T
            column = column + 1
        else:
            device = self.models[0].device
            _, _, children = (part.to(states.device) for part in self.models[0].children(states.to(device), allowed.to(device)))
            # Most children are states of other trajectories, and want the network once.
            every, place = distinct(torch.cat([states, children]))
            of, column = place[len(states) :], torch.zeros_like(place[len(states) :])
        start = (every == self.models[0].env.s0.to(every)).flatten(1).all(-1).nonzero()[0]
        features = classifier.network(every)
        of, column = torch.cat([start, of]), torch.cat([torch.zeros_like(start), column])
        each = [None] if odds is None else odds
        log_h = torch.stack(
            [classifier.set_head(features, v if v is None else v.expand(len(features), -1), of, column) for v in each]
        )
        return features[place[: len(states)]], log_h[:, :1], log_h[:, 1:]

    def _log_f(
        self, classifier: Classifier, log_p: Float[Tensor, "n m"], odds: Float[Tensor, "o m"] | None
    ) -> Float[Tensor, "o n k"]:
        r""":math:`\log \Pi_{k \ge 2} \, p_v(y_k|x)` of every label set, under each of the odds"""
        log_p = log_p[None] if odds is None else torch.log_softmax(log_p[None] + odds[:, None], dim=-1)
        log_f = classifier.set_head.log_f(log_p)
        return log_f if self.composed else log_f[..., : len(classifier.set_head.sets)]

    def _odds_each(self, log_P: Tensor, classifier: Classifier) -> int:
        """How many odds a batch is seen under: the trajectories are the same, so they cost the heads only."""
        return max(1, min(4, 2**22 // (int((log_P > float("-inf")).sum()) * len(classifier.set_head.sets))))

    def trajectories(self, size: int, generator: torch.Generator, held_out: bool) -> Trajectories:
        """``size`` trajectories per model."""
        # The step's own seed says which filling it is, so a resumed training sees what the uninterrupted one would have.
        uses = max(1, int(self.samples * self.reuse / size))
        filling = -1 if held_out else generator.initial_seed() // uses
        if held_out not in self.stores or self.stores[held_out][0] != filling:
            fresh = torch.Generator().manual_seed((self.seed + 1) * 7919 + filling + 1)
            n = self.samples if not held_out else min(self.samples, 4096)
            self.stores[held_out] = filling, [record(model, self.models, n, fresh) for model in self.models]
        store = self.stores[held_out][1]
        return Trajectories.join([part.pick(size, generator) for part in store])

    def _compositions(
        self, size: int, teacher: Classifier, generator: torch.Generator, log_odds_range: float, held_out: bool
    ) -> list[Trajectories]:
        """``size`` trajectories of harmonic means, and guided ones."""
        if held_out not in self.harmonic:
            fresh = torch.Generator().manual_seed((self.seed + 1) * 7919 - 1 - held_out)
            self.harmonic[held_out] = self._harmonic(self.samples if not held_out else min(self.samples, 1024), fresh)
        parts, n = [self.harmonic[held_out].pick(size, generator)], self.GUIDED * size
        if held_out:
            return parts
        if (now := generator.initial_seed() // self.RENEW) != self.renewed:
            self.renewed = now
            for _ in range(self.NEW):
                self.guided.append(self._guided(256, teacher, generator, log_odds_range))
        which = torch.randint(len(self.guided), (n,), generator=generator).bincount().tolist()
        return parts + [part.pick(k, generator) for part, k in zip(self.guided, which, strict=False)]

    def _harmonic(self, n: int, generator: torch.Generator) -> Trajectories:
        """n trajectories of the harmonic means of any two or more of the models. Several particles each: they are worth fewer than they are."""
        m = len(self.models)
        sets = [labels for k in range(2, m + 1) for labels in itertools.combinations(range(m), k)]
        each = -(-n // len(sets))
        options = {"particles": 4 * each, "generator": generator, "progress": False}
        x = [track(Posterior(m, labels), self.models, each, **options).x for labels in sets]
        return retrace(self.models, torch.cat(x), generator)

    def _guided(self, n: int, teacher: Classifier, generator: torch.Generator, log_odds_range: float) -> Trajectories:
        """n trajectories of one composition, guided by the classifier as it is."""
        anchor = int(torch.randint(teacher.m, (), generator=generator))
        sets = [*teacher.set_head.sets, *teacher.set_head.smaller]
        labels = sets[int(torch.randint(len(sets), (), generator=generator))]
        odds = draw_log_odds(1, teacher, log_odds_range, generator)
        posterior = Posterior(teacher.m, (anchor, *labels), None if odds is None else odds[0].exp().tolist())
        return record(guide(posterior, self.models, teacher), self.models, n, generator)


@dataclass
class Trajectories:
    r"""Trajectories end to end. ``p`` is :math:`p(y_1 = i|\tau) = P_i(\tau) / \sum_j P_j(\tau)`, ``so_far`` the same given the way to each state.

    Given the trajectory the label is no longer random in a way that matters: the expected loss stays, its noise goes.
    """

    x: Shaped[Tensor, "n *s"]
    p: Float[Tensor, "n m"]
    last: Int[Tensor, "n"]
    states: Shaped[Tensor, "l *s"]
    actions: Int[Tensor, "l"]
    so_far: Float[Tensor, "l m"]
    owner: Int[Tensor, "l"]

    def pick(self, size: int, generator: torch.Generator) -> Trajectories:
        return self.select(torch.randint(len(self.x), (size,), generator=generator))

    def select(self, pick: Int[Tensor, "k"]) -> Trajectories:
        first = torch.cat([self.last.new_tensor([-1]), self.last])[pick] + 1
        length = self.last[pick] + 1 - first
        owner = torch.arange(len(pick)).repeat_interleave(length)
        ends = length.cumsum(0)
        row = torch.arange(len(owner)) + (first - ends + length)[owner]
        return Trajectories(self.x[pick], self.p[pick], ends - 1, self.states[row], self.actions[row], self.so_far[row], owner)

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        columns = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in ("x", "p", "states", "actions", "so_far")
        }
        owners = torch.cat([part.owner + sum(len(q.x) for q in parts[:i]) for i, part in enumerate(parts)])
        last = torch.cat([part.last + sum(len(q.states) for q in parts[:i]) for i, part in enumerate(parts)])
        return Trajectories(owner=owners, last=last, **columns)

    def to(self, device: torch.device) -> Trajectories:
        return Trajectories(**{name: value.to(device) for name, value in vars(self).items()})


@torch.no_grad()
def record(model: GFlowNet, models: Sequence[GFlowNet], n: int, generator: torch.Generator) -> Trajectories:
    """n trajectories of a model, seen by all models."""
    columns = []
    for chunk in torch.arange(n).split(batch_of(model)):
        columns += [(chunk[i.cpu()], s, a) for i, s, a in rollout(model, len(chunk), generator)]
    return _seen(models, *(torch.cat(column) for column in zip(*columns, strict=True)))


@torch.no_grad()
def retrace(models: Sequence[GFlowNet], x: Shaped[Tensor, "b *s"], generator: torch.Generator) -> Trajectories:
    """Trajectories to these x by the first model's backward policy, seen by all models."""
    _, parents, actions, owner = backward_paths(models[0], x, generator)
    exits = torch.full((len(x),), models[0].env.n_actions - 1, device=x.device)
    parts = (torch.arange(len(x), device=x.device), owner), (x, parents), (exits, actions)
    return _seen(models, *(torch.cat(part).flip(0) for part in parts))


def _seen(models: Sequence[GFlowNet], owner: Tensor, states: Tensor, actions: Tensor) -> Trajectories:
    """States and actions of trajectories, each trajectory's in order, and what the models think of them."""
    order = owner.argsort(stable=True)
    owner, states, actions = owner[order], states[order], actions[order]
    steps = []
    for part in torch.arange(len(states)).split(8 * batch_of(models[0])):
        unique, rows = distinct(states[part])
        steps.append(torch.stack([model.log_pf(unique)[rows, actions[part]] for model in models], dim=-1))
    # A number for what a model thinks impossible, so that it stays in its own trajectory.
    log_p = torch.cat(steps).clamp(min=-1e5).cumsum(0).cpu()
    last = torch.bincount(owner).cumsum(0).cpu() - 1
    owner, states, actions = owner.cpu(), states.cpu(), actions.cpu()
    before = torch.cat(
        [torch.zeros(1, len(models), dtype=log_p.dtype), log_p]
    )  # the sum up to each row, and up to its trajectory
    start = before[torch.cat([last.new_zeros(1), last[:-1] + 1])]
    so_far = torch.softmax(before[:-1] - start[owner], dim=-1).float()
    p = torch.softmax(log_p[last] - start, dim=-1).float()
    return Trajectories(states[last], p, last, states, actions, so_far, owner)


def _logsumexp_by(x: Float[Tensor, "o e m k"], index: Int[Tensor, "e"], size: int) -> Float[Tensor, "o u m k"]:
    """log Σ exp over the entries of each index."""
    x = x.transpose(0, 1)
    top = torch.full((size, *x.shape[1:]), float("-inf"), device=x.device)
    top = top.scatter_reduce_(0, index[:, None, None, None].expand(x.shape), x.detach(), "amax")
    return (top + torch.zeros_like(top).index_add(0, index, (x - top[index]).exp()).log()).transpose(0, 1)
