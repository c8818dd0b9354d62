"""Rewards against the reference table, and everything that can be wrong with molecules, weights and networks."""

import csv
import functools
import gzip
import hashlib
import http.server
import importlib.util
import os
import pickle
import socketserver
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem
from safetensors.torch import load_file, save_file

from sculpt.molecules import QED, SA, SEH, FragmentNetwork, FragmentTrees
from sculpt.molecules import seh as module
from sculpt.molecules.proxy import Proxy, graph
from sculpt.molecules.scores import Summary, score

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("SCULPT_DATA", "missing")) / "molecules"
needs_data = pytest.mark.skipif(
    not (DATA / "seh_proxy.safetensors").is_file(), reason="SCULPT_DATA has no molecules/seh_proxy.safetensors"
)


@pytest.fixture(scope="module")
def reference():
    with (DATA / "reference.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [row["smiles"] for row in rows], lambda name: torch.tensor([float(row[name]) for row in rows])


@pytest.fixture
def random_weights():
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in module._ARRAYS.values()}


def pickled(weights) -> bytes:
    """The public file's form: 22 arrays in a compressed pickle."""
    arrays = [weights[module._ARRAYS[i][0]].numpy() if i in module._ARRAYS else torch.zeros(1).numpy() for i in range(22)]
    return gzip.compress(pickle.dumps(arrays).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"), mtime=0)


# Against the reference


@needs_data
@pytest.mark.parametrize("root, column", [("published", "seh_peer"), ("trained", "seh_transposed_root")])
def test_the_proxy_agrees_with_the_reference(reference, root, column):
    smiles, values = reference
    assert (SEH(root=root).proxy(smiles) - values(column)).abs().max() < 1e-5


@needs_data
def test_the_reward_is_the_clipped_proxy_over_eight(reference):
    smiles, values = reference
    assert (SEH()(smiles) - values("seh_peer").clamp(1e-4, 100) / 8).abs().max() < 2e-6


@needs_data
@pytest.mark.parametrize("reward, column", [(SA(), "sa_reward"), (SA().score, "sa_score"), (QED(), "qed")])
def test_synthesis_and_drug_likeness_agree_with_the_reference(reference, reward, column):
    smiles, values = reference
    assert (reward(smiles) - values(column)).abs().max() < 1e-5


# The network, on weights of no meaning


def test_a_molecule_is_worth_the_same_in_any_company_and_any_order_of_atoms(random_weights):
    proxy = Proxy(random_weights)
    smiles = ["CCO", "C", "c1ccccc1C#N", "CC(=O)Nc1ccc(O)cc1", "CCO.C#CC.[Na+]", "[Na+].[Cl-]"]
    molecules = [Chem.MolFromSmiles(s) for s in smiles]
    together = proxy(*graph(molecules))
    apart = torch.cat([proxy(*graph([molecule])) for molecule in molecules])
    assert (together - apart).abs().max() < 1e-5
    turned = [Chem.RenumberAtoms(m, list(reversed(range(m.GetNumAtoms())))) for m in molecules[:5]]
    assert (proxy(*graph(turned)) - together[:5]).abs().max() < 1e-5


def test_the_five_bond_matrices_are_those_of_the_edge_network(random_weights):
    proxy = Proxy(random_weights)
    w = random_weights
    for kind, e in enumerate([*torch.eye(4), torch.zeros(4)]):
        hidden = torch.nn.functional.leaky_relu(w["edge_net.0.weight"] @ e + w["edge_net.0.bias"])
        theta = (w["edge_net.1.weight"] @ hidden + w["edge_net.1.bias"]).view(64, 64)
        assert (proxy.theta[kind] - theta).abs().max() < 1e-5


# Bad molecules


def test_what_is_no_molecule_gets_nan_and_is_counted(random_weights, tmp_path):
    save_file(random_weights, tmp_path / "w.safetensors")
    for reward in (SA(), QED(), SEH(tmp_path / "w.safetensors")):
        with pytest.warns(
            UserWarning,
            match="has no value for 5 of 7 molecules: 'not a molecule' .number 1: no molecule., '' .number 2: no atoms., "
            "'C1CC' .number 3: no molecule. and 2 more. They get NaN",
        ) as told:
            values = reward(["CCO", "not a molecule", "", "C1CC", Chem.MolFromSmiles("CC"), None, "\ud800"])
        assert len(told) == 1
        assert values.isnan().tolist() == [False, True, True, True, False, True, True] and reward.invalid == 5
        assert reward(["C"]).isfinite().all() and reward.invalid == 0
        assert reward([]).shape == (0,) and reward.invalid == 0
        with pytest.warns(UserWarning, match="1 of 1"):
            assert reward([None]).isnan().all()
        assert reward(["CCO.c1ccccc1", "[Na+].[Cl-]"]).isfinite().all()  # parts that hang together by nothing
        assert reward(["C" * 500]).isfinite().all()
        with pytest.warns(UserWarning, match="'CC' .number 1: not sanitised; call Chem.SanitizeMol"):
            assert reward(["C", Chem.MolFromSmiles("CC", sanitize=False)]).isnan().tolist() == [False, True]
        reward.strict = True
        with pytest.raises(ValueError, match="no value for 1 of 2 molecules: None .number 1: no molecule.. Leave them out, or"):
            reward(["C", None])
    with pytest.raises(TypeError, match="takes a list of molecules, got one str"):
        SA()("CCO")


ODD = {
    "*": r"elements up to barium \(56\), got \* \(0\)",
    "Cl[Pt]Cl": r"elements up to barium \(56\), got Pt \(78\)",
    "N->[Cu]": "single, double, triple and aromatic bonds, got DATIVE",
    "C$C": "got QUADRUPLE",
}


@pytest.mark.parametrize("smiles", ODD)
def test_one_odd_molecule_costs_the_others_nothing(random_weights, tmp_path, smiles):
    save_file(random_weights, tmp_path / "w.safetensors")
    good = ["CCO", "c1ccccc1C#N", "CC(=O)Nc1ccc(O)cc1"] * 50
    seh, strict = SEH(tmp_path / "w.safetensors"), SEH(tmp_path / "w.safetensors", strict=True)
    batch = [*good[:100], smiles, *good[100:]]
    with pytest.warns(UserWarning, match=ODD[smiles]) as told:
        values = seh(batch)
    assert len(told) == 1 and seh.invalid == 1 and values.isnan().nonzero().flatten().tolist() == [100]
    assert (values[values.isfinite()] - seh(good)).abs().max() < 1e-6
    with pytest.raises(ValueError, match=ODD[smiles]):
        strict(batch)
    with pytest.warns(UserWarning, match=ODD[smiles]):
        assert seh.proxy(batch).isnan().sum() == 1


def test_what_rdkit_raises_is_about_one_molecule(monkeypatch):
    def raises(molecule):
        if molecule.GetNumAtoms() == 3:
            raise RuntimeError("Pre-condition Violation\n  no ring info")
        return 0.5

    sa = SA()
    monkeypatch.setattr(sa.scorer, "calculateScore", raises)
    with pytest.warns(UserWarning, match="'CCC' .number 2: RDKit says: Pre-condition Violation no ring info"):
        assert sa.score(["C", "CC", "CCC", "CCCC"]).isnan().tolist() == [False, False, True, False]
    monkeypatch.setattr("sculpt.molecules.rewards.qed", raises)
    with pytest.raises(ValueError, match="'CCC' .number 2: RDKit says"):
        QED(strict=True)(["C", "CC", "CCC", "CCCC"])


def test_many_molecules_are_scored_with_one_warning_for_each_reward(random_weights, tmp_path):
    save_file(random_weights, tmp_path / "w.safetensors")
    smiles = ["CCO", "Cl[Pt]Cl", "CC", "C1CC"] * 300
    functions = {"seh": SEH(tmp_path / "w.safetensors"), "qed": QED(), "own": lambda molecules: [x is None for x in molecules]}
    with pytest.warns(UserWarning) as told:
        table = score(smiles, functions, progress=False)
    said = [str(warning.message) for warning in told]
    assert len(said) == 2 and "SEH has no value for 600 of 1200 molecules: 'Cl[Pt]Cl' (number 1: " in said[0]
    assert "QED has no value for 300 of 1200 molecules: 'C1CC' (number 3: no molecule)" in said[1]
    assert np.isnan(table["seh"]).sum() == 600 and np.isnan(table["qed"]).sum() == 300 and table["own"].sum() == 300
    with pytest.raises(
        ValueError, match=r"SEH has no value for 128 of 1200 molecules: 'Cl\[Pt\]Cl' .number 1: .*Leave them out"
    ):
        score(smiles, functions | {"seh": SEH(tmp_path / "w.safetensors", strict=True)}, progress=False)


def test_a_summary_counts_the_molecules_that_have_a_value():
    summary, smiles = Summary(8), np.array(["C", "CC", "CCC", "Cl[Pt]Cl"], dtype=object)
    table = {"smiles": smiles, "count": np.array([1, 2, 1, 4]), "seh": np.array([0.6, 0.3, 0.9, np.nan]), "sa": np.full(4, 0.7)}
    summary.add(table)
    assert summary.means == pytest.approx({"seh": 2.1 / 4, "sa": 0.7}) and summary.unknown == {"seh": 4}
    assert summary.shares == pytest.approx({"seh": 2 / 8, "sa": 1, "all": 2 / 8})
    assert "not known  sEH of 4\n" in str(summary)
    assert (summary.valid, summary.n) == (8, 8)
    summary.add(table | {"seh": np.full(4, np.nan), "mine": np.full(4, np.nan)})
    assert summary.unknown == {"seh": 12, "mine": 8} and np.isnan(summary.means["mine"])


# Weights


def test_weights_that_do_not_fit_are_refused(random_weights, tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        SEH(tmp_path / "missing.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="truncated or damaged"):
        SEH(tmp_path / "cut.safetensors")
    save_file(random_weights | {"out.bias": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "another.safetensors")
    with pytest.raises(
        ValueError, match=r"another.safetensors does not hold the sEH proxy: a is \(1,\), expected no such array"
    ):
        SEH(tmp_path / "another.safetensors")
    with pytest.raises(ValueError, match="There is no file"):
        SEH(tmp_path)
    with pytest.raises(ValueError, match=r"out.bias is \(2,\), expected \(1,\)"):
        SEH(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected 'published'"):
        SEH(root="left")


@pytest.fixture
def server(tmp_path):
    """A web server on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}/best_params.pkl.gz"
        httpd.shutdown()


def test_the_public_file_is_downloaded_once_and_kept(random_weights, server, tmp_path, monkeypatch):
    folder, url = server
    content = pickled(random_weights)
    (folder / "best_params.pkl.gz").write_bytes(content)
    monkeypatch.delenv("SCULPT_DATA", raising=False)
    monkeypatch.setenv("SCULPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "URL", url)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(content).hexdigest())
    first = SEH().proxy(["CCO"])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["seh_proxy.safetensors"]
    kept = load_file(tmp_path / "cache" / "seh_proxy.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in random_weights.items())
    (folder / "best_params.pkl.gz").unlink()
    assert torch.equal(SEH().proxy(["CCO"]), first)


def test_a_file_with_another_hash_is_not_opened(server, tmp_path, monkeypatch):
    folder, url = server
    monkeypatch.chdir(tmp_path)
    (folder / "best_params.pkl.gz").write_bytes(gzip.compress(pickle.dumps(_Trap())))
    monkeypatch.setattr(module.gzip, "decompress", lambda content: pytest.fail("it was interpreted"))
    with pytest.raises(ValueError, match="is not the published file: got sha256 .* It was not opened"):
        module.download(tmp_path / "kept.safetensors", url, module.SHA256)
    assert not (tmp_path / "sprung").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["served"]


def test_the_cache_goes_before_the_data_folder_and_both_before_the_network(random_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("SCULPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCULPT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(module, "download", lambda *_: pytest.fail("it went to the network"))
    for path in (tmp_path / "data" / "molecules", tmp_path / "cache"):
        path.mkdir(parents=True)
        save_file(random_weights, path / "seh_proxy.safetensors")
        assert SEH().path == path / "seh_proxy.safetensors"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.delenv("SCULPT_DATA", raising=False)
    monkeypatch.setenv("SCULPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "URL", "http://127.0.0.1:9/best_params.pkl.gz")


def test_offline_the_student_takes_over_and_says_so(offline, tmp_path):
    with pytest.warns(
        UserWarning, match=r"cannot be downloaded .* Go online once, .* student .* \(Spearman 0\.\d+\).*not the published"
    ):
        seh = SEH()
    assert seh.path == module.STUDENT and not (tmp_path / "cache").exists()
    assert torch.equal(seh(["CCO", "CC"]), SEH(module.STUDENT)(["CCO", "CC"]))
    with pytest.raises(ValueError, match="cannot be downloaded .* set SCULPT_DATA"):
        SEH(root="trained")
    with pytest.raises(ValueError, match="published values only, got root='trained'"):
        SEH(module.STUDENT, root="trained")


def test_who_answers_without_http_is_offline_too(offline, monkeypatch):
    class Garbage(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            self.request.sendall(b"come in\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Garbage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(module, "URL", f"http://127.0.0.1:{server.server_address[1]}/best_params.pkl.gz")
        with pytest.warns(UserWarning, match="student"):
            assert SEH().path == module.STUDENT
        server.shutdown()


def test_a_wrong_file_from_the_network_is_no_reason_for_the_student(server, offline, tmp_path, monkeypatch):
    folder, url = server
    (folder / "best_params.pkl.gz").write_bytes(b"<html>log in</html>")
    monkeypatch.setattr(module, "URL", url)
    with pytest.raises(ValueError, match="is not the published file"):
        SEH()
    assert not (tmp_path / "cache").exists()


@needs_data
def test_the_student_ranks_new_molecules_as_the_proxy_does():
    """Trees of another untrained policy than those that it was trained on."""
    torch.manual_seed(7)
    env = FragmentTrees()
    x = FragmentNetwork(env.vocabulary).sample(torch.zeros(400), torch.Generator().manual_seed(7))
    values = torch.stack([SEH(weights).proxy(env.molecules(x)) for weights in (None, module.STUDENT)])
    assert torch.corrcoef(values.argsort(1).argsort(1).double())[0, 1] > 0.95


def test_a_killed_training_of_a_student_goes_on_bit_for_bit(random_weights, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("student", ROOT / "pretrained" / "molecules" / "student.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    monkeypatch.setattr(recipe, "WIDTH", 8)
    monkeypatch.setattr(recipe, "BATCH", 4)
    save_file(random_weights, tmp_path / "w.safetensors")
    (tmp_path / "chains.csv").write_text("".join(f"{'C' * n}O,{n / 10}\n" for n in range(1, 30)))
    molecules = recipe.Molecules(tmp_path, SEH(tmp_path / "w.safetensors"))
    through, first = (recipe.Recipe(molecules, 6, tmp_path / name) for name in "ab")

    def losses(one, steps):
        return [row["loss"] for row in one.training.run(one.loss, steps)]

    expected = losses(through, 6)
    assert losses(first, 3) == expected[:3]
    first.training.save()
    again = recipe.Recipe(molecules, 6, tmp_path / "b")
    assert again.training.step == 3 and losses(again, 6) == expected[3:]
    average = through.training.average.arrays()
    assert all(torch.equal(w, average[name]) for name, w in again.training.average.arrays().items())


def test_a_wheel_takes_the_student_and_the_vocabulary_along():
    package = Path(module.__file__).parents[1]
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["sculpt"]
    taken = {path for pattern in patterns for path in package.glob(pattern)}
    needed = [module.STUDENT / "config.json", module.STUDENT / "model.safetensors", package / "molecules" / "vocabulary.json"]
    assert all(path in taken and path.is_file() for path in needed)


class _Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_even_a_file_with_the_right_hash_may_hold_nothing_but_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = gzip.compress(pickle.dumps([_Trap()]))
    (tmp_path / "trap.gz").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError, match="weights are plain arrays"):
        module.download(tmp_path / "kept.safetensors", (tmp_path / "trap.gz").as_uri(), hashlib.sha256(content).hexdigest())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trap.gz"]
