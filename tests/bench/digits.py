"""What compositions of the coloured-digit models reach: ``make bench-digits``, or with options ``python tests/bench/digits.py pair -n 500``.

Every road to every label set, scored by the judge: class proportions, how many samples satisfy the observed condition, Fréchet
distance to held-out digits in the composition's proportions. Beside them what the data's proportions give exactly, and the referee:
rejection from the same base models, with the weight of keeping a sample in place of the coin that keeps it, which is the same on average
and wastes none. One thread, CPU time. Finished rows are kept in a file, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "pretrained" / "digits"))

import base_samples
from base_samples import pool
from classifiers import FRESH
from coloured_mnist import SETS, composed, proportions, written
from judge import Judge, Moments, frechet, moments, reference

import sculpt
from sculpt.classifier.guide import with_odds
from sculpt.formula import label_sets
from sculpt.identity import weights as weights_of
from sculpt.particles import effective_sample_size

DIGITS = Path(__file__).parents[2] / "pretrained" / "digits"
ODDS = (0.05, 0.5, 0.95)
STEPS, MAIN = (16, 32, 64), 32
STRENGTH = 1.25
"""Of guidance, in a row of its own."""
PARTS = {"pair": (2,), "triple": (2, 3)}
"""Numbers of observations."""
TARGETS = {"satisfied": 0.98, "of referee": 0.03, "of data": 0.08, "CPU seconds": 0.2, "cheaper": 50, "beside": 1.35}


@dataclass
class Case:
    """One composition, and what it ought to be."""

    composition: sculpt.Composition
    share: torch.Tensor
    """of each class, exactly, if the models drew as the data"""
    real: Moments
    """of held-out digits in these shares"""


@dataclass
class Row:
    shares: torch.Tensor
    n: float
    """how many independent draws the shares are worth"""
    satisfied: float
    accepted: float
    frechet: float
    seconds: float = 0.0
    """an image"""
    note: str = ""

    def error(self, other: torch.Tensor) -> float:
        """The largest difference of a class's share."""
        return float((self.shares - other).abs().max())

    def allowed(self, referee: Row) -> float:
        """Two standard errors of the largest difference to the referee."""
        p = referee.shares
        return float((2 * (p * (1 - p) * (1 / self.n + 1 / referee.n)).sqrt()).max())


