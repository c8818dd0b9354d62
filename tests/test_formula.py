"""Formulas: the facts of the algebra, and values, gradients and Hessians against automatic differentiation."""

import itertools
import math

import pytest
import torch

from sculpt.formula import Formula, Mixture, Nested, Posterior, PowerMean, Product, label_sets

INF = float("inf")


def logs(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numbers(m, seed=0):
    """m different positive numbers."""
    return (0.3 + torch.rand(m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).tolist()


def posteriors(m, n):
    for labels in itertools.islice(itertools.product(range(m), repeat=n), 0, None, max(1, m**n // 4)):
        yield Posterior(m, labels)
        yield Posterior(m, labels, numbers(m, n))


def plain_formulas(m) -> list[Formula]:
    formulas = [Mixture([1.0] * m), Mixture(numbers(m)), Product(numbers(m)), Product([2.0, *[-0.2] * (m - 1)])]
    formulas += [PowerMean(r, numbers(m)) for r in (-3.0, -1.0, -1e-3, 0.0, 0.5, 1.0, 2.0)]
    return formulas + [posterior for n in (1, 2, 3, 4) for posterior in posteriors(m, n)]


def nested_formulas() -> list[Formula]:
    inner = Nested(
        Posterior(2, (0, 0), [0.3, 0.7]), [PowerMean(-2, [1, 2]), Posterior(3, (2, 0, 1))], [(0, 1), (1, 2, 3)], [0.4, -1.0]
    )
    twice = Nested(
        Posterior(3, (0, 2, 0)), [inner, Mixture([1.0]), Product([0.5, 0.5])], [(0, 1, 2, 3), (1,), (3, 0)], [-2, 0, 0.3]
    )
    return [
        Nested(Posterior(2, (0, 1)), [Posterior(2, (0, 1)), Mixture([1.0])], [(0, 1), (2,)], [-1.0, 0.0]),
        Nested(Mixture([1, 2]), [Product([1.5, -0.5]), Posterior(2, (1, 1))], [(0, 1), (0, 1)], [0.7, 0.1]),
        Nested(PowerMean(0.5, [1, 3]), [Posterior(2, (0, 1)), Posterior(2, (1, 0, 0), [1, 4])], [(2, 0), (0, 1)], [0.0, -0.2]),
        Nested(Product([2, -0.5]), [Mixture([1, 1]), Posterior(2, (0, 1))], [(0, 1), (1, 2)]),
        Nested(Posterior(2, (0, 1)), [Product([1.5, -0.5]), Mixture([1.0])], [(0, 1), (2,)]),
        inner,
        twice,
        Nested(Mixture([1.0, 1.0]), [twice, inner], [(0, 1, 2, 3), (3, 2, 1, 0)], [1.0, 2.0]),
    ]


ALL = [formula for m in range(1, 6) for formula in plain_formulas(m)] + nested_formulas()


def differences(values):
    """Up to a constant: the values less their first."""
    return values - values[..., :1]


# Values, by hand -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", range(1, 6))
@pytest.mark.parametrize("n", range(1, 5))
def test_a_posterior_is_its_definition_term_by_term(m, n):
    p = logs(7, m, scale=1.0).exp()
    v = torch.tensor(numbers(m), dtype=torch.float64)
    v = v / v.sum()
    for labels in itertools.product(range(m), repeat=n):
        expected = p[:, labels[0]]
        for i in labels[1:]:
            expected = expected * v[i] * p[:, i] / (v * p).sum(-1)
        torch.testing.assert_close(Posterior(m, labels, v.tolist()).value(p.log()), expected.log())


def test_mixture_product_and_power_mean_are_their_definitions():
    p, w = logs(9, 3, scale=1.0).exp(), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    torch.testing.assert_close(Mixture([2, 5, 3]).value(p.log()).exp(), p @ w)
    torch.testing.assert_close(
        Product([1.5, -0.5, 0.2]).value(p.log()).exp(), p[:, 0] ** 1.5 * p[:, 1] ** -0.5 * p[:, 2] ** 0.2
    )
    for r in (-2.0, -1.0, 0.5, 3.0):
        torch.testing.assert_close(PowerMean(r, [2, 5, 3]).value(p.log()).exp(), (p**r @ w) ** (1 / r))


def test_a_nested_formula_is_the_outer_one_of_the_normalised_parts():
    ell = logs(9, 3)
    inner, outer = Posterior(2, (0, 1)), Posterior(2, (1, 1), [0.3, 0.7])
    expected = outer.value(torch.stack([inner.value(ell[:, [2, 0]]) - 0.6, ell[:, 1] + 0.2], -1))
    torch.testing.assert_close(Nested(outer, [inner, Mixture([1.0])], [(2, 0), (1,)], [0.6, -0.2]).value(ell), expected)


# The facts ------------------------------------------------------------------------------------------------------------------------


def test_a_posterior_with_one_label_is_that_base_model():
    for m in range(1, 6):
        ell = logs(20, m)
        for i in range(m):
            torch.testing.assert_close(Posterior(m, (i,), numbers(m)).value(ell), ell[:, i], rtol=0, atol=0)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_exchanging_labels_rescales_the_target_by_the_ratio_of_the_odds_and_nothing_else(m):
    ell, odds = logs(20, m), numbers(m)
    labels = (0, 1, 1, m - 1)
    for order in set(itertools.permutations(labels)):
        difference = Posterior(m, order, odds).value(ell) - Posterior(m, labels, odds).value(ell)
        torch.testing.assert_close(difference, torch.full_like(difference, math.log(odds[labels[0]] / odds[order[0]])))
        torch.testing.assert_close(Posterior(m, order).value(ell), Posterior(m, labels).value(ell))


def test_equal_odds_of_any_size_are_the_plain_form():
    for m, labels in ((2, (0, 1)), (3, (0, 1, 2)), (5, (4, 4, 0, 1))):
        ell = logs(20, m)
        torch.testing.assert_close(Posterior(m, labels, [7.0] * m).value(ell), Posterior(m, labels).value(ell))
    assert Posterior(2, (0, 1), [0.5, 0.5]) == Posterior(2, (0, 1)) == Posterior(2, (0, 1), [3, 3])


def test_the_plain_harmonic_mean_is_half_of_p_q_over_their_mean():
    # Z = p(y2 | y1) needs the constants: p q / (p + q), not 2 p q / (p + q).
    p, q = logs(20, 2, scale=1.0).exp().unbind(-1)
    torch.testing.assert_close(Posterior(2, (0, 1)).value(torch.stack([p, q], -1).log()).exp(), p * q / (p + q))
    torch.testing.assert_close(Posterior(2, (0, 0)).value(torch.stack([p, q], -1).log()).exp(), p * p / (p + q))


@pytest.mark.parametrize("formula", [f for m in (2, 3, 5) for f in plain_formulas(m)], ids=repr)
def test_relabelling_the_models_relabels_the_target(formula):
    m = formula.m
    ell = logs(10, m)
    order = [(i + 1) % m for i in range(m)]  # new model j is old model order[j]
    back = [order.index(i) for i in range(m)]
    if isinstance(formula, Posterior):
        relabelled = Posterior(m, [back[i] for i in formula.labels], [formula.odds[i] for i in order])
    elif isinstance(formula, Mixture):
        relabelled = Mixture([formula.weights[i] for i in order])
    elif isinstance(formula, Product):
        relabelled = Product([formula.powers[i] for i in order])
    else:
        relabelled = PowerMean(formula.exponent, [formula.weights[i] for i in order])
    torch.testing.assert_close(relabelled.value(ell[:, order]), formula.value(ell))


def test_the_posteriors_of_the_last_label_sum_to_that_of_the_others():
    # Summed over y_n, the targets give p(x | y_1 ... y_{n-1}) with its constant: that is what the odds' normalisation is for.
    for m, labels in ((2, (0,)), (3, (1, 1)), (4, (0, 2, 3))):
        ell, odds = logs(20, m), numbers(m)
        total = torch.stack([Posterior(m, (*labels, j), odds).value(ell) for j in range(m)]).logsumexp(0)
        torch.testing.assert_close(total, Posterior(m, labels, odds).value(ell))


@pytest.mark.parametrize("formula", ALL, ids=repr)
def test_scaling_all_densities_by_c_scales_the_target_by_c_to_the_degree(formula):
    ell = logs(10, formula.m)
    if all(part.degree == 1 for part in getattr(formula, "parts", ())):
        torch.testing.assert_close(formula.value(ell + 2.5), formula.value(ell) + 2.5 * formula.degree)
    if not isinstance(formula, Product | Nested):
        assert formula.degree == 1


@pytest.mark.parametrize("formula", [f for m in range(1, 6) for f in plain_formulas(m)], ids=repr)
def test_a_composition_of_equal_models_is_that_model(formula):
    one = logs(20, 1)
    equal = one.expand(20, formula.m)
    expected = formula.degree * one[:, 0]
    if isinstance(formula, Posterior):  # with the constant of the observations, log v for each
        expected = expected + sum(math.log(formula.odds[i]) for i in formula.labels[1:])
    torch.testing.assert_close(formula.value(equal), expected)


def test_the_harmonic_mean_is_the_posterior_and_the_power_mean_of_exponent_minus_one():
    ell, odds = logs(30, 2), [0.3, 0.7]
    # p q / (a p + (1-a) q): weight a belongs to p in the posterior's sum and to q, whose reciprocal it scales, in the mean.
    posterior, mean = Posterior(2, (0, 1), odds), PowerMean(-1, odds[::-1])
    torch.testing.assert_close(differences(posterior.value(ell)), differences(mean.value(ell)))
    torch.testing.assert_close(posterior.gradient(ell), mean.gradient(ell))
    torch.testing.assert_close(posterior.hessian(ell), mean.hessian(ell))


def test_the_power_mean_of_exponent_one_is_the_mixture_and_of_zero_the_product():
    ell, weights = logs(30, 3), [0.2, 0.5, 0.3]
    for mean, other in ((PowerMean(1, weights), Mixture(weights)), (PowerMean(0, weights), Product(weights))):
        torch.testing.assert_close(mean.value(ell), other.value(ell))
        torch.testing.assert_close(mean.gradient(ell), other.gradient(ell))
        torch.testing.assert_close(mean.hessian(ell), other.hessian(ell))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [0.0, -1e5, 1e5])
def test_the_power_mean_runs_continuously_into_the_geometric_mean(dtype, offset):
    ell, weights = logs(200, 3) + offset, [0.2, 0.5, 0.3]
    geometric, w = PowerMean(0, weights), torch.tensor(weights, dtype=torch.float64)
    variance = (w * (ell - (ell @ w)[:, None]) ** 2).sum(-1)
    eps = torch.finfo(dtype).eps
    for r in (1e-1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-12, -1e-12, -1e-8, -1e-6, -1e-4, -1e-2, -1e-1):
        error = (PowerMean(r, weights).value(ell.to(dtype)).double() - geometric.value(ell)).abs()
        # The cumulant expansion: r/2 times the variance, then r²/6 times at most the cubed range; and the rounding of the input.
        bound = abs(r) / 2 * variance + r**2 / 6 * 20.0**3 + 8 * eps * ell.abs().amax(-1) + 100 * eps
        assert (error <= bound).all(), (r, float((error / bound).max()))


# Derivatives ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", ALL, ids=repr)
def test_gradient_and_hessian_are_those_of_automatic_differentiation(formula):
    ell = logs(6, formula.m)
    gradient = torch.func.vmap(torch.func.grad(formula.value))(ell) if not isinstance(formula, Product | PowerMean) else None
    if gradient is None:  # value has branches on its input: one sample at a time
        gradient = torch.stack([torch.autograd.functional.jacobian(formula.value, row) for row in ell])
    hessian = torch.stack([torch.autograd.functional.hessian(formula.value, row) for row in ell])
    torch.testing.assert_close(formula.gradient(ell), gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(formula.hessian(ell), hessian, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("formula", ALL, ids=repr)
def test_gradients_sum_to_the_degree_and_hessian_rows_to_zero(formula):
    if any(part.degree != 1 for part in getattr(formula, "parts", ())):
        return
    ell = logs(10, formula.m)
    torch.testing.assert_close(formula.gradient(ell).sum(-1), torch.full((10,), formula.degree, dtype=torch.float64))
    torch.testing.assert_close(formula.hessian(ell).sum(-1), torch.zeros(10, formula.m, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "formula", [Mixture([1, 2]), Posterior(3, (0, 1, 1)), PowerMean(-2, [1, 1]), nested_formulas()[0]], ids=repr
)
def test_leading_axes_of_any_number_are_a_batch(formula):
    ell = logs(2, 3, formula.m)
    for function in (formula.value, formula.gradient, formula.hessian):
        whole, one = function(ell), function(ell[1, 2])
        assert whole.shape[:2] == (2, 3)
        torch.testing.assert_close(whole[1, 2], one)


# Extremes -------------------------------------------------------------------------------------------------------------------------

EXTREMES = [-INF, -1e6, -1e3, 0.0, 1e3, 1e6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("formula", [f for m in (1, 2, 3) for f in plain_formulas(m)] + nested_formulas(), ids=repr)
def test_log_densities_of_any_size_give_no_nan(formula, dtype):
    rows = list(itertools.product(EXTREMES, repeat=formula.m))
    ell = torch.tensor(rows, dtype=dtype)
    value, gradient, hessian = formula.value(ell), formula.gradient(ell), formula.hessian(ell)
    assert not value.isnan().any(), ell[value.isnan()][:3]
    assert gradient.isfinite().all(), ell[~gradient.isfinite().all(-1)][:3]
    assert hessian.isfinite().all(), ell[~hessian.isfinite().flatten(1).all(-1)][:3]
    finite = ell.isfinite().all(-1)
    assert value[finite].isfinite().all()


def test_outside_every_support_there_is_nothing_to_sample():
    nowhere = torch.full((1, 3), -INF, dtype=torch.float64)
    parts = [f for f in plain_formulas(3) if not (isinstance(f, Product) and min(f.powers) < 0)]
    for formula in [*parts, Product([2.0, -0.2, -0.2])]:
        assert formula.value(nowhere) == -INF, formula


def test_minus_infinity_is_the_limit_of_ever_smaller_densities():
    for formula in plain_formulas(2):
        if isinstance(formula, Product):
            continue
        ell = logs(10, 2, scale=1.0)
        zero, tiny = ell.clone(), ell.clone()
        zero[:, 1], tiny[:, 1] = -INF, -1e7
        value, limit = formula.value(zero), formula.value(tiny)
        vanished = value == -INF
        assert (limit[vanished] < -1e3).all(), formula
        torch.testing.assert_close(value[~vanished], limit[~vanished])
        torch.testing.assert_close(formula.gradient(zero), formula.gradient(tiny), msg=lambda m, f=formula: f"{f}: {m}")


def test_a_negated_model_without_density_gives_plus_infinity_and_one_of_power_zero_is_ignored():
    assert Product([1.0, -0.5]).value(torch.tensor([0.0, -INF])) == INF
    assert Product([1.0, -0.5]).value(torch.tensor([-INF, -INF])) == -INF
    assert Product([1.0, 0.0]).value(torch.tensor([-2.0, -INF])) == -2.0


def test_large_log_densities_lose_only_the_digits_of_their_size():
    ell = logs(50, 3)
    for formula in plain_formulas(3):
        shifted = formula.value(ell + 1e6) - 1e6 * formula.degree
        torch.testing.assert_close(shifted, formula.value(ell), rtol=0, atol=1e-8)


# Label sets, printing, equality -----------------------------------------------------------------------------------------------------


def test_label_sets_are_the_unordered_tuples():
    assert label_sets(2, 2) == [(0, 0), (0, 1), (1, 1)]
    for m, n in itertools.product(range(1, 6), range(1, 5)):
        sets = label_sets(m, n)
        assert len(sets) == math.comb(m + n - 1, n)
        assert set(sets) == {tuple(sorted(labels)) for labels in itertools.product(range(m), repeat=n)}


def test_printing_is_the_notation_of_the_paper():
    names = ["p", "q", "r"]
    assert Mixture([1, 1, 1]).write(names) == "p | q | r"
    assert Mixture([1, 1, 2]).write(names) == "0.25·p | 0.25·q | 0.5·r"
    assert Posterior(2, (0, 1)).write(names[:2]) == "p ⊗ q"
    assert Posterior(3, (0, 1, 2)).write(names) == "p ⊗ q ⊗ r"
    assert Posterior(2, (0, 0)).write(names[:2]) == "p ◑ q"
    assert Posterior(2, (1, 1)).write(names[:2]) == "q ◑ p"
    assert Posterior(2, (0, 1), [0.9, 0.1]).write(names[:2]) == "p ⊗[α=0.9] q"
    assert Posterior(3, (0, 0, 2)).write(names) == "p(x | y1=p, y2=p, y3=r; p, q, r)"
    assert "odds 0.2:0.2:0.6" in Posterior(3, (0, 1, 2), [1, 1, 3]).write(names)
    assert Product([1, -0.5, 2]).write(names) == "p · q^-0.5 · r^2"
    assert PowerMean(-2, [1, 1, 1]).write(names) == "M[r=-2](p, q, r)"
    assert PowerMean(0.5, [1, 1, 2]).write(names) == "M[r=0.5; 0.25:0.25:0.5](p, q, r)"


def test_the_odds_of_a_contrast_are_printed_for_the_model_that_stands_first():
    # q ◑[α] p is q² / (α q + (1-α) p): α is the odds of the model written first.
    assert Posterior(2, (0, 0), [0.9, 0.1]).write(["p", "q"]) == "p ◑[α=0.9] q"
    assert Posterior(2, (1, 1), [0.9, 0.1]).write(["p", "q"]) == "q ◑[α=0.1] p"


def test_different_formulas_print_differently():
    names = [f"p{i}" for i in range(3)]
    formulas = {f for f in plain_formulas(3) if not (isinstance(f, Posterior) and len(f.labels) == 1)}
    texts = [f.write(names) for f in formulas]
    assert len(set(texts)) == len(formulas)


def test_a_nested_formula_prints_its_parentheses():
    nested = Nested(Posterior(2, (0, 0)), [Posterior(2, (0, 1)), Mixture([1.0])], [(0, 1), (2,)])
    assert nested.write(["p", "q", "r"]) == "(p ⊗ q) ◑ r"
    assert repr(nested) == "Nested((p0 ⊗ p1) ◑ p2)"


def test_formulas_are_equal_when_their_numbers_are():
    assert Mixture([1, 3]) == Mixture([2, 6]) != Mixture([3, 1])
    assert Posterior(2, (0, 1)) != Posterior(2, (1, 0)) and Posterior(2, (0, 1)) != Posterior(3, (0, 1))
    assert Product([0.5, 0.5]) != Mixture([0.5, 0.5])
    assert len({*nested_formulas(), *nested_formulas()}) == len(nested_formulas())
    assert hash(PowerMean(-1, [1, 1])) == hash(PowerMean(-1.0, [2, 2]))


# Refusals -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Posterior(2, ()), "at least one label"),
        (lambda: Posterior(2, (0, 2)), r"0 to 1; got \[2\]"),
        (lambda: Posterior(2, (0, -1)), r"got \[-1\]"),
        (lambda: Posterior(3, (0, 1), [1, 1]), "2 odds for 3 base models"),
        (lambda: Posterior(2, (0, 1), [1, 0]), "odds have to be positive"),
        (lambda: Posterior(2, (0, 1), [1, -1]), "odds have to be positive"),
        (lambda: Posterior(2, (0, 1), [1, INF]), "odds have to be positive"),
        (lambda: Posterior(2, (0, 1), [1, float("nan")]), "odds have to be positive"),
        (lambda: Mixture([]), "weights have to be positive"),
        (lambda: Mixture([1, 0]), "weights have to be positive"),
        (lambda: PowerMean(INF, [1, 1]), "finite"),
        (lambda: PowerMean(float("nan"), [1, 1]), "finite"),
        (lambda: PowerMean(1, [1, -1]), "weights have to be positive"),
        (lambda: Product([1, -1]), "positive sum"),
        (lambda: Product([1, -2]), "positive sum"),
        (lambda: Product([]), "positive sum"),
        (lambda: Product([float("nan"), 1]), "finite"),
        (lambda: Nested(Posterior(2, (0, 1)), [Mixture([1])], [(0,)]), "takes 2 operands, got 1"),
        (lambda: Nested(Posterior(2, (0, 1)), [Mixture([1])] * 2, [(0,), (1,)], [0.0]), "1 log Z"),
        (lambda: Nested(Mixture([1.0]), [Posterior(2, (0, 1))], [(0,)]), "operand"),
    ],
)
def test_what_is_no_formula_is_refused_with_what_was_got(make, message):
    with pytest.raises(ValueError, match=message):
        make()
