"""The parts of a pipeline's folder: every file of a part is known to be plain and to fit before a library builds anything from it.

Weights are read from safetensors only. Networks and schedulers are of diffusers, text encoders and tokenizers of a fixed table:
nothing in a folder is unpickled or executed.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sculpt.blueprint import draw
from sculpt.diffusion.diffusers.settings import check_sample_size, check_schedule
from sculpt.entries import Entries, read_json
from sculpt.settings import check_settings, check_tokenizer, clear, known
from sculpt.weights import Weights, check_plain, check_weights

__all__ = ["NETWORKS", "read_pipeline"]

NETWORKS = ("unet", "transformer")
# Part of a pipeline -> where its class has to come from, and what it has to be. Other parts (safety checkers and the like) are not
# read at all.
_PARTS = {
    "unet": ("diffusers", "ModelMixin"),
    "transformer": ("diffusers", "ModelMixin"),
    "vae": ("diffusers", "ModelMixin"),
    "vqvae": ("diffusers", "ModelMixin"),
    "movq": ("diffusers", "ModelMixin"),
    "scheduler": ("diffusers", "SchedulerMixin"),
    "text_encoder": (
        "transformers",
        "CLIPTextModel CLIPTextModelWithProjection T5EncoderModel UMT5EncoderModel BertModel LlamaModel LlamaForCausalLM GemmaModel "
        "Gemma2Model Qwen2Model Qwen2ForCausalLM Qwen3Model Qwen3ForCausalLM GlmModel MistralModel MistralForCausalLM",
    ),
    "tokenizer": (
        "transformers",
        "CLIPTokenizer CLIPTokenizerFast T5Tokenizer T5TokenizerFast BertTokenizer BertTokenizerFast LlamaTokenizer LlamaTokenizerFast "
        "GemmaTokenizer GemmaTokenizerFast Qwen2Tokenizer Qwen2TokenizerFast PreTrainedTokenizerFast",
    ),
}
TYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def read_pipeline(folder: Path, device: Any, dtype: torch.dtype | None) -> Any:
    """A pipeline of diffusers, or something with its ``components`` where the folder does not say which."""
    path = folder / "model_index.json"
    index = Entries(read_json(path, "pipeline") if path.exists() else {}, str(path))
    names = _names(folder, index)
    pipeline = _pipeline_class(index, folder)
    # Everything that can be checked without reading weights is, before any are read.
    parts = {name: _Part(folder / name, _class_of(folder, name, index.get(name))) for name in names}
    components = {name: part.read(device, dtype) for name, part in parts.items()}
    if pipeline is None:
        return SimpleNamespace(components=components)
    others = {name: None for name, value in index.found.items() if isinstance(value, list) and name not in components}
    options = {name: value for name, value in known(index, pipeline).items() if isinstance(value, (bool, int, float))}
    options |= {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    with clear(f"The parts in {folder} do not make a {pipeline.__name__}"):
        return pipeline(**components, **others, **options)


def _names(folder: Path, index: Entries) -> list[str]:
    """The parts that are read."""
    for name in index.found:
        if isinstance(index.get(name), list) and not (
            len(index.get(name)) == 2 and all(value is None or isinstance(value, str) for value in index.get(name))
        ):
            raise index.refuse(name, "a library and a class")
    found = {path.name for path in folder.iterdir() if path.is_dir()}
    named = (
        {name for name, value in index.found.items() if isinstance(value, list) and value[0] is not None}
        if index.found
        else found
    )
    names = sorted(name for name in named if re.sub(r"_\d+\Z", "", name) in _PARTS)
    if not any(name in names for name in NETWORKS):
        kind = f"{index.get('_class_name') or 'pipeline'!s:.80}"
        raise ValueError(f"{folder} is a {kind} of {', '.join(sorted(named))[:300] or 'nothing'}: no unet and no transformer.")
    if "scheduler" not in names or not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise ValueError(
            f"{folder} has no scheduler/scheduler_config.json. The scheduler of the training fixes the noise levels and what the network "
            f"predicts: write it there with scheduler.save_pretrained({str(folder / 'scheduler')!r})."
        )
    return names


def _pipeline_class(index: Entries, folder: Path) -> type | None:
    import diffusers

    if not index.found:
        return None
    name = index.get("_class_name")
    cls = _named(diffusers, name)
    if cls is None or not issubclass(cls, diffusers.DiffusionPipeline):
        raise ValueError(
            f"{folder} wants to be a {name!s:.80}, which is no pipeline of diffusers; code from a checkpoint is not run. "
            "Build it yourself and pass it: sculpt.Diffusion.from_pipeline(pipe), or sculpt.Diffusion(model, scheduler)."
        )
    return cls


def _class_of(folder: Path, part: str, entry: list[Any] | None) -> type:
    """The class of a pipeline's part. A JSON file must not name arbitrary code to run."""
    library, wanted = _PARTS[re.sub(r"_\d+\Z", "", part)]
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    got, name = entry or (library, read_json(path, f"{part} of diffusers").get("_class_name"))
    try:
        module = importlib.import_module(library)
    except ImportError:
        raise ImportError(f"{folder} has a {part}, which is read with transformers: pip install transformers") from None
    cls = _named(module, name) if got == library else None
    if cls is not None and (missing := getattr(cls, "_backends", None)):
        raise ImportError(
            f"{folder} has a {part} of class {name}, which {library} has only with {', '.join(missing)} installed."
        )
    fits = cls is not None and (
        name in wanted.split() if library == "transformers" else issubclass(cls, getattr(module, wanted))
    )
    if cls is None or not fits:
        expected = f"a {wanted} of {library}" if library == "diffusers" else f"one of {wanted}"
        raise ValueError(
            f"{folder} wants its {part} to be {got!s:.80}.{name!s:.80}, expected {expected}; code from a checkpoint is not run. "
            "Build that part yourself and pass it: sculpt.Diffusion(model, scheduler)."
        )
    return cls


