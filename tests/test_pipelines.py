"""Pipelines of diffusers as base models: what is learned from a pipeline's call is what the pipeline does."""

import copy
import functools
import gc
import inspect
import weakref

import pytest
import torch

import sculpt
from sculpt import Diffusion, Tracked
from sculpt.chain import Settings

pytest.importorskip("transformers")
from pipelines import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")

SLOW = {"Stable Audio", "HunyuanDiT", "AnimateDiff", "CogVideoX", "HunyuanVideo", "Mochi", "Sana"}
EVERY = [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]


def asked(kind, prompt="a dog"):
    return {} if kind == "DDPM" else {"class_labels": [len(prompt)]} if kind == "DiT" else {"prompt": prompt}


def built(kind, **changes):
    pipe, call = KINDS[kind]()
    pipe.set_progress_bar_config(disable=True)
    # Images are encoded with noise: the same noise gives the same image.
    return pipe, {**call, **changes, "generator": torch.Generator().manual_seed(0)}


def own_run(pipe, call, steps=4):
    """The pipeline by itself: what its scheduler was given at every step, the last sample, and what came out."""
    seen, real = [], pipe.scheduler.step
    signature = inspect.signature(real)

    @functools.wraps(real)
    def step(*args, **kwargs):
        out, given = real(*args, **kwargs), signature.bind(*args, **kwargs).arguments
        last = out[0] if isinstance(out, tuple) else out.prev_sample
        seen.append((given["sample"], given["timestep"], given["model_output"], last))
        return out

    pipe.scheduler.step = step
    try:
        takes = inspect.signature(type(pipe).__call__).parameters
        how = {
            "num_inference_steps": steps,
            "output_type": "pt",
            "return_dict": False,
            "generator": torch.Generator().manual_seed(0),
        }
        out = pipe(**{**call, **{name: value for name, value in how.items() if name in takes}})[0]
    finally:
        del pipe.scheduler.step
    return seen, torch.as_tensor(out)


def one(x, model):
    """The first sample of what a scheduler has: some are given frames, and no videos."""
    return x[None] if x.ndim == len(model.shape) else x[:1]


def off(model, scheduler, seen):
    """The relative error of the model's answer to what the pipeline's network was asked."""
    x, t, F, _ = (one(value, model) if isinstance(value, torch.Tensor) and value.ndim else value for value in seen)
    s = model.schedule.sigma(torch.as_tensor(t).cpu())
    exploding = (
        "Euler" in type(scheduler).__name__ and model.schedule.s_max != float("inf") or "EDM" in type(scheduler).__name__
    )
    z = x[:1].double() if exploding else x[:1].double() / model.schedule.scale(s)
    for axis, (n, m) in enumerate(zip(F.shape, x.shape, strict=True)):
        F = F.narrow(axis, 0, m) if n == 2 * m else F  # without a learned variance
    ours = model.schedule.output(z, s, model.denoise(z, s))
    return float((ours - F[:1]).norm() / F[:1].norm())


@pytest.mark.parametrize("kind", EVERY)
def test_a_model_of_a_pipeline_is_the_pipeline(kind):
    pipe, call = built(kind)
    dog = Diffusion.from_pipeline(pipe, **asked(kind), **call)
    steps, out = own_run(pipe, {**asked(kind), **call})
    # At the first step of a flow there is nothing but noise, and no z.
    assert max(off(dog, pipe.scheduler, step) for step in steps[1:]) < 1e-5
    torch.testing.assert_close(dog.decode(one(steps[-1][-1], dog)), out[:1], rtol=0, atol=0)
    if kind == "DDPM":
        return
    cat = dog.with_condition(**asked(kind, "a great cat" if kind == "DiT" else "a cat"))
    assert cat.key != dog.key and cat.name != dog.name
    networks = {id(call.network): call.network for call in dog._calls()}
    calls = []
    hooks = [network.register_forward_hook(lambda module, *_: calls.append(module)) for network in networks.values()]
    samples = (dog & cat).sample(1, Tracked(particles=1), steps=3, generator=torch.Generator().manual_seed(0), progress=False)
    for hook in hooks:
        hook.remove()
    # Both prompts and their guidance are one call of each network; of two experts one is asked.
    assert len(calls) == 3 * (2 if "ControlNet" in kind else 1)
    assert samples.x.isfinite().all() and samples.decode().shape == out[:1].shape
    assert samples.verdict.level == "steered"


