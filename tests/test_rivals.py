"""Other people's samplers on what is known in closed form, and the benchmark that runs them."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from bench.parts import checkerboard, logic, mixtures, runs
from bench.parts.closed import Boxes, Closed, Corners, log_probs
from bench.rivals.averaged import averaged, composable
from bench.rivals.complift import complift, lifts
from bench.rivals.dombi import And, Atom, Not, Or, dombi
from bench.rivals.experts import experts
from bench.rivals.fkc import fkc
from bench.rivals.joint import joint
from bench.rivals.superdiff import superdiff_and, superdiff_or
from bench.rivals.walk import Walk, evaluations
from oracles import GaussianMixture

import sculpt
from sculpt.diffusion.clock import noise_levels, noise_range, spread
from sculpt.formula import Nested, PowerMean, Product

N = 4000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(name, mean, c):
    return Closed(name, GaussianMixture([mean], torch.tensor(c, dtype=torch.float64)), len(mean))


def pair(c=(0.5, 0.5)):
    return [gaussian("p", [1.0, 0.0], c[0]), gaussian("q", [-1.0, 1.0], c[1])]


def moments(levels, total, mean, variance, start=1.0):
    """Of the chain z' = z + κ (Σ a D − ... ) for scores that add up to (mean − total z) / variance(v): a linear recursion."""
    m, V = torch.zeros_like(mean), float(levels[0] ** 2) * start
    for s, s_next in zip(levels, [*levels[1:], torch.zeros(())], strict=True):
        delta = float(s**2 - s_next**2)
        rate = delta / (variance + float(s**2))
        m, V = m + rate * (mean - total * m), (1 - total * rate) ** 2 * V + delta * float((s_next / s) ** 2)
    return m, V


def assert_gaussian(x, mean, variance):
    """Within four standard errors."""
    torch.testing.assert_close(x.mean(0), mean, atol=4 * math.sqrt(variance / len(x)), rtol=0)
    torch.testing.assert_close(x.var(0), torch.full_like(mean, variance), atol=4 * variance * math.sqrt(2 / len(x)), rtol=0)


def test_one_prompt_is_its_model_and_every_evaluation_is_counted():
    (p, _), steps = pair(), 100
    with evaluations([p, p]) as told:
        x = joint([p], N, steps=steps, generator=seeded())
    assert told.count == N * steps
    m, variance = moments(noise_levels([p], steps), 1, torch.tensor([1.0, 0.0]).double(), 0.5)
    assert_gaussian(x, m, variance)
    assert variance == pytest.approx(0.5, abs=0.03)


def test_averaged_scores_of_equal_gaussians_make_the_one_in_the_middle():
    models, steps = pair(), 100
    with evaluations(models) as told:
        x = averaged(models, N, steps=steps, generator=seeded())
    assert told.count == 2 * N * steps
    assert_gaussian(x, *moments(noise_levels(models, steps), 1, torch.tensor([0.0, 0.5]).double(), 0.5))


def test_differences_of_scores_make_what_they_promise_of_equal_gaussians():
    """AND: the means add up. NOT: the mean is on the other side."""
    base = gaussian("base", [0.0, 0.0], 0.5)
    for weights, mean in (([1.0, 1.0], [0.0, 1.0]), ([1.0, -0.5], [1.5, -0.5])):
        x = composable([base, *pair()], N, steps=60, generator=seeded(), weights=weights)
        assert_gaussian(x, *moments(noise_levels([base], 60), 1, torch.tensor(mean).double(), 0.5))


def test_added_scores_of_two_gaussians_have_a_third_of_their_variance_and_corrected_ones_half():
    models, steps = pair(), 200
    x = experts(models, N, steps=steps, generator=seeded())
    m, variance = moments(noise_levels(models, steps), 2, torch.tensor([0.0, 1.0]).double(), 0.5)
    assert_gaussian(x, m, variance)
    assert variance == pytest.approx(0.5 / 3, abs=0.02)  # and not 0.5 / 2
    y = fkc(models, N, steps=steps, generator=seeded(), powers=[1, 1])
    assert float(y.var(0).mean()) == pytest.approx(0.5 / 2, abs=0.03)
    torch.testing.assert_close(y.mean(0), torch.tensor([0.0, 0.5]).double(), atol=0.06, rtol=0)


