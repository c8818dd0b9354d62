r"""The diffusion family's border: every pretrained network becomes a denoiser :math:`D(z, s)` in canonical coordinates.

Notation: :math:`z = x_0 + s \varepsilon`, :math:`v = s^2`, F the network's output; ``b`` batch, ``*x`` one sample.
"""

from __future__ import annotations

import abc
import copy
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.base import BaseModel
from sculpt.diffusion.condition import class_condition, expand, leaves, prompt_encoder, tree_map
from sculpt.diffusion.identity import digest, is_a, weights
from sculpt.diffusion.schedule import Level, level, like, schedule_of
from sculpt.particles import Samples

__all__ = ["Denoiser", "Diffusion", "EnergyModel"]


class Denoiser(BaseModel):
    r"""A diffusion model seen only through its denoiser :math:`D(z, s) = E[x_0 \mid z]`, :math:`z = x_0 + s \varepsilon`."""

    family = "diffusion"

    shape: tuple[int, ...]
    """Of one sample."""

    s_min: float
    s_max: float
    """The noise levels that the model covers; ``s_max`` may be infinite."""

    dtype: torch.dtype = torch.float32
    """What the network computes in. States and clock are float32 or wider all the same."""

    autoencoder: nn.Module | None = None
    """A diffusers autoencoder where samples are latents."""

    guided: bool = False
    """Whether the score is extrapolated by classifier-free guidance: such a score has no marginal of its own."""

    has_energy: bool = False
    """Whether there is an ``energy(z, s)`` with :math:`E = -\\log q + \\text{const}`, one number per sample."""

    @abc.abstractmethod
    def denoise(self, z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b *x"]:
        """D(z, s) in z's dtype. Gradients flow to z."""

    @property
    def space(self) -> tuple:
        """What a sample is: its shape, and for latents the encoder that defines them."""
        return self.shape, _latents(self.autoencoder)

    def check_composable(self, other: BaseModel) -> None:
        if self.family != other.family:
            raise ValueError(
                f"{self} is a {self.family} model and {other} a {other.family} model: they have no states in common. "
                "Compose models of one family."
            )
        if self.shape != other.shape:
            raise ValueError(
                f"{self} makes samples of shape {self.shape}, {other} of shape {other.shape}. "
                "Compose models of one shape; networks of any resolution take shape=."
            )
        if self.space != other.space:
            raise ValueError(
                f"{self} and {other} live in different latent spaces: {self.space[1]} and {other.space[1]}. "
                "Compose models that share their autoencoder, and pass autoencoder= to both."
            )
        if max(self.s_min, other.s_min) >= min(self.s_max, other.s_max):
            raise ValueError(
                f"{self} covers noise levels {self.s_min:.3g} to {self.s_max:.3g} and {other} {other.s_min:.3g} to "
                f"{other.s_max:.3g}: they have none in common. Check the training schedulers."
            )

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "b *x"], batch_size: int = 8) -> Tensor:
        """Images in [0, 1] from latents and from pixels (one or three channels); anything else as it is."""
        if self.autoencoder is None:
            image = len(self.shape) == 3 and self.shape[0] in (1, 3)
            return (x / 2 + 0.5).clamp(0, 1) if image else x
        config, weight = self.autoencoder.config, next(self.autoencoder.parameters())
        mean, std = (
            x.new_tensor(config.get(entry) or [otherwise])[:, None, None]
            for entry, otherwise in (("latents_mean", config.get("shift_factor") or 0.0), ("latents_std", 1.0))
        )
        x = (x * std / config.get("scaling_factor", 1.0) + mean).to(weight.device, weight.dtype)
        images = [self.autoencoder.decode(part).sample for part in x.split(batch_size)]
        return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)

    def sample(self, n: int, *, steps=None, solver=None, batch_size=None, generator=None, progress=True, **options) -> Samples:
        """n samples; see :func:`sculpt.diffusion.sampler.sample` for the options."""
        from sculpt.diffusion.sampler import sample

        return sample(
            self, n, steps=steps, solver=solver, batch_size=batch_size, generator=generator, progress=progress, **options
        )

    def replay(self, models: Sequence[BaseModel], **options):
        from sculpt.diffusion.network import DiffusionReplay

        return DiffusionReplay(models, **options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, shape={self.shape}, s={self.s_min:.3g} to {self.s_max:.3g})"


