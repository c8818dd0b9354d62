"""Every public name has an example, in its docstring or on a page of the reference, and all of them run and print what they say."""

import doctest
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pages
import pytest

import sculpt
import sculpt.molecules
from sculpt import plots
from sculpt.gflownet import exact

DOCS = Path(__file__).parent.parent / ".docs"
PAGE = DOCS / "plots.rst"
ON_PAGE = {f"plots.{name}" for name in plots.__all__} | {"sculpt.explore"}
NAMES = [f"sculpt.{name}" for name in sculpt.__all__ if name not in ("__version__", "exact", "explore")]
NAMES += [f"sculpt.molecules.{name}" for name in sculpt.molecules.__all__]
NAMES += [f"sculpt.exact.{name}" for name in exact.__all__]
HOW = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def defined():
    """What the first lines of the reference define: two policies on a grid, two Gaussians in the plane."""
    scope: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(DOCS.parent)
        exec(compile(pages.blocks(DOCS / "reference.rst")[0], "reference.rst", "exec"), scope)
    return scope


@pytest.fixture
def scope(defined, tmp_path, monkeypatch):
    """The same in a folder of its own, with a new seed."""
    (tmp_path / "pretrained").symlink_to(DOCS.parent / "pretrained")
    monkeypatch.chdir(tmp_path)
    defined["seed"].manual_seed(0)
    return dict(defined)


def check(text: str, name: str, scope: dict) -> dict:
    test = doctest.DocTestParser().get_doctest(text, scope, name, None, 0)
    said: list[str] = []
    assert not doctest.DocTestRunner(optionflags=HOW).run(test, out=said.append, clear_globs=False).failed, "".join(said)
    return test.globs


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_name_runs_and_prints_what_it_says(name, scope):
    module, _, attribute = name.rpartition(".")
    module = exact if module == "sculpt.exact" else importlib.import_module(module)
    text = inspect.getdoc(getattr(module, attribute)) or ""
    example = re.search(r"^Example:\n((?: {4}.*\n?|\n)+)", text, re.MULTILINE)
    assert example, f"{name} has no example: a section 'Example:' at the end of its docstring."
    example = textwrap.dedent(example[1])
    assert ">>>" in example
    check(example, name, scope)


def test_pictures_and_the_explorer_have_examples_that_run(scope):
    pytest.importorskip("ipywidgets")
    text = PAGE.read_text()
    missing = {name for name in ON_PAGE if f"{name}(" not in text}
    assert not missing
    scope = check("\n".join(pages.blocks(PAGE)), "plots.rst", scope)
    assert Path("cells.png").stat().st_size > 0 and type(scope["panel"]).__name__ == "View"


def test_an_example_that_prints_something_else_fails():
    with pytest.raises(AssertionError, match="Expected"):
        check(">>> 1 + 1\n3\n", "wrong", {})
