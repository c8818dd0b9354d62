"""Reading checkpoints from disk and from the Hugging Face Hub: what a folder holds decides what it becomes.

Weights are read from safetensors only, and classes come from diffusers, transformers, torchgfn and sculpt only: nothing in a
checkpoint is unpickled or executed.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sculpt import shipped
from sculpt.classifier.guide import Guide
from sculpt.classifier.heads import Classifier
from sculpt.diffusion.diffusers.parts import NETWORKS, read_pipeline
from sculpt.entries import Entries, read_json
from sculpt.files import settled
from sculpt.habits import here, refuse_words
from sculpt.model import BaseModel
from sculpt.weights import check_weights

if TYPE_CHECKING:
    from sculpt.diffusion.denoiser import DiffusionComposition
    from sculpt.gflownet.model import GFlowNetComposition
    from sculpt.tokens.model import TokensComposition

    class LoadedComposition(DiffusionComposition, GFlowNetComposition, TokensComposition):
        """A composition of what was loaded."""

    class Loaded(BaseModel, Guide):
        """What a type checker is told that :func:`load` gives: only the folder knows which family it holds, or a classifier."""

        scheduler: Any

        def __or__(self, other: BaseModel) -> LoadedComposition: ...
        def __and__(self, other: BaseModel) -> LoadedComposition: ...
        def __sub__(self, other: BaseModel) -> LoadedComposition: ...


__all__ = ["load", "asks", "kind_of", "locate"]

# fnmatch's * crosses folders: weights of the parts, but no single-file copies of them at the top, nor half-precision twins.
_FETCH = ["*.json", "*.txt", "model.safetensors", "*/*.safetensors"]
_LEAVE = ["*.fp16.safetensors", "*.fp16-*", "*.non_ema*", "safety_checker/*"]


def load(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **condition: Any,
) -> Loaded:
    """Read a base model or a classifier from a folder, or from the Hub (``owner/name``).

    .. code-block:: python

        cyan = sculpt.load("sculpt/digits-cyan")                          # what sculpt ships, from the repository, the cache or the Hub
        dog = sculpt.load("owner/name", prompt="a dog", device="cuda")    # a pipeline of diffusers under a prompt
        seh = sculpt.load("pretrained/molecules/seh", beta=32)            # a GFlowNet under a condition

    Args:
        path_or_hub_id: a shipped checkpoint, ``sculpt/digits-cyan`` and the like; a diffusers pipeline, a folder with ``unet/`` (or ``transformer/``) and ``scheduler/``, a GFlowNet of
            sculpt, a causal language model of transformers, or a classifier of sculpt.
        device: where its networks go.
        dtype: of its networks.
        condition: what fixes one distribution of a conditional model. A pipeline takes what its own call takes, with its defaults:
            ``prompt``, ``negative_prompt``, ``guidance_scale``, ``height`` and the like; networks alone ``class_label``, ``guidance_scale``
            and ``shape``; both a ``name``. GFlowNets: the values it was trained to be conditioned on, e.g. ``beta=32``.
            Language models: ``prompt``, ``max_length``, ``stop``, ``name``, and what changes their distribution: ``temperature``, ``top_k``,
            ``top_p``, ``min_length`` and ``suppress``; or the conditions that their folder has prompts for, such as ``beta=32``.

    Example:
        >>> circle1 = sculpt.load("pretrained/grid/circle1")  # a folder, or an id of the Hub
        >>> print(circle1.name, circle1.shape)
        circle1 (2,)
    """
    refuse_words(condition, ("device", "dtype"), "sculpt.load")
    if "seed" in condition:
        raise TypeError("seed: loading draws nothing. Pass sample(n, generator=torch.Generator().manual_seed(0)).")
    device = None if device is None else here(device)
    folder = locate(path_or_hub_id)
    kind = kind_of(folder)
    # A snapshot's folder is named by its hash.
    local = Path(path_or_hub_id).expanduser().is_dir() or shipped.folder_of(str(path_or_hub_id))
    name = folder.resolve().name if local else str(path_or_hub_id).rpartition("/")[2]
    if kind == "diffusion":
        with settled(folder):
            return _diffusion(folder, name, device, dtype, condition)
    check_weights(folder)
    if kind == "tokens":
        return _tokens(folder, name, device, dtype, condition)
    if kind == "gflownet":
        from sculpt.gflownet.model import GFlowNet

        return GFlowNet.from_pretrained(folder, device=device, dtype=dtype, **condition)
    if condition:
        raise ValueError(f"{folder} holds a classifier, which takes no condition; got {', '.join(condition)}.")
    return Classifier.from_pretrained(folder, device=device).to(dtype=dtype)


def locate(path_or_hub_id: str | Path) -> Path:
    """The folder itself, or the local copy of what the Hub has under this id."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if not path.exists() and shipped.folder_of(str(path_or_hub_id)):
        return shipped.find(str(path_or_hub_id))
    if path.exists():
        raise ValueError(f"{path} is a file; a checkpoint is a folder. Pass the folder around it: {str(path.parent)!r}.")
    # The Hub's own rule: words of letters and digits, joined by single signs, at most 96 characters.
    word = r"\w+(?:[.-]\w+)*"
    if (
        not (re.fullmatch(f"{word}/{word}", str(path_or_hub_id), re.ASCII) and len(str(path_or_hub_id)) <= 96)
        or path.suffix == ".git"
    ):
        raise ValueError(f"There is no folder {str(path)!r}, and a Hub id has the form 'owner/name'. Check the path.")
    return _download(str(path_or_hub_id))


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_FETCH, ignore_patterns=_LEAVE))
    except GatedRepoError:
        raise ValueError(
            f"{repository} wants you to accept its terms on the Hub first, and to log in: hf auth login."
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"There is no folder {repository!r} here and no such public repository on the Hub. Check the spelling."
        ) from None
    except OSError as error:  # whatever can be wrong with a network: all of the Hub's errors are OSErrors
        raise ValueError(
            f"There is no folder {repository!r} here, and the Hub cannot be reached ({type(error).__name__}). Check the path, or go "
            "online once: what was downloaded is kept and read offline."
        ) from error


