"""Language models of SMILES as models of molecules: what their folders say, their results, the command, shards."""

import csv
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from imported import pretrained
from rdkit import Chem
from token_models import densities, sequences

import sculpt
from sculpt.apps import cli
from sculpt.molecules import Molecules, Smiles, passes, valid
from sculpt.molecules.scores import Summary, named
from sculpt.tokens.results import Texts

SHELF = Path(__file__).parents[1] / "pretrained" / "smiles"
(network,) = pretrained("smiles", "network")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(seed=0, name="p"):
    """Strings of at most four of C, O and an open bracket, so that a third of them are no molecules."""
    table = torch.randn(4, 4, generator=seeded(seed))
    return sculpt.Tokens(
        lambda tokens, cache: (table[tokens], None),
        vocabulary=["C", "O", "(", "$"], end="$", prompt=[3], max_length=4, name=name, samples=Smiles,
    )  # fmt: skip


def all_strings(model):
    """Every string and its probability."""
    return model.decoder(sequences(model)[0]), densities([model])[:, 0].exp()


@pytest.fixture(scope="module")
def policies():
    return [sculpt.load(SHELF / name, beta=32) for name in ("seh", "sa")]


@pytest.fixture(scope="module")
def both(policies):
    seh, sa = policies
    return (seh & sa).sample(40, sculpt.Tracked(particles=80), generator=seeded(), progress=False)


# Strings and molecules, against all strings


def test_tables_count_molecules_and_weigh_them_by_all_of_their_strings():
    """CO and OC are two strings of one molecule: its weight is the sum of theirs, and all weights come to the share that is valid."""
    p, n = tiny(), 20_000
    samples = p.sample(n, generator=seeded(), progress=False)
    share = {}
    for text, probability in zip(*(list(part) for part in all_strings(p)), strict=True):
        if text and (molecule := Chem.MolFromSmiles(text)) is not None:
            share[Chem.MolToSmiles(molecule)] = share.get(Chem.MolToSmiles(molecule), 0.0) + float(probability)
    table = samples.table([])
    assert set(table["smiles"]) <= set(share) and "CO" in share and 0.2 < sum(share.values()) < 0.9
    for smiles, weight, count in zip(table["smiles"], table["weight"], table["count"], strict=True):
        assert weight == pytest.approx(count / n) and abs(weight - share[smiles]) < 5 * math.sqrt(share[smiles] / n)
    assert table["weight"].sum() == pytest.approx(float(samples.valid.double().mean()))
    assert {"CO", "OC"} <= set(samples.text) and "OC" not in samples.smiles


def test_what_is_no_molecule_is_forbidden_by_a_factor_and_log_z_is_the_share_that_is_valid():
    p = tiny(1)
    texts, probability = all_strings(p)
    there = torch.tensor([bool(text) and Chem.MolFromSmiles(text) is not None for text in texts])
    samples = (p * valid()).sample(500, sculpt.Tracked(particles=20_000), generator=seeded(), progress=False)
    assert samples.valid.all() and abs(samples.log_z - math.log(float(probability[there].sum()))) < 0.05
    assert valid()(["CO", "C(", ""], 3).tolist() == [0, -math.inf, -math.inf]


def test_a_summary_counts_samples_that_are_no_molecules_as_not_high():
    samples = tiny().sample(200, generator=seeded(), progress=False)
    summary, share = samples.summary(["qed"]), float(samples.valid.double().mean())
    table = samples.table(["qed"])
    assert summary.means["qed"] == pytest.approx(float((table["qed"] * table["weight"]).sum() / share))
    assert (summary.n, summary.valid) == (200, int(samples.valid.sum())) and summary.distinct == len(table["smiles"])
    assert f"valid  {summary.valid} of 200 samples" in str(summary)


def test_no_molecule_at_all_is_no_error(tmp_path):
    samples = tiny().sample(200, generator=seeded(), progress=False)
    none = samples[~samples.valid][:5]
    assert none.smiles == [""] * 5 and all(len(column) == 0 for column in none.table(["sa"]).values())
    assert "none of 5 samples is one" in str(none.summary(["sa"])) and none.picture() == ("text", b"no molecules")
    for ending in ("csv", "sdf", "smi", "png", "svg", "parquet", "safetensors"):
        none.save(tmp_path / f"a.{ending}", ["sa"])
    assert sculpt.Samples.load(tmp_path / "a.safetensors").text == none.text


