"""The page of the demo, ``index.html``: a section for every part, with its pictures, its table, what was done and what it cost.

Each part puts its own section on the page when it is done. The sections of the others stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from sculpt.apps.demos.common import Clock
from sculpt.diagnostics import LEVELS, Verdict
from sculpt.files import replace_file

__all__ = ["MEANING", "Part", "Shown", "meanings", "publish"]

ORDER = ("molecules", "digits", "discs")
"""The best first."""
MEANING = {
    "exact": "drawn by rejection: no approximation beside the base samplers and the named judge",
    "sound": "many independent particles carry the weight, or nothing was weighted: take the samples as draws from the target",
    "thin": "few base samples lie where the formula does: take many particles",
    "steered": "each sample was steered alone and nothing was selected: the proportions are not the target's",
    "strained": "few independent particles carry the weight: the samples are right, but similar to each other",
    "biased": "the classifier's steering leaves the exact chain: the proportions are roughly right only",
    "doubtful": "the weights have a known error: do not take the samples as draws from the target",
    "collapsed": "nearly all samples descend from one or two particles",
    "uncovered": "no base model covers what was asked for",
}
"""Verdicts in a line each."""


@dataclass(frozen=True)
class Shown:
    """A picture on the page.

    Args:
        file: its name, in the folder of the page.
        title: what it shows, in a few words.
        caption: how to read it.
        alt: what there is to see, for those who cannot.
    """

    file: str
    title: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Part:
    """A section of the page.

    Args:
        name: of the part: ``sculpt demo NAME``.
        headline: what came out, in one sentence.
        done: what was done.
        pictures: the best first.
        cells: a table by row; the first row is the head.
        note: what its words mean.
        more: lines to type next.
    """

    name: str
    headline: str
    done: str
    pictures: Sequence[Shown]
    cells: Sequence[Sequence[str]]
    note: str
    more: str


def meanings(cells: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """The verdicts of a table, and what they mean.

    Args:
        cells: by row; the first row is the head.
    """
    said = {cell for row in cells for cell in row}
    return [(level, MEANING[level]) for level in LEVELS if level in said]


def publish(folder: Path, part: Part, clock: Clock) -> Path:
    """Put a part on the page, in the place of its last run.

    Args:
        folder: of the page and its pictures.
        part: what is shown.
        clock: of its run.
    """
    path = folder / "index.html"
    page = path.read_text(errors="replace") if path.is_file() else ""
    # Text is escaped, so no text looks like a mark.
    sections = dict(re.findall(r"<!-- part (\w+) -->\n(.*?)\n<!-- end -->", page, re.DOTALL))
    sections[part.name] = _section(part, clock)
    names = sorted(sections, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    cpu = sum(float(x) for name in names for x in re.findall(r'data-cpu="([\d.]+)"', sections[name]))
    links = "".join(f'<a href="#{name}">{name}</a>' for name in names)
    body = "\n".join(f"<!-- part {name} -->\n{sections[name]}\n<!-- end -->" for name in names)
    replace_file(path, _PAGE.format(style=_STYLE, links=links, cpu=cpu, body=body).encode())
    return path


def _section(part: Part, clock: Clock) -> str:
    figures = "\n".join(
        f'<figure><a class="wide" href="{escape(shown.file)}"><img src="{escape(shown.file)}" alt="{escape(shown.alt)}"></a>'
        f"<figcaption><b>{escape(shown.title)}.</b> {escape(shown.caption)}</figcaption></figure>"
        for shown in part.pictures
    )
    words = "".join(f"<dt>{_cell(level)}</dt><dd>{escape(meaning)}</dd>" for level, meaning in meanings(part.cells))
    return f"""<section id="{part.name}" data-cpu="{clock.cpu:.1f}">
<h2>{escape(part.headline)}</h2>
<p>{escape(part.done)}</p>
{figures}
<div class="wide" tabindex="0" role="region" aria-label="numbers of {part.name}">{_table(part.cells)}</div>
<p class="small">{escape(part.note)}</p>
<dl class="small">{words}</dl>
<p class="small">It took {clock.seconds:.0f} s, {clock.cpu:.0f} s of one CPU core. Again: <code>sculpt demo {part.name}</code></p>
<h3>Next</h3>
<pre tabindex="0">{escape(part.more.strip())}</pre>
</section>"""


def _table(cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in cells[0])
    rows = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in cells[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"


def _cell(text: str) -> str:
    level = next((level for level in LEVELS if level == text), None)
    return escape(text) if level is None else f'<b class="{Verdict(level, "").trust}">{escape(text)}</b>'


_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#2b2135, #ece8f2); --soft: light-dark(#625b6f, #b3abc2);
  --line: light-dark(#ddd8e4, #40394d); --card: light-dark(#ffffff, #221d2b); --back: light-dark(#f7f5fa, #17131d);
  --accent: light-dark(#5b2a86, #c9a2ee); --good: light-dark(#2e7d32, #7fd187); --careful: light-dark(#8f5600, #f0b35c);
  --bad: light-dark(#b3261e, #ff8a80); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; } footer { padding-bottom: 3rem; }
h1 { font-size: clamp(1.7rem, 4vw, 2.4rem); line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .5rem; } h3 { font-size: 1rem; margin: 0 0 .5rem; }
a, nav a { color: var(--accent); } nav a { margin-right: 1.2rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: clamp(1rem, 3vw, 1.75rem); margin: 1.5rem 0; }
figure { margin: 1.25rem 0; } figcaption { margin-top: .4rem; }
figcaption, .small { color: var(--soft); font-size: .88rem; } figcaption b { color: var(--ink); }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 8px; padding: .5rem; }
.wide { display: block; overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; font-variant-numeric: tabular-nums; }
td { min-width: 4.2rem; white-space: nowrap; } th { white-space: nowrap; }
th:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .8rem; margin: .5rem 0; } dd { margin: 0; }
.good { color: var(--good); } .careful { color: var(--careful); } .bad { color: var(--bad); }
pre { overflow-x: auto; background: var(--back); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; font-size: .86rem; }
""".strip()

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sculpt demo</title>
<style>
{style}
</style>
</head>
<body>
<header>
<h1>Pretrained models in, a new distribution out</h1>
<p>sculpt composes generative models while they sample. <b>p &amp; q</b> is likely under both, <b>p − q</b> is likely under p and not under
q. No base model is trained again, and every result says how far to trust it.</p>
<nav aria-label="parts">{links}</nav>
</header>
<main>
{body}
</main>
<footer class="small"><p>All parts together: {cpu:.0f} s of one CPU core. The tables are beside this page as .md files. More: the README,
the notebooks, and <code>sculpt --help</code>.</p></footer>
</body>
</html>
"""
