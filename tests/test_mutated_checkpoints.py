"""Spoiled checkpoints are refused with a sentence, at once and in little memory, whatever their numbers say."""

import hashlib
import json
import math
import os
import sys

import mutated_classifier
import mutated_gflownet
import pytest
import torch
from mutations import MEGABYTES, SECONDS, run, summary, watch
from safetensors.torch import load_file, save_file

import sculpt
from sculpt.actions.networks import GridNetwork
from sculpt.classifier.heads import Classifier, SetHead
from sculpt.gflownet.model import GFlowNet

KINDS = ["gflownet", "classifier"]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_wrong_with_a_checkpoint_it_loads_or_says_so(kind):
    cases = run(kind, range(150))
    assert not [case for case in cases if case.is_bad], summary(cases)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_wrong_with_many_checkpoints_they_load_or_say_so(kind):
    cases = run(kind, range(10**6, 10**6 + 4000), workers=2)
    assert not [case for case in cases if case.is_bad], summary(cases)


# The worst that a trial found


@pytest.fixture
def make(tmp_path):
    """A whole tiny checkpoint."""

    def make(kind, name):
        kinds = {"gflownet": mutated_gflownet, "classifier": mutated_classifier}
        kinds[kind].FOLDERS[name](tmp_path)
        return tmp_path

    return make


def change(folder, path, value):
    """Another value in config.json at ``"a.b.c"``."""
    config = json.loads((folder / "config.json").read_text())
    *parents, last = path.split(".")
    place = config
    for name in parents:
        place = place[name]
    place[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, load=sculpt.load):
    """The error, which came soon and took no memory."""
    case = watch(lambda: load(folder))
    assert case.outcome == "clear", case
    assert case.seconds < SECONDS and case.megabytes < MEGABYTES, case
    return case.what


CLASSES = [
    "sculpt.cli.__main__.x",
    "sculpt.apps.cli.__main__.x",
    "sculpt.__main__:x",
    "os.system",
    "builtins:eval",
    "torch.nn.Linear",
]


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_is_in_no_table_is_not_imported(make, name):
    modules = set(sys.modules)
    folder = make("classifier", "grid")
    change(folder, "network.class", name)
    assert "network" in refused(folder)
    folder = make("gflownet", "one-hot")
    change(folder, "policy.class", name)
    assert "policy=" in refused(folder, lambda folder: GFlowNet.from_pretrained(folder))
    change(folder, "environment.name", name)
    refused(folder)
    assert not [module for module in set(sys.modules) - modules if "__main__" in module]


HUGE = [
    ("grid", "network.config.width", 40_000),
    ("grid", "network.config.depth", 10**6),
    ("grid", "network.config.depth", 2**31 - 1),
    ("grid", "network.config.ndim", 10**5),
    ("grid", "observations", 10**9),
    ("grid", "observations", 170),
    ("grid", "children", 10**9),
    ("vector", "network.config.depth", 10**9),
    ("vector", "network.config.d", 10**9),
    ("image", "network.config.channels", [8] * 1000),
    ("image", "network.config.channels", [8, 8 * 10**6]),
    ("encoder", "network.config.unet.layers_per_block", 10**5),
    ("encoder", "network.config.unet.layers_per_block", 10**4),
    ("encoder", "network.config.unet.block_out_channels", [8, 8000]),
    ("encoder", "network.config.unet.num_class_embeds", 10**9),
    ("encoder", "network.config.unet.attention_head_dim", 10**9),
    ("encoder", "network.config.scheduler.num_train_timesteps", 10**9),
    ("encoder", "network.config.scheduler.trained_betas", [0.1] * 10**5),
    ("fragments", "network.config.slots", 10**9),
    ("fragments", "network.config.vocabulary", [["C", [0]]] * 20_000),
    ("fragments", "network.config.vocabulary", [["*", [0] * 16]]),
    ("fragments", "network.config.vocabulary", [["C" * 150, [*range(16)]]] * 900),
]


@pytest.mark.parametrize(("name", "path", "value"), HUGE)
def test_a_classifier_of_huge_numbers_is_refused_before_it_is_built(make, name, path, value):
    folder = make("classifier", name)
    change(folder, path, value)
    refused(folder)


