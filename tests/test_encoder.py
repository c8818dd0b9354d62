"""A UNet's encoder as a classifier's backbone."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

import sculpt
from sculpt import Classifier
from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.encoder import UNetEncoder

SIZES = {"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}


def model(seed=0, **options):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(in_channels=1, out_channels=1, **SIZES, **{**blocks, **options}).eval()
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    return sculpt.Diffusion(unet, scheduler, name=f"unet-{seed}")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("centred", [False, True])
def test_an_encoder_sees_what_the_middle_of_its_unet_sees(centred):
    p, seen = model(center_input_sample=centred), []
    encoder, schedule = UNetEncoder.of(p, width=24), p.schedule
    p.model.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    encoder.middle.register_forward_hook(lambda module, inputs, output: seen.append(output))
    z, s = 3 * randn(4, 1, 16, 16), torch.tensor([0.1, 1.0, 5.0, 50.0], dtype=torch.float64)
    with torch.no_grad():
        p.model(like(schedule.scale(s), z) * z, schedule.time(s))
        assert encoder(z, s).shape == encoder(z).shape == (4, 24)
    torch.testing.assert_close(seen[1], seen[0])
    encoder.stem.weight.data.zero_()
    assert p.model.conv_in.weight.abs().max() > 0  # the weights are its own


def test_a_classifier_on_an_encoder_is_fitted_saved_and_read(tmp_path):
    models, data = [model(0), model(1)], [randn(24, 1, 16, 16, seed=i) + i for i in range(2)]
    network = UNetEncoder.of(models[0], width=16)
    options = {"data": data, "network": network, "steps": 8, "batch_size": 8, "progress": False}
    classifier = sculpt.fit(models, **options)  # with the gradients' losses, which differentiate twice
    assert "held_out_path" in classifier.history[-1]
    classifier.save_pretrained(tmp_path)
    z, s = randn(3, 1, 16, 16), torch.tensor(2.0, dtype=torch.float64)
    again = Classifier.from_pretrained(tmp_path)
    torch.testing.assert_close(again.marginal(z, s), classifier.marginal(z, s), rtol=0, atol=0)
    samples = [
        (models[0] & models[1]).sample(2, c, steps=3, generator=torch.Generator().manual_seed(0)).x for c in (classifier, again)
    ]
    assert torch.equal(*samples)


def test_only_an_unconditional_unet_lends_its_encoder():
    with pytest.raises(ValueError, match="UNet of 3 classes.*unconditional"):
        UNetEncoder.of(model(num_class_embeds=3))
    callable_ = sculpt.Diffusion(lambda x, t: x, DDPMScheduler(), (1, 16, 16), name="callable")
    with pytest.raises(ValueError, match="read from a diffusers UNet2DModel, got"):
        UNetEncoder.of(callable_)


@pytest.mark.parametrize("name", ["NoSuchScheduler", "UNet2DModel", "loaders"])
def test_noise_levels_are_those_of_a_scheduler_that_diffusers_has(name):
    config = UNetEncoder.of(model()).config
    with pytest.raises(ValueError, match=f"{name}, which is no scheduler of diffusers"):
        UNetEncoder(**{**config, "scheduler": {**config["scheduler"], "_class_name": name}})
