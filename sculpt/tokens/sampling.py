r"""How a model chooses its next token: this makes its logits a distribution, which is the base model's own.

Notation: ``v`` tokens of the vocabulary; the exit comes after them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sculpt.actions.states import NEG_INF
from sculpt.checks import each, real, whole

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """Options of transformers' ``generate`` that change a model's distribution. Its log-density is that of what it then samples.

    Args:
        temperature: by which logits are divided.
        top_k: how many of the most probable tokens may come; ``None`` says all.
        top_p: tokens may come that have this much probability together, the most probable first.
        min_length: tokens before which no end may come.
        suppress: tokens that are never written.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_length: int = 0
    suppress: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not 0 < real("temperature", self.temperature) < math.inf:
            raise ValueError(
                f"temperature divides the logits: a positive number, got {self.temperature}. The most probable token alone is top_k=1."
            )
        if not 0 < real("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p is a probability, more than 0 and at most 1; got {self.top_p}.")
        if self.top_k is not None:
            whole("top_k", self.top_k, least=1)
        whole("min_length", self.min_length, least=0)
        object.__setattr__(
            self, "suppress", tuple(sorted({whole("a token", i, least=0) for i in each("suppress", self.suppress, "tokens")}))
        )

    def log_p(self, logits: Float[Tensor, "*b v"], end: Sequence[int], early: Bool[Tensor, "*#b"]) -> Float[Tensor, "*b a"]:
        """Log-probabilities of all tokens, and last that of the exit: of the end tokens together, which are no tokens of their own.

        Args:
            logits: as the network gives them.
            end: tokens that end a sequence.
            early: where none of these may come yet.
        """
        x, end = logits.to(torch.promote_types(logits.dtype, torch.float32)), list(end)
        if self.suppress:
            x = x.index_fill(-1, torch.tensor(self.suppress, device=x.device), NEG_INF)
        if self.min_length and end:
            x = torch.where(early[..., None], x.index_fill(-1, torch.tensor(end, device=x.device), NEG_INF), x)
        x = x / self.temperature if self.temperature != 1 else x
        if self.top_k is not None and self.top_k < x.shape[-1]:
            x = torch.where(x < x.topk(self.top_k, dim=-1).values[..., -1:], NEG_INF, x)
        if self.top_p < 1:
            x = self._nucleus(x)
        out = x.new_empty(*x.shape[:-1], x.shape[-1] + 1, dtype=torch.float64)
        out[..., :-1] = torch.log_softmax(x.double(), dim=-1)
        out[..., -1] = out[..., end].logsumexp(-1) if end else NEG_INF
        out[..., end] = NEG_INF
        return out

    def _nucleus(self, x: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
        """Without the least probable tokens, which have 1 - top_p together."""
        ordered, order = x.sort(dim=-1)
        out = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
        out[..., -1] = False
        return x.masked_fill(torch.zeros_like(out).scatter(-1, order, out), NEG_INF)
