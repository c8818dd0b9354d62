"""Small language models over a handful of tokens, whose sequences can be counted."""

import itertools

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import sculpt


class Recurrent(nn.Module):
    """A GRU as a callable ``(tokens, cache) -> (logits, cache)``."""

    def __init__(self, seed, vocabulary=4, width=16, scale=6.0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.gru = nn.Embedding(vocabulary, width), nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, vocabulary)
        self.out.weight.data *= scale

    def forward(self, tokens, cache):
        h, cache = self.gru(self.embedding(tokens), None if cache is None else cache.transpose(0, 1).contiguous())
        return self.out(h), cache.transpose(0, 1)


def causal(seed, vocabulary=4, scale=0.3, positions=32, **options):
    """A GPT-2 with random weights; its last token ends sequences."""
    torch.manual_seed(seed)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": vocabulary, "n_positions": positions} | options
    end = vocabulary - 1
    return GPT2LMHeadModel(GPT2Config(eos_token_id=end, bos_token_id=end, initializer_range=scale, **size))


def recurrent_models(m, length=4, vocabulary=4, **options):
    end = vocabulary - 1
    nets = (Recurrent(seed, vocabulary) for seed in range(m))
    return [
        sculpt.Tokens(net, vocabulary=vocabulary, end=end, max_length=length, name=f"r{i}", **options)
        for i, net in enumerate(nets)
    ]


def causal_models(m, length=4, vocabulary=4, scale=0.3, **options):
    nets = (causal(seed, vocabulary, scale) for seed in range(m))
    return [sculpt.Tokens(net, max_length=length, name=f"t{i}", **options) for i, net in enumerate(nets)]


def sequences(model):
    """All of them, and where each is."""
    written = [i for i in range(model.vocabulary.size) if i not in model.end]
    every = [
        w + (-1,) * (model.max_length - k) for k in range(model.max_length + 1) for w in itertools.product(written, repeat=k)
    ]
    return torch.tensor(every, device=model.device), {x: i for i, x in enumerate(every)}


def densities(models):
    """Log-densities ``(s, m)`` of all sequences."""
    return torch.stack([model.log_p(sequences(models[0])[0]) for model in models], -1)


def over_floor(x, model, target, repeats=20):
    """L1 of samples from a target over all sequences, and the same over that of as many exact draws."""
    place, g = sequences(model)[1], torch.Generator().manual_seed(0)
    index = [torch.tensor([place[row] for row in map(tuple, x.tolist())])]
    index += [torch.multinomial(target, len(x), True, generator=g) for _ in range(repeats)]
    error, *floor = [float((torch.bincount(i, minlength=len(target)) / len(i) - target).abs().sum()) for i in index]
    return error, error / max(sum(floor) / len(floor), 1e-9)
