"""Images without training: ``make bench-images``, or for one table ``python tests/bench/images.py fields|one|referee|digits``.

Compositions are seen through noise of the default level, which is found from the base models before anything is composed of them.
Digits are judged beside rejection: base samples weighed by the probability of keeping them, says the fitted head at s_d = 0, or the
referee that nobody trained at the same s_d. Runs are kept in a file, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "pretrained" / "digits")]

from base_samples import pool
from classifiers import FRESH
from coloured_mnist import CLASSES, SETS, composed, proportions
from fields import Fields, Network
from judge import Judge
from safetensors.torch import save

import sculpt
from sculpt.classifier.guide import with_odds
from sculpt.diffusion.detail import detail_level
from sculpt.diffusion.referee import Referee
from sculpt.files import replace_file
from sculpt.formula import Formula, Posterior, label_sets
from sculpt.identity import weights as weights_of
from sculpt.model import randn
from sculpt.particles import effective_sample_size
from sculpt.weights import read_tensors

DIGITS = Path(__file__).parents[2] / "pretrained" / "digits"
PARTS, ODDS = {"pair": (2,), "triple": (2, 3)}, (0.05, 0.5, 0.95)
STEPS, PARTICLES, RUNS = 32, 256, 10
HEAD, LOOKED_AT = 4000, {"pair": 1000, "triple": 1500}
"""Samples of each model for rejection by the head, and for the referee."""


def heading(text: str, *columns: str) -> None:
    print(f"\n{text}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


# ------------------------------------------------------------------------------------------------------------- closed forms

ONE, TWO = ([0.4, 0.4, 0.2, 1e-12], [0.1, 0.4, 1e-12, 0.5])


def seen(models: list[Fields], formula: Formula, s: float, n: int = 20_000) -> torch.Tensor:
    """The shares of the patterns in the exact target seen through noise: exact samples of the anchor, weighed by what z says."""
    generator, total = torch.Generator().manual_seed(1), torch.zeros(4, dtype=torch.float64)
    label = formula.labels[0]
    for _ in range(n // 1000):
        x = models[label].draw(1000, generator)
        z = x + s * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        ell = torch.stack([model.log_prob(z, s) for model in models], -1)
        total.index_add_(0, models[label].which(x), (formula.value(ell) - ell[:, label]).exp())
    return total / total.sum()


def fields(_: argparse.Namespace) -> None:
    heading(
        f"**Random fields**, mixtures of four patterns, the default level, {STEPS} steps, {RUNS} runs",
        *(
            "numbers",
            "labels",
            "particles",
            "off the exact shares, worst pattern",
            "allowed",
            "families, least",
            "log Z off, mean",
        ),
    )
    for d, labels, particles in itertools.product((3072, 16384), ((0, 1), (1, 0), (0, 0), (1, 1)), (64, 256)):
        models = [Fields("one", ONE, d), Fields("two", TWO, d)]
        composition, s = sculpt.posterior(models, labels), detail_level(models)
        want, shares, families, log_z = seen(models, composition.formula, s), [], [], []
        exact = float(composition.formula.value(torch.tensor([ONE, TWO], dtype=torch.float64).T.log()).exp().sum().log())
        for seed in range(RUNS):
            generator = torch.Generator().manual_seed(seed)
            samples = composition.sample(
                particles, sculpt.Tracked(particles=particles), steps=STEPS, generator=generator, progress=False
            )
            shares.append(torch.bincount(models[0].which(samples.x), minlength=4).double() / particles)
            families.append(samples.diagnostics.families)
            log_z.append(samples.log_z - exact)
        off, allowed = compared(torch.stack(shares), want, 0.03)
        row(
            f"{d:,}",
            str(labels),
            str(particles),
            f"{off:.3f}",
            f"{allowed:.3f}",
            f"{min(families):.0f}",
            f"{sum(log_z) / RUNS:+.3f}",
        )


def compared(runs: torch.Tensor, want: torch.Tensor, points: float, se: torch.Tensor | float = 0.0) -> tuple[float, float]:
    """How far the mean of runs is off the worst share, and what is allowed there: so many points and two standard errors."""
    off = (runs.mean(0) - want).abs()
    error = (runs.var(0) / len(runs) + se**2).sqrt()
    worst = int((off - points - 2 * error).argmax())
    return float(off[worst]), float(points + 2 * error[worst])


def peak() -> float:
    """The largest resident memory so far, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def one(_: argparse.Namespace) -> None:
    shape = (4, 128, 128)
    network = Network()
    models = [
        Fields(name, shares, math.prod(shape), shape=shape, network=network) for name, shares in (("one", ONE), ("two", TWO))
    ]
    composition = models[0] & models[1]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    start = time.process_time()
    samples = composition.sample(1, generator=torch.Generator().manual_seed(0), progress=False)
    seconds, more = time.process_time() - start, peak() - before
    heading("**One image of two models with a common network**, 4×128×128", "", "measured", "target")
    row("evaluations, calls", f"{network.evaluations}, {network.calls} in {samples.diagnostics.steps} steps", "100, 50")
    row("memory beside the models", f"{more:.0f} MB", "≤ 400 MB")
    row("CPU seconds beside the networks", f"{seconds:.1f}", "")
    row("verdict", str(samples.verdict), "true")


