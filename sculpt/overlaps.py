r"""Before sampling: how far base models overlap, and whether a composition asks for a region that none of them covers.

Everything comes from the shares :math:`r_i(x) = p_i(x) / \sum_j p_j(x)` at samples of every base model, that is from the
terminal head of a classifier, from exact densities, from densities tracked along paths of destruction, or, of images, from denoising
errors above the detail level:

.. math::
    \text{JS} &= \log m + \tfrac1m \sum_i E_{p_i} \log r_i \\
    \text{acceptance of labels } (i_1 \dots i_n) &= E_{p_{i_1}} \prod_{k \ge 2} r_{i_k} = Z \\
    \text{support distance of } p, q &= \tfrac12 E_{x \sim p} \min_{x' \sim q} |t(x) - t(x')|
        + \tfrac12 E_{x' \sim q} \min_{x \sim p} |t(x) - t(x')|, \qquad t = \log r_p - \log r_q

An imperfect classifier gives lower bounds of JS. The support distance is half of the thesis's one-dimensional symmetric support
difference, on logits, in nats: how far a sample's log-ratio lies from the nearest one that the other model's samples have.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.classifier.guide import Guide
from sculpt.classifier.heads import Classifier
from sculpt.composition import Composition
from sculpt.diagnostics import LEVELS, Verdict
from sculpt.formula import Posterior, label_sets
from sculpt.model import BaseModel, check_composable, same_model
from sculpt.particles import effective_sample_size
from sculpt.state import in_parts

__all__ = ["Overlap", "Prediction", "overlap", "predict"]

Referee = Guide | Callable[[Tensor], Tensor]
"""A classifier, or a function from samples to their log-densities ``(b, m)``, up to a constant common to all models."""

SAMPLES, CALLS = 2000, 50_000
"""Samples of each model where nobody says, fewer where each takes many calls of every model."""
UNCOVERED = 1e-3
"""Below this acceptance a composition lies where no base model has samples to speak of."""


@dataclass(frozen=True)
class Prediction:
    """What the overlap of the base models says about one composition."""

    formula: str
    acceptance: float
    """Z, what rejection would keep; of the d-th root of the target where its degree d is not one"""
    covered: float
    """the effective share of the base models' samples, taken together, under the composition"""
    samples: int

    @property
    def verdict(self) -> Verdict:
        """Do the base models know the region that the composition asks for?"""
        return _verdict(self.formula, self.acceptance, self.covered, self.samples)

    def __str__(self) -> str:
        name = "acceptance" if self.acceptance <= 1 else "Z"  # that of a product can be above one
        return f"{self.verdict} ({name} {self.acceptance:.3g}, {self.covered:.0%} of {self.samples} base samples count)"


def _verdict(formula: str, acceptance: float, covered: float = 1.0, samples: int = 10) -> Verdict:
    if acceptance < UNCOVERED or covered * samples < 10:
        return Verdict(
            "uncovered",
            f"{formula} asks for a region that no base model covers (acceptance {acceptance:.1g}). The networks extrapolate there, and "
            "neither particles nor correctors help: mix the models, or train one on what is missing.",
        )
    if acceptance < 0.02 or covered < 0.02:
        return Verdict(
            "thin", f"few base samples lie where {formula} does. Take many particles, or a classifier and correct=True."
        )
    return Verdict("sound", f"the base models cover {formula}.")


