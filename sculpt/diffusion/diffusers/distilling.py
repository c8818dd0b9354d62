"""Which network a composition of diffusion models is distilled into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from sculpt.diffusion.diffusers.loras import LoraStudent
from sculpt.diffusion.diffusers.students import DenoisingStudent
from sculpt.diffusion.networks import is_a
from sculpt.formula import Posterior
from sculpt.model import BaseModel

if TYPE_CHECKING:
    from sculpt.diffusion.diffusers.adapter import Diffusion

__all__ = ["student_of"]


def student_of(leaf: Diffusion, composition: BaseModel, road: Any, options: Mapping[str, Any]) -> DenoisingStudent:
    """The student of a composition, from its anchor's network."""
    anchor: Any = leaf
    if composition.models:
        formula = composition.formula  # type: ignore[attr-defined]
        if isinstance(formula, Posterior):
            label = composition.anchored(getattr(road, "anchor", None)).labels[0]  # type: ignore[attr-defined]
            anchor = composition.models[label].leaves[0]
        else:
            anchor = composition.models[0].leaves[0]
    if not (is_a(anchor, "Diffusion") and isinstance(anchor.model, nn.Module) and any(True for _ in anchor.model.parameters())):
        raise ValueError(
            f"A student begins as the anchor's network, and {anchor} has none that could learn. Anchor on another model: "
            "sculpt.Guided(classifier, anchor=...)."
        )
    anchor = unguided(anchor)
    if anchor.pipeline is None:
        return DenoisingStudent(composition, anchor, road, **options)
    return LoraStudent(composition, anchor, road, **options)


def unguided(model: Diffusion) -> Diffusion:
    """The same model without classifier-free guidance: a student is one call a step."""
    if not model.extrapolated:
        return model
    new, kept = model.with_condition(guidance_scale=1.0, name=model.name), {id(c.network): c.switches for c in model._calls()}
    new._stages = tuple(stage.switched(lambda switches, network: kept.get(id(network), switches)) for stage in new._stages)
    if new.extrapolated:
        raise ValueError(f"A student is one call a step, and {model} is guided at any guidance_scale. Anchor on another model.")
    return new
