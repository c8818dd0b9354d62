r"""What a classifier adds to denoised samples: its field, or :math:`v \, \nabla \log h` where it has none."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.classifier.guide import Guide
from sculpt.diffusion.clock import like
from sculpt.formula import Posterior

__all__ = ["Guidance"]


class Guidance:
    """A classifier's guidance to one posterior.

    Args:
        classifier: with or without a field.
        posterior: in the classifier's order.
        form: anchored or mixture; a field is what is added to the anchor, so the mixture form takes the gradient.
        strength: what the guidance is multiplied with.
    """

    def __init__(self, classifier: Guide, posterior: Posterior, form: str = "anchored", strength: float = 1.0):
        self.classifier, self.posterior, self.form, self.strength = classifier, posterior, form, float(strength)

    @property
    def field(self) -> bool:
        """Whether it is a field, which needs no way back through the classifier."""
        return self.form == "anchored" and self.classifier.field is not None

    def __call__(self, z: Float[Tensor, "N *x"], s: Tensor) -> tuple[Float[Tensor, "N"], Float[Tensor, "N *x"]]:
        r""":math:`\log h(z)` of the anchored form, or :math:`\log p(y_1 \dots y_n \mid z)`, and what is added."""
        if self.field:
            return self.log_h(z, s), self.added(z, s)
        log_h, gradient = self.with_gradient(z, s)
        return log_h, like(self.strength * s**2, z) * gradient.to(z.dtype)

    def added(self, z: Float[Tensor, "N *x"], s: Tensor) -> Float[Tensor, "N *x"]:
        """What is added, alone: with a field the classifier's heads are not asked."""
        if not self.field:
            return self(z, s)[1]
        assert self.classifier.field is not None
        moved = self.classifier.field(z, s, labels=self.posterior.labels, odds=self.posterior.odds)
        return self.strength * moved.to(z.dtype)

    def log_h(self, z: Float[Tensor, "N *x"], s: Tensor) -> Float[Tensor, "N"]:
        """The logarithm alone, one pass forward."""
        labels, odds, s = self.posterior.labels, self.posterior.odds, s.expand(len(z))
        log_h = self.classifier.log_h(z, s, labels=labels, odds=odds)
        # The joint as marginal times conditional: any split of it is the same where the classifier is exact.
        return log_h if self.form == "anchored" else log_h + self.classifier.marginal(z, s)[:, labels[0]]

    def with_gradient(self, z: Float[Tensor, "N *x"], s: Tensor) -> tuple[Float[Tensor, "N"], Float[Tensor, "N *x"]]:
        """The logarithm and its gradient."""
        differentiable = torch.is_grad_enabled() and z.requires_grad
        with torch.enable_grad():
            z = z if differentiable else z.detach().requires_grad_(True)
            value = self.log_h(z, s)
            (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=differentiable)
        return value if differentiable else value.detach(), gradient
