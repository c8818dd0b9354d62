"""SMILES as tokens: an atom, a bond, a ring's digit or a bracket each.

A sequence is a prompt, the tokens of a string, and ``<end>``. The prompt is one token and says which distribution the string is drawn
from: ``<begin>`` MOSES, ``<seh:16>`` MOSES times SEH^16. A tokenizer writes what it is given, without adding a prompt or an end.
"""

import numpy as np
import torch
from jaxtyping import Int, UInt8
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPLIT = r"\[[^\]]*\]|Br|Cl|%[0-9]{2}|."
SPECIAL = ("<pad>", "<begin>", "<end>", "<unk>")
ATOMS = ("C", "N", "O", "F", "S", "Cl", "Br", "c", "n", "o", "s", "[nH]", "[H]")
MARKS = ("(", ")", "=", "#", "-", "1", "2", "3", "4", "5", "6")
BETAS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""The exponents that a policy may be asked for."""
REWARDS = ("seh", "sa", "qed")
PROMPTS = tuple(f"<{name}:{beta}>" for name in REWARDS for beta in BETAS)
VOCABULARY = (*SPECIAL, *ATOMS, *MARKS, *PROMPTS)
PAD, BEGIN, END, UNKNOWN = range(len(SPECIAL))
WRITTEN = range(len(SPECIAL), len(SPECIAL) + len(ATOMS) + len(MARKS))
"""The tokens that a SMILES is made of."""
LONGEST = 63
"""Tokens of a string at most, its end among them; those of MOSES have 55."""


def prompts(name: str) -> list[int]:
    """The token of each exponent; a prior has one token for all."""
    return [VOCABULARY.index(f"<{name}:{beta}>") for beta in BETAS] if name in REWARDS else [BEGIN]


def tokenizer() -> PreTrainedTokenizerFast:
    """For transformers."""
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=SPECIAL[UNKNOWN]))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    words.decoder = decoders.Fuse()
    words.add_special_tokens([*SPECIAL, *PROMPTS])
    pad, begin, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        unk_token=unknown,
        additional_special_tokens=list(PROMPTS),
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST + 1,
    )


# The same, for millions of strings


def encode(table: bytes) -> UInt8[Tensor, "n t"]:
    """Strings, one a line, as tokens with their end, padded to the longest."""
    codes = np.full(256, UNKNOWN, np.uint8)
    codes[ord("\n")] = END
    for i in WRITTEN:
        token = VOCABULARY[i].encode()
        if len(token) > 1:  # one byte that no SMILES has
            table, token = table.replace(token, bytes([128 + i])), bytes([128 + i])
        codes[token[0]] = i
    flat = codes[np.frombuffer(table, np.uint8)]
    ends = np.flatnonzero(flat == END)
    lengths = np.diff(ends, prepend=-1)
    x = np.full((len(lengths), lengths.max()), PAD, np.uint8)
    x[np.arange(lengths.max()) < lengths[:, None]] = flat[: ends[-1] + 1]
    return torch.from_numpy(x)


def decode(x: Int[Tensor, "n t"] | UInt8[Tensor, "n t"]) -> list[str]:
    """Strings up to their end; one that does not end keeps an open bracket, so that it is no molecule."""
    text = np.array([token if i in WRITTEN else "" for i, token in enumerate(VOCABULARY)], dtype=object)
    x = x.cpu().numpy()
    ended = (x == END).any(1)
    lengths = np.where(ended, (x == END).argmax(1), x.shape[1])
    return ["".join(text[row[:n]]) + "(" * (not e) for row, n, e in zip(x, lengths.tolist(), ended.tolist(), strict=True)]
