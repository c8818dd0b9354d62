"""sculpt.load: what a folder holds decides what it becomes, and nothing in it is executed."""

import inspect
import json
import math
import shutil

import pytest
import torch
from checkpoints import save_parts, save_pipeline, tiny_unet
from diffusers import DDPMScheduler

import sculpt
from sculpt.entries import Entries
from sculpt.settings import check_settings


@pytest.fixture
def pipeline(tmp_path):
    return save_pipeline(tmp_path / "digits")


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_pipeline_folder_and_its_parts_are_the_model_that_was_saved(tmp_path, pipeline):
    model = sculpt.Diffusion(tiny_unet(), DDPMScheduler())
    parts = sculpt.load(save_parts(tmp_path / "parts"))
    loaded = sculpt.load(pipeline)
    assert loaded.key == parts.key == model.key
    assert (loaded.name, parts.name) == ("digits", "parts")
    z = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded.denoise(z, 1.0), model.denoise(z, 1.0))
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training


def test_a_name_shape_and_dtype_are_passed_on(pipeline):
    model = sculpt.load(pipeline, name="seven", shape=(1, 16, 16), dtype=torch.bfloat16)
    assert (model.name, model.shape, model.dtype) == ("seven", (1, 16, 16), torch.bfloat16)


def test_half_precision_files_and_variants_are_read(tmp_path):
    folder = save_parts(tmp_path / "half")
    shutil.rmtree(folder / "unet")
    tiny_unet().half().save_pretrained(folder / "unet", variant="fp16")
    assert sculpt.load(folder).dtype == torch.float32
    assert sculpt.load(folder, dtype=torch.float16).dtype == torch.float16


def test_a_classifier_folder_is_a_classifier(tmp_path):
    from sculpt.diffusion.backbones import VectorNetwork

    sculpt.Classifier(VectorNetwork(2, width=8), ["a", "b"]).save_pretrained(tmp_path / "c")
    loaded = sculpt.load(tmp_path / "c")
    assert isinstance(loaded, sculpt.Classifier)
    assert loaded.keys == ("a", "b")
    with pytest.raises(ValueError, match="takes no condition; got prompt"):
        sculpt.load(tmp_path / "c", prompt="a cat")


def test_a_gflownet_folder_is_a_gflownet(tmp_path):
    from gfn.gym import HyperGrid

    from sculpt.actions.networks import GridNetwork
    from sculpt.gflownet.estimators import NetworkPolicy

    env = HyperGrid(ndim=2, height=4, validate_modes=False)
    network = GridNetwork(ndim=2, height=4, outputs=env.n_actions, width=8, depth=1)
    model = sculpt.GFlowNet(env, NetworkPolicy(network, env.n_actions), name="grid")
    model.save_pretrained(tmp_path / "g")
    assert sculpt.load(tmp_path / "g").key == model.key


def test_a_text_to_image_pipeline_takes_a_prompt(tmp_path):
    from diffusers import StableDiffusionPipeline
    from test_diffusion_model import clip, conditional_unet, tiny_autoencoder

    tokenizer, encoder = clip(tmp_path)
    scheduler = DDPMScheduler(steps_offset=1, clip_sample=False)
    parts = {
        "vae": tiny_autoencoder(),
        "unet": conditional_unet(),
        "scheduler": scheduler,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
    }
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "sd")
    # As published checkpoints have it: a checker that is neither read nor needed.
    edit(tmp_path / "sd" / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    cat, dog = (sculpt.load(tmp_path / "sd", prompt=prompt) for prompt in ("cat", "dog"))
    assert (cat.name, dog.name) == ("cat", "dog")
    assert cat.key == sculpt.Diffusion.from_pipeline(pipe, "cat").key != dog.key
    assert sculpt.load(tmp_path / "sd").name == "sd"
    cat.check_composable(dog)


def test_a_pipeline_of_three_text_encoders_is_the_model_that_was_saved(tmp_path):
    import diffusers
    import mutated_diffusers

    mutated_diffusers.three(tmp_path / "three")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "three")
    assert sculpt.load(tmp_path / "three", prompt="cat").key == sculpt.Diffusion.from_pipeline(pipe, "cat").key


