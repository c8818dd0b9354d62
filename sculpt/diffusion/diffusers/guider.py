"""A composition as a guider of diffusers' modular pipelines."""

from __future__ import annotations

from typing import Any

from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from sculpt.diffusion.diffusers.unet import DenoiserUNet

__all__ = ["CompositionGuider"]

NAME = "sculpt_composition"


class CompositionGuider(BaseGuidance):
    """A composition inside a modular pipeline: for the one call of a step it stands in for the pipeline's network.

    The base models bring their own conditions, as many as there are, and those that share a network are one call of it. The pipeline's own
    prompt says nothing.

    Args:
        unet: of a composition, see :meth:`DiffusionComposition.as_unet`.
    """

    _input_predictions = ["pred"]

    def __init__(self, unet: DenoiserUNet):
        super().__init__()
        self.unet = unet
        self.register_to_config(composition=str(unet.denoiser))

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self.unet.restart()

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(_StandIn(self.unet), NAME)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        _removed(denoiser)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch(data, 0, "pred")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred")]

    def forward(self, pred: Tensor) -> GuiderOutput:
        return GuiderOutput(pred=pred, pred_cond=pred, pred_uncond=None)

    @property
    def is_conditional(self) -> bool:
        return True

    @property
    def num_conditions(self) -> int:
        return 1

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        raise ValueError("A composition's guider is not saved: save its base models, and compose them again.")


class _StandIn(ModelHook):
    """Answers in the network's place. The base models, whose network it may be, reach the network itself."""

    def __init__(self, unet: DenoiserUNet):
        super().__init__()
        self.unet, self.asking = unet, False

    def new_forward(self, module: nn.Module, *args: Any, **options: Any) -> Any:
        if self.asking:
            return self.fn_ref.original_forward(*args, **options)
        self.asking = True
        try:
            return self.unet(*args, **options)
        except BaseException:
            _removed(module)  # pipelines do not clean up after a failure
            raise
        finally:
            self.asking = False


def _removed(module: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(module).remove_hook(NAME, recurse=False)
