"""What is public is documented: docstrings, their arguments, the API pages, and the code in CONTRIBUTING.md."""

import functools
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

import sculpt
import sculpt.molecules
from sculpt import chain, formula, plots
from sculpt.classifier.guide import Guide
from sculpt.classifier.store import Store
from sculpt.diffusion.correctors import Corrector
from sculpt.diffusion.denoiser import Denoiser
from sculpt.diffusion.diffusers.encoder import UNetEncoder
from sculpt.gflownet import exact

ROOT = Path(__file__).parent.parent
NAMES = [f"sculpt.{name}" for name in sculpt.__all__ if not name.startswith("_")]
NAMES += [f"sculpt.molecules.{name}" for name in sculpt.molecules.__all__]

# What they return and what they ask others to fill in, beside what is public by name.
MORE = [
    chain.Chain,
    chain.State,
    chain.Settings,
    chain.Selection,
    chain.Progress,
    Denoiser,
    Guide,
    Store,
    Corrector,
    UNetEncoder,
]
MORE += [getattr(formula, name) for name in formula.__all__]


def script(name: str):
    """A module of .docs, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / ".docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolve(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def members(cls: type) -> dict[str, object]:
    """Public methods and properties of our own, each with a docstring of its own or, where it has none, that of its parent's.

    What torch or torchgfn defines they document. ``inspect.getdoc`` would take the docstring of an overridden *value*, too.
    """
    found: dict[str, object] = {}
    for parent in reversed([parent for parent in cls.__mro__ if parent.__module__.startswith("sculpt")]):
        for name, value in vars(parent).items():
            value = getattr(value, "__func__", value)
            if name.startswith("_") or not (
                inspect.isfunction(value) or isinstance(value, (property, functools.cached_property))
            ):
                continue
            if value.__doc__ or not getattr(found.get(name), "__doc__", None):
                found[name] = value
    return found


def documented() -> dict[str, object]:
    """Every public thing by its full name, members included."""
    things = {name: resolve(name) for name in NAMES}
    things |= {f"{thing.__module__}.{thing.__qualname__}": thing for thing in MORE}
    for name, module in {"exact": exact, "plots": plots}.items():
        things |= {f"sculpt.{name}.{member}": getattr(module, member) for member in module.__all__}
    for name, thing in list(things.items()):
        if inspect.isclass(thing):
            things |= {f"{name}.{member}": value for member, value in members(thing).items()}
    return things


THINGS = documented()


def text_of(name: str) -> str:
    return inspect.cleandoc(THINGS[name].__doc__ or "")


@pytest.mark.parametrize("name", THINGS)
def test_what_is_public_has_a_docstring(name):
    text = text_of(name)
    assert text, f"{name} has no docstring."
    assert not text.startswith(f"{name.rpartition('.')[2]}("), f"{name} has only the signature that a dataclass writes itself."


def documented_arguments(text: str) -> list[str]:
    """The names of an ``Args:`` section: what stands before the colon at its first level of indentation."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    if section is None:
        return []
    heads = re.findall(r"^ {4}(\*{0,2}\w+(?:, ?\w+)*):", section[1], re.MULTILINE)
    return [name.strip().lstrip("*") for head in heads for name in head.split(",")]


@pytest.mark.parametrize("name", [name for name in THINGS if "\nArgs:" in text_of(name)])
def test_documented_arguments_exist(name):
    arguments = documented_arguments(text_of(name))
    assert arguments, f"{name}: the Args section names nothing."
    unknown = set(arguments) - set(inspect.signature(THINGS[name]).parameters)
    assert not unknown, f"{name} documents {', '.join(sorted(unknown))}, which it does not take."


def test_the_reader_of_arguments_reads_them():
    text = "It does.\n\nArgs:\n    a: one,\n        two: not one.\n    b, c: more.\n    **rest: others.\n\nReturns: nothing."
    assert documented_arguments(text) == ["a", "b", "c", "rest"]


