r"""What a diffusion model is: a denoiser :math:`D(z, s)` in canonical coordinates, alone or steered by a classifier.

Notation: :math:`z = x_0 + s \varepsilon`, :math:`v = s^2`; ``b`` batch, ``*x`` one sample.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.chain import Chain, Settings
from sculpt.diffusion.chains import DenoisingChain, GuidedChain
from sculpt.diffusion.clock import Level, common_start, level, like, noise_range
from sculpt.diffusion.composed import DiffusionComposition, in_place
from sculpt.diffusion.correctors import Corrector
from sculpt.diffusion.detail import DetailedChain, detail_level
from sculpt.diffusion.guidance import Guidance
from sculpt.diffusion.networks import device_of, dtype_of, latents_of
from sculpt.diffusion.ratios import PATH, path_ratios
from sculpt.diffusion.referee import MOST, Referee
from sculpt.diffusion.states import DiffusionStore
from sculpt.diffusion.together import at_once
from sculpt.diffusion.tracked import TrackedChain
from sculpt.diffusion.twist import TwistedChain
from sculpt.formula import Tilted
from sculpt.habits import move
from sculpt.identity import digest, weights
from sculpt.model import BaseModel, Steered, Steppable, operand_names, randn
from sculpt.samples import pixels

if TYPE_CHECKING:
    from sculpt.classifier.guide import Guide
    from sculpt.diffusion.diffusers.unet import DenoiserUNet
    from sculpt.factor import Factor
    from sculpt.formula import Formula, Posterior

__all__ = ["Denoiser", "DiffusionComposition", "GuidedDenoiser"]

LARGE = 2**14
"""Numbers of a sample, from which on a population of them is more than anybody wants to pay for unasked."""


class Denoiser(Steppable):
    r"""A diffusion model seen only through its denoiser :math:`D(z, s) = E[x_0 \mid z]`, :math:`z = x_0 + s \varepsilon`."""

    default_steps = 32

    s_min: float
    s_max: float
    """The noise levels that the model covers; ``s_max`` may be infinite."""

    dtype: torch.dtype = torch.float32
    """What the network computes in. States and clock are float32 or wider all the same."""

    model: Any = None
    """Its network, where it has one."""

    autoencoder: nn.Module | None = None
    """A diffusers autoencoder where samples are latents."""

    scheduler: Any = None
    """The diffusers scheduler of its training, where there is one."""

    start: Tensor | None = None
    """A clean sample around which sampling starts at ``s_max``, as in image-to-image; pure noise where there is none."""

    extrapolated: bool = False
    """Whether classifier-free guidance extrapolates the score: such a score has no marginal of its own."""

    has_energy: bool = False
    """Whether there is an ``energy(z, s)`` with :math:`E = -\\log q + \\text{const}`, one number per sample."""

    has_referee = True

    road = "base model"
    """How diagnostics call the way its chain goes."""

    @abc.abstractmethod
    def denoise(self, z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b *x"]:
        """D(z, s) in z's dtype. Gradients flow to z."""

    @property
    def first(self) -> Denoiser:
        """The base model that says what samples are: itself, or a composition's anchor."""
        return self

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All that moves with it."""
        return (self.model,) if isinstance(self.model, nn.Module) else ()

    def place(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        move([*self.networks, *([] if self.autoencoder is None else [self.autoencoder])], device, dtype)
        if device is not None:
            self._device = device  # of a function, which has no weights to tell

    @property
    def together(self) -> Any:
        """Models for which this is the same are one call of a network; ``None`` for a model by itself."""
        return None

    def denoise_together(self, models: Sequence[Denoiser], z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b m *x"]:
        """What models of one network, this one among them, make of z."""
        return torch.stack([model.denoise(z, s) for model in models], dim=1)

    @property
    def space(self) -> tuple[Any, ...]:
        """What a sample is: its shape, and for latents the encoder that defines them."""
        return self.shape, latents_of(self.autoencoder)

    def check_composable(self, other: BaseModel) -> None:
        if not isinstance(other, Denoiser):
            raise ValueError(
                f"{self} is a diffusion model and {other} is a {type(other).__name__}: they have no states in common. "
                "Compose models of one family."
            )
        if self.shape != other.shape:
            raise ValueError(
                f"{self} makes samples of shape {self.shape}, {other} of shape {other.shape}. Compose models of one shape; networks of any resolution take shape=."
            )
        if self.space != other.space:
            raise ValueError(
                f"{self} and {other} live in different latent spaces: {self.space[1]} and {other.space[1]}. Compose models that share their autoencoder, and pass autoencoder= to both."
            )
        common_start([self, other])
        if max(self.s_min, other.s_min) >= min(self.s_max, other.s_max):
            raise ValueError(
                f"{self} covers noise levels {self.s_min:.3g} to {self.s_max:.3g} and {other} {other.s_min:.3g} to "
                f"{other.s_max:.3g}: they have none in common. Check the training schedulers."
            )

    # What roads ask for

    def chain(self, settings: Settings) -> Chain:
        if settings.solver is None:
            return DenoisingChain(self, settings)
        from sculpt.diffusion.diffusers.solver import SolverChain

        return SolverChain(self, settings)

    @property
    def alone(self) -> bool:
        """Whether each sample is a run of its own by default: latents, and whatever is as large."""
        return self.autoencoder is not None or math.prod(self.shape) > LARGE

    def tracked(
        self,
        formula: Formula,
        models: Sequence[Steppable],
        settings: Settings,
        road: Any = None,
        alone: bool = False,
        factors: Sequence[Factor] = (),
    ) -> Chain:
        corrector, detail = (None, None) if road is None else (road.corrector, road.detail)
        if not (corrector is None or isinstance(corrector, Corrector)):
            raise TypeError(
                f"corrector is an MCMC kernel, sculpt.ULA(), sculpt.MALA() or sculpt.HMC(); got {corrector!r:.200}."
            )
        if factors:
            settings.refuse("samples that factors weigh, which need a kernel of their own", "solver")
            if isinstance(formula, Tilted):
                return TwistedChain(self, factors, formula.powers, settings, alone)
        if not alone:
            settings.refuse("tracked densities, whose populations need a kernel of their own", "solver")
        if settings.solver is not None:
            if detail or corrector is not None:
                raise ValueError(
                    "detail and corrector need the steps of tracked densities. Leave them out, or leave solver out."
                )
            from sculpt.diffusion.solved import SolvedChain

            return SolvedChain(formula, models, settings)
        if detail is None:
            detail = 0.0 if alone else detail_level(models)
        if not detail:
            return TrackedChain(formula, models, settings, corrector, alone, factors)
        return DetailedChain(formula, models, settings, corrector, detail, alone, factors)

    def guided(
        self,
        posterior: Posterior,
        models: Sequence[BaseModel],
        classifier: Guide,
        form: str = "anchored",
        strength: float = 1.0,
    ) -> GuidedDenoiser:
        return GuidedDenoiser(posterior, models, classifier, form, strength)

    def log_ratios(
        self,
        models: Sequence[BaseModel],
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        made_by: int = 0,
        detail: float | None = None,
        paths: int | None = None,
    ) -> Tensor:
        if paths is not None:
            raise ValueError(f"paths: {self} has no paths of actions. Leave it out.")
        s = detail_level(models) if detail is None else detail
        if not s:
            return path_ratios(models, x, generator, made_by)
        z = x.double() + s * randn(x.shape, generator, torch.empty((), dtype=torch.float64, device=x.device))
        return Referee(models, s, at_once(self.shape))(z, generator)

    def ratio_source(self, models: Sequence[BaseModel]) -> tuple[str, int]:
        s = detail_level(models)
        if not s:
            return super().ratio_source(models)[0], PATH
        return f"denoising errors, seen through noise of s_d={s:.2g},", MOST

    def store(self, models: Sequence[BaseModel], **options: Any) -> DiffusionStore:
        return DiffusionStore(models, **options)

    def compose(self, formula: Formula, models: Sequence[BaseModel], *how: Any) -> DiffusionComposition:
        return DiffusionComposition(formula, models, *how)

    def told(self, x: Tensor) -> Tensor:
        """Factors take the tensors themselves, so that gradients flow; of latents ``decode`` makes images."""
        return x

    # What a person looks at

    @property
    def decoder(self) -> Callable[[Tensor], Any] | None:
        if self.autoencoder is not None:
            return self.decode
        return pixels if len(self.shape) == 3 and self.shape[0] in (1, 3) else None

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "b *x"], batch_size: int = 8) -> Tensor:
        """Images in [0, 1] from latents and from pixels (one or three channels); anything else as it is."""
        if self.autoencoder is None:
            return x if self.decoder is None else self.decoder(x)
        config = self.autoencoder.config
        mean, std = (
            x.new_tensor(config.get(entry) or [otherwise])[:, None, None]
            for entry, otherwise in (("latents_mean", config.get("shift_factor") or 0.0), ("latents_std", 1.0))
        )
        x = (x * std / config.get("scaling_factor", 1.0) + mean).to(device_of(self.autoencoder), dtype_of(self.autoencoder))
        images = [self.autoencoder.decode(part).sample for part in x.split(batch_size)]
        return pixels(torch.cat(images).float())

    @property
    def facts(self) -> dict[str, str]:
        return super().facts | {"dtype": str(self.dtype).removeprefix("torch."), "s": f"{self.s_min:.3g} to {self.s_max:.3g}"}

    if TYPE_CHECKING:

        def __or__(self, other: BaseModel) -> DiffusionComposition: ...
        def __and__(self, other: BaseModel) -> DiffusionComposition: ...
        def __sub__(self, other: BaseModel) -> DiffusionComposition: ...


class GuidedDenoiser(Denoiser, Steered):
    r"""A posterior of base models as a denoiser, steered by a classifier: itself a base model again.

    .. math::
        \text{anchored:}\quad & D = D_{i_1} + v \, \nabla \log p(y_2 \dots y_n \mid z, y_1 = i_1) \\
        \text{mixture:}\quad & D = \sum_i p(y_1 = i \mid z) \, D_i + v \, \nabla \log p(y_1 \dots y_n \mid z)

    The anchored form runs one base network, and its chain can be corrected to be exact. It takes the classifier's field in place of the
    gradient where there is one. ``strength`` multiplies either.
    """

    def __init__(
        self,
        posterior: Posterior,
        models: Sequence[BaseModel],
        classifier: Guide,
        form: str = "anchored",
        strength: float = 1.0,
    ):
        self.posterior, self.operands, self.classifier, self.form = posterior, list(models), classifier, form
        self.guidance, self.strength = Guidance(classifier, posterior, form, strength), float(strength)
        self.anchor: Denoiser = self.operands[posterior.labels[0]]
        self.s_min, self.s_max = noise_range(self.operands)
        self.shape, self.autoencoder = self.anchor.shape, self.anchor.autoencoder
        self.start = self.anchor.start
        self.extrapolated = any(leaf.extrapolated for model in models for leaf in model.leaves)
        self.name = posterior.write(operand_names(models))
        self.road = f"classifier, {form} form" + ", field" * self.guidance.field

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.anchor.dtype

    def place(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        for model in self.operands:
            model.place(device, dtype)
        if isinstance(self.classifier, nn.Module):
            self.classifier.to(device)  # its heads keep their precision

    @property
    def key(self) -> str:
        classifier = weights(self.classifier) if isinstance(self.classifier, nn.Module) else type(self.classifier).__qualname__
        stronger = [self.strength] if self.strength != 1 else []
        return digest(
            "guided", self.posterior.identity, [model.key for model in self.operands], classifier, self.form, *stronger
        )

    def chain(self, settings: Settings) -> Chain:
        anchored = self.form == "anchored" and settings.solver is None
        return GuidedChain(self, settings) if anchored else super().chain(settings)

    def corrected(self, settings: Settings, densities: bool) -> Chain:
        if densities:
            raise ValueError("correct is True or False for diffusion, whose densities no road knows exactly, got 'densities'.")
        if settings.solver is not None:
            raise ValueError(
                f"correct=True needs the solver's own Gaussian kernel, and {type(settings.solver).__name__} gives none "
                "(a deterministic solver has no density at all). Leave solver out."
            )
        return GuidedChain(self, settings, corrected=True)

    def base(self, z: Float[Tensor, "N *x"], s: Tensor) -> Float[Tensor, "N *x"]:
        """The denoised image before guidance."""
        if self.form == "anchored":
            return self.anchor.denoise(z, s)
        p = self.classifier.marginal(z, s.expand(len(z))).exp().to(z)
        return sum(like(p[:, i], z) * model.denoise(z, s) for i, model in enumerate(self.operands))

    def denoise(self, z: Float[Tensor, "b *x"], s: Level) -> Float[Tensor, "b *x"]:
        s = level(s, z.device)
        return self.base(z, s) + self.guidance.added(z, s)

    @property
    def first(self) -> Denoiser:
        return self.anchor.first

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        classifier = (self.classifier,) if isinstance(self.classifier, nn.Module) else ()
        return *(network for model in self.operands for leaf in model.leaves for network in leaf.networks), *classifier

    def as_unet(self, scheduler: Any | None = None, network: nn.Module | None = None) -> DenoiserUNet:
        """The composition in the place of a diffusers network, see :meth:`DiffusionComposition.as_unet`."""
        return in_place(self, scheduler, network)
