"""The algebra of compositions: which formula over which models an expression stands for."""

import itertools

import pytest
import torch
from diffusers_models import exact_model
from oracles import ExactGuide, GaussianMixture, ring

import sculpt
from sculpt.composition import Composition
from sculpt.diffusion.denoiser import DiffusionComposition
from sculpt.formula import Mixture, Nested, Posterior, PowerMean, Product
from sculpt.model import BaseModel, same_model

MIXTURES = [ring(2 + i, 1.0, 0.2, phase=0.3 * i) for i in range(5)]
p, q, r, s, t = MODELS = [exact_model(mixture, name=name) for mixture, name in zip(MIXTURES, "pqrst", strict=True)]


class Stub(BaseModel):
    """A base model of a family that diffusion models have no states in common with."""

    name, key, device, shape = "stub", "stub", torch.device("cpu"), (2,)

    def stream(self, n, road, settings):
        raise NotImplementedError

    def check_composable(self, other):
        if not isinstance(other, Stub):
            raise ValueError(f"{self} is a stub, {other} is not.")


def is_(composition, formula, models):
    return composition.formula == formula and [str(m) for m in composition.models] == [str(m) for m in models]


def densities(composition, ell):
    """log of the composition's target from its leaves' log-densities: dict from name to tensor. Inner parts as they are."""
    if not isinstance(composition, Composition):
        return ell[str(composition)]
    return composition.formula.value(torch.stack([densities(part, ell) for part in composition.models], -1))


ELL = dict(zip("pqrst", torch.randn(5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), strict=True))


# Operators ------------------------------------------------------------------------------------------------------------------------


def test_union_intersection_and_difference_are_mixture_harmonic_mean_and_contrast():
    assert is_(p | q, Mixture([1, 1]), [p, q])
    assert is_(p & q, Posterior(2, (0, 1)), [p, q])
    assert is_(p - q, Posterior(2, (0, 0)), [p, q])
    for operator, function in (("|", sculpt.mixture), ("&", sculpt.harmonic_mean), ("-", sculpt.contrast)):
        composed = eval(f"p {operator} q")
        assert is_(function(p, q), composed.formula, composed.models)


def test_chains_of_one_operator_flatten():
    for chain in (p & q & r, p & (q & r), (p & q) & r):
        assert is_(chain, Posterior(3, (0, 1, 2)), [p, q, r])
    for chain in (p | q | r, p | (q | r)):
        assert is_(chain, Mixture([1, 1, 1]), [p, q, r])
    assert is_(p - q - r, Posterior(3, (0, 0, 0)), [p, q, r])
    assert is_(p & q & r & s & t, Posterior(5, (0, 1, 2, 3, 4)), MODELS)
    assert is_((p | q) | (r | s), Mixture([1] * 4), [p, q, r, s])
    assert is_((p & q) & (r & s), Posterior(4, (0, 1, 2, 3)), [p, q, r, s])


def test_a_difference_does_not_flatten_on_its_right():
    # p - (q - r) takes away less than p - q - r.
    assert is_(p - (q - r), Posterior(2, (0, 0)), [p, q - r])


def test_mixed_operators_nest():
    assert is_((p & q) - r, Posterior(2, (0, 0)), [p & q, r])
    assert is_(p & (q | r), Posterior(2, (0, 1)), [p, q | r])
    assert is_((p - q) | (r - s), Mixture([1, 1]), [p - q, r - s])
    # Python's precedence: & binds more loosely than -, | more loosely than &.
    assert is_(p & q - r, Posterior(2, (0, 1)), [p, q - r])
    assert is_(p | q & r, Mixture([1, 1]), [p, q & r])


def test_what_functions_make_is_a_part_and_no_chain():
    assert is_(sculpt.harmonic_mean(p, q, 0.3) & r, Posterior(2, (0, 1)), [sculpt.harmonic_mean(p, q, 0.3), r])
    assert is_(sculpt.mixture(p, q, weights=[1, 3]) | r, Mixture([1, 1]), [sculpt.mixture(p, q, weights=[1, 3]), r])
    assert is_((p & q) & sculpt.product([p], [2]), Posterior(3, (0, 1, 2)), [p, q, sculpt.product([p], [2])])


def test_equal_models_in_an_operator_count_once():
    again = exact_model(MIXTURES[0], name="p")  # another object of the same weights, name and schedule
    assert again is not p and same_model(again, p)
    assert is_(p | again | q, Mixture([1, 1]), [p, q])
    assert is_(p & q & again, Posterior(2, (0, 1, 0)), [p, q])
    assert is_(p - q - again, Posterior(2, (0, 0, 0)), [p, q])
    assert is_((p & q) - (p & q), Posterior(1, (0, 0)), [p & q])
    for same in (p & p, p | p, p - p):
        assert same.formula.m == 1
        torch.testing.assert_close(densities(same, ELL), ELL["p"])


