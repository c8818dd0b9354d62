"""Diffusion compositions as checkpoints: one network, which diffusers runs from its folder, and which composes again."""

import json
import math

import pytest
import torch
from checkpoints import tiny_unet
from diffusers import DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, UNet2DModel
from diffusers_models import three_rings
from oracles import draw_posterior, energy_distance

import sculpt
from sculpt.diffusion.twosample import two_sample_test
from sculpt.formula import Posterior

RINGS = three_rings()[:2]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unets():
    return [sculpt.Diffusion(tiny_unet(seed), DDPMScheduler(), name=name) for seed, name in enumerate("pq")]


P, Q = unets()
DATA = 0.3 * torch.randn(64, 1, 8, 8, generator=generator()) + 0.5


def quick(composition=None, road=None, **options):
    """A second of training: nothing is learned, everything runs."""
    defaults = {"steps": 6, "batch_size": 4, "progress": False, "sample_steps": 4}
    defaults |= {"data": DATA} if road is None else {"samples": 24}
    return sculpt.distill(P & Q if composition is None else composition, road, **(defaults | options))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# The two-sample test ------------------------------------------------------------------------------------------------------------------


def test_the_discrepancy_of_points_is_the_sum_over_their_kernels():
    a, b = torch.tensor([[0.0]]), torch.tensor([[2.0]])
    kernel = sum(math.exp(-1 / (2 * c**2)) for c in (0.25, 0.5, 1.0))  # the median of the squared distances is their only one
    assert two_sample_test(a, b, generator())[0] == pytest.approx(2 * (3 - kernel))
    assert two_sample_test(a, a.clone() + 1e-9, generator())[0] == pytest.approx(0, abs=20)


def test_samples_of_one_distribution_are_told_apart_as_often_as_by_chance_and_others_always():
    def p_value(k, shift):
        return two_sample_test(
            torch.randn(80, 2, generator=generator(k)),
            torch.randn(80, 2, generator=generator(1000 + k)) + shift,
            generator(k),
            99,
        )[1]

    same = torch.tensor([p_value(k, 0.0) for k in range(100)])
    # Uniform p-values, by Dvoretzky, Kiefer and Wolfowitz.
    bound = math.sqrt(math.log(2 / 1e-4) / 200)
    assert all(abs(float((same <= level).float().mean()) - level) < bound for level in (0.1, 0.3, 0.5, 0.7, 0.9))
    assert max(p_value(k, 1.0) for k in range(10)) == 0.01


# The student --------------------------------------------------------------------------------------------------------------------------


def test_a_student_is_one_network_that_diffusers_runs_from_its_folder_alone(tmp_path):
    model = quick(checkpoint=tmp_path / "both")
    again = sculpt.load(tmp_path / "both")
    assert same(again.model, model.model) and not same(model.model, P.model)
    assert model.key != P.key and str(model) == str(P & Q) and str(again) == "both"
    calls = []
    again.model.register_forward_hook(lambda *_: calls.append(1))
    found = again.sample(3, steps=5, generator=generator(), progress=False)
    assert len(calls) == 5 and torch.equal(found.x, model.sample(3, steps=5, generator=generator(), progress=False).x)
    pipe = DDPMPipeline.from_pretrained(tmp_path / "both")
    assert same(pipe.unet.float(), model.model)
    assert pipe(batch_size=2, num_inference_steps=3, output_type="np", generator=generator()).images.shape == (2, 8, 8, 1)
    nested = (again - P).sample(2, steps=3, generator=generator(), progress=False)
    assert nested.x.shape == (2, 1, 8, 8)


def test_the_card_says_how_far_the_student_and_its_anchor_are_from_the_target(tmp_path):
    quick(checkpoint=tmp_path / "both", judge=lambda x: {"mean": float(x.mean())})
    about = json.loads((tmp_path / "both" / "distillation.json").read_text())
    measured = about["measured"]
    assert measured["target: mean"] == pytest.approx(0.5, abs=0.1)
    assert 0 < measured["student and target: p"] <= 1 and measured["anchor and target: MMD²"] > 0
    assert f"`{P & Q}`" in (tmp_path / "both" / "README.md").read_text()


@pytest.mark.parametrize(
    "road",
    [
        sculpt.Tracked(particles=24, resample=False, detail=0),
        sculpt.Tracked(particles=12),
        sculpt.Rejection(lambda x: torch.stack([x.flatten(1).mean(1), 0 * x.flatten(1).mean(1)], -1)),
    ],
    ids=["weights", "selected", "rejection"],
)
def test_a_student_learns_from_any_road(road):
    assert quick(road=road).sample(2, steps=3, progress=False).x.shape == (2, 1, 8, 8)


