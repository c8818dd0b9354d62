"""Folders of shards: what is in them does not depend on kills, on processes, or on how often one starts over."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers_models import exact_model, scheduler_of, three_rings
from gflownet_models import ENVIRONMENTS, network_policy, perfect
from molecule_models import molecule_classifier, molecule_model

import sculpt
from sculpt import GFlowNet, Library, generate
from sculpt.apps import cli
from sculpt.gflownet import exact
from sculpt.launch import place
from sculpt.roads import Guided, Rejection, Tracked

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def both():
    return molecule_model(0, "p") & molecule_model(1, "q")


FEW = Tracked(particles=20)
SETTINGS = {"road": FEW, "shard": 10, "rewards": ["sa"], "progress": False}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def whole(both, tmp_path_factory):
    """35 molecules in one go."""
    folder = tmp_path_factory.mktemp("whole") / "library"
    generate(both, 35, folder, **SETTINGS)
    return folder


class Kill(BaseException):
    """Like a SIGKILL between two instructions: no handler of sculpt's catches it."""


def test_all_molecules_are_there_once(both, whole):
    import pandas

    library, frame = Library(whole), pandas.read_parquet(whole)
    assert list(frame.columns) == ["smiles", "count", "sa", "log_weight", "log_z", "shard", "seed"]
    assert sorted(contents(whole)) == ["_manifest.json", *(f"part-{k:05}.parquet" for k in range(4))]
    assert int(frame["count"].sum()) == len(library) == 35
    assert [int(table["count"].sum()) for table in library.tables()] == [10, 10, 10, 5]
    assert library.missing == []
    summary = library.summary()
    assert summary.distinct == frame["smiles"].nunique() and summary.n == 35
    w = frame["count"] * frame["log_z"].map(math.exp)  # a population counts as much as its Z says
    assert summary.means["sa"] == pytest.approx(float((frame["sa"] * w).sum() / w.sum()))
    assert sum(table["weight"].sum() for table in library.tables()) == pytest.approx(1)
    assert "(4 of 4 shards)" in library.verdict
    assert "35 samples of p ⊗ q, 4 of 4 shards" in repr(library)


def test_a_folder_by_any_name_has_its_own_columns_only(both, whole, tmp_path):
    library = generate(both, 35, tmp_path / "beta=32", **SETTINGS)
    assert str(library.summary()) == str(Library(whole).summary())
    assert all("beta" not in table for table in library.tables())


def test_shards_are_not_copies_of_each_other(whole):
    found = [tuple(table["smiles"]) for table in Library(whole).tables()]
    assert len(set(found)) == 4


def test_processes_share_the_shards_and_their_union_is_the_same(both, whole, tmp_path):
    first = generate(both, 35, tmp_path, share=(1, 2), **SETTINGS)
    assert first.missing == [0, 2]
    second = generate(both, 35, tmp_path, share=(0, 2), **SETTINGS)
    assert second.missing == []
    assert contents(tmp_path) == contents(whole)


def test_the_launcher_says_which_process_this_is(both, whole, tmp_path, monkeypatch):
    for rank in "02", "12":
        monkeypatch.setenv("RANK", rank[0])
        monkeypatch.setenv("WORLD_SIZE", rank[1])
        generate(both, 35, tmp_path, **SETTINGS)
    assert contents(tmp_path) == contents(whole)