# What stays as it was ----------------------------------------------------------------------------------------------------------------


def state_of(pipe):
    """Whatever a run could change."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    own = {
        name: ("forward" in vars(part), part.training, dict(getattr(part, "attn_processors", {})))
        for name, part in networks.items()
    }
    return dict(vars(pipe)), dict(vars(pipe.scheduler)), own, torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", ["SD 1.5", "Wan 2.2", "SD ControlNet", "Z-Image"])
def test_a_pipeline_is_left_as_it_was(kind):
    pipe, call = built(kind)
    # What a pipeline remembers of its calls is there after the first one.
    pipe(**asked(kind), **call, num_inference_steps=2, output_type="latent")
    before = state_of(pipe)
    model = Diffusion.from_pipeline(pipe, **asked(kind), **call)
    assert state_of(pipe) == before
    model.decode(torch.zeros(1, *model.shape))
    assert state_of(pipe) == before


@pytest.mark.parametrize("when", ["encoding", "denoising", "stepping"])
def test_a_pipeline_that_fails_is_left_as_it_was_too(when):
    pipe, call = built("SD 1.5")
    before = state_of(pipe)

    def fail(*args, **kwargs):
        raise RuntimeError("out of order")

    part, name = {
        "encoding": (pipe.text_encoder, "forward"),
        "denoising": (pipe.unet, "forward"),
        "stepping": (pipe.scheduler, "step"),
    }[when]
    setattr(part, name, functools.wraps(getattr(part, name))(fail))
    with pytest.raises(
        ValueError, match="StableDiffusionPipeline failed when its own call was run: RuntimeError: out of order"
    ):
        Diffusion.from_pipeline(pipe, prompt="a dog")
    delattr(part, name)
    assert state_of(pipe) == before


def test_text_encoders_may_be_freed():
    pipe, _ = built("SD3")
    dog = Diffusion.from_pipeline(pipe, prompt="a dog", max_sequence_length=12)
    z = torch.randn(1, *dog.shape, generator=torch.Generator().manual_seed(0))
    before, picture = dog.denoise(z, 1.0), dog.decode(z)
    gone = [weakref.ref(getattr(pipe, name)) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
    gc.collect()
    assert not any(encoder() for encoder in gone)
    assert torch.equal(dog.denoise(z, 1.0), before) and torch.equal(dog.decode(z), picture)
    with pytest.raises(ValueError, match="lost its text_encoder, text_encoder_2, text_encoder_3 since. Put that back"):
        dog.with_condition(prompt="a cat")


# What is refused --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("CogVideoX", {"use_dynamic_cfg": True}, "no fixed weighted sum"),
        ("Lumina2", {"cfg_trunc_ratio": 0.5}, "depends on more than the time"),
        ("Z-Image", {"cfg_truncation": 0.5}, "depends on more than the time"),
        ("SD ControlNet", {"control_guidance_end": 0.5}, "conditioning_scale of ControlNetModel changes from step to step"),
        ("SD ControlNet", {"guess_mode": True}, "what one answers is changed before the next takes it"),
        ("SD 1.5", {"prompts": "a cat"}, "prompts: no option of StableDiffusionPipeline, which takes prompt"),
        ("SD 1.5", {"prompt": ["a cat", "a dog"]}, "prompt has 2 entries, and a base model has one condition"),
        ("SD3", {"height": 15}, "StableDiffusion3Pipeline failed when its own call was run.*divisible by"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_the_reason(kind, changes, why):
    pipe, call = built(kind)
    with pytest.raises(ValueError, match=why):
        Diffusion.from_pipeline(pipe, **{**asked(kind), **call, **changes})


def test_experts_change_places_where_the_pipeline_lets_them():
    pipe, call = built("Wan 2.2")
    model = Diffusion.from_pipeline(pipe, prompt="a dog", **call)
    assert [stage.least for stage in model._stages] == [800.0, -float("inf")]
    asked_of = []
    for part in (pipe.transformer, pipe.transformer_2):
        part.register_forward_hook(lambda module, *_: asked_of.append(module))
    z = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    s = model.schedule.sigma(torch.tensor([800.0, 799.9]))
    together = model.denoise(z, s)
    assert asked_of == [pipe.transformer, pipe.transformer_2] or asked_of == [pipe.transformer_2, pipe.transformer]
    alone = torch.cat([model.denoise(z[i : i + 1], s[i]) for i in range(2)])
    torch.testing.assert_close(together, alone)


# Adapters ---------------------------------------------------------------------------------------------------------------------------


def with_loras(pipe, network, names=("ink", "oil"), rank=2):
    peft = pytest.importorskip("peft")
    for k, name in enumerate(names):
        torch.manual_seed(k)
        config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        network.add_adapter(config, adapter_name=name)
    return network


def merged(network, adapter, scale):
    """The network with an adapter's weights added to its own."""
    plain = copy.deepcopy(network)
    for module in list(plain.modules()):
        for name, layer in list(module.named_children()):
            if hasattr(layer, "lora_A"):
                base = layer.base_layer
                if adapter is not None:
                    base.weight.data += scale * 3 / 2 * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
                setattr(module, name, base)
    del plain.peft_config
    return plain


