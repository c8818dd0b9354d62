"""The steps of the diffusion chains, one by one: against diffusers' solver, closed forms, and the limit of small steps."""

import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers_models import exact_model, three_rings, tight_rings
from oracles import ExactGuide, GaussianMixture

import sculpt
from sculpt.chain import Selection, Settings, run
from sculpt.diffusion import control, tracked
from sculpt.diffusion.chains import GuidedChain
from sculpt.diffusion.control import Control
from sculpt.diffusion.kernels import analytic_variance, kernel_variance
from sculpt.diffusion.tracked import TrackedChain
from sculpt.formula import Posterior, PowerMean, Product

RINGS = three_rings()
P, Q, _ = (exact_model(mixture, name=name) for mixture, name in zip(RINGS, "pqr", strict=True))
GUIDE = ExactGuide(RINGS[:2], [P.key, Q.key])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# The base chain ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_step_of_the_base_chain_is_the_second_order_stochastic_solver_of_diffusers_from_the_same_noise():
    steps, n = 9, 50
    chain, g, twin = P.chain(Settings(steps=steps)), generator(1), generator(1)
    solver = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint")
    solver.set_timesteps(steps)
    solver.sigmas = torch.cat([chain.levels, torch.zeros(1)])
    alpha = (1 + chain.levels**2).rsqrt()
    state, weight = chain.start(n, g)
    z, outputs = chain.levels[0] * torch.randn(n, 2, generator=twin).double(), []
    for k, s in enumerate(chain.levels):
        torch.testing.assert_close(state.z.double(), z, rtol=1e-4, atol=1e-5)
        outputs.append(RINGS[0].denoise(z, s))
        if k == steps - 1:
            break
        assert weight is None and not chain.done(state).any()
        state, weight = chain.step(state, torch.zeros(n), g)
        noise, solver._step_index = torch.randn(n, 2, generator=twin).double(), k
        if k == 0:
            x = solver.dpm_solver_first_order_update(outputs[-1], sample=alpha[k] * z, noise=noise)
        else:
            x = solver.multistep_dpm_solver_second_order_update(outputs, sample=alpha[k] * z, noise=noise)
        z = x / alpha[k + 1]
    assert chain.done(state).all()
    torch.testing.assert_close(chain.end(state, torch.zeros(n), g)[0].double(), outputs[-1], rtol=1e-4, atol=1e-5)


# The guided chain -------------------------------------------------------------------------------------------------------------------


def guided_chain(steps, corrected=False, **options):
    return GuidedChain((P & Q).guided(sculpt.Guided(GUIDE, **options)), Settings(steps=steps), corrected)


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 1.6])
def test_the_weights_of_a_guided_path_are_those_of_the_two_gaussian_kernels(strength):
    steps, n, g = 7, 40, generator(1)
    chain = guided_chain(steps, strength=strength)
    state, log_w = chain.start(n, g)
    torch.testing.assert_close(log_w, GUIDE.log_h(state.z, chain.levels[0].expand(n), labels=(0, 1), odds=None))
    for k, (s, s_next) in enumerate(itertools.pairwise(chain.levels)):
        before, (state, increment) = state, chain.step(state, log_w, g)
        D = before.D.double()
        if k > 0:
            h, h_before = (s / s_next).log(), (chain.levels[k - 1] / s).log()
            D = D + h / (2 * h_before) * (D - before.before.double())
        kappa = 1 - (s_next / s) ** 2
        z = before.z.double()
        own, guided = (z + kappa * (end - z) for end in (D[:, 0], D.sum(1)))
        kernels = [
            torch.distributions.Normal(mean, s_next * kappa.sqrt()).log_prob(state.z.double()).sum(1) for mean in (own, guided)
        ]
        h_ratio = GUIDE.log_h(state.z, s_next.expand(n), labels=(0, 1), odds=None) - before.log_h
        torch.testing.assert_close(increment, h_ratio + kernels[0] - kernels[1], rtol=1e-3, atol=1e-3)
        assert increment.abs().max() > 0.01


