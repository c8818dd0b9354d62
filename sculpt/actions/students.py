r"""A composition of models that write action by action, distilled into one policy.

The log-density of a composition is known up to its normaliser, :math:`\Phi(\ell(x))`, so the student :math:`\pi_\theta` is trained to balance:

.. math:: \delta(\tau) = \log \pi_\theta(\tau) - \log P_B(\tau|x) - \Phi(\ell(x)), \qquad
          \text{loss} = \min_c \operatorname{E} \operatorname{huber}\bigl(\delta(\tau) - c\bigr)

The loss is zero where :math:`\delta = -\log Z` everywhere, whichever trajectories it is taken over. They lead to three kinds of samples: new
ones of the student, older ones of it by their weights :math:`e^{\Phi(\ell)} / \pi_\theta`, which show where it is too rare, and those of a road,
which show what it never finds. A trajectory goes back from its sample by the anchor's :math:`P_B`, so samples are all that is kept.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.actions.counting import Counted
from sculpt.actions.paths import backward_paths
from sculpt.actions.states import NEG_INF, distinct
from sculpt.actions.targets import Target
from sculpt.checks import check_whole, whole
from sculpt.distillation import Student
from sculpt.identity import module_digest
from sculpt.model import BaseModel
from sculpt.particles import effective_sample_size
from sculpt.training import Row

if TYPE_CHECKING:
    from sculpt.actions.model import ActionModel

__all__ = ["Pool", "PolicyStudent"]

RENEW, REUSE = 16, 2
"""Steps until there are new samples of the student, and how often each of them is new."""
NEW, OLD = 0.375, 0.375
"""Shares of a batch: new samples of the student, and older ones by their weights. The rest are the road's."""
HUBER = 5.0
"""Nats from which on the loss is linear: one bad sample is a thousand nats away."""
FLOOR = 100.0
"""Nats under the largest, where the log-density of what the composition never makes is put."""


class Pool(nn.Module):
    """The last samples that were put in, with their log-densities under the target and under who made them.

    Args:
        like: a state, for shape, type and device.
        size: how many there are at most.
    """

    def __init__(self, like: Shaped[Tensor, "1 *s"], size: int):
        super().__init__()
        self.register_buffer("x", like.expand(size, *like.shape[1:]).clone())
        for name in ("log_target", "log_q"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float64, device=like.device))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        return min(int(self.count), len(self.x))

    def add(self, x: Shaped[Tensor, "k *s"], log_target: Float[Tensor, "k"], log_q: Float[Tensor, "k"]) -> None:
        """Put samples in the places of the oldest."""
        at = (int(self.count) + torch.arange(len(x))) % len(self.x)
        self.x[at], self.log_target[at], self.log_q[at] = x, log_target, log_q
        self.count += len(x)

    def newest(self, k: int, among: int, generator: torch.Generator) -> Tensor:
        """Rows of k of the last samples."""
        last = min(among, len(self))
        return (int(self.count) - 1 - torch.randint(last, (k,), generator=generator)) % len(self.x)

    def heaviest(self, k: int, generator: torch.Generator) -> Tensor:
        """Rows of k samples, drawn by their weights; no weight counts more than twenty times the mean."""
        n = len(self)
        w = torch.softmax((self.log_target - self.log_q)[:n].cpu(), 0).nan_to_num(0.0) + 1e-12
        return torch.multinomial(w.clamp(max=20 / n), k, True, generator=generator)


