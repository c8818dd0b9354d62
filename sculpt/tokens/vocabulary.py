"""What the tokens of a model are: a tokenizer's, words of one's own, or numbers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from sculpt.checks import whole
from sculpt.identity import digest

__all__ = ["NOTHING", "Vocabulary", "lengths"]

NOTHING = -1
"""stands in a state where no token is written yet"""


def lengths(states: Int[Tensor, "*b t"]) -> Int[Tensor, "*b"]:
    """How many tokens are written in each."""
    return (states >= 0).sum(-1)


class Vocabulary:
    """Tokens, and what they look like to a person.

    Args:
        words: a tokenizer of transformers, the words themselves (of a text, its characters), or how many tokens there are.
    """

    def __init__(self, words: Any):
        self.tokenizer = words if hasattr(words, "get_vocab") else None
        if self.tokenizer is None and not isinstance(words, int | Sequence):
            raise TypeError(
                f"vocabulary is how many tokens there are, or the words that they stand for; tokenizer is one of transformers. Got {words!r:.80}."
            )
        self.words = None if self.tokenizer or isinstance(words, int) else [str(word) for word in words]
        if self.words is not None and len(set(self.words)) < len(self.words):
            raise ValueError("vocabulary has a word twice: two tokens would look alike. Pass different words.")
        self.size = len(words) if self.tokenizer or self.words else whole("vocabulary", words, least=1)

    @functools.cached_property
    def identity(self) -> str:
        """A hash of the words and their order."""
        return digest(self._table())

    def _table(self) -> dict[str, int]:
        if self.tokenizer:
            return dict(self.tokenizer.get_vocab())
        return {word: i for i, word in enumerate(self.words or map(str, range(self.size)))}

    def __str__(self) -> str:
        kind = type(self.tokenizer).__name__ if self.tokenizer else "a vocabulary"
        return f"{kind} of {self.size:,} tokens"

    def difference(self, other: Vocabulary) -> str:
        """What tells two vocabularies apart, by an example."""
        mine, its = self._table(), other._table()
        word = min((word for word in mine.keys() | its.keys() if mine.get(word) != its.get(word)), key=lambda w: (len(w), w))
        return f"{word!r:.40} is token {mine.get(word, 'none')} on one side, {its.get(word, 'none')} on the other"

    # Tokens from what a person writes

    def encode(self, text: str | Sequence[int]) -> tuple[int, ...]:
        """The tokens of a prompt; numbers are tokens already."""
        if not isinstance(text, str):
            return tuple(whole("a token", i, least=0) for i in (text.tolist() if isinstance(text, Tensor) else text))
        if self.tokenizer:
            return tuple(self.tokenizer(text)["input_ids"])
        missing = [c for c in text if c not in (self.words or ())]
        if self.words is None or missing:
            raise ValueError(
                f"There is no tokenizer to read {text!r:.80} with{f', and {missing[0]!r} is no word' if missing and self.words else ''}. "
                "Pass tokenizer=, or the numbers of the tokens."
            )
        return tuple(map(self.words.index, text))

    def token(self, word: int | str) -> int:
        """The number of one token."""
        found: Any = word
        if isinstance(word, str):
            found = self._table().get(word)
            if found is None:
                raise ValueError(f"{word!r:.80} is no token of {self}. Pass one of its tokens, or a number.")
        found = whole("a token", found, least=0)
        if found >= self.size:
            raise ValueError(f"Token {found} is none of {self}: expected 0 to {self.size - 1}.")
        return found

    # What a person reads

    def text(self, tokens: Sequence[int]) -> str:
        """The tokens as text, special ones left out; numbers where there are no words."""
        if self.tokenizer:
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return " ".join(map(str, tokens)) if self.words is None else "".join(self.words[i] for i in tokens)

    def texts(self, x: Int[Tensor, "b t"]) -> list[str]:
        """Of each sequence."""
        return [self.text(tokens) for tokens in self.tokens(x)]

    @staticmethod
    def tokens(x: Int[Tensor, "b t"]) -> list[list[int]]:
        """Of each sequence, what is written of it."""
        return [row[:n] for row, n in zip(x.tolist(), lengths(x).tolist(), strict=True)]

    def stops(self, x: Int[Tensor, "b t"], stop: Sequence[str]) -> Int[Tensor, "b"]:
        """After how many tokens each text has one of these strings in it; one more than there are where none ever is."""
        first = lengths(x) + 1
        for i, tokens in enumerate(self.tokens(x) if stop else ()):
            if any(s in self.text(tokens) for s in stop):
                first[i] = next(k for k in range(len(tokens) + 1) if any(s in self.text(tokens[:k]) for s in stop))
        return first
