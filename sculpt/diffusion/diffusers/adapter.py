r"""The adapter: every pretrained network becomes a denoiser :math:`D(z, s)` in canonical coordinates.

Notation: :math:`z = x_0 + s \varepsilon`, F the network's output; ``b`` batch, ``*x`` one sample.
"""

from __future__ import annotations

import copy
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.checks import real
from sculpt.diffusion.clock import Level, level, like
from sculpt.diffusion.denoiser import Denoiser
from sculpt.diffusion.diffusers.calls import Call, Stage, answers
from sculpt.diffusion.diffusers.direct import (
    batched,
    check_conditions,
    class_condition,
    config_shape,
    direct_strand,
    probed_time,
    splits,
)
from sculpt.diffusion.diffusers.distilling import student_of
from sculpt.diffusion.diffusers.learning import Learned, learn
from sculpt.diffusion.diffusers.pipeline import PipelineCall, joined
from sculpt.diffusion.diffusers.schedules import schedule_of
from sculpt.diffusion.diffusers.switches import Switches, adapters_of
from sculpt.diffusion.networks import device_of, dtype_of, is_a, unwrapped
from sculpt.distillation import Student
from sculpt.habits import move
from sculpt.identity import digest
from sculpt.model import BaseModel

__all__ = ["Diffusion"]


