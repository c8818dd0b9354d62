"""Spoiled pipelines, states of trainings and results are refused with a sentence, at once and in little memory."""

import json
import math
import os
import re
import shutil
import struct

import mutated_diffusers
import mutated_training
import pytest
import torch
from checkpoints import save_pipeline
from mutations import MEGABYTES, SECONDS, run, summary, watch
from safetensors.torch import load_file, save, save_file

import sculpt
from sculpt.training import read_state

KINDS = {"diffusers": 60, "training": 200, "results": 500}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_wrong_with_a_file_it_is_read_or_says_so(kind):
    cases = run(kind, range(KINDS[kind]))
    assert not [case for case in cases if case.is_bad], summary(cases)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_wrong_with_many_files_they_are_read_or_say_so(kind):
    cases = run(kind, range(10**6, 10**6 + 4000), workers=2)
    assert not [case for case in cases if case.is_bad], summary(cases)


def refused(folder, load=mutated_diffusers.load):
    """The error, which came soon and took no memory."""
    case = watch(lambda: load(folder))
    assert case.outcome == "clear", case
    assert case.seconds < SECONDS and case.megabytes < MEGABYTES, case
    return case.what


# Pipelines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Pipelines to copy."""
    made = {}

    def copied(name, folder):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            mutated_diffusers.FOLDERS[name](made[name])
        return shutil.copytree(made[name], folder / name)

    return copied


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


HUGE = [
    ("pipeline", "unet", {"layers_per_block": 10**5}),
    ("pipeline", "unet", {"layers_per_block": 2**18}),
    ("pipeline", "unet", {"block_out_channels": [8, 8 * 10**5]}),
    ("pipeline", "unet", {"block_out_channels": [8] * 10**5}),
    ("pipeline", "unet", {"down_block_types": ["DownBlock2D"] * 1000, "block_out_channels": [8] * 1000}),
    ("pipeline", "unet", {"sample_size": 10**9}),
    ("pipeline", "unet", {"sample_size": [10**5, 10**5]}),
    ("pipeline", "unet", {"sample_size": 0}),
    ("pipeline", "unet", {"attention_head_dim": 0, "down_block_types": ["AttnDownBlock2D"] * 2}),
    ("pipeline", "unet", {"num_class_embeds": 2**18}),
    ("pipeline", "unet", {"downsample_padding": -1}),
    ("pipeline", "unet", {"norm_eps": "x"}),
    ("pipeline", "unet", {"act_fn": [["silu"]]}),
    ("pipeline", "unet", {"act_fn": "s" * 10**6}),
    ("pipeline", "unet", {"x": [[[[[[[[1]]]]]]]]}),
    ("pipeline", "unet", {"x": [0] * 10**6}),
    ("pipeline", "unet", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ("latents", "transformer", {"sample_size": 2**13}),
    ("latents", "transformer", {"num_embeds_ada_norm": 2**18}),
    ("latents", "vae", {"latent_channels": 2**18}),
    ("three", "transformer", {"pos_embed_max_size": 10**4}),
    ("prompted", "text_encoder", {"vocab_size": 2**18}),
    ("prompted", "text_encoder", {"num_hidden_layers": 2**18}),
    ("prompted", "text_encoder", {"hidden_size": 10**9}),
    ("three", "text_encoder_3", {"d_model": 2**18}),
    ("prompted", "tokenizer", {"model_max_length": 10**9}),
    ("prompted", "tokenizer", {"init_inputs": ["/etc/passwd"]}),
    ("pipeline", "scheduler", {"num_train_timesteps": 10**9}),
    ("pipeline", "scheduler", {"num_train_timesteps": 1}),
    ("pipeline", "scheduler", {"trained_betas": [0.1] * 10**5}),
    ("pipeline", "scheduler", {"trained_betas": []}),
    ("pipeline", "scheduler", {"beta_start": math.nan}),
    ("EDM", "scheduler", {"sigma_max": math.inf}),
    ("EDM", "scheduler", {"sigma_min": 0}),
    ("EDM", "scheduler", {"sigma_min": 90}),
    ("betas", "scheduler", {"solver_order": 10**9}),
]


@pytest.mark.parametrize(("name", "part", "entries"), HUGE, ids=lambda value: str(value)[:40])
def test_settings_that_do_not_fit_the_weights_are_refused_before_anything_is_built(whole, tmp_path, name, part, entries):
    folder = whole(name, tmp_path)
    file = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(part, "config.json")
    edit(folder / part / file, **entries)
    assert part in refused(folder) or "samples of shape" in refused(folder)


def test_padding_that_would_end_the_process_is_refused(whole, tmp_path):
    path = whole("prompted", tmp_path) / "tokenizer" / "tokenizer.json"
    edit(path, padding={"strategy": {"Fixed": 10**12}, "pad_id": 0})
    assert "tokenizer.json: padding is" in refused(path.parents[1])


@pytest.mark.parametrize(
    "entries",
    [
        {"unet": ["diffusers"]},
        {"unet": ["diffusers", 3]},
        {"unet": 3},
        {"scheduler": ["diffusers", None]},
        {"_class_name": 3},
        {"_class_name": None},
        {"text_encoder": ["transformers", "AutoModel"]},
        {"tokenizer": ["transformers", "AutoTokenizer"]},
    ],
)
def test_an_index_of_parts_names_a_library_and_a_class_of_each(whole, tmp_path, entries):
    folder = whole("prompted", tmp_path)
    edit(folder / "model_index.json", **entries)
    refused(folder)


@pytest.mark.parametrize("architectures", [3, "x", [3], [None, ["a"]], {"a": 1}, []])
def test_another_kind_of_checkpoint_is_refused_whatever_it_calls_itself(tmp_path, architectures):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    assert "which sculpt does not compose" in refused(tmp_path)


@pytest.mark.parametrize(
    "file", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "model_index.json"]
)
def test_a_pipe_a_folder_and_an_endless_file_in_a_pipeline_are_not_waited_for(whole, tmp_path, file):
    path = whole("prompted", tmp_path) / file
    path.unlink(missing_ok=True)
    for put in (os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path.name, path)):
        put(path)
        refused(path.parents[len(file.split("/")) - 1])
        path.unlink()


