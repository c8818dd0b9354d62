"""What a chemist does with samples: SMILES, tables, files, pictures, and the command that makes them."""

import builtins
import csv
import io
import json
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from molecule_models import TINY, molecule_classifier, molecule_model
from rdkit import Chem

import sculpt
from sculpt import plots
from sculpt.apps import cli
from sculpt.molecules import QED, SA, SEH, Molecules, scores
from sculpt.roads import Guided, Rejection, Tracked

ALKANES = [["C", [0, 0]], ["O", [0, 0]]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def models():
    return molecule_model(0, "p"), molecule_model(1, "q")


@pytest.fixture(scope="module")
def samples(models):
    return models[0].sample(60, generator=seeded())


@pytest.fixture
def without(monkeypatch):
    """Python without some module."""

    def leave_out(name):
        real = builtins.__import__

        def importing(wanted, *rest, **options):
            if wanted.split(".")[0] == name:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return real(wanted, *rest, **options)

        monkeypatch.setattr(builtins, "__import__", importing)
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr("importlib.import_module", lambda wanted, *_: importing(wanted) and sys.modules[wanted])

    return leave_out


# Samples ----------------------------------------------------------------------------------------------------------------------------


def roads(p, q):
    classifier = molecule_classifier(p, q)
    both = p & q
    return {
        "base model": lambda: p.sample(5),
        "tracked": lambda: both.sample(5, Tracked(particles=20)),
        "tracked, weighted": lambda: both.sample(5, Tracked(particles=20, resample=False)),
        "guided": lambda: both.sample(5, classifier),
        "mixture form": lambda: both.sample(5, Guided(classifier, form="mixture")),
        "corrected": lambda: both.sample(5, Guided(classifier, correct=True, particles=20)),
        "guided policy": lambda: both.guided(classifier).sample(5),
        "picked": lambda: (p | q).sample(5),
        "nested": lambda: ((p & q) - p).sample(5, Tracked(particles=20)),
        "rejected": lambda: both.sample(5, Rejection(classifier)),
        "one label": lambda: sculpt.posterior([p], [0]).sample(5),
    }


ROADS = (
    "base model", "tracked", "tracked, weighted", "guided", "mixture form", "corrected", "guided policy", "picked", "nested", "rejected",
    "one label",
)  # fmt: skip


@pytest.mark.parametrize("road", ROADS)
def test_samples_of_every_road_are_molecules(models, road):
    found = roads(*models)[road]()
    assert isinstance(found, Molecules)
    assert len(found.smiles) == len(found) == len(found.x)
    assert "Molecules(" in repr(found)
    assert all(Chem.MolFromSmiles(smiles) is not None for smiles in found.smiles)


def test_samples_of_other_environments_are_not():
    from gflownet_models import ENVIRONMENTS, perfect

    assert type(perfect(ENVIRONMENTS["grid-2d"](), 1)[0].sample(3)) is sculpt.Samples


def test_smiles_are_canonical_and_made_once(samples):
    assert samples.smiles is samples.smiles
    assert samples.smiles == samples.decode() == [Chem.CanonSmiles(smiles) for smiles in samples.smiles]


# Samples that are kept --------------------------------------------------------------------------------------------------------------


def without_model(samples, tmp_path):
    """The same samples saved and read back, pickled, and both, none of them with its model."""
    samples.save(tmp_path / "kept.safetensors")
    loaded, pickled = sculpt.Samples.load(tmp_path / "kept.safetensors"), pickle.loads(pickle.dumps(samples))
    return [loaded, pickled, pickle.loads(pickle.dumps(loaded))]


@pytest.fixture(scope="module")
def weighted(models):
    return (models[0] - models[1]).sample(5, Tracked(particles=60, resample=False), generator=seeded())


@pytest.mark.parametrize("which", ["samples", "weighted"])
def test_molecules_that_are_read_back_need_no_model(which, request, tmp_path):
    original = request.getfixturevalue(which)
    for again in without_model(original, tmp_path):
        assert type(again) is Molecules and again.smiles == again.decode() == original.smiles
        assert torch.equal(again.x, original.x)
        assert str(again.diagnostics) == str(original.diagnostics) and again.verdict == original.verdict
        ours, its = again.table(["sa", "qed"]), original.table(["sa", "qed"])
        assert list(ours) == list(its) and all((ours[name] == its[name]).all() for name in its)
        assert str(again.summary(["sa", "qed"])) == str(original.summary(["sa", "qed"]))
        assert again.draw(4, rewards=["sa"]).svg == original.draw(4, rewards=["sa"]).svg


def test_smiles_go_wherever_their_samples_go(weighted, tmp_path):
    weighted.save(tmp_path / "kept.safetensors")
    lost = sculpt.Samples.load(tmp_path / "kept.safetensors")
    order = torch.randperm(len(weighted), generator=seeded())
    mask = order < 20
    for original in (weighted, lost):
        for index in (slice(3, 40, 2), [5, 1, 1], order, mask, 7):
            part = original[index]
            expected = [weighted.smiles[i] for i in torch.arange(len(weighted))[index].reshape(-1).tolist()]
            assert type(part) is Molecules and part.smiles == expected == weighted.decoder(part.x)
        whole = Molecules.cat([original[:20], original[20:]])
        assert whole.smiles == weighted.smiles and torch.equal(whole.x, weighted.x)
        assert original.to("cpu").smiles == weighted.smiles
    # The table of a part is made of the part.
    assert int(weighted[:20].table(["sa"])["count"].sum()) == 20
    assert weighted[:20].table(["sa"])["weight"].sum() == pytest.approx(1)


def test_a_result_read_back_with_its_model_decodes_again(models, samples, tmp_path):
    samples.save(tmp_path / "kept.safetensors")
    again = sculpt.Samples.load(tmp_path / "kept.safetensors", model=models[0])
    assert again.decoder(again.x) == samples.smiles


def test_arrays_hold_the_states(samples, tmp_path):
    samples.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as read:
        assert (read["x"] == samples.x.numpy()).all()


# Tables -----------------------------------------------------------------------------------------------------------------------------


def test_each_different_molecule_is_a_row_and_nothing_is_lost(samples):
    frame = samples.to_frame(["sa", "qed"])
    assert list(frame.columns) == ["smiles", "count", "weight", "sa", "qed"]
    assert frame.smiles.is_unique and len(frame) < len(samples)  # there are some twice, or this tests nothing
    counts = {smiles: samples.smiles.count(smiles) for smiles in samples.smiles}
    assert dict(zip(frame["smiles"], frame["count"], strict=True)) == counts
    np.testing.assert_allclose(frame["weight"], frame["count"] / len(samples))


def test_weights_of_equal_molecules_add_up(models):
    found = (models[0] - models[1]).sample(5, Tracked(particles=300, resample=False), generator=seeded())
    frame = found.to_frame(["sa"])
    w = torch.softmax(found.log_weights, 0)
    for row in frame.itertuples():
        own = torch.tensor([smiles == row.smiles for smiles in found.smiles])
        assert row.count == int(own.sum())
        assert row.weight == pytest.approx(float(w[own].sum()))
    assert frame["weight"].sum() == pytest.approx(1)


def test_the_scores_are_those_of_the_rewards(samples):
    frame = samples.to_frame()
    for name, reward in (("seh", SEH()), ("sa", SA()), ("qed", QED())):
        np.testing.assert_allclose(frame[name], reward(list(frame.smiles)), atol=1e-5)


def test_a_reward_is_computed_once_and_only_when_it_is_asked_for(models):
    called = []

    def weight(molecules):
        called.append(len(molecules))
        return [float(molecule.GetNumAtoms()) for molecule in molecules]

    found = models[0].sample(20)
    first, again = (found.to_frame({"atoms": weight}) for _ in range(2))
    assert called == [len(first)]
    assert first.equals(again)
    assert list(first["atoms"]) == [Chem.MolFromSmiles(smiles).GetNumAtoms() for smiles in first["smiles"]]
    # What is done to a table is not done to the samples.
    first["atoms"] += 1
    assert found.to_frame({"atoms": weight}).equals(again)


def test_the_summary_says_what_is_high_and_how_many_differ(samples):
    frame, summary = samples.to_frame(), samples.summary()
    assert summary.distinct == len(frame) and summary.n == len(samples)
    assert summary.means["sa"] == pytest.approx(float((frame["sa"] * frame["weight"]).sum()))
    assert summary.shares["sa"] == pytest.approx(float(frame["weight"][frame["sa"] >= 0.6].sum()))
    high = (frame["seh"] >= 0.5) & (frame["sa"] >= 0.6) & (frame["qed"] >= 0.25)
    assert summary.shares["all"] == pytest.approx(float(frame["weight"][high].sum()))
    assert f"{summary.distinct} of 60 molecules" in str(summary)


@pytest.mark.parametrize("rewards", [["seh", "logp"], "logp"])
def test_a_reward_that_is_not_there_says_which_are(samples, rewards):
    with pytest.raises(ValueError, match="no reward 'logp'; expected names among seh, sa, qed, or functions by name"):
        samples.to_frame(rewards)


def test_a_reward_of_the_wrong_shape_is_named(samples):
    with pytest.raises(ValueError, match=r"reward mine answered with shape \(1,\)"):
        samples.to_frame({"mine": lambda molecules: [1.0]})


# Files ------------------------------------------------------------------------------------------------------------------------------


def test_parquet_and_csv_hold_the_table(samples, tmp_path):
    import pandas

    frame = samples.to_frame(["sa"])
    samples.save(tmp_path / "a.parquet", ["sa"])
    samples.save(tmp_path / "a.csv", ["sa"])
    for read in (pandas.read_parquet(tmp_path / "a.parquet"), pandas.read_csv(tmp_path / "a.csv")):
        pandas.testing.assert_frame_equal(read, frame, check_dtype=False)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_structure_file_holds_molecules_with_their_properties(samples, tmp_path):
    frame = samples.to_frame(["sa"])
    samples.to_sdf(tmp_path / "a.sdf", ["sa"])
    read = list(Chem.SDMolSupplier(str(tmp_path / "a.sdf")))
    assert [Chem.MolToSmiles(molecule) for molecule in read] == list(frame["smiles"])
    assert [molecule.GetIntProp("count") for molecule in read] == list(frame["count"])
    assert float(read[0].GetProp("sa")) == pytest.approx(frame["sa"][0], abs=1e-5)
    assert all(not molecule.GetConformer().Is3D() for molecule in read)
    assert any(abs(x) > 0.1 for x in read[0].GetConformer().GetPositions().flatten())


def test_a_smiles_file_holds_every_sample(samples, tmp_path):
    samples.save(tmp_path / "a.smi")
    assert (tmp_path / "a.smi").read_text().splitlines() == samples.smiles


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.txt"])
def test_a_format_that_is_not_known_says_which_are(samples, tmp_path, name):
    with pytest.raises(ValueError, match=r"expected a name that ends in .parquet, .csv, .sdf"):
        samples.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_pandas_only_the_data_frame_is_out_of_reach(samples, tmp_path, without):
    without("pandas")
    with pytest.raises(
        ImportError, match=r"to_frame needs pandas: pip install pandas, or pip install 'compositional-sculpting\[tables\]'"
    ):
        samples.to_frame(["sa"])
    samples.save(tmp_path / "a.csv", ["sa"])
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert sum(int(row["count"]) for row in rows) == len(samples)


def test_without_pyarrow_a_parquet_file_is_refused_before_anything_is_scored(samples, tmp_path, without):
    without("pyarrow")
    with pytest.raises(ImportError, match="a .parquet file needs pyarrow: pip install pyarrow.*Or write .csv"):
        samples.save(tmp_path / "a.parquet", {"never": lambda _: pytest.fail("was scored")})


# Pictures ---------------------------------------------------------------------------------------------------------------------------


def test_a_picture_shows_molecules_with_their_scores(samples, tmp_path):
    picture = samples.draw(6, rewards=["sa", "qed"])
    assert len(picture.molecules) == 6 and picture.columns == 3
    assert "<svg" in picture.svg and picture._repr_svg_() == picture.svg
    frame = samples.to_frame(["sa"])
    assert f"SA {frame['sa'][0]:.2f}" in picture.legends[0]
    picture.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    picture.save(tmp_path / "a.svg")
    with pytest.raises(ValueError, match=r"ends in .png or .svg"):
        picture.save(tmp_path / "a.jpg")


def test_a_notebook_shows_molecules_and_scores_nothing_that_is_not_shown(models, monkeypatch, tmp_path):
    monkeypatch.setenv("SCULPT_CACHE", str(tmp_path))
    monkeypatch.delenv("SCULPT_DATA", raising=False)
    monkeypatch.setattr("sculpt.molecules.seh.download", lambda *_: pytest.fail("it went to the network"))
    scored = []
    monkeypatch.setattr(
        "sculpt.molecules.results.score", lambda smiles, *rest: scored.append(len(smiles)) or scores.score(smiles, *rest)
    )
    found = models[0].sample(60, generator=seeded())
    kind, svg = found.picture()
    assert kind == "svg+xml" and b"<svg" in svg and scored == [6]
    html = found._repr_html_()
    assert "image/svg+xml" in html and str(found.verdict) in html
    # What is known anyway is shown.
    found.table({"atoms": lambda molecules: [molecule.GetNumAtoms() for molecule in molecules]})
    scored.clear()
    assert found.picture()[1] != svg and scored == []


def test_a_picture_by_a_reward_shows_the_best(samples):
    frame = samples.to_frame(["sa"])
    best = samples.draw(3, by="sa").molecules
    assert [Chem.MolToSmiles(x) for x in best] == list(frame.sort_values("sa", ascending=False, kind="stable")["smiles"][:3])
    with pytest.raises(ValueError, match="by='qed': the rewards are sa"):
        samples.draw(3, by="qed", rewards=["sa"])
    with pytest.raises(ValueError, match="n=0"):
        samples.draw(0)


def test_a_density_plot_has_a_panel_for_each_and_the_share_that_is_high(models, samples, tmp_path):
    other = models[1].sample(30)
    figure = plots.molecule_density({"p": samples, "q": other, "frame": other.to_frame(["seh", "sa"])}, title="densities")
    assert [axes.get_title() for axes in figure.axes] == ["p", "q", "frame"]
    shares = [axes.texts[0].get_text() for axes in figure.axes]
    assert shares[1] == shares[2]
    table = samples.table(["seh", "sa"])
    share = table["weight"][(table["seh"] >= 0.5) & (table["sa"] >= 0.6)].sum()
    assert shares[0] == f"{share:.0%} high in both"
    plots.save(figure, tmp_path / "density.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.molecule_density({})


def test_a_density_is_one_whatever_its_width():
    x, y = torch.rand(2, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    density = plots._smooth(x, 0.02 * y, torch.ones(500, dtype=torch.float64))
    assert float(density.sum()) == pytest.approx(1)
    assert float(density[:, :12].sum()) > 0.99  # nothing leaks out over the edge
    assert float(density.sum(1).std() / density.sum(1).mean()) < 0.2


# Bad input --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -3])
def test_no_molecules_at_all_is_refused(models, n):
    for model in (models[0], models[0] & models[1], models[0] | models[1]):
        with pytest.raises(ValueError, match=f"at least 1, got n={n}"):
            model.sample(n)


@pytest.mark.parametrize("beta", [-1.0, 96.5, math.inf, math.nan])
def test_an_exponent_outside_the_training_is_refused(tmp_path, beta):
    with pytest.raises(ValueError, match="beta=.* for p: expected a number from 0 to 96, the range that it was trained for"):
        molecule_model(0, "p", beta=beta)
    molecule_model(0, "p").save_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match="expected a number from 0 to 96"):
        sculpt.load(tmp_path / "p", beta=beta)


def test_an_exponent_that_is_missing_is_asked_for(tmp_path):
    molecule_model(0).save_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match=r"conditional on \['beta'\].*beta=…"):
        sculpt.load(tmp_path / "p")


def test_exponents_of_one_policy_compose_and_vocabularies_do_not_mix(tmp_path):
    molecule_model(0, "p").save_pretrained(tmp_path / "p")
    cold, hot = (sculpt.load(tmp_path / "p", beta=beta) for beta in (32, 96))
    assert cold.key != hot.key
    assert isinstance((cold & hot).sample(3, Tracked(particles=10)), Molecules)
    with pytest.raises(ValueError, match="cannot be composed: environment FragmentTrees.*<5 fragments.*<2 fragments"):
        cold & molecule_model(0, vocabulary=ALKANES)


def test_the_shipped_policies_are_still_the_models_that_the_shipped_classifier_was_fitted_for():
    shelf = Path(__file__).parents[1] / "pretrained" / "molecules"
    keys = json.loads((shelf / "seh-sa" / "config.json").read_text())["keys"]
    assert [sculpt.load(shelf / name, beta=32).key for name in ("seh", "sa")] == keys


# The command ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A working directory with pretrained molecule models and a classifier of two of them."""
    home = tmp_path_factory.mktemp("home")
    shelf = home / "pretrained" / "molecules"
    for seed, name in enumerate(("seh", "sa", "qed")):
        molecule_model(seed, name).save_pretrained(shelf / name)
    seh, sa = (sculpt.load(shelf / name, beta=32) for name in ("seh", "sa"))
    molecule_classifier(seh, sa).save_pretrained(shelf / "seh-sa")
    return home


@pytest.fixture
def molecules(shelf, monkeypatch, tmp_path):
    monkeypatch.chdir(shelf)
    monkeypatch.setattr("sculpt.apps.cli.molecules._shelves", lambda part: [shelf / "pretrained" / part])

    def run(formula, *arguments, output="out.csv", beta=("--beta", "32"), rewards=("--rewards", "sa,qed")):
        path = tmp_path / output
        return cli.main(
            ["molecules", formula, "-n", "30", "--policies", "fragments", *beta, *rewards, "-o", str(path), *arguments]
        ), path

    return run


def rows(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_the_command_writes_scored_molecules_and_tells_how_good_they_are(molecules, capsys):
    code, path = molecules("seh & sa", "--no-classifier")
    out = capsys.readouterr().out
    assert code == 0
    assert sum(int(row["count"]) for row in rows(path)) == 30
    assert list(rows(path)[0]) == ["smiles", "count", "weight", "sa", "qed"]
    for text in (
        "tracked densities",
        "seh[beta=32] ⊗ sa[beta=32]",
        "verdict",
        "≥ 0.6",
        "all of them",
        "of 30 molecules",
        "wrote",
    ):
        assert text in out


@pytest.mark.parametrize("suffix", ["parquet", "csv", "sdf", "smi", "png", "svg"])
def test_the_name_of_the_output_says_its_format(molecules, suffix):
    code, path = molecules("qed", output=f"out.{suffix}")
    assert code == 0
    assert path.stat().st_size > 100


def test_the_same_seed_gives_the_same_molecules(molecules):
    texts = [molecules("seh - sa", "--seed", seed, output=f"{k}.csv")[1].read_text() for k, seed in enumerate("112")]
    assert texts[0] == texts[1] != texts[2]


def test_a_classifier_that_fits_is_taken_by_itself(molecules, shelf, capsys):
    assert molecules("sa & seh")[0] == 0
    out = capsys.readouterr().out
    assert "classifier, anchored form" in out and "seh-sa, found by itself" in out
    for correct, road in (("--correct", "corrected"), ("--correct-densities", "corrected by densities")):
        assert molecules("sa & seh", correct, "--particles", "40")[0] == 0
        assert f"anchored form, {road}\n" in capsys.readouterr().out
    # Another exponent, a third model, a mixture, and being told not to: none of these is what it was fitted for.
    for formula, *arguments in (
        ("seh & sa", "--beta", "seh=96"), ("seh & qed",), ("(seh & sa) - qed",), ("seh | sa",), ("seh & sa", "--no-classifier"),
    ):  # fmt: skip
        assert molecules(formula, *arguments)[0] == 0
        assert "found by itself" not in capsys.readouterr().out
    classifier = str(shelf / "pretrained" / "molecules" / "seh-sa")
    assert molecules("seh - sa", "--classifier", classifier)[0] == 0
    assert classifier in capsys.readouterr().out


def test_one_folder_at_two_exponents_is_two_models(molecules, shelf, capsys):
    hot = f"hot={shelf / 'pretrained' / 'molecules' / 'seh'}"
    assert molecules("hot - seh", "--model", hot, "--beta", "hot=96")[0] == 0
    assert "seh[beta=96]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("formula", "arguments", "options", "message"),
    [
        ("seh & tox", (), {}, "no model 'tox' in pretrained/molecules: there are qed, sa, seh. For one that is elsewhere: --model tox=FOLDER"),
        ("seh &", (), {}, "is not complete"),
        ("seh + sa", (), {}, "Add has no meaning here"),
        ("seh", (), {"beta": ()}, "Say how peaked seh should be: --beta 32 for all models, or --beta seh=32"),
        ("seh & sa", (), {"beta": ("--beta", "seh=32")}, "Say how peaked sa should be"),
        ("seh", (), {"beta": ("--beta", "97")}, "expected a number from 0 to 96"),
        ("seh", (), {"beta": ("--beta", "high")}, "--beta high: expected a number"),
        ("seh", ("--beta", "16"), {}, "was given before"),
        ("seh", ("--beta", "sa=16"), {}, "the formula's models are seh"),
        ("seh", ("--model", "sa=nowhere"), {}, "--model sa: the formula names seh only"),
        ("seh", ("--model", "seh=nowhere"), {}, "no folder 'nowhere'"),
        ("seh", (), {"rewards": ("--rewards", "seh,logp")}, "no reward 'logp'"),
        ("seh", (), {"output": "out.xlsx"}, "expected a name that ends in .parquet"),
        ("seh", ("--correct",), {}, "--correct needs a classifier, and none was found"),
        ("seh & sa", ("--correct", "--no-classifier"), {}, "leave --no-classifier out"),
        ("seh & qed", ("--classifier", "pretrained/molecules/seh-sa"), {}, "fitted for other base models"),
        ("seh & sa", ("--classifier", "pretrained/molecules/seh"), {}, "is not a classifier"),
        ("seh & sa", ("--no-classifier", "--particles", "3"), {}, "--particles 3 cannot give -n 30 samples"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(molecules, capsys, formula, arguments, options, message):
    code, path = molecules(formula, *arguments, **options)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not path.exists()


def test_a_policy_without_an_exponent_needs_none_and_has_to_make_molecules(molecules, capsys, tmp_path):
    from gflownet_models import ENVIRONMENTS, network_policy

    env = ENVIRONMENTS["grid-2d"]()
    sculpt.GFlowNet(env, network_policy(env), name="grid").save_pretrained(tmp_path / "grid")
    for beta in ((), ("--beta", "32")):
        assert molecules("grid", "--model", f"grid={tmp_path / 'grid'}", beta=beta)[0] == 2
        assert "makes no molecules. Use sculpt sample." in capsys.readouterr().err
    assert molecules("pair", "--model", "pair=pretrained/molecules/seh-sa")[0] == 2
    assert "holds a classifier, expected a policy" in capsys.readouterr().err


def test_the_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["molecules", "--help"])
    out = capsys.readouterr().out
    for text in ("accelerate launch", "seh & sa", "--beta", ".sdf", "folder/"):
        assert text in out


def test_sculpt_sample_writes_molecules_too(shelf, tmp_path):
    model = ["--model", f"a={shelf / 'pretrained' / 'molecules' / 'sa'}", "--with", "beta=32"]
    for name in ("out.smi", "out.png"):
        assert cli.main(["sample", "a", *model, "-n", "5", "-o", str(tmp_path / name)]) == 0
    assert len((tmp_path / "out.smi").read_text().splitlines()) == 5


def test_tiny_models_make_the_molecules_that_their_fragments_allow(samples):
    assert len(TINY) == 5 and {atom.GetSymbol() for s in samples.smiles for atom in Chem.MolFromSmiles(s).GetAtoms()} <= set(
        "CON"
    )
