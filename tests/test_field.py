"""Guidance as a field: the regression has the composed denoiser for its minimum, chains and weights take any field, files keep it."""

import copy
import math

import pytest
import torch
from checkpoints import tiny_unet
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusers_models import exact_model, three_rings
from gflownet_models import ENVIRONMENTS, arbitrary
from oracles import ExactGuide, Grid, draw_posterior

import sculpt
from sculpt.classifier.heads import Classifier
from sculpt.classifier.store import Draw
from sculpt.diffusion.backbones import VectorNetwork
from sculpt.diffusion.clock import like
from sculpt.diffusion.diffusers.field import NetworkField
from sculpt.diffusion.field import Field, VectorField
from sculpt.diffusion.guidance import Guidance
from sculpt.diffusion.regression import drawn
from sculpt.diffusion.states import DiffusionStore
from sculpt.formula import Posterior

RINGS = three_rings()[:2]
P, Q = (exact_model(mixture, name=name) for mixture, name in zip(RINGS, "pq", strict=True))
GUIDE = ExactGuide(RINGS, [P.key, Q.key])
GRID = Grid(4.0)
LEVELS = (1.5, 4.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


DATA = [mixture.draw(6000, generator(i)).float() for i, mixture in enumerate(RINGS)]


def fresh(odds=False, observations=2, models=(P, Q)):
    """A classifier whose terminal head is exact, and which knows nothing before the end."""
    torch.manual_seed(0)
    classifier = Classifier(VectorNetwork(2, width=16, depth=1), [model.key for model in models], observations, odds)
    classifier.terminal = GUIDE.terminal
    return classifier.eval().requires_grad_(False)


def quick(classifier=None, **options):
    torch.manual_seed(0)
    defaults = {
        "data": DATA,
        "steps": 8,
        "batch_size": 16,
        "progress": False,
        "network": VectorField(2, False, 2, 0.0, 1.2, width=16),
    }
    return sculpt.fit_field(classifier or fresh(), [P, Q], **(defaults | options))


class ExactField(Field):
    r"""The field that training would end in, times a factor: :math:`v \nabla \log h`."""

    config = {}

    def __init__(self, factor=1.0):
        super().__init__(2, False, 1.2)
        self.factor = factor

    def added(self, z, s, told):
        out = torch.empty_like(z)
        for row in told.unique(dim=0):
            labels = (int(row[:2].argmax()), *[i for i in (0, 1) for _ in range(int(row[2 + i]))])
            rows = (told == row).all(1)
            out[rows] = Guidance(GUIDE, Posterior(2, labels)).added(z[rows], s[rows]).to(z)
        return self.factor * out

    def G(self, z, s, told):
        raise NotImplementedError


class WithField(ExactGuide):
    """The exact guide, steering by a field."""

    moved: Field | None = None

    @property
    def field(self):
        return self.moved


def guide_with(field):
    guide = WithField(RINGS, [P.key, Q.key])
    guide.moved = field
    return guide


@pytest.fixture(scope="module")
def fitted():
    """Some seconds of training."""
    network = VectorField(2, False, 2, 0.0, 1.2, width=96, depth=3)
    return quick(steps=700, batch_size=64, learning_rate=3e-3, network=network)


@torch.no_grad()
def relative_error(field, labels, s):
    """The field's square error on noisy samples of the composition, as a share of the square of what is to be added."""
    x = draw_posterior(Posterior(2, labels), RINGS, 1000, generator(3))
    z = (x + s * torch.randn(x.shape, generator=generator(4), dtype=x.dtype)).float()
    s = torch.tensor(s, dtype=torch.float64)
    exact = Guidance(GUIDE, Posterior(2, labels)).added(z, s)
    return float((field(z, s, labels=labels) - exact).square().mean() / exact.square().mean())


# The regression -----------------------------------------------------------------------------------------------------------------------


def test_indices_are_drawn_in_proportion_to_f_each_row_from_its_own():
    log_f = torch.randn(3, 5, generator=generator())
    rows = torch.randint(3, (60_000,), generator=generator(1))
    index = drawn(log_f, rows, torch.rand(len(rows), generator=generator(2)))
    for row in range(3):
        own = index[rows == row]
        shares = torch.bincount(own, minlength=5) / len(own)
        assert (shares - log_f[row].softmax(0)).abs().max() < math.sqrt(math.log(2 * 15 / 1e-4) / (2 * len(own)))


@torch.no_grad()
@pytest.mark.parametrize("s", [0.3, 1.0, 3.0])
def test_the_regression_is_least_at_what_the_exact_classifier_adds(s, monkeypatch):
    monkeypatch.setattr("sculpt.diffusion.regression.spread", lambda u, *_: torch.full_like(u, s))
    regression = DiffusionStore([P, Q], data=[mixture.draw(30_000, generator(i)).float() for i, mixture in enumerate(RINGS)])
    regression = regression.regression(fresh())
    # In the factor a of the exact field the loss is A a² - 2 B a.
    one, two = (float(regression.loss(ExactField(a), Draw(2000, generator()))) for a in (1.0, 2.0))
    A, B = (two - 2 * one) / 2, (two - 4 * one) / 4
    assert pytest.approx(1.0, abs=0.06) == B / A
    assert one < 0


def test_a_fitted_field_comes_near_the_exact_one_where_none_at_all_is_off_by_all_of_it(fitted):
    for labels in ((0, 1), (0, 0), (1, 0), (1, 1)):
        errors = [relative_error(fitted.field, labels, s) for s in LEVELS]
        assert max(errors) < (0.4 if labels[0] == labels[1] else 0.1), (labels, errors)  # contrasts move samples less
    untrained = VectorField(2, False, 2, 0.0, 1.2)
    assert relative_error(untrained, (0, 1), 1.0) == 1.0


def test_a_field_is_nothing_before_it_is_trained_and_for_the_anchor_alone(fitted):
    z, s = torch.randn(3, 2, generator=generator()), torch.tensor(1.0, dtype=torch.float64)
    untrained = VectorField(2, True, 2, 0.0, 1.2)
    assert (untrained(z, s, labels=(0, 1), odds=(0.2, 0.8)) == 0).all()
    assert (fitted.field(z, s, labels=(1,)) == 0).all() and (fitted.field(z, s, labels=(1, 0)) != 0).all()


def test_odds_and_fewer_labels_are_other_compositions():
    field = VectorField(2, True, 2, 0.0, 1.2, width=16)
    torch.nn.init.normal_(field.out.weight, generator=generator())
    z, s = torch.randn(3, 2, generator=generator()), torch.tensor(1.0, dtype=torch.float64)
    calls = [((0, 1), None), ((0, 1), (0.2, 0.8)), ((0, 0), None), ((1, 0), None), ((0, 1, 1), None)]
    moved = [field(z, s, labels=labels, odds=odds) for labels, odds in calls]
    for i, one in enumerate(moved):
        assert not any(torch.equal(one, other) for other in moved[i + 1 :])
    torch.testing.assert_close(field(z, s, labels=(0, 1), odds=(3.0, 3.0)), moved[0])
    torch.testing.assert_close(field(z, s, labels=(0, 1), odds=(1.0, 4.0)), moved[1])
    torch.testing.assert_close(field(z, s, labels=(0, 1, 0)), field(z, s, labels=(0, 0, 1)))


# Guided by it -------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_exact_field_makes_the_samples_and_the_weights_of_the_exact_gradient():
    runs = [
        (P & Q).sample(200, sculpt.Guided(guide, strength=1.3), steps=8, generator=generator(), progress=False)
        for guide in (GUIDE, guide_with(ExactField()))
    ]
    torch.testing.assert_close(runs[0].x, runs[1].x, rtol=1e-4, atol=1e-4)
    assert runs[0].log_z == pytest.approx(runs[1].log_z, abs=1e-4)
    assert "field" in runs[1].diagnostics.road and "field" not in runs[0].diagnostics.road


def test_the_mixture_form_takes_the_gradient():
    guided = (P & Q).guided(sculpt.Guided(guide_with(ExactField(0.0)), form="mixture"))
    z, s = torch.randn(5, 2, generator=generator()), torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(guided.denoise(z, s), (P & Q).guided(sculpt.Guided(GUIDE, form="mixture")).denoise(z, s))


def test_strength_multiplies_the_field(fitted):
    z, s = torch.randn(5, 2, generator=generator()), torch.tensor(1.0, dtype=torch.float64)
    plain, more = ((P & Q).guided(sculpt.Guided(fitted, strength=a)).denoise(z, s) for a in (1.0, 2.0))
    torch.testing.assert_close(more - plain, fitted.field(z, s, labels=(0, 1)))
    torch.testing.assert_close(plain - P.denoise(z, s), fitted.field(z, s, labels=(0, 1)))


def test_the_correction_is_exact_though_the_field_is_not(fitted):
    n, options, guide = 3000, {"steps": 48, "progress": False}, guide_with(fitted.field)
    masses, log_z = GRID.exact((P & Q).formula, RINGS)
    weak = sculpt.Guided(guide, strength=0.6)
    plain = (P & Q).sample(n, weak, generator=generator(), **options)
    assert GRID.total_variation(plain.x, masses) > 1.5 * GRID.floor(masses, n)
    found = (P & Q).sample(n, sculpt.Guided(guide, strength=0.6, correct=True), generator=generator(), **options)
    assert GRID.total_variation(found.x, masses) < 1.3 * GRID.floor(masses, n)
    # The chain of so many steps is itself off by a hundredth of a nat or two.
    assert abs(found.log_z - log_z) < 0.02 + 3 * found.diagnostics.log_z_error


def test_a_guided_step_is_one_call_of_each_network_and_no_way_back():
    models = [sculpt.Diffusion(tiny_unet(seed), DDPMScheduler(), name=name) for seed, name in enumerate("pq")]
    data = [torch.randn(24, *models[0].shape, generator=generator(i)) for i in range(2)]
    classifier = sculpt.fit(models, data=data, steps=4, batch_size=4, path=False, field=True, progress=False)
    calls = {}
    watched = {"p": models[0].model, "q": models[1].model, "field": classifier.field, "heads": classifier.network}
    for name, network in watched.items():
        network.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    steps, composition = 5, models[0] & models[1]
    with torch.inference_mode():
        for correct in (False, True):
            calls.clear()
            road = sculpt.Guided(classifier, correct=correct, **({"particles": 3} if correct else {}))
            composition.sample(3, road, steps=steps, progress=False)
            # Weights that correct want h at every level, and the terminal head has the last word; others at the first and the last.
            assert calls == {"p": steps, "field": steps, "heads": steps + 1 if correct else 2}
        calls.clear()
        composition.sample(3, classifier, solver=DDPMScheduler(), steps=steps, progress=False)
        assert calls == {"p": steps, "field": steps}  # a solver's chain has no weights
        classifier.vector_field = None
        with pytest.raises(RuntimeError):  # the gradient of log h needs the way back
            composition.sample(3, classifier, steps=steps, progress=False)


@pytest.mark.slow
def test_chains_guided_by_a_longer_trained_field_are_near_the_target():
    n, data = 10_000, [mixture.draw(20_000, generator(i)).float() for i, mixture in enumerate(RINGS)]
    network = VectorField(2, False, 2, 0.0, 1.3, width=128)
    field = quick(data=data, steps=4000, batch_size=128, learning_rate=2e-3, network=network).field
    for composition in (P & Q, P - Q):
        masses, _ = GRID.exact(composition.formula, RINGS)
        found = composition.sample(n, guide_with(field), steps=32, generator=generator(), progress=False)
        assert GRID.total_variation(found.x, masses) < 1.5 * GRID.floor(masses, n), composition


# Training and files -------------------------------------------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Killed(Exception):
    pass


def test_a_killed_training_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole = quick()
    loss, calls = sculpt.diffusion.regression.Regression.loss, []

    def killed(self, field, draw):
        calls.append(draw.held_out)
        if calls.count(False) == 6:
            raise Killed
        return loss(self, field, draw)

    with monkeypatch.context() as patch:
        patch.setattr(sculpt.diffusion.regression.Regression, "loss", killed)
        patch.setattr("time.monotonic", iter(range(0, 10_000_000, 100)).__next__)  # the state is saved whenever it may be
        with pytest.raises(Killed):
            quick(checkpoint=tmp_path)
    before = len(calls)
    assert (tmp_path / "field" / "state.safetensors").exists()
    resumed = quick(checkpoint=tmp_path)
    assert before > 0 and same(whole, resumed)
    assert same(Classifier.from_pretrained(tmp_path), resumed)
    with pytest.raises(ValueError, match="holds another training: steps is 8 there and 9 here"):
        quick(checkpoint=tmp_path, steps=9)


def test_a_field_is_saved_beside_the_heads_in_half_precision_and_read_bit_by_bit(tmp_path, fitted):
    fitted.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors")
    assert {name.startswith("vector_field.") for name, value in stored.items() if value.dtype == torch.float16} == {True}
    again = sculpt.load(tmp_path)
    assert same(again, fitted) and isinstance(again.field, VectorField)
    found = [(P & Q).sample(20, one, steps=4, generator=generator(), progress=False).x for one in (fitted, again)]
    again.terminal = GUIDE.terminal
    assert torch.equal(*found)


def test_a_field_of_the_users_own_is_steered_by_saved_and_passed_again(tmp_path):
    classifier = quick(network=None)
    classifier.vector_field = ExactField()
    (P & Q).sample(3, classifier, steps=3, progress=False)
    classifier.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="field of its user's own .*field="):
        sculpt.load(tmp_path)
    assert Classifier.from_pretrained(tmp_path, field=ExactField(0.5)).field.factor == 0.5


