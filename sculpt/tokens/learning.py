"""A language model that learns to be a composition, and the folder that it becomes: one of transformers, and beside it what makes it a
distribution over sequences, ``sculpt.json``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sculpt.entries import Entries, read_json
from sculpt.files import replacing
from sculpt.tokens import sequences, transformers
from sculpt.tokens.networks import FunctionNetwork, Network
from sculpt.tokens.sampling import Sampling

if TYPE_CHECKING:
    from sculpt.tokens.model import Tokens

__all__ = ["TOLD", "read_told", "save", "to_learn", "with_module"]

TOLD = "sculpt.json"


def to_learn(model: Tokens, name: str, network: nn.Module | None) -> Tokens:
    """A copy of a model that learns. It may write every token: what others write must not be impossible for it.

    Args:
        model: this one.
        name: of the copy.
        network: in the place of a copy of its network.
    """
    module: Any = model.module if network is None else network
    if network is None and getattr(model.network, "adapters", None):
        raise ValueError(
            f"{model} is a network with adapters, and a student has weights of its own. Pass network=, a copy in which they are merged: "
            "model.merge_and_unload()."
        )
    new = with_module(model, copy.deepcopy(module).float().requires_grad_(True))
    new.sampling, new._name, new.learns = Sampling(temperature=model.sampling.temperature), name, True
    sequences.ask_once(new)
    return new


def with_module(model: Tokens, module: nn.Module) -> Tokens:
    """The same with another network of its kind."""
    new = copy.copy(model)
    new.model = module.eval()
    causal = isinstance(model.network, transformers.CausalNetwork)
    new.network: Network = transformers.CausalNetwork(module) if causal else FunctionNetwork(module, model.network.name)  # type: ignore[misc]
    return new


def save(model: Tokens, folder: Path) -> None:
    """Write a model with its prompt, its lengths and how it chooses tokens."""
    if not isinstance(model.network, transformers.CausalNetwork):
        raise ValueError(
            f"{model} is a {model.network.name}, which no file can build again: models of transformers are saved. Leave checkpoint out, or "
            "pass network=, one of those."
        )
    told = {"kind": "tokens", "prompt": list(model.prompt), "end": list(model.end), "max_length": model.max_length}
    told |= {"stop": list(model.stop), "sampling": {name: _plain(value) for name, value in vars(model.sampling).items()}}
    if model.vocabulary.words is not None:
        told["words"] = model.vocabulary.words
    with replacing(folder) as new:
        model.network.model.save_pretrained(new)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(new)
        (new / TOLD).write_text(json.dumps(told, indent=1) + "\n")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read_told(folder: Path) -> dict[str, Any]:
    """The arguments of the model that :func:`save` wrote; nothing where another library did."""
    if not (folder / TOLD).exists():
        return {}
    found = Entries(read_json(folder / TOLD, "language model"), str(folder / TOLD))
    sampling = found.inside("sampling")
    return {
        "prompt": found.each("prompt", int, "tokens", most=100_000),
        "end": found.each("end", int, "tokens", most=1000),
        "max_length": found.whole("max_length", least=1),
        "stop": tuple(found.texts("stop", most=1000)),
        "vocabulary": found.optional("words", found.texts),
        "sampling": Sampling(
            temperature=sampling.number("temperature"),
            top_k=sampling.optional("top_k", sampling.whole),
            top_p=sampling.number("top_p"),
            min_length=sampling.whole("min_length"),
            suppress=sampling.each("suppress", int, "tokens", most=1_000_000),
        ),
    }
