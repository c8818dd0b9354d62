"""Check a built site: ``python .docs/check.py docs-html``. Local links and anchors lead somewhere, and every page has what a reader needs.

A title, a language, one first heading and no level left out below it, words for every picture, a way to skip to the content. External links
are not followed.
"""

import re
import sys
from collections.abc import Iterator
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

GENERATED = {"genindex.html", "search.html", "py-modindex.html"}


class Page(HTMLParser):
    """What is checked of a page: its links, anchors, headings, and pictures."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.levels: list[int] = []
        self.wordless: list[str] = []
        self.language, self.title, self.skips, self._reads_title = "", "", False, False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]
        if tag == "html":
            self.language = found.get("lang", "")
        elif tag == "img" and not found.get("alt", "").strip() and "aria-hidden" not in found:
            self.wordless.append(found.get("src", ""))
        elif re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        elif tag == "a" and "skip" in found.get("class", ""):
            self.skips = True
        self._reads_title = tag == "title"

    def handle_data(self, data: str) -> None:
        if self._reads_title:
            self.title += data

    def handle_endtag(self, tag: str) -> None:
        self._reads_title = False


class Site:
    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def pages(self) -> dict[Path, Page]:
        files = [path for path in sorted(self.folder.rglob("*.html")) if "_static" not in path.parts]
        return {path.resolve(): Page(path) for path in files}

    def faults(self) -> Iterator[str]:
        for page in self.pages.values():
            for fault in (*self._missing(page), *self._broken(page)):
                yield f"{page.path.relative_to(self.folder)}: {fault}"

    def _missing(self, page: Page) -> Iterator[str]:
        if not page.title.strip():
            yield "no title"
        if not page.language:
            yield "no language"
        if not page.skips:
            yield "no link that skips to the content"
        yield from (f"a picture without words: {source}" for source in page.wordless)
        if page.path.name not in GENERATED:
            if page.levels.count(1) != 1:
                yield f"{page.levels.count(1)} first headings, expected one"
            jumps = [(a, b) for a, b in zip(page.levels, page.levels[1:], strict=False) if b > a + 1]
            yield from (f"a heading of level {b} below one of level {a}" for a, b in jumps)

    def _broken(self, page: Page) -> Iterator[str]:
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
            if not target.exists():
                yield f"a link to {link}, where nothing is"
            elif target in self.pages and parts.fragment and unquote(parts.fragment) not in self.pages[target].anchors:
                yield f"a link to {link}, a page without this anchor"


def main(folder: str) -> int:
    site = Site(Path(folder))
    faults = list(site.faults())
    print("\n".join(faults) or f"{len(site.pages)} pages, no faults", file=sys.stderr if faults else sys.stdout)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
