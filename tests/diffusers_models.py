"""Closed-form Gaussian mixtures behind diffusers schedulers: base models with exact answers."""

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from oracles import GaussianMixture, ring
from torch import nn

import sculpt
from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.schedules import schedule_of


class Exact(nn.Module):
    """What a perfectly trained network of this scheduler would answer for a Gaussian mixture."""

    def __init__(self, mixture: GaussianMixture, scheduler):
        super().__init__()
        self.mixture, self.schedule = mixture, schedule_of(scheduler)

    def forward(self, x, t):
        s = self.schedule.sigma(t)
        s = s[0] if s.ndim and bool((s == s[0]).all()) else s  # one level for all costs less
        z = x.double() / like(self.schedule.scale(s), x.double())
        return self.schedule.output(z, s, self.mixture.denoise(z, s)).to(x.dtype)


def scheduler_of(kind: str):
    if kind == "linear":
        return DDPMScheduler(clip_sample=False)
    if kind == "cosine":
        return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    return FlowMatchEulerDiscreteScheduler()


def exact_model(mixture: GaussianMixture, kind: str = "linear", name: str | None = None) -> sculpt.Diffusion:
    scheduler = scheduler_of(kind)
    return sculpt.Diffusion(Exact(mixture, scheduler), scheduler, (mixture.d,), name=name)


def three_rings() -> list[GaussianMixture]:
    """Three overlapping 2-D mixtures on rings, of 4, 5 and 3 modes."""
    return [
        ring(4, 1.5, 0.15, centre=(-0.4, 0.0)),
        ring(5, 1.4, 0.15, centre=(0.5, 0.2), phase=0.3),
        ring(3, 1.2, 0.2, centre=(0.0, -0.5), phase=0.9),
    ]


def tight_rings() -> list[GaussianMixture]:
    """The same kind of mixtures with modes of half the width or less."""
    return [
        ring(4, 1.5, 0.05, centre=(-0.5, 0.0)),
        ring(5, 1.4, 0.06, centre=(0.6, 0.2), phase=0.3),
        ring(3, 1.2, 0.08, centre=(0.0, -0.6), phase=0.9),
    ]


def sixteen_dimensions(seed: int = 0) -> list[GaussianMixture]:
    """Two 16-D mixtures of three modes each, with different covariances: of seed 0, one sample of the first in seven is as likely under both."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.3 * torch.randn(6, 16, dtype=torch.float64, generator=generator)
    A = torch.randn(6, 16, 16, dtype=torch.float64, generator=generator) / 4
    covariances = 0.15 * (A @ A.mT) + 0.2 * torch.eye(16, dtype=torch.float64)
    return [GaussianMixture(means[:3], covariances[:3]), GaussianMixture(means[3:], covariances[3:])]
