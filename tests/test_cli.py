"""The command: what it writes, what it refuses, and that it leaves nothing half done."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import save_pipeline

import sculpt
from sculpt.apps import cli
from sculpt.apps.cli.words import OPTIONS, said
from sculpt.apps.formulas import TextFormula, compose
from sculpt.model import BaseModel

PRETRAINED = Path(__file__).parents[1] / "pretrained"


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
    """Only its name counts."""

    device, shape = torch.device("cpu"), (2,)

    def __init__(self, name):
        self.name = self._key = name

    @property
    def key(self):
        return self._key

    def check_composable(self, other):
        pass

    def stream(self, n, road, settings):
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
    composed = compose(formula, MODELS)
    assert str(composed) == str(expected)
    assert composed.key == expected.key


def test_a_formula_names_its_models_in_the_order_in_which_they_come():
    formula = TextFormula(" posterior([c, a, c], odds=[1, 2, 1], labels=[0]) | b ")
    assert formula.names == ["c", "a", "b"] and not formula.is_one_model
    assert formula.compose(MODELS).key == (sculpt.posterior([c, a, c], [0], [1, 2, 1]) | b).key
    assert TextFormula("(a)").is_one_model


def test_a_formula_is_checked_without_models():
    formula = TextFormula("a & posterior([b, c], (0, 0))", "abc")
    assert formula.compose(MODELS).key == (a & sculpt.posterior([b, c], (0, 0))).key
    with pytest.raises(ValueError, match="no such model. Expected the models a, b"):
        TextFormula("a & c", "ab")


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
        TextFormula(formula, MODELS)


# Commands -----------------------------------------------------------------------------------------------------------------------


def test_samples_are_written_in_every_format(sample, folders, capsys):
    guided = ("--classifier", folders["classifier"])
    code, path = sample("a & b", *guided)
    assert code == 0
    assert np.load(path)["x"].shape == (4, 1, 8, 8)
    assert "a ⊗ b" in capsys.readouterr().out
    code, path = sample("a & b", *guided, output="out.safetensors")
    assert code == 0
    kept = sculpt.Samples.load(path)
    assert kept.x.shape == (4, 1, 8, 8) and kept.diagnostics.formula == "a ⊗ b" and kept.diagnostics.seed == 0
    assert kept.decode().min() >= 0
    code, path = sample("a & b", *guided, output="out.png")
    assert code == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_the_same_seed_gives_the_same_samples(sample):
    first, second, third = (np.load(sample("a | b", "--seed", seed)[1])["x"] for seed in ("1", "1", "2"))
    assert (first == second).all()
    assert (first != third).any()


@pytest.mark.parametrize(
    "arguments",
    [("--correct", "--particles", "8"), ("--reject",), ("--reject", "--anchor", "b"), ("--anchor", "b"), ("--strength", "1.5")],
)
def test_every_road_of_a_classifier_is_reachable(sample, folders, arguments):
    assert sample("a & b", "--classifier", folders["classifier"], *arguments)[0] == 0


def test_strength_reaches_the_guidance(sample, folders):
    plain, stronger = (
        np.load(sample("a & b", "--classifier", folders["classifier"], *more)[1])["x"] for more in ((), ("--strength", "50"))
    )
    assert (plain != stronger).any()


def test_without_a_classifier_densities_are_tracked(sample, capsys):
    assert sample("a & b", "--particles", "8")[0] == 0
    out = capsys.readouterr().out
    assert "tracked densities" in out and "particles  8\n" in out


def test_a_single_model_is_sampled_too(sample):
    assert sample("a")[0] == 0


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Two GFlowNets on a grid, which know their densities."""
    from gflownet_models import ENVIRONMENTS, network_policy

    home, env = tmp_path_factory.mktemp("policies"), ENVIRONMENTS["grid-2d"]()
    for seed, name in enumerate("pq"):
        sculpt.GFlowNet(env, network_policy(env, seed), name=name).save_pretrained(home / name)
    return ["--model", f"p={home / 'p'}", "--model", f"q={home / 'q'}"]


