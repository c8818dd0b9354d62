"""The prompted scenes of ``pretrained/shapes``: what they are exactly, their judge, and the pipeline that draws them."""

import argparse
import hashlib
import itertools
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from imported import pretrained

import sculpt
from sculpt.formula import Posterior

SHAPES = Path(__file__).parents[1] / "pretrained" / "shapes"
MODEL = SHAPES / "model"
WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
PROMPTS = ["a red circle", "a thing at the left", "a blue cross at the top right", "a yellow thing", "a square", ""]


scenes, judge, measures, recipe = pretrained("shapes", "scenes", "judge", "measures", "recipe")


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbers(prompts):
    return torch.tensor([scenes.PROMPTS.index(prompt) for prompt in prompts])


# Scenes


def test_the_scenes_are_those_that_are_drawn():
    x = scenes.draw(50_000, generator())
    rows = scenes.row(x)
    assert len(scenes.scenes()) == 17_984 and rows.min() >= 0 and torch.equal(scenes.scenes()[rows], x)
    assert scenes.prior().sum() == pytest.approx(1, abs=1e-12)
    drawn = (x > 0).sum(-1).bincount(minlength=4)[1:] / len(x)
    torch.testing.assert_close(drawn, torch.full((3,), 1 / 3), atol=0.01, rtol=0)
    expected = torch.zeros(4, 17, dtype=torch.float64)
    for quarter in range(4):
        expected[quarter].index_add_(0, scenes.scenes()[:, quarter], scenes.prior())
        torch.testing.assert_close(x[:, quarter].bincount(minlength=17) / len(x), expected[quarter].float(), atol=0.01, rtol=0)


def test_prompts_pick_scenes_as_often_as_they_say():
    x = scenes.draw(100_000, generator(1))
    prompt = scenes.prompted(x, generator(2), empty=0.1)
    assert (prompt == 0).double().mean() == pytest.approx(0.1, abs=0.01)
    assert scenes.fits(prompt, x).any(-1).all()
    assert len(scenes.PROMPTS) == len(set(scenes.PROMPTS)) == 225 and prompt.unique().numel() == 225
    for name in ("a red thing", "a cross at the left", "a thing at the bottom right", "a green triangle at the top"):
        rows = scenes.row(x[prompt == scenes.PROMPTS.index(name)])
        p = scenes.conditional(name)
        assert p.sum() == pytest.approx(1, abs=1e-12) and (p[rows] > 0).all()
        objects = (scenes.scenes() > 0).sum(-1)
        expected = torch.stack([p[objects == k].sum() for k in (1, 2, 3)])
        drawn = objects[rows].bincount(minlength=4)[1:] / len(rows)
        torch.testing.assert_close(drawn.double(), expected, atol=2 / len(rows) ** 0.5, rtol=0)  # four standard errors
    assert max(measures.distances(prompt, x).values()) < 0.01


def test_exact_compositions_are_those_of_their_formulas():
    prompts = ("a red thing", "a circle", "a thing at the left")
    p = torch.stack([scenes.conditional(prompt) for prompt in prompts], -1)
    some = (p > 0).all(-1)
    for labels in [(0, 1, 2), (0, 1), (0, 0, 2)]:
        exact = scenes.posterior(prompts, labels)[some]
        wanted = Posterior(3, labels).value(p[some].log()).softmax(0)
        torch.testing.assert_close(exact / exact.sum(), wanted)
    torch.testing.assert_close(scenes.harmonic_mean(*prompts[:2]), scenes.posterior(prompts[:2], (0, 1)))
    torch.testing.assert_close(scenes.contrast(*prompts[:2]), scenes.posterior(prompts[:2], (0, 0)))
    both = scenes.product("a red thing", "a circle")
    assert (scenes.fits("a red thing", scenes.scenes()).any(-1) & scenes.fits("a circle", scenes.scenes()).any(-1))[
        both > 0
    ].all()
    torch.testing.assert_close(scenes.product("a circle", powers=[1.0]), scenes.conditional("a circle"))
    with pytest.raises(ValueError, match="No scene"):
        scenes.product("a red thing at the top left", "a blue thing at the top left")


def test_odds_and_mixtures_of_scenes_are_those_of_their_formulas():
    prompts = ("a green thing", "a triangle")
    p = torch.stack([scenes.conditional(prompt) for prompt in prompts], -1)
    some = (p > 0).all(-1)
    exact = scenes.posterior(prompts, (0, 1), (0.2, 0.8))
    wanted = Posterior(2, (0, 1), (0.2, 0.8)).value(p[some].log()).softmax(0)
    torch.testing.assert_close(exact[some], wanted)
    assert exact[~some].sum() == 0
    torch.testing.assert_close(scenes.mixture(p[:, 0], p[:, 1]), p.mean(-1))
    none = scenes.without("a red thing")
    assert not scenes.fits("a red thing", scenes.scenes()[none > 0]).any() and none.sum() == pytest.approx(1)


def test_exact_draws_of_a_composition_are_near_it_and_others_are_not():
    prompts = ("a green thing", "a triangle")
    target = scenes.harmonic_mean(*prompts)
    for p, near in ((target, True), (scenes.conditional(prompts[0]), False)):
        x = scenes.scenes()[p.multinomial(4000, True, generator=generator())]
        apart = measures.composed_distances(prompts, x, target)
        assert all((distance < 0.06) == near for distance in apart.values()), apart


# The judge


