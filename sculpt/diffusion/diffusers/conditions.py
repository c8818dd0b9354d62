"""Conditions: keyword tensors of a network (dicts may nest), and how diffusers pipelines make them from prompts and labels."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sculpt.diffusion.networks import is_a
from sculpt.settings import clear

__all__ = ["class_condition", "entries", "expand", "leaves", "prompt_encoder", "tree_map"]


def tree_map(f: Callable[..., Tensor], *conditions: Mapping[str, Any]) -> dict[str, Any]:
    """f over the tensors of equally built conditions; what is no tensor stays as it is."""

    def walk(*values):
        if isinstance(values[0], Mapping):
            return tree_map(f, *values)
        return f(*values) if isinstance(values[0], Tensor) else values[0]

    return {k: walk(*(condition[k] for condition in conditions)) for k in conditions[0]}


def entries(condition: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every entry, those of dicts inside among them."""
    for k, c in sorted(condition.items()):
        if isinstance(c, Mapping):
            yield from entries(c)
        else:
            yield k, c


def leaves(condition: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Its tensors."""
    return ((k, c) for k, c in entries(condition) if isinstance(c, Tensor))


def expand(c: Tensor, x: Tensor) -> Tensor:
    """A condition with x's batch and device and, where it is not an index, x's dtype."""
    c = c.to(x.device, x.dtype if c.is_floating_point() else c.dtype)
    return c.expand(len(x), *c.shape[1:]) if c.ndim and len(c) == 1 else c


def class_condition(model: Any, label: int) -> tuple[dict, dict | None]:
    """A class label as a condition; transformers of the DiT kind have a null class after the last one."""
    config = model.config if is_a(model, "ModelMixin") else {}
    null = config.get("num_embeds_ada_norm")
    classes = null or config.get("num_class_embeds")
    if classes is None:
        raise ValueError(f"{type(model).__name__} is not class-conditional, got class_label={label}. Pass its tensors instead.")
    if not 0 <= label < classes:
        raise ValueError(f"{type(model).__name__} knows classes 0 to {classes - 1}, got class_label={label}.")
    return {"class_labels": torch.tensor([label])}, None if null is None else {"class_labels": torch.tensor([null])}


def prompt_encoder(pipe: Any) -> Callable[[str, str | None], tuple[dict, dict]] | None:
    """(prompt, negative prompt) to (condition, null condition), None for a pipeline without text encoder."""
    if pipe.components.get("text_encoder") is None:
        return None
    encode = next((encode for kind, encode in _ENCODERS.items() if is_a(pipe, kind)), None)
    if encode is None:
        raise ValueError(
            f"Cannot encode prompts with {type(pipe).__name__}; supported are {', '.join(_ENCODERS)}. "
            "Encode the prompt yourself and pass Diffusion(model, scheduler, condition={...}, autoencoder=pipe.vae)."
        )
    return partial(_encoded, encode, pipe)


def _encoded(encode: Callable, pipe: Any, prompt: str, negative: str | None) -> tuple[dict, dict]:
    with clear(f"The tokenizer and text encoder of {type(pipe).__name__} cannot encode {prompt!r:.80}"):
        return encode(pipe, prompt, negative)


@torch.no_grad()
def _encode_sd(pipe: Any, prompt: str, negative: str | None) -> tuple[dict, dict]:
    return tuple({"encoder_hidden_states": e} for e in pipe.encode_prompt(prompt, pipe.device, 1, True, negative))


@torch.no_grad()
def _encode_sdxl(pipe: Any, prompt: str, negative: str | None) -> tuple[dict, dict]:
    e, e_null, p, p_null = pipe.encode_prompt(prompt, device=pipe.device, negative_prompt=negative)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    time_ids = torch.tensor([[side, side, 0, 0, side, side]]).to(p)  # asks for an uncropped image of this size
    added = ({"text_embeds": pooled, "time_ids": time_ids} for pooled in (p, p_null))
    return tuple({"encoder_hidden_states": h, "added_cond_kwargs": more} for h, more in zip((e, e_null), added, strict=True))


@torch.no_grad()
def _encode_sd3(pipe: Any, prompt: str, negative: str | None) -> tuple[dict, dict]:
    e, e_null, p, p_null = pipe.encode_prompt(prompt, None, None, device=pipe.device, negative_prompt=negative)
    return tuple({"encoder_hidden_states": h, "pooled_projections": pooled} for h, pooled in ((e, p), (e_null, p_null)))


_ENCODERS = {
    "StableDiffusionPipeline": _encode_sd,
    "StableDiffusionXLPipeline": _encode_sdxl,
    "StableDiffusion3Pipeline": _encode_sd3,
}