class Bench:
    def __init__(self, part: str, options: argparse.Namespace):
        self.part, self.options = part, options
        self.models = [sculpt.load(DIGITS / name) for name in SETS[part]]
        self.classifier, self.judge = sculpt.load(DIGITS / part), Judge.from_pretrained(DIGITS / "judge")
        self.exact = [proportions(name) for name in SETS[part]]
        self.draws: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Of each model, for rejection, with their log p(y | x)."""
        self.identity = [*(model.key for model in self.models), weights_of(self.classifier), weights_of(self.judge)]

    def case(self, labels: tuple[int, ...], odds: float | None) -> Case:
        labels, _, _ = self.anchored(labels, sculpt.posterior(self.models, labels, odds).formula.odds)
        composition = sculpt.posterior(self.models, labels, odds)
        share = composed(composition.formula, self.exact)
        return Case(composition, share, reference(self.judge, share))

    def anchored(self, labels: Sequence[int], odds: Sequence[float]) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor]:
        """The labels, anchored where the least has to be steered: where rejection's draws are worth most. And those draws, with
        the log-weights of keeping them."""
        found = []
        for label in dict.fromkeys(labels):
            order = (label, *_without(labels, label))
            if label not in self.draws:
                x, _ = pool(self.models[label], self.options.referee, self.options.state, first=FRESH)
                with torch.no_grad():
                    self.draws[label] = x, torch.cat([self.classifier.terminal(part) for part in x.split(250)]).double()
            x, log_p = self.draws[label]
            found.append((order, x, with_odds(log_p, odds)[:, list(order[1:])].sum(-1)))
        return max(found, key=lambda one: effective_sample_size(one[2]))

    def measure(self, case: Case, x: torch.Tensor, log_w: torch.Tensor | None = None, **known) -> Row:
        scores = self.judge.score(x)
        w = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if log_w is None else torch.softmax(log_w.double(), 0)
        n = len(x) if log_w is None else effective_sample_size(log_w)
        return Row(
            scores.weighted_shares(w),
            n,
            float(w @ (case.share[scores.label] > 0).double()),
            float(w @ scores.accepted.double()),
            frechet(moments(scores.features, w), case.real),
            **known,
        )

    def kept(self, case: Case, way: dict, run: Callable[[], Row]) -> Row:
        """A row from the file, or measured now and added to it."""
        formula = case.composition.formula
        key = hashlib.sha256(repr((self.identity, formula.identity, way)).encode()).hexdigest()[:20]
        path = self.options.results
        for line in path.read_text().splitlines() if path.exists() else []:
            stored = json.loads(line)
            if stored.pop("key") == key:
                stored["shares"] = torch.tensor(stored["shares"], dtype=torch.float64)
                return Row(**{name: value for name, value in stored.items() if name not in ("composition", "way")})
        row = run()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            stored = vars(row) | {"shares": [round(p, 6) for p in row.shares.tolist()]}
            file.write(json.dumps({"key": key, "composition": str(case.composition), "way": way, **stored}) + "\n")
        return row

    # Roads

    def referee(self, case: Case) -> Row:
        def run() -> Row:
            _, x, log_w = self.anchored(case.composition.formula.labels, case.composition.formula.odds)
            note = f"acceptance {float(log_w.exp().mean()):.1%}, worth {effective_sample_size(log_w):.0f} draws"
            return self.measure(case, x, log_w, note=note)

        return self.kept(case, {"road": "rejection", "n": self.options.referee, "steps": base_samples.STEPS}, run)

    def road(self, case: Case, road: sculpt.Road, n: int, steps: int) -> Row:
        def run() -> Row:
            started = time.process_time()
            generator = torch.Generator().manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the weights collapse is what is measured
                samples = case.composition.sample(n, road, steps=steps, generator=generator, progress=False)
            seconds = (time.process_time() - started) / n
            d = samples.diagnostics
            share = f"effective share {d.ess[-1] / d.particles:.1%}" if d.particles and d.ess else ""
            origin = f", worth {d.families:.0f} of {d.particles} ancestors" if d.families is not None else ""
            row = self.measure(case, samples.x.float(), seconds=seconds, note=f"{share}{origin}; {d.verdict.level}")
            # Members of one family are not independent draws.
            row.n = min(row.n, d.families or row.n)
            return row

        return self.kept(case, {**road.identity, "n": n, "steps": steps}, run)

    def rows(self, case: Case) -> dict[str, Row]:
        few, plain = min(self.options.few, self.options.n), sculpt.Guided(self.classifier)
        table = {"rejection": self.referee(case)}
        for steps in STEPS:
            n = self.options.n if steps == MAIN else few
            table[f"guided, {steps} steps"] = self.road(case, plain, n, steps)
        stronger = sculpt.Guided(self.classifier, strength=STRENGTH)
        table[f"guided, {MAIN} steps, strength {STRENGTH}"] = self.road(case, stronger, self.options.n, MAIN)
        corrected = sculpt.Guided(self.classifier, correct=True, particles=few)
        table[f"corrected, {MAIN} steps"] = self.road(case, corrected, few, MAIN)
        if self.options.particles:
            particles, steps = self.options.particles, self.options.tracked_steps
            name = f"tracked, {steps} steps, {particles} particles"
            table[name] = self.road(case, sculpt.Tracked(particles=particles), particles, steps)
        return table

    def run(self) -> list[tuple[Case, dict[str, Row]]]:
        print(f"\n## {self.part}: {', '.join(map(str, self.models))}", flush=True)
        done, (k, of) = [], self.options.share
        odds = ODDS if self.classifier.odds else (None,)
        sets = [labels for n in PARTS[self.part] for labels in label_sets(len(self.models), n)]
        for labels, v in list(itertools.product(sets, odds))[k::of]:
            case = self.case(labels, v)
            table = self.rows(case)
            show(case, table)
            done.append((case, table))
        return done


def _without(labels: Sequence[int], label: int) -> tuple[int, ...]:
    """The other labels: one of this kind is taken away."""
    i = labels.index(label)
    return (*labels[:i], *labels[i + 1 :])


def show(case: Case, table: dict[str, Row]) -> None:
    print(f"\n**{case.composition}**; the data's proportions: {written(case.share)}\n")
    print("| | proportions | satisfied | off the referee | off the data | Fréchet | accepted | CPU s | |\n" + "|---" * 9 + "|")
    referee = table["rejection"]
    for name, row in table.items():
        cells = [name, written(row.shares, 0.01), f"{row.satisfied:.1%}"]
        cells += ["" if row is referee else f"{row.error(referee.shares):.3f}", f"{row.error(case.share):.3f}"]
        cells += [f"{row.frechet:.2f}", f"{row.accepted:.1%}", f"{row.seconds:.3f}" if row.seconds else "", row.note]
        print(f"| {' | '.join(cells)} |", flush=True)


def summary(done: list[tuple[Case, dict[str, Row]]]) -> None:
    """How many of the compositions meet each target."""
    print(
        "\n| of all compositions | satisfied | of the referee | of the data | worst of the data | Fréchet, mean |\n"
        + "|---" * 6
        + "|"
    )
    for name in [name for name in done[0][1] if name != "rejection"]:
        rows = [(case, table[name], table["rejection"]) for case, table in done]
        clear = [row.satisfied >= TARGETS["satisfied"] for _, row, referee in rows if referee.satisfied >= 0.99]
        near = [row.error(ref.shares) <= TARGETS["of referee"] + row.allowed(ref) for _, row, ref in rows]
        data = [row.error(case.share) for case, row, _ in rows]
        cells = [name, f"{sum(clear)} of {len(clear)}", f"{sum(near)} of {len(near)}"]
        cells += [f"{sum(e <= TARGETS['of data'] for e in data)} of {len(data)}", f"{max(data):.3f}"]
        cells += [f"{sum(row.frechet for _, row, _ in rows) / len(rows):.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(
        f"\nTargets: at least {TARGETS['satisfied']:.0%} satisfied where the referee says 99 %; within {TARGETS['of referee']} (and two "
        f"standard errors) of the referee's proportions and within {TARGETS['of data']} of the data's."
    )


def best(run: Callable, repeats: int = 5) -> float:
    """CPU seconds of the fastest of a few runs; others share the machine."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


