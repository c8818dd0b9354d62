"""What language models reach as GFlowNets on a tree: ``make bench-tokens``; ``--parts roads distilled speed language`` for some of it.

One thread, CPU time. Targets on all sequences are exact; of molecules as texts the densities of both models are, and a distribution is
compared with that of rejection, which knows nothing of how the others sample.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "pretrained" / "smiles"))

from token_models import causal, causal_models, densities, over_floor, recurrent_models

import sculpt
from sculpt.actions.model import ActionModel
from sculpt.actions.paths import path_ratios
from sculpt.actions.reading import Memory, read
from sculpt.formula import Nested, Posterior

N = 10_000
PARTS = ("roads", "distilled", "speed", "language")


def heading(text: str, columns: str) -> None:
    print(f"\n{text}\n\n| {columns} |\n|{'---|' * (columns.count('|') + 1)}", flush=True)


def row(*cells: object) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def best(run, repeats: int = 5) -> float:
    """CPU seconds of the fastest of a few runs; others share the machine."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


# All sequences


def roads() -> None:
    heading(
        f"**Every road against all sequences** ({N:,} samples, mean of 3 runs; L1 over that of as many exact draws, target ≤ 1.2)",
        "models | composition | tracked | guided, corrected | by densities | rejection | guided",
    )
    for kind, make, vocabulary, length in (
        ("GRU, 3 tokens, length ≤ 8", recurrent_models, 4, 8),
        ("GPT-2, 3 tokens, length ≤ 8", causal_models, 4, 8),
        ("GPT-2, 5 tokens, length ≤ 4", causal_models, 6, 4),
    ):
        for m in (2, 3):
            models = make(m, length, vocabulary)
            # Three GPT-2s are more to learn than two, and than GRUs.
            steps, samples = (4000, 40_000) if m == 3 and make is causal_models and length == 8 else (1000, 10_000)
            classifier = sculpt.fit(models, observations=m, steps=steps, samples=samples, batch_size=64, progress=False)
            for name, composition in compositions(models).items():
                target = exact_target(composition)
                ratios = [ratio(composition, target, road) for road in all_roads(composition, classifier)]
                row(f"{m} × {kind}", name, *("" if r is None else f"{r:.2f}" for r in ratios))


def distilled() -> None:
    heading(
        f"**Distilled, against all sequences** ({N:,} samples, mean of 3 runs of one student; L1 over that of as many exact draws, target ≤ 1.2)",
        "models | composition | L1 | effective share of exact weights | total variation, exact | CPU s of training",
    )
    for kind, make in (("GRU, 3 tokens, length ≤ 8", recurrent_models), ("GPT-2, 3 tokens, length ≤ 8", causal_models)):
        for m in (2, 3):
            for name, composition in compositions(make(m, 8, 4)).items():
                target = exact_target(composition)
                start = time.process_time()
                model = sculpt.distill(composition, steps=4000, progress=False)
                seconds = time.process_time() - start
                runs = [model.sample(N, generator=seeded(k), progress=False).x for k in range(3)]
                l1 = sum(over_floor(x, composition.leaves[0], target)[1] for x in runs) / len(runs)
                share, tv = exact_weights(model, target)
                row(f"{m} × {kind}", name, f"{l1:.2f}", f"{share:.3f}", f"{tv:.4f}", f"{seconds:.0f}")


def exact_weights(model, target):
    """The effective share of exact weights, and the total variation, by all sequences."""
    p = densities([model])[:, 0].softmax(0)
    return float(1 / (target**2 / p).sum()), float((p - target).abs().sum() / 2)


def compositions(models):
    p, q, *rest = models
    if rest:
        return {"labels (0, 1, 2)": sculpt.posterior(models, (0, 1, 2)), "(a & b) - c": (p & q) - rest[0]}
    return {"a & b": p & q, "a - b": p - q, "a · b^0.5": sculpt.product([p, q], [1.0, 0.5])}


def all_roads(composition, classifier):
    yield sculpt.Tracked(particles=8 * N)
    posterior = isinstance(composition.formula, Posterior)
    flat = posterior and not any(model.models for model in composition.models)
    for correct in (True, "densities"):
        yield sculpt.Guided(classifier, correct=correct, particles=4 * N) if flat else None
    yield sculpt.Rejection() if posterior else None
    yield sculpt.Guided(classifier) if flat else None