def test_models_that_differ_in_weights_schedule_or_condition_are_different():
    assert not same_model(p, exact_model(MIXTURES[1], name="p"))
    assert not same_model(p, exact_model(MIXTURES[0], kind="cosine", name="p"))
    assert not same_model(p, p & p)


# Functions ------------------------------------------------------------------------------------------------------------------------


def test_the_weights_odds_and_powers_of_equal_models_add_up():
    assert is_(sculpt.mixture(p, q, p, weights=[1, 2, 3]), Mixture([4, 2]), [p, q])
    assert is_(sculpt.mixture(p, q, p), Mixture([2, 1]), [p, q])
    assert is_(sculpt.product([p, q, p], [1, 0.5, -0.25]), Product([0.75, 0.5]), [p, q])
    assert is_(sculpt.power_mean([q, p, q], -2), PowerMean(-2, [2, 1]), [q, p])
    assert is_(sculpt.posterior([p, q, p], (0, 2, 1)), Posterior(2, (0, 0, 1), [2, 1]), [p, q])
    assert is_(sculpt.posterior([p, q, p], (2, 1), [1, 5, 2]), Posterior(2, (0, 1), [3, 5]), [p, q])


@pytest.mark.parametrize("odds", [None, [1.0, 2.0, 0.5]])
def test_recognising_equal_models_keeps_the_target_that_was_written(odds):
    ell = torch.stack([ELL["p"], ELL["q"], ELL["p"]], -1)
    for labels in ((0, 1, 2), (2, 2), (1, 0, 0), (1,)):
        written = Posterior(3, labels, odds).value(ell)
        merged = densities(sculpt.posterior([p, q, p], labels, odds), ELL)
        torch.testing.assert_close(merged - merged[0], written - written[0])
    for written, merged in (
        (Mixture([1, 2, 4]), sculpt.mixture(p, q, p, weights=[1, 2, 4])),
        (Product([1, 0.3, -0.2]), sculpt.product([p, q, p], [1, 0.3, -0.2])),
        (PowerMean(0.5, [1, 2, 4]), sculpt.power_mean([p, q, p], 0.5, [1, 2, 4])),
    ):
        torch.testing.assert_close(densities(merged, ELL), written.value(ell))


def test_one_number_of_odds_is_the_share_of_the_first_model():
    a = torch.stack([ELL["p"], ELL["q"]], -1).exp()
    denominator = 0.3 * a[:, 0] + 0.7 * a[:, 1]
    harmonic, contrast = (densities(f(p, q, 0.3), ELL).exp() for f in (sculpt.harmonic_mean, sculpt.contrast))
    torch.testing.assert_close(harmonic, 0.7 * a[:, 0] * a[:, 1] / denominator)  # 0.7: the constant of y2 = q
    torch.testing.assert_close(contrast, 0.3 * a[:, 0] ** 2 / denominator)
    assert is_(sculpt.harmonic_mean(p, q, 0.5), (p & q).formula, [p, q])
    assert is_(sculpt.harmonic_mean(p, q, [1, 3]), sculpt.harmonic_mean(p, q, 0.25).formula, [p, q])


# Closure --------------------------------------------------------------------------------------------------------------------------


def test_compositions_of_compositions_are_base_models():
    deep = sculpt.product([sculpt.power_mean([(p & q) - r, s | t], -1), p], [1, 0.5])
    assert isinstance(deep, BaseModel) and isinstance(deep, DiffusionComposition) and deep.shape == (2,)
    assert [str(leaf) for leaf in deep.leaves] == list("pqrst")
    assert is_(deep & (q - p), Posterior(2, (0, 1)), [deep, q - p])


def test_leaves_are_the_different_pretrained_models_in_order_of_appearance():
    assert [str(leaf) for leaf in ((q & p) - (p | r)).leaves] == ["q", "p", "r"]
    assert p.leaves == (p,)


def test_keys_tell_compositions_apart_and_recognise_what_was_built_again():
    build = [
        lambda: p & q,
        lambda: p - q,
        lambda: q - p,
        lambda: p | q,
        lambda: p & r,
        lambda: p & q & r,
        lambda: (p & q) - r,
        lambda: (p - q) & r,
        lambda: sculpt.harmonic_mean(p, q, 0.3),
        lambda: sculpt.harmonic_mean(p, q, 0.3001),
        lambda: sculpt.product([p, q], [1, 0.5]),
        lambda: sculpt.product([p, q], [1, 0.5000001]),
        lambda: sculpt.power_mean([p, q], -1),
        lambda: sculpt.posterior([p, q], (0, 1, 1)),
    ]
    assert all(make().key == make().key and same_model(make(), make()) for make in build)
    assert len({make().key for make in build}) == len(build)


