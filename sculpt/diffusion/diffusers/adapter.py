r"""The adapter: every pretrained network becomes a denoiser :math:`D(z, s)` in canonical coordinates.

Notation: :math:`z = x_0 + s \varepsilon`, F the network's output; ``b`` batch, ``*x`` one sample.
"""

from __future__ import annotations

import copy
import inspect
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.diffusion.clock import Level, level, like
from sculpt.diffusion.denoiser import Denoiser
from sculpt.diffusion.diffusers.conditions import class_condition, entries, expand, leaves, prompt_encoder, tree_map
from sculpt.diffusion.diffusers.schedules import schedule_of
from sculpt.diffusion.networks import device_of, dtype_of, is_a, known_as, unwrapped
from sculpt.identity import digest

__all__ = ["Diffusion"]

SMALL = 2**32
"""Parameters times numbers of a sample, where a call takes milliseconds."""


class Diffusion(Denoiser):
    """A diffusion network with the diffusers scheduler that it was trained with.

    The key hashes weights, configuration, path and condition. A model without weights is known by its ``name``, and without a
    name by a random key: a classifier saved for it will not be matched later. Modules that are not from diffusers count their
    ``name`` in as well, because Python attributes are not hashed.

    Args:
        model: any diffusers model, or any module or callable ``(x, t) -> output`` (a tensor, or an object with ``.sample``). It is put into
            evaluation mode. A network that is not from diffusers is called once, to see whether it wants t as ``(b,)`` or 0-dim; one
            that takes integer times only gets them rounded, which is an approximation between the training times.
        scheduler: the one of the training: it says the path and what the network predicts.
        shape: of one sample; by default read off the network's configuration.
        name: how formulas and messages call it.
        condition: keyword arguments of the model, tensors with a batch axis of one (dicts may nest).
        null_condition: the same for no condition.
        guidance_scale: w of classifier-free guidance, F(null) + w (F(condition) - F(null)); 1 leaves the condition as it is.
        autoencoder: a diffusers autoencoder where samples are latents.
        device: of a model that has no weights to tell.
    """

    def __init__(
        self,
        model: nn.Module | Callable,
        scheduler: Any,
        shape: Sequence[int] | None = None,
        *,
        name: str | None = None,
        condition: Mapping[str, Any] | None = None,
        null_condition: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
        autoencoder: nn.Module | None = None,
        device: torch.device | str | None = None,
    ):
        self.model, self.scheduler, self.schedule = model, scheduler, schedule_of(scheduler)
        self.s_min, self.s_max = self.schedule.s_min, self.schedule.s_max
        self.autoencoder = autoencoder
        self.name = name or getattr(model, "__name__", type(unwrapped(model)).__name__)
        self.condition, self.null_condition, self.guidance_scale = condition or {}, null_condition, float(guidance_scale)
        self._check_condition()
        self.shape = tuple(shape) if shape is not None else _config_shape(unwrapped(model))
        self._given_name, self._anonymous, self._encode = name, uuid.uuid4().hex, None
        self._device = torch.device(device or "cpu")
        self._from_diffusers = is_a(unwrapped(model), "ModelMixin")
        if isinstance(model, nn.Module):
            model.eval()
        self._splits = scheduler.config.get("variance_type") in ("learned", "learned_range")
        if self._from_diffusers:
            self._check_channels()
        self._time = (True, torch.float32) if self._from_diffusers else self._probe()

    @property
    def device(self) -> torch.device:
        """The network's."""
        return device_of(self.model) or self._device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in, as its library says; float32 for a model without weights."""
        return dtype_of(self.model)

    @property
    def extrapolated(self) -> bool:
        """Whether the score is extrapolated: the guidance scale is not 1."""
        return self.guidance_scale != 1

    @property
    def key(self) -> str:
        """A hash of the weights, the schedule and the condition, or of the name of a callable without weights."""
        guidance = (self.guidance_scale, self.null_condition) if self.extrapolated else None
        known = known_as(self.model, self._given_name, self._anonymous)
        return digest(known, self.schedule.identity, self.shape, self.condition, guidance)

    @property
    def together(self) -> Any:
        """The network, the path, and how conditions are built: other conditions of the same kind are one call."""
        built = [(k, tuple(c.shape), c.dtype) if isinstance(c, Tensor) else (k, c) for k, c in entries(self.condition)]
        return id(self.model), self.schedule.identity, self.shape, self.extrapolated, repr(built)

    def denoise(self, z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b *x"]:
        return self.denoise_together([self], z, s)[:, 0]

    def denoise_together(self, models: Sequence[Denoiser], z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b m *x"]:
        if tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"{self} takes samples of shape {self.shape}, got a batch of {tuple(z.shape[1:])}.")
        s, dtype = level(s, z.device), z.dtype
        z = z.to(torch.promote_types(dtype, torch.float32))  # D is a difference of large numbers where s is large
        F = self._outputs(models, like(self.schedule.scale(s), z) * z, self.schedule.time(s))
        return torch.stack([self.schedule.denoised(z, s, part) for part in F], dim=1).to(dtype)

    def _outputs(self, models: Sequence[Any], x: Tensor, t: Tensor) -> list[Tensor]:
        """F(x, t) of all of them, guided."""
        conditions = [c for p in models for c in ([p.null_condition] if self.extrapolated else []) + [p.condition]]
        k = len(conditions)
        every = tree_map(lambda *c: torch.cat([expand(one, x) for one in c]) if k > 1 else c[0], *conditions)
        F = self._call(torch.cat([x] * k) if k > 1 else x, t.repeat(k) if t.ndim else t, every).chunk(k)
        if not self.extrapolated:
            return list(F)
        return [null + p.guidance_scale * (own - null) for p, null, own in zip(models, F[::2], F[1::2], strict=True)]

    def _call(self, x: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        F = self._network(x, t, condition, *self._time)
        channels = self.shape[0]
        if self._splits and tuple(F.shape) == (len(x), 2 * channels, *self.shape[1:]):
            F = F[:, :channels]  # the rest is the learned variance
        if F.shape != x.shape:
            raise ValueError(
                f"{self} answered with shape {tuple(F.shape)}, expected {tuple(x.shape)}. If it predicts its variance too, "
                "give the scheduler variance_type='learned_range'; otherwise check shape=."
            )
        return F.to(x.dtype)

    def _network(self, x: Tensor, t: Tensor, condition: Mapping[str, Any], batched: bool, dtype: torch.dtype) -> Tensor:
        """One forward pass, with t as ``(b,)`` or as 0-dim tensor of ``dtype``."""
        if t.ndim and not batched:
            parts = [
                self._network(x[i : i + 1], t[i], tree_map(lambda c, i=i: expand(c, x)[i : i + 1], condition), False, dtype)
                for i in range(len(x))
            ]
            return torch.cat(parts)
        t = (t if dtype.is_floating_point else t.round()).to(dtype)
        x = x.to(self.dtype)
        condition = tree_map(lambda c: expand(c, x), condition)
        t = t.expand(len(x)) if batched else t
        out = self.model(x, timestep=t, **condition) if self._from_diffusers else self.model(x, t, **condition)
        if isinstance(out, tuple):
            return out[0]
        return out if isinstance(out, Tensor) else out.sample

    @torch.no_grad()
    def _probe(self) -> tuple[bool, torch.dtype]:
        """Whether t goes in as ``(b,)`` or 0-dim, and its dtype: the first form that gives an output of the right shape."""
        # A batch unlike every side of the sample, so that t of shape (b,) cannot be broadcast along the wrong axis unnoticed.
        b = next(b for b in range(2, len(self.shape) + 3) if b not in self.shape)
        noise = torch.randn(b, *self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        s = level(min(max(1.0, self.s_min), self.s_max), self.device)
        failures = {}
        for dtype in dict.fromkeys((torch.float32, self.dtype, *((torch.long,) if self.schedule.integer_times else ()))):
            for batched in (True, False):
                self._time = batched, dtype
                try:
                    self._call(noise, self.schedule.time(s), self.condition)
                    return self._time
                except Exception as error:
                    failures[f"{dtype} t of shape {f'({b},)' if batched else '()'}"] = f"{type(error).__name__}: {error}"
        listed = "\n".join(f"  {form}: {failure}" for form, failure in failures.items())
        raise ValueError(
            f"Cannot call {self.name} on x of shape {tuple(noise.shape)}: it should answer (x, t) with x's shape.\n{listed}\n"
            "Check shape= and condition=, or wrap the network in a callable (x, t)."
        )

    def check_answer(self) -> None:
        """Call a network of diffusers without its numbers, and a small one with them too: raise where it cannot take what it is called with."""
        if not self._from_diffusers:
            return
        takes, config = {*inspect.signature(self.model.forward).parameters}, self.model.config
        labelled = config.get("num_class_embeds") or config.get("class_embed_type")
        if not self.condition and (labelled or takes - {"sample", "timestep", "class_labels", "return_dict"}):
            return  # its condition comes later
        state = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        # Without numbers first: a setting may make a small network's images so large that it would never answer.
        self._try(state, torch.device("meta"))
        if sum(value.numel() for value in state.values()) * math.prod(self.shape) < SMALL:
            self._try(state, self.device)

    def _try(self, state: dict[str, Tensor], place: torch.device) -> None:
        state = {name: value.to(place) for name, value in state.items()}
        twin, x = copy.copy(self), torch.zeros(2, *self.shape, dtype=self.dtype, device=place)
        twin.model = _Holding(self.model, state)
        try:
            with torch.no_grad():
                twin._call(x, torch.ones(2, device=place), self.condition)
        except Exception as error:
            # Some networks look at numbers.
            if not isinstance(error, NotImplementedError) and "meta" not in str(error):
                raise ValueError(
                    f"{self} cannot be called on samples of shape {self.shape}: {type(error).__name__}: {error!s:.300} Check its config.json, "
                    "and shape= and the condition that it was loaded with."
                ) from None

    def _check_channels(self) -> None:
        config = self.model.config
        channels, out = config.get("in_channels"), config.get("out_channels") or config.get("in_channels")
        if channels is None:
            return
        if channels != self.shape[0]:
            raise ValueError(f"{self.name} takes {channels} channels, got shape={self.shape}. Pass shape=({channels}, ...).")
        if out not in (channels, 2 * channels):
            raise ValueError(
                f"{self.name} has {channels} channels in and {out} out, expected as many (or twice, with a learned variance). "
                "Wrap a model with further inputs in a callable (x, t)."
            )
        self._splits = out == 2 * channels

    def _check_condition(self) -> None:
        for condition in (self.condition, self.null_condition or {}):
            for k, c in leaves(condition):
                if c.ndim and len(c) != 1:
                    raise ValueError(
                        f"The condition {k} of {self} has shape {tuple(c.shape)}; a base model has one condition, so the batch "
                        "axis has to be 1. Make one base model per condition, using with_condition."
                    )
        if self.extrapolated:
            own, null = ([(k, tuple(c.shape)) for k, c in leaves(part or {})] for part in (self.condition, self.null_condition))
            if null != own or not own:
                raise ValueError(
                    f"guidance_scale={self.guidance_scale:g} needs a condition and a null_condition of the same shapes; "
                    f"{self} has {own} and {null}. Pass both, or guidance_scale=1."
                )

    def with_condition(
        self,
        prompt: str | None = None,
        *,
        negative_prompt: str | None = None,
        class_label: int | None = None,
        guidance_scale: float | None = None,
        null_condition: Mapping[str, Any] | None = None,
        name: str | None = None,
        **condition: Any,
    ) -> Diffusion:
        """The same network under another condition, as a base model of its own; the weights are shared.

        A prompt (models from a pipeline), a class label, or the network's keyword tensors.
        """
        new = copy.copy(self)
        new.name, new._given_name = name or prompt or self.name, name or self._given_name
        if prompt is not None or negative_prompt is not None:
            if self._encode is None:
                raise ValueError(
                    f"{self} has no text encoder for prompt={prompt!r}. Make it by Diffusion.from_pipeline, or pass the "
                    "encoded prompt, e.g. with_condition(encoder_hidden_states=...)."
                )
            new.condition, new.null_condition = self._encode(prompt or "", negative_prompt)
        if class_label is not None:
            new.condition, new.null_condition = class_condition(unwrapped(self.model), class_label)
            new.name = name or f"class {class_label}"
        new.condition = condition or new.condition
        new.null_condition = null_condition or new.null_condition
        new.guidance_scale = self.guidance_scale if guidance_scale is None else float(guidance_scale)
        new._check_condition()
        return new

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        prompt: str | None = None,
        *,
        negative_prompt: str | None = None,
        class_label: int | None = None,
        guidance_scale: float = 1.0,
        shape: Sequence[int] | None = None,
        name: str | None = None,
    ) -> Diffusion:
        """The network of a diffusers pipeline under one condition. The pipeline's scheduler has to be that of the training.

        Samples of latent models are in the network's own, scaled coordinates. The pipeline stays at hand for further
        prompts, see :meth:`with_condition`.
        """
        parts = pipe.components
        network = parts.get("unet") or parts.get("transformer")
        if network is None or parts.get("scheduler") is None:
            raise ValueError(
                f"{type(pipe).__name__} has {', '.join(parts)}; expected a unet or a transformer, and a scheduler. "
                "Pass its network to Diffusion(model, scheduler, shape) instead."
            )
        model = cls(network, parts["scheduler"], shape, name=name, autoencoder=parts.get("vae") or parts.get("vqvae"))
        model._encode = prompt_encoder(pipe)
        if prompt is None and model._encode is not None:
            prompt = ""  # a text-conditional network without a prompt is its unconditional self
        return model.with_condition(
            prompt, negative_prompt=negative_prompt, class_label=class_label, guidance_scale=guidance_scale, name=name
        )


class _Holding(nn.Module):
    """A network with other numbers in it, and of its own type."""

    def __init__(self, network: nn.Module, state: dict[str, Tensor]):
        super().__init__()
        self.network, self.state = network, state

    def forward(self, x: Tensor, **options: Any) -> Any:
        return torch.func.functional_call(self.network, self.state, (x,), options)


def _config_shape(model: Any) -> tuple[int, ...]:
    """The shape of one sample from a diffusers config: ``in_channels`` and ``sample_size``."""
    kind = type(model).__name__
    config = model.config if is_a(model, "ModelMixin") else {}
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None or any(word in kind for word in ("3D", "Temporal", "Motion")):
        raise ValueError(
            f"Cannot read the shape of a sample from {kind}: it has no config that tells it. "
            "Pass shape=, for one sample and without the batch, e.g. shape=(3, 32, 32)."
        )
    axes = 1 if "1D" in kind else 2
    return (channels, *((size,) * axes if isinstance(size, int) else size))