def _named(module: Any, name: Any) -> type | None:
    """A class of a library that imports its own when they are asked for."""
    try:
        found = getattr(module, name)
    except Exception:  # whatever its import says, or a name that is none
        return None
    return found if isinstance(found, type) else None


class _Part:
    """One folder, checked when it is made: files, settings, and the blueprint of a network against the header of its weights."""

    def __init__(self, folder: Path, cls: type):
        if not folder.is_dir():
            raise ValueError(f"{folder.parent} names a part {folder.name!r} that is missing. Copy or download it again.")
        check_plain(folder)
        self.folder, self.cls = folder, cls
        self.damaged = f"{folder} does not hold the {cls.__name__} that its config.json describes"
        if folder.name.startswith("tokenizer"):
            self._check_tokenizer()
        elif folder.name == "scheduler":
            self.config = self._config("scheduler_config.json")
            check_settings(self.config, cls)
            check_schedule(self.config)
        else:
            self.config = self._config("config.json")
            self._check_network()

    def _config(self, name: str) -> Entries:
        return Entries(read_json(self.folder / name, self.cls.__name__), str(self.folder / name))

    def _check_tokenizer(self) -> None:
        for name, entries in (("tokenizer_config.json", None), ("tokenizer.json", ("padding", "truncation"))):
            if (self.folder / name).exists():
                config = self._config(name)
                found = config.found if entries is None else {entry: config.get(entry) for entry in entries}
                check_tokenizer(Entries(found, config.where))

    def _check_network(self) -> None:
        """Refuse what does not fit, before there is anything of the size that the config asks for."""
        self.files = check_weights(self.folder)
        self.is_ours = self.cls.__module__.startswith("diffusers")
        if self.config.get("quantization_config") is not None:
            raise ValueError(
                f"{self.folder} has quantized weights. Dequantize them with the library that wrote them, and save that."
            )
        described: type = self.cls if self.is_ours else self.cls.config_class  # type: ignore[attr-defined]
        check_settings(self.config, described)
        weights = Weights(self.files[0])
        for path in self.files[1:]:
            weights.shapes |= Weights(path).shapes
        if self.is_ours:
            check_sample_size(self.config, self.cls)
            make = lambda: self.cls.from_config(self.config.found)  # type: ignore[attr-defined]  # noqa: E731
        else:
            # The config never decides where weights come from, or which implementation is fetched from elsewhere.
            with clear(self.damaged):
                self.described = described(**known(self.config, described))
            make = lambda: self.cls(self.described)  # noqa: E731
        drawn, kinds = draw(make, weights, f"the {self.cls.__name__}"), self._kinds()
        # Names differ between versions of the libraries, which rename them; shapes do not.
        for name, value in drawn.state_dict().items():
            if (got := weights.shapes.get(name, value.shape)) != value.shape:
                raise self._misfit(f"{name:.200} is {tuple(got)!s:.200}, expected {tuple(value.shape)!s:.200}")
            if value.is_floating_point() and not (kind := kinds.get(name, "F")).startswith(("F", "BF")):
                raise self._misfit(f"{name:.200} is of type {kind}, expected floating-point numbers")

    def _kinds(self) -> dict[str, str]:
        """Of the numbers in each tensor."""
        kinds = {}
        for path in self.files:
            with clear(self.damaged), safe_open(path, "pt") as file:
                kinds |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        return kinds

    def _misfit(self, why: str) -> ValueError:
        return ValueError(
            f"The weights in {self.folder} do not fit the {self.cls.__name__} that its config.json describes: {why}. "
            "Copy or download both files again."
        )

    def read(self, device: Any, dtype: torch.dtype | None) -> Any:
        """The part itself."""
        if self.folder.name.startswith("tokenizer"):
            with clear(f"The tokenizer in {self.folder} cannot be read"):
                return self.cls.from_pretrained(self.folder, local_files_only=True)  # type: ignore[attr-defined]
        if self.folder.name == "scheduler":
            with clear(f"{self.folder} does not describe a {self.cls.__name__}"):
                return self.cls.from_config(self.config.found)  # type: ignore[attr-defined]
        with clear(self.damaged):
            part, info = self._network(dtype)
        # The libraries would leave what they do not find at its random start, with no more than a warning.
        if missing := info["missing_keys"]:
            raise self._misfit(f"{len(missing)} are missing, {min(missing)} among them")
        # diffusers leaves the types of a file as they are where its first tensor has the type that is wanted.
        types = {parameter.dtype for parameter in part.parameters()}
        if len(types) > 1 and not getattr(part, "_keep_in_fp32_modules", None):
            part = part.to(dtype or torch.float32)
        # A pipeline hands from one part to the next what has one dtype.
        part = part.to(device) if self.is_ours else part.to(device=device, dtype=dtype or torch.float32)
        return part.eval().requires_grad_(False)

    def _network(self, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any]]:
        read: Any = self.cls.from_pretrained  # type: ignore[attr-defined]
        variant = _variant(self.files)
        if not self.is_ours:
            files = [path for path in self.files if _variant([path]) == variant]
            tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
            told = str(self.config.get("dtype") or self.config.get("torch_dtype"))
            options = {"state_dict": tensors, "torch_dtype": TYPES.get(told, "auto"), "output_loading_info": True}
            return read(None, config=self.described, **options)
        from diffusers.utils import is_accelerate_available

        options = {"use_safetensors": True, "variant": variant, "local_files_only": True, "output_loading_info": True}
        options |= {"torch_dtype": dtype or torch.float32, "low_cpu_mem_usage": is_accelerate_available()}
        return read(self.folder, **options)


def _variant(files: list[Path]) -> str | None:
    """The variant of the weights (``fp16``) where there is no plain file."""
    names = [path.name.removesuffix(".safetensors") for path in files]
    variants = {re.sub(r"-\d+-of-\d+\Z", "", name).partition(".")[2] for name in names}
    return None if "" in variants else min(variants)