def test_a_network_is_asked_once_whether_it_takes_what_it_is_called_with(tmp_path, monkeypatch):
    classes = save_parts(tmp_path / "classes", num_class_embeds=3)
    assert (
        not sculpt.load(classes).condition
        and sculpt.load(classes, class_label=2).denoise(torch.zeros(1, 1, 8, 8), 1.0).isfinite().all()
    )
    edit(save_parts(tmp_path / "odd") / "unet" / "config.json", downsample_padding=3)
    for small in (2**32, 0):  # with its numbers and without them
        monkeypatch.setattr("sculpt.diffusion.diffusers.direct.SMALL", small)
        with pytest.raises(
            ValueError, match=r"odd cannot be called on samples of shape \(1, 8, 8\): RuntimeError: Sizes of tensors"
        ):
            sculpt.load(tmp_path / "odd")
        sculpt.load(save_parts(tmp_path / f"parts-{small}"))


def test_text_encoders_of_older_versions_and_half_precision_are_read(tmp_path):
    """Older ones name the part in each tensor, keep the numbers of the positions, and say their precision in the config."""
    import mutated_diffusers
    from safetensors.torch import load_file, save_file

    mutated_diffusers.prompted(tmp_path)
    model = sculpt.load(tmp_path, prompt="cat")
    path = tmp_path / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name}": value for name, value in load_file(path).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(old, path, {"format": "pt"})
    edit(path.parent / "config.json", dtype=None, torch_dtype="float32", dropout=0.0, model_type="clip_text_model")
    assert sculpt.load(tmp_path, prompt="cat").key == model.key
    path.unlink()
    half = {name: value.half() if value.is_floating_point() else value for name, value in old.items()}
    save_file(half, path.with_name("model.fp16.safetensors"), {"format": "pt"})
    for precision in ("float32", "float16"):
        edit(path.parent / "config.json", torch_dtype=precision)
        condition = sculpt.load(tmp_path, prompt="cat").condition["encoder_hidden_states"]
        assert condition.dtype == torch.float32
        torch.testing.assert_close(condition, model.condition["encoder_hidden_states"], rtol=1e-2, atol=1e-2)


