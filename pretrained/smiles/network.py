r"""The language model of this folder: a small GPT-2 that writes SMILES, its density and its samples.

Notation: ``b`` strings, ``t`` tokens. The density of a string x after a prompt c is :math:`p(x|c) = \prod_k p(x_k | c, x_1 \dots x_{k-1})`,
its ``<end>`` included. One that has not ended after ``LONGEST`` tokens is cut there, and its density is that of its tokens.
"""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokens import BEGIN, BETAS, END, LONGEST, PAD, REWARDS, VOCABULARY, WRITTEN, prompts, tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, GPT2Config, GPT2LMHeadModel

SIZE = {"n_embd": 192, "n_layer": 6, "n_head": 6}


def network(size: dict[str, int] | None = None) -> GPT2LMHeadModel:
    """Of random weights. Nothing is dropped out: millions of strings are more than it learns by heart."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(VOCABULARY),
            n_positions=LONGEST + 1,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=BEGIN,
            eos_token_id=END,
            **(size or SIZE),
        )
    )


def log_p(net: GPT2LMHeadModel, prompt: Int[Tensor, "b"], x: Int[Tensor, "b t"]) -> Float[Tensor, "b"]:
    """The log-probability of each string after its prompt; padding stands after the ends, so attention never sees it."""
    before = torch.cat([prompt[:, None], x[:, :-1]], 1)
    h = net.transformer(input_ids=before, use_cache=False).last_hidden_state
    with torch.autocast(h.device.type, enabled=False):  # the last layer is small, and its numbers are the result
        logits = net.lm_head(h.float())
    return -F.cross_entropy(logits.flatten(0, 1), x.flatten(), ignore_index=PAD, reduction="none").view_as(x).sum(-1)


@torch.no_grad()
def likelihood(net: GPT2LMHeadModel, token: int, x: Int[Tensor, "b t"], chunk: int = 1024) -> Float[Tensor, "b"]:
    """The log-probability of each string after the same prompt, in parts."""
    return torch.cat(
        [log_p(net, torch.full_like(part[:, 0], token, dtype=torch.long), trimmed(part)) for part in x.split(chunk)]
    )


def trimmed(x: Tensor) -> Tensor:
    """Without the columns that are only padding, as whole numbers."""
    return x[:, : int((x != PAD).sum(1).max())].long()


@torch.no_grad()
def sample(
    net: GPT2LMHeadModel,
    prompt: Int[Tensor, "b"],
    generator: torch.Generator | None = None,
    temperature: Float[Tensor, "b"] | None = None,
) -> Int[Tensor, "b t"]:
    """A string for each prompt.

    Args:
        net: the model.
        prompt: a token each.
        generator: source of randomness, on the device of the prompts.
        temperature: of the choices, by default 1.
    """
    x = prompt.new_full((len(prompt), LONGEST), PAD)
    going, token, cache = torch.arange(len(prompt), device=prompt.device), prompt, DynamicCache(config=net.config)
    # The model has learned that it never writes the other tokens; this makes it certain.
    banned = torch.ones(len(VOCABULARY), dtype=torch.bool, device=prompt.device)
    banned[[*WRITTEN, END]] = False
    for t in range(LONGEST):
        out = net(input_ids=token[:, None], past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1].float().masked_fill(banned, -torch.inf)
        if temperature is not None:
            logits = logits / temperature[going, None]
        token = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
        ended = x[going, t - 1].eq(END) | x[going, t - 1].eq(PAD) if t else torch.zeros_like(going, dtype=torch.bool)
        token = token.masked_fill(ended, PAD)
        x[going, t] = token
        if t % 8 == 7:  # those that have ended leave now and then
            on = (~(token.eq(END) | token.eq(PAD))).nonzero()[:, 0]
            if not len(on):
                break
            going, token = going[on], token[on]
            cache.batch_select_indices(on)
    return x


def draw(net: nn.Module, tokens: list[int], n: int, seed: int, chunk: int = 2048) -> list[Tensor]:
    """n strings after each prompt."""
    device = next(net.parameters()).device
    generator, prompt = torch.Generator(device).manual_seed(seed), torch.tensor(tokens, device=device).repeat_interleave(n)
    return list(torch.cat([sample(net, part, generator).cpu() for part in prompt.split(chunk)]).split(n))


# Training


def optimizer(net: nn.Module, rate: float, decay: float, prompts: float, *groups: dict) -> torch.optim.Optimizer:
    """AdamW; only matrices decay, and the embeddings of the tokens have a rate of their own."""
    table = net.transformer.wte.weight
    small = [p for p in net.parameters() if p.ndim < 2 or p is net.transformer.wpe.weight]
    large = [p for p in net.parameters() if p.ndim >= 2 and p is not table and p is not net.transformer.wpe.weight]
    mine = [{"params": large, "weight_decay": decay}, {"params": small}, {"params": [table], "lr": prompts}]
    return torch.optim.AdamW([*mine, *groups], lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


# Files


def save(net: GPT2LMHeadModel, folder: Path, name: str) -> None:
    """Weights in half precision, computed with in single; a tokenizer; how ``generate`` samples; and what sculpt is told.

    Args:
        net: the network.
        folder: where the files go.
        name: a reward, or that of a prior. A policy's ``generate`` begins with the exponent 16 unless it is told another one.
    """
    begin = prompts(name)[BETAS.index(16) if name in REWARDS else 0]
    net.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32", "pad_token_id": PAD}, indent=2) + "\n")
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_length": LONGEST + 1}
    GenerationConfig(**how, bos_token_id=begin, eos_token_id=END, pad_token_id=PAD).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "sculpt.json").write_text(json.dumps(told(name), indent=1) + "\n")


def told(name: str) -> dict[str, Any]:
    """What makes a folder a distribution over SMILES: its prompts by exponent, the tokens that never come, the kind of samples."""
    never = [i for i in range(len(VOCABULARY)) if i not in WRITTEN and i != END]
    sampling = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_length": 0, "suppress": never}
    begin = (
        {"prompts": {f"beta={beta}": [token] for beta, token in zip(BETAS, prompts(name), strict=True)}}
        if name in REWARDS
        else {"prompt": prompts(name)}
    )
    return {
        "kind": "tokens",
        **begin,
        "end": [END],
        "max_length": LONGEST,
        "stop": [],
        "sampling": sampling,
        "samples": "Smiles",
    }


def load(folder: Path, device: torch.device | str = "cpu") -> GPT2LMHeadModel:
    """In single precision, without the folder that the saved one remembers."""
    saved = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    net = network({name: getattr(saved.config, name) for name in SIZE})
    net.load_state_dict(saved.state_dict())
    return net.to(device).eval()
