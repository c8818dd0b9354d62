"""Compositions inside pipelines of every kind, guidance and all: what their schedulers are given is what the composition makes."""

import pytest
import torch

pytest.importorskip("transformers")

import pipelines

from sculpt import Diffusion
from sculpt.diffusion.diffusers.prediction import Prediction

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


# Text-to-video's scheduler has frames where its network has channels, which is refused; DDPM takes no prompts.
KINDS = [kind for kind in pipelines.KINDS if kind not in ("DDPM", "text-to-video")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_gives_its_scheduler_what_the_composition_makes(kind):
    pipe, call = pipelines.KINDS[kind]()
    pipe.set_progress_bar_config(disable=True)
    dog, cat = ({"class_labels": [i]} if kind == "DiT" else {"prompt": f"a {name}"} for i, name in enumerate(("dog", "cat")))
    p = Diffusion.from_pipeline(pipe, **dog, **call)
    composition = p & p.with_condition(**cat)
    unet, asked, given, step = composition.as_unet(), [], [], pipe.scheduler.step
    for part in ("unet", "transformer", "transformer_2"):
        if getattr(pipe, part, None) is not None:
            setattr(pipe, part, unet)
    unet.register_forward_pre_hook(lambda _, args, options: asked.append(unet.place.read(args, options)), with_kwargs=True)

    def watched(model_output, *args, **options):
        given.append(model_output)
        return step(model_output, *args, **options)

    pipe.scheduler.step = watched
    pipe(**dog, **call, num_inference_steps=4, output_type="np" if kind == "DiT" else "latent")
    # Guidance asks in one doubled call, or in several.
    asked = asked[:: len(asked) // len(given)]
    assert len(asked) == len(given) >= 2
    composed = Prediction(composition._at_once(None), pipe.scheduler)
    for (x, t), F in zip(asked, given, strict=True):
        x = torch.stack([part[: p.shape[0]] if part.shape[1:] == p.shape[1:] else part.reshape(p.shape) for part in x])[:1]
        expected = composed(x, t.flatten()[0])
        got = F.flatten()[: expected.numel()].reshape(expected.shape)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
