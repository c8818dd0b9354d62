"""Annealed MCMC: invariance and convergence by the Dvoretzky-Kiefer-Wolfowitz bound, closed forms, and exact log-densities."""

import math

import pytest
import torch
from diffusers_models import exact_model, three_rings
from oracles import GaussianMixture, Grid
from torch import nn

import sculpt
from sculpt import HMC, MALA, ULA, Tracked
from sculpt.diffusion.correctors import Target
from sculpt.formula import Nested, Posterior, PowerMean, Product

P = GaussianMixture([[-1.0], [1.2]], [[[0.2]], [[0.4]]], [0.4, 0.6])
Q = GaussianMixture([[-0.5], [2.0]], [[[0.3]], [[0.3]]])
S = torch.tensor(0.8, dtype=torch.float64)
ALL = 10**6
"""All particles go through a network at once."""

FORMULAS = [
    Product([1.0, 1.0]),
    Product([1.5, 0.0]),
    Product([1.0, -0.5]),
    Posterior(2, (0, 1)),
    Posterior(2, (0, 0)),
    PowerMean(-2.0, [1, 1]),
    Nested(Posterior(2, (0, 1)), [Product([1.0, 1.0]), Posterior(1, (0,))], [(0, 1), (1,)], [-1.0, 0.0]),
]


def name(corrector):
    return type(corrector).__name__


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def energy_model(mixture, name="E"):
    """The exact energy: the line integral is not needed."""
    return sculpt.EnergyModel(lambda z, s: -mixture.log_prob(z, s**2), (mixture.d,), name=name, s_min=0.01)


def score_model(mixture, name="D"):
    """The same model with its energy hidden."""
    model = energy_model(mixture, name)
    model.has_energy = False
    return model


def log_densities(mixtures, z, s=S):
    return torch.stack([mixture.log_prob(z, s**2) for mixture in mixtures], -1)


class Line:
    """exp Φ at a noise level on a fine 1-D grid: its distribution function, and exact draws."""

    def __init__(self, formula, s=S):
        self.x = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
        p = torch.softmax(formula.value(log_densities((P, Q), self.x[:, None], s)), 0)
        self.cdf = p.cumsum(0) - p / 2

    def draw(self, n, seed=0):
        u = torch.rand(n, dtype=torch.float64, generator=generator(seed))
        return self.interpolate(u, self.cdf, self.x)[:, None]

    def distance(self, z):
        """Kolmogorov-Smirnov."""
        F = self.interpolate(z[:, 0].sort().values, self.x, self.cdf)
        steps = torch.arange(len(z) + 1, dtype=torch.float64) / len(z)
        return float(torch.maximum((F - steps[1:]).abs(), (F - steps[:-1]).abs()).max())

    @staticmethod
    def interpolate(at, x, y):
        i = torch.searchsorted(x, at).clamp(1, len(x) - 1)
        return torch.lerp(y[i - 1], y[i], (at - x[i - 1]) / (x[i] - x[i - 1]))


def bound(n, delta=1e-3):
    """Dvoretzky-Kiefer-Wolfowitz: an exact sampler stays within, but for a share delta of all runs."""
    return math.sqrt(math.log(2 / delta) / (2 * n))


@pytest.mark.parametrize("formula", FORMULAS, ids=repr)
@pytest.mark.parametrize("corrector", [MALA(12, 0.8), HMC(6, 0.6, leapfrog=3, damping=0.9)], ids=name)
def test_mala_and_hmc_leave_the_exact_target_invariant(corrector, formula):
    line, models = Line(formula), [energy_model(P), energy_model(Q)]
    z = line.draw(10_000)
    z, *_ = corrector(z, log_densities((P, Q), z), S, formula, models, ALL, generator(1))
    assert line.distance(z) < bound(len(z))
    assert 0.3 < corrector.acceptance[-1] < 0.98  # it did both: move and refuse to


@pytest.mark.parametrize("hide", [False, True], ids=["energies", "line integrals"])
@pytest.mark.parametrize("corrector", [MALA(60, 0.5), HMC(16, 0.3, leapfrog=4, damping=0.3)], ids=name)
def test_mala_and_hmc_converge_from_elsewhere(corrector, hide):
    formula = Product([1.0, 1.0])
    line, models = Line(formula), [(score_model if hide else energy_model)(mixture) for mixture in (P, Q)]
    z = 3 + 0.1 * torch.randn(4_000, 1, dtype=torch.float64, generator=generator())
    z, *_ = corrector(z, log_densities((P, Q), z), S, formula, models, ALL, generator(1))
    assert line.distance(z) < bound(len(z))


def test_langevin_without_metropolis_is_biased_as_its_closed_form_says():
    c = 0.3 + float(S) ** 2
    gaussian = GaussianMixture([[0.0]], 0.3)
    z = math.sqrt(c) * torch.randn(50_000, 1, dtype=torch.float64, generator=generator())
    step = 0.5
    z, *_ = ULA(30, step)(z, log_densities([gaussian], z), S, Product([1.0]), [energy_model(gaussian)], ALL, generator(1))
    epsilon = step * float(S) ** 2
    expected = c / (1 - epsilon / (2 * c))
    assert expected / c > 1.1
    assert float(z.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / len(z)))


