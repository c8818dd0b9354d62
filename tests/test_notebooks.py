"""The notebooks run from top to bottom in a fresh kernel, and are kept with the outputs of such a run."""

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONG = ("1_gaussian_mixtures", "2_digits", "4_molecules", "6_prompts_and_loras", "7_tokens")
"""half a minute and more, and run by `make test-all`"""


def shrunk(notebook):
    """With small numbers after the page's own: a cell says in its metadata which, so that the page need not."""
    for cell in notebook.cells:
        if small := cell.metadata.get("fast"):
            names = {name.id for node in ast.parse(small).body for name in ast.walk(node) if isinstance(name, ast.Name)}
            assert all(re.search(rf"\b{name} ?[,=]", cell.source) for name in names), "the page has no such numbers"
            cell.source += f"\n{small}"
    return notebook


@pytest.mark.parametrize("folder", ["notebooks", pytest.param(".", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in LONG)) for p in NOTEBOOKS], ids=lambda path: path.stem
)
def test_a_notebook_runs(path, folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    for name in ("notebooks", "pretrained"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = shrunk(nbformat.read(copy / "notebooks" / path.name, as_version=4))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(copy / folder)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not re.search(r"/(home|root|Users|work|tmp|usr|opt)/|[A-Z]:\\", "\n".join(text))
    assert path.stat().st_size < 600_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_fits_its_page(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert max(len(line) for cell in cells for line in cell.source.splitlines()) <= 88
    assert not [cell for cell in cells if "SCULPT_FAST" in cell.source]


def test_there_are_notebooks():
    assert NOTEBOOKS
