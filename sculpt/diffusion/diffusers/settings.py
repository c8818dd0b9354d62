"""What a diffusers config says of schedules and sample sizes, checked before the library sees it."""

from __future__ import annotations

import math
from typing import Any

import torch

from sculpt.diffusion.diffusers.schedules import Schedule, schedule_of
from sculpt.diffusion.networks import is_a
from sculpt.entries import Entries
from sculpt.settings import check_settings

__all__ = ["check_sample_size", "check_schedule", "described", "plain", "read_schedule"]

TIMES = 10_000
"""of a training: some schedulers take a millisecond for each"""
NUMBERS = 2**26
"""in a channel of a sample"""


def check_schedule(config: Entries) -> None:
    """Raise where a scheduler has no times or noise levels that a training could have had."""
    if "num_train_timesteps" in config:
        config.whole("num_train_timesteps", 2, TIMES)
    betas = config.optional("trained_betas", config.each, kind=(int, float), what="numbers", most=TIMES)
    if betas is not None and len(betas) < 2:
        raise config.refuse("trained_betas", "two numbers or more")
    for name in ("sigma_min", "sigma_max", "sigma_data"):
        config.optional(name, config.number, least=1e-12, most=1e12)


def check_sample_size(config: Entries, cls: type) -> None:
    """Raise where the samples of a network would be of a size that nobody can make."""
    size = config.get("sample_size")
    if size is None:
        return
    if isinstance(size, list):
        sides = config.each("sample_size", int, "whole numbers", most=3)
    else:
        sides = [config.whole("sample_size", 1)] * (1 if "1D" in cls.__name__ else 2)
    if min(sides, default=0) < 1 or math.prod(sides) > NUMBERS:
        raise config.refuse("sample_size", f"the sides of a sample of at most {NUMBERS:,} pixels")


def plain(config: Any) -> dict[str, Any]:
    """What a diffusers configuration says of a network or scheduler, without where and by which version it was written."""
    return {
        key: value.tolist() if is_a(value, "ndarray") else list(value) if isinstance(value, tuple) else value
        for key, value in dict(config).items()
        if not key.startswith("_")
    }


def described(thing: Any) -> dict[str, Any]:
    """The same with its class."""
    return {**plain(thing.config), "_class_name": type(thing).__name__}


def read_schedule(name: Any, config: Entries) -> Schedule:
    """The noise levels of a scheduler that a file describes.

    Args:
        name: of its class.
        config: its settings, which are checked before the library sees them.
    """
    import diffusers

    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ValueError(
            f"Noise levels are to be those of a {name}, which is no scheduler of diffusers. "
            "Take a model with a scheduler of diffusers, or leave network out."
        )
    check_settings(config, cls)
    check_schedule(config)
    with torch.device("cpu"):  # its tables are numbers, also where the network is but drawn
        return schedule_of(cls.from_config(config.found))
