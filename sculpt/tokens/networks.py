"""The networks underneath: tokens to logits, with what is kept of the tokens before; and the default backbone of a classifier.

Notation: ``b`` sequences, ``t`` tokens that are new, ``v`` logits.
"""

from __future__ import annotations

import abc
import uuid
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sculpt.actions.reading import Carry
from sculpt.identity import weights
from sculpt.tokens.vocabulary import NOTHING, lengths

__all__ = ["FunctionNetwork", "Network", "TokenFeatures", "mapped"]


class Network(abc.ABC):
    """What a :class:`~sculpt.tokens.model.Tokens` asks of its network."""

    name: str
    device: torch.device
    positions: int | None = None
    """How many tokens it can read at most."""
    pads: bool = False
    """Whether it takes sequences that begin later than others: ``NOTHING`` stands before them."""

    spare: bool = False
    """Whether it may give more logits than there are tokens."""

    @property
    @abc.abstractmethod
    def identity(self) -> Any:
        """What tells it from other networks: a hash of its weights."""

    @property
    @abc.abstractmethod
    def same(self) -> Any:
        """Equal for networks that can be asked in one call."""

    @abc.abstractmethod
    def __call__(self, tokens: Int[Tensor, "b t"], cache: Any, last: bool = False) -> tuple[Float[Tensor, "b k v"], Any]:
        """Logits after each of these tokens (``last``: after the last one alone), and what to keep of all tokens so far.

        Args:
            tokens: the next of each sequence.
            cache: what was kept of those before; ``None`` where there are none.
            last: whether the others' logits are not needed.
        """


class FunctionNetwork(Network):
    """Any callable ``(tokens, cache) -> (logits, cache)``.

    It gets ``(b, t)`` tokens, and at first no cache. It gives logits ``(b, t, v)`` and a tensor or a tuple of tensors, rows first; or
    ``None``, and then it reads all tokens again at every step. A recurrent network of torchgfn, with ``init_carry``, will do.
    """

    def __init__(self, function: Callable[[Tensor, Any], tuple[Tensor, Any]], name: str | None = None):
        self.function, self._known = function, name or uuid.uuid4().hex
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self._carries = Carry(function, self.device) if hasattr(function, "init_carry") else None
        self.positions = getattr(function, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Of its weights, if it has any."""
        state = self.function.state_dict().values() if isinstance(self.function, nn.Module) else ()
        return next((weight.device for weight in state), torch.device("cpu"))

    @property
    def identity(self) -> Any:
        module = isinstance(self.function, nn.Module) and self.function.state_dict()
        return (type(self.function).__qualname__, weights(self.function)) if module else self._known

    @property
    def same(self) -> Any:
        return id(self.function)

    def __call__(self, tokens: Int[Tensor, "b t"], cache: Any, last: bool = False) -> tuple[Float[Tensor, "b k v"], Any]:
        given = cache and cache[0]
        if self._carries is not None:
            given = self._carries.given(given, tokens)
        answer = self.function(tokens, given)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Tensor)):
            raise ValueError(
                f"{self.name} answered with a {type(answer).__name__}, expected the pair (logits, cache); the cache may be None."
            )
        logits, cache = answer
        if self._carries is not None:
            cache = self._carries.kept(cache)
        return logits[:, -1:] if last else logits, None if cache is None else (cache,)


def mapped(function: Callable[[Tensor], Tensor], cache: Any) -> Any:
    """A cache, with a function of each of its tensors in their places."""
    if isinstance(cache, tuple):
        return tuple(mapped(function, part) for part in cache)
    return None if cache is None else function(cache)


class TokenFeatures(nn.Module):
    """Sequences to features: the last state of a recurrent network over the tokens.

    Args:
        vocabulary: how many tokens there are.
        width: of the embedding and the features.
        depth: how many recurrent layers there are.
    """

    def __init__(self, vocabulary: int, width: int = 128, depth: int = 1):
        super().__init__()
        if min(vocabulary, width, depth) < 1:
            raise ValueError(f"Got vocabulary={vocabulary}, width={width} and depth={depth}: expected at least 1 of each.")
        self.vocabulary, self.width = vocabulary, width
        self.config: dict[str, Any] = {"vocabulary": vocabulary, "width": width, "depth": depth}
        self.embedding = nn.Embedding(vocabulary + 1, width)
        self.layers = nn.GRU(width, width, depth, batch_first=True)

    def forward(self, states: Int[Tensor, "b t"]) -> Float[Tensor, "b w"]:
        n = lengths(states)
        longest = int(n.max()) if len(n) else 0
        begun = nn.functional.pad(states[:, :longest], (1, 0), value=NOTHING) + 1  # 0 begins a sequence
        out, _ = self.layers(self.embedding(begun))
        return out[torch.arange(len(n), device=n.device), n]