def test_fit_trains_heads_and_field_one_after_the_other(tmp_path):
    options = {"data": DATA, "steps": 6, "batch_size": 16, "progress": False, "network": VectorNetwork(2, width=16, depth=1)}
    both = sculpt.fit([P, Q], odds=True, field=True, checkpoint=tmp_path, **options)
    heads = sculpt.fit([P, Q], odds=True, **options)
    assert heads.field is None and both.field.odds and both.field.told == 6
    assert all(torch.equal(value, both.state_dict()[name]) for name, value in heads.state_dict().items())
    assert same(sculpt.load(tmp_path), both)
    assert same(sculpt.fit([P, Q], odds=True, field=True, checkpoint=tmp_path, **options), both)


def test_the_classifier_that_was_given_is_not_changed_and_its_models_may_come_in_any_order():
    classifier, one = fresh(), quick()
    torch.manual_seed(0)
    other = sculpt.fit_field(
        classifier, [Q, P], data=[DATA[1], DATA[0]], steps=8, batch_size=16, progress=False,
        network=VectorField(2, False, 2, 0.0, 1.2, width=16),
    )  # fmt: skip
    assert classifier.field is None and same(one, other)


def test_samples_that_are_not_denoised_have_no_field():
    models = arbitrary(ENVIRONMENTS["grid-2d"](), 2)
    with pytest.raises(ValueError, match="A guidance field moves samples that are denoised"):
        sculpt.fit(models, field=True, samples=20, progress=False)


