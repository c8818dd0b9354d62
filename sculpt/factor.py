r"""Factors: likelihoods of finished samples that multiply a model, :math:`p(x) \, f(x)^\gamma`. Rewards, constraints, energies, masks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.checks import real
from sculpt.diagnostics import printable

if TYPE_CHECKING:
    from sculpt.composition import Composition
    from sculpt.model import BaseModel

__all__ = ["Factor", "Observed"]

SLACK = 1e-4
"""Nats by which rounding may carry a log-likelihood over its bound."""

_SERIAL = itertools.count(1)


class Factor:
    r"""A likelihood f of finished samples. ``p * Factor(log_f)`` is the model :math:`\propto p(x) \, f(x)^\gamma`, which composes further.

    On the way to a sample f is asked about what the sample will probably be, and steers; at the end it weighs. The weights are exact.

    Args:
        log_f: from b samples to their b values of log f. Diffusion models give it their tensors, molecules SMILES, language models texts,
            other models the states that they end in. Minus infinity forbids a sample.
        power: :math:`\gamma`.
        gradient: how log f rises (diffusion): ``True`` differentiates log_f, a function gives the gradient itself. Without one, f selects and
            does not steer.
        bound: the most that log_f can be, the least where the power is negative. Rejection needs it.
        value: from unfinished samples to what log f will probably be (models that write action by action); ``True`` takes log_f itself.
        name: how formulas call it. Factors of one name are one factor; it also lets large jobs go on in another process.

    Example:
        >>> near = sculpt.Factor(lambda cells: -cells[:, 0].double(), name="left")
        >>> samples = (one * near).sample(100, generator=seed)
        >>> bool(samples.x[:, 0].double().mean() < one.sample(100, generator=seed).x[:, 0].double().mean())
        True
    """

    def __init__(
        self,
        log_f: Callable[[Any], Any],
        power: float = 1.0,
        *,
        gradient: bool | Callable[[Tensor], Tensor] = False,
        bound: float | None = None,
        value: bool | Callable[[Any], Any] = False,
        name: str | None = None,
    ):
        for what, function in (("log_f", log_f), ("gradient", gradient), ("value", value)):
            if not (callable(function) or (what != "log_f" and isinstance(function, bool))):
                raise TypeError(
                    f"{what} is a function of samples{', True or False' * (what != 'log_f')}; got {function!r:.100}."
                )
        if not (name is None or isinstance(name, str)):
            raise TypeError(f"name is a text, got {name!r:.60}.")
        self.log_f, self.power, self.gradient, self.value = log_f, real("power", power), gradient, value
        if self.power == 0:
            raise ValueError("A factor to the power 0 changes nothing. Leave it out.")
        self.bound = None if bound is None else real("bound", bound)
        called = getattr(log_f, "__name__", type(log_f).__name__)
        self.name = name or ("f" if called == "<lambda>" else called)
        self.key = f"factor {name or next(_SERIAL)}"

    @classmethod
    def observed(cls, x: Tensor, mask: Tensor | None = None, noise: float = 0.05, *, name: str = "known") -> Observed:
        """Parts of a sample that are known (diffusion): inpainting with any model.

        Args:
            x: what is known, of a sample's shape.
            mask: one where it is known, zero elsewhere; by default all of it is.
            noise: the standard deviation up to which it is known.
            name: of the factor. Factors of one name are one factor.
        """
        return Observed(x, mask, noise, name=name)

    def __repr__(self) -> str:
        return f"Factor({self.name}{'' if self.power == 1 else f', power={self.power:g}'})"

    def __str__(self) -> str:
        return printable(self.name, 200) or "f"

    def __mul__(self, model: BaseModel) -> Composition:
        return model * self

    def __call__(
        self, samples: Any, n: int, what: str = "log_f", function: Callable[[Any], Any] | None = None
    ) -> Float[Tensor, "b"]:
        """log f, checked: one number for each of n samples, where minus infinity is one.

        Args:
            samples: as log_f takes them.
            n: how many these are.
            what: is asked, for messages.
            function: in place of log_f.
        """
        found = torch.as_tensor((function or self.log_f)(samples))
        if tuple(found.shape) != (n,):
            raise ValueError(
                f"{what} of {self} gave the shape {tuple(found.shape)} for {n} samples; expected ({n},), one number for each."
            )
        if bad := int((~(found < math.inf)).sum()):
            raise FloatingPointError(
                f"{what} of {self} gave {bad} of {n} samples a log-likelihood that is NaN or plus infinity. Minus infinity forbids a sample; "
                "anything else has to be a finite number."
            )
        return found.double()

    def guess(self, samples: Any, n: int) -> Float[Tensor, "b"]:
        """What log f of unfinished samples will probably be."""
        return self(samples, n, "value", self.value if callable(self.value) else None)

    def pull(self, x: Float[Tensor, "b *x"]) -> tuple[Float[Tensor, "b"], Float[Tensor, "b *x"] | None]:
        """log f and its gradient, ``None`` where there is none."""
        if callable(self.gradient):
            pull = self.gradient(x)
        elif self.gradient:
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                log_f = self(x, len(x))
                if not log_f.requires_grad:
                    raise ValueError(
                        f"gradient=True differentiates log_f of {self}, and what it gives does not depend on the samples as far as autograd "
                        "can tell. Compute it with torch from the tensor that it is given, or leave gradient out."
                    )
                (pull,) = torch.autograd.grad(log_f.sum(), x)
            return log_f.detach(), self._checked(pull, x)
        else:
            return self(x, len(x)), None
        return self(x, len(x)), self._checked(pull, x)

    def _checked(self, pull: Any, x: Tensor) -> Tensor:
        if not isinstance(pull, Tensor) or pull.shape != x.shape:
            got = tuple(pull.shape) if isinstance(pull, Tensor) else type(pull).__name__
            raise ValueError(f"The gradient of {self} has the samples' shape {tuple(x.shape)}; got {got}.")
        return pull.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def check_bound(self, log_f: Float[Tensor, "b"]) -> None:
        """Raise where the bound is none."""
        assert self.bound is not None
        over = (log_f - self.bound) * (1 if self.power > 0 else -1)
        if float(over.max()) > SLACK:
            raise ValueError(
                f"bound={self.bound:g} of {self} is none: a sample has log f = {float(log_f[over.argmax()]):.6g}. Pass a bound that holds."
            )


class Observed(Factor):
    r"""Parts of a sample that are known up to Gaussian noise: :math:`\log f = -\tfrac12 \, |m (x - y)|^2 / \sigma^2`.

    Args:
        y: what is known.
        mask: m, one where it is known and zero elsewhere; by default one.
        noise: :math:`\sigma`
        name: of the factor.
    """

    def __init__(self, y: Tensor, mask: Tensor | None = None, noise: float = 0.05, *, name: str = "known"):
        if not (sigma := real("noise", noise)) > 0:
            raise ValueError(f"noise is a standard deviation over 0, got {noise}.")
        if mask is not None and mask.shape != y.shape:
            raise ValueError(f"The mask has the shape of what is known, {tuple(y.shape)}; got {tuple(mask.shape)}.")
        self.mask = torch.ones_like(y) if mask is None else (mask != 0).to(y)
        self.y, self.noise = torch.where(self.mask == 0, 0.0, y), sigma
        if not self.y.isfinite().all():
            raise ValueError("What is known has numbers that are not finite. Mask them.")
        super().__init__(self._log_f, gradient=self._gradient, bound=0.0, name=name)

    def miss(self, x: Float[Tensor, "b *x"]) -> Float[Tensor, "b *x"]:
        """What samples miss of what is known, zero elsewhere."""
        if x.shape[1:] != self.y.shape:
            raise ValueError(f"What is known has the shape {tuple(self.y.shape)}, and samples are {tuple(x.shape[1:])}.")
        return self.mask.to(x) * (self.y.to(x) - x)

    def _log_f(self, x: Tensor) -> Tensor:
        return -self.miss(x).double().square().flatten(1).sum(1) / (2 * self.noise**2)

    def _gradient(self, x: Tensor) -> Tensor:
        return self.miss(x) / self.noise**2
