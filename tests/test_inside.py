"""Compositions inside diffusers' own pipelines, with tiny networks: what comes out is what ``sample`` makes with the same solver and noise."""

import functools

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import nn

import sculpt
from sculpt import Diffusion, Tracked

STEPS = 6
ALONE = Tracked(particles=1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(cls, seed=0, **config):
    """A network with weights that make its answers depend on everything."""
    torch.manual_seed(seed)
    network = cls(**config).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim > 1 and parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.1)
    return network


def autoencoder():
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    return drawn(diffusers.AutoencoderKL, down_block_types=down, up_block_types=up, **sizes)


def unet(**more):
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    size = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return drawn(diffusers.UNet2DConditionModel, cross_attention_dim=8, attention_head_dim=2, **blocks, **size, **more)


class Inside:
    """A pipeline, two base models of its network, and how it is called."""

    part, shape = "transformer", (4, 8, 8)

    def model(self, seed, scheduler=None):
        return Diffusion(
            self.network, scheduler or self.pipe.scheduler, self.shape, condition=self.condition(seed), name=f"prompt {seed}"
        )

    def run(self, network, noise, guidance=1.0, **options):
        setattr(self.pipe, self.part, network)
        self.pipe.set_progress_bar_config(disable=True)
        return self.pipe(
            latents=noise, num_inference_steps=STEPS, output_type="latent", **self.call(len(noise), guidance), **options
        )[0]


class SD(Inside):
    part = "unet"

    def __init__(self, scheduler=None):
        self.network = unet()
        scheduler = scheduler or DDIMScheduler(clip_sample=False)
        self.pipe = diffusers.StableDiffusionPipeline(
            autoencoder(), None, None, self.network, scheduler, None, None, requires_safety_checker=False
        )

    def condition(self, seed):
        return {"encoder_hidden_states": randn(1, 5, 8, seed=seed)}

    def call(self, n, guidance):
        nothing = torch.zeros(n, 5, 8)
        return {"prompt_embeds": nothing, "negative_prompt_embeds": nothing, "guidance_scale": guidance}