# ------------------------------------------------------------------------------------------------------------------- digits


class Digits:
    """The models of one part, and what rejection needs of them."""

    def __init__(self, part: str, options: argparse.Namespace):
        self.part, self.options = part, options
        self.models = [sculpt.load(DIGITS / name, device=options.device) for name in SETS[part]]
        self.classifier, self.judge = sculpt.load(DIGITS / part), Judge.from_pretrained(DIGITS / "judge")
        self.s = detail_level(self.models)
        self.identity = [*(model.key[:12] for model in self.models), f"{self.s:g}"]

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.options.device).manual_seed(seed)

    def cases(self) -> list[tuple[tuple[int, ...], float | None]]:
        odds = ODDS if self.classifier.odds else (None,)
        return [(labels, v) for n in PARTS[self.part] for labels in label_sets(len(self.models), n) for v in odds]

    def kept(self, name: str, make) -> dict[str, torch.Tensor]:
        path = self.options.state / "images" / f"{name}-{'-'.join(self.identity)}.safetensors"
        if not path.exists():
            replace_file(path, save({key: value.cpu().contiguous() for key, value in make().items()}))
        return read_tensors(path)

    def head(self, label: int) -> dict[str, torch.Tensor]:
        """Samples of a model that no classifier was fitted to: their classes, and what the fitted head says of them."""

        def make():
            x, _ = pool(self.models[label], HEAD, self.options.state, first=FRESH)
            log_p = torch.cat([self.classifier.terminal(part) for part in x.split(250)])
            scores = self.judge.score(x)
            return {"ell": log_p.double(), "label": scores.label, "accepted": scores.accepted}

        with torch.no_grad():
            return self.kept(f"head-{weights_of(self.classifier)[:12]}-{label}", make)

    def refereed(self, label: int) -> dict[str, torch.Tensor]:
        """The same by the referee, of samples seen through noise."""

        def make():
            x, _ = pool(self.models[label], LOOKED_AT[self.part], self.options.state, first=FRESH)
            generator, started, ell, calls, errors = self.generator(label), time.process_time(), [], [], []
            for part in x.to(self.options.device).split(250):
                z = part.double() + self.s * randn(part.shape, generator, part.double())
                referee = Referee(self.models, self.s, self.options.batch_size)
                ell.append(referee(z, generator))
                calls.append(referee.calls)
                errors.append(referee.reached)
            scores, cost = (
                self.judge.score(x),
                [sum(calls) / len(calls), sum(errors) / len(errors), time.process_time() - started],
            )
            return {"ell": torch.cat(ell), "label": scores.label, "cost": torch.tensor(cost)}

        return self.kept(f"referee-{label}", make)

    def rejection(self, found: dict[str, torch.Tensor], formula: Posterior) -> tuple[torch.Tensor, float, torch.Tensor]:
        """Shares of classes, how many draws they are worth, and their standard errors."""
        log_p = torch.log_softmax(found["ell"], -1)
        log_w = with_odds(log_p, formula.odds)[:, list(formula.labels[1:])].sum(-1)
        n = effective_sample_size(log_w)
        shares = torch.zeros(len(CLASSES), dtype=torch.float64).index_add_(0, found["label"], torch.softmax(log_w, 0))
        return shares, n, (shares * (1 - shares) / n).sqrt()

    def runs(self) -> None:
        """All runs that are not in the file, one of each case before the next."""
        k, of = self.options.share
        for seed, (labels, odds) in list(itertools.product(range(self.options.runs), self.cases()))[k::of]:
            key = self.key(labels, odds, seed)
            if key in self.options.done:
                continue
            started = time.time(), time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                samples = sculpt.posterior(self.models, labels, odds).sample(
                    PARTICLES,
                    sculpt.Tracked(particles=PARTICLES),
                    steps=STEPS,
                    batch_size=self.options.batch_size,
                    generator=self.generator(seed),
                    progress=False,
                )
            scores, told = self.judge.score(samples.x.float().cpu()), samples.diagnostics
            stored = {
                "key": key,
                "classes": torch.bincount(scores.label, minlength=len(CLASSES)).tolist(),
                "accepted": int(scores.accepted.sum()),
                "families": told.families,
                "log_z": [told.log_z, told.log_z_error],
                "level": told.verdict.level,
                "note": told.notes[-1],
                "seconds": [round(time.time() - started[0], 1), round(time.process_time() - started[1], 1)],
            }
            with self.options.results.open("a") as file:
                file.write(json.dumps(stored) + "\n")

    def key(self, labels, odds, seed: int) -> str:
        return f"{self.part} {labels} {odds} {seed} {' '.join(self.identity)}"

    def table(self) -> None:
        heading(
            f"**{self.part}**: {', '.join(map(str, self.models))}; s_d = {self.s:g}, {PARTICLES} particles, {STEPS} steps; as asked in %",
            *(
                "labels, odds",
                "runs",
                "as asked",
                "rejection (head)",
                "off the head's shares",
                "allowed",
                "off the referee's",
                "allowed",
            ),
            *("families", "verdicts"),
        )
        found = read_runs(self.options.results)
        for labels, odds in self.cases():
            runs = [found[key] for seed in range(self.options.runs) if (key := self.key(labels, odds, seed)) in found]
            if len(runs) < 2:
                continue
            formula = sculpt.posterior(self.models, labels, odds).formula
            asked = composed(formula, [proportions(name) for name in SETS[self.part]]) > 0
            classes = torch.tensor([run["classes"] for run in runs], dtype=torch.float64)
            shares = classes / classes.sum(1, keepdim=True)
            ours = shares[:, asked].sum(1)
            se = float(ours.std()) / math.sqrt(len(runs))
            want, n, error = self.rejection(self.head(labels[0]), formula)
            kept = float(want[asked].sum())
            cells = [f"{labels}, {odds}" if odds else str(labels), str(len(runs))]
            cells += [
                f"**{100 * ours.mean():.1f}** ± {100 * se:.1f}",
                f"{100 * kept:.1f} ± {100 * math.sqrt(kept * (1 - kept) / n):.1f}",
            ]
            for reference, errors, points in (
                (want, error, 0.06),
                (*self.rejection(self.refereed(labels[0]), formula)[::2], 0.03),
            ):
                off, allowed = compared(shares, reference, points, errors)
                cells += [f"{off:.3f}", f"{allowed:.3f}"]
            levels = sorted({run["level"] for run in runs})
            families = [run["families"] for run in runs]
            cells += [
                f"{min(families):.0f} to {max(families):.0f}",
                ", ".join(f"{sum(run['level'] == x for run in runs)} {x}" for x in levels),
            ]
            row(*cells)