def test_a_copy_of_the_hub_is_links_to_files_elsewhere(tmp_path):
    folder = save_pipeline(tmp_path / "whole")
    for i, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        path.rename(tmp_path / "blobs" / str(i))
        path.symlink_to(tmp_path / "blobs" / str(i))
    assert sculpt.load(folder).key == sculpt.load(save_pipeline(tmp_path / "again")).key


def test_a_pipeline_whose_saving_was_stopped_is_finished_by_who_loads_it(tmp_path):
    old, new = save_pipeline(tmp_path / "p"), save_pipeline(tmp_path / "new", seed=1)
    key = sculpt.load(new).key
    new.rename(old / ".saved")
    assert sculpt.load(old).key == key and not (old / ".saved").exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", 3, None, "x.safetensors"])
def test_shards_are_files_of_the_folder(whole, tmp_path, name):
    path = whole("shards", tmp_path) / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    names = json.loads(path.read_text())["weight_map"]
    edit(path, weight_map=names | {next(iter(names)): name})
    refused(path.parents[1])


def test_weights_that_claim_more_than_the_file_has_are_refused(whole, tmp_path):
    path = next((whole("pipeline", tmp_path) / "unet").glob("*.safetensors"))
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    assert "truncated or damaged" in refused(path.parents[1])


@pytest.mark.parametrize("change", [lambda x: x.int(), lambda x: x.to(torch.complex64), lambda x: x[..., None]])
def test_weights_of_another_kind_or_shape_are_refused(whole, tmp_path, change):
    path = next((whole("pipeline", tmp_path) / "unet").glob("*.safetensors"))
    weights = load_file(path)
    save_file(weights | {"conv_in.weight": change(weights["conv_in.weight"])}, path)
    assert "do not fit the UNet2DModel that its config.json describes: conv_in.weight is" in refused(path.parents[1])


def test_a_network_of_several_precisions_gets_one(whole, tmp_path):
    path = next((whole("pipeline", tmp_path) / "unet").glob("*.safetensors"))
    weights = load_file(path)
    save_file(weights | {"conv_out.weight": weights["conv_out.weight"].bfloat16()}, path)
    model = sculpt.load(path.parents[1])
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}


# States of trainings


@pytest.fixture
def state(tmp_path):
    mutated_training.FOLDERS["AdamW"](tmp_path)
    return tmp_path


