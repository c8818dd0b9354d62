"""The demos: what they write and print, and that their exact models are exact. Those of shipped models are tested with the models."""

import importlib
import math
import re
import sys

import pytest
import torch

from sculpt.apps.demos.common import PRETRAINED, Clock, luck, markdown, modules, pretrained
from sculpt.apps.demos.discs import discs, run
from sculpt.apps.demos.page import MEANING, Part, Shown, meanings, publish
from sculpt.diagnostics import LEVELS
from sculpt.shipped import Missing


def test_the_demo_of_discs_writes_its_picture_and_its_table(tmp_path, capsys):
    rows = run(tmp_path, n=200, fit_steps=10, samples=500)
    assert {row["road"] for row in rows} == {"guided", "corrected", "tracked", "rejection"}
    assert len(rows) == 10
    for row in rows:
        assert 0 < row["error"] < (0.8 if row["road"] in ("guided", "corrected") else 1.4 * row["floor"] + 0.1)
        assert row["road"] in ("guided", "corrected") or abs(row["log_z"] - row["exact_log_z"]) < 0.5
        assert row["verdict"] == "exact" or row["road"] != "rejection"
    picture = "discs-beside-the-exact-answer.png"
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "discs.md").read_text().strip() in capsys.readouterr().out
    assert f'src="{picture}"' in (tmp_path / "index.html").read_text()


def part(name, headline):
    shown = Shown(f"{name}.png", "a & b", "read it <so>", "what there is")
    return Part(name, headline, "what was done", [shown], [["", "verdict"], ["a - b", "sound"]], "a note", "import sculpt")


def test_the_page_has_the_last_run_of_every_part_and_the_best_first(tmp_path):
    for name, headline in (("discs", "the run before"), ("discs", "<!-- end --> second"), ("molecules", "third")):
        path = publish(tmp_path, part(name, headline), Clock())
    page = path.read_text()
    assert path.name == "index.html" and "the run before" not in page
    assert 0 < page.index("third") < page.index("&lt;!-- end --&gt; second")
    assert page.count("<section") == page.count("</section>") == 2
    assert "a &amp; b" in page and "read it &lt;so&gt;" in page and '<b class="good">sound</b>' in page
    sources, targets = re.findall(r'src="([^"]+)"', page), re.findall(r'href="([^"]+)"', page)
    assert sources == ["molecules.png", "discs.png"]  # beside the page, nothing from the web
    assert targets == ["#molecules", "#discs", *sources]
    assert re.findall(r'<section id="(\w+)"', page) == ["molecules", "discs"]
    assert all(re.search(r'alt="[^"]+"', image) for image in re.findall("<img[^>]*>", page))


def test_every_verdict_is_explained_where_it_stands():
    assert set(MEANING) == set(LEVELS)
    assert meanings([["", "verdict"], ["x", "strained"], ["y", "sound"], ["z", ""]]) == [
        (level, MEANING[level]) for level in ("sound", "strained")
    ]


def test_luck_is_the_mean_error_of_exact_draws():
    """Of two kinds at one half, n draws miss by E|B/n - 1/2| for a binomial B, whose closed form is C(n, n/2) / 2^(n + 1)."""
    n = 10
    assert luck(torch.tensor([0.5, 0.5]), n, 4000) == pytest.approx(math.comb(n, n // 2) / 2 ** (n + 1), rel=0.05)
    assert luck(torch.tensor([1.0, 0.0]), n) == 0


def test_the_models_of_the_demo_are_exact():
    """Three schedules, one denoiser: the score is the gradient of the log-density."""
    z = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for model in discs():
        disc = model.model.disc
        for s in (0.05, 0.7, 5.0):
            wide = type(disc)((0.0, 0.0))
            wide.means, wide.variance = disc.means, disc.variance + s**2
            x = z.clone().requires_grad_()
            (score,) = torch.autograd.grad(wide.log_prob(x).sum(), x)
            torch.testing.assert_close(model.denoise(z, s), z + s**2 * score, rtol=1e-3, atol=1e-3)


def test_modules_of_a_folder_leave_the_interpreter_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text("import sys\nsys.path.append('somewhere')\nimport helper\nname = helper.name\n")
    (tmp_path / "helper.py").write_text("name = 'of the folder'\n")
    mine = object()
    monkeypatch.setitem(sys.modules, "helper", mine)  # somebody's own module of the same name
    path, known = list(sys.path), set(sys.modules)
    (judge,) = modules(tmp_path, "judge")
    assert judge.name == "of the folder"
    assert sys.path == path and set(sys.modules) == known and sys.modules["helper"] is mine
    (tmp_path / "judge.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        modules(tmp_path, "judge")
    assert sys.path == path and set(sys.modules) == known


def test_models_that_are_not_there_say_where_they_come_from(monkeypatch, tmp_path):
    assert (PRETRAINED.parent / "sculpt").is_dir()
    for place in ("sculpt.apps.demos.common.PRETRAINED", "sculpt.shipped.CLONE"):
        monkeypatch.setattr(place, tmp_path)
    monkeypatch.setenv("SCULPT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="sculpt/digits-cyan is not here: .* take pretrained/digits/cyan from the repository"):
        pretrained("digits", "triple")


def test_code_is_never_fetched(tmp_path):
    with pytest.raises(Missing, match="has no judge.py, which is code and not fetched: this part runs in a clone"):
        modules(tmp_path, "judge")


def test_a_table_reads_well_and_is_markdown():
    assert markdown([["", "x"], ["road", "1"]]) == "|      | x |\n| ---- | - |\n| road | 1 |"


@pytest.mark.slow
def test_the_demo_of_molecules_compares_both_roads_with_the_policies(tmp_path, capsys):
    from sculpt.apps.demos.molecules import run as molecules

    rows = molecules(tmp_path, n=200)
    like = ["drug-like seh", "drug-like sa", "drug-like seh & sa, odds .01"]
    assert [row["name"] for row in rows] == ["seh", "sa", "seh & sa", "seh & sa, guided", *like]
    seh, sa, *both = (row["high all"] for row in rows[:4])
    assert min(both) > max(seh, sa)
    seh, sa, both = rows[4:]
    assert both["seh"] > sa["seh"] + 0.15 and both["high sa"] >= seh["high sa"] - 0.1  # binds as sa does not, and can be made
    assert 40 <= len((tmp_path / "molecules.smi").read_text().splitlines()) <= 50  # a few strings are no molecules
    assert (tmp_path / "molecules.md").read_text().strip() in capsys.readouterr().out
    for name in ("molecules-bind-and-can-be-made.png", "molecules-scores-before-and-after.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["discs", "digits", "molecules"])
def test_what_the_page_offers_next_runs(demo, tmp_path, monkeypatch):
    (tmp_path / "pretrained").symlink_to(PRETRAINED)
    monkeypatch.chdir(tmp_path)
    exec(importlib.import_module(f"sculpt.apps.demos.{demo}").MORE, {})