def test_langevin_without_metropolis_does_not_keep_the_target_that_mala_keeps():
    formula = Product([1.0, 1.0])
    line, models = Line(formula), [energy_model(P), energy_model(Q)]
    z = line.draw(20_000)
    z, *_ = ULA(20, 0.8)(z, log_densities((P, Q), z), S, formula, models, ALL, generator(1))
    assert line.distance(z) > 1.5 * bound(len(z))


def test_mala_is_hamiltonian_with_one_leapfrog_step_and_no_damping():
    formula, models = Product([1.0, -0.5]), [score_model(P), energy_model(Q)]
    z = Line(formula).draw(1_000)
    ell = log_densities((P, Q), z)
    one, two = (c(z, ell, S, formula, models, ALL, generator(1)) for c in (MALA(5, 0.4), HMC(5, 0.4, leapfrog=1, damping=0.0)))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_rejected_hamiltonian_particle_goes_back_the_way_it_came():
    """With all of the momentum kept: moved, rejected, moved is at the start again. Reversibility and the flip in one."""
    formula, models = Posterior(2, (0, 0)), [energy_model(P), energy_model(Q)]
    z = Line(formula).draw(5_000)
    target = Target(formula, models, S, 3, ALL)
    start = target.at(z, log_densities((P, Q), z))
    states = list(HMC(3, 1.2, leapfrog=3, damping=1 - 1e-15).moves(start, target, generator(2)))
    first, second, third = (moved for _, moved in states)
    back, on = first & ~second & third, first & second
    assert back.sum() > 100
    torch.testing.assert_close(states[2][0].z[back], z[back], rtol=0, atol=1e-5)
    assert ((states[1][0].z - states[0][0].z)[on].abs() > 1e-3).double().mean() > 0.9


def test_every_particle_has_a_decision_of_its_own():
    formula, models = Product([1.0, 1.0]), [energy_model(P), energy_model(Q)]
    z = Line(formula).draw(2_000)
    far = z.clone()
    far[1_000:] += 5
    for corrector in (MALA(1, 1.5), HMC(1, 1.0)):
        one, two = (corrector(x, log_densities((P, Q), x), S, formula, models, ALL, generator(3))[0] for x in (z, far))
        torch.testing.assert_close(one[:1_000], two[:1_000], rtol=0, atol=0)
        stayed = (one == z).all(1).double().mean()
        assert 0.02 < stayed < 0.98
        assert corrector.acceptance[0] == pytest.approx(1 - float(stayed))


@torch.no_grad()
@pytest.mark.parametrize(("nodes", "rms"), [(2, 1e-1), (3, 6e-3), (4, 6e-4)])
def test_line_integrals_of_the_score_agree_with_exact_energies(nodes, rms):
    """Moves of step 0.3 at any noise level of two 2-D mixtures, in nats; the worst levels are those of the modes' own width."""
    rings, worst = three_rings()[:2], 0.0
    for s in torch.tensor([0.02, 0.1, 0.3, 1.0, 5.0], dtype=torch.float64):
        z = rings[0].draw(2_000, generator(), float(s) ** 2)
        target = Target(Product([1.0, 1.0]), [score_model(ring) for ring in rings], s, nodes, ALL)
        point = target.at(z, log_densities(rings, z, s))
        xi = torch.randn(z.shape, dtype=torch.float64, generator=generator(1))
        new = target.move(point, z + 0.3 * s**2 * target.score(point) + math.sqrt(0.6) * s * xi)
        worst = max(worst, float((new.ell - log_densities(rings, new.z, s)).square().mean().sqrt()))
        returned = target.move(new, z)
        torch.testing.assert_close(returned.ell, point.ell, rtol=0, atol=1e-9)  # there and back again
    assert rms / 30 < worst < rms  # no better than it says, either


@pytest.mark.parametrize("corrector", [ULA(10, 0.3), MALA(10, 0.3), HMC(5, 0.3)], ids=name)
def test_log_densities_stay_those_of_the_particles_up_to_the_error_they_came_with(corrector):
    formula, models = Posterior(2, (0, 1)), [energy_model(P), score_model(Q)]
    z = Line(formula).draw(2_000)
    error = torch.randn(2_000, 2, dtype=torch.float64, generator=generator(5))
    z_new, ell, _ = corrector(z, log_densities((P, Q), z) + error, S, formula, models, ALL, generator(1))
    drift = ell - log_densities((P, Q), z_new) - error
    assert (z_new - z).abs().mean() > 0.3
    assert drift[:, 0].abs().max() < 1e-10  # exact energies
    assert drift[:, 1].square().mean().sqrt() < 0.02  # ten line integrals


def test_chunks_and_repetition_change_nothing():
    formula, models = Product([1.0, -0.5]), [energy_model(P), score_model(Q)]
    z = Line(formula).draw(500)
    ell = log_densities((P, Q), z)
    whole, again, parts = (MALA(3)(z, ell, S, formula, models, size, generator(1)) for size in (ALL, ALL, 64))
    torch.testing.assert_close(whole, again, rtol=0, atol=0)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)


