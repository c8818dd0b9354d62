r"""Calls: how a network is called for n samples at once, and how several conditions go through it together.

The output of a model is a weighted sum of what its strands answer, :math:`F(x, t) = \sum_r w_r O_r(x, t)`: a condition and
its null condition are two strands of one network. Strands that are called with the same kinds of inputs are one call.

Notation: ``n`` samples, ``k`` rows of a strand in a network's batch, ``*x`` one sample.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sculpt.diffusion.diffusers.sources import Given, Output, Source, State, Time
from sculpt.diffusion.diffusers.switches import Switches
from sculpt.diffusion.diffusers.trees import LISTED, Path, at, entries, first, joined, mapped
from sculpt.diffusion.networks import dtype_of

__all__ = ["Answer", "Call", "Rescale", "Stage", "Strand", "answers"]


@dataclass(frozen=True, eq=False)
class Call:
    """A network with the sources of its inputs."""

    network: Any
    inputs: Mapping[str, Any]
    """by keyword; trees of sources"""
    positional: tuple[Any, ...] = ()
    switches: Switches = field(default_factory=Switches)
    dtype: torch.dtype | None = None
    """of the network when its inputs were kept: by default that of now"""
    tree: dict[Any, Any] = field(init=False)
    """all of them, positional ones by number"""
    sources: dict[Path, Source] = field(init=False)
    """with their places in it"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tree", {**dict(enumerate(self.positional)), **self.inputs})
        object.__setattr__(self, "sources", dict(entries(self.tree)))
        object.__setattr__(self, "dtype", self.dtype or dtype_of(self.network))

    @functools.cached_property
    def condition(self) -> dict[str, Any]:
        """What is given in it, by keyword."""
        given = {name for (name, *_), source in self.sources.items() if isinstance(source, Given)}
        kept = {name: tree for name, tree in self.inputs.items() if name in given}
        return mapped(lambda _, source: source.kept if isinstance(source, Given) else None, kept)

    @functools.cached_property
    def kind(self) -> Any:
        # Its id would be that of another network once both are copied.
        network = self.network if isinstance(self.network, nn.Module) else id(self.network)
        return network, self.switches, tuple((path, source.kind) for path, source in self.sources.items())

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
        return (self if self.single else None), tuple(call.kind for call in self.calls), self.answer.axis

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
        return (
            self.weights,
            moved,
            [[(p, s.described) for p, s in sorted(c.sources.items(), key=lambda own: str(own[0]))] for c in self.calls],
        )

    def switched(self, change: Callable[[Switches, Any], Switches]) -> Strand:
        """The same with other switches in its networks."""
        calls = [dataclasses.replace(call, switches=change(call.switches, call.network)) for call in self.calls]
        return dataclasses.replace(self, calls=tuple(calls))

    def weighed(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """This strand's share of F, from its rows of a network's output."""
        if self.answer.index is not None:
            rows = rows.flatten(1)[:, self.answer.index.to(rows.device)].reshape(len(rows), *shape)
        parts = rows.unflatten(0, (len(self.weights), -1))
        return sum(w * part for w, part in zip(self.weights, parts, strict=True)) if self.weights != (1.0,) else parts[0]


@dataclass(frozen=True)
class Rescale:
    r"""Guidance that is brought back to the size of the condition's own answer c: :math:`F (1 - \varphi + \varphi \, |c| / |F|)`."""

    own: int
    """the strand that answers with c"""
    share: float = 1.0
    along_last: bool = False
    """whether sizes are norms along the last axis, or else standard deviations of whole samples"""

    def __call__(self, F: Float[Tensor, "n *x"], c: Float[Tensor, "n *x"]) -> Float[Tensor, "n *x"]:
        if self.along_last:
            ratio = c.norm(dim=-1, keepdim=True) / F.norm(dim=-1, keepdim=True)
        else:
            every = tuple(range(1, F.ndim))
            ratio = c.std(dim=every, keepdim=True) / F.std(dim=every, keepdim=True)
        return F * (1 - self.share + self.share * ratio)


@dataclass(frozen=True, eq=False)
class Stage:
    """What is done from a time on up: several strands, whose weighed answers add up."""

    least: float
    strands: tuple[Strand, ...]
    rescale: Rescale | None = None

    def total(self, parts: Sequence[Tensor]) -> Tensor:
        """F from the strands' shares of it."""
        F = sum(parts[1:], parts[0])
        if self.rescale is None:
            return F
        k = self.rescale.own
        # The weight has the output's sign, which c has too.
        return self.rescale(F, parts[k] / abs(self.strands[k].weights[0]))

    def switched(self, change: Callable[[Switches, Any], Switches]) -> Stage:
        """The same with other switches in its networks: what ``change`` makes of those there are, and the network."""
        return dataclasses.replace(self, strands=tuple(strand.switched(change) for strand in self.strands))

    def with_adapters(self, adapters: Mapping[str, float]) -> Stage:
        """The same with these adapters in its networks."""
        return self.switched(lambda switches, network: switches.with_adapters(network, adapters))

    @property
    def guided(self) -> bool:
        """Whether several answers are weighed."""
        return len(self.strands) > 1 or len(self.strands[0].weights) > 1

    @property
    def described(self) -> Any:
        """What tells it from others, for the model's key."""
        return self.least, [strand.described for strand in self.strands], self.rescale


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
        own = x.to(dtype_of(call.network))
        values = {}
        for path, source in call.sources.items():
            if isinstance(source, Output):
                values[path] = at(outs[source.call], source.path)
            else:
                whose = strands if source.axis is not None else strands[:1]
                each = [strand.calls[stage].sources[path] for strand in whose]
                value = joined([one.value(x if _exact(one) else own, t) for one in each], source.axis)
                values[path] = value if isinstance(source, Time) else _followed(value, call.dtype, own.dtype)
        outs.append(call(values))
    return list(strands[0].answer.rows(outs[-1]).chunk(len(strands)))


def _followed(value: Any, before: torch.dtype | None, now: torch.dtype) -> Any:
    """What was kept in the precision of a network, in the one to which the network has moved."""
    if before is now:
        return value
    if isinstance(value, list):
        return [_followed(one, before, now) for one in value]
    return value.to(now) if isinstance(value, Tensor) and value.dtype is before else value


def _exact(source: Source) -> bool:
    """Whether a source rounds x itself."""
    return isinstance(source, State) and source.dtype is not None
