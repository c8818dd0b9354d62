"""Overlap reports against quadrature, and the verdicts at the two ends: equal models and disjoint ones."""

import itertools
import json
import math

import pytest
import torch
from diffusers_models import exact_model, three_rings
from gflownet_models import Stairs, perfect
from gfn.gym import HyperGrid
from oracles import GaussianMixture, Grid

import sculpt
from sculpt import Classifier
from sculpt.classifier.guide import Guide
from sculpt.diffusion.backbones import VectorNetwork
from sculpt.formula import Posterior, label_sets
from sculpt.gflownet import exact
from sculpt.model import same_model
from sculpt.overlaps import overlap, predict

N = 20_000


def gaussian(mean, variance=1.0):
    return GaussianMixture([[float(mean)]], [[[variance]]])


def models_of(mixtures):
    return [exact_model(mixture, name=name) for mixture, name in zip(mixtures, "pqr", strict=False)]


def densities(mixtures):
    return lambda x: torch.stack([mixture.log_prob(x) for mixture in mixtures], -1)


def draws(mixtures, n=N, seed=0):
    return [mixture.draw(n, torch.Generator().manual_seed(seed + i)) for i, mixture in enumerate(mixtures)]


def report(mixtures, n=N):
    return overlap(models_of(mixtures), densities(mixtures), data=draws(mixtures, n))


class Quadrature:
    """Midpoint rule for 1-D mixtures."""

    def __init__(self, mixtures):
        x = torch.linspace(-15, 15, 60_001, dtype=torch.float64)[:, None]
        self.ell, self.dx = densities(mixtures)(x), 30 / 60_000
        self.p = self.ell.exp() * self.dx

    def js(self, which):
        log_r = torch.log_softmax(self.ell[:, which], -1)
        return math.log(len(which)) + float((self.p[:, which] * log_r).sum()) / len(which)

    def z(self, formula, which):
        return float(formula.value(self.ell[:, which]).exp().sum()) * self.dx


THREE = [gaussian(-1.0), gaussian(0.7, 0.5), gaussian(1.5, 2.0)]


def test_jensen_shannon_and_acceptance_are_those_of_quadrature():
    truth, found, names = Quadrature(THREE), report(THREE), "pqr"
    tolerance = 4 / math.sqrt(N)  # shares are at most one, their logarithms of variance about one
    assert found.js == pytest.approx(truth.js([0, 1, 2]), abs=tolerance)
    for (i, j), (js, _) in found.pairs.items():
        assert js == pytest.approx(truth.js([i, j]), abs=tolerance)
        for labels in ((0, 1), (0, 0), (1, 1)):
            formula = Posterior(2, labels)
            z = found.acceptance[formula.write((names[i], names[j]))]
            assert z == pytest.approx(truth.z(formula, [i, j]), abs=tolerance)
    for labels in label_sets(3, 2):
        formula = Posterior(3, labels)
        assert found.acceptance[formula.write(names)] == pytest.approx(truth.z(formula, [0, 1, 2]), abs=tolerance)
    assert found.verdict.level == "sound"


@pytest.mark.parametrize(
    "compose",
    [
        lambda p, q, r: p & q,
        lambda p, q, r: r - p,
        lambda p, q, r: p & q & r,
        lambda p, q, r: p | r,
        lambda p, q, r: sculpt.harmonic_mean(p, q, odds=0.8),
        lambda p, q, r: sculpt.posterior([q, p, r], (2, 0, 0), odds=[1, 2, 3]),
        lambda p, q, r: sculpt.power_mean([p, r], -2),
        lambda p, q, r: sculpt.power_mean([p, r], 0),
    ],
    ids=range(8),
)
def test_the_predicted_acceptance_of_a_composition_is_its_normaliser(compose):
    models, mixtures = models_of(THREE), dict(zip("pqr", THREE, strict=True))
    composition = compose(*models)
    truth = Quadrature([mixtures[str(leaf)] for leaf in composition.leaves])
    prediction = report(THREE).predict(composition)
    expected = truth.z(composition.formula, range(composition.formula.m))
    assert prediction.acceptance == pytest.approx(expected, abs=6 / math.sqrt(N))
    assert prediction.verdict.level == "sound"


def test_an_inner_composition_is_normalised():
    p, q, r = models_of(THREE)
    truth = Quadrature(THREE)
    inner = Posterior(2, (0, 1))
    first = inner.value(truth.ell[:, :2]) - math.log(truth.z(inner, [0, 1]))
    expected = float(Posterior(2, (0, 0)).value(torch.stack([first, truth.ell[:, 2]], -1)).exp().sum()) * truth.dx
    assert report(THREE).predict((p & q) - r).acceptance == pytest.approx(expected, abs=6 / math.sqrt(N))


