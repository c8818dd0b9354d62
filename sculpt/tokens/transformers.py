"""The border to transformers: causal language models with their caches and adapters, and their folders.

A folder has to hold safetensors, and every JSON file is checked before the library sees it: nothing in it is unpickled or executed, and
classes are the library's own, named by ``model_type``.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from sculpt.blueprint import draw
from sculpt.checks import real
from sculpt.entries import Entries, read_json
from sculpt.identity import weights
from sculpt.settings import check_settings, check_tokenizer, clear, known
from sculpt.tokens.networks import Network
from sculpt.weights import Weights, check_plain, check_weights

__all__ = ["CausalNetwork", "Facts", "facts", "read_folder"]

TYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
POSITIONS = ("n_positions", "max_position_embeddings", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class Facts:
    """What a model says of itself; ``None`` where it does not."""

    width: int | None = None
    begin: int | None = None
    end: int | list[int] | None = None
    max_length: int | None = None
    """of a sequence with its prompt"""


def facts(model: Any) -> Facts:
    """Of a causal language model of transformers; of anything else there are none."""
    if not _is_a(model, "PreTrainedModel") and not _is_a(model, "PeftModel"):
        return Facts()
    model = _inner(model)
    if not hasattr(model, "generation_config") or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is no causal language model. Load one with transformers' AutoModelForCausalLM."
        )
    config = model.config.get_text_config(decoder=True)
    told = lambda name: next((v for c in (model.generation_config, config) if (v := getattr(c, name, None)) is not None), None)  # noqa: E731
    return Facts(config.vocab_size, told("bos_token_id"), told("eos_token_id"), told("max_length"))


def _is_a(thing: Any, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(thing).__mro__)


def _inner(model: Any) -> Any:
    """The model that peft has put adapters into."""
    if not _is_a(model, "PeftModel"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(model).__name__} learns its prompt; adapters in the layers (LoRA) can be composed. Pass a model with those."
        )
    return model.get_base_model()


class CausalNetwork(Network):
    """A model of transformers, with some of its adapters active.

    Args:
        model: a ``...ForCausalLM``, or what peft made of one.
        adapters: which of its adapters, and how much each counts; by default those that are active now.
    """

    pads = spare = True

    def __init__(self, model: Any, adapters: Mapping[str, float] | None = None):
        self.model = _inner(model)
        self.layers = [part for part in self.model.modules() if hasattr(part, "active_adapters") and hasattr(part, "scaling")]
        self.adapters = _active(self.layers) if adapters is None else self._known(adapters)
        config = self.model.config.get_text_config(decoder=True)
        found = [getattr(config, name, None) for name in POSITIONS]
        self.positions = min((n for n in found if isinstance(n, int) and n > 0), default=None)
        self._takes = {*inspect.signature(self.model.forward).parameters}

    def _known(self, adapters: Mapping[str, float]) -> dict[str, float]:
        loaded = {name for layer in self.layers for name in layer.scaling}
        if missing := [name for name in adapters if name not in loaded]:
            raise ValueError(
                f"{type(self.model).__name__} has no adapter {missing[0]!r:.80}; it has {', '.join(sorted(loaded)) or 'none'}. Load it first: "
                "model.load_adapter(folder, adapter_name=...)."
            )
        return {name: real("an adapter's weight", weight) for name, weight in adapters.items()}

    def with_adapters(self, adapters: Mapping[str, float]) -> CausalNetwork:
        """The same network with these active."""
        new = copy.copy(self)
        new.adapters = self._known(adapters)
        return new

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return next(self.model.parameters()).device

    @property
    def identity(self) -> Any:
        return weights(self.model), sorted(self.adapters.items())

    @property
    def same(self) -> Any:
        return id(self.model), tuple(sorted(self.adapters.items()))

    @cached_property
    def remembers(self) -> bool:
        """Whether all of what it keeps is keys and values."""
        with torch.no_grad(), self._switched():
            cache, one = self._cache(None), torch.ones(1, 1, dtype=torch.long, device=self.device)
            try:
                self.model(input_ids=one - 1, attention_mask=one, past_key_values=cache, use_cache=True)
            except Exception:  # whatever a model with another kind of memory says
                return False
        return bool(cache.layers) and all(
            type(layer).__name__ == "DynamicLayer" and layer.is_initialized for layer in cache.layers
        )

    def __call__(self, tokens: Int[Tensor, "b t"], cache: Any, last: bool = False) -> tuple[Float[Tensor, "b k v"], Any]:
        before, layers = (None, None) if cache is None else cache
        there = tokens >= 0
        if layers is not None:
            past = there.new_ones(len(there), layers[0][0].shape[-2]) if before is None else before
            there = torch.cat([past, there], 1)
        padded = before is not None or (layers is None and not bool(there.all()))
        given: dict[str, Any] = {"input_ids": tokens.clamp(min=0), "attention_mask": there.long(), "use_cache": self.remembers}
        if self.remembers:
            given["past_key_values"] = self._cache(layers)
        if padded and "position_ids" in self._takes:
            given["position_ids"] = (there.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        if last and "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        with self._switched():
            logits = self.model(**given).logits
        kept = (
            (there if padded else None, tuple((layer.keys, layer.values) for layer in given["past_key_values"].layers))
            if self.remembers
            else None
        )
        return logits[:, -1:] if last else logits, kept

    def _cache(self, layers: Any) -> Any:
        cache = importlib.import_module("transformers").DynamicCache()
        for keys, values in layers or ():
            layer = cache.layer_class_to_replicate()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # an update would copy them
            cache.layers.append(layer)
        return cache

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        """With this network's adapters and no others, for as long as it is asked."""
        if not self.layers or self.adapters == _active(self.layers):
            yield
            return
        before = [(layer, layer._active_adapter, layer._disable_adapters, dict(layer.scaling)) for layer in self.layers]
        try:
            for layer in self.layers:  # by hand: peft's own methods would change what is trained
                layer._active_adapter, layer._disable_adapters = [*self.adapters], not self.adapters
                for name, weight in self.adapters.items():
                    layer.set_scale(name, weight)
            yield
        finally:
            for layer, active, disabled, scaling in before:
                layer._active_adapter, layer._disable_adapters = active, disabled
                layer.scaling.update(scaling)


