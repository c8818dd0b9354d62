"""Pictures: what is in them, and what is said of things that have none. Molecules and images have theirs in their own tests."""

import pytest
import torch

from sculpt import plots
from sculpt.diagnostics import Diagnostics
from sculpt.samples import Samples


def samples(x, **diagnostics):
    return Samples(x, None, Diagnostics("tracked densities", "p ⊗ q", **diagnostics))


def test_a_figure_is_a_png(tmp_path):
    figure = plots.points2d(torch.randn(20, 2), "points")
    assert plots.png(figure).startswith(b"\x89PNG")
    plots.save(figure, tmp_path / "points.png")
    assert (tmp_path / "points.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["points.png"]


def test_points_and_cells_have_titles_and_their_place():
    points, cells = plots.points2d(torch.tensor([[0.0, 3.0], [-1.0, 0.0]]), "p"), plots.points2d(torch.tensor([[0, 3]]), "q")
    assert [figure.axes[0].get_title() for figure in (points, cells)] == ["p", "q"]
    assert points.axes[0].get_xlim() == pytest.approx((-3.15, 3.15))
    image = cells.axes[0].images[0].get_array()
    assert image.shape == (4, 4) and image[3, 0] == 1 and image.sum() == 1


def test_images_come_as_tensors_and_as_samples():
    x = torch.rand(5, 3, 4, 4)
    alone, said = plots.image_grid(x), plots.image_grid(samples(x))
    assert alone.axes[0].get_title() == "" and said.axes[0].get_title() == "p ⊗ q"
    assert plots.image_grid(samples(x), title="mine").axes[0].get_title() == "mine"
    assert (alone.axes[0].images[0].get_array() == said.axes[0].images[0].get_array()).all()


def test_a_comparison_has_a_panel_for_each_column_and_leaves_empty_places_empty():
    density = torch.ones(4, 4) / 16
    rows = [
        {"title": "first", "exact": density, "drawn": torch.zeros(10, 2), "captions": {"drawn": "error 0.1"}},
        {"title": "second", "exact": density, "drawn": None},
    ]
    figure = plots.compare2d(rows, 2.0, ["exact", "drawn"], outlines={"p": torch.rand(4, 4)}, title="all", bins=4)
    assert [axes.get_title() for axes in figure.axes] == ["exact", "drawn", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["first", "", "second", ""]
    assert figure.axes[1].get_xlabel() == "error 0.1" and not figure.axes[3].axison


def test_a_curve_is_drawn_of_samples_and_of_their_diagnostics():
    run = samples(torch.zeros(4, 2), particles=10, ess=[10.0, 5.0, 8.0])
    for thing in (run, run.diagnostics):
        (line,) = plots.ess_curve(thing).axes[0].lines
        assert line.get_ydata().tolist() == [1.0, 0.5, 0.8]


def test_shares_stand_beside_their_images():
    row = {"title": "p", "images": torch.rand(3, 3, 4, 4), "shares": {"a": (0.25, 0.5), "b": (0.75, 0.5)}, "caption": "said"}
    figure = plots.image_shares([row, row], across=3, title="all")
    images, bars = figure.axes[2:]
    assert images.get_title(loc="left") == "p" and [text.get_text() for text in images.texts] == ["said"]
    assert [bar.get_height() for bar in bars.patches] == [0.5, 0.5, 0.25, 0.75]
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.image_shares([])


def test_near_copies_are_left_out_of_a_display():
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    copies = x[[0, 0, 1, 2, 2, 3, 4, 5]] + 1e-3 * torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plots.distinct(copies, 9), copies[[0, 2, 3, 5, 6, 7]])
    assert torch.equal(plots.distinct(samples(copies), 2), copies[[0, 2]])
    assert len(plots.distinct(x[[0, 0, 0]], 3)) == 1


def test_pictures_of_the_wrong_thing_say_what_was_got():
    with pytest.raises(ValueError, match=r"got \(4, 2\)"):
        plots.image_grid(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"got \(4, 2\)"):
        plots.image_panels({"p": samples(torch.zeros(4, 2))})
    with pytest.raises(ValueError, match="there is no curve"):
        plots.ess_curve(samples(torch.zeros(4, 2)))
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.image_panels({})


def test_the_module_does_not_load_what_it_draws():
    import subprocess
    import sys

    code = "import sys, sculpt.plots; print('matplotlib' in sys.modules, 'sculpt.samples' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"
