"""A diffusers scheduler's own loop, in its own coordinates, as a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sculpt.chain import Chain, Settings
from sculpt.diffusion.chains import given_noise
from sculpt.diffusion.diffusers.prediction import Prediction
from sculpt.diffusion.diffusers.stepping import Solver, check_solver
from sculpt.diffusion.kernels import check_finite
from sculpt.diffusion.networks import patch_of
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
        steps = model.default_steps if settings.steps is None else settings.steps
        if steps < 1:
            raise ValueError(f"Sampling with a solver needs at least 1 step, got {steps}.")
        check_solver(settings.solver, steps)
        patch, pixels = patch_of(model.first.model), model.autoencoder is None and len(model.shape) == 3
        self.solver = Solver(settings.solver, steps, model.shape, patch=patch, pixels=pixels, device=model.device)
        self.predict, self.length, self.latents = Prediction(model, self.solver.scheduler), len(self.solver), settings.latents
        self.first = 0 if model.start is None else self._below(model.s_max)
        self.batch_size = settings.batch_size or at_once(model.shape)

    def start(self, n, generator):
        like = torch.empty((), device=self.device)
        noise = randn((n, *self.model.shape), generator, like)
        if self.latents is not None:
            noise = given_noise(self.latents, n, self.model.shape, like)
        clean = None if self.model.start is None else self.model.start.to(noise).expand_as(noise)
        x = self.solver.start(noise) if clean is None else self.solver.around(clean, noise, self.first)
        return Scheduled(torch.full((n,), self.first, dtype=torch.long, device=self.device), x), None

    def _below(self, s_max: float) -> int:
        """The first time at which there is no more noise than this."""
        s = self.predict.level(torch.as_tensor(self.solver.times))
        below = (s <= s_max * (1 + 1e-4)).nonzero().flatten().tolist()
        if not below:
            raise ValueError(
                f"None of {self.length} steps is below s={s_max:.3g}, where {self.model} starts. Take more steps, or more strength."
            )
        return below[0]

    def step(self, state, log_w, generator):
        k = int(state.k[0])
        t, scaled = self.solver.times[k], self.solver.scaled(state.x, k)
        output = in_parts(lambda part: self.predict(part, t), self.batch_size, scaled)
        check_finite(output, f"{self.model} gave", k, t, "t")
        generator = generator.each if isinstance(generator, Generators) else generator
        return Scheduled(state.k + 1, self.solver.step(output, k, state.x, generator)), None

    def done(self, state):
        return state.k == self.length - 1

    def end(self, state, log_w, generator):
        return self.step(state, log_w, generator)[0].x, None