def test_samples_count_as_their_weights_say():
    some = torch.where(torch.arange(64) < 32, 0.0, -1e9)
    student = P.student(P & Q, None, data=sculpt.Samples(DATA, some.log_softmax(0)))
    student.prepare(False)
    left = 32 - len(student.held_out[0])
    torch.testing.assert_close(student.p, torch.cat([torch.full((left,), 1 / left), torch.zeros(32)]).double())
    spread = float(DATA[32 - left : 32].flatten(1).var(0, unbiased=False).mean().sqrt())
    assert student.std == pytest.approx(spread, rel=1e-5)


def test_a_killed_student_goes_on_with_what_was_drawn_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    road = sculpt.Tracked(particles=24, detail=0)
    whole = quick(road=road)
    student = type(P.student(P & Q, road))
    loss, calls = student.loss, []

    def killed(self, seed):
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(self, seed)

    with monkeypatch.context() as patch:
        patch.setattr(student, "loss", killed)
        patch.setattr("time.monotonic", iter(range(0, 10_000_000, 100)).__next__)  # the state is saved whenever it may be
        with pytest.raises(KeyboardInterrupt):
            quick(road=road, checkpoint=tmp_path)
    monkeypatch.setattr(student, "_draw", None)  # it is there
    resumed = quick(road=road, checkpoint=tmp_path)
    assert same(resumed.model, whole.model) and same(sculpt.load(tmp_path).model, whole.model)


def test_adapters_are_merged_and_little_else_is_trained(tmp_path):
    student = P.student(P & Q, None, data=DATA, lora=2)
    trained = sum(p.numel() for p in student.network.parameters() if p.requires_grad)
    assert 0 < trained < 0.7 * sum(p.numel() for p in P.model.parameters())
    model = quick(lora=2, checkpoint=tmp_path / "lora", learning_rate=1e-2)
    assert list(model.model.state_dict()) == list(P.model.state_dict()) and not same(model.model, P.model)
    assert torch.equal(model.model.conv_in.bias, P.model.conv_in.bias.half().float())  # an adapter has none
    assert same(sculpt.load(tmp_path / "lora").model, model.model)
    DDPMPipeline.from_pretrained(tmp_path / "lora")


def test_a_scheduler_that_is_not_ddpms_is_kept(tmp_path):
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction")
    models = [sculpt.Diffusion(tiny_unet(seed), scheduler, name=name) for seed, name in enumerate("pq")]
    quick(models[0] & models[1], checkpoint=tmp_path / "euler")
    again = sculpt.load(tmp_path / "euler")
    assert type(again.scheduler) is EulerDiscreteScheduler and again.schedule.prediction_type == "v_prediction"


def test_what_cannot_become_a_student_says_so():
    closed = sculpt.Diffusion(lambda x, t: x, DDPMScheduler(), (1, 8, 8), name="closed")
    with pytest.raises(ValueError, match="A student begins as the anchor's network.*closed"):
        quick(closed & P)
    with pytest.raises(ValueError, match=r"data holds 20 samples or more of shape \(1, 8, 8\), got \(64, 1, 4, 4\)"):
        quick(data=DATA[..., :4, :4])
    with pytest.raises(ValueError, match="entries that are not finite"):
        quick(data=DATA / 0)
    with pytest.raises(ValueError, match="lora has to be at least 1"):
        quick(lora=0)
    with pytest.raises(ValueError, match="samples has to be at least 20"):
        quick(road=sculpt.Tracked(), samples=3)


@pytest.mark.slow
def test_a_student_of_mixtures_samples_as_exact_draws_do():
    torch.manual_seed(0)
    size = {"sample_size": 1, "in_channels": 2, "out_channels": 2, "block_out_channels": (64,), "layers_per_block": 2}
    unet = UNet2DModel(**size, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=8)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    p = sculpt.Diffusion(unet, scheduler, name="p")
    q = sculpt.Diffusion(lambda x, t: x, scheduler, p.shape, name="q")
    n, posterior = 4000, Posterior(2, (0, 1))
    exact = [draw_posterior(posterior, RINGS, n, generator(k)) for k in range(4)]
    data = draw_posterior(posterior, RINGS, 30_000, generator(9)).float().reshape(-1, 2, 1, 1)
    model = sculpt.distill(p & q, data=data, steps=1500, batch_size=256, learning_rate=2e-3, progress=False)
    found = model.sample(n, steps=64, generator=generator(), progress=False).x.flatten(1)
    floor = sum(energy_distance(other, exact[0]) for other in exact[1:]) / 3
    assert energy_distance(found, exact[0]) < 2.5 * floor
    of_anchor = RINGS[0].draw(n, generator(5))
    assert energy_distance(of_anchor, exact[0]) > 40 * floor