def ratio(composition, target, road):
    if road is None:
        return None
    runs = [composition.sample(N, road, generator=seeded(k), progress=False).x for k in range(3)]
    return sum(over_floor(x, composition.leaves[0], target)[1] for x in runs) / len(runs)


def exact_target(composition):
    ell = densities(composition.leaves)
    formula = composition.formula
    if any(model.models for model in composition.models):
        inner = composition.models[0].formula
        log_z = float(inner.value(ell[:, :2]).logsumexp(0))
        formula = Nested(formula, [inner, Posterior(1, (0,))], [(0, 1), (2,)], [log_z, 0.0])
    return formula.value(ell).softmax(0)


# Beside transformers


def speed() -> None:
    heading("**Beside transformers' generate** (batch 64, 64 tokens, CPU seconds)", "| measured | target | beside")
    nets = [causal(seed, 1024, 0.02, 128, n_embd=128, n_layer=4, n_head=4).eval() for seed in range(2)]
    p, q = (sculpt.Tokens(net, prompt=[5], max_length=64, name=f"m{i}") for i, net in enumerate(nets))
    p, q = (model.with_sampling(min_length=64) for model in (p, q))
    ids = torch.full((64, 1), 5)
    options = {"do_sample": True, "top_k": 0, "min_new_tokens": 64, "max_new_tokens": 64, "pad_token_id": 0}
    theirs = best(lambda: nets[0].generate(ids, attention_mask=torch.ones_like(ids), **options))
    ours = best(lambda: p.sample(64, progress=False))
    both = best(lambda: (p & q).sample(64, sculpt.Tracked(particles=64), progress=False))
    size = sum(value.numel() for value in nets[0].parameters())
    row("base sampling over generate", f"{theirs / ours:.2f}", "≥ .8", f"{size:,} parameters, vocabulary 1,024; {ours:.2f} s")
    row(
        "two models tracked over both alone",
        f"{both / (2 * ours):.2f}",
        "≤ 1.3",
        f"{both:.2f} s, of generate's {both / (2 * theirs):.2f}",
    )


# Molecules as texts: two halves of MOSES by logP


class TokenWise(ActionModel):
    """What composes the next token's distributions instead of the sequences': a rule of both models' log-probabilities."""

    def __init__(self, name, models, rule):
        self.name = self.key = name
        self.parts, self.rule, self.first = models, rule, models[0]
        self.device, self.shape, self.n_actions = self.first.device, self.first.shape, self.first.n_actions

    def start(self, n):
        return self.first.start(n)

    def step(self, states, actions):
        return self.first.step(states, actions)

    def backtrack(self, states, generator=None):
        return self.first.backtrack(states, generator)

    def log_pf(self, states):
        return self.rule(*(model.log_pf(states) for model in self.parts)).log_softmax(-1)

    def read(self, models, states, memory):
        reading = read(self.parts, states, None if memory is None else memory.tensors)
        return [self.rule(*reading.log_p).log_softmax(-1)[reading.rows]], reading.memory and Memory(reading.memory)


def plausible(a, x, share=0.1):
    """Contrastive decoding keeps tokens that have a tenth of the best one's probability under the expert."""
    return torch.where(a >= a.amax(-1, keepdim=True) + math.log(share), x, -torch.inf)


def both_of(a, b):
    return Posterior(2, (0, 1)).value(torch.stack([a, b], -1))


def first_of(a, b):
    return Posterior(2, (0, 0)).value(torch.stack([a, b], -1))


def finite(x):
    return torch.where(x.isnan(), -torch.inf, x)


TOKEN_WISE = {
    "a & b": {
        "token-wise a b / (a + b)": both_of,
        "token-wise product a b": lambda a, b: a + b,
        "token-wise geometric mean √(a b)": lambda a, b: (a + b) / 2,
    },
    "a - b": {
        "token-wise a² / (a + b)": first_of,
        "contrastive decoding a / b": lambda a, b: plausible(a, finite(a - b)),
        "contrastive decoding a^1.5 / b^0.5": lambda a, b: plausible(a, finite(1.5 * a - 0.5 * b)),
    },
}


