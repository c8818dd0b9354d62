"""Sequences under a model: the next token while they are written, and whole ones in one pass.

Notation: ``b`` sequences, ``t`` tokens, ``m`` models of one network, ``v`` tokens of the vocabulary, ``a`` actions: these and the exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sculpt.actions.reading import Memory
from sculpt.actions.states import NEG_INF, distinct
from sculpt.state import in_parts
from sculpt.tokens.networks import mapped
from sculpt.tokens.vocabulary import NOTHING, lengths

if TYPE_CHECKING:
    from sculpt.tokens.model import Tokens

__all__ = ["after", "ask_once", "checked", "log_p", "read_on"]

AT_ONCE = 2**15
"""Tokens that go through a network at once where whole sequences are read."""
NUMBERS = 2**24
"""Logits of theirs at once."""


@torch.no_grad()
def read_on(
    models: Sequence[Tokens], states: Int[Tensor, "b t"], memory: Memory | None
) -> tuple[list[Float[Tensor, "b a"]], Memory | None]:
    """The next token of sequences that are all of one length, under each model, and what to keep of them.

    Args:
        models: of one network.
        states: what is written.
        memory: of all tokens but the last; without one, all of them are read.
    """
    first, b, m, t = models[0], len(states), len(models), int(lengths(states[:1]).sum())
    if t == first.max_length or not b:
        return [_ended(first, b)] * m, memory
    if memory is None:
        longest = max(len(model.prompt) for model in models)
        tokens = torch.stack([_begun(model, states[:, :t], longest) for model in models], dim=1)
    else:
        tokens = states[:, None, t - 1 : t].expand(-1, m, -1)
    cache = None if memory is None else mapped(lambda part: part.flatten(0, 1), memory.tensors)
    logits, cache = first.network(tokens.flatten(0, 1), cache, last=True)
    logits = checked(first, logits, b * m)[:, -1].unflatten(0, (b, m))
    early = (torch.tensor(t < model.sampling.min_length, device=states.device) for model in models)
    log_p = [model.sampling.log_p(logits[:, i], first.end, e) for i, (model, e) in enumerate(zip(models, early, strict=True))]
    if first.stop:
        over = first.vocabulary.stops(states, first.stop) <= t
        log_p = [torch.where(over[:, None], _ended(first, b), table) for table in log_p]
    keep = first.cache and cache is not None
    return log_p, Memory(mapped(lambda part: part.unflatten(0, (b, m)), cache)) if keep else None


@torch.no_grad()
def after(model: Tokens, states: Int[Tensor, "b t"]) -> Float[Tensor, "b a"]:
    """Log-probabilities of the actions after each of these prefixes, of any lengths. A prefix of another one costs nothing."""
    unique, place = torch.unique(states, dim=0, return_inverse=True)
    # In this order a prefix stands right before what goes on from it.
    goes_on = ((unique[:-1] == NOTHING) | (unique[:-1] == unique[1:])).all(-1)
    whole = F.pad(~goes_on, (0, 1), value=True)
    owner, n, longest = whole.cumsum(0) - whole.long(), lengths(unique), unique[whole]
    out = torch.empty(len(unique), model.n_actions, dtype=torch.float64, device=states.device)
    for some in torch.arange(len(longest), device=states.device).split(_rows(model, longest)):
        mine = ((owner >= some[0]) & (owner <= some[-1])).nonzero()[:, 0]
        out[mine] = _tables(model, longest[some])[owner[mine] - some[0], n[mine]]
    return out[place]


def log_p(model: Tokens, x: Int[Tensor, "b t"]) -> Float[Tensor, "b"]:
    """Log-probabilities of sequences with their end."""
    _check(model, x)

    def of_some(x: Int[Tensor, "b t"]) -> Float[Tensor, "b"]:
        tables = _tables(model, x)
        k = tables.shape[1]
        chosen = F.pad(x, (0, 1), value=NOTHING)[:, :k]
        chosen = torch.where(chosen == NOTHING, model.n_actions - 1, chosen)
        steps = tables.gather(-1, chosen[..., None])[..., 0]
        return torch.where(torch.arange(k, device=x.device) <= lengths(x)[:, None], steps, 0.0).sum(-1)

    if not len(x):
        return torch.zeros(0, dtype=torch.float64, device=x.device)
    unique, rows = distinct(x)
    return in_parts(of_some, _rows(model, x), unique)[rows]


def _check(model: Tokens, x: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] != model.max_length or bool((x >= model.vocabulary.size).any()):
        raise ValueError(
            f"Sequences of {model} are ({'b'}, {model.max_length}) numbers of tokens below {model.vocabulary.size}, {NOTHING} after their end; "
            f"got shape {tuple(x.shape)} up to {int(x.max()) if x.numel() else 0}."
        )


def _tables(model: Tokens, x: Int[Tensor, "b t"]) -> Float[Tensor, "b k a"]:
    """Log-probabilities of the actions after each prefix of these. What stands after the end of one of them is of no use."""
    longest = int(lengths(x).max())
    read = min(longest, model.max_length - 1)
    tokens = _begun(model, x[:, :read].clamp(min=0), len(model.prompt))
    logits = checked(model, model.network(tokens, None)[0], len(x))[:, len(model.prompt) - 1 :]
    step = torch.arange(read + 1, device=x.device)
    log_p = model.sampling.log_p(logits, model.end, step < model.sampling.min_length)
    if model.stop:
        over = step >= model.vocabulary.stops(x, model.stop)[:, None]
        log_p = torch.where(over[..., None], _ended(model, 1), log_p)
    return torch.cat([log_p, _ended(model, 1).expand(len(x), 1, -1)], 1) if longest > read else log_p


def _begun(model: Tokens, states: Int[Tensor, "b t"], longest: int) -> Int[Tensor, "b t2"]:
    """The model's prompt before these, as long as the longest one."""
    prompt = [NOTHING] * (longest - len(model.prompt)) + [*model.prompt]
    return torch.cat([torch.tensor(prompt, device=states.device).expand(len(states), -1), states], dim=1)