@torch.no_grad()
def test_two_loras_and_the_bare_network_are_three_models():
    pipe, call = built("SD 1.5")
    bare = Diffusion.from_pipeline(pipe, prompt="a dog", guidance_scale=1.0, name="dog")
    key = bare.key
    network = with_loras(pipe, pipe.unet)
    plain, ink, oil = bare.with_adapters(None), bare.with_adapters({"ink": 0.8}), bare.with_adapters({"oil": 1.2})
    assert [str(model) for model in (plain, ink, oil)] == ["dog[plain]", "dog[ink=0.8]", "dog[oil=1.2]"]
    assert len({plain.key, ink.key, oil.key, bare.with_adapters({"ink": 0.7}).key}) == 4 and plain.key == key
    z, s = torch.randn(2, *bare.shape, generator=torch.Generator().manual_seed(0)), torch.tensor(1.0, dtype=torch.float64)
    wanted = {plain: merged(network, None, 0), ink: merged(network, "ink", 0.8), oil: merged(network, "oil", 1.2)}
    found = {}
    for active in (["ink"], ["oil"], ["ink", "oil"]):
        network.set_adapters(active, [0.3] * len(active))
        for model, reference in wanted.items():
            by_hand = Diffusion(reference, pipe.scheduler, condition=bare.condition)
            D = model.denoise(z, s)
            assert float((D - by_hand.denoise(z, s)).norm() / D.norm()) < 1e-5
            # What is active in the network changes nothing, and stays as it is.
            torch.testing.assert_close(found.setdefault(model, D), D, rtol=1e-5, atol=1e-5)
            assert network.active_adapters() == active
            assert all(
                layer.scaling[a] == 0.3 * 3 / 2 for layer in network.modules() if hasattr(layer, "lora_A") for a in active
            )
    # A model that was made before any were loaded has none.
    assert torch.equal(bare.denoise(z, s), found[plain]) and bare.key == plain.key


def test_a_model_keeps_the_adapters_that_were_active_when_it_was_made():
    pipe, _ = built("SD 1.5")
    network = with_loras(pipe, pipe.unet)
    network.set_adapters(["ink"], [0.5])
    condition = Diffusion.from_pipeline(pipe, prompt="a dog").condition
    model = Diffusion(network, pipe.scheduler, condition=condition)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before, key = model.denoise(z, 1.0), model.key
    network.set_adapters(["oil"])
    assert torch.equal(model.denoise(z, 1.0), before) and model.key == key == model.with_adapters({"ink": 0.5}).key
    network.disable_adapters()
    assert torch.equal(model.denoise(z, 1.0), before)
    with pytest.raises(ValueError, match="pen: no adapter of UNet2DConditionModel, which has ink, oil"):
        model.with_adapters({"pen": 1.0})


@pytest.mark.parametrize("kind", ["SD 1.5", "SD3"])
def test_a_composition_in_a_pipelines_place_moves_a_copy_of_its_network_and_nothing_else(kind):
    pipe, call = built(kind)
    network = pipe.unet if kind == "SD 1.5" else pipe.transformer
    with_loras(pipe, network)
    dog = Diffusion.from_pipeline(pipe, **{**call, "prompt": "a dog"})
    cat = dog.with_condition(prompt="a cat").with_adapters({"ink": 0.8})
    unet, x, known = (dog & cat).as_unet(), torch.randn(2, *dog.shape), (dog.key, cat.key)
    with torch.no_grad():
        expected = unet(x, torch.tensor(500.0)).sample
        unet.to(torch.float64).to(torch.float32)  # there and back is the same numbers
        assert torch.equal(unet(x, torch.tensor(500.0)).sample, expected)
    (moved,), (one, other) = unet.networks, unet.denoiser.operands
    assert moved is not network and one.networks == other.networks == (moved,) and (one.key, other.key) == known
    assert one.pipeline.pipe is pipe and one.autoencoder is other.autoencoder is dog.autoencoder
    away = (dog & cat).as_unet().to("meta")
    assert away.device.type == "meta" and dog.device.type == network.device.type == "cpu" and (dog.key, cat.key) == known