# The summary


def test_a_formula_says_which_rewards_count():
    assert (
        named("seh[beta=32] ⊗ sa[beta=32]") == ["seh", "sa"]
        and named("prior") == []
        and named("(qed ◑ seh-sa)") == ["seh", "sa", "qed"]
    )
    table = {"smiles": np.array(["C", "CC"], dtype=object), "count": np.array([1, 1]), "weight": np.array([0.5, 0.5])}
    table |= {"seh": np.array([0.9, 0.1]), "qed": np.array([0.1, 0.9])}
    for asked, share in (((), 0.0), (["seh"], 0.5), (["qed"], 0.5)):
        summary = Summary(2, asked=asked)
        summary.add(table)
        assert summary.shares["all"] == pytest.approx(share)


def test_a_summary_has_the_ranges_of_properties_by_weight():
    summary = Summary(100)
    summary.add({"smiles": np.array(["C", "CCCC"], dtype=object), "count": np.array([96, 4]), "weight": np.array([0.97, 0.03])})
    low, middle, high = summary.ranges["mw"]
    assert low == middle == pytest.approx(16.04, abs=0.01) or low < middle < high
    even = Summary(2)
    even.add({"smiles": np.array(["C", "CCCC"], dtype=object), "count": np.array([1, 1])})
    assert even.ranges["mw"] == pytest.approx((16.04, 37.08, 58.12), abs=0.01) and even.passed == 1


def test_a_picture_has_no_gaps_and_the_scores_of_the_formula(both):
    picture = both.draw(12)
    assert len(picture.molecules) == 12 and picture.columns == 4
    assert all("sEH" in legend and "SA" in legend and "QED" not in legend for legend in picture.legends)


# The shipped policies


def test_an_exponent_is_a_prompt_and_others_are_refused(policies):
    seh = policies[0]
    assert str(seh) == "seh[beta=32]" and seh.max_length == 63 and seh.samples_class is Smiles
    assert seh.key == sculpt.load(SHELF / "seh", beta=32.0).key == sculpt.load(SHELF / "seh", prompt="<seh:32>").key
    assert seh.key != sculpt.load(SHELF / "seh", beta=64).key
    with pytest.raises(ValueError, match=r"seh does not know beta=40: it was trained for beta=0, 1, 2, .*, 64. Pass one"):
        sculpt.load(SHELF / "seh", beta=40)
    with pytest.raises(ValueError, match="seh wants beta=…: it was trained for beta=0, 1"):
        sculpt.load(SHELF / "seh")
    with pytest.raises(ValueError, match="Got a prompt and beta, for which the folder has prompts of its own"):
        sculpt.load(SHELF / "seh", beta=32, prompt="<seh:16>")
    with pytest.raises(ValueError, match="beta: no option of a language model"):
        sculpt.load(SHELF / "prior", beta=32)
    with pytest.raises(ValueError, match="no common states"):
        seh & sculpt.load(SHELF.parent / "molecules" / "sa", beta=32)


@pytest.mark.parametrize("name", ["prior", "seh", "sa", "qed"])
def test_the_folders_say_what_the_recipe_writes(name):
    assert json.loads((SHELF / name / "sculpt.json").read_text()) == network.told(name)


