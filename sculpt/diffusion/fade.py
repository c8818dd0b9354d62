r"""Contrasts on the way: what a formula pushes away from is faded in as the noise falls.

Tracked densities walk through the targets :math:`\exp \Phi(\ell(z, s))`, and for a contrast these are far from the noised target:
with :math:`r = q / (p + q)`, the weights of p − q grow by :math:`r^2 \|S_p - S_q\|^2 \, \delta` a step. So the few particles that stray
to where q is likelier become families of hundreds, however exact the densities are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sculpt.formula import Formula, Nested, Product

__all__ = ["Faded", "fade"]


class Faded(Formula):
    r"""A formula on its way in, from a product of positive powers w of the same degree.

    .. math:: \Phi_\beta = (1 - \beta) \sum_i w_i \ell_i + \beta \, \Phi

    For a contrast, :math:`p \, (1 - r)^\beta`: its weights grow by :math:`\tfrac12 \beta (1 + \beta) \, r^2 \|S_p - S_q\|^2 \, \delta`,
    and a rise of :math:`\beta` multiplies them by a power of :math:`1 - r`, which takes this back.
    """

    def __init__(self, formula: Formula, powers: Sequence[float], beta: float):
        self.formula, self.start, self.beta, self.m = formula, Product(powers), float(beta), formula.m

    @property
    def degree(self) -> float:
        return self.formula.degree

    def value(self, ell):
        return torch.lerp(self.start.value(ell), self.formula.value(ell), self.beta)

    def gradient(self, ell):
        return torch.lerp(self.start.gradient(ell), self.formula.gradient(ell), self.beta)

    def hessian(self, ell):
        return self.beta * self.formula.hessian(ell)

    def write(self, names):
        return f"({self.start.write(names)})^{1 - self.beta:.3g} · ({self.formula.write(names)})^{self.beta:.3g}"


class Believed(Formula):
    r"""A formula whose operands' log-densities are believed to differ by a share :math:`\lambda` of what they say:

    .. math:: \Phi(\bar\ell + \lambda (\ell - \bar\ell)), \qquad \bar\ell = \sum_i b_i \ell_i

    Steering by noisy log-ratios, half-heartedly. What is homogeneous along b, such as a product with these powers, stays as it is.
    """

    def __init__(self, formula: Formula, b: Float[Tensor, "m"], share: float):
        self.formula, self.b, self.share, self.m = formula, b, float(share), formula.m
        self.factors = formula.factors
        believed = self.share * torch.eye(self.m, dtype=b.dtype, device=b.device) + (1 - self.share) * b
        # Likelihoods are evaluated, not tracked: these are believed as they are.
        believed[list(self.factors)] = torch.eye(self.m, dtype=b.dtype, device=b.device)[list(self.factors)]
        self.J = believed

    @property
    def degree(self) -> float:
        return self.formula.degree

    def value(self, ell):
        return self.formula.value(ell @ self.J.T)

    def gradient(self, ell):
        return self.formula.gradient(ell @ self.J.T) @ self.J

    def hessian(self, ell):
        return self.J.T @ self.formula.hessian(ell @ self.J.T) @ self.J

    def write(self, names):
        return f"{self.formula.write(names)} at {self.share:.3g} of the log-ratios"


def fade(formula: Formula, beta: float) -> Formula:
    """The formula with everything that it pushes away from faded to the share beta; itself where there is nothing of the kind.

    Pushed away are the models whose entry of the gradient is negative where all densities are equal. The powers to start from are
    the positive entries. Nested formulas fade level by level.
    """
    if isinstance(formula, Nested):
        parts = [fade(part, beta) for part in formula.parts]
        return Nested(fade(formula.outer, beta), parts, formula.indices, formula.log_z)
    a = formula.gradient(torch.zeros(formula.m, dtype=torch.float64))
    if beta == 1 or formula.factors or (a >= 0).all():
        return formula
    towards = a.clamp(min=0)
    return Faded(formula, (formula.degree * towards / towards.sum()).tolist(), beta)