def test_an_error_in_a_call_puts_adapters_back():
    pipe, _ = built("SD 1.5")
    ink = Diffusion.from_pipeline(pipe, prompt="a dog")
    network = with_loras(pipe, pipe.unet)
    network.set_adapters(["oil"], [0.4])
    with pytest.raises(RuntimeError):
        ink.with_adapters({"ink": 1.0})._in_stages(ink._stages, torch.zeros(1, 5, 8, 8), torch.tensor(1.0))
    assert network.active_adapters() == ["oil"]


def test_fused_adapters_are_weights():
    pipe, _ = built("SD 1.5")
    network = with_loras(pipe, pipe.unet)
    before = Diffusion.from_pipeline(pipe, prompt="a dog", guidance_scale=1.0).with_adapters({"ink": 1.0})
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    D = before.denoise(z, 1.0)
    network.fuse_lora(adapter_names=["ink"])
    fused = Diffusion.from_pipeline(pipe, prompt="a dog", guidance_scale=1.0)
    torch.testing.assert_close(fused.denoise(z, 1.0), D, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="ink: fused into the weights.*unfuse_lora"):
        fused.with_adapters({"oil": 1.0})


def test_models_that_differ_in_adapters_compose_by_every_road_and_train():
    pipe, _ = built("SD 1.5")
    dog = Diffusion.from_pipeline(pipe, prompt="a dog", guidance_scale=1.0, name="dog")
    with_loras(pipe, pipe.unet)
    ink, oil = dog.with_adapters({"ink": 0.8}), dog.with_adapters({"oil": 0.8})
    both = ink & oil
    assert str(both) == "dog[ink=0.8] ⊗ dog[oil=0.8]"
    classifier = sculpt.fit([ink, oil], steps=2, samples=10, sample_steps=2, batch_size=4, progress=False)
    for road in (None, classifier, Tracked(particles=4), sculpt.Rejection(classifier)):
        samples = both.sample(2, road, steps=3, progress=False)
        assert samples.x.shape == (2, 4, 8, 8) and samples.x.isfinite().all()


def test_encoders_with_adapters_encode_again():
    peft = pytest.importorskip("peft")
    pipe, _ = built("SD 1.5")
    dog = Diffusion.from_pipeline(pipe, prompt="a dog", guidance_scale=1.0)
    with_loras(pipe, pipe.unet, ["ink"])
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(config, adapter_name="ink")
    ink, plain = dog.with_adapters({"ink": 1.0}), dog.with_adapters(None)
    encoded = [model.condition["encoder_hidden_states"] for model in (dog, plain, ink)]
    assert torch.equal(encoded[0], encoded[1]) and not torch.equal(encoded[0], encoded[2])
    assert plain.key == dog.key != ink.key


def test_the_scale_of_an_ip_adapter_is_that_of_the_making():
    pipe, call = built("IP-Adapter")
    much = Diffusion.from_pipeline(pipe, prompt="a dog", **call)
    z = torch.randn(1, *much.shape, generator=torch.Generator().manual_seed(0))
    before, key = much.denoise(z, 1.0), much.key
    pipe.set_ip_adapter_scale(0.1)
    little = Diffusion.from_pipeline(pipe, prompt="a dog", **call)
    assert torch.equal(much.denoise(z, 1.0), before) and much.key == key != little.key
    assert not torch.allclose(little.denoise(z, 1.0), before)
    assert all(p.scale == [0.1] for p in pipe.unet.attn_processors.values() if hasattr(p, "scale"))


def test_the_scale_of_a_controlnet_is_a_condition():
    pipe, call = built("SD ControlNet")
    much = Diffusion.from_pipeline(pipe, prompt="a dog", **call)
    little = much.with_condition(controlnet_conditioning_scale=0.1)
    z = torch.randn(1, *much.shape, generator=torch.Generator().manual_seed(0))
    assert much.key != little.key and not torch.allclose(much.denoise(z, 1.0), little.denoise(z, 1.0))


