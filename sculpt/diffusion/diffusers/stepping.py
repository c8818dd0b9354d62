r"""A scheduler of diffusers as a solver: what its loop needs in one run, and a trial on a Gaussian before the first.

Notation: :math:`x_t` a sample in the scheduler's coordinates, k the step.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.prediction import Prediction
from sculpt.diffusion.diffusers.schedules import schedule_of
from sculpt.diffusion.networks import is_a
from sculpt.identity import digest

__all__ = ["Solver", "check_solver"]

PIXELS_ONLY = ("clip_sample", "thresholding")
"""Settings that cut samples to [-1, 1]. They would falsify anything but pixels."""


class Solver:
    """A scheduler for one run: its times, and its step with whatever that asks for.

    Args:
        scheduler: of diffusers. It is copied, because multistep ones carry state.
        steps: how many.
        shape: of one sample. Schedulers with dynamic shifting choose their times by how many positions it has.
        patch: positions along a side that are one token of the network.
        pixels: whether samples are pixels, which may be clipped.
        device: where samples live.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        shape: Sequence[int],
        *,
        patch: int = 1,
        pixels: bool = False,
        device: torch.device | str = "cpu",
    ):
        # Not from_config: what a pipeline has changed in its scheduler's configuration would fall back to the default there.
        self.scheduler = copy.deepcopy(scheduler)
        if not pixels:
            self.scheduler.register_to_config(**{name: False for name in PIXELS_ONLY if name in scheduler.config})
        options = _shifted(self.scheduler, steps, shape, patch) if scheduler.config.get("use_dynamic_shifting") else {}
        self.scheduler.set_timesteps(steps, device=device, **options)
        self.times = self.scheduler.timesteps
        self.takes = inspect.signature(self.scheduler.step).parameters
        self.before: Tensor | None = None
        """the denoised samples of the step before, for schedulers that want them back"""

    def __len__(self) -> int:
        return len(self.times)

    def start(self, noise: Float[Tensor, "N *x"]) -> Float[Tensor, "N *x"]:
        """The samples to begin with."""
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def around(self, clean: Float[Tensor, "N *x"], noise: Float[Tensor, "N *x"], k: int) -> Float[Tensor, "N *x"]:
        """Samples to go on from at step k, with as much noise as there is at its time."""
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(k)
        t = self.times[k : k + 1].expand(len(clean))
        if hasattr(self.scheduler, "scale_noise"):  # of flows
            return self.scheduler.scale_noise(clean, t, noise)
        return self.scheduler.add_noise(clean, noise, t)

    def scaled(self, x: Float[Tensor, "N *x"], k: int) -> Float[Tensor, "N *x"]:
        """What the network sees of them."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return x if scale is None else scale(x, self.times[k])

    def step(self, output: Tensor, k: int, x: Float[Tensor, "N *x"], generator: Any) -> Tensor:
        """The samples at the next time, from the network's output."""
        offered = {
            "generator": generator,
            "prev_timestep": self.times[k + 1] if k + 1 < len(self) else None,
            "timestep_back": self.times[k - 1] if k else None,
            "old_pred_original_sample": self.before,
            "return_dict": False,
        }
        options = {name: value for name, value in offered.items() if name in self.takes}
        x, *more = self.scheduler.step(model_output=output, timestep=self.times[k], sample=x, **options)
        self.before = more[0] if more else None
        return x


def _shifted(scheduler: Any, steps: int, shape: Sequence[int], patch: int) -> dict[str, Any]:
    """The mu of dynamic shifting, linear in the tokens of a sample, and the levels that pipelines shift by it."""
    config = scheduler.config
    tokens = shape[0] if len(shape) == 2 else math.prod(shape[1:]) / patch**2
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    options: dict[str, Any] = {"mu": least + (tokens - low) * (most - least) / (high - low)}
    if is_a(scheduler, "FlowMatchEulerDiscreteScheduler"):
        options["sigmas"] = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy()
    return options


# ------------------------------------------------------------------------------------------------------------- the trial

STEPS, SAMPLES, MEAN, SPREAD = 100, 2000, 0.3, 0.5
"""Steps and samples of the trial, and its Gaussian."""
OFF = 0.1
"""Of the Gaussian's standard deviation: what mean and spread may be off by in so many steps. First-order solvers miss 0.06 of the spread."""
DISTILLED = ["LCM", "TCD", "SCM", "FlowMatchLCM", "CMStochasticIterative", "ConsistencyDecoder"]

_TRIED: dict[tuple[Any, ...], str] = {}
"""What is wrong with a solver; an empty text where nothing is."""


class _Gaussian:
    """The exact denoiser of a Gaussian in four dimensions."""

    shape, s_min, s_max = (4,), 0.002, math.inf

    def denoise(self, z: Float[Tensor, "b 4"], s: Float[Tensor, ""]) -> Float[Tensor, "b 4"]:
        v = s**2
        return like(SPREAD**2 / (SPREAD**2 + v), z) * z + like(v * MEAN / (SPREAD**2 + v), z)


def check_solver(scheduler: Any, steps: int) -> None:
    """Raise where this is no solver, or one that does not sample a Gaussian from its exact denoiser."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "set_timesteps"):
        raise TypeError(f"solver is a diffusers scheduler, e.g. DPMSolverMultistepScheduler(); got {scheduler!r:.200}.")
    if hasattr(scheduler, "step_pred"):
        raise ValueError(
            f"{name} has no plain step(); it can be the training scheduler but not the solver. Take another, or leave solver out."
        )
    known = type(scheduler), digest(dict(scheduler.config)), steps
    if known not in _TRIED:
        _TRIED[known] = _wrong(scheduler, steps)
    if _TRIED[known]:
        raise ValueError(f"{name} {_TRIED[known]} Take e.g. DPMSolverMultistepScheduler(), or leave solver out.")


@torch.no_grad()
def _wrong(scheduler: Any, steps: int) -> str:
    if type(scheduler).__name__.removesuffix("Scheduler") in DISTILLED:
        return "steps networks that were distilled to answer with finished samples. Samples of any other come out too narrow."
    try:
        schedule_of(scheduler)
    except ValueError as error:
        return f"cannot be a solver: {str(error).split('. ')[0]}."
    predict = Prediction(_Gaussian(), scheduler)
    for count in dict.fromkeys((steps, STEPS)):
        try:
            x = _sampled(scheduler, count, predict)
        except Exception as error:
            return f"fails in diffusers itself, with {count} steps: {type(error).__name__}: {error!s:.200}."
        if not x.isfinite().all():
            return f"gives numbers that are not finite, in diffusers itself: those of a Gaussian, in {count} steps."
        mean, spread = (float(x.mean()) - MEAN) / SPREAD, float(x.std()) / SPREAD
        if max(abs(mean), abs(spread - 1)) > OFF * max(1, STEPS / count) ** 0.7:
            return (
                f"does not sample what a network says, in diffusers itself: with the exact denoiser of a Gaussian and {count} steps, the mean is "
                f"off by {mean:+.2f} of its standard deviations and the spread is {spread:.2f} of what it should be."
            )
    return ""


def _sampled(scheduler: Any, steps: int, predict: Prediction) -> Float[Tensor, "n 4"]:
    generator = torch.Generator().manual_seed(0)
    solver = Solver(scheduler, steps, _Gaussian.shape)
    x = solver.start(torch.randn(SAMPLES, 4, generator=generator))
    for k in range(len(solver)):
        x = solver.step(predict(solver.scaled(x, k), solver.times[k]), k, x, generator)
    return x
