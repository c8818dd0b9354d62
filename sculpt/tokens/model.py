r"""Language models: GFlowNets on a tree, whose log-density is known at every prefix.

A state is what has been written of a sequence. Its actions are the tokens of the vocabulary and the exit, to which all end tokens lead; so
an end is no part of a sample. A sequence that has L tokens ends there without one, and its density is that of its tokens:

.. math:: \log p(x) = \sum_t \log \pi(x_t \mid x_1 \dots x_{t-1}) + [|x| < L] \, \log \pi(\text{end} \mid x)

A state has one parent, so this is exact for every prefix, and compositions of whole sequences need nothing but these numbers.
Notation: ``b`` sequences, ``t`` tokens, ``m`` models, ``a`` actions; ``NOTHING`` stands where nothing is written yet.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sculpt.actions.model import ActionModel
from sculpt.actions.reading import Memory
from sculpt.checks import check_whole
from sculpt.composition import Composition
from sculpt.identity import digest
from sculpt.model import BaseModel
from sculpt.tokens import learning, sequences, transformers
from sculpt.tokens.networks import FunctionNetwork, Network, TokenFeatures
from sculpt.tokens.results import Reader, Texts
from sculpt.tokens.sampling import Sampling
from sculpt.tokens.vocabulary import NOTHING, Vocabulary, lengths

if TYPE_CHECKING:
    from sculpt.formula import Formula

__all__ = ["Tokens", "TokensComposition"]


class Tokens(ActionModel):
    """A language model under one prompt: sequences of at most ``max_length`` tokens.

    Args:
        model: a causal language model of transformers; or a callable ``(tokens, cache) -> (logits, cache)`` of tokens ``(b, t)``, logits
            ``(b, t, v)`` and whatever it wants to be given back with the next tokens: a tensor or a tuple of tensors, rows first, ``None``
            at first.
        tokenizer: of transformers.
        prompt: what stands before every sequence and is no part of it, a text or tokens; by default the token that begins (or ends) texts.
        vocabulary: where there is no tokenizer: how many tokens there are, or the words that they stand for.
        end: the token that ends a sequence, or several, as numbers or words; by default the model's own. ``()`` says that there is none,
            and that all sequences have ``max_length`` tokens.
        max_length: of a sequence, without prompt and end; by default as the model's generation_config says, or as many as it has positions
            for, up to 256.
        stop: texts after which a sequence ends; they are a part of it.
        sampling: temperature, top-k, top-p and the like: they are a part of the model's distribution.
        name: how formulas and messages call it; by default the prompt.
        cache: whether to keep what the network has read, so that a step costs one token; without it a step reads all tokens again.
        samples: what its samples are: texts, or a kind of texts that knows more of them.

    Example:
        >>> fair = lambda tokens, cache: (torch.zeros(*tokens.shape, 3), cache)  # logits of heads, tails and the end
        >>> sculpt.Tokens(fair, vocabulary=3, end=2, max_length=6, prompt=[0], name="coins").sample(4).x.shape[0]
        4
    """

    learns = False
    """Whether its log-probabilities have gradients."""

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor, Any], tuple[Tensor, Any]],
        tokenizer: Any = None,
        prompt: str | Sequence[int] | None = None,
        *,
        vocabulary: int | Sequence[str] | None = None,
        end: int | str | Sequence[int | str] | None = None,
        max_length: int | None = None,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
        name: str | None = None,
        cache: bool = True,
        samples: type[Texts] = Texts,
    ):
        told = transformers.facts(model)
        if tokenizer is None and vocabulary is None and told.width is None:
            raise ValueError("How many tokens are there? Pass tokenizer=, or vocabulary=, their number or their words.")
        self.model, self.tokenizer, self.cache, self.samples_class = model, tokenizer, cache, samples
        self.network: Network = transformers.CausalNetwork(model) if told.width else FunctionNetwork(model, name)
        self.vocabulary = Vocabulary(tokenizer if tokenizer is not None else told.width if vocabulary is None else vocabulary)
        self.n_actions, self._name, self._told = self.vocabulary.size + 1, name, told
        self.end = self._ends(end)
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self.sampling = sampling or Sampling()
        if isinstance(model, nn.Module):
            model.eval()
        self._prompt(prompt, max_length)

    # What it is

    @property
    def name(self) -> str:  # type: ignore[override]
        """As given, or the prompt."""
        return self._name or self.vocabulary.text(self.prompt) or self.network.name

    @property
    def key(self) -> str:
        """A hash of the weights, the prompt and all that changes the distribution."""
        return digest("tokens", self.network.identity, self.prompt, self.rules, vars(self.sampling))

    @property
    def device(self) -> torch.device:
        """The network's."""
        return self.network.device

    @property
    def networks(self) -> tuple[nn.Module, ...]:  # type: ignore[override]
        """The language model; a function has none."""
        return (self.model,) if isinstance(self.model, nn.Module) else ()

    @property
    def max_length(self) -> int:
        """Tokens of a sequence at most."""
        return self.shape[0]

    @property
    def rules(self) -> str:
        return digest(self.vocabulary.identity, self.end, self.max_length, self.stop)

    @property
    def together(self) -> Any:
        """Models of one network are read in one call; shorter prompts are padded on the left where the network knows about that."""
        return self.network.same, self.max_length, self.cache, None if self.network.pads else len(self.prompt)

    @property
    def batch_size(self) -> int:
        """How many sequences at a time."""
        return max(64, 2**21 // self.n_actions)

    @property
    def decoder(self) -> Callable[[Tensor], Any]:
        return Reader((self,))

    def default_network(self) -> nn.Module:
        return TokenFeatures(self.vocabulary.size)

    def check_composable(self, other: BaseModel) -> None:
        its = getattr(other, "anchor", other)
        if not isinstance(its, Tokens):
            raise ValueError(f"{self} writes tokens and {other} is a {type(other).__name__}: they have no common states.")
        if self.vocabulary.identity != its.vocabulary.identity:
            raise ValueError(
                f"{self} and {other} cannot be composed: their tokens differ, {self.vocabulary} and {its.vocabulary}: "
                f"{self.vocabulary.difference(its.vocabulary)}. What helps: models fine-tuned from one share its tokenizer; or train one of these on with the other's."
            )
        for what in ("end", "max_length", "stop", "device"):
            if (p := getattr(self, what)) != (q := getattr(its, what)):
                raise ValueError(
                    f"{self} and {other} cannot be composed: {what} is {p} on one side, {q} on the other. Pass the same {what}=."
                )

    def compose(self, formula: Formula, models: Sequence[BaseModel], *how: Any) -> TokensComposition:
        return TokensComposition(formula, models, *how)

    # Others of the same weights

    def with_prompt(self, prompt: str | Sequence[int], name: str | None = None) -> Tokens:
        """The same network under another prompt, as a base model of its own.

        Args:
            prompt: a text, or tokens.
            name: of the new model.
        """
        new = copy.copy(self)
        new._name = name
        new._prompt(prompt, self.max_length)
        return new

    def with_sampling(self, name: str | None = None, **changes: Any) -> Tokens:
        """The same network with another temperature, top-k, top-p, min_length or suppressed tokens, as a base model of its own.

        Args:
            name: of the new model.
            changes: what differs.
        """
        new = copy.copy(self)
        new.sampling, new._name = replace(self.sampling, **changes), name or self._name
        new._check_end()
        return new

    def with_adapters(self, adapters: Mapping[str, float], name: str | None = None) -> Tokens:
        """The same network with these of its LoRAs and no others, each with a weight, as a base model of its own; ``{}`` is the network
        without any. The model of transformers loads them: ``model.load_adapter(folder, adapter_name=...)``.

        Args:
            adapters: their names, and how much each counts.
            name: of the new model.
        """
        new = copy.copy(self)
        if not isinstance(self.network, transformers.CausalNetwork):
            raise ValueError(f"{self} is no model of transformers, and has no adapters.")
        new.network = self.network.with_adapters(adapters)
        new._name = name or " + ".join([self.name, *adapters])
        return new

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        prompt: str | Sequence[int] | None = None,
        max_length: int | None = None,
        stop: str | Sequence[str] = (),
        name: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Tokens:
        """Read a folder of transformers, a causal language model as safetensors and its tokenizer; or of :meth:`save_pretrained`, which
        knows prompt, lengths and sampling itself.

        Args:
            folder: with config.json.
            prompt: before every sequence.
            max_length: of a sequence.
            stop: texts that end one.
            name: how it is called; by default as the folder, with the prompt or the condition.
            device: where the network goes.
            dtype: of its numbers.
            options: of :class:`~sculpt.tokens.sampling.Sampling`; and conditions such as ``beta=32``, where the folder has a prompt for each.
        """
        folder = Path(folder)
        name = name or learning.title(folder.resolve().name, {"prompt": prompt, **options})
        given = {"prompt": prompt, "max_length": max_length, "stop": stop, "name": name}
        told = learning.read(folder, given, options)
        return cls(*transformers.read_folder(folder, device, dtype), **told)

    # Distillation

    @property
    def module(self) -> nn.Module:
        return self.model  # type: ignore[return-value]

    def with_module(self, module: nn.Module) -> Tokens:
        return learning.with_module(self, module)

    def learner(self, name: str, network: nn.Module | None = None) -> Tokens:
        return learning.to_learn(self, name, network)

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder of transformers, with what makes it this distribution beside it."""
        learning.save(self, Path(folder))

    # The chain

    def start(self, n: int) -> Int[Tensor, "n t"]:
        return torch.full((n, self.max_length), NOTHING, device=self.device)

    def step(self, states: Int[Tensor, "b t"], actions: Int[Tensor, "b"]) -> Int[Tensor, "b t"]:
        return states.scatter(1, lengths(states)[:, None], actions[:, None])

    def backtrack(
        self, states: Int[Tensor, "b t"], generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b"]]:
        last = lengths(states)[:, None] - 1
        return states.scatter(1, last, NOTHING), states.gather(1, last)[:, 0]

    def read(
        self, models: Sequence[ActionModel], states: Int[Tensor, "b t"], memory: Memory | None
    ) -> tuple[Sequence[Float[Tensor, "b a"]], Memory | None]:
        return sequences.read_on(models, states, memory)  # type: ignore[arg-type]

    def log_pf(self, states: Int[Tensor, "b t"]) -> Float[Tensor, "b a"]:
        r""":math:`\log \pi` of every token, and of the exit, after each of these prefixes. Those on the way to another one cost nothing."""
        return sequences.after(self, states)

    def log_p(self, x: Int[Tensor, "b t"]) -> Float[Tensor, "b"]:
        """Log-probabilities of sequences with their end."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            return sequences.log_p(self, x)

    def notes(self, x: Int[Tensor, "b t"]) -> list[str]:
        if not self.end or not (
            cut := int(((lengths(x) == self.max_length) & (self.vocabulary.stops(x, self.stop) > self.max_length)).sum())
        ):
            return []
        return [f"{cut} of {len(x)} sequences have max_length={self.max_length} tokens, and were cut there"]

    # What it is given

    def _ends(self, end: Any) -> tuple[int, ...]:
        told = getattr(self.tokenizer, "eos_token_id", None) if self._told.end is None else self._told.end
        given = told if end is None else end
        if given is None:
            raise ValueError(
                "Which token ends a sequence? Pass end=, one or several; or end=() for sequences that all have max_length tokens."
            )
        return tuple(sorted({self.vocabulary.token(word) for word in ([given] if isinstance(given, int | str) else given)}))

    def _check_end(self) -> None:
        if wrong := [i for i in self.sampling.suppress if i >= self.vocabulary.size]:
            raise ValueError(
                f"suppress names the token {wrong[0]}, and {self.vocabulary} has none beyond {self.vocabulary.size - 1}."
            )
        if self.end and set(self.end) <= set(self.sampling.suppress):
            raise ValueError(
                f"The end tokens {self.end} are suppressed, so no sequence would ever end. Leave one of them out of suppress."
            )

    def _prompt(self, prompt: str | Sequence[int] | None, max_length: int | None) -> None:
        begin = [i for i in (self._told.begin, getattr(self.tokenizer, "bos_token_id", None), *self.end) if i is not None][:1]
        self.prompt = (self.vocabulary.encode(prompt) if prompt else ()) or tuple(begin)
        if not self.prompt:
            raise ValueError("A network begins from a token. Pass prompt=, the token that begins a sequence, [number].")
        if self._told.width is not None and max(self.prompt) >= self._told.width:
            raise ValueError(
                f"The prompt has a token {max(self.prompt)}, and {self.network.name} knows {self._told.width:,} tokens."
            )
        room = None if self.network.positions is None else self.network.positions - len(self.prompt) + 1
        usual = self._told.max_length or 256 + len(self.prompt)
        length = check_whole("max_length", max_length) or max(1, min(usual - len(self.prompt), room or 256))
        if room is not None and length > room:
            raise ValueError(
                f"The prompt has {len(self.prompt)} tokens and the model reads {self.network.positions}, so a sequence may have {max(room, 0)}; max_length={length} are more. Shorten the prompt, or pass a smaller max_length."
            )
        self.shape, self.longest = (length,), length
        if self.sampling.min_length > length:
            raise ValueError(f"min_length={self.sampling.min_length} is more than max_length={length}. Pass a smaller one.")
        self._check_end()
        sequences.ask_once(self)

    if TYPE_CHECKING:

        def __or__(self, other: BaseModel) -> TokensComposition: ...
        def __and__(self, other: BaseModel) -> TokensComposition: ...
        def __sub__(self, other: BaseModel) -> TokensComposition: ...


class TokensComposition(Composition):
    """A composition of language models. Its samples know their log-densities under all of them."""

    @property
    def decoder(self) -> Callable[[Tensor], Any]:
        return Reader(tuple(self.leaves))