class Diffusion(Denoiser):
    """A diffusion network with the diffusers scheduler that it was trained with.

    The key hashes weights, configuration, path and condition; a model without weights is known by its ``name``, or by a random key that
    no saved classifier matches. Adapters (LoRAs) are those that were active when the model was made; see :meth:`with_adapters`.

    Args:
        model: any diffusers model, or any module or callable ``(x, t) -> output`` (a tensor, or an object with ``.sample``), put into
            evaluation mode. Others' are called once, to see how they want t; integer times are rounded between those of the training.
        scheduler: the one of the training: it says the path and what the network predicts.
        shape: of one sample; by default read off the network's configuration.
        name: how formulas and messages call it; of modules that are not from diffusers it counts in the key.
        condition, null_condition: keyword arguments of the model, tensors with a batch axis of one; the latter for no condition.
        guidance_scale: w of classifier-free guidance, F(null) + w (F(condition) - F(null)); 1 leaves the condition as it is.
        autoencoder: a diffusers autoencoder where samples are latents.
        device: of a model that has no weights to tell.

    Example:
        >>> sculpt.Diffusion(gaussian(2.0), scheduler, shape=(2,), name="two").sample(3, generator=seed).x.shape
        torch.Size([3, 2])
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
        self._begin(model, scheduler, name, autoencoder, device)
        self.condition, self.null_condition, self.guidance_scale = condition or {}, null_condition, float(guidance_scale)
        check_conditions(str(self), self.condition, self.null_condition, self.guidance_scale)
        self.shape = tuple(shape) if shape is not None else config_shape(model)
        self.pipeline: PipelineCall | None = None
        self._learned: Learned | None = None
        if isinstance(model, nn.Module):
            model.eval()
        self._switches = Switches.of(model)
        said = splits(model, self.shape, self.name)
        self._split = scheduler.config.get("variance_type") in ("learned", "learned_range") if said is None else said
        self._time = (True, torch.float32)
        self.build()
        self._probe()

    def _begin(self, model: Any, scheduler: Any, name: str | None, autoencoder: Any, device: Any = None) -> None:
        self.model, self.scheduler, self.schedule = model, scheduler, schedule_of(scheduler)
        self.s_min, self.s_max = self.schedule.s_min, self.schedule.s_max
        self.autoencoder, self._device = autoencoder, torch.device(device or "cpu")
        self.name = name or getattr(model, "__name__", type(unwrapped(model)).__name__)
        self._given_name, self._anonymous = name, uuid.uuid4().hex

    def build(self) -> None:
        """Strands of the condition, and of the null condition where there is guidance."""
        weighed = [(self.guidance_scale, self.condition)]
        if self.guidance_scale != 1:
            weighed.insert(0, (1 - self.guidance_scale, self.null_condition or {}))
        own = [direct_strand(self.model, c, self._time, self.shape, self._split, self._switches, w) for w, c in weighed]
        self._stages: tuple[Stage, ...] = (Stage(-math.inf, tuple(own)),)

    @property
    def device(self) -> torch.device:
        """The network's."""
        return device_of(self.model) or self._device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in, as its library says; float32 for a model without weights."""
        return dtype_of(self.model)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All that are called."""
        return tuple(dict.fromkeys(call.network for call in self._calls() if isinstance(call.network, nn.Module)))

    def place(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        if self.pipeline is not None:  # other conditions are made by its encoders
            move([part for part in self.pipeline.pipe.components.values() if isinstance(part, nn.Module)], device, dtype)
        super().place(device, dtype)
        self._probe()

    @property
    def extrapolated(self) -> bool:
        """Whether the score is extrapolated by guidance: several conditions are weighed."""
        return any(stage.guided for stage in self._stages)

    @property
    def key(self) -> str:
        """A hash of the weights, the schedule and the condition, or of the name of a callable without weights."""
        guidance = (self.guidance_scale, self.null_condition) if self.extrapolated else None
        own = [self.schedule.identity, self.shape, self.condition, guidance, *self._begun]
        if self._learned is None:
            return digest(self._known(self.model, self._switches), *own)
        known = [self._known(call.network, call.switches) for call in {id(c.network): c for c in self._calls()}.values()]
        if self._learned.plain:
            return digest(*known, *own)
        return digest(known, self.schedule.identity, self.shape, [stage.described for stage in self._stages], *self._begun)

    @property
    def _begun(self) -> list[Any]:
        return [] if self.start is None else [self.s_max, self.start]

    def _calls(self) -> list[Call]:
        return [call for stage in self._stages for strand in stage.strands for call in strand.calls]

    def _known(self, network: Any, switches: Switches) -> Any:
        return switches.known(network, self._given_name if network is self.model else None, self._anonymous)

    @property
    def together(self) -> Any:
        """The networks and the path: other conditions are one call of them where they are built alike."""
        networks = tuple(dict.fromkeys(id(call.network) for call in self._calls()))
        return networks, self.schedule.identity, self.shape

    def denoise(self, z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b *x"]:
        return self.denoise_together([self], z, s)[:, 0]

    def denoise_together(self, models: Sequence[Denoiser], z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b m *x"]:
        if tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"{self} takes samples of shape {self.shape}, got a batch of {tuple(z.shape[1:])}.")
        s, dtype = level(s, z.device), z.dtype
        z = z.to(torch.promote_types(dtype, torch.float32))  # D is a difference of large numbers where s is large
        F = self.outputs(models, like(self.schedule.scale(s), z) * z, self.schedule.time(s))
        return torch.stack([self.schedule.denoised(z, s, part) for part in F], dim=1).to(dtype)

    def outputs(self, models: Sequence[Any], x: Tensor, t: Tensor) -> list[Tensor]:
        """F(x, t) of all of them, guided."""
        if all(len(p._stages) == 1 for p in models):
            return self._in_stages([p._stages[0] for p in models], x, t)
        which = [tuple(p._stage(one) for p in models) for one in t.flatten().tolist()]
        if len(set(which)) == 1:
            return self._in_stages([p._stages[k] for p, k in zip(models, which[0], strict=True)], x, t)
        F = [torch.empty_like(x) for _ in models]
        for chosen in set(which):
            rows = torch.tensor([own == chosen for own in which], device=x.device)
            parts = self._in_stages([p._stages[k] for p, k in zip(models, chosen, strict=True)], x[rows], t[rows])
            F = [whole.index_put((rows,), part) for whole, part in zip(F, parts, strict=True)]
        return F

    def _stage(self, t: float) -> int:
        """Which of the networks is asked at this time."""
        return next(k for k, stage in enumerate(self._stages) if t >= stage.least)

    def _in_stages(self, stages: Sequence[Stage], x: Tensor, t: Tensor) -> list[Tensor]:
        found = answers([strand for stage in stages for strand in stage.strands], x, t, x.dtype)
        for F in found:
            if F.shape != x.shape:
                raise ValueError(
                    f"{self} answered with shape {tuple(F.shape)}, expected {tuple(x.shape)}. If it predicts its variance too, give the scheduler variance_type='learned_range'; otherwise check shape=."
                )
        each = iter(found)
        return [stage.total([next(each) for _ in stage.strands]) for stage in stages]

    @torch.no_grad()
    def _probe(self) -> None:
        """See by calling it how a network that is not of diffusers takes its time."""
        if self.pipeline is not None or is_a(unwrapped(self.model), "ModelMixin"):
            return
        noise = torch.randn(batched(self.shape), *self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        t = self.schedule.time(level(min(max(1.0, self.s_min), self.s_max), self.device))

        def call(form: tuple[bool, torch.dtype]) -> None:
            self._time = form
            self.build()
            self.outputs([self], noise, t)

        forms = [torch.float32, self.dtype, *([torch.long] if self.schedule.integer_times else [])]
        probed_time(call, forms, self.shape, self.name)

    # Conditions

    def with_condition(self, *args: Any, name: str | None = None, **condition: Any) -> Diffusion:
        """The same network under another condition, as a base model of its own; the weights are shared.

        A model of a pipeline takes what the pipeline takes, and runs the pipeline's call again with what is new. Others take
        ``class_label``, ``guidance_scale``, ``null_condition``, and the network's keyword tensors.
        """
        if self.pipeline is not None:
            return type(self).__new__(type(self))._learn(self.pipeline.changed(args, condition), name)
        if args or {"prompt", "negative_prompt"} & set(condition):
            raise ValueError(
                f"{self} has no text encoder for prompt={(*args, condition.get('prompt'))[0]!r}. Make it by Diffusion.from_pipeline, or pass the "
                "encoded prompt, e.g. with_condition(encoder_hidden_states=...)."
            )
        return self._with_tensors(name=name, **condition)

    def _with_tensors(
        self,
        class_label: int | None = None,
        guidance_scale: float | None = None,
        null_condition: Mapping[str, Any] | None = None,
        name: str | None = None,
        **condition: Any,
    ) -> Diffusion:
        new = copy.copy(self)
        new.name, new._given_name = name or self.name, name or self._given_name
        if class_label is not None:
            new.condition, new.null_condition = class_condition(self.model, class_label)
            new.name = name or f"class {class_label}"
        new.condition = condition or new.condition
        new.null_condition = null_condition or new.null_condition
        new.guidance_scale = self.guidance_scale if guidance_scale is None else float(guidance_scale)
        check_conditions(str(new), new.condition, new.null_condition, new.guidance_scale)
        new.build()
        return new

    # Pipelines

    @classmethod
    def from_pipeline(cls, pipe: Any, *args: Any, name: str | None = None, **call: Any) -> Diffusion:
        """What a diffusers pipeline samples when it is called so: ``from_pipeline(pipe, prompt="a dog", guidance_scale=4.0)``.

        The pipeline's own call is run for some steps with its networks and its scheduler watched. What its networks are called with, text,
        masks, control images and all, is kept; where the sample and the time go in, guidance, packing and signs are learned, and checked
        against a step of the pipeline. The pipeline is left as it was, and its text encoders may be freed: only
        :meth:`with_condition` needs them again. The pipeline's scheduler has to be that of the training.

        Args:
            pipe: of diffusers.
            args: what the pipeline takes, by position.
            name: of the model; by default the prompt.
            call: what the pipeline takes, by name, its defaults included: without a ``guidance_scale`` it is the pipeline's. How many
                steps a solver takes is none of the model's business, and left aside.
        """
        return cls.__new__(cls)._learn(PipelineCall(pipe, args, call), name)

    def _learn(self, call: PipelineCall, name: str | None) -> Diffusion:
        learned = learn(call)
        self.pipeline, self._learned, self._stages, self.shape = call, learned, learned.stages, learned.shape
        self._begin(self._calls()[-1].network, learned.scheduler, name, call.autoencoder)
        self.name = name or call.name or self.name
        self.condition, self.null_condition, self.guidance_scale = learned.guidance
        if learned.start is not None:
            clean, t = learned.start
            self._begin_at(clean, float(self.schedule.sigma(torch.tensor(t))))
        return self

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "b *x"], batch_size: int = 8) -> Any:
        """What the pipeline makes of finished latents, as its ``output_type`` says, by default tensors with images in [0, 1]; pixels as they are."""
        if self.pipeline is None or self.autoencoder is None:
            return super().decode(x, batch_size)
        return joined([self.pipeline.decode(part, self._learned.still) for part in x.split(batch_size)])

    def with_start(self, start: Tensor, strength: float, name: str | None = None) -> Diffusion:
        """The same model, sampled from a noisy version of an image and not from pure noise. Models of image-to-image pipelines start so by themselves.

        Args:
            start: a clean sample in the model's own coordinates, for latents those of the network.
            strength: the share of the training's times that are left, from 0 (nothing is changed) to 1.
            name: of the model.
        """
        if tuple(start.shape) not in (self.shape, (1, *self.shape)):
            raise ValueError(f"{self} makes samples of shape {self.shape}, and start is one of them; got {tuple(start.shape)}.")
        if not 0 < real("strength", strength) <= 1:
            raise ValueError(f"strength is a share from 0 to 1, got {strength}.")
        new = copy.copy(self)
        new._begin_at(start.reshape(1, *self.shape), self.schedule.at_share(strength))
        new.name, new._given_name = name or self.name, name or self._given_name
        return new

    def _begin_at(self, start: Tensor, s: float) -> None:
        self.start, self.s_max = start.float(), min(self.schedule.s_max, s)
        if not self.s_max > 1.001 * self.s_min:
            raise ValueError(
                f"{self} would start at s={s:.3g}, at or below its least noise level s={self.s_min:.3g}. Take more strength."
            )

    def student(self, composition: BaseModel, road: Any, **options: Any) -> Student:
        return student_of(self, composition, road, options)

    # Adapters

    def with_adapters(self, adapters: Mapping[str, float] | None, name: str | None = None) -> Diffusion:
        """The same model with these adapters (LoRAs) and no others, at these scales: a base model of its own, which shares the network.

        They are switched on for its calls and back after them. Text encoders that have adapters encode the prompt again.

        Args:
            adapters: the names by which they were loaded, with their scales; ``None`` for the network without any.
            name: of the model; by default its own, with the adapters in brackets.
        """
        adapters = {k: float(v) for k, v in (adapters or {}).items()}
        loaded = set[str]().union(*(adapters_of(call.network) for call in self._calls()))
        if unknown := sorted(set(adapters) - loaded):
            raise ValueError(
                f"{', '.join(unknown)}: no adapter of {self}, which has {', '.join(sorted(loaded)) or 'none'}. Load it first, "
                "pipe.load_lora_weights(..., adapter_name=...)."
            )
        said = ",".join(f"{k}={v:g}" for k, v in adapters.items())
        name = name or f"{self.name.partition('[')[0]}[{said or 'plain'}]"
        new = copy.copy(self)
        if self.pipeline is not None and self.pipeline.encoders_adapted:
            new = type(self).__new__(type(self))._learn(self.pipeline.with_adapters(adapters), name)
        new.name, new._given_name = name, self._given_name
        new._switches = Switches() if self.pipeline is not None else self._switches.with_adapters(self.model, adapters)
        new._stages = tuple(stage.with_adapters(adapters) for stage in new._stages)
        return new