@pytest.mark.parametrize("corrector", [ULA(3), MALA(3), HMC(3)], ids=name)
def test_a_particle_whose_score_is_not_a_number_stays_where_it_is(corrector):
    broken = sculpt.EnergyModel(lambda z, s: torch.where(z[:, 0] > 1, float("nan"), -P.log_prob(z, s**2)), (1,), name="broken")
    z = Line(Product([1.0, 0.0])).draw(2_000)
    z_new, ell, _ = corrector(z, log_densities([P], z), S, Product([1.0]), [broken], ALL, generator())
    lost = z[:, 0] > 1
    torch.testing.assert_close(z_new[lost], z[lost], rtol=0, atol=0)
    assert z_new.isfinite().all()
    assert ell.isfinite().all()
    assert (z_new[~lost] <= 1).all()


def test_a_corrector_refuses_settings_that_make_no_sense():
    for settings in ({"steps": 0}, {"step": 0.0}, {"step": float("inf")}, {"nodes": 5}):
        with pytest.raises(ValueError, match="got"):
            MALA(**settings)
    for settings in ({"leapfrog": 0}, {"damping": 1.0}):
        with pytest.raises(ValueError, match="got"):
            HMC(**settings)


# ------------------------------------------------------------------------------------------------------ with particle weights

GRID = Grid(4.0)
RINGS = three_rings()


def networks(m):
    return [exact_model(ring, name=name) for ring, name in zip(RINGS[:m], "pqr", strict=False)]


@pytest.mark.slow
@pytest.mark.parametrize("powers", [(1.0, 1.0), (1.5,), (1.0, -0.5)], ids=str)
def test_correctors_bring_products_nearer_to_the_target_than_weights_alone(powers):
    """64 steps, 10,000 particles, three runs, total variation over an exact sampler's own: 1.5 and 1.3 without, 1.0 to 1.2 with.

    p·q^-1/2 lives where q's tail is thin: what is left there, 1.9, is the tracked densities' own error.
    """
    m, n = len(powers), 10_000
    composition = sculpt.product(networks(m), powers)
    masses, _ = GRID.exact(composition.formula, RINGS[:m])
    floor = GRID.floor(masses, n)
    errors = []
    for corrector in (None, MALA(), HMC()):
        road = Tracked(corrector=corrector)
        runs = [composition.sample(n, road, steps=64, generator=generator(seed), progress=False).x for seed in (1, 2, 3)]
        errors.append(sum(GRID.total_variation(x, masses) for x in runs) / len(runs) / floor)
    assert max(errors[1:]) < errors[0] * (1.1 if min(powers) < 0 else 0.95)


def test_the_diagnostics_name_the_corrector_its_acceptance_and_its_approximation():
    corrector = MALA(1)
    composition = sculpt.product([energy_model(RINGS[0], "E"), *networks(2)[1:]], [1, 1])
    for steps in (8, 6):
        road = Tracked(particles=200, corrector=corrector)
        samples = composition.sample(10, road, steps=steps, generator=generator(), progress=False)
        assert len(corrector.acceptance) == steps  # of the last run only
    (note,) = samples.diagnostics.notes
    assert "MALA with 1 × step" in note
    assert "log-densities of q moved by line integrals of 3 nodes, an approximation" in note
    road = Tracked(particles=200, corrector=(ula := ULA(1)))
    composition.sample(10, road, steps=4, generator=generator(), progress=False)
    assert "unadjusted" in ula.note


@pytest.mark.parametrize("powers", [(1.0, 1.0), (1.0, -0.5), (1.5, 0.0)], ids=str)
def test_energy_models_multiply_negate_and_temper_and_compose_with_networks(powers):
    p, q = networks(2)
    n, energies = 2_000, sculpt.product([energy_model(RINGS[0], "E"), energy_model(RINGS[1], "F")], powers)
    mixed = sculpt.product([p, energy_model(RINGS[1], "F")], powers)
    masses, log_z = GRID.exact(energies.formula, RINGS[:2])
    floor = GRID.floor(masses, n)
    for composition in (energies, mixed):
        road = Tracked(particles=4 * n, corrector=MALA(1, 0.3))
        samples = composition.sample(n, road, steps=48, generator=generator(2), progress=False)
        assert GRID.total_variation(samples.x, masses) < 1.6 * floor
        assert samples.log_z == pytest.approx(log_z, abs=0.3)


def test_an_energy_network_in_single_precision_is_a_base_model_too():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(2))
            self.layer = nn.Linear(2, 2)
            nn.init.eye_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)

        def forward(self, z, s):
            return (self.layer(z) - self.mean).square().sum(-1) / 2 / (1 + s**2)

    model = sculpt.EnergyModel(Energy(), (2,))
    road = Tracked(corrector=HMC())
    samples = sculpt.product([model], [2.0]).sample(4_000, road, steps=32, generator=generator(), progress=False)
    # N(0, 1) squared is N(0, 1/2); 32 levels and the spread of 4,000 draws leave a few percent
    assert samples.x.var(0).tolist() == pytest.approx([0.5, 0.5], abs=0.05)