def test_a_textual_inversion_is_a_word_of_the_prompt():
    pipe, _ = built("SD 1.5")
    dog = Diffusion.from_pipeline(pipe, prompt="a dog")
    torch.manual_seed(0)
    pipe.load_textual_inversion({"<ours>": torch.randn(8)}, token="<ours>")
    ours = dog.with_condition(prompt="a <ours>")
    assert ours.key != dog.with_condition(prompt="a dog").key == dog.key


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("SD 1.5", {"guidance_rescale": 0.7}),
        ("Lumina2", {"cfg_normalization": True}),
        ("Qwen-Image", {"negative_prompt": "a cat", "true_cfg_scale": 3.0}),
    ],
)
def test_guidance_that_is_rescaled_is_learned_as_it_is(kind, changes):
    pipe, call = built(kind, **changes)
    model = Diffusion.from_pipeline(pipe, prompt="a dog", **call)
    steps, _ = own_run(pipe, {"prompt": "a dog", **call})
    assert max(off(model, pipe.scheduler, step) for step in steps[1:]) < 1e-5
    # Not because nothing is rescaled.
    plain = (
        {"guidance_rescale": 0.0}
        if kind == "SD 1.5"
        else {"cfg_normalization": False}
        if kind == "Lumina2"
        else {"true_cfg_scale": 1.0}
    )
    other = model.with_condition(**plain)
    assert max(off(other, pipe.scheduler, step) for step in steps[1:]) > 1e-3 and other.key != model.key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["SD 1.5", "SD3", "Flux", "Wan 2.1"])
def test_half_precision_is_as_good_as_its_numbers(kind, dtype):
    pipe, call = built(kind)
    pipe.to(dtype)
    model = Diffusion.from_pipeline(pipe, prompt="a dog", **call)
    steps, _ = own_run(pipe, {"prompt": "a dog", **call})
    assert model.dtype == dtype and max(off(model, pipe.scheduler, step) for step in steps[1:]) < 8 * torch.finfo(dtype).eps
    exact = {w for stage in model._stages for strand in stage.strands for w in strand.weights}
    assert exact == {"SD 1.5": {-6.5, 7.5}, "SD3": {-6.0, 7.0}, "Flux": {1.0}, "Wan 2.1": {5.0, -4.0}}[kind]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["SD 1.5", "SD3", "Flux", "Wan 2.1"])
def test_a_model_that_moves_to_a_precision_moves_its_encoders_and_its_conditions(kind, dtype):
    pipe, call = built(kind)
    model = Diffusion.from_pipeline(pipe, prompt="a dog", **call)
    assert model.to(dtype) is model and model.dtype == dtype
    cat = model.with_condition(prompt="a cat")
    assert (model & cat).sample(1, steps=2, progress=False).x.isfinite().all()
    # In half a precision the dog's embeddings are better than the pipeline's: they were made before.
    for own, prompt in [(cat, "a cat"), (model, "a dog")][: 1 if dtype is torch.bfloat16 else 2]:
        steps, _ = own_run(pipe, {"prompt": prompt, **call})
        bound = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # times stay rounded as they were
        assert max(off(own, pipe.scheduler, step) for step in steps[1:]) < bound


# Starts other than noise ------------------------------------------------------------------------------------------------------------