def cost(bench: Bench, batch: int = 64, steps: int = MAIN) -> None:
    """CPU seconds an image, against the published sampler's calls of the same networks."""
    guided = sculpt.posterior(bench.models, (0, 1)).guided(bench.classifier)  # by the field, where it has one
    s = torch.tensor(1.0, dtype=torch.float64)
    z = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        score = best(lambda: bench.models[0].denoise(z, s)) / batch
        forward = best(lambda: bench.classifier.log_h(z, s.expand(batch), labels=(0, 1))) / batch
    backward = best(lambda: guided.guidance.with_gradient(z, s)) / batch - forward
    ours = best(lambda: guided.sample(batch, steps=steps, progress=False), 2) / batch
    without = copy.deepcopy(bench.classifier)
    without.vector_field = None
    gradient = sculpt.posterior(bench.models, (0, 1)).guided(without)
    beside = ours / (best(lambda: gradient.sample(batch, steps=steps, progress=False), 2) / batch)
    published = 500 * (4 * score + 4 * forward + 2 * backward)
    print(f"\n**Cost at batch {batch}** ({bench.part}), one thread\n\n| | CPU ms an image |\n|---|---|")
    print(
        f"| base network | {1000 * score:.2f} |\n| classifier | {1000 * forward:.2f} |\n| its gradient | {1000 * backward:.2f} |"
    )
    print(f"| ours, {steps} steps: one call of each | {1000 * ours:.0f} (target {1000 * TARGETS['CPU seconds']:.0f}) |")
    print(f"| beside guidance by the gradient of log h | {beside:.2f} (target {TARGETS['beside']} with a field) |")
    print(f"| the published sampler with these networks: 500 steps of 4, 4 and 2 calls | {1000 * published:.0f} |")
    print(f"| ratio | 1/{published / ours:.0f} (target 1/{TARGETS['cheaper']}) |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "cost"], default=[*PARTS, "cost"])
    parser.add_argument("-n", type=int, default=2000, help="samples of the guided road at 32 steps")
    parser.add_argument("--few", type=int, default=500, help="samples of the other roads, which are there to compare")
    parser.add_argument("--referee", type=int, default=4000, help="samples of every base model for rejection")
    parser.add_argument("--particles", type=int, default=256, help="of tracked densities; 0 leaves them out")
    parser.add_argument("--tracked-steps", type=int, default=64)
    parser.add_argument(
        "--state", type=Path, default=Path("train_state/digits"), help="where the base models' samples are kept"
    )
    parser.add_argument("--results", type=Path, default=Path("train_state/digits/bench.jsonl"))
    parser.add_argument(
        "--share", type=int, nargs=2, metavar=("K", "OF"), default=(0, 1),
        help="every OF-th composition from the K-th on: for several processes at once; a last one without it finds all rows",
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = [row for part in PARTS if part in options.parts for row in Bench(part, options).run()]
    if done:
        summary(done)
    if "cost" in options.parts:
        for part in PARTS:
            cost(Bench(part, options))
