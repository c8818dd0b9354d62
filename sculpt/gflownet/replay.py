"""Training states for a classifier: trajectories of the base models, drawn in large batches and replaced as they are used up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sculpt.classifier import Batch, Replay
from sculpt.gflownet.model import GFlowNet, distinct
from sculpt.gflownet.sampler import _batch, rollout

__all__ = ["GFlowNetReplay"]


class GFlowNetReplay(Replay):
    """``samples`` trajectories per model are kept; after each was used about ``reuse`` times come new ones.

    ``states`` of them are drawn per trajectory and batch. ``children`` asks for a head over actions, which scores all
    children of a state in one pass; by default where there are more than 64 actions.
    """

    def __init__(
        self,
        models: Sequence[GFlowNet],
        *,
        samples: int = 20_000,
        reuse: float = 1.0,
        states: int = 4,
        children: bool | None = None,
        seed: int = 0,
        **_: object,
    ):
        self.models, self.samples, self.reuse, self.states_each, self.seed = tuple(models), samples, reuse, states, seed
        self.actions = models[0].env.n_actions
        self.head = self.actions > 64 if children is None else children
        self.stores: dict[str, tuple[int, list[Store]]] = {}

    @property
    def children(self) -> int:
        # Column 0 of the head is the state itself, column 1 + a its child by action a; the exit goes through the terminal head.
        return self.actions if self.head else 1

    def default_network(self) -> nn.Module:
        return self.models[0].default_network(self.models)

    def draw(self, size: int, generator: torch.Generator, held_out: bool = False) -> Batch:
        x, p, states, actions, rows = [], [], [], [], []
        for store in self._stores(size, generator, held_out):
            pick = torch.randint(len(store.first) - 1, (size,), generator=generator)
            first, last = store.first[pick], store.first[pick + 1] - 1
            u = torch.rand(size, self.states_each, generator=generator)
            at = (first[:, None] + (u * (last - first + 1)[:, None]).long()).flatten()
            rows.append(torch.arange(size).repeat_interleave(self.states_each) + size * len(rows))
            x.append(store.states[last])
            p.append(store.p[pick])
            states.append(store.states[at])
            actions.append(store.actions[at])
        x, p, s, a, owner = torch.cat(x), torch.cat(p), torch.cat(states), torch.cat(actions), torch.cat(rows)
        y = torch.arange(len(self.models)).repeat_interleave(size)
        if not self.head:
            return Batch(x, y, (s,), owner, p=p)
        inner = a < self.actions - 1
        child = torch.cat([torch.zeros_like(a), 1 + a[inner]])
        return Batch(x, y, (torch.cat([s, s[inner]]),), torch.cat([owner, owner[inner]]), child, p)

    def _stores(self, size: int, generator: torch.Generator, held_out: bool) -> list[Store]:
        # The step's own seed says which filling it is, so a resumed training sees what the uninterrupted one would have.
        uses = max(1, int(self.samples * self.reuse / size))
        filling = -1 if held_out else generator.initial_seed() // uses
        kept = self.stores.get(str(held_out))
        if kept is None or kept[0] != filling:
            fresh = torch.Generator().manual_seed((self.seed + 1) * 7_919 + filling + 1)
            kept = filling, [Store(model, self.models, self.samples, fresh) for model in self.models]
            self.stores[str(held_out)] = kept
        return kept[1]


class Store:
    r"""Trajectories end to end: trajectory j is ``states[first[j]:first[j + 1]]``, its last state the sample.

    With them goes :math:`p(y_1 = i | \tau) = P_i(\tau) / \sum_j P_j(\tau)`, which GFlowNets know: in the place of the label of the
    model that made the trajectory it gives the same expected loss, with less noise.
    """

    def __init__(self, model: GFlowNet, models: Sequence[GFlowNet], n: int, generator: torch.Generator):
        index, states, actions, log_p = [], [], [], torch.zeros(n, len(models), dtype=torch.float64)
        for chunk in torch.arange(n).split(_batch(model)):
            for i, s, a in rollout(model, len(chunk), generator):
                unique, rows = distinct(s)
                step = torch.stack([other.log_pf(unique)[rows, a] for other in models], dim=-1)
                index.append(chunk[i.cpu()])
                states.append(s.cpu())
                actions.append(a.cpu())
                log_p[index[-1]] += step.cpu()
        index = torch.cat(index)
        order = index.argsort(stable=True)
        self.states: Tensor = torch.cat(states)[order]
        self.actions: Tensor = torch.cat(actions)[order]
        self.first = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(index, minlength=n).cumsum(0)])
        self.p = torch.softmax(log_p, dim=-1).float()