class SDXL(SD):
    def __init__(self, scheduler=None):
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
        self.network = unet(**added)
        self.pipe = diffusers.StableDiffusionXLPipeline(
            autoencoder(), None, None, None, None, self.network, scheduler or EulerDiscreteScheduler()
        )

    def condition(self, seed):
        added = {"text_embeds": randn(1, 8, seed=seed + 9), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
        return {**super().condition(seed), "added_cond_kwargs": added}

    def call(self, n, guidance):
        pooled = torch.zeros(n, 8)
        return {**super().call(n, guidance), "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}


class SD3(Inside):
    def __init__(self, scheduler=None):
        size = {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "pos_embed_max_size": 8,
        }
        heads = {"attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 8}
        self.network = drawn(diffusers.SD3Transformer2DModel, pooled_projection_dim=6, **size, **heads)
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.pipe = diffusers.StableDiffusion3Pipeline(self.network, scheduler, autoencoder(), *[None] * 6)

    def condition(self, seed):
        return {"encoder_hidden_states": randn(1, 5, 8, seed=seed), "pooled_projections": randn(1, 6, seed=seed + 9)}

    def call(self, n, guidance):
        nothing, pooled = torch.zeros(n, 5, 8), torch.zeros(n, 6)
        prompts = {"prompt_embeds": nothing, "negative_prompt_embeds": nothing}
        return {**prompts, "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled, "guidance_scale": guidance}


class DiT(Inside):
    def __init__(self, scheduler=None):
        size = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8, "patch_size": 2}
        classes = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}
        self.network = drawn(DiTTransformer2DModel, in_channels=4, out_channels=8, **size, **classes)
        self.pipe = diffusers.DiTPipeline(self.network, autoencoder(), scheduler or DDIMScheduler(clip_sample=False))

    def condition(self, seed):
        return {"class_labels": torch.tensor([seed])}

    def model(self, seed, scheduler=None):
        return Diffusion(
            self.network, scheduler or self.pipe.scheduler, condition=self.condition(seed), autoencoder=self.pipe.vae
        )

    def run(self, network, noise, guidance=1.0):
        """It takes no latents and gives no latents: its noise is that of the generator."""
        self.pipe.transformer = network
        self.pipe.set_progress_bar_config(disable=True)
        options = {"guidance_scale": guidance, "num_inference_steps": STEPS, "output_type": "np"}
        images = self.pipe([7] * len(noise), generator=torch.Generator().manual_seed(0), **options).images
        return torch.from_numpy(images).permute(0, 3, 1, 2)


class Packed(Inside):
    """Networks that take latents in packs, with t from 0 to 1, and further inputs without a batch: called by functions."""

    shape = (16, 16)

    def model(self, seed, scheduler=None):
        def call(x, t):
            return self.network(
                hidden_states=x, timestep=t.expand(len(x)) / 1000, **self.others(len(x), seed), return_dict=False
            )[0]

        return Diffusion(call, scheduler or self.pipe.scheduler, self.shape, name=f"prompt {seed}")


class Flux(Packed):
    def __init__(self, scheduler=None):
        size = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
        text = {"joint_attention_dim": 8, "pooled_projection_dim": 6, "axes_dims_rope": (4, 2, 2), "guidance_embeds": True}
        self.network = drawn(diffusers.FluxTransformer2DModel, **size, **text)
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        self.pipe = diffusers.FluxPipeline(scheduler, autoencoder(), None, None, None, None, self.network)

    def others(self, n, seed):
        ids = self.pipe._prepare_latent_image_ids(n, 4, 4, "cpu", torch.float32)
        text = {
            "encoder_hidden_states": randn(1, 5, 8, seed=seed).expand(n, -1, -1),
            "pooled_projections": randn(1, 6).expand(n, -1),
        }
        return {**text, "img_ids": ids, "txt_ids": torch.zeros(5, 3), "guidance": torch.full((n,), 3.5)}

    def call(self, n, guidance):
        prompts = {"prompt_embeds": torch.zeros(n, 5, 8), "pooled_prompt_embeds": torch.zeros(n, 6)}
        none = {f"negative_{name}": value for name, value in prompts.items()} if guidance > 1 else {}
        return {**prompts, **none, "true_cfg_scale": guidance, "height": 16, "width": 16}


class QwenImage(Packed):
    def __init__(self, scheduler=None):
        size = {"in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
        self.network = drawn(diffusers.QwenImageTransformer2DModel, joint_attention_dim=8, axes_dims_rope=(4, 2, 2), **size)
        vae = drawn(
            diffusers.AutoencoderKLQwenImage,
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            temperal_downsample=[False],
            num_res_blocks=1,
        )
        vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9)
        self.pipe = diffusers.QwenImagePipeline(scheduler, vae, None, None, self.network)

    def others(self, n, seed):
        return {"encoder_hidden_states": randn(1, 5, 8, seed=seed).expand(n, -1, -1), "img_shapes": [[(1, 4, 4)]] * n}

    def call(self, n, guidance):
        nothing, mask = torch.zeros(n, 5, 8), torch.ones(n, 5, dtype=torch.long)
        none = {"negative_prompt_embeds": nothing, "negative_prompt_embeds_mask": mask} if guidance > 1 else {}
        return {
            "prompt_embeds": nothing,
            "prompt_embeds_mask": mask,
            **none,
            "true_cfg_scale": guidance,
            "height": 16,
            "width": 16,
        }


KINDS = {"SD": SD, "SDXL": SDXL, "SD3": SD3, "DiT": DiT, "Flux": Flux, "QwenImage": QwenImage}
FORMULAS = {"and": lambda p, q: p & q, "not": lambda p, q: p - q, "product": lambda p, q: sculpt.product([p, q], [1.5, -0.5])}


def sampled(kind, composition, n=2, solver=None):
    generator = torch.Generator().manual_seed(0)
    return composition.sample(n, ALONE, solver=solver or kind.pipe.scheduler, steps=STEPS, generator=generator, progress=False)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("name", KINDS)
def test_images_inside_a_pipeline_are_those_of_sample(name, formula):
    kind = KINDS[name]()
    composition = FORMULAS[formula](kind.model(1), kind.model(2))
    expected = sampled(kind, composition)
    expected = expected.decode() if name == "DiT" else expected.x
    network = composition.as_unet(network=kind.network)
    noise = randn(2, *kind.shape)
    # Twice, because a run has to forget the one before; and with guidance, which has no effect.
    for guidance in (1.0, 1.0, 4.0):
        torch.testing.assert_close(kind.run(network, noise, guidance), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler])
def test_any_scheduler_of_the_pipeline_will_do(scheduler):
    kind = SD(scheduler())
    composition = kind.model(1) - kind.model(2)
    x = kind.run(composition.as_unet(), randn(2, 4, 8, 8))
    torch.testing.assert_close(x, sampled(kind, composition).x, rtol=1e-5, atol=1e-5)


def test_a_loop_written_by_hand_is_a_pipeline_too():
    kind = SD3()
    composition, scheduler = kind.model(1) & kind.model(2), kind.pipe.scheduler
    unet, x = composition.as_unet(), randn(2, *kind.shape)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(x, sampled(kind, composition).x, rtol=1e-5, atol=1e-5)


def test_guidance_of_the_pipeline_costs_no_calls_and_prompts_of_one_network_are_one():
    calls = []
    for kind in (SD(), Flux()):
        calls.clear()
        network = (kind.model(1) & kind.model(2)).as_unet(network=kind.network)
        kind.network.register_forward_hook(lambda *_: calls.append(1))
        kind.run(network, randn(1, *kind.shape), 5.0)
        assert len(calls) == STEPS * (1 if isinstance(kind, SD) else 2)  # of functions nobody knows that they share a network


def test_a_run_that_was_left_is_forgotten():
    kind = SD3()
    composition = kind.model(1) - kind.model(2)
    unet, noise = composition.as_unet(), randn(2, *kind.shape)
    expected = kind.run(unet, noise)

    def leave(pipe, i, t, values):
        if i == 2:
            raise KeyboardInterrupt
        return values

    for n in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            kind.run(unet, randn(n, *kind.shape, seed=n), callback_on_step_end=leave)
        torch.testing.assert_close(kind.run(unet, noise), expected, rtol=0, atol=0)


def test_pipelines_find_in_it_what_they_look_for_in_their_network():
    kind = SDXL()
    unet = (kind.model(1) & kind.model(2)).as_unet()
    assert unet.config.addition_time_embed_dim == 4 and unet.add_embedding is kind.network.add_embedding
    assert unet.dtype == torch.float32 and unet.device == torch.device("cpu")
    assert (unet.config.in_channels, unet.config.sample_size) == (4, 8)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = unet.nothing_of_the_kind
    unet = (DiT().model(1) & DiT().model(2)).as_unet()  # whose pipeline takes half of the answer for a variance
    assert unet.config.out_channels == 8 and unet(randn(2, 4, 8, 8), torch.tensor(500)).sample.shape == (2, 8, 8, 8)


class Features(nn.Module):
    """Two numbers of a latent, for a classifier that nobody has trained."""

    width = 2

    def forward(self, z, s=None):
        return z.flatten(1)[:, :2].tanh()


@pytest.mark.parametrize("road", ["tracked", "guided"])
@pytest.mark.parametrize("name", ["SD", "SD3", "DiT"])
def test_a_pipeline_moves_copies_and_the_base_models_stay_what_they_are(name, road):
    kind = KINDS[name]()
    p, q = kind.model(1), kind.model(2)
    p.autoencoder = q.autoencoder = kind.pipe.vae
    known, z, s = (p.key, q.key), randn(2, *kind.shape), torch.tensor(1.3, dtype=torch.float64)
    before, numbers = p.denoise(z, s), [id(parameter) for parameter in kind.network.parameters()]
    judge = None if road == "tracked" else sculpt.Classifier(Features(), [p.key, q.key]).eval()
    unet = (p & q).as_unet(judge)
    x, t = randn(2, *kind.shape, seed=5), torch.tensor(500.0)
    with torch.no_grad():
        exact = unet(x, t).sample
        assert unet.to(torch.float64) is unet and unet.dtype == torch.float64 != p.dtype == kind.network.dtype
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.float64}
        torch.testing.assert_close(unet(x.double(), t).sample.float(), exact, rtol=1e-4, atol=1e-4)
        moved = unet.networks[0]
        assert moved is not kind.network and unet.half().networks[0] is moved and moved.dtype == torch.float16  # once is enough
    assert (p.key, q.key) == known and [id(parameter) for parameter in kind.network.parameters()] == numbers
    assert torch.equal(p.denoise(z, s), before)
    # Both prompts are still one call of one network, and what decodes is no copy.
    calls, (one, other) = [], unet.denoiser.operands
    assert one.model is other.model is moved and one.together == other.together and one.autoencoder is p.autoencoder
    moved.register_forward_hook(lambda *_: calls.append(1))
    unet.to(torch.float32)(x, torch.tensor(400.0))
    assert len(calls) == 1 or road == "guided"


