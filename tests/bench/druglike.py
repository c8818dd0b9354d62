"""The SMILES policies and their compositions, as a medicinal chemist looks at them: the part ``druglike`` of ``make bench-molecules``.

The exponent and the numbers of particles were chosen before anything was measured: see README.md.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import ks_2samp

import sculpt
from sculpt.molecules import Patterns, Smiles, profile, properties
from sculpt.particles import effective_sample_size

ROOT = Path(__file__).parents[2]
PRETRAINED = ROOT / "pretrained" / "smiles"
MOSES = Path(os.environ.get("SCULPT_DATA", "missing")) / "moses"
NAMES = ("seh", "sa", "qed")
GOOD = Smiles.high
BETA, N, RUNS, PARTICLES = 64, 2000, 2, 3000
"""Compositions are sampled in so many runs of so many particles: each particle remembers what every network has read of it."""
PEAKS = {"seh": 6.76, "sa": 1.97, "qed": 0.94}
"""Nats from the prior at this exponent, as the cards say: odds of e to minus these let no model outweigh the others by its peak alone."""
LOOKED_AT = 1000
"""Of so many molecules of each set alerts and similarities are computed."""

Rows = dict[str, str]


@functools.cache
def load(name: str, beta: int = BETA):
    return sculpt.load(PRETRAINED / name, **({} if name == "prior" else {"beta": beta}))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(title: str, *columns: str) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def line(*values: object) -> None:
    print(f"| {' | '.join(map(str, values))} |", flush=True)


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """CPU seconds of the fastest of a few calls: others use the machine, too."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


@functools.cache
def known() -> list[str]:
    """MOSES' training set."""
    sys.path.insert(0, str(PRETRAINED))
    import moses

    return moses.smiles("train")


# Speed


def speed(n: int = 256) -> None:
    prior, both = load("prior"), load("seh") & load("sa")
    prompt = torch.full((n, 1), prior.prompt[0])
    options = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": 63,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(prompt),
    }
    ours = seconds(lambda: prior.sample(n, progress=False))
    theirs = seconds(lambda: prior.model.generate(prompt, **options))
    composed = seconds(lambda: both.sample(n, sculpt.Tracked(particles=n), progress=False))
    table(f"Speed, {n} at a time, CPU time of one thread", "", "measured", "target")
    line("base, molecules a second", f"{n / ours:.0f}", "≥ 100")
    line("two composed, tracked, as many particles as molecules", f"{n / composed:.0f}", "≥ 40")
    line("base over transformers' generate", f"{theirs / ours:.2f}", "≥ .8")


# The models


def models() -> None:
    x = load("prior").sample(10_000, generator=seeded(), progress=False)
    smiles = [s for s in x.smiles if s]
    new = set(smiles) - set(known())
    table("The prior, 10,000 strings", "valid", "unique", "novel")
    line(
        *(
            f"{100 * share:.1f} %"
            for share in (len(smiles) / len(x), len(set(smiles)) / len(smiles), len(new) / len(set(smiles)))
        )
    )
    table(f"Policies at β = {BETA}, {N:,} strings", "", "mean reward", "valid", "unique")
    for name in NAMES:
        x = drawn(name)
        summary = x.summary([name])
        line(name, f"{summary.means[name]:.3f}", f"{summary.valid / N:.1%}", f"{summary.distinct / summary.valid:.1%}")


@functools.cache
def drawn(name: str) -> Smiles:
    return load(name).sample(N, generator=seeded(1), progress=False)


# The composition beside what it is made of


@functools.cache
def composition(name: str = "seh & sa & qed") -> sculpt.Composition:
    """The harmonic mean of all three; the same with odds against the models' own peaks; the prior times all three rewards."""
    policies = [load(name) for name in NAMES]
    if name.startswith("prior"):
        return sculpt.product([*policies, load("prior")], [1, 1, 1, -2])
    return sculpt.posterior(policies, (0, 1, 2), [math.exp(-PEAKS[key]) for key in NAMES] if "odds" in name else None)


COMPOSED = ("seh & sa & qed", "with odds", "prior × all three")


@functools.cache
def tracked(name: str = COMPOSED[0]) -> Smiles:
    return populations(composition(name), 2)


