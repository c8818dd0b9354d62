"""Reading checkpoints from disk and from the Hugging Face Hub: what a folder holds decides what it becomes.

Weights are read from safetensors only, and classes come from diffusers, transformers, torchgfn and sculpt only: nothing in a
checkpoint is unpickled or executed.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from sculpt.classifier.guide import Guide
from sculpt.classifier.heads import Classifier
from sculpt.entries import read_json
from sculpt.model import BaseModel

if TYPE_CHECKING:
    from sculpt.diffusion.denoiser import DiffusionComposition
    from sculpt.gflownet.model import GFlowNetComposition

    class LoadedComposition(DiffusionComposition, GFlowNetComposition):
        """A composition of what was loaded."""

    class Loaded(BaseModel, Guide):
        """What a type checker is told that :func:`load` gives: only the folder knows which family it holds, or a classifier."""

        scheduler: Any

        def __or__(self, other: BaseModel) -> LoadedComposition: ...
        def __and__(self, other: BaseModel) -> LoadedComposition: ...
        def __sub__(self, other: BaseModel) -> LoadedComposition: ...


__all__ = ["load", "kind_of", "locate"]

# Part of a pipeline -> where its class has to come from. Other parts (safety checkers and the like) are not read at all.
_PARTS = {
    "unet": ("diffusers", "ModelMixin"),
    "transformer": ("diffusers", "ModelMixin"),
    "vae": ("diffusers", "ModelMixin"),
    "vqvae": ("diffusers", "ModelMixin"),
    "scheduler": ("diffusers", "SchedulerMixin"),
    "text_encoder": ("transformers", "PreTrainedModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerBase"),
}
_NETWORKS = ("unet", "transformer")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

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

    Args:
        path_or_hub_id: a diffusers pipeline, a folder with ``unet/`` (or ``transformer/``) and ``scheduler/``, a GFlowNet of
            sculpt, or a classifier of sculpt.
        device: where its networks go.
        dtype: of its networks.
        condition: what fixes one distribution of a conditional model. Diffusion: ``prompt``, ``negative_prompt``,
            ``class_label``, ``guidance_scale``, and ``shape`` and ``name``. GFlowNets: the values it was trained to be
            conditioned on, e.g. ``beta=32``.
    """
    folder = locate(path_or_hub_id)
    kind = kind_of(folder)
    if kind == "diffusion":
        # A snapshot's folder is named by its hash.
        name = folder.resolve().name if Path(path_or_hub_id).expanduser().is_dir() else str(path_or_hub_id).rpartition("/")[2]
        return _diffusion(folder, name, device, dtype, condition)
    _check_weights(folder)
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
    if path.exists():
        raise ValueError(f"{path} is a file; a checkpoint is a folder. Pass the folder around it: {str(path.parent)!r}.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_hub_id)):
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


def kind_of(folder: Path) -> str:
    """``"diffusion"``, ``"gflownet"`` or ``"classifier"``, by what is in the folder."""
    if (folder / "model_index.json").exists() or any((folder / part).is_dir() for part in _NETWORKS):
        return "diffusion"
    if (folder / "config.json").exists():
        config = read_json(folder / "config.json", "checkpoint")
        kind = config.get("kind")
        if kind in ("gflownet", "classifier"):
            return kind
        if kind == "training":
            raise ValueError(
                f"{folder} is the state of an unfinished or finished training, not a classifier. "
                f"Load {str(folder.parent)!r}, or call sculpt.fit with checkpoint={str(folder.parent)!r} again to continue it."
            )
        if name := config.get("_class_name"):
            raise ValueError(
                f"{folder} holds a single {name} without the scheduler of its training. Pass the folder above it if that has both, "
                "or put the two together: sculpt.Diffusion(model, scheduler)."
            )
        name = ", ".join(config.get("architectures") or [str(kind or "another kind of model")])
        raise ValueError(f"{folder} holds {name}, which sculpt does not compose. {_EXPECTED}")
    if (folder / "training").is_dir():
        raise ValueError(
            f"The classifier in {folder} is not finished. Call sculpt.fit with the same arguments and checkpoint={str(folder)!r} to continue."
        )
    inside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ValueError(f"{folder} is no checkpoint that sculpt knows; it has {inside}. {_EXPECTED}")


_EXPECTED = (
    "Expected model_index.json, or unet/ (or transformer/) and scheduler/, as diffusers writes them; or a GFlowNet or a classifier "
    "written by sculpt's save_pretrained."
)


def _diffusion(folder: Path, name: str, device: Any, dtype: torch.dtype | None, condition: dict[str, Any]) -> BaseModel:
    from sculpt.diffusion.diffusers.adapter import Diffusion

    known = [
        name
        for name, p in inspect.signature(Diffusion.from_pipeline).parameters.items()
        if name != "pipe" and p.kind != p.VAR_KEYWORD
    ]
    if unknown := sorted(set(condition) - set(known)):
        raise ValueError(f"{', '.join(unknown)}: no option of a diffusion model, which takes {', '.join(known)}.")
    index = read_json(folder / "model_index.json", "pipeline") if (folder / "model_index.json").exists() else {}
    found = {path.name for path in folder.iterdir() if path.is_dir()}
    named = (
        {name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None}
        if index
        else found
    )
    parts = sorted(name for name in named if re.sub(r"_\d+$", "", name) in _PARTS)
    if not any(name in parts for name in _NETWORKS):
        raise ValueError(
            f"{folder} is a {index.get('_class_name', 'pipeline')} of {', '.join(sorted(named))}: no unet and no transformer."
        )
    if "scheduler" not in parts or not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(
            f"{folder} has no scheduler/scheduler_config.json. The scheduler of the training fixes the noise levels and what the network "
            f"predicts: write it there with scheduler.save_pretrained({str(folder / 'scheduler')!r})."
        )
    pipeline = _pipeline_class(index, folder)
    # Everything that can be checked without reading weights is, before any are read.
    plan = {name: (_class_of(folder, name, index.get(name)), _variant(folder / name)) for name in parts}
    components = {name: _part(folder / name, cls, variant, dtype, device) for name, (cls, variant) in plan.items()}
    if "text_encoder" in components:
        others = {name: None for name, value in index.items() if isinstance(value, list) and name not in components}
        options = {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
        pipe = pipeline(**components, **others, **options)
    else:
        pipe = SimpleNamespace(components=components)
    # Two prompts of one folder are two models: the prompt is then the better name.
    if "name" not in condition and not {"prompt", "class_label"} & set(condition):
        condition = {**condition, "name": name}
    return Diffusion.from_pipeline(pipe, **condition)


def _pipeline_class(index: dict[str, Any], folder: Path) -> type | None:
    import diffusers

    if not index:
        return None
    name = index.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"{folder} wants to be a {name}, which is no pipeline of diffusers; code from a checkpoint is not run. "
            "Build it yourself and pass it: sculpt.Diffusion.from_pipeline(pipe), or sculpt.Diffusion(model, scheduler)."
        )
    return cls


def _class_of(folder: Path, part: str, entry: list[str] | None) -> type:
    """The class of a pipeline's part. A JSON file must not name arbitrary code to run."""
    library, base = _PARTS[re.sub(r"_\d+$", "", part)]
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    got, name = entry or (library, read_json(path, f"{part} of diffusers").get("_class_name"))
    try:
        module = importlib.import_module(library)
    except ImportError:
        raise ImportError(f"{folder} has a {part}, which is read with transformers: pip install transformers") from None
    cls = getattr(module, name, None) if isinstance(name, str) and got == library else None
    if not (isinstance(cls, type) and issubclass(cls, _base(module, base))):
        raise ValueError(
            f"{folder} wants its {part} to be {got}.{name}, expected a {base} of {library}; code from a checkpoint is not run. "
            "Build that part yourself and pass it: sculpt.Diffusion(model, scheduler)."
        )
    return cls


def _base(module: Any, name: str) -> type:
    if hasattr(module, name):
        return getattr(module, name)
    return getattr(importlib.import_module("transformers.tokenization_utils_base"), name)


def _variant(folder: Path) -> str | None:
    """Check the weights of a pipeline's part, and tell their variant (``fp16``) where there is no plain file."""
    if not folder.is_dir():
        raise ValueError(f"{folder.parent} names a part {folder.name!r} that is missing. Copy or download it again.")
    if folder.name.startswith(("scheduler", "tokenizer")):
        return None
    names = _check_weights(folder)
    variants = {re.sub(r"-\d+-of-\d+$", "", name.removesuffix(".safetensors")).partition(".")[2] for name in names}
    return None if "" in variants else min(variants)


def _check_weights(folder: Path) -> list[str]:
    """The safetensors files of a folder, each whole; pickles are refused with the way out of them."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index*.json"):
        listed = set(read_json(index, "sharded checkpoint").get("weight_map", {}).values())
        if missing := sorted(listed - {path.name for path in files}):
            raise ValueError(f"{folder} lacks {', '.join(missing)}, named in {index.name}. Copy or download it again.")
    if not files:
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
        if pickles:
            raise ValueError(
                f"{folder} has its weights as {', '.join(pickles)} only. A pickle may run any code when it is read, so sculpt reads "
                "safetensors only. If you trust the file, convert it once with the library that wrote it: "
                "Model.from_pretrained(folder, use_safetensors=False).save_pretrained(folder)."
            )
        raise ValueError(f"{folder} has no weights: no .safetensors file. Copy or download it again.")
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file: truncated or damaged ({error}). Copy or download it again."
            ) from None
    return [path.name for path in files]


def _part(folder: Path, cls: type, variant: str | None, dtype: torch.dtype | None, device: Any) -> Any:
    if not hasattr(cls, "parameters"):
        return cls.from_pretrained(folder, local_files_only=True)
    options = {"use_safetensors": True, "variant": variant, "local_files_only": True, "output_loading_info": True}
    ours = cls.__module__.startswith("diffusers")
    if ours:
        from diffusers.utils import is_accelerate_available

        options |= {"torch_dtype": dtype or torch.float32, "low_cpu_mem_usage": is_accelerate_available()}
    try:
        part, info = cls.from_pretrained(folder, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The weights in {folder} do not fit the {cls.__name__} that its config.json describes: {error}"
        ) from None
    # diffusers would leave what it does not find at its random start, with no more than a warning.
    if ours and (missing := info["missing_keys"]):
        raise ValueError(
            f"The weights in {folder} do not fit the {cls.__name__} that its config.json describes: {len(missing)} are missing, "
            f"{sorted(missing)[0]} among them. Copy or download both files again."
        )
    part = part.to(device) if ours else part.to(device=device, dtype=dtype)
    return part.eval().requires_grad_(False)
