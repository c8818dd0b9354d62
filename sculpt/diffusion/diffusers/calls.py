r"""Calls: how a network is called for n samples at once, and how several conditions go through it together.

The output of a model is a weighted sum of what its strands answer, :math:`F(x, t) = \sum_r w_r O_r(x, t)`: a condition and
its null condition are two strands of one network. Strands that are called with the same kinds of inputs are one call.

Notation: ``n`` samples, ``k`` rows of a strand in a network's batch, ``*x`` one sample.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sculpt.diffusion.diffusers.switches import Switches
from sculpt.diffusion.diffusers.trees import LISTED, Path, at, entries, first, joined, mapped
from sculpt.diffusion.networks import first_state
from sculpt.identity import digest

__all__ = ["Answer", "Call", "Given", "Output", "Source", "State", "Strand", "Time", "answers"]


class Source(abc.ABC):
    """Where one input of a network comes from."""

    axis: int | None
    """that counts samples; ``None`` for what all samples and strands share"""

    @abc.abstractmethod
    def value(self, x: Float[Tensor, "n *x"], t: Float[Tensor, "*t"]) -> Any:
        """The input for these samples."""

    @property
    @abc.abstractmethod
    def kind(self) -> Any:
        """What has to be the same in strands that are one call."""

    @property
    @abc.abstractmethod
    def described(self) -> Any:
        """What tells it from others, for the model's key; ``None`` for the sample and the time as they are."""


@dataclass(frozen=True, eq=False)
class Given(Source):
    """A condition, which is the same at every step."""

    kept: Any
    axis: int | None = None
    cast: bool = False
    """whether it is brought to the dtype of x"""

    def value(self, x, t):
        if self.axis == LISTED:
            return list(self.kept) * len(x)
        if not isinstance(self.kept, Tensor):
            return self.kept
        kept = self.kept.to(x.device, x.dtype if self.cast and self.kept.is_floating_point() else self.kept.dtype)
        if self.axis is None or len(x) == 1:
            return kept
        if kept.shape[self.axis] == 1:
            return kept.expand(*(len(x) if i == self.axis else n for i, n in enumerate(kept.shape)))
        return torch.cat([kept] * len(x), self.axis)

    @functools.cached_property
    def kind(self):
        if self.axis == LISTED:
            return "list"
        if self.axis is None or not isinstance(self.kept, Tensor):
            return digest(self.kept)
        return self.axis, self.kept.dtype, tuple(self.kept.shape)

    @property
    def described(self):
        return self.axis, self.kept


@dataclass(frozen=True, eq=False)
class State(Source):
    """The noisy sample, as it is or rearranged: each number of the input is one of x, or a constant."""

    axis: int | None
    shape: tuple[int, ...] | None = None
    """of a strand's rows; that of x where there is none"""
    dtype: torch.dtype | None = None
    index: Int[Tensor, "r"] | None = None
    """which of x's numbers each is; in x's own order where there is none"""
    base: Float[Tensor, "r"] | None = None
    factor: Float[Tensor, "r"] | None = None

    def value(self, x, t):
        rows = x
        if self.index is not None:
            rows = x.flatten(1)[:, self.index.to(x.device)]
            rows = rows if self.factor is None else rows * self.factor.to(rows) + self.base.to(rows)  # type: ignore[union-attr]
        if self.shape is not None:
            rows = rows.reshape(len(x), *self.shape)
        rows = rows if self.dtype is None else rows.to(self.dtype)
        return rows if self.shape is None else _along(rows, self.axis)

    @property
    def kind(self):
        return self.axis, self.shape, self.dtype

    @property
    def described(self):
        return None if self.index is None else ("x", self.shape, self.index, self.base, self.factor)


@dataclass(frozen=True, eq=False)
class Time(Source):
    """The time, or what is affine in it: a + b t, a number or one for every place."""

    axis: int | None
    a: Tensor
    b: Tensor
    dtype: torch.dtype | None = torch.float32
    """``None`` for a plain number"""

    def value(self, x, t):
        if self.axis is None:
            new = self.a.to(t.device) + self.b.to(t.device) * t.double()
            return new.item() if self.dtype is None else self._typed(new)
        t = t.double().expand(len(x)).reshape(-1, *[1] * self.a.ndim)
        return _along(self._typed(self.a.to(t.device) + self.b.to(t.device) * t), self.axis)

    def _typed(self, t: Tensor) -> Tensor:
        return (t if self.dtype.is_floating_point else t.round()).to(self.dtype)  # type: ignore[union-attr]

    @property
    def kind(self):
        return self.axis, tuple(self.a.shape), self.dtype, None if self.axis is not None else digest(self.a, self.b)

    @property
    def described(self):
        plain = self.a.numel() == 1 and float(self.a) == 0 and float(self.b) == 1
        return None if plain else ("t", self.a, self.b)


@dataclass(frozen=True)
class Output(Source):
    """What an earlier call of the same strand answered."""

    call: int
    path: Path
    axis: int | None = 0

    def value(self, x, t):
        raise TypeError("the output of a call is known after the call only")

    @property
    def kind(self):
        return self.call, self.path

    @property
    def described(self):
        return "output", self.call, self.path


def _along(rows: Tensor, axis: int | None) -> Any:
    """(n, *rows of a sample) as a network takes it: sample after sample along the axis."""
    if axis == LISTED:
        return list(rows.unbind(0))
    if axis is None or rows.ndim == 1:
        return rows[0] if axis is None else rows
    return rows.movedim(0, axis).flatten(axis, axis + 1)


