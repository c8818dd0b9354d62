"""Compositions with exact answers, rivals beside us at equal evaluations, on one page: ``make bench``.

Runs are kept in a file, one a line, so that a killed benchmark goes on; the page is written from it, as markdown and as HTML with
pictures. ``--quick`` does a tiny version of everything.
"""

from __future__ import annotations

import argparse
import base64
import html
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.parts import checkerboard, hypergrid, logic, mixtures, shapes
from bench.parts.runs import Case, Method, Part, Records, commit, key, run

from sculpt.files import replace_file

PARTS: dict[str, Callable[..., Part]] = {
    "shapes": shapes.part,
    "logic": logic.part,
    "checkerboard": checkerboard.part,
    "mixtures": mixtures.part,
    "hypergrid": hypergrid.part,
}


@dataclass(frozen=True)
class Table:
    """One case: its columns and rows, and the picture of each row where there is one."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    pictures: Sequence[tuple[str, Path]]


def average(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; of one run there is none."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def told(values: Sequence[float]) -> str:
    """Mean ± standard error, with the digits that they have."""
    mean, error = average(values)
    digits = 3 if math.isnan(error) or error <= 0 else max(0, min(5, 1 - math.floor(math.log10(error))))
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def ahead(ours: Sequence[float], theirs: Sequence[float], better: int) -> float:
    """By how many standard errors of the difference ours is better."""
    (a, ea), (b, eb) = average(ours), average(theirs)
    error, gain = math.hypot(ea, eb), (a - b) * better
    if math.isnan(error):
        return math.nan
    return gain / error if error else math.copysign(math.inf, gain) if gain else 0.0


class Found:
    """What is known of a case so far."""

    def __init__(self, name: str, part: Part, case: Case, records: Records):
        every = {m: [records.runs.get(key(name, case, m, seed)) for seed in range(part.seeds)] for m in case.methods}
        self.name, self.case, self.records = name, case, records
        self.runs = {m: [run for run in runs if run] for m, runs in every.items() if any(runs)}
        self.lead, self.better = next(iter(case.better.items()))

    def values(self, method: Method, measure: str) -> list[float]:
        """A number of all runs."""
        return [run["measures"][measure] for run in self.runs[method]]

    def ahead(self, rival: Method) -> dict[Method, float]:
        """By how much each of ours that can be compared is better on the first number."""
        if rival.kind != "rival" or not (rival.same or self.better > 0):
            return {}
        own = [m for m in self.runs if m.kind == "ours" and (rival.alone or not m.alone)]
        return {m: ahead(self.values(m, self.lead), self.values(rival, self.lead), self.better) for m in own}

    def row(self, method: Method) -> list[str]:
        """One line of the table."""
        runs = self.runs[method]
        name = f"**{method.name}**" if method.kind == "ours" else method.name + " †" * (not method.same)
        evaluations = statistics.mean(run["evaluations"] for run in runs) / self.case.n
        return [
            name,
            *(told(self.values(method, measure)) for measure in self.case.better),
            f"{evaluations:.0f}" if evaluations else "",
            f"{statistics.mean(run['seconds'] for run in runs):.1f}",
            f"{statistics.mean(run['n'] for run in runs):.0f}",
            str(len(runs)),
            " / ".join(f"{gain:+.1f}" for gain in self.ahead(method).values() if not math.isnan(gain)),
        ]

    def table(self) -> Table:
        """All of it."""
        arrows = {1: " ↑", -1: " ↓", 0: ""}
        columns = ["", *(f"{measure}{arrows[better]}" for measure, better in self.case.better.items()), *BESIDE]
        rows = [self.row(method) for method in self.runs]
        if self.case.exact:
            cells = [f"{self.case.exact[m]:.3f}" if m in self.case.exact else "" for m in self.case.better]
            rows.append(["*the exact target*", *cells, *[""] * len(BESIDE)])
        pictures = [(m.name, self.records.picture(f"{self.name} {self.case.name} {m.name}")) for m in self.runs]
        return Table(self.case.name, columns, rows, [(m, path) for m, path in pictures if path.exists()])


BESIDE = ("evaluations a sample", "CPU s", "samples", "seeds", "ours ahead, standard errors")


def everything(parts: dict[str, Part], records: Records) -> dict[str, list[Found]]:
    """What is known of all cases, part by part."""
    found = {name: [Found(name, part, case, records) for case in part.cases] for name, part in parts.items()}
    return {name: [one for one in of if one.runs] for name, of in found.items()}


def summary(found: dict[str, list[Found]]) -> list[str]:
    """How many comparisons are won and lost by two standard errors, and all that are lost."""
    pairs = [
        (one.case.name, ours.name, rival.name, gain)
        for of in found.values()
        for one in of
        for rival in one.runs
        for ours, gain in one.ahead(rival).items()
        if not math.isnan(gain)
    ]
    lost = [f"{case}: {ours} behind {rival}, {gain:+.1f}" for case, ours, rival, gain in pairs if gain < -2]
    won = sum(gain > 2 for *_, gain in pairs)
    head = f"Of {len(pairs)} comparisons ours is ahead by two standard errors in {won}, and behind in {len(lost)}"
    return [head + (":" if lost else "."), *lost]


def markdown(parts: dict[str, Part], records: Records) -> Iterator[str]:
    """The page as lines of markdown."""
    found = everything(parts, records)
    head, *lost = summary(found)
    yield from ("# Compositions with exact answers", "", _note(records), "", head, "", *(f"- {line}" for line in lost))
    for name, part in parts.items():
        yield from ("", f"## {part.title}", "", " ".join(part.about.split()), "")
        yield from (f"- {line}" for line in part.reported)
        for table in (one.table() for one in found[name]):
            yield from ("", f"**{table.title}**", "", f"| {' | '.join(table.columns)} |", "|---" * len(table.columns) + "|")
            yield from (f"| {' | '.join(row)} |" for row in table.rows)


NOTE = (
    "Every method takes about as many evaluations of networks as the first of its table, on the same networks and seeds: mean ± standard error over the "
    "seeds. ↑: more is better, ↓: less is. The last column compares that row with each of ours, in the order of the table, on the first measure: above +2 "
    "ours is ahead, below -2 behind; particles that go alone are compared with those that do. † has a target of its own, so that it is compared on what is "
    "as asked only, where the target always is. {runs} runs, commits {commits}."
)


def page(parts: dict[str, Part], records: Records) -> str:
    """The page as HTML, with the pictures in it."""
    found = everything(parts, records)
    head, *lost = summary(found)
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lost)
    body = [f"<h1>Compositions with exact answers</h1><p>{html.escape(_note(records))}</p>"]
    body.append(f"<p>{html.escape(head)}</p><ul>{items}</ul>")
    for name, part in parts.items():
        body.append(f"<h2>{html.escape(part.title)}</h2><p>{html.escape(' '.join(part.about.split()))}</p>")
        body.append("".join(f"<p><i>{html.escape(line)}</i></p>" for line in part.reported))
        for table in (one.table() for one in found[name]):
            columns = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
            rows = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
            body.append(f"<h3>{html.escape(table.title)}</h3><table><tr>{columns}</tr>{rows}</table>")
            body.append("<div>" + "".join(map(_figure, table.pictures)) + "</div>")
    return f"<!doctype html><meta charset=utf-8><title>sculpt: the benchmark</title><style>{STYLE}</style>{''.join(body)}"


STYLE = (
    "body{font:15px/1.45 system-ui;max-width:1200px;margin:2em auto;padding:0 1em}table{border-collapse:collapse;font-size:13px}"
    "td,th{border-bottom:1px solid #ddd;padding:3px 8px;text-align:right}td:first-child,th:first-child{text-align:left}"
    "div{display:flex;flex-wrap:wrap}figure{margin:6px}figure img{max-width:280px}figcaption{font-size:12px}"
)


def _note(records: Records) -> str:
    return NOTE.format(commits=", ".join(sorted({r["commit"] for r in records.runs.values()})), runs=len(records.runs))


def _cell(cell: str) -> str:
    said = html.escape(cell)
    if said.startswith("**"):
        return f"<b>{said.strip('*')}</b>"
    return f"<i>{said.strip('*')}</i>" if said.startswith("*") else said


def _figure(picture: tuple[str, Path]) -> str:
    method, path = picture
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{image}"><figcaption>{html.escape(method)}</figcaption></figure>'


def write(parts: dict[str, Part], records: Records) -> None:
    """Both pages, beside the runs."""
    replace_file(records.folder / "page.md", ("\n".join(markdown(parts, records)) + "\n").encode())
    replace_file(records.folder / "page.html", page(parts, records).encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and write the page after each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which parts (all by default)")
    parser.add_argument("--quick", action="store_true", help="a tiny version of everything")
    parser.add_argument("--out", type=Path, help="where runs and page are kept; by default train_state/bench")
    parser.add_argument("--device", default="cpu", help="of the shapes' network")
    parser.add_argument("--page", action="store_true", help="write the page of what is there, and run nothing")
    parser.add_argument("--seeds", type=int, help="runs of every method, by default five")
    parser.add_argument(
        "--share", type=int, nargs=2, metavar=("K", "OF"), default=(0, 1), help="every OF-th case from the K-th on"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = Records(options.out or Path("train_state") / ("bench-quick" if options.quick else "bench"))
    known: dict[str, Any] = {"shapes": {"device": options.device}}
    parts = {name: PARTS[name](options.quick, **known.get(name, {})) for name in options.parts or PARTS}
    if options.seeds:
        parts = {name: replace(part, seeds=options.seeds) for name, part in parts.items()}
    for name, part in parts.items():
        if not options.page:
            run(name, part, records, lambda line: print(line, flush=True), tuple(options.share))
        write(parts, records)
    print(f"{records.folder / 'page.md'}, {records.folder / 'page.html'} ({commit()})")


if __name__ == "__main__":
    main()