def _active(layers: list[Any]) -> dict[str, float]:
    """The adapters that are active, and how much each counts."""
    found: dict[str, float] = {}
    for layer in layers:
        if layer.disable_adapters:
            continue
        for name in layer.active_adapters:
            if name in layer.scaling and name not in found:
                now = layer.scaling[name]
                layer.set_scale(name, 1.0)
                one, layer.scaling[name] = layer.scaling[name], now
                found[name] = now / one if one else 0.0
    return found


# Folders


def read_folder(folder: Path, device: Any = None, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer; ``None`` where the folder has none.

    Args:
        folder: as ``save_pretrained`` writes it.
        device: where the model goes.
        dtype: of its numbers.
    """
    try:
        library = importlib.import_module("transformers")
    except ImportError:
        raise ImportError(
            f"{folder} holds a language model, which is read with transformers: pip install transformers"
        ) from None
    check_plain(folder)
    config, files = (
        Entries(read_json(folder / "config.json", "language model"), str(folder / "config.json")),
        check_weights(folder),
    )
    cls, described = _described(library, config)
    stored = Weights(files[0])
    for path in files[1:]:
        stored.shapes |= Weights(path).shapes
    drawn = draw(lambda: cls(copy.deepcopy(described)), stored, f"the {cls.__name__}")
    for name, value in drawn.state_dict().items():
        if (got := stored.shapes.get(name, value.shape)) != value.shape:
            raise _misfit(folder, cls, f"{name:.200} is {tuple(got)!s:.200}, expected {tuple(value.shape)!s:.200}")
    generation, tokenizer = _generation(library, folder), _tokenizer(library, folder)
    with clear(f"{folder} does not hold the {cls.__name__} that its config.json describes"):
        tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
        told = TYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "auto")
        with _silent(library.utils.logging):
            model, info = cls.from_pretrained(
                None, config=described, state_dict=tensors, dtype=dtype or told, output_loading_info=True
            )
    if missing := info["missing_keys"]:
        raise _misfit(folder, cls, f"{len(missing)} are missing, {min(missing)} among them")
    if wrong := next((name for name, value in model.named_parameters() if not value.isfinite().all()), None):
        raise _misfit(folder, cls, f"{wrong} holds numbers that are not finite")
    model.generation_config = generation or model.generation_config
    return model.to(device=device).eval().requires_grad_(False), tokenizer


@contextlib.contextmanager
def _silent(log: Any) -> Iterator[None]:
    """Without a bar for what takes a moment."""
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def _described(library: Any, config: Entries) -> tuple[Any, Any]:
    """The class of a model and its configuration, both the library's own."""
    kind = config.text("model_type", most=100)
    if config.get("quantization_config") is not None:
        raise config.refuse(
            "quantization_config", "none: dequantize the weights with the library that wrote them, and save that"
        )
    if (
        kind not in library.CONFIG_MAPPING
        or (described := library.CONFIG_MAPPING[kind]) not in library.MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise config.refuse(
            "model_type", "a causal language model of the installed transformers; code from a checkpoint is not run"
        )
    check_settings(config, described)
    with clear(f"{config.where} does not describe a {kind}"):
        made = described(**known(config, described))
    cls = library.MODEL_FOR_CAUSAL_LM_MAPPING[described]
    return cls[0] if isinstance(cls, tuple) else cls, made


def _misfit(folder: Path, cls: type, why: str) -> ValueError:
    return ValueError(
        f"The weights in {folder} do not fit the {cls.__name__} that its config.json describes: {why}. Copy or download both files again."
    )


def _generation(library: Any, folder: Path) -> Any:
    """What generation_config.json says of beginning, end and length; the rest of it is how somebody liked to sample."""
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    entries = Entries(read_json(path, "language model"), str(path))
    told = {name: entries.optional(name, entries.whole) for name in ("bos_token_id", "pad_token_id", "max_length")}
    end = entries.each("eos_token_id", int, "tokens", most=100) if isinstance(entries.get("eos_token_id"), list) else None
    return library.GenerationConfig(**told, eos_token_id=end or entries.optional("eos_token_id", entries.whole))


def _tokenizer(library: Any, folder: Path) -> Any:
    if not (folder / "tokenizer.json").exists():
        return None
    for name, found in (("tokenizer_config.json", None), ("tokenizer.json", ("padding", "truncation"))):
        if (folder / name).exists():
            entries = Entries(read_json(folder / name, "tokenizer"), str(folder / name))
            entries.optional("model_max_length", entries.number)  # many have 10³⁰, and nothing is padded to it here
            looked_at = [entry for entry in found or entries.found if entry in entries and entry != "model_max_length"]
            check_tokenizer(Entries({entry: entries.get(entry) for entry in looked_at}, entries.where))
    with clear(f"The tokenizer in {folder} cannot be read"):
        return library.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
