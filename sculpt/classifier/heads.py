r"""The classifier: p(y_1 | s) and p(y_2 ... y_n | s, y_1) along the way, p(y | x) at the end.

Notation: ``b`` batch, ``m`` base models, ``n`` observations, ``k`` unordered sets of n-1 labels. A state s is what the
family's network takes: ``(z, s)`` for diffusion, the state tensor for GFlowNets. With a finished sample x alone the
network gives the features of the end of a trajectory.

.. math:: h(s) = p(y_2, \dots, y_n \mid s, y_1), \qquad p_v(i \mid x) = \frac{v_i \, p(i \mid x)}{\sum_j v_j \, p(j \mid x)}
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt import preview
from sculpt.blueprint import build, fill
from sculpt.classifier.guide import Guide
from sculpt.contents import arguments, find
from sculpt.entries import Entries
from sculpt.files import open_folder, save_folder
from sculpt.formula import label_sets
from sculpt.weights import Weights

__all__ = ["Classifier", "SetHead"]

MOST_OBSERVATIONS = 170
"""The orderings of as many labels are still a float."""
MOST_ENTRIES = 50_000_000
"""in the lists of label sets"""


class SetHead(nn.Module):
    r"""Features to :math:`\log p(y_2, \dots, y_n \mid s, y_1 = i)`: a row per anchor i, a column per unordered label set.

    Args:
        width: how many features there are.
        m: base models.
        n: observations, the anchor's among them.
        odds: whether log-odds are an input.
        children: how many successors of s are scored in one pass; 1 for s itself.
    """

    log_orderings: Tensor
    counts: Tensor

    def __init__(self, width: int, m: int, n: int, odds: bool = False, children: int = 1):
        super().__init__()
        # comb(m + size - 1, size) sets of each size, as a list of labels and a row of counts.
        entries = sum(math.comb(m + size - 1, size) * (size + m) for size in range(1, min(n, MOST_OBSERVATIONS + 1)))
        if n > MOST_OBSERVATIONS or entries > MOST_ENTRIES:
            raise ValueError(
                f"{n} observations of {m} models have too many sets of labels: {math.comb(m + n - 2, n - 1):,} of {n - 1} labels. "
                "Condition on fewer labels at once."
            )
        self.m, self.n, self.odds, self.n_children = m, n, odds, children
        self.sets = label_sets(m, n - 1)
        self.smaller = [labels for size in range(1, n - 1) for labels in label_sets(m, size)]
        orderings = [math.factorial(n - 1) / math.prod(map(math.factorial, collections.Counter(s).values())) for s in self.sets]
        self.register_buffer("log_orderings", torch.tensor(orderings, dtype=torch.float64).log().float(), persistent=False)
        counts = [[labels.count(i) for i in range(m)] for labels in (*self.sets, *self.smaller)]
        self.register_buffer("counts", torch.tensor(counts, dtype=torch.float32), persistent=False)
        self.hidden = nn.Linear(width + m * odds, width)
        self.out = nn.Linear(width, children * m * len(self.sets))

    def forward(
        self,
        features: Float[Tensor, "b w"],
        log_odds: Float[Tensor, "b m"] | None = None,
        rows: Int[Tensor, "e"] | None = None,
        children: Int[Tensor, "e"] | int = 0,
        anchors: Int[Tensor, "e"] | None = None,
    ) -> Float[Tensor, "*b k"]:
        """All children's ``(b, c, m, k)``, or ``(e, m, k)`` of chosen ones, or ``(e, k)`` of chosen ones' chosen anchors.

        Args:
            features: of the states.
            log_odds: a row for each state, where the head takes odds.
            rows: the states whose children are chosen.
            children: which child of each of these rows.
            anchors: which anchor of each of these rows.
        """
        if self.odds and log_odds is not None:
            features = torch.cat([features, log_odds - log_odds.mean(-1, keepdim=True)], dim=-1)
        logits = rearrange(self.out(F.silu(self.hidden(features))), "b (c m k) -> b c m k", m=self.m, c=self.n_children)
        if rows is not None:
            logits = logits[rows, children] if anchors is None else logits[rows, children, anchors]
        # A set stands for all its orderings, so each column counts that often in the total.
        return torch.log_softmax(logits.float() + self.log_orderings, dim=-1) - self.log_orderings

    def target(self, log_p: Float[Tensor, "*b m"]) -> Float[Tensor, "*b k"]:
        r"""The probability of each set from that of each label, ``log_p``: all orderings together, :math:`\Pi_{k \ge 2} \, p(y_k \mid x)` each."""
        return (self.log_f(log_p)[..., : len(self.sets)] + self.log_orderings.to(log_p)).exp()

    def log_f(self, log_p: Float[Tensor, "*b m"], columns: Int[Tensor, "r k2"] | None = None) -> Float[Tensor, "*b k2"]:
        r""":math:`\log \Pi_{k \ge 2} \, p(y_k \mid x)` of each set from that of each label, ``log_p``; the smaller sets come last.

        Args:
            log_p: of each label.
            columns: which sets each row is wanted of, where that is not all of them.
        """
        counts = self.counts if columns is None else self.counts[columns]
        # Clamped: a label of no probability, not observed, has to be 0 · log 0 = 0.
        return log_p.clamp(min=-1e4) @ counts.mT.to(log_p)

    def column(self, labels: Sequence[int]) -> int:
        """Where the set of these labels is among ``sets``."""
        return self.sets.index(tuple(sorted(labels)))

    def select(self, log_h: Float[Tensor, "*b k"], labels: Sequence[int]) -> Float[Tensor, "*b"]:
        """The entries of ``log_h`` for these labels; observations that were not made are summed out."""
        missing = itertools.product(range(self.m), repeat=self.n - 1 - len(labels))
        columns = [self.column((*labels, *more)) for more in missing]
        return log_h[..., columns].logsumexp(-1)

    def with_smaller(self, log_h: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k2"]:
        """``log_h`` with a further column for each of the ``smaller`` label sets, for compositions that make fewer observations."""
        return torch.cat([log_h, *(self.select(log_h, labels)[..., None] for labels in self.smaller)], -1)


class Classifier(Guide, nn.Module):
    """Heads over a backbone. ``sculpt.fit`` makes it; from then on it is in evaluation mode and needs no gradient of its weights.

    Args:
        network: the backbone ``(*state) -> (b, width)`` with an attribute ``width``; given a finished sample alone, it takes that.
        keys: of the base models, in the order of the labels.
        observations: the most labels that one sample may be conditioned on.
        odds: whether odds are an input.
        children: how many children of a state are scored in one pass; 1 for the state itself.
        names: of the base models.
        field: a network that gives guidance itself, see ``sculpt.fit_field``.

    Example:
        >>> classifier = sculpt.load("pretrained/grid/pair")
        >>> classifier.m, classifier.observations, classifier.names
        (2, 2, ('symmetric_shubert', 'diag_sigmoid'))
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
        field: nn.Module | None = None,
    ):
        super().__init__()
        if observations < 2:
            raise ValueError(f"A classifier observes at least two labels, got observations={observations}.")
        if len(set(keys)) != len(keys) or len(keys) < 2:
            raise ValueError(
                f"A classifier tells two or more different base models apart, got keys {[key[:12] for key in keys]}."
            )
        self.m, self.observations, self.odds, self.n_children = len(keys), observations, odds, children
        self.takes_odds = odds
        self.keys: tuple[str, ...] = tuple(keys)
        self.names = tuple(names or (f"p{i}" for i in range(len(keys))))
        self.network = network
        width = getattr(network, "width", None)
        if not isinstance(width, int):
            raise ValueError(
                f"The backbone {type(network).__name__} has no width: heads need to know how many features it gives. Set network.width to "
                "the size of its output's last axis."
            )
        self.marginal_head = nn.Linear(width, self.m)
        self.terminal_head = nn.Linear(width, self.m)
        self.set_head = SetHead(width, self.m, observations, odds, children)
        self.vector_field = field
        self.history: list[dict[str, float]] = []
        """The training curve, a row for each evaluation; the one whose weights these are has ``kept``."""

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.parameters())
        said = f"observations={self.observations}, odds={self.odds}, parameters={size:,}"
        return f"{type(self).__name__}({', '.join(self.names)}, {said})"

    @property
    def field(self) -> nn.Module | None:
        return self.vector_field

    def marginal(self, *state: Tensor) -> Float[Tensor, "b m"]:
        return torch.log_softmax(self.marginal_head(self.network(*state)).float(), dim=-1)

    def terminal(self, x: Tensor) -> Float[Tensor, "b m"]:
        return torch.log_softmax(self.terminal_head(self.network(x)).float(), dim=-1)

    def log_h(self, *state: Tensor, labels: Sequence[int], odds: Sequence[float] | None = None) -> Float[Tensor, "b"]:
        return self.select(self.joint(*state, odds=odds)[:, 0], labels)

    def joint(self, *state: Tensor, odds: Sequence[float] | None = None) -> Float[Tensor, "b c m k"]:
        r""":math:`\log p(y_2 \dots y_n \mid s', y_1 = i)`, with these odds, for the state itself or, with children, for each of them"""
        features = self.network(*state)
        return self.set_head(features, self._log_odds(odds, features))

    def select(self, joint: Float[Tensor, "*b m k"], labels: Sequence[int]) -> Float[Tensor, "*b"]:
        """The entries of ``joint`` for these labels, the anchor's first; observations that were not made are summed out."""
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

    @property
    def config(self) -> dict[str, Any]:
        """What ``save_pretrained`` writes beside the weights."""
        return {
            "kind": "classifier",
            "keys": list(self.keys),
            "names": list(self.names),
            "observations": self.observations,
            "odds": self.odds,
            "children": self.n_children,
            "network": _described(self.network),
            **({} if self.vector_field is None else {"field": _described(self.vector_field)}),
            "history": self.history,
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder; the field in half precision."""
        state = {name: value.half() if name.startswith("vector_field.") else value for name, value in self.state_dict().items()}
        save_folder(folder, self.config, state)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        network: nn.Module | None = None,
        *,
        field: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> Classifier:
        """Read a saved classifier.

        Args:
            folder: where it was saved.
            network: its backbone, where that is one of your own.
            field: its guidance field, where that is one of your own.
            device: where it should live.
        """
        with open_folder(folder, kind="classifier") as (config, weights):
            backbone = _network(config, "network", weights) if network is None else lambda: network
            guidance = _network(config, "field", weights) if field is None and "field" in config else lambda: field
            options = _options(config, weights)
            classifier = build(lambda: cls(backbone(), field=guidance(), **options), weights, "the classifier")
            fill(classifier, weights.read(), weights)
            classifier.history = _history(config)
        return classifier.eval().requires_grad_(False).to(device or "cpu")

    def _repr_html_(self) -> str:
        size, heads = (
            sum(p.numel() for p in self.parameters()),
            "set_head, terminal_head, marginal_head" + ", field" * (self.field is not None),
        )
        rows = {
            "models": ", ".join(self.names),
            "observations": str(self.observations),
            "odds": "an input" if self.odds else "equal",
        }
        rows |= {"backbone": type(self.network).__name__, "heads": heads, "parameters": f"{size:,}"}
        return f"<b>Classifier</b>{preview.table(list(rows.items()))}"

    def extra_repr(self) -> str:
        """What it was fitted for, in torch's printout."""
        return f"models={', '.join(self.names)}, observations={self.observations}, odds={self.odds}"


def _described(network: nn.Module) -> dict[str, Any]:
    """The class of a network and its arguments."""
    cls = type(network)
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "config": getattr(network, "config", None)}


