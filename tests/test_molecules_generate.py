"""Folders of shards: what is in them does not depend on kills, on processes, or on how often one starts over."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from molecule_models import molecule_classifier, molecule_model

import sculpt
from sculpt.apps import cli
from sculpt.molecules import Library, generate
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
    assert list(frame.columns) == ["smiles", "count", "sa"]
    assert sorted(contents(whole)) == ["_manifest.json", *(f"part-{k:05}.parquet" for k in range(4))]
    assert int(frame["count"].sum()) == len(library) == 35
    assert [int(table["count"].sum()) for table in library.tables()] == [10, 10, 10, 5]
    assert library.missing == []
    summary = library.summary()
    assert summary.distinct == frame["smiles"].nunique() and summary.n == 35
    assert summary.means["sa"] == pytest.approx(float((frame["sa"] * frame["count"]).sum() / 35))
    assert "(4 of 4 shards)" in library.verdict
    assert "35 of 35 molecules of p ⊗ q" in repr(library)


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
        ({"rewards": ["qed"]}, "rewards"),
        ({"rewards": {"sa": lambda molecules: [0.5] * len(molecules)}}, "rewards"),
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
        ((0,), {}, "n=0 and shard=10: both have to be at least 1"),
        ((5,), {"shard": 0}, "shard=0"),
        ((5,), {"rewards": ["logp"]}, "no reward 'logp'"),
        ((5,), {"share": (2, 2)}, r"process 2 of 2: processes are numbered from 0 to 1"),
        ((5,), {"road": Tracked(resample=False)}, "resample=False: shards hold equally weighted molecules"),
        ((35,), {"road": Tracked(particles=5)}, "particles=5 cannot give n=10 samples"),
        ((5,), {"batch_size": 0}, "batch_size has to be at least 1"),
    ],
)
def test_bad_input_is_refused(both, tmp_path, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        generate(both, *arguments, tmp_path / "library", **SETTINGS | options)
    assert not list(tmp_path.glob("library/part-*"))


def test_what_makes_no_molecules_or_cannot_be_guided_is_refused(both, tmp_path):
    from gflownet_models import ENVIRONMENTS, perfect

    with pytest.raises(ValueError, match="p0 makes no molecules"):
        generate(perfect(ENVIRONMENTS["grid-2d"](), 1)[0], 5, tmp_path, **SETTINGS)
    classifier = molecule_classifier(*both.models)
    with pytest.raises(ValueError, match="p is one model, and roads lead to compositions"):
        generate(both.models[0], 5, tmp_path, classifier, progress=False)
    with pytest.raises(ValueError, match="A classifier steers posteriors"):
        generate(both.models[0] | both.models[1], 5, tmp_path, classifier, progress=False)
    assert list(tmp_path.iterdir()) == []


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
        for text in ("4 shards, 35 molecules", "(4 of 4 shards)", "≥ 0.6", "p[beta=32] ⊗ q[beta=32]", "distinct"):
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
    assert sculpt.molecules.generate is generate