def test_the_judge_reads_what_is_drawn_and_refuses_what_is_spoilt():
    x = scenes.draw(500, generator())
    pictures = scenes.paint(x, generator(1))
    reading = judge.read(pictures)
    assert reading.accepted.all() and torch.equal(reading.scenes, x) and torch.equal(reading.rows, scenes.row(x))
    for how, spoilt in judge.spoilt(pictures).items():
        assert judge.read(spoilt).accepted.double().mean() < 0.15, how
    assert not judge.read(torch.rand(20, 3, 32, 32, generator=generator())).accepted.any()
    assert not judge.read(torch.full((1, 3, 32, 32), scenes.GROUND)).accepted.any()  # no object


def test_measures_of_exact_draws_are_the_least():
    x = scenes.draw(2000, generator())
    prompt = scenes.prompted(x, generator(1))
    told = measures.measure(prompt, judge.read(scenes.paint(x, generator(2))))
    assert told.accepted == told.asked == 1 and set(told.by_kind.values()) == {1.0}
    floor = measures.floor(prompt, generator(3))
    assert all(told.distances[name] < 2 * floor[name] + 0.01 for name in floor)
    other = measures.measure(prompt.flip(0), judge.read(scenes.paint(x, generator(2))))
    assert other.asked < 0.5 and other.distances["what is named"] > 2 * floor["what is named"]


# What is shipped


def test_the_card_names_the_weights_that_are_there():
    card = (MODEL / "README.md").read_text()
    assert sorted(MODEL.rglob("*.safetensors")) == sorted(MODEL / f"{name}.safetensors" for name in WEIGHTS)
    for name in WEIGHTS:
        content = (MODEL / f"{name}.safetensors").read_bytes()
        assert len(content) <= 12e6
        assert re.search(rf"`{name}\.safetensors` \| sha256 {hashlib.sha256(content).hexdigest()} ", card)


def test_every_word_of_the_grammar_is_a_token(pipe):
    assert [len(pipe.tokenizer(word).input_ids) for word in scenes.WORDS] == [3] * len(scenes.WORDS)
    ids = pipe.tokenizer(scenes.PROMPTS, padding="max_length").input_ids
    assert {len(row) for row in ids} == {recipe.LENGTH} and len({tuple(row) for row in ids}) == len(scenes.PROMPTS)
    assert ids == recipe.tokenizer()(scenes.PROMPTS, padding="max_length").input_ids


def test_the_pipeline_draws_clear_scenes_as_asked(pipe):
    prompt = numbers(PROMPTS * 4)
    told = measures.measure(prompt, measures.pictures(recipe.painter(pipe, 1.0, generator()), prompt))
    assert told.accepted >= 0.8 and told.asked >= 0.75


def test_the_autoencoder_keeps_scenes(pipe):
    x = scenes.draw(100, generator())
    with torch.no_grad():
        z = recipe.encoded(pipe.vae, scenes.paint(x, generator(1)), generator(2))[0]
        reading = judge.read(recipe.decoded(pipe.vae, z))
    assert (reading.accepted & (reading.scenes == x).all(-1)).double().mean() >= 0.95
    assert float(z.std()) * pipe.vae.config.scaling_factor == pytest.approx(1, abs=0.1)


def test_sculpt_draws_the_same_scenes():
    model = sculpt.load(MODEL, prompt="a red circle", guidance_scale=1.0)
    reading = judge.read(model.sample(24, steps=24, generator=generator(), progress=False).decode().float())
    assert reading.accepted.double().mean() >= 0.8
    assert scenes.fits("a red circle", reading.scenes).any(-1).double().mean() >= 0.75


@pytest.mark.slow
def test_the_harmonic_mean_has_both_things_more_often_than_its_parts():
    circle, square = (sculpt.load(MODEL, prompt=prompt, guidance_scale=1.0) for prompt in ("a red circle", "a blue square"))
    both = (circle & square).sample(24, steps=32, generator=generator(), progress=False).decode().float()
    one = circle.sample(24, steps=32, generator=generator(), progress=False).decode().float()
    share = []
    for pictures in (both, one):
        x = judge.read(pictures).scenes
        fit = scenes.fits("a red circle", x).any(-1) & scenes.fits("a blue square", x).any(-1)
        share.append(float(fit.double().mean()))
    assert share[0] > share[1] + 0.2


# Training


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    def options(**more):
        return argparse.Namespace(device="cpu", batch=8, minutes=None, steps=4, threads=1, bfloat16=False, folder=MODEL, **more)

    def take(made, steps):
        for _ in itertools.islice(made.training.run(made.loss, made.plan.steps), steps):
            made.plan.tick(made.training.step)
        return made

    for make in (recipe.Autoencoder, recipe.Model):
        through, first = take(make(tmp_path / "a", options()), 4), take(make(tmp_path / "b", options()), 2)
        first.training.save()
        again = take(make(tmp_path / "b", options()), 2)
        assert again.training.step == 4 and again.plan.over(4)
        for part in ("network", "average"):
            one, two = (getattr(made.training, part).state_dict() for made in (through, again))
            assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_training_by_the_clock_ends_where_its_time_does(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(recipe.time, "monotonic", lambda: now[0])
    plan, step, rates = recipe.Plan(None, 100.0), 0, []
    while not plan.over(step):
        now[0] += 0.1 if step < 300 else 0.2  # another job comes
        step += 1
        plan.tick(step)
        rates.append(plan.rate(step))
    assert 95 < plan.spent < 105 and 500 < step < 700
    assert max(rates) > 0.9 and rates[-1] < 0.02
