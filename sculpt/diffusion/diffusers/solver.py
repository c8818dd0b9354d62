"""A diffusers scheduler's own loop, in its own coordinates, as a chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sculpt.chain import Chain, Settings
from sculpt.diffusion.diffusers.prediction import Prediction
from sculpt.diffusion.diffusers.stepping import Solver, check_solver
from sculpt.diffusion.kernels import check_finite
from sculpt.diffusion.networks import patch_of
from sculpt.diffusion.together import at_once
from sculpt.model import randn
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
        self.predict, self.length = Prediction(model, self.solver.scheduler), len(self.solver)
        self.batch_size = settings.batch_size or at_once(model.shape)

    def start(self, n, generator):
        noise = randn((n, *self.model.shape), generator, torch.empty((), device=self.device))
        return Scheduled(torch.zeros(n, dtype=torch.long, device=self.device), self.solver.start(noise)), None

    def step(self, state, log_w, generator):
        k = int(state.k[0])
        t, scaled = self.solver.times[k], self.solver.scaled(state.x, k)
        output = in_parts(lambda part: self.predict(part, t), self.batch_size, scaled)
        check_finite(output, f"{self.model} gave", k, t, "t")
        return Scheduled(state.k + 1, self.solver.step(output, k, state.x, generator)), None

    def done(self, state):
        return state.k == self.length - 1

    def end(self, state, log_w, generator):
        return self.step(state, log_w, generator)[0].x, None