def test_there_is_a_page_for_every_public_name():
    listed = set(re.findall(r"^   ~?(sculpt\.[\w.]+)$", (ROOT / ".docs/reference.rst").read_text(), re.MULTILINE))
    assert set(NAMES) - {"sculpt.exact"} <= listed  # exact is a module, and has a page written by hand
    for name, module in {"exact": exact, "plots": plots}.items():
        assert f"automodule:: {module.__name__}\n" in (ROOT / f".docs/{name}.rst").read_text()
    for name in listed:
        resolve(name)


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning_and_every_link_leads_somewhere(tmp_path):
    for module in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(module, reason="make docs installs it")
    build = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        tmp_path / "trees",
        ROOT / ".docs",
        tmp_path / "html",
    ]
    subprocess.run(build, check=True)
    subprocess.run([sys.executable, ROOT / ".docs" / "check.py", tmp_path / "html"], check=True)
    for name in set(NAMES) - {"sculpt.exact"}:
        assert (tmp_path / "html" / "api" / f"{name}.html").is_file(), name
    page = (tmp_path / "html" / "api" / "sculpt.harmonic_mean.html").read_text()
    assert r"\alpha p + (1 - \alpha) q" in page
    assert "mathjax" in page.lower()


def test_the_check_of_the_site_finds_what_is_wrong(tmp_path):
    check = script("check")
    good = '<html lang="en"><title>t</title><a class="skip" href="#here">s</a><h1 id="here">a</h1><h2>b</h2><img src="good.html" alt="words">'
    (tmp_path / "good.html").write_text(good)
    (tmp_path / "bad.html").write_text(
        '<h1>a</h1><h3>b</h3><img src="lost.png"><a href="good.html#lost">c</a><a href="https://e.org">d</a>'
    )
    assert list(check.Site(tmp_path).faults()) == [
        "bad.html: no title",
        "bad.html: no language",
        "bad.html: no link that skips to the content",
        "bad.html: a picture without words: lost.png",
        "bad.html: a heading of level 3 below one of level 1",
        "bad.html: a link to lost.png, where nothing is",
        "bad.html: a link to good.html#lost, a page without this anchor",
    ]


def test_every_notebook_is_a_page_with_its_words_code_and_pictures(tmp_path):
    script("gallery").write_pages(ROOT / "notebooks", tmp_path / "gallery")
    index = (tmp_path / "gallery/index.md").read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        page, cells = (tmp_path / f"gallery/{path.stem}.md").read_text(), json.loads(path.read_text())["cells"]
        assert f"]({path.stem}.md)" in index
        assert page.count("```python") >= sum(cell["cell_type"] == "code" for cell in cells)
        shown = re.findall(r"^!\[.+\]\((.+\.png)\)$", page, re.MULTILINE)
        drawn = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
        assert len(shown) == drawn > 0
        assert all((tmp_path / "gallery" / name).read_bytes().startswith(b"\x89PNG") for name in shown)


def test_links_of_pages_lead_to_files_of_the_repository():
    for page in (ROOT / "README.md", *pages.GUIDES):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()) if page.suffix == ".md" else ():
            made = "gallery/" in link  # from the notebooks, when the site is built
            assert link.startswith("http") or made or (page.parent / link).exists(), f"{page.name}: {link}"


def test_contributing_runs_as_it_is_written():
    assert len(pages.blocks(ROOT / ".github/CONTRIBUTING.md")) == 11
    pages.run(ROOT / ".github/CONTRIBUTING.md")


def test_every_guide_has_code_that_is_run():
    without = {path.stem for path in pages.GUIDES if not pages.blocks(path)}
    assert without == {"changelog", "contributing", "faq", "limits", "measured", "words"}


@pytest.mark.parametrize("path", [path for path in pages.GUIDES if pages.blocks(path)], ids=lambda path: path.stem)
def test_a_guide_runs_as_it_is_written(path, tmp_path, monkeypatch):
    pages.at_hand(tmp_path, monkeypatch)
    scope = pages.run(path)
    if path.stem == "policies":
        p, x = scope["p"], scope["sets"].x
        assert x.sum(-1).max() <= 3 and len(p.sample(50)) == 50
    if path.stem in ("policies", "compose"):
        # The harmonic mean of N(-1, 2) and N(1, 2), or of N(-1, 1) and N(1, 1), is symmetric, and narrower than both.
        between = scope["between"].x
        assert between.mean(0).abs().max() < 0.35 and between.var(0).max() < 2.0
    if path.stem == "large":
        assert len(scope["library"]) == len(scope["frame"]) == 20
    if path.stem == "gflownets":
        assert abs(float(scope["guided"].sum()) - 1) < 1e-6