def test_a_killed_run_goes_on_with_what_is_missing(both, whole, tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def killed(source, target):
        calls.append(Path(target).name)
        if len(calls) == 3:
            Path(source).write_bytes(Path(source).read_bytes()[:50])  # the disk had not got all of it
            raise Kill
        replace(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(Kill):
        generate(both, 35, tmp_path, **SETTINGS)
    library = Library(tmp_path)
    assert calls == [f"part-{k:05}.parquet" for k in range(3)] and library.missing == [2, 3] and len(library) == 20
    generate(both, 35, tmp_path, **SETTINGS)
    assert calls[3:] == ["part-00002.parquet", "part-00003.parquet"]
    assert {name: text for name, text in contents(tmp_path).items() if name[0] != "."} == contents(whole)
    # What is done is not done again, and what the kill left behind disturbs no reader.
    generate(both, 35, tmp_path, **SETTINGS)
    assert len(calls) == 5
    import pandas

    assert int(pandas.read_parquet(tmp_path)["count"].sum()) == 35


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_a_file_that_is_cut_short_is_made_again(both, whole, tmp_path, keep):
    generate(both, 35, tmp_path, **SETTINGS)
    path = tmp_path / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    assert Library(tmp_path).missing == [1]
    generate(both, 35, tmp_path, **SETTINGS)
    assert contents(tmp_path) == contents(whole)


def test_a_shard_of_another_place_is_not_taken_for_this_one(both, whole, tmp_path):
    generate(both, 35, tmp_path, **SETTINGS)
    (tmp_path / "part-00001.parquet").write_bytes((tmp_path / "part-00000.parquet").read_bytes())
    assert Library(tmp_path).missing == [1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed"),
        ({"shard": 7}, "shard"),
        ({"n": 36}, "n"),
        ({"road": Tracked(particles=30)}, "road"),
        ({"road": Tracked(particles=20, threshold=0.4)}, "road"),
        ({"batch_size": 5}, "batch_size"),
        ({"rewards": ["qed"]}, "rows"),
        ({"rewards": {"sa": lambda molecules: [0.5] * len(molecules)}}, "rows"),
        ({"model": "q"}, "formula, models, key"),
        ({"beta": 96.0}, "models, key"),
        ({"road": "classifier"}, "road"),
    ],
)
def test_other_settings_are_refused_and_change_nothing(both, whole, change, said):
    before = contents(whole)
    settings, n, model = SETTINGS | change, change.get("n", 35), both
    for name in ("n", "model", "beta"):
        settings.pop(name, None)
    if "model" in change:
        model = both.models[1] & molecule_model(2, "r")
    if "beta" in change:
        model = molecule_model(0, "p", beta=change["beta"]) & both.models[1]
    if settings["road"] == "classifier":
        settings["road"] = molecule_classifier(*both.models)
    with pytest.raises(ValueError, match=rf"begun with other settings: {said} \(.* or choose another folder"):
        generate(model, n, whole, **settings)
    assert contents(whole) == before


def test_a_reward_that_rounds_differently_is_the_same_reward(both, tmp_path):
    generate(both, 5, tmp_path, **SETTINGS | {"rewards": {"mine": lambda molecules: [0.1] * len(molecules)}})
    generate(both, 5, tmp_path, **SETTINGS | {"rewards": {"mine": lambda molecules: [0.1 + 1e-7] * len(molecules)}})


def test_a_folder_of_something_else_is_left_alone(both, tmp_path):
    (tmp_path / "mine.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds mine.parquet of something else"):
        generate(both, 5, tmp_path, **SETTINGS)
    assert sorted(contents(tmp_path)) == ["mine.parquet"]
    (tmp_path / "mine.parquet").rename(tmp_path / "_manifest.json")
    with pytest.raises(ValueError, match="not readable JSON"):
        generate(both, 5, tmp_path, **SETTINGS)


def test_only_one_shard_is_in_memory_at_a_time(both, tmp_path, monkeypatch):
    sample, made, alive = type(both).sample, [], []

    def watched(self, *arguments, **options):
        alive.append(sum(samples() is not None for samples in made))
        samples = sample(self, *arguments, **options)
        made.append(weakref.ref(samples))
        return samples

    monkeypatch.setattr(type(both), "sample", watched)
    generate(both, 80, tmp_path, **SETTINGS)
    assert len(alive) == 8
    assert max(alive) <= 1  # the loop's name still holds the last one


def test_every_road_can_be_sharded(both, tmp_path):
    classifier = molecule_classifier(*both.models)
    p, q = both.models
    settings = {"shard": 10, "rewards": ["sa"], "progress": False}
    roads = (
        (p, None), (p | q, None), (both, classifier), (both, Guided(classifier, correct=True, particles=20)),
        (both, Guided(classifier, anchor=q)), (both, Rejection(classifier)), (both.guided(classifier), None),
    )  # fmt: skip
    described = set()
    for k, (model, road) in enumerate(roads):
        library = generate(model, 15, tmp_path / str(k), road, **settings)
        assert len(library) == 15
        described.add(json.dumps([library.settings["key"], library.settings["road"]]))
    assert len(described) == len(roads)


def test_the_manifest_knows_a_road_with_its_options(both, whole, tmp_path):
    assert Library(whole).settings["road"] == FEW.identity == Tracked(particles=20).identity != Tracked().identity
    classifier = molecule_classifier(*both.models)
    roads = (
        Guided(classifier), Guided(classifier, anchor=1), Guided(classifier, correct=True), Guided(classifier, correct="densities"),
        Guided(classifier, correct=True, particles=50), Guided(classifier, form="mixture"), Rejection(classifier), Rejection(),
        Rejection(classifier, max_draws=5000),
    )  # fmt: skip
    identities = [json.dumps(road.identity) for road in roads]
    assert len(set(identities)) == len(roads)
    assert all(json.loads(text) == road.identity for text, road in zip(identities, roads, strict=True))
    # Another classifier is another road, the same weights are not.
    assert Guided(molecule_classifier(*both.models)).identity == Guided(classifier).identity
    with torch.no_grad():
        next(classifier.parameters()).add_(1)
    assert Guided(molecule_classifier(*both.models)).identity != Guided(classifier).identity


def test_the_verdict_counts_levels(both, whole, tmp_path):
    levels = [Library(whole).about(k)["level"] for k in range(4)]
    assert all(f"{levels.count(level)} {level}" in Library(whole).verdict for level in levels)
    assert generate(both.models[0], 15, tmp_path, shard=10, rewards=["sa"], progress=False).verdict == "2 sound (2 of 2 shards)"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "at least 1, got n=0"),
        ((5,), {"shard": 0}, "shard has to be at least 1, got 0"),
        ((10**9,), {"shard": 1}, "more than 1,000,000 files"),
        ((5,), {"rewards": ["logp"]}, "no reward 'logp'"),
        ((5,), {"share": (2, 2)}, r"process 2 of 2: processes are numbered from 0 to 1"),
        ((35,), {"road": Tracked(particles=5)}, "particles=5 cannot give n=10 samples"),
        ((5,), {"batch_size": 0}, "batch_size has to be at least 1"),
    ],
)
def test_bad_input_is_refused(both, tmp_path, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        generate(both, *arguments, tmp_path / "library", **SETTINGS | options)
    assert not list(tmp_path.glob("library/part-*"))


def test_what_cannot_be_guided_is_refused(both, tmp_path):
    classifier = molecule_classifier(*both.models)
    with pytest.raises(ValueError, match="p is one model, and roads lead to compositions"):
        generate(both.models[0], 5, tmp_path, classifier, progress=False)
    with pytest.raises(ValueError, match="A classifier steers posteriors"):
        generate(both.models[0] | both.models[1], 5, tmp_path, classifier, progress=False)
    assert list(tmp_path.iterdir()) == []


# Any family -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells():
    return perfect(ENVIRONMENTS["grid-2d"](), 2)


def plane(road=None):
    p, q = (exact_model(mixture, name=name) for mixture, name in zip(three_rings(), "pq", strict=False))
    return p & q, {"steps": 4, "road": road}


FAMILIES = {
    "diffusion": lambda cells: plane(),
    "grid": lambda cells: (cells[0] & cells[1], {}),
    "one model": lambda cells: (cells[0], {}),
    "weighted": lambda cells: (cells[0] & cells[1], {"road": Tracked(particles=30, resample=False)}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_any_family_are_read_back_shard_by_shard(cells, tmp_path, family):
    import pandas

    model, options = FAMILIES[family](cells)
    library = generate(model, 25, tmp_path, shard=10, progress=False, **options)
    frame, whole = pandas.read_parquet(tmp_path), sculpt.Samples.cat(list(library))
    assert len(library) == len(frame) == len(whole) == (90 if family == "weighted" else 25)
    assert torch.equal(torch.tensor(frame[["x0", "x1"]].to_numpy()).to(whole.x), whole.x)
    tables = list(library.tables())
    weight = torch.cat([torch.tensor(table["weight"]) for table in tables])
    assert float(weight.sum()) == pytest.approx(1)
    assert sorted(set(frame["seed"])) == sorted(library.seed(k) for k in range(3))
    # The rows' weights are those of the samples put together, where there are any.
    log_w = weight.log() if whole.log_weights is None else whole.log_weights
    assert torch.allclose(weight, torch.softmax(log_w, 0), atol=1e-6)
    if library.log_z is not None:
        assert library.log_z == pytest.approx(whole.log_z, abs=1e-6)
    alone = model.sample(10, options.get("road"), steps=options.get("steps"), progress=False, generator=torch.Generator().manual_seed(library.seed(1)))  # fmt: skip
    assert torch.equal(library.samples(1).x, alone.x)


def test_images_are_in_shards_of_their_own_size(tmp_path):
    model = sculpt.Diffusion(lambda x, t: x, scheduler_of("linear"), (3, 64, 64), name="p")
    library = generate(model, 3, tmp_path, steps=2, progress=False)
    assert library.settings["shard"] == 2**27 // (4 * 3 * 64 * 64)
    (samples,) = library
    assert samples.decode().shape == (3, 3, 64, 64) and "x0" not in next(library.tables())


@pytest.mark.slow
def test_shards_weighed_by_their_z_are_right_where_each_of_them_is_not(cells, tmp_path):
    p, q = cells
    composition, graph = sculpt.product([p, q], [2, 1]), exact.dag(p)
    target = exact.target(composition.formula, [exact.terminal_distribution(model) for model in cells])
    library = generate(composition, 4_000, tmp_path, Tracked(particles=10), shard=10, progress=False)
    tables = list(library.tables())
    x = torch.cat([torch.tensor(np.stack([table["x0"], table["x1"]], 1)) for table in tables])
    row = (graph.states[:, None] == x[None].to(graph.states)).all(-1).double().argmax(0)
    found = {name: torch.zeros(len(target), dtype=torch.float64) for name in ("weighed", "alike")}
    weight = torch.cat([torch.tensor(table["weight"]) for table in tables])
    found["weighed"].index_add_(0, row, weight)
    found["alike"].index_add_(0, row, torch.full_like(weight, 1 / len(weight)))
    off = {name: exact.l1(share, target) for name, share in found.items()}
    assert off["weighed"] < 0.5 * off["alike"]


def test_a_shard_whose_samples_are_damaged_is_made_again(cells, tmp_path):
    model = cells[0] & cells[1]
    library = generate(model, 20, tmp_path, shard=10, progress=False)
    path = tmp_path / "_samples" / "00001.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert library.missing == [1]
        with pytest.raises(ValueError, match="no samples of shard 1: it is not there yet"):
            library.samples(1)
        generate(model, 20, tmp_path, shard=10, progress=False)
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"00001.safetensors is damaged. Delete it"):
        library.samples(1)
    with pytest.raises(ValueError, match="Samples have no scores to sum up"):
        library.summary()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": "many"}, "n is 'many', expected a whole number"),
        ({"n": 10**30}, "n is "),
        ({"shard": 0}, "shard is 0"),
        ({"n": 10**9, "shard": 1}, "at most 1,000,000"),
        ({"format": 1}, "format is 1, expected one of 2"),
        ({"samples": "os.system"}, "'os.system' is not a Samples of this sculpt"),
        ({"kind": None}, "kind is None"),
    ],
)
def test_a_manifest_is_checked(whole, tmp_path, change, said):
    path = tmp_path / "_manifest.json"
    path.write_text(json.dumps(json.loads((whole / "_manifest.json").read_text()) | change))
    with pytest.raises(ValueError, match=said):
        print(Library(tmp_path).missing, Library(tmp_path).summary())


