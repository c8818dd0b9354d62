r"""The classifier: p(y_1 | s) and p(y_2 ... y_n | s, y_1) along the way, p(y | x) at the end.

Notation: ``b`` batch, ``m`` base models, ``n`` observations, ``k`` unordered sets of n-1 labels. A state s is what the
family's network takes: ``(z, s)`` for diffusion, the state tensor for GFlowNets. With a finished sample x alone the
network gives the features of the end of a trajectory.

.. math:: h(s) = p(y_2, \dots, y_n \mid s, y_1), \qquad p_v(i \mid x) = \frac{v_i \, p(i \mid x)}{\sum_j v_j \, p(j \mid x)}
"""

from __future__ import annotations

import abc
import collections
import importlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.base import BaseModel
from sculpt.files import load_folder, save_folder
from sculpt.formula import Posterior, label_sets

__all__ = ["Guide", "Classifier", "Batch"]


class Guide(abc.ABC):
    """What guided sampling asks of a classifier, learned or exact. Labels count in the order of ``keys``."""

    m: int
    observations: int
    keys: tuple[str, ...] | None = None
    """The base models' keys in the order of the labels; ``None`` takes the models in whatever order they come."""

    @abc.abstractmethod
    def marginal(self, *state: Tensor) -> Float[Tensor, "b m"]:
        r""":math:`\log p(y_1 = i \mid s)`"""

    @abc.abstractmethod
    def log_h(self, *state: Tensor, labels: Sequence[int], odds: Sequence[float] | None = None) -> Float[Tensor, "b"]:
        r""":math:`\log h(s) = \log p(y_2 = i_2, \dots, y_n = i_n \mid s, y_1 = i_1)`, the labels in this order"""

    @abc.abstractmethod
    def terminal(self, x: Tensor) -> Float[Tensor, "b m"]:
        r""":math:`\log p(y = i \mid x)`, without odds"""

    def log_h_terminal(self, x: Tensor, *, labels: Sequence[int], odds: Sequence[float] | None = None) -> Float[Tensor, "b"]:
        r""":math:`\sum_{k \ge 2} \log p_v(i_k \mid x)`: at the end the labels are independent"""
        log_p = with_odds(self.terminal(x), odds)
        return log_p[:, list(labels[1:])].sum(-1)

    def align(self, posterior: Posterior, models: Sequence[BaseModel]) -> tuple[Posterior, list[BaseModel]]:
        """The posterior and its models in this classifier's order; refuses models and labels it was not made for."""
        names = ", ".join(str(model) for model in models)
        if len(models) != self.m:
            raise ValueError(
                f"This classifier knows {self.m} base models, the composition has {len(models)} ({names}). "
                "Fit one for exactly these models, or write the composition as sculpt.posterior over all the classifier's models."
            )
        if len(posterior.labels) > self.observations:
            raise ValueError(
                f"Cannot condition on labels {posterior.labels}: this classifier was trained for {self.observations} observations "
                f"of {self.m} models (0 to {self.m - 1}). Fit one with observations={len(posterior.labels)}, "
                f"or pass {self.observations} labels."
            )
        if self.keys is None:
            return posterior, list(models)
        position = []
        for model in models:
            if model.key not in self.keys:
                raise ValueError(
                    f"The classifier was fitted for other base models: {model} (key {model.key[:12]}) is not among its keys "
                    f"{', '.join(key[:12] for key in self.keys)}. Weights, configuration or condition differ; "
                    "run sculpt.fit on these models. (A callable without weights needs the same name= as when it was fitted.)"
                )
            position.append(self.keys.index(model.key))
        order = sorted(range(self.m), key=position.__getitem__)
        aligned = Posterior(self.m, [position[i] for i in posterior.labels], [posterior.odds[i] for i in order])
        return aligned, [models[i] for i in order]


def with_odds(log_p: Float[Tensor, "b m"], odds: Sequence[float] | None) -> Float[Tensor, "b m"]:
    r""":math:`\log p_v(i \mid x)` from :math:`\log p(i \mid x)`"""
    if odds is None or len(set(odds)) == 1:
        return log_p
    return torch.log_softmax(log_p + torch.tensor(odds, dtype=torch.float64).log().to(log_p), dim=-1)