def asks(folder: Path) -> list[str]:
    """What a folder's model has to be told to be one distribution, such as ``beta``."""
    if (kind := kind_of(folder)) == "tokens":
        from sculpt.tokens.learning import conditions

        return conditions(folder)
    if kind == "gflownet":
        return Entries(read_json(folder / "config.json", "policy"), str(folder / "config.json")).texts("condition", most=100)
    return []


def kind_of(folder: Path) -> str:
    """``"diffusion"``, ``"tokens"``, ``"gflownet"`` or ``"classifier"``, by what is in the folder."""
    with settled(folder):
        if (folder / "model_index.json").exists() or any((folder / part).is_dir() for part in NETWORKS):
            return "diffusion"
        if (folder / "config.json").exists():
            return _kind_of_config(folder)
        if (folder / "pytorch_lora_weights.safetensors").exists():
            raise ValueError(
                f"{folder} holds a LoRA, which belongs into its pipeline: pipe.load_lora_weights({str(folder)!r}, adapter_name='name'), and "
                "then with_adapters({'name': 1.0}) of the pipeline's model."
            )
        if (folder / "training").is_dir():
            raise ValueError(
                f"What is trained in {folder} is not finished. Call sculpt.fit or sculpt.distill with the same arguments and "
                f"checkpoint={str(folder)!r} to continue."
            )
        below = sorted(path.name for path in folder.iterdir() if path.is_dir() and next(path.glob("*.json"), None))
        if below:
            raise ValueError(f"{folder} is a folder of checkpoints. Load one of them: {', '.join(below):.300}.")
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(f"{folder} is no checkpoint that sculpt knows; it has {inside:.200}. {_EXPECTED}")


def _kind_of_config(folder: Path) -> str:
    config = read_json(folder / "config.json", "checkpoint")
    kind = config.get("kind")
    if kind in ("gflownet", "classifier"):
        return kind
    if kind == "training":
        raise ValueError(
            f"{folder} is the state of an unfinished or finished training, not what it trains. "
            f"Load {str(folder.parent)!r}, or call sculpt.fit or sculpt.distill with checkpoint={str(folder.parent)!r} again to continue it."
        )
    if name := config.get("_class_name"):
        raise ValueError(
            f"{folder} holds a single {name!s:.80} without the scheduler of its training. Pass the folder above it if that has both, "
            "or put the two together: sculpt.Diffusion(model, scheduler)."
        )
    names = config.get("architectures")
    if isinstance(names, list) and any(str(one).endswith(("ForCausalLM", "LMHeadModel")) for one in names):
        return "tokens"
    name = ", ".join(map(str, names)) if isinstance(names, list) and names else str(kind or "another kind of model")
    raise ValueError(f"{folder} holds {name:.200}, which sculpt does not compose. {_EXPECTED}")


_OPTIONS = ("prompt", "negative_prompt", "class_label", "guidance_scale", "shape", "name")
"""of a network without a pipeline's call"""
_EXPECTED = (
    "Expected model_index.json, or unet/ (or transformer/) and scheduler/, as diffusers writes them; or a GFlowNet or a classifier "
    "written by sculpt's save_pretrained; or a causal language model of transformers, config.json with weights."
)


def _tokens(folder: Path, name: str, device: Any, dtype: torch.dtype | None, condition: dict[str, Any]) -> BaseModel:
    from sculpt.tokens.learning import title
    from sculpt.tokens.model import Tokens

    return Tokens.from_pretrained(folder, device=device, dtype=dtype, **({"name": title(name, condition)} | condition))


def _diffusion(folder: Path, name: str, device: Any, dtype: torch.dtype | None, condition: dict[str, Any]) -> BaseModel:
    from sculpt.diffusion.diffusers.adapter import Diffusion
    from sculpt.diffusion.diffusers.direct import check_answer

    pipe = read_pipeline(folder, device, dtype)
    network = next(pipe.components[part] for part in NETWORKS if part in pipe.components)
    # A network that takes nothing but x, t and a class is called no differently by a pipeline.
    plain = not {*inspect.signature(network.forward).parameters} - {"sample", "timestep", "class_labels", "return_dict"}
    if plain or not callable(pipe):
        if unknown := sorted(set(condition) - set(_OPTIONS)):
            raise ValueError(f"{', '.join(unknown)}: no option of a diffusion model, which takes {', '.join(_OPTIONS)}.")
        parts, options = pipe.components, {"name": None if "class_label" in condition else name, **condition}
        model = Diffusion(
            network, parts["scheduler"], options.pop("shape", None), autoencoder=parts.get("vae") or parts.get("vqvae")
        )
        model = model.with_condition(**options)
        check_answer(model)
    else:
        # Two prompts of one folder are two models: the prompt is then the better name.
        named = {} if {"name", "prompt", "class_labels"} & set(condition) else {"name": name}
        model = Diffusion.from_pipeline(pipe, **named, **condition)
    if not 0 < model.s_min < model.s_max:
        raise ValueError(
            f"{folder / 'scheduler'} has noise levels from {model.s_min:g} to {model.s_max:g}; expected positive ones that increase. "
            "Copy or download it again."
        )
    return model