def test_equal_models_are_not_apart_and_half_of_their_samples_satisfy_any_pair_of_labels():
    found = report([gaussian(0.0), gaussian(0.0)])
    assert found.js == pytest.approx(0, abs=1e-12)
    assert found.pairs[0, 1] == (pytest.approx(0, abs=1e-12), 0.0)
    assert list(found.acceptance.values()) == pytest.approx([0.5] * 3)
    assert found.verdict.level == "sound" and "hardly different" in found.verdict.reason


def test_disjoint_models_are_log_2_apart_and_nothing_satisfies_both():
    mixtures = [gaussian(-8.0, 0.1), gaussian(8.0, 0.1)]
    p, q = models_of(mixtures)
    found = report(mixtures, 1000)
    assert found.js == pytest.approx(math.log(2))
    assert found.acceptance["p ⊗ q"] < 1e-100
    assert found.acceptance["p ◑ q"] == pytest.approx(1)
    assert str(found.verdict).startswith("UNCOVERED: p ⊗ q asks for a region that no base model covers")
    assert found.predict(p & q).verdict.level == "uncovered"
    assert found.predict(sculpt.product([p, q], [1, 1])).verdict.level == "uncovered"
    for composition in (p - q, p | q, sculpt.product([p, q], [1.5, 0])):
        assert found.predict(composition).verdict.level == "sound"


def test_a_negated_model_asks_for_what_few_samples_show():
    mixtures = [gaussian(0.0), gaussian(3.0, 0.5)]
    p, q = models_of(mixtures)
    prediction = report(mixtures, 1000).predict(sculpt.product([p, q], [1, -0.9]))
    assert prediction.verdict.level != "sound"


def test_the_support_distance_is_the_mean_distance_of_log_ratios_to_the_nearest_of_the_other_model():
    mixtures = [gaussian(-1.0), gaussian(1.0)]
    found, (x, y) = report(mixtures, 200), draws(mixtures, 200)
    t, u = (densities(mixtures)(part).diff(dim=-1) for part in (x, y))
    distances = (t - u.T).abs()
    expected = (distances.amin(1).mean() + distances.amin(0).mean()) / 2
    assert found.pairs[0, 1][1] == pytest.approx(float(expected))


def test_the_support_distance_of_separated_models_is_the_gap_of_their_log_ratios():
    """log p - log q = -2 μ x / σ² for means ±μ: nearest across the gap are the innermost samples."""
    mixtures = [gaussian(-5.0, 0.01), gaussian(5.0, 0.01)]
    (_, distance), *_ = report(mixtures, 1000).pairs.values()
    assert distance == pytest.approx(2 * 5 / 0.01 * (10 - 3.2 * 0.1), rel=0.02)


def test_without_a_classifier_tracked_densities_give_the_same_report():
    rings = three_rings()
    models = [exact_model(ring, name=name) for ring, name in zip(rings, "pqr", strict=True)]
    data = draws(rings, 2000)
    truth = overlap(models, densities(rings), data=data)
    tracked = overlap(models, data=data, generator=torch.Generator().manual_seed(0))
    assert "approximation" in tracked.source
    assert tracked.js == pytest.approx(truth.js, abs=0.02)
    for pair, (js, _) in truth.pairs.items():
        assert tracked.pairs[pair][0] == pytest.approx(js, abs=0.02)
    for formula, z in truth.acceptance.items():
        assert tracked.acceptance[formula] == pytest.approx(z, abs=0.02)


def test_gflownets_tell_their_densities_along_a_path_back():
    env = HyperGrid(ndim=2, height=6, validate_modes=False)
    models = perfect(env, 2)
    p, q = (exact.terminal_distribution(model) for model in models)
    found = overlap(models, n=4000, generator=torch.Generator().manual_seed(0))
    assert found.js == pytest.approx(exact.js(p, q), abs=4 / math.sqrt(4000))
    z = float(torch.where(p * q > 0, p * q / (p + q), 0.0).sum())
    assert found.predict(models[0] & models[1]).acceptance == pytest.approx(z, abs=4 / math.sqrt(4000))
    with pytest.raises(ValueError, match="traced back"):
        overlap(perfect(Stairs(), 2), n=10)


def test_samples_are_drawn_where_none_are_given_and_the_same_seed_gives_the_same_report():
    rings = three_rings()[:2]
    p, q = (exact_model(ring, name=name) for ring, name in zip(rings, "pq", strict=True))
    one, two = (
        overlap(p & q, densities(rings), n=500, steps=16, generator=torch.Generator().manual_seed(0)).to_dict()
        for _ in range(2)
    )
    assert one == two
    grid = Grid(4.0)
    assert predict(p & q, densities(rings), n=2000, steps=16).acceptance == pytest.approx(
        math.exp(grid.exact(Posterior(2, (0, 1)), rings)[1]), abs=0.03
    )


