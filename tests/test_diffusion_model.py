"""The adapter: any network with its training scheduler is a denoiser, and a denoiser is any scheduler's UNet."""

import json
import math

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

import sculpt
from sculpt import Diffusion, EnergyModel, Tracked
from sculpt.diffusion.denoiser import Denoiser
from sculpt.diffusion.diffusers.unet import DenoiserUNet
from sculpt.model import same_model

DDPM = DDPMScheduler()


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny_unet(seed=0, **kwargs):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    defaults = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    return UNet2DModel(**(defaults | blocks | {"layers_per_block": 1, "norm_num_groups": 4} | kwargs)).eval()


def tiny_autoencoder(seed=0, **kwargs):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks, **kwargs).eval()


def tiny_dit(seed=0, learned=True):
    torch.manual_seed(seed)
    size = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    classes = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}
    dit = DiTTransformer2DModel(in_channels=4, out_channels=8 if learned else 4, **size, **classes)
    for parameter in dit.proj_out_2.parameters():
        nn.init.normal_(parameter, std=0.2)
    return dit.eval()


class Gaussian(Denoiser):
    r"""The exact denoiser of :math:`\mathcal N(\mu, c^2)`."""

    name, key, device, s_min, s_max = "gaussian", "gaussian", torch.device("cpu"), 0.002, math.inf

    def __init__(self, shape, mean=0.3, c=0.5):
        self.shape, self.mean, self.c = tuple(shape), mean, c

    def denoise(self, z, s):
        v = torch.as_tensor(s, dtype=torch.float64).to(z.dtype) ** 2
        v = v.reshape(v.shape + (1,) * (z.ndim - v.ndim))
        return (self.c**2 * z + v * self.mean) / (self.c**2 + v)


# Calling networks -------------------------------------------------------------------------------------------------------------

ALPHAS = DDPM.alphas_cumprod


def test_a_diffusers_network_is_called_with_its_own_input_and_time():
    unet = tiny_unet()
    model = Diffusion(unet, DDPM)
    assert model.shape == (1, 8, 8) and model.dtype == torch.float32 and model.device.type == "cpu"
    t = torch.tensor([10, 500])
    x0, eps = randn(2, 2, 1, 8, 8)
    x = DDPM.add_noise(x0, eps, t)
    s = ((1 - ALPHAS[t].double()) / ALPHAS[t].double()).sqrt()
    with torch.no_grad():
        F = unet(x, t).sample
        D = model.denoise(x / ALPHAS[t].sqrt()[:, None, None, None], s)
    expected = (x - (1 - ALPHAS[t]).sqrt()[:, None, None, None] * F) / ALPHAS[t].sqrt()[:, None, None, None]
    torch.testing.assert_close(D, expected, rtol=1e-4, atol=1e-4)


def test_one_level_for_all_and_one_per_sample_agree():
    for network in (tiny_unet(), lambda x, t: x * t.reshape(-1, 1, 1, 1), lambda x, t: x * (1 if t > 200 else 2)):
        model = Diffusion(network, DDPM, (1, 8, 8))
        z, s = randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 2.0, 30.0], dtype=torch.float64)
        each = torch.cat([model.denoise(z[i : i + 1], float(s[i])) for i in range(4)])
        torch.testing.assert_close(model.denoise(z, s), each, rtol=1e-4, atol=1e-5)


