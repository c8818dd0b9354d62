"""What a chemist looks at: against values that are known, and as factors."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import sculpt
from sculpt.molecules import Patterns, alerts, passes, profile, properties, within

ROOT = Path(__file__).parents[1]
ASPIRIN, CAFFEINE, RHODANINE = "CC(=O)Oc1ccccc1C(=O)O", "Cn1c(=O)c2c(ncn2C)n(C)c1=O", "O=C1NC(=S)SC1=Cc1ccccc1"


def test_properties_are_those_of_textbooks():
    found = properties([ASPIRIN, CAFFEINE, "no molecule"])
    assert found["mw"][:2] == pytest.approx([180.16, 194.19], abs=0.01) and math.isnan(found["mw"][2])
    assert found["tpsa"][0] == pytest.approx(63.6) and found["rings"].tolist()[:2] == [1, 2]
    assert found["donors"].tolist()[:2] == [1, 0] and found["fsp3"][1] == pytest.approx(3 / 8)
    assert found["atoms"].tolist()[:2] == [13, 14]


def test_alerts_name_what_chemists_avoid():
    found = alerts([CAFFEINE, RHODANINE, "no molecule"])
    assert set(found) == {"pains", "brenk", "nih"}
    assert found["pains"].tolist() == [False, True, True]
    own = alerts([CAFFEINE, ASPIRIN], Patterns(["C(=O)[OH]"], name="acids"))
    assert {name: values.tolist() for name, values in own.items()} == {"acids": [False, True]}


UNACCEPTABLE = {
    "ynol ether": "C#COc1ccccc1", "ynamine": "CN(C)C#Cc1ccccc1", "acyl fluoride": "O=C(F)c1ccccc1", "carbamoyl fluoride": "CN(C)C(=O)F",
    "oxime": "ON=Cc1ccccc1", "oxime ether": "C=NOc1ccccc1", "hemiaminal": "OC(C)N1CCCCC1", "peroxide": "COOC", "N-halide": "CN(C)F",
    "alpha-fluoroamine": "FCN1CCCCC1", "enol": "CC(O)=CC", "carbamic acid": "OC(=O)Nc1ccccc1", "aldehyde": "O=Cc1ccccc1",
    "thiocyanate": "N#CSc1ccccc1", "sulfenamide": "CSNC", "allene": "C=C=CC", "sulfinic hydrogen": "C[SH](=O)=O", "hydrazine": "CNNC",
}  # fmt: skip
DRUGS = {
    "aspirin": ASPIRIN, "caffeine": CAFFEINE, "ibuprofen": "CC(C)Cc1ccc(cc1)C(C)C(=O)O", "riluzole": "Nc1nc2ccc(OC(F)(F)F)cc2s1",
    "imatinib": "Cc1ccc(NC(=O)c2ccc(CN3CCN(C)CC3)cc2)cc1Nc1nccc(-c2cccnc2)n1", "fluconazole": "OC(Cn1cncn1)(Cn1cncn1)c1ccc(F)cc1F",
    "celecoxib": "Cc1ccc(cc1)-c1cc(nn1-c1ccc(cc1)S(N)(=O)=O)C(F)(F)F", "sildenafil": "CCCc1nn(C)c2c1nc([nH]c2=O)-c1cc(ccc1OCC)S(=O)(=O)N1CCN(C)CC1",
    "metformin": "CN(C)C(=N)NC(=N)N", "losartan": "CCCCc1nc(Cl)c(CO)n1Cc1ccc(cc1)-c1ccccc1-c1nnn[nH]1", "terbinafine": "CC(C)(C)C#CC=CCN(C)Cc1cccc2ccccc12",
    "nifedipine": "COC(=O)C1=C(C)NC(C)=C(C1c1ccccc1[N+](=O)[O-])C(=O)OC", "penicillin G": "CC1(C)SC2C(NC(=O)Cc3ccccc3)C(=O)N2C1C(=O)O",
}  # fmt: skip


def test_groups_that_no_chemist_accepts_are_found_and_drugs_have_none():
    found = alerts([*UNACCEPTABLE.values(), *DRUGS.values()], "unstable")["unstable"]
    assert dict(zip([*UNACCEPTABLE, *DRUGS], found.tolist(), strict=True)) == dict.fromkeys(UNACCEPTABLE, True) | dict.fromkeys(
        DRUGS, False
    )
    assert passes("unstable")([UNACCEPTABLE["oxime"], ASPIRIN], 2).tolist() == [-math.inf, 0]


def test_patterns_may_name_hydrogens():
    assert alerts([ASPIRIN, CAFFEINE], Patterns(["c1(-[#1])ccccc1"]))["patterns"].tolist() == [True, False]


def test_patterns_are_read_from_tables_with_and_without_a_heading(tmp_path):
    with (tmp_path / "headed.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["names", "smarts"], ["acid", "C(=O)[OH]"]])
    (tmp_path / "bare.csv").write_text('"C(=O)[OH]","acid"\n')
    for name in ("headed", "bare"):
        patterns = Patterns.read(tmp_path / f"{name}.csv")
        assert patterns.name == name and alerts([ASPIRIN, CAFFEINE], patterns)[name].tolist() == [True, False]


@pytest.mark.skipif("SCULPT_DATA" not in os.environ, reason="MOSES is not here")
def test_mosess_own_molecules_pass_its_filters():
    import gzip

    moses = Path(os.environ["SCULPT_DATA"]) / "moses"
    with gzip.open(moses / "test.csv.gz", "rt") as file:
        smiles = [row["SMILES"] for row, _ in zip(csv.DictReader(file), range(300), strict=False)]
    filters = [Patterns.read(moses / f"{name}.csv") for name in ("mcf", "wehi_pains")]
    found = profile(smiles, *filters)
    assert min(found.passed.values()) == 1 and found.share(mw=(250, 350)) > 0.95 and found.diversity > 0.8


def test_ranges_are_a_factor_of_soft_edges():
    factor = within(mw=(185, 250), logp=(None, 1))
    told = factor([ASPIRIN, CAFFEINE], 2)
    mw, logp = (properties([ASPIRIN])[name][0] for name in ("mw", "logp"))
    expected = -0.5 * ((185 - mw) / 25) ** 2 - 0.5 * (max(logp - 1, 0) / 0.5) ** 2
    torch.testing.assert_close(told, torch.tensor([expected, 0.0], dtype=torch.float64))
    assert str(factor) == "mw 185 to 250, logp -inf to 1" and factor.bound == 0
    assert within(mw=(185, 250), softness=0)([ASPIRIN, CAFFEINE], 2).tolist() == [-math.inf, 0]
    assert passes("pains")([CAFFEINE, RHODANINE], 2).tolist() == [0, -math.inf]
    assert passes("pains", penalty=3)([CAFFEINE, RHODANINE], 2).tolist() == [0, -3]


def test_molecules_are_conditioned_by_ranges_and_filters():
    """What is forbidden does not come out, and log Z is the share of the policy's molecules that is allowed."""
    seh = sculpt.load(ROOT / "pretrained/molecules/seh", beta=32)
    allowed = within(rings=(0, 9), softness=0)
    base = seh.sample(2000, generator=torch.Generator().manual_seed(0), progress=False)
    share = float((properties(base.smiles)["rings"] <= 9).mean())
    got = (seh * allowed).sample(
        300, sculpt.Tracked(particles=2000), generator=torch.Generator().manual_seed(1), progress=False
    )
    assert properties(got.smiles)["rings"].max() <= 9 and 0.05 < share < 0.99
    error = math.hypot(got.diagnostics.log_z_error, math.sqrt((1 - share) / share / 2000))
    assert abs(got.log_z - math.log(share)) < 3 * error