def test_400_keys_and_4_observations_are_compared_with_the_header(make):
    folder = make("classifier", "grid")
    change(folder, "keys", [f"{i:064x}" for i in range(400)])
    change(folder, "names", [f"p{i}" for i in range(400)])
    change(folder, "observations", 4)
    assert "expected 4,298,720,000 for 400 keys" in refused(folder)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("HyperGrid", {"ndim": 10**5, "height": 4}),
        ("HyperGrid", {"ndim": 2048, "height": 2**31 - 1}),
        ("BitSequence", {"word_size": 30, "seq_size": 60, "n_modes": 2}),
        ("BitSequence", {"word_size": 4, "seq_size": 40, "n_modes": 10**9}),
        ("BitSequence", {"word_size": 8, "seq_size": 40, "n_modes": 1024}),
        ("BitSequence", {"word_size": 7, "seq_size": 40, "n_modes": 2}),
        ("NonAutoregressiveBitSequence", {"word_size": 8, "seq_size": 256, "n_modes": 1024}),
        ("SetAddition", {"n_items": 10**9, "max_items": 3, "fixed_length": True}),
        ("SetAddition", {"n_items": 2048, "max_items": 10**9, "fixed_length": True}),
        ("PerfectBinaryTree", {"depth": 10**6}),
        ("PerfectBinaryTree", {"depth": 13}),
        ("DiscreteEBM", {"ndim": 10**5}),
        ("DiscreteEBM", {"ndim": 1024}),
    ],
)
def test_an_environment_of_huge_numbers_is_refused_soon(make, name, arguments):
    folder = make("gflownet", "one-hot")
    change(folder, "environment.name", f"gfn.gym:{name}")
    change(folder, "environment.arguments", arguments)
    refused(folder)


@pytest.mark.parametrize("ndim", [40, 4000, 2**31 - 1])
def test_a_table_of_too_many_states_is_refused(make, ndim):
    folder = make("gflownet", "table")
    change(folder, "policy.arguments.ndim", ndim)
    refused(folder)


@pytest.mark.parametrize(
    ("entry", "value"), [("name", 3), ("name", ["mine"]), ("name", "x" * 10**6), ("condition", ["a", "a"]), ("policy", 3)]
)
def test_entries_of_the_wrong_kind_are_named(make, entry, value):
    folder = make("gflownet", "one-hot")
    change(folder, entry, value)
    assert f"config.json: {entry} is" in refused(folder, lambda folder: GFlowNet.from_pretrained(folder))


def test_a_vocabulary_is_a_list_and_no_file_to_read(make):
    folder = make("gflownet", "trees")
    change(folder, "environment.arguments.vocabulary", "/etc/passwd")
    assert "vocabulary is '/etc/passwd', expected a list" in refused(folder, lambda folder: sculpt.load(folder, beta=1))


def test_label_sets_that_nobody_can_list_are_refused():
    with pytest.raises(ValueError, match="30 observations of 20 models have too many sets of labels: .* Condition on fewer"):
        SetHead(8, 20, 30)


def test_a_grids_network_reads_states_of_its_grid_only():
    with pytest.raises(ValueError, match="reads states of 1 coordinates, got 2"):
        GridNetwork(1, 16, 3, encoding="table")(torch.zeros(1, 2, dtype=torch.long))


# Files that are none, or hold other tensors


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_a_folder_and_an_endless_file_are_not_waited_for(make, kind, name):
    folder = make(kind, {"gflownet": "one-hot", "classifier": "grid"}[kind])
    (folder / name).unlink()
    for put in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        put(folder / name)
        refused(folder, {"gflownet": GFlowNet, "classifier": Classifier}[kind].from_pretrained)
        (folder / name).rmdir() if put is os.mkdir else (folder / name).unlink()


def test_a_terabyte_of_nothing_is_not_read(make):
    folder = make("classifier", "grid")
    os.truncate(folder / "model.safetensors", 2**40)
    assert "truncated or damaged" in refused(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["another name", "another kind", "nan", "infinity"])
def test_tensors_that_do_not_belong_there_are_named(make, kind, how):
    folder = make(kind, {"gflownet": "both", "classifier": "grid"}[kind])
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    if how == "another name":
        weights["stranger"] = torch.zeros(3)
    elif how == "another kind":
        weights[name] = weights[name].view(torch.int32)
    else:
        weights[name].view(-1)[1] = {"nan": math.nan, "infinity": math.inf}[how]
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    assert ("stranger" if how == "another name" else name) in refused(folder)


def test_a_network_that_fits_the_weights_but_not_the_environment_is_refused(make):
    folder = make("gflownet", "one-hot")
    change(folder, "policy.arguments.ndim", 4)
    change(folder, "policy.arguments.height", 2)
    assert "GridNetwork that does not fit HyperGrid(ndim=2, height=4)" in refused(folder)
