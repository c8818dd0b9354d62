"""Samples: they slice, join, move, and are kept in one file that is read back without their models."""

from __future__ import annotations

import copy
import dataclasses
import html
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sculpt import preview
from sculpt.contents import VERSION, find
from sculpt.diagnostics import Diagnostics, Verdict, printable
from sculpt.files import replace_file
from sculpt.stored import FORMAT, Stored

if TYPE_CHECKING:
    from sculpt.model import BaseModel

__all__ = ["Samples", "check_name", "in_plane", "pixels"]

S = TypeVar("S", bound="Samples")

FEW = 32
"""How many coordinates a table has columns for."""
SIDE = 1000
"""How long a side of a grid is that is drawn."""


def pixels(x: Tensor) -> Tensor:
    """Images in [0, 1] from images in [-1, 1]."""
    return (x / 2 + 0.5).clamp(0, 1)


def _lost(x: Tensor) -> Tensor:
    raise ValueError(
        "These samples were read back without their model, which decodes them. Pass it, Samples.load(path, model=model), or call "
        "model.decode(samples.x)."
    )


_DECODERS: dict[str, Callable[[Tensor], Tensor] | None] = {"": None, "pixels": pixels, "model": _lost}


@dataclass(repr=False, eq=False)
class Samples:
    """n samples and what is known about them.

    They slice, ``cat``, move, save, load and pickle; a decoder that needs its model stays behind with the model.

    Args:
        x: the samples, along the first axis.
        log_weights: ``None`` for equally weighted samples (the default everywhere), or the particles' normalised log-weights.
        diagnostics: of the run.
        decoder: from x to what a person looks at; ``None`` where that is x.

    Example:
        >>> samples = (one & two).sample(100, generator=seed)
        >>> samples.save("cells.safetensors")
        >>> len(sculpt.Samples.cat([sculpt.Samples.load("cells.safetensors"), samples[:10]]))
        110
    """

    x: Tensor
    log_weights: Tensor | None = None
    diagnostics: Diagnostics = field(default_factory=lambda: Diagnostics(road=""))
    decoder: Callable[[Tensor], Any] | None = None

    columns: ClassVar[tuple[str, ...]] = ()
    """What else there is for each sample, such as SMILES: cached lists that go wherever the samples go."""
    keeps_x: ClassVar[bool] = True
    """Whether a shard of a :class:`~sculpt.library.Library` has x beside its table."""

    def __post_init__(self) -> None:
        if self.log_weights is not None and len(self.log_weights) != len(self.x):
            raise ValueError(f"Got {len(self.log_weights)} log-weights for {len(self.x)} samples; expected one for each.")

    @property
    def log_z(self) -> float | None:
        """The estimate of the target's log-normaliser, ``None`` on roads that give none."""
        return self.diagnostics.log_z

    @property
    def verdict(self) -> Verdict:
        """How far the samples may be trusted."""
        return self.diagnostics.verdict

    def decode(self) -> Any:
        """What a person looks at: images in [0, 1] for pixel models, decoded latents, molecules."""
        return self.x if self.decoder is None else self.decoder(self.x)

    # Rows of a table

    @classmethod
    def described(cls) -> dict[str, Any]:
        """What decides the columns of :meth:`rows`, for the manifest of a library."""
        return {}

    def rows(self) -> dict[str, Any]:
        """Columns by name: the samples' coordinates where these are few, and ``weight``, which sums to one."""
        n, x = len(self), self.x.cpu()
        few = x.ndim == 2 and x.shape[1] <= FEW
        columns = {f"x{i}": _numpy(x[:, i]) for i in range(x.shape[1])} if few else {}
        w = (
            torch.full((n,), 1 / max(n, 1), dtype=torch.float64)
            if self.log_weights is None
            else torch.softmax(self.log_weights.cpu().double(), 0)
        )
        return columns | {"weight": w.numpy()}

    @classmethod
    def summed(cls, tables: Iterable[dict[str, Any]], n: int, formula: str = "") -> Any:
        """What the tables of a library of n samples of a formula come to, where there is something to sum up."""
        raise ValueError(f"{cls.__name__} have no scores to sum up. Read the library's tables(), or its samples(k).")

    def origin(self) -> dict[str, Any]:
        """Where the samples come from, for the metadata of their file."""
        d, verdict = self.diagnostics, self.verdict
        said = {"formula": d.formula, "road": d.road, "verdict": str(verdict), "level": verdict.level}
        z = {"log_z": d.log_z, "log_z_error": d.log_z_error, "particles": d.particles}
        return said | z | {"selected": d.families is not None}

    def __len__(self) -> int:
        return len(self.x)

    # Parts, joins, places

    def __getitem__(self: S, index: int | slice | Sequence[int] | Tensor) -> S:
        """Some of the samples: a number, a slice, a list of numbers, or a mask. Their log-weights stay as they are."""
        if isinstance(index, slice):
            rows = torch.tensor(range(len(self))[index], dtype=torch.long)
        else:
            rows = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index].reshape(-1)
        at = rows.to(self.x.device)
        part = dataclasses.replace(self, x=self.x[at], log_weights=None if self.log_weights is None else self.log_weights[at])
        part._keep({name: [values[i] for i in rows.tolist()] for name, values in self._kept().items()})
        return part

    @classmethod
    def cat(cls, parts: Sequence[S]) -> S:
        """Samples of several runs, one after another; weighted ones count as much as their run's Z says, where every run has one."""
        parts = list(parts)
        if not parts:
            raise ValueError("There is nothing to put together: pass a list of samples.")
        for part in parts:
            if type(part) is not type(parts[0]) or part.x.shape[1:] != parts[0].x.shape[1:]:
                got = [f"{type(one).__name__} of {tuple(getattr(one, 'x', one).shape[1:])}" for one in (parts[0], part)]
                raise ValueError(f"Only samples of one kind and shape go together, got {got[0]} and {got[1]}.")
        log_w = _joined_weights(parts) if any(part.log_weights is not None and len(part) for part in parts) else None
        diagnostics = Diagnostics.join([part.diagnostics for part in parts])
        whole = type(parts[0])(torch.cat([part.x for part in parts]), log_w, diagnostics, parts[0].decoder)
        kept = [part._kept() for part in parts]
        whole._keep({name: [v for part in kept for v in part[name]] for name in kept[0] if all(name in part for part in kept)})
        return whole

    def to(self: S, *args: Any, **kwargs: Any) -> S:
        """The samples on another device, or of another dtype: as :meth:`torch.Tensor.to`."""
        x = self.x.to(*args, **kwargs)
        log_w = None if self.log_weights is None else self.log_weights.to(x.device)
        new = dataclasses.replace(self, x=x, log_weights=log_w)
        new._keep(self._kept())
        return new

    def half(self: S) -> S:
        """:meth:`to` half precision; log-weights stay as they are."""
        return self.to(torch.float16)

    def _kept(self) -> dict[str, list[Any]]:
        return {name: vars(self)[name] for name in self.columns if name in vars(self)}

    def _keep(self, columns: dict[str, list[Any]]) -> None:
        vars(self).update({name: values for name, values in columns.items() if name in self.columns})

    # Files

    def save(self, path: str | Path) -> None:
        """Write ``.safetensors`` (everything; :meth:`load` reads it), ``.npz`` (the arrays), or a picture, ``.png``: all of it or nothing."""
        path = Path(path)
        check_name(path, (".safetensors", ".npz", ".png"))
        if path.suffix == ".png":
            kind, picture = self.picture(most=len(self))
            if kind != "png":
                raise ValueError(
                    f"There is no picture of samples of shape {tuple(self.x.shape[1:])}. Write .npz or .safetensors."
                )
            return replace_file(path, picture)
        tensors = {"x": self.x} if self.log_weights is None else {"x": self.x, "log_weights": self.log_weights}
        tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        about = json.dumps(self._about(), ensure_ascii=False).encode(errors="replace").decode()
        if path.suffix == ".npz":
            import numpy as np

            buffer = io.BytesIO()
            np.savez_compressed(buffer, about=np.array(about), **{name: _numpy(value) for name, value in tensors.items()})
            return replace_file(path, buffer.getvalue())
        from safetensors import SafetensorError
        from safetensors.torch import save

        try:
            content = save(tensors, {"sculpt": about})
        except SafetensorError as error:
            raise ValueError(
                f"{len(self)} samples have too much to say for one .safetensors file ({error!s:.100}). Save parts of them, samples[:k]."
            ) from None
        replace_file(path, content)

    def _about(self) -> dict[str, Any]:
        self._complete()
        decoder = next((name for name, known in _DECODERS.items() if known is self.decoder), "model")
        said = {"formula": self.diagnostics.formula, "verdict": str(self.verdict), "seed": self.diagnostics.seed}
        head = {"format": FORMAT, "version": VERSION, "class": type(self).__name__, "decoder": decoder, **said}
        return head | {"diagnostics": dataclasses.asdict(self.diagnostics), "columns": self._kept()}

    def _complete(self) -> None:
        """Compute the columns, before the model that they come from is out of reach."""
        for name in self.columns:
            getattr(self, name)

    @classmethod
    def load(cls, path: str | Path, model: BaseModel | None = None) -> Samples:
        """Read what :meth:`save` wrote as ``.safetensors``.

        Args:
            path: the file.
            model: decodes again what only it can decode.
        """
        path = Path(path)
        if path.suffix in (".npz", ".png"):
            raise ValueError(f"{path.name} holds arrays or a picture for others. Samples are read back from .safetensors only.")
        stored = Stored(path, [*_DECODERS])
        kind = cls if stored.name == cls.__name__ else find(stored.name, Samples)
        columns = stored.columns(kind.columns)
        samples = kind(*stored.tensors(), stored.diagnostics, _DECODERS[stored.decoder])
        samples._keep(columns)
        if model is not None:
            samples.decoder = model.decoder
        return samples

    def __copy__(self: S) -> S:
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def __deepcopy__(self: S, memo: Any) -> S:
        """The model that decodes stays the same one."""
        new = self.__copy__()
        vars(new).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "decoder"})
        return new

    def __getstate__(self) -> dict[str, Any]:
        self._complete()
        kept = self.decoder if any(known is self.decoder for known in _DECODERS.values()) else _lost
        names = [f.name for f in dataclasses.fields(self)]
        return {name: vars(self)[name] for name in names} | self._kept() | {"decoder": kept}

    # Pictures

    def picture(self, most: int = 64) -> tuple[Literal["png", "svg+xml", "text"], bytes]:
        """The samples as a person looks at them: the kind of picture, and its bytes.

        Args:
            most: how many images to show.
        """
        from sculpt import plots

        if not len(self):
            return "text", b"no samples"
        shown, title = self.decode(), printable(self.diagnostics.formula, 80).replace("$", r"\$")  # a name is no mathematics
        if isinstance(shown, Tensor) and shown.is_floating_point():
            shown = shown.float()
        if isinstance(shown, Tensor) and shown.ndim == 4 and shown.shape[1] in (1, 3):
            return "png", plots.png(plots.image_grid(shown[:most], title=title))
        if isinstance(shown, Tensor) and shown.ndim == 2 and shown.shape[1] >= 2 and in_plane(shown):
            of = title if shown.shape[1] == 2 else f"the first two of {shown.shape[1]} coordinates"
            return "png", plots.png(plots.points2d(shown[:, :2], of))
        rows = Counter(str(x.tolist()) if isinstance(x, Tensor) else str(x) for x in shown).most_common(12)
        return "text", "\n".join(f"{count:>6} ×  {x:.100}" for x, count in rows).encode()

    def _repr_html_(self) -> str:
        try:
            body = preview.embedded(*self.picture(), alt=f"samples of {printable(self.diagnostics.formula, 80)}")
        except ValueError as error:
            body = f"<i>{html.escape(str(error))}</i>"
        return f"{body}{self.diagnostics._repr_html_()}"

    def __repr__(self) -> str:
        weighted = "equally weighted" if self.log_weights is None else "weighted"
        return f"{type(self).__name__}({len(self)} × {tuple(self.x.shape[1:])}, {weighted})\n{self.diagnostics}"


def check_name(path: Path, endings: Sequence[str]) -> None:
    """Raise before the work where a file of this name cannot be written."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass the file to write.")
    if path.suffix not in endings:
        raise ValueError(f"Cannot write {path.name}: expected a name that ends in {', '.join(endings)}.")


def in_plane(x: Tensor) -> bool:
    """Vectors, and the cells of a grid in two dimensions."""
    return x.is_floating_point() or (x.shape[1] == 2 and int(x.min()) >= 0 and int(x.max()) < SIDE)


def _joined_weights(parts: Sequence[Samples]) -> Float[Tensor, "n"]:
    """Parts of one run keep their weights to each other. Runs count as much as their Z says, where all of them have one."""
    parts = [part for part in parts if len(part)]
    known = all(part.log_z is not None and part.diagnostics.particles is not None for part in parts)
    log_w = []
    for part in parts:
        w = torch.full((len(part),), -math.log(len(part))) if part.log_weights is None else part.log_weights
        count = math.log(part.diagnostics.particles or 1) + (part.log_z or 0.0) if known else math.log(len(part))
        log_w.append(w.double().to(parts[0].x.device) + count)
    return torch.log_softmax(torch.cat(log_w), 0)


def _numpy(x: Tensor) -> Any:
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
