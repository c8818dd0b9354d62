"""Energies as base models: a number for every sample and noise level, whose gradient is the score."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.diffusion.clock import Level, level, like
from sculpt.diffusion.denoiser import Denoiser
from sculpt.diffusion.networks import device_of, dtype_of, known_as
from sculpt.identity import digest

__all__ = ["EnergyModel"]


class EnergyModel(Denoiser):
    r"""An energy :math:`E(z, s) = -\log q(z; s) + \text{const}` for every noise level, one number per sample.

    .. math:: D(z, s) = z - v \, \nabla_z E(z, s)

    Args:
        energy: a module or callable; s reaches it in z's dtype, 0-dim or ``(b,)``.
        shape: of one sample.
        s_min: the least noise level that it covers, and
        s_max: the widest.
        name: how formulas and messages call it.
        device: of an energy that has no weights to tell.

    Example:
        >>> bowl = sculpt.EnergyModel(lambda z, s: (z**2).sum(1) / (1 + s**2) / 2, shape=(2,), name="bowl")  # N(0, 1)
        >>> bowl.sample(3, generator=seed).x.shape
        torch.Size([3, 2])
    """

    has_energy = True

    def __init__(
        self,
        energy: nn.Module | Callable,
        shape: Sequence[int],
        *,
        s_min: float = 0.002,
        s_max: float = 80.0,
        name: str | None = None,
        device: torch.device | str | None = None,
    ):
        self.model, self.shape, self.s_min, self.s_max = energy, tuple(shape), float(s_min), float(s_max)
        if not 0 < self.s_min < self.s_max:
            raise ValueError(f"An energy model needs noise levels 0 < s_min < s_max, got {s_min} and {s_max}.")
        self.name = name or getattr(energy, "__name__", type(energy).__name__)
        self._given_name, self._anonymous = name, uuid.uuid4().hex
        self._device = torch.device(device or "cpu")
        if isinstance(energy, nn.Module):
            energy.eval()

    @property
    def device(self) -> torch.device:
        """The network's."""
        return device_of(self.model) or self._device

    @property
    def key(self) -> str:
        """A hash of the weights and the range, or of the name of a callable without weights."""
        return digest(known_as(self.model, self._given_name, self._anonymous), self.shape, self.s_min, self.s_max)

    def energy(self, z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, " b"]:
        """E(z, s)"""
        x = z if device_of(self.model) is None else z.to(dtype_of(self.model))  # a formula keeps what it is asked in
        E = self.model(x, level(s, z.device).to(x.dtype)).to(z.dtype)
        if E.shape != z.shape[:1]:
            raise ValueError(f"The energy {self} answered with shape {tuple(E.shape)}, expected one per sample, ({len(z)},).")
        return E

    def denoise(self, z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b *x"]:
        v = like(level(s, z.device) ** 2, z)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():  # samplers and pipelines run under no_grad
            z = z if z.requires_grad else z.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.energy(z, s).sum(), z, create_graph=differentiable)
        return z - v * gradient if differentiable else (z - v * gradient).detach()