def test_corrected_products_of_unequal_gaussians_and_powers_are_those_products():
    models, steps = pair((0.3, 0.8)), 200
    for powers in ([1.0, 1.0], [2.0, 0.0], [1.5, -0.5]):
        precision = powers[0] / 0.3 + powers[1] / 0.8
        mean = (powers[0] / 0.3 * torch.tensor([1.0, 0.0]) + powers[1] / 0.8 * torch.tensor([-1.0, 1.0])).double() / precision
        x = fkc(models, N, steps=steps, generator=seeded(), powers=powers)
        # Selection leaves relatives: a few times the error of independent draws, and the step's own.
        torch.testing.assert_close(x.mean(0), mean, atol=0.08, rtol=0)
        assert float(x.var(0).mean()) == pytest.approx(1 / precision, rel=0.12)


def test_equal_densities_are_kept_equal():
    """Of equal Gaussians log-ratios are linear in z. They stay what they are in the noise of the start, hardly anything: |Δμ| / s."""
    models = [*pair(), gaussian("r", [0.0, -1.5], 0.5)]
    for few in (models[:2], models):
        x = superdiff_and(few, 1000, steps=200, generator=seeded())
        ell = log_probs(few, x, 0.0)
        for i in range(1, len(few)):
            apart = float((few[i].density.means - few[0].density.means).norm()) / 80
            assert float((ell[:, i] - ell[:, 0]).square().mean().sqrt()) == pytest.approx(apart, rel=0.12)
    # Two of them leave a line free, three only a point.
    assert float(superdiff_and(models[:2], 1000, steps=200, generator=seeded()).var(0).sum()) == pytest.approx(0.5, rel=0.2)
    assert float(x.var(0).sum()) < 0.01


def test_tracked_densities_choose_the_parts_of_a_mixture_equally():
    models = [gaussian("p", [3.0, 0.0], 0.2), gaussian("q", [-3.0, 0.0], 0.5)]
    x = superdiff_or(models, N, steps=200, generator=seeded())
    right = x[:, 0] > 0
    assert float(right.double().mean()) == pytest.approx(0.5, abs=0.04)
    assert float(x[right].var(0).mean()) == pytest.approx(0.2, rel=0.15)
    assert float(x[~right].var(0).mean()) == pytest.approx(0.5, rel=0.15)


def test_the_estimator_tracks_log_densities():
    """Differences of tracked log-densities come to the exact ones, and the error halves with the steps."""
    models, errors = pair((0.3, 0.8)), []
    for steps in (100, 400):
        walk = Walk(models, 1000, steps, seeded())
        for S in walk:
            if walk.tau > 0:
                exact, tracked = log_probs(models, walk.z, walk.v), walk.ell
                error = (tracked[:, 0] - tracked[:, 1]) - (exact[:, 0] - exact[:, 1])
            walk.step(S.new_tensor([0.5, 0.5]))
        errors.append(float(error.square().mean().sqrt()))
    assert errors[1] < 0.6 * errors[0] and errors[1] < 0.2


def test_the_logic_of_power_means_is_ours_but_for_a_constant():
    ell = 3 * torch.randn(100, 3, dtype=torch.float64, generator=seeded())
    atoms = tuple(map(Atom, range(3)))
    for strength in (0.5, 1.0, 4.0):
        for make, exponent in ((Or, strength), (And, -strength)):
            value, a = make(atoms, strength).at(ell)
            ours = PowerMean(exponent, [1, 1, 1])
            torch.testing.assert_close(value, ours.value(ell) + math.log(3) / exponent)
            torch.testing.assert_close(a, ours.gradient(ell))
    value, a = Not(Atom(1), Atom(0)).at(ell)
    torch.testing.assert_close(value, Product([2, -1]).value(ell[:, :2]))
    torch.testing.assert_close(a[:, :2], Product([2, -1]).gradient(ell[:, :2]))
    value, a = And((Or((Atom(0), Atom(1))), Not(Atom(2), Atom(0), 0.5))).at(ell)
    parts = [PowerMean(1, [1, 1]), Product([1.5, -0.5])]
    ours = Nested(PowerMean(-1, [1, 1]), parts, [(0, 1), (0, 2)], [-math.log(2), 0.0])
    torch.testing.assert_close(value, ours.value(ell) - math.log(2))
    torch.testing.assert_close(a, ours.gradient(ell))


