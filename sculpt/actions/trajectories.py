"""What a classifier of models that write action by action learns from: whole trajectories, of them and of compositions."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as made_again

from sculpt.actions.balance import GUIDED, Balance, odds_each
from sculpt.actions.recordings import Sizes, Trajectories, measure, record, retrace
from sculpt.actions.states import distinct
from sculpt.chain import Selection, Settings, run
from sculpt.classifier.plan import COPIES, STEP, Plan, kept
from sculpt.classifier.store import CACHE_BYTES, Batch, Draw, Store
from sculpt.formula import Posterior
from sculpt.progress import watch
from sculpt.training import seed_of_step

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel
    from sculpt.classifier.heads import Classifier

__all__ = ["TrajectoryStore"]

RENEW = 32
"""Steps until there are new guided trajectories."""
NEW = 3
"""How many sets of them there are then, each of one composition."""
SET = 256
"""Trajectories in such a set."""
KEEP = 30
"""How many sets are kept."""
FEW = 16
"""Trajectories of each model that tell how large the others are."""
SAVING = 8
"""How many times less a head over children has to take than visits of the children."""


class TrajectoryStore(Store):
    """Trajectories of every base model, kept until each was used about ``reuse`` times.

    Where models hardly overlap, their own trajectories never show what a composition is about. ``composed`` adds trajectories of
    compositions: some of harmonic means, by tracked densities and drawn once, and twice as many that the classifier guides as it is, one
    composition after the other, so that it sees where it errs. It wants converged flows or one parent per state.

    Args:
        models: the base models.
        samples: trajectories of each that are kept at a time, in bounded memory.
        reuse: how often each is used.
        children: whether a head over actions scores all children of a state in one pass; by default where visiting them would take eight
            times as much memory, and so time.
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
        self.models, self.most, self.reuse, self.seed = tuple(models), samples, reuse, seed
        self.n_actions, self.device, self.composed, self.head = models[0].n_actions, models[0].device, composed, children
        self.backbone_bytes = 0.0
        """bytes of a state in the backbone, once there is a plan"""
        self.fillings: dict[bool, tuple[int, list[Trajectories]]] = {}
        self.harmonic: dict[bool, Trajectories] = {}
        self.guided: collections.deque[Trajectories] = collections.deque(maxlen=KEEP)
        self.renewed = -1

    # What fits into memory

    @functools.cached_property
    def sizes(self) -> Sizes:
        """How large trajectories are."""
        return measure(self.models, FEW, torch.Generator().manual_seed((self.seed + 1) * 7919 - 3))

    @functools.cached_property
    def samples(self) -> int:
        """Trajectories of each model that are kept at a time: held-out ones, as many or fewer, have to fit beside them."""
        return max(1, min(self.most, int(CACHE_BYTES / (2 * len(self.models) * self.sizes.bytes))))

    def plan(self, plan: Plan, network: nn.Module, batch_size: int | None = None) -> Plan:
        # Column 0 of a head over children is the state itself, column 1 + a its child by action a; the exit goes through the terminal head.
        head, visits = replace(plan, children=self.n_actions), replace(plan, children=1)
        self.backbone_bytes = kept(network, self.sizes.few.states[: 4 * FEW].to(self.device))
        if self.head is None:
            self.head = SAVING * self._bytes(head, 1, 1) < self._bytes(visits, 1, 1) and COPIES * head.weights < STEP
        plan, steps = head if self.head else visits, self.sizes.steps
        one = self._bytes(plan, self.sizes.different * steps, steps)
        each = one * (len(self.models) + (1 + GUIDED) * self.composed)
        # A head over thousands of children is a large table per state.
        suits = min(256, 2**19 // (self.n_actions * len(self.models))) if self.head else 256
        batch_size = batch_size or max(8, min(suits, int(STEP / each)))
        return replace(plan, batch_size=batch_size, step=int(min(batch_size * each, max(STEP, one))), least=int(one))

    def _bytes(self, plan: Plan, states: float, steps: float) -> float:
        """What the losses of so many different states and steps take, on the way there and back."""
        children, row = states * self.sizes.children, plan.row + (plan.smaller if self.composed else 0)
        visited = states if plan.children > 1 else states + children
        odds = odds_each(children * plan.row // 4) if plan.odds else 1
        tables = visited * plan.children * plan.row + (5 * children + 6 * (states + steps)) * row
        # The hidden layer of the head keeps its input, what goes into the nonlinearity and what comes out of it.
        layers = self.backbone_bytes + odds * 12 * plan.width
        return odds * tables + visited * layers + 24 * states * self.n_actions * plan.m

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
            self.fillings.pop(held_out, None)  # before there are new ones
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
        # A sum over a whole trajectory asks for more digits than bfloat16 has.
        with torch.autocast(self.device.type, enabled=False):
            parts = [self.trajectories(draw), *(self._compositions(draw, teacher) if self.composed else [])]
            batch, balance = Trajectories.join(parts), Balance(self.models, self.composed)
            parts = self._parts(classifier, batch)
            if len(parts) == 1:
                return balance.losses(classifier, teacher, batch.to(self.device), draw)
            common = balance.common(classifier, teacher, batch, draw)
            losses = dict.fromkeys(self.weights, torch.zeros((), device=self.device))
            for part in parts:
                # Its tables are made again on the way back, so that those of one part are in memory at a time.
                own = made_again(balance.losses, classifier, teacher, part.to(self.device), draw, common, use_reentrant=False)
                for name, loss in own.items():
                    share = len(part.states) / len(batch.states) if name == "marginal" else len(part.x) / len(batch.x)
                    losses[name] = losses[name] + share * loss
            return losses

    def _parts(self, classifier: Classifier, batch: Trajectories) -> list[Trajectories]:
        """The batch in parts for which there is memory, with a trajectory each at least."""
        head = classifier.set_head
        plan = Plan(head.m, head.n, head.hidden.out_features, head.odds, head.n_children)
        parts = [batch]
        while len(parts) < len(batch.x) and any(self._large(plan, part.states) for part in parts):
            parts = batch.split(min(2 * len(parts), len(batch.x)))
        return parts

    def _large(self, plan: Plan, states: Tensor) -> bool:
        """Whether the losses of these states take more than a step may."""
        if self._bytes(plan, len(states), len(states)) <= STEP:
            return False
        return self._bytes(plan, len(distinct(states)[0]), len(states)) > STEP