def test_nothing_is_copied_where_nothing_changes_nor_what_a_copy_would_not_be():
    kind = SD3()
    unet = (kind.model(1) & kind.model(2)).as_unet()
    assert unet.to("cpu", torch.float32).networks[0] is kind.network and unet.float().cpu().networks[0] is kind.network
    kind = Flux()  # functions, which call the network that they know
    unet = (kind.model(1) & kind.model(2)).as_unet(network=kind.network)
    assert unet.to(torch.bfloat16).networks[0] is kind.network and kind.network.dtype == torch.bfloat16
    kind = SD()
    p, q, forward = kind.model(1), kind.model(2), kind.network.forward
    # As libraries that offload weights do
    kind.network.forward = functools.update_wrapper(functools.partial(forward), forward)
    assert (p & q).as_unet().to(torch.float64).networks[0] is kind.network and p.dtype == torch.float64


def test_a_composition_that_does_not_fit_its_place_says_so():
    kind = SD3()
    composition = kind.model(1) & kind.model(2)
    with pytest.raises(ValueError, match=r"makes samples of shape \(4, 8, 8\), the pipeline wants \(4, 16, 16\)"):
        kind.run(composition.as_unet(), randn(1, 4, 16, 16), height=32, width=32)
    with pytest.raises(TypeError, match="is called with hidden_states or sample and timestep, got nothing"):
        composition.as_unet()()
    with pytest.raises(ValueError, match="prompt 1 does not call the UNet2DConditionModel"):
        composition.as_unet(network=SD().network)
    with pytest.raises(ValueError, match="goes alone|go alone"):
        composition.as_unet(Tracked(particles=16))
    with pytest.raises(ValueError, match="is no network with weights of its own.*Save the pipelines of the base models"):
        composition.as_unet().save_pretrained("nowhere")
    gaussian = sculpt.EnergyModel(lambda z, s: (z**2).flatten(1).sum(1) / 2, (2,), name="gaussian")
    other = sculpt.EnergyModel(lambda z, s: (z**2).flatten(1).sum(1), (2,), name="other")
    with pytest.raises(ValueError, match="gaussian has no diffusers scheduler of its own: pass scheduler="):
        (gaussian & other).as_unet()