@torch.no_grad()
def test_a_corrected_path_ends_with_its_anchors_own_denoising_and_the_terminal_head_has_the_last_word():
    for corrected in (False, True):
        chain, g = guided_chain(4, corrected), generator(1)
        state, log_w = chain.start(50, g)
        state, _ = chain.step(state, log_w, g)  # far from the end, where guidance still adds a good deal
        x, increment = chain.end(state, log_w, g)
        own = P.denoise(state.z, chain.levels[1])
        if corrected:
            torch.testing.assert_close(x, own)
            torch.testing.assert_close(increment, GUIDE.log_h_terminal(own, labels=(0, 1)) - state.log_h)
        else:
            assert increment is None and (x - own).abs().mean() > 0.05
            torch.testing.assert_close(x, (P & Q).guided(GUIDE).denoise(state.z, chain.levels[1]))


def test_what_a_particle_remembers_is_selected_with_it(monkeypatch):
    came, went, walk = [], [], GuidedChain._walk

    def spy(self, state, generator):
        out = walk(self, state, generator)
        came.append(state)
        went.append(out[0])
        return out

    monkeypatch.setattr(GuidedChain, "_walk", spy)
    chain = guided_chain(8, corrected=True)
    list(run(chain, 60, "g", Settings(generator=generator(3)), selection=Selection(60, threshold=1.0)))
    multiplied = 0
    for earlier, out, state in zip(came, went, came[1:], strict=False):
        # Every particle that steps on is one that the last step left, with all that belongs to it.
        same = (state.z[:, None] == out.z[None]).all(-1)
        assert (same.sum(1) == 1).all()
        ancestor = same.long().argmax(1)
        multiplied += len(ancestor) - len(ancestor.unique())
        for name in ("D", "before", "log_h", "k"):
            assert torch.equal(getattr(state, name), getattr(out, name)[ancestor]), name
        assert torch.equal(out.before, earlier.D)
    assert multiplied > 30


# Tracked densities ------------------------------------------------------------------------------------------------------------------


def gaussian(mean, c, d=3):
    return GaussianMixture(torch.full((1, d), float(mean)), c)


def weighted_draws(target, n=40_000, seed=0):
    """Draws from a wider Gaussian around a mean, with the log-weights that make them draws of the target's N(mean, c)."""
    mean, c = target
    z = mean + math.sqrt(2 * c) * randn(n, 3, seed=seed)
    square = ((z - mean) ** 2).sum(1)
    return z, -square / (2 * c) + square / (4 * c)


