"""The notebooks as pages: what they are kept with is shown, nothing is run."""

import base64
import json
import math
import re
import struct
from pathlib import Path

__all__ = ["write_pages"]

INTRODUCTION = """\
# Notebooks

Each notebook runs from top to bottom on one core with what is in the repository, and is shown here as it ran. They are in the order that a newcomer needs.

:::{container} cards
"""


def write_pages(notebooks: Path, folder: Path) -> None:
    """Write a page for each notebook, its pictures, and the page that shows all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    cards, pages = [], []
    for path in sorted(notebooks.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        title, text = _page(cells, folder, path.stem)
        begins = re.search(r"^# .+\n+((?:.+\n?)+)", text, re.MULTILINE)
        said = re.split(r"[.:](?:\s|$)", " ".join(begins[1].split()))[0] + "." if begins else ""
        source = f"\n\n*This is [notebooks/{path.name}](../../notebooks/{path.name}) of the repository.*\n"
        (folder / f"{path.stem}.md").write_text(text + source, encoding="utf-8")
        pages.append(path.stem)
        pictures = sorted(folder.glob(f"{path.stem}-*.png"), key=_unlike_a_card)
        shown = f"![A picture of {title}]({pictures[0].name})\\\n" if pictures else ""
        cards.append(f"- [{shown}**{title}**]({path.stem}.md)\\\n  {said}")
    listed = "\n".join(pages)
    end = f"\n:::\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    (folder / "index.md").write_text(INTRODUCTION + "\n".join(cards) + end, encoding="utf-8")


def _unlike_a_card(picture: Path) -> float:
    """How far a picture is from twice as wide as high: a PNG begins with its size."""
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    return abs(math.log(width / height / 2))


def _page(cells: list[dict], folder: Path, stem: str) -> tuple[str, str]:
    """The title, and the page: words as they are, code, and below it what it gave."""
    title, heading, parts = stem, stem, []
    for k, cell in enumerate(cells):
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            if found := re.search(r"^# (.+)$", source, re.MULTILINE):
                title = found[1]
            headings = re.findall(r"^#+ (.+)$", source, re.MULTILINE)
            heading = headings[-1] if headings else heading
            parts.append(source)
        elif source:
            parts.append(_fenced(source.removeprefix("%matplotlib inline\n"), "python"))
            parts += [_output(output, folder / f"{stem}-{k:02d}.{i}.png", heading) for i, output in enumerate(cell["outputs"])]
    return title, "\n\n".join(part for part in parts if part)


def _output(output: dict, picture: Path, heading: str) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture.write_bytes(base64.b64decode("".join(data["image/png"])))
        return f"![{heading}: the picture that this code draws]({picture.name})"
    if "text/html" in data:
        return _fenced("".join(data["text/html"]), "{raw} html")
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return _fenced(text, "text") if text else ""


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
