"""Compositions as guiders of diffusers' modular pipelines, with tiny networks: what comes out is what ``sample`` makes."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.flux2.modular_blocks_flux2_klein_base import Flux2KleinBaseCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import StableDiffusion3T2ICoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import StableDiffusionXLCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.modular_pipelines.z_image.modular_blocks_z_image import ZImageCoreDenoiseStep
from test_inside import SD3, SDXL, STEPS, Inside, drawn, randn

import sculpt
from sculpt import Diffusion, Tracked

pytestmark = pytest.mark.filterwarnings("ignore")


class Linear(diffusers.FlowMatchEulerDiscreteScheduler):
    """Steps at the levels that these pipelines ask for, also where nobody asks."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        n = num_inference_steps or len(sigmas)
        super().set_timesteps(device=device, sigmas=np.linspace(1, 1 / n, n))


class ModularSD3(SD3):
    steps = StableDiffusion3T2ICoreDenoiseStep

    def __init__(self):
        super().__init__(Linear(shift=3.0))

    def inputs(self):
        return {"pooled_prompt_embeds": torch.zeros(1, 6), "height": 64, "width": 64}


class ModularSDXL(SDXL):
    steps = StableDiffusionXLCoreDenoiseStep

    def inputs(self):
        return {"pooled_prompt_embeds": torch.zeros(1, 8), "height": 64, "width": 64}


class Called(Inside):
    """A network that is called by a function."""

    def __init__(self, network, **config):
        self.network, self.scheduler = drawn(network, **config), Linear(shift=2.0)
        self.pipe = type("Pipe", (), {"scheduler": self.scheduler})

    def model(self, seed):
        return Diffusion(
            lambda x, t: self.called(x, t.expand(len(x)), randn(1, 5, 8, seed=seed).expand(len(x), -1, -1)),
            self.scheduler,
            self.shape,
            name=f"prompt {seed}",
        )


class Flux2(Called):
    steps, shape = Flux2KleinBaseCoreDenoiseStep, (16, 16)

    def __init__(self):
        size = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
        text = {
            "joint_attention_dim": 8,
            "axes_dims_rope": (2, 2, 2, 2),
            "guidance_embeds": False,
            "timestep_guidance_channels": 8,
        }
        super().__init__(diffusers.Flux2Transformer2DModel, **size, **text)

    def called(self, x, t, text):
        axes = [torch.arange(n) for n in (1, 4, 4, 1)], [torch.arange(n) for n in (1, 1, 1, 5)]
        ids = [torch.cartesian_prod(*axis).expand(len(x), -1, -1) for axis in axes]
        options = {"img_ids": ids[0], "txt_ids": ids[1], "encoder_hidden_states": text}
        return self.network(hidden_states=x, timestep=t / 1000, **options).sample

    def inputs(self):
        return {"height": 64, "width": 64}


class Wan(Called):
    steps, shape = WanCoreDenoiseStep, (4, 2, 4, 4)

    def __init__(self):
        size = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1}
        super().__init__(diffusers.WanTransformer3DModel, text_dim=8, freq_dim=8, ffn_dim=16, rope_max_seq_len=32, **size)

    def called(self, x, t, text):
        return self.network(hidden_states=x, timestep=t, encoder_hidden_states=text).sample

    def inputs(self):
        return {"negative_prompt_embeds": torch.zeros(1, 5, 8), "height": 32, "width": 32, "num_frames": 5}


class ZImage(Called):
    steps, shape = ZImageCoreDenoiseStep, (4, 8, 8)

    def __init__(self):
        size = {"in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        axes = {"axes_dims": [4, 2, 2], "axes_lens": [64, 32, 32]}
        super().__init__(diffusers.ZImageTransformer2DModel, cap_feat_dim=8, **size, **axes)

    def called(self, x, t, text):
        """Lists go in and come out, the time runs upwards, and the velocity has the other sign."""
        return -torch.stack(self.network(list(x.unsqueeze(2)), (1000 - t) / 1000, list(text)).sample).squeeze(2)

    def inputs(self):
        return {"prompt_embeds": [torch.zeros(5, 8)], "height": 64, "width": 64}


KINDS = {"SDXL": ModularSDXL, "SD3": ModularSD3, "Flux2": Flux2, "Wan": Wan, "ZImage": ZImage}


def inside(kind, guider):
    pipe = kind.steps().init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(**{kind.part: kind.network}, scheduler=kind.pipe.scheduler, guider=guider)
    noise = randn(1, *kind.shape)
    packed = len(kind.shape) == 2
    prompt = {"prompt_embeds": torch.zeros(1, 5, 8)} | kind.inputs()
    latents = noise.transpose(1, 2).reshape(1, 16, 4, 4) if packed else noise
    x = pipe(latents=latents, num_inference_steps=STEPS, output="latents", **prompt)
    return x.flatten(2).transpose(1, 2) if packed else x


@pytest.mark.parametrize("name", KINDS)
def test_images_inside_a_modular_pipeline_are_those_of_sample(name):
    kind = KINDS[name]()
    p, q, r = (kind.model(seed) for seed in (1, 2, 3))
    for composition in (p & q, p - q, sculpt.posterior([p, q, r], (0, 1, 2))):
        generator = torch.Generator().manual_seed(0)
        options = {"solver": kind.pipe.scheduler, "steps": STEPS, "generator": generator, "progress": False}
        expected = composition.sample(1, Tracked(particles=1), **options).x
        guider = composition.as_guider(network=kind.network)
        for _ in range(2):  # a run forgets the one before
            torch.testing.assert_close(inside(kind, guider), expected, rtol=1e-5, atol=1e-5)
        assert not kind.network._diffusers_hook.hooks  # the network is left as it was


def test_prompts_of_one_network_are_one_call_of_it_inside_too():
    kind, calls = ModularSD3(), []
    guider = (kind.model(1) & kind.model(2) & kind.model(3)).as_guider()
    kind.network.proj_out.register_forward_hook(lambda _, args, output: calls.append(len(output)))
    inside(kind, guider)
    assert calls == [3] * STEPS


def test_models_of_other_networks_never_run_the_pipelines():
    kind, other = ModularSD3(), SD3(Linear(shift=3.0))
    torch.nn.init.zeros_(kind.network.proj_out.weight)
    guider = (other.model(1) & other.model(2)).as_guider()
    kind.network.proj_out.register_forward_hook(lambda *_: pytest.fail("the pipeline's network was called"))
    x = inside(kind, guider)
    other.steps, other.inputs = kind.steps, kind.inputs
    assert torch.equal(x, inside(other, (other.model(1) & other.model(2)).as_guider()))


def test_a_guider_leaves_the_network_as_it_was_where_a_run_fails():
    kind = ModularSD3()
    guider = (kind.model(1) & kind.model(2)).as_guider()
    guider.unet.forward = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        inside(kind, guider)
    guider = (kind.model(1) & kind.model(2)).as_guider()  # and another one takes its place
    assert inside(kind, guider).isfinite().all()
    with pytest.raises(ValueError, match="is not saved: save its base models"):
        guider.save_pretrained("nowhere")
