"""One prompt that says it all: what people do without any composition."""

from collections.abc import Sequence

import torch
from bench.rivals.walk import Walk
from torch import Tensor

from sculpt.diffusion.denoiser import Denoiser

__all__ = ["joint"]


def joint(models: Sequence[Denoiser], n: int, *, steps: int, generator: torch.Generator | None) -> Tensor:
    """Samples of one model.

    Args:
        models: the one model, under the prompt that says everything.
        n: how many samples.
        steps: evaluations for each.
        generator: of all noise.
    """
    (model,) = models
    walk = Walk([model], n, steps, generator)
    for S in walk:
        walk.step(S.new_ones(1))
    return walk.z