def rewritten(folder, change):
    note, tensors = {}, load_file(folder / "state.safetensors")
    content = (folder / "state.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    note = json.loads(header["__metadata__"]["training"])
    change(note, tensors)
    (folder / "state.safetensors").write_bytes(save(tensors, {"training": json.dumps(note)}))


def drop(name):
    def change(note, tensors):
        del tensors[name]
        note["tensors"] = len(tensors)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda note, tensors: note.update(identity=3), "identity is 3, expected an object"),
        (lambda note, tensors: note.update(step=1.5), "step is 1.5, expected a whole number"),
        (lambda note, tensors: note.update(step=-1), "step is -1"),
        (lambda note, tensors: note.update(seconds="x"), "seconds is 'x', expected a number"),
        (lambda note, tensors: note.update(seconds=math.nan), "seconds is nan"),
        (lambda note, tensors: note.update(curve={}), "curve is an object of 0 entries, expected a list"),
        (lambda note, tensors: note.update(curve=[3]), "curve is a list of 1 entries, expected a list of objects"),
        (lambda note, tensors: note.update(curve=[{"a": "x"}]), "row 0 of the curve: a is 'x', expected a number"),
        (lambda note, tensors: note.update(curve=[{"a": 10**300}]), "expected a number"),
        (lambda note, tensors: tensors.update(x=torch.zeros(1)), "tensors is 44, expected 45, which are there"),
        (lambda note, tensors: tensors.pop("optimizer.0/exp_avg"), "tensors is 44, expected 43, which are there"),
        (drop("optimizer.0/exp_avg"), "optimizer.0 has .*expected .*exp_avg"),
        (drop("network/0.weight"), "the network of this training: network/0.weight is missing"),
        (drop("average/0.weight"), "the average of this training: average/0.weight is missing"),
        (drop("seen/steps"), "does not fit this training: KeyError: 'steps'"),
        (lambda note, tensors: tensors.update({"optimizer.0/exp_avg": torch.zeros(4, 2)}), r"optimizer.0 has .*\(4, 2\).*expected .*\(4, 3\)"),
        (lambda note, tensors: tensors.update({"optimizer.0/step": torch.tensor(-1.0)}), "counts steps that are no number"),
        (lambda note, tensors: tensors.update({"optimizer.0/step": torch.tensor(1).to(torch.float8_e5m2)}), "torch.float8_e5m2, expected real"),
        (lambda note, tensors: tensors.update({"network/0.bias": torch.full((4,), math.nan)}), "network/0.bias holds numbers that are not finite"),
        (lambda note, tensors: tensors.update({"network/0.bias": torch.zeros(4, dtype=torch.int32)}), "holds torch.int32, expected torch.float32"),
    ],
)  # fmt: skip
def test_a_state_is_believed_entry_by_entry(state, change, said):
    rewritten(state, change)
    assert re.search(said, refused(state, mutated_training.Loop))


def test_a_state_of_another_optimiser_is_refused_before_it_is_read(state):
    assert "optimizer.0 has" in refused(state, lambda folder: mutated_training.Loop(folder, torch.optim.SGD))


def test_a_state_that_an_older_sculpt_wrote_has_no_count_of_its_tensors(state):
    rewritten(state, lambda note, tensors: note.pop("tensors"))
    assert mutated_training.Loop(state).training.step == 2


def test_what_a_killed_process_was_about_to_write_is_gone_once_the_training_goes_on(state):
    debris = state / f".state.safetensors.{sculpt.files._HOST}.0123456789ab.part"
    debris.write_bytes(b"x" * 100)
    mutated_training.Loop(state)
    assert not debris.exists() and read_state(state)[0]["step"] == 2


def test_a_curve_that_lacks_what_a_classifier_is_chosen_by_is_refused(tmp_path):
    mutated_training.FOLDERS["fit"](tmp_path)
    rewritten(tmp_path / "training", lambda note, tensors: [row.pop("held_out_joint") for row in note["curve"]])
    assert "a row of the training curve lacks held_out_joint" in refused(tmp_path, mutated_training.load)


TYPES = (torch.complex64, torch.float8_e4m3fn)
CHANGES = [lambda x: x[:5], lambda x: x[:, :1], lambda x: x * math.nan, *(lambda x, to=to: x.to(to) for to in TYPES)]


@pytest.mark.parametrize("change", CHANGES)
def test_samples_that_were_drawn_before_are_those_of_the_training(tmp_path, change):
    mutated_training.FOLDERS["fit"](tmp_path)
    (tmp_path / "training" / "state.safetensors").unlink()
    path = next((tmp_path / "training").glob("samples-*"))
    save_file({"x": change(load_file(path)["x"]).contiguous()}, path)
    assert path.name in refused(tmp_path, mutated_training.load)