def test_a_field_needs_a_classifier_its_own_models_and_samples_that_are_denoised():
    with pytest.raises(TypeError, match="A field is fitted to a classifier of sculpt.fit, got"):
        sculpt.fit_field(GUIDE, [P, Q])
    stranger = exact_model(three_rings()[2], name="r")
    with pytest.raises(ValueError, match="fitted for other base models: r"):
        sculpt.fit_field(fresh(), [P, stranger], data=DATA)
    with pytest.raises(ValueError, match="steps has to be at least 1, got 0"):
        quick(steps=0)
    with pytest.raises(TypeError, match="network is a sculpt.diffusion.field.Field, got a Linear"):
        quick(network=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="told of 3 base models without odds, and this classifier has 2 without odds"):
        quick(network=VectorField(3, False, 2, 0.0, 1.2))


# From a model's own network -----------------------------------------------------------------------------------------------------------


def dit(seed=0):
    torch.manual_seed(seed)
    size = {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 4,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
    }
    network = DiTTransformer2DModel(**size, patch_size=2, num_embeds_ada_norm=3, norm_num_groups=2)
    return sculpt.Diffusion(network, DDPMScheduler(), name=f"dit-{seed}").with_condition(class_label=1)


@pytest.mark.parametrize(
    "model", [lambda: sculpt.Diffusion(tiny_unet(), DDPMScheduler(), name="unet"), dit], ids=["unet", "dit"]
)
@torch.no_grad()
def test_a_field_begins_as_a_models_own_network_but_for_its_last_layer(model):
    model, seen = model(), []
    field = NetworkField.of(model, 3, True, 0.7).eval()
    last = {"UNet2DModel": "conv_norm_out", "DiTTransformer2DModel": "transformer_blocks"}[type(model.model).__name__]
    for network in (model.model, field.network):
        inner = network.get_submodule(last)
        (inner[-1] if isinstance(inner, torch.nn.ModuleList) else inner).register_forward_hook(lambda *a: seen.append(a[-1]))
    z, s = 2 * torch.randn(3, *model.shape, generator=generator()), torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    model.denoise(z, s)
    told = field.tell(torch.tensor([2, 0, 1]), torch.tensor([[1.0, 0.0, 1.0]] * 3), torch.randn(3, 3))
    assert (field.added(z, s, told) == 0).all()
    torch.testing.assert_close(seen[1], seen[0])
    last_layer = field.network.get_submodule({"conv_norm_out": "conv_out"}.get(last, "proj_out_2"))
    torch.nn.init.normal_(last_layer.weight, generator=generator())
    torch.nn.init.normal_(field.network.get_submodule(field.embeddings[0]).tell[2].weight, generator=generator())
    moved = field.added(z, s, told)
    assert moved.shape == z.shape and not torch.equal(moved, field.added(z, s, told.flip(0)))
    assert not torch.equal(field(z, s, labels=(0, 1)), field(z, s, labels=(0, 2)))