UNET = {"sample_size": 128, "in_channels": 4, "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10]}
PUBLISHED = {
    "UNet2DConditionModel": UNET
    | {"upcast_attention": None, "mid_block_only_cross_attention": None, "cross_attention_norm": None},
    "UNet2DModel": {"attention_head_dim": None, "mid_block_scale_factor": 1, "downsample_padding": 0, "norm_num_groups": 32},
    "AutoencoderKL": {"scaling_factor": 0.13025, "force_upcast": True, "latents_mean": None, "_name_or_path": "../sdxl-vae/"},
    "SD3Transformer2DModel": {"pos_embed_max_size": 192, "dual_attention_layers": [0, 1, 2], "qk_norm": "rms_norm"},
    "PNDMScheduler": {"trained_betas": None, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False},
    "DPMSolverMultistepScheduler": {"lambda_min_clipped": -math.inf, "variance_type": None, "use_karras_sigmas": 0},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3, "base_image_seq_len": 256, "use_dynamic_shifting": False},
    "CLIPTextConfig": {"bos_token_id": 0, "dropout": 0.0, "torch_dtype": "float32", "hidden_act": "quick_gelu"},
    "T5Config": {"d_ff": 10240, "dense_act_fn": "gelu_new", "tie_word_embeddings": False, "output_past": True},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_that_published_checkpoints_have_are_accepted(name):
    import diffusers
    import transformers

    cls = getattr(diffusers, name, None) or getattr(transformers, name)
    check_settings(Entries(PUBLISHED[name] | {"_class_name": name, "_diffusers_version": "0.6.0"}, name), cls)


@pytest.mark.slow
def test_the_defaults_of_every_class_of_diffusers_are_accepted():
    import diffusers

    classes = [getattr(diffusers, name) for name in dir(diffusers) if name[0].isupper()]
    bases = (diffusers.ModelMixin, diffusers.SchedulerMixin)
    for cls in (cls for cls in classes if isinstance(cls, type) and issubclass(cls, bases)):
        defaults = {p.name: p.default for p in inspect.signature(cls).parameters.values() if p.default is not p.empty}
        plain = {name: json.loads(json.dumps(value, default=lambda _: None)) for name, value in defaults.items()}
        check_settings(Entries(plain, cls.__name__), cls)


def test_the_hub_is_asked_for_safetensors_and_text_only(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(repository, **options):
        asked.update(options, repository=repository)
        return str(save_pipeline(tmp_path / "0123abcd"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert sculpt.load("owner/cats").name == "cats"
    assert asked["repository"] == "owner/cats"
    assert all(pattern.endswith((".json", ".txt", ".safetensors")) for pattern in asked["allow_patterns"])


# Bad input: a clear error, and before any weights are read -----------------------------------------------------------------------


def test_a_path_that_is_nowhere_says_so():
    with pytest.raises(ValueError, match="no folder 'nowhere'.*'owner/name'"):
        sculpt.load("nowhere")
    with pytest.raises(ValueError, match="no folder 'nobody/nothing' here, and the Hub cannot be reached"):
        sculpt.load("nobody/nothing")


def test_a_file_in_place_of_its_folder(pipeline):
    with pytest.raises(ValueError, match="is a file.*Pass the folder around it"):
        sculpt.load(pipeline / "unet" / "config.json")


def test_a_network_alone_lacks_its_scheduler(pipeline):
    with pytest.raises(ValueError, match="single UNet2DModel without the scheduler"):
        sculpt.load(pipeline / "unet")
    shutil.rmtree(pipeline / "scheduler")
    with pytest.raises(ValueError, match="no scheduler/scheduler_config.json.*save_pretrained"):
        sculpt.load(pipeline)


def test_pickles_are_refused_with_the_way_out(pipeline):
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin only.*convert it once"):
        sculpt.load(pipeline)


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_truncated_weights_are_noticed(pipeline, keep):
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or damaged"):
        sculpt.load(pipeline)


def test_weights_of_another_network_are_noticed(pipeline):
    edit(pipeline / "unet" / "config.json", layers_per_block=2)
    with pytest.raises(ValueError, match="do not fit the UNet2DModel"):
        sculpt.load(pipeline)
    edit(pipeline / "unet" / "config.json", layers_per_block=1, block_out_channels=[16, 32])
    with pytest.raises(ValueError, match="do not fit the UNet2DModel"):
        sculpt.load(pipeline)


def test_a_shard_that_is_missing_is_named(pipeline):
    index = {"metadata": {}, "weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks diffusion_pytorch_model-00002-of-00002.safetensors"):
        sculpt.load(pipeline)


def test_damaged_json_is_noticed(pipeline):
    (pipeline / "model_index.json").write_text('{"_class_name": "DDPM')
    with pytest.raises(ValueError, match="not readable JSON"):
        sculpt.load(pipeline)


@pytest.mark.parametrize(
    "entries",
    [
        {"_class_name": "EvilPipeline"},
        {"_class_name": ["pipeline", "EvilPipeline"]},
        {"_class_name": "logging"},
        {"unet": ["evil", "UNet2DModel"]},
        {"unet": ["os", "system"]},
        {"unet": ["diffusers", "DDPMPipeline"]},
        {"scheduler": ["diffusers", "UNet2DModel"]},
        {"vae": ["builtins", "eval"]},
    ],
)
def test_classes_from_elsewhere_are_refused(pipeline, entries):
    for name in ("evil.py", "pipeline.py", "unet/evil.py"):
        (pipeline / name).write_text("raise SystemExit('code from a checkpoint was run')")
    edit(pipeline / "model_index.json", **entries)
    with pytest.raises(ValueError, match=r"not run|is missing"):
        sculpt.load(pipeline)


def test_a_part_named_by_its_own_config_is_checked_too(tmp_path):
    folder = save_parts(tmp_path / "parts")
    edit(folder / "unet" / "config.json", _class_name="DDPMPipeline")
    with pytest.raises(ValueError, match="expected a ModelMixin of diffusers"):
        sculpt.load(folder)


def test_a_checkpoint_of_another_kind_says_what_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ValueError, match="holds BertForMaskedLM, which sculpt does not compose"):
        sculpt.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint that sculpt knows; it has nothing"):
        sculpt.load(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a folder of checkpoints. Load one of them: one"):
        sculpt.load(tmp_path)


def test_an_unfinished_training_says_how_to_continue(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "config.json").write_text(json.dumps({"kind": "training"}))
    with pytest.raises(ValueError, match="is not finished.*to continue"):
        sculpt.load(tmp_path)
    with pytest.raises(ValueError, match="state of an unfinished or finished training"):
        sculpt.load(tmp_path / "training")


def test_a_condition_that_the_model_does_not_have(pipeline):
    with pytest.raises(ValueError, match="beta: no option of a diffusion model"):
        sculpt.load(pipeline, beta=32)
    with pytest.raises(ValueError, match="no text encoder for prompt='a cat'"):
        sculpt.load(pipeline, prompt="a cat")