def test_a_damaged_note_is_named(tmp_path):
    told = network.told("seh")
    for change, message in (
        ({"prompts": {"beta=1": [1], "alpha=2": [2]}}, "prompts is an object of 2 entries, expected .* the same conditions"),
        ({"prompts": {"beta=32": ["x"]}}, "beta=32 is a list of 1 entries, expected a list of tokens"),
        ({"samples": "os.system"}, "is not a Texts of this sculpt"),
        ({"samples": "Molecules"}, "is not a Texts of this sculpt"),
    ):
        for path in (SHELF / "seh").glob("*.*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "sculpt.json").write_text(json.dumps(told | change))
        with pytest.raises(ValueError, match=message):
            sculpt.load(tmp_path, beta=32)


def test_results_are_molecules_and_texts(both, tmp_path):
    assert isinstance(both, Molecules) and isinstance(both, Texts)
    assert [Chem.CanonSmiles(text) for text, there in zip(both.text, both.valid.tolist(), strict=True) if there] == [
        smiles for smiles in both.smiles if smiles
    ]
    assert list(both.log_p) == ["seh[beta=32]", "sa[beta=32]"] and both.valid.double().mean() > 0.8
    both.save(tmp_path / "a.safetensors")
    for again in (sculpt.Samples.load(tmp_path / "a.safetensors"), pickle.loads(pickle.dumps(both))):
        assert type(again) is Smiles and (again.text, again.smiles, again.log_p) == (both.text, both.smiles, both.log_p)
    part = both[both.valid][:5]
    assert part.valid.all() and len(part.to_frame([])) <= 5 and len(part.log_p["sa[beta=32]"]) == 5
    assert type(Smiles.cat([both, part])) is Smiles


def test_a_policy_is_saved_with_its_exponent(policies, tmp_path):
    policies[0].save_pretrained(tmp_path / "mine")
    again = sculpt.load(tmp_path / "mine")
    assert again.samples_class is Smiles and again.prompt == policies[0].prompt and again.sampling == policies[0].sampling
    cooler = sculpt.load(tmp_path / "mine", temperature=0.5)
    assert cooler.sampling.suppress == again.sampling.suppress and cooler.sampling.temperature == 0.5


def test_filters_are_factors_of_strings_too(policies):
    clean = (policies[1] * passes("brenk")).sample(30, sculpt.Tracked(particles=90), generator=seeded(), progress=False)
    assert clean.valid.all() and (passes("brenk")(clean.smiles, 30) == 0).all()


# The command, and shards


@pytest.mark.parametrize("ending", ["parquet", "csv", "sdf", "smi", "png", "svg", "safetensors"])
def test_the_command_writes_drug_like_molecules(ending, tmp_path, capsys):
    path = tmp_path / f"out.{ending}"
    formula = ["molecules", "seh & sa", "-n", "16", "--beta", "32", "--particles", "32", "--rewards", "sa,qed", "-o", str(path)]
    assert cli.main(formula) == 0 and path.stat().st_size > 100
    out = capsys.readouterr().out
    assert "seh[beta=32] ⊗ sa[beta=32]" in out and "MW" in out and "distinct" in out
    if ending == "csv":
        rows = list(csv.DictReader(path.open()))
        assert list(rows[0]) == ["smiles", "count", "weight", "sa", "qed"] and all(
            Chem.MolFromSmiles(row["smiles"]) for row in rows
        )


@pytest.mark.parametrize(
    ("formula", "arguments", "message"),
    [
        ("seh", ("--beta", "40"), "does not know --beta 40: it was trained for --beta 0, 1"),
        ("seh & sa", (), "Say how peaked seh, sa should be"),
        ("seh & tox", ("--beta", "32"), "no model 'tox' in pretrained/smiles: there are prior, qed, sa, seh."),
        ("prior & seh", ("--beta", "prior=8", "--beta", "seh=8"), "takes no exponent. Leave it out"),
        ("old & sa", ("--beta", "32", "--model", f"old={SHELF.parent / 'molecules' / 'seh'}"), "they have no common states"),
    ],
)
def test_a_mistake_is_one_line(formula, arguments, message, tmp_path, capsys):
    assert cli.main(["molecules", formula, "-n", "4", *arguments, "-o", str(tmp_path / "out.csv")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out.csv").exists()


def test_a_prior_takes_no_exponent_beside_policies_that_do(tmp_path):
    command = ["molecules", "prior & qed", "-n", "8", "--beta", "8", "--particles", "16", "--rewards", "qed"]
    assert cli.main([*command, "-o", str(tmp_path / "out.smi")]) == 0


def test_shards_of_strings_are_tables_of_molecules(policies, tmp_path):
    seh, sa = policies
    how = {"shard": 10, "rewards": ["sa"], "progress": False}
    library = sculpt.generate(seh & sa, 30, tmp_path, sculpt.Tracked(particles=20), **how)
    tables, summary = list(library.tables()), library.summary()
    assert len(library) == 30 and library.missing == [] and summary.n == 30
    assert summary.valid == sum(int(table["count"].sum()) for table in tables) <= 30
    assert all(Chem.MolFromSmiles(smiles) for table in tables for smiles in table["smiles"])
    assert sum(table["weight"].sum() for table in tables) <= 1 + 1e-9
