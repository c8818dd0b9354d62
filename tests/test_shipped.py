"""Shipped checkpoints by name: what is found is what was shipped, or it is refused, and nothing is half there."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

import sculpt
from sculpt import shipped
from sculpt.apps import cli
from sculpt.shipped import Missing, find, folder_of, shelf

PRETRAINED = Path(__file__).parents[1] / "pretrained"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The package without a repository around it, with an empty cache."""
    monkeypatch.setattr(shipped, "CLONE", tmp_path / "nowhere")
    monkeypatch.setenv("SCULPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pretrained"


@pytest.fixture
def hub(elsewhere, monkeypatch):
    """A Hub that has what is asked of it, and what was asked."""
    asked = []

    def snapshot_download(repository, *, local_dir, allow_patterns):
        asked.append(repository)
        for name in allow_patterns:
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PRETRAINED / folder_of(repository) / name, local_dir / name)
        (local_dir / ".cache").mkdir()
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_the_manifest_is_what_is_shipped():
    """``python pretrained/manifest.py`` writes it anew."""
    assert json.loads(shipped.MANIFEST.read_text()) == shipped.described(PRETRAINED)


def test_every_folder_of_models_has_a_name():
    folders = {path.parent for name in ("config.json", "model_index.json") for path in PRETRAINED.glob(f"*/*/{name}")}
    named = {shipped.CLONE / folder_of(f"sculpt/{path.parent.name}-{path.name}") for path in folders if not path.is_symlink()}
    assert named == {path for path in folders if not path.is_symlink()} and len(named) >= 25


def test_a_name_is_the_folder_of_the_repository():
    loaded, same = sculpt.load("sculpt/grid-circle1"), sculpt.load(PRETRAINED / "grid" / "circle1")
    assert (loaded.key, loaded.name) == (same.key, same.name)
    assert sculpt.load("sculpt/digits-red-green", dtype=torch.bfloat16).name == "red-green"
    assert folder_of("owner/name") is None


def test_a_name_that_is_none_gets_near_ones():
    with pytest.raises(ValueError, match="No shipped checkpoint is called 'sculpt/digit-cyan'. There is sculpt/digits-cyan"):
        sculpt.load("sculpt/digit-cyan")


def test_away_from_the_repository_it_is_fetched_once_and_the_cache_is_a_shelf(hub, elsewhere):
    assert sculpt.load("sculpt/grid-circle1").key == sculpt.load(PRETRAINED / "grid" / "circle1").key
    assert find("sculpt/grid-circle1") == elsewhere / "grid" / "circle1"
    assert hub == ["sculpt/grid-circle1"]
    assert not (elsewhere / "grid" / "circle1" / ".cache").exists()
    assert shelf("grid") == elsewhere / "grid" and len(hub) == 7
    assert sculpt.load("sculpt/grid-pair").names == ("symmetric_shubert", "diag_sigmoid")


def test_what_the_hub_has_otherwise_is_not_kept(hub, elsewhere, monkeypatch):
    right = huggingface_hub.snapshot_download

    def tampered(repository, *, local_dir, allow_patterns):
        right(repository, local_dir=local_dir, allow_patterns=allow_patterns)
        content = bytearray((local_dir / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (local_dir / "model.safetensors").write_bytes(content)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", tampered)
    with pytest.raises(ValueError, match="not what this sculpt was shipped with, and was not kept: model.safetensors"):
        find("sculpt/grid-circle1")
    assert not (elsewhere / "grid" / "circle1").exists()


def test_a_damaged_copy_is_fetched_again(hub, elsewhere):
    weights = find("sculpt/grid-circle1") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    find("sculpt/grid-circle1")
    assert weights.read_bytes() == whole and len(hub) == 2
    weights.unlink()
    find("sculpt/grid-circle1")
    assert weights.read_bytes() == whole and len(hub) == 3


def test_a_fetch_that_is_stopped_leaves_nothing_that_is_taken_for_a_checkpoint(hub, elsewhere, monkeypatch):
    right = huggingface_hub.snapshot_download

    def stopped(repository, *, local_dir, allow_patterns):
        right(repository, local_dir=local_dir, allow_patterns=allow_patterns[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stopped)
    with pytest.raises(KeyboardInterrupt):
        find("sculpt/grid-circle1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", right)
    assert sculpt.load("sculpt/grid-circle1").key == sculpt.load(PRETRAINED / "grid" / "circle1").key


def test_offline_it_says_where_it_can_be_had(elsewhere):
    with pytest.raises(Missing, match=r"sculpt/grid-circle1 is not here: .* cannot be reached .* put it at .*grid.circle1"):
        sculpt.load("sculpt/grid-circle1")


def test_a_folder_of_the_repository_that_was_changed_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "CLONE", tmp_path)
    shutil.copytree(PRETRAINED / "grid" / "circle1", tmp_path / "grid" / "circle1")
    find("sculpt/grid-circle1")
    (tmp_path / "grid" / "circle1" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json is missing or differs. .* pretrained/manifest.py"):
        find("sculpt/grid-circle1")


def test_the_command_finds_molecules_away_from_the_repository(hub, elsewhere, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sculpt.apps.cli.molecules.CLONE", tmp_path / "nowhere")
    options = ["--beta", "32", "-n", "4", "--rewards", "qed", "-o", str(tmp_path / "x.csv")]
    assert cli.main(["molecules", "seh", *options]) == 0
    assert (tmp_path / "x.csv").exists() and len(hub) == 4  # the folders of smiles


def test_the_demo_leaves_out_what_cannot_be_had(elsewhere, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sculpt.apps.demos.common.PRETRAINED", tmp_path / "nowhere")
    monkeypatch.setattr("sculpt.apps.cli.demo.PARTS", ("molecules",))
    assert cli.main(["demo", "-o", str(tmp_path)]) == 0
    assert "molecules is left out: sculpt/molecules-qed is not here" in capsys.readouterr().out
    assert cli.main(["demo", "molecules", "-o", str(tmp_path)]) == 2
