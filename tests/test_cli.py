"""The command: what it writes, what it refuses, and that it leaves nothing half done."""

import numpy as np
import pytest
import torch
from checkpoints import save_pipeline
from safetensors.torch import load_file

import sculpt
from sculpt import cli
from sculpt.base import BaseModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models and a classifier, by name."""
    home = tmp_path_factory.mktemp("models")
    found = {name: str(save_pipeline(home / name, seed)) for seed, name in enumerate("ab")}
    arguments = ["fit", "--model", f"a={found['a']}", "--model", f"b={found['b']}", "-o", str(home / "ab")]
    assert cli.main([*arguments, "--steps", "3", "--batch-size", "4", "--samples", "20"]) == 0
    return found | {"classifier": str(home / "ab")}


@pytest.fixture
def sample(folders, tmp_path):
    def run(formula, *arguments, output="out.npz"):
        models = ["--model", f"a={folders['a']}", "--model", f"b={folders['b']}"]
        path = tmp_path / output
        return cli.main(["sample", formula, *models, "-n", "4", "--steps", "4", "-o", str(path), *arguments]), path

    return run


# Formulas -----------------------------------------------------------------------------------------------------------------------


class Named(BaseModel):
    family, device = "diffusion", torch.device("cpu")

    def __init__(self, name):
        self.name = self._key = name

    @property
    def key(self):
        return self._key

    def sample(self, n, **options):
        raise NotImplementedError

    def check_composable(self, other):
        pass

    def replay(self, models, **options):
        raise NotImplementedError


MODELS = {name: Named(name) for name in "abc"}
a, b, c = MODELS.values()


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("a", a),
        ("a & b", a & b),
        ("a & b & c", a & b & c),
        ("a - b - c", a - b - c),
        ("(a | b) - c", (a | b) - c),
        ("a & b - c", a & b - c),
        ("harmonic_mean(a, b, odds=0.2)", sculpt.harmonic_mean(a, b, odds=0.2)),
        ("contrast(a, b, 0.2)", sculpt.contrast(a, b, 0.2)),
        ("posterior([a, b, c], (0, 0, 2), odds=[1, 2, 3])", sculpt.posterior([a, b, c], (0, 0, 2), odds=[1, 2, 3])),
        ("product([a, b], [1.5, -0.5])", sculpt.product([a, b], [1.5, -0.5])),
        ("power_mean([a & b, c], -2)", sculpt.power_mean([a & b, c], -2)),
        ("mixture(a, b, weights=[2, 1])", sculpt.mixture(a, b, weights=[2, 1])),
    ],
)
def test_a_formula_in_text_is_the_one_in_python(formula, expected):
    composed = cli.compose(formula, MODELS)
    assert str(composed) == str(expected)
    assert composed.key == expected.key
    assert cli.compose(formula, dict.fromkeys(MODELS)) is None


@pytest.mark.parametrize(
    "formula",
    [
        "", "a &", "a + b", "a & d", "~a", "2", "a if b else c", "a.key", "[a, b]", "lambda: a", "a & 'b'", "a[0]", "f'{a}'",
        "__import__('os').system('true')", "a.__class__", "sculpt.product([a], [1])", "product([a], [1j])", "mixture(*[a, b])",
        "mixture(a, b, weights=[True, 1])", "mixture(a, b, **c)", "(a := b)", "(" * 500 + "a" + ")" * 500,
    ],
)  # fmt: skip
def test_anything_else_is_refused_and_nothing_is_evaluated(formula):
    with pytest.raises(ValueError, match="formula"):
        cli.compose(formula, MODELS)


# Commands -----------------------------------------------------------------------------------------------------------------------


def test_samples_are_written_in_every_format(sample, folders, capsys):
    guided = ("--classifier", folders["classifier"])
    code, path = sample("a & b", *guided)
    assert code == 0
    assert np.load(path)["x"].shape == (4, 1, 8, 8)
    assert "a ⊗ b" in capsys.readouterr().out
    code, path = sample("a & b", *guided, output="out.safetensors")
    assert code == 0
    assert load_file(path)["x"].shape == (4, 1, 8, 8)
    code, path = sample("a & b", *guided, output="out.png")
    assert code == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_the_same_seed_gives_the_same_samples(sample):
    first, second, third = (np.load(sample("a | b", "--seed", seed)[1])["x"] for seed in ("1", "1", "2"))
    assert (first == second).all()
    assert (first != third).any()


@pytest.mark.parametrize(
    "arguments", [("--correct", "--particles", "8"), ("--reject",), ("--anchor", "b"), ("--strength", "1.5")]
)
def test_every_road_of_a_classifier_is_reachable(sample, folders, arguments):
    assert sample("a & b", "--classifier", folders["classifier"], *arguments)[0] == 0


def test_strength_reaches_the_guidance(sample, folders):
    plain, stronger = (
        np.load(sample("a & b", "--classifier", folders["classifier"], *more)[1])["x"] for more in ((), ("--strength", "50"))
    )
    assert (plain != stronger).any()


def test_a_single_model_is_sampled_too(sample):
    assert sample("a")[0] == 0


def test_a_fit_that_is_done_is_not_done_again(folders, capsys):
    before = sculpt.load(folders["classifier"]).state_dict()
    arguments = ["fit", "--model", f"a={folders['a']}", "--model", f"b={folders['b']}", "-o", folders["classifier"]]
    assert cli.main([*arguments, "--steps", "3", "--batch-size", "4", "--samples", "20"]) == 0
    assert "3 steps" in capsys.readouterr().out
    for name, value in sculpt.load(folders["classifier"]).state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("which", "said"), [("a", ["diffusion", "1 × 8 × 8", "epsilon", "0.01 to 157"]), ("classifier", ["3 steps", "a (", "b ("])]
)
def test_inspect_tells_what_is_in_a_checkpoint(folders, capsys, which, said):
    assert cli.main(["inspect", folders[which]]) == 0
    out = capsys.readouterr().out
    for text in [*said, "sha256"]:
        assert text in out


def test_without_a_command_the_help_says_where_to_start(capsys):
    assert cli.main([]) == 0
    assert "sculpt demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("formula", "arguments", "output", "message"),
    [
        ("a & d", (), "out.npz", "no such model"),
        ("a & b", (), "out.jpg", "expected a name that ends in .png"),
        ("a & b", ("--reject",), "out.npz", "pass --classifier"),
        ("a & b", ("--classifier", "nowhere"), "out.npz", "no folder 'nowhere'"),
        (
            "a & b",
            ("--classifier", "nowhere", "--reject", "--strength", "2"),
            "out.npz",
            "--strength to guidance; rejection has neither",
        ),
        ("a & b", ("--anchor", "c"), "out.npz", "--anchor c: the models are a, b"),
        ("a & b", ("--with", "prompt"), "out.npz", "expected KEY=VALUE"),
        ("a & b", ("--with", "c.prompt=x"), "out.npz", "with a model's name (a, b)"),
        ("a & b", ("--with", "a.beta=3"), "out.npz", "beta: no option"),
        ("a & b", ("--model", "a=elsewhere"), "out.npz", "given twice"),
        ("a & b", ("--model", "no path"), "out.npz", "expected NAME=PATH"),
        ("a & b", ("--model", "c=nowhere"), "out.npz", "no folder 'nowhere'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(sample, capsys, formula, arguments, output, message):
    code, path = sample(formula, *arguments, output=output)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not path.exists()


def test_densities_are_refused_where_no_road_knows_them(sample, folders, capsys):
    code, path = sample("a & b", "--classifier", folders["classifier"], "--correct-densities")
    assert code == 2
    assert "densities no road knows exactly" in capsys.readouterr().err
    assert not path.exists()
    with pytest.raises(SystemExit, match="2"):
        sample("a & b", "--classifier", folders["classifier"], "--correct-densities", "--correct")


def test_numbers_below_one_are_refused_by_the_parser(sample):
    with pytest.raises(SystemExit, match="2"):
        sample("a & b", "-n", "0")


def test_an_interruption_leaves_the_old_file(sample, monkeypatch, capsys):
    path = sample("a | b")[1]
    before = path.read_bytes()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sculpt.composition.Composition.sample", interrupt)
    code, path = sample("a | b")
    assert code == 130
    assert path.read_bytes() == before
    assert capsys.readouterr().err == "\nsculpt: stopped. Nothing was written.\n"


# The demo and the pictures ---------------------------------------------------------------------------------------------------------


def test_the_demo_writes_its_picture_and_its_table(tmp_path, capsys):
    from sculpt.demo import run

    rows = run(tmp_path, n=200, fit_steps=10, samples=500)
    assert {row["road"] for row in rows} == {"guided", "corrected", "tracked", "rejection"}
    assert len(rows) == 12
    for row in rows:
        assert 0 < row["error"] < (0.8 if row["road"] in ("guided", "corrected") else 1.4 * row["floor"] + 0.1)
        assert row["road"] in ("guided", "corrected") or abs(row["log_z"] - row["exact_log_z"]) < 0.5
    assert (tmp_path / "compositions.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out


def test_the_demo_models_are_exact():
    """Three schedules, one denoiser: the score is the gradient of the log-density."""
    from sculpt.demo import discs

    z = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for model in discs():
        disc = model.model.disc
        for s in (0.05, 0.7, 5.0):
            wide = type(disc)((0.0, 0.0))
            wide.means, wide.variance = disc.means, disc.variance + s**2
            x = z.clone().requires_grad_()
            (score,) = torch.autograd.grad(wide.log_prob(x).sum(), x)
            torch.testing.assert_close(model.denoise(z, s), z + s**2 * score, rtol=1e-3, atol=1e-3)


def test_pictures_of_the_wrong_thing_say_what_was_got():
    from sculpt import plots

    with pytest.raises(ValueError, match=r"got \(4, 2\)"):
        plots.image_grid(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="there is no curve"):
        plots.ess_curve(sculpt.Samples(torch.zeros(4, 2)))
