"""A denoiser as what a scheduler wants of a network: in its coordinates, its time and its prediction type."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.schedules import schedule_of

__all__ = ["Prediction"]

S_MAX = 1e5
"""Stands for the infinite noise level of pure noise: the sample's share is then under float32's resolution of the input."""


class Prediction:
    """``(x, t) -> F`` for a scheduler's own loop.

    Args:
        denoiser: anything with ``denoise``, ``s_min`` and ``s_max``.
        scheduler: of diffusers.
    """

    def __init__(self, denoiser: Any, scheduler: Any):
        if scheduler.config.get("variance_type") in ("learned", "learned_range"):
            raise ValueError(
                f"{type(scheduler).__name__} with variance_type={scheduler.config.variance_type!r} steps with a variance "
                "that a denoiser does not give. Use from_config(scheduler.config, variance_type='fixed_small')."
            )
        self.denoiser, self.schedule = denoiser, schedule_of(scheduler)

    def __call__(self, sample: Float[Tensor, "b *x"], t: Tensor) -> Float[Tensor, "b *x"]:
        x, s = sample.to(torch.promote_types(sample.dtype, torch.float32)), self.level(t)
        z = x / like(self.schedule.scale(s), x)
        # Outside the denoiser's range its nearest level stands in; above it the excess noise is scaled away.
        known = s.clamp(self.denoiser.s_min, self.denoiser.s_max)
        D = self.denoiser.denoise(like((known / s).clamp(max=1), z) * z, known)
        return self.schedule.output(z, s, D).to(sample.dtype)

    def level(self, t: Tensor) -> Float[Tensor, "*b"]:
        """The noise level at a time."""
        return self.schedule.sigma(t).clamp(max=S_MAX)