def halves(steps: int):
    """The prior of pretrained/smiles, trained on with the lower and the upper half of MOSES by logP."""
    import network
    from moses import strings
    from rdkit import Chem, RDLogger
    from rdkit.Chem import Crippen
    from tokens import BEGIN, VOCABULARY, WRITTEN, decode, tokenizer

    RDLogger.DisableLog("rdApp.*")
    x = strings("train")
    x = x[torch.randperm(len(x), generator=seeded(0))[:20_000]]
    log_p = torch.tensor([Crippen.MolLogP(Chem.MolFromSmiles(text)) for text in decode(x)])
    models, middle = [], log_p.median()
    for name, part in (("low", x[log_p < middle]), ("high", x[log_p >= middle])):
        net = network.load(Path(__file__).parents[2] / "pretrained" / "smiles" / "prior")
        adam = torch.optim.Adam(net.parameters(), lr=3e-4)
        for step in range(steps):
            rows = network.trimmed(part[torch.randint(len(part), (64,), generator=seeded(step))])
            loss = -network.log_p(net, torch.full((64,), BEGIN), rows).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        unwritten = [i for i in range(len(VOCABULARY)) if i not in WRITTEN and i not in (2,)]
        model = sculpt.Tokens(net, tokenizer(), "<begin>", max_length=63, name=name)
        models.append(model.with_sampling(suppress=unwritten))
    return models, lambda text: Chem.MolFromSmiles(text) if text else None, Crippen.MolLogP


def distance(p, q):
    """Kolmogorov and Smirnov's, between two sets of numbers."""
    every = torch.cat([p, q]).sort().values
    shares = [torch.searchsorted(part.sort().values, every, right=True) / len(part) for part in (p, q)]
    return float((shares[0] - shares[1]).abs().max())


def language(steps: int, n: int) -> None:
    start = time.process_time()
    models, parse, weigh = halves(steps)
    columns = "composition | how | log-ratio | log p(low) | log p(high) | nats from the target | length | logP: middle, 10 to 90 % | valid"
    heading(
        f"**Sequences and tokens composed**, {n:,} texts each, two calls a token (the models' training: {time.process_time() - start:.0f} CPU s). "
        f"Distances of Kolmogorov and Smirnov from rejection's log-densities; two sets of {n:,} exact draws differ by about {0.87 * math.sqrt(2 / n):.3f}",
        columns,
    )
    p, q = models
    for name, model in zip("ab", models, strict=True):
        x = model.sample(n, generator=seeded(5), progress=False).x
        told(name, f"the model {model}", x, None, None, models, parse, weigh)
    for name, composition in (("a & b", p & q), ("a - b", p - q)):
        exact = composition.sample(n, sculpt.Rejection(), generator=seeded(1), progress=False)
        told(name, "rejection (the truth)", exact.x, None, exact, models, parse, weigh)
        tracked = composition.sample(n, sculpt.Tracked(particles=n), generator=seeded(2), progress=False)
        told(name, "sequence-level, tracked", tracked.x, None, exact, models, parse, weigh)
        for title, rule in TOKEN_WISE[name].items():
            model = TokenWise(title, models, rule)
            x = model.sample(n, generator=seeded(3), progress=False).x
            own = path_ratios([model], x)[:, 0]
            ell = torch.stack([part.log_p(x) for part in models], -1)
            nats = float((own - composition.formula.value(ell)).mean()) + exact.log_z
            told(name, title, x, nats, exact, models, parse, weigh)


def told(name, how, x, nats, exact, models, parse, weigh) -> None:
    ell = torch.stack([part.log_p(x) for part in models], -1)
    far = ["", "", ""]
    if exact is not None:
        true = torch.stack([part.log_p(exact.x) for part in models], -1)
        pairs = ((ell[:, 0] - ell[:, 1], true[:, 0] - true[:, 1]), (ell[:, 0], true[:, 0]), (ell[:, 1], true[:, 1]))
        far = [f"{distance(*pair):.3f}" for pair in pairs]
    molecules = [m for m in map(parse, models[0].decode(x)) if m is not None]
    logp = torch.tensor([weigh(m) for m in molecules])
    low, middle, high = torch.quantile(logp, torch.tensor([0.1, 0.5, 0.9])).tolist()
    row(
        name,
        how,
        *far,
        "" if nats is None else f"{nats:.2f}",
        f"{float((x >= 0).sum(-1).double().mean()):.1f}",
        f"{middle:.2f}, {low:.2f} to {high:.2f}",
        f"{len(molecules) / len(x):.1%}",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--steps", type=int, default=80, help="of training on each half of MOSES")
    parser.add_argument("--texts", type=int, default=1000, help="of each way to compose")
    given = parser.parse_args()
    for part in given.parts:
        {"roads": roads, "distilled": distilled, "speed": speed, "language": lambda: language(given.steps, given.texts)}[part]()