def test_nothing_is_computed_until_a_composition_is_sampled():
    calls = []
    model = sculpt.Diffusion(lambda x, t: calls.append(1) or torch.zeros_like(x), p.scheduler, (2,), name="counted")
    calls.clear()
    composition = (model & q) - (r | model)
    assert str(composition) and composition.key and composition.leaves and not calls


# Printing -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("composition", "text"),
    [
        (p | q, "p | q"),
        (p & q & r, "p ⊗ q ⊗ r"),
        (p - q, "p ◑ q"),
        (sculpt.harmonic_mean(p, q, 0.9), "p ⊗[α=0.9] q"),
        (sculpt.contrast(p, q, 0.25), "p ◑[α=0.25] q"),
        ((p & q) - r, "(p ⊗ q) ◑ r"),
        (p & q - r, "p ⊗ (q ◑ r)"),
        (p | q & r, "p | (q ⊗ r)"),
        (p - (q - r), "p ◑ (q ◑ r)"),
        (p - q - r, "p(x | y1=p, y2=p, y3=p; p, q, r)"),
        ((p & q) - r - (p | s), "p(x | y1=(p ⊗ q), y2=(p ⊗ q), y3=(p ⊗ q); (p ⊗ q), r, (p | s))"),
        (((p & q) - r) & (s | t), "((p ⊗ q) ◑ r) ⊗ (s | t)"),
        (sculpt.product([p, q], [1, -0.5]), "p · q^-0.5"),
        (sculpt.product([p | q], [1.5]), "(p | q)^1.5"),
        (sculpt.power_mean([p, q], -2), "M[r=-2](p, q)"),
        (sculpt.mixture(p, q, weights=[1, 3]), "0.25·p | 0.75·q"),
    ],
)
def test_printing_shows_the_formula_with_its_parentheses(composition, text):
    assert str(composition) == text


def test_printed_parentheses_balance_however_deep_compositions_nest():
    def balanced(text):
        depth = list(itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in text))
        return depth[-1] == 0 and min(depth) >= 0

    deep = p
    for k, other in enumerate([q, r, s, t, q, r]):
        deep = [deep - other - p, deep & other, deep | other & q, sculpt.posterior([deep, other, p], (0, 0, 1))][k % 4]
        assert balanced(str(deep)), str(deep)


# Refusals -------------------------------------------------------------------------------------------------------------------------


def test_models_of_different_families_do_not_compose():
    for compose in (lambda: p & Stub(), lambda: Stub() | p, lambda: (p & q) - Stub(), lambda: sculpt.mixture(p, q, Stub())):
        with pytest.raises(ValueError, match="stub"):
            compose()


def test_models_of_different_shapes_do_not_compose():
    other = exact_model(GaussianMixture([[0.0, 0.0, 0.0]], 1.0), name="three")
    with pytest.raises(ValueError, match=r"p makes samples of shape \(2,\), three of shape \(3,\)"):
        p & other
    with pytest.raises(ValueError, match="three"):
        (p - q) | other


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: p & 3, TypeError, "unsupported operand"),
        (lambda: "q" - p, TypeError, "unsupported operand"),
        (lambda: Composition.__init__.__wrapped__(object.__new__(Composition), Mixture([1]), ["q"]), TypeError, "got 'q'"),
        (lambda: sculpt.mixture(), ValueError, "at least one base model"),
        (lambda: sculpt.posterior([], ()), ValueError, "at least one"),
        (lambda: sculpt.product([], []), ValueError, "at least one base model"),
        (lambda: sculpt.mixture(p, q, weights=[1]), ValueError, "1 weights for 2 base models"),
        (lambda: sculpt.mixture(p, q, weights=[1, 0]), ValueError, "positive"),
        (lambda: sculpt.product([p, q], [1]), ValueError, "1 powers for 2 base models"),
        (lambda: sculpt.product([p, q], [1, -1]), ValueError, "positive sum"),
        (lambda: sculpt.power_mean([p, q], 2, [1, 2, 3]), ValueError, "3 weights for 2 base models"),
        (lambda: sculpt.posterior([p, q], (0, 2)), ValueError, "indices of base models, 0 to 1"),
        (lambda: sculpt.posterior([p, q, p], (0, 3)), ValueError, "indices of base models, 0 to 2"),
        (lambda: sculpt.posterior([p, q], ()), ValueError, "at least one label"),
        (lambda: sculpt.posterior([p, q], (0, 1), [1, 2, 3]), ValueError, "3 odds for 2 base models"),
        (lambda: sculpt.posterior([p, q], (0, 1), [1, 0]), ValueError, "positive"),
        (lambda: sculpt.posterior([p, q, p], (0, 1), [1, 1, -0.5]), ValueError, "positive"),
        (lambda: sculpt.mixture(p, q, p, weights=[1, 1, -0.5]), ValueError, "positive"),
        (lambda: sculpt.power_mean([p, q, p], 2, [1, 1, -0.5]), ValueError, "positive"),
        (lambda: sculpt.posterior([p, q, r], (0, 1), 0.3), ValueError, "odds of two models, got odds=0.3 for 3"),
        *[
            (lambda a=a: sculpt.harmonic_mean(p, q, a), ValueError, "between 0 and 1")
            for a in (0, 1, -0.1, 1.5, float("nan"), 0.0)
        ],
    ],
)
def test_what_cannot_be_composed_is_refused_with_what_was_got(make, error, message):
    with pytest.raises(error, match=message):
        make()