def _network(config: Entries, entry: str, weights: Weights) -> Callable[[], nn.Module]:
    """What makes the network that a file describes."""
    spec, what = config.inside(entry), "backbone" if entry == "network" else entry
    name = spec.text("class", most=200)
    if not name.startswith("sculpt.") or spec.get("config") is None:
        raise ValueError(
            f"The classifier in {weights.path.parent} has a {what} of its user's own ({name}). "
            f"Build it and pass it: Classifier.from_pretrained(folder, {entry}=...)."
        )
    try:
        cls = find(name, nn.Module)
    except ValueError as error:
        raise ValueError(f"The {entry} of the classifier in {weights.path.parent} cannot be built: {error}") from None
    options = arguments(cls, spec.inside("config"))
    return lambda: cls(**options)


def _options(config: Entries, weights: Weights) -> dict[str, Any]:
    """The arguments of a classifier, whose label sets are as many as the weights have columns for."""
    keys, names = config.texts("keys", most=1000, distinct=True), config.texts("names", most=1000)
    for entry, texts in (("keys", keys), ("names", names)):
        if len(texts) != len(keys) or not all(0 < len(text) <= 1000 for text in texts):
            raise config.refuse(entry, f"{len(keys)} texts of 1 to 1,000 characters, one for each base model")
    observations, children = config.whole("observations", 2, MOST_OBSERVATIONS), config.whole("children", 1)
    rows = children * len(keys) * math.comb(len(keys) + observations - 2, observations - 1)
    if (found := weights.shapes.get("set_head.out.weight", (0,))[0]) != rows:
        raise ValueError(
            f"The weights in {weights.path} do not fit the classifier that config.json describes: set_head.out.weight has {found:,} rows, "
            f"expected {rows:,} for {len(keys)} keys, {observations} observations and {children} children. "
            "Copy or download the folder again."
        )
    return {"keys": keys, "names": names, "observations": observations, "odds": config.flag("odds"), "children": children}


def _history(config: Entries) -> list[dict[str, float]]:
    """Rows of numbers, the same held-out losses in each."""
    rows = config.each("history", dict, "objects of numbers", most=100_000)
    losses = {name for row in rows for name in row if name.startswith("held_out_")}
    for row in rows:
        entries = Entries(row, f"{config.where}: history")
        for name in ({"step", "held_out_terminal", *losses, *row}) - {"kept"}:
            if not isinstance(row.get(name), float):  # NaN is one
                entries.number(name)
        if "kept" in row:
            entries.flag("kept")
    return rows
