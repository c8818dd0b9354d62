"""A language model that learns to be a composition, and the folder that it becomes: one of transformers, and beside it what makes it a
distribution over sequences, ``sculpt.json``."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sculpt.contents import CLASSES, find
from sculpt.entries import Entries, read_json
from sculpt.files import replacing
from sculpt.tokens import sequences, transformers
from sculpt.tokens.networks import FunctionNetwork, Network
from sculpt.tokens.results import Texts
from sculpt.tokens.sampling import Sampling

if TYPE_CHECKING:
    from sculpt.tokens.model import Tokens

__all__ = ["TOLD", "conditions", "known", "read", "save", "title", "to_learn", "with_module"]

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
    """Write a model with its prompt, its lengths, how it chooses tokens, and what its samples are."""
    if not isinstance(model.network, transformers.CausalNetwork):
        raise ValueError(
            f"{model} is a {model.network.name}, which no file can build again: models of transformers are saved. Leave checkpoint out, or "
            "pass network=, one of those."
        )
    told = {"kind": "tokens", "prompt": list(model.prompt), "end": list(model.end), "max_length": model.max_length}
    told |= {"stop": list(model.stop), "sampling": {name: _plain(value) for name, value in vars(model.sampling).items()}}
    if model.vocabulary.words is not None:
        told["words"] = model.vocabulary.words
    if CLASSES.get(kind := model.samples_class.__name__) == model.samples_class.__module__ and model.samples_class is not Texts:
        told["samples"] = kind
    with replacing(folder) as new:
        model.network.model.save_pretrained(new)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(new)
        (new / TOLD).write_text(json.dumps(told, indent=1) + "\n")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# What a folder says of itself


def read(folder: Path, given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a folder's model: what ``sculpt.json`` says, and in its place what somebody asks for.

    Args:
        folder: of the model.
        given: arguments of the model, ``None`` or empty where nobody says.
        options: of :class:`~sculpt.tokens.sampling.Sampling`, and conditions, for which the folder knows prompts.
    """
    found = _read(folder) if (folder / TOLD).exists() else None
    names = [field.name for field in dataclasses.fields(Sampling)]
    wanted = _conditions(found)
    if unknown := sorted(set(options) - {*names, *wanted}):
        raise ValueError(
            f"{', '.join(unknown)}: no option of a language model, which takes {', '.join([*given, *names, *wanted])}."
        )
    told = {} if found is None else _told(found)
    sampling = {name: options[name] for name in names if name in options}
    told["sampling"] = replace(told.get("sampling", Sampling()), **sampling)
    condition = {name: options[name] for name in wanted if name in options}
    if found is not None and wanted and not given.get("prompt"):
        told["prompt"] = _prompt(found, wanted, condition)
    elif condition:
        raise ValueError(
            f"Got a prompt and {', '.join(condition)}, for which the folder has prompts of its own. Pass one of the two."
        )
    return told | {name: value for name, value in given.items() if value}


def title(name: str, options: Mapping[str, Any]) -> str:
    """What a model is called if nobody says: as its folder, with its prompt or its condition.

    Args:
        name: of the folder.
        options: what is asked of it.
    """
    own = {"prompt", "max_length", "stop", "name", *(field.name for field in dataclasses.fields(Sampling))}
    prompt = options.get("prompt")
    said = prompt if isinstance(prompt, str) else _key({key: value for key, value in options.items() if key not in own})
    return f"{name}[{said}]" if said else name


def conditions(folder: Path) -> list[str]:
    """What a folder has to be told to be one distribution, such as ``beta``."""
    return _conditions(_read(folder)) if (folder / TOLD).exists() else []


def known(folder: Path) -> list[str]:
    """The conditions that a folder has prompts for, such as ``beta=32``."""
    found = _read(folder) if (folder / TOLD).exists() else None
    return [*found.inside("prompts").found] if _conditions(found) and found is not None else []


def _read(folder: Path) -> Entries:
    return Entries(read_json(folder / TOLD, "language model"), str(folder / TOLD))


def _conditions(found: Entries | None) -> list[str]:
    """The names in keys such as ``beta=32``, or ``beta=32, target=seh``."""
    if found is None or found.get("prompts") is None:
        return []
    keys = {tuple(part.partition("=")[0] for part in key.split(", ")) for key in found.inside("prompts").found}
    if len(keys) != 1:
        raise found.refuse("prompts", "an object whose names say the same conditions, e.g. beta=1 and beta=32")
    return [*keys.pop()]


def _key(condition: Mapping[str, Any]) -> str:
    """``beta=32``, whether it was written 32 or 32.0."""
    plain = lambda value: f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)  # noqa: E731
    return ", ".join(f"{name}={plain(condition[name])}" for name in condition)


def _prompt(found: Entries, wanted: list[str], condition: Mapping[str, Any]) -> list[int]:
    """The prompt that stands for a condition."""
    prompts, folder = found.inside("prompts"), Path(found.where).parent
    keys = [key if i == 0 or len(wanted) > 1 else key.partition("=")[2] for i, key in enumerate(prompts.found)]
    known = f"it was trained for {', '.join(keys)}"
    if missing := [name for name in wanted if name not in condition]:
        raise ValueError(f"The model in {folder} wants {', '.join(f'{name}=…' for name in missing)}: {known}.")
    key = _key({name: condition[name] for name in wanted})
    if key not in prompts:
        raise ValueError(f"The model in {folder} does not know {key:.80}: {known}. Pass one of these.")
    return prompts.each(key, int, "tokens", most=100_000)


def _told(found: Entries) -> dict[str, Any]:
    """The arguments of the model that a file describes."""
    sampling = found.inside("sampling")
    return {
        "prompt": None if found.get("prompts") is not None else found.each("prompt", int, "tokens", most=100_000),
        "end": found.each("end", int, "tokens", most=1000),
        "max_length": found.whole("max_length", least=1),
        "stop": tuple(found.texts("stop", most=1000)),
        "vocabulary": found.optional("words", found.texts),
        "samples": find(found.text("samples", 200), Texts) if found.get("samples") is not None else Texts,
        "sampling": Sampling(
            temperature=sampling.number("temperature"),
            top_k=sampling.optional("top_k", sampling.whole),
            top_p=sampling.number("top_p"),
            min_length=sampling.whole("min_length"),
            suppress=sampling.each("suppress", int, "tokens", most=1_000_000),
        ),
    }
