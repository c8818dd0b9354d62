"""Tiny checkpoints on disk, as diffusers writes them."""

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


def tiny_unet(seed: int = 0, **config) -> UNet2DModel:
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    size = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    return UNet2DModel(**(size | blocks | {"layers_per_block": 1, "norm_num_groups": 4} | config)).eval()


def save_pipeline(folder: Path, seed: int = 0, **config) -> Path:
    DDPMPipeline(unet=tiny_unet(seed, **config), scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


def save_parts(folder: Path, seed: int = 0, **config) -> Path:
    """The same without model_index.json."""
    tiny_unet(seed, **config).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder
