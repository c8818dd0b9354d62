"""The coloured digits' recipe, judge and benchmark, on made-up digits and tiny networks: no trained weights and no MNIST needed."""

import functools
import hashlib
import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline

import sculpt
from sculpt import Diffusion
from sculpt.diffusion.backbones import ImageNetwork
from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.schedules import schedule_of
from sculpt.formula import Posterior

sys.path.append(str(Path(__file__).parents[1] / "pretrained" / "digits"))

import base_samples
import coloured_mnist
import judge as judging
from coloured_mnist import CLASSES, COLOURS, DATA, SETS, composed, proportions

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "pretrained" / "digits"


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def digits(split: str = "train"):
    """Made up: every digit twelve times, a bar whose length is the digit."""
    label = torch.arange(120) % 10
    grey = torch.zeros(120, 32, 32, dtype=torch.uint8)
    for i, digit in enumerate(label.tolist()):
        grey[i, 8 : 12 + 2 * digit, 10 + i // 40 : 16] = 255
    return grey, label


@pytest.fixture
def recipe(monkeypatch):
    module = load("digits_recipe", DIGITS / "recipe.py")
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    monkeypatch.setattr(module, "NETWORK", small)
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "mnist", digits)
    return module


def take(recipe, steps=1):
    """So many steps of a recipe."""
    for _ in itertools.islice(recipe.training.run(recipe.loss, recipe.steps), steps):
        pass
    return recipe


def bits(recipe):
    """Everything that a training goes on from."""
    training = recipe.training
    parts = {"network": training.network, "average": training.average}
    state = {f"{part}/{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    moments = training.optimizer.state_dict()["state"]
    return state | {f"{i}/{name}": value for i, part in moments.items() for name, value in part.items()}


@pytest.fixture
def trunk(recipe, tmp_path):
    """A trunk that has taken its only step, and its state on disk."""
    trunk = take(recipe.Recipe("trunk", 1, tmp_path))
    trunk.training.save()
    return trunk


def shares(**known: float) -> torch.Tensor:
    return torch.tensor([known.get(f"{colour}_{digit}", 0.0) for digit, colour in CLASSES], dtype=torch.float64)


# Data


def test_the_pairs_exact_compositions_are_the_papers():
    pair = [proportions(name) for name in SETS["pair"]]
    expected = {
        (0, 0): shares(red_0=0.659, green_0=0.341),
        (0, 1): shares(green_0=1.0),
        (1, 1): shares(green_1=0.702, green_0=0.298),
    }
    for labels, share in expected.items():
        torch.testing.assert_close(composed(Posterior(2, labels), pair), share, atol=5e-4, rtol=0)


def test_the_triples_exact_compositions_are_the_digits_that_all_observed_models_draw():
    triple = [proportions(name) for name in SETS["triple"]]
    for labels, names in {(0, 1): "cyan 0 1", (0, 2): "cyan 0 2", (1, 2): "cyan beige 0", (0, 1, 2): "cyan 0"}.items():
        words = names.split()
        share = composed(Posterior(3, labels), triple)
        inside = [(str(d) in words) and (c in words) for d, c in CLASSES]
        assert ((share > 0) == torch.tensor(inside)).all() and abs(float(share.sum()) - 1) < 1e-12


def test_colouring_multiplies_the_grey_digit_by_its_colour_on_black():
    grey = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)
    for i, rgb in enumerate(COLOURS.values()):
        x = coloured_mnist.coloured(grey, torch.full((3,), i))
        expected = torch.tensor([0.0, 0.2, 1.0])[:, None] * torch.tensor(rgb) * 2 - 1
        torch.testing.assert_close(x, expected[:, :, None, None].expand(3, 3, 32, 32))