def test_one_particle_of_ours_takes_the_same_path_in_the_limit_of_small_steps():
    models, off = pair((0.3, 0.8)), []
    both = sculpt.power_mean(models, -1)
    for steps in (64, 512):
        theirs = dombi(models, 200, steps=steps, generator=seeded(), expression=And((Atom(0), Atom(1))))
        ours = both.sample(200, sculpt.Tracked(particles=1), steps=steps, generator=seeded(), progress=False).x
        off.append(float((theirs - ours).square().mean().sqrt()))
    assert off[1] < 0.35 * off[0] and off[1] < 0.05


def test_lifts_are_those_of_denoising_errors_in_closed_form():
    base, p = gaussian("base", [0.0, 0.0], 1.0), gaussian("p", [1.0, 0.0], 0.3)
    x, looks = torch.tensor([[1.0, 0.2], [-0.5, 0.5]], dtype=torch.float64), 60
    found = torch.stack([lifts([base, p], x, looks, seeded(seed))[:, 0] for seed in range(25)])
    v = spread((torch.arange(looks, dtype=torch.float64) + 0.5) / looks, *noise_range([base, p])) ** 2

    def error(mean, c):
        far = ((x - torch.tensor(mean)) ** 2).sum(-1, keepdim=True)
        return ((v * far + 2 * c**2) / (c + v) ** 2).mean(-1)

    wanted = error([0.0, 0.0], 1.0) - error([1.0, 0.0], 0.3)
    assert (found.mean(0) - wanted).abs().lt(4 * found.std(0) / math.sqrt(25)).all()
    assert wanted[0] > 0 > wanted[1]


def test_what_is_accepted_is_where_it_was_asked():
    base, p, q = gaussian("base", [0.0, 0.0], 2.0), gaussian("p", [2.0, 0.0], 0.4), gaussian("q", [0.0, 2.0], 0.4)
    with evaluations([base, p, q]) as told:
        x = complift([base, p, q], 400, steps=20, generator=seeded(), weights=[1.0, -1.0], looks=16)
    assert told.count == 400 * (20 + 16) * 3 and 0 < len(x) < 400
    assert (log_probs([p], x, 0.0)[:, 0] > log_probs([q], x, 0.0)[:, 0]).double().mean() > 0.95


def test_closed_forms_denoise_by_tweedies_formula():
    boxes = Boxes([(-1, 0, -1, 0), (0, 1, 0.5, 1)], [3, 1])
    for density in (Corners(2, 0.5, [1]), boxes):
        z = torch.randn(50, 2, dtype=torch.float64, generator=seeded()) * 2
        for s in (0.1, 1.0, 20.0):
            z.requires_grad_(True)
            (score,) = torch.autograd.grad(density.log_prob(z, s**2).sum(), z)
            z = z.detach()
            torch.testing.assert_close(density.denoise(z, torch.tensor(s)), z + s**2 * score)
    grid = torch.cartesian_prod(*[torch.linspace(-3, 3, 601, dtype=torch.float64)] * 2)
    for density in (Corners(2, 0.25, [0]), boxes):
        assert float(density.log_prob(grid, 0.04).exp().sum()) * 0.01**2 == pytest.approx(1, abs=0.01)


# The toys


def test_logic_in_one_piece_is_the_nested_formula():
    ell = 2 * torch.randn(20, 4, dtype=torch.float64, generator=seeded())
    clauses = ((1, 2, 3), (-1, -2), (-3,))
    for strength in (1.0, 5.0):
        ours = logic.Logic(3, clauses, strength)
        value, a = logic.expression(clauses, strength).at(ell)
        torch.testing.assert_close(ours.value(ell), value)
        torch.testing.assert_close(ours.gradient(ell), a)
        H = torch.stack([torch.autograd.functional.hessian(lambda e, f=ours: f.value(e), row) for row in ell])
        torch.testing.assert_close(ours.hessian(ell), H, atol=1e-8, rtol=1e-6)