def _ended(model: Tokens, b: int) -> Float[Tensor, "b a"]:
    """All that is left is the exit."""
    out = torch.full((b, model.n_actions), NEG_INF, dtype=torch.float64, device=model.device)
    out[:, -1] = 0.0
    return out


def _rows(model: Tokens, x: Int[Tensor, "b t"]) -> int:
    """How many sequences are read at once."""
    tokens = len(model.prompt) + (int(lengths(x).max()) if len(x) else 0)
    return max(1, min(AT_ONCE, NUMBERS // model.n_actions) // tokens)


@torch.no_grad()
def ask_once(model: Tokens) -> None:
    """Ask for the first token: what does not fit is better known before time is spent."""
    logits, cache = model.network(torch.tensor(model.prompt, device=model.device).expand(2, -1), None)
    first = checked(model, logits, 2, len(model.prompt))[:, -1]
    if first.isnan().any() or not first.isfinite().any(-1).all():
        raise FloatingPointError(
            f"{model} answers its prompt with logits that are no numbers. Check its weights and its dtype."
        )
    shapes: list[tuple[int, ...]] = []
    mapped(lambda part: shapes.append(tuple(part.shape)) or part, cache)  # type: ignore[func-returns-value]
    if wrong := [shape for shape in shapes if shape[:1] != (2,)]:
        raise ValueError(
            f"{model} keeps a tensor of shape {wrong[0]} for 2 sequences; expected their rows along the first axis."
        )


def checked(model: Tokens, logits: Tensor, b: int, t: int | None = None) -> Float[Tensor, "b k v"]:
    """The logits of the vocabulary, ``(b, t, v)``. Some networks have more of them, to spare, which are no tokens."""
    v = model.vocabulary.size
    fits = logits.ndim == 3 and logits.shape[0] == b and t in (None, logits.shape[1])
    if not fits or logits.shape[2] < v or (logits.shape[2] > v and not model.network.spare):
        raise ValueError(
            f"{model} answered {b} sequences{f' of {t} tokens' if t else ''} with logits of shape {tuple(logits.shape)}; expected one for each "
            f"of {v:,} tokens after each token, ({b}, {t or 'tokens'}, {v}). Check vocabulary= or tokenizer=."
        )
    return logits[..., :v]
