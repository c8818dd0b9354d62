"""Whether the error bars of log Z are true: ``python tests/bench/coverage.py --file FILE``.

Every row is so many runs (``--runs``, 200 by default), each with a population and a seed of its own, of a composition whose log Z is
known: by quadrature, by counting, or, where a terminal head has the last word, that of the head's own target. FILE gets one line of
JSON per run; runs that are there are not done again. ``--rows TEXT`` does only the rows whose name has it, ``--reprint`` runs nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from verdicts import Case, append, base, classifier, composed, judged, read, road, stored

from sculpt.state import in_parts

START = 1e-3
"""Nats that all runs may be off by: base models start from N(0, v0) whatever their means."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    models: str
    formula: str
    particles: int
    steps: int | None = None
    road: str = "tracked"

    @property
    def name(self) -> str:
        return f"{self.models}: {self.formula}" + (f", {self.road}" if self.road != "tracked" else "")

    @property
    def size(self) -> str:
        return f"{self.particles}" + ("" if self.steps is None else f", {self.steps}")


ROWS = [
    # the trial's
    Row("2 apart", "p & q", 200, 32),
    Row("2 apart", "p & q", 200, 128),
    Row("6 apart", "p & q", 200, 32),
    Row("2 apart", "p^1.5 q^-.5", 200, 32),
    Row("2 apart", "p q", 200, 32),
    Row("2 apart", "(p & q) r", 200, 32),
    Row("2 apart", "M_0", 200, 32),
    Row("hills, exact flows", "p & q", 200),
    Row("hills, exact flows", "p q", 200),
    Row("hills, exact flows", "(p & q) r", 200),
    Row("rough bumps, exact flows", "p & q", 200),
    Row("rough bumps, exact flows", "p & q", 2048),
    # modes, contrasts and differences
    Row("rings", "p & q", 200, 32),
    Row("rings", "p - q", 200, 32),
    Row("rings", "p - q - r", 200, 32),
    Row("rings", "(p & q) - r", 200, 32),
    Row("rings", "p q", 200, 32),
    Row("rings", "p q^-.5", 200, 32),
    Row("rings", "(p & q) r", 200, 32),
    Row("tight rings", "p & q", 200, 32),
    Row("tight rings", "p - q", 200, 32),
    Row("tails", "p & q", 200, 32),
    Row("circles, learned", "p & q", 200),
    Row("circles, learned", "p - q", 200),
    Row("circles, learned", "(p & q) - r", 200),
    Row("circles, 150 steps", "p & q", 200),
    Row("untold backward policies, 2", "p & q", 200),
    # other roads
    Row("rings", "p & q", 200, 32, "corrected, fair"),
    Row("rings", "p - q", 200, 32, "corrected, fair"),
    Row("rings", "p & q", 200, 32, "corrected, poor"),
    Row("pair, learned", "p & q", 200, None, "corrected, good"),
    Row("pair, learned", "p & q", 200, None, "corrected, poor"),
    Row("pair, learned", "p - q", 200, None, "corrected, poor"),
    Row("rings", "p & q", 200, 32, "rejection by densities"),
    Row("rings", "p - q", 200, 32, "rejection by densities"),
    Row("hills, exact flows", "p & q", 200, None, "rejection"),
    Row("circles, learned", "p - q", 200, None, "rejection"),
    Row("circles, 150 steps", "p & q", 200, None, "rejection"),
    # large populations
    Row("2 apart", "p & q", 2048, 128),
    Row("2 apart", "p q", 2048, 128),
    Row("2 apart", "(p & q) r", 2048, 128),
    Row("rings", "p - q", 2048, 128),
    Row("rings", "(p & q) - r", 2048, 128),
]


def exact_log_z(row: Row) -> float:
    """Of the target, or of the one that a terminal head makes of it."""
    composition, _, log_z = composed(row.models, row.formula)
    if not row.road.startswith("corrected"):
        return log_z
    ours, posterior = base(row.models), composition.formula
    head = classifier(row.models, row.road.split(", ")[1])
    log_p = ours.log_p[:, posterior.labels[0]] + ours.log_area
    some = log_p > -40
    x = ours.points[some]
    x = x.float() if ours.mixtures else x.to(composition.leaves[0].start(1))
    with torch.no_grad():
        log_f = in_parts(lambda x: head.log_h_terminal(x, labels=posterior.labels, odds=None), 4096, x)
    return float((log_p[some] + log_f.double()).logsumexp(0))


def runs(row: Row, seeds: range, done: set[tuple[str, str, int]]) -> Iterator[dict[str, Any]]:
    """The runs that are missing."""
    seeds = [seed for seed in seeds if (row.name, row.size, seed) not in done]
    if not seeds:
        return
    exact, composition = exact_log_z(row), composed(row.models, row.formula)[0]
    how = road(Case("", row.models, row.formula, row.road, row.particles, row.steps, row.particles, 0))
    for seed in seeds:
        start, generator = time.process_time(), torch.Generator().manual_seed(seed)
        samples = composition.sample(row.particles, how, steps=row.steps, generator=generator, progress=False)
        yield {
            "row": row.name,
            "size": row.size,
            "seed": seed,
            "exact": exact,
            "log_z": samples.log_z,
            "error": samples.diagnostics.log_z_error,
            "seconds": time.process_time() - start,
            "diagnostics": stored(samples.diagnostics),
        }


def report(row: Row, lines: list[dict[str, Any]]) -> None:
    lines = [line for line in lines if (line["row"], line["size"]) == (row.name, row.size)]
    if len(lines) < 2:
        return
    off = [line["log_z"] - line["exact"] for line in lines]
    missed = [line for line, d in zip(lines, off, strict=True) if not abs(d) <= 2 * line["error"] + START]
    sound = [line for line in missed if judged(line).trust == "good"]
    trusted = [line for line in lines if judged(line).trust == "good"]
    covered = 1 - len(missed) / len(lines)
    said = f"{covered:.0%}" if covered >= 0.9 else f"**{covered:.0%}**"
    print(
        f"| {row.name} | {row.size} | {len(lines)} | {statistics.mean(off):+.3f} | {statistics.stdev(off):.3f} "
        f"| {statistics.mean(line['error'] for line in lines):.3f} | {said} | {len(sound)} of {len(missed)} | {len(trusted)} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--runs", type=int, default=200, help="how many a row")
    parser.add_argument("--rows", default="", help="only rows whose name has this text")
    parser.add_argument("--reprint", action="store_true", help="judge what is there again, and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = read(options.file)
    done = {(line["row"], line["size"], line["seed"]) for line in lines}
    print("| case | particles, steps | runs | bias | sd | reported | 2σ covered | of the missed, called sound | called sound |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        if options.rows not in f"{row.name}, {row.size}":
            continue
        if not options.reprint:
            for line in runs(row, range(options.runs), done):
                append(options.file, line)
                lines.append(line)
        report(row, lines)


if __name__ == "__main__":
    main()