def test_models_that_know_their_densities_are_rejected_without_a_classifier(policies, tmp_path, capsys):
    assert cli.main(["sample", "p & q", *policies, "-n", "50", "--reject", "-o", str(tmp_path / "x.npz")]) == 0
    assert "the models' own densities" in capsys.readouterr().out
    assert np.load(tmp_path / "x.npz")["x"].shape == (50, 2)
    for arguments, message in (
        (("--steps", "4"), "error: --steps: not an option of p ⊗ q"),
        (("--reject", "--steps", "4"), "error: --steps: not an option of p ⊗ q"),
    ):
        assert cli.main(["sample", "p & q", *policies, "-o", str(tmp_path / "y.npz"), *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["molecules/seh", "smiles/qed", "digits/judge", "grid/pair"])
def test_inspect_needs_nothing_else_for_what_is_shipped(capsys, name):
    assert cli.main(["inspect", str(PRETRAINED / name)]) == 0
    out, said_beside = capsys.readouterr()
    assert "sha256" in out and "sculpt:" not in said_beside
    if name == "molecules/seh":
        assert "beta, a number from 0 to 96: --with beta=NUMBER" in out and "one for each value of its condition" in out
        assert cli.main(["inspect", str(PRETRAINED / name), "--with", "beta=32"]) == 0
        assert "beta=32\n" in capsys.readouterr().out
    if name == "smiles/qed":
        assert "one of beta=0, 1, 2, 3," in out and "--with beta=32" in out
        assert cli.main(["inspect", str(PRETRAINED / name), "--with", "beta=32"]) == 0
        assert "qed[beta=32]" in capsys.readouterr().out


def test_a_condition_that_is_missing_is_asked_for_as_an_option(tmp_path, capsys):
    arguments = ["sample", "a", "--model", f"a={PRETRAINED / 'molecules' / 'seh'}", "-o", str(tmp_path / "x.npz")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "Pass --with beta=NUMBER" in error and "load(" not in error


def test_no_warning_precedes_a_plain_mistake(tmp_path, capsys, monkeypatch):
    """The weights of a reward are not here, and cannot be fetched: that is told after what is wrong with the options."""
    from sculpt.molecules import scores, seh

    def offline(*_):
        raise seh.Offline("no network.")

    monkeypatch.setattr(seh, "kept_weights", lambda: None)
    monkeypatch.setattr(seh, "download", offline)
    scores._reward.cache_clear()
    arguments = ["molecules", "seh", "--model", f"seh={PRETRAINED / 'molecules' / 'seh'}", "-n", "2"]
    try:
        assert cli.main([*arguments, "--beta", "1000", "-o", str(tmp_path / "x.smi")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sculpt: error: --beta 1000.0 for ") and error.count("\n") == 1
        assert cli.main([*arguments, "--beta", "32", "-o", str(tmp_path / "x.smi")]) == 0
        assert "sculpt: warning: no network." in capsys.readouterr().err
    finally:
        scores._reward.cache_clear()


def test_a_name_that_is_almost_right_gets_near_ones_and_no_classifiers(tmp_path, capsys):
    assert cli.main(["molecules", "seh & sah", "--beta", "32", "-o", str(tmp_path / "x.csv")]) == 2
    error = capsys.readouterr().err
    assert "did you mean sa or seh? For one that is elsewhere: --model sah=FOLDER" in error
    assert cli.main(["molecules", "xyz", "--beta", "32", "-o", str(tmp_path / "x.csv")]) == 2
    assert "there are prior, qed, sa, seh. For" in capsys.readouterr().err


def test_inspect_tells_of_a_policy_too(policies, capsys):
    assert cli.main(["inspect", policies[1].partition("=")[2]]) == 0
    out = capsys.readouterr().out
    assert "HyperGrid, 3 actions" in out and "condition  none" in out


def test_a_fit_that_is_done_is_not_done_again(folders, capsys):
    before = sculpt.load(folders["classifier"]).state_dict()
    arguments = ["fit", "--model", f"a={folders['a']}", "--model", f"b={folders['b']}", "-o", folders["classifier"]]
    assert cli.main([*arguments, "--steps", "3", "--batch-size", "4", "--samples", "20"]) == 0
    assert "3 steps" in capsys.readouterr().out
    for name, value in sculpt.load(folders["classifier"]).state_dict().items():
        assert torch.equal(value, before[name])


def test_a_fit_that_is_done_gets_a_field_beside_it(folders, tmp_path):
    shutil.copytree(folders["classifier"], tmp_path / "ab")
    before = sculpt.load(tmp_path / "ab")
    arguments = ["fit", "--model", f"a={folders['a']}", "--model", f"b={folders['b']}", "-o", str(tmp_path / "ab"), "--field"]
    assert cli.main([*arguments, "--steps", "3", "--batch-size", "4", "--samples", "20"]) == 0
    after = sculpt.load(tmp_path / "ab")
    assert before.field is None and after.field is not None
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())


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
        ("a & b", (), "out.smi", "expected a name that ends in .png, .npz, .safetensors."),
        ("a & b", ("--reject",), "out.npz", "a ⊗ b does not know its densities. Pass --classifier"),
        ("a & b", ("--classifier", "nowhere"), "out.npz", "no folder 'nowhere'"),
        ("a & b", ("--anchor", "c"), "out.npz", "--anchor c: the models are a, b"),
        ("a & b", ("--with", "prompt"), "out.npz", "expected KEY=VALUE"),
        ("a & b", ("--with", "c.prompt=x"), "out.npz", "with a model's name (a, b)"),
        ("a & b", ("--with", "a.beta=3"), "out.npz", "beta: no option"),
        ("a & b", ("--model", "a=elsewhere"), "out.npz", "given twice"),
        ("a & b", ("--model", "no path"), "out.npz", "expected NAME=PATH"),
        ("a & b", ("--model", "c=nowhere"), "out.npz", "no folder 'nowhere'"),
        ("a | b", ("--particles", "9"), "out.npz", "particles"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(sample, capsys, formula, arguments, output, message):
    code, path = sample(formula, *arguments, output=output)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not path.exists()


@pytest.mark.parametrize(
    ("formula", "arguments", "message"),
    [
        (
            "a & b",
            ("--classifier", "CLASSIFIER", "--reject", "--strength", "2"),
            "--strength to guidance; rejection has neither",
        ),
        ("a & b", ("--classifier", "CLASSIFIER", "--reject", "--correct"), "rejection has neither"),
        ("a & b", ("--reject", "--particles", "9"), "rejection has neither"),
        ("a & b", ("--correct",), "--correct: guided sampling only. Pass --classifier FOLDER"),
        ("a & b", ("--correct-densities", "--strength", "2"), "--correct, --strength: guided sampling only"),
        ("a & b", ("--anchor", "b"), "--anchor: guided sampling only"),
        ("a & b", ("--classifier", "CLASSIFIER", "--particles", "9"), "add --correct, or leave --classifier out"),
        ("a & b", ("--classifier", "MODEL"), "is not a classifier. Make one: sculpt fit"),
        ("a", ("--classifier", "CLASSIFIER", "--particles", "9"), "a is one model, and --classifier, --particles belong to"),
        ("b", ("--reject",), "b is one model, and --reject belong to compositions"),
    ],
)
def test_options_of_no_road_are_refused_before_anything_is_loaded(
    sample, folders, capsys, monkeypatch, formula, arguments, message
):
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setitem(vars(sculpt), "load", load)
    places = {"CLASSIFIER": folders["classifier"], "MODEL": folders["a"]}
    assert sample(formula, *(places.get(argument, argument) for argument in arguments))[0] == 2
    assert message in capsys.readouterr().err


def test_densities_are_refused_where_no_road_knows_them(sample, folders, capsys):
    code, path = sample("a & b", "--classifier", folders["classifier"], "--correct-densities")
    assert code == 2
    assert "densities no road knows exactly" in capsys.readouterr().err
    assert not path.exists()
    with pytest.raises(SystemExit, match="2"):
        sample("a & b", "--classifier", folders["classifier"], "--correct-densities", "--correct")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-n", "0"), "-n: '0' is no whole number from 1 on"),
        (("--dtype", "int8"), "--dtype: invalid choice: 'int8'"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
    ],
)
def test_what_the_parser_refuses_is_one_line_too(sample, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        sample("a & b", *arguments)
    error = capsys.readouterr().err
    assert error.startswith(f"sculpt: error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("python", "command"),
    [
        ("steps, particles: not an option of a", "--steps, --particles: not an option of a"),
        ("steps, solver: not an option of a", "steps, solver: not an option of a"),
        ("A population of particles=20 cannot give n=300.", "A population of --particles 20 cannot give -n 300."),
        ("Fit one with observations=3, or leave it.", "Fit one with --observations 3, or leave it."),
        ("Sample with Guided(classifier, correct=True), or", "Sample with --classifier FOLDER --correct, or"),
        ("Take Tracked(particles=64) or more.", "Take --particles 64 or more."),
        ("needs odds: sculpt.fit(models, odds=True).", "needs odds: sculpt fit --odds."),
        ("in runs/steps=4/b and in 'n=3'", "in runs/steps=4/b and in 'n=3'"),
    ],
)
def test_messages_are_in_the_words_of_the_command(python, command):
    assert said(python) == command


def test_every_option_of_a_message_is_one_of_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["sample", "--help"])
    known = capsys.readouterr().out
    for command in ("fit", "distill", "molecules"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        known += capsys.readouterr().out
    assert [option for option in OPTIONS.values() if option not in known] == []


def test_a_device_that_is_not_there_is_one_line(sample, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sample("a & b", "--device", "cuda:1")[0] == 2
    assert "--device cuda:1: torch" in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_folder_that_is_made_for_a_file_is_named(sample, capsys):
    code, path = sample("a", output="new/deep/out.npz")
    assert code == 0 and f"wrote {path} (and made the folder {path.parent})" in capsys.readouterr().out
    assert sample("a", output="new/deep/out.npz")[0] == 0
    assert "made the folder" not in capsys.readouterr().out


def test_an_interrupted_fit_says_what_it_has_kept(folders, tmp_path, monkeypatch, capsys):
    from sculpt.training import Training

    arguments = ["fit", "--model", f"a={folders['a']}", "--model", f"b={folders['b']}", "-o", str(tmp_path / "ab")]
    arguments += ["--steps", "80", "--batch-size", "4", "--samples", "20"]
    update, save = Training._update, Training.save
    monkeypatch.setattr(Training, "save", lambda self, every=0.0: save(self))
    for at, said_then in (
        (1, "No state was saved yet: the same command begins anew."),
        (5, "The same command continues from step 4, "),
    ):

        def interrupted(self, gradients, at=at):
            if self.step == at:
                raise KeyboardInterrupt
            return update(self, gradients)

        monkeypatch.setattr(Training, "_update", interrupted)
        assert cli.main(arguments) == 130
        assert f"sculpt: stopped. {said_then}" in capsys.readouterr().err
    monkeypatch.setattr(Training, "_update", update)
    assert cli.main(arguments) == 0


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


def test_what_sculpt_does_wrong_is_one_line_too_and_warnings_are_and_the_process_keeps_its_own(sample, capsys, monkeypatch):
    import warnings

    monkeypatch.setattr("sculpt.apps.cli.sample.load_models", lambda options: warnings.warn("look out", stacklevel=1) or 1 / 0)
    before = warnings.showwarning
    code, _ = sample("a & b")
    assert code == 1
    assert capsys.readouterr().err == (
        "sculpt: warning: look out\n"
        "sculpt: error: ZeroDivisionError: division by zero. This is a bug in sculpt; run again with --traceback to see where.\n"
    )
    assert warnings.showwarning is before


def test_the_package_is_the_command_too():
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "sculpt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"sculpt {sculpt.__version__}\n"
