r"""A composition of diffusion models, distilled into one network.

The student begins as the anchor's network, in its schedule and prediction type, and regresses samples x of the composition, each as often
as its weight says, from :math:`z = x + s \varepsilon`:

.. math:: \text{loss} = (1 + \sigma^2 / s^2) \, |D(z, s) - x|^2 / \sigma^2

with :math:`\sigma` the spread of the samples. Samples are drawn once, by any road, and are part of the training's state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sculpt.bars import bar
from sculpt.checks import check_whole, real, whole
from sculpt.classifier.guide import Guide
from sculpt.classifier.heads import Classifier
from sculpt.diffusion.clock import like, noise_range, spread
from sculpt.diffusion.diffusers.switches import Switches
from sculpt.diffusion.networks import is_a, unwrapped
from sculpt.diffusion.regression import stratified
from sculpt.diffusion.twosample import two_sample_test
from sculpt.distillation import Student
from sculpt.identity import digest
from sculpt.model import BaseModel, randn
from sculpt.roads import as_road
from sculpt.samples import Samples
from sculpt.training import Kept, Row, halved

if TYPE_CHECKING:
    from sculpt.diffusion.diffusers.adapter import Diffusion

__all__ = ["DenoisingStudent", "Drawn", "renewed"]

SMALL = 64
"""Numbers of a sample, up to which samples are cheap, kept in single precision and compared as they are."""
CHUNK = 250
"""Larger samples that are drawn at once."""
HELD_OUT = 0.1
"""The share of the samples that nothing is trained on: the student is compared with them."""


class Drawn:
    """Samples of a composition with their log-weights: what a training keeps of them."""

    def __init__(self) -> None:
        self.x, self.log_w = torch.empty(0), torch.empty(0, dtype=torch.float64)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Both tensors."""
        return {"x": self.x, "log_w": self.log_w}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], /) -> None:
        """Take them back."""
        x, log_w = state_dict["x"], state_dict["log_w"]
        if log_w.shape != x.shape[:1] or not (x.isfinite().all() and (log_w < math.inf).all()):
            raise ValueError("its samples have no weights, or are no numbers")
        self.x, self.log_w = x, log_w


