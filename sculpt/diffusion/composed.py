"""Compositions of diffusion models, and how they take the place of a network of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from sculpt.classifier.guide import Guide
from sculpt.composition import Composition
from sculpt.roads import Guided, Tracked

if TYPE_CHECKING:
    from sculpt.diffusion.diffusers.guider import CompositionGuider
    from sculpt.diffusion.diffusers.unet import DenoiserUNet

__all__ = ["DiffusionComposition", "in_place"]


class DiffusionComposition(Composition):
    """A composition of diffusion models."""

    def as_unet(
        self,
        road: Guided | Guide | Tracked | None = None,
        scheduler: Any | None = None,
        network: nn.Module | None = None,
    ) -> DenoiserUNet:
        """The composition in the place of a diffusers network: ``pipe.unet = (p & q).as_unet()``, or ``pipe.transformer = ...``.

        The base models bring their own conditions, so the pipeline's prompt says nothing, and its guidance scale has no effect: turn it off
        (``guidance_scale=1``), because it costs a second look at the samples. Guidance belongs into the base models. Without a classifier
        every sample goes alone, steered by the densities of its path, as ``sample(n, solver=pipe.scheduler)`` does. Gradients flow through
        it; run a loop of your own under ``torch.no_grad()``, as pipelines do.

        A pipeline that moves (``pipe.to("cuda", torch.float16)``) moves copies: the base models stay what they are. Move these first, with
        ``composition.to(...)``, and nothing is copied. Base models that are functions cannot be copied, nor can networks whose weights are
        offloaded: these move themselves.

        Args:
            road: a classifier, or ``Guided(classifier, ...)``; nothing or ``Tracked(particles=1)`` for densities along the path.
            scheduler: the one that the loop steps with; by default the first base model's own.
            network: the one it takes the place of, which pipelines look at; by default the first base model's.
        """
        return in_place(self._at_once(road), scheduler, network)

    def as_guider(
        self,
        road: Guided | Guide | Tracked | None = None,
        scheduler: Any | None = None,
        network: nn.Module | None = None,
    ) -> CompositionGuider:
        """The composition as a guider of diffusers' modular pipelines: ``pipe.update_components(guider=(p & q).as_guider())``.

        Base models may be any number of prompts of the pipeline's network, or of other networks.

        Args:
            road: as for :meth:`as_unet`, and the others as well.
            scheduler: the pipeline's; by default the first base model's own.
            network: the pipeline's; by default the first base model's.
        """
        from sculpt.diffusion.diffusers.guider import CompositionGuider

        return CompositionGuider(self.as_unet(road, scheduler, network))

    def _at_once(self, road: Guided | Guide | Tracked | None) -> Any:
        """What the composition makes of samples at one noise level, and of nothing else but those before."""
        if road is not None and not isinstance(road, Tracked):
            return self.guided(road)
        from sculpt.diffusion.solved import Remembering
        from sculpt.diffusion.together import at_once

        formula = (Tracked() if road is None else road).formula_alone(self)
        return Remembering(formula, self.leaves, at_once(self.shape))


def in_place(denoiser: Any, scheduler: Any | None, network: nn.Module | None) -> DenoiserUNet:
    """A denoiser as a network of diffusers."""
    from sculpt.diffusion.diffusers.unet import DenoiserUNet

    scheduler = scheduler or denoiser.first.scheduler
    if scheduler is None:
        raise ValueError(
            f"{denoiser.first} has no diffusers scheduler of its own: pass scheduler=, the one that the pipeline or loop steps with."
        )
    return DenoiserUNet(denoiser, scheduler, network)
