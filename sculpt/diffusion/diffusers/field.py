"""A guidance field from a base model's own network, which has learned already what images look like at every noise level."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.settings import described, plain, read_schedule
from sculpt.diffusion.field import Field, nothing
from sculpt.diffusion.networks import unwrapped
from sculpt.entries import Entries
from sculpt.settings import check_settings

if TYPE_CHECKING:
    from sculpt.diffusion.denoiser import Denoiser

__all__ = ["NetworkField"]

KINDS = {"UNet2DModel": "conv_out", "DiTTransformer2DModel": "proj_out_2"}
"""Networks that take a sample, a time and at most a class -> their last layer."""

_TOLD: ContextVar[Tensor] = ContextVar("told")


class NetworkField(Field):
    """A UNet or transformer of diffusers as G. Its time embedding is told the composition; its last layer gives zero until it is trained.

    Args:
        m: base models.
        odds: whether log-odds are an input.
        std: the spread of the data.
        network: the configuration of a network of diffusers.
        scheduler: that of the scheduler of its training.
        label: of the class that it makes, where it has classes.
    """

    def __init__(
        self, m: int, odds: bool, std: float, network: dict[str, Any], scheduler: dict[str, Any], label: int | None = None
    ):
        super().__init__(m, odds, std)
        self.config = {"m": m, "odds": odds, "std": std, "network": network, "scheduler": scheduler, "label": label}
        self.label, name = label, network.get("_class_name")
        if name not in KINDS:
            raise ValueError(f"A field is one of {', '.join(KINDS)}, got a {name!s:.80}. Leave network out.")
        settings = Entries(plain(network), "the field's network")
        check_settings(settings, getattr(diffusers, name))
        self.network = getattr(diffusers, name).from_config(settings.found)
        nothing(getattr(self.network, KINDS[name]))
        self.embeddings = [at for at, module in self.network.named_modules() if isinstance(module, TimestepEmbedding)]
        for at in self.embeddings:
            self.network.set_submodule(at, _Told(self.network.get_submodule(at), self.told))
        self.schedule = read_schedule(scheduler.get("_class_name"), Entries(plain(scheduler), "the field's scheduler"))

    @staticmethod
    def fits(model: Denoiser) -> bool:
        """Whether a field can begin as this model's network: it is called with nothing but a sample, a time and at most a class."""
        network, condition = unwrapped(model.model), getattr(model, "condition", {})
        classes = getattr(network, "config", {}).get("num_class_embeds") is not None or "class_labels" in condition
        return (
            type(network).__name__ in KINDS
            and model.scheduler is not None
            and set(condition) == ({"class_labels"} if classes else set())
            and not model.extrapolated
        )

    @classmethod
    def of(cls, model: Denoiser, m: int, odds: bool, std: float) -> NetworkField:
        """A copy of this model's network, weights included.

        Args:
            model: whose network it is.
            m: base models.
            odds: whether log-odds are an input.
            std: the spread of the data.
        """
        if not cls.fits(model):
            raise ValueError(
                f"A field begins as one of {', '.join(KINDS)} that is called with a sample and a time alone, got {model} with a "
                f"{type(unwrapped(model.model)).__name__}. Leave network out for the default one."
            )
        network = unwrapped(model.model)
        label = next((int(value) for value in model.condition.values()), None)  # type: ignore[attr-defined]
        field = cls(m, odds, std, described(network), described(model.scheduler), label)
        own, last = field.network.state_dict(), KINDS[type(network).__name__]
        for name, value in network.state_dict().items():
            at = next((at for at in field.embeddings if name.startswith(f"{at}.")), None)
            name = name if at is None else f"{at}.inner.{name[len(at) + 1 :]}"
            if not name.startswith(f"{last}."):
                own[name].copy_(value)
        return field

    @classmethod
    def new(cls, shape: Sequence[int], m: int, odds: bool, std: float) -> NetworkField:
        """A small UNet for samples of this shape, which has learned nothing yet.

        Args:
            shape: channels, height and width.
            m: base models.
            odds: whether log-odds are an input.
            std: the spread of the data.
        """
        channels, *sides = shape
        halvings = next(k for k in (2, 1, 0) if all(side % 2**k == 0 and side >= 4**k for side in sides))
        unet = {
            "_class_name": "UNet2DModel",
            "sample_size": list(sides),
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": [32, 64, 96][: halvings + 1],
            "down_block_types": ["DownBlock2D"] * (halvings + 1),
            "up_block_types": ["UpBlock2D"] * (halvings + 1),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        }
        path = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        return cls(m, odds, std, unet, described(path))

    def G(self, z, s, told):
        s = s.clamp(self.schedule.s_min, self.schedule.s_max)
        dtype = next(self.network.parameters()).dtype
        x = (like(self.schedule.scale(s), z) * z).to(dtype)
        classes = {} if self.label is None else {"class_labels": torch.full((len(z),), self.label, device=z.device)}
        token = _TOLD.set(told)
        try:
            out = self.network(x, self.schedule.time(s), return_dict=False, **classes)[0]
        finally:
            _TOLD.reset(token)
        return out[:, : z.shape[1]]  # what may follow is a variance


class _Told(nn.Module):
    """A time embedding, and one of the composition added to it."""

    def __init__(self, inner: nn.Module, told: int, width: int = 64):
        super().__init__()
        self.inner = inner
        self.tell = nn.Sequential(nn.Linear(told, width), nn.SiLU(), nothing(nn.Linear(width, inner.linear_2.out_features)))

    def forward(self, *args: Any, **options: Any) -> Tensor:
        embedded: Tensor = self.inner(*args, **options)
        return embedded + self.tell(_TOLD.get().to(self.tell[0].weight.dtype)).to(embedded)