@dataclass(repr=False)
class Overlap:
    """How far base models overlap. ``print`` it; ``predict(composition)`` judges a composition of them on the same samples."""

    names: tuple[str, ...]
    js: float
    """Jensen-Shannon divergence of all the base models, in nats; at most log m"""
    source: str
    pairs: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    """for each two of them, Jensen-Shannon divergence and support distance"""
    acceptance: dict[str, float] = field(default_factory=dict)
    """predicted acceptance, Z, of harmonic means, contrasts and label sets"""
    models: tuple[BaseModel, ...] = ()
    log_r: tuple[Float[Tensor, "n m"], ...] = ()
    """log-shares at the samples of each base model"""

    @classmethod
    def of(cls, models: Sequence[BaseModel], log_r: Sequence[Tensor], source: str, observations: int = 2) -> Overlap:
        names, m = tuple(str(model) for model in models), len(models)
        if len(set(names)) < m:
            names = tuple(f"{name} [{i}]" for i, name in enumerate(names))
        pairs, acceptance = {}, {}
        for i, j in itertools.combinations(range(m), 2):
            pairs[i, j] = _js(log_r, (i, j)), _support_distance(log_r, i, j)
            for labels in ((0, 1), (0, 0), (1, 1)):
                formula = Posterior(2, labels)
                acceptance[formula.write((names[i], names[j]))] = _acceptance(log_r, (i, j), formula)
        for labels in label_sets(m, observations) if m > 2 or observations > 2 else ():
            formula = Posterior(m, labels)
            acceptance[formula.write(names)] = _acceptance(log_r, range(m), formula)
        return cls(names, _js(log_r, range(m)), source, pairs, acceptance, tuple(models), tuple(log_r))

    def predict(self, composition: Composition) -> Prediction:
        """Whether the base models cover what this composition of them asks for."""
        if not self.log_r:
            raise ValueError("A training curve judges no single composition. Draw samples: sculpt.overlap(models, classifier).")
        which = []
        for leaf in composition.leaves:
            known = [i for i, model in enumerate(self.models) if same_model(leaf, model)][:1]
            if not known:
                raise ValueError(f"{leaf} of {composition} is not among the models of this report, {', '.join(self.names)}.")
            which += known
        # All samples together are those of the equal mixture, (1/m) Σ p: the composition's weights against it need only shares.
        log_r, log_w = _pool(self.log_r, which)
        formula, log_m = composition.formula, math.log(len(which))
        log_ratio = formula.value(_operands(composition, composition.leaves, log_r, log_w)) / formula.degree + log_m
        log_z = float((log_w + log_ratio).logsumexp(0))
        covered = effective_sample_size(log_w + log_ratio) / len(log_w)
        return Prediction(str(composition), math.exp(min(log_z, 700.0)), covered, len(log_w))

    @property
    def verdict(self) -> Verdict:
        """Which of the common compositions make sense?"""
        if not self.pairs:
            # The entropy of a share r is at least 4 r (1 - r) log 2: for two models JS bounds the acceptance of p & q.
            apart, most = self.js / math.log(len(self.names)), max(0.0, 1 - self.js / math.log(2)) / 2
            if len(self.names) == 2 and most < UNCOVERED:
                return _verdict(" & ".join(self.names), most)
            return Verdict(
                "thin",
                f"{apart:.0%} apart. What that means for compositions needs samples: sculpt.overlap(models, classifier).",
            )
        said = []
        for (i, j), (js, _) in self.pairs.items():
            p, q = self.names[i], self.names[j]
            both = Posterior(2, (0, 1)).write((p, q))
            if self.acceptance[both] < 0.02:
                said.append(_verdict(both, self.acceptance[both]))
            elif js < 0.01:
                said.append(Verdict("sound", f"{p} and {q} are hardly different: so are their compositions."))
        if not said:
            return Verdict("sound", "every two of the base models overlap, and differ.")
        said.sort(key=lambda verdict: LEVELS.index(verdict.level), reverse=True)
        return Verdict(said[0].level, "\n".join([said[0].reason, *map(str, said[1:])]))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        pairs = [
            {"models": [self.names[i], self.names[j]], "js": js, "support_distance": distance}
            for (i, j), (js, distance) in self.pairs.items()
        ]
        head = {"names": list(self.names), "js": self.js, "js_most": math.log(len(self.names)), "source": self.source}
        return {**head, "pairs": pairs, "acceptance": dict(self.acceptance), "verdict": str(self.verdict)}

    def __str__(self) -> str:
        rows = [("base models", ", ".join(self.names)), ("from", self.source)]
        rows.append(("Jensen-Shannon", f"{self.js:.3f} of at most {math.log(len(self.names)):.3f} nats"))
        for (i, j), (js, distance) in self.pairs.items():
            own = f"Jensen-Shannon {js:.3f} of at most {math.log(2):.3f}, " if len(self.names) > 2 else ""
            rows.append((f"{self.names[i]}, {self.names[j]}", f"{own}support distance {distance:.3g} nats"))
        shown = list(self.acceptance.items())[:12]
        rows += [("acceptance", f"{value:<8.3g} {formula}") for formula, value in shown]
        if len(self.acceptance) > len(shown):
            rows.append(("", f"and {len(self.acceptance) - len(shown)} more in .acceptance"))
        return "\n".join(f"{name:>16}  {value}" for name, value in [*rows, ("verdict", str(self.verdict))])

    __repr__ = __str__


