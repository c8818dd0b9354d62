"""A pretrained UNet's own way down as a classifier's backbone: it has learned already what images look like at every noise level."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.adapter import Diffusion
from sculpt.diffusion.diffusers.settings import described, plain, read_schedule
from sculpt.diffusion.networks import unwrapped
from sculpt.entries import Entries
from sculpt.settings import check_settings

__all__ = ["UNetEncoder"]


class UNetEncoder(nn.Module):
    """The downward blocks and the middle of a diffusers ``UNet2DModel``, pooled; for ``sculpt.fit(models, network=UNetEncoder.of(model))``.

    On the coloured digits its forward pass costs a fifth of the UNet's.
    """

    def __init__(self, unet: dict[str, Any], scheduler: dict[str, Any], width: int = 128):
        super().__init__()
        self.width, self.config = width, {"unet": unet, "scheduler": scheduler, "width": width}
        settings, times = Entries(plain(unet), "the encoder's unet"), Entries(plain(scheduler), "the encoder's scheduler")
        check_settings(settings, diffusers.UNet2DModel)
        network = diffusers.UNet2DModel.from_config(settings.found)
        if network.class_embedding is not None:
            raise ValueError(
                f"A UNet of {network.config.num_class_embeds} classes sees noise levels through one of them. "
                "Take the encoder of an unconditional UNet2DModel, or leave network out."
            )
        self.time, self.stem = nn.Sequential(network.time_proj, network.time_embedding), network.conv_in
        self.down, self.middle = network.down_blocks, network.mid_block
        for module in self.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(AttnProcessor())  # the fused attention has no second derivative, which training wants
        self.out = nn.Linear(2 * network.config.block_out_channels[-1], width)
        self.schedule = read_schedule(scheduler.get("_class_name"), times)

    @classmethod
    def of(cls, model: Diffusion, width: int = 128) -> UNetEncoder:
        """A copy of this model's encoder, weights included."""
        unet = unwrapped(getattr(model, "model", None))
        if not isinstance(unet, diffusers.UNet2DModel):
            raise ValueError(f"An encoder is read from a diffusers UNet2DModel, got {model} with a {type(unet).__name__}.")
        encoder = cls(plain(unet.config), described(model.scheduler), width)
        parts = {"time.1": unet.time_embedding, "stem": unet.conv_in, "down": unet.down_blocks, "middle": unet.mid_block}
        for name, part in parts.items():
            encoder.get_submodule(name).load_state_dict(part.state_dict())
        return encoder.float()

    def forward(self, z: Float[Tensor, "b c h w"], s: Float[Tensor, "*b"] | None = None) -> Float[Tensor, "b w2"]:
        """Features of z at noise level s; without one, of a finished sample."""
        dtype = self.out.weight.dtype
        s = torch.full((), self.schedule.s_min, dtype=torch.float64, device=z.device) if s is None else s.double()
        s = s.clamp(self.schedule.s_min, self.schedule.s_max).expand(len(z))
        x = like(self.schedule.scale(s), z) * z
        h = self.stem((2 * x - 1 if self.config["unet"].get("center_input_sample") else x).to(dtype))
        level = self.time[1](self.time[0](self.schedule.time(s)).to(dtype))
        for block in self.down:
            h, _ = block(hidden_states=h, temb=level)
        h = h if self.middle is None else self.middle(h, level)
        return F.silu(self.out(torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=-1)))
