"""What the finished models are worth: ``recipe.py NAME --card n``."""

import math
import sys
import time
from pathlib import Path

import torch
from moses import quality
from network import draw, likelihood, load
from scores import Workers, log_reward
from tokens import BEGIN, BETAS, PAD, REWARDS, prompts
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))

import recipes
from recipes import table

SHOWN = (0, 4, 8, 16, 32, 64)
"""exponents with a row in a card"""
LICENCE = "MOSES: Insilico Medicine, MIT. The weights are the project's."
STRINGS = """The distribution is over **strings**. A molecule has many, and the model writes most of its molecules canonically; the others
are strings of their own, with a density of their own. The density counts the end, too. No string has more than 62 tokens."""


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def size_and_cost(net: nn.Module, folder: Path) -> dict[str, str]:
    runs = recipes.read_runs(folder)
    size, config = sum(p.numel() for p in net.parameters()), net.config
    layers = (
        f"`GPT2LMHeadModel`, {config.n_layer} layers of width {config.n_embd}, {size:,} parameters, saved in half precision"
    )
    more, steps = ", `--more`" * (len(runs) > 1), " and ".join(f"{run['steps']:,}" for run in runs)
    recipe = f"`python pretrained/smiles/recipe.py {runs[0]['name']}`{more}: {steps} steps of {runs[0]['batch']:,} strings, averaged weights"
    return {
        "network": layers,
        "recipe": recipe,
        "cost": f"{recipes.written_cost(runs)} by the clock; the device had other work, too",
    }


def code(name: str, prompt: str) -> str:
    return f"""
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("pretrained/smiles/{name}")
model = AutoModelForCausalLM.from_pretrained("pretrained/smiles/{name}")
x = model.generate(**tokenizer(["{prompt}"] * 100, return_tensors="pt"))
smiles = tokenizer.batch_decode(x, skip_special_tokens=True)
"""


def prior(folder: Path, n: int, held: Tensor) -> str:
    net = load(folder)
    draw(net, [BEGIN], 64, 0)
    started = time.process_time()
    x = draw(net, [BEGIN], n, 2)[0]
    speed = n / (time.process_time() - started)
    told, nats = quality(x), -likelihood(net, BEGIN, held)
    rows = {
        "molecules (valid)": f"{percent(told['valid'])} (target 97 %)",
        "different ones of these (unique)": f"{percent(told['unique'])} (target 99 %)",
        "of those, not in MOSES' training set (novel)": f"{percent(told['novel'])} (target 85 %)",
        "different molecules whose string is not canonical": percent(told["other"]),
        "nats a string of MOSES' test set": f"{nats.mean():.2f} ({nats.sum() / (held != PAD).sum():.3f} a token; {len(held):,} strings)",
        "strings a CPU second, one thread": f"{speed:.0f}",
    }
    return recipes.card(
        folder,
        "A language model of drug-like molecules: it writes SMILES as MOSES has them. The prompt is `<begin>`. The policies `seh`, `sa` and "
        f"`qed` beside it start from it.\n\n{STRINGS}",
        code("prior", "<begin>"),
        {"data": "MOSES' training set, 1,584,663 SMILES as they are", **size_and_cost(net, folder)},
        measured=table((f"{n:,} samples", ""), rows.items()),
        licence=LICENCE,
    )


def policy(folder: Path, n: int, workers: int) -> str:
    name, net, base = folder.name, load(folder), load(folder.parent / "prior")
    run, rows, spreads = recipes.read_runs(folder)[-1], [], []
    levels = [BETAS.index(beta) for beta in SHOWN]
    drawn = draw(net, [prompts(name)[i] for i in levels], n, 2)
    with Workers(*REWARDS, count=workers) as pool:
        for i, x in zip(levels, drawn, strict=True):
            R = {reward: pool.end(pool.begin(x, reward)) for reward in REWARDS}
            valid, told, log_Z = ~R[name].isnan(), quality(x), run["log_Z"][str(BETAS[i])]
            far = likelihood(net, prompts(name)[i], x) - likelihood(base, BEGIN, x)
            residual = log_Z + far - BETAS[i] * log_reward(R[name])
            # Importance weights of the samples say what log Z would be right.
            error = math.log(n) - float(torch.logsumexp(-residual, 0))
            residual = residual[valid]
            spreads.append(float(residual.std()))
            means = [f"{R[reward][valid].mean():.3f}" for reward in REWARDS]
            shares = [percent(told[key]) for key in ("valid", "unique", "novel")]
            off = f"{residual.mean():+.2f}", f"{spreads[-1]:.2f}", f"{error:+.2f}"
            rows.append((str(BETAS[i]), *means, *shares, f"{far.mean():.2f}", *off))
            print(*rows[-1], flush=True)
    head = "β", *(f"mean {reward}" for reward in REWARDS), "valid", "unique", "novel"
    head += "nats from the prior", "residual", "spread", "log Z error"
    return recipes.card(
        folder,
        f"A policy that learned to write SMILES in proportion to prior(x) R(x)^β. The prior is the language model of MOSES beside it, R is\n"
        f"`sculpt.molecules.{name.upper()}`, and β is one of {', '.join(map(str, BETAS))}: the prompt is `<{name}:β>`, and it has learned no other.\n\n"
        f"{STRINGS}\n\n"
        f"**It is not there yet.** Training stopped by the clock, and its balance is off: the residual, which should be zero, has a standard\n"
        f"deviation of {min(spreads):.1f} to {max(spreads):.1f} nats over samples. Where proportions matter, weigh or correct its samples.",
        code(name, f"<{name}:32>"),
        {
            "data": f"MOSES' training set, and the rewards of {run['molecules']:,} of its molecules; no molecule has less than 0.01, a string "
            "that is none has that, and R^β stays within e^10 of its mean over MOSES",
            **size_and_cost(net, folder),
        },
        measured=f"""{table((f"{n:,} samples each, {head[0]}", *head[1:]), rows)}

Mean rewards are over valid samples. Nats from the prior: the mean of log p(x) − log prior(x), the divergence. Residual and spread: mean and
standard deviation, over valid samples, of log Z(β) + log p(x) − log prior(x) − β log R(x), zero where the policy draws exactly in
proportion; log Z(β) was learned beside the policy and is in `training.json`. log Z error: that less an estimate by importance weights of
these samples, which rests on a few of them where the spread is large.""",
        licence=LICENCE,
    )