@pytest.mark.parametrize("v", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize(
    ("powers", "variances"), [((1.0,), (0.5,)), ((1.0, 1.0), (0.5, 1.2)), ((2.0, -0.5), (0.5, 1.2))], ids=str
)
def test_the_estimated_variance_of_a_denoised_image_is_the_exact_one_of_gaussians(powers, variances, mean, v):
    models, a = [gaussian(mean, c) for c in variances], torch.tensor(powers, dtype=torch.float64)
    c = torch.tensor(variances, dtype=torch.float64)
    z, log_w = weighted_draws((mean, float(1 / (a / (c + v)).sum())))
    D = torch.stack([model.denoise(z, math.sqrt(v)) for model in models], 1)
    own, composed = analytic_variance(z, D, a.expand(len(z), -1), log_w.softmax(0), torch.tensor(v).double())
    posterior = v * c / (c + v)  # of N(mean, c), seen through noise of variance v
    # No noise at all: of Gaussians both of Stein's identities are off by the same factor.
    torch.testing.assert_close(own, posterior, rtol=1e-6, atol=0)
    torch.testing.assert_close(composed, (a * posterior).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("c", [0.01, 0.5, 20.0])
@pytest.mark.parametrize(("v", "delta"), [(0.3, 0.1), (0.3, 0.29), (5.0, 4.0)])
def test_the_variance_of_a_step_is_that_of_the_exact_reverse_kernel_of_gaussians(c, v, delta):
    v, delta = (torch.tensor(x, dtype=torch.float64) for x in (v, delta))
    # x ~ N(m, c), z' = x + noise of variance v - delta, z = z' + noise of variance delta: what z leaves of z'.
    exact = 1 / (1 / (c + v - delta) + 1 / delta)
    assert float(kernel_variance(v * c / (c + v), v, delta)) == pytest.approx(float(exact))
    # An estimate beyond what is possible: a point, and no data at all.
    assert float(kernel_variance(torch.tensor(-1.0).double(), v, delta)) == pytest.approx(float((v - delta) * delta / v))
    assert float(kernel_variance(10 * v, v, delta)) == pytest.approx(float(delta))


@torch.no_grad()
def test_a_tracked_step_has_the_exact_variance_where_the_weights_say_that_the_particles_are():
    c, s, s_next, d = 0.5, 1.0, 0.3, 3
    mixture = gaussian(0.2, c)
    model = sculpt.EnergyModel(lambda z, s: -mixture.log_prob(z, s**2), (d,), s_min=0.01, name="gaussian")
    chain = TrackedChain(Product([1.0]), [model], Settings(steps=2))
    chain.levels = torch.tensor([s, s_next], dtype=torch.float64)
    z, log_w = weighted_draws((0.2, c + s**2))
    state, _ = chain._at(0, z, mixture.log_prob(z, s**2)[:, None], torch.zeros_like(log_w), log_w)
    delta = s**2 - s_next**2
    miss = chain.step(state, log_w, generator(1))[0].z - z - delta * mixture.score(z, s**2)
    exact = 1 / (1 / (c + s_next**2) + 1 / delta)
    assert float(miss.var()) == pytest.approx(exact, rel=5 * 2 * math.sqrt(2 / (d * len(z))))


def test_the_weights_of_one_model_tracked_by_itself_stay_one_to_the_last_digit():
    samples = sculpt.product([P], [1.0]).sample(
        200, sculpt.Tracked(particles=200), steps=12, generator=generator(), progress=False
    )
    assert samples.log_z == pytest.approx(0, abs=1e-9)
    assert samples.diagnostics.ess == pytest.approx([200.0] * 12, abs=1e-6)


@torch.no_grad()
def test_the_tracked_densities_of_gaussians_are_the_exact_ones_all_along():
    mixtures = [gaussian(-0.3, 0.5), gaussian(0.4, 0.9)]
    models = [exact_model(mixture, name=name) for mixture, name in zip(mixtures, "ab", strict=True)]
    chain, g = TrackedChain(Posterior(2, (0, 1)), models, Settings(steps=48)), generator(1)
    state, log_w = chain.start(4000, g)
    for s in chain.levels[1:]:
        state, increment = chain.step(state, log_w, g)
        log_w = log_w + increment
        exact = torch.stack([mixture.log_prob(state.z, s**2) for mixture in mixtures], -1)
        # The kernels of Gaussians are exact but for the means that the start does not know.
        assert (state.ell - exact).abs().mean() < 0.01


def divergence_of(mixture, z, v):
    """Of the score."""
    h = 1e-4 * math.sqrt(v)
    axes = h * torch.eye(z.shape[1], dtype=z.dtype)
    return sum((mixture.score(z + e, v) - mixture.score(z - e, v))[:, i] / (2 * h) for i, e in enumerate(axes))


@torch.no_grad()
@pytest.mark.parametrize("s", [0.2, 1.0])
@pytest.mark.parametrize(
    "formula",
    [Posterior(2, (0, 1)), Posterior(2, (0, 0), [0.3, 0.7]), Product([1.0, 1.0]), Product([1.5, -0.4]), PowerMean(-2, [1, 3])],
    ids=repr,
)
def test_in_the_limit_of_small_steps_the_weights_grow_as_the_scores_say(formula, s, monkeypatch):
    r"""By :math:`\tfrac12 [\|S\|^2 - \sum a_i \|S_i\|^2 + \sum H_{ij} \langle S_i, S_j \rangle] \delta` on average over the noise, and where the
    degree d is not one by :math:`\tfrac12 (1/d - 1) (\nabla \cdot S + \|S\|^2) \, \delta` more."""
    monkeypatch.setattr(tracked, "fade", lambda formula, beta: formula)
    chain = TrackedChain(formula, [P, Q], Settings(steps=2))
    v, delta, points, draws = s**2, 1e-4 * s**2, 4, 20_000
    chain.levels = torch.tensor([v, v - delta], dtype=torch.float64).sqrt()
    z = RINGS[0].draw(points, generator(2), v).repeat_interleave(draws, 0)
    xi = randn(points, draws // 2, 2, seed=3)
    monkeypatch.setattr(tracked, "randn", lambda *_: torch.cat([xi, -xi], 1).flatten(0, 1))  # odd terms cancel exactly
    ell = torch.stack([mixture.log_prob(z, v) for mixture in RINGS[:2]], -1)
    log_w = torch.zeros(len(z), dtype=torch.float64)
    _, increment = chain.step(chain._at(0, z, ell, log_w, log_w)[0], log_w, None)
    growth = increment.view(points, draws).mean(1) / delta
    first = slice(None, None, draws)
    S = torch.stack([mixture.score(z[first], v) for mixture in RINGS[:2]], 1)
    a, H = formula.gradient(ell[first]), formula.hessian(ell[first])
    drift, inner = torch.einsum("ni,nix->nx", a, S), torch.einsum("nix,njx->nij", S, S)
    divergence = torch.einsum("ni,ni->n", a, torch.stack([divergence_of(mixture, z[first], v) for mixture in RINGS[:2]], 1))
    divergence = divergence + torch.einsum("nij,nij->n", H, inner)
    expected = drift.square().sum(1) - torch.einsum("ni,nii->n", a, inner) + torch.einsum("nij,nij->n", H, inner)
    expected = expected + (1 / formula.degree - 1) * (divergence + drift.square().sum(1))
    torch.testing.assert_close(growth, expected / 2, rtol=0.05, atol=0.05 * float(inner.abs().max()))


# The drift that takes variance out of the weights -----------------------------------------------------------------------------------

APART = [GaussianMixture([[x, 0.0]], torch.tensor(1.0)) for x in (-1.0, 1.0)]


def normaliser(formula, mixtures, half_width=9.0, n=400):
    axis = ((torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1) * half_width
    points = torch.cartesian_prod(axis, axis)
    ell = torch.stack([mixture.log_prob(points) for mixture in mixtures], -1)
    return float(formula.value(ell).logsumexp(0)) + 2 * math.log(2 * half_width / n)


@pytest.mark.parametrize("theta", [(0.0, 0.0, 0.0, 0.0), (0.3, -0.2, 0.0, 0.0), (0.1, 0.0, 0.5, -0.4)])
def test_the_weights_of_a_path_are_right_whatever_drift_it_has(theta, monkeypatch):
    monkeypatch.setattr(Control, "learn", lambda control, *rest: control.theta.copy_(torch.tensor(theta)))
    p, q = (exact_model(mixture, name=name) for mixture, name in zip(APART, "pq", strict=True))
    found = (p & q).sample(10, sculpt.Tracked(particles=3000), steps=64, generator=generator(), progress=False)
    off = found.log_z - normaliser(Posterior(2, (0, 1)), APART)
    assert abs(off) < 3 * found.diagnostics.log_z_error < 0.4


def test_the_drift_leaves_more_families():
    rings = [exact_model(mixture, name=name) for mixture, name in zip(tight_rings(), "pqr", strict=True)]
    composition, families = sculpt.posterior(rings, (0, 1, 2)), []
    for least in (16, math.inf):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(control, "PARTICLES", least)
            found = composition.sample(10, sculpt.Tracked(particles=2000), steps=64, generator=generator(), progress=False)
        families.append(found.diagnostics.families)
    assert families[0] > 1.5 * families[1], families


def test_a_few_particles_have_no_drift():
    drift = Control(2, 63, torch.zeros(()))
    assert not drift.learns and Control(2, 64, torch.zeros(())).learns
    drift.learn(*(torch.randn(63, *shape) for shape in ((), (4, 2), (4, 2), (2,), (2,), ())))
    assert (drift.theta == 0).all()