def test_clauses_are_satisfied_where_their_names_say():
    for d in (2, 5):
        corners = torch.cartesian_prod(*[torch.tensor([0, 1])] * d).sum(1)
        for make, holds in (
            (logic.majority, corners >= d - d // 2),
            (logic.xor, corners % 2 == 1),
            (logic.one_hot, corners == 1),
        ):
            assert torch.equal(logic.Truth(d, make(d)).satisfying, holds), (make, d)


def test_the_share_that_satisfies_xor_of_two_is_the_targets_own():
    """Integrated on a grid: the pool says the same, and a stronger NOT excludes more."""
    truth = logic.Truth(2, logic.xor(2))
    axis = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    p = truth.formula.value(log_probs(truth.models, grid, 0.0)).exp()
    near = ((grid.abs() - 2).abs() <= logic.NEAR).all(1)
    right = truth.satisfying[truth.number(grid)]
    exact = float(p[near & right].sum() / p[near].sum())
    drawn = truth.measure(truth.draw(20_000, 0, seeded()))["satisfied"]
    assert drawn == pytest.approx(exact, abs=0.01) and exact < 0.96
    stronger = logic.Truth(2, logic.xor(2), gamma=logic.STRONGER)
    assert stronger.measure(stronger.draw(20_000, 0, seeded()))["satisfied"] > 0.99
    positive = torch.stack([p[(grid > 0).sum(1) == k].sum() for k in range(3)]) / p.sum()
    torch.testing.assert_close(truth.masses, positive, atol=0.01, rtol=0)


def test_their_logic_gives_the_number_that_is_reported_for_xor_of_two():
    """.97 of the samples near a corner satisfy it, evenly: as reported, and more than exact draws of the formula."""
    truth, said = logic.Truth(2, logic.xor(2)), logic.expression(logic.xor(2))
    x = dombi(truth.models, 4096, steps=128, generator=seeded(), expression=said)
    measured = truth.measure(x)
    assert measured["satisfied"] == pytest.approx(0.97, abs=0.012)  # four standard errors
    assert measured["even"] == pytest.approx(1, abs=0.005)


def test_the_square_of_a_mixture_is_the_mixture_of_its_products():
    p = mixtures.mixture()
    x = p.draw(50, seeded())
    constant = mixtures.square(p).log_prob(x) - 2 * p.log_prob(x)
    torch.testing.assert_close(constant, constant[:1].expand(50))


def test_the_boards_experts_multiply_to_the_board_that_is_wanted():
    made = checkerboard.part(quick=True).cases[0]
    x = checkerboard.joint(checkerboard.WANTED).draw(200, seeded())
    ell = log_probs(made.models, x, 1e-12)
    constant = ell @ torch.tensor(checkerboard.POWERS).double() - checkerboard.joint(checkerboard.WANTED).log_prob(x, 1e-12)
    torch.testing.assert_close(constant, constant[:1].expand(200), atol=1e-6, rtol=0)
    shift = torch.tensor([0.3, -0.4], dtype=torch.float64)
    w1, w2 = checkerboard.distances(x, (x + shift)[torch.randperm(200, generator=seeded())])
    assert w1 <= 0.5 + 1e-9 and w2 == pytest.approx(0.5)  # of a shift W2 is its length


# The page


@pytest.fixture
def page():
    path = Path(__file__).parent / "bench" / "page.py"
    spec = importlib.util.spec_from_file_location("bench_page", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def counted_part(drawn):
    models = pair()

    def method(name, width, kind="rival"):
        def draw(n, steps, generator):
            drawn.append(name)
            return averaged(models[:width], n, steps=steps, generator=generator)

        return runs.Method(name, draw, width, kind=kind)

    methods = [method("ours", 2, "ours"), method("one", 1)]
    case = runs.Case("a case", methods, lambda x: {"mean": float(x.mean())}, {"mean": 1}, 10, 8, models)
    return runs.Part("A part", "About it.", ["Reported by nobody."], [case], 3)


def test_a_killed_benchmark_goes_on_with_equal_evaluations(tmp_path, page):
    drawn, silent = [], lambda line: None
    part = counted_part(drawn)
    runs.run("toy", part, runs.Records(tmp_path), silent)
    assert drawn == ["ours", "one"] * 3
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join([*lines[:4], lines[4][:20]]))  # the fifth was being written
    runs.run("toy", part, runs.Records(tmp_path), silent)
    assert drawn == ["ours", "one"] * 3 + ["ours", "one"]
    records = runs.Records(tmp_path)
    assert len(records.runs) == 6
    assert {told["evaluations"] for told in records.runs.values()} == {10 * 8 * 2}
    assert sorted(told["steps"] for told in records.runs.values()) == [8, 8, 8, 16, 16, 16]
    page.write({"toy": part}, records)
    said = (tmp_path / "page.md").read_text()
    assert "| one |" in said and "Reported by nobody." in said and "| **ours** |" in said and " ± " in said
    assert "<b>ours</b>" in (tmp_path / "page.html").read_text()


def test_the_page_tells_means_with_their_standard_errors(page):
    assert page.told([1.0, 2.0, 3.0]) == "2.00 ± 0.58" and page.told([0.5]) == "0.500"
    assert page.ahead([3.0, 5.0], [1.0, 3.0], 1) == pytest.approx(2 / math.sqrt(2))
    assert page.ahead([3.0, 5.0], [1.0, 3.0], -1) == pytest.approx(-2 / math.sqrt(2))
    assert page.ahead([1.0, 1.0], [1.0, 1.0], 1) == 0 and page.ahead([1.0, 1.0], [2.0, 2.0], 1) == -math.inf
    assert math.isnan(page.ahead([1.0], [2.0], 1))


def test_particles_that_go_alone_are_compared_with_those_that_do(tmp_path, page):
    def method(name, kind="rival", **how):
        return runs.Method(name, None, kind=kind, **how)

    methods = [
        method("ours, many", "ours", alone=False),
        method("ours, 1", "ours"),
        method("single"),
        method("many", alone=False),
    ]
    methods += [method("elsewhere", same=False), method("exact", "exact")]
    numbers = {"ours, many": (9, 10), "ours, 1": (4, 5), "single": (7, 8), "many": (1, 2), "elsewhere": (9, 9), "exact": (9, 9)}
    records = runs.Records(tmp_path)
    for better in (1, -1):
        case = runs.Case(f"case {better}", methods, None, {"number": better}, 1, 2)
        part = runs.Part("A part", "", [], [case], 2)
        for made, seed in itertools.product(methods, range(2)):
            told = {"measures": {"number": numbers[made.name][seed]}, "evaluations": 2, "seconds": 0, "n": 1, "commit": "c"}
            records.add({"key": runs.key("toy", case, made, seed), **told})
        found = page.everything({"toy": part}, records)
        compared = {rival.name: [m.name for m in found["toy"][0].ahead(rival)] for rival in methods}
        assert compared["single"] == ["ours, many", "ours, 1"] and compared["many"] == ["ours, many"]
        assert compared["elsewhere"] == (["ours, many", "ours, 1"] if better > 0 else []) and not compared["exact"]
        head, *lost = page.summary(found)
        assert any("ours, 1 behind single" in line for line in lost) == (better > 0)
        assert f"behind in {len(lost)}" in head


@pytest.mark.slow
def test_a_tiny_version_of_everything_makes_the_page(tmp_path, page):
    page.main(["--quick", "--out", str(tmp_path)])
    said = (tmp_path / "page.md").read_text()
    for make in page.PARTS.values():
        part = make(True)
        assert f"## {part.title}" in said
        for case in part.cases:
            assert f"**{case.name}**" in said and all(method.name in said for method in case.methods)
    before = (tmp_path / "runs.jsonl").read_text()
    page.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "runs.jsonl").read_text() == before
    assert (tmp_path / "page.html").read_text().count("<img") > 20