def populations(target: sculpt.Composition, seed: int) -> Smiles:
    road = sculpt.Tracked(particles=PARTICLES)
    runs = (target.sample(N // RUNS, road, generator=seeded(seed + 10 * k), progress=False) for k in range(RUNS))
    return sculpt.Samples.cat([*runs])


def druglike_table() -> None:
    sets = {name: drawn(name) for name in ("prior", *NAMES)} | {name: tracked(name) for name in COMPOSED}
    columns = {name: looks(x) for name, x in sets.items()}
    table(
        f"{N:,} molecules each, β = {BETA}; compositions by tracked densities, {RUNS} runs of {PARTICLES:,} particles",
        "",
        *columns,
        "target",
    )
    for row in next(iter(columns.values())):
        line(row, *(column[row] for column in columns.values()), TARGETS.get(row, ""))
    for name in COMPOSED:
        print(f"\n{tracked(name).diagnostics}", flush=True)


TARGETS = {
    "all three": "≥ 60 %",
    "MW, 5 to 95 %": "250 to 450",
    "all of these filters": "≥ 80 % (MOSES 86 %)",
    "distinct": "≥ 95 %",
}


def looks(x: Smiles) -> Rows:
    """What a set is like; shares are of all strings where nothing else is said."""
    scores = x.table(NAMES, progress=False)
    means = x.summary(NAMES).means
    high = {name: scores[name] >= GOOD[name] for name in NAMES}
    share = lambda good: f"{100 * float(scores['weight'][good].sum()):.1f} %"  # noqa: E731
    smiles = [s for s in x.smiles if s]
    found = profile(smiles[:LOOKED_AT], *filters(), reference=known())
    mw = np.quantile(properties(smiles)["mw"], [0.05, 0.95])
    clean = all_passed(smiles[:LOOKED_AT])
    rows = {f"{name.upper()} ≥ {GOOD[name]:g}": share(high[name]) for name in NAMES}
    rows |= {"all three": share(np.all([*high.values()], axis=0))}
    rows |= {f"mean {name.upper()}": f"{means[name]:.3f}" for name in NAMES}
    rows |= {"MW, 5 to 95 %": f"{mw[0]:.0f} to {mw[1]:.0f}"}
    rows |= {f"passes {name}": f"{share:.1%}" for name, share in found.passed.items()}
    rows |= {"all of these filters": f"{clean:.1%}", "valid": f"{len(smiles) / len(x):.1%}"}
    rows |= {"distinct": f"{len(set(smiles)) / len(smiles):.1%}", "novel, of the distinct": f"{found.novel:.1%}"}
    rows |= {"internal diversity": f"{found.diversity:.3f}", f"scaffolds of {LOOKED_AT:,}": f"{found.scaffolds}"}
    return rows | {"nearest of 2,000 of MOSES": f"{found.nearest:.2f}"}


@functools.cache
def filters() -> tuple[Patterns | str, ...]:
    return (*(Patterns.read(MOSES / f"{name}.csv") for name in ("mcf", "wehi_pains")), "pains", "nih", "brenk")


def all_passed(smiles: Sequence[str]) -> float:
    from sculpt.molecules import alerts

    return float(1 - np.any([*alerts(smiles, *filters()).values()], axis=0).mean())


# The roads


def roads() -> None:
    """Of seh & sa & qed; and, where rejection accepts, of seh & sa at a smaller exponent."""
    seh, sa = (load(name, 32) for name in ("seh", "sa"))
    one = composition()
    compare(f"seh & sa & qed, β = {BETA}", one, {
        "exact weights of base draws": lambda: weighted(one, 2 * N, 3),
        "tracked": tracked,
    })  # fmt: skip
    pair = seh & sa
    compare("seh & sa, β = 32", pair, {
        "rejection": lambda: pair.sample(N // 4, sculpt.Rejection(), generator=seeded(5), progress=False),
        "exact weights of base draws": lambda: weighted(pair, N, 6),
        "tracked": lambda: populations(pair, 7),
    })  # fmt: skip


def weighted(target: sculpt.Composition, each: int, seed: int) -> Smiles:
    """Draws of all base models together, which have the density Σ p_i / m, selected by the target's weight in them."""
    models = target.leaves
    x = torch.cat([model.sample(each, generator=seeded(100 * seed + i), progress=False).x for i, model in enumerate(models)])
    ell = torch.stack([model.log_p(x) for model in models], -1)
    log_w = target.formula.value(ell) - ell.logsumexp(-1) + math.log(len(models))
    worth = effective_sample_size(log_w)
    pick = torch.multinomial(torch.softmax(log_w, 0), N, True, generator=seeded(seed))
    said = sculpt.Diagnostics(road=f"worth {worth:.0f}", log_z=float(log_w.logsumexp(0)) - math.log(len(x)))
    return Smiles(x[pick], None, said, target.decoder)


def compare(title: str, target: sculpt.Composition, ways: dict[str, Callable[[], Smiles]]) -> None:
    """Two-sample tests against the first road. A population counts for as many as its families are worth."""
    table(title, "road", "mean SEH, SA, QED", "log Z", "worth", "KS: SEH, SA, QED, MW, tokens (5 % level)", "verdict")
    first: dict[str, np.ndarray] = {}
    size = 0.0
    for name, draw in ways.items():
        x = draw()
        values, d = columns(x), x.diagnostics
        worth = (
            d.families
            if d.families is not None
            else float(d.road.removeprefix("worth "))
            if d.road.startswith("worth")
            else len(x)
        )
        worth = min(float(worth), len(x))
        means = ", ".join(f"{values[key].mean():.3f}" for key in NAMES)
        ks = ""
        if first:
            level = 1.36 * math.sqrt(1 / worth + 1 / size)
            ks = ", ".join(f"{ks_2samp(values[key], first[key]).statistic:.3f}" for key in values) + f" ({level:.3f})"
        else:
            first, size = values, worth
        line(
            name, means, "" if d.log_z is None else f"{d.log_z:.3f}", f"{worth:.0f}", ks, d.verdict.level if d.particles else ""
        )


def columns(x: Smiles) -> dict[str, np.ndarray]:
    """Of each molecule, by which two sets are told apart."""
    scores = x.table(NAMES, progress=False)
    of = {s: i for i, s in enumerate(scores["smiles"])}
    rows = [of[s] for s in x.smiles if s]
    mw = properties(list(scores["smiles"]))["mw"]
    length = (x.x >= 0).sum(-1)[x.valid].numpy()
    return {name: scores[name][rows] for name in NAMES} | {"mw": mw[rows], "tokens": length}


def druglike() -> None:
    for part in (speed, models, druglike_table, roads):
        start = time.process_time()
        part()
        print(f"\n({part.__name__}: {time.process_time() - start:.0f} CPU s)", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    druglike()