@dataclass(frozen=True, eq=False)
class Call:
    """A network with the sources of its inputs."""

    network: Any
    inputs: Mapping[str, Any]
    """by keyword; trees of sources"""
    positional: tuple[Any, ...] = ()
    switches: Switches = field(default_factory=Switches)
    tree: dict[Any, Any] = field(init=False)
    """all of them, positional ones by number"""
    sources: dict[Path, Source] = field(init=False)
    """with their places in it"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", {**dict(enumerate(self.positional)), **self.inputs})
        object.__setattr__(self, "sources", dict(entries(self.tree)))

    @functools.cached_property
    def condition(self) -> dict[str, Any]:
        """What is given in it, by keyword."""
        given = {name for (name, *_), source in self.sources.items() if isinstance(source, Given)}
        kept = {name: tree for name, tree in self.inputs.items() if name in given}
        return mapped(lambda _, source: source.kept if isinstance(source, Given) else None, kept)

    @functools.cached_property
    def kind(self) -> Any:
        return id(self.network), self.switches, tuple((path, source.kind) for path, source in self.sources.items())

    def __call__(self, values: Mapping[Path, Any]) -> Any:
        """What the network answers to these inputs, with its switches as they belong."""
        inputs = mapped(lambda path, _: values[path], self.tree)
        positional = [inputs.pop(i) for i in range(len(self.positional))]
        with self.switches.on(self.network):
            return self.network(*positional, **inputs)


@dataclass(frozen=True, eq=False)
class Answer:
    """How the numbers of F are found in a network's output."""

    axis: int = 0
    """that counts samples"""
    index: Int[Tensor, "r"] | None = None
    """which of the numbers of a row; all of them where there is none"""

    def rows(self, out: Any) -> Tensor:
        """One row for every sample of every strand."""
        return torch.stack(first(out)) if self.axis == LISTED else first(out)


@dataclass(frozen=True, eq=False)
class Strand:
    """Calls one after another, the last of which answers with one row for every sample, or with several that are weighed."""

    calls: tuple[Call, ...]
    weights: tuple[float, ...] = (1.0,)
    """of its rows"""
    answer: Answer = field(default_factory=Answer)
    single: bool = False
    """whether samples go through one by one"""

    @functools.cached_property
    def kind(self) -> Any:
        """Strands of the same kind are one call."""
        return (id(self) if self.single else None), tuple(call.kind for call in self.calls), self.answer.axis

    @property
    def plain(self) -> bool:
        """Whether it is one call with the sample, the time and a condition as they are."""
        sources = self.calls[0].sources.values()
        return len(self.calls) == 1 == len(self.weights) and all(isinstance(s, Given) or s.described is None for s in sources)

    @property
    def described(self) -> Any:
        """What tells it from others, for the model's key."""
        index = self.answer.index
        moved = None if index is None or torch.equal(index.cpu(), torch.arange(len(index))) else index
        return self.weights, moved, [[(p, s.described) for p, s in sorted(c.sources.items(), key=str)] for c in self.calls]

    def with_adapters(self, adapters: Mapping[str, float]) -> Strand:
        """The same with these adapters in its networks."""
        calls = [dataclasses.replace(c, switches=c.switches.with_adapters(c.network, adapters)) for c in self.calls]
        return dataclasses.replace(self, calls=tuple(calls))

    def weighed(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """This strand's share of F, from its rows of a network's output."""
        if self.answer.index is not None:
            rows = rows.flatten(1)[:, self.answer.index.to(rows.device)].reshape(len(rows), *shape)
        parts = rows.unflatten(0, (len(self.weights), -1))
        return sum(w * part for w, part in zip(self.weights, parts, strict=True)) if self.weights != (1.0,) else parts[0]


def answers(
    strands: Sequence[Strand], x: Float[Tensor, "n *x"], t: Float[Tensor, "*t"], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Every strand's share of F: strands of the same kind are one call.

    Args:
        strands: of any models.
        x: what the networks see.
        t: the time, one for all or one for each.
        dtype: of what is weighed.
    """
    groups: dict[Any, list[int]] = {}
    for i, strand in enumerate(strands):
        groups.setdefault(strand.kind, []).append(i)
    found: dict[int, Tensor] = {}
    for group in groups.values():
        members = [strands[i] for i in group]
        # Some networks take one time for all, and some strands cannot be told apart along a batch.
        apart = len(x) > 1 and (members[0].single or (t.ndim > 0 and _one_time(members[0])))
        parts = [_together(members, x[i : i + 1], t[i] if t.ndim else t) for i in range(len(x))] if apart else None
        outs = (
            _together(members, x, t)
            if parts is None
            else [torch.stack(own, 1).flatten(0, 1) for own in zip(*parts, strict=True)]
        )
        for i, rows in zip(group, outs, strict=True):
            found[i] = strands[i].weighed(rows if dtype is None else rows.to(dtype), x.shape[1:])
    return [found[i] for i in range(len(strands))]


def _one_time(strand: Strand) -> bool:
    return any(isinstance(source, Time) and source.axis is None for call in strand.calls for source in call.sources.values())


def _together(strands: Sequence[Strand], x: Tensor, t: Tensor) -> list[Tensor]:
    """The rows of each strand's last call."""
    outs: list[Any] = []
    for stage, call in enumerate(strands[0].calls):
        state = first_state(call.network)
        own = x if state is None else x.to(state.dtype)
        values = {}
        for path, source in call.sources.items():
            if isinstance(source, Output):
                values[path] = at(outs[source.call], source.path)
            else:
                whose = strands if source.axis is not None else strands[:1]
                each = [strand.calls[stage].sources[path] for strand in whose]
                values[path] = joined([one.value(x if _exact(one) else own, t) for one in each], source.axis)
        outs.append(call(values))
    return list(strands[0].answer.rows(outs[-1]).chunk(len(strands)))


def _exact(source: Source) -> bool:
    """Whether a source rounds x itself."""
    return isinstance(source, State) and source.dtype is not None