def test_a_profile_says_how_different_and_how_new_molecules_are():
    found = profile([ASPIRIN, ASPIRIN, CAFFEINE, "no molecule"], reference=[ASPIRIN])
    assert (found.n, found.valid, found.distinct, found.scaffolds) == (4, 3, 2, 2)
    assert found.novel == 0.5 and 0.5 < found.diversity < 1 and 0 <= found.nearest <= 1
    assert found.share(mw=(0, 185)) == 0.5 and np.allclose(found.columns["mw"][0], 180.16, atol=0.01)
    assert "no pains  100.0%" in str(found) and "3 of 4, 2 different, 2 scaffolds" in str(found)
    assert "valid  0 of 0" in str(profile([]))


@pytest.mark.usefixtures("unchecked")
def test_ranges_that_are_none_are_refused():
    with pytest.raises(ValueError, match="Ranges are of mw, logp, .*; got weight"):
        within(weight=(1, 2))
    with pytest.raises(ValueError, match="got none"):
        within()
    with pytest.raises(ValueError, match="no number is at least 5 and at most 1"):
        within(mw=(5, 1))
    with pytest.raises(ValueError, match="mw has a least and a most"):
        within(mw=300)
    with pytest.raises(ValueError, match="'lilly' is no catalogue of alerts; expected pains, brenk, nih"):
        passes("lilly")
    with pytest.raises(ValueError, match="is no SMARTS pattern"):
        Patterns(["((("])
    with pytest.raises(ValueError, match="penalty is a number of nats over 0"):
        passes(penalty=0)
