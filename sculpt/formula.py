r"""Formulas: functions of the base models' log-densities.

Notation: :math:`\ell_i = \log p_i(x)`, last axis ``m``. A formula :math:`\Phi` names the target
:math:`p(x) \propto \exp \Phi(\ell(x))`. Every formula gives its value, its gradient :math:`a = \partial \Phi` and its
Hessian :math:`H = \partial^2 \Phi`, in log space: log-densities of any size, minus infinity included, give no NaN.
"""

import abc
import itertools
from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from sculpt.checks import each, normalised, real, whole
from sculpt.logspace import covariance, log_of, log_softmax, softmax

__all__ = ["Formula", "Mixture", "Posterior", "Product", "PowerMean", "Tilted", "Nested", "divides", "label_sets"]

NEG_INF = float("-inf")

LARGEST = 1e30
"""The largest exponent of a power mean: single precision holds it."""


def label_sets(m: int, n: int) -> list[tuple[int, ...]]:
    """Unordered tuples of n labels among m, e.g. ``label_sets(2, 2) == [(0, 0), (0, 1), (1, 1)]``."""
    return list(itertools.combinations_with_replacement(range(m), n))


class Formula(abc.ABC):
    r"""A function :math:`\Phi(\ell_1, \dots, \ell_m)` of log-densities."""

    m: int
    factors: tuple[int, ...] = ()
    """The entries that are log-likelihoods, not log-densities: the degree does not count them."""

    @property
    @abc.abstractmethod
    def degree(self) -> float:
        r"""The d of :math:`\Phi(\ell + c) = \Phi(\ell) + d\,c`: the power in which the densities are scaled."""

    @abc.abstractmethod
    def value(self, ell: Float[Tensor, "*b m"]) -> Float[Tensor, "*b"]:
        r""":math:`\Phi(\ell)`"""

    @abc.abstractmethod
    def gradient(self, ell: Float[Tensor, "*b m"]) -> Float[Tensor, "*b m"]:
        r""":math:`a_i = \partial \Phi / \partial \ell_i`; the entries of densities sum to the degree."""

    @abc.abstractmethod
    def hessian(self, ell: Float[Tensor, "*b m"]) -> Float[Tensor, "*b m m"]:
        r""":math:`H_{ij} = \partial^2 \Phi / \partial \ell_i \partial \ell_j`; the rows sum to zero."""

    @abc.abstractmethod
    def write(self, names: Sequence[str]) -> str:
        """The formula in the paper's notation, over operands with these names."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.write([f'p{i}' for i in range(self.m)])})"

    @property
    def identity(self) -> tuple:
        """The kind and every number of it. Printing rounds, keys must not."""
        return type(self).__name__, *((name, _identity(value)) for name, value in sorted(vars(self).items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Formula) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


class Mixture(Formula):
    r""".. math:: \Phi = \log \sum_i \omega_i e^{\ell_i}, \qquad \sum_i \omega_i = 1"""

    degree = 1.0

    def __init__(self, weights: Sequence[float]):
        self.weights = normalised(weights, "weights")
        self.m = len(self.weights)

    def value(self, ell):
        return torch.logsumexp(log_of(self.weights, ell) + ell, dim=-1)

    def gradient(self, ell):
        return softmax(log_of(self.weights, ell) + ell)

    def hessian(self, ell):
        return covariance(self.gradient(ell))

    def write(self, names):
        if len(set(self.weights)) == 1:
            return " | ".join(names)
        return " | ".join(f"{w:.3g}·{name}" for w, name in zip(self.weights, names, strict=True))


class Posterior(Formula):
    r"""The posterior of base models given n observations.

    .. math:: \Phi = \ell_{i_1} + \sum_{k \ge 2} \Bigl[ \log v_{i_k} + \ell_{i_k} - \log \sum_j v_j e^{\ell_j} \Bigr]

    The odds v are the weights of the observations :math:`y_2 \dots y_n`; the first is observed plainly. With these
    constants the normaliser is :math:`Z = p(y_2 \dots y_n \mid y_1)`.
    """

    degree = 1.0

    def __init__(self, m: int, labels: Sequence[int], odds: Sequence[float] | None = None):
        self.m = m
        self.labels = tuple(whole("a label", i, least=-m) for i in each("labels", labels, "indices of base models"))
        if not self.labels:
            raise ValueError("A posterior needs at least one label, got none. Pass labels=(0, 1) to observe y1=0 and y2=1.")
        if wrong := [i for i in self.labels if not 0 <= i < m]:
            raise ValueError(f"Labels are indices of base models, 0 to {m - 1}; got {wrong} in {self.labels}.")
        self.odds = normalised([1.0] * m if odds is None else odds, "odds")
        if len(self.odds) != m:
            raise ValueError(f"Got {len(self.odds)} odds for {m} base models. Pass one positive number per model.")

    def _shares(self, ell):
        r""":math:`\log r_i = \log v_i + \ell_i - \log \sum_j v_j e^{\ell_j}`, minus infinity where no model has density."""
        return log_softmax(log_of(self.odds, ell) + ell)

    def value(self, ell):
        log_v, shares, (anchor, *_) = log_of(self.odds, ell), self._shares(ell).unbind(-1), self.labels
        out = None
        for first in dict.fromkeys(self.labels):
            # Exchanging labels only rescales, so each may stand first. The least is a number where infinities of both signs meet in others.
            rest = list(self.labels)
            rest.remove(first)
            value = ell[..., first] + (log_v[first] - log_v[anchor]) + sum(shares[i] for i in rest)
            out = value if out is None else torch.fmin(out, value)
        return out

    def gradient(self, ell):
        counts = torch.zeros(self.m, dtype=ell.dtype, device=ell.device)
        for i in self.labels:
            counts[i] += 1
        return counts - (len(self.labels) - 1) * self._shares(ell).exp()

    def hessian(self, ell):
        return -(len(self.labels) - 1) * covariance(self._shares(ell).exp())

    def write(self, names):
        if len(set(self.odds)) > 1:
            # In a contrast of the second model with the first, α belongs to the one that is written first.
            first = self.labels[0] if len(set(self.labels)) == 1 else 0
            alpha = "" if self.m > 2 else f"[α={self.odds[first]:.3g}]"
        else:
            alpha = None
        if self.m > 1 and self.labels == tuple(range(self.m)) and (alpha is None or alpha):
            return f" ⊗{alpha or ''} ".join(names)
        if self.m == 2 and len(self.labels) == 2 and len(set(self.labels)) == 1 and (alpha is None or alpha):
            i = self.labels[0]
            return f" ◑{alpha or ''} ".join([names[i], names[1 - i]])
        observed = ", ".join(f"y{k}={names[i]}" for k, i in enumerate(self.labels, 1))
        weights = "" if alpha is None else "; odds " + ":".join(f"{v:.3g}" for v in self.odds)
        return f"p(x | {observed}; {', '.join(names)}{weights})"


class Product(Formula):
    r""".. math:: \Phi = \sum_i \gamma_i \ell_i

    A negative power negates, a single one tempers. The degree, the sum of the powers, has to be positive.
    """

    def __init__(self, powers: Sequence[float]):
        self.powers = tuple(real("a power", g) for g in each("powers", powers))
        self.m = len(self.powers)
        if not self.degree > 0:
            raise ValueError(
                f"The powers {self.powers} sum to {self.degree:g}; a density needs a positive sum, or it spreads without end. "
                "Raise a positive power or lower a negative one."
            )

    @property
    def degree(self) -> float:
        return sum(self.powers)

    def value(self, ell):
        # A power of zero ignores its model altogether, also where that model has no density.
        used = [i for i, g in enumerate(self.powers) if g != 0]
        powers = torch.tensor([self.powers[i] for i in used], dtype=ell.dtype, device=ell.device)
        terms = powers * ell[..., used]
        # p^a / q^b where both vanish: outside the support of a factor there is nothing to sample.
        return torch.where((ell[..., used] == NEG_INF)[..., powers > 0].any(-1), NEG_INF, terms.sum(-1))

    def gradient(self, ell):
        return torch.tensor(self.powers, dtype=ell.dtype, device=ell.device).expand(ell.shape)

    def hessian(self, ell):
        return ell.new_zeros(*ell.shape, self.m)

    def write(self, names):
        return _powers(self.powers, names)


class PowerMean(Formula):
    r""".. math:: \Phi = \tfrac1r \log \sum_i \omega_i e^{r \ell_i}

    :math:`r = -1` is the harmonic mean, :math:`r \to 0` the geometric, :math:`r = 1` the mixture.
    """

    degree = 1.0

    def __init__(self, exponent: float, weights: Sequence[float]):
        self.exponent = real("the exponent of a power mean", exponent)
        if abs(self.exponent) > LARGEST:
            raise ValueError(f"The exponent of a power mean has to be at most {LARGEST:g} in size, got {exponent}.")
        self.weights = normalised(weights, "weights")
        self.m = len(self.weights)

    def _shifted(self, ell):
        """The dominant term, what is taken off of all, and the terms relative to it: large r overflow nowhere."""
        top = ell.amax(-1) if self.exponent > 0 else ell.amin(-1)
        shift = torch.where(top.isfinite(), top, 0.0)
        return top, shift, self.exponent * (ell - shift[..., None])

    def value(self, ell):
        if self.exponent == 0:
            return Product(self.weights).value(ell)
        top, shift, scaled = self._shifted(ell)
        # By expm1 because the weights sum to one: small r lose no digits in the division.
        excess = torch.expm1(scaled)
        mean = shift + torch.log1p((log_of(self.weights, ell).exp() * excess).sum(-1)) / self.exponent
        return torch.where(top == NEG_INF, NEG_INF, mean)

    def gradient(self, ell):
        if self.exponent == 0:
            return Product(self.weights).gradient(ell)
        return softmax(log_of(self.weights, ell) + self._shifted(ell)[-1])

    def hessian(self, ell):
        return self.exponent * covariance(self.gradient(ell))

    def write(self, names):
        weights = "" if len(set(self.weights)) == 1 else "; " + ":".join(f"{w:.3g}" for w in self.weights)
        return f"M[r={self.exponent:.3g}{weights}]({', '.join(names)})"


class Tilted(Formula):
    r"""A density times powers of likelihoods: :math:`\Phi = \ell_0 + \sum_k \gamma_k \, \log f_k`, the density first."""

    degree = 1.0

    def __init__(self, powers: Sequence[float]):
        self.powers = tuple(real("a power", g) for g in each("powers", powers))
        self.m = 1 + len(self.powers)
        self.factors = tuple(range(1, self.m))

    def value(self, ell):
        powers = torch.tensor(self.powers, dtype=ell.dtype, device=ell.device)
        # Where the model has no density there is nothing to weigh.
        return torch.where(ell[..., 0] == NEG_INF, NEG_INF, ell[..., 0] + (powers * ell[..., 1:]).sum(-1))

    def gradient(self, ell):
        return torch.tensor((1.0, *self.powers), dtype=ell.dtype, device=ell.device).expand(ell.shape)

    def hessian(self, ell):
        return ell.new_zeros(*ell.shape, self.m)

    def write(self, names):
        return _powers((1.0, *self.powers), names)


class Nested(Formula):
    r"""A formula over formulas.

    .. math:: \Phi = \Phi_0(\Phi_1(\ell) - \log Z_1, \dots, \Phi_K(\ell) - \log Z_K)

    Part k sees the log-densities ``ell[..., indices[k]]``. Every part is normalised by its own ``log_z``: nesting means
    composing distributions, and posteriors, mixtures and products of unnormalised parts would be others.
    """

    def __init__(
        self, outer: Formula, parts: Sequence[Formula], indices: Sequence[Sequence[int]], log_z: Sequence[float] | None = None
    ):
        self.outer, self.parts = outer, tuple(parts)
        self.indices = tuple(tuple(index) for index in indices)
        self.log_z = tuple(float(z) for z in log_z) if log_z is not None else (0.0,) * len(self.parts)
        if not outer.m == len(self.parts) == len(self.indices) == len(self.log_z):
            raise ValueError(
                f"The outer formula takes {outer.m} operands, got {len(self.parts)} parts and {len(self.log_z)} log Z."
            )
        for part, index in zip(self.parts, self.indices, strict=True):
            if part.m != len(index):
                raise ValueError(f"{part} takes {part.m} operands, got the indices {index}.")
        self.m = 1 + max(max(index) for index in self.indices)
        inner = [index[k] for part, index in zip(self.parts, self.indices, strict=True) for k in part.factors]
        self.factors = tuple(sorted({*inner, *(self.indices[k][0] for k in outer.factors)}))

    @property
    def degree(self) -> float:
        # Equal for every ell, so read off where it is easiest.
        ell = torch.zeros(self.m, dtype=torch.float64)
        a = self.gradient(ell)
        return float(a.sum() - a[list(self.factors)].sum())

    def _inner(self, ell):
        values = [
            part.value(ell[..., list(index)]) - z for part, index, z in zip(self.parts, self.indices, self.log_z, strict=True)
        ]
        return torch.stack(values, dim=-1)

    def _jacobian(self, ell):
        J = ell.new_zeros(*ell.shape[:-1], len(self.parts), self.m)
        for k, (part, index) in enumerate(zip(self.parts, self.indices, strict=True)):
            J[..., k, list(index)] = part.gradient(ell[..., list(index)])
        return J

    def value(self, ell):
        return self.outer.value(self._inner(ell))

    def gradient(self, ell):
        return einsum(self.outer.gradient(self._inner(ell)), self._jacobian(ell), "... k, ... k m -> ... m")

    def hessian(self, ell):
        inner, J = self._inner(ell), self._jacobian(ell)
        H = einsum(J, self.outer.hessian(inner), J, "... k i, ... k l, ... l j -> ... i j")
        a = self.outer.gradient(inner)
        for k, (part, index) in enumerate(zip(self.parts, self.indices, strict=True)):
            rows = torch.tensor(index, device=ell.device)
            H[..., rows[:, None], rows] += a[..., k, None, None] * part.hessian(ell[..., list(index)])
        return H

    def write(self, names):
        texts = [part.write([names[i] for i in index]) for part, index in zip(self.parts, self.indices, strict=True)]
        return self.outer.write([text if part.m == 1 else f"({text})" for part, text in zip(self.parts, texts, strict=True)])


def _powers(powers: Sequence[float], names: Sequence[str]) -> str:
    return " · ".join(name if g == 1 else f"{name}^{g:.3g}" for g, name in zip(powers, names, strict=True))


def _identity(value):
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    return value.identity if isinstance(value, Formula) else value


def divides(formula: Formula) -> bool:
    """Whether a density is divided by somewhere in a formula."""
    if isinstance(formula, Nested):
        return any(map(divides, (formula.outer, *formula.parts)))
    return isinstance(formula, Product) and min(formula.powers) < 0
