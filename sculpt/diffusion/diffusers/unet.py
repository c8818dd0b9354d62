"""A denoiser in the place of a diffusers network: in the coordinates, the time and the prediction type of any scheduler."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.diffusion.diffusers.place import Place, place_of
from sculpt.diffusion.diffusers.prediction import Prediction
from sculpt.diffusion.networks import is_a, unwrapped

__all__ = ["DenoiserUNet"]


class DenoiserUNet(ModelMixin, ConfigMixin):
    """``(sample, timestep) -> output`` for a scheduler's own loop, or for a pipeline: ``pipe.unet = ...``, ``pipe.transformer = ...``.

    It is called as the network that it takes the place of, and has its configuration, its attributes and its methods. What a pipeline
    passes beside x and t, the embedded prompt among it, is ignored: the base models bring their own conditions. So a guidance scale of the
    pipeline has no effect. It doubles the batch or the calls, and both halves get the same answer, made once.

    A denoiser may remember the path (:class:`~sculpt.diffusion.solved.Remembering`). It begins anew where the noise rises, where the number
    of samples changes, and where the scheduler has got new times. Nothing is saved with this: save the base models instead.

    Where a pipeline moves it to another device or precision, it takes networks of its own there, and the base models stay what they are.
    What stays where it is, is not copied.

    Args:
        denoiser: anything with ``denoise``, ``first``, ``networks``, ``shape``, ``s_min``, ``s_max``, ``device`` and ``dtype``; a composition has
            ``operands``, too.
        scheduler: the one of the loop.
        network: the one it takes the place of; by default the first base model's.
    """

    def __init__(self, denoiser: Any, scheduler: Any, network: nn.Module | None = None):
        super().__init__()
        network = denoiser.first.model if network is None else network
        self.fresh, self.scheduler, self.predict = denoiser, scheduler, Prediction(denoiser, scheduler)
        self.place = place_of(denoiser.first, network) if isinstance(network, nn.Module) else Place()
        # Where a pipeline moves its network, it moves these.
        self.networks = nn.ModuleList(
            dict.fromkeys([*denoiser.networks, *([network] if isinstance(network, nn.Module) else [])])
        )
        self.borrowed = all(model.networks for model in _bases(denoiser)) and not _wrapped(self.networks)
        self.register_to_config(**_config(unwrapped(network), denoiser.shape))
        self.restart()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not len(networks := self.__dict__["_modules"].get("networks", ())):
                raise
            return getattr(unwrapped(networks[0]), name)

    @property
    def denoiser(self) -> Any:
        """What answers, with what it remembers of this run."""
        return self.predict.denoiser

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DenoiserUNet:
        """What ``.to()``, ``.half()`` and the like do to all tensors."""
        if self.borrowed:
            old = [*self.networks.parameters(), *self.networks.buffers()]
            new = [fn(tensor.detach()) for tensor in old]
            if any((p.dtype, p.device) != (q.dtype, q.device) for p, q in zip(old, new, strict=True)):
                self._take(old, new)
                return self
        return super()._apply(fn, recurse)

    def _take(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Go on with networks of its own, which have the new tensors in the place of the old ones."""
        shared = (model.autoencoder for model in _bases(self.fresh))
        memo: dict[int, Any] = {id(one): one for one in (self.fresh.autoencoder, *shared, self.scheduler)}
        for p, q in zip(old, new, strict=True):
            memo[id(p)] = nn.Parameter(q, p.requires_grad) if isinstance(p, nn.Parameter) else q
        self.fresh, self.networks, self.borrowed = *copy.deepcopy((self.fresh, self.networks), memo), False
        self.restart()

    def restart(self) -> None:
        """Begin a new run: forget the path."""
        self.predict.denoiser = copy.copy(self.fresh)
        self.level, self.times = float("inf"), getattr(self.scheduler, "timesteps", None)
        self.asked: tuple[Tensor, Tensor, Tensor] | None = None

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        raise ValueError(
            f"{self.denoiser} is no network with weights of its own, so neither it nor a pipeline around it can be saved. Without it, what a "
            "pipeline has written of its other parts is of no use. Save the pipelines of the base models, and compose them again; or make one "
            "network of it: sculpt.distill(composition, checkpoint=folder) writes a folder of diffusers."
        )

    def forward(self, *args: Any, return_dict: bool = True, **options: Any) -> UNet2DOutput | tuple[Any]:
        came, t = self.place.read(args, options)
        x = torch.cat([self._samples(part[None]) for part in came]) if isinstance(came, list) else self._samples(came)
        n = _distinct(x, t)
        F = self._answer(x[:n], t[:n] if t.ndim else t) * self.place.sign
        F = F.repeat(len(x) // n, *(1,) * (x.ndim - 1)) if n < len(x) else F
        # In the shape in which the samples came, without channels that were none of theirs; no variance is learned.
        shape = (-1, *came[0].shape[1:]) if self._has_more(came[0]) else came[0].shape
        F = F.reshape(len(F), *shape)
        F = torch.cat([F] + [torch.zeros_like(F)] * (self.place.answers - 1), dim=1)
        answer = list(F) if isinstance(came, list) else F
        return UNet2DOutput(sample=answer) if return_dict else (answer,)

    def _answer(self, sample: Float[Tensor, "n *x"], t: Tensor) -> Float[Tensor, "n *x"]:
        """What the scheduler wants of the network. Asked twice for the same, as by guidance in two calls, it answers from memory."""
        t = t.flatten()[0] if t.ndim and (t == t.flatten()[0]).all() else t
        if self.asked is not None and _same(self.asked[:2], (t, sample)):
            return self.asked[2]
        self._begun(float(self.predict.level(t).max()), len(sample))
        F = self.predict(sample, t)
        self.asked = None if F.requires_grad else (t, sample.clone(), F)
        return F

    def _begun(self, s: float, n: int) -> None:
        """Notice a new run."""
        renewed = getattr(self.scheduler, "timesteps", None) is not self.times
        if renewed or s > self.level or (self.asked is not None and len(self.asked[1]) != n):
            self.restart()
        self.level = s

    def _has_more(self, sample: Tensor) -> bool:
        """Whether there are channels behind the sample's own: masks, images."""
        shape = tuple(self.denoiser.shape)
        return sample.ndim == len(shape) and sample.shape[1:] == shape[1:] and sample.shape[0] > shape[0]

    def _samples(self, came: Tensor) -> Float[Tensor, "n *x"]:
        """The samples, in their own shape."""
        shape = tuple(self.denoiser.shape)
        x = came[:, : shape[0]] if self._has_more(came[0]) else came
        if x[0].numel() != math.prod(shape):
            raise ValueError(
                f"The composition makes samples of shape {shape}, the pipeline wants {tuple(x.shape[1:])}. Make its base models with "
                "shape=, or ask the pipeline for their size (height=, width=)."
            )
        return x.reshape(len(x), *shape)


def _bases(denoiser: Any) -> list[Any]:
    """The pretrained models that answer."""
    return [leaf for model in getattr(denoiser, "operands", [denoiser]) for leaf in model.leaves]


def _wrapped(networks: nn.ModuleList) -> bool:
    """Whether some are called by way of others, as where their weights are offloaded: a copy would not be."""
    return any("forward" in vars(module) for module in networks.modules())


def _config(network: Any, shape: Sequence[int]) -> dict[str, Any]:
    """What pipelines read of the network: its configuration, where it has one."""
    channels, *size = shape
    square = len(size) == 2 and size[0] == size[1]
    own = {"in_channels": channels, "out_channels": channels, "sample_size": size[0] if square else tuple(size)}
    return {**own, **network.config} if is_a(network, "ModelMixin") else own


def _distinct(x: Float[Tensor, "b *x"], t: Tensor) -> int:
    """How many of these samples there are once guidance has repeated them."""
    for k in (k for k in (4, 3, 2) if len(x) % k == 0):
        n = len(x) // k
        if all(torch.equal(whole, whole[:n].repeat(k, *(1,) * (whole.ndim - 1))) for whole in ([x, t] if t.ndim else [x])):
            return n
    return len(x)


def _same(known: Sequence[Tensor], asked: Sequence[Tensor]) -> bool:
    return all(p.shape == q.shape and p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(known, asked, strict=True))
