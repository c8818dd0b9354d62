"""The package from outside: light to import, complete, and as its README says."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

import sculpt

ROOT = Path(__file__).parent.parent


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_sculpt_loads_neither_torch_nor_the_libraries_it_adapts():
    loaded = python(
        "import sys, sculpt; print(*(m for m in ('torch', 'diffusers', 'gfn', 'rdkit', 'matplotlib') if m in sys.modules))"
    )
    assert loaded.split() == []


def test_the_core_needs_none_of_the_adapted_libraries():
    names = (
        "composition roads overlaps samples classifier.fit diffusion.denoiser diffusion.energy actions.model hub plots apps.cli"
    )
    modules, adapted = (
        ", ".join(f"sculpt.{name}" for name in names.split()),
        ("diffusers", "transformers", "gfn", "rdkit", "matplotlib"),
    )
    loaded = python(f"import sys, {modules}; print(*(m for m in {adapted} if m in sys.modules))")
    assert loaded.split() == []


@pytest.mark.parametrize("name", sculpt.__all__)
def test_every_public_name_resolves_and_has_a_docstring(name):
    thing = getattr(sculpt, name)
    assert inspect.getdoc(thing)
    assert name in dir(sculpt)
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if callable(value) and not member.startswith("_"):
                assert inspect.getdoc(getattr(thing, member)), f"{name}.{member} has no docstring"


def test_a_name_that_is_not_there_says_which_are():
    with pytest.raises(AttributeError, match="harmonic_mean"):
        sculpt.harmonic  # noqa: B018


def test_no_tracked_file_names_an_index_or_a_machine():
    names = ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", "README.md")
    text = "".join((ROOT / name).read_text() for name in names)
    assert not re.search(r"index-url|find-links|/work/|/home/|/root/", text)


def test_the_readme_runs_as_it_is_written(tmp_path, monkeypatch):
    pages.at_hand(tmp_path, monkeypatch)
    scope = pages.run(ROOT / "README.md")
    assert scope["zeros"].decode().shape == (8, 3, 32, 32) and scope["picture"].shape[0] == 1
    assert len(scope["both"]) == len(scope["again"]) == 100 and len(scope["texts"]) == 8
    assert (tmp_path / "drugs.csv").read_text().startswith(("smiles", "text"))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"sculpt\.(\w+)\(", text)):
        assert hasattr(sculpt, name), name
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in set(re.findall(r"`?make ([a-z-]+)", text)) - {"and"}:
        assert target in targets, target


def test_citation_changelog_and_package_are_of_one_version():
    assert f"\nversion: {sculpt.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {sculpt.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_advice_to_install_names_the_distribution():
    """Another package has the name sculpt on the index."""
    import tomllib

    from sculpt.tables import needs

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "compositional-sculpting" and project["scripts"] == {"sculpt": "sculpt.apps.cli:main"}
    with pytest.raises(ImportError, match=r"pip install 'compositional-sculpting\[tables\]'"):
        needs("no_such_module", "A test")
    assert {"text", "tables", "notebook", "all"} <= set(project["optional-dependencies"])