class Module(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.linear = f, nn.Linear(3, 3)

    def forward(self, x, t):
        return self.linear(x) * self.f(t)


class Wrapped(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x, t):
        return self.part(x, t) if isinstance(self.part, Module) else self.part(x)


@pytest.mark.parametrize(
    ("network", "form"),
    [
        (lambda x, t: x * t[:, None], (True, torch.float32)),
        (lambda x, t: x * t, (False, torch.float32)),
        (lambda x, t: x * float(t), (False, torch.float32)),
        (lambda x, t: x if t > 3 else 2 * x, (False, torch.float32)),
        (lambda x, t: type("Output", (), {"sample": x * t[:, None]})(), (True, torch.float32)),
        (lambda x, t: (x * t[:, None], "more"), (True, torch.float32)),
        (lambda x, t: x * ALPHAS[t][:, None], (True, torch.long)),
        (lambda x, t: x * ALPHAS[t], (False, torch.long)),
        (Module(lambda t: t[:, None]), (True, torch.float32)),
        (Module(nn.Sequential(nn.Embedding(1000, 3))), (True, torch.long)),
        (Module(nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3))).half(), (True, torch.float16)),
    ],
)
@pytest.mark.parametrize("n", [3, 2, 1])
def test_the_time_is_passed_in_the_form_that_the_network_takes(network, form, n):
    model = Diffusion(network, DDPM, (3,))
    assert model._time == form
    assert model.denoise(randn(n, 3), 1.3).shape == (n, 3)  # also where the batch is as long as the sample


def test_the_form_is_found_also_where_a_wrong_one_would_broadcast():
    for d in (1, 2, 3):
        assert Diffusion(lambda x, t: x * t, DDPM, (d,))._time == (False, torch.float32)
        assert Diffusion(lambda x, t: x * t, DDPM, (2, 3, d))._time == (False, torch.float32)


def test_times_are_fractional_where_the_network_allows_it():
    seen = []
    model = Diffusion(lambda x, t: seen.append(t) or x * t[:, None], DDPM, (3,))
    model.denoise(randn(2, 3), 1.3)
    assert seen[-1].dtype == torch.float32 and seen[-1][0] != seen[-1][0].round()


def test_integer_times_are_rounded():
    seen = []
    fractional, rounded = (
        Diffusion(lambda x, t: x, DDPM, (2,)),
        Diffusion(lambda x, t: seen.append(t) or x * ALPHAS[t], DDPM, (2,)),
    )
    rounded.denoise(randn(1, 2), 1.3)
    assert seen[-1] == fractional.schedule.time(torch.tensor(1.3, dtype=torch.float64)).round().long()
    with pytest.raises(ValueError, match="Cannot call"):  # 0.25 log s has nothing to do with integers
        Diffusion(lambda x, t: x * ALPHAS[t.abs()], EDMEulerScheduler(), (2,))


def test_a_network_that_fits_no_convention_is_refused_with_both_failures():
    with pytest.raises(ValueError, match=r"float32 t of shape \(2,\)(.|\n)*variance_type(.|\n)*float32 t of shape \(\)"):
        Diffusion(lambda x, t: torch.cat([x, x], 1), DDPM, (4,))