class SetHead(nn.Module):
    r"""Features to :math:`\log p(y_2, \dots, y_n \mid s, y_1 = i)`: a row per anchor i, a column per unordered label set.

    With ``children`` it scores that many successors of s in one pass. With ``odds`` it takes the log-odds as an input.
    """

    def __init__(self, width: int, m: int, n: int, odds: bool = False, children: int = 1):
        super().__init__()
        self.m, self.n, self.odds, self.n_children = m, n, odds, children
        self.sets = label_sets(m, n - 1)
        self.smaller = [labels for size in range(1, n - 1) for labels in label_sets(m, size)]
        orderings = [math.factorial(n - 1) / math.prod(map(math.factorial, collections.Counter(s).values())) for s in self.sets]
        self.register_buffer("log_orderings", torch.tensor(orderings).log(), persistent=False)
        counts = [[labels.count(i) for i in range(m)] for labels in (*self.sets, *self.smaller)]
        self.register_buffer("counts", torch.tensor(counts, dtype=torch.float32), persistent=False)
        self.hidden = nn.Linear(width + m * odds, width)
        self.out = nn.Linear(width, children * m * len(self.sets))

    def forward(
        self,
        features: Float[Tensor, "b w"],
        log_odds: Float[Tensor, "b m"] | None = None,
        rows: Int[Tensor, "e"] | None = None,
        children: Int[Tensor, "e"] | None = None,
    ) -> Float[Tensor, "*b m k"]:
        """Of all children ``(b, c, m, k)``; of these children of these rows ``(e, m, k)``."""
        if self.odds:
            features = torch.cat([features, log_odds - log_odds.mean(-1, keepdim=True)], dim=-1)
        logits = rearrange(self.out(F.silu(self.hidden(features))), "b (c m k) -> b c m k", m=self.m, c=self.n_children)
        logits = logits if rows is None else logits[rows, children]
        # A set stands for all its orderings, so each column counts that often in the total.
        return torch.log_softmax(logits.float() + self.log_orderings, dim=-1) - self.log_orderings

    def target(self, log_p: Float[Tensor, "*b m"]) -> Float[Tensor, "*b k"]:
        r"""The weight of each set: all its orderings together, :math:`\Pi_{k \ge 2} \, p(y_k \mid x)` each."""
        return (self.log_f(log_p)[..., : len(self.sets)] + self.log_orderings.to(log_p)).exp()

    def log_f(self, log_p: Float[Tensor, "*b m"]) -> Float[Tensor, "*b k2"]:
        r""":math:`\log \Pi_{k \ge 2} \, p(y_k \mid x)` of each set, the smaller ones last"""
        # Clamped: a label of no probability, not observed, has to be 0 · log 0 = 0.
        return log_p.clamp(min=-1e4) @ self.counts.T.to(log_p)

    def column(self, labels: Sequence[int]) -> int:
        return self.sets.index(tuple(sorted(labels)))

    def select(self, log_h: Float[Tensor, "*b k"], labels: Sequence[int]) -> Float[Tensor, "*b"]:
        """The entry of these labels; observations that were not made are summed out."""
        missing = itertools.product(range(self.m), repeat=self.n - 1 - len(labels))
        columns = [self.column((*labels, *more)) for more in missing]
        return log_h[..., columns].logsumexp(-1)

    def with_smaller(self, log_h: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k2"]:
        """With a column for each of the ``smaller`` label sets, for compositions that make fewer observations."""
        return torch.cat([log_h, *(self.select(log_h, labels)[..., None] for labels in self.smaller)], -1)


class Classifier(Guide, nn.Module):
    """Heads over a backbone ``network(*state) -> (b, width)``; ``network(x)`` alone sees a finished sample.

    Made by ``sculpt.fit``. It is in evaluation mode from then on and needs no gradient of its weights.
    """

    def __init__(
        self,
        network: nn.Module,
        keys: Sequence[str],
        observations: int = 2,
        odds: bool = False,
        *,
        children: int = 1,
        names: Sequence[str] | None = None,
    ):
        super().__init__()
        if observations < 2:
            raise ValueError(f"A classifier observes at least two labels, got observations={observations}.")
        if len(set(keys)) != len(keys) or len(keys) < 2:
            raise ValueError(
                f"A classifier tells two or more different base models apart, got keys {[key[:12] for key in keys]}."
            )
        self.m, self.observations, self.odds, self.n_children = len(keys), observations, odds, children
        self.keys, self.names = tuple(keys), tuple(names or (f"p{i}" for i in range(len(keys))))
        self.network = network
        width = network.width
        self.marginal_head = nn.Linear(width, self.m)
        self.terminal_head = nn.Linear(width, self.m)
        self.set_head = SetHead(width, self.m, observations, odds, children)
        self.history: list[dict[str, float]] = []

    def marginal(self, *state):
        return torch.log_softmax(self.marginal_head(self.network(*state)).float(), dim=-1)

    def terminal(self, x):
        return torch.log_softmax(self.terminal_head(self.network(x)).float(), dim=-1)

    def log_h(self, *state, labels, odds=None):
        return self.select(self.joint(*state, odds=odds)[:, 0], labels)

    def joint(self, *state: Tensor, odds: Sequence[float] | None = None) -> Float[Tensor, "b c m k"]:
        r""":math:`\log p(y_2 \dots y_n \mid s', y_1 = i)` for the state itself or, with children, for each of them"""
        features = self.network(*state)
        return self.set_head(features, self._log_odds(odds, features))

    def select(self, joint: Float[Tensor, "*b m k"], labels: Sequence[int]) -> Float[Tensor, "*b"]:
        """The entry of these labels, the anchor's first; observations that were not made are summed out."""
        return self.set_head.select(joint[..., labels[0], :], labels[1:])

    def _log_odds(self, odds: Sequence[float] | None, features: Tensor) -> Tensor | None:
        if not self.odds:
            if odds is not None and len(set(odds)) > 1:
                raise ValueError(
                    f"Odds {tuple(odds)} need a classifier that takes them, this one does not: sculpt.fit(models, odds=True)."
                )
            return None
        odds = [1.0] * self.m if odds is None else odds
        return torch.tensor(odds, dtype=torch.float64).log().to(features).expand(len(features), -1)

    def losses(
        self, batch: Batch, teacher: Classifier, log_odds: Tensor | None = None, *, follow: bool = False
    ) -> dict[str, Tensor]:
        """Cross-entropies of the terminal head, the label's marginal and the label sets, in nats.

        The terminal head's is to the labels, or to what the teacher says (``follow``).
        """
        y = batch.y[batch.owner]
        with torch.no_grad():
            taught = teacher.terminal(batch.x)
            log_p = taught[batch.owner]
            if log_odds is not None:
                log_p = torch.log_softmax(log_p + log_odds, dim=-1)
            target = self.set_head.target(log_p)
        features = self.network(*batch.states)
        joint = self.set_head(features, log_odds)
        rows = torch.arange(len(y), device=y.device)
        joint = joint[rows, batch.child if batch.child is not None else 0, y]
        return {
            "terminal": F.cross_entropy(self.terminal(batch.x), taught.exp() if follow else batch.y),
            "marginal": F.cross_entropy(self.marginal_head(features).float(), y),
            "joint": -(target * joint).sum(-1).mean(),
        }

    @property
    def config(self) -> dict:
        """What ``save_pretrained`` writes beside the weights."""
        network = type(self.network)
        return {
            "kind": "classifier",
            "keys": list(self.keys),
            "names": list(self.names),
            "observations": self.observations,
            "odds": self.odds,
            "children": self.n_children,
            "network": {
                "class": f"{network.__module__}.{network.__qualname__}",
                "config": getattr(self.network, "config", None),
            },
            "history": self.history,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        save_folder(folder, self.config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, network: nn.Module | None = None, *, device: torch.device | str | None = None
    ) -> Classifier:
        """Read a saved classifier. One with a backbone of your own needs that backbone: ``network=``."""
        config, weights = load_folder(folder, kind="classifier")
        if network is None:
            network = _own_network(config["network"], folder)
        classifier = cls(
            network, config["keys"], config["observations"], config["odds"], children=config["children"], names=config["names"]
        )
        try:
            classifier.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"The weights in {folder} do not fit the classifier that its config.json describes: {error}"
            ) from None
        classifier.history = config["history"]
        return classifier.eval().requires_grad_(False).to(device or "cpu")

    def extra_repr(self) -> str:
        """What it was fitted for, in torch's printout."""
        return f"models={', '.join(self.names)}, observations={self.observations}, odds={self.odds}"


def _own_network(description: dict, folder: str | Path) -> nn.Module:
    module, _, name = description["class"].rpartition(".")
    if not module.startswith("sculpt.") or description["config"] is None:
        raise ValueError(
            f"The classifier in {folder} has a backbone of its user's own ({description['class']}). "
            "Build it and pass it: Classifier.from_pretrained(folder, network=...)."
        )
    network = getattr(importlib.import_module(module), name, None)
    if not (isinstance(network, type) and issubclass(network, nn.Module)):
        raise ValueError(
            f"The classifier in {folder} names {description['class']} as its network, which this sculpt does not have. Update sculpt."
        )
    return network(**description["config"])


@dataclass
class Batch:
    """Finished samples with their labels, and states of the trajectories that ended in them."""

    x: Tensor
    """finished samples, first axis ``b``"""
    y: Int[Tensor, "b"]
    """index of the base model that made each x"""
    states: tuple[Tensor, ...]
    """states on the way, first axis ``c``: what the network takes"""
    owner: Int[Tensor, "c"]
    """row of x in which each state's trajectory ended"""
    child: Int[Tensor, "c"] | None = None
    """with a head over children: which child of the state the trajectory went to"""

    def to(self, device: torch.device) -> Batch:
        child = None if self.child is None else self.child.to(device)
        return Batch(
            self.x.to(device), self.y.to(device), tuple(s.to(device) for s in self.states), self.owner.to(device), child
        )