@pytest.mark.parametrize("name", DATA)
def test_a_batch_has_the_data_sets_proportions(name, recipe, trunk, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "retime", lambda *_: None)
    training = recipe.Recipe(name, 2, tmp_path)
    n, bound = 4000, (torch.tensor(2 / 1e-6).log() / (2 * 4000)).sqrt()  # Dvoretzky, Kiefer and Wolfowitz
    x, label = training.batch(n, torch.Generator().manual_seed(0))
    rgb = torch.tensor(list(COLOURS.values())) * 2 - 1
    colour = ((x.amax((2, 3))[:, None] - rgb).abs().sum(-1)).argmin(-1)
    allowed = torch.tensor([c in DATA[name][1] for c in COLOURS])
    counts = torch.bincount(colour, minlength=len(COLOURS)) / n
    expected = allowed / allowed.sum()
    assert float((counts.cumsum(0) - expected.cumsum(0)).abs().max()) < bound and not label.any()
    length = (x.amax(1) > -1).any(-1).sum(-1)  # of the bar, which tells the digit
    digit = torch.bincount((length - 4) // 2, minlength=10) / n
    inside = torch.tensor([d in DATA[name][0] for d in range(10)])
    assert float((digit.cumsum(0) - (inside / inside.sum()).cumsum(0)).abs().max()) < bound


@pytest.mark.parametrize("damaged", [b"", b"something else"])
def test_a_damaged_file_is_named_and_not_read(damaged, monkeypatch, tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(damaged)
    monkeypatch.setenv("SCULPT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="expected ec29112dd5afa0611ce80d1b7f02629c"):
        coloured_mnist.read("t10k-labels-idx1-ubyte.gz")


def test_without_files_or_a_network_the_message_says_where_to_put_them(monkeypatch, tmp_path):
    monkeypatch.delenv("SCULPT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(coloured_mnist, "MIRROR", "file:///nowhere/")
    with pytest.raises(RuntimeError, match="SCULPT_DATA"):
        coloured_mnist.read("t10k-labels-idx1-ubyte.gz")


# Training


def test_threads_draw_different_shares_of_a_batch(recipe, tmp_path):
    two, seen = recipe.Recipe("trunk", 2, tmp_path, threads=2), []
    two.training.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    take(two)
    assert [len(x) for x in seen] == [2, 2] and not torch.equal(*seen)  # of a batch of four


@pytest.mark.parametrize("name", ["trunk", "cyan", "judge"])
def test_a_killed_training_goes_on_bit_for_bit(name, recipe, trunk, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "mnist", digits)
    monkeypatch.setattr(judging, "BATCH", 40)

    def made(folder):
        if name == "judge":
            return judging.Recipe(4, folder)
        if name != "trunk":
            (folder / "trunk").mkdir(parents=True, exist_ok=True)
            (folder / "trunk" / "state.safetensors").write_bytes((tmp_path / "trunk" / "state.safetensors").read_bytes())
        return recipe.Recipe(name, 4, folder)

    through, first = take(made(tmp_path / "a"), 4), take(made(tmp_path / "b"), 2)
    first.training.save()
    again = made(tmp_path / "b")
    assert again.training.step == 2
    expected, got = bits(through), bits(take(again, 2))
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_recipe_prints_evaluates_and_saves_until_its_end(recipe, trunk, tmp_path, monkeypatch, capsys):
    green = recipe.Recipe("green", 4, tmp_path)
    monkeypatch.setattr(recipe.Recipe, "picture", lambda self: None)
    recipe.recipes.train(green, report=2, check=3)
    lines = [json.loads(line.removeprefix("green ")) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 4] and {"loss", "far", "near", "norm", "seconds"} <= set(lines[0])
    again = recipe.Recipe("green", 4, tmp_path)
    assert again.training.step == 4 and [row["step"] for row in again.training.curve] == [3, 4]


def test_a_training_of_other_settings_is_refused_by_what_differs(recipe, trunk, tmp_path):
    take(recipe.Recipe("green", 2, tmp_path)).training.save()
    with pytest.raises(ValueError, match="holds another training: rate is 0.0006 there and 0.1 here"):
        recipe.Recipe("green", 2, tmp_path, rate=0.1)


def test_a_model_starts_as_the_trunk_under_its_label(recipe, trunk):
    x, t = torch.randn(3, 3, 32, 32), torch.tensor([3.0, 200.0, 999.0])
    average = trunk.training.average
    for label in range(len(DATA)):
        expected = average(x, t, class_labels=torch.full((3,), label)).sample
        torch.testing.assert_close(recipe.member(average, label)(x, t).sample, expected, atol=1e-6, rtol=1e-5)


def test_a_model_without_a_trunk_says_what_to_run_first(recipe, tmp_path):
    with pytest.raises(ValueError, match="recipe.py trunk first"):
        recipe.Recipe("cyan", 2, tmp_path)
    recipe.Recipe("trunk", 2, tmp_path).training.save()
    with pytest.raises(ValueError, match="0 of 2 steps"):
        recipe.Recipe("cyan", 2, tmp_path)


def test_a_grown_network_computes_what_it_did_and_its_new_layers_learn(recipe):
    unet = recipe.network()
    large = recipe.grown(unet)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3.0, 700.0])
    torch.testing.assert_close(large(x, t).sample, unet(x, t).sample)
    names = [name for name in dict(large.named_parameters()) if ".attentions.0.to_out" in name or ".resnets.1.conv2" in name]
    assert len(names) == 2 * (2 * 4 + 2)  # weight and bias; two blocks down, two up and the middle
    large(x, t).sample.square().sum().backward()
    assert all(dict(large.named_parameters())[name].grad.abs().max() > 0 for name in names)


def test_a_model_of_ten_digits_grows_when_it_is_trained_further(recipe, trunk, tmp_path):
    take(recipe.Recipe("cyan", 1, tmp_path)).finish(tmp_path / "cyan")
    more = recipe.Recipe("cyan", 1, tmp_path, folder=tmp_path / "cyan")
    assert more.training.network.config.layers_per_block == 2 and more.training.folder == tmp_path / "cyan-2"
    take(more).finish(tmp_path / "cyan")
    again = recipe.Recipe("cyan", 1, tmp_path, folder=tmp_path / "cyan")
    assert again.training.network.config.layers_per_block == 2


def test_retiming_gives_another_schedule_the_same_embedding_at_the_same_noise(recipe):
    unet = recipe.network()
    with torch.no_grad():  # an untrained embedding also follows the time's fast waves, which tell nothing of the noise
        for wave in (0, 1):
            unet.time_embedding.linear_1.weight[:, wave::4] = 0
    old, new = (schedule_of(recipe.scheduler(name)) for name in ("trunk", "zero-two"))
    s = torch.logspace(-1.5, 1.5, 40, dtype=torch.float64)
    before = unet.time_embedding(unet.time_proj(old.time(s))).detach()
    untouched = unet.time_embedding(unet.time_proj(new.time(s))).detach()
    recipe.retime(unet, old, new)
    after = unet.time_embedding(unet.time_proj(new.time(s))).detach()
    assert (after - before).abs().mean() < 0.1 * (untouched - before).abs().mean()


@pytest.mark.parametrize("name", ["cyan", "zero-two"])
def test_the_loss_is_that_of_predicting_v_whatever_the_parametrisation(name, recipe):
    """Up to the bound on the weight, it is the square error of D times 1 + 1/s²."""
    schedule = schedule_of(recipe.scheduler(name))
    s = torch.tensor([0.02, 0.3, 1.0, 1.9], dtype=torch.float64)
    x, z, F = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
    _, b = schedule.coefficients(s)
    weight = (b**2 * (1 + s**-2)).clamp(max=5.0)
    ours = weight * (F - schedule.output(z, s, x)).square().mean((1, 2, 3))
    expected = (1 + s**-2) * (schedule.denoised(z, s, F) - x).square().mean((1, 2, 3))
    torch.testing.assert_close(ours, expected)


def test_one_model_has_another_schedule_and_prediction_type(recipe):
    known = {name: schedule_of(recipe.scheduler(name)).identity for name in DATA}
    assert len(set(known.values())) == 2 and list(known.values()).count(known["zero-two"]) == 1


# Checkpoints


@pytest.mark.parametrize("name", ["cyan", "zero-two"])
def test_a_saved_model_is_the_same_in_sculpt_and_in_diffusers(name, recipe, trunk, tmp_path):
    made = take(recipe.Recipe(name, 2, tmp_path))
    folder = tmp_path / "saved" / name
    folder.parent.mkdir()
    for _ in range(2):  # the second takes the first one's place
        made.finish(folder)
    assert [path.name for path in folder.parent.iterdir()] == [name]
    model, pipe = sculpt.load(folder), DDPMPipeline.from_pretrained(folder)
    assert model.name == name and model.shape == (3, 32, 32) and model.dtype == torch.float32
    assert pipe.unet.dtype == torch.float32 and type(pipe.unet) is type(model.model)
    # Half precision on disk is what is lost, nothing else.
    average = made.training.average
    for one, two, own in zip(pipe.unet.parameters(), model.model.parameters(), average.parameters(), strict=True):
        assert torch.equal(one, two) and torch.equal(one, own.half().float())
    z, s = 5 * torch.randn(2, 3, 32, 32), torch.tensor(5.0, dtype=torch.float64)
    schedule = schedule_of(pipe.scheduler)
    F = pipe.unet(like(schedule.scale(s), z) * z, schedule.time(s)).sample
    torch.testing.assert_close(model.denoise(z, s), schedule.denoised(z, s, F))
    images = pipe(batch_size=1, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (1, 32, 32, 3)


def test_models_of_two_schedules_compose(recipe, trunk, tmp_path):
    models = [Diffusion(recipe.network(), recipe.scheduler(name), name=name) for name in ("cyan", "zero-two")]
    samples = sculpt.harmonic_mean(*models).sample(1, sculpt.Tracked(particles=2), steps=2)
    assert samples.x.shape == (1, 3, 32, 32)


def test_a_pool_goes_on_where_it_stopped(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(base_samples, "CHUNK", 2)
    monkeypatch.setattr(base_samples, "STEPS", 2)
    model = Diffusion(recipe.network(), recipe.scheduler("cyan"), name="cyan")
    first, _ = base_samples.pool(model, 3, tmp_path)
    second, seconds = base_samples.pool(model, 5, tmp_path)
    assert torch.equal(second[:3], first) and len(second) == 5 and seconds > 0
    later, _ = base_samples.pool(model, 3, tmp_path, first=1)
    assert torch.equal(later, second[1:4])


# The judge


@pytest.fixture
def judge(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(judging, "mnist", digits)
    return judging.Judge((8, 8)).eval().requires_grad_(False)


def test_a_saved_judge_says_the_same(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    x = torch.randn(5, 3, 32, 32)
    one, two = judge.score(x), judging.Judge.from_pretrained(tmp_path).score(x)
    assert torch.equal(one.label, two.label) and torch.equal(one.features, two.features)
    assert one.shares.shape == (40,) and abs(float(one.shares.sum()) - 1) < 1e-12
    with pytest.raises(ValueError, match="does not compose"):
        sculpt.load(tmp_path)


def test_an_image_is_accepted_where_both_heads_are_sure(judge, monkeypatch):
    sure, unsure = torch.tensor([9.0, 0.0]), torch.tensor([0.3, 0.0])
    monkeypatch.setattr(
        judge,
        "forward",
        lambda x: (torch.stack([sure, sure, unsure]), torch.stack([sure, unsure, sure]), torch.zeros(3, 4)),
    )
    assert judge.score(torch.zeros(3, 3, 32, 32)).accepted.tolist() == [True, False, False]


def test_spoilt_images_belong_to_all_classes_alike():
    generator = torch.Generator().manual_seed(0)
    grey, label = digits()
    colour = torch.randint(len(COLOURS), (len(grey),), generator=generator)
    digit_target = torch.nn.functional.one_hot(label, 10).float()
    colour_target = torch.nn.functional.one_hot(colour, len(COLOURS)).float()
    x = coloured_mnist.coloured(grey, colour)
    before = x.clone(), digit_target.clone(), colour_target.clone()
    judging.spoil(x, digit_target, colour_target, generator)
    for target in (digit_target, colour_target):
        torch.testing.assert_close(target.sum(-1), torch.ones(len(grey)))
    for one, two in zip((x, digit_target, colour_target), before, strict=True):
        assert torch.equal(one[judging.SPOILT :], two[judging.SPOILT :])
    changed = (x != before[0]).flatten(1).any(1)
    certain = (digit_target.amax(-1) == 1) & (colour_target.amax(-1) == 1)
    assert not (changed & certain).any() and int((~certain).sum()) > judging.SPOILT // 2


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form():
    """Covariances with common eigenvectors: |μ₁ − μ₂|² + Σ (√λ₁ − √λ₂)²."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    means, variances = torch.randn(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
    variances[1, 3] = 0.0
    one, two = [(mean, q @ variance.diag() @ q.T) for mean, variance in zip(means, variances, strict=True)]
    expected = (means[0] - means[1]).square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    assert abs(judging.frechet(one, two) - float(expected)) < 1e-7
    assert abs(judging.frechet(one, one)) < 1e-7


def test_moments_with_weights_are_those_of_the_repeated_sample():
    h = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    mean, covariance = judging.moments(h, torch.tensor([1.0, 2.0, 0.0, 3.0]))
    again = judging.moments(h[[0, 1, 1, 3, 3, 3]])
    torch.testing.assert_close(mean, again[0])
    torch.testing.assert_close(covariance, again[1])


def test_the_reference_has_the_wanted_proportions(judge):
    """One class alone: the moments of its own images."""
    grey, label = digits()
    own = coloured_mnist.coloured(grey[label == 3], torch.full((12,), list(COLOURS).index("red")))
    expected = judging.moments(judge.score(own).features)
    got = judging.reference(judge, shares(red_3=1.0))
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


# Classifiers, cards and the benchmark


@pytest.fixture
def pair(recipe, judge, monkeypatch, tmp_path):
    """Two tiny models and a judge in a folder; samples come by the four."""
    monkeypatch.setattr(base_samples, "CHUNK", 4)
    monkeypatch.setattr(base_samples, "STEPS", 2)
    for i, name in enumerate(SETS["pair"]):
        unet = recipe.network()
        with torch.no_grad():
            next(unet.parameters()).add_(0.01 * i)
        DDPMPipeline(unet, recipe.scheduler(name)).save_pretrained(tmp_path / name)
    judge.save_pretrained(tmp_path / "judge")
    return [sculpt.load(tmp_path / name) for name in SETS["pair"]]


def test_a_classifier_is_fitted_to_samples_of_its_models_and_judged_by_others(pair, monkeypatch, tmp_path):
    fitting = load("digits_classifiers", DIGITS / "classifiers.py")
    small = {"HERE": tmp_path, "FRESH": 16}
    for constant, value in small.items():
        monkeypatch.setattr(fitting, constant, value)
    drawn = []
    monkeypatch.setattr(
        fitting,
        "pool",
        lambda *args, first=0, **options: drawn.append(first) or base_samples.pool(*args, first=first, **options),
    )
    classifier, runs = fitting.fit("pair", pair, tmp_path / "state", steps=2, n=12)
    assert (
        drawn == [0, 0]
        and [(run["steps"], run["samples"]) for run in runs] == [(2, 12)]
        and classifier.odds
        and classifier.keys == tuple(model.key for model in pair)
    )
    classifier.save_pretrained(tmp_path / "pair")
    monkeypatch.setattr(fitting, "quality", functools.partial(fitting.quality, n=4))
    monkeypatch.setattr(fitting, "by_class", functools.partial(fitting.by_class, n=4))
    card = fitting.card("pair", classifier, pair, runs, tmp_path / "state")
    assert drawn[2:] == [16] * 4 and "12 samples of each model" in card and "at any odds" in card
    again, runs = fitting.fit("pair", pair, tmp_path / "state", steps=1, n=16, past=runs)
    assert again.network.config == classifier.network.config and (tmp_path / "state" / "pair-1").exists()
    card = fitting.card("pair", classifier, pair, runs, tmp_path / "state")
    assert "12 and 16 samples of each model" in card and "`pair --more`" in card and "2 and 1 steps" in card


def test_a_saved_classifier_gets_a_field_that_begins_as_a_models_network(pair, monkeypatch, tmp_path):
    fitting = load("digits_classifiers", DIGITS / "classifiers.py")
    monkeypatch.setattr(fitting, "HERE", tmp_path)
    monkeypatch.setattr(fitting, "FRESH", 16)
    heads, runs = fitting.fit("pair", pair, tmp_path / "state", steps=2, n=12)
    heads.save_pretrained(tmp_path / "pair")
    how = {"samples": 12, "steps": 2, "batch": 3, "rate": 1e-3}
    classifier, runs = fitting.fit_field("pair", pair, tmp_path / "state", runs, **how)
    assert [run.get("field", False) for run in runs] == [False, True]
    green = pair[SETS["pair"].index("green")].model
    assert torch.allclose(classifier.field.network.conv_in.weight, green.conv_in.weight, atol=5e-3)
    monkeypatch.setattr(fitting, "quality", functools.partial(fitting.quality, n=4))
    monkeypatch.setattr(fitting, "by_class", functools.partial(fitting.by_class, n=4))
    fitting.finish("pair", classifier, pair, runs, tmp_path / "state")
    card, again = (tmp_path / "pair" / "README.md").read_text(), sculpt.load(tmp_path / "pair")
    assert "| guidance field | `classifiers.py pair --field`: the network of green" in card and again.field.odds
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in heads.state_dict().items())


def test_a_composition_is_distilled_from_its_anchors_samples_as_often_as_they_are_kept(pair, monkeypatch, tmp_path):
    making = load("digits_distill", DIGITS / "distill.py")
    monkeypatch.setattr(making, "HERE", tmp_path)
    monkeypatch.setattr(making, "SETS", {"triple": SETS["pair"]})
    monkeypatch.setitem(making.LABELS, "both", ("green", "red-green"))
    data = [torch.randn(12, 3, 32, 32) for _ in pair]
    tiny = ImageNetwork((3, 32, 32), channels=(8, 8), width=8)
    classifier = sculpt.fit(pair, data=data, network=tiny, steps=2, batch_size=2, path=False, progress=False)
    composition = making.composition_of("both", pair)
    samples, _ = making.weighted(composition, classifier, 24, tmp_path / "state")
    green = SETS["pair"].index("green")
    with torch.no_grad():
        kept = classifier.terminal(samples.x)[:, 1 - green].double()
    assert str(composition.models[composition.formula.labels[0]]) == "green"
    torch.testing.assert_close(samples.log_weights, kept.log_softmax(0))
    how = {"steps": 2, "batch": 2, "rate": 1e-3, "compare": 4}
    run = making.distilled("both", composition, classifier, tmp_path / "state", 24, **how)
    making.recipes.publish(
        tmp_path / "state" / "distilled-both", tmp_path / "both", [run], functools.partial(making.card, run=run)
    )
    card = (tmp_path / "both" / "README.md").read_text()
    assert "| student: as asked, % |" in card and "24 samples of green at 2 steps" in card
    assert not (tmp_path / "both" / "training").exists()
    model = sculpt.load(tmp_path / "both")
    assert model.sample(2, steps=2, progress=False).x.shape == (2, 3, 32, 32)
    DDPMPipeline.from_pretrained(tmp_path / "both")


def test_the_least_cross_entropy_of_the_pair_is_that_of_its_shared_green_zeros(pair, monkeypatch, tmp_path):
    fitting = load("digits_classifiers", DIGITS / "classifiers.py")
    monkeypatch.setattr(fitting, "pool", lambda model, n, *args, **options: (torch.zeros(n, 3, 32, 32), 0.0))
    even = type("Even", (), {"terminal": staticmethod(lambda x: torch.full((len(x), 2), 0.5).log())})
    zeros = 5923 / (5923 + 6742)
    p, q = 0.5 / (0.5 + zeros), zeros / (0.5 + zeros)
    measured = fitting.quality(even, pair, tmp_path, n=4)
    assert measured["least"] == pytest.approx(-(0.5 * math.log(p) + zeros * math.log(q)) / 2)
    assert measured["terminal"] == pytest.approx(math.log(2))


def test_a_models_card_tells_what_was_measured(recipe, trunk, judge, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "HERE", tmp_path)
    monkeypatch.setattr(base_samples, "CHUNK", 4)
    monkeypatch.setattr(base_samples, "STEPS", 2)
    judge.save_pretrained(tmp_path / "judge")
    take(recipe.Recipe("green", 1, tmp_path)).finish(tmp_path / "green")
    card = recipe.card(tmp_path / "green", 8, tmp_path)
    assert "| green 1 |" in card and "| 53.2 % |" in card and (tmp_path / "green" / "samples.png").exists()
    sha = hashlib.sha256((tmp_path / "green" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert sha in card and "`green`: 1 and 1 steps" in card


def test_a_card_says_how_long_the_runs_were_and_where(recipe):
    runs = [{"steps": 7000, "seconds": 90}, {"steps": 3000, "seconds": 120, "batch": 512, "device": "cuda"}]
    assert recipe.written_steps(runs, 64) == "7,000 and 3,000 (of 512) steps of 64"
    assert recipe.written_cost(runs) == "2 CPU minutes and 2 GPU minutes" and recipe.written_cost(runs[:1]) == "2 CPU minutes"


def test_a_saved_model_is_trained_further(recipe, trunk, monkeypatch, tmp_path):
    folder = tmp_path / "green"
    first = take(recipe.Recipe("green", 1, tmp_path))
    first.finish(folder)
    more = recipe.Recipe("green", 2, tmp_path, folder=folder)
    for own, saved in zip(more.training.network.parameters(), first.training.average.parameters(), strict=True):
        assert torch.equal(own, saved.half().float())
    take(more).training.save()
    resumed = recipe.Recipe("green", 2, tmp_path, folder=folder)
    assert resumed.training.step == 1
    take(resumed).finish(folder)
    assert [(run["name"], run["steps"]) for run in json.loads((folder / "training.json").read_text())["runs"]] == [
        ("trunk", 1),
        ("green", 1),
        ("green", 2),
    ]
    assert "_name_or_path" not in json.loads((folder / "unet" / "config.json").read_text())


def test_the_benchmark_scores_every_road_and_keeps_its_rows(pair, monkeypatch, tmp_path, capsys):
    bench = load("digits_bench", ROOT / "tests" / "bench" / "digits.py")
    for constant, value in {"DIGITS": tmp_path, "ODDS": (0.5,), "STEPS": (2, 3), "MAIN": 2}.items():
        monkeypatch.setattr(bench, constant, value)
    data = [torch.randn(12, 3, 32, 32) for _ in pair]
    tiny = ImageNetwork((3, 32, 32), channels=(8, 8), width=8)
    sculpt.fit(pair, odds=True, data=data, network=tiny, steps=2, batch_size=2, progress=False).save_pretrained(
        tmp_path / "pair"
    )
    options = type("Options", (), {"n": 4, "few": 4, "referee": 8, "particles": 4, "tracked_steps": 2, "share": (0, 1)})
    options.state, options.results = tmp_path / "state", tmp_path / "rows.jsonl"
    run = bench.Bench("pair", options)
    done = run.run()
    bench.summary(done)
    printed = capsys.readouterr().out
    assert printed.count("| rejection |") == 3 and "red 0 65.9 %" in printed
    rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    assert len(rows) == 3 * 6 and all(abs(sum(row["shares"]) - 1) < 1e-4 for row in rows)
    monkeypatch.setattr(bench.Bench, "measure", None)  # nothing is measured again
    again = bench.Bench("pair", options).run()
    assert [row.note for row in again[0][1].values()] == [row.note for row in done[0][1].values()]
    cases = []
    for options.share in ((0, 2), (1, 2)):
        cases += [str(case.composition) for case, _ in bench.Bench("pair", options).run()]
    assert sorted(cases) == sorted(str(case.composition) for case, _ in done)