def test_images_without_such_a_network_get_a_small_unet_and_both_are_saved(tmp_path):
    def closed(i):
        return sculpt.Diffusion(lambda x, t: x * 0.1 * i, DDPMScheduler(), (1, 8, 8), name=f"closed-{i}")

    of_networks = [sculpt.Diffusion(tiny_unet(seed), DDPMScheduler(), name=f"unet-{seed}") for seed in range(2)]
    data = [torch.randn(24, 1, 8, 8, generator=generator(i)) + i for i in range(2)]
    for k, models in enumerate(([closed(1), closed(2)], of_networks)):
        fitted = sculpt.fit(
            models, data=data, steps=4, batch_size=4, path=False, field=True, checkpoint=tmp_path / str(k), progress=False
        )
        assert isinstance(fitted.field, NetworkField)
        again = sculpt.load(tmp_path / str(k))
        assert same(again, fitted)
        found = [
            (models[0] - models[1]).sample(2, one, steps=3, generator=generator(), progress=False).x for one in (fitted, again)
        ]
        assert torch.equal(*found)
    begun = fitted.field.network.conv_in.weight - of_networks[0].model.conv_in.weight
    assert begun.abs().max() < 0.02


def test_only_networks_of_a_table_become_fields():
    with pytest.raises(ValueError, match="A field begins as one of UNet2DModel.*got closed"):
        NetworkField.of(sculpt.Diffusion(lambda x, t: x, DDPMScheduler(), (1, 8, 8), name="closed"), 2, False, 1.0)
    config = NetworkField.of(sculpt.Diffusion(tiny_unet(), DDPMScheduler()), 2, False, 1.0).config
    with pytest.raises(ValueError, match="A field is one of UNet2DModel, DiTTransformer2DModel, got a AutoencoderKL"):
        NetworkField(**config | {"network": config["network"] | {"_class_name": "AutoencoderKL"}})
    with pytest.raises(ValueError, match="which is no scheduler of diffusers"):
        NetworkField(**config | {"scheduler": {"_class_name": "loaders"}})
    with pytest.raises(ValueError, match="Got m=1 and std=1.0"):
        VectorField(1, False, 2, 0.0, 1.0)
    assert copy.deepcopy(ExactField()).std == 1.2 and like(torch.ones(()), torch.ones(1)) == 1