def test_image_to_image_starts_where_the_pipeline_does():
    pipe, call = built("img2img")
    model = Diffusion.from_pipeline(pipe, prompt="a dog", **call)
    torch.manual_seed(0)
    clean = pipe.vae.config.scaling_factor * pipe.vae.encode(pipe.image_processor.preprocess(call["image"])).latent_dist.sample(
        torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(model.start, clean, rtol=1e-4, atol=1e-4)
    for n in (50, 20):
        steps, _ = own_run(pipe, {"prompt": "a dog", **call}, steps=n)
        model = model if n == 50 else model.with_condition(num_inference_steps=n)
        assert model.s_max == pytest.approx(float(model.schedule.sigma(torch.as_tensor(steps[0][1]))), rel=1e-6)
    pure = Diffusion.from_pipeline(built("SD 1.5")[0], prompt="a dog")
    assert model.key != pure.key and model.s_max < pure.s_max
    with pytest.raises(ValueError, match="start from different samples.*Give both the same image and strength"):
        _ = model & pure


@pytest.mark.parametrize("solver", [None, "DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_little_strength_changes_an_image_a_little(solver):
    import diffusers

    pipe, _ = built("SD 1.5")
    dog = Diffusion.from_pipeline(pipe, prompt="a dog", guidance_scale=1.0)
    x = torch.randn(1, *dog.shape, generator=torch.Generator().manual_seed(3))
    solver = None if solver is None else getattr(diffusers, solver)()
    off = []
    for strength in (0.02, 0.3, 1.0):
        model = dog.with_start(x, strength)
        samples = model.sample(4, steps=60, solver=solver, generator=torch.Generator().manual_seed(0), progress=False)
        off.append(float((samples.x - x).square().mean().sqrt()))
    assert off[0] < 0.3 and off[0] < off[1] < off[2]
    both = dog.with_start(x, 0.02) & dog.with_condition(prompt="a cat").with_start(x, 0.02)
    samples = both.sample(2, Tracked(particles=1), steps=8, generator=torch.Generator().manual_seed(0), progress=False)
    assert float((samples.x - x).square().mean().sqrt()) < 0.3
    with pytest.raises(ValueError, match="at or below its least noise level"):
        dog.with_start(x, 1e-9)
    with pytest.raises(ValueError, match=r"samples of shape \(4, 8, 8\), and start is one of them; got \(4, 8, 9\)"):
        dog.with_start(torch.zeros(4, 8, 9), 0.5)


@pytest.mark.parametrize("solver", [None, "DDIMScheduler"])
def test_given_noise_is_where_sampling_starts(solver):
    import diffusers

    pipe, _ = built("SD3")
    dog = Diffusion.from_pipeline(pipe, prompt="a dog", max_sequence_length=12)
    solver = None if solver is None else diffusers.FlowMatchEulerDiscreteScheduler()
    noise = torch.randn(2, *dog.shape, generator=torch.Generator().manual_seed(5))
    drawn = dog.sample(2, steps=4, solver=solver, generator=torch.Generator().manual_seed(5), progress=False)
    generator = torch.Generator().manual_seed(5)
    torch.randn(2, *dog.shape, generator=generator)  # what was drawn for the start
    given = dog.sample(2, steps=4, solver=solver, latents=noise, generator=generator, progress=False)
    torch.testing.assert_close(given.x, drawn.x)
    cat = dog.with_condition(prompt="a cat")
    assert (dog & cat).sample(2, steps=3, latents=noise, progress=False, road=Tracked(particles=1)).x.isfinite().all()
    with pytest.raises(ValueError, match=r"shape \(3, 4, 8, 8\), one row for each sample; got \(2, 4, 8, 8\)"):
        dog.sample(3, steps=4, latents=noise, progress=False)
    with pytest.raises(ValueError, match="latents: not an option of samples that do not go alone"):
        (dog & cat).sample(2, Tracked(particles=4), steps=4, latents=noise, progress=False)


def test_every_sample_may_have_a_generator_of_its_own():
    import diffusers

    pipe, _ = built("SD 1.5")
    dog = Diffusion.from_pipeline(pipe, prompt="a dog")

    def seeds(*numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    for solver in (None, diffusers.EulerAncestralDiscreteScheduler()):
        together = dog.sample(3, steps=4, solver=solver, generator=seeds(1, 2, 3), progress=False).x
        for i, number in enumerate((1, 2, 3)):
            alone = dog.sample(1, steps=4, solver=solver, generator=seeds(number), progress=False).x
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Got 2 generators for 3 samples"):
        dog.sample(3, steps=4, generator=seeds(1, 2), progress=False)
    both = dog & dog.with_condition(prompt="a cat")
    with pytest.raises(ValueError, match="one for each sample, and here particles are selected"):
        both.sample(2, Tracked(particles=4), steps=4, generator=seeds(1, 2), progress=False)
    with pytest.raises(TypeError, match="has a torch.Generator for each sample"):
        Settings(generator=[1, 2])


def test_a_callback_sees_every_step():
    pipe, _ = built("SD 1.5")
    dog = Diffusion.from_pipeline(pipe, prompt="a dog")
    seen = []
    dog.sample(2, steps=5, callback=lambda progress: seen.append(progress), progress=False)
    assert [progress.state.z.shape for progress in seen if progress.state is not None] == [(2, 4, 8, 8)] * 6
    assert seen[-1].samples is not None