class PolicyStudent(Student):
    """A policy that learns to be a composition.

    Args:
        composition: what it is to be.
        road: whose samples it sees beside its own.
        batch_size: trajectories a step.
        seed: of what is drawn.
        samples: how many of the road's, and of its own that are kept.
        network: a policy network of your own, from states to the logits of all actions; by default a copy of the anchor's.
        name: of the model; by default the formula.
        draws: fresh samples that tell how far it is from its target.
    """

    steps = 4000
    learning_rate = 1e-3
    clip = 20.0

    def __init__(
        self,
        composition: BaseModel,
        road: Any = None,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        samples: int = 4096,
        network: nn.Module | None = None,
        name: str | None = None,
        draws: int = 5000,
    ):
        self.composition, self.road, self.seed = composition, road, seed
        self.samples, self.draws = whole("samples", samples), whole("draws", draws, least=2)
        self.batch_size = check_whole("batch_size", batch_size) or 128
        torch.default_generator.manual_seed(seed)  # a new network is drawn with it
        self.target = Target(composition, torch.Generator().manual_seed(seed))
        self.anchor: ActionModel = self.target.models[self.target.first]
        self.learner = self.anchor.learner(name or str(composition), network)
        self.network = self.learner.module
        start = self.anchor.start(1)
        _check_way_back(self.anchor, start)
        self.own, self.given = Pool(start, 2 * self.samples), Pool(start, self.samples)
        self._identity = {"batch_size": self.batch_size, "samples": self.samples, "network": module_digest(self.network)}

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity | {"road": getattr(self.road, "identity", str(self.road))}

    @property
    def kept(self) -> dict[str, nn.Module]:
        return {"own": self.own, "given": self.given}

    def check_saving(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.learner.save_pretrained(Path(folder) / "model")

    def prepare(self, progress: bool) -> None:
        if not len(self.given):
            generator = torch.Generator().manual_seed(self.seed)
            x = self.composition.sample(self.samples, self.road, generator=generator, progress=progress).x
            log_target = self.target(x, generator)
            self.given.add(x, log_target, log_target)

    # The loss

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        generator, B = torch.Generator().manual_seed(seed), self.batch_size
        self.network.eval()  # balance is a property of one policy, and dropout would make it another one each time
        new = max(1, int(RENEW * NEW * B / REUSE))
        if seed % RENEW == 0 or not len(self.own):
            self._explore(new if len(self.own) else max(new, len(self.own.x) // 4), generator)
        parts = [
            (self.own, self.own.newest(int(NEW * B), new, generator)),
            (self.own, self.own.heaviest(int(OLD * B), generator)),
        ]
        rest = B - sum(len(rows) for _, rows in parts)
        parts.append((self.given, torch.randint(len(self.given), (rest,), generator=generator)))
        x = torch.cat([pool.x[rows] for pool, rows in parts])
        log_target = torch.cat([pool.log_target[rows] for pool, rows in parts])
        log_target = log_target.clamp(min=float(log_target.max()) - FLOOR)
        delta = log_pi(self.learner, x, generator) - log_target
        centred = delta - centre(delta.detach())
        row = {"spread": centred.detach()[: len(parts[0][1])].std(correction=0)}  # of what the student writes now, in nats
        return F.huber_loss(centred, torch.zeros_like(centred), delta=HUBER), row

    @torch.no_grad()
    def _explore(self, n: int, generator: torch.Generator) -> None:
        """New samples of the student as it is."""
        x = self.learner.sample(n, generator=generator, progress=False).x
        self.own.add(x, self.target(x, generator), log_pi(self.learner, x, generator))

    # What becomes of it

    def graduate(self, network: nn.Module) -> BaseModel:
        return self.learner.with_module(network)

    @torch.no_grad()
    def measure(self, model: BaseModel, generator: torch.Generator) -> Row:
        r"""With exact weights :math:`w = e^{\Phi(\ell)} / \pi`: their effective share, log Z, and the total variation."""
        x = model.sample(self.draws, generator=generator, progress=False).x
        counted = Counted.of([model]) if self.target.table is not None else None  # type: ignore[list-item]
        log_q = log_pi(model, x, generator) if counted is None else counted(x)[:, 0]  # type: ignore[arg-type]
        log_w = self.target(x, generator) - log_q
        log_z = float(log_w.logsumexp(0) - torch.tensor(float(len(x))).log())
        share = effective_sample_size(log_w) / len(x)
        row: Row = {"target": self.target.said, "fresh draws": len(x), "effective share of exact weights": share}
        row |= {"log Z": log_z, "standard error of log Z": ((1 / share - 1) / len(x)) ** 0.5}
        if counted is None:
            return row | {"total variation, estimated": float(((log_w - log_z).exp() - 1).abs().mean() / 2)}
        q, p = counted(self.target.table.x)[:, 0].exp(), self.target.table_density()  # type: ignore[union-attr]
        return row | {"total variation, exact": float((1 - q.sum() + (p - q).abs().sum()) / 2)}

    def save(self, model: BaseModel, folder: Path) -> None:
        model.save_pretrained(folder)  # type: ignore[attr-defined]


@torch.no_grad()
def _check_way_back(model: ActionModel, start: Shaped[Tensor, "1 *s"]) -> None:
    try:
        backward_paths(model, model.children(start, model.log_pf(start) > NEG_INF)[2][:1])
    except NotImplementedError:
        raise ValueError(
            f"The samples of {model} cannot be traced back to their start, which a student does: it learns from finished samples. Give its "
            "environment a backward_step, or its family a backtrack."
        ) from None


def log_pi(model: ActionModel, x: Shaped[Tensor, "b *s"], generator: torch.Generator) -> Float[Tensor, "b"]:
    r""":math:`\log \pi(\tau) - \log P_B(\tau|x)` along one path back from each x: log p(x) itself where there is one path."""
    if (log_p := model.log_p(x)) is not None:
        return log_p
    children, parents, actions, owner = backward_paths(model, x, generator)
    unique, rows = distinct(torch.cat([x, parents]))
    taken = torch.cat([torch.full((len(x),), model.n_actions - 1, device=x.device), actions])
    steps = model.log_pf(unique)[rows, taken]
    if len(owner):
        unique, rows = distinct(children)
        steps = steps - F.pad(model.log_pb(unique)[rows, actions], (len(x), 0))
    own = torch.arange(len(x), device=x.device)
    return torch.zeros(len(x), dtype=torch.float64, device=x.device).index_add(0, torch.cat([own, owner]), steps)


def centre(delta: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    """The c with the least mean Huber loss of delta - c."""
    c = delta.median()
    for _ in range(20):
        c = c + (delta - c).clamp(-HUBER, HUBER).mean()
    return c