class Exact(Guide):
    """A guide with keys in an order of its own."""

    def __init__(self, mixtures, models):
        self.m, self.observations, self.mixtures = len(models), 3, mixtures
        self.keys = tuple(model.key for model in models)

    def marginal(self, *state): ...

    def log_h(self, *state, labels, odds=None): ...

    def terminal(self, x):
        return torch.log_softmax(densities(self.mixtures)(x), -1)


def test_a_classifier_knows_its_models_in_any_order_and_refuses_others():
    models = models_of(THREE)
    guide = Exact(THREE[::-1], models[::-1])
    ours = overlap(models, guide, data=draws(THREE, 2000))
    truth = report(THREE, 2000)
    assert ours.js == pytest.approx(truth.js)
    assert ours.pairs == truth.pairs
    assert Posterior(3, (0, 1, 2)).write("pqr") in ours.acceptance  # label sets of the classifier's three observations
    other = exact_model(gaussian(9.0), name="other")
    with pytest.raises(ValueError, match="other base models"):
        overlap([*models[:2], other], guide, data=draws(THREE, 100))
    with pytest.raises(ValueError, match="not among the models"):
        truth.predict(models[0] & other)
    assert same_model(models[0], ours.models[0])


def test_a_classifier_alone_answers_from_its_training_curve():
    classifier = Classifier(VectorNetwork(1), ["a", "b"], names=["p", "q"])
    with pytest.raises(ValueError, match="no training curve"):
        overlap(classifier)
    rows = [(0.69, 0.69, 0.69), (0.30, 0.5, 0.4), (0.29, 0.6, 0.5)]
    classifier.history = [
        dict(zip(("held_out_terminal", "held_out_marginal", "held_out_joint"), row, strict=True)) for row in rows
    ]
    found = overlap(classifier)
    assert found.js == pytest.approx(math.log(2) - 0.30)  # of an older curve, the row of the least loss in total
    classifier.history[2]["kept"] = True
    assert overlap(classifier).js == pytest.approx(math.log(2) - 0.29)  # of the row whose weights these are
    del classifier.history[2]["kept"]
    assert "lower bound" in found.source
    with pytest.raises(ValueError, match="Draw samples"):
        found.predict(models_of(THREE)[0] & models_of(THREE)[1])
    classifier.history[1]["held_out_terminal"] = 1e-4
    assert str(overlap(classifier).verdict).startswith("UNCOVERED: p & q")


def test_the_bound_from_the_training_curve_holds():
    """Acceptance of p & q ≤ (1 - JS / log 2) / 2."""
    for distance in (0.0, 0.5, 1.0, 2.0, 4.0, 6.0):
        truth = Quadrature([gaussian(0.0), gaussian(distance, 1.5)])
        assert truth.z(Posterior(2, (0, 1)), [0, 1]) <= (1 - truth.js([0, 1]) / math.log(2)) / 2 + 1e-9


def test_a_report_reads_well_and_is_json():
    found = report(THREE, 500)
    text = str(found)
    for part in ("p, q, r", "Jensen-Shannon", "support distance", "p ⊗ q", "verdict", "more in .acceptance"):
        assert part in text
    assert repr(found) == text
    again = json.loads(json.dumps(found.to_dict()))
    assert again["names"] == ["p", "q", "r"]
    assert [tuple(pair["models"]) for pair in again["pairs"]] == list(itertools.combinations("pqr", 2))


def test_models_of_one_name_are_told_apart():
    models = [exact_model(mixture, name="p") for mixture in THREE[:2]]
    found = overlap(models, densities(THREE[:2]), data=draws(THREE[:2], 100))
    assert found.names == ("p [0]", "p [1]")
    assert len(found.acceptance) == 3


def test_bad_input_is_refused():
    p, q = models_of(THREE[:2])
    with pytest.raises(ValueError, match="two or more"):
        overlap([p], densities(THREE[:1]))
    with pytest.raises(ValueError, match="at least 2 samples of each"):
        overlap([p, q], densities(THREE[:2]), data=draws(THREE[:1]))
    with pytest.raises(ValueError, match="one column per base model"):
        overlap([p, q], densities(THREE), data=draws(THREE[:2], 100))
    with pytest.raises(FloatingPointError, match="not a number"):
        overlap([p, q], lambda x: x.new_full((len(x), 2), float("nan")), data=draws(THREE[:2], 100))
    with pytest.raises(ValueError, match="at least 2 samples"):
        overlap([p, q], densities(THREE[:2]), n=1)
    with pytest.raises(ValueError, match="Shares cannot normalise"):
        report(THREE[:2], 100).predict(sculpt.product([p, q], [1, 1]) - q)