def overlap(
    models: Classifier | BaseModel | Sequence[BaseModel],
    classifier: Referee | None = None,
    *,
    n: int | None = None,
    data: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Overlap:
    """How far base models overlap, before anything is composed.

    Args:
        models: base models, a composition of them, or just a fitted classifier: its training curve knows their
            Jensen-Shannon divergence.
        classifier: of these models, or a function from samples to their log-densities ``(b, m)`` up to a common constant.
            Without one the densities are tracked along paths of destruction from the samples, which is an approximation; images are
            seen through noise of their detail level, and compared by denoising errors.
        n: samples to draw of each base model; by default 2,000, of images without a classifier 195.
        data: samples to use instead, one tensor per model. A classifier's own training samples flatter it.
        generator: source of randomness.
        options: of the base models' ``sample``, such as ``steps``.

    Example:
        >>> report = sculpt.overlap([one, two], n=200, generator=seed)
        >>> report.predict(one & two).verdict.level
        'sound'
    """
    if isinstance(models, Guide):
        return _from_curve(models)
    models = list(models.leaves if isinstance(models, BaseModel) else models)
    if len(models) < 2:
        raise ValueError(f"An overlap takes two or more base models, got {len(models)}.")
    check_composable(models)
    source, calls = ("the terminal head", 1) if isinstance(classifier, Guide) else ("the given densities", 1)
    if classifier is None:
        source, calls = models[0].ratio_source(models)
    n = min(SAMPLES, CALLS // calls) if n is None else n
    if data is None:
        if n < 2:
            raise ValueError(f"An overlap takes at least 2 samples of each base model, got n={n}.")
        data = [model.sample(n, generator=generator, **options).x for model in models]
    if len(data) != len(models) or min(map(len, data)) < 2:
        raise ValueError(f"data holds at least 2 samples of each of the {len(models)} models, got {[len(x) for x in data]}.")
    log_r = [_log_shares(models, i, x.to(models[0].device), classifier, generator) for i, x in enumerate(data)]
    if any(part.isnan().any() for part in log_r):
        raise FloatingPointError("Some samples have a share that is not a number. Check the samples and the classifier.")
    counts = " and ".join(dict.fromkeys(str(len(x)) for x in data))
    return Overlap.of(models, log_r, f"{source} at {counts} samples of each", getattr(classifier, "observations", 2))


def predict(composition: Composition, classifier: Referee | None = None, **options: Any) -> Prediction:
    """Whether base models cover what a composition of them asks for; arguments as for :func:`overlap`."""
    return overlap(composition, classifier, **options).predict(composition)


# -------------------------------------------------------------------------------------------------------------------- shares


def _from_curve(classifier: Guide) -> Overlap:
    curve = getattr(classifier, "history", [])
    if not curve:
        raise ValueError("This classifier has no training curve. Draw samples instead: sculpt.overlap(models, classifier).")
    # The row whose weights were kept; an older curve does not tell, and then it was that of the least held-out loss in total.
    least = min(curve, key=lambda row: sum(value for name, value in row.items() if name.startswith("held_out_")))
    kept = next((row for row in curve if row.get("kept")), least)
    js = max(0.0, math.log(classifier.m) - kept["held_out_terminal"])
    return Overlap(classifier.names, js, "the terminal head's held-out loss, a lower bound")


def _log_shares(models, i: int, x: Tensor, classifier, generator) -> Float[Tensor, "n m"]:
    """log r at samples x of model i."""
    if classifier is None:
        ell = models[0].log_ratios(models, x, generator, made_by=i).double()
    else:
        judge = partial(classifier.shares, models) if isinstance(classifier, Guide) else classifier
        with torch.no_grad():
            ell = in_parts(judge, 1024, x).double()
    if ell.shape != (len(x), len(models)):
        raise ValueError(f"Got log-densities of shape {tuple(ell.shape)} for {len(x)} samples: one column per base model.")
    return torch.log_softmax(ell, dim=-1)


# ------------------------------------------------------------------------------------------------------------ what they give


def _restricted(log_r: Sequence[Tensor], which: Sequence[int]) -> list[Float[Tensor, "n k"]]:
    """The shares among some of the models, at these models' samples."""
    return [torch.log_softmax(log_r[i][:, list(which)], dim=-1) for i in which]


def _js(log_r, which) -> float:
    parts = _restricted(log_r, which)
    own = [float(part[:, k].mean()) for k, part in enumerate(parts)]
    return max(0.0, math.log(len(parts)) + sum(own) / len(parts))


def _acceptance(log_r, which, formula: Posterior) -> float:
    """The mean over all labels that can be the anchor; with equal odds they agree, so all samples count."""
    parts = _restricted(log_r, which)
    anchors = sorted(set(formula.labels))
    return sum(float((formula.value(parts[i]) - parts[i][:, i]).exp().mean()) for i in anchors) / len(anchors)


def _support_distance(log_r, i: int, j: int) -> float:
    t, u = (log_r[k][:, i] - log_r[k][:, j] for k in (i, j))
    return float(_nearest(t, u).mean() + _nearest(u, t).mean()) / 2


def _nearest(t: Float[Tensor, "a"], others: Float[Tensor, "b"]) -> Float[Tensor, "a"]:
    """The distance of each number to the nearest of the others."""
    others = others.sort().values
    k = torch.searchsorted(others, t)
    sides = torch.stack([others[(k - 1).clamp(min=0)], others[k.clamp(max=len(others) - 1)]])
    return torch.where(sides == t, 0.0, (sides - t).abs()).amin(0)


def _pool(log_r, which) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n"]]:
    """All samples of these models, each model with the same weight in total."""
    parts = _restricted(log_r, which)
    log_w = [torch.full_like(part[:, 0], -math.log(len(part) * len(parts))) for part in parts]
    return torch.cat(parts), torch.cat(log_w)


def _operands(composition: Composition, leaves: Sequence[BaseModel], log_r, log_w) -> Float[Tensor, "n k"]:
    """The log-densities of a composition's operands against the sum of the leaves', inner compositions normalised."""
    columns = []
    for model in composition.models:
        if not isinstance(model, Composition):
            columns.append(log_r[:, next(i for i, leaf in enumerate(leaves) if same_model(leaf, model))])
            continue
        if abs(model.formula.degree - 1) > 1e-12:
            raise ValueError(f"Shares cannot normalise {model}, of degree {model.formula.degree:g}; its samples have a log Z.")
        ell = model.formula.value(_operands(model, leaves, log_r, log_w))
        columns.append(ell - (log_w + ell + math.log(len(leaves))).logsumexp(0))
    return torch.stack(columns, dim=-1)
