"""Switches: what is active in a network that several models share. Adapters (LoRAs) and the scales of IP-Adapters go on for a call and back after it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sculpt.diffusion.networks import is_a, known_as, unwrapped
from sculpt.identity import digest

__all__ = ["Switches", "adapters_of"]


@dataclass(frozen=True)
class Switches:
    """The adapters that a model has, each with its scale in every layer, whatever is active in the network.

    Args:
        layers: of adapters: the layer's name, and (adapter, scale) for all that are on in it.
        images: of IP-Adapters: the attention processor's name, and its scales.
    """

    layers: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = ()
    images: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, network: Any) -> Switches:
        """As they are in the network now."""
        places = _places(network)
        layers = ((name, _active(layer)) for name, layer in places.layers.items())
        images = tuple((name, _frozen(processor.scale)) for name, processor in places.images.items())
        return cls(tuple((name, on) for name, on in layers if on), images)

    def with_adapters(self, network: Any, adapters: Mapping[str, float]) -> Switches:
        """The same with these adapters and no others, at these scales."""
        places, layers = _places(network), []
        for name, layer in places.layers.items():
            if layer.merged:
                raise ValueError(
                    f"{', '.join(layer.merged_adapters)}: fused into the weights of {type(network).__name__}, so it cannot be switched. "
                    "Call unfuse_lora() first."
                )
            before, on = dict(layer.scaling), []
            try:
                for adapter, scale in adapters.items():
                    if adapter in layer.scaling and scale:
                        layer.set_scale(adapter, scale)
                        on.append((adapter, float(layer.scaling[adapter])))
            finally:
                layer.scaling.update(before)
            layers.append((name, tuple(sorted(on))))
        return Switches(tuple((name, on) for name, on in layers if on), self.images)

    def also(self, network: Any, adapter: str) -> Switches:
        """The same with one adapter more, at its own scale."""
        layers = dict(self.layers)
        for name, layer in _places(network).layers.items():
            if adapter in layer.scaling:
                layers[name] = tuple(sorted((*layers.get(name, ()), (adapter, float(layer.scaling[adapter])))))
        return Switches(tuple(layers.items()), self.images)

    def put(self, network: Any) -> None:
        """Leave the network's adapters so."""
        for name, layer in _places(network).layers.items():
            if not layer.merged:
                _switch(layer, dict(self.layers).get(name, ()))

    @contextlib.contextmanager
    def on(self, network: Any) -> Iterator[None]:
        """Switch the network, and back at the end, an error included."""
        places = _places(network)
        if not places:
            yield
            return
        wanted, kept = dict(self.layers), []
        scales = [(places.images[name], places.images[name].scale, scale) for name, scale in self.images]
        try:
            for name, layer in places.layers.items():
                if layer.merged:  # a fused adapter is part of the weights
                    continue
                kept.append((layer, {k: vars(layer).get(k) for k in _SWITCHED}, dict(layer.scaling)))
                _switch(layer, wanted.get(name, ()))
            for processor, _, scale in scales:
                processor.scale = _thawed(scale)
            yield
        finally:
            for layer, before, scaling in kept:
                for k, value in before.items():
                    vars(layer).pop(k, None) if value is None else vars(layer).update({k: value})
                layer.scaling.update(scaling)
            for processor, before, _ in scales:
                processor.scale = before

    def known(self, network: Any, name: str | None, anonymous: str) -> Any:
        """What tells the network with these switches from others: its own weights, and those of the adapters that are on, with their scales."""
        places = _places(network)
        ours = {f"{place}.": layer for place, layer in places.layers.items()}
        inside = {
            f"{place}{part}.": (place, part)
            for place, layer in ours.items()
            for part in (*layer.adapter_layer_names, *layer.other_param_names)
        }

        def plain(key: str) -> str | None:
            """The key that it has where no adapters are loaded."""
            if any(key.startswith(prefix) for prefix in inside):
                return None
            return key.replace(".base_layer.", ".") if ours else key

        known = known_as(network, name, anonymous, plain if ours else None)
        if not self.layers and not self.images:
            return known
        return known, self._weights(places), self.images

    def _weights(self, places: _Places) -> list[Any]:
        found = []
        for name, on in self.layers:
            layer = places.layers[name]
            for adapter, scale in on:
                state = {
                    part: value.state_dict() if isinstance(value, nn.Module) else value
                    for part in layer.adapter_layer_names
                    if adapter in (held := getattr(layer, part)) and (value := held[adapter]) is not None
                }
                found.append((name, scale, digest(state)))
        return sorted(found)

    def adapters(self, network: Any) -> list[str]:
        """The names of those that are on."""
        return sorted({adapter for _, on in self.layers for adapter, _ in on})


def adapters_of(network: Any) -> set[str]:
    """The names of all adapters that are loaded into a network."""
    return {adapter for layer in _places(network).layers.values() for adapter in layer.scaling}


_SWITCHED = ("_active_adapter", "_disable_adapters")


def _switch(layer: Any, on: Sequence[tuple[str, float]]) -> None:
    vars(layer).update(zip(_SWITCHED, ([adapter for adapter, _ in on], not on), strict=True))
    layer.scaling.update(on)


@dataclass
class _Places:
    layers: dict[str, Any]
    images: dict[str, Any]

    def __bool__(self) -> bool:
        return bool(self.layers or self.images)


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, _Places, Any]] = weakref.WeakKeyDictionary()


def _places(network: Any) -> _Places:
    """Where a network can be switched, looked up anew only after adapters were loaded or taken out."""
    if not isinstance(network, nn.Module):
        return _Places({}, {})
    network = unwrapped(network)
    loaded = getattr(network, "peft_config", None) or {}
    images = getattr(network, "encoder_hid_proj", None), getattr(network, "image_proj", None)
    if not loaded and images == (None, None):
        return _Places({}, {})
    stamp = *((name, id(config)) for name, config in loaded.items()), *map(id, images)
    if network not in _KNOWN or _KNOWN[network][0] != stamp:
        layers = {n: m for n, m in network.named_modules() if is_a(m, "BaseTunerLayer") and hasattr(m, "scaling")}
        processors = getattr(network, "attn_processors", {})
        held = {n: p for n, p in processors.items() if "IPAdapter" in type(p).__name__ and hasattr(p, "scale")}
        # As long as these are kept, no others get their ids.
        _KNOWN[network] = stamp, _Places(layers, held), (*loaded.values(), *images)
    return _KNOWN[network][1]


def _active(layer: Any) -> tuple[tuple[str, float], ...]:
    if layer.disable_adapters or layer.merged:
        return ()
    return tuple(sorted((name, float(layer.scaling[name])) for name in layer.active_adapters if name in layer.scaling))


def _frozen(scale: Any) -> Any:
    return tuple(map(_frozen, scale)) if isinstance(scale, (list, tuple)) else scale


def _thawed(scale: Any) -> Any:
    return list(map(_thawed, scale)) if isinstance(scale, tuple) else scale
