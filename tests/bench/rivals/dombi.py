r"""Dombi's logic (Blohm and Garg, ICLR 2026): AND, OR and NOT of log-densities, nested at will, each particle by itself.

.. math::
    \mathrm{OR}: \; \tfrac1\lambda \log \sum_k e^{\lambda \ell_k}, \qquad
    \mathrm{AND}: \; -\tfrac1\lambda \log \sum_k e^{-\lambda \ell_k}, \qquad
    \mathrm{NOT}: \; (1 + \gamma) \, \ell_0 - \gamma \, \ell

with :math:`\ell_0` of a reference model. The score is that of the expression, :math:`\sum_i a_i S_i` with a its gradient, and nothing
makes up for the difference between the noised expression and the expression of noised densities. AND and OR are ``power_mean`` with the
exponents -λ and λ but for a constant, NOT is ``product([reference, p], [1 + γ, -γ])``: what is called for here, ``Tracked(particles=1)``
does with a better kernel.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bench.rivals.walk import Walk
from einops import einsum
from torch import Tensor

from sculpt.diffusion.denoiser import Denoiser

__all__ = ["And", "Atom", "Expression", "Not", "Or", "dombi"]


class Expression(abc.ABC):
    """A logical expression of models."""

    @abc.abstractmethod
    def at(self, ell: Tensor) -> tuple[Tensor, Tensor]:
        """Its value ``(N,)`` and gradient ``(N, m)`` at the models' log-densities ``(N, m)``."""


@dataclass(frozen=True)
class Atom(Expression):
    """The model of this index."""

    i: int

    def at(self, ell: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Expression`."""
        a = torch.zeros_like(ell)
        a[:, self.i] = 1
        return ell[:, self.i], a


@dataclass(frozen=True)
class Not(Expression):
    """Away from an expression, against a reference."""

    of: Expression
    reference: Expression
    gamma: float = 1.0

    def at(self, ell: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Expression`."""
        (value, a), (value_0, a_0) = self.of.at(ell), self.reference.at(ell)
        return (1 + self.gamma) * value_0 - self.gamma * value, (1 + self.gamma) * a_0 - self.gamma * a


@dataclass(frozen=True)
class Or(Expression):
    """Any of several; with a negative strength all of them, see :func:`And`."""

    parts: tuple[Expression, ...]
    strength: float = 1.0

    def at(self, ell: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Expression`."""
        values, gradients = zip(*(part.at(ell) for part in self.parts), strict=True)
        scaled = self.strength * torch.stack(values, dim=-1)
        a = einsum(torch.softmax(scaled, dim=-1), torch.stack(gradients, dim=1), "N k, N k m -> N m")
        return scaled.logsumexp(-1) / self.strength, a


def And(parts: tuple[Expression, ...], strength: float = 1.0) -> Or:
    """All of several: De Morgan's other side, the same mean with the opposite exponent."""
    return Or(parts, -strength)


def dombi(
    models: Sequence[Denoiser],
    n: int,
    *,
    steps: int,
    generator: torch.Generator | None,
    expression: Expression,
    log_prob: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Samples by the score of an expression.

    Args:
        models: those that the expression names by their indices.
        n: how many samples.
        steps: evaluations of each model for each sample.
        generator: of all noise.
        expression: of the models.
        log_prob: the models' log-densities ``(N, m)`` of z at the variance v where they are known, as in the paper's own toys; by default
            they are tracked by the Itô estimator, as in its images.
    """
    walk = Walk(models, n, steps, generator)
    for _ in walk:
        walk.step(expression.at(walk.ell if log_prob is None else log_prob(walk.z, walk.v))[1])
    return walk.z