def test_outputs_of_another_shape_are_refused_while_sampling_too():
    model = Diffusion(lambda x, t: x if len(x) < 4 else x[:1], DDPM, (4,), name="shrinker")
    with pytest.raises(ValueError, match=r"shrinker answered with shape \(1, 4\), expected \(4, 4\)"):
        model.denoise(randn(4, 4), 1.0)
    with pytest.raises(ValueError, match=r"takes samples of shape \(4,\)"):
        model.denoise(randn(4, 5), 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_any_precision_denoise_like_the_float32_one(dtype):
    reference, model = Diffusion(tiny_unet(), DDPM), Diffusion(tiny_unet().to(dtype), DDPM)
    assert model.dtype == dtype
    for z in (randn(2, 1, 8, 8), randn(2, 1, 8, 8, dtype=torch.float64)):
        for s in (0.05, 2.0):
            D = model.denoise(z, s)
            assert D.dtype == z.dtype
            torch.testing.assert_close(D, reference.denoise(z, s), rtol=0.05, atol=0.05 * max(1, s))


def test_half_precision_samples_are_denoised_in_float32():
    model = Diffusion(lambda x, t: x, DDPM, (3,))
    z = (50 * randn(4, 3)).half()
    D = model.denoise(z, 50.0)
    assert D.dtype == torch.float16
    torch.testing.assert_close(D, model.denoise(z.double(), 50.0).half())


def test_a_callable_without_weights_computes_in_the_dtype_of_the_samples():
    model = Diffusion(lambda x, t: x, DDPM, (3,))
    assert model.denoise(randn(2, 3, dtype=torch.float64), 1.0).dtype == torch.float64


def test_a_network_may_be_cast_after_it_was_wrapped():
    network = nn.BatchNorm1d(3, affine=False)  # buffers only, which casting replaces
    module = Module(lambda t: t[:, None])
    for part in (module, network):
        model = Diffusion(Wrapped(part), DDPM, (3,))
        model.model.to(torch.float64)
        assert model.dtype == torch.float64 and model.denoise(randn(2, 3), 1.0).dtype == torch.float32


def test_a_learned_variance_is_split_off():
    unet = tiny_unet(out_channels=2)
    model = Diffusion(unet, DDPMScheduler(variance_type="learned_range"))
    halves = Diffusion(lambda x, t: unet(x, t).sample[:, :1], DDPM, (1, 8, 8))
    z = randn(2, 1, 8, 8)
    torch.testing.assert_close(model.denoise(z, 1.0), halves.denoise(z, 1.0))
    wide = Diffusion(lambda x, t: torch.cat([x, x], 1), DDPMScheduler(variance_type="learned"), (2, 4, 4))
    assert wide.denoise(randn(3, 2, 4, 4), 1.0).shape == (3, 2, 4, 4)


def test_gradients_flow_through_the_denoiser():
    z = randn(2, 1, 8, 8).requires_grad_()
    (g,) = torch.autograd.grad(Diffusion(tiny_unet(), DDPM).denoise(z, 1.0).sum(), z)
    assert g.isfinite().all() and g.abs().max() > 0


def test_shapes_come_from_the_config_or_have_to_be_given():
    assert Diffusion(tiny_unet(sample_size=(8, 16)), DDPM).shape == (1, 8, 16)
    assert Diffusion(tiny_unet(), DDPM, (1, 16, 16)).denoise(randn(2, 1, 16, 16), 1.0).shape == (2, 1, 16, 16)
    assert Diffusion(diffusers.UNet1DModel(sample_size=16, in_channels=2, out_channels=2), DDPM).shape == (2, 16)
    with pytest.raises(ValueError, match="shape=.*without the batch"):
        Diffusion(lambda x, t: x, DDPM)
    with pytest.raises(ValueError, match="shape="):
        Diffusion(tiny_unet(sample_size=None), DDPM)
    with pytest.raises(ValueError, match=r"takes 1 channels, got shape=\(3, 8, 8\)"):
        Diffusion(tiny_unet(), DDPM, (3, 8, 8))
    with pytest.raises(ValueError, match="3 channels in and 1 out"):
        Diffusion(tiny_unet(in_channels=3), DDPM)


def test_a_network_is_put_into_evaluation_mode():
    unet = tiny_unet().train()
    Diffusion(unet, DDPM)
    assert not unet.training


# Conditions and guidance ------------------------------------------------------------------------------------------------------


def conditional_unet(seed=0, **kwargs):
    torch.manual_seed(seed)
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    size = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return UNet2DConditionModel(cross_attention_dim=8, attention_head_dim=2, **blocks, **size, **kwargs).eval()


def text(seed):
    return {"encoder_hidden_states": randn(1, 5, 8, seed=seed)}


@pytest.mark.parametrize("w", [3.0, 0.5, 0.0])
@torch.no_grad()
def test_guidance_is_the_formula_of_two_calls_in_one(w):
    unet = conditional_unet()
    model = Diffusion(unet, DDPM, condition=text(1), null_condition=text(2), guidance_scale=w)
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(1))
    z, s = randn(3, 4, 8, 8), torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64)
    D = model.denoise(z, s)
    assert len(calls) == 1 and model.extrapolated
    x, t = (z / (1 + s**2).sqrt()[:, None, None, None]).float(), model.schedule.time(s)
    own, null = (unet(x, t, randn(1, 5, 8, seed=seed).expand(3, -1, -1)).sample for seed in (1, 2))
    torch.testing.assert_close(D, model.schedule.denoised(z, s, null + w * (own - null)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.denoise(z, 1.0)[1], D[1], rtol=1e-4, atol=1e-4)


def test_without_guidance_only_the_condition_is_run():
    model = Diffusion(conditional_unet(), DDPM, condition=text(1), null_condition=text(2))
    z = randn(2, 4, 8, 8)
    assert not model.extrapolated
    torch.testing.assert_close(model.denoise(z, 1.0), Diffusion(model.model, DDPM, condition=text(1)).denoise(z, 1.0))


def test_conditions_may_nest():
    added = {"time_embedding": "nothing", "added": {"shift": randn(1, 3)}}
    model = Diffusion(lambda x, t, added, time_embedding: x + added["shift"], DDPM, (3,), condition=added, name="nested")
    other = model.with_condition(time_embedding="nothing", added={"shift": randn(1, 3, seed=1)})
    assert model.key != other.key and (model.denoise(randn(2, 3), 1.0) != other.denoise(randn(2, 3), 1.0)).all()


def test_two_conditions_of_one_network_share_the_weights():
    model = Diffusion(conditional_unet(), DDPM, condition=text(1), name="one")
    other = model.with_condition(**text(2), name="two")
    assert other.model is model.model and (model.name, other.name) == ("one", "two")
    assert other.key != model.key and other.with_condition(**text(1)).key == model.key
    assert model.with_condition(null_condition=text(3), guidance_scale=2.0).key != model.key
    model.check_composable(other)


def test_a_condition_is_one_and_guidance_needs_two():
    with pytest.raises(ValueError, match=r"encoder_hidden_states.*\(2, 5, 8\).*batch axis"):
        Diffusion(conditional_unet(), DDPM, condition={"encoder_hidden_states": randn(2, 5, 8)})
    for null in (None, {"encoder_hidden_states": randn(1, 6, 8)}):
        with pytest.raises(ValueError, match="guidance_scale=2 needs"):
            Diffusion(conditional_unet(), DDPM, condition=text(1), null_condition=null, guidance_scale=2.0)
    with pytest.raises(ValueError, match="no text encoder"):
        Diffusion(conditional_unet(), DDPM, condition=text(1)).with_condition("a cat")
    with pytest.raises(ValueError, match="classes 0 to 999, got class_label=1000"):
        Diffusion(tiny_dit(), DDPM).with_condition(class_label=1000)
    with pytest.raises(ValueError, match="not class-conditional"):
        Diffusion(tiny_unet(), DDPM).with_condition(class_label=1)


# Identity ---------------------------------------------------------------------------------------------------------------------


def test_equal_weights_have_equal_keys_whatever_the_name():
    p, q = Diffusion(tiny_unet(), DDPM, name="p"), Diffusion(tiny_unet(), DDIMScheduler.from_config(DDPM.config), name="q")
    assert p.key == q.key and same_model(p, q)


def test_whatever_changes_the_distribution_changes_the_key():
    model = Diffusion(tiny_unet(), DDPM)
    others = [
        Diffusion(tiny_unet(seed=1), DDPM),
        Diffusion(tiny_unet(freq_shift=1), DDPM),
        Diffusion(tiny_unet(), DDPMScheduler(beta_end=0.03)),
        Diffusion(tiny_unet(), DDPMScheduler(prediction_type="sample")),
        Diffusion(tiny_unet(), DDPM, (1, 16, 16)),
    ]
    assert len({model.key, *(other.key for other in others)}) == 6
    before = model.key
    with torch.no_grad():
        model.model.conv_in.bias += 1e-3
    assert model.key != before  # a remembered hash does not outlive the weights


def test_a_callable_is_known_by_its_name_only():
    def network(x, t):
        return x

    p, q = (Diffusion(network, DDPM, (2,), name=name) for name in ("p", "q"))
    assert p.key == Diffusion(network, DDPM, (2,), name="p").key != q.key
    assert Diffusion(network, DDPM, (2,)).name == "network"
    anonymous = Diffusion(network, DDPM, (2,))
    assert anonymous.key == anonymous.key != Diffusion(network, DDPM, (2,)).key
    module = Module(lambda t: t[:, None])
    assert Diffusion(module, DDPM, (3,), name="p").key != Diffusion(module, DDPM, (3,), name="q").key


# Composability ----------------------------------------------------------------------------------------------------------------


def test_models_without_common_states_are_refused_by_name():
    small, large = Diffusion(tiny_unet(), DDPM, name="small"), Diffusion(tiny_unet(), DDPM, (1, 16, 16), name="large")
    with pytest.raises(ValueError, match=r"small.*\(1, 8, 8\), large.*\(1, 16, 16\)"):
        small.check_composable(large)
    low, high = (
        EnergyModel(lambda z, s: z.sum(1), (2,), s_min=a, s_max=b, name=name)
        for a, b, name in ((0.1, 1, "low"), (2, 3, "high"))
    )
    with pytest.raises(ValueError, match="low.*0.1 to 1.*high.*2 to 3"):
        low.check_composable(high)
    small.check_composable(Diffusion(tiny_unet(seed=1), FlowMatchEulerDiscreteScheduler()))


def test_latents_are_composable_within_one_latent_space_only():
    vae = tiny_autoencoder(scaling_factor=0.18)
    p = Diffusion(conditional_unet(), DDPM, condition=text(1), autoencoder=vae, name="p")
    decoder = tiny_autoencoder(scaling_factor=0.18)
    nn.init.normal_(decoder.decoder.conv_in.weight)
    p.check_composable(Diffusion(conditional_unet(), DDPM, condition=text(2), autoencoder=decoder))
    others = [tiny_autoencoder(scaling_factor=0.13), tiny_autoencoder(seed=1, scaling_factor=0.18), None]
    for other in others:
        with pytest.raises(ValueError, match=r"p and q live in different latent spaces.*autoencoder="):
            p.check_composable(Diffusion(conditional_unet(), DDPM, condition=text(2), autoencoder=other, name="q"))


@torch.no_grad()
def test_decoding_undoes_the_scaling():
    x = randn(5, 4, 8, 8)
    for kwargs in ({"scaling_factor": 0.18}, {"scaling_factor": 1.5, "shift_factor": 0.1}):
        vae = tiny_autoencoder(**kwargs)
        model = Diffusion(conditional_unet(), DDPM, condition=text(1), autoencoder=vae)
        expected = vae.decode(x / kwargs["scaling_factor"] + kwargs.get("shift_factor", 0.0)).sample
        torch.testing.assert_close(model.decode(x, batch_size=2), (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    pixels = randn(2, 1, 8, 8)
    torch.testing.assert_close(Diffusion(tiny_unet(), DDPM).decode(pixels), (pixels / 2 + 0.5).clamp(0, 1))
    assert Gaussian((3,)).decode(randn(2, 3)).equal(randn(2, 3))


# Energies ---------------------------------------------------------------------------------------------------------------------


def gaussian_energy(z, s):
    return ((z - 0.3) ** 2 / (0.25 + (s**2).reshape(-1, 1)) / 2).sum(-1)


def test_an_energy_denoises_by_its_gradient():
    model, exact = EnergyModel(gaussian_energy, (3,)), Gaussian((3,))
    z = randn(4, 3)
    for s in (0.01, 1.0, torch.tensor([0.1, 1.0, 2.0, 50.0], dtype=torch.float64)):
        with torch.no_grad():
            D = model.denoise(z, s)
        assert not D.requires_grad
        torch.testing.assert_close(D, exact.denoise(z, s), rtol=1e-4, atol=1e-3)
    assert model.has_energy and model.energy(z, 1.0).shape == (4,)


def test_the_denoiser_of_an_energy_can_be_differentiated():
    z = randn(4, 3).requires_grad_()
    (g,) = torch.autograd.grad(EnergyModel(gaussian_energy, (3,)).denoise(z, 1.0).sum(), z)
    torch.testing.assert_close(g, torch.full_like(g, 0.25 / 1.25))


def test_an_energy_is_one_number_per_sample():
    with pytest.raises(ValueError, match=r"answered with shape \(4, 3\)"):
        EnergyModel(lambda z, s: z**2, (3,)).denoise(randn(4, 3), 1.0)
    with pytest.raises(ValueError, match="s_min"):
        EnergyModel(gaussian_energy, (3,), s_min=0.0)


# A denoiser as a UNet ---------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "epsilon": DDPM,
    "sample": DDIMScheduler(prediction_type="sample", beta_schedule="squaredcos_cap_v2"),
    "velocity": diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
    "zero-snr": DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc-flow": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "edm": EDMEulerScheduler(),
    "edm-v": diffusers.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "ve": ScoreSdeVeScheduler(),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_denoiser_read_back_from_its_unet_is_the_denoiser(scheduler):
    for denoiser in (Gaussian((1, 8, 8)), Gaussian((3,))):
        model = Diffusion(DenoiserUNet(denoiser, scheduler), scheduler)
        assert model.shape == denoiser.shape
        low, high = model.s_min, min(model.s_max, 1e3)
        z = randn(5, *denoiser.shape, dtype=torch.float64)
        s = torch.logspace(math.log10(low), math.log10(high), 5, dtype=torch.float64)
        z = z * (0.5 + s.reshape(-1, *(1,) * len(denoiser.shape)))
        torch.testing.assert_close(model.denoise(z, s), denoiser.denoise(z, s), rtol=1e-3, atol=1e-3)


def test_a_network_read_back_from_its_unet_is_the_network():
    p = Diffusion(tiny_unet(), DDPM)
    q = Diffusion(DenoiserUNet(p, DDPM), DDPM)
    torch.testing.assert_close(q.denoise(randn(2, 1, 8, 8), 0.7), p.denoise(randn(2, 1, 8, 8), 0.7), rtol=1e-4, atol=1e-4)
    assert q.key == Diffusion(DenoiserUNet(p, DDPM), DDPM).key != Diffusion(DenoiserUNet(Gaussian((1, 8, 8)), DDPM), DDPM).key


LOOPS = {
    "DDIM": DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"),
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
    "Euler": diffusers.EulerDiscreteScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    "Heun": diffusers.HeunDiscreteScheduler(beta_schedule="squaredcos_cap_v2"),
    "zero-SNR": DDIMScheduler(
        clip_sample=False, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "EDM": EDMEulerScheduler(),
}


@pytest.mark.parametrize("scheduler", LOOPS.values(), ids=LOOPS)
@torch.no_grad()
def test_a_scheduler_loop_over_an_exact_denoiser_samples_its_distribution(scheduler):
    unet = DenoiserUNet(Gaussian((2,)), scheduler)
    scheduler.set_timesteps(60)
    x = randn(20_000, 2) * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else randn(20_000, 2)
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(unet(x_in, t).sample, t, x).prev_sample
    # 40,000 draws leave 0.0025 on the mean and 0.0018 on the deviation; 60 first-order steps leave up to 3 % bias.
    assert abs(x.mean() - 0.3) < 0.02 and abs(x.std() - 0.5) < 0.03


def test_a_ddpm_pipeline_takes_a_denoiser_as_its_unet():
    def energy(z, s):
        return ((z - 0.3) ** 2 / (0.25 + (s**2).reshape(-1, 1, 1, 1)) / 2).sum((1, 2, 3))

    # Pipelines run under no_grad; the energy switches gradients on for itself.
    scheduler = DDPMScheduler(clip_sample=False)
    pipe = DDPMPipeline(unet=DenoiserUNet(EnergyModel(energy, (3, 8, 8), s_max=200), scheduler), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=4, num_inference_steps=20, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (4, 3, 8, 8) and abs(images.mean() - 0.65) < 0.05  # 0.3 in [-1, 1]


def test_outside_its_range_a_denoiser_is_asked_at_its_nearest_level():
    gaussian = Gaussian((2,))
    gaussian.s_min, gaussian.s_max = 0.1, 10.0
    scheduler = ScoreSdeVeScheduler()
    model = Diffusion(DenoiserUNet(gaussian, scheduler), scheduler)
    z = randn(4, 2, dtype=torch.float64)
    torch.testing.assert_close(model.denoise(1000 * z, 1000.0), gaussian.denoise(10 * z, 10.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.denoise(z, 0.02), gaussian.denoise(z, 0.1), rtol=1e-4, atol=1e-4)


def test_a_unet_returns_tuples_and_refuses_learned_variances():
    unet = DenoiserUNet(Gaussian((1, 8, 8)), DDPM)
    (out,) = unet(randn(2, 1, 8, 8), 10, return_dict=False, class_labels=None)
    assert out.equal(unet(randn(2, 1, 8, 8), torch.tensor([10, 10])).sample)
    assert (unet.config.sample_size, unet.config.in_channels, unet.dtype) == (8, 1, torch.float32)
    with pytest.raises(ValueError, match=r"variance_type='learned_range'.*fixed_small"):
        DenoiserUNet(Gaussian((1, 8, 8)), DDPMScheduler(variance_type="learned_range"))


# Pipelines --------------------------------------------------------------------------------------------------------------------


def test_an_unconditional_pipeline_is_its_unet():
    unet = tiny_unet()
    model = Diffusion.from_pipeline(DDPMPipeline(unet=unet, scheduler=DDPM), name="digits")
    assert model.model is unet and model.scheduler.config == DDPM.config and model.name == "digits"
    assert model.key == Diffusion(unet, DDPM).key
    with pytest.raises(ValueError, match="prompt: no option of DDPMPipeline, which takes batch_size"):
        Diffusion.from_pipeline(DDPMPipeline(unet=unet, scheduler=DDPM), prompt="a cat")


@torch.no_grad()
def test_a_dit_pipeline_is_conditioned_on_classes():
    dit = tiny_dit()
    pipe = diffusers.DiTPipeline(
        transformer=dit, vae=tiny_autoencoder(scaling_factor=0.18), scheduler=DDIMScheduler(clip_sample=False)
    )
    model = Diffusion.from_pipeline(pipe, class_labels=[7], guidance_scale=4.0)
    z, s = randn(2, 4, 8, 8), torch.tensor(1.0, dtype=torch.float64)
    x, t = z / 2**0.5, model.schedule.time(s).expand(2)
    own, null = (dit(x, timestep=t, class_labels=torch.tensor([k, k])).sample[:, :4] for k in (7, 1000))
    torch.testing.assert_close(
        model.denoise(z, s), model.schedule.denoised(z, s, null + 4 * (own - null)), rtol=1e-4, atol=1e-4
    )
    assert model.name == "class 7" and model.decode(z).shape == (2, 3, 16, 16)
    assert model.with_condition(class_labels=[8]).key != model.key


def clip(folder, projection=False):
    """A text encoder and tokenizer from nothing: every letter is a token."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = letters + [f"{c}</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(vocab_size=len(tokens), max_position_embeddings=12, **size, **ends)
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return tokenizer, cls(config).eval()


def tiny_stable_diffusion(folder):
    tokenizer, encoder = clip(folder)
    safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = {"vae": tiny_autoencoder(scaling_factor=0.18), "unet": conditional_unet(), "scheduler": DDPMScheduler()}
    return diffusers.StableDiffusionPipeline(**parts, text_encoder=encoder, tokenizer=tokenizer, **safety)


def test_two_prompts_of_a_stable_diffusion_pipeline_compose_in_latent_space(tmp_path):
    cat = Diffusion.from_pipeline(tiny_stable_diffusion(tmp_path), "cat", guidance_scale=1.0)
    dog = cat.with_condition("dog")
    both = cat & dog
    assert str(both) == "cat ⊗ dog"
    classifier = sculpt.fit([cat, dog], steps=2, samples=10, sample_steps=2, batch_size=4, progress=False)
    samples = both.sample(2, classifier, steps=4, progress=False)
    assert samples.x.shape == (2, 4, 8, 8) and samples.decode().shape == (2, 3, 16, 16)
    assert samples.decode().min() >= 0 and samples.decode().max() <= 1
    tracked = both.sample(2, Tracked(particles=8), steps=4, progress=False)
    assert tracked.decode().shape == (2, 3, 16, 16) and not tracked.diagnostics.notes
    strong = cat.with_condition(guidance_scale=3.0, negative_prompt="dog", prompt="cat")
    extrapolated = (dog & strong).sample(2, Tracked(particles=8), steps=4)
    assert any("no marginal" in note for note in extrapolated.diagnostics.notes)


@torch.no_grad()
def test_two_prompts_of_a_stable_diffusion_pipeline_are_two_base_models(tmp_path):
    pipe = tiny_stable_diffusion(tmp_path)
    cat = Diffusion.from_pipeline(pipe, "cat", guidance_scale=3.0)
    dog = cat.with_condition("dog", negative_prompt="cat")
    assert (cat.name, dog.name) == ("cat", "dog") and cat.model is dog.model and cat.key != dog.key and dog.extrapolated
    cat.check_composable(dog)
    z = randn(2, 4, 8, 8)
    own, null = pipe.encode_prompt("dog", "cpu", 1, True, "cat")
    by_hand = Diffusion(
        pipe.unet,
        DDPM,
        condition={"encoder_hidden_states": own},
        null_condition={"encoder_hidden_states": null},
        guidance_scale=3.0,
    )
    torch.testing.assert_close(dog.denoise(z, 1.0), by_hand.denoise(z, 1.0))
    assert dog.key == by_hand.key and dog.decode(z).shape == (2, 3, 16, 16)
    assert not Diffusion.from_pipeline(pipe).extrapolated


@torch.no_grad()
def test_a_stable_diffusion_xl_pipeline_carries_its_added_conditions(tmp_path):
    tokenizer, encoder = clip(tmp_path)
    _, encoder_2 = clip(tmp_path, projection=True)
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    size = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    unet = UNet2DConditionModel(cross_attention_dim=16, attention_head_dim=2, **blocks, **size, **added).eval()
    parts = {"vae": tiny_autoencoder(scaling_factor=0.13), "unet": unet, "scheduler": DDPMScheduler()}
    texts = {"text_encoder": encoder, "text_encoder_2": encoder_2, "tokenizer": tokenizer, "tokenizer_2": tokenizer}
    pipe = diffusers.StableDiffusionXLPipeline(**parts, **texts, add_watermarker=False)
    model = Diffusion.from_pipeline(pipe, "cat", guidance_scale=3.0)
    assert model.condition["added_cond_kwargs"]["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    assert model.denoise(randn(2, 4, 8, 8), 1.0).isfinite().all()
    assert model.with_condition("dog").key != model.key


@torch.no_grad()
def test_a_stable_diffusion_3_pipeline_flows_in_latents(tmp_path):
    tokenizer, encoder = clip(tmp_path, projection=True)
    torch.manual_seed(0)
    size = {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "caption_projection_dim": 8,
    }
    widths = {"attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16}
    transformer = SD3Transformer2DModel(**size, **widths).eval()
    vae = tiny_autoencoder(scaling_factor=1.5, shift_factor=0.06)
    encoders = {"text_encoder": encoder, "text_encoder_2": encoder, "text_encoder_3": None}
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": None}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, **encoders, **tokenizers)
    model = Diffusion.from_pipeline(pipe, "cat", guidance_scale=2.0)
    z, s = randn(2, 4, 8, 8), torch.tensor(1.0, dtype=torch.float64)
    calls = {name: (model.condition, model.null_condition)[i] for i, name in enumerate(("own", "null"))}
    t = torch.full((2,), 500.0)
    F = {
        name: transformer(z / 2, timestep=t, **{k: c.expand(2, *c.shape[1:]) for k, c in condition.items()}).sample
        for name, condition in calls.items()
    }
    expected = (z - (F["null"] + 2 * (F["own"] - F["null"]))) / 2  # D = (z - s v) / (1 + s)
    torch.testing.assert_close(model.denoise(z, s), expected, rtol=1e-4, atol=1e-4)
    assert model.s_max == math.inf and model.decode(z).shape == (2, 3, 16, 16)


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(TypeError, match="got a UNet2DModel. Pass a network to"):
        Diffusion.from_pipeline(tiny_unet())
