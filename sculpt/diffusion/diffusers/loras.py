"""Adapters (LoRAs) that are trained: merged into a network of their own, or beside the others in a pipeline's."""

from __future__ import annotations

import copy
import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sculpt.diffusion.diffusers.students import DenoisingStudent
from sculpt.diffusion.diffusers.switches import Switches, adapters_of
from sculpt.diffusion.diffusers.watch import networks
from sculpt.diffusion.networks import unwrapped
from sculpt.training import halved

if TYPE_CHECKING:
    from sculpt.diffusion.diffusers.adapter import Diffusion

__all__ = ["LoraStudent"]

RANK = 16
"""of an adapter, unless the caller says otherwise"""
NAME = "distilled"


class LoraStudent(DenoisingStudent):
    """Of an anchor whose network a pipeline calls: one LoRA more in that network, which is on for this model alone.

    The anchor keeps its prompt and its other adapters; the pipeline itself goes on as before.
    """

    def begin(self) -> None:
        called = {id(call.network): call.network for call in self.anchor._calls()}
        if len(called) > 1 or not hasattr(network := unwrapped(next(iter(called.values()))), "add_adapter"):
            names = " and ".join(type(unwrapped(one)).__name__ for one in called.values())
            raise ValueError(
                f"A student of {self.anchor} is a LoRA in its network, and {names} cannot hold one. Anchor on another model."
            )
        self.parent, self.lora, taken = network, self.lora or RANK, adapters_of(network)
        self.adapter = next(name for k in itertools.count(1) if (name := NAME if k == 1 else f"{NAME}{k}") not in taken)
        self.before = _Before.of(network)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed)
                self.network = _added(network, self.adapter, self.lora)
            for parameter in self.before.learned:  # whoever else trains in this network goes on afterwards
                parameter.requires_grad_(False)
            self.student = _beside(self.anchor, self.adapter, str(self.composition))
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        self.before.without(self.adapter)

    def check_saving(self) -> None:
        if not hasattr(self.anchor.pipeline.pipe, "save_lora_weights"):
            raise ValueError(
                f"{self.anchor.pipeline.kind} of diffusers has no save_lora_weights, and so no place for a LoRA on disk. Leave checkpoint "
                "out: the model then lives in its pipeline."
            )

    @torch.no_grad()
    def graduate(self, network: nn.Module) -> Diffusion:
        for own, learned in zip(self.network.parameters(), halved(copy.deepcopy(network)).parameters(), strict=True):
            own.copy_(learned).requires_grad_(False)
        self.before.learn_on()
        return self.student

    def save(self, model: Any, folder: Path) -> None:
        """The LoRA alone, as pipelines of diffusers read it."""
        from peft import get_peft_model_state_dict

        pipe = self.anchor.pipeline.pipe
        (part,) = (name for name, one in networks(pipe).items() if unwrapped(one) is self.parent)
        found = get_peft_model_state_dict(self.parent, adapter_name=self.adapter)
        layers = {name: value.cpu().half().contiguous() for name, value in found.items()}
        type(pipe).save_lora_weights(folder, **{f"{part}_lora_layers": layers})

    def usage(self, name: str) -> str:
        before = sorted({adapter for call in self.anchor._calls() for adapter in call.switches.adapters(call.network)})
        beside = f"  # beside what its anchor has: {', '.join(before)}" if before else ""
        call = ", ".join(
            f"{key}={value!r}" for key, value in self.anchor.pipeline.call.items() if isinstance(value, (str, float, int))
        )
        return (
            f"pipe.load_lora_weights({name!r}, adapter_name={name!r})  # a {self.anchor.pipeline.kind}\n"
            f"model = sculpt.Diffusion.from_pipeline(pipe, {call}).with_adapters({{{name!r}: 1.0}}){beside}\n"
            "samples = model.sample(4)"
        )


@dataclass(frozen=True)
class _Before:
    """A network as it was before it got another adapter."""

    network: Any
    learned: dict[nn.Parameter, bool]
    """whether they learned"""
    layers: set[nn.Module]
    """that held adapters"""
    switches: Switches

    @classmethod
    def of(cls, network: nn.Module) -> _Before:
        """As it is now."""
        learned = {parameter: parameter.requires_grad for parameter in network.parameters()}
        return cls(network, learned, {layer for _, layer in _layers(network)}, Switches.of(network))

    def learn_on(self) -> None:
        """Let learn what did."""
        for parameter, learns in self.learned.items():
            parameter.requires_grad_(learns)

    def without(self, adapter: str) -> None:
        """Take this adapter out, even where it is in some layers only, and leave no trace of it."""
        for name, layer in _layers(self.network):
            if layer in self.layers:
                layer.delete_adapter(adapter)
            else:
                self.network.set_submodule(name, layer.get_base_layer())
        configs = getattr(self.network, "peft_config", {})
        configs.pop(adapter, None)
        if not configs:
            vars(self.network).pop("peft_config", None)
            self.network._hf_peft_config_loaded = False
        self.switches.put(self.network)
        self.learn_on()


def _layers(network: nn.Module) -> list[tuple[str, Any]]:
    """Layers that hold adapters, and their names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)]


def _added(network: nn.Module, adapter: str, rank: int) -> nn.ParameterList:
    """Put a LoRA at each matrix and convolution, which changes nothing yet and stays off; its numbers."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    before, others = Switches.of(network), set(network.parameters())
    held = tuple(f"{name}." for name, _ in _layers(network))
    kinds = (nn.Linear, nn.Conv2d, BaseTunerLayer)
    targets = [name for name, one in network.named_modules() if isinstance(one, kinds) and not name.startswith(held)]
    with warnings.catch_warnings(action="ignore"):  # that there are adapters already
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter)  # type: ignore[operator]
    before.put(network)
    own = (parameter for parameter in network.parameters() if parameter not in others)
    return nn.ParameterList(own).float().requires_grad_(True)


def _beside(model: Diffusion, adapter: str, name: str) -> Diffusion:
    """The same model with one adapter more."""
    new = copy.copy(model)
    new.name, new._given_name = name, name
    new._stages = tuple(stage.switched(lambda switches, network: switches.also(network, adapter)) for stage in model._stages)
    return new