class Diffusion(Denoiser):
    """A diffusion network with the diffusers scheduler that it was trained with.

    ``model`` is any diffusers model, or any module or callable ``(x, t) -> output`` (a tensor, or an object with ``.sample``),
    and is put into evaluation mode. A network that is not from diffusers is called once, to see whether it wants t as ``(b,)``
    or 0-dim; one that takes integer times only gets them rounded, which is an approximation between the training times.

    ``condition`` and ``null_condition`` are keyword arguments of the model, tensors with a batch axis of one (dicts may nest).
    With ``guidance_scale`` w the output is that of classifier-free guidance, F(null) + w (F(condition) - F(null)).

    The key hashes weights, configuration, path and condition. A model without weights is known by its ``name``, and without a
    name by a random key: a classifier saved for it will not be matched later. Modules that are not from diffusers count their
    ``name`` in as well, because Python attributes are not hashed.
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
        guidance_scale: float | int = 1.0,
        autoencoder: nn.Module | None = None,
        device: torch.device | str | None = None,
    ):
        self.model, self.scheduler, self.schedule = model, scheduler, schedule_of(scheduler)
        self.s_min, self.s_max = self.schedule.s_min, self.schedule.s_max
        self.autoencoder = autoencoder
        self.name = name or getattr(model, "__name__", type(model).__name__)
        self.condition, self.null_condition, self.guidance_scale = condition or {}, null_condition, float(guidance_scale)
        self._check_condition()
        self.shape = tuple(shape) if shape is not None else _config_shape(model)
        self._given_name, self._anonymous, self._encode = name, uuid.uuid4().hex, None
        self._device = torch.device(device or "cpu")
        self._from_diffusers = is_a(model, "ModelMixin")
        if isinstance(model, nn.Module):
            model.eval()
        self._splits = scheduler.config.get("variance_type") in ("learned", "learned_range")
        if self._from_diffusers:
            self._check_channels()
        self._time = (True, torch.float32) if self._from_diffusers else self._probe()

    @property
    def device(self) -> torch.device:
        state = _first_state(self.model)
        return self._device if state is None else state.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in, read off its weights."""
        state = _first_state(self.model)
        return torch.float32 if state is None else state.dtype

    @property
    def guided(self) -> bool:
        """Whether the score is extrapolated: the guidance scale is not 1."""
        return self.guidance_scale != 1

    @property
    def key(self) -> str:
        guidance = (self.guidance_scale, self.null_condition) if self.guided else None
        known = _known_as(self.model, self._given_name, self._anonymous)
        return digest(known, self.schedule.identity, self.shape, self.condition, guidance)

    def denoise(self, z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b *x"]:
        if tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"{self} takes samples of shape {self.shape}, got a batch of {tuple(z.shape[1:])}.")
        s, dtype = level(s, z.device), z.dtype
        z = z.to(torch.promote_types(dtype, torch.float32))  # D is a difference of large numbers where s is large
        F = self._output(like(self.schedule.scale(s), z) * z, self.schedule.time(s))
        return self.schedule.denoised(z, s, F).to(dtype)

    def _output(self, x: Tensor, t: Tensor) -> Tensor:
        """F(x, t), guided."""
        if not self.guided:
            return self._call(x, t, self.condition)
        both = tree_map(lambda u, c: torch.cat([expand(u, x), expand(c, x)]), self.null_condition, self.condition)
        F_null, F = self._call(torch.cat([x, x]), t.repeat(2) if t.ndim else t, both).chunk(2)
        return F_null + self.guidance_scale * (F - F_null)

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
        x = x if _first_state(self.model) is None else x.to(self.dtype)
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
        if self.guided:
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
        guidance_scale: float | int | None = None,
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
            new.condition, new.null_condition = class_condition(self.model, class_label)
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
        guidance_scale: float | int = 1.0,
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


class EnergyModel(Denoiser):
    r"""An energy :math:`E(z, s) = -\log q(z; s) + \text{const}` for every noise level, one number per sample.

    .. math:: D(z, s) = z - v \, \nabla_z E(z, s)

    ``energy`` is a module or callable; s reaches it in z's dtype, 0-dim or ``(b,)``.
    """

    has_energy = True

    def __init__(
        self,
        energy: nn.Module | Callable,
        shape: Sequence[int],
        *,
        s_min: float | int = 0.002,
        s_max: float | int = 80.0,
        name: str | None = None,
        device: torch.device | str | None = None,
    ):
        self.model, self.shape, self.s_min, self.s_max = energy, tuple(shape), float(s_min), float(s_max)
        if not 0 < self.s_min < self.s_max:
            raise ValueError(f"An energy model needs noise levels 0 < s_min < s_max, got {s_min} and {s_max}.")
        self.name = name or getattr(energy, "__name__", type(energy).__name__)
        self._given_name, self._anonymous = name, uuid.uuid4().hex
        self._device = torch.device(device or "cpu")
        if isinstance(energy, nn.Module):
            energy.eval()

    @property
    def device(self) -> torch.device:
        state = _first_state(self.model)
        return self._device if state is None else state.device

    @property
    def key(self) -> str:
        return digest(_known_as(self.model, self._given_name, self._anonymous), self.shape, self.s_min, self.s_max)

    def energy(self, z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, " b"]:
        """E(z, s)"""
        state = _first_state(self.model)
        x = z if state is None or not state.is_floating_point() else z.to(state.dtype)
        E = self.model(x, level(s, z.device).to(x.dtype)).to(z.dtype)
        if E.shape != z.shape[:1]:
            raise ValueError(f"The energy {self} answered with shape {tuple(E.shape)}, expected one per sample, ({len(z)},).")
        return E

    def denoise(self, z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b *x"]:
        v = like(level(s, z.device) ** 2, z)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():  # samplers and pipelines run under no_grad
            z = z if z.requires_grad else z.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.energy(z, s).sum(), z, create_graph=differentiable)
        return z - v * gradient if differentiable else (z - v * gradient).detach()


def _first_state(model: Any) -> Tensor | None:
    """The parameter or buffer that tells a network's device and dtype, looked up anew because networks move."""
    state = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return next((t for t in state if t.is_floating_point()), None)


def _known_as(model: Any, name: str | None, anonymous: str) -> Any:
    """What tells this network from others: weights and configuration, or its name."""
    if is_a(model, "DenoiserUNet"):
        return model.denoiser.key
    if not isinstance(model, nn.Module) or not model.state_dict():
        return name or anonymous
    config = name
    if is_a(model, "ModelMixin"):
        config = json.dumps({k: v for k, v in model.config.items() if not k.startswith("_")}, sort_keys=True, default=str)
    return type(model).__qualname__, config, weights(model)


def _latents(autoencoder: nn.Module | None) -> tuple | None:
    """What defines a latent space: the encoder and the scaling. Decoders may differ, and half precision is the same encoder."""
    if autoencoder is None:
        return None
    entries = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    scaling = tuple((k, autoencoder.config.get(k)) for k in entries if autoencoder.config.get(k) is not None)
    return type(autoencoder).__name__, *scaling, weights(autoencoder, ("encoder", "quant_conv"), torch.float16)[:8]


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
