"""A diffusers scheduler's own loop, in its own coordinates, as a chain."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sculpt.chain import Chain, Settings
from sculpt.diffusion.chains import given_noise
from sculpt.diffusion.diffusers.unet import DenoiserUNet
from sculpt.diffusion.kernels import check_finite
from sculpt.diffusion.together import at_once
from sculpt.generators import Generators, randn
from sculpt.state import State, in_parts

if TYPE_CHECKING:
    from sculpt.diffusion.denoiser import Denoiser

__all__ = ["SolverChain"]


@dataclass
class Scheduled(State):
    """Samples in the scheduler's coordinates."""

    k: Int[Tensor, "N"]
    x: Float[Tensor, "N *x"]


class SolverChain(Chain):
    """A denoiser, stepped by a scheduler of diffusers. What a multistep scheduler remembers stays with it: nothing is selected here."""

    whole = True

    def __init__(self, model: Denoiser, settings: Settings):
        self.model, self.road, self.device = model, model.road, model.device
        self.scheduler = _copied(settings.solver, model)
        steps = model.default_steps if settings.steps is None else settings.steps
        if steps < 1:
            raise ValueError(f"Sampling with a solver needs at least 1 step, got {steps}.")
        self.scheduler.set_timesteps(steps, device=model.device)
        self.times, self.unet = self.scheduler.timesteps, DenoiserUNet(model, self.scheduler)
        self.length, self.latents = len(self.times), settings.latents
        self.first = 0 if model.start is None else self._below(model.s_max)
        self.batch_size = settings.batch_size or at_once(model.shape)
        self.random = "generator" in inspect.signature(self.scheduler.step).parameters

    def start(self, n, generator):
        like = torch.empty((), device=self.device)
        noise = randn((n, *self.model.shape), generator, like)
        if self.latents is not None:
            noise = given_noise(self.latents, n, self.model.shape, like)
        k = torch.full((n,), self.first, dtype=torch.long, device=self.device)
        if self.model.start is None:
            return Scheduled(k, noise * getattr(self.scheduler, "init_noise_sigma", 1.0)), None
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.first)
        clean, t = self.model.start.to(noise).expand_as(noise), self.times[self.first : self.first + 1].expand(n)
        flows = hasattr(self.scheduler, "scale_noise")
        return Scheduled(
            k, self.scheduler.scale_noise(clean, t, noise) if flows else self.scheduler.add_noise(clean, noise, t)
        ), None

    def _below(self, s_max: float) -> int:
        """The first time at which there is no more noise than this."""
        s = self.unet.schedule.sigma(torch.as_tensor(self.times))
        below = (s <= s_max * (1 + 1e-4)).nonzero().flatten().tolist()
        if not below:
            raise ValueError(
                f"None of {self.length} steps is below s={s_max:.3g}, where {self.model} starts. Take more steps, or more strength."
            )
        return below[0]

    def step(self, state, log_w, generator):
        x, t, k = state.x, self.times[int(state.k[0])], int(state.k[0])
        scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
        output = in_parts(lambda part: self.unet(part, t).sample, self.batch_size, scaled)
        check_finite(output, f"{self.model} gave", k, t, "t")
        options = {"generator": generator.each if isinstance(generator, Generators) else generator} if self.random else {}
        return Scheduled(state.k + 1, self.scheduler.step(output, t, x, **options).prev_sample), None

    def done(self, state):
        return state.k == self.length - 1

    def end(self, state, log_w, generator):
        return self.step(state, log_w, generator)[0].x, None


def _copied(solver, model: Denoiser):
    """The scheduler for one run: multistep ones carry state. Clipping to [-1, 1] is for pixels and would falsify anything else."""
    if not hasattr(solver, "set_timesteps"):
        raise TypeError(f"solver is a diffusers scheduler, e.g. DPMSolverMultistepScheduler(); got {solver!r}.")
    if hasattr(solver, "step_pred"):
        raise ValueError(f"{type(solver).__name__} has no plain step(); it can be the training scheduler but not the solver.")
    pixels = model.autoencoder is None and len(model.shape) == 3
    off = {} if pixels else {name: False for name in ("clip_sample", "thresholding") if name in solver.config}
    return type(solver).from_config(solver.config, **off)
