"""A denoiser as a diffusers UNet: in the coordinates, the time and the prediction type of any scheduler."""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.schedules import schedule_of

__all__ = ["DenoiserUNet"]

S_MAX = 1e5
"""Stands for the infinite noise level of pure noise: the sample's share is then under float32's resolution of the input."""


class DenoiserUNet(ModelMixin, ConfigMixin):
    """``(sample, timestep) -> output`` for a scheduler's own loop, or for ``DDPMPipeline(unet=..., scheduler=...)``.

    ``denoiser`` is anything with ``denoise``, ``shape``, ``s_min``, ``s_max``, ``device`` and ``dtype``. Nothing is saved with
    it: save the base models instead.
    """

    def __init__(self, denoiser: Any, scheduler: Any):
        super().__init__()
        if scheduler.config.get("variance_type") in ("learned", "learned_range"):
            raise ValueError(
                f"{type(scheduler).__name__} with variance_type={scheduler.config.variance_type!r} steps with a variance "
                "that a denoiser does not give. Use from_config(scheduler.config, variance_type='fixed_small')."
            )
        self.denoiser, self.schedule = denoiser, schedule_of(scheduler)
        channels, *size = denoiser.shape
        square = len(size) == 2 and size[0] == size[1]
        self.register_to_config(in_channels=channels, out_channels=channels, sample_size=size[0] if square else tuple(size))

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True, **ignored: Any) -> UNet2DOutput | tuple[Tensor]:
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        s = self.schedule.sigma(torch.as_tensor(timestep, device=x.device)).clamp(max=S_MAX)
        z = x / like(self.schedule.scale(s), x)
        # Outside the denoiser's range its nearest level stands in; above it the excess noise is scaled away.
        known = s.clamp(self.denoiser.s_min, self.denoiser.s_max)
        D = self.denoiser.denoise(like((known / s).clamp(max=1), z) * z, known)
        F = self.schedule.output(z, s, D).to(sample.dtype)
        return UNet2DOutput(sample=F) if return_dict else (F,)