def read_runs(path: Path) -> dict[str, dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {stored["key"]: stored for stored in map(json.loads, lines)}


def referee(options: argparse.Namespace) -> None:
    heading(
        "**The referee that nobody trained**, digits",
        "models",
        "s_d",
        "samples",
        "cross-entropy",
        "fitted head, the same",
        "calls a sample",
        "its noise",
        "CPU s a sample",
    )
    for part in PARTS:
        digits = Digits(part, options)
        ell, head, cost = [], [], []
        for i in range(len(digits.models)):
            found = digits.refereed(i)
            ell.append(-torch.log_softmax(found["ell"], -1)[:, i])
            head.append(-torch.log_softmax(digits.head(i)["ell"], -1)[: len(found["ell"]), i])
            cost.append(found["cost"])
        calls, error, seconds = torch.stack(cost).mean(0).tolist()
        n = sum(map(len, ell))
        row(
            ", ".join(SETS[part]), f"{digits.s:g}", f"{n:,}", f"**{torch.cat(ell).mean():.3f}**", f"{torch.cat(head).mean():.3f}",
            f"{calls:.0f}", f"{error:.2f} nats", f"{seconds * len(ell) / n:.2f}",
        )  # fmt: skip
        shares_of_classes(digits)


def shares_of_classes(digits: Digits) -> None:
    """What the referee says of each class, beside what the data's proportions say."""
    exact = torch.stack([proportions(name) for name in SETS[digits.part]], -1)
    found = [digits.refereed(i) for i in range(len(digits.models))]
    p, label = (torch.cat(parts) for parts in ([torch.softmax(f["ell"], -1) for f in found], [f["label"] for f in found]))
    for i in exact.sum(-1).nonzero()[:, 0].tolist():
        if int((label == i).sum()) >= 20:
            said, want = p[label == i].mean(0), exact[i] / exact[i].sum()
            told = ", ".join(f"{100 * a:.0f} ({100 * b:.0f})" for a, b in zip(said.tolist(), want.tolist(), strict=True))
            row(f"{CLASSES[i][1]} {CLASSES[i][0]}", "", str(int((label == i).sum())), told, "", "", "", "")


def digits(options: argparse.Namespace) -> None:
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.done = set(read_runs(options.results))
    both = [Digits(part, options) for part in PARTS]
    for part in both:
        part.runs()
    for part in both if options.share == (0, 1) else []:
        part.table()


def main() -> None:
    tables = {"fields": fields, "one": one, "referee": referee, "digits": digits}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*tables, []], help="which tables (all by default)")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each composition of digits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=170, help="samples that go through a network at once")
    parser.add_argument(
        "--state", type=Path, default=Path("train_state/digits"), help="where the base models' samples are kept"
    )
    parser.add_argument("--results", type=Path, default=Path("train_state/digits/images.jsonl"))
    parser.add_argument(
        "--share", type=int, nargs=2, metavar=("K", "OF"), default=(0, 1), help="every OF-th run from the K-th on"
    )
    options = parser.parse_args()
    options.share = tuple(options.share)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.parts or tables:
        tables[name](options)


if __name__ == "__main__":
    main()