def test_a_network_whose_answers_are_taken_for_something_else_is_found_out():
    kind = SD3()

    def twice(x, t):
        return (
            2
            * kind.network(
                x, timestep=t.expand(len(x)), **{k: v.expand(len(x), *v.shape[1:]) for k, v in kind.condition(1).items()}
            ).sample
        )

    p, q = (Diffusion(twice, kind.pipe.scheduler, kind.shape, name=name) for name in "pq")
    with pytest.raises(ValueError, match="p does not take the answers of its SD3Transformer2DModel for the flow_prediction"):
        (p & q).as_unet(network=kind.network)


def test_channels_behind_the_sample_are_not_the_compositions():
    network, scheduler = unet(in_channels=9), DDIMScheduler(clip_sample=False)
    behind, x = randn(1, 5, 8, 8), randn(2, 4, 8, 8)

    def call(seed):
        return lambda x, t: (
            network(
                torch.cat([x, behind.expand(len(x), -1, -1, -1)], 1),
                t.expand(len(x)),
                randn(1, 5, 8, seed=seed).expand(len(x), -1, -1),
            ).sample
        )

    p, q = (Diffusion(call(seed), scheduler, (4, 8, 8), name=f"prompt {seed}") for seed in (1, 2))
    inside, plain = (p & q).as_unet(network=network), (p & q).as_unet()
    F = inside(torch.cat([x, randn(2, 5, 8, 8, seed=3)], 1), torch.tensor(500), encoder_hidden_states=None).sample
    torch.testing.assert_close(F, plain(x, torch.tensor(500)).sample)