class DenoisingStudent(Student):
    """Of an anchor with a network of its own, which is called with a sample, a time and constant conditions.

    Args:
        composition: what it is to be.
        anchor: whose network it begins as.
        road: how the composition is sampled.
        batch_size: samples a step; by default 256 small ones or 64 large ones.
        seed: of drawing.
        samples: how many to draw; by default 20,000 small ones or 5,000 large ones.
        sample_steps: of drawing them.
        data: samples of the composition instead, as a tensor, or as ``Samples`` with their weights.
        lora: the rank of adapters that are trained in place of the whole network, and merged into it in the end.
        judge: from samples (b, \\*x) to numbers by name, for the card.
        compare: how many fresh samples of student, anchor and target are compared at most; by default 2,000 small ones or 500 large ones.
    """

    learning_rate = 3e-4

    def __init__(
        self,
        composition: BaseModel,
        anchor: Diffusion,
        road: Any,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        samples: int | None = None,
        sample_steps: int | None = None,
        data: Tensor | Samples | None = None,
        lora: int | None = None,
        judge: Callable[[Tensor], Mapping[str, float]] | None = None,
        compare: int | None = None,
    ):
        self.composition, self.anchor, self.road, self.seed, self.judge = composition, anchor, as_road(road), seed, judge
        small = math.prod(anchor.shape) <= SMALL
        self.batch_size, self.steps = batch_size or (256 if small else 64), 8000 if small else 4000
        self.samples = whole("samples", samples or (20_000 if small else 5_000), least=20)
        self.sample_steps, self.lora = check_whole("sample_steps", sample_steps, least=2), check_whole("lora", lora)
        self.drawn, self.data, self.small = Drawn(), data, small
        self.compare = whole("compare", compare or (2000 if small else 500), least=2)
        if data is None:
            self.road.check(composition)  # type: ignore[arg-type]
        else:
            self._take(data)
        self.begin()

    def begin(self) -> None:
        """Make the network that learns, and the model that it is."""
        network = copy.deepcopy(unwrapped(self.anchor.model)).float().requires_grad_(True)
        self.network = network if self.lora is None else with_lora(network, self.lora)
        self.student = renewed(self.anchor, self.network, str(self.composition))

    @property
    def identity(self) -> dict[str, Any]:
        source = self.road.identity if self.data is None else {"data": digest(self.drawn.x, self.drawn.log_w)}
        sizes = {"batch_size": self.batch_size, "lora": self.lora, "samples": self.samples, "sample_steps": self.sample_steps}
        return {"anchor": self.anchor.key, "source": source, **sizes}

    @property
    def kept(self) -> Mapping[str, Kept]:
        return {"drawn": self.drawn} if self.data is None else {}

    def check_saving(self) -> None:
        if not is_a(unwrapped(self.anchor.model), "ModelMixin"):
            raise ValueError(
                f"{self.anchor} has a {type(unwrapped(self.anchor.model)).__name__} for a network, which is not from diffusers: nothing could "
                "read it back. Leave checkpoint out, and save the model's network yourself."
            )

    def prepare(self, progress: bool) -> None:
        if not len(self.drawn.x):
            self._draw(progress)
        x, log_w = self.drawn.x, self.drawn.log_w
        k = max(10, int(HELD_OUT * len(x)))
        self.held_out, self.x, self.p = (x[:k], log_w[:k]), x[k:], torch.softmax(log_w[k:], 0)
        mean = self.p @ self.x.flatten(1).double()
        self.std = float((self.p @ (self.x.flatten(1).double() - mean).square()).mean().sqrt().clamp(min=1e-6))

    def _draw(self, progress: bool) -> None:
        """Chunks of samples, each with a seed of its own; those of a population count by its share of all."""
        most = self.road.selection.particles if self.road.selection is not None else None
        size = min(self.samples if self.small else CHUNK, most or self.samples)
        x, log_w = [], []
        for k in bar(range(-(-self.samples // size)), f"sampling {self.composition}", -(-self.samples // size), show=progress):
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + k)
            found = self.composition.sample(size, self.road, steps=self.sample_steps, generator=generator, progress=False)
            x.append(found.x.cpu().float() if self.small else found.x.cpu().half())
            log_w.append(_log_weights(found))
        whole = torch.cat(x), torch.cat(log_w)
        order = torch.randperm(len(whole[0]), generator=torch.Generator().manual_seed(self.seed))
        self.drawn.x, self.drawn.log_w = whole[0][order][: self.samples], whole[1][order][: self.samples]

    def _take(self, data: Tensor | Samples) -> None:
        """Samples of the caller's."""
        x = data.x if isinstance(data, Samples) else data
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) != self.anchor.shape or len(x) < 20:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"data holds 20 samples or more of shape {self.anchor.shape}, got {got}.")
        if not x.isfinite().all():
            raise ValueError("data has entries that are not finite numbers.")
        log_w = _log_weights(data) if isinstance(data, Samples) else torch.zeros(len(x), dtype=torch.float64)
        self.drawn.x, self.drawn.log_w, self.samples = x.detach().cpu(), log_w, len(x)

    def loss(self, seed: int) -> tuple[Tensor, Row]:
        generator, device, n = torch.Generator().manual_seed(seed), self.anchor.device, self.batch_size
        x = self.x[torch.multinomial(self.p, n, True, generator=generator)].to(device).float()
        s = spread(stratified(n, generator), *noise_range([self.anchor]), self.std).to(device)
        z = x + like(s, x) * randn(x.shape, generator, x)
        error = (self.student.denoise(z, s) - x).flatten(1).double().square().mean(1)
        return ((1 / s**2 + 1 / self.std**2) * error).mean(), {}

    def graduate(self, network: nn.Module) -> Diffusion:
        network = copy.deepcopy(network) if self.lora is None else without_lora(copy.deepcopy(network))
        return renewed(self.anchor, halved(network).eval().requires_grad_(False), str(self.composition))

    def measure(self, model: BaseModel, generator: torch.Generator) -> Row:
        x, log_w = self.held_out
        n = min(len(x), self.compare)
        target = x[torch.multinomial(torch.softmax(log_w, 0), n, True, generator=generator)].float()
        own, anchor = (
            one.sample(n, steps=self.sample_steps, generator=generator, progress=False).x.cpu().float()
            for one in (model, self.anchor)
        )
        sets = {"student": own, "target": target, "anchor": anchor}
        features = {name: self._features(part) for name, part in sets.items()}
        row: Row = {"samples to learn from": len(self.x), "samples compared": n}
        for name in ("student", "anchor"):
            discrepancy, p = two_sample_test(features[name], features["target"], generator)
            row[f"{name} and target: MMD²"], row[f"{name} and target: p"] = discrepancy, p
        if self.judge is not None:
            judged = {name: self.judge(part) for name, part in sets.items()}
            for what in judged["student"]:
                for name in sets:
                    row[f"{name}: {what}"] = real(what, judged[name][what])
        return row

    @torch.no_grad()
    def _features(self, x: Tensor) -> Float[Tensor, "n d"]:
        """What samples are compared by: themselves, or where they are large what the road's classifier sees in them."""
        guide: Guide | None = getattr(self.road, "classifier", None)
        if self.small or not isinstance(guide, Classifier):
            return x.flatten(1)
        device = next(guide.parameters()).device
        return torch.cat([guide.network(part.to(device)).float().cpu() for part in x.split(CHUNK)])

    def save(self, model: BaseModel, folder: Path) -> None:
        """A folder of diffusers, in half precision; one that ``DDPMPipeline`` reads where it would sample so."""
        import diffusers

        assert is_a(model, "Diffusion")
        network = copy.deepcopy(unwrapped(model.model)).cpu().half()  # type: ignore[attr-defined]
        scheduler, autoencoder = model.scheduler, model.autoencoder  # type: ignore[attr-defined]
        if (
            isinstance(network, diffusers.UNet2DModel)
            and isinstance(scheduler, diffusers.DDPMScheduler)
            and autoencoder is None
        ):
            diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder)
            return
        network.save_pretrained(folder / ("unet" if "UNet" in type(network).__name__ else "transformer"))
        scheduler.save_pretrained(folder / "scheduler")
        if autoencoder is not None:
            autoencoder.save_pretrained(folder / "vae")


def renewed(model: Diffusion, network: nn.Module, name: str) -> Diffusion:
    """The same model with another network of the same kind."""
    new = copy.copy(model)
    new.model, new.name, new._given_name = network, name, name
    new._switches = Switches.of(network)
    new.build()
    return new


def _log_weights(samples: Samples) -> Float[Tensor, "n"]:
    """Of samples whose population stands for its own Z; those without weights count one each."""
    if samples.log_weights is None:
        return torch.zeros(len(samples.x), dtype=torch.float64)
    return samples.log_weights.cpu().double() + math.log(len(samples.x)) + (samples.log_z or 0.0)


# Adapters


def with_lora(network: nn.Module, rank: int) -> nn.Module:
    """The network with an adapter of this rank at each of its matrices and convolutions; nothing else is trained."""
    import peft

    targets = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    network.requires_grad_(False)
    return peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)


def without_lora(network: nn.Module) -> nn.Module:
    """The network with its adapters, where it has some, merged into its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            network.set_submodule(name, layer.get_base_layer())
    return network