# Launchers --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    [
        {"RANK": "1", "WORLD_SIZE": "3"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"},
        {"PMI_RANK": "1", "PMI_SIZE": "3"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "8"},
    ],
)
def test_launchers_say_which_process_this_is(monkeypatch, told):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert place() == (1, 3) and place((0, 2)) == (0, 2)


def test_a_batch_script_by_itself_is_one_process(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert place() == (0, 1)


def test_a_launcher_that_speaks_nonsense_is_quoted(monkeypatch):
    monkeypatch.setenv("RANK", "one")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="RANK='one' and WORLD_SIZE='3', expected whole numbers"):
        place()


@pytest.mark.parametrize(
    ("asked", "said"), [("--num_processes=4", True), ("--num-processes 4", True), ("--num_processes=1", False)]
)
def test_a_launch_that_ends_up_as_one_process_says_so(asked, said):
    # accelerate launch on a machine without GPUs starts one process, and tells it nothing but settings.
    child = "import os, subprocess, sys; os.environ['ACCELERATE_MIXED_PRECISION'] = 'no'; subprocess.run([sys.executable, '-c', 'from sculpt.launch import place; print(place())'])"
    ended = subprocess.run([sys.executable, "-c", child, "launch", *asked.split()], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.strip() == "(0, 1)"
    assert ("4 processes were asked for and this is the only one" in ended.stderr) == said


# The command ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(both, tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    for model in both.models:
        model.save_pretrained(home / str(model))
    models = [f"--model={model}={home / str(model)}" for model in both.models]
    return ["molecules", "p & q", "-n", "35", "--beta", "32", "--rewards", "sa", "--shard", "10", "--particles", "20", *models]


def test_a_folder_as_output_is_filled_with_shards(command, tmp_path, capsys):
    for output in (f"{tmp_path}/library/", str(tmp_path / "library")):  # the second time it is there, and nothing is left to do
        assert cli.main([*command, "-o", output]) == 0
        out = capsys.readouterr().out
        for text in ("4 shards, 35 samples", "(4 of 4 shards)", "≥ 0.6", "p[beta=32] ⊗ q[beta=32]", "distinct"):
            assert text in out
    assert cli.main([*command, "-o", str(tmp_path / "other"), "--shards"]) == 0
    assert contents(tmp_path / "other") == contents(tmp_path / "library")
    capsys.readouterr()
    assert cli.main([*command, "-o", str(tmp_path / "other"), "--seed", "1"]) == 2
    assert "begun with other settings: seed (seed was 0, now it is 1)" in capsys.readouterr().err


def test_an_interrupted_command_says_how_to_go_on(command, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sculpt.model.BaseModel.sample", interrupt)
    assert cli.main([*command, "-o", f"{tmp_path}/library/"]) == 130
    assert "The same command continues" in capsys.readouterr().err


def test_any_command_that_samples_fills_folders(tmp_path, capsys):
    for i in range(2):
        GFlowNet(ENVIRONMENTS["grid-2d"](), network_policy(ENVIRONMENTS["grid-2d"](), i), name=f"p{i}").save_pretrained(
            tmp_path / f"p{i}"
        )
    models = [f"--model={name}={tmp_path / folder}" for name, folder in (("a", "p0"), ("b", "p1"))]
    command = ["sample", "a & b", *models, "-n", "25", "--shard", "10", "--particles", "30"]
    for output in (f"{tmp_path}/both/", str(tmp_path / "both")):
        assert cli.main([*command, "-o", output]) == 0
        out = capsys.readouterr().out
        for text in ("p0 ⊗ p1", "(3 of 3 shards)", "log Z", "3 shards, 25 samples"):
            assert text in out
    assert len(sculpt.Samples.cat(list(Library(tmp_path / "both")))) == 25
    assert cli.main([*command, "-o", str(tmp_path / "other"), "--shards"]) == 0
    assert contents(tmp_path / "other" / "_samples") == contents(tmp_path / "both" / "_samples")
    assert cli.main([*command, "-o", str(tmp_path / "both"), "--seed", "1"]) == 2


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_whole_shards_only(command, tmp_path):
    command = [sys.executable, "-m", "sculpt", *command, "-n", "400", "-o"]
    process = subprocess.Popen([*command, f"{tmp_path}/killed/"], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.time() + 300
    while len(list(tmp_path.glob("killed/part-*"))) < 3 and process.poll() is None and time.time() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(Library(tmp_path / "killed").missing) < 40
    for output in ("killed", "through"):
        subprocess.run([*command, f"{tmp_path}/{output}/"], cwd=ROOT, capture_output=True, check=True)
    parts = [{name: text for name, text in contents(tmp_path / o).items() if name[0] != "."} for o in ("killed", "through")]
    assert parts[0] == parts[1] and len(parts[0]) == 41


def test_the_manifest_is_there_for_people_too(whole):
    manifest = json.loads((whole / "_manifest.json").read_text())
    assert manifest["formula"] == "p ⊗ q" and [name for name, _ in manifest["models"]] == ["p", "q"]
    assert (manifest["n"], manifest["shard"], manifest["seed"]) == (35, 10, 0)
    assert sculpt.generate is generate
