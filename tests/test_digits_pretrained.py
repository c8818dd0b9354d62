"""The coloured-digit models and classifiers that the repository ships."""

import hashlib
import re
import sys
from pathlib import Path

import pytest
import torch

import sculpt
from sculpt import plots

DIGITS = Path(__file__).parents[1] / "pretrained" / "digits"
sys.path.append(str(DIGITS))

from coloured_mnist import DATA, SETS, composed, proportions  # noqa: E402
from judge import Judge  # noqa: E402

FOLDERS = [*DATA, "judge", *SETS]


@pytest.fixture(scope="module")
def judge():
    return Judge.from_pretrained(DIGITS / "judge")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_card_names_the_weights_that_are_there(name):
    (weights,) = (DIGITS / name).rglob("*.safetensors")
    assert weights.stat().st_size < 12e6
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert re.search(rf"sha256 {sha}\b", (DIGITS / name / "README.md").read_text())


@pytest.mark.parametrize("name", DATA)
def test_a_model_draws_clear_digits_of_its_own_classes(name, judge):
    torch.set_num_threads(1)
    samples = sculpt.load(DIGITS / name).sample(24, steps=16, generator=generator(), progress=False)
    scores = judge.score(samples.x.float())
    assert scores.accepted.double().mean() > 0.6  # the cards have the shares
    assert (proportions(name)[scores.label] > 0).double().mean() > 0.85


@pytest.mark.parametrize(
    "part, labels",
    [
        *(pytest.param("triple", labels, marks=pytest.mark.slow) for labels in ((1, 0), (1, 2))),
        ("triple", (1, 0, 2)),
        ("pair", (0, 1)),
    ],
)
def test_a_composition_draws_what_was_asked_for(part, labels, judge):
    torch.set_num_threads(1)
    models = [sculpt.load(DIGITS / name) for name in SETS[part]]
    composition = sculpt.posterior(models, labels)
    road = sculpt.Guided(sculpt.load(DIGITS / part), correct=True, particles=64)
    samples = composition.sample(24, road, steps=20, generator=generator(), progress=False)
    exact = composed(composition.formula, [proportions(name) for name in SETS[part]])
    label = judge.score(samples.x.float()).label
    # None of the observed base models draws it in more than half of its images.
    assert max(float(proportions(SETS[part][i])[exact > 0].sum()) for i in labels) <= 0.51
    assert (exact[label] > 0).double().mean() >= 0.7


def test_the_demo_shows_models_and_compositions(tmp_path, capsys):
    from sculpt.apps.demos.digits import run

    rows = run(tmp_path, n=4, steps=4)
    assert [row["labels"] for row in rows] == [None, None, None, (1, 0, 2), (1, 2), (1, 0), (0, 0, 0), (1, 1, 1)]
    for row in rows:
        expected, obtained = (sum(both[k] for both in row["shares"].values()) for k in (0, 1))
        assert expected == pytest.approx(1) and obtained == pytest.approx(1)
        assert 0 <= row["misplaced"] <= 1 + 1e-9 and 0 <= row["luck"] < 1
    assert rows[3]["shares"]["cyan 0"][0] == pytest.approx(1)
    for name in ("digits-base-models.png", "digits-composed.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f'src="{name}"' in (tmp_path / "index.html").read_text()
    assert (tmp_path / "digits.md").read_text().strip() in capsys.readouterr().out


def test_panels_show_every_image_under_its_title():
    figure = plots.image_panels(
        {"p": torch.zeros(5, 3, 8, 8), "q": torch.ones(7, 1, 8, 8)}, 3, across=4, captions={"q": "all white"}
    )
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["p", "q"]
    black = shown[0].images[0].get_array()
    assert (black == 0).all(-1).sum() == 5 * 64
    assert "all white" in [text.get_text() for text in shown[1].texts]
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.image_panels({})