def noisy(name, low, high):
    return sculpt.EnergyModel(lambda z, s: z.square().sum(-1), (2,), s_min=low, s_max=high, name=name)


def test_every_two_of_the_pretrained_models_have_to_share_noise_levels():
    wide, low, high = noisy("wide", 0.01, 80.0), noisy("low", 0.01, 1.0), noisy("high", 2.0, 80.0)
    assert (wide & low).models and (wide & high).models
    message = "(low covers noise levels 0.01 to 1 and high 2 to 80|high covers noise levels 2 to 80 and low 0.01 to 1).* none in common"
    for compose in (
        lambda: wide & low & high,
        lambda: wide | low | high,
        lambda: sculpt.posterior([wide, low, high], (0,)),
        lambda: sculpt.product([high, wide, low], [1, 1, 1]),
        lambda: (wide & low) - high,
        lambda: high - (wide | low),
        lambda: (wide - low) & (wide - high),
        lambda: (wide & low).check_composable(high),
        lambda: high.check_composable(low),
    ):
        with pytest.raises(ValueError, match=message):
            compose()


def test_a_unet_is_what_compositions_of_diffusion_models_can_be():
    assert (p & q).as_unet(ExactGuide(MIXTURES[:2])).config.in_channels == 2
    assert not hasattr(p & q, "as_estimator") and not hasattr(Stub() & Stub(), "as_unet")


# Nested formulas ------------------------------------------------------------------------------------------------------------------


def tracked_formulas(composition, monkeypatch, **options):
    """Of every chain that a run makes: its formula and the models that it tracks; and the run's notes."""
    made, tracked = [], type(p).tracked

    def spy(self, formula, models, settings, *rest):
        made.append((formula, models))
        return tracked(self, formula, models, settings, *rest)

    monkeypatch.setattr(type(p), "tracked", spy)
    road = sculpt.Tracked(particles=500)
    samples = composition.sample(1, road, steps=8, progress=False, generator=torch.Generator().manual_seed(0), **options)
    return made, samples.diagnostics.notes


def test_nested_formulas_over_the_leaves_have_the_inner_parts_normalised(monkeypatch):
    made, notes = tracked_formulas((p & q) - sculpt.product([r], [2]), monkeypatch)
    assert [formula for formula, _ in made[:2]] == [(p & q).formula, Product([2.0])] and len(made) == 3
    formula, leaves = made[2]
    assert isinstance(formula, Nested) and formula.indices == ((0, 1), (2,)) and [str(leaf) for leaf in leaves] == list("pqr")
    assert [note.partition(": ")[0] for note in notes] == ["log Z of p ⊗ q", "log Z of r^2"]
    z = [float(note.partition(": ")[2].split(" ± ")[0]) for note in notes]
    assert formula.log_z == pytest.approx(z, abs=1e-3)
    ell = torch.stack([ELL[name] for name in "pqr"], -1)
    parts = torch.stack([densities(p & q, ELL) - z[0], 2 * ELL["r"] - z[1]], -1)
    torch.testing.assert_close(formula.value(ell), Posterior(2, (0, 0)).value(parts), rtol=0, atol=2e-3)


def test_an_operand_keeps_its_place_where_models_stand_in_another_order(monkeypatch):
    made, _ = tracked_formulas(sculpt.product([q, p - q], [0.5, 1]), monkeypatch)
    formula, leaves = made[-1]
    assert [str(leaf) for leaf in leaves] == ["q", "p"] and formula.indices == ((0,), (1, 0))
    ell = torch.stack([ELL["q"], ELL["p"]], -1)
    expected = 0.5 * ELL["q"] + densities(p - q, ELL) - formula.log_z[1]
    torch.testing.assert_close(formula.value(ell), expected)
